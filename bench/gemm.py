"""FP8 GEMM: forward and dgrad (1x128 by 128x128), wgrad (1x128 by 1x128, fp32 accumulate). Ceiling: largest matmul."""

import torch

from eightfold.ops.layouts import ceil_div

from .common import Bench, Case, Run, relative_error

ops = torch.ops.eightfold
Quantized = tuple[torch.Tensor, torch.Tensor]
FORWARD = (
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (8192, 11008, 4096),
    (8192, 4096, 11008),
    (16384, 3584, 18944),
    (4096, 7168, 16384),
    (4096, 24576, 1536),
    (4096, 2176, 7168),
    (8192, 12288, 4096),
    (8192, 22016, 4096),
    (16384, 8192, 28672),
    (2048, 7168, 2048),
)
WGRAD = (  # outputs x inputs x tokens
    (4096, 4096, 8192),
    (11008, 4096, 8192),
    (4096, 11008, 8192),
    (3584, 18944, 16384),
    (4096, 4096, 32768),
    (6144, 4096, 16384),
)
CPU_FORWARD = ((64, 4096, 4096), (512, 576, 576), (512, 1536, 576), (512, 576, 1536), (1024, 4096, 4096))
CPU_WGRAD = ((1536, 576, 512), (576, 1536, 512))


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    for m, n, k in FORWARD if cuda else CPU_FORWARD:
        bench.add(_forward(bench.device, m, n, k))
    for m, n, k in WGRAD if cuda else CPU_WGRAD:
        for case in _wgrad(bench.device, m, n, k):
            bench.add(case)


def _forward(device: torch.device, m: int, n: int, k: int) -> Case:
    x, w = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
    a, b = ops.quantize(x, (1, 128)), ops.quantize(w, (128, 128))
    ours = bind(ops.fp8_gemm, *a, *b, 128, None, torch.bfloat16)
    return Case(
        "fp8_gemm",
        f"{m}x{n}x{k}",
        ours=ours,
        error=lambda: relative_error(ours()[:256], exact(a, b, (128, 128))),
        tolerance=1.75e-3,
        flop=2 * m * n * k,
        peers=forward_peers(x, w, a, b) if x.is_cuda else {"torch fp32": bind(torch.mm, x.float(), w.float().t())},
    )


def _wgrad(device: torch.device, m: int, n: int, k: int) -> list[Case]:
    """Added to fp32 sums, as over micro-batches, written in bf16, and added to bf16 sums."""
    dy, x = (torch.randn(k, cols, device=device, dtype=torch.bfloat16) for cols in (m, n))
    a, b = (tuple(t.t() for t in ops.quantize(tensor, (128, 1))) for tensor in (dy, x))
    out = torch.zeros(m, n, device=device)
    bf16 = bind(ops.fp8_gemm, *a, *b, 1, None, torch.bfloat16)
    bf16_out = torch.zeros(m, n, device=device, dtype=torch.bfloat16)

    def added_once() -> torch.Tensor:
        bf16_out.zero_()
        ops.fp8_gemm_accumulate_(bf16_out, *a, *b, 1)
        return bf16_out

    shape, flop, reference = f"{m}x{n}x{k}", 2 * m * n * k, {"torch fp32": bind(torch.mm, dy.float().t(), x.float())}
    return [
        Case(
            "fp8_gemm wgrad",
            shape,
            ours=bind(ops.fp8_gemm_accumulate_, out, *a, *b, 1),
            error=lambda: relative_error(ops.fp8_gemm(*a, *b, 1, None, torch.float32)[:256], exact(a, b, (1, 128))),
            tolerance=2e-4 if x.is_cuda else 1e-5,
            flop=flop,
            peers=_deep_gemm_wgrad(a, b) if x.is_cuda else reference,
        ),
        Case(
            "fp8_gemm wgrad in bf16",
            shape,
            ours=bf16,
            error=lambda: relative_error(bf16()[:256], exact(a, b, (1, 128))),
            tolerance=1.75e-3,
            flop=flop,
            peers=_wgrad_peers(dy, x, a, b) if x.is_cuda else reference,
        ),
        Case(
            "fp8_gemm wgrad added to bf16",
            shape,
            ours=bind(ops.fp8_gemm_accumulate_, bf16_out, *a, *b, 1),
            error=lambda: relative_error(added_once()[:256], exact(a, b, (1, 128))),
            tolerance=1.75e-3,
            flop=flop,
            peers={"torch bf16 addmm_": bind(torch.Tensor.addmm_, torch.zeros_like(bf16_out), dy.t(), x)}
            if x.is_cuda
            else reference,
        ),
    ]


def bind(function, *arguments) -> Run:
    return lambda: function(*arguments)


def exact(a: Quantized, b: Quantized, b_group: tuple[int, int]) -> torch.Tensor:
    """fp64 product of the dequantised operands, first 256 rows (any row stands for all)."""
    left = ops.dequantize(a[0][:256].contiguous(), a[1][:256], (1, 128), torch.float32).double()
    right = ops.dequantize(b[0].contiguous(), b[1], b_group, torch.float32).double()
    return left @ right.t()


def deep_gemm():
    """The module, or None where it is not installed."""
    try:
        import deep_gemm
    except ImportError:
        return None
    return deep_gemm


def forward_peers(x: torch.Tensor, w: torch.Tensor, a: Quantized, b: Quantized) -> dict[str, Run]:
    """bf16 by torch; cuBLASLt with the same groups, a scale a row, and a scale a tensor; DeepGEMM."""
    scaled_mm, recipe = torch.nn.functional.scaled_mm, torch.nn.functional.ScalingType
    (m, k), n = x.shape, w.shape[0]
    groups = 4 * ceil_div(ceil_div(k, 128), 4)  # cuBLASLt wants the groups of K padded to 4
    blocks = torch.zeros(n // 128, groups, device=x.device).t()
    blocks[: b[1].shape[1]].copy_(b[1].t())
    left, right, bf16 = a[0], b[0].t(), torch.bfloat16
    rows, columns = torch.ones(m, 1, device=x.device), torch.ones(1, n, device=x.device)
    one = torch.ones((), device=x.device)
    peers = {
        "torch bf16": bind(torch.mm, x, w.t()),
        "cuBLASLt 1x128 x 128x128": lambda: scaled_mm(
            left, right, a[1], recipe.BlockWise1x128, blocks, recipe.BlockWise128x128, output_dtype=bf16
        ),
        "cuBLASLt row-wise": lambda: torch._scaled_mm(left, right, rows, columns, out_dtype=bf16, use_fast_accum=True),
        "cuBLASLt tensor-wise": lambda: torch._scaled_mm(left, right, one, one, out_dtype=bf16, use_fast_accum=True),
    }
    if deep_gemm():
        out = torch.empty(m, n, device=x.device, dtype=bf16)
        peers["DeepGEMM"] = lambda: deep_gemm().fp8_gemm_nt(a, b, out, disable_ue8m0_cast=True)
    return peers


def _wgrad_peers(dy: torch.Tensor, x: torch.Tensor, a: Quantized, b: Quantized) -> dict[str, Run]:
    """With bf16 out: torch's bf16 product; cuBLASLt with the same groups."""
    scaled_mm, recipe = torch.nn.functional.scaled_mm, torch.nn.functional.ScalingType
    return {
        "torch bf16": bind(torch.mm, dy.t(), x),
        "cuBLASLt 1x128 x 1x128": lambda: scaled_mm(
            a[0], b[0].t(), a[1], recipe.BlockWise1x128, b[1], recipe.BlockWise1x128, output_dtype=torch.bfloat16
        ),
    }


def _deep_gemm_wgrad(a: Quantized, b: Quantized) -> dict[str, Run]:
    """Its 1D1D kernel, which adds to fp32 sums."""
    if not deep_gemm():
        return {}
    out = torch.zeros(a[0].shape[0], b[0].shape[0], device=a[0].device)
    return {
        "DeepGEMM 1D1D": lambda: deep_gemm().fp8_gemm_nt(a, b, out, c=out, disable_ue8m0_cast=True, recipe=(1, 1, 128))
    }
