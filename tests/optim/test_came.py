"""eightfold.optim.CAME8bit as a torch optimizer: which states a parameter has, learning, checkpoints, errors."""

import copy
import math

import pytest
import torch
from torch import nn

from came_problem import Plain, relative
from eightfold.optim import CAME8bit
from eightfold.reference import optim as reference


def network(device="cpu", dtype=torch.float32, seed=0):
    """Two matrices with 8-bit moments, a 1 x 1 and a depthwise convolution, a norm, a small matrix."""
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(128, 130, 1),
        nn.GELU(),
        nn.Conv2d(130, 130, 3, padding=1, groups=130),
        nn.Flatten(),
        nn.LayerNorm(130),
        nn.Linear(130, 200, bias=False),
        nn.GELU(),
        nn.Linear(200, 8),
    ]
    return nn.Sequential(*layers).to(device, dtype)


def data(device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((64, 128, 1, 1), generator=generator)
    flat = x.flatten(1)
    y = torch.tanh(flat[:, :8] * 2 + flat[:, 8:16] * flat[:, 16:24])
    return x.to(device, dtype), y.to(device, dtype)


def train(model, optimizer, steps):
    x, y = data(next(model.parameters()).device, next(model.parameters()).dtype)
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x).float(), y.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_training(a, b, optimizer_a, optimizer_b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        state_p, state_q = optimizer_a.state[p], optimizer_b.state[q]
        assert state_p.keys() == state_q.keys()
        for key in state_p:
            assert state_p[key].dtype == state_q[key].dtype
            assert torch.equal(state_p[key], state_q[key]), key


def test_which_states(device):
    model = network(device)
    optimizer = CAME8bit(model.parameters())
    train(model, optimizer, 1)
    point, depthwise, linear, small = model[0].weight, model[2].weight, model[5].weight, model[7].weight
    for p in (point, linear):
        state = optimizer.state[p]
        assert state["exp_avg"].dtype == torch.uint8
        assert state["exp_avg"].shape == p.shape
        assert state["exp_avg_scales"].shape == (-(-p.numel() // 2048), 2)
        for name in ("v", "u"):
            assert (state[f"{name}_rows"].shape, state[f"{name}_cols"].shape) == ((p.shape[0],), (p.shape[1],))
    state = optimizer.state[small]
    assert state["exp_avg"].dtype == torch.float32
    assert state["v_rows"].shape == (8,)
    for p in (depthwise, model[4].weight, model[7].bias):
        state = optimizer.state[p]
        assert state["exp_avg"].dtype == torch.float32
        assert state["v_rows"].shape == p.shape
        assert state["v_cols"].numel() == state["u_rows"].numel() == state["u_cols"].numel() == 0


def test_state_bytes():
    weight = nn.Parameter(torch.zeros(2240, 2240))
    weight.grad = torch.ones_like(weight)
    optimizer = CAME8bit([weight])
    optimizer.step()
    assert optimizer.state_bytes() == sum(t.nbytes for t in optimizer.state[weight].values())
    assert optimizer.state_bytes() / weight.numel() < 1.012


def test_steps_are_those_of_plain_came(device):
    """Every parameter of a network over 10 steps; those with float32 moments to rounding."""
    model = network(device)
    start = [p.detach().cpu().double() for p in model.parameters()]
    optimizer = CAME8bit(model.parameters(), lr=1e-3, weight_decay=0.1)
    plain = []
    for p in model.parameters():
        matrix = p.ndim == 2 or p.shape[2:] == (1, 1)
        plain.append(Plain(p.detach().flatten(1) if matrix else p.detach(), matrix, 1e-3))
    x, y = data(device)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        for each, p in zip(plain, model.parameters(), strict=True):
            each.step(p.grad.view(each.param.shape))
        optimizer.step()
    for each, p, s in zip(plain, model.parameters(), start, strict=True):
        update, expected = p.detach().cpu().double() - s, each.param.view(s.shape) - s
        in_bytes = optimizer.state[p]["exp_avg"].dtype == torch.uint8
        assert relative(update, expected) < (0.06 if in_bytes else 1e-4)


def test_1x1_convolution_is_its_matrix(device):
    matrix = nn.Parameter(torch.randn(160, 130, device=device))
    convolution = nn.Parameter(matrix.detach().clone().view(160, 130, 1, 1))
    optimizers = CAME8bit([matrix], lr=0.1), CAME8bit([convolution], lr=0.1)
    for _ in range(3):
        matrix.grad = torch.randn(160, 130, device=device)
        convolution.grad = matrix.grad.view(160, 130, 1, 1).to(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(matrix, convolution.view(160, 130))
    states = [o.state[p] for o, p in zip(optimizers, (matrix, convolution), strict=True)]
    for name, value in states[0].items():
        assert torch.equal(value.flatten(), states[1][name].flatten()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learns_as_with_float32_moments(device, dtype):
    """The same regression: at every tenth step the loss has fallen as far, to 1 % of where it began."""
    losses = {}
    for name, limit in (("8 bits", 16384), ("32 bits", 10**9)):
        model = network(device, dtype)
        optimizer = CAME8bit(model.parameters(), lr=3e-4, quantize_above=limit)
        losses[name] = train(model, optimizer, 40)
    assert losses["32 bits"][-1] < 0.2 * losses["32 bits"][0]
    for ours, theirs in list(zip(losses["8 bits"], losses["32 bits"], strict=True))[9::10]:
        assert ours < theirs + 0.01 * losses["32 bits"][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "seed": 4, "betas": (0.8, 0.99, 0.999)}])
def test_resume_is_bit_exact(device, dtype, options, tmp_path):
    whole, part = network(device, dtype), network(device, dtype)
    optimizer = CAME8bit(whole.parameters(), lr=1e-3, **options)
    train(whole, optimizer, 8)

    first = CAME8bit(part.parameters(), lr=1e-3, **options)
    train(part, first, 5)
    torch.save({"model": part.state_dict(), "optimizer": first.state_dict()}, tmp_path / "checkpoint.pt")
    resumed = network(device, dtype, seed=1)
    second = CAME8bit(resumed.parameters(), lr=0.5)  # options come back with the state
    checkpoint = torch.load(tmp_path / "checkpoint.pt", map_location="cpu")
    resumed.load_state_dict(checkpoint["model"])
    second.load_state_dict(checkpoint["optimizer"])
    assert_same_training(part, resumed, first, second)
    train(resumed, second, 3)
    assert_same_training(whole, resumed, optimizer, second)


def test_deepcopy_keeps_options():
    model = network()
    optimizer = CAME8bit(model.parameters(), max_grad_norm=0.01)
    train(model, optimizer, 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2), train(twin_model, twin, 2)
    assert_same_training(model, twin_model, optimizer, twin)


def test_scaling_by_the_norm_is_that_of_torch(device):
    a, b = network(device), network(device)
    clipped, plain = CAME8bit(a.parameters(), max_grad_norm=0.01), CAME8bit(b.parameters())
    x, y = data(device)
    for model, optimizer in ((a, clipped), (b, plain)):
        nn.functional.mse_loss(model(x), y).backward()
        if model is b:
            norm = nn.utils.clip_grad_norm_(b.parameters(), 0.01)
        optimizer.step()
    torch.testing.assert_close(clipped.grad_norm, norm, rtol=1e-5, atol=0)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(clipped.state[p]["v_rows"], plain.state[q]["v_rows"], rtol=1e-4, atol=1e-37)


def test_tensor_lr_is_a_float_lr(device):
    a, b = network(device), network(device)
    optimizer_a = CAME8bit(a.parameters(), lr=torch.tensor(1e-3, device=device))
    optimizer_b = CAME8bit(b.parameters(), lr=1e-3)
    for lr in (1e-3, 5e-4):
        optimizer_a.param_groups[0]["lr"].fill_(lr)
        optimizer_b.param_groups[0]["lr"] = lr
        train(a, optimizer_a, 2), train(b, optimizer_b, 2)
    assert_same_training(a, b, optimizer_a, optimizer_b)


def test_strided_parameters_and_gradients(device):
    start, gradient = torch.randn(128, 256, device=device), torch.randn(256, 128, device=device)
    strided, plain = nn.Parameter(start.clone().t()), nn.Parameter(start.t().contiguous())
    optimizers = CAME8bit([strided], lr=0.1), CAME8bit([plain], lr=0.1)
    strided.grad, plain.grad = gradient.t().contiguous().t(), gradient
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(strided, plain)
    assert not torch.equal(plain, start.t())
    assert strided.stride() == (1, 256)


def test_missing_gradients_and_empty_parameters():
    model = network()
    empty = nn.Parameter(torch.zeros(0, 5))
    empty.grad = torch.zeros(0, 5)
    model[5].weight.requires_grad_(False)
    optimizer = CAME8bit([*model.parameters(), empty], lr=1e-3)
    before = model[5].weight.clone()
    version = model[7].weight._version
    train(model, optimizer, 2)
    assert torch.equal(model[5].weight, before)
    assert model[5].weight not in optimizer.state
    assert model[7].weight._version > version


def test_constant_gradient_keeps_constant_blocks():
    """All gradients equal: m is one value everywhere, which bytes hold exactly from the first step."""
    p = nn.Parameter(torch.zeros(200, 130))
    optimizer = CAME8bit([p])
    for step in range(1, 4):
        p.grad = torch.full_like(p, 0.3)
        optimizer.step()
        state = optimizer.state[p]
        assert (state["exp_avg_scales"][:, 0] < 1e-6).all()
        m = reference.affine_dequantize(state["exp_avg"], state["exp_avg_scales"])
        torch.testing.assert_close(m, torch.full_like(m, 1 - 0.9**step), rtol=1e-4, atol=0)
        assert p.isfinite().all()


@pytest.mark.gpu
def test_step_in_a_cuda_graph():
    graphed, eager = network("cuda"), network("cuda")
    lr = torch.tensor(1e-3, device="cuda")
    optimizer, peer = (CAME8bit(m.parameters(), lr=lr, max_grad_norm=1.0) for m in (graphed, eager))
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
        ({"betas": (0.9, 0.999)}, r"betas must be 3 numbers, got \(0.9, 0.999\)"),
        ({"betas": (0.9, 0.999, 1.0)}, r"betas\[2\] must be at least 0 and below 1, got 1.0"),
        ({"eps": (1e-30,)}, r"eps must be 2 numbers, got \(1e-30,\)"),
        ({"eps": (0.0, 1e-16)}, r"eps\[0\] must be at least 1e-36, got 0.0"),
        ({"clip_threshold": math.nan}, "clip_threshold must be at least 1e-36, got nan"),
        ({"quantize_above": -1}, "quantize_above must not be negative, got -1"),
        ({"weight_decay": -1}, "weight_decay must not be negative, got -1"),
    ],
)
def test_option_errors(options, message):
    with pytest.raises(ValueError, match="CAME8bit: " + message):
        CAME8bit([nn.Parameter(torch.zeros(2, 64))], **options)


def test_parameter_errors(tmp_path):
    with pytest.raises(
        ValueError, match=r"CAME8bit: parameter 0 of group 0, shape \(3,\), must be float32 or bfloat16"
    ):
        CAME8bit([nn.Parameter(torch.zeros(3, dtype=torch.float16))])
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        sharded = nn.Parameter(distribute_tensor(torch.zeros(4, 64), init_device_mesh("cpu", (1,)), [Shard(0)]))
        with pytest.raises(ValueError, match=r"CAME8bit: parameter 0 of group 0, shape \(4, 64\), is a DTensor"):
            CAME8bit([sharded])
    finally:
        destroy_process_group()


def test_foreign_state_is_rejected():
    model = network()
    ours = CAME8bit(model.parameters())
    train(model, ours, 1)
    state = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=r"loaded exp_avg of parameter 0 .* torch\.float32, got .* torch\.uint8"):
        CAME8bit(model.parameters(), quantize_above=10**9).load_state_dict(
            {**state, "param_groups": [{**state["param_groups"][0], "quantize_above": 10**9}]}
        )
    state["state"][0]["u_cols"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"loaded u_cols of parameter 0 .* of shape \(128,\) .* of shape \(7,\)"):
        ours.load_state_dict(state)
