"""convert(model): puts the FP8 layers in the place of the linears, norms and gated MLPs of any torch model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from eightfold.nn.linear import FP8Linear
from eightfold.nn.mlp import FP8SwiGLU
from eightfold.nn.norm import FP8RMSNorm, norm_eps

# Output heads, embeddings, routers, and the norms of single attention heads stay in high precision.
DEFAULT_EXCLUDE = ("*lm_head", "*embed*", "*router*", "*.gate", "*q_norm", "*k_norm")
# Inputs that attention saves in bfloat16 anyway: kept by reference, not a second time in FP8.
SAVED_BY_ATTENTION = ("*.o_proj", "*.out_proj")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass
class ConversionReport:
    """What `convert` did: qualified names of what it replaced, and of what it left with the reason."""

    linears: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    mlps: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = f"{len(self.linears)} linears, {len(self.norms)} norms, {len(self.mlps)} gated MLPs converted"
        return "\n".join([counts] + [f"left {name}: {reason}" for name, reason in self.left.items()])


def convert(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    *,
    cache_weights: bool = False,
) -> nn.Module:
    """Replaces, in place, nn.Linear by FP8Linear, RMS norms by FP8RMSNorm and SiLU-gated MLPs by FP8SwiGLU.

    ``include`` and ``exclude`` are globs (fnmatch) on qualified module names such as "model.layers.0.mlp.down_proj";
    None includes everything, and what ``exclude`` matches is never touched. Parameters are the same objects afterwards
    (tied ones stay tied, optimizers keep them) under the same state_dict keys. RMS norms are recognised by a class name
    that ends with RMSNorm, MLPs by gate_proj, up_proj, down_proj and a SiLU act_fn, and both by computing what the FP8
    layer computes on a small input: other formulas, such as a weight of 1 + w, are left. Also left: sizes that are not
    multiples of 16, subclasses of nn.Linear, modules with hooks. `model.conversion_report` lists all of it.

    Returns the model (the new layer, when ``model`` itself is one). ValueError when a pattern of ``include`` matches
    nothing that was converted.
    """
    converter = _Converter(tuple(include) if include is not None else None, tuple(exclude), cache_weights)
    model = converter.visit(model, "")
    report = converter.report
    for pattern in include or ():
        converted = report.linears + report.norms + report.mlps + converter.projections
        if not any(fnmatchcase(name, pattern) for name in converted):
            near = [f"{name} ({reason})" for name, reason in report.left.items() if fnmatchcase(name, pattern)]
            raise ValueError(
                f"convert: the include pattern {pattern!r} matched no convertible module"
                + (f"; left: {', '.join(near[:5])}" if near else "")
            )
    model.conversion_report = report
    return model


class _Converter:
    def __init__(self, include: tuple[str, ...] | None, exclude: tuple[str, ...], cache_weights: bool) -> None:
        self.include, self.exclude, self.cache_weights = include, exclude, cache_weights
        self.report = ConversionReport()
        self.projections: list[str] = []  # linears that went into an FP8SwiGLU
        self.done: dict[nn.Module, nn.Module] = {}  # a module used in two places stays one module

    def visit(self, module: nn.Module, name: str) -> nn.Module:
        if module in self.done:
            return self.done[module]
        new = self.done[module] = self.replacement(module, name)
        if new is module and not isinstance(module, (FP8Linear, FP8RMSNorm, FP8SwiGLU)):
            for child_name, child in list(module._modules.items()):  # named_children skips repeated ones
                if child is None:
                    continue
                full = f"{name}.{child_name}" if name else child_name
                replaced = self.visit(child, full)
                if replaced is not child:
                    setattr(module, child_name, replaced)
        return new

    def replacement(self, module: nn.Module, name: str) -> nn.Module:
        if type(module) is nn.Linear:
            return self.linear(module, name)
        if isinstance(module, nn.Linear) and not isinstance(module, FP8Linear) and self.selected(name):
            self.report.left[name] = f"{type(module).__name__} is a subclass of Linear"
        elif type(module).__name__.endswith("RMSNorm") and not isinstance(module, FP8RMSNorm):
            return self.norm(module, name)
        elif all(type(getattr(module, projection, None)) is nn.Linear for projection in PROJECTIONS):
            return self.mlp(module, name)
        return module

    def selected(self, name: str) -> bool:
        included = self.include is None or any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not self.excluded(name)

    def excluded(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def leave(self, module: nn.Module, name: str, reason: str) -> nn.Module:
        self.report.left[name] = reason
        return module

    def linear(self, linear: nn.Linear, name: str) -> nn.Module:
        if not self.selected(name):
            return linear
        reason = _unfit(linear)
        if reason is not None:
            return self.leave(linear, name, reason)
        self.report.linears.append(name)
        save = "input" if any(fnmatchcase(name, pattern) for pattern in SAVED_BY_ATTENTION) else "columns"
        return FP8Linear.from_linear(linear, save=save, cache_weight=self.cache_weights)

    def norm(self, norm: nn.Module, name: str) -> nn.Module:
        if not self.selected(name):
            return norm
        weight, eps = getattr(norm, "weight", None), norm_eps(norm)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
            return self.leave(norm, name, "needs a 1-D weight and a fixed eps")
        if set(dict(norm.named_parameters())) != {"weight"} or _has_hooks(norm):
            return self.leave(norm, name, "has other parameters or hooks")
        if not _same_norm(norm, eps):
            return self.leave(norm, name, f"{type(norm).__name__} does not compute x / rms(x) * weight")
        self.report.norms.append(name)
        return FP8RMSNorm.from_norm(norm)

    def mlp(self, mlp: nn.Module, name: str) -> nn.Module:
        """FP8SwiGLU where all of it is selected and fits; else the module, whose linears are visited one by one."""
        layers = [getattr(mlp, projection) for projection in PROJECTIONS]
        names = [f"{name}.{projection}" if name else projection for projection in PROJECTIONS]
        selected = self.selected(name) or all(self.selected(n) for n in names)
        if not selected or any(self.excluded(n) for n in (name, *names)):
            return mlp
        if set(dict(mlp.named_parameters())) != {f"{projection}.weight" for projection in PROJECTIONS}:
            return mlp  # biases, or more layers
        if any(_unfit(layer) is not None for layer in layers) or _has_hooks(mlp):
            return mlp
        if set(dict(mlp.named_children())) - {*PROJECTIONS, "act_fn"} or not _same_mlp(mlp):
            return mlp  # dropout and the like, or another formula
        self.report.mlps.append(name)
        self.projections += names
        new = FP8SwiGLU.from_mlp(mlp)
        for layer in (new.gate_proj, new.up_proj, new.down_proj):
            layer.cache_weight = self.cache_weights
        return new


def _unfit(linear: nn.Linear) -> str | None:
    if linear.in_features % 16 or linear.out_features % 16 or not linear.in_features or not linear.out_features:
        return f"in_features {linear.in_features} and out_features {linear.out_features} must be multiples of 16"
    if linear.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"weight is {linear.weight.dtype}, neither float32 nor bfloat16"
    return "has hooks" if _has_hooks(linear) else None


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds) or "forward" in vars(module)


def _try(module: nn.Module, parameters: dict, x: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether ``module`` with these small parameters maps x to ``expected``; works for modules on any device."""
    try:
        with torch.no_grad():
            out = torch.func.functional_call(module, parameters, (x,))
    except Exception:  # a forward of another shape: not this formula
        return False
    return isinstance(out, torch.Tensor) and out.shape == expected.shape and torch.allclose(out, expected, 1e-4, 1e-5)


def _random(*shape: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)


def _same_norm(norm: nn.Module, eps: float) -> bool:
    hidden = norm.weight.shape[0]
    x, weight = _random(2, hidden), _random(hidden)
    expected = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return _try(norm, {"weight": weight}, x, expected)


def _same_mlp(mlp: nn.Module) -> bool:
    x, gate, up, down = _random(3, 16), _random(32, 16), _random(32, 17)[:, :16], _random(16, 32)
    expected = (nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
    weights = dict(zip((f"{projection}.weight" for projection in PROJECTIONS), (gate, up, down), strict=True))
    return _try(mlp, weights, x, expected)
