"""Runs eightfold's ops through their torch references where this build or this device has no kernels: right, not fast.

A reference has the name and signature of its op, so it can stand in for a kernel of any dispatch key. The choice is
made once, when CUDA is first initialised at the latest: an op never changes hands between two calls.
"""

import functools
import importlib
import pkgutil
import warnings
from collections.abc import Callable

import torch

NAMESPACE = "eightfold"
HOPPER = (9, 0)

_libraries: list[torch.library.Library] = []  # a registration lives as long as its Library
_warned: set[str] = set()


def references() -> dict[str, Callable]:
    """Every op of the schema that has a function of its name in ``eightfold.reference``."""
    prefix = NAMESPACE + "::"
    ops = {name.removeprefix(prefix) for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}
    package = importlib.import_module("eightfold.reference")
    found = {}
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        module = importlib.import_module(info.name)
        # Only what a module defines itself: references import helpers from each other.
        found |= {n: f for n, f in vars(module).items() if n in ops and getattr(f, "__module__", None) == info.name}
    return found


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)


def install(dispatch_key: str = "CUDA", replace: bool = False, reason: str | None = None) -> list[str]:
    """Registers the references for ``dispatch_key`` and returns the names of the ops they now run.

    Ops that have a kernel for the key keep it unless ``replace``. The first call of any of them warns, with ``reason``.
    """
    reason = reason or f"no kernels for {dispatch_key} in this build"
    message = f"eightfold: {reason}: running the torch composition: right, not fast"
    library = torch.library.Library(NAMESPACE, "IMPL")
    installed = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered kernel.*")
        for name, reference in references().items():
            if not replace and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", dispatch_key):
                continue

            def run(*args, reference=reference, **kwargs):
                _warn_once(message)
                return reference(*args, **kwargs)

            library.impl(name, functools.wraps(reference)(run), dispatch_key)
            installed.append(name)
    _libraries.append(library)
    return installed


def has_kernels(dispatch_key: str) -> bool:
    """Whether the library was built with kernels for ``dispatch_key``."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::quantize", dispatch_key)


def kernels_run_on(device: torch.device) -> bool:
    """Whether ops on ``device`` are this library's CUDA kernels, which a CUDA graph can capture."""
    return device.type == "cuda" and has_kernels("CUDA") and torch.cuda.get_device_capability(device) == HOPPER


def _check_devices() -> None:
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    others = [i for i, capability in enumerate(capabilities) if capability != HOPPER]
    if others:
        device = others[0]
        major, minor = capabilities[device]
        name = torch.cuda.get_device_name(device)
        install(
            "CUDA", replace=True, reason=f"no sm_90 kernels for this device ({name}, cuda:{device}, sm_{major}{minor})"
        )


def install_where_needed() -> None:
    """Decides for CUDA without initialising it: devices are looked at when torch first initialises CUDA, or never."""
    if not has_kernels("CUDA"):
        install("CUDA", reason="this build has no CUDA kernels")
    else:
        torch.cuda._lazy_call(_check_devices)
