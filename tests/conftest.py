"""Shared fixtures. `device` runs a test on the CPU and, marked `gpu`, on CUDA; fresh memory is poisoned with NaN."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin cost 20 ms an operation on a busy machine

import pytest
import torch


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory():
    """torch.empty returns NaN-filled memory, so that an element a kernel forgot to write cannot look right."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def bare_memory():
    """torch.empty launches nothing, so that kernels follow each other on the device as they do outside of tests."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True
