"""Memory layouts of FP8 codes and scales, in one place for fakes, references and tests.

A quantised tensor of logical shape [rows, cols] and group [gr, gc] has codes of that shape and scales
[ceil(rows/gr), ceil(cols/gc)], so code[i, j] * scale[i // gr, j // gc] is its value whatever the strides. The strides
are what the matrix kernels want (csrc/bindings/common.cpp allocates the same):

========== ============================== =================================================
group      codes                          scales
========== ============================== =================================================
(1, 128)   row-major                      rows contiguous, leading dimension padded to 4
(1, 16)    row-major                      as (1, 128)
(128, 1)   rows contiguous, ld padded 16  cols contiguous, leading dimension padded to 4
(128, 128) row-major                      row-major
========== ============================== =================================================
"""

import torch
from torch import Tensor

GROUPS = ((1, 128), (128, 128), (128, 1), (1, 16))
CODES = torch.float8_e4m3fn


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def round_up(a: int, b: int) -> int:
    return ceil_div(a, b) * b


def empty_codes(rows: int, cols: int, group: tuple[int, int], device: torch.device) -> Tensor:
    if tuple(group) == (128, 1):
        return torch.empty_strided((rows, cols), (1, round_up(max(rows, 1), 16)), dtype=CODES, device=device)
    return torch.empty((rows, cols), dtype=CODES, device=device)


def empty_turned_codes(rows: int, cols: int, device: torch.device) -> Tensor:
    """Codes [cols, rows] of the transpose of a [rows, cols] tensor in groups (128, 128): the ld is padded to 16."""
    return torch.empty_strided((cols, rows), (round_up(max(rows, 1), 16), 1), dtype=CODES, device=device)


def empty_scales(rows: int, cols: int, group: tuple[int, int], device: torch.device) -> Tensor:
    shape = (ceil_div(rows, group[0]), ceil_div(cols, group[1]))
    if group[0] == 1:
        strides = (1, round_up(max(rows, 1), 4))
    elif group[1] == 1:
        strides = (round_up(max(cols, 1), 4), 1)
    else:
        strides = (max(shape[1], 1), 1)
    return torch.empty_strided(shape, strides, dtype=torch.float32, device=device)
