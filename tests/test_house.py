"""The house's own rules, checked: every op is whole, kernels know no framework, inline assembly stays in csrc/core."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import eightfold
from eightfold import reference

ROOT = Path(__file__).resolve().parent.parent
OPS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("eightfold::"))


def test_schemas_are_registered():
    assert len(OPS) >= 16, OPS


@pytest.mark.parametrize("name", OPS)
def test_op_is_whole(name):
    """A reference of the same signature, a CPU kernel, a fake kernel, and a CUDA kernel where CUDA was built in."""
    short = name.removeprefix("eightfold::")
    schema = getattr(torch.ops.eightfold, short).default._schema
    specification = list(inspect.signature(getattr(reference, short)).parameters.values())
    count = len(schema.arguments)
    assert [argument.name for argument in schema.arguments] == [parameter.name for parameter in specification[:count]]
    assert all(parameter.default is not inspect.Parameter.empty for parameter in specification[count:])
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None
    if eightfold.build_info()["cuda"]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def sources(*suffixes):
    return [path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes]


def test_only_bindings_know_torch():
    found = [
        path.relative_to(ROOT)
        for path in sources(".h", ".cpp", ".cu", ".cuh")
        if "bindings" not in path.parts and re.search(r'#include\s*[<"](torch|ATen|c10|pybind11)', path.read_text())
    ]
    assert not found


def test_inline_assembly_lives_in_core():
    found = [
        path.relative_to(ROOT)
        for path in sources(".h", ".cpp", ".cu", ".cuh")
        if path.parent.name != "core" and re.search(r"\basm\b", path.read_text())
    ]
    assert not found


def test_files_stay_small():
    limits = {".py": 400, ".cpp": 500, ".h": 500, ".cu": 500, ".cuh": 500}
    files = [
        p for folder in ("csrc", "python", "tests", "bench") for p in (ROOT / folder).rglob("*") if p.suffix in limits
    ]
    assert files
    assert not [(str(p), n) for p in files if (n := len(p.read_text().splitlines())) > limits[p.suffix]]
