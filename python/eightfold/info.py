"""What this build contains and what this machine runs: the facts behind `eightfold info`."""

import platform
from pathlib import Path

_CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "amx_bf16")
_HOPPER = (9, 0)


def collect() -> dict[str, str]:
    """Facts in the order in which they are printed."""
    import torch

    from eightfold.cli import version

    facts = {"eightfold": version(), "python": platform.python_version(), "torch": torch.__version__}
    try:
        from eightfold.ops import _library
    except (ImportError, OSError) as error:
        facts["library"] = f"not loaded: {error}"
    else:
        facts["library"] = str(_library.LIBRARY_PATH)
        facts["kernels inside"] = _kernels(torch)
    facts["CPU"] = _cpu()
    facts["GPU"] = _gpu(torch)
    return facts


def _kernels(torch) -> str:
    ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("eightfold::")]
    counts = {
        key: sum(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for name in ops) for key in ("CPU", "CUDA")
    }
    cuda = f"{counts['CUDA']} for CUDA" if counts["CUDA"] else "none for CUDA"
    return f"{len(ops)} ops: {counts['CPU']} for the CPU, {cuda} (sm_90a)"


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


def _gpu(torch) -> str:
    if not torch.cuda.is_available():
        return "none that torch can see: ops run on the CPU"
    major, minor = capability = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory >> 30
    name = f"{torch.cuda.get_device_name()} (sm_{major}{minor}, {memory} GiB)"
    inside = torch._C._dispatch_has_kernel_for_dispatch_key("eightfold::quantize", "CUDA")
    if capability == _HOPPER and inside:
        return f"{name}: kernels run there"
    why = "the build has no CUDA kernels" if capability == _HOPPER else "the kernels are for sm_90"
    return f"{name}: ops run through their torch composition, right but not fast ({why})"
