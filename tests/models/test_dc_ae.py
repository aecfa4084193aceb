import diffusers
import pytest
import torch
from torch import nn

from dc_ae_models import CONFIGS, RESNET, SMALL, assert_close, random_model, random_peer
from eightfold.models import DCAE, SANA_F32C32, Tiling
from eightfold.models.dc_ae import INDEX_LIMIT, largest_tensor
from eightfold.models.dc_ae_blocks import Upsample, relu_attention
from eightfold.models.dc_ae_loading import build_dc_ae
from eightfold.models.dc_ae_names import diffusers_layout
from eightfold.models.tiles import spans


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


# ---- Against diffusers ----


# 8 pixels are 2 x 2 latents, fewer than a head's channels: the quadratic form.
@pytest.mark.parametrize("size", [(32, 32), (8, 8), (24, 40)])
@torch.no_grad()
def test_equals_diffusers(config, size, device):
    peer = random_peer(config).to(device)
    model = build_dc_ae(config, peer.state_dict()).to(device)
    images = torch.randn(2, 3, *size, device=device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        theirs = peer.encode(images).latent
        assert_close(model.encode(images), theirs * config.scaling_factor)
        assert_close(model.decode(theirs * config.scaling_factor), peer.decode(theirs).sample)
        assert_close(model(images), peer(images).sample)


@torch.no_grad()
def test_bfloat16_is_as_near_as_diffusers():
    peer = random_peer(SMALL)
    model = build_dc_ae(SMALL, peer.state_dict(), torch.bfloat16)
    images = torch.randn(2, 3, 32, 48).bfloat16()
    exact = peer.encode(images.float()).latent
    image = peer.decode(exact).sample
    peer.bfloat16()
    rounded = exact.bfloat16()

    def error(ours, reference):
        return (ours.float() - reference).square().mean().sqrt()

    ours, theirs = model.encode(images) / SMALL.scaling_factor, peer.encode(images).latent
    assert 0 < error(ours, exact) <= 1.2 * error(theirs, exact)
    ours, theirs = model.decode(exact * SMALL.scaling_factor), peer.decode(rounded).sample
    assert ours.dtype == torch.bfloat16
    assert 0 < error(ours, image) <= 1.2 * error(theirs, image)


def test_gradients_equal_diffusers(config):
    """Of the reconstruction's error, in training mode, through every parameter."""
    peer = random_peer(config).train()
    model = build_dc_ae(config, peer.state_dict()).train()
    images = torch.randn(2, 3, 32, 24)
    (model(images) - images).square().mean().backward()
    (peer(images).sample - images).square().mean().backward()
    theirs = {name: parameter.grad for name, parameter in peer.named_parameters()}
    for name, parameter in model.named_parameters():
        parts = diffusers_layout(name, tuple(parameter.shape))
        assert_close(parameter.grad, torch.cat([theirs.pop(part) for part in parts]), 1e-4)
    assert not theirs


def test_sana_autoencoder_is_the_released_one():
    """Names, shapes and parameters of dc-ae-f32c32-sana-1.0 and 1.1."""
    with torch.device("meta"):
        model = DCAE(SANA_F32C32)
        peer = diffusers.AutoencoderDC.from_config(SANA_F32C32.to_diffusers())
    parameters = [sum(p.numel() for p in m.parameters()) for m in (model, model.encoder, model.decoder)]
    assert parameters == [312_250_275, 153_027_104, 159_223_171]
    stored = {}
    for name, tensor in model.state_dict().items():
        stored |= diffusers_layout(name, tuple(tensor.shape))
    assert stored == {name: tuple(tensor.shape) for name, tensor in peer.state_dict().items()}


# ---- Attention ----


@pytest.mark.parametrize("tokens", [1, 8, 9, 70])
def test_relu_attention(tokens):
    """Against the definition in fp64; below and above the head's 8 channels, where the form changes."""
    qkv = torch.randn(2, tokens, 3 * 24)
    qkv[:, 0, :8] = -1  # a query of no weight
    out = relu_attention(qkv, 8)
    for head in range(3):
        q, k, v = qkv.double()[..., 24 * head : 24 * (head + 1)].split(8, dim=-1)
        weights = q.relu() @ k.relu().mT
        expected = weights @ v / (weights.sum(-1, keepdim=True) + 1e-15)
        torch.testing.assert_close(out[..., 8 * head : 8 * (head + 1)].double(), expected, rtol=1e-4, atol=1e-6)
    assert not out[:, 0, :8].any()
    assert torch.equal(relu_attention(qkv.bfloat16(), 8), relu_attention(qkv.bfloat16().float(), 8).bfloat16())


# ---- Upsampling ----


@pytest.mark.parametrize(("width", "shortcut"), [(6, True), (12, True), (48, True), (6, False)])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 5)])
def test_upsampling_by_phases(size, width, shortcut, device):
    """Without a gradient windows of 2 x 2 take the place of a 3x3 over twice the pixels."""
    layer = Upsample(12, width, "interpolate", shortcut).to(device)
    x = torch.randn(2, 12, *size, device=device).to(memory_format=torch.channels_last)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        want = layer(x)
        with torch.no_grad():
            out = layer(x)
    assert want.requires_grad
    assert out.shape == (2, width, 2 * size[0], 2 * size[1])
    assert out.stride() == want.stride()
    torch.testing.assert_close(out, want.detach(), rtol=1e-5, atol=1e-5)


# ---- Memory layout and tiles ----


@torch.no_grad()
def test_convolutions_stay_channels_last(config):
    """No convolution reads, writes or weighs with another layout, so none is transposed on its way."""
    model, bad = random_model(config), []

    def check(name):
        def hook(module, inputs, out):
            tensors = (*inputs, out, module.weight)
            bad.extend(name for x in tensors if not x.is_contiguous(memory_format=torch.channels_last))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(check(name))
    assert model(torch.randn(2, 3, 24, 40)).is_contiguous(memory_format=torch.channels_last)
    assert not bad


def test_4096_pixels_stay_below_the_index_limit():
    """The whole model on a device that only counts: five tiles of 29 x 32 latents, no tensor of 2^31 elements."""
    with torch.device("meta"):
        model = DCAE(SANA_F32C32).bfloat16()
    seen = {"encoder": 0, "decoder": 0}
    for side in seen:

        def count(module, inputs, out, side=side):
            seen[side] = max(seen[side], out.numel(), *(x.numel() for x in inputs))

        for module in getattr(model, side).modules():
            module.register_forward_hook(count)
    latents = model.encode(torch.empty(1, 3, 4096, 1024, device="meta"))
    assert latents.shape == (1, 32, 128, 32)
    assert model.decode(latents).shape == (1, 3, 4096, 1024)
    for side, elements in seen.items():
        assert elements == 928 * 1024 * largest_tensor(SANA_F32C32, side) < INDEX_LIMIT
    latents = torch.empty(1, 32, 128, 128, device="meta")
    with pytest.raises(ValueError, match=r"tiling: expected one with .* less than 2\^31 elements, got 4,294,967,296"):
        model.decode(latents, tiling=None)
    with pytest.raises(ValueError, match=r"tile: expected one with which this decoder's .*, got 4,294,967,296"):
        model.decode(latents, Tiling(4096, 4096))


@torch.no_grad()
def test_one_tile_is_exact():
    model = random_model(SMALL)
    images = torch.randn(1, 3, 64, 48)
    latents = model.encode(images, None)
    assert torch.equal(model.encode(images), latents)
    assert torch.equal(model.encode(images, Tiling(64, 48)), latents)
    assert torch.equal(model.decode(latents), model.decode(latents, None))
    assert torch.equal(model.decode(latents, Tiling(64, 32)), model.decode(latents, None))


@torch.no_grad()
def test_tiles_equal_the_whole_away_from_seams():
    """Without attention a pixel depends on 6 latents around it: the 8 that tiles share hide their edges."""
    model = random_model(RESNET)
    latents = torch.randn(2, 4, 52, 40)
    tiled, whole = model.decode(latents, Tiling(128, 96)), model.decode(latents, None)
    keep = [torch.ones(4 * size, dtype=torch.bool) for size in (52, 40)]
    for mask, size in zip(keep, (52, 40)):
        tiles = spans(size, 32, 8)
        assert len(tiles) == 2
        mask[4 * tiles[1][0] : 4 * tiles[0][1]] = False
    inside = keep[0][:, None] & keep[1]
    assert inside.float().mean() > 0.4
    assert_close(tiled[..., inside], whole[..., inside])
    assert not torch.equal(tiled, whole)
    assert_close(tiled, whole, 0.5)

    images = torch.randn(1, 3, 208, 160)
    tiled, whole = model.encode(images, Tiling(128, 96)), model.encode(images, None)
    inside = inside[::4, ::4]
    assert_close(tiled[..., inside], whole[..., inside])
    assert not torch.equal(tiled, whole)


@torch.no_grad()
def test_seams_are_continuous():
    """Attention sees a tile, so tiles differ everywhere; the blend lies between them, and from pixel to pixel it steps
    no further than they do, plus their difference over the width of the overlap."""
    model = random_model(SMALL)
    latents = torch.randn(1, 4, 16, 28)
    a, b = (model.decode(latents[..., part], None) for part in (slice(0, 16), slice(12, 28)))
    out = model.decode(latents, Tiling(64, 48))
    left, right, shared = a[..., 48:], b[..., :16], out[..., 48:64]
    assert (left - right).abs().max() > 0.01
    slack = 1e-5 * out.abs().max()
    assert (shared >= torch.minimum(left, right) - slack).all()
    assert (shared <= torch.maximum(left, right) + slack).all()
    assert torch.equal(out[..., :48], a[..., :48])
    assert torch.equal(out[..., 64:], b[..., 16:])

    steps = out.diff(dim=-1).abs()[..., 47:64]
    own = torch.zeros_like(steps)
    own[..., :16] = a.diff(dim=-1).abs()[..., 47:]
    own[..., 1:] = torch.maximum(own[..., 1:], b.diff(dim=-1).abs()[..., :16])
    apart = (left - right).abs() / 16
    apart = torch.maximum(nn.functional.pad(apart, (1, 0)), nn.functional.pad(apart, (0, 1)))
    assert (steps <= own + apart + slack).all()


def test_wrong_input():
    model = random_model(SMALL)
    with pytest.raises(ValueError, match=r"images: expected height and width in multiples of 4, got \(1, 3, 8, 10\)"):
        model.encode(torch.randn(1, 3, 8, 10))
    for images in (torch.randn(1, 1, 8, 8), torch.randn(3, 8, 8), torch.randn(1, 3, 0, 8)):
        with pytest.raises(ValueError, match=r"images: expected \[B, 3, H, W\], got"):
            model.encode(images)
    with pytest.raises(ValueError, match=r"latents: expected \[B, 4, H, W\], got \(1, 3, 2, 2\)"):
        model.decode(torch.randn(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"latents: expected on cpu like the parameters, got meta"):
        model.decode(torch.randn(1, 4, 2, 2, device="meta"))
    with pytest.raises(ValueError, match="tile: expected a multiple of 4 pixels, got 30"):
        model.decode(torch.randn(1, 4, 2, 2), Tiling(30, 16))
