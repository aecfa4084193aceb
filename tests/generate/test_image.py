"""Sampling of images against a plain loop with diffusers' transformer and schedulers; seeds, guidance, errors."""

import dataclasses

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel

from eightfold.generate.image import SEEDS, ImageSampler
from eightfold.models.sana import Sana
from eightfold.models.sana_loading import sana_tensors
from plain_sana import TINY

PIXELS = dataclasses.replace(TINY, in_channels=3, out_channels=3)
SIZE = {"height": 6, "width": 4}
SCHEDULERS = {
    "flow-dpm": lambda shift: DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    ),
    "flow-euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
}


def tiny(precision="fp32", **changes):
    """A model that nothing can be left out of unnoticed: its guidance is not 0, its text is read."""
    torch.manual_seed(3)
    model = Sana(dataclasses.replace(PIXELS, **changes), precision)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.caption_norm.weight.fill_(1.0)
    return model


def texts(rows=3, tokens=6, negative_tokens=6, channels=PIXELS.caption_channels):
    """(text, mask, negative, negative_mask)"""
    generator = torch.Generator().manual_seed(5)
    text = torch.randn(rows, tokens, channels, generator=generator)
    mask = torch.ones(rows, tokens)
    mask[-1, 3:] = 0
    negative_mask = torch.zeros(1, negative_tokens)
    negative_mask[:, :2] = 1
    return text, mask, torch.randn(1, negative_tokens, channels, generator=generator), negative_mask


@torch.no_grad()
def plain_loop(model, noise, text, mask, negative, negative_mask, guidance, solver="flow-dpm", shift=3.0, steps=20):
    """diffusers' transformer, one call a text, and its scheduler."""
    peer = SanaTransformer2DModel.from_config(model.config.to_diffusers()).eval()
    peer.load_state_dict(sana_tensors(model))
    scheduler = SCHEDULERS[solver](shift)
    scheduler.set_timesteps(steps)
    x, config = noise, model.config
    embedded = torch.full((len(x),), guidance * config.guidance_embeds_scale) if config.guidance_embeds else None

    def velocity(time, text, mask):
        options = {"encoder_attention_mask": mask, "guidance": embedded}
        times = (time * config.timestep_scale).expand(len(x)).float()
        return peer(x, text.expand(len(x), -1, -1), times, **options).sample

    for time in scheduler.timesteps:
        towards = velocity(time, text, mask.expand(len(x), -1))
        if guidance != 1 and not config.guidance_embeds:
            away = velocity(time, negative, negative_mask.expand(len(x), -1))
            towards = away + guidance * (towards - away)
        x = scheduler.step(towards, time, x).prev_sample
    return x


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({}, {"guidance": 4.5, "steps": 20}),
        ({"qk_norm": True}, {"guidance": 4.5, "steps": 5, "solver": "flow-euler", "shift": 6.0}),
        ({"timestep_scale": 0.5, "patch_size": 2}, {"guidance": 1.0, "steps": 3}),
        ({"qk_norm": True, "guidance_embeds": True}, {"guidance": 4.5, "steps": 4, "shift": 1.5}),
        ({"interpolation_scale": 2.0}, {"guidance": 0.0, "steps": 1}),
    ],
    ids=["dpm", "euler", "no-pair", "embedded-guidance", "only-negative"],
)
def test_trajectory_is_a_plain_loop_with_diffusers(changes, given, device):
    model, inputs = tiny(**changes), texts()
    sampler = ImageSampler(model.to(device))
    seeds = [11, 4, 7]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        got = sampler.sample(*inputs, **SIZE, **given, seeds=seeds, as_latents=True)
    noise = torch.stack([sampler.noise(seed, (6, 4)) for seed in seeds])
    want = plain_loop(model.cpu(), noise, *inputs, **given)
    assert (got.dtype, got.device.type) == (torch.float32, device.type)
    tolerance = 3e-5 if device.type == "cpu" else 1e-3
    torch.testing.assert_close(got.cpu(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_graph_is_what_runs_without_one(precision, guidance, device):
    """On the CPU there is no graph, and the same step runs twice."""
    model = tiny(precision).to(device)
    graphs = device.type == "cuda"
    options = {**SIZE, "guidance": guidance, "steps": 6, "as_latents": True}
    sampler, eager = ImageSampler(model, cuda_graphs=graphs), ImageSampler(model, cuda_graphs=False)
    for seeds in ([1, 2, 3], [4, 5, 6]):
        assert torch.equal(
            sampler.sample(*texts(), **options, seeds=seeds), eager.sample(*texts(), **options, seeds=seeds)
        )
    for changed in ({"steps": 3}, {"guidance": guidance + 1}, {"shift": 6.0}, {"height": 8}):
        got, want = (engine.sample(*texts(), **{**options, **changed}) for engine in (sampler, eager))
        assert torch.equal(got, want)


def test_an_image_is_of_its_seed_and_text_alone():
    """Noise bit by bit; images but for what products of another number of rows do."""
    sampler, inputs = ImageSampler(tiny()), texts()
    options = {**SIZE, "steps": 4, "as_latents": True}
    together = sampler.sample(*inputs, **options, seeds=[8, 9, SEEDS - 1])
    for i, seed in enumerate([8, 9, SEEDS - 1]):
        alone = sampler.sample(inputs[0][i : i + 1], inputs[1][i : i + 1], *inputs[2:], **options, seeds=[seed])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)
    one = [x[:1] for x in inputs]
    many = sampler.sample(*one, **options, seeds=range(5), batch=5)
    parts = sampler.sample(*one, **options, seeds=range(5), batch=2)
    torch.testing.assert_close(parts, many, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(many[3:], sampler.sample(*one, **options, seeds=[3, 4]), rtol=1e-5, atol=1e-5)
    shared = sampler.sample(*inputs, **options, seeds=[0, 1, 8, 9, 4, 5], batch=4)  # two to each of three texts
    for i, seed in enumerate([0, 1, 8, 9, 4, 5]):
        own = inputs[0][i // 2 : i // 2 + 1], inputs[1][i // 2 : i // 2 + 1], *inputs[2:]
        torch.testing.assert_close(sampler.sample(*own, **options, seeds=[seed])[0], shared[i], rtol=1e-5, atol=1e-5)
    assert (many[0] - many[1]).abs().max() > 0.1
    assert torch.equal(sampler.sample(*one, **options, seeds=range(5), batch=5), many)
    assert torch.equal(sampler.noise(7, (4, 4)), torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(7)))


class RowwiseModel(Sana):
    """Its velocity is made of an image's own numbers, one by one, so that no batch can change a bit of it."""

    def velocity(self, latents, time, text):
        bent = torch.tanh(latents) * text.layers[-1][0][:, :1, :1, :1] + time.embedding[:, :3, None, None]
        return bent + text.bias[:, :, :, -1:]


def test_seeds_and_batches_bit_by_bit():
    """All that the sampler itself does, with a model in which nothing is summed over a batch."""
    torch.manual_seed(3)
    sampler, inputs = ImageSampler(RowwiseModel(PIXELS, "fp32")), texts()
    options = {**SIZE, "steps": 4, "as_latents": True, "guidance": 1.5}
    together = sampler.sample(*inputs, **options, seeds=[8, 9, 10])
    for i, seed in enumerate([8, 9, 10]):
        own = inputs[0][i : i + 1], inputs[1][i : i + 1], *inputs[2:]
        assert torch.equal(sampler.sample(*own, **options, seeds=[seed])[0], together[i])
    assert torch.equal(sampler.sample(*inputs, **options, seeds=[8, 9, 10], batch=2), together)


def test_guidance():
    """1 is the text alone, 0 the negative alone, and between and beyond them a line, in a single step from noise."""
    sampler, (text, mask, negative, negative_mask) = ImageSampler(tiny()), texts(1)
    options = {**SIZE, "steps": 1, "seeds": [3], "as_latents": True}
    made = {g: sampler.sample(text, mask, negative, negative_mask, guidance=g, **options) for g in (0, 1, 0.25, 3.0)}
    swapped = sampler.sample(negative, negative_mask, guidance=1, **options)
    torch.testing.assert_close(made[0], swapped, rtol=1e-5, atol=1e-5)
    for scale in (0.25, 3.0):
        torch.testing.assert_close(made[scale], made[0] + scale * (made[1] - made[0]), rtol=1e-4, atol=1e-5)
    assert (made[1] - made[0]).abs().max() > 0.01


def test_texts_of_two_lengths_and_states_made_before():
    sampler = ImageSampler(tiny())
    text, mask, negative, negative_mask = texts(2, tokens=6, negative_tokens=4)
    options = {**SIZE, "steps": 2, "as_latents": True}
    want = sampler.sample(text, mask, negative, negative_mask, **options)
    padded = torch.cat((negative, torch.ones(1, 2, 24)), dim=1), torch.cat((negative_mask, torch.zeros(1, 2)), dim=1)
    torch.testing.assert_close(sampler.sample(text, mask, *padded, **options), want, rtol=1e-5, atol=1e-5)
    whole = sampler.sample(text, None, negative, None, **options)
    ones = torch.cat((torch.ones(1, 4), torch.zeros(1, 2)), dim=1)
    given = sampler.sample(text, torch.ones(2, 6), padded[0], ones, **options)
    torch.testing.assert_close(whole, given, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        states = sampler.model.text_states(text, mask), None, sampler.model.text_states(*padded), None
    torch.testing.assert_close(sampler.sample(*states, **options), want, rtol=1e-5, atol=1e-5)


def test_weights_may_change_between_calls(device):
    """In place, as by an optimizer, and by other tensors."""
    model = tiny("bf16").to(device)
    sampler, options = ImageSampler(model), {**SIZE, "steps": 3, "as_latents": True}
    before = sampler.sample(*texts(), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = sampler.sample(*texts(), **options)
    assert not torch.equal(after, before)
    assert torch.equal(after, ImageSampler(model).sample(*texts(), **options))
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()}, assign=True)
    assert torch.equal(sampler.sample(*texts(), **options), ImageSampler(model).sample(*texts(), **options))


def test_pixels_and_decoders():
    sampler = ImageSampler(tiny())
    latents = torch.tensor([-3.0, -1.0, -0.5, 0.0, 1.0, 2.0]).view(1, 1, 2, 3).expand(1, 3, -1, -1)
    assert sampler.images(latents)[0, ..., 1].tolist() == [[0, 0, 64], [128, 255, 255]]
    options = {**SIZE, "steps": 2, "seeds": [0, 1]}
    want = sampler.images(sampler.sample(*texts(1), **options, as_latents=True))
    got = sampler.sample(*texts(1), **options)
    assert (got.dtype, tuple(got.shape)) == (torch.uint8, (2, 6, 4, 3))
    assert torch.equal(got, want)
    decoded = ImageSampler(sampler.model, lambda x: x.repeat_interleave(4, 2).repeat_interleave(4, 3), ratio=4)
    large = decoded.sample(*texts(1), **{**options, "height": 24, "width": 16})
    assert torch.equal(large[:, ::4, ::4], got)


def test_steps_are_told():
    told = []
    sampler = ImageSampler(tiny())
    sampler.sample(*texts(1), **SIZE, steps=2, seeds=range(3), batch=2, on_step=lambda *now: told.append(now))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"height": 6.0}, "height: expected a multiple of 2 pixels, got 6.0"),
        ({"width": 5}, "width: expected a multiple of 2 pixels, got 5"),
        ({"width": 0}, "width: expected a multiple of 2 pixels, got 0"),
        ({"solver": "dpm"}, "solver: expected one of flow-dpm, flow-euler, got 'dpm'"),
        ({"steps": 0}, "steps: expected 1 to 999, got 0"),
        ({"shift": -1.0}, "shift: expected 0.001 to 1000, got -1.0"),
        ({"guidance": float("nan")}, "guidance: expected a finite number, got nan"),
        ({"batch": 0}, "batch: expected 1 or more, got 0"),
        ({"negative": None}, "negative: expected a text to lead away from with guidance 4.5, got None"),
        ({"negative": torch.zeros(2, 3, 24)}, "negative: expected a number that divides 3 seeds, got 2"),
        ({"negative": torch.zeros(24)}, r"negative: expected embeddings \[N, T, 24\], not empty, got \(24,\)"),
        ({"text": torch.zeros(3, 2, 8)}, r"text: expected embeddings \[N, T, 24\], not empty, got \(3, 2, 8\)"),
        ({"text": torch.zeros(0, 2, 24)}, r"text: expected embeddings \[N, T, 24\], not empty, got \(0, 2, 24\)"),
        ({"mask": torch.ones(3, 5)}, r"mask: expected \(3, 6\) as of text, got \(3, 5\)"),
        ({"negative_mask": torch.ones(1)}, r"negative_mask: expected \(1, 6\) as of negative, got \(1,\)"),
        ({"seeds": [1, 2]}, "text: expected a number that divides 2 seeds, got 3"),
        ({"seeds": [1, 2, -1]}, "seeds: expected integers from 0 to 4294967295, got -1"),
        ({"seeds": [0, 1, 2**32]}, "seeds: expected integers from 0 to 4294967295, got 4294967296"),
        ({"seeds": []}, "seeds: expected integers from 0 to 4294967295, got none"),
    ],
)
def test_errors_name_the_argument(changes, line):
    text, mask, negative, negative_mask = texts()
    given = {"text": text, "mask": mask, "negative": negative, "negative_mask": negative_mask, **SIZE, "steps": 1}
    if "text" in changes or "negative" in changes:
        given["mask" if "text" in changes else "negative_mask"] = None
    with pytest.raises(ValueError, match=f"^{line}$"):
        ImageSampler(tiny(patch_size=2)).sample(**{**given, **changes})


def test_errors_of_models_and_decoders():
    with pytest.raises(ValueError, match="decode: expected one for latents of 4 channels, no pixels, got None"):
        ImageSampler(Sana(TINY))
    with pytest.raises(ValueError, match="model: expected out_channels 3 as in_channels, got 6"):
        ImageSampler(tiny(out_channels=6))
    with pytest.raises(ValueError, match="ratio: expected 1 without decode, got 8"):
        ImageSampler(tiny(), ratio=8)
    model = tiny()
    with pytest.raises(ValueError, match=r"decode: expected images \(1, 3, 64, 32\) of ratio 32, got \(1, 3, 2, 1\)"):
        ImageSampler(model, lambda x: x).sample(*texts(1), height=64, width=32, steps=1)
    states = model.text_states(*texts()[:2])
    with pytest.raises(ValueError, match="mask: expected None with states of a text, which have it, got a tensor"):
        ImageSampler(model).sample(states, torch.ones(3, 6), guidance=1, **SIZE)
    short = texts(negative_tokens=4)[2:]
    with pytest.raises(ValueError, match="text: expected states of 8 tokens as of the other, got 6"):
        ImageSampler(model).sample(states, None, torch.zeros(1, 8, 24), **SIZE)
    assert len(ImageSampler(model).sample(states, None, *short, **SIZE, steps=1)) == 3


def test_values_that_are_not_finite():
    """An error, of which nothing stays behind."""
    model = tiny()
    sampler = ImageSampler(model)
    want = sampler.sample(*texts(), **SIZE, steps=2)
    bias = model.proj_out.bias.detach().clone()
    with torch.no_grad():
        model.proj_out.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="sample: the model gave values that are not finite"):
        sampler.sample(*texts(), **SIZE, steps=2)
    with torch.no_grad():
        model.proj_out.bias.copy_(bias)
    assert torch.equal(sampler.sample(*texts(), **SIZE, steps=2), want)
