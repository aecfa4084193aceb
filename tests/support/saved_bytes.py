"""What autograd keeps between a forward and its backward, byte by byte."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Saved:
    shape: tuple
    dtype: torch.dtype
    bytes: int  # of the whole storage


def saved_storages(run: Callable, parameters) -> tuple[list[Saved], object]:
    """Distinct storages that ``run()`` saves, without those of ``parameters``; and its result."""
    skip = {p.untyped_storage().data_ptr() for p in parameters}
    found: dict[int, Saved] = {}
    alive = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        alive.append(tensor)  # so that no address is used twice
        if storage.data_ptr() not in skip and storage.nbytes() and storage.data_ptr() not in found:
            entry = Saved(tuple(tensor.shape), tensor.dtype, storage.nbytes())
            found[storage.data_ptr()] = entry
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    return list(found.values()), result


def table(saved: list[Saved], unit: int, title: str) -> str:
    lines = [title]
    lines += [f"  {list(s.shape)!s:>20} {str(s.dtype)[6:]:>15} {s.bytes:>9} B {s.bytes / unit:6.3f} U" for s in saved]
    total = sum(s.bytes for s in saved)
    return "\n".join([*lines, f"  total {total} B = {total / unit:.3f} U"])
