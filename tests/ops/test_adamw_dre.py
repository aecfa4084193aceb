"""The multi-tensor AdamW step over DRE states: against the reference; the same bits in any layout, shard, thread."""

import copy
import math

import pytest
import torch

from adamw_problem import E4M3, KINDS, SHAPES, WITH_CODES, Problem, assert_same, bits, compare
from eightfold.ops import optim as ops
from eightfold.reference import optim as reference


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("misaligned", [False, True])
def test_step_matches_reference(device, kind, misaligned):
    actual = Problem(device, misaligned=misaligned, **KINDS[kind]).step()
    expected = Problem("cpu", **KINDS[kind]).step(reference.adamw_dre_)
    compare(actual, expected)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_step_with_stochastic_states_matches_reference(device, kind):
    actual = Problem(device, **KINDS[kind]).step(stochastic_states=True)
    expected = Problem("cpu", **KINDS[kind]).step(reference.adamw_dre_, stochastic_states=True)
    compare(actual, expected, share=2e-2)


def test_many_tensors(device):
    """More tensors than one launch takes, of mixed sizes."""
    shapes = [SHAPES[i % len(SHAPES)] for i in range(75)]
    compare(Problem(device, shapes=shapes).step(), Problem("cpu", shapes=shapes).step(reference.adamw_dre_))


def test_misaligned_tensors_give_the_same_bits(device):
    for kind in KINDS.values():
        aligned, misaligned = (Problem(device, misaligned=m, **kind).step() for m in (False, True))
        assert_same(aligned, misaligned)


def test_empty_tensors_are_skipped(device):
    shapes = [(0, 128), (3, 128), (0, 5)]
    compare(Problem(device, shapes=shapes).step(), Problem("cpu", shapes=shapes).step(reference.adamw_dre_))
    ops.adamw_dre_(*[[] for _ in range(12)], torch.tensor(0.1, device=device))
    Problem(device, shapes=[(0, 128)]).step()


def test_no_gradient_scale(device):
    a, b = Problem(device), Problem(device)
    b.scale = torch.tensor(1.0, device=device)
    assert_same(a.step(scale=False), b.step())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_gradient_stays_in_its_group_and_visible(device, value):
    problem = Problem(device, shapes=[(2, 256)])
    problem.grads[0][0, 3] = value
    for _ in range(2):
        problem.step()
    expected = torch.zeros(2, 256, dtype=torch.bool)
    expected[0, :128] = True
    assert torch.equal(problem.params[0].isnan().cpu(), expected)
    for maxima in (problem.states[1][0], problem.states[4][0]):
        assert torch.equal(maxima.isnan().cpu(), torch.tensor([[True, False], [False, False]]))


def test_zero_and_sparse_gradients(device):
    problem = Problem(device, shapes=[(64, 128)])
    start = problem.params[0].clone()
    for part in (0, 3):
        problem.states[part][0].view(torch.uint8).zero_()
    problem.grads[0][1:] = 0
    for _ in range(3):
        problem.step(weight_decay=0.0)
    assert torch.equal(problem.params[0][1:], start[1:])
    assert (problem.params[0][0] != start[0]).all()
    assert (bits(problem.states[3][0])[1:] == 0).all()


def test_tiny_gradients(device):
    """v of 1e-40 and below is subnormal and still steers the step: every element moves by about lr."""
    problem = Problem(device, shapes=[(1, 128)])
    for part in (0, 3):
        problem.states[part][0].view(torch.uint8).zero_()
    problem.grads[0] = torch.full((1, 128), 1e-19, device=device)
    problem.steps[0].fill_(1.0)
    start = problem.params[0].clone()
    problem.step(scale=False, eps=0.0, weight_decay=0.0)
    torch.testing.assert_close(start - problem.params[0], torch.full_like(start, 1e-2), rtol=1e-2, atol=0)
    assert (stored_second_moment(problem) > 0).all()


def stored_second_moment(problem):
    return ops.dre_dequantize(*(problem.states[part][0] for part in (3, 4, 5)), problem.row_lengths[0])


def test_threads_do_not_change_results():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                Problem("cpu", shapes=[(700, 300), (5, 129), (2000, 128)], **KINDS["bf16"]).step(stochastic_states=True)
            )
    finally:
        torch.set_num_threads(threads)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_runs_are_identical(device):
    a, b = (Problem(device, **KINDS["bf16"]).step(stochastic_states=True) for _ in range(2))
    assert_same(a, b)


def test_seed_and_step_change_the_random_bits(device):
    base, seed = (Problem(device, shapes=[(64, 256)], **KINDS["bf16"]) for _ in range(2))
    base.step(), seed.step(seed=6)
    assert not torch.equal(base.params[0], seed.params[0])
    words = [reference.random_words(0, 64, step, 0, 5, torch.device("cpu")) for step in (1, 2)]
    assert not torch.equal(*words)


def test_philox_known_answers():
    """Vectors of the Random123 distribution (kat_vectors, philox4x32 with 10 rounds)."""

    def words(counter, key):
        return [int(w) for w in reference.philox4x32(tuple(torch.tensor([c]) for c in counter), key)]

    assert words((0, 0, 0, 0), 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert words((ones, ones, ones, ones), (ones << 32) | ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("cut", [1, 3])
def test_shards_by_rows_give_the_same_bits(device, kind, cut):
    """Rows of 129 elements, so that shards start inside a Philox block."""
    whole = Problem(device, shapes=[(5, 129)], **KINDS[kind])
    whole.offsets = [8]
    parts = Problem(device, shapes=[(5, 129)], **KINDS[kind])
    two = Problem(device, shapes=[(cut, 129), (5 - cut, 129)], **KINDS[kind])

    def split(t):
        return [t[:cut].clone(), t[cut:].clone()]

    two.params, two.grads = split(parts.params[0]), split(parts.grads[0])
    two.states = [
        split(part[0].view(torch.uint8)) if i in (0, 3) else split(part[0]) for i, part in enumerate(parts.states)
    ]
    for i in (0, 3):
        two.states[i] = [t.view(E4M3) for t in two.states[i]]
    two.offsets = [8, 8 + cut * 129]
    whole.step(stochastic_states=True)
    two.step(stochastic_states=True)
    assert torch.equal(torch.cat(two.params), whole.params[0])
    for mine, theirs in zip(two.states, whole.states, strict=True):
        joined = torch.cat([t.view(torch.uint8) if t.dtype == E4M3 else t for t in mine])
        assert torch.equal(joined, theirs[0].view(torch.uint8) if theirs[0].dtype == E4M3 else theirs[0])


def test_stochastic_parameters_are_unbiased(device):
    """Updates of a hundredth of a bf16 step: nearest rounding would lose all of them."""
    count, length = 64, 4096
    problem = Problem(device, shapes=[(count, length)], **KINDS["bf16"])
    problem.params[0].fill_(1.0)
    problem.grads[0].fill_(1.0)
    for part in (0, 3):
        problem.states[part][0].view(torch.uint8).zero_()
    problem.steps[0].fill_(1.0)
    problem.lr.fill_(1e-4)
    problem.step(scale=False, eps=0.0, weight_decay=0.0)
    values = problem.params[0].double()
    assert set(values.unique().tolist()) == {1.0, 1 - 2**-8}
    probability = 1e-4 * 2**8
    sigma = math.sqrt(probability / (count * length)) / 2**8
    assert abs(values.mean().item() - (1 - 1e-4)) < 4 * sigma


def test_stochastic_states_are_unbiased(device):
    """The same moments under 400 seeds: the mean of what is stored is the exact moment, which nearest would miss."""
    shape, seeds = (8, 128), 400
    start = Problem(device, shapes=[shape])
    for part in (0, 3):
        start.states[part][0].view(torch.uint8).zero_()
    draws = torch.empty(2, seeds, *shape)
    for seed in range(seeds):
        problem = copy.copy(start)
        problem.params = [t.clone() for t in start.params]
        problem.states = [[t.clone() for t in part] for part in start.states]
        problem.step(scale=False, stochastic_states=True, seed=seed)
        for moment in range(2):
            state = (problem.states[3 * moment + part][0] for part in range(3))
            draws[moment, seed] = ops.dre_dequantize(*state, 128)
    g = start.grads[0].cpu()
    for drawn, exact in zip(draws.double(), (0.1 * g, 0.01 * g * g), strict=True):
        error = drawn.mean(0) - exact
        # The floor is for elements whose other neighbour comes up less than once in 400 draws.
        deviation = (drawn.std(0) / math.sqrt(seeds)).clamp(min=1e-3 * exact.abs())
        scores = error / deviation
        assert scores.abs().max() < 6
        assert scores.mean().abs() < 4 / math.sqrt(scores.numel())
        assert drawn.std(0).count_nonzero() > 0.9 * scores.numel()


def test_opcheck(device):
    problem = Problem(device, shapes=[(5, 300), (1, 64)])
    arguments = (*problem.lists(), problem.scale, 0.9, 0.99, 1e-8, 0.1, False, 0)
    torch.library.opcheck(torch.ops.eightfold.adamw_dre_.default, arguments, test_utils=WITH_CODES)


def test_only_what_the_schema_names_is_written(device):
    problem, untouched = (Problem(device, **KINDS["bf16 with master"]) for _ in range(2))
    problem.step()
    read = ("grads", "steps")
    for a, b in zip(
        *(sum((getattr(p, name) for name in read), [p.lr, p.scale]) for p in (problem, untouched)), strict=True
    ):
        assert torch.equal(a, b)
    assert not any(torch.equal(a, b) for a, b in zip(problem.masters, untouched.masters, strict=True))


def test_compile(device):
    a, b = Problem(device), Problem(device)
    torch.compile(a.step, fullgraph=True, backend="aot_eager")()
    assert_same(a, b.step())


@pytest.mark.gpu
def test_graph_capture():
    problems = [Problem("cuda", **kind) for kind in KINDS.values()]
    expected = [Problem("cuda", **kind) for kind in KINDS.values()]
    for kind in KINDS.values():
        Problem("cuda", **kind).step()  # kernels are loaded before capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for problem in problems:
            torch._foreach_add_(problem.steps, 1.0)
            problem.step()
    for lr in (1e-2, 3e-3):
        for problem, eager in zip(problems, expected, strict=True):
            problem.lr.fill_(lr), eager.lr.fill_(lr)
            torch._foreach_add_(eager.steps, 1.0)
            eager.step()
        graph.replay()
    for problem, eager in zip(problems, expected, strict=True):
        assert_same(problem, eager)


def replaced(name, index, value):
    def change(problem):
        if name.startswith("state"):
            problem.states[int(name[-1])][index] = value(problem.states[int(name[-1])][index])
        else:
            getattr(problem, name)[index] = value(getattr(problem, name)[index])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("params", 1, lambda t: t.half()), r"params\[1\] must be float32 or bfloat16, got float16"),
        (replaced("params", 0, lambda t: t.t()), r"params\[0\] must be contiguous, got shape \[300, 5\] with strides"),
        (replaced("grads", 0, lambda t: t.double()), r"grads\[0\] must be float32 or bfloat16, got float64"),
        (replaced("grads", 1, lambda t: t[:, :-1]), r"grads\[1\] must have 64 elements, got shape \[1, 63\]"),
        (replaced("masters", 0, lambda t: t.new_zeros(7)), r"masters\[0\] must have 1500 elements, got shape \[7\]"),
        (replaced("state0", 0, lambda t: t.view(torch.uint8)), r"m_codes\[0\] must be float8_e4m3fn, got uint8"),
        (replaced("state1", 0, lambda t: t[:, :2]), r"m_maxima\[0\] must have 15 elements, got shape \[5, 2\]"),
        (replaced("state5", 1, lambda t: t.int()), r"v_exponents\[1\] must be uint8, got int32"),
        (
            replaced("row_lengths", 0, lambda n: 7),
            r"row_lengths\[0\] = 7 must be at least 1 and divide the 1500 elements",
        ),
        (replaced("row_lengths", 1, lambda n: 0), r"row_lengths\[1\] = 0 must be at least 1"),
        (replaced("offsets", 1, lambda n: -4), r"offsets\[1\] must not be negative, got -4"),
        (replaced("steps", 0, lambda t: t.int()), r"steps\[0\] must be float32, got int32"),
        (lambda p: p.grads.pop(), r"grads must have one entry for each of the 2 params, got 1"),
        (lambda p: setattr(p, "lr", p.lr.double()), r"lr must be float32, got float64"),
        (lambda p: setattr(p, "lr", torch.zeros(2)), r"lr must have one element, got shape \[2\]"),
        (lambda p: setattr(p, "scale", torch.zeros(0)), r"grad_scale must have one element, got shape \[0\]"),
    ],
)
def test_step_errors(change, message):
    problem = Problem("cpu", shapes=[(5, 300), (1, 64)])
    before = [t.clone() for t in problem.outputs()]
    change(problem)
    with pytest.raises(RuntimeError, match="adamw_dre_: " + message):
        problem.step()
    unchanged = Problem("cpu", shapes=[(5, 300), (1, 64)]).outputs()
    for a, b in zip(before, unchanged, strict=True):
        assert torch.equal(a, b)


def test_step_rejects_betas():
    with pytest.raises(RuntimeError, match=r"adamw_dre_: beta2 must be at least 0 and below 1, got 1"):
        Problem("cpu", shapes=[(1, 64)]).step(beta2=1.0)


@pytest.mark.gpu
def test_step_rejects_two_devices():
    problem = Problem("cuda", shapes=[(5, 300)])
    problem.grads[0] = problem.grads[0].cpu()
    with pytest.raises(RuntimeError, match=r"grads\[0\] is on cpu but params\[0\] is on cuda:0"):
        problem.step()
