"""FP8 codes of weights that are kept from one product to the next."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from eightfold.ops import _library  # noqa: F401  (loads torch.ops.eightfold; the package registers the fakes)

ops = torch.ops.eightfold

_BLOCKS = [128, 128]
Codes = tuple[Tensor, Tensor]  # codes and scales


def cast_weights(weights: Sequence[Tensor], transposed: bool = False) -> Codes:
    """Codes in groups (128, 128) of weights, one below the other."""
    if len(weights) == 1 and not transposed:
        codes, scales = ops.quantize(weights[0].contiguous(), _BLOCKS)
    else:
        codes, scales = ops.quantize_stacked([weight.contiguous() for weight in weights], transposed)
    return codes, scales


class WeightCache:
    """Keeps the (128, 128) codes of a parameter, or of several as one, while each is the same object, storage and
    version: 1 byte an element. Codes of another version take the place of those before, at their address: a CUDA graph
    that reads them goes on with the new ones.

    Writes that torch does not count (through `.data` or another library's kernels) need `clear()` or `refresh()`. Not
    used while compiling, nor for parameters made in inference mode, which have no version.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._weights, self._key, self._codes, self._cast_in_graph = (), None, None, False

    @property
    def settled(self) -> bool:
        """Whether a CUDA graph is being captured that found the codes cast: its products may read them early."""
        return self._codes is not None and not self._cast_in_graph and _capturing(self._codes[0])

    def codes(self, *weights: Tensor) -> Codes:
        if any(weight.is_inference() for weight in weights):
            return cast_weights(weights)
        key = [(weight._version, weight.data_ptr(), weight.shape) for weight in weights]
        same = len(self._weights) == len(weights) and all(map(_is_of, weights, self._weights))
        if not same or self._key != key:
            self._cast_in_graph = _capturing(weights[0])
            with torch.inference_mode(False), torch.no_grad():  # made while generating, written again while training
                codes = cast_weights(weights)
                self._codes = write_over(self._codes, codes) if same else codes
            self._key = key
            if not same:
                self._weights = tuple(weakref.ref(weight) for weight in weights)
        return self._codes

    def refresh(self) -> None:
        """Casts what is kept again, whatever its version."""
        weights = tuple(reference() for reference in self._weights)
        if weights and all(weight is not None for weight in weights):
            self._key = None
            self.codes(*weights)

    def __reduce__(self):  # copies and pickles of a layer start empty
        return WeightCache, ()


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_of(weight: Tensor, reference: weakref.ref) -> bool:
    """Whether it is the referent or shares its memory and version, as what a checkpointed layer has saved does."""
    known = reference()
    if known is None or known is weight:
        return known is weight
    return known.data_ptr() == weight.data_ptr() and known.shape == weight.shape and known._version == weight._version


def write_over(kept: Codes | None, codes: Codes) -> Codes:
    """``codes`` at the addresses of ``kept``, where they fit."""
    if kept is None or any(old.shape != new.shape or old.device != new.device for old, new in zip(kept, codes)):
        return codes
    kept[0].view(torch.uint8).copy_(codes[0].view(torch.uint8))
    kept[1].copy_(codes[1])
    return kept


class ServedCodes(WeightCache):
    """Codes of many weights, made elsewhere: one cache for all layers of a model, whose weights are never read."""

    settled = False

    def clear(self) -> None:
        self._each: dict[Tensor, Codes] = {}
        self._stacks: dict[tuple[Tensor, ...], Codes] = {}

    def put(self, weight: Tensor, codes: Tensor, scales: Tensor) -> None:
        """(128, 128) codes and scales of ``weight``; in the place of those before."""
        self._each[weight] = write_over(self._each.get(weight), (codes, scales))

    def refresh(self) -> None:
        """Nothing: whoever made the codes puts new ones."""

    def codes(self, *weights: Tensor) -> Codes:
        if len(weights) == 1:
            return self._each[weights[0]]
        if weights not in self._stacks:
            codes, scales = zip(*(self._each[weight] for weight in weights), strict=True)
            with torch.inference_mode(False), torch.no_grad():
                stack = torch.cat([each.view(torch.uint8) for each in codes]).view(codes[0].dtype)
                stack_scales = torch.cat(scales)
            # What they were stacked from becomes views: a byte an element is kept, not two.
            parts = stack.split([len(each) for each in codes]), stack_scales.split([len(each) for each in scales])
            self._each.update(zip(weights, zip(*parts, strict=True), strict=True))
            self._stacks[weights] = stack, stack_scales
        return self._stacks[weights]
