from itertools import pairwise

import pytest
import torch

from eightfold.models.tiles import Tiling, ramps, spans, tiled

CASES = [
    (size, tile, overlap)
    for size in (1, 7, 31, 32, 33, 57, 60, 64, 100, 128, 255)
    for tile, overlap in ((32, 4), (32, 0), (8, 7), (8, 4), (1, 0))
]


@pytest.mark.parametrize(("size", "tile", "overlap"), CASES)
def test_spans_cover_with_equal_tiles_that_overlap(size, tile, overlap):
    found = spans(size, tile, overlap)
    assert found[0][0] == 0
    assert found[-1][1] == size
    assert len({end - start for start, end in found}) == 1
    assert found[0][1] <= tile
    assert all(a[1] - b[0] >= overlap for a, b in pairwise(found))
    fewer = len(found) - 1
    assert fewer == 0 or fewer * tile - (fewer - 1) * overlap < size


@pytest.mark.parametrize(("size", "tile", "overlap"), CASES)
def test_ramps_sum_to_one(size, tile, overlap):
    found, total = spans(size, tile, overlap), torch.zeros(size)
    for (start, end), weight in zip(found, ramps(found)):
        assert (weight > 0).all()
        total[start:end] += weight
    torch.testing.assert_close(total, torch.ones(size), rtol=0, atol=1e-6)


def test_default_tiles_of_a_4096_image():
    """128 latents: five tiles of 29, which read 1.28 times the image, not of 32 with a cut one behind them."""
    found = spans(128, *Tiling().cells(32))
    assert found == [(0, 29), (24, 53), (49, 78), (74, 103), (99, 128)]


@pytest.mark.parametrize("scales", [(1, 4), (4, 1)])
def test_a_pointwise_function_is_unchanged(scales):
    """Each position's value is known to all tiles that cover it, so blending may only round it."""

    def resized(x):
        return torch.nn.functional.interpolate(x, scale_factor=scales[1] / scales[0], mode="nearest")

    seen = []

    def function(x):
        seen.append(x.shape[0] * x.shape[2] * x.shape[3] // scales[0] ** 2)
        return resized(x)

    x = torch.randn(5, 3, 22 * scales[0], 9 * scales[0])
    out = tiled(function, x, 8, 2, scales)
    torch.testing.assert_close(out, resized(x), rtol=0, atol=1e-6)
    assert max(seen) <= 8 * 8
    assert len(seen) == 5 * 4 * 2


def test_small_images_go_together():
    seen = []

    def function(x):
        seen.append(x.shape[0])
        return x * 2

    x = torch.randn(7, 1, 4, 4)
    assert torch.equal(tiled(function, x, 8, 2, (1, 1)), x * 2)
    assert seen == [4, 3]


def test_gradients_pass_through_the_blend():
    x = torch.randn(1, 2, 11, 5, requires_grad=True)
    tiled(lambda part: part.square(), x, 4, 1, (1, 1)).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x)


@pytest.mark.parametrize(("tile", "stride", "message"), [(0, 1, "tile: "), (64, 0, "stride: "), (64, 65, "stride: ")])
def test_bad_tiling(tile, stride, message):
    with pytest.raises(ValueError, match=message):
        Tiling(tile, stride)


def test_tiles_are_of_whole_cells():
    with pytest.raises(ValueError, match="stride: expected a multiple of 32 pixels, got 900"):
        Tiling(1024, 900).cells(32)
