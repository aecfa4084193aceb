"""The program of a verifier process: loads one verifier, then answers requests over a pipe until the pipe closes.

It is run by its path, in a session of its own, and imports nothing of the library: a worker starts in a blink, needs
no memory for torch, and never runs the main script a second time as multiprocessing's spawn would.
"""

import difflib
import importlib
import importlib.util
import math
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def load(target: str, arguments: dict[str, Any] | None) -> Any:
    """What ``package.module:name`` or ``path/to/file.py:name`` names; with ``arguments`` what it returns for them."""
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise ValueError("expected package.module:function or path/to/file.py:function")
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.is_file():
            raise ValueError(f"{place}: no such file")
        sys.path.insert(0, str(path.parent))  # a file may import its neighbours, as a script does
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    if not callable(found := getattr(module, name, None)):
        names = [each for each in vars(module) if callable(getattr(module, each)) and not each.startswith("_")]
        close = difflib.get_close_matches(name, names, n=1)
        raise ValueError(f"{place} has no function {name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    return found if arguments is None else found(**arguments)


def checked(value: Any) -> float:
    """``value`` as a float; ValueError where it is no finite number."""
    try:
        number = None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise ValueError(f"expected a number as reward, got {value!r}"[:300])
    if not math.isfinite(number):
        raise ValueError(f"expected a finite reward, got {number}")
    return number


def explained(error: BaseException) -> str:
    """One line: type, message and where it was raised."""
    text = " ".join(str(error).split())[:500]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and frames[-1].filename != __file__ else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def end_with_parent(lifeline: int) -> None:
    """Kills this session once the other end of ``lifeline`` is gone: the parent was killed while a verifier hung."""
    os.read(lifeline, 1)
    os.killpg(0, signal.SIGKILL)


def serve(connection: Connection, lifeline: int) -> None:
    threading.Thread(target=end_with_parent, args=(lifeline,), daemon=True).start()
    sys.path[:], target, arguments = connection.recv()
    try:
        verifier = load(target, arguments)
    except BaseException as error:  # SystemExit too: whatever a user's file does at import
        connection.send(explained(error))
        return
    connection.send(None)
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        start = time.perf_counter()
        try:
            answer = checked(verifier(*pickle.loads(request)))
        except BaseException as error:
            answer = explained(error)
        connection.send((answer, time.perf_counter() - start))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
