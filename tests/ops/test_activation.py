"""SwiGLU, alone and fused with casts: against the reference, its own parts, and fp64 gradients."""

import pytest
import torch

from eightfold.ops.activation import swiglu, swiglu_backward_quantize, swiglu_quantize
from eightfold.ops.quant import quantize
from eightfold.reference import activation as reference
from eightfold.reference import quant as reference_quant
from fused_bytes import check_layout, close_cast, same_bytes, same_cast

ops = torch.ops.eightfold
SHAPES = [(0, 256), (1, 16), (3, 129), (130, 144), (257, 1000), (128, 2176)]
DTYPES = [torch.bfloat16, torch.float32]
BACKWARD_GROUPS = ((1, 128), (128, 1), (1, 128), (128, 1), (128, 1))


def data(rows, cols, dtype, device):
    gate, up = (torch.randn(2, rows, cols, device=device) * 3).to(dtype)
    return gate, up


def saved(gate, up):
    casts = swiglu_quantize(gate, up, training=True)
    return casts.gate, casts.up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 0), (1, 14336), (1100, 520)])
def test_alone_is_the_reference_and_what_is_cast(shape, dtype, device):
    gate, up = data(*shape, dtype, device)
    h, want = swiglu(gate, up), reference.swiglu(gate, up)
    assert (h.shape, h.dtype, h.stride()) == (want.shape, want.dtype, want.stride())
    torch.testing.assert_close(h, want, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-30)
    if shape[1]:
        same_cast(quantize(h, (1, 128)), swiglu_quantize(gate, up).h)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_the_reference(shape, dtype, device):
    gate, up = data(*shape, dtype, device)
    out, want = ops.swiglu_quantize(gate, up, True), reference.swiglu_quantize(gate, up, True)
    close_cast(*out[:2], *want[:2])
    for a, b in zip(out[2:], want[2:], strict=True):  # nothing but the casts of gate and up
        same_bytes(a, b)
    for i in (0, 2, 4):
        check_layout(*out[i : i + 2], (1, 128))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_is_the_reference(shape, dtype, device):
    gate, up = data(*shape, dtype, device)
    dh = torch.randn_like(gate)
    g, u = saved(gate, up)
    args = (dh, g.codes, g.scales, u.codes, u.scales)
    out, want = ops.swiglu_backward_quantize(*args), reference.swiglu_backward_quantize(*args)
    for i, group in enumerate(BACKWARD_GROUPS):
        close_cast(*out[2 * i : 2 * i + 2], *want[2 * i : 2 * i + 2])
        check_layout(*out[2 * i : 2 * i + 2], group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 256), (1, 128), (130, 256), (257, 1024), (128, 2176)])
def test_backward_beside_has_the_bytes_of_both(shape, dtype, device):
    """[dgate | dup] in one buffer, as one operand: each half is what it is alone."""
    rows, cols = shape
    gate, up = data(*shape, dtype, device)
    dh = torch.randn_like(gate)
    g, u = saved(gate, up)
    args = (dh, g.codes, g.scales, u.codes, u.scales)
    out, apart = ops.swiglu_backward_quantize(*args, True), ops.swiglu_backward_quantize(*args)
    assert [t.shape for t in out[4:8]] == [(0, 0)] * 4
    for i, group in enumerate(((1, 128), (128, 1))):
        check_layout(*out[2 * i : 2 * i + 2], group)
        width = (cols, cols // 128) if i == 0 else (cols, cols)
        for j, w in enumerate(width):
            same_bytes(out[2 * i + j][:, :w], apart[2 * i + j])
            same_bytes(out[2 * i + j][:, w:], apart[4 + 2 * i + j])
    for a, b in zip(out[8:], apart[8:], strict=True):
        same_bytes(a, b)
    for a, b in zip(out, reference.swiglu_backward_quantize(*args, True), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    public = swiglu_backward_quantize(dh, g, u, beside=True)
    assert public.dup is None
    assert public.dup_cols is None
    same_bytes(public.dgate.codes, out[0])
    if rows == 130:
        with pytest.raises(RuntimeError, match=r"dh must have a multiple of 128 columns .* got shape \[130, 144\]"):
            ops.swiglu_backward_quantize(dh[:, :144], g.codes[:, :144], g.scales[:, :2], *args[3:], True)


def test_h_against_fp64_and_rounding_bias(device):
    """With one element a row, the scale is |h| / 448: it shows h itself, before the cast takes it to 8 bits."""
    gate = torch.cat([torch.linspace(-80, 20, 4001), torch.tensor([-0.0, 1e-30, -1e-30, 88.0, 3e4])]).to(device)[
        :, None
    ]
    for dtype, tolerance in ((torch.float32, 5e-6 if device.type == "cpu" else 2e-5), (torch.bfloat16, 2**-8 * 1.001)):
        g = gate.to(dtype)
        scales = ops.swiglu_quantize(g, torch.full_like(g, 1.7), False)[1].double() * 448
        exact = (g.double() * torch.sigmoid(g.double()) * torch.full_like(g, 1.7).double()).abs()
        seen = exact > 1e-9  # smaller groups take the floor of the quantiser
        alone = swiglu(g, torch.full_like(g, 1.7)).double().abs()
        for found in (scales, alone):
            error = ((found - exact) / exact)[seen]
            assert error.abs().max() <= tolerance
            assert error.mean().abs() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [400, 512])
def test_fused_is_unfused_to_the_byte(cols, dtype, device):
    """The columns of the backward pass are casts of the values whose rows it casts: seen here one row a call."""
    gate, up = data(130, cols, dtype, device)
    same_cast(saved(gate, up)[0], quantize(gate, (1, 128)))
    same_cast(saved(gate, up)[1], quantize(up, (1, 128)))
    same_cast(swiglu_quantize(gate, up).h, swiglu_quantize(gate, up, training=True).h)
    assert swiglu_quantize(gate, up)[1:] == (None, None)
    assert [t.shape for t in ops.swiglu_quantize(gate, up, False)[2:]] == [(0, 0)] * 4

    dh = torch.randn_like(gate)
    whole = swiglu_backward_quantize(dh, *saved(gate, up))
    for row in (0, 127, 129):
        at = slice(row, row + 1)
        one = swiglu_backward_quantize(dh[at], *saved(gate[at], up[at]))
        for name in ("dgate", "dup"):
            same_bytes(getattr(one, name).codes, getattr(whole, name).codes[at])
            same_bytes(getattr(one, name).scales, getattr(whole, name).scales[at])
    # A column group of one row holds one value: |value| = scale * 448. The largest of 128 is the scale of the group.
    for name in ("dgate_cols", "dup_cols", "h_cols"):
        alone = []
        for row in range(128):
            at = slice(row, row + 1)
            alone.append(getattr(swiglu_backward_quantize(dh[at], *saved(gate[at], up[at])), name).scales)
        same_bytes(getattr(whole, name).scales[:1], torch.cat(alone).amax(0, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_of_a_wider_buffer_and_unaligned_memory(dtype, device):
    for cols, shift in ((256, 0), (200, 0), (256, 1), (130, 3)):
        buffer = torch.randn(40 * 2 * cols + shift, device=device).to(dtype)[shift:].view(40, 2 * cols)
        gate, up = buffer[:, :cols], buffer[:, cols:]
        dh = buffer.flip(1)[:, :cols]
        for a, b in zip(
            ops.swiglu_quantize(gate, up, True),
            ops.swiglu_quantize(gate.contiguous(), up.contiguous(), True),
            strict=True,
        ):
            same_bytes(a, b)
        same_bytes(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))
        g, u = saved(gate, up)
        codes = (g.codes, g.scales, u.codes, u.scales)
        for a, b in zip(
            ops.swiglu_backward_quantize(dh, *codes), ops.swiglu_backward_quantize(dh.contiguous(), *codes), strict=True
        ):
            same_bytes(a, b)


def test_gradients_are_fp64_autograd(device):
    """From exactly the values that were saved, in fp32: only the 8-bit casts of the results are left (E4M3: 2^-4)."""
    gate, up = data(150, 400, torch.float32, device)
    dh = torch.randn_like(gate)
    g, u = saved(gate, up)
    g64, u64 = (q.dequantize(torch.float32).double().requires_grad_() for q in (g, u))
    h = torch.nn.functional.silu(g64) * u64
    h.backward(dh.double())
    out = swiglu_backward_quantize(dh, g, u)
    for q, want in (
        (out.dgate, g64.grad),
        (out.dgate_cols, g64.grad),
        (out.dup, u64.grad),
        (out.dup_cols, u64.grad),
        (out.h_cols, h.detach()),
    ):
        got = reference_quant.dequantize(q.codes, q.scales, list(q.group), torch.float32).double()
        step = q.scales.double().repeat_interleave(q.group[0], 0)[:150].repeat_interleave(q.group[1], 1)[:, :400]
        assert ((got - want).abs() <= 2**-4 * 1.001 * want.abs() + 2**-10 * 1.001 * step).all()
        error = (got - want) / want.norm() * want.numel() ** 0.5
        assert error.square().mean().sqrt() < 0.03
        assert error.mean().abs() < 1e-3  # nearest even has no bias


def test_gradients_against_the_unquantised_maths(device):
    """What FP8 saves cost: gate and up in E4M3 leave a few percent, as COAT reports for its FP8 activations."""
    gate, up = data(256, 512, torch.bfloat16, device)
    dh = torch.randn_like(gate)
    g64, u64 = gate.double().requires_grad_(), up.double().requires_grad_()
    (torch.nn.functional.silu(g64) * u64).backward(dh.double())
    out = swiglu_backward_quantize(dh, *saved(gate, up))
    for q, want in ((out.dgate, g64.grad), (out.dup, u64.grad)):
        assert (q.dequantize(torch.float32).double() - want).norm() / want.norm() < 0.06


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_marks_its_groups_and_no_other(bad, device):
    gate, up = data(140, 300, torch.bfloat16, device)
    up[130, 7] = bad
    assert (~swiglu(gate, up).isfinite()).nonzero().tolist() == [[130, 7]]
    casts = swiglu_quantize(gate, up, training=True)
    assert casts.h.scales[130].isnan().tolist() == [True, False, False]
    assert casts.h.scales.isnan().sum() == 1
    assert casts.gate.scales.isfinite().all()
    assert casts.up.scales.isnan().sum() == 1
    out = swiglu_backward_quantize(torch.randn_like(gate), casts.gate, casts.up)
    # up's whole group of 128 is NaN from here on: its gradients and h too, and every column group they touch
    assert out.dgate.scales.isnan().nonzero().tolist() == [[130, 0]]
    assert out.dup.scales.isfinite().all()
    for q in (out.dgate_cols, out.h_cols):
        assert q.scales.isnan().nonzero().tolist() == [[1, c] for c in range(128)]
        assert (q.codes.view(torch.uint8)[128:, :128] == 0x7F).all()
    assert out.dup_cols.scales.isfinite().all()


def test_extreme_gates_stay_finite(device):
    gate = torch.tensor([[-3e38, -1e4, -100.0, -0.0, 0.0, 100.0, 1e4, 1e30]], device=device)
    casts = swiglu_quantize(gate, torch.ones_like(gate), training=True)
    assert casts.h.scales.isfinite().all()
    want = torch.tensor([[0, 0, 0, 0, 0, 100, 1e4, 1e30]], device=device)
    torch.testing.assert_close(swiglu(gate, torch.ones_like(gate)), want)
    for value in gate[0]:
        g = quantize(value.view(1, 1), (1, 128))
        out = swiglu_backward_quantize(
            torch.ones(1, 1, device=device), g, quantize(torch.ones(1, 1, device=device), (1, 128))
        )
        slope = 1.0 if value > 1 else 0.5 if value.abs() < 1 else 0.0
        assert out.dgate.dequantize(torch.float32).item() == pytest.approx(slope, abs=1e-9)


def test_bits_do_not_depend_on_threads_or_run(device):
    gate, up = data(300, 520, torch.bfloat16, device)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            forward = ops.swiglu_quantize(gate, up, True)
            runs.append([*forward, *ops.swiglu_backward_quantize(gate, *forward[2:])])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            same_bytes(a, b)


def test_errors_name_the_argument_and_the_values(device):
    gate, up = data(8, 256, torch.bfloat16, device)
    g, u = saved(gate, up)
    codes = (g.codes, g.scales, u.codes, u.scales)
    forward, backward = "swiglu_quantize: ", "swiglu_backward_quantize: "
    for call, message in (
        (lambda: swiglu(gate.half(), up), "swiglu: gate must be bfloat16 or float32, got float16"),
        (lambda: swiglu(gate, up[:, :128]), r"swiglu: up must have shape \[8, 256\], got \[8, 128\]"),
        (lambda: swiglu_quantize(gate.half(), up), forward + "gate must be bfloat16 or float32, got float16"),
        (lambda: swiglu_quantize(gate[0], up), forward + r"gate must have 2 dimensions, got shape \[256\]"),
        (lambda: swiglu_quantize(gate, up.float()), forward + "up must be bfloat16, got float32"),
        (lambda: swiglu_quantize(gate, up[:, :128]), forward + r"up must have shape \[8, 256\], got \[8, 128\]"),
        (
            lambda: swiglu_quantize(gate.t(), up.t()),
            forward + r"gate must have stride 1 in its last dimension, got shape \[256, 8\] with strides \[1, 256\]",
        ),
        (
            lambda: swiglu_quantize(gate[:1].expand(8, 256), up),
            forward + r"gate must have rows that do not overlap, got shape \[8, 256\] with strides \[0, 1\]",
        ),
        (
            lambda: ops.swiglu_backward_quantize(gate, up, *codes[1:]),
            backward + "gate_codes must be float8_e4m3fn, got bfloat16",
        ),
        (
            lambda: ops.swiglu_backward_quantize(gate[:4], *codes),
            backward + r"gate_codes must have shape \[4, 256\], got \[8, 256\]",
        ),
        (
            lambda: ops.swiglu_backward_quantize(gate, *codes[:3], u.scales[:, :1]),
            backward + r"up_scales must have shape \[8, 2\], got \[8, 1\]",
        ),
        (
            lambda: ops.swiglu_backward_quantize(gate, *codes[:3], u.scales.contiguous()),
            backward + "up_scales must have stride 1 along the rows, as quantize writes it",
        ),
        (
            lambda: ops.swiglu_backward_quantize(gate, g.codes, g.scales.bfloat16(), *codes[2:]),
            backward + "gate_scales must be float32, got bfloat16",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(ValueError, match=r"up.group must be \(1, 128\), got \(128, 1\)"):
        swiglu_backward_quantize(gate, g, quantize(up, (128, 1)))


@pytest.mark.gpu
def test_cpu_and_cuda_agree():
    gate, up = data(130, 1040, torch.bfloat16, "cpu")
    cpu, cuda = ops.swiglu_quantize(gate, up, True), ops.swiglu_quantize(gate.cuda(), up.cuda(), True)
    close_cast(*(t.cpu() for t in cuda[:2]), *cpu[:2])
    torch.testing.assert_close(swiglu(gate.cuda(), up.cuda()).cpu(), swiglu(gate, up), rtol=2**-7, atol=1e-30)
    for a, b in zip(cuda[2:], cpu[2:], strict=True):
        same_bytes(a.cpu(), b)
    back = ops.swiglu_backward_quantize(gate, *cpu[2:]), ops.swiglu_backward_quantize(gate.cuda(), *cuda[2:])
    for i in range(0, 10, 2):
        close_cast(*(t.cpu() for t in back[1][i : i + 2]), *back[0][i : i + 2])


def _calls(device):
    gate, up = data(20, 272, torch.bfloat16, device)
    g, u = saved(gate, up)
    yield ops.swiglu, (gate, up)
    yield ops.swiglu_quantize, (gate, up, True)
    yield ops.swiglu_quantize, (gate, up, False)
    yield ops.swiglu_backward_quantize, (gate, g.codes, g.scales, u.codes, u.scales)


# opcheck's own test_schema computes with the inputs, which torch cannot do in FP8; this is what it would check.
def test_inputs_are_left_alone(device):
    for op, args in _calls(device):
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        op(*args)
        for a, b in zip(args, before, strict=True):
            if isinstance(a, torch.Tensor):
                same_bytes(a, b)


@pytest.mark.filterwarnings("ignore")
def test_opcheck(device):
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, args in _calls(device):
        torch.library.opcheck(op.default, args, test_utils=checks)


def test_compiles_as_one_graph(device):
    for op, args in _calls(device):
        compiled = torch.compile(lambda *a, op=op: op(*a), fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(*args), op(*args), strict=True):
            same_bytes(a, b)
            assert a.stride() == b.stride()


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
