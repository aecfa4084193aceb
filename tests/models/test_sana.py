"""The SANA transformer against diffusers' and against plain torch in float64."""

import dataclasses

import pytest
import torch
from diffusers import SanaTransformer2DModel

from eightfold.models.precision import KeptWeights
from eightfold.models.sana import Sana, SanaConfig
from eightfold.models.sana_loading import build_sana, sana_tensors
from plain_sana import TINY, plain_sana


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


def shaken(model):
    """The model with all parameters moved, so that none of them can be dropped unnoticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(config, height=5, width=7, batch=2, masked=True):
    patch = config.patch_size
    made = {
        "latents": torch.randn(batch, config.in_channels, height * patch, width * patch),
        "timestep": torch.tensor([999.0, 371.5, 20.0])[:batch],
        "text": torch.randn(batch, 6, config.caption_channels),
        "text_mask": None,
    }
    if masked:
        made["text_mask"] = torch.ones(batch, 6)
        made["text_mask"][-1, 2:] = 0
    if config.guidance_embeds:
        made["guidance"] = torch.linspace(0.1, 0.45, batch)
    return made


def theirs(peer, given, dtype=torch.float32):
    latents, timestep, text, mask, *guidance = (None if x is None else x.to(dtype) for x in given.values())
    options = {"encoder_attention_mask": mask, "guidance": guidance[0] if guidance else None}
    return peer(latents, text, timestep, **options).sample


# ---- against diffusers ----

CASES = {
    "plain": (tiny(), {"height": 4, "width": 4, "masked": False}),
    "mask": (tiny(), {"height": 4, "width": 4}),
    "not-square": (tiny(), {}),
    "one-token": (tiny(), {"height": 1, "width": 1, "batch": 1}),
    "qk-norm": (tiny(qk_norm=True), {}),
    "guidance": (tiny(qk_norm=True, guidance_embeds=True), {}),
    "positions": (tiny(interpolation_scale=2.0), {"height": 4, "width": 4}),
    "positions-not-square": (tiny(interpolation_scale=1.0), {}),
    "patches": (tiny(patch_size=2, sample_size=8, interpolation_scale=1.0, out_channels=3), {}),
    "ffn-width": (tiny(mlp_ratio=1.7, norm_eps=1e-3), {}),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_diffusers(case):
    config, sizes = CASES[case]
    peer = shaken(SanaTransformer2DModel.from_config(config.to_diffusers()).eval())
    model = build_sana(config, dict(peer.state_dict()), "fp32")
    given = inputs(config, **sizes)
    want = theirs(peer, given)
    got = model(**given)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "millions"),
    [
        ("0.6B", {}, 591.7),
        ("1.6B", {}, 1604.5),
        ("1.6B-1.5", {}, 1604.6),
        ("4.8B", {}, 4721.8),
        ("1.6B-1.5", {"guidance_embeds": True}, 1610.2),
    ],
)
def test_released_sizes(name, changes, millions):
    config = SanaConfig.named(name, **changes)
    with torch.device("meta"):
        model, peer = Sana(config), SanaTransformer2DModel.from_config(config.to_diffusers())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 1) == millions
    assert {n: t.shape for n, t in sana_tensors(model).items()} == {n: t.shape for n, t in peer.state_dict().items()}


# ---- gradients and precisions ----


def gradients(model, given):
    """Of the sum of the velocity's squares: of the latents, the text, and every parameter under diffusers' name."""
    model.zero_grad()
    leaves = [given[name].clone().requires_grad_() for name in ("latents", "text")]
    model(**{**given, "latents": leaves[0], "text": leaves[1]}).square().sum().backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    holder = build_sana(model.config, sana_tensors(model), "fp32")
    with torch.no_grad():
        for name, parameter in holder.named_parameters():
            parameter.data = named[name]
    return {"latents": leaves[0].grad, "text": leaves[1].grad, **sana_tensors(holder)}


def plain_gradients(model, given):
    tensors = {n: t.double().clone().requires_grad_() for n, t in sana_tensors(model).items()}
    given = {n: None if x is None else x.double() for n, x in given.items()}
    leaves = {n: given[n].requires_grad_() for n in ("latents", "text")}
    plain_sana(tensors, model.config, **given).square().sum().backward()
    return {n: x.grad for n, x in {**leaves, **tensors}.items()}


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "guidance_embeds": True}], ids=["plain", "guidance"])
def test_gradients_are_those_of_plain_torch_in_float64(changes, checkpoint_blocks):
    model = shaken(Sana(tiny(**changes), "fp32", checkpoint_blocks))
    given = inputs(model.config)
    given["timestep"] = torch.tensor([0.9, 0.2])  # angles of larger ones are exact to 1e-4 in float32
    want = plain_gradients(model, given)
    got = gradients(model, given)
    assert got.keys() == want.keys()
    for name, grad in got.items():
        assert (grad - want[name]).norm() <= 1e-5 * want[name].norm() + 1e-5, (
            name
        )  # a gradient may be 0, as of to_k.bias


@torch.no_grad()
def test_bf16_is_as_near_to_float64_as_diffusers_in_bf16():
    config = tiny(qk_norm=True, num_layers=4)
    peer = shaken(SanaTransformer2DModel.from_config(config.to_diffusers()).eval()).to(torch.bfloat16)
    model, given = build_sana(config, dict(peer.state_dict())), inputs(config, 16, 16)
    exact = {n: None if x is None else x.double() for n, x in given.items()}
    want = plain_sana({n: t.double() for n, t in peer.state_dict().items()}, config, **exact)
    error = (model(**given) - want).norm()
    assert error <= 1.1 * (theirs(peer, given, torch.bfloat16) - want).norm()
    assert error <= 0.02 * want.norm()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_fp8(qk_norm, device):
    config = tiny(qk_norm=qk_norm)
    model = Sana(config, "fp32").to(device)
    fp8 = build_sana(config, sana_tensors(model), "fp8")
    given = {n: x.to(device) for n, x in inputs(config, 16, 16).items()}
    got, want = gradients(fp8, given), gradients(model, given)
    with torch.no_grad():
        assert torch.cosine_similarity(fp8(**given).flatten(), model(**given).flatten(), dim=0) > 0.9995
    for name, grad in got.items():
        if want[name].norm() > 1e-3:  # without norms of keys the text's key biases have none
            assert torch.cosine_similarity(grad.flatten(), want[name].flatten(), dim=0) > 0.98, name
        else:
            assert grad.norm() < 0.1, name


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@torch.no_grad()
def test_constant_weights_are_read_once(precision):
    model, given = Sana(tiny(qk_norm=True), precision), inputs(TINY)
    want = model(**given)
    with model.compute.constant_weights():
        first = model(**given)
        for layer in (model.transformer_blocks[0].ff.conv_inverted, model.proj_out):
            layer.weight.data.mul_(2)
        assert torch.equal(model(**given), first)
    torch.testing.assert_close(first, want, rtol=0.02, atol=0.02)
    assert (model(**given) - want).norm() > 0.5 * want.norm()


@torch.no_grad()
def test_products_of_image_tokens_are_fp8_and_no_others():
    model, kept = Sana(tiny(num_layers=1), "fp8"), KeptWeights(torch.bfloat16)
    with model.compute.constant_weights(kept):
        model(**inputs(TINY))
    names = {module: name for name, module in model.named_modules()}
    fp8 = "attn1.qkv attn1.to_out attn2.to_q attn2.to_out ff.conv_inverted ff.conv_point"
    assert {names[layer] for layer in kept.codes} == {f"transformer_blocks.0.{name}" for name in fp8.split()}


@torch.no_grad()
def test_states_made_before_give_the_same_bits():
    model = Sana(tiny(guidance_embeds=True), "bf16")
    given = inputs(model.config)
    time = model.time_states(given["timestep"], given["guidance"])
    text = model.text_states(given["text"], given["text_mask"])
    assert torch.equal(model.velocity(given["latents"], time, text), model(**given))


@torch.no_grad()
def test_pictures_of_a_batch_do_not_mix():
    model, given = shaken(Sana(tiny(qk_norm=True), "fp32")), inputs(TINY, batch=3)
    whole = model(**given)
    for i in range(3):
        alone = model(**{name: x[i : i + 1] for name, x in given.items()})
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_text_that_is_all_padding():
    model, given = Sana(TINY, "fp32"), inputs(TINY)
    given["text_mask"][0] = 0
    assert model(**given).isfinite().all()


def test_compiles_whole():
    model = Sana(tiny(num_layers=1, qk_norm=True), "fp8")
    given = inputs(model.config)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**given), model(**given))


# ---- errors ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers: expected a positive integer, got 0"),
        ({"patch_size": 1.0}, "patch_size: expected a positive integer, got 1.0"),
        ({"mlp_ratio": -1}, "mlp_ratio: expected a positive number, got -1"),
        ({"mlp_ratio": 0.001}, "mlp_ratio: expected at least 1 / the width 32, got 0.001"),
        ({"qk_norm": "rms"}, "qk_norm: expected true or false, got 'rms'"),
        ({"interpolation_scale": 0.0}, "interpolation_scale: expected a positive number, got 0.0"),
        ({"cross_attention_head_dim": 8}, r"cross_attention_head_dim: expected the width 32 .* / 2 heads, got 8"),
    ],
)
def test_config_errors_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_positions_need_quarters_of_the_width():
    sizes = {"attention_head_dim": 2, "num_attention_heads": 3, "cross_attention_head_dim": 3}
    assert tiny(**sizes).width == 6
    with pytest.raises(
        ValueError, match="interpolation_scale: expected None unless the width is a multiple of 4, got 6"
    ):
        tiny(**sizes, interpolation_scale=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": "rms_norm"}, "qk_norm: expected null or 'rms_norm_across_heads', got 'rms_norm'"),
        ({"attention_bias": True}, "attention_bias: expected False, got True"),
        ({"cross_attention_dim": None}, "cross_attention_dim: expected the width 32, got None"),
        ({"rope": 1}, "rope: unknown key"),
        ({"_class_name": "PixArtTransformer2DModel"}, "_class_name: expected 'SanaTransformer2DModel'"),
    ],
)
def test_diffusers_config_errors_name_the_key(changes, message):
    with pytest.raises(ValueError, match=message):
        SanaConfig.from_diffusers({**TINY.to_diffusers(), **changes})


def test_unknown_name():
    with pytest.raises(ValueError, match=r"name: expected one of 0.6B, 1.6B, 1.6B-1.5, 4.8B, got '2B'"):
        SanaConfig.named("2B")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "latents",
            torch.zeros(2, 3, 4, 4),
            r"latents: expected floating point \[B, 4, H, W\], got torch.float32 \(2, 3",
        ),
        ("latents", torch.zeros(2, 4, 4), r"latents: expected floating point \[B, 4, H, W\]"),
        (
            "latents",
            torch.zeros(2, 4, 3, 4),
            r"latents: expected H and W multiples of 2, not empty, got \(2, 4, 3, 4\)",
        ),
        ("latents", torch.zeros(3, 4, 4, 4), "timestep: expected the batch of latents, 3, got 2"),
        ("timestep", torch.tensor(3.0), r"timestep: expected \[B\], got \(\)"),
        ("text", torch.zeros(2, 6, 23), r"text: expected \[B, T, 24\], got \(2, 6, 23\)"),
        ("text", torch.zeros(1, 6, 24), r"text_mask: expected \(1, 6\) as of text, got \(2, 6\)"),
        ("text_mask", torch.zeros(2, 5), r"text_mask: expected \(2, 6\) as of text, got \(2, 5\)"),
        ("guidance", torch.zeros(2), "guidance: expected None, as guidance_embeds is False"),
    ],
)
def test_argument_errors(name, value, message):
    model = Sana(tiny(patch_size=2), "fp32")
    with pytest.raises(ValueError, match=message):
        model(**{**inputs(model.config, 2, 2), name: value})


def test_guidance_is_asked_for():
    model = Sana(tiny(guidance_embeds=True), "fp32")
    with pytest.raises(ValueError, match=r"guidance: expected a tensor \[B\], as guidance_embeds is True"):
        model(**{**inputs(model.config), "guidance": None})


def test_fp8_sizes():
    with pytest.raises(ValueError, match=r"precision: 'fp8' takes a width and an FFN width that are .* got 32 and 54"):
        Sana(tiny(mlp_ratio=1.7), "fp8")
    with pytest.raises(ValueError, match="precision: expected one of fp32, bf16, fp8, got 'fp4'"):
        Sana(TINY, "fp4")
