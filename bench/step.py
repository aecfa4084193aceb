"""The training step: one layer of two 7B models forward and backward, and whole steps of a 1.1B and a 3B model.

Ours is models.Decoder in FP8 (and optim.AdamW); peers are the same layer and model in plain torch (bench/plain.py)
under torch.compile, in bf16 and through torchao's float8 training. U = tokens * hidden * 2 bytes.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import eightfold.optim
from eightfold.models.config import DecoderConfig
from eightfold.models.decoder import Decoder, DecoderLayer
from eightfold.models.precision import strategy
from eightfold.models.rotary import inverse_frequencies, rotary_tables

from .common import Bench, Case, relative_error
from .kernel_times import KernelTimes
from .plain import PlainLayer, PlainModel


def _config(kind: str, hidden: int, heads: int, kv_heads: int, inter: int, layers: int = 1, vocab: int = 32000):
    return DecoderConfig(kind, vocab, hidden, inter, layers, heads, kv_heads, hidden // heads, rms_norm_eps=1e-5)


LAYERS = {
    "llama-2-7b": (_config("llama", 4096, 32, 32, 11008), 4, 2048),
    "qwen2.5-7b": (_config("qwen2", 3584, 28, 4, 18944), 4, 2048),
}
CPU_LAYERS = {
    "llama small": (_config("llama", 256, 4, 4, 512), 1, 64),
    "qwen2 small": (_config("qwen2", 256, 4, 2, 768), 1, 64),
}
MODELS = {
    "1.1B": (_config("llama", 2048, 32, 4, 5632, 22), 8, 2048),
    "3B": (_config("llama", 3072, 24, 8, 8192, 28), 4, 2048),
}
CPU_MODELS = {"small": (_config("llama", 256, 4, 2, 512, 2, 1024), 1, 64)}


def run(bench: Bench, peers: bool = True, graphs: bool = True) -> None:
    cuda = bench.device.type == "cuda"
    for name, (config, batch, tokens) in (LAYERS if cuda else CPU_LAYERS).items():
        layers(bench, name, config, batch, tokens, peers, graphs and cuda)
    for name, (config, batch, tokens) in (MODELS if cuda else CPU_MODELS).items():
        models(bench, name, config, batch, tokens, peers)


# ---- one layer ----


@dataclass
class LayerRun:
    """Forward and backward of one layer on an input of its own."""

    forward: Callable[[], tuple[torch.Tensor, ...]]
    inputs: list[torch.Tensor]
    parameters: dict[str, torch.Tensor]  # by the last two parts of their names
    grads: tuple[torch.Tensor, ...]

    def step(self) -> None:
        for t in (*self.inputs, *self.parameters.values()):
            t.grad = None
        torch.autograd.backward(self.forward(), self.grads)

    def error(self, reference: "LayerRun") -> float:
        """The larger relative error of the gradients of the input and of any parameter."""
        self.step()
        reference.step()
        pairs = [(self.inputs[0].grad, reference.inputs[0].grad)]
        pairs += [(p.grad, reference.parameters[key].grad) for key, p in self.parameters.items()]
        return max(relative_error(a, b) for a, b in pairs)

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


def layers(bench: Bench, name: str, config, batch: int, tokens: int, peers: bool, graphs: bool) -> None:
    device, hidden = bench.device, config.hidden_size
    torch.manual_seed(0)
    plain = PlainLayer(config).to(device, torch.bfloat16)
    tables = rotary_tables(inverse_frequencies(config).to(device), torch.arange(tokens, device=device)[None])
    x, grad = (torch.randn(batch, tokens, hidden, device=device, dtype=torch.bfloat16) for _ in range(2))
    reference, ours = plain_run(plain, plain, tables, x, grad), our_run(config, plain, tables, x, grad)
    runs = {"": ours}
    if graphs:
        runs |= _variant(", CUDA graph", lambda: our_run(config, plain, tables, x, grad, graph=True))
    others = {}
    if peers and device.type == "cuda":
        others["bf16 compiled"] = plain_run(torch.compile(plain, dynamic=False), plain, tables, x, grad)
        others |= _torchao_run(plain, tables, x, grad)
        runs |= _variant(", compiled", lambda: our_run(config, plain, tables, x, grad, compile=True))
    unit = batch * tokens * hidden * 2
    flop = 6 * batch * tokens * sum(p.numel() for p in plain.parameters() if p.ndim == 2)
    flop += 7 * batch * tokens**2 * config.num_attention_heads * config.head_dim  # causal attention: 2 + 5 products
    for suffix, candidate in runs.items():
        line = bench.add(
            Case(
                f"layer fwd+bwd{suffix}",
                f"{name} {batch}x{tokens}",
                ours=candidate.step,
                error=lambda candidate=candidate: candidate.error(reference),
                tolerance=0.12,
                flop=flop,
                peers={key: other.step for key, other in others.items()},
            )
        )
        for key, us in line.peers_us.items():
            print(f"    {key}: {us / 1e3:.2f} ms, ours {us / line.us:.2f}x")
    for key, candidate in {"ours": ours, "bf16 eager": reference, **others}.items():
        saved, peak = candidate.saved_bytes(), _peak_bytes(candidate.step, device)
        print(f"    {key}: saves {saved / unit:.1f} U ({saved / 1e6:.0f} MB), peak {peak / 1e6:.0f} MB")
    if device.type == "cuda":
        print(KernelTimes(ours.step).table(kernels=16))


def _variant(name: str, make: Callable[[], LayerRun]) -> dict[str, LayerRun]:
    try:
        made = make()
        made.step()
        return {name: made}
    except Exception as reason:
        print(f"  ours{name} left out: {str(reason).splitlines()[0][:90]}")
        return {}


def plain_run(call, layer: PlainLayer, tables, x, grad) -> LayerRun:
    leaf = x.clone().requires_grad_()
    return LayerRun(lambda: (call(leaf, *tables),), [leaf], _parameters(layer), (grad,))


def our_run(config, plain: PlainLayer, tables, x, grad, compile: bool = False, graph: bool = False) -> LayerRun:
    """Our layer with the weights of `plain`. It takes and gives the stream and a branch not yet added to it: here half
    of x each, so that both adds of a layer are in it; the gradient goes to both outputs."""
    layer = DecoderLayer(config, 0, strategy("fp8")).to(x.device, torch.bfloat16)
    with torch.no_grad():
        for key, parameter in _parameters(layer).items():
            parameter.copy_(_parameters(plain)[key])
    stream, branch = ((x / 2).requires_grad_() for _ in range(2))

    def forward(stream, branch):
        return layer(stream, branch, tables, None, None)

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
        return self.layer(stream, branch, self.tables, None, None)


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


def models(bench: Bench, name: str, config, batch: int, tokens: int, peers: bool) -> None:
    device = bench.device
    ids = torch.randint(config.vocab_size, (batch, tokens + 1), device=device)
    data = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    runs = {"ours": _built(lambda: _our_model(config, device, data), device)}
    if peers and device.type == "cuda":
        tables = rotary_tables(inverse_frequencies(config).to(device), torch.arange(tokens, device=device)[None])
        fp32 = _built(lambda: _plain_model(config, device, data, tables, torch.float32), device)
        print(f"  {name}: fp32 master + autocast compiled: peak {fp32.peak / 1e9:.1f} GB")
        del fp32
        torch.cuda.empty_cache()
        runs["bf16 compiled + fused AdamW"] = _built(
            lambda: _plain_model(config, device, data, tables, torch.bfloat16), device
        )
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(8 if device.type == "cuda" else 2):
        for key, candidate in runs.items():
            times[key].append(_wall_seconds(candidate.step, device))
    ours = statistics.median(times["ours"])
    for key, candidate in runs.items():
        seconds = statistics.median(times[key])
        print(
            f"  step {name} {batch}x{tokens} {key:28s} {1e3 * seconds:8.1f} ms {batch * tokens / seconds:9.0f} tok/s "
            f"(ours {seconds / ours:.2f}x), peak {candidate.peak / 1e9:.2f} GB (ours "
            f"{runs['ours'].peak / candidate.peak:.2f} of it)",
            flush=True,
        )
    if device.type == "cuda":
        print(KernelTimes(runs["ours"].step, repeats=2).table(kernels=20))


def _our_model(config, device, data) -> Callable[[], torch.Tensor]:
    with device:
        model = Decoder(config, "fp8").to(torch.bfloat16)
    optimizer = eightfold.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        loss = model.loss(*data)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _plain_model(config, device, data, tables, dtype) -> Callable[[], torch.Tensor]:
    with device:
        model = PlainModel(config).to(dtype)
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


def _built(make: Callable[[], Callable], device) -> ModelRun:
    before = _allocated(device)
    step = make()
    for _ in range(3):  # the first steps make states and compile
        loss = step()
    if not torch.isfinite(loss):
        raise SystemExit(f"step: the loss is {loss.item()}")
    return ModelRun(step, _peak_bytes(step, device) - before, _allocated(device) - before)


def _wall_seconds(step: Callable[[], object], device, steps: int = 2) -> float:
    """Seconds a step, host and device: `steps` in a row, then one wait."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


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
