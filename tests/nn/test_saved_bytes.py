"""The memory claim: what a Llama-shaped layer (multi-head attention, SwiGLU) saves, every byte of it.

U = tokens * hidden * 2 bytes. The layer's input is counted where a layer saves it; parameters are not.
"""

import pytest
import torch
from torch import nn

from eightfold.models.attention import Whole
from eightfold.models.config import DecoderConfig
from eightfold.models.decoder import DecoderLayer
from eightfold.models.precision import strategy
from eightfold.models.rotary import inverse_frequencies
from eightfold.nn import FP8Linear, convert, functional
from eightfold.ops import rotary_tables
from saved_bytes import saved_storages, table

HIDDEN, INTERMEDIATE, HEADS, BATCH, LENGTH = 512, 1376, 8, 2, 256
U = BATCH * LENGTH * HIDDEN * 2
EPS = 1e-5


def rope(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Layer(nn.Module):
    def __init__(self, device):
        super().__init__()
        options = {"device": device, "dtype": torch.bfloat16}
        self.norms = nn.ParameterList([torch.ones(HIDDEN, **options) for _ in range(2)])
        shapes = [(HIDDEN, HIDDEN)] * 4 + [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]
        self.weights = nn.ParameterList([torch.randn(*s, **options) * s[1] ** -0.5 for s in shapes])
        angles = torch.outer(torch.arange(LENGTH), 10000 ** -torch.linspace(0, 1, HIDDEN // HEADS // 2)).to(device)
        angles = torch.cat((angles, angles), -1)
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def attend(self, q, k, v):
        q, k, v = (t.view(BATCH, LENGTH, HEADS, -1).transpose(1, 2) for t in (q, k, v))
        q, k = rope(q, self.cos, self.sin), rope(k, self.cos, self.sin)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).reshape(BATCH, LENGTH, HIDDEN)

    def fp8(self, x):
        q, k, v, o, gate, up, down = self.weights
        _, qkv = functional.fp8_norm_linears(x, self.norms[0], EPS, [q, k, v])
        out = functional.fp8_linear(self.attend(*qkv), o, save="input")
        total, out = functional.fp8_norm_swiglu_mlp(out, self.norms[1], EPS, gate, up, down, residual=x)
        return total + out

    def bf16(self, x):
        q, k, v, o, gate, up, down = self.weights
        linear, norm = nn.functional.linear, nn.functional.rms_norm
        y = norm(x, (HIDDEN,), self.norms[0], EPS)
        x = x + linear(self.attend(linear(y, q), linear(y, k), linear(y, v)), o)
        y = norm(x, (HIDDEN,), self.norms[1], EPS)
        return x + linear(nn.functional.silu(linear(y, gate)) * linear(y, up), down)


def input_of_layer(device):
    return torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.bfloat16, device=device, requires_grad=True)


def total(saved):
    return sum(s.bytes for s in saved) / U


def test_llama_layer_saves_at_most_nine_and_a_half_u(device):
    layer, x = Layer(device), input_of_layer(device)
    fp8, out = saved_storages(lambda: layer.fp8(x), layer.parameters())
    bf16, _ = saved_storages(lambda: layer.bf16(x), layer.parameters())
    print(table(fp8, U, "\nfp8"), table(bf16, U, "bf16, eager"), sep="\n")
    assert total(fp8) <= 9.5
    assert total(fp8) < 0.55 * total(bf16)
    # q, k, v and the attention output are there in bf16, once each, and no other bf16 tensor of that size is.
    large = [s for s in fp8 if s.dtype == torch.bfloat16 and s.bytes >= U]
    assert len(large) == 4
    # FP8: two norm inputs, two norm outputs, gate and up.
    assert sum(s.dtype == torch.float8_e4m3fn for s in fp8) == 6
    out.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "save", "most"), [("llama", "columns", 9.1), ("qwen2", "columns", 9.9), ("qwen2", "input", 9.35)]
)
def test_layers_of_7b_models(device, shape, save, most):
    """In the proportions of Llama-2-7B and Qwen2.5-7B: heads of 128, and a quarter of their sizes."""
    hidden, heads, kv_heads, inter = {"llama": (1024, 8, 8, 2752), "qwen2": (896, 7, 1, 4736)}[shape]
    config = DecoderConfig(shape, 64, hidden, inter, 1, heads, kv_heads, 128)
    layer = DecoderLayer(config, 0, strategy("fp8", save)).to(device, torch.bfloat16)
    tables = rotary_tables(inverse_frequencies(config).to(device), torch.arange(256, device=device)[None])
    stream, branch = (torch.randn(1, 256, hidden, dtype=torch.bfloat16, device=device) for _ in range(2))
    branch.requires_grad_()
    parameters = list(layer.parameters())
    saved, out = saved_storages(lambda: layer(stream, branch, tables, Whole(None, None)), parameters)
    unit = 256 * hidden * 2
    print(table(saved, unit, f"\n{shape}, save={save}"))
    tables_of_all_layers = sum(t.numel() * 4 for t in tables)
    assert (sum(s.bytes for s in saved) - tables_of_all_layers) / unit <= most
    torch.autograd.backward(out, [torch.randn_like(t) for t in out])
    assert all(p.grad.isfinite().all() for p in parameters)


def test_compiled_layer_saves_no_more(device):
    """The compiler chooses what to save: it must not keep FP8 copies of weights, nor the attention output twice."""
    layer, x = Layer(device), input_of_layer(device)
    torch._dynamo.reset()
    out = torch.compile(layer.fp8, fullgraph=True, backend="aot_eager_decomp_partition", dynamic=False)(x)
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in out.grad_fn.saved_tensors}
    saved = sum(size for pointer, size in storages.items() if pointer not in parameters)
    eager, _ = saved_storages(lambda: layer.fp8(x), layer.parameters())
    assert saved / U <= total(eager) + 1e-6
    dy = torch.randn_like(out)
    grads = torch.autograd.grad(out, (x, *layer.parameters()), dy)
    wanted = torch.autograd.grad(layer.fp8(x), (x, *layer.parameters()), dy)
    assert all((a - b).float().norm() <= 0.03 * b.float().norm() for a, b in zip(grads, wanted, strict=True))


def test_fp8_layer_computes_what_the_bf16_layer_computes(device):
    layer, x = Layer(device), input_of_layer(device)
    dy = torch.randn_like(x)
    grads = []
    for run in (layer.fp8, layer.bf16):
        out = run(x)
        grads.append((out, *torch.autograd.grad(out, (x, *layer.parameters()), dy)))
    for ours, theirs in zip(*grads, strict=True):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < 0.12, error  # 0.10 at most: FP8 noise of every product on the way, on random data


def test_frozen_weights_save_no_columns(device):
    layer, x = Layer(device), input_of_layer(device)
    layer.requires_grad_(False)
    saved, _ = saved_storages(lambda: layer.fp8(x), layer.parameters())
    assert sum(s.dtype == torch.float8_e4m3fn for s in saved) == 4  # norm inputs, gate, up


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_gradients(device, grad):
    layer, x = Layer(device), input_of_layer(device)
    with grad():
        saved, _ = saved_storages(lambda: layer.fp8(x), layer.parameters())
    assert saved == []


def test_save_input_adds_nothing_to_what_attention_saved(device):
    layer, x = Layer(device), input_of_layer(device)
    counts = {}
    for save in ("input", "columns"):
        q = x + 0

        def run(q=q, save=save):
            return functional.fp8_linear(layer.attend(q, q, q), layer.weights[3], save=save)

        counts[save] = total(saved_storages(run, layer.parameters())[0])
    alone = total(saved_storages(lambda: layer.attend(q, q, q), layer.parameters())[0])
    assert counts["input"] == alone
    assert counts["columns"] == pytest.approx(alone + 0.5 * (1 + 4 / 128), abs=1e-3)


def test_layers_that_read_one_tensor_save_it_once(device):
    x = input_of_layer(device) + 0
    layers = [FP8Linear(HIDDEN, HIDDEN, device=device) for _ in range(3)]
    parameters = [p for layer in layers for p in layer.parameters()]
    saved, _ = saved_storages(lambda: [layer(x) for layer in layers], parameters)
    assert total(saved) == pytest.approx(0.5 * (1 + 4 / 128), abs=1e-3)


def test_converted_llama_layer(device):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_hidden_layers=1,
        vocab_size=32,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaModel(config).to(device, torch.bfloat16)
    x = input_of_layer(device)
    positions = torch.arange(LENGTH, device=device)[None]
    rotation = model.rotary_emb(x, positions)
    run = lambda layer: layer(x, position_embeddings=rotation, position_ids=positions)  # noqa: E731
    before, _ = saved_storages(lambda: run(model.layers[0]), model.parameters())
    convert(model)
    after, _ = saved_storages(lambda: run(model.layers[0]), model.parameters())
    print(table(after, U, "\nconverted transformers layer"), f"before: {total(before):.3f} U", sep="\n")
    assert total(after) <= 9.5
    assert total(after) < 0.55 * total(before)
