"""LayerNorm and modulation, alone, after a gated residual and fused with casts: against fp64 and their own parts."""

import pytest
import torch

from eightfold.ops import (
    gated_residual_layer_norm_modulate,
    gated_residual_layer_norm_modulate_quantize,
    layer_norm_modulate,
    layer_norm_modulate_quantize,
    quantize,
)
from eightfold.reference import modulate as reference
from fused_bytes import check_layout, close_cast, same_bytes, same_cast

ops = torch.ops.eightfold
EPS = 1e-6
DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [
    (0, 3, 64),
    (2, 0, 64),
    (1, 1, 8),
    (3, 5, 136),
    (2, 70, 1152),
    (1, 129, 2240),
    (3, 43, 520),
    (2, 3, 3080),
    (1, 9, 8192),
]


def data(shape, dtype, device, vector_dtype=torch.float32):
    """x with rows of different means and sizes, branch, then gate, scale and shift as slices of one table."""
    samples, tokens, features = shape
    x = torch.randn(shape, device=device) * (torch.rand(samples, tokens, 1, device=device) * 4 + 0.3)
    x = x + torch.randn(samples, tokens, 1, device=device) * 3
    table = torch.randn(samples, 6, features, device=device).to(vector_dtype)
    branch = torch.randn(shape, device=device)
    return x.to(dtype), branch.to(dtype), table[:, 2], table[:, 4], table[:, 3]


def exact(r, scale, shift):
    centred = r - r.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return normed * (1 + scale[:, None]) + shift[:, None]


def allowed(want, dtype):
    """Half a step of bfloat16, and float32's own error where terms cancel or a mean is large beside the differences."""
    size = want.abs().amax(-1, keepdim=True) if want.numel() else want
    return (2**-8 * 1.001 if dtype == torch.bfloat16 else 0) * want.abs() + 1e-5 * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_against_fp64_and_the_reference(shape, dtype, device):
    for vector_dtype in (torch.float32, torch.bfloat16):
        x, branch, gate, scale, shift = data(shape, dtype, device, vector_dtype)
        for g in (gate, None):
            r, y, mean, rstd = ops.gated_residual_layer_norm_modulate(x, branch, g, scale, shift, EPS, True)
            want = reference.gated_residual_layer_norm_modulate(x, branch, g, scale, shift, EPS, True)
            same_bytes(r, want[0])
            for a, b in zip((y, mean, rstd), want[1:], strict=True):
                assert (a.shape, a.dtype, a.is_contiguous()) == (b.shape, b.dtype, True)
            torch.testing.assert_close(mean, want[2], rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(rstd, want[3], rtol=2e-6, atol=0)
            want = exact(r.double(), scale.double(), shift.double())
            assert ((y.double() - want).abs() <= allowed(want, dtype)).all()
            for a, b in zip(ops.layer_norm_modulate(r, scale, shift, EPS, True), (y, mean, rstd), strict=True):
                same_bytes(a, b)
        bare = ops.gated_residual_layer_norm_modulate(x, branch, None, scale, shift, EPS, False)
        same_bytes(bare[0], x + branch)
        same_bytes(bare[1], y)
        assert [t.shape for t in bare[2:]] == [(0, 0)] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_is_unfused_to_the_byte(shape, dtype, device):
    x, branch, gate, scale, shift = data(shape, dtype, device)
    r, fused = gated_residual_layer_norm_modulate_quantize(x, branch, gate, scale, shift, training=True)
    apart = gated_residual_layer_norm_modulate(x, branch, gate, scale, shift)
    same_bytes(r, apart[0])
    y = apart[1].flatten(0, 1)
    same_cast(fused.rows, quantize(y, (1, 128)))
    same_cast(fused.cols, quantize(y, (128, 1)))
    for cast in (fused.rows, fused.cols):
        check_layout(cast.codes, cast.scales, cast.group)
    alone = layer_norm_modulate_quantize(r, scale, shift, training=True)
    for name in ("rows", "cols"):
        same_cast(getattr(alone, name), getattr(fused, name))
    for name in ("mean", "rstd"):
        same_bytes(getattr(alone, name), getattr(fused, name))
    inference = layer_norm_modulate_quantize(r, scale, shift)
    same_cast(inference.rows, fused.rows)
    assert inference[1:] == (None, None, None)


def fp64_gradients(dr, dy, x, branch, gate, scale, shift):
    inputs = [t if t is None else t.double().detach().requires_grad_() for t in (x, branch, gate, scale, shift)]
    x, branch, gate, scale, shift = inputs
    r = x if branch is None else x + (branch if gate is None else gate[:, None] * branch)
    y = exact(r, scale, shift)
    leaves = [t for t in inputs if t is not None]
    out = (r * dr.double()).sum() + (y * dy.double()).sum() if dr is not None else (y * dy.double()).sum()
    return torch.autograd.grad(out, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_against_fp64(shape, dtype, device):
    for vector_dtype in (torch.float32, torch.bfloat16):
        x, branch, gate, scale, shift = data(shape, dtype, device, vector_dtype)
        dr, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        for r_grad, b, g in ((None, None, None), (dr, None, None), (dr, branch, gate), (None, branch, gate)):
            # From r itself: the gradient of its rounding is that of the identity.
            r = x if b is None else ops.gated_residual_layer_norm_modulate(x, b, g, scale, shift, EPS, False)[0]
            _, mean, rstd = ops.layer_norm_modulate(r, scale, shift, EPS, True)
            got = ops.layer_norm_modulate_backward(dy, r, mean, rstd, scale, r_grad, b, g)
            like = reference.layer_norm_modulate_backward(dy, r, mean, rstd, scale, r_grad, b, g)
            for a, w in zip(got, like, strict=True):
                assert (a.shape, a.dtype, a.stride()) == (w.shape, w.dtype, w.stride())
            dx, dscale, dshift = fp64_gradients(r_grad, dy, r, None, None, scale, shift)
            assert ((got[0].double() - dx).abs() <= allowed(dx, dtype)).all()
            sums = [(got[3], dscale), (got[4], dshift)]
            if b is not None:
                dbranch = gate.double()[:, None] * dx
                assert ((got[1].double() - dbranch).abs() <= allowed(dbranch, dtype)).all()
                sums.append((got[2], (dx * branch.double()).sum(1)))
            for a, w in sums:
                size = float(w.abs().max()) if w.numel() else 0.0
                torch.testing.assert_close(a.double(), w, rtol=2e-5, atol=2e-5 * size)


@pytest.mark.parametrize("gated", [False, True])
def test_autograd(gated, device):
    x, branch, gate, scale, shift = data((2, 9, 136), torch.float32, device)
    gate = gate if gated else None
    leaves = [t.requires_grad_() for t in (x, branch, gate, scale, shift) if t is not None]
    out = gated_residual_layer_norm_modulate(x, branch, gate, scale, shift)
    grads = [torch.randn_like(t) for t in out]
    got = torch.autograd.grad(out, leaves, grads, retain_graph=True)
    for a, b in zip(got, fp64_gradients(*grads, x, branch, gate, scale, shift), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    (only_y,) = torch.autograd.grad(out[1], x, grads[1])
    (plain,) = torch.autograd.grad(layer_norm_modulate(out[0], scale, shift), out[0], grads[1])
    same_bytes(only_y, plain)
    x, _, _, scale, shift = (t.requires_grad_() for t in data((2, 9, 136), torch.bfloat16, device, torch.bfloat16))
    got = torch.autograd.grad(layer_norm_modulate(x, scale, shift), (x, scale, shift), grads[1].bfloat16())
    assert [t.dtype for t in got] == [torch.bfloat16] * 3


@pytest.mark.parametrize("features", [64, 1152, 2240, 4096])
def test_a_token_depends_on_itself_and_its_sample(features, device):
    x, branch, gate, scale, shift = data((3, 21, features), torch.bfloat16, device)
    whole = ops.gated_residual_layer_norm_modulate_quantize(x, branch, gate, scale, shift, EPS, True)
    vectors = [t[1:2] for t in (gate, scale, shift)]
    part = [t[1:2, 5:9].contiguous() for t in (x, branch)]
    out = ops.gated_residual_layer_norm_modulate_quantize(*part, *vectors, EPS, True)
    same_bytes(out[0], whole[0][1:2, 5:9].contiguous())
    for i in (1, 2):
        same_bytes(out[i], whole[i][26:30])
    for i in (5, 6):
        same_bytes(out[i], whole[i][1:2, 5:9].contiguous())
    dy, r, mean, rstd = torch.randn_like(x), whole[0], *whole[5:]
    gradients = ops.layer_norm_modulate_backward(dy, r, mean, rstd, scale, dy, branch, gate)
    of_one = ops.layer_norm_modulate_backward(
        *(t[1:2].contiguous() for t in (dy, r, mean, rstd)), scale[1:2], dy[1:2], branch[1:2], gate[1:2]
    )
    for a, b in zip(of_one, gradients, strict=True):
        same_bytes(a, b[1:2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_memory_gives_the_same_bytes(dtype, device):
    tensors = data((2, 7, 1152), dtype, device)
    dy = torch.randn(2, 7, 1152, device=device).to(dtype)

    def shifted(t):
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)[1:]
        return memory.view(t.shape).copy_(t)

    odd = [shifted(t) for t in tensors]
    want = ops.gated_residual_layer_norm_modulate_quantize(*tensors, EPS, True)
    for a, b in zip(ops.gated_residual_layer_norm_modulate_quantize(*odd, EPS, True), want, strict=True):
        same_bytes(a, b)
    gradients = ops.layer_norm_modulate_backward(dy, want[0], *want[5:], tensors[3], dy, tensors[1], tensors[2])
    again = ops.layer_norm_modulate_backward(
        shifted(dy), shifted(want[0]), *want[5:], odd[3], shifted(dy), odd[1], odd[2]
    )
    for a, b in zip(again, gradients, strict=True):
        same_bytes(a, b)


def test_a_large_mean_costs_no_bits(device):
    """Of rows at 1000 +- 1 the sum of squares would lose the variance: 1e6 * 2^-24 is 6 % of it."""
    x = torch.randn(2, 8, 2240, device=device) + 1000
    zeros = torch.zeros(2, 2240, device=device)
    y = layer_norm_modulate(x, zeros, zeros)
    assert (y.double() - exact(x.double(), zeros.double(), zeros.double())).abs().max() < 2e-4


def test_zero_rows_stay_zero_and_bad_ones_are_marked(device):
    x, _, _, scale, shift = data((2, 100, 256), torch.bfloat16, device)
    x[0, 3] = 0
    x[1, 30, 7] = torch.nan
    casts = layer_norm_modulate_quantize(x, scale, shift, training=True)
    torch.testing.assert_close(casts.rstd[0, 3].cpu(), torch.tensor(EPS**-0.5))
    same_bytes(layer_norm_modulate(x, scale, shift)[0, 3], shift[0].bfloat16())
    assert casts.rows.scales.isnan().any(1).nonzero().tolist() == [[130]]
    assert casts.cols.scales[1].isnan().all()
    assert casts.cols.scales[0].isfinite().all()


def test_bits_do_not_depend_on_threads_or_run(device):
    x, branch, gate, scale, shift = data((2, 150, 1040), torch.bfloat16, device)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            out = ops.gated_residual_layer_norm_modulate_quantize(x, branch, gate, scale, shift, EPS, True)
            runs.append([*out, *ops.layer_norm_modulate_backward(x, out[0], *out[5:], scale, x, branch, gate)])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            same_bytes(a, b)


def test_errors_name_the_argument_and_the_values(device):
    x, branch, gate, scale, shift = data((2, 5, 64), torch.bfloat16, device)
    mean = torch.zeros(2, 5, device=device)
    one, gated = "layer_norm_modulate: ", "gated_residual_layer_norm_modulate: "
    backward = "layer_norm_modulate_backward: "

    def back(dy=x, x=x, mean=mean, rstd=mean, scale=scale, residual_grad=None, branch=None, gate=None):
        return ops.layer_norm_modulate_backward(dy, x, mean, rstd, scale, residual_grad, branch, gate)

    for call, message in (
        (lambda: layer_norm_modulate(x.half(), scale, shift), one + "x must be bfloat16 or float32, got float16"),
        (lambda: layer_norm_modulate(x[0], scale, shift), one + r"x must have 3 dimensions, got shape \[5, 64\]"),
        (
            lambda: layer_norm_modulate(x.transpose(0, 1), scale, shift),
            one + r"x must be contiguous, got shape \[5, 2, 64\] with strides \[64, 320, 1\]",
        ),
        (lambda: layer_norm_modulate(x, scale[:1], shift), one + r"scale must have shape \[2, 64\], got \[1, 64\]"),
        (lambda: layer_norm_modulate(x, scale, shift.bfloat16()), one + "shift must be float32, got bfloat16"),
        (lambda: layer_norm_modulate(x, scale.half(), shift), one + "scale must be bfloat16 or float32, got float16"),
        (
            lambda: layer_norm_modulate(x, scale, shift.repeat(1, 2)[:, ::2]),
            one + r"shift must have stride 1 in its last dimension, got shape \[2, 64\] with strides \[128, 2\]",
        ),
        (lambda: layer_norm_modulate(x, scale, shift, -1.0), one + "eps must not be negative, got -1"),
        (
            lambda: gated_residual_layer_norm_modulate(x, branch[:, :3], gate, scale, shift),
            gated + r"branch must have shape \[2, 5, 64\], got \[2, 3, 64\]",
        ),
        (
            lambda: gated_residual_layer_norm_modulate(x, branch, gate[:, :8], scale, shift),
            gated + r"gate must have shape \[2, 64\], got \[2, 8\]",
        ),
        (lambda: back(x=x.float()), backward + "x must be bfloat16, got float32"),
        (lambda: back(mean=mean[:1]), backward + r"mean must have shape \[2, 5\], got \[1, 5\]"),
        (lambda: back(rstd=mean.bfloat16()), backward + "rstd must be float32, got bfloat16"),
        (lambda: back(residual_grad=x[:1]), backward + r"residual_grad must have shape \[2, 5, 64\], got \[1, 5, 64\]"),
        (lambda: back(branch=branch), backward + "branch and gate come together, got branch alone"),
        (lambda: back(gate=gate), backward + "branch and gate come together, got gate alone"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.gpu
def test_what_cuda_does_not_take():
    for features in (60, 8200):
        x, _, _, scale, shift = data((2, 5, features), torch.bfloat16, "cuda")
        with pytest.raises(
            RuntimeError, match=f"x has {features} features; the CUDA kernel takes multiples of 8 up to"
        ):
            layer_norm_modulate(x, scale, shift)
    x, _, _, scale, shift = data((2, 5, 64), torch.bfloat16, "cuda")
    with pytest.raises(RuntimeError, match="shift is on cpu"):
        layer_norm_modulate(x, scale, shift.cpu())


@pytest.mark.gpu
def test_cpu_and_cuda_agree():
    args = data((2, 70, 2240), torch.bfloat16, "cpu")
    cpu = ops.gated_residual_layer_norm_modulate_quantize(*args, EPS, True)
    cuda = [t.cpu() for t in ops.gated_residual_layer_norm_modulate_quantize(*(t.cuda() for t in args), EPS, True)]
    same_bytes(cuda[0], cpu[0])
    for i in (1, 3):
        close_cast(cuda[i], cuda[i + 1], cpu[i], cpu[i + 1])


def _calls(device):
    x, branch, gate, scale, shift = data((2, 10, 272), torch.bfloat16, device)
    mean, rstd = (torch.rand(2, 10, device=device) + 0.5 for _ in range(2))
    for training in (True, False):
        yield ops.layer_norm_modulate, (x, scale, shift, EPS, training)
        yield ops.layer_norm_modulate_quantize, (x, scale, shift, EPS, training)
        for g in (gate, None):
            yield ops.gated_residual_layer_norm_modulate, (x, branch, g, scale, shift, EPS, training)
            yield ops.gated_residual_layer_norm_modulate_quantize, (x, branch, g, scale, shift, EPS, training)
    yield ops.layer_norm_modulate_backward, (x, x, mean, rstd, scale, None, None, None)
    yield ops.layer_norm_modulate_backward, (x, x, mean, rstd, scale, x, branch, gate)


def test_inputs_are_left_alone(device):
    for op, args in _calls(device):
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        op(*args)
        for a, b in zip(args, before, strict=True):
            if isinstance(a, torch.Tensor):
                same_bytes(a.contiguous(), b.contiguous())


@pytest.mark.filterwarnings("ignore")
def test_opcheck(device):
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, args in _calls(device):
        torch.library.opcheck(op.default, args, test_utils=checks)


def test_compiles_as_one_graph(device):
    for op, args in _calls(device):
        torch._dynamo.reset()  # the lambda is one function to it, which it compiles eight times at most
        compiled = torch.compile(lambda *a, op=op: op(*a), fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(*args), op(*args), strict=True):
            same_bytes(a, b)
            assert a.stride() == b.stride()
    torch._dynamo.reset()

    def loss(*a):
        r, y = gated_residual_layer_norm_modulate(*a)
        return (r.float().square() + layer_norm_modulate(y, *a[3:]).float()).sum()

    args = [t.detach().requires_grad_() for t in data((2, 10, 272), torch.bfloat16, device)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(*args), args), torch.autograd.grad(loss(*args), args)
    for a, b in zip(*gradients, strict=True):
        same_bytes(a, b)


@pytest.mark.gpu
def test_graph_capture():
    for op, args in _calls("cuda"):
        expected = op(*args)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = op(*args)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(out, expected, strict=True):
            same_bytes(a, b)
