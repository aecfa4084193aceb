"""eightfold.optim.AdamW as a torch optimizer: against torch.optim.AdamW, checkpoints, schedulers, clipping, errors."""

import copy
import math

import pytest
import torch
from torch import nn

from eightfold.optim import AdamW

E4M3 = torch.float8_e4m3fn


def network(device="cpu", dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(128, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 200), nn.GELU(), nn.Linear(200, 8)]
    return nn.Sequential(*layers).to(device, dtype)


def data(device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((64, 128), generator=generator)
    y = torch.tanh(x[:, :8] * 2 + x[:, 8:16] * x[:, 16:24])
    return x.to(device, dtype), y.to(device, dtype)


def train(model, optimizer, steps, scheduler=None, before_step=None):
    x, y = data(next(model.parameters()).device, next(model.parameters()).dtype)
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x).float(), y.float())
        optimizer.zero_grad()
        loss.backward()
        if before_step:
            before_step()
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    return losses


def raw(t):
    return t.view(torch.uint8) if t.dtype == E4M3 else t


def assert_same_training(a, b, optimizer_a, optimizer_b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        state_p, state_q = optimizer_a.state[p], optimizer_b.state[q]
        assert state_p.keys() == state_q.keys()
        for key in state_p:
            assert state_p[key].dtype == state_q[key].dtype
            assert torch.equal(raw(state_p[key]), raw(state_q[key])), key


def test_first_steps_are_those_of_torch(device):
    """Both start from zero moments: the first step is exact, the next differ by what 8 bits lose."""
    ours, theirs = network(device), network(device)
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer, peer = AdamW(ours.parameters(), **options), torch.optim.AdamW(theirs.parameters(), **options)
    train(ours, optimizer, 1), train(theirs, peer, 1)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    train(ours, optimizer, 9), train(theirs, peer, 9)
    start = network(device)
    for p, q, s in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True):
        assert (p - q).norm() <= 0.05 * (q - s).norm()


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_trajectory_follows_torch(device, betas):
    ours, theirs = network(device), network(device)
    options = {"lr": 3e-4, "betas": betas, "weight_decay": 0.01}
    losses = train(ours, AdamW(ours.parameters(), **options), 60)
    expected = train(theirs, torch.optim.AdamW(theirs.parameters(), **options), 60)
    assert expected[-1] < 0.2 * expected[0]
    for i in (10, 20, 40, 59):
        assert abs(math.log(losses[i] / expected[i])) < 0.1


def test_small_parameters_are_exactly_adamw(device):
    """Vectors and tiny matrices keep float32 moments: torch's numbers, to float32 rounding, over 200 steps."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(s, device=device)) for s in ((300,), (10, 63), (1,), ())]
    theirs = copy.deepcopy(ours)
    optimizer, peer = AdamW(ours, lr=1e-2, weight_decay=0.1), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for _ in range(200):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, device=device)
            q.grad = p.grad.clone()
        optimizer.step(), peer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        assert optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_state_bytes():
    model = nn.Sequential(nn.Linear(1024, 512), nn.LayerNorm(512), nn.Linear(512, 1024))
    optimizer = AdamW(model.parameters())
    model(torch.randn(2, 1024)).sum().backward()
    optimizer.step()
    assert optimizer.state_bytes() == sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    assert optimizer.state_bytes() / sum(p.numel() for p in model.parameters()) <= 2.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"master_weights": True}, {"stochastic_states": True, "seed": 4}])
def test_resume_is_bit_exact(device, dtype, options, tmp_path):
    whole, part = network(device, dtype), network(device, dtype)
    optimizer = AdamW(whole.parameters(), lr=1e-3, **options)
    train(whole, optimizer, 8)

    first = AdamW(part.parameters(), lr=1e-3, **options)
    train(part, first, 5)
    torch.save({"model": part.state_dict(), "optimizer": first.state_dict()}, tmp_path / "checkpoint.pt")
    resumed = network(device, dtype, seed=1)
    second = AdamW(resumed.parameters(), lr=0.5)  # options come back with the state
    checkpoint = torch.load(tmp_path / "checkpoint.pt", map_location="cpu")
    resumed.load_state_dict(checkpoint["model"])
    second.load_state_dict(checkpoint["optimizer"])
    assert_same_training(part, resumed, first, second)
    train(resumed, second, 3)
    assert_same_training(whole, resumed, optimizer, second)


def test_loaded_state_is_a_copy():
    model = network()
    first = AdamW(model.parameters())
    train(model, first, 2)
    twin = copy.deepcopy(model)
    second = AdamW(twin.parameters())
    second.load_state_dict(first.state_dict())
    before = {key: raw(t).clone() for key, t in first.state[model[0].weight].items()}
    train(twin, second, 1)
    for key, t in first.state[model[0].weight].items():
        assert torch.equal(raw(t), before[key])


def test_deepcopy_and_pickle_keep_options():
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=0.5)
    train(model, optimizer, 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2), train(twin_model, twin, 2)
    assert_same_training(model, twin_model, optimizer, twin)


def test_schedulers(device):
    ours, theirs = network(device), network(device)
    optimizer, peer = AdamW(ours.parameters(), lr=1e-2), torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=20) for o in (optimizer, peer)]
    losses, expected = train(ours, optimizer, 20, schedules[0]), train(theirs, peer, 20, schedules[1])
    assert optimizer.param_groups[0]["lr"] == peer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    assert abs(math.log(losses[-1] / expected[-1])) < 0.05
    before = [p.clone() for p in ours.parameters()]
    optimizer.param_groups[0]["lr"] = 0.0
    train(ours, optimizer, 1)
    for p, q in zip(ours.parameters(), before, strict=True):
        assert torch.equal(p, q)


def test_tensor_lr_is_a_float_lr(device):
    a, b = network(device), network(device)
    optimizer_a = AdamW(a.parameters(), lr=torch.tensor(1e-3, device=device))
    optimizer_b = AdamW(b.parameters(), lr=1e-3)
    for lr in (1e-3, 5e-4):
        optimizer_a.param_groups[0]["lr"].fill_(lr)
        optimizer_b.param_groups[0]["lr"] = lr
        train(a, optimizer_a, 2), train(b, optimizer_b, 2)
    assert_same_training(a, b, optimizer_a, optimizer_b)


def test_parameter_groups():
    model = network()
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = AdamW([{"params": decay, "weight_decay": 0.5}, {"params": rest, "lr": 0.0}], lr=1e-2, weight_decay=0.0)
    start = [p.clone() for p in rest]
    weights = [p.detach().clone() for p in decay]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, q in zip(decay, weights, strict=True):
        torch.testing.assert_close(p, q * (1 - 1e-2 * 0.5))
    train(model, optimizer, 3)
    assert all(torch.equal(p, q) for p, q in zip(rest, start, strict=True))
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(4, 128))]})
    optimizer.param_groups[2]["params"][0].grad = torch.ones(4, 128)
    optimizer.step()
    assert "m_codes" in optimizer.state[optimizer.param_groups[2]["params"][0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_is_that_of_torch(device, dtype):
    """Gradients scaled by hand and gradients scaled inside give the same training; .grad itself is not touched."""
    a, b = network(device, dtype), network(device, dtype)
    clipped, plain = AdamW(a.parameters(), lr=1e-3, max_grad_norm=0.01), AdamW(b.parameters(), lr=1e-3)
    norms = []

    def clip():
        norms.append(torch.nn.utils.clip_grad_norm_(b.parameters(), 0.01))

    train(a, clipped, 1), train(b, plain, 1, before_step=clip)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # bf16 gradients scaled by hand are rounded once more
    torch.testing.assert_close(clipped.grad_norm, norms[0].float(), rtol=tolerance, atol=0)
    assert a[0].weight.grad.float().norm() > 2 * b[0].weight.grad.float().norm()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        moment = "exp_avg" if "exp_avg" in clipped.state[p] else "m_maxima"
        torch.testing.assert_close(clipped.state[p][moment], plain.state[q][moment], rtol=2 * tolerance, atol=1e-9)


def test_small_gradients_are_not_scaled_up():
    a, b = network(), network()
    clipped, plain = AdamW(a.parameters(), max_grad_norm=1e6), AdamW(b.parameters())
    train(a, clipped, 3), train(b, plain, 3)
    assert_same_training(a, b, clipped, plain)


def test_bf16_parameters_learn_where_rounding_would_stall(device):
    """Updates of a tenth of a bf16 step: stochastic rounding and a master follow float32; nearest would not move."""
    for options in ({}, {"master_weights": True}):
        p = nn.Parameter(torch.ones(64, 128, device=device, dtype=torch.bfloat16))
        optimizer = AdamW([p], lr=4e-4, weight_decay=0.0, **options)
        for _ in range(50):
            p.grad = torch.ones_like(p)
            optimizer.step()
        assert p.float().mean().item() == pytest.approx(1 - 50 * 4e-4, abs=2e-3)
        if options:
            torch.testing.assert_close(optimizer.state[p]["master"], torch.full_like(p, 0.98, dtype=torch.float32))


def test_small_bf16_parameters_have_a_master(device):
    p = nn.Parameter(torch.ones(100, device=device, dtype=torch.bfloat16))
    optimizer = AdamW([p], lr=4e-4, weight_decay=0.0)
    for _ in range(50):
        p.grad = torch.ones_like(p)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["master"], torch.full_like(p, 0.98, dtype=torch.float32))
    assert torch.equal(p, optimizer.state[p]["master"].bfloat16())


def test_strided_parameters_and_gradients(device):
    """A parameter that is not contiguous, a gradient that is not: the numbers of the contiguous ones."""
    start = torch.randn(128, 256, device=device)
    gradient = torch.randn(256, 128, device=device)
    strided, plain = nn.Parameter(start.clone().t()), nn.Parameter(start.t().contiguous())
    optimizers = AdamW([strided], lr=0.1), AdamW([plain], lr=0.1)
    strided.grad, plain.grad = gradient.t().contiguous().t(), gradient
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(strided, plain)
    assert not torch.equal(plain, start.t())
    assert strided.stride() == (1, 256)


@pytest.mark.parametrize("change", ["parameter", "state", "state in place"])
def test_moved_tensors_are_noticed(device, change):
    a, b = network(device, torch.bfloat16), network(device, torch.bfloat16)
    moved, left = AdamW(a.parameters(), lr=1e-2), AdamW(b.parameters(), lr=1e-2)
    train(a, moved, 3), train(b, left, 3)
    weight, state = a[0].weight, moved.state[a[0].weight]
    if change == "parameter":
        weight.data = weight.data.clone()
    elif change == "state":
        state["v_maxima"] = state["v_maxima"].clone()
    else:
        for t in state.values():
            t.data = t.data.clone()
    train(a, moved, 3), train(b, left, 3)
    assert_same_training(a, b, moved, left)


def test_parameters_that_take_part_change_between_steps(device):
    """Batches are kept between steps: they follow gradients that come and go, and states that are put in anew."""
    model = network(device)
    opt = AdamW(model.parameters(), lr=1e-2)
    weight = model[0].weight
    train(model, opt, 1)
    without = weight.detach().clone()
    for p in model.parameters():
        p.grad = None if p is weight else torch.ones_like(p)
    opt.step()
    assert torch.equal(weight, without)
    assert float(opt.state[weight]["step"]) == 1
    weight.grad = torch.ones_like(weight)
    opt.step()
    assert not torch.equal(weight, without)
    assert float(opt.state[weight]["step"]) == 2
    opt.state[weight] = {name: t.clone() for name, t in opt.state[weight].items()}
    opt.step()
    assert float(opt.state[weight]["step"]) == 3


def test_missing_gradients_closures_and_versions():
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = AdamW(model.parameters())
    x, y = data()

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    version = model[3].weight._version
    assert optimizer.step(closure).requires_grad
    assert model[3].weight._version > version
    assert model[0].weight not in optimizer.state
    kept = (model(x) ** 2).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_random_bits_do_not_repeat_between_parameters():
    """Two equal parameters with equal gradients round differently."""
    params = [nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = AdamW(params, lr=1e-3, weight_decay=0.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(*params)


@pytest.mark.gpu
def test_step_in_a_cuda_graph():
    graphed, eager = network("cuda"), network("cuda")
    lr = torch.tensor(1e-3, device="cuda")
    optimizer, peer = (AdamW(m.parameters(), lr=lr, max_grad_norm=1.0) for m in (graphed, eager))
    train(graphed, optimizer, 3), train(eager, peer, 3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(4):
        graph.replay()
        peer.step()
    assert_same_training(graphed, eager, optimizer, peer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and not negative, got -1.0"),
        ({"lr": math.nan}, "lr must be finite and not negative, got nan"),
        ({"lr": torch.zeros(2)}, r"lr must have one element, got shape \(2,\)"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be at least 0 and below 1, got 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be at least 0 and below 1, got -0.1"),
        ({"eps": -1e-8}, "eps must not be negative, got -1e-08"),
        ({"weight_decay": -1}, "weight_decay must not be negative, got -1"),
        ({"max_grad_norm": 0}, "max_grad_norm must be positive or None, got 0"),
    ],
)
def test_option_errors(options, message):
    with pytest.raises(ValueError, match="AdamW: " + message):
        AdamW([nn.Parameter(torch.zeros(2, 64))], **options)


def test_parameter_errors():
    with pytest.raises(
        ValueError, match=r"parameter 1 of group 0, shape \(2, 64\), must be float32 or bfloat16, got torch.float16"
    ):
        AdamW([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 64, dtype=torch.float16))])
    table = nn.Embedding(100, 64, sparse=True)
    optimizer = AdamW(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of shape \(100, 64\) has layout torch.sparse_coo"):
        optimizer.step()


def test_foreign_state_is_rejected():
    model = network()
    theirs = torch.optim.AdamW(model.parameters())
    train(model, theirs, 1)
    with pytest.raises(
        ValueError, match=r"loaded state of parameter 0 of group 0, shape \(256, 128\) must have \['m_codes'"
    ):
        AdamW(model.parameters()).load_state_dict(theirs.state_dict())
    ours = AdamW(model.parameters())
    train(model, ours, 1)
    state = copy.deepcopy(ours.state_dict())
    state["state"][0]["m_maxima"] = torch.zeros(256, 2)
    with pytest.raises(
        ValueError, match=r"loaded m_maxima of parameter 0 .* of shape \(256, 1\) .* of shape \(256, 2\)"
    ):
        ours.load_state_dict(state)
