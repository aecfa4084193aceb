"""Parameters that may be shards: the local tensor, its rows, and where they start."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from eightfold.ops.layouts import ceil_div, round_up
from eightfold.ops.optim import GROUP

MIN_ROW_LENGTH = 64


@dataclass(frozen=True)
class Rows:
    """A parameter as rows: its elements per row, and the index of its first local element in the random stream."""

    length: int
    offset: int

    @property
    def groups(self) -> int:
        return ceil_div(self.length, GROUP)


def local(t: Tensor) -> Tensor:
    """This process's part of a DTensor; other tensors as they are. Writes go through."""
    return t.to_local() if isinstance(t, DTensor) else t


def takes_8_bit_states(param: Tensor) -> bool:
    """At least two dimensions and rows of at least 64 elements: decided by the global shape, whatever the sharding."""
    return param.ndim >= 2 and param.shape[1:].numel() >= MIN_ROW_LENGTH


def rows_of(param: Tensor, first: int, name: str) -> Rows:
    """``first``: index of the parameter's first global element in the random stream.

    Raises:
        ValueError: a DTensor whose placements split rows.
    """
    length = param.shape[1:].numel()
    if not isinstance(param, DTensor):
        return Rows(length, first)
    whole_rows = all(isinstance(p, Replicate) or (isinstance(p, Shard) and p.dim == 0) for p in param.placements)
    if not whole_rows:
        raise ValueError(
            f"AdamW: {name} of shape {tuple(param.shape)} has placements {param.placements}; 8-bit states need whole "
            "rows in one process: Shard(0) or Replicate() on every mesh dimension"
        )
    _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return Rows(length, first + offset[0] * length)


def stream_size(param: Tensor) -> int:
    """Length of a parameter in the random stream: its global elements, up to the next Philox block of eight."""
    return round_up(param.numel(), 8)


def state_like(param: Tensor, value: Tensor, columns: int | None = None) -> Tensor:
    """``value`` (local) sharded like ``param``, of its global shape or, given ``columns``, [param.size(0), columns]."""
    if not isinstance(param, DTensor):
        return value
    shape = param.shape if columns is None else torch.Size((param.shape[0], columns))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(value, param.device_mesh, param.placements, run_check=False, shape=shape, stride=stride)


def total_norm(grads: list[Tensor]) -> Tensor:
    """Euclidean norm of all gradients over all processes, accumulated in float32 whatever their dtype."""
    norms: dict[bool, list[Tensor]] = {False: [], True: []}
    for grad in grads:
        norms[isinstance(grad, DTensor)].append(torch.linalg.vector_norm(grad, dtype=torch.float32))
    device = local(grads[0]).device
    parts = []
    for sharded, some in norms.items():
        if some:
            part = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in some]))
            parts.append(part.full_tensor() if sharded else part)
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))
