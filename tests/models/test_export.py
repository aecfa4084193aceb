"""FP8 and bf16 folders for other engines: their bytes, what reads them, what comes back, what is refused."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

from eightfold import cli, ops
from eightfold.models import Decoder, DecoderConfig, load_decoder, save_decoder

FP8 = torch.float8_e4m3fn
BLOCK = (128, 128)
# Heads of 64: k and v are one block high, every other width is several, so that transformers can dequantise on the CPU.
EVEN = DecoderConfig("llama", 320, 256, 384, 2, 4, 2, 64, bos_token_id=1, eos_token_id=2)
UNEVEN = DecoderConfig("qwen2", 320, 208, 336, 2, 4, 2, 48, tie_word_embeddings=True)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UP = "model.layers.0.mlp.up_proj.weight"


def random_model(config, dtype=torch.float32):
    torch.manual_seed(3)
    model = Decoder(config, "fp8")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 if parameter.dim() == 2 else 1).add_(torch.randn_like(parameter) * 0.02)
    return model.to(dtype)


def bytes_of(tensor):
    return tensor.contiguous().view(torch.uint8)


def same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bytes_of(a), bytes_of(b))


def linears(model):
    return {name: p for name, p in model.named_parameters() if name.rsplit(".", 2)[-2] in LINEARS and p.dim() == 2}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return save_decoder(random_model(EVEN), tmp_path_factory.mktemp("export") / "fp8", format="fp8")


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "m")


# ---- What comes back ----


def test_every_scale_is_a_fixed_point():
    """fl(fl(448 s) / 448) = s for s = fl(m / 448): all m of one binade, and so of all."""
    m = torch.arange(2**23, 2**24, dtype=torch.int32).float()
    divisor = torch.tensor(448.0)
    s = m / divisor
    assert torch.equal((s * divisor) / divisor, s)


def blocks():
    torch.manual_seed(0)
    for rows, cols in ((128, 128), (256, 384), (16, 16), (80, 208), (208, 336), (144, 512)):
        x = torch.randn(rows, cols)
        yield from (x, x.bfloat16(), x * torch.randn(rows, cols).exp(), x * 1e-5, x * 1e30, x * 1e-11)
        yield torch.zeros(rows, cols)
        yield -torch.zeros(rows, cols)
        yield torch.full((rows, cols), 0.3)
        yield torch.zeros(rows, cols).index_put_((torch.tensor(rows // 2), torch.tensor(3)), torch.tensor(-1.7))
    for _ in range(64):
        yield torch.randn(256, 128) * torch.rand(1).mul(80).sub(40).exp2()
    yield torch.full((16, 16), torch.finfo(torch.float32).max)


def test_quantising_what_was_read_gives_the_same_bytes():
    for x in blocks():
        first = ops.quantize(x, BLOCK)
        again = ops.quantize(first.dequantize(torch.float32), BLOCK)
        assert same_bytes(first.codes, again.codes)
        assert same_bytes(first.scales, again.scales)


@pytest.mark.parametrize("config", [EVEN, UNEVEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(tmp_path, config, dtype):
    model = random_model(config, dtype)
    stored = load_file(save_decoder(model, tmp_path / "a", format="fp8") / "model.safetensors")
    weights = linears(model)
    assert {name for name, tensor in stored.items() if tensor.dtype == FP8} == set(weights)
    assert {name for name in stored if name.endswith("_scale_inv")} == {name + "_scale_inv" for name in weights}
    for name, weight in weights.items():
        codes, scales = torch.ops.eightfold.quantize(weight.detach().float(), [128, 128])
        assert same_bytes(stored[name], codes)
        assert same_bytes(stored[name + "_scale_inv"], scales)
    for name, parameter in model.named_parameters():
        if name not in weights:
            assert same_bytes(stored[name], parameter.detach().bfloat16())

    again, _ = load_decoder(tmp_path / "a", "fp8")
    assert again.config == config
    assert all(p.dtype == torch.float32 and p.requires_grad for p in again.parameters())
    save_decoder(again, tmp_path / "b", format="fp8")
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_whoever_may_read_the_config_may_read_the_weights(exported):
    weights, config = ((exported / name).stat().st_mode for name in ("model.safetensors", "config.json"))
    assert oct(weights) == oct(config)


@torch.no_grad()
def test_logits_of_an_import_are_those_of_the_model(exported):
    """Bit for bit, where the parameters that an export rounds to bf16 held bf16 values."""
    model = random_model(EVEN)
    for name, parameter in model.named_parameters():
        if name not in linears(model):
            parameter.copy_(parameter.bfloat16())
    ids = torch.randint(0, 320, (2, 33))
    again, _ = load_decoder(exported, "fp8")
    assert torch.equal(again(ids), model(ids))


def test_dtype_argument_and_bf16_format(exported, tmp_path):
    wide, _ = load_decoder(exported)
    narrow, _ = load_decoder(exported, dtype=torch.bfloat16)
    plain, _ = load_decoder(save_decoder(wide, tmp_path / "plain", format="bf16"))
    for a, b, c in zip(wide.parameters(), narrow.parameters(), plain.parameters(), strict=True):
        assert same_bytes(a.detach().bfloat16(), b.detach())
        assert same_bytes(b.detach(), c.detach())
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_scales_of_another_quantiser(folder):
    """bfloat16 scales, as in Qwen3's releases, in shards: the values are codes * scales."""
    tensors = load_file(folder / "model.safetensors")
    scale = tensors[UP + "_scale_inv"].bfloat16()
    tensors[UP + "_scale_inv"] = scale
    save_file({UP: tensors.pop(UP)}, folder / "model-1.safetensors")
    save_file(tensors, folder / "model-2.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {UP: "model-1.safetensors", **dict.fromkeys(tensors, "model-2.safetensors")}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    codes = load_file(folder / "model-1.safetensors")[UP].float()
    expected = codes * scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    model, _ = load_decoder(folder)
    assert torch.equal(model.get_parameter(UP), expected)
    del index["weight_map"][UP + "_scale_inv"], tensors[UP + "_scale_inv"]
    save_file(tensors, folder / "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"model.safetensors.index.json: {UP}_scale_inv: missing"):
        load_decoder(folder)


# ---- What transformers makes of it ----


@torch.no_grad()
def test_logits_in_transformers(exported):
    """Without a GPU transformers dequantises to bf16: the same parameters, so the same logits but for rounding.

    What its FP8 layers compute on a GPU is modelled by rounding their inputs to codes of 1x128 groups: our error
    against float32 is of that size, and shared in part (bf16 between the layers turns some codes over).
    """
    quantization = transformers.FineGrainedFP8Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, quantization_config=quantization).eval()
    assert theirs.dtype == torch.bfloat16
    ours, _ = load_decoder(exported, "bf16", dtype=torch.bfloat16)
    for name, parameter in theirs.named_parameters():
        assert same_bytes(parameter, ours.get_parameter(name))
    ids = torch.randint(0, 320, (2, 24))
    rounded, exact = theirs(ids).logits, theirs.float()(ids).logits
    torch.testing.assert_close(ours.in_precision("fp32")(ids), exact, rtol=1e-4, atol=1e-4)
    assert distance(ours(ids), exact) < 1.2 * distance(rounded, exact) < 0.02

    def cast(layer, inputs):
        return ops.quantize(inputs[0].flatten(0, 1), (1, 128)).dequantize(torch.float32).view_as(inputs[0])

    for name, parameter in load_decoder(exported)[0].named_parameters():
        theirs.get_parameter(name).copy_(parameter)
        if name.rsplit(".", 2)[-2] in LINEARS:
            theirs.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(cast)
    modelled, unified = theirs(ids).logits, load_decoder(exported, "fp8")[0](ids)
    assert distance(unified, exact) < 1.2 * distance(modelled, exact) < 0.1
    assert distance(unified, modelled) < 1.2 * distance(modelled, exact)


def distance(logits, other):
    return (logits - other).norm() / other.norm()


@pytest.mark.parametrize("config", [EVEN, UNEVEN])
def test_keys_shapes_and_dtypes_are_those_of_transformers_fp8_layers(tmp_path, config):
    folder = save_decoder(random_model(config), tmp_path / "m", format="fp8")
    hf = transformers.AutoConfig.from_pretrained(folder)
    assert hf.dtype == torch.bfloat16
    quantization = transformers.FineGrainedFP8Config(**hf.quantization_config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf)
    model = replace_with_fp8_linear(model, quantization.modules_to_not_convert, quantization, pre_quantized=True)
    model.tie_weights()
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored = load_file(folder / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == expected
    for name, parameter in model.named_parameters():
        if name.endswith("_scale_inv") or parameter.dtype == FP8:
            assert stored[name].dtype == parameter.dtype


# ---- What is refused ----


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quant_method", "gptq", "quant_method: expected 'fp8', got 'gptq'"),
        ("quant_method", None, "quant_method: expected 'fp8', got None"),
        ("weight_block_size", [64, 128], r"weight_block_size: expected \[128, 128\], got \[64, 128\]"),
        ("weight_block_size", None, r"weight_block_size: expected \[128, 128\], got None"),
        ("activation_scheme", "static", "activation_scheme: expected 'dynamic', got 'static'"),
        ("fmt", "e5m2", "fmt: expected 'e4m3', got 'e5m2'"),
    ],
)
def test_another_quantisation_is_named(folder, key, value, message):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"][key] = value
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"m/config.json: quantization_config.{message}$"):
        load_decoder(folder)


@pytest.mark.parametrize(("value", "message"), [(None, "missing, but model.layers"), ([], "expected an object, got")])
def test_absent_or_odd_quantization_config(folder, value, message):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": value}))
    with pytest.raises(ValueError, match=f"m/config.json: quantization_config: {message}"):
        load_decoder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP + "_scale_inv"), rf"{UP}_scale_inv: missing: the scales of {UP}"),
        (lambda t: t.pop(UP), rf"{UP}: expected torch.float8_e4m3fn for its scales {UP}_scale_inv, got none"),
        (
            lambda t: t.update({UP: t[UP].bfloat16()}),
            rf"{UP}: expected torch.float8_e4m3fn for its scales .*, got torch.bfloat16",
        ),
        (
            lambda t: t.update({UP + "_scale_inv": torch.ones(2, 3)}),
            rf"{UP}_scale_inv: expected shape \(3, 2\) for \(384, 256\), got \(2, 3\)",
        ),
        (
            lambda t: t.update({UP + "_scale_inv": torch.ones(3, 2, dtype=torch.uint8)}),
            rf"{UP}_scale_inv: expected float32 or bfloat16, got torch.uint8",
        ),
    ],
)
def test_wrong_tensors_are_named(folder, change, message):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"m/model.safetensors: {message}") as caught:
        load_decoder(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_without_a_code_leave_nothing_behind(tmp_path, value):
    model = random_model(EVEN)
    with torch.no_grad():
        model.get_parameter(UP)[3, 5] = value
    with pytest.raises(ValueError, match=f"{UP}: expected finite weights, got NaN or Inf"):
        save_decoder(model, tmp_path / "m", format="fp8")
    assert not list(tmp_path.iterdir())


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="format: expected one of fp8, bf16, got 'int4'"):
        save_decoder(random_model(EVEN), tmp_path / "m", format="int4")


# ---- The command ----


def test_command(tmp_path, capsys):
    words = {word: index for index, word in enumerate(("[UNK]", "one", "two"))}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "[UNK]")), unk_token="[UNK]"
    )
    tokenizer.chat_template = "{{ messages[0].content }}"
    save_decoder(random_model(UNEVEN), tmp_path / "m", tokenizer)
    for arguments, form in (((), "fp8"), (("--format", "bf16"), "bf16")):
        output = tmp_path / "out" / form
        assert cli.main(["export", str(tmp_path / "m"), str(output), *arguments]) == 0
        assert capsys.readouterr().out.startswith(f"done: {form} model in {output}, ")
        expected = save_decoder(random_model(UNEVEN), tmp_path / f"expected-{form}", format=form)
        for file in expected.iterdir():
            assert (output / file.name).read_bytes() == file.read_bytes()
        copied = transformers.AutoTokenizer.from_pretrained(output)
        assert copied.get_vocab() == transformers.AutoTokenizer.from_pretrained(tmp_path / "m").get_vocab()
        assert copied.chat_template == tokenizer.chat_template
    # A folder that is exported onto itself stays what it is.
    before = (tmp_path / "out" / "fp8" / "model.safetensors").read_bytes()
    assert cli.main(["export", str(tmp_path / "out" / "fp8"), str(tmp_path / "out" / "fp8")]) == 0
    assert (tmp_path / "out" / "fp8" / "model.safetensors").read_bytes() == before


def test_mistakes_of_the_command(tmp_path, capsys):
    save_decoder(random_model(UNEVEN), tmp_path / "m")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    for model, output, line in (
        (tmp_path / "absent", tmp_path / "out", "absent: expected a folder, a .gguf file or 'smollm2'"),
        (tmp_path / "m", tmp_path / "photos", "photos: expected a new name, an empty folder or a saved model"),
    ):
        assert cli.main(["export", str(model), str(output)]) == cli.USER_ERROR
        err = capsys.readouterr().err
        assert line in err
        assert err.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main(["export", str(tmp_path / "m"), str(tmp_path / "out"), "--format", "fp4"])
    assert not (tmp_path / "out").exists()
