"""The multi-tensor CAME step: against the reference and a plain float64 CAME; the same bits whatever the layout."""

import math

import pytest
import torch

from came_problem import KINDS, MATRICES, OPTIONS, STATES, Plain, Problem, assert_same, relative
from eightfold.ops import optim as ops
from eightfold.reference import optim as reference

STEPS = 20


def updates(problem, start):
    return [p.float().cpu() - s.float().cpu() for p, s in zip(problem.params, start, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("misaligned", [False, True])
def test_twenty_steps_match_reference(device, kind, quantized, misaligned):
    """States drift apart only where a code is rounded the other way: 1/510 of a block's range, seldom."""
    options = {"quantized": quantized, **KINDS[kind]}
    actual, expected = Problem(device, misaligned=misaligned, **options), Problem("cpu", **options)
    start = [p.clone() for p in actual.params]
    actual.step(count=STEPS), expected.step(reference.came8bit_, count=STEPS)
    coarse = quantized or actual.params[0].dtype == torch.bfloat16  # bf16: a parameter rounded the other way
    for a, e in zip(updates(actual, start), updates(expected, start), strict=True):
        assert relative(a, e) < (3e-3 if coarse else 1e-5)
    for a, e in zip(actual.moments(), expected.moments(), strict=True):
        assert relative(a, e) < (3e-3 if quantized else 1e-5)
    for name, tolerance in (("v_rows", 1e-6), ("v_cols", 1e-6), ("u_rows", 1e-4), ("u_cols", 1e-4)):
        for a, e in zip(getattr(actual, name), getattr(expected, name), strict=True):
            assert relative(a, e) < tolerance, name


@pytest.mark.parametrize("op", ["kernel", "reference"])
@pytest.mark.parametrize("quantized", [True, False])
def test_twenty_steps_match_plain_float64(device, op, quantized):
    """What 8 bits of m cost: 3 % of the update, where float32 m costs nothing."""
    if op == "reference" and device.type == "cuda":
        pytest.skip("the reference is tested on the CPU")
    problem = Problem(device, quantized=quantized)
    plain = [Plain(p, i < problem.matrices, 1e-2) for i, p in enumerate(problem.params)]
    start = [p.cpu().double() for p in problem.params]
    for step in range(STEPS):
        if step:
            problem.draw()
        for each, g in zip(plain, problem.grads, strict=True):
            each.step(0.7 * g)
        problem.step(ops.came8bit_ if op == "kernel" else reference.came8bit_)
        if step == 0:  # from m = 0, which bytes hold exactly
            for each, p, s in zip(plain, problem.params, start, strict=True):
                assert relative(p.cpu().double() - s, each.param - s) < 1e-4
    for i, (each, p, s) in enumerate(zip(plain, problem.params, start, strict=True)):
        rounded = quantized and i < problem.matrices
        assert relative(p.cpu().double() - s, each.param - s) < (0.03 if rounded else 1e-4)
        assert relative(problem.moments()[i], each.m) < (0.03 if rounded else 1e-5)
        if i < problem.matrices:
            for actual, expected in (
                (problem.v_rows[i], each.r),
                (problem.v_cols[i], each.c),
                (problem.u_rows[i], each.big_r),
                (problem.u_cols[i], each.big_c),
            ):
                assert relative(actual, expected) < (0.01 if rounded else 1e-5)


@pytest.mark.parametrize("clip_threshold", [0.1, 1.0, 1e3])
def test_clipping(device, clip_threshold):
    """Below, at and above the RMS of the update, which 20 steps of fresh states have at 1 to 32."""
    options = {"clip_threshold": clip_threshold, "beta2": 0.9, "beta3": 0.95}
    problem = Problem(device, quantized=False)
    betas = (0.9, 0.9, 0.95)
    plain = [Plain(p, i < problem.matrices, 1e-2, 0.1, betas, clip_threshold) for i, p in enumerate(problem.params)]
    for step in range(STEPS):
        if step:
            problem.draw()
        for each, g in zip(plain, problem.grads, strict=True):
            each.step(0.7 * g)
        problem.step(**options)
    for i, each in enumerate(plain):
        assert relative(problem.moments()[i], each.m) < 1e-5
        if i < problem.matrices:
            assert relative(problem.u_rows[i], each.big_r) < 1e-5


def test_steady_gradient_leaves_no_instability(device):
    """m follows w to the last bits: what is left of (w - m)^2 is not the rounding of three large sums."""
    problem = Problem(device, matrices=[(64, 2240)], vectors=[], quantized=False)
    torch.nn.init.ones_(problem.grads[0])
    for _ in range(300):
        problem.step(beta2=0.5, beta3=0.5)
    assert (problem.u_rows[0] < 1e-9).all()
    assert problem.u_rows[0].isfinite().all()
    assert (problem.u_rows[0] > 0).all()


def heavy_tailed(rows, cols):
    """Rows of very different sizes, elements of heavy tails."""
    return torch.randn(rows, cols) * torch.exp(1.5 * torch.randn(rows, 1)) * torch.exp(0.3 * torch.randn(rows, cols))


def test_stored_moment_is_near(device):
    """Blocks of 2,048 elements hold m to 2 %, whatever rows are beside each other; each to half a step of its block."""
    problem = Problem(device, matrices=[(64, 2048)], vectors=[])
    problem.grads = [heavy_tailed(64, 2048).to(device)]
    exact = Problem(device, matrices=[(64, 2048)], vectors=[], quantized=False)
    exact.grads = problem.grads
    # Row means would undo the tails: v is set to be the same everywhere.
    for p in (problem, exact):
        p.v_rows[0].fill_(1.0), p.v_cols[0].fill_(1.0)
        p.step(beta2=0.999999, clip_threshold=1e6)
    m, expected = problem.moments()[0], exact.moments()[0]
    assert relative(m, expected) < 0.02
    bound = 0.5001 * problem.m_scales[0][:, :1].cpu() + 1e-9
    assert ((m - expected).abs() <= bound).all()


def test_constant_blocks_are_exact(device):
    """One value in all blocks but the last, and then another: scale 0, no NaN, the value itself."""
    problem = Problem(device, matrices=[(33, 640)], vectors=[])
    blocks = problem.m_scales[0].shape[0]
    problem.m[0].fill_(7)
    problem.m_scales[0][:, 1] = -0.3
    problem.grads[0].zero_()
    for step in range(1, 4):
        problem.step()
        expected = torch.full((33, 640), -0.3)
        for _ in range(step):
            expected = expected * 0.9
        torch.testing.assert_close(problem.moments()[0], expected, rtol=1e-6, atol=0)
        assert torch.equal(problem.m_scales[0][:, 0].cpu(), torch.zeros(blocks))
        assert len(problem.moments()[0].unique()) == 1
    assert all(t.isfinite().all() for t in problem.outputs())


def test_zero_gradients_from_zero_states(device):
    problem = Problem(device)
    start = [p.clone() for p in problem.params]
    for g in problem.grads:
        g.zero_()
    problem.step(count=1, weight_decay=0.0)
    for p, s in zip(problem.params, start, strict=True):
        assert torch.equal(p, s)
    assert all(t.isfinite().all() for t in problem.outputs())
    assert all((m == 0).all() for m in problem.moments())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("quantized", [True, False])
def test_bad_gradient_is_never_finite_again(device, value, quantized):
    """In the middle of a tensor; its neighbours in the same launch keep the bits they have without it."""
    problem, good = (Problem(device, quantized=quantized) for _ in range(2))
    bad = [7] if value == 1e30 else [7, len(MATRICES) + 3]  # a square that overflows
    for i in bad:
        problem.grads[i].view(-1)[problem.grads[i].numel() // 2] = value
    problem.step(), good.step()
    for _ in range(2):
        for i, p in enumerate(problem.params):
            if i in bad:
                assert p.isnan().all()
                assert problem.moments()[i].isnan().all()
                assert problem.u_rows[i].isnan().all()
                assert problem.u_cols[i].isnan().all()
                if quantized and i == 7:
                    assert problem.m_scales[i].isnan().all()
            else:
                assert torch.equal(p, good.params[i])
        problem.draw(), good.draw()
        problem.step(), good.step()


def test_overflow_in_a_vector_stays_infinite(device):
    """That element does not move; its second moment says why."""
    problem = Problem(device, matrices=[], vectors=[(300,)])
    start = problem.params[0].clone()
    problem.grads[0][5] = 1e30
    problem.step(count=2, weight_decay=0.0)
    assert problem.v_rows[0][5].isinf()
    assert torch.equal(problem.params[0] == start, torch.arange(300, device=device) == 5)


def test_bad_gradient_is_the_reference_s(device):
    for value in (math.nan, math.inf):
        actual, expected = Problem(device, matrices=[(40, 52)]), Problem("cpu", matrices=[(40, 52)])
        for p in (actual, expected):
            p.grads[0][3, 5] = p.grads[2][7] = value
        actual.step(), expected.step(reference.came8bit_)
        for name in ("params", *STATES[1:]):  # codes of a NaN block say nothing
            for a, e in zip(getattr(actual, name), getattr(expected, name), strict=True):
                assert torch.equal(a.isnan().cpu(), e.isnan()), name


def test_misaligned_tensors_give_the_same_values(device):
    for kind in KINDS.values():
        aligned, misaligned = (Problem(device, misaligned=m, **kind).step(count=3) for m in (False, True))
        assert_same(aligned, misaligned)


def test_threads_do_not_change_results():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(Problem("cpu", **KINDS["bf16"]).step(count=3))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_runs_are_identical(device):
    a, b = (Problem(device, **KINDS["bf16"]).step(count=3) for _ in range(2))
    assert_same(a, b)


def test_a_tensor_s_bits_do_not_depend_on_its_company(device):
    """One at a time, many together, more than a launch takes."""
    together = Problem(device, matrices=MATRICES * 31, vectors=[(300,)] * 300).step()
    for i in (0, 7, 8, len(MATRICES) * 31 - 2, len(MATRICES) * 31, len(MATRICES) * 31 + 299):
        alone = Problem(device, matrices=MATRICES * 31, vectors=[(300,)] * 300)
        for name in ("params", "grads", *STATES, "offsets", "steps"):
            setattr(alone, name, getattr(alone, name)[i : i + 1])
        alone.step()
        for name in ("params", *STATES):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i]), (i, name)


def test_empty_tensors_are_skipped(device):
    ops.came8bit_(*[[] for _ in range(10)], torch.tensor(0.1, device=device))
    problem = Problem(device, matrices=[(0, 128), (3, 128)], vectors=[(0,)])
    expected = Problem("cpu", matrices=[(0, 128), (3, 128)], vectors=[(0,)])
    problem.step(), expected.step(reference.came8bit_)
    for a, e in zip(problem.outputs(), expected.outputs(), strict=True):
        torch.testing.assert_close(a.float(), e.float(), rtol=1e-4, atol=1.0 if a.dtype == torch.uint8 else 1e-6)


def test_no_gradient_scale(device):
    a, b = Problem(device), Problem(device)
    b.scale = torch.tensor(1.0, device=device)
    assert_same(a.step(scale=False), b.step())


def test_stochastic_parameters_are_unbiased(device):
    """An update of a fortieth of a bf16 step: nearest rounding would lose all of it."""
    problem = Problem(device, matrices=[(256, 1024)], vectors=[], **KINDS["bf16"])
    problem.params[0].fill_(1.0), problem.grads[0].fill_(1.0)
    problem.lr.fill_(9e-6)
    problem.step(weight_decay=0.0)
    update = 9e-6 * 0.1 / (0.9 * math.sqrt(1e-4))  # w = 1, m = 0.1, u = 1e-4 0.9^2
    values = problem.params[0].double()
    assert set(values.unique().tolist()) == {1.0, 1 - 2**-8}
    sigma = math.sqrt(update * 2**8 / values.numel()) / 2**8
    assert abs(values.mean().item() - (1 - update)) < 4 * sigma


def test_seed_changes_the_random_bits(device):
    a, b = (Problem(device, **KINDS["bf16"]).step(seed=seed) for seed in (5, 6))
    assert not torch.equal(a.params[7], b.params[7])
    for name in STATES:
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            assert torch.equal(x, y)


def test_opcheck(device):
    problem = Problem(device, matrices=[(40, 52)], vectors=[(30,)])
    arguments = (*problem.lists(), problem.scale, *OPTIONS.values())
    torch.library.opcheck(torch.ops.eightfold.came8bit_.default, arguments)


def test_compile(device):
    a, b = (Problem(device, matrices=[(40, 52)]) for _ in range(2))
    torch.compile(a.step, fullgraph=True, backend="aot_eager")()
    assert_same(a, b.step())


@pytest.mark.gpu
def test_graph_capture():
    problems, expected = ([Problem("cuda", **kind) for kind in KINDS.values()] for _ in range(2))
    for kind in KINDS.values():
        Problem("cuda", **kind).step()  # kernels are loaded before capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for problem in problems:
            problem.step()
    for lr in (1e-2, 3e-3):
        for problem, eager in zip(problems, expected, strict=True):
            problem.lr.fill_(lr), eager.lr.fill_(lr)
            eager.step()
        graph.replay()
    for problem, eager in zip(problems, expected, strict=True):
        assert_same(problem, eager)


@pytest.mark.gpu
def test_large_matrices_on_both_devices():
    """More tiles than one, ragged at both ends, and more elements than a batch of many takes."""
    shapes = [(2240, 2240), (11200, 2240), (2240, 5600), (8200, 8200)]
    torch.manual_seed(0)
    gpu, cpu = (Problem(d, matrices=shapes, vectors=[(100_000,)], **KINDS["bf16"]) for d in ("cuda", "cpu"))
    start = [p.clone() for p in gpu.params]
    gpu.step(count=2), cpu.step(count=2)
    for a, e in zip(updates(gpu, start), updates(cpu, start), strict=True):
        assert relative(a, e) < 3e-3
    for name in ("v_rows", "v_cols", "u_rows", "u_cols"):
        for a, e in zip(getattr(gpu, name), getattr(cpu, name), strict=True):
            assert relative(a, e) < 1e-5, name


def replaced(name, index, value):
    def change(problem):
        getattr(problem, name)[index] = value(getattr(problem, name)[index])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("params", 0, lambda t: t.half()), r"params\[0\] must be float32 or bfloat16, got float16"),
        (replaced("params", 0, lambda t: t.t()), r"params\[0\] must be contiguous, got shape \[52, 40\] with strides"),
        (replaced("grads", 1, lambda t: t.double()), r"grads\[1\] must be float32 or bfloat16, got float64"),
        (replaced("grads", 1, lambda t: t[:-1]), r"grads\[1\] must have 30 elements, got shape \[29\]"),
        (replaced("m", 0, lambda t: t.int()), r"m\[0\] must be uint8 or float32, got int32"),
        (replaced("m", 1, lambda t: t.byte()), r"m_scales\[1\] must have 2 elements, got shape \[0, 2\]"),
        (replaced("m_scales", 0, lambda t: t[:1]), r"m_scales\[0\] must have 4 elements, got shape \[1, 2\]"),
        (replaced("m_scales", 0, lambda t: t.double()), r"m_scales\[0\] must be float32, got float64"),
        (replaced("v_rows", 0, lambda t: t[:5]), r"v_rows\[0\] must have 40 elements, got shape \[5\]"),
        (replaced("v_rows", 1, lambda t: t[:5]), r"v_rows\[1\] must have 30 elements, got shape \[5\]"),
        (replaced("v_cols", 0, lambda t: t[:7]), r"v_cols\[0\] must have no elements or .* divides the 2080 .*, got 7"),
        (replaced("u_rows", 0, lambda t: t[:5]), r"u_rows\[0\] must have 40 elements, got shape \[5\]"),
        (replaced("u_cols", 0, lambda t: t[:5]), r"u_cols\[0\] must have 52 elements, got shape \[5\]"),
        (replaced("offsets", 1, lambda n: -4), r"offsets\[1\] must not be negative, got -4"),
        (replaced("steps", 0, lambda t: t.int()), r"steps\[0\] must be float32, got int32"),
        (lambda p: p.u_cols.pop(), r"u_cols must have one entry for each of the 2 params, got 1"),
        (lambda p: setattr(p, "lr", p.lr.double()), r"lr must be float32, got float64"),
        (lambda p: setattr(p, "scale", torch.zeros(0)), r"grad_scale must have one element, got shape \[0\]"),
    ],
)
def test_step_errors(change, message):
    problem = Problem("cpu", matrices=[(40, 52)], vectors=[(30,)])
    before = [t.clone() for t in problem.outputs()]
    change(problem)
    with pytest.raises(RuntimeError, match="came8bit_: " + message):
        ops.came8bit_(*problem.lists(), problem.scale, **OPTIONS)
    for a, b in zip(before, Problem("cpu", matrices=[(40, 52)], vectors=[(30,)]).outputs(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("beta3", 1.0, "beta3 must be at least 0 and below 1, got 1"),
        ("eps1", 0.0, "eps1 must be at least 1e-36, got 0"),
        ("eps2", -1.0, "eps2 must be at least 1e-36, got -1"),
        ("clip_threshold", math.nan, "clip_threshold must be at least 1e-36, got nan"),
    ],
)
def test_option_errors(option, value, message):
    with pytest.raises(RuntimeError, match="came8bit_: " + message):
        Problem("cpu", matrices=[(40, 52)]).step(**{option: value})


@pytest.mark.gpu
def test_step_rejects_two_devices():
    problem = Problem("cuda", matrices=[(40, 52)])
    problem.grads[0] = problem.grads[0].cpu()
    with pytest.raises(RuntimeError, match=r"grads\[0\] is on cpu but params\[0\] is on cuda:0"):
        problem.step()
