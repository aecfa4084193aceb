"""nn.convert on torch and transformers models."""

import copy

import pytest
import torch
from torch import nn

from eightfold.nn import FP8Linear, FP8RMSNorm, FP8SwiGLU, convert

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 48,
    "max_position_embeddings": 64,
}


def make(kind, **options):
    config = getattr(transformers, f"{kind}Config")(
        **{**SIZES, **({"head_dim": 16} if kind == "Qwen3" else {}), **options}
    )
    torch.manual_seed(3)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def kinds(model):
    return [type(m).__name__ for m in model.modules()]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_transformers_model_converts_and_trains(device, kind, tied):
    model = make(kind, tie_word_embeddings=tied).to(device)
    plain = copy.deepcopy(model)
    before = dict(model.named_parameters(remove_duplicate=False))
    keys = list(model.state_dict())
    assert convert(model) is model
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(model.state_dict()) == keys
    assert all(after[name] is before[name] for name in before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    report = model.conversion_report
    assert (len(report.linears), len(report.norms), len(report.mlps)) == (8, 5, 2)
    assert report.left == {}
    assert str(report) == "8 linears, 5 norms, 2 gated MLPs converted"
    assert type(model.lm_head) is nn.Linear
    assert "FP8RMSNorm" not in [type(m).__name__ for n, m in model.named_modules() if "q_norm" in n or "k_norm" in n]
    assert model.model.layers[0].self_attn.o_proj.save == "input"

    ids = torch.randint(0, 48, (4, 24), device=device)
    losses = {}
    for name, net in (("fp8", model), ("plain", plain)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        losses[name] = []
        for _ in range(12):
            loss = net(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(float(loss.detach()))
    assert losses["fp8"][0] == pytest.approx(losses["plain"][0], rel=0.02)
    assert losses["fp8"][-1] < 0.7 * losses["fp8"][0]
    assert losses["fp8"][-1] == pytest.approx(losses["plain"][-1], rel=0.1)


def test_generate_with_cached_weights(device):
    model = convert(make("Llama").to(device), cache_weights=True).eval()
    assert all(m.cache_weight for m in model.modules() if isinstance(m, FP8Linear))
    ids = torch.randint(0, 48, (1, 5), device=device)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 11)
    assert torch.equal(out, model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))


def test_include_and_exclude(device):
    model = convert(make("Llama").to(device), include=["*.layers.1.*"], exclude=["*.k_proj", "*.layers.1.mlp.up_proj"])
    report = model.conversion_report
    prefix = "model.layers.1."
    assert report.linears == [
        prefix + n
        for n in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    assert report.norms == [prefix + "input_layernorm", prefix + "post_attention_layernorm"]
    assert report.mlps == []
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear


def test_including_the_projections_fuses_the_mlp(device):
    report = convert(make("Llama").to(device), include=["*.mlp.*_proj"]).conversion_report
    assert report.mlps == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert not report.norms
    assert not report.linears


def test_a_pattern_that_matches_nothing_raises():
    with pytest.raises(ValueError, match=r"'\*\.qproj' matched no convertible module"):
        convert(make("Llama"), include=["*.mlp", "*.qproj"])
    with pytest.raises(ValueError, match=r"matched no convertible module; left: 0 \(.*10.*20.*multiples of 16\)"):
        convert(nn.Sequential(nn.Linear(10, 20)), include=["0"])


def test_sizes_and_modules_that_do_not_fit_are_left_and_reported(device):
    class Lora(nn.Linear):
        pass

    hooked = nn.Linear(32, 32)
    hooked.register_forward_hook(lambda *a: None)
    layers = [nn.Linear(32, 32), nn.Linear(32, 20), Lora(32, 32), hooked, nn.Linear(32, 32).half()]
    norms = [nn.RMSNorm(32), nn.RMSNorm(32, 1e-5), nn.RMSNorm((4, 32), 1e-5), nn.RMSNorm(32, 1e-5, False)]
    model = convert(nn.Sequential(*layers, *norms, nn.LayerNorm(32)).to(device))
    report = model.conversion_report
    assert report.linears == ["0"]
    assert report.norms == ["6"]
    reasons = {
        "1": "in_features 32 and out_features 20 must be multiples of 16",
        "2": "Lora is a subclass of Linear",
        "3": "has hooks",
        "4": "weight is torch.float16, neither float32 nor bfloat16",
        "5": "needs a 1-D weight and a fixed eps",
        "7": "needs a 1-D weight and a fixed eps",
        "8": "needs a 1-D weight and a fixed eps",
    }
    assert report.left == reasons
    assert "left 1: in_features 32" in str(report)


def test_other_formulas_under_the_same_names_are_left(device):
    """Gemma's norm multiplies by 1 + weight and its MLP uses GELU."""
    config = transformers.GemmaConfig(**SIZES, head_dim=16)
    model = convert(transformers.GemmaForCausalLM(config).to(device))
    report = model.conversion_report
    assert not report.norms
    assert not report.mlps
    assert len(report.linears) == 14
    assert set(report.left.values()) == {"GemmaRMSNorm does not compute x / rms(x) * weight"}


def test_an_mlp_with_biases_keeps_them(device):
    model = convert(make("Llama", mlp_bias=True).to(device))
    assert len(model.conversion_report.linears) == 14
    assert model.model.layers[0].mlp.down_proj.bias is not None
    assert type(model.model.layers[0].mlp.down_proj) is FP8Linear


def test_a_module_in_two_places_stays_one(device):
    shared, norm = nn.Linear(32, 32), nn.RMSNorm(32, 1e-5)
    model = convert(nn.Sequential(shared, norm, shared, nn.ModuleList([norm])).to(device))
    assert model[0] is model[2]
    assert model[1] is model[3][0]
    assert type(model[0]) is FP8Linear
    assert type(model[1]) is FP8RMSNorm


def test_the_model_may_be_one_layer(device):
    linear = nn.Linear(32, 48, device=device)
    ours = convert(linear)
    assert type(ours) is FP8Linear
    assert ours.weight is linear.weight
    assert ours.conversion_report.linears == [""]


def test_converting_twice_changes_nothing():
    model = convert(make("Llama"))
    before = kinds(model)
    again = convert(model)
    assert kinds(again) == before
    assert not again.conversion_report.linears


def test_meta_model_converts():
    with torch.device("meta"):
        model = make("Llama")
        convert(model)
    assert sum(isinstance(m, FP8SwiGLU) for m in model.modules()) == 2
    assert all(p.is_meta for p in model.parameters())


def test_random_state_is_left_alone():
    model = make("Llama")
    state = torch.get_rng_state()
    convert(model)
    assert torch.equal(torch.get_rng_state(), state)
