"""What this build contains and what this machine runs: the facts behind `eightfold info`."""

import platform
from pathlib import Path
from typing import Any

_CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "amx_bf16")
_HOPPER = (9, 0)


def collect() -> dict[str, str]:
    """Facts in the order in which they are printed."""
    import torch

    from eightfold.cli import version

    facts = {"eightfold": version(), "python": platform.python_version(), "torch": torch.__version__}
    build: dict[str, Any] = {"cuda": False}
    try:
        from eightfold.ops import _library
    except (ImportError, OSError) as error:
        facts["library"] = f"not loaded: {error}"
    else:
        build = _library.build_info()
        cuda = f"CUDA {build['cuda_version']}" if build["cuda"] else "no CUDA"
        facts["library"] = f"{_library.LIBRARY_PATH} (compiler {build['compiler']}, {cuda})"
        facts["kernels inside"] = _kernels(torch, build)
    facts["CPU"] = _cpu()
    facts["GPU"] = _gpu(torch, build)
    return facts


def _kernels(torch, build: dict[str, Any]) -> str:
    ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("eightfold::")]
    cpu = sum(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU") for name in ops)
    cuda = "sm_90a" if build["cuda"] else "none"
    return f"{len(ops)} ops; for the CPU {cpu} (matrix product: {build['cpu_gemm']}); for CUDA: {cuda}"


def _cpu() -> str:
    import torch

    name, flags = platform.machine(), []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        lines = {key.strip(): value.strip() for key, value in lines.items()}
        name = lines.get("model name", name)
        present = set(lines.get("flags", "").split())
        flags = [flag for flag in _CPU_FLAGS if flag in present]
    return f"{name}, {torch.get_num_threads()} threads{': ' if flags else ''}{' '.join(flags)}"


def _gpu(torch, build: dict[str, Any]) -> str:
    if not torch.cuda.is_available():
        return "none that torch can see: ops run on the CPU"
    major, minor = capability = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory >> 30
    name = f"{torch.cuda.get_device_name()} (sm_{major}{minor}, {memory} GiB)"
    if capability == _HOPPER and build["cuda"]:
        return f"{name}: kernels run there"
    why = "the build has no CUDA kernels" if capability == _HOPPER else "the kernels are for sm_90"
    return f"{name}: ops run through their torch composition, right but not fast ({why})"
