"""The parameters that a step updates together, kept between steps: sorting them anew costs as much as the launch."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from eightfold.optim.sharding import Rows

STATES_8_BIT = ("m_codes", "m_maxima", "m_exponents", "v_codes", "v_maxima", "v_exponents")


@dataclass
class Batch:
    """Parameters of one group on one device, and the states of those whose states are 8 bits."""

    eight_bit: list[Tensor]
    plain: list[Tensor]
    states: list[dict[str, Any]]
    rows: list[Rows]

    def __post_init__(self) -> None:
        self.sharded = any(isinstance(p, DTensor) for p in self.eight_bit)
