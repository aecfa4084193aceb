"""Tokens drawn from logits: the reference's tokens, the right distribution, exact cuts, a row on its own, errors."""

import pytest
import torch

from eightfold.ops import sample
from eightfold.reference import sample as reference
from eightfold.reference.sampling import philox

op = torch.ops.eightfold.sample


def options(rows, device="cpu"):
    """Seeds, positions, temperatures, top_k and top_p of every kind."""
    temperatures, top_p = torch.empty(2, rows).uniform_(0.05, 1)
    temperatures[::7], top_p[::3] = 0, 1
    top_k = torch.randint(0, 40, (rows,), dtype=torch.int32)
    top_k[::5] = 0
    seeds, positions = torch.randint(-(2**62), 2**62, (rows,)), torch.randint(0, 2**33, (rows,))
    return [t.to(device) for t in (seeds, positions, temperatures * 2, top_k, top_p)]


def logits_of(rows, vocabulary, kind):
    x = torch.randn(rows, vocabulary) * torch.empty(rows, 1).uniform_(0, 6)
    return {"random": x, "ties": x.round(), "bfloat16": x.bfloat16().float()}[kind]


def test_philox_is_the_published_one():
    """Known answers of the Random123 distribution (kat_vectors)."""
    ones, pi = [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    for counter, key, expected in (
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (ones, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, 0x299F31D0A4093822, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        words = philox(tuple(torch.tensor(c) for c in counter), torch.tensor(key))
        assert [int(word) for word in words] == expected


@pytest.mark.parametrize("kind", ["random", "ties", "bfloat16"])
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 5, 64, 1025, 5000, 50257])
def test_draws_what_the_reference_draws(vocabulary, kind, device):
    rows = 8 if vocabulary > 5000 else 64
    logits, arguments = logits_of(rows, vocabulary, kind).to(device), options(rows, device)
    tokens = op(logits, *arguments)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, reference(logits, *arguments))


def check_distribution(tokens, probability):
    """Chi-square at 1e-6 (Wilson-Hilferty); tokens of probability 0 never come."""
    count = torch.bincount(tokens.cpu(), minlength=len(probability)).double()
    assert count[probability == 0].sum() == 0
    expected = probability[probability > 0].double() * len(tokens)
    statistic = ((count[probability > 0] - expected) ** 2 / expected).sum()
    freedom = max(len(expected) - 1, 1)
    z = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5
    assert z < 4.75, float(statistic)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperatures": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperatures": 0.0}, [0, 1, 0, 0]),
    ],
)
def test_distribution(arguments, expected, device):
    rows = 20000
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().to(device).expand(rows, 4)
    seeds = torch.arange(rows, device=device)
    check_distribution(sample(logits, seeds, 5, **arguments), torch.tensor(expected))  # over seeds
    check_distribution(
        sample(logits, torch.full_like(seeds, 7), seeds, **arguments), torch.tensor(expected)
    )  # positions


def test_distribution_over_many_tokens(device):
    logits = torch.randn(300).to(device)
    seeds = torch.arange(60000, device=device)
    check_distribution(sample(logits.expand(60000, 300), seeds, 0), logits.cpu().double().softmax(0))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (20, 1.0), (20, 0.9), (1, 1.0), (0, 0.01), (500, 0.5)])
def test_kept_tokens(top_k, top_p, temperature, device):
    """Everything that 3000 seeds draw is in the set that sorting finds, and all of its likely tokens come."""
    logits = torch.randn(400).mul(2).to(device)
    ranked, order = (logits.double() / temperature).sort(descending=True, stable=True)
    if top_k:
        ranked[top_k:] = -torch.inf
    probability = ranked.softmax(0)
    probability[probability.cumsum(0) - probability >= top_p] = 0
    probability /= probability.sum()
    seeds = torch.arange(3000, device=device)
    drawn = set(sample(logits.expand(3000, 400), seeds, 0, temperature, top_k, top_p).tolist())
    assert drawn <= set(order[probability > 0].tolist())
    assert drawn >= set(order[probability > 0.01].tolist())


def test_equal_logits_are_cut_by_index(device):
    seeds = torch.arange(4000, device=device)
    logits = torch.zeros(9, device=device)
    logits[1::2] = -0.0
    logits[7], logits[3] = 1.0, -1.0
    rows = logits.expand(4000, 9)
    assert set(sample(rows, seeds, 0, 1.0, 4).tolist()) == {7, 0, 1, 2}
    mass = torch.tensor([1.0, -1.0]).exp()
    share = (mass[0] + 2.5) / (mass.sum() + 7)  # the third of the equal ones is needed to reach it
    assert set(sample(rows, seeds, 0, 1.0, 0, float(share)).tolist()) == {7, 0, 1, 2}
    assert set(sample(rows, seeds, 0, 1.0, 3, 0.999).tolist()) == {7, 0, 1}


def test_greedy_takes_the_first_of_the_largest(device):
    logits = torch.randn(6, 5000).clamp(max=2.0).to(device)
    logits[1, 4:9], logits[2], logits[3, 4999] = torch.inf, -torch.inf, 9.0
    logits[4] = -0.0
    logits[4, 7] = 0.0
    tokens = sample(logits, torch.arange(6, device=device), 0, 0.0, 3, 0.5)
    assert torch.equal(tokens, logits.argmax(dim=1))
    assert tokens[1:5].tolist() == [4, 0, 4999, 0]


def test_infinite_logits(device):
    seeds = torch.arange(2000, device=device)
    logits = torch.zeros(2000, 40, device=device)
    logits[:, 5], logits[:, 9] = torch.inf, torch.inf
    for arguments in ((), (0.5, 3, 0.9)):
        assert set(sample(logits, seeds, 0, *arguments).tolist()) == {5, 9}
    logits.fill_(-torch.inf)
    assert len(set(sample(logits, seeds, 0).tolist())) == 40
    logits[:, 30] = -3e38
    assert set(sample(logits, seeds, 0, 1.0, 5, 0.99).tolist()) == {30}


@pytest.mark.parametrize("vocabulary", [70, 5000])
def test_nan_and_impossible_options_give_no_token(vocabulary, device):
    rows = 12
    logits = torch.randn(rows, vocabulary, device=device)
    logits[0, 0], logits[1, vocabulary - 1], logits[2, 65] = torch.nan, torch.nan, -torch.nan
    seeds, positions = (torch.arange(rows, device=device) for _ in range(2))
    temperatures, top_p = torch.ones(2, rows, device=device)
    top_k = torch.zeros(rows, dtype=torch.int32, device=device)
    temperatures[2], temperatures[3], temperatures[4], temperatures[5] = 0, -1, torch.nan, torch.inf
    top_k[6], top_p[7], top_p[8], top_p[9] = -1, 0, 1.5, torch.nan
    for function in (op, reference):
        tokens = function(logits, seeds, positions, temperatures, top_k, top_p)
        assert (tokens[:10] == -1).all()
        assert (tokens[10:] >= 0).all()


@pytest.mark.parametrize(("rows", "vocabulary"), [(40, 3001), (150, 5004), (150, 9001)])
def test_a_row_depends_on_itself_alone(rows, vocabulary, device):
    """Also where a few rows are taken by more blocks than many are."""
    logits, arguments = logits_of(rows, vocabulary, "bfloat16").to(device), options(rows, device)
    whole = op(logits, *arguments)
    for start, count in ((0, 1), (39, 1), (7, 2), (3, 30)):
        part = slice(start, start + count)
        assert torch.equal(op(logits[part].clone(), *(t[part] for t in arguments)), whole[part])
    order = torch.randperm(rows, device=device)
    assert torch.equal(op(logits[order], *(t[order] for t in arguments)), whole[order])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(op(logits, *arguments), whole)
    finally:
        torch.set_num_threads(threads)


def test_row_stride(device):
    wide, arguments = logits_of(9, 1032, "random").to(device), options(9, device)
    for part in (wide[:, :1000], wide[:, 3:1003], wide[::2, 4:]):
        chosen = [t[: part.shape[0]] for t in arguments]
        assert torch.equal(op(part, *chosen), op(part.contiguous(), *chosen))


@pytest.mark.gpu
def test_cpu_and_cuda_draw_the_same_tokens():
    logits, arguments = logits_of(500, 32000, "bfloat16"), options(500)
    assert torch.equal(op(logits, *arguments), op(logits.cuda(), *(t.cuda() for t in arguments)).cpu())


def test_public_function_takes_numbers(device):
    logits, seeds = logits_of(6, 50, "random").to(device), torch.arange(6, device=device)
    full = torch.full((6,), 3, device=device)
    expected = op(logits, seeds, full, full / 2.0, full.int(), full * 0.25)
    assert torch.equal(sample(logits, seeds, 3, 1.5, 3, 0.75), expected)
    assert torch.equal(sample(logits, seeds, full, full / 2.0, full.int(), full * 0.25), expected)


@pytest.mark.parametrize("vocabulary", [0, 8])
def test_empty(vocabulary, device):
    assert op(torch.zeros(0, vocabulary, device=device), *options(0, device)).shape == (0,)


def test_torch_citizen(device):
    logits, arguments = logits_of(5, 40, "random").to(device), options(5, device)
    torch.library.opcheck(op, (logits, *arguments))
    compiled = torch.compile(lambda x: sample(x * 2, arguments[0], 3, 0.8, 10, 0.9) + 1, fullgraph=True)
    assert torch.equal(compiled(logits), sample(logits * 2, arguments[0], 3, 0.8, 10, 0.9) + 1)


@pytest.mark.gpu
def test_cuda_graph():
    logits, arguments = logits_of(5, 4000, "random").cuda(), options(5, "cuda")
    graph = torch.cuda.CUDAGraph()
    op(logits, *arguments)
    with torch.cuda.graph(graph):
        tokens = op(logits, *arguments)
    logits.normal_()
    arguments[1].add_(1)
    graph.replay()
    assert torch.equal(tokens, op(logits, *arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4)}, r"sample: logits must have 2 dimensions, got shape \[4\]"),
        ({"logits": torch.zeros(4, 8).bfloat16()}, "sample: logits must be float32, got bfloat16"),
        ({"logits": torch.zeros(8, 4).t()}, "sample: logits must have stride 1 in its last dimension"),
        ({"logits": torch.zeros(4, 0)}, r"logits must have from 1 to 4194304 columns, got shape \[4, 0\]"),
        ({"logits": torch.zeros(1, 2**22 + 1).expand(4, -1)}, r"to 4194304 columns, got shape \[4, 4194305\]"),
        ({"seeds": torch.zeros(4)}, "sample: seeds must be int64, got float32"),
        ({"positions": torch.zeros(5).long()}, r"sample: positions must have shape \[4\], got \[5\]"),
        ({"temperatures": torch.zeros(8)[::2]}, "sample: temperatures must be contiguous"),
        ({"top_k": torch.zeros(4).long()}, "sample: top_k must be int32, got int64"),
        ({"top_p": torch.zeros(4).double()}, "sample: top_p must be float32, got float64"),
    ],
)
def test_errors(change, message):
    names = ("seeds", "positions", "temperatures", "top_k", "top_p")
    arguments = {"logits": torch.zeros(4, 8), **dict(zip(names, options(4), strict=True))}
    with pytest.raises(RuntimeError, match=message):
        op(**{**arguments, **change})
