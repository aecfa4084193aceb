"""Rewards of completions from a verifier that runs in processes of its own, each item under a time limit.

A verifier that raises, hangs, dies or returns something else than a number in the range gives reward 0; it is counted
by kind and its first message kept. A hung worker is killed with everything it started, and replaced.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal, get_args

from eightfold.train.rl.options import require, require_choice, require_finite
from eightfold.train.rl.tasks import TaskOptions
from eightfold.train.rl.verifiers import Extraction

HERE = Path(__file__).parent
START_LIMIT = 120.0  # seconds a worker may take to import its verifier

Failure = Literal["raised", "time limit", "died", "out of range"]


@dataclass(frozen=True)
class RewardOptions:
    """Who says what a completion is worth.

    function: a user's verifier, ``package.module:function`` or ``path/to/file.py:function``; without, the scorer of
    the reasoning-gym task, or math-verify for a JSON lines file. extraction: where a reasoning-gym answer is looked
    for. workers: processes, of each process of the run. time_limit: seconds an item. low, high: the range that a reward
    must lie in.
    """

    function: str | None = None
    extraction: Extraction = "tag"
    workers: int = 2
    time_limit: float = 10.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        require_choice("extraction", self.extraction, get_args(Extraction))
        if self.function is not None:
            parts = self.function.rpartition(":")
            require(
                bool(parts[0] and parts[2]),
                "function",
                "package.module:function or path/to/file.py:function",
                self.function,
            )
        require(self.workers >= 1, "workers", "1 or more", self.workers)
        require_finite("time_limit", self.time_limit)
        require(self.time_limit > 0, "time_limit", "more than 0 seconds", self.time_limit)
        require_finite("low", self.low)
        require_finite("high", self.high)
        require(self.low < self.high, "high", f"more than low={self.low}", self.high)


@dataclass(frozen=True)
class VerifierSource:
    """What a worker loads: ``target`` is module:name or file.py:name, called once with ``arguments`` where given."""

    target: str
    arguments: dict[str, Any] | None = None

    @classmethod
    def of(cls, options: RewardOptions, task: TaskOptions) -> "VerifierSource":
        """The verifier that ``options`` ask for, for the items of ``task``."""
        if options.function is not None:
            return cls(options.function)
        built_in = HERE / "verifiers.py"
        if task.name is not None:
            arguments = {"name": task.name, "options": task.options, "extraction": options.extraction}
            return cls(f"{built_in}:ReasoningGym", arguments)
        return cls(f"{built_in}:MathAnswer", {"answer_field": task.answer_field})


@dataclass(frozen=True)
class Verdict:
    """reward: 0 where the verifier failed; failure and message then say how."""

    reward: float
    failure: Failure | None = None
    message: str = ""


class _Worker:
    """One process and what it is at. ``ticket`` None: idle, or still loading its verifier (``ready`` False)."""

    def __init__(self, source: VerifierSource, lifeline: int) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "verifier_worker.py"), str(theirs.fileno()), str(lifeline)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), lifeline),
                start_new_session=True,  # so that the kill reaches what a verifier started, and Ctrl-C does not
            )
        self.connection.send((sys.path, source.target, source.arguments))
        self.ready = False
        self.ticket: int | None = None
        self.deadline = time.monotonic() + START_LIMIT

    @property
    def idle(self) -> bool:
        return self.ready and self.ticket is None

    def kill(self) -> int:
        """Ends the process and its children; returns the exit status (negative: the signal's number)."""
        # Before the wait: until then the process, alive or dead, keeps its id and its group. A dead one's status stays.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def close(self) -> int:
        status = self.kill()
        self.connection.close()
        return status


class VerifierPool:
    """Workers that score completions: ``submit`` as they come, ``collect`` the verdicts; or ``score`` a list.

    Use it as a context manager, or call ``close``. ``failures`` counts by kind and ``first_failure`` is one line, over
    the pool's life. The constructor returns when every worker has loaded the verifier; ValueError if one cannot.
    """

    def __init__(self, source: VerifierSource, options: RewardOptions | None = None) -> None:
        self.options = options or RewardOptions()
        self.failures: Counter[str] = Counter()
        self.first_failure: str | None = None
        self._source = source
        self._waiting: deque[int] = deque()
        self._requests: dict[int, bytes] = {}
        self._verdicts: dict[int, Verdict] = {}
        self._workers: list[_Worker] = []
        # The workers hold the end to read from: they end when this process is gone, however it went.
        self._lifeline, self._alive = os.pipe()
        self._open = True
        try:
            self._workers += (_Worker(source, self._lifeline) for _ in range(self.options.workers))
            while not all(worker.ready for worker in self._workers):
                self._turn(block=True)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, item: dict[str, Any], completion: str, finish_reason: str) -> None:
        """Hands in one completion; goes on at once."""
        if not self._open:
            raise ValueError("the pool is closed")
        ticket = len(self._requests)
        self._requests[ticket] = pickle.dumps((item, completion, finish_reason))
        self._waiting.append(ticket)
        self._turn(block=False)

    def collect(self) -> list[Verdict]:
        """Waits for everything submitted since the last call; verdicts in the order of submission."""
        while len(self._verdicts) < len(self._requests):
            self._turn(block=True)
        found = [self._verdicts[ticket] for ticket in range(len(self._requests))]
        self._requests.clear()
        self._verdicts.clear()
        return found

    def score(self, requests: Iterable[tuple[dict[str, Any], str, str]]) -> list[Verdict]:
        """Verdicts on (item, completion, finish_reason), in their order."""
        for request in requests:
            self.submit(*request)
        return self.collect()

    def close(self) -> None:
        """Kills the workers; nothing that they started is left behind."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()
        if self._open:
            os.close(self._alive)
            os.close(self._lifeline)
            self._open = False

    def _turn(self, block: bool) -> None:
        """Takes answers, ends what is over its time, gives idle workers their next request."""
        for worker in [each for each in self._workers if each.idle]:
            self._feed(worker)
        busy = [worker for worker in self._workers if not worker.idle]
        patience = max(0.0, min((worker.deadline for worker in busy), default=0.0) - time.monotonic()) if block else 0.0
        answered = wait([worker.connection for worker in busy], patience)
        for worker in busy:
            if worker.connection in answered:
                self._receive(worker)
            elif time.monotonic() >= worker.deadline:
                self._end(worker, "time limit")
        for worker in [each for each in self._workers if each.idle]:
            self._feed(worker)

    def _feed(self, worker: _Worker) -> None:
        if not self._waiting:
            return
        ticket = self._waiting[0]
        try:
            worker.connection.send_bytes(self._requests[ticket])
        except OSError:  # it died while idle, which is not this request's doing
            self._replace(worker)
            return
        self._waiting.popleft()
        worker.ticket, worker.deadline = ticket, time.monotonic() + self.options.time_limit

    def _receive(self, worker: _Worker) -> None:
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            self._end(worker, "died")
            return
        if not worker.ready:
            if answer is not None:
                raise ValueError(f"verifier {self._source.target}: {answer}")
            worker.ready = True
            return
        value, seconds = answer
        ticket, worker.ticket = worker.ticket, None
        limit, low, high = self.options.time_limit, self.options.low, self.options.high
        # The worker's own clock decides, not the moment when this process came to look.
        if seconds > limit:
            self._fail(ticket, "time limit", f"took {seconds:.2f} s, more than the limit of {limit:g} s")
        elif isinstance(value, str):
            self._fail(ticket, "raised", value)
        elif not low <= value <= high:
            self._fail(ticket, "out of range", f"expected a reward from {low:g} to {high:g}, got {value:g}")
        else:
            self._verdicts[ticket] = Verdict(value)

    def _end(self, worker: _Worker, failure: Failure) -> None:
        """A worker hung or died: its request fails, a new worker takes its place."""
        ticket, loaded = worker.ticket, worker.ready
        status = self._replace(worker) if loaded else worker.kill()
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        if not loaded:
            late = failure == "time limit"
            reason = (
                f"took more than {START_LIMIT:g} s to load" if late else f"its process ended while loading it ({how})"
            )
            raise ValueError(f"verifier {self._source.target}: {reason}")
        if failure == "time limit":
            self._fail(ticket, failure, f"took more than the limit of {self.options.time_limit:g} s")
        else:
            self._fail(ticket, failure, f"its process ended ({how})")

    def _replace(self, worker: _Worker) -> int:
        status = worker.close()
        self._workers[self._workers.index(worker)] = _Worker(self._source, self._lifeline)
        return status

    def _fail(self, ticket: int, failure: Failure, message: str) -> None:
        self.failures[failure] += 1
        if self.first_failure is None:
            self.first_failure = f"verifier {self._source.target}: {failure}: {message}"
        self._verdicts[ticket] = Verdict(0.0, failure, message)
