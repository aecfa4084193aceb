"""AdamW over FSDP2: two gloo processes train as one does, and torch.distributed.checkpoint reshards its states."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from eightfold.optim import AdamW

E4M3 = torch.float8_e4m3fn


def network(dtype):
    """Rows of 130 have groups with tails; 5 rows shard unevenly, 1 row leaves an empty shard; biases stay float32."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 130), nn.LayerNorm(130), nn.Linear(130, 5), nn.Tanh(), nn.Linear(5, 65), nn.Linear(65, 1)
    ).to(dtype)


def train(model, optimizer, first, last):
    """The same batch in every process, so that the mean gradient is that of one process, to the bit."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn((16, 64), generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        (model(x) - x[:, :1]).square().mean().backward()
        optimizer.step()


def optimizer_of(model, dtype, clip=None):
    return AdamW(model.parameters(), lr=1e-2, stochastic_states=dtype == torch.bfloat16, seed=7, max_grad_norm=clip)


def full(t):
    t = t.full_tensor() if isinstance(t, DTensor) else t
    return t.view(torch.uint8) if t.dtype == E4M3 else t


def snapshot(model, optimizer):
    """Parameters and states, whole, by name."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = full(p.detach())
        for key, t in optimizer.state[p].items():
            # Collectives know no E4M3: gather the bytes.
            if isinstance(t, DTensor) and t.dtype == E4M3:
                t = DTensor.from_local(
                    t.to_local().view(torch.uint8), t.device_mesh, t.placements, shape=t.shape, stride=t.stride()
                )
            found[f"{name}.{key}"] = full(t)
    return {name: t.clone() for name, t in found.items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def save(model, optimizer, folder):
    parts = get_state_dict(model, optimizer)
    dcp.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=folder)


def load(model, optimizer, folder):
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(parts, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])


def sharded_training(rank, world, folder, dtype):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        model = network(dtype)
        fully_shard(model, mesh=mesh)
        optimizer = optimizer_of(model, dtype)
        train(model, optimizer, 0, 4)
        state = optimizer.state[model[2].weight]
        assert state["m_codes"].placements == model[2].weight.placements
        assert state["m_codes"].to_local().shape == (3 - rank, 130)
        assert state["m_maxima"].shape == (5, 2)
        assert state["m_maxima"].to_local().shape == (3 - rank, 2)
        found = snapshot(model, optimizer)
        save(model, optimizer, f"{folder}/checkpoint")
        if rank == 0:
            torch.save(found, f"{folder}/sharded.pt")

        # A checkpoint goes back into shards too.
        again = network(dtype)
        fully_shard(again, mesh=mesh)
        other = optimizer_of(again, dtype)
        load(again, other, f"{folder}/checkpoint")
        assert_equal(snapshot(again, other), found)

        # Clipping sees the global norm.
        clipped = network(dtype)
        fully_shard(clipped, mesh=mesh)
        clipper = optimizer_of(clipped, dtype, clip=0.1)
        train(clipped, clipper, 0, 1)
        if rank == 0:
            torch.save(clipper.grad_norm, f"{folder}/norm.pt")

        # Rows must stay whole; replicas are welcome.
        weight = nn.Parameter(distribute_tensor(torch.ones(4, 128), mesh, [Shard(1)]))
        with pytest.raises(ValueError, match=r"parameter 0 of group 0 of shape \(4, 128\) has placements \(Shard"):
            AdamW([weight])
        replica = nn.Parameter(distribute_tensor(torch.ones(4, 128), mesh, [Replicate()]))
        replica.grad = distribute_tensor(torch.ones(4, 128), mesh, [Replicate()])
        AdamW([replica], lr=0.5, weight_decay=0.0).step()
        assert torch.allclose(replica.to_local(), torch.full((4, 128), 0.5))
    finally:
        dist.destroy_process_group()


def sharded_training_without_teardown(*arguments):
    """DTensor's caches keep gloo's threads past destroy_process_group; one that still lets go of a tensor while the
    interpreter is being torn down aborts the process."""
    sharded_training(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def check(folder, dtype):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: matrix products may round differently otherwise
    try:
        compare_with_one_process(folder, dtype)
    finally:
        torch.set_num_threads(threads)


def compare_with_one_process(folder, dtype):
    mp.spawn(sharded_training_without_teardown, args=(2, str(folder), dtype), nprocs=2)
    whole = network(dtype)
    optimizer = optimizer_of(whole, dtype)
    train(whole, optimizer, 0, 4)
    expected = snapshot(whole, optimizer)
    assert_equal(torch.load(folder / "sharded.pt"), expected)

    clipped = network(dtype)
    clipper = optimizer_of(clipped, dtype, clip=0.1)
    train(clipped, clipper, 0, 1)
    torch.testing.assert_close(torch.load(folder / "norm.pt"), clipper.grad_norm, rtol=1e-6, atol=0)

    # Two processes' checkpoint into one: continue as if nothing had happened.
    resumed = network(dtype)
    with torch.no_grad():
        for p in resumed.parameters():
            p.zero_()
    other = optimizer_of(resumed, dtype)
    load(resumed, other, f"{folder}/checkpoint")
    assert_equal(snapshot(resumed, other), expected)
    train(whole, optimizer, 4, 7), train(resumed, other, 4, 7)
    assert_equal(snapshot(resumed, other), snapshot(whole, optimizer))


def test_two_processes_train_as_one(tmp_path):
    check(tmp_path, torch.float32)


def test_two_processes_train_as_one_in_bf16(tmp_path):
    """Stochastic rounding of parameters and states: random bits belong to elements, not to shards."""
    check(tmp_path, torch.bfloat16)
