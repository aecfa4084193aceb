"""eightfold: FP8 and efficient-generation kernels for torch.

Low-level ops (`quantize`, `fp8_gemm`, ...), drop-in layers (`eightfold.nn`), an optimizer with 8-bit states
(`eightfold.optim`), models and training loops built on them. `eightfold.reference` defines every op in plain torch.
"""

# ops before reference: loading the library looks the references up where it has no kernels of its own.
from eightfold.ops import (
    QuantizedTensor,
    build_info,
    quantize,
    quantize_both,
    requantize,
)

# isort: split
from eightfold import reference

__version__ = "0.1.0"
__all__ = [
    "QuantizedTensor",
    "build_info",
    "quantize",
    "quantize_both",
    "reference",
    "requantize",
]
