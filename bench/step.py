"""The training step: one layer of two 7B models forward and backward, whole steps of 1.1B, 3B and 7B models.

`python -m bench step` runs the parts that take part in the comparison, `python -m bench step 1.1B 7B` those named.

Ours is models.Decoder in FP8 (and optim.AdamW); peers are the same layer and model in plain torch (bench/plain.py)
under torch.compile, in bf16 and through torchao's float8 training. U = tokens * hidden * 2 bytes.
"""

import contextlib
import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import eightfold.optim
from eightfold.models.attention import Whole
from eightfold.models.config import DecoderConfig
from eightfold.models.decoder import Decoder, DecoderLayer
from eightfold.models.precision import strategy
from eightfold.models.rotary import inverse_frequencies
from eightfold.ops import rotary_tables

from .common import Bench, Case, relative_error
from .kernel_times import KernelTimes
from .plain import PlainLayer, PlainModel


def _config(kind: str, hidden: int, heads: int, kv_heads: int, inter: int, layers: int = 1, vocab: int = 32000):
    return DecoderConfig(kind, vocab, hidden, inter, layers, heads, kv_heads, hidden // heads, rms_norm_eps=1e-5)


# The last: what ours keeps for q, k and v's weight gradients (functional.fp8_norm_linears).
LAYERS = {
    "llama-2-7b": (_config("llama", 4096, 32, 32, 11008), 4, 2048, "columns"),
    "qwen2.5-7b": (_config("qwen2", 3584, 28, 4, 18944), 4, 2048, "input"),
}
CPU_LAYERS = {
    "llama-small": (_config("llama", 256, 4, 4, 512), 1, 64, "columns"),
    "qwen2-small": (_config("qwen2", 256, 4, 2, 768), 1, 64, "input"),
}
MODELS = {
    "1.1B": (_config("llama", 2048, 32, 4, 5632, 22), 8, 2048),
    "3B": (_config("llama", 3072, 24, 8, 8192, 28), 4, 2048),
}
CPU_MODELS = {"small": (_config("llama", 256, 4, 2, 512, 2, 1024), 1, 64)}
_7B = _config("llama", 4096, 32, 32, 11008, 32)
ALONE = {"7B": (_7B, 1, 2048), "7B-batch-4": (_7B, 4, 2048)}  # one card holds nothing beside it
CPU_ALONE = {"alone": (_config("llama", 256, 4, 4, 512, 2, 1024), 1, 64)}
Part = Callable[[Bench], None]


def parts(cuda: bool) -> dict[str, Part]:
    """By name, in the order in which they run: minutes each on an H100, most of them spent compiling the peers."""
    found: dict[str, Part] = {}
    for name, (config, batch, tokens, save) in (LAYERS if cuda else CPU_LAYERS).items():
        found[name] = partial(layers, name=name, config=config, batch=batch, tokens=tokens, save=save)
    for name, (config, batch, tokens) in (MODELS if cuda else CPU_MODELS).items():
        shape = {"name": name, "config": config, "batch": batch, "tokens": tokens}
        found[name] = partial(models, **shape, peers=("bf16 compiled + fused AdamW",))
        found[f"{name}-fp32"] = partial(models, **shape, peers=("fp32 master + autocast, compiled",))
    for name, (config, batch, tokens) in (ALONE if cuda else CPU_ALONE).items():
        found[name] = partial(models, name=name, config=config, batch=batch, tokens=tokens, peers=())
    for name, (config, batch, tokens, save) in (LAYERS if cuda else CPU_LAYERS).items():
        found[f"{name}-variants"] = partial(
            layers, name=name, config=config, batch=batch, tokens=tokens, save=save, variants=True
        )
    return found


# ---- one layer ----


@dataclass
class LayerRun:
    """Forward and backward of one layer on an input of its own."""

    forward: Callable[[], tuple[torch.Tensor, ...]]
    inputs: list[torch.Tensor]
    parameters: dict[str, torch.Tensor]  # by the last two parts of their names
    grads: tuple[torch.Tensor, ...]

    def step(self) -> dict[str, torch.Tensor]:
        """Gradients of the first input and of the parameters."""
        wanted = [*self.inputs, *self.parameters.values()]
        found = torch.autograd.grad(self.forward(), wanted, self.grads)
        return dict(zip(["input", *self.parameters], [found[0], *found[len(self.inputs) :]], strict=True))

    def error(self, reference: "LayerRun") -> float:
        """The largest relative error of a gradient."""
        ours, theirs = self.step(), reference.step()
        return max(relative_error(gradient, theirs[key]) for key, gradient in ours.items())

    def saved_bytes(self) -> int:
        """Bytes of distinct storages that the forward pass keeps for the backward, parameters left out."""
        own, kept = {p.untyped_storage().data_ptr() for p in self.parameters.values()}, {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = self.forward()
            total = sum(kept.values())  # read while everything is alive: addresses are not reused
        del out
        return total


def layers(bench: Bench, *, name: str, config, batch: int, tokens: int, save: str, variants: bool = False) -> None:
    """Ours beside bf16 and torchao; with ``variants`` ours compiled and in a CUDA graph beside ours."""
    device, hidden = bench.device, config.hidden_size
    torch.manual_seed(0)
    plain = PlainLayer(config).to(device, torch.bfloat16)
    tables = rotary_tables(inverse_frequencies(config).to(device), torch.arange(tokens, device=device)[None])
    x, grad = (torch.randn(batch, tokens, hidden, device=device, dtype=torch.bfloat16) for _ in range(2))
    reference, ours = plain_run(plain, plain, tables, x, grad), our_run(config, plain, tables, x, grad, save)
    others = {}
    if variants:
        others |= _variant("ours compiled", lambda: our_run(config, plain, tables, x, grad, save, compile=True))
        if device.type == "cuda":
            others |= _variant(
                "ours in a CUDA graph", lambda: our_run(config, plain, tables, x, grad, save, graph=True)
            )
    else:
        others["bf16 compiled"] = plain_run(torch.compile(plain, dynamic=False), plain, tables, x, grad)
        others |= _torchao_run(plain, tables, x, grad)
    flop = 6 * batch * tokens * sum(p.numel() for p in plain.parameters() if p.ndim == 2)
    flop += 7 * batch * tokens**2 * config.num_attention_heads * config.head_dim  # causal attention: 2 + 5 products
    line = bench.add(
        Case(
            "layer fwd+bwd" + (" variants" if variants else ""),
            f"{name} {batch}x{tokens}",
            ours=ours.step,
            error=lambda: ours.error(reference),
            tolerance=0.12,
            flop=flop,
            peers={key: other.step for key, other in others.items()},
            graph=False,
            queue_cycles=20_000_000,  # 11 ms: more than the host's time for a layer
        )
    )
    unit = batch * tokens * hidden * 2
    runs = {}
    timed = {key: other for key, other in others.items() if key in line.peers_us}  # others could not run, and said so
    for key, candidate in {"ours": ours, "bf16 eager": reference, **timed}.items():
        us = line.us if key == "ours" else line.peers_us.get(key)
        saved, peak = candidate.saved_bytes(), _peak_bytes(candidate.step, device)
        runs[key] = {"ms": us / 1e3 if us else None, "saved_units": saved / unit, "peak_bytes": peak}
    bench.note("step", name=f"layer of {name} {batch}x{tokens}", runs=runs)
    profile(bench, f"layer of {name} {batch}x{tokens}", ours.step)


def _variant(name: str, make: Callable[[], LayerRun]) -> dict[str, LayerRun]:
    try:
        made = make()
        made.step()
        return {name: made}
    except Exception as reason:
        print(f"  {name} left out: {str(reason).splitlines()[0][:90]}")
        return {}


def plain_run(call, layer: PlainLayer, tables, x, grad) -> LayerRun:
    leaf = x.clone().requires_grad_()
    return LayerRun(lambda: (call(leaf, *tables),), [leaf], _parameters(layer), (grad,))


def our_run(
    config, plain: PlainLayer, tables, x, grad, save: str, compile: bool = False, graph: bool = False
) -> LayerRun:
    """Our layer with the weights of `plain`. It takes and gives the stream and a branch not yet added to it: here half
    of x each, so that both adds of a layer are in it; the gradient goes to both outputs."""
    layer = DecoderLayer(config, 0, strategy("fp8", save)).to(x.device, torch.bfloat16)
    with torch.no_grad():
        for key, parameter in _parameters(layer).items():
            parameter.copy_(_parameters(plain)[key])
    stream, branch = ((x / 2).requires_grad_() for _ in range(2))

    def forward(stream, branch):
        return layer(stream, branch, tables, Whole(None, None))

    call = forward
    if compile:
        call = torch.compile(forward, dynamic=False)
    if graph:
        call = torch.cuda.make_graphed_callables(_Pair(layer, tables), (stream, branch))
    return LayerRun(lambda: call(stream, branch), [stream, branch], _parameters(layer), (grad, grad))


def _parameters(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {".".join(key.split(".")[-2:]): p for key, p in layer.named_parameters()}


class _Pair(torch.nn.Module):
    """A layer with its constant arguments bound, as make_graphed_callables takes it."""

    def __init__(self, layer, tables):
        super().__init__()
        self.layer, self.tables = layer, tables

    def forward(self, stream, branch):
        return self.layer(stream, branch, self.tables, Whole(None, None))


def _torchao_run(plain, tables, x, grad) -> dict[str, LayerRun]:
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        print("  peer torchao left out: not installed")
        return {}
    layer = convert_to_float8_training(copy.deepcopy(plain))
    return {"torchao float8 tensorwise": plain_run(torch.compile(layer, dynamic=False), layer, tables, x, grad)}


# ---- whole steps ----


@dataclass
class ModelRun:
    step: Callable[[], torch.Tensor]  # returns the loss
    peak: int  # bytes, its own parameters and states included
    state: int  # bytes of parameters, gradients and optimizer states


def models(bench: Bench, *, name: str, config, batch: int, tokens: int, peers: tuple[str, ...]) -> None:
    """Whole steps, host and device: ours and each peer in turn, or, of what does not fit beside ours, its memory."""
    device = bench.device
    ids = torch.randint(config.vocab_size, (batch, tokens + 1), device=device)
    data = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    tables = rotary_tables(inverse_frequencies(config).to(device), torch.arange(tokens, device=device)[None])
    runs: dict[str, dict] = {}
    if peers == ("fp32 master + autocast, compiled",):
        runs[peers[0]] = _alone(lambda: _plain_model(config, device, data, tables, torch.float32), device)
        peers = ()
    built = {"ours": built_run(lambda: _our_model(config, device, data), device)}
    for peer in peers:
        try:
            built[peer] = built_run(lambda: _plain_model(config, device, data, tables, torch.bfloat16), device)
        except Exception as reason:
            print(f"  peer {peer} left out: {str(reason).splitlines()[0][:90]}")
    times: dict[str, list[float]] = {key: [] for key in built}
    for _ in range(8 if device.type == "cuda" else 2):
        for key, candidate in built.items():
            times[key].append(wall_seconds(candidate.step, device))
    for key, candidate in built.items():
        seconds = statistics.median(times[key])
        runs[key] = {
            "ms": 1e3 * seconds,
            "host_ms": 1e3 * host_seconds(candidate.step, device),
            "tokens_per_second": batch * tokens / seconds,
            "peak_bytes": candidate.peak,
            "state_bytes": candidate.state,
        }
    bench.note("step", name=f"{name} {batch}x{tokens}", runs=runs)
    if len(runs) == 1 or peers:
        profile(bench, f"{name} {batch}x{tokens}", built["ours"].step, runs["ours"]["ms"])


def _alone(make: Callable[[], Callable], device) -> dict:
    """Peak memory of a run that is gone afterwards; None where it does not fit."""
    try:
        run = built_run(make, device)
    except torch.OutOfMemoryError:
        return {"peak_bytes": None, "does_not_fit": torch.cuda.get_device_properties(device).total_memory}
    finally:
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    return {"peak_bytes": run.peak, "state_bytes": run.state}


def profile(bench: Bench, name: str, step: Callable[[], object], wall_ms: float | None = None) -> None:
    if bench.device.type != "cuda":
        return
    times = KernelTimes(step, wall_ms)
    print(times.table(bench.kernels or 16))
    bench.note("profile", name=name, ms=dict(times.by_class), wall_ms=times.wall_ms, idle_share=times.idle_share)


def _our_model(config, device, data) -> Callable[[], torch.Tensor]:
    with device, default_dtype(torch.bfloat16):
        model = Decoder(config, "fp8")
    optimizer = eightfold.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        loss = model.loss(*data)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _plain_model(config, device, data, tables, dtype) -> Callable[[], torch.Tensor]:
    with device, default_dtype(dtype):
        model = PlainModel(config)
    call = torch.compile(model, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.float32):
            loss = call(*data, *tables)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def built_run(make: Callable[[], Callable], device) -> ModelRun:
    before = _allocated(device)
    step = make()
    for _ in range(3):  # the first steps make states and compile
        loss = step()
    if not torch.isfinite(loss):
        raise SystemExit(f"step: the loss is {loss.item()}")
    return ModelRun(step, _peak_bytes(step, device) - before, _allocated(device) - before)


def wall_seconds(step: Callable[[], object], device, steps: int = 2) -> float:
    """Seconds a step, host and device: `steps` in a row, then one wait."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def host_seconds(step: Callable[[], object], device) -> float:
    """Seconds until a step's call returns, the device being free. Below the step's own time, the host is ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _allocated(device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _peak_bytes(step: Callable[[], object], device) -> int:
    """Most bytes of live tensors during a step (0 on the CPU)."""
    if device.type != "cuda":
        step()
        return 1
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
