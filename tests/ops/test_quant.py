"""The casts: bytes of the kernels against bytes of the reference, on every kind of value, shape and layout."""

import math

import pytest
import torch

from cast_bytes import E4M3, GROUPS, assert_same, bit_patterns, bits, check_all
from eightfold.ops import quant
from eightfold.reference import quant as reference

ops = torch.ops.eightfold


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_on_bit_patterns(device, dtype):
    for rows, cols in ((1000, 2304), (1111, 1999)):
        x = bit_patterns(rows, cols, dtype)
        assert x.isnan().any()
        assert x.isinf().any()
        check_all(x, device)


def test_bytes_on_every_bf16_pattern(device):
    """All 65536 patterns, each in a row group with a finite neighbour of its size, NaN groups among them."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).view(-1, 16)
    check_all(torch.cat([every, every.flip(0)], 1).repeat(1, 5), device)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_of_cuda_and_cpu_on_many_patterns(dtype):
    for _ in range(6):  # 10^8 elements
        x = bit_patterns(4096, 4224, dtype, specials=1e-6)
        on_device = x.cuda()
        for group in GROUPS:
            assert_same(ops.quantize(on_device, list(group)), ops.quantize(x, list(group)))
        assert_same(ops.quantize_both(on_device), ops.quantize_both(x))
        assert_same(ops.quantize(x, [1, 128]), reference.quantize(x, [1, 128]))


def test_bytes_next_to_rounding_boundaries(device):
    """Quotients within an ulp of the middle between two codes, for many scales: an inexact division fails here."""
    values = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    middles = (values[1:] + values[:-1]) / 2
    amax = torch.empty(4096, 1).uniform_(1, 2) * torch.randint(-30, 30, (4096, 1)).double().exp2().float()
    scale = amax / 448
    columns = [(middles * scale).view(torch.int32) + step for step in (-2, -1, 0, 1, 2)]
    for column in columns:
        x = torch.cat([column.view(torch.float32).clamp(max=amax), amax, -amax], 1)
        assert x.shape[1] == 128
        assert_same(ops.quantize(x.to(device), [1, 128]), reference.quantize(x, [1, 128]))
        assert_same(
            ops.quantize(x.t().contiguous().to(device), [128, 1]), reference.quantize(x.t().contiguous(), [128, 1])
        )


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 128), (3, 16), (7, 130), (128, 128), (129, 257), (300, 24), (513, 72), (2, 4100)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ragged_shapes(device, shape, dtype):
    x = torch.randn(shape).to(dtype)
    for power_of_two in (False, True):
        check_all(x, device, power_of_two)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 128)])
def test_empty(device, shape):
    check_all(torch.empty(shape, dtype=torch.bfloat16), device)
    codes = torch.empty(shape, dtype=E4M3, device=device)
    assert ops.transpose_codes(codes).shape == shape[::-1]


@pytest.mark.parametrize("group", GROUPS)
def test_groups_of_one_value(device, group):
    """A constant group decodes to itself; zeros keep their sign; a group below the floor stays small."""
    x = torch.full((256, 256), -3.7, device=device)
    q = quant.quantize(x, group)
    assert (bits(q.codes) == 0xFE).all()  # -448
    torch.testing.assert_close(q.dequantize(torch.float32), x, rtol=2e-7, atol=0)

    zeros = torch.zeros(256, 256, device=device)
    zeros[:, ::2] = -0.0
    q = quant.quantize(zeros, group)
    assert (q.scales.cpu() == torch.tensor(1e-10) / torch.tensor(448.0)).all()
    assert torch.equal(bits(q.codes), bits(zeros).lt(0).to(torch.uint8) * 0x80)

    tiny = torch.full((256, 256), 1e-12, device=device)  # below the floor: scaled by the floor, not to 448
    q = quant.quantize(tiny, group)
    assert q.codes.float().amax() < 5
    assert q.dequantize(torch.float32).sub(tiny).abs().amax() < 1e-13


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("special", [math.nan, -math.nan, math.inf, -math.inf])
def test_non_finite_groups_are_never_silently_finite(device, group, special):
    x = torch.ones(256, 256, dtype=torch.bfloat16, device=device)
    x[130, 5] = special
    codes, scales = ops.quantize(x, list(group))
    hit = torch.zeros(256, 256, dtype=torch.bool, device=device)
    row, col = 130 // group[0] * group[0], 5 // group[1] * group[1]
    hit[row : row + group[0], col : col + group[1]] = True
    assert torch.equal(bits(codes), torch.where(hit, 0x7F, 0x7E).to(torch.uint8))
    assert torch.equal(bits(scales) == 0x7FC00000, scales.isnan())
    assert scales.isnan().sum() == 1


def test_power_of_two_scales_are_exact(device):
    x = torch.randn(200, 300, device=device)
    codes, scales = ops.quantize(x, [1, 128], True)
    assert (torch.frexp(scales.cpu()).mantissa == 0.5).all()
    plain = ops.quantize(x, [1, 128])[1]
    assert (scales >= plain).all()
    assert (scales < 2 * plain).all()
    assert codes.float().abs().amax() <= 448


@pytest.mark.parametrize("group", [(1, 128), (128, 1)])
def test_rounding_is_unbiased(device, group):
    """Uniform values round down as often as up, within five standard deviations: rounding to nearest has no bias."""
    x = torch.rand(2048, 1024, device=device) * 2 - 1
    x[::128] = 1
    x[:, ::128] = 1  # one scale for all groups, so that codes cut the range at fixed points
    error = quant.quantize(x, group).dequantize(torch.float32).double() - x.double()
    for signed in (error, error * x.sign()):
        rounded = signed[error != 0]
        down = (rounded < 0).double().mean().item()
        assert abs(down - 0.5) < 5 * 0.5 / math.sqrt(rounded.numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("start", "width", "total"), [(0, 256, 400), (8, 256, 272), (3, 250, 301), (1, 128, 512)])
def test_views_of_wider_tensors(device, dtype, start, width, total):
    """Any row stride, aligned or not, gives the bytes of the contiguous copy, whatever surrounds the view."""
    wide = torch.full((150, total), math.nan, dtype=dtype)
    wide[:, start : start + width] = torch.randn(150, width)
    view = wide.to(device)[:, start : start + width]
    for group in GROUPS:
        assert_same(ops.quantize(view, list(group)), reference.quantize(view.cpu(), list(group)))
    assert_same(ops.quantize_both(view), reference.quantize_both(view.cpu()))


@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (128, 256), (130, 270), (320, 144)])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantize(device, shape, group, dtype):
    x = torch.randn(shape)
    expected = reference.dequantize(*reference.quantize(x, list(group)), list(group), dtype)
    q = quant.quantize(x.to(device), group)
    assert_same(q.dequantize(dtype), expected)
    assert_same(q.t().dequantize(dtype), expected.t().clone(memory_format=torch.contiguous_format))
    step = 0.07 if dtype == torch.bfloat16 else 0.0625  # half of the gap between codes, relative
    bound = (x.abs() * step).clamp(min=2**-10 * reference.quantize(x, list(group))[1].amax())
    assert ((q.dequantize(dtype).cpu().float() - x).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(1, 7), (16, 128), (128, 384), (130, 45), (272, 260)])
def test_transpose_codes(device, shape):
    codes = torch.randint(0, 256, shape, dtype=torch.uint8).view(E4M3)
    assert_same(ops.transpose_codes(codes.to(device)), reference.transpose_codes(codes))
    wide = torch.randint(0, 256, (shape[0], shape[1] + 9), dtype=torch.uint8).view(E4M3)
    view = wide.to(device)[:, 3 : 3 + shape[1]]
    assert_same(ops.transpose_codes(view), reference.transpose_codes(wide[:, 3 : 3 + shape[1]]))


def test_transpose_of_squares_is_the_cast_of_the_transpose(device):
    w = torch.randn(272, 400, device=device)
    turned, again = quant.transpose(quant.quantize(w, (128, 128))), quant.quantize(w.t().contiguous(), (128, 128))
    assert_same((turned.codes, turned.scales), (again.codes.cpu(), again.scales.cpu()))


def test_column_codes_are_a_matrix_operand(device):
    """.t() of column codes has the layout that fp8_gemm takes: contraction contiguous, padded to 16 bytes."""
    q = quant.quantize(torch.randn(100, 60, device=device), (128, 1)).t()
    assert q.shape == (60, 100)
    assert q.group == (1, 128)
    assert q.codes.stride() == (112, 1)
    assert q.codes.data_ptr() % 16 == 0
    assert q.scales.stride() == (1, 60)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """Rows so far apart that the last starts beyond 2^31 elements, and codes and outputs beyond 2^31 bytes."""
    stride = (1 << 31) // 99 // 8 * 8
    storage = torch.empty(stride * 100 + 512, dtype=torch.bfloat16, device="cuda")
    x = storage.as_strided((101, 512), (stride, 1))
    x.copy_(torch.randn(101, 512))
    for group in GROUPS:
        assert_same(ops.quantize(x, list(group)), reference.quantize(x.cpu(), list(group)))
    del storage, x
    rows = 600_000  # 600,000 x 4,096 = 2.4e9 elements
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16).repeat(rows // 64, 1)
    codes, scales, col_codes, col_scales = ops.quantize_both(x)
    assert_same((codes[-64:], scales[-64:].contiguous()), (codes[:64].cpu(), scales[:64].cpu().contiguous()))
    assert torch.equal(bits(col_codes.t()[:, -64:]), bits(col_codes.t()[:, :64]))
    assert torch.equal(col_scales[0], col_scales[-1])
