"""What every bench shares: correctness gate, interleaved timing with a cold L2, ceilings, one table, JSON lines.

The chip throttles, so a time alone says little: each line carries its share of a ceiling measured in the same run and
the ratio to the best peer, timed in turn with ours. What is bound by bytes also carries its share of a plain copy of as
many bytes, timed in turn as well: a small copy is slower than the large one that is the ceiling.
"""

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch

Run = Callable[[], object]
COPY = "a copy of as many bytes"
LARGEST_COPY = 1 << 33  # bytes; larger ones run at the ceiling
PEERS = ("sgl-deep-gemm", "deep_gemm", "torchao", "bitsandbytes", "liger-kernel", "diffusers", "triton")


@dataclass
class Case:
    """One shape of one op. `ours` and each peer run the same work on the same inputs."""

    op: str
    shape: str
    ours: Run
    error: Callable[[], float]  # against the reference, relative; checked before anything is timed
    tolerance: float
    flop: float = 0.0
    bytes: float = 0.0
    peers: dict[str, Run] = field(default_factory=dict)
    calls: int = 1  # how often one run does the work; times are those of one
    graph: bool = True  # whether ours and the best peer are also timed in a CUDA graph, with what it needs in L2
    queue_cycles: int = 20_000  # the device waits so long while the host queues a run, so host time is not measured


@dataclass
class Line:
    op: str
    shape: str
    us: float
    tflops: float | None
    gbps: float | None
    share_of_ceiling: float
    share_of_copy: float | None
    peer: str | None
    ratio_to_peer: float | None
    peers_us: dict[str, float]
    graph_us: dict[str, float]
    error: float


class Bench:
    """Times cases on one device; `ceilings()` are measured when it is made and again when it reports."""

    def __init__(self, device: str | None = None, rounds: int = 20, kernels: int = 0):
        self.kernels = kernels  # how many a family that can shall print of a run
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.rounds = rounds if self.device.type == "cuda" else max(3, rounds // 4)
        self.flush = (
            torch.empty(256 << 20, dtype=torch.int8, device=self.device) if self.device.type == "cuda" else None
        )
        self.copy_gbps, self.matmul_tflops = self._ceilings()
        self.lines: list[Line] = []
        self.notes: list[dict[str, dict]] = []

    def _ceilings(self) -> tuple[float, float]:
        cuda = self.device.type == "cuda"
        source = torch.empty((1 << 31) if cuda else (1 << 27), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        n = 8192 if cuda else 1024
        a, b = (torch.randn(n, n, device=self.device) for _ in range(2))
        if cuda:  # E4M3 with one scale a tensor: the fastest matrix product there is
            a, b, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=self.device)

        def matmul():
            return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16) if cuda else a @ b.t()

        times = self._interleaved({"copy": lambda: target.copy_(source), "matmul": matmul})
        return 2 * source.numel() / times["copy"] / 1e3, 2 * n**3 / times["matmul"] / 1e6

    def _time_once(self, run: Run, queue_cycles: int, flush: bool) -> float:
        if self.device.type == "cpu":
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e6
        if flush:
            self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(queue_cycles)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def _interleaved(self, runs: dict[str, Run], queue_cycles: int = 20_000, flush: bool = True) -> dict[str, float]:
        for run in runs.values():
            for _ in range(2):
                run()
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.rounds):
            for name, run in runs.items():
                samples[name].append(self._time_once(run, queue_cycles, flush))
        return {name: statistics.median(values) for name, values in samples.items()}

    def add(self, case: Case) -> Line:
        error = case.error()
        if not error <= case.tolerance:  # NaN fails too
            raise SystemExit(f"{case.op} {case.shape}: error {error:.3g} is over {case.tolerance:.3g}; not timed")
        usable = {}
        for name, run in case.peers.items():
            try:
                run()
                usable[name] = run
            except Exception as reason:  # a peer that cannot take this shape is left out, visibly
                print(f"  peer {name} left out at {case.shape}: {str(reason).splitlines()[0][:90]}")
        times = self._interleaved({"ours": case.ours, **usable, **self._copy(case)}, case.queue_cycles)
        copy_us = times.pop(COPY, None)
        times = {name: us / case.calls for name, us in times.items()}
        us = times.pop("ours")
        best = min(times, key=times.get) if times else None
        tflops = case.flop / us / 1e6 if case.flop else None
        gbps = case.bytes / us / 1e3 if case.bytes else None
        floor_us = max(case.bytes / self.copy_gbps / 1e3, 0.0 if case.bytes else case.flop / self.matmul_tflops / 1e6)
        graph_us = {}
        if case.graph and self.device.type == "cuda":
            again = {"ours": case.ours, **({best: usable[best]} if best else {})}
            graph_us = self._interleaved({name: replayed([run]) for name, run in again.items()}, flush=False)
        line = Line(
            op=case.op,
            shape=case.shape,
            us=us,
            tflops=tflops,
            gbps=gbps,
            share_of_ceiling=floor_us / us,
            share_of_copy=copy_us / us if copy_us else None,
            peer=best,
            ratio_to_peer=times[best] / us if best else None,
            peers_us=times,
            graph_us=graph_us,
            error=error,
        )
        self.lines.append(line)
        print(self._row(line), flush=True)
        return line

    def _copy(self, case: Case) -> dict[str, Run]:
        """Reads half of the bytes and writes half; by a kernel, which outruns the driver's copy at these sizes."""
        if self.device.type != "cuda" or case.calls > 1 or not 0 < case.bytes <= LARGEST_COPY:
            return {}
        source = torch.empty(int(case.bytes) // 8, dtype=torch.int32, device=self.device)
        target = torch.empty_like(source)
        return {COPY: lambda: torch.bitwise_not(source, out=target)}

    @staticmethod
    def _row(line: Line) -> str:
        rate = flop_rate(line.tflops) if line.tflops else f"{line.gbps:8.0f} GB/s   "
        peer = f"{line.ratio_to_peer:5.2f}x {line.peer}" if line.peer else "    - no peer"
        return (
            f"{line.op:28s} {line.shape:26s} {line.us:10.1f} us {rate} {100 * line.share_of_ceiling:5.0f} % of ceiling"
            f" {f'{100 * line.share_of_copy:4.0f} % of copy' if line.share_of_copy else '':14s}"
            f"  {peer:28s} error {line.error:.1e}"
        )

    def note(self, kind: str, *, name: str, **facts) -> None:
        """A record that is no line: of kind "step" (``runs``: what each took and kept) or "profile"."""
        self.notes.append({kind: {"name": name, **facts}})
        for run, figures in facts.get("runs", {}).items():
            known = ", ".join(f"{key} {_figure(value)}" for key, value in figures.items() if value is not None)
            print(f"  {name:26s} {run:34s} {known}", flush=True)

    def report(self, family: str, results: Path | None, commit: str | None = None) -> None:
        """Prints the ceilings and, where ``results`` is given, writes results/<device>/<family>.jsonl."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        machine = {
            "device": name,
            "driver": _driver() if self.device.type == "cuda" else None,
            "versions": _versions(),
            "commit": commit or _commit(),
            "copy_gbps": self.copy_gbps,
            "fp8_matmul_tflops" if self.device.type == "cuda" else "fp32_matmul_tflops": self.matmul_tflops,
        }
        print(f"{family} on {name}: copy {self.copy_gbps:.0f} GB/s, matmul {flop_rate(self.matmul_tflops).strip()}")
        for (op, peer), ratios in _by_peer(self.lines).items():
            mean = statistics.geometric_mean(ratios)
            print(f"  {op}: {mean:.3f}x {peer} (geometric mean of {len(ratios)}; least {min(ratios):.3f})")
        if results is None:
            return
        path = results / name.lower().replace(" ", "-") / f"{family}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as out:
            for record in ({"machine": machine}, *({"line": asdict(line)} for line in self.lines), *self.notes):
                out.write(json.dumps(record) + "\n")
        print(f"written: {path}")


def _by_peer(lines: list[Line]) -> dict[tuple[str, str], list[float]]:
    """(op, peer) -> the peer's time over ours at each shape."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        for peer, us in line.peers_us.items():
            ratios.setdefault((line.op, peer), []).append(us / line.us)
    return ratios


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def flop_rate(tflops: float) -> str:
    return f"{tflops:8.1f} TFLOP/s" if tflops >= 10 else f"{1e3 * tflops:8.1f} GFLOP/s"


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    found = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def _driver() -> str | None:
    """The GPU driver's version."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _versions() -> dict[str, str]:
    """Versions of torch and of the peers that are installed."""
    found = {"torch": torch.__version__}
    for package in PEERS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, in float64."""
    reference = reference.double()
    return ((value.double() - reference).norm() / reference.norm().clamp(min=1e-300)).item()


def replayed(calls: list[Run]) -> Run:
    """Runs ``calls`` in turn: on a GPU as one CUDA graph, so that the host has no part in their time."""
    if not torch.cuda.is_available():
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()

    def replay(kept=calls):  # what the graph reads must outlive it
        graph.replay()

    return replay


def compiled(function: Callable, *inputs: torch.Tensor) -> Run:
    """`function` of these inputs under torch.compile, as a peer."""
    fast = torch.compile(function, dynamic=False)
    return lambda: fast(*inputs)
