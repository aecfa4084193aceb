"""What crosses processes in a step of reinforcement learning: the policy's weights, the numbers of samples, errors.

Every process rolls out and trains on its own prompts; parameters are sharded (FSDP2), so each forward or backward pass
is one of all processes, and rollout, which takes as many passes as its completions need, runs on a decoder of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from eightfold.models import Decoder
from eightfold.models.interchange import Format
from eightfold.models.loading import save_decoder
from eightfold.models.precision import Precision
from eightfold.nn import ServedCodes
from eightfold.ops import quantize
from eightfold.ops.layouts import ceil_div
from eightfold.train import distributed
from eightfold.train.distributed import World
from eightfold.train.rl.batches import PackedSamples, Sample, pack

T = TypeVar("T")


class PolicyCopy:
    """A decoder with all weights of a sharded one, as of the last ``receive``, in what its precision reads of them.

    In "fp8" a linear's weight is its codes and scales, with the bytes that training's passes make: each process casts
    its shard and the codes are gathered, a byte an element. Where shards cut through 128 x 128 groups (rows, divided by
    the processes, are no multiple of 128), the weight is gathered in its own dtype, cast, and let go.
    """

    def __init__(self, model: Decoder, precision: Precision) -> None:
        self._model = model
        self.decoder = model.in_precision(precision)
        self._received = False

    @torch.no_grad()
    def receive(self) -> None:
        """Every process must call it."""
        from torch.distributed.fsdp import FSDPModule

        for module in self._model.modules():
            if isinstance(module, FSDPModule):  # a pass without a backward leaves parameters gathered
                module.reshard()
        decoder, compute = self.decoder, self.decoder.compute
        served = None
        if decoder.precision == "fp8":
            served = compute.served = compute.served or ServedCodes()
        for name, parameter in self._model.named_parameters():
            path, _, leaf = name.rpartition(".")
            module = decoder.get_submodule(path)
            in_codes = isinstance(module, nn.Linear) and leaf == "weight"
            if module is decoder.lm_head and not compute.fp8_head:
                in_codes = False
            if served is not None and in_codes:
                if not self._received:
                    # Nothing reads it: it only says shape, dtype and device.
                    blank = torch.empty((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
                    setattr(module, leaf, nn.Parameter(blank, requires_grad=False))
                served.put(getattr(module, leaf), *gathered_codes(parameter))
                continue
            value = _in_compute_dtype(parameter.detach(), compute.dtype).full_tensor()
            if self._received:  # in the place of the values before: CUDA graphs read them there
                getattr(module, leaf).copy_(value)
            else:
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        decoder.tie_weights()
        if served is not None and compute.fp8_head and decoder.config.tie_word_embeddings:
            served.put(decoder.lm_head.weight, *gathered_codes(self._model.lm_head.weight))
        self._received = True


def _in_compute_dtype(value: DTensor, dtype: torch.dtype) -> DTensor:
    """Matrices as products read them, where that is less to send; norms and biases are read in their own dtype."""
    return value.to(dtype) if value.ndim == 2 and dtype.itemsize < value.dtype.itemsize else value


def gathered_codes(weight: DTensor) -> tuple[Tensor, Tensor]:
    """The (128, 128) codes and scales of a weight sharded by rows. Every process must call it."""
    mesh, rows = weight.device_mesh, weight.shape[0]
    if mesh.ndim != 1 or weight.placements != (Shard(0),):
        raise ValueError(f"weight: expected rows sharded over one mesh dimension, got {weight.placements}")
    share = ceil_div(rows, mesh.size())  # rows of every shard but the last ones, as torch.chunk cuts
    if share % 128:
        whole = quantize(weight.full_tensor(), (128, 128))
        return whole.codes, whole.scales
    mine = quantize(weight.to_local().contiguous(), (128, 128))
    codes = _all_rows(mine.codes.view(torch.uint8), share, rows, mesh.get_group())
    return codes.view(mine.codes.dtype), _all_rows(mine.scales, share // 128, ceil_div(rows, 128), mesh.get_group())


def _all_rows(mine: Tensor, share: int, rows: int, group: dist.ProcessGroup) -> Tensor:
    """The first ``rows`` of all processes' rows, ``share`` of each."""
    part = mine.new_zeros(share, *mine.shape[1:])
    part[: len(mine)] = mine
    out = mine.new_empty(share * group.size(), *mine.shape[1:])
    dist.all_gather_into_tensor(out, part, group=group)
    return out[:rows]


def export_policy(model: Decoder, folder: Path, tokenizer: Any, format: Format, world: World) -> None:
    """`save_decoder` of a sharded model, in the first process. Every process must call it, and raises its error."""
    policy, error = distributed.whole(model, world), None
    if policy is not None:
        try:
            save_decoder(policy, folder, tokenizer, format)
        except (OSError, ValueError) as failure:
            error = str(failure)
    world.together(error, ValueError)


def own_part(items: Sequence[T], world: World) -> Sequence[T]:
    """This process's of ``items``, whose number is a multiple of the processes: as many as the others', in order."""
    count = len(items) // world.size
    return items[world.rank * count : (world.rank + 1) * count]


def dealt_out(samples: Sequence[Sample], shares: int, world: World) -> list[list[Sample]]:
    """This process's samples in ``shares`` parts: its own of those that dealing out all processes' samples gives."""
    first = sum(world.gather(len(samples))[: world.rank])
    numbered = list(enumerate(samples, first))
    return [[sample for number, sample in numbered if number % shares == share] for share in range(shares)]


def same_passes(
    shares: list[list[PackedSamples]], spare: Sample, device: torch.device, world: World
) -> list[list[PackedSamples]]:
    """Micro-batches of each share, as many in every process: made up by one token of ``spare`` that does not count."""
    counts = world.gather([len(share) for share in shares])
    most = [max(of_share) for of_share in zip(*counts, strict=True)]
    if most == [len(share) for share in shares]:
        return shares
    drawn = spare.completion
    short = dataclasses.replace(drawn, tokens=drawn.tokens[:1], log_probs=drawn.log_probs[:1])
    packed = pack([dataclasses.replace(spare, completion=short)], device)
    batch = dataclasses.replace(packed.batch, mask=torch.zeros_like(packed.batch.mask))
    blank = dataclasses.replace(packed, batch=batch)
    return [share + [blank] * (count - len(share)) for share, count in zip(shares, most, strict=True)]


@contextlib.contextmanager
def agreeing(world: World) -> Iterator[None]:
    """A ValueError inside, in one process, is raised in all of them, which otherwise would wait for it; a barrier."""
    error = None
    try:
        yield
    except ValueError as failure:
        if world.size == 1:
            raise
        error = str(failure)
    world.together(error, ValueError)
