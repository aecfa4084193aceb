"""FP8Linear, FP8RMSNorm, FP8SwiGLU: drop-in replacements, weight caches, FSDP."""

import copy
import io

import pytest
import torch
from torch import nn

from eightfold.nn import FP8Linear, FP8RMSNorm, FP8SwiGLU, WeightCache, cache_weights, functional


def test_linear_has_the_keys_and_the_initial_values_of_nn_linear(device):
    torch.manual_seed(1)
    plain = nn.Linear(64, 48, device=device)
    torch.manual_seed(1)
    ours = FP8Linear(64, 48, device=device)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    ours.load_state_dict(plain.state_dict())
    assert isinstance(ours, nn.Linear)
    assert repr(ours) == "FP8Linear(in_features=64, out_features=48, bias=True)"
    assert repr(FP8Linear(64, 48, False, save="input")).endswith("bias=False, save='input')")


def test_from_linear_shares_parameters(device):
    plain = nn.Linear(64, 48, device=device, dtype=torch.bfloat16).eval()
    plain.weight.requires_grad_(False)
    ours = FP8Linear.from_linear(plain)
    assert ours.weight is plain.weight
    assert ours.bias is plain.bias
    assert not ours.training
    assert FP8Linear.from_linear(nn.Linear(64, 48, bias=False)).bias is None


@pytest.mark.parametrize("sizes", [(60, 48), (64, 50), (0, 16)])
def test_sizes_that_do_not_fit_raise(sizes):
    with pytest.raises(ValueError, match=f"multiples of 16, got {sizes[0]} and {sizes[1]}"):
        FP8Linear(*sizes)


def test_rms_norm_is_torch_rms_norm(device):
    plain = nn.RMSNorm(80, eps=1e-5, device=device)
    nn.init.normal_(plain.weight)
    ours = FP8RMSNorm.from_norm(plain)
    x = torch.randn(7, 80, device=device)
    assert ours.weight is plain.weight
    assert torch.allclose(ours(x), plain(x), 1e-5, 1e-6)
    assert list(ours.state_dict()) == ["weight"]


def test_swiglu_keys_and_function(device):
    mlp = FP8SwiGLU(64, 96, device=device)
    assert list(mlp.state_dict()) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    x = torch.randn(2, 5, 64, device=device)
    assert torch.equal(mlp(x), functional.fp8_swiglu_mlp(x, *mlp.parameters()))


@pytest.mark.parametrize("make", [lambda: FP8Linear(64, 64), lambda: FP8SwiGLU(64, 96)])
def test_copies_and_files(device, make):
    layer = cache_weights(make().to(device))
    x = torch.randn(5, 64, device=device)
    want = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), want)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(2)
        assert not torch.equal(twin(x), want)
    assert torch.equal(layer(x), want)


def test_meta_device():
    layer = FP8SwiGLU(64, 96, device="meta")
    assert layer.to_empty(device="cpu").gate_proj.weight.device.type == "cpu"


class TestWeightCache:
    def count(self, monkeypatch, layer, x, calls=2):
        """How often ``calls`` forward and backward passes cast the weight."""
        from eightfold.nn import _products

        casts = []
        real, real_stacked = _products.ops.quantize, _products.ops.quantize_stacked

        def quantize(tensor, group):
            casts.extend([tensor] if group == [128, 128] else [])
            return real(tensor, group)

        def quantize_stacked(tensors, transposed):
            casts.append(tensors)
            return real_stacked(tensors, transposed)

        monkeypatch.setattr(_products.ops, "quantize", quantize)
        monkeypatch.setattr(_products.ops, "quantize_stacked", quantize_stacked)
        for _ in range(calls):
            layer(x).sum().backward()
        monkeypatch.undo()
        return len(casts)

    def test_keeps_addresses_and_knows_a_detached_weight(self, device):
        """What a checkpointed layer has saved is not the parameter itself."""
        cache, weight = WeightCache(), torch.nn.Parameter(torch.randn(128, 64, device=device))
        codes, scales = cache.codes(weight)
        assert cache.codes(weight.detach())[0] is codes
        with torch.no_grad():
            weight.mul_(2)
        before = scales.clone()
        assert cache.codes(weight.detach())[1] is scales
        assert torch.equal(scales, 2 * before)
        weight.data.mul_(2)  # a write that is not counted
        assert torch.equal(cache.codes(weight)[1], 2 * before)
        cache.refresh()
        assert torch.equal(scales, 4 * before)
        assert cache.codes(torch.nn.Parameter(weight.detach().clone()))[1] is not scales

    def test_casts_once(self, device, monkeypatch):
        layer, x = FP8Linear(64, 48, device=device), torch.randn(5, 64, device=device, requires_grad=True)
        assert self.count(monkeypatch, layer, x) == 4
        cache_weights(layer)
        assert self.count(monkeypatch, layer, x) == 1
        assert self.count(monkeypatch, layer, x) == 0
        cache_weights(layer, False)
        assert self.count(monkeypatch, layer, x) == 4

    def test_does_not_change_numbers(self, device):
        layer, x = FP8Linear(64, 48, device=device), torch.randn(5, 64, device=device, requires_grad=True)
        results = []
        for enabled in (False, True, True):
            cache_weights(layer, enabled)
            out = layer(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, layer.weight))))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    @pytest.mark.parametrize("change", ["step", "data", "parameter"])
    def test_follows_the_parameter(self, device, change):
        layer, x = cache_weights(FP8Linear(64, 48, False, device=device)), torch.randn(5, 64, device=device)
        before = layer(x)
        if change == "step":
            optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
            layer.weight.grad = 2 * layer.weight.detach()
            optimizer.step()
        elif change == "data":
            layer.weight.data = -layer.weight.data
        else:
            layer.weight = nn.Parameter(-layer.weight.detach())
        assert torch.equal(layer(x), -before)

    def test_inference_parameters_are_not_cached(self, device):
        with torch.inference_mode():
            layer, x = cache_weights(FP8Linear(64, 48, False, device=device)), torch.randn(5, 64, device=device)
            before = layer(x)
            layer.weight.neg_()
            assert torch.equal(layer(x), -before)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.mlp = FP8RMSNorm(64), FP8Linear(64, 64), FP8SwiGLU(64, 96)

    def forward(self, x):
        x = x + self.linear(self.norm(x))
        return x + self.mlp(x)


def test_fsdp(tmp_path):
    """One rank: parameters are DTensors outside forward, plain inside; gradients are those without FSDP."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        blocks = nn.Sequential(Block(), Block())
        twin = copy.deepcopy(blocks)
        mesh = init_device_mesh("cpu", (1,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(blocks, mesh=mesh)
        x = torch.randn(3, 5, 64)
        for step in range(2):
            for model in (blocks, twin):
                loss = model(x).square().mean()
                loss.backward()
            for a, b in zip(blocks.parameters(), twin.parameters(), strict=True):
                assert torch.equal(a.grad.full_tensor(), b.grad), step
            with torch.no_grad():
                for parameter in (*blocks.parameters(), *twin.parameters()):
                    parameter.sub_(0.1 * parameter.grad)
                    parameter.grad = None
    finally:
        torch.distributed.destroy_process_group()
