import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from eightfold.models import Decoder, DecoderConfig, load_decoder
from eightfold.models.attention import Whole
from eightfold.models.decoder import DecoderLayer
from eightfold.models.precision import FP32, KeptWeights
from eightfold.ops import rotary

TINY = DecoderConfig("llama", 320, 64, 160, 2, 4, 2, 16)


def relative(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def distance(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def tokens(batch, length, device="cpu", vocab=320):
    return torch.randint(0, vocab, (batch, length)).to(device)


@pytest.fixture
def pair(saved, family, device):
    """(transformers model, our decoder) with the same weights."""
    reference, folder = saved(family)
    model, tokenizer = load_decoder(folder, precision="fp32", device=device)
    assert tokenizer is None
    return copy.deepcopy(reference).to(device), model


@torch.no_grad()
def test_prompt_logits_match_transformers(pair, device):
    reference, model = pair
    ids = tokens(2, 50, device)
    assert relative(model(ids), reference(ids).logits) < 1e-5
    assert relative(model(ids, last_only=True), reference(ids).logits[:, -1:]) < 1e-5


@torch.no_grad()
def test_cached_decode_matches_transformers(pair, device):
    reference, model = pair
    ids = tokens(2, 40, device)
    cache = model.new_cache(2, 64)
    pieces = [model(part, cache=cache) for part in ids.split([20, 1, 1, 1, 7, 1, 9], dim=1)]
    assert cache.length == 40
    assert relative(torch.cat(pieces, dim=1), reference(ids).logits) < 1e-5
    cache.truncate(30)
    assert relative(model(ids[:, 30:], cache=cache), reference(ids).logits[:, 30:]) < 1e-5


@torch.no_grad()
def test_packed_documents_equal_separate_ones(pair, device):
    _, model = pair
    lengths = [9, 1, 17, 5]
    ids = tokens(2, sum(lengths), device)
    document_ids = torch.repeat_interleave(torch.tensor([4, 0, 4, 7]), torch.tensor(lengths)).expand(2, -1).to(device)
    packed = model(ids, document_ids=document_ids)
    separate = torch.cat([model(part) for part in ids.split(lengths, dim=1)], dim=1)
    assert relative(packed, separate) < 1e-5
    assert relative(packed, model(ids)) > 1e-2


def test_gradients_match_transformers(pair, device):
    reference, model = pair
    ids = tokens(2, 24, device)
    reference(ids, labels=ids).loss.backward()
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    model.loss(ids, labels).backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, expected[name].grad) < 1e-4, name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_equals_cross_entropy(device, tied, reduction):
    config = DecoderConfig("llama", 320, 64, 160, 2, 4, 2, 16, tie_word_embeddings=tied)
    model = Decoder(config, precision="fp32").to(device)
    ids, labels = tokens(3, 21, device), tokens(3, 21, device)
    labels[0, :5] = -100
    labels[2] = -100
    expected = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction=reduction)
    expected_grads = torch.autograd.grad(expected * 3, list(model.parameters()))
    actual = model.loss(ids, labels, reduction=reduction, chunk_tokens=10)
    grads = torch.autograd.grad(actual * 3, list(model.parameters()))
    assert actual.dtype == torch.float32
    assert relative(actual, expected) < 1e-6
    for (name, _), grad, wanted in zip(model.named_parameters(), grads, expected_grads, strict=True):
        assert relative(grad, wanted) < 1e-5, name
    with torch.no_grad():
        assert torch.equal(model.loss(ids, labels, reduction=reduction, chunk_tokens=10), actual)


def test_fp8_head(device):
    """The loss is that of the forward pass's logits; the gradients are about those without."""
    config = DecoderConfig("llama", 320, 128, 256, 2, 2, 1, 64, initializer_range=0.1)
    model = Decoder(config, precision="fp8", fp8_head=True).to(device)
    ids, labels = tokens(2, 21, device), tokens(2, 21, device)
    loss = model.loss(ids, labels, chunk_tokens=10)
    logits = model(ids)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()), rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(loss, model.lm_head.weight)
    copy = model.in_precision("fp8")
    assert torch.equal(copy(ids), logits)
    copy.compute.fp8_head = False
    assert 1e-3 < relative(copy(ids), logits) < 0.1
    (plain,) = torch.autograd.grad(copy.loss(ids, labels), copy.lm_head.weight)
    assert relative(grad, plain) < 0.05
    with torch.no_grad(), model.compute.constant_weights():
        assert torch.equal(model(ids), logits)
    with pytest.raises(ValueError, match="fp8_head: expected False unless precision is 'fp8', got True with 'bf16'"):
        Decoder(config, precision="bf16", fp8_head=True)


def test_loss_keeps_no_logits(device):
    model = Decoder(DecoderConfig("llama", 4096, 32, 64, 1, 2, 2, 16), precision="fp32").to(device)
    ids = tokens(2, 32, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        model.loss(ids, ids, chunk_tokens=8)
    assert max(saved) == 32 * 4096  # the head's gradient; the logits would be 64 x 4096


def test_loss_of_ignored_labels_is_zero(device):
    model = Decoder(TINY, precision="fp32").to(device)
    ids = tokens(1, 8, device)
    loss = model.loss(ids, torch.full_like(ids, -100))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.all(p.grad == 0) for p in model.parameters())


def test_loss_backward_runs_once():
    model = Decoder(TINY, precision="fp32")
    loss = model.loss(tokens(1, 8), tokens(1, 8))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can run once only"):
        loss.backward()


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp8", 0.16)])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_low_precision_follows_fp32(saved, name, precision, tolerance, device):
    _, folder = saved(name)
    exact, _ = load_decoder(folder, precision="fp32", device=device)
    model, _ = load_decoder(folder, precision=precision, device=device)
    ids, labels = tokens(2, 40, device), tokens(2, 40, device)
    expected, actual = exact.loss(ids, labels), model.loss(ids, labels)
    assert distance(model(ids), exact(ids)) < tolerance
    assert relative(actual, expected) < tolerance / 2
    expected.backward()
    actual.backward()
    grads = dict(model.named_parameters())
    for key, parameter in exact.named_parameters():
        assert grads[key].grad.dtype == torch.float32
        assert distance(grads[key].grad, parameter.grad) < 3 * tolerance, key


@pytest.mark.parametrize("save", ["columns", "input"])
@pytest.mark.parametrize("shape", [(256, 4, 2, 64), (256, 2, 2, 128), (64, 4, 2, 16)], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_fused_rotary_changes_no_gradient(family, shape, save, device, monkeypatch):
    """FP8 projections and rotary as one function, beside the two apart: all bits, but for the biases' sums."""
    hidden, heads, kv_heads, head_dim = shape
    config = DecoderConfig(family, 320, hidden, 160, 2, heads, kv_heads, head_dim)
    assert config.qkv_bias == (family == "qwen2")
    model = Decoder(config, precision="fp8", save=save).to(device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    ids, labels, documents = tokens(2, 40, device), tokens(2, 40, device), torch.arange(40, device=device) // 23

    def gradients(**options):
        loss = model.loss(ids, labels, **options)
        return loss, torch.autograd.grad(loss, list(model.parameters()))

    for options in ({}, {"document_ids": documents.expand(2, -1)}):
        fused = gradients(**options)
        with monkeypatch.context() as patch:
            patch.setattr(type(model.compute), "norm_qkv", FP32.norm_qkv)
            apart = gradients(**options)
        assert torch.equal(fused[0], apart[0])
        for (name, _), a, b in zip(model.named_parameters(), fused[1], apart[1], strict=True):
            assert torch.equal(a, b) if not name.endswith("bias") else distance(a, b) < 1e-6, name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_checkpointed_layers_give_the_same_gradients(precision, device):
    """The same bits; but FP8's norm backward adds the residual's gradient before it rounds, and autograd after."""
    plain = Decoder(TINY, precision=precision).to(device)
    again = Decoder(TINY, precision=precision, checkpoint_layers=True).to(device)
    again.load_state_dict(plain.state_dict())
    ids, labels = tokens(2, 33, device), tokens(2, 33, device)
    documents = (torch.arange(33, device=device) // 10).expand(2, -1)
    losses = [m.loss(ids, labels, documents) for m in (plain, again)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert distance(b.grad, a.grad) < 0.05 if precision == "fp8" else torch.equal(a.grad, b.grad), name


@torch.no_grad()
def test_fp8_cached_decode_equals_prompt_rows(device):
    """A row's FP8 linears depend on that row alone, so only attention's summation order may differ."""
    model = Decoder(TINY, precision="fp8").to(device)
    ids = tokens(2, 24, device)
    cache = model.new_cache(2, 24)
    with model.compute.constant_weights():
        pieces = [model(part, cache=cache) for part in ids.split(1, dim=1)]
    assert relative(torch.cat(pieces, dim=1), model(ids)) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_constant_weights_change_no_numbers(saved, name, precision, device):
    model, _ = load_decoder(saved(name)[1], precision=precision, device=device)
    ids = tokens(2, 12, device)
    expected = model(ids)
    with model.compute.constant_weights():
        model(ids)
        assert relative(model(ids), expected) < (1e-6 if precision == "fp32" else 5e-3)
    model.model.norm.weight.mul_(2)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(2)
    assert relative(model(ids), expected) > 0.1


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_parameters_may_be_bf16(precision, device):
    model = Decoder(TINY, precision=precision).to(device, torch.bfloat16)
    model.loss(tokens(1, 16, device), tokens(1, 16, device)).backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


def test_saved_bytes_of_an_fp8_layer(device):
    """One Llama layer (MHA) keeps at most 9.5 U, U = tokens * hidden * 2 bytes; bf16 composition needs 22.66 U."""
    hidden, intermediate, batch, length = 384, 1024, 2, 128
    config = DecoderConfig("llama", 320, hidden, intermediate, 1, 6, 6, 64)
    model = Decoder(config, precision="fp8").to(device)
    layer: DecoderLayer = model.model.layers[0]
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stream = torch.randn(batch, length, hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    branch = torch.randn_like(stream, requires_grad=True)
    shape = (1, length, 1, 32)
    tables = torch.ones(shape, device=device), torch.zeros(shape, device=device)
    shared = parameters | {t.untyped_storage().data_ptr() for t in tables}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(stream, branch, tables, Whole(None, None))
    units = sum(s.nbytes() for s in kept.values()) / (batch * length * hidden * 2)
    assert units <= 9.5, units
    assert units > 8.5, units
    sum(o.float().sum() for o in out).backward()


def test_errors_name_the_argument():
    model = Decoder(TINY, precision="fp32")
    ids = tokens(2, 8)
    with pytest.raises(ValueError, match=r"ids: expected int32 or int64 \[B, T\], not empty, got torch.int64 \(8,\)"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"ids: .* got torch.float32"):
        model(ids.float())
    with pytest.raises(ValueError, match=r"ids: .* got torch.int64 \(2, 0\)"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match=r"positions: expected the shape of ids \(2, 8\), got \(8,\)"):
        model(ids, positions=torch.arange(8))
    with pytest.raises(ValueError, match=r"document_ids: expected the shape of ids \(2, 8\), got \(2, 7\)"):
        model(ids, document_ids=ids[:, 1:])
    with pytest.raises(ValueError, match=r"labels: expected the shape of ids \(2, 8\), got \(2, 7\)"):
        model.loss(ids, ids[:, 1:])
    with pytest.raises(ValueError, match="reduction: expected 'mean' or 'sum', got 'max'"):
        model.loss(ids, ids, reduction="max")
    with pytest.raises(ValueError, match=r"cache: expected torch.no_grad\(\)"):
        model(ids, cache=model.new_cache(2, 8))
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"cache: expected room for 2 x 8 tokens, got 2 x 7"):
            model(ids, cache=model.new_cache(2, 7))
        with pytest.raises(ValueError, match=r"cache: expected room for 2 x 8 tokens, got 1 x 8"):
            model(ids, cache=model.new_cache(1, 8))
        with pytest.raises(ValueError, match="document_ids: packed documents and a cache cannot be combined"):
            model(ids, document_ids=ids, cache=model.new_cache(2, 8))
    with pytest.raises(ValueError, match="precision: expected one of fp32, bf16, fp8, got 'fp16'"):
        Decoder(TINY, precision="fp16")
    with pytest.raises(ValueError, match="length: expected 0 to 0, got 3"):
        model.new_cache(1, 8).truncate(3)


SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: expected one of llama, qwen2, qwen3, llada, dream, got 'gpt2'"),
        ({"model_type": None}, "model_type: .* got None"),
        ({"hidden_size": None}, "config: missing hidden_size"),
        ({"hidden_size": "32"}, "hidden_size: expected a positive integer, got '32'"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window: .* got True"),
        ({"layer_types": ["sliding_attention"]}, "layer_types: .* got 'sliding_attention'"),
        ({"num_key_value_heads": 3}, r"num_attention_heads: expected a multiple of num_key_value_heads \(3\), got 4"),
        ({"head_dim": 7}, "head_dim: expected an even number .* got 7"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type: expected one of .* got 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type: expected one of .* got 'dynamic'"),
        (
            {"rope_scaling": {"rope_type": "linear"}},
            r"rope_scaling\['factor'\]: expected a positive number .* got None",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: expected 1, got 0.5"),
    ],
)
def test_unsupported_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf({"model_type": "llama", **SIZES, **change})


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_config_round_trip(model_type):
    rope = {"rope_type": "linear", "factor": 2.0}
    config = DecoderConfig.from_hf({"model_type": model_type, **SIZES, "rope_scaling": rope, "rope_theta": 5e5})
    assert config.rope_scaling == rope
    assert DecoderConfig.from_hf(config.to_hf()) == config


def test_stacked_weights_follow_the_parameters():
    """They stay where they are, as CUDA graphs ask for, and `refresh` writes the weights of the moment there."""
    layers = [torch.nn.Linear(8, rows) for rows in (16, 4, 4)]
    kept = KeptWeights(torch.bfloat16)
    weight, bias = kept.stacked(layers), kept.stacked(layers, "bias")
    for layer in layers:
        with torch.no_grad():
            layer.weight.mul_(2)
            layer.bias.add_(1)
    kept.refresh()
    assert kept.stacked(layers) is weight
    assert torch.equal(weight, torch.cat([layer.weight for layer in layers]).bfloat16())
    assert torch.equal(bias, torch.cat([layer.bias for layer in layers]).bfloat16())
    assert kept.stacked([torch.nn.Linear(8, 4, bias=False)] * 2, "bias") is None


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_norms_of_heads_and_their_rotation_are_one_op(model_type, device, monkeypatch):
    """In FP8, both ways and only where there are such norms, with the bits of the ops in sequence."""
    torch.manual_seed(3)
    config = DecoderConfig(model_type, 320, 128, 256, 2, 3, 1, 128, initializer_range=0.2)
    model = Decoder(config, precision="fp8").to(device)
    ids, starts = tokens(1, 66, device)[0], torch.tensor([0, 33, 66], dtype=torch.int32, device=device)

    def run():
        hidden = model.packed_hidden(ids, starts, 33)
        return [hidden, *torch.autograd.grad(hidden.float().square().sum(), list(model.model.parameters()))]

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours = run()
    counts = Counter(event.name.removeprefix("eightfold::") for event in profile.events())
    each = 4 if model_type == "qwen3" else 0  # q and k of two layers
    assert counts["rms_norm_rotary"] == counts["rms_norm_rotary_backward"] == each
    assert counts["rotary"] == 4 - each
    monkeypatch.setattr(
        model.compute, "norm_rotary", lambda x, norm, tables: rotary(model.compute.norm(x, norm), *tables)
    )
    assert all(torch.equal(a, b) for a, b in zip(run(), ours, strict=True))
