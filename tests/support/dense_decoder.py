"""A decoder's forward pass in plain fp64 torch, each mask written out: what a loss and its gradients should be."""

import torch
import torch.nn.functional as F


def parameters_of(model):
    """fp64 copies of a Decoder's parameters, by name, that take gradients."""
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def log_probs(config, parameters, ids, positions, visible):
    """Natural log-probabilities [T, V] of each row of one sequence: ids and positions [T], visible bool [T, T]."""

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * parameters[name]

    def linear(x, name):
        bias = parameters.get(f"{name}.bias")
        return x @ parameters[f"{name}.weight"].T + (0 if bias is None else bias)

    half = config.head_dim // 2
    angle = positions[:, None] / config.rope_theta ** (torch.arange(half, dtype=torch.float64) / half)

    def rotated(x):
        low, high = x[..., :half], x[..., half:]
        return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], dim=-1)

    x = parameters["model.embed_tokens.weight"][ids]
    groups = config.num_attention_heads // config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        y = norm(x, f"{at}input_layernorm.weight")
        q, k, v = (
            linear(y, f"{at}self_attn.{part}_proj").unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
            for part in "qkv"
        )
        k, v = k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0)
        scores = rotated(q) @ rotated(k).transpose(1, 2) * config.head_dim**-0.5
        mixed = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
        x = x + linear(mixed.transpose(0, 1).flatten(1), f"{at}self_attn.o_proj")
        y = norm(x, f"{at}post_attention_layernorm.weight")
        x = x + linear(F.silu(linear(y, f"{at}mlp.gate_proj")) * linear(y, f"{at}mlp.up_proj"), f"{at}mlp.down_proj")
    head = parameters.get("lm_head.weight", parameters["model.embed_tokens.weight"])
    return (norm(x, "model.norm.weight") @ head.T).log_softmax(-1)
