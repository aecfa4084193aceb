"""SANA written out in plain torch, in the layout of its papers (channels before rows and columns), in the dtype of its
tensors: what `eightfold.models.Sana` is held against where diffusers computes in float32."""

import math

import torch
import torch.nn.functional as F

from eightfold.models.sana_config import SanaConfig

TINY = SanaConfig(
    num_layers=2,
    num_attention_heads=4,
    attention_head_dim=8,
    num_cross_attention_heads=2,
    cross_attention_head_dim=16,
    caption_channels=24,
    in_channels=4,
    out_channels=4,
    sample_size=4,
)


def plain_sana(tensors, config, latents, timestep, text, text_mask=None, guidance=None):
    """The velocity; `tensors` have diffusers' names. Without positional embedding and patches."""

    def linear(x, name):
        weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        return F.linear(x, weight.flatten(1), bias)

    def rms(x, name, eps=1e-5):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * tensors[f"{name}.weight"]

    def norm(x, shift, scale, eps):
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * (1 + scale) + shift

    def wave(values, name):
        angles = values[:, None] * 10000 ** (-torch.arange(128, dtype=values.dtype) / 128)
        hidden = F.silu(linear(torch.cat([angles.cos(), angles.sin()], -1), f"{name}.linear_1"))
        return linear(hidden, f"{name}.linear_2")

    emb = "time_embed." if config.guidance_embeds else "time_embed.emb."
    state = wave(timestep, f"{emb}timestep_embedder")
    if guidance is not None:
        state = state + wave(guidance, "time_embed.guidance_embedder")
    modulation = linear(F.silu(state), "time_embed.linear").unflatten(-1, (6, -1))
    text = F.gelu(linear(text, "caption_projection.linear_1"), approximate="tanh")
    text = rms(linear(text, "caption_projection.linear_2"), "caption_norm")
    bias = 0 if text_mask is None else (1 - text_mask.to(text.dtype))[:, None, None] * -10000

    batch, _, height, width = latents.shape
    x = linear(latents.permute(0, 2, 3, 1).flatten(1, 2), "patch_embed.proj")
    for i in range(config.num_layers):
        block = f"transformer_blocks.{i}"
        table = (tensors[f"{block}.scale_shift_table"] + modulation).unbind(1)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = (row[:, None] for row in table)

        u = norm(x, shift, scale, config.norm_eps)
        q, k, v = (linear(u, f"{block}.attn1.to_{name}") for name in "qkv")
        if config.qk_norm:
            q, k = rms(q, f"{block}.attn1.norm_q"), rms(k, f"{block}.attn1.norm_k")
        q, k, v = (y.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2) for y in (q, k, v))
        weights = q.relu() @ k.relu().mT
        mixed = weights @ v / (weights.sum(-1, keepdim=True) + config.attention_eps)
        x = x + gate * linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn1.to_out.0")

        q, k, v = (linear(y, f"{block}.attn2.to_{name}") for y, name in ((x, "q"), (text, "k"), (text, "v")))
        if config.qk_norm:
            eps = config.cross_norm_eps
            q, k = rms(q, f"{block}.attn2.norm_q", eps), rms(k, f"{block}.attn2.norm_k", eps)
        q, k, v = (y.unflatten(-1, (config.num_cross_attention_heads, -1)).transpose(1, 2) for y in (q, k, v))
        mixed = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn2.to_out.0")

        u = linear(norm(x, shift_ff, scale_ff, config.norm_eps), f"{block}.ff.conv_inverted")
        u = F.silu(u).transpose(1, 2).unflatten(-1, (height, width))
        weight, conv_bias = tensors[f"{block}.ff.conv_depth.weight"], tensors[f"{block}.ff.conv_depth.bias"]
        value, g = F.conv2d(u, weight, conv_bias, padding=1, groups=len(weight)).chunk(2, dim=1)
        hidden = (value * F.silu(g)).flatten(2).transpose(1, 2)
        x = x + gate_ff * linear(hidden, f"{block}.ff.conv_point")

    shift, scale = (tensors["scale_shift_table"] + state[:, None]).unbind(1)
    out = linear(norm(x, shift[:, None], scale[:, None], 1e-6), "proj_out")
    return out.transpose(1, 2).reshape(batch, -1, height, width)
