"""An endless shuffled walk whose state is two integers, and random numbers that a step can draw again."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


def step_generator(seed: int, purpose: int, step: int) -> np.random.Generator:
    """Numbers that are a function of these three alone, so that a resumed run draws what an unbroken one draws."""
    counter = np.array([0, 0, 0, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=np.array([seed, purpose], np.uint64)))


@dataclass
class Cursor:
    """Walks through the indices 0 .. count-1, in a new order each epoch, which depends on ``seed`` and epoch alone.

    ``fingerprint`` tells what is walked through from anything else; ``depends_on`` says, for an error, what changes it.
    """

    count: int
    seed: int
    fingerprint: str
    depends_on: str
    epoch: int = 0
    position: int = 0
    _order: tuple[int, np.ndarray] | None = field(default=None, repr=False)  # of an epoch: a permutation takes a while

    def order(self) -> np.ndarray:
        if self._order is None or self._order[0] != self.epoch:
            generator = np.random.default_rng([self.seed, self.epoch])
            self._order = self.epoch, generator.permutation(self.count)
        return self._order[1]

    def take(self, count: int) -> list[int]:
        """The next ``count`` indices; runs over into the next epoch."""
        indices: list[int] = []
        while len(indices) < count:
            order = self.order()
            part = order[self.position : self.position + count - len(indices)]
            indices += part.tolist()
            self.position += len(part)
            if self.position == len(order):
                self.epoch, self.position = self.epoch + 1, 0
        return indices

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(f"the data are not those of the checkpoint ({self.depends_on} differ)")
        self.epoch, self.position = state["epoch"], state["position"]
