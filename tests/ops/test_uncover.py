"""Which tokens a step uncovers: against a plain loop over Python lists, rule by rule; ends, odd candidates, errors."""

import pytest
import torch

from eightfold import reference
from eightfold.ops import uncover_

op = torch.ops.eightfold.uncover_
MASK, EOS, END_OF_TURN = 99, 7, 8
RULES = ["threshold", "factor", "factor as published", "counts"]


def plain(tokens, at, ids, confidence, left, rule, value, ended):
    """One sequence after the other, one token at a time; returns new lists."""
    tokens, left, ended = [list(row) for row in tokens], list(left), list(ended)
    for b, row in enumerate(tokens):
        places = range(at[b], at[b] + len(ids[b]))
        valid = [
            (-confidence[b][i], i)
            for i, place in enumerate(places)
            if row[place] == MASK and ids[b][i] >= 0 and ids[b][i] != MASK and confidence[b][i] == confidence[b][i]
        ]
        taken = []
        for n, (negative, i) in enumerate(sorted(valid), start=1):
            if n > 1:
                if rule == "threshold" and -negative < value:
                    break
                if rule.startswith("factor") and -negative < 1 - value / (n + 1):
                    if rule == "factor as published" and n == len(valid):
                        taken.append(i)
                    break
                if rule == "counts" and n > value[b]:
                    break
            taken.append(i)
        for i in taken:
            row[places[i]] = ids[b][i]
        left[b] = sum(row[place] == MASK for place in places)
        for place in places:
            if row[place] == MASK:
                break
            if row[place] in (EOS, END_OF_TURN):
                ended[b] = 1
    return tokens, left, ended


def random_case(batch, rows, generator):
    """Confidences on a grid of 64ths, so that ties, and values at the threshold itself, are common."""

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    length = rows + int(integers(0, 9, 1))
    at = integers(0, length - rows + 1, batch).int()
    tokens, ids = integers(0, 30, batch, length), integers(0, 30, batch, rows)
    confidence = integers(0, 65, batch, rows) / 64.0
    share = torch.tensor([0.0, 0.1, 0.5, 1.0])[integers(0, 4, batch)]
    tokens[torch.rand(batch, length, generator=generator) < share[:, None]] = MASK
    odd = torch.rand(batch, rows, generator=generator)
    ids[odd < 0.05], ids[(odd > 0.05) & (odd < 0.1)] = MASK, -1
    confidence[odd > 0.95] = torch.nan
    confidence[(odd > 0.9) & (odd < 0.95)] = -torch.inf
    return tokens, at, ids, confidence, integers(0, 2, batch).int(), integers(0, rows + 2, batch).int()


def arguments_of(rule, value, device):
    if rule == "counts":
        return {"counts": value.to(device)}
    if rule == "factor as published":
        return {"factor": value, "last_too": True}
    return {rule: value}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("rows", [1, 2, 8, 32, 64])
def test_against_a_plain_loop(rows, batch, rule, device):
    generator = torch.Generator().manual_seed(rows)
    eos = torch.tensor([EOS, END_OF_TURN], device=device)
    for trial in range(60):
        tokens, at, ids, confidence, ended, counts = random_case(batch, rows, generator)
        value = {"threshold": (1 + trial % 64) / 64, "counts": counts}.get(rule, 0.25 * (1 + trial % 16))
        numbers = value.tolist() if rule == "counts" else value
        expected = plain(
            tokens.tolist(), at.tolist(), ids.tolist(), confidence.tolist(), [0] * batch, rule, numbers, ended.tolist()
        )
        for function in (uncover_, reference.uncover_):
            mine, left, ends = (
                tokens.to(device, copy=True),
                torch.full_like(at, -5).to(device),
                ended.to(device, copy=True),
            )
            function(
                mine,
                *(t.to(device) for t in (at, ids, confidence)),
                left,
                mask_id=MASK,
                eos_ids=eos,
                ended=ends,
                **arguments_of(rule, value, device),
            )
            assert mine.tolist() == expected[0], f"trial {trial} of {function.__module__}"
            assert left.tolist() == expected[1], f"trial {trial} of {function.__module__}"
            assert ends.tolist() == expected[2], f"trial {trial} of {function.__module__}"


def step(confidence, device, **rule):
    """Which of one fully masked block's places are taken."""
    rows = len(confidence)
    tokens = torch.full((1, rows), MASK, device=device)
    left = torch.zeros(1, dtype=torch.int32, device=device)
    ids = torch.arange(10, 10 + rows, device=device)[None]
    uncover_(tokens, torch.zeros_like(left), ids, torch.tensor([confidence], device=device), left, mask_id=MASK, **rule)
    assert int(left) == int((tokens == MASK).sum())
    return (tokens[0] != MASK).nonzero().flatten().tolist()


def test_rules_by_hand(device):
    assert step([0.5, 0.9, 0.95, 0.1], device, threshold=0.9) == [1, 2]
    assert step([0.5, 0.2, 0.5, 0.1], device, threshold=1.0) == [0]
    assert step([1.0, 0.2, 1.0, 1.0], device, threshold=1.0) == [0, 2, 3]
    # 1 - 1 / (n + 1): 2/3 for the second, 3/4 for the third, 4/5 for the fourth
    assert step([0.6, 0.80, 0.76, 0.78], device, factor=1.0) == [1, 2, 3]
    assert step([0.1, 0.60, 0.66, 0.65], device, factor=1.0) == [2]
    assert step([0.6, 0.70, 0.76, 0.78], device, factor=1.0) == [2, 3]
    assert step([0.9, 0.90, 0.90, 0.10], device, factor=1.0, last_too=True) == [0, 1, 2, 3]
    assert step([0.2, 0.1], device, factor=1.0, last_too=True) == [0, 1]
    assert step([0.2, 0.1, 0.1], device, factor=1.0, last_too=True) == [0]
    assert step([0.2], device, factor=1e-9) == [0]
    assert step([0.3, 0.3, 0.1, 0.3], device, counts=torch.tensor([2], dtype=torch.int32, device=device)) == [0, 1]


def test_a_block_of_no_candidates_makes_no_progress(device):
    tokens = torch.full((3, 6), MASK, device=device)
    at = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    left, before = torch.zeros_like(at), tokens.clone()
    ids = torch.tensor([[MASK] * 4, [-1] * 4, [3] * 4], device=device)
    confidence = torch.full((3, 4), 0.99, device=device)
    confidence[2] = torch.nan
    uncover_(tokens, at, ids, confidence, left, mask_id=MASK, threshold=0.5)
    assert torch.equal(tokens, before)
    assert left.tolist() == [4, 4, 4]


def test_ends_need_all_before_them(device):
    tokens = torch.tensor([[1, MASK, EOS, 2], [1, 2, EOS, MASK], [MASK, 2, 3, 4]], device=device)
    at, left, ended = (torch.zeros(3, dtype=torch.int32, device=device) for _ in range(3))
    ids, confidence = torch.full((3, 4), 5, device=device), torch.zeros(3, 4, device=device)
    ids[0], confidence[:] = MASK, 0.5
    eos = torch.tensor([EOS], device=device)
    uncover_(tokens, at, ids, confidence, left, mask_id=MASK, threshold=0.9, eos_ids=eos, ended=ended)
    assert ended.tolist() == [0, 1, 0]
    ids[0] = 5
    uncover_(tokens, at, ids, confidence, left, mask_id=MASK, threshold=0.9, eos_ids=eos, ended=ended)
    assert ended.tolist() == [1, 1, 0]
    assert left.tolist() == [0, 0, 0]


def case(device, batch=3, rows=4):
    tokens = torch.full((batch, 8), MASK, device=device)
    at, left, ended = (torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(3))
    ids = torch.arange(batch * rows, device=device).view(batch, rows)
    return {"tokens": tokens, "at": at, "ids": ids, "confidence": ids / 16.0, "left": left}, ended


def test_rows_of_tokens_may_lie_apart(device):
    arguments, _ = case(device)
    wide = torch.full((3, 20), MASK, device=device)
    uncover_(**arguments, mask_id=MASK, threshold=0.6)
    uncover_(**{**arguments, "tokens": wide[:, 5:13]}, mask_id=MASK, threshold=0.6)
    assert torch.equal(wide[:, 5:13], arguments["tokens"])
    assert (wide[:, :5] == MASK).all()
    assert (wide[:, 13:] == MASK).all()


def test_torch_citizen(device):
    arguments, ended = case(device)
    eos = torch.tensor([EOS], device=device)
    torch.library.opcheck(op, tuple(arguments.values()), {"mask_id": MASK, "threshold": 0.5})
    torch.library.opcheck(
        op, tuple(arguments.values()), {"mask_id": MASK, "factor": 0.5, "eos_ids": eos, "ended": ended}
    )

    def body(tokens, rest):
        tokens = tokens.clone()
        uncover_(tokens, **rest, mask_id=MASK, threshold=0.5)
        return tokens

    tokens = arguments.pop("tokens")
    assert torch.equal(torch.compile(body, fullgraph=True)(tokens, arguments), body(tokens, arguments))


@pytest.mark.gpu
def test_cuda_graph():
    arguments, _ = case(torch.device("cuda"))
    run = lambda: uncover_(**arguments, mask_id=MASK, threshold=0.6)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    arguments["tokens"].fill_(MASK)
    arguments["at"].fill_(4)
    graph.replay()
    assert (arguments["tokens"][:, :4] == MASK).all()
    assert arguments["left"].tolist() == [3, 3, 1]


@pytest.mark.gpu
def test_cuda_leaves_blocks_outside_their_sequence_alone():
    arguments, _ = case(torch.device("cuda"))
    arguments["at"].copy_(torch.tensor([-1, 5, 4]))
    uncover_(**arguments, mask_id=MASK, threshold=0.6)
    assert (arguments["tokens"][:2] == MASK).all()
    assert arguments["left"].tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0.0}, "threshold must be above 0 and at most 1, got 0"),
        ({"threshold": 1.5}, "threshold must be above 0 and at most 1, got 1.5"),
        ({"threshold": float("nan")}, "threshold must be above 0 and at most 1, got nan"),
        ({"threshold": None}, "exactly one of threshold, factor and counts is given"),
        ({"factor": 1.0}, "exactly one of threshold, factor and counts is given"),
        ({"counts": torch.zeros(3).int()}, "exactly one of threshold, factor and counts is given"),
        ({"threshold": None, "factor": 0.0}, "factor must be above 0 and finite, got 0"),
        ({"threshold": None, "factor": float("inf")}, "factor must be above 0 and finite, got inf"),
        ({"last_too": True}, "last_too belongs to factor"),
        ({"threshold": None, "counts": torch.zeros(3).long()}, "counts must be int32, got int64"),
        ({"tokens": torch.zeros(3, 8).int()}, "tokens must be int64, got int32"),
        ({"tokens": torch.zeros(8, 3).long().t()}, "tokens must have stride 1 in its last dimension"),
        ({"tokens": torch.zeros(8).long().expand(3, 8)}, "rows of tokens must not overlap"),
        (
            {"ids": torch.zeros(3, 0).long()},
            r"a block has from 1 to 64 tokens and fits its sequence, got ids of shape \[3, 0\]",
        ),
        ({"ids": torch.zeros(3, 9).long()}, "a block has from 1 to 64 tokens and fits its sequence"),
        ({"ids": torch.zeros(3, 65).long(), "tokens": torch.zeros(3, 99).long()}, "a block has from 1 to 64 tokens"),
        ({"ids": torch.zeros(2, 4).long()}, r"ids must have shape \[3, 4\], got \[2, 4\]"),
        ({"confidence": torch.zeros(3, 4).double()}, "confidence must be float32, got float64"),
        ({"left": torch.zeros(3).long()}, "left must be int32, got int64"),
        ({"at": torch.tensor([0, 5, 0]).int()}, "at must be from 0 to 4, got 5 for sequence 1"),
        ({"at": torch.tensor([0, 0, -1]).int()}, "at must be from 0 to 4, got -1 for sequence 2"),
        ({"eos_ids": torch.tensor([EOS])}, "eos_ids and ended come together"),
    ],
)
def test_errors(change, message):
    arguments, _ = case("cpu")
    with pytest.raises(RuntimeError, match="uncover_: " + message):
        uncover_(**{**arguments, "mask_id": MASK, "threshold": 0.5, **change})
