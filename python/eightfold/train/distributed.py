"""Several processes: started by torchrun, parameters sharded by FSDP2, gloo on the CPU and NCCL on GPUs."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class World:
    """This process among the others. ``size`` 1 means that no process group exists."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes logs."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the processes, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The (picklable) ``value`` of every process, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, error: str | None, kind: type[Exception] = OSError) -> None:
        """Raises ``kind`` in every process when one of them hit ``error``; also a barrier."""
        errors = [message for message in self.gather(error) if message]
        if errors:
            raise kind(errors[0])


@contextlib.contextmanager
def start(device: str = "auto") -> Iterator[World]:
    """The world of this process; joins torchrun's other processes while the context lasts.

    ``device`` is auto, cpu or cuda. ValueError when CUDA is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch sees no CUDA device here")
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    size = int(os.environ.get("WORLD_SIZE", "1"))
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, place)
        return
    # gloo beside NCCL: flags and messages travel between hosts' processes without waiting for the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield World(dist.get_rank(), size, place)
    finally:
        dist.destroy_process_group()


def speaks_first(message: str) -> bool:
    """Whether this process is the first of torchrun's to ask about ``message``; true when the others are out of reach.

    No fixed process can speak for all: torchrun ends the others as soon as one has failed.
    """
    try:
        # torchrun's own store, which outlives every process of a run.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=5),
        )
        return store.add(f"eightfold/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{message}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def shard(model: nn.Module, world: World) -> None:
    """Shards the parameters of a Decoder in place: one FSDP2 unit a layer, one for the rest.

    Gradients are averaged over the processes. Quantisation sees gathered weights, so its groups do not depend on
    the sharding.
    """
    if world.size == 1:
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = dist.init_device_mesh(world.device.type, (world.size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("loss", "token_log_probs", "denoising_loss"):
        register_fsdp_forward_method(model, method)


def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Unsharded parameters on the CPU: all of them in rank 0, none elsewhere. Every process must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def whole(model: nn.Module, world: World) -> nn.Module | None:
    """``model`` with unsharded parameters, in rank 0; None elsewhere. Every process must call it."""
    if world.size == 1:
        return model
    tensors = whole_state_dict(model)
    if not world.leads:
        return None
    with torch.device("meta"):
        model = type(model)(model.config)
    model.load_state_dict(tensors, assign=True)
    return model
