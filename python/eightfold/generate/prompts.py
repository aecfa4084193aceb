"""Texts for an image model: embeddings from a file, or from a text encoder of transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from eightfold.models.files import read_safetensors_file, write_file, write_safetensors

TABLE = "embeddings.safetensors"  # in a model's folder: the texts or classes that it was trained on
POSITIONS = 300
_TENSORS = ("embeddings", "mask", "negative", "negative_mask")


@dataclass(frozen=True)
class Prompts:
    """Embeddings [N, T, channels] and their mask [N, T], 1 for text and 0 for padding, or None; a negative
    [1, T', channels], or None, and its mask; a caption for each of N."""

    embeddings: Tensor
    mask: Tensor | None
    negative: Tensor | None
    negative_mask: Tensor | None
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.embeddings)

    def rows(self, numbers: Sequence[int]) -> Prompts:
        """Those of the numbers, in their order. ValueError for one that there is not."""
        wrong = [i for i in numbers if not 0 <= i < len(self)]
        if wrong or not numbers:
            raise ValueError(f"classes: expected 0 to {len(self) - 1}, got {wrong[0] if wrong else 'none'}")
        picked, mask = list(numbers), None if self.mask is None else self.mask[list(numbers)]
        captions = tuple(self.captions[i] for i in picked)
        return Prompts(self.embeddings[picked], mask, self.negative, self.negative_mask, captions)


def save_prompts(prompts: Prompts, file: str | os.PathLike) -> Path:
    """Writes what `read_prompts` reads: the tensors under the names of the fields, and metadata "captions", a JSON
    list. Written to a temporary name and renamed. OSError naming the file."""
    tensors = {name: getattr(prompts, name) for name in _TENSORS}
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items() if tensor is not None}
    captions = {"captions": json.dumps(prompts.captions)}
    return write_file(Path(file), lambda work: write_safetensors(kept, work, captions))


def read_prompts(file: str | os.PathLike) -> Prompts:
    """The texts of a safetensors file: `embeddings` [N, T, channels], and if there `mask` [N, T], `negative`
    [T', channels] or [1, T', channels] and `negative_mask` [T'] or [1, T']; captions of the metadata, or their numbers.

    Raises FileNotFoundError or ValueError naming the file and the tensor."""
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    tensors = read_safetensors_file(file)
    if "embeddings" not in tensors or set(tensors) - set(_TENSORS):
        got = ", ".join(sorted(tensors)) or "none"
        raise ValueError(f"{file}: expected embeddings, and no tensors but {', '.join(_TENSORS[1:])} beside, got {got}")
    embeddings, mask, negative, negative_mask = (tensors.get(name) for name in _TENSORS)
    if negative is not None and negative.dim() == 2:
        negative = negative[None]
    if negative_mask is not None and negative_mask.dim() == 1:
        negative_mask = negative_mask[None]
    for name, text, rows in (("embeddings", embeddings, "N"), ("negative", negative, "1")):
        fits = text is None or (text.dim() == 3 and text.numel() and text.is_floating_point())
        if not fits or (rows == "1" and text is not None and len(text) != 1):
            got = f"{text.dtype} {tuple(text.shape)}"
            raise ValueError(f"{file}: {name}: expected floating point [{rows}, T, channels], got {got}")
    for name, of_text, text in (("mask", mask, embeddings), ("negative_mask", negative_mask, negative)):
        if of_text is not None and (text is None or of_text.shape != text.shape[:2]):
            wanted = "none without negative" if text is None else tuple(text.shape[:2])
            raise ValueError(f"{file}: {name}: expected {wanted}, got {tuple(of_text.shape)}")
    return Prompts(embeddings, mask, negative, negative_mask, _captions(file, len(embeddings)))


def _captions(file: Path, count: int) -> tuple[str, ...]:
    with safe_open(file, framework="pt") as opened:
        stored = (opened.metadata() or {}).get("captions")
    if stored is None:
        return tuple(f"text {i}" for i in range(count))
    try:
        captions = json.loads(stored)
    except ValueError:
        captions = None
    if not isinstance(captions, list) or len(captions) != count or not all(isinstance(c, str) for c in captions):
        raise ValueError(f"{file}: captions: expected a JSON list of {count} texts, got {stored[:80]!r}")
    return tuple(captions)


class PromptEncoder:
    """A text encoder of transformers, encoder or decoder-only, as SANA uses Gemma 2: the last hidden state of
    `positions` tokens, padded on the right (arXiv 2410.10629 and diffusers' pipeline)."""

    def __init__(
        self,
        folder: str | os.PathLike,
        device: torch.device | str = "cpu",
        instruction: str = "",
        positions: int = POSITIONS,
    ):
        """folder: a model and its tokenizer, or a pipeline with `text_encoder` and `tokenizer`. instruction: goes
        before each prompt (SANA's complex human instruction), but not before the negative one; the first position and
        the last `positions` - 1 are kept. Raises FileNotFoundError or ValueError naming the folder."""
        from transformers import (
            MODEL_FOR_TEXT_ENCODING_MAPPING,
            AutoConfig,
            AutoModel,
            AutoModelForTextEncoding,
            AutoTokenizer,
        )

        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        inside = (folder / "text_encoder").is_dir()
        model, tokenizer = (folder / "text_encoder", folder / "tokenizer") if inside else (folder, folder)
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        if self._tokenizer.pad_token_id is None:
            raise ValueError(f"{tokenizer}: has no token to pad with")
        self._tokenizer.padding_side = "right"
        config = AutoConfig.from_pretrained(model, local_files_only=True)
        family = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
        self._model = family.from_pretrained(model, dtype="auto", local_files_only=True).to(device).eval()
        self._instruction, self._positions = instruction, positions

    def encode(self, prompts: Sequence[str], negative: str = "") -> Prompts:
        """Prompts are lower-cased and stripped, as the model was trained, and encoded one by one."""
        encoded = [self._encoded(prompt, self._instruction) for prompt in prompts]
        embeddings, masks = (torch.cat(rows) for rows in zip(*encoded, strict=True))
        return Prompts(embeddings, masks, *self._encoded(negative, ""), tuple(prompts))

    @torch.inference_mode()
    def _encoded(self, prompt: str, instruction: str) -> tuple[Tensor, Tensor]:
        length = self._positions
        if instruction:
            length += len(self._tokenizer.encode(instruction)) - 2
        text = instruction + prompt.lower().strip()
        inputs = self._tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids, mask = (inputs[name].to(self._model.device) for name in ("input_ids", "attention_mask"))
        hidden = self._model(input_ids=ids, attention_mask=mask)[0]
        kept = [0, *range(length - self._positions + 1, length)]
        return hidden[:, kept], mask[:, kept]
