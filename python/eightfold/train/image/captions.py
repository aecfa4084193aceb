"""What stands for the caption of a picture, and for one that is left out.

Classes: a learned embedding [tokens, channels] of each. Text: a .safetensors file with

    embeddings  [captions, tokens, channels]  of any text encoder
    mask        [captions, tokens]            1 for text, 0 for padding; if absent all is text
    scores      [captions]                    how well a caption describes its picture (CLIP score); if absent all alike

and in its metadata "files", a JSON list of the path (in the folder or archive) of each caption's picture. A picture may
have many captions; each step draws one by score. The empty caption is learned in both cases.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from eightfold.train.image.config import CaptionConfig


class Captions(nn.Module):
    """The learned ones: `null` [tokens, channels], and `classes` [classes, tokens, channels] or None where captions are
    text. `names` of the classes."""

    def __init__(self, channels: int, tokens: int, names: tuple[str, ...] = ()):
        super().__init__()
        self.names = tuple(names)
        self.null = nn.Parameter(torch.empty(tokens, channels))
        self.classes = nn.Parameter(torch.empty(len(names), tokens, channels)) if names else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in self.parameters():
            nn.init.normal_(table)

    def embed(self, chosen: Chosen, dropped: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings [B, tokens, channels] and mask [B, tokens] (None: all is text) of captions, the empty one in the
        place of those `dropped` [B] bool."""
        text = self.classes[chosen.labels] if chosen.text is None else chosen.text
        text = torch.where(dropped[:, None, None], self.null, text)
        return text, None if chosen.mask is None else chosen.mask | dropped[:, None]


class Chosen(NamedTuple):
    """Captions of a batch: `labels` [B] int64 of classes, or `text` [B, tokens, channels] float32 and `mask`
    [B, tokens] bool."""

    labels: Tensor
    text: Tensor | None = None
    mask: Tensor | None = None

    def part(self, places: slice, device: torch.device | str) -> Chosen:
        return Chosen(*(None if each is None else each[places].to(device) for each in self))


def choose(labels: list[int], source: TextFile | None, generator: np.random.Generator) -> Chosen:
    """The captions of pictures with `labels`: classes, or what `TextFile.label_of` gave, of which one is drawn."""
    numbers = torch.tensor(labels)
    if source is None:
        return Chosen(numbers)
    return Chosen(numbers, *source.read([source.choose(label, generator) for label in labels]))


class TextFile:
    """The file above, read as it is needed. ValueError naming the file and what is wrong."""

    def __init__(self, path: str | Path, options: CaptionConfig):
        self.path, self.options = Path(path), options
        try:
            self._file = safe_open(self.path, framework="pt")
            names = set(self._file.keys())
            files = json.loads((self._file.metadata() or {}).get("files", "null"))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: truncated or not a safetensors file: {error}") from None
        if "embeddings" not in names or not isinstance(files, list):
            what = "tensor 'embeddings'" if isinstance(files, list) else "list 'files' in its metadata"
            raise ValueError(f"{path}: expected a {what}")
        self._embeddings = self._file.get_slice("embeddings")
        shape = self._embeddings.get_shape()
        if len(shape) != 3 or shape[0] != len(files):
            raise ValueError(f"{path}: embeddings: expected [{len(files)} as of files, tokens, channels], got {shape}")
        self.tokens, self.channels = shape[1:]
        self._mask = self._file.get_tensor("mask").bool() if "mask" in names else torch.ones(shape[:2], dtype=bool)
        alike = torch.full(shape[:1], 100.0)  # the most that a CLIP score can be: none is left out
        scores = (self._file.get_tensor("scores") if "scores" in names else alike).double()
        for name, tensor, wanted in (("mask", self._mask, shape[:2]), ("scores", scores, shape[:1])):
            if list(tensor.shape) != list(wanted):
                raise ValueError(f"{path}: {name}: expected {list(wanted)}, got {list(tensor.shape)}")
        rows = defaultdict(list)
        for row, name in enumerate(files):
            rows[name].append(row)
        self._labels = {name: label for label, name in enumerate(rows)}
        self._rows = list(rows.values())
        self._odds = [caption_probabilities(scores.numpy()[each], options) for each in self._rows]

    def label_of(self, name: str) -> int | None:
        """What stands for the captions of the picture `name`; None where it has none."""
        return self._labels.get(name)

    def choose(self, label: int, generator: np.random.Generator) -> int:
        """The row of one of them, drawn by score."""
        return self._rows[label][int(generator.choice(len(self._rows[label]), p=self._odds[label]))]

    def read(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, tokens, channels] float32 and mask [B, tokens] bool."""
        return torch.cat([self._embeddings[row : row + 1] for row in rows]).float(), self._mask[rows]


def caption_probabilities(scores: np.ndarray, options: CaptionConfig) -> np.ndarray:
    """Of each caption of a picture: those below `least_score` are left out, but for the best; the rest by score^(1/tau)
    ("power", what SANA's released code does) or exp(score/tau) ("softmax", what its paper says)."""
    kept = np.maximum(scores, 1e-9)
    logits = np.log(kept) / options.tau if options.choice == "power" else scores / options.tau
    left_out = scores < options.least_score
    left_out[scores.argmax()] = False
    logits = np.where(left_out, -np.inf, logits)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()
