"""Linear attention: what a caller can get wrong."""

import pytest
import torch

from eightfold.ops import _library  # noqa: F401

ops = torch.ops.eightfold


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 2, 32)}, r": q must have 4 dimensions, got shape \[5, 2, 32\]"),
        ({"q": torch.zeros(2, 5, 3, 32).half()}, ": q must be bfloat16 or float32, got float16"),
        (
            {"q": torch.zeros(2, 5, 3, 48)},
            r": q must have a last dimension of 32, 64 or 128, got shape \[2, 5, 3, 48\]",
        ),
        ({"q": torch.zeros(2, 5, 32, 3).mT}, ": q must have stride 1 in its last dimension"),
        ({"k": torch.zeros(2, 5, 3, 32).bfloat16()}, ": k must be float32, got bfloat16"),
        ({"k": torch.zeros(2, 6, 3, 32)}, r": k must have shape \[2, 5, 3, 32\], got \[2, 6, 3, 32\]"),
        ({"v": torch.zeros(2, 5, 3, 64)}, r": v must have shape \[2, 5, 3, 32\], got \[2, 5, 3, 64\]"),
        ({"key_mask": torch.ones(2, 5)}, ": key_mask must be bool, got float32"),
        ({"key_mask": torch.ones(2, 3).bool()}, r": key_mask must have shape \[2, 5\], got \[2, 3\]"),
        ({"key_mask": torch.ones(5, 2).bool().t()}, ": key_mask must be contiguous"),
        ({"normalizer": torch.zeros(2, 3, 32)}, ": normalizer must be None where state is None"),
        ({"state": torch.zeros(2, 3, 32, 32)}, ": normalizer must be given where state is"),
        (
            {"state": torch.zeros(2, 3, 32, 64), "normalizer": torch.zeros(2, 3, 32)},
            r": state must have shape \[2, 3, 32, 32\], got \[2, 3, 32, 64\]",
        ),
        (
            {"state": torch.zeros(2, 3, 32, 32).bfloat16(), "normalizer": torch.zeros(2, 3, 32)},
            ": state must be float32, got bfloat16",
        ),
        (
            {"state": torch.zeros(2, 3, 32, 32).mT, "normalizer": torch.zeros(2, 3, 32)},
            ": state must be contiguous",
        ),
    ],
)
def test_errors(change, message):
    x = torch.zeros(2, 5, 3, 32)
    for op in (ops.linear_attention, ops.linear_attention_quantize):
        with pytest.raises(RuntimeError, match=op.__name__ + message):
            op(**{"q": x, "k": x, "v": x, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dout": torch.zeros(2, 5, 3, 64)}, r": dout must have shape \[2, 5, 3, 32\], got \[2, 5, 3, 64\]"),
        ({"dout": torch.zeros(2, 5, 3, 32).bfloat16()}, ": dout must be float32, got bfloat16"),
        ({"state_out": torch.zeros(2, 3, 32)}, r": state_out must have shape \[2, 3, 32, 32\], got \[2, 3, 32\]"),
        ({"normalizer_out": torch.zeros(2, 3, 32).double()}, ": normalizer_out must be float32, got float64"),
        ({"dstate_out": torch.zeros(2, 3, 32, 32)}, ": dnormalizer_out must be given where dstate_out is"),
    ],
)
def test_errors_of_the_backward_pass(change, message):
    x, state, normalizer = torch.zeros(2, 5, 3, 32), torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32)
    arguments = {"dout": x, "q": x, "k": x, "v": x, "state_out": state, "normalizer_out": normalizer}
    with pytest.raises(RuntimeError, match="linear_attention_backward" + message):
        ops.linear_attention_backward(**{**arguments, **change})


@pytest.mark.gpu
def test_errors_on_cuda():
    x = torch.zeros(2, 5, 3, 32, device="cuda", dtype=torch.bfloat16)
    wide, many = x.new_zeros(2, 5, 3, 36), x[:1, :1].expand(1, 2**30 + 1, 3, 32)
    cases = [
        ((x.float(),) * 3, ": q must be bfloat16 on CUDA, got float32"),
        ((x, wide[..., :32], x), ": k must have strides that are multiples of 8 on CUDA, got shape"),
        ((x, x, x.new_zeros(961)[1:].view(x.shape)), ": v must start at a multiple of 16 bytes, got an address 2 past"),
        ((many,) * 3, r": q must have at most 2\^30 tokens on CUDA, got shape"),
        ((x, x, x.cpu()), ": v is on cpu but the first argument is on cuda"),
    ]
    for tensors, message in cases:
        with pytest.raises(RuntimeError, match="linear_attention" + message):
            ops.linear_attention(*tensors)
