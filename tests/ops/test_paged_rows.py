"""What a decoding step reads of its sequences: against the reference, blank rows, torch's machinery, errors."""

import pytest
import torch

from eightfold.ops import paged_next_rows_
from eightfold.reference import paged_next_rows_ as reference

op = torch.ops.eightfold.paged_next_rows_
SIZE = 16


def case(rows, device, width=5):
    """Every fifth row is blank: page -1, position 0, no sequence."""
    positions = torch.randint(width * SIZE, (rows,))
    tokens, active = torch.randint(-1, 1000, (rows,)), torch.ones(rows, dtype=torch.int32)
    pages = torch.randint(2**20, (rows, width), dtype=torch.int32)
    positions[::5], active[::5], pages[::5] = 0, 0, -1
    return [t.to(device) for t in (positions, tokens, active, pages)]


@pytest.mark.parametrize("rows", [0, 1, 7, 128, 300])
def test_against_the_reference(rows, device):
    ours = case(rows, device)
    theirs = [t.clone() for t in ours]
    for _ in range(2):
        ours[0].clamp_(max=5 * SIZE - 1), theirs[0].clamp_(max=5 * SIZE - 1)
        found, expected = paged_next_rows_(*ours, SIZE), reference(*theirs, SIZE)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
        assert torch.equal(ours[0], theirs[0])
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))


@pytest.mark.gpu
def test_beyond_the_pages_is_no_slot():
    positions, tokens, active, pages = case(4, "cuda")
    positions[1], positions[2] = 5 * SIZE, 7 * SIZE + 1
    assert paged_next_rows_(positions, tokens, active, pages, SIZE)[2].tolist()[1:3] == [-1, -1]


def test_torch_citizen(device):
    torch.library.opcheck(op, (*case(9, device), SIZE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.tensor([3, 80, 0])}, "positions must be from 0 to 79, got 80 at 1"),
        ({0: torch.tensor([3, -1, 0])}, "positions must be from 0 to 79, got -1 at 1"),
        ({0: torch.zeros(3, dtype=torch.int32)}, "positions must be int64, got int32"),
        ({1: torch.zeros(2, dtype=torch.int64)}, r"tokens must have shape \[3\], got \[2\]"),
        ({2: torch.zeros(3, dtype=torch.int64)}, "active must be int32, got int64"),
        ({3: torch.zeros(5, 3, dtype=torch.int32).t()}, "pages must be contiguous"),
        ({4: 0}, "page_size must be at least 1, got 0"),
    ],
)
def test_errors(change, message):
    arguments = [*case(3, "cpu"), SIZE]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=f"paged_next_rows_: {message}"):
        op(*arguments)
