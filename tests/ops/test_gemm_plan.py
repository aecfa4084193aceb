"""The plan that the Hopper kernel takes for a shape: printable, a function of the shape alone, and covering it."""

import random
import threading

import pytest

from eightfold.ops import gemm_plan

SHAPES = [
    (1, 4096, 4096),
    (64, 24576, 1536),
    (128, 4096, 4096),
    (100, 28672, 4096),
    (8192, 11008, 4096),
    (4096, 2176, 7168),
    (129, 144, 16),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("b_group_rows", [1, 128])
def test_plan_covers_the_result(shape, b_group_rows):
    m, n, _ = shape
    plan = gemm_plan(*shape, b_group_rows=b_group_rows, sm_count=132)
    assert set(plan) == {"kernel", "tile_m", "tile_n", "tiles_m", "tiles_n", "grid", "waves"}
    assert (plan["tiles_m"] - 1) * plan["tile_m"] < m <= plan["tiles_m"] * plan["tile_m"]
    assert n <= plan["tiles_n"] * plan["tile_n"]
    assert 0 < plan["grid"] <= 132
    assert plan["tiles_m"] * plan["tiles_n"] <= plan["grid"] * plan["waves"]


def test_kernels():
    assert gemm_plan(8192, 8192, 8192, sm_count=132)["kernel"] == "pairs"
    assert gemm_plan(64, 4096, 4096, sm_count=132)["kernel"] == "small"
    assert gemm_plan(200, 576, 576, sm_count=132)["kernel"] == "tiles"


def test_plan_is_deterministic():
    assert gemm_plan(8192, 4096, 11008, sm_count=132) == gemm_plan(8192, 4096, 11008, sm_count=132)


def test_plans_are_kept_apart():
    """Plans of the shapes seen last are kept, by thread: any order of many shapes gives what each gives on its own."""
    random.seed(0)
    shapes = [tuple(random.choice((1, 48, 129, 576, 4096, 11008)) for _ in range(3)) for _ in range(300)]
    calls = [(shape, rows, sms) for shape in shapes for rows in (1, 128) for sms in (66, 132)]

    def plans(calls):
        return {call: gemm_plan(*call[0], b_group_rows=call[1], sm_count=call[2]) for call in calls}

    wanted = {}
    for call in set(calls):  # each in a thread of its own, which has seen nothing
        thread = threading.Thread(target=lambda call=call: wanted.update(plans([call])))
        thread.start()
        thread.join()
    for _ in range(2):
        random.shuffle(calls)
        assert plans(calls) == wanted


def test_the_device_decides_the_grid():
    assert gemm_plan(8192, 8192, 8192, sm_count=66)["grid"] <= 66


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"m": 0}, "gemm_plan: m must be from 1 to 2147483647, got 0"),
        ({"n": -5}, "gemm_plan: n must be from 1 to 2147483647, got -5"),
        ({"k": 1 << 31}, "gemm_plan: k must be from 1 to 2147483647, got 2147483648"),
        ({"sm_count": 0}, "gemm_plan: sm_count must be from 1 to 2147483647, got 0"),
        ({"b_group_rows": 64}, "gemm_plan: b_group_rows must be 1 or 128, got 64"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        gemm_plan(**{"m": 64, "n": 64, "k": 64, "sm_count": 132, **arguments})
