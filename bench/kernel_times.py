"""Where the time of a run goes on the GPU: kernel time by class, and the share in which no kernel runs."""

import time
from collections import Counter
from collections.abc import Callable

import torch

# The first class one of whose words is in a kernel's name takes it.
CLASSES = {
    "convolution": ("depthwise", "conv2d", "implicit_gemm"),
    "attention": ("flash", "fmha", "sdpa", "cudnn", "attention"),
    "optimizer": ("adamw", "came_", "multi_tensor", "dre_"),
    "GEMM": ("fp8_gemm", "gemm", "cutlass", "nvjet", "cublas", "splitk", "_mm_"),
    "casts, norms, SwiGLU": (
        "_cast",
        "transpose_codes",
        "quantize",
        "norm",
        "dweight",
        "_sums",
        "swiglu",
        "silu",
        "float8",
        "fp8",
    ),
    "rotary": ("rotary", "rope_", "cos", "sin"),
    "loss": ("cross_entropy", "softmax", "nll_loss"),
}


def class_of(kernel: str) -> str:
    name = kernel.lower()
    return next((group for group, words in CLASSES.items() if any(word in name for word in words)), "other")


class KernelTimes:
    """Kernels of `repeats` runs: milliseconds a run by class and by name, launches a run, and the idle share. A kernel
    that starts while one before it still runs counts from that one's end.

    The idle share is of `wall_ms`, a run's time without the profiler, which slows the host; measured where not given.
    """

    def __init__(self, run: Callable[[], object], wall_ms: float | None = None, repeats: int = 3):
        run()
        torch.cuda.synchronize()
        if wall_ms is None:
            wall_ms = self._wall_ms(run, repeats)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(repeats):
                run()
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        events = sorted(
            (e.time_range.start, e.time_range.end, e.name) for e in profile.events() if e.device_type == on_device
        )
        self.by_class: Counter[str] = Counter()
        self.by_name: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        busy, reached = 0.0, events[0][0] if events else 0.0
        for start, end, name in events:
            alone = max(0.0, end - max(start, reached))
            self.by_class[class_of(name)] += alone / repeats / 1e3
            self.by_name[name] += alone / repeats / 1e3
            self.launches[name] += 1 / repeats
            busy += alone
            reached = max(reached, end)
        self.wall_ms = wall_ms
        self.idle_share = max(0.0, 1 - busy / repeats / 1e3 / wall_ms)

    @staticmethod
    def _wall_ms(run: Callable[[], object], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / repeats

    def table(self, kernels: int = 0) -> str:
        """Classes, idle time and, where asked for, the longest kernels."""
        lines = [
            f"  {group:24s} {ms:9.3f} ms {100 * ms / self.wall_ms:5.1f} %" for group, ms in self.by_class.most_common()
        ]
        lines.append(f"  {'idle':24s} {self.idle_share * self.wall_ms:9.3f} ms {100 * self.idle_share:5.1f} %")
        for name, ms in self.by_name.most_common(kernels):
            lines.append(f"    {ms:8.3f} ms in {self.launches[name]:5.1f}  {name[:90]}")
        return "\n".join(lines)
