"""What a policy is asked: items of a reasoning-gym generator or of a JSON lines file, made into prompts.

Their order depends on the seed alone, and a checkpoint can continue it.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from eightfold.train.data import json_records
from eightfold.train.order import Cursor
from eightfold.train.rl.options import require, require_choice
from eightfold.train.rl.verifiers import REASONING_GYM, reasoning_gym_dataset


@dataclass(frozen=True)
class TaskOptions:
    """Either ``name``, a reasoning-gym task, with its own ``options`` and ``size``, how many different items there are;
    or ``path``, a JSON lines file whose ``question_field`` is asked and whose ``answer_field`` is what math-verify
    compares with (a user's verifier sees all fields and needs none of them)."""

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 100_000
    path: str | None = None
    question_field: str = "question"
    answer_field: str = "answer"

    def __post_init__(self):
        given = {"name": self.name, "path": self.path}
        require((self.name is None) != (self.path is None), "name, path", "one of the two", given)
        require(self.path is None or not self.options, "options", "none for a JSON lines file", self.options)
        require(self.size >= 1, "size", "1 or more items", self.size)


@dataclass(frozen=True)
class PromptOptions:
    """How a question becomes a prompt: ``text``, with ``{question}`` replaced, as it is (template "plain") or as the
    user's turn of the tokenizer's chat template after ``system`` (template "chat"). max_tokens: longest prompt."""

    template: Literal["plain", "chat"] = "plain"
    text: str = "{question}"
    system: str | None = None
    max_tokens: int | None = None

    def __post_init__(self):
        require_choice("template", self.template, ("plain", "chat"))
        require("{question}" in self.text, "text", "a text with {question} in it", self.text)
        require(self.system is None or self.template == "chat", "system", "none unless template is chat", self.system)
        require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "1 or more", self.max_tokens)


class Task(Protocol):
    """Items by index; an item is a dict of what a verifier needs."""

    fingerprint: str

    def __len__(self) -> int: ...

    def item(self, index: int) -> dict[str, Any]: ...

    def question(self, item: dict[str, Any]) -> str: ...


class ReasoningGymTask:
    """``options.size`` items of the generator ``options.name``, made when they are asked for. Another ``seed`` gives
    other items. An item has ``question``, ``answer`` and ``metadata``."""

    def __init__(self, options: TaskOptions, seed: int) -> None:
        self._dataset = reasoning_gym_dataset(options.name, options.options, seed, options.size)
        told = (REASONING_GYM, options.name, asdict(self._dataset.config))
        self.fingerprint = hashlib.sha256(repr(told).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._dataset)

    def item(self, index: int) -> dict[str, Any]:
        return self._dataset[index]

    def question(self, item: dict[str, Any]) -> str:
        return item["question"]


class JsonLinesTask:
    """The objects of a JSON lines file. ValueError with file and line for one whose question is missing or no text, or,
    with ``needs_answer``, whose answer is neither text nor a number."""

    def __init__(self, options: TaskOptions, needs_answer: bool) -> None:
        path = Path(options.path)
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        self._field = options.question_field
        self._items: list[dict[str, Any]] = []
        for where, record in json_records(path):
            _require_field(record, options.question_field, str, "text", where)
            if needs_answer:
                _require_field(record, options.answer_field, (str, int, float), "text or a number", where)
            self._items.append(record)
        if not self._items:
            raise ValueError(f"{path}: holds no item")
        digest = hashlib.sha256(options.question_field.encode())
        for record in self._items:
            digest.update(json.dumps(record).encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._items)

    def item(self, index: int) -> dict[str, Any]:
        return self._items[index]

    def question(self, item: dict[str, Any]) -> str:
        return item[self._field]


def _require_field(record: dict[str, Any], name: str, kind: Any, expected: str, where: str) -> None:
    if name not in record:
        raise ValueError(f"{where}: has no field {name!r}; its fields: {', '.join(record)}")
    if not isinstance(record[name], kind) or isinstance(record[name], bool):
        raise ValueError(f"{where}: field {name!r} should be {expected}, got {type(record[name]).__name__}")


def load_task(options: TaskOptions, seed: int, needs_answer: bool = True) -> Task:
    """The task that ``options`` name; ``needs_answer``: of a JSON lines file, whether the verifier is math-verify."""
    if options.name is not None:
        return ReasoningGymTask(options, seed)
    return JsonLinesTask(options, needs_answer)


@dataclass(frozen=True)
class PromptItem:
    """``index`` of the item in its task, the prompt's ``text`` and token ``ids``, and the ``item`` for the verifier."""

    index: int
    text: str
    ids: list[int]
    item: dict[str, Any]


class Prompts:
    """An endless walk through the prompts of a task, shuffled anew each epoch; resumes from its ``state_dict``."""

    def __init__(self, task: Task, tokenizer: Any, options: PromptOptions | None = None, seed: int = 0) -> None:
        self._options = options or PromptOptions()
        if self._options.template == "chat" and not getattr(tokenizer, "chat_template", None):
            raise ValueError("template: chat needs a tokenizer with a chat template, and the model's has none")
        self._task, self._tokenizer = task, tokenizer
        self._cursor = Cursor(len(task), seed, task.fingerprint, "the task, its options, its file or the seed")

    def __iter__(self) -> Iterator[PromptItem]:
        return self

    def __next__(self) -> PromptItem:
        return self.take(1)[0]

    def take(self, count: int) -> list[PromptItem]:
        """The next ``count`` prompts. ValueError for one of more than ``max_tokens``."""
        return [self._prompt(index) for index in self._cursor.take(count)]

    def state_dict(self) -> dict[str, Any]:
        return self._cursor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError where the state is another task's."""
        self._cursor.load_state_dict(state)

    def _prompt(self, index: int) -> PromptItem:
        item = self._task.item(index)
        text = self._options.text.replace("{question}", self._task.question(item))
        if self._options.template == "chat":
            turns = [{"role": "system", "content": self._options.system}] if self._options.system is not None else []
            turns.append({"role": "user", "content": text})
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = list(self._tokenizer.encode(text, add_special_tokens=False))
        limit = self._options.max_tokens
        if not ids or (limit is not None and len(ids) > limit):
            expected = f"1 to {limit}" if limit is not None else "1 or more"
            raise ValueError(f"item {index}: expected a prompt of {expected} tokens, got {len(ids)}: {text[:80]!r}")
        return PromptItem(index, text, ids, item)
