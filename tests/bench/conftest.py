"""`bench` of this tree: it is no installed package."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def bench():
    sys.path.insert(0, str(ROOT))
    try:
        import bench
        import bench.__main__
        import bench.chains
        import bench.image
        import bench.image_training
        import bench.step
        import bench.table
    finally:
        sys.path.remove(str(ROOT))
    assert Path(bench.__file__).is_relative_to(ROOT)
    return bench
