"""Ctrl-C and SIGTERM end a run between two steps, after a checkpoint."""

import os
import signal
import threading
from types import FrameType
from typing import Any

from eightfold.train.distributed import World


class Interrupted(Exception):
    """The run was asked to stop and did, leaving a checkpoint; the message says which."""


class StopRequests:
    """While the context lasts, the first SIGINT or SIGTERM only sets a flag; a second one kills the process at once.

    Under torchrun a terminal's Ctrl-C reaches each process twice (from the terminal and from torchrun), so there
    further signals change nothing; torchrun itself kills processes that do not end. Outside the main thread Python
    gives no signals, and nothing is caught.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        in_main_thread = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM) if in_main_thread else ():
            self._previous[number] = signal.signal(number, self._first)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _first(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._world.size == 1:
            for each in self._previous:
                signal.signal(each, signal.SIG_DFL)
        if self._world.leads:
            again = " (again: stop at once)" if self._world.size == 1 else ""
            os.write(2, f"\nstopping after this step, with a checkpoint{again}\n".encode())

    def agreed(self) -> bool:
        """Whether any process was asked to stop: the same answer in all of them."""
        return self._world.sum([float(self._asked)])[0] > 0
