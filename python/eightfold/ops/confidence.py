"""What a masked diffusion language model's step does with its hidden states: tokens with their probabilities, of which
the most certain are uncovered.

Source: Fast-dLLM (arXiv 2505.22618, section 3.3 and theorem 1), over the samplers of LLaDA and Dream.
"""

import torch
from torch import Tensor

from eightfold.ops import _library
from eightfold.ops.quant import QuantizedTensor

_confidence, _uncover = _library.direct("lm_head_confidence"), _library.direct("uncover_")


def lm_head_confidence(
    hidden: Tensor | QuantizedTensor,
    weight: Tensor | QuantizedTensor,
    *,
    active: Tensor | None = None,
    forbidden: Tensor | None = None,
    temperatures: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of each row of ``hidden`` [rows, H] a token of ``weight`` [V, H] and its probability: int64 and float32 [rows].

    Logits have the bits of ``gemm(hidden, weight)``, or of ``fp8_gemm`` with float32 results, and are never in memory.
    The token is the one with the largest logit, the lowest of several. Its confidence is its probability by the softmax
    of all logits but the forbidden ones. A row's results do not depend on the rows around it, to the last bit.

    Args:
        hidden, weight: both bfloat16, or both float32 (CPU only), last dimension contiguous, rows at multiples of 16
            bytes, V and H multiples of 8; or both quantized as for ``fp8_gemm``: groups (1, 128) and (128, 128), V and
            H multiples of 16. Any number of rows; H > 0; 0 < V <= 2^22.
        active: bool [rows]; a row that is not gets -1 and -inf.
        forbidden: int64 [n], n < V, ids that have no probability, e.g. that of the mask. An id that is none of the
            vocabulary's raises on the CPU, and is passed over on CUDA. Each tile of the head reads the list: keep it
            short.
        temperatures: float32 [rows]; where it is above 0 the token is a draw from softmax(logits / temperature), with
            the noise of ``sample`` at that seed and position. Its confidence has neither noise nor temperature.
        seeds, positions: int64 [rows], given with temperatures.

    A row gives -1 and NaN if a logit that is not forbidden is NaN or +inf, if all are -inf, or if its temperature is
    negative or not finite. Temperatures below 1e-30 count as 0.
    Raises ValueError for other groups, RuntimeError for dtypes, sizes, layouts or devices that do not fit.
    """
    if isinstance(hidden, QuantizedTensor) != isinstance(weight, QuantizedTensor):
        raise ValueError("lm_head_confidence: hidden and weight must both be tensors, or both be quantized")
    rest = active, forbidden, temperatures, seeds, positions
    if isinstance(hidden, Tensor):
        return _confidence(hidden, None, weight, None, *rest)
    if hidden.group != (1, 128) or weight.group != (128, 128):
        raise ValueError(
            f"lm_head_confidence: groups of hidden and weight must be (1, 128) and (128, 128), "
            f"got {hidden.group} and {weight.group}"
        )
    return _confidence(hidden.codes, hidden.scales, weight.codes, weight.scales, *rest)


def uncover_(
    tokens: Tensor,
    at: Tensor,
    ids: Tensor,
    confidence: Tensor,
    left: Tensor,
    *,
    mask_id: int,
    threshold: float | None = None,
    factor: float | None = None,
    counts: Tensor | None = None,
    eos_ids: Tensor | None = None,
    ended: Tensor | None = None,
    last_too: bool = False,
) -> None:
    """Writes the most certain of ``ids`` over masks of each sequence's block, in place, by exactly one of three rules.

    Candidates are the block's masked tokens whose id is neither negative nor the mask's and whose confidence is no NaN,
    ranked by confidence, the lower place first of equal ones. The first is always taken. Of the others

    - ``threshold``, 0 < threshold <= 1: those whose confidence is at least that (in float32);
    - ``factor``, above 0: the n-th, as long as all before it are taken and its confidence is at least
      1 - factor / (n + 1) (theorem 1 with factor 1);
    - ``counts``, int32 [batch]: as many as make that number, the first included.

    A block whose candidates are none keeps its masks, and ``left`` says so: who loops must stop there.

    Args:
        tokens: int64 [batch, max_tokens], last dimension contiguous.
        at: int32 [batch], where each sequence's block begins. A block that reaches out of its sequence raises on the
            CPU, and is left alone on CUDA, ``left`` and ``ended`` included.
        ids, confidence: int64 and float32 [batch, K], K from 1 to 64: what ``lm_head_confidence`` gives of the block.
        left: int32 [batch], set to the number of masks that stay in the block.
        mask_id: the mask's token.
        eos_ids, ended: int64 [n] and int32 [batch]; ended is set to 1 where one of eos_ids stands in the block with
            no mask before it, and is otherwise left as it is.
        last_too: with ``factor``: the last candidate too where all before it are taken, as in the published code.

    Nothing waits for the host: a CUDA graph can hold it. Raises RuntimeError for dtypes, shapes, layouts, devices,
    rules or sizes that do not fit.
    """
    _uncover(tokens, at, ids, confidence, left, mask_id, threshold, factor, counts, eos_ids, ended, last_too)


@torch.library.register_fake("eightfold::lm_head_confidence")
def _(
    hidden,
    hidden_scales,
    weight,
    weight_scales,
    active=None,
    forbidden=None,
    temperatures=None,
    seeds=None,
    positions=None,
):
    rows = hidden.shape[0]
    return hidden.new_empty(rows, dtype=torch.int64), hidden.new_empty(rows, dtype=torch.float32)


@torch.library.register_fake("eightfold::uncover_")
def _(
    tokens,
    at,
    ids,
    confidence,
    left,
    mask_id,
    threshold=None,
    factor=None,
    counts=None,
    eos_ids=None,
    ended=None,
    last_too=False,
):
    return None
