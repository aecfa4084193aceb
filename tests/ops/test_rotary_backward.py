"""rotary_backward_quantize: the bytes of rotary and quantize_beside apart, sums in a fixed order, torch's machinery."""

import pytest
import torch

from cast_bytes import assert_same, bit_patterns
from eightfold import ops as public
from eightfold.reference import rotary_backward_quantize as reference

ops = torch.ops.eightfold
op = ops.rotary_backward_quantize
DTYPES = [torch.bfloat16, torch.float32]
# batch, tokens, heads of queries, of keys, of values, dim
FUSED = [(1, 8, 2, 1, 1, 128), (2, 200, 4, 2, 3, 64), (3, 136, 3, 1, 2, 128), (1, 512, 2, 2, 2, 64)]
OTHERS = [
    (2, 77, 4, 2, 2, 64),
    (1, 5, 32, 16, 3, 24),
    (2, 16, 8, 16, 7, 16),
    (1, 129, 2, 1, 1, 256),
    (0, 8, 1, 1, 1, 128),
]


def case(shape, dtype, device, batched=False, swapped=True, make=torch.randn):
    """Gradients as attention leaves them, heads before tokens, or as a product does."""
    batch, tokens, *heads, dim = shape
    grads = []
    for h in heads:
        order = (batch, h, tokens, dim) if swapped else (batch, tokens, h, dim)
        x = make(order).to(dtype).to(device)
        grads.append(x.transpose(1, 2) if swapped else x)
    angle = torch.rand(batch if batched and batch else 1, tokens, 1, dim // 2) * 100
    return *grads, angle.cos().to(device), angle.sin().to(device)


def apart(dq, dk, dv, cos, sin, columns):
    parts = ops.rotary(dq, cos, sin, True), ops.rotary(dk, cos, sin, True), dv
    parts = [x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]) for x in parts]
    return ops.quantize_beside(parts, columns), parts


def sums_in_order(x):
    """The order of csrc/rotary/rotary_backward.h, in fp32."""
    rows, cols = x.shape
    tiles = (rows + 127) // 128
    runs = 8 * ((tiles + 7) // 8)
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, runs * 128 - rows))

    def in_turn(t, dim):
        total = t.select(dim, 0)
        for i in range(1, t.shape[dim]):
            total = total + t.select(dim, i)
        return total

    bands = in_turn(padded.view(runs, 8, 2, 8, cols), 3)
    of_tiles = in_turn(bands[:, :, 0] + bands[:, :, 1], 1)
    if tiles == 0:
        return x.new_zeros(cols, dtype=torch.float32)
    return in_turn(in_turn(of_tiles.view(8, runs // 8, cols), 1), 0)


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FUSED + OTHERS, ids=str)
def test_bytes_of_the_ops_apart(shape, dtype, columns, device):
    for batched in (False, True):
        inputs = case(shape, dtype, device, batched, swapped=not batched)
        *codes, dbias = op(*inputs, columns)
        assert_same(tuple(codes), apart(*inputs, columns)[0])
        assert_same(tuple(codes), reference(*(x.cpu() for x in inputs), columns)[:4])
        assert dbias.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern(dtype, device):
    """NaN, Inf and denormals; the rotation of a pair with one of them."""
    inputs = case(
        (2, 136, 2, 1, 1, 128), dtype, device, make=lambda s: bit_patterns(s[0] * s[1] * s[2], s[3], dtype).view(s)
    )
    assert_same(tuple(op(*inputs)[:4]), tuple(reference(*(x.cpu() for x in inputs))[:4]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*FUSED, *OTHERS, (1, 1304, 1, 1, 1, 128), (9, 136, 1, 1, 1, 128)], ids=str)
def test_sums(shape, dtype, device):
    """Bits of the documented order; near the exact sums; the codes do not change with them."""
    inputs = case(shape, dtype, device)
    for columns in (True, False):
        *codes, dbias = op(*inputs, columns, True)
        assert_same(tuple(codes), tuple(op(*inputs, columns)[:4]))
        whole = torch.cat(apart(*inputs, columns)[1], 1)
        assert torch.equal(dbias, sums_in_order(whole))
        exact = reference(*inputs, columns, True)[4]
        torch.testing.assert_close(dbias, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, device):
    """Slices of one buffer, an odd start, one head's stride for all: the kernel that is chosen changes no byte."""
    *_, cos, sin = case((2, 16, 1, 1, 1, 64), dtype, device)
    wide = torch.randn(2, 16, 8, 64, device=device).to(dtype)
    odd = torch.randn(2, 16, 8, 67, device=device).to(dtype)[..., 1:65]
    expanded = torch.randn(2, 16, 1, 64, device=device).to(dtype).expand(2, 16, 2, 64)
    for grads in (
        (wide[:, :, :4], wide[:, :, 4:6], wide[:, :, 6:]),
        (odd[:, :, :4], odd[:, :, 4:6], odd[:, :, 6:]),
        (expanded,) * 3,
    ):
        got = op(*grads, cos, sin, True, True)
        assert_same(got, op(*(g.contiguous() for g in grads), cos, sin, True, True))
        assert_same(tuple(got[:4]), tuple(reference(*(t.cpu() for t in (*grads, cos, sin)))[:4]))


def test_public_function(device):
    inputs = case((2, 16, 2, 1, 3, 128), torch.bfloat16, device)
    rows, columns, dbias = public.rotary_backward_quantize(*inputs, bias=True)
    assert (rows.group, columns.group) == ((1, 128), (128, 1))
    assert rows.shape == columns.shape == (32, 768)
    assert dbias.shape == (768,)
    assert public.rotary_backward_quantize(*inputs, columns=False)[1:] == (None, None)


def test_torch_citizen(device):
    for shape in ((2, 16, 2, 1, 1, 128), (1, 5, 2, 2, 1, 64)):
        inputs = case(shape, torch.bfloat16, device)
        for flags in ((True, True), (False, False)):
            torch.library.opcheck(op.default, (*inputs, *flags))
        torch._dynamo.reset()
        compiled = torch.compile(lambda *t: op(*t, True, True), fullgraph=True, backend="aot_eager")
        assert_same(tuple(compiled(*inputs)), tuple(op(*inputs, True, True)))


@pytest.mark.gpu
def test_cuda_graph():
    inputs = case((2, 136, 3, 1, 1, 128), torch.bfloat16, "cuda")
    new = case((2, 136, 3, 1, 1, 128), torch.bfloat16, "cuda")
    want = op(*new, True, True)
    op(*inputs, True, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = op(*inputs, True, True)
    for x, y in zip(inputs, new, strict=True):
        x.copy_(y)
    graph.replay()
    assert_same(tuple(got), tuple(want))


@pytest.mark.gpu
def test_bytes_of_the_cpu():
    """Sums too, at the size of a layer; and the same on every run."""
    inputs = case((2, 2048, 28, 4, 4, 128), torch.bfloat16, "cuda")
    got = op(*inputs, True, True)
    assert_same(got, op(*(x.cpu() for x in inputs), True, True))
    assert_same(got, op(*inputs, True, True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dq": torch.zeros(2, 5, 64)}, r": dq must have 4 dimensions, got shape \[2, 5, 64\]"),
        ({"dq": torch.zeros(2, 5, 2, 64).half()}, ": dq must be bfloat16 or float32, got float16"),
        ({"dq": torch.zeros(2, 5, 128, 3)}, r": dq must have an even last dimension, got shape \[2, 5, 128, 3\]"),
        ({"dk": torch.zeros(2, 5, 2, 64).bfloat16()}, ": dk must be float32, got bfloat16"),
        ({"dk": torch.zeros(2, 4, 2, 64)}, r": dk must have shape \[2, 5, 2, 64\], got \[2, 4, 2, 64\]"),
        ({"dk": torch.zeros(2, 5, 3, 64)}, r": heads x dim of dk must be a multiple of 128, got shape \[2, 5, 3, 64\]"),
        ({"dv": torch.zeros(2, 5, 2, 32)}, r": dv must have shape \[2, 5, 2, 64\], got \[2, 5, 2, 32\]"),
        ({"dv": torch.zeros(2, 5, 64, 2).transpose(2, 3)}, ": dv must have stride 1 in its last dimension"),
        ({"cos": torch.zeros(1, 4, 1, 32)}, r": cos must have shape \[1, 5, 1, 32\], got \[1, 4, 1, 32\]"),
        ({"sin": torch.zeros(2, 5, 1, 32)}, r": sin must have shape \[1, 5, 1, 32\], got \[2, 5, 1, 32\]"),
    ],
)
def test_errors_name_the_argument(change, message):
    dq, dk, dv, cos, sin = case((2, 5, 2, 2, 2, 64), torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="rotary_backward_quantize" + message):
        op(**{"dq": dq, "dk": dk, "dv": dv, "cos": cos, "sin": sin, **change})
