"""Text to packed sequences: read, tokenise once, pack, shuffle, shard.

A corpus is a list of documents. Whole documents are held out (of a single document, its tail). The rest is shuffled,
laid end to end and cut into sequences; ``document_ids`` keep attention inside a document and the label of a
document's last token is -100. Which sequences a step sees depends on the seed and the step alone: processes take
slices of one global batch.
"""

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eightfold.train.config import DataConfig
from eightfold.train.order import Cursor

IGNORED = -100
PROMPT_FIELDS = ("prompt", "question")
COMPLETION_FIELDS = ("completion", "answer")


@dataclass(frozen=True)
class Document:
    """``text`` with ``prompt`` before it (empty for plain text); ``source`` says where it came from."""

    text: str
    prompt: str = ""
    source: str = ""


def read_documents(config: DataConfig) -> list[Document]:
    """Documents of ``config.path``. ValueError with file and position for what cannot be read as text."""
    path = Path(config.path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    kind = config.format if config.format != "auto" else _guess_format(path)
    if kind == "datasets":
        documents = _read_datasets(path, config)
    elif kind == "jsonl":
        files = [path] if path.is_file() else sorted(path.rglob("*.jsonl"))
        documents = [
            _record_to_document(record, config, where) for file in files for where, record in json_records(file)
        ]
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in config.extensions)
        if not files:
            raise ValueError(f"{path}: no file with one of the extensions {', '.join(config.extensions)}")
        documents = [Document(_read_text(file), source=str(file)) for file in files]
    else:
        documents = [Document(_read_text(path), source=str(path))]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"{path}: contains no text")
    return documents


def _guess_format(path: Path) -> str:
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return "datasets"
        return "text"
    return "jsonl" if path.suffix in (".jsonl", ".ndjson") else "text"


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}: not UTF-8: byte {error.start} (line {line}) is 0x{data[error.start]:02x}") from None


def json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON lines file, each with its place (``file:line``). ValueError for a line that is none."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON at column {error.colno}: {error.msg}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
        yield where, record


def _read_datasets(path: Path, config: DataConfig) -> list[Document]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{path}: reading a Hugging Face dataset needs the package: pip install datasets") from None
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the reader of Arrow files finds wrong
        raise ValueError(f"{path}: not a readable dataset folder: {' '.join(str(error).split())}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise ValueError(f"{path}: no split 'train'; splits: {', '.join(loaded)}")
        loaded = loaded["train"]
    return [_record_to_document(record, config, f"{path}: row {row}") for row, record in enumerate(loaded)]


def _record_to_document(record: dict[str, Any], config: DataConfig, where: str) -> Document:
    """The text field, or prompt and completion, of one record."""
    prompt_field = config.prompt_field or next((name for name in PROMPT_FIELDS if name in record), None)
    completion_field = config.completion_field or next((name for name in COMPLETION_FIELDS if name in record), None)
    if config.text_field in record and not (config.prompt_field or config.completion_field):
        names = (config.text_field,)
    elif prompt_field and completion_field:
        names = (completion_field, prompt_field)
    else:
        raise ValueError(
            f"{where}: has neither {config.text_field!r} nor a prompt and a completion; its fields: {', '.join(record)}"
        )
    for name in names:
        if not isinstance(record.get(name), str):
            raise ValueError(f"{where}: field {name!r} should be text, got {type(record.get(name)).__name__}")
    return Document(*(record[name] for name in names), source=where)


Tokens = tuple[np.ndarray, np.ndarray]  # ids int32 [n] and, of the same length, whether each counts as a target
BATCH = 256  # documents tokenised at once: a fast tokenizer spreads them over the cores


def tokenize_all(documents: list[Document], tokenizer: Any, config: DataConfig) -> list[Tokens]:
    """The tokens of every document."""
    if config.template == "chat":
        return [tokenize(document, tokenizer, config) for document in documents]
    found = []
    for begin in range(0, len(documents), BATCH):
        batch = documents[begin : begin + BATCH]
        texts = [document.prompt for document in batch] + [document.text for document in batch]
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        found += [_joined([ids[i], ids[i + len(batch)]], tokenizer, config) for i in range(len(batch))]
    return found


def tokenize(document: Document, tokenizer: Any, config: DataConfig) -> Tokens:
    """The tokens of one document."""
    if config.template == "chat" and document.prompt:
        turns = [{"role": "user", "content": document.prompt}, {"role": "assistant", "content": document.text}]
        head = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        if not whole.startswith(head):
            raise ValueError("data.template=chat: the chat template does not continue its own generation prompt")
        parts = [_encode(tokenizer, head), _encode(tokenizer, whole[len(head) :])]
        return _counted(parts, tokenizer, config)
    return _joined([_encode(tokenizer, document.prompt), _encode(tokenizer, document.text)], tokenizer, config)


def _joined(parts: list[list[int]], tokenizer: Any, config: DataConfig) -> Tokens:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return _counted([parts[0], [*parts[1], *end]], tokenizer, config)


def _counted(parts: list[list[int]], tokenizer: Any, config: DataConfig) -> Tokens:
    if config.fill_answers and parts[0]:
        if tokenizer.eos_token_id is None:
            raise ValueError("data.fill_answers: the model's tokenizer has no end token")
        parts[1] += [tokenizer.eos_token_id] * (-len(parts[1]) % config.fill_answers)
    ids = np.array(parts[0] + parts[1], dtype=np.int32)
    counts = np.ones(len(ids), dtype=bool)
    if not config.train_on_prompt:
        counts[: len(parts[0])] = False
    return ids, counts


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


def tokens_of(documents: list[Document], tokenizer: Any, config: DataConfig) -> list[Tokens]:
    """``tokenize_all``, or what ``config.cache`` keeps of an earlier call with the same text, tokenizer and options."""
    if config.cache is None:
        return tokenize_all(documents, tokenizer, config)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError("data.cache: the model's tokenizer cannot be told from another (it is no fast tokenizer)")
    options = (config.template, config.train_on_prompt, config.fill_answers, tokenizer.eos_token_id)
    digest = hashlib.sha256(repr(options).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for document in documents:
        for text in (document.prompt, document.text):
            digest.update(f"{len(text)} ".encode() + text.encode())
    path = Path(config.cache) / f"tokens-{digest.hexdigest()[:32]}.npz"
    if not path.exists():
        found = tokenize_all(documents, tokenizer, config)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.writing")
        with open(draft, "wb") as out:
            lengths = np.array([len(ids) for ids, _ in found])
            np.savez(out, ids=_end_to_end(found, 0), counts=_end_to_end(found, 1), lengths=lengths)
        draft.rename(path)
        return found
    try:
        with np.load(path) as kept:
            ends = np.cumsum(kept["lengths"])[:-1]
            return list(zip(np.split(kept["ids"], ends), np.split(kept["counts"], ends), strict=True))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged, remove it: {' '.join(str(error).split())}") from None


def _end_to_end(documents: list[Tokens], part: int) -> np.ndarray:
    return np.concatenate([document[part] for document in documents])


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor`` on ``device``; the host does not wait for a GPU to take it."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class Sequences:
    """Packed sequences, all [count, length]: ``ids``, ``labels`` (the next token, or -100), ``document_ids`` (None
    where attention is not to stay inside a document) and ``counts`` (bool: whether the token itself is to be learned,
    where -100 in ``labels`` is about the next)."""

    ids: Tensor
    labels: Tensor
    document_ids: Tensor | None
    counts: Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]

    def batch(self, indices: list[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor | None]:
        """``ids``, ``labels``, ``document_ids`` of the sequences ``indices``, int64 [len(indices), length].

        The host does not wait for a GPU to take them.
        """
        rows = torch.tensor(indices)
        parts = (None if part is None else part[rows] for part in (self.ids, self.labels, self.document_ids))
        return tuple(None if part is None else moved(part, device).to(torch.int64) for part in parts)

    def targets(self, indices: list[int]) -> int:
        """How many labels of these sequences count in the loss."""
        return int((self.labels[torch.tensor(indices)] != IGNORED).sum()) if indices else 0


def pack(documents: list[Tokens], length: int, isolate: bool = True, whole: bool = False) -> Sequences:
    """Lays documents end to end and cuts sequences of ``length``; those without a single target are dropped.

    The last sequence is filled with -100 labels when the stream ends inside it; with ``whole`` so is each that a
    document would not fit into any more, and of a document longer than ``length`` the beginning is kept.
    """
    if whole:
        documents = list(_apart(documents, length))
    ids = _end_to_end(documents, 0)
    labels = np.concatenate(
        [np.append(np.where(counts[1:], ids[1:], IGNORED), IGNORED) for ids, counts in documents]
    ).astype(np.int32)
    document_ids = np.repeat(np.arange(len(documents), dtype=np.int32), [len(ids) for ids, _ in documents])
    rows = math.ceil(len(ids) / length)
    pad = rows * length - len(ids)
    ids = np.pad(ids, (0, pad)).reshape(rows, length)
    labels = np.pad(labels, (0, pad), constant_values=IGNORED).reshape(rows, length)
    document_ids = np.pad(document_ids, (0, pad), constant_values=len(documents)).reshape(rows, length)
    document_ids = document_ids - document_ids[:, :1]
    counts = np.pad(_end_to_end(documents, 1), (0, pad)).reshape(rows, length)
    keep = (labels != IGNORED).any(axis=1)
    kept = [torch.from_numpy(part[keep]) for part in (ids, labels, document_ids, counts)]
    return Sequences(*kept[:2], kept[2] if isolate else None, kept[3])


def _apart(documents: list[Tokens], length: int) -> Iterator[Tokens]:
    """The documents, none longer than ``length``, and between them what fills the sequences that they leave."""
    used = 0
    for ids, counts in documents:
        ids, counts = ids[:length], counts[:length]
        if len(ids) > length - used:
            yield np.zeros(length - used, dtype=np.int32), np.zeros(length - used, dtype=bool)
            used = 0
        yield ids, counts
        used = (used + len(ids)) % length


def split(documents: list[Tokens], share: float, seed: int) -> tuple[list[Tokens], list[Tokens]]:
    """Shuffled training documents, and held-out ones of about ``share`` of the tokens."""
    if len(documents) == 1 and share > 0:
        ids, counts = documents[0]
        cut = len(ids) - max(2, round(len(ids) * share))
        return [(ids[:cut], counts[:cut])], [(ids[cut:], counts[cut:])]
    order = np.random.default_rng([seed, 0x5EED]).permutation(len(documents))
    wanted = share * sum(len(ids) for ids, _ in documents)
    held_out: list[Tokens] = []
    taken = 0
    for index in order[:-1]:
        if taken >= wanted:
            break
        held_out.append(documents[index])
        taken += len(documents[index][0])
    return [documents[index] for index in order[len(held_out) :]], held_out


@dataclass
class Corpus:
    """Training and held-out sequences; ``fingerprint`` is a hash of every token and label of the former."""

    train: Sequences
    held_out: Sequences | None
    seed: int = 0
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        parts = (self.train.ids, self.train.labels, self.train.document_ids)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(b"" if part is None else part.numpy())
        self.fingerprint = digest.hexdigest()

    @classmethod
    def load(cls, config: DataConfig, tokenizer: Any, seed: int) -> "Corpus":
        """Reads, tokenises, splits and packs ``config.path``."""
        if tokenizer is None:
            raise ValueError("the model has no tokenizer: its folder should hold tokenizer.json")
        if config.template == "chat" and not getattr(tokenizer, "chat_template", None):
            raise ValueError("data.template=chat: the model's tokenizer has no chat template")
        documents = tokens_of(read_documents(config), tokenizer, config)
        documents = [(ids, counts) for ids, counts in documents if len(ids) >= 2 and counts[1:].any()]
        if not documents:
            raise ValueError(f"{config.path}: no document of at least two tokens")
        train, held_out = split(documents, config.held_out, seed)
        if config.whole_documents and not config.isolate_documents:
            raise ValueError("data.whole_documents: needs data.isolate_documents, or empty places would be attended")
        options = (config.sequence_length, config.isolate_documents, config.whole_documents)
        sequences = pack(train, *options) if len(train[0][0]) else None
        if not sequences:
            raise ValueError(f"{config.path}: too little text to train on after holding out {config.held_out:.0%}")
        return cls(sequences, pack(held_out, *options) if held_out else None, seed)

    def start(self) -> Cursor:
        """A cursor at the first sequence of the first epoch."""
        depends_on = "text, tokenizer, sequence_length, held_out or seed"
        return Cursor(len(self.train), self.seed, self.fingerprint, depends_on)
