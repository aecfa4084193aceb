"""FP8 GEMM: forward and dgrad (1x128 by 128x128), wgrad (1x128 by 1x128, fp32 accumulate). Ceiling: largest matmul."""

import torch

from eightfold.ops.layouts import ceil_div

from .common import Bench, Case, relative_error

ops = torch.ops.eightfold
FORWARD = (
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (8192, 11008, 4096),
    (8192, 4096, 11008),
    (16384, 3584, 18944),
    (4096, 7168, 16384),
    (4096, 24576, 1536),
    (4096, 2176, 7168),
    (64, 4096, 4096),
    (64, 24576, 1536),
    (1, 4096, 4096),
)
WGRAD = ((4096, 4096, 8192), (11008, 4096, 8192), (3584, 18944, 16384), (4096, 4096, 32768))
CPU_FORWARD = ((64, 4096, 4096), (512, 576, 576), (512, 1536, 576), (512, 576, 1536), (1024, 4096, 4096))
CPU_WGRAD = ((1536, 576, 512), (576, 1536, 512))


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    for m, n, k in FORWARD if cuda else CPU_FORWARD:
        x, w = (torch.randn(rows, k, device=bench.device, dtype=torch.bfloat16) for rows in (m, n))
        a, b = ops.quantize(x, (1, 128)), ops.quantize(w, (128, 128))
        ours = _bind(ops.fp8_gemm, *a, *b, 128, None, torch.bfloat16)
        bench.add(
            Case(
                "fp8_gemm",
                f"{m}x{n}x{k}",
                ours=ours,
                error=lambda a=a, b=b, ours=ours: relative_error(ours()[:256], _exact(a, b, (128, 128))),
                tolerance=1.75e-3,
                flop=2 * m * n * k,
                bytes=0 if m > 256 else n * k + m * k + 2 * m * n,
                peers=_cuda_peers(x, w, a, b) if cuda else {"torch fp32": _bind(torch.mm, x.float(), w.float().t())},
            )
        )
    for m, n, k in WGRAD if cuda else CPU_WGRAD:
        dy, x = (torch.randn(k, cols, device=bench.device, dtype=torch.bfloat16) for cols in (m, n))
        a, b = ([t.t() for t in ops.quantize(t, (128, 1))] for t in (dy, x))
        out = torch.zeros(m, n, device=bench.device)
        bench.add(
            Case(
                "fp8_gemm wgrad",
                f"{m}x{n}x{k}",
                ours=_bind(ops.fp8_gemm_accumulate_, out, *a, *b, 1),
                error=lambda a=a, b=b: relative_error(
                    ops.fp8_gemm(*a, *b, 1, None, torch.float32)[:256], _exact(a, b, (1, 128))
                ),
                tolerance=2e-4 if cuda else 1e-5,
                flop=2 * m * n * k,
                peers={"torch bf16": _bind(torch.mm, dy.t(), x)}
                if cuda
                else {"torch fp32": _bind(torch.mm, dy.float().t(), x.float())},
            )
        )


def _bind(function, *arguments):
    return lambda: function(*arguments)


def _exact(a, b, b_group) -> torch.Tensor:
    """fp64 product of the dequantised operands, first 256 rows (any row stands for all)."""
    left = ops.dequantize(a[0][:256].contiguous(), a[1][:256], (1, 128), torch.float32).double()
    right = ops.dequantize(b[0].contiguous(), b[1], b_group, torch.float32).double()
    return left @ right.t()


def _cuda_peers(x, w, a, b) -> dict:
    peers = {"torch bf16": _bind(torch.mm, x, w.t())}
    m, k = x.shape
    n = w.shape[0]
    recipe = torch.nn.functional.ScalingType
    groups = 4 * ceil_div(ceil_div(k, 128), 4)  # cuBLASLt wants the groups of K padded to 4
    blocks = torch.zeros(n // 128, groups, device=x.device).t()
    blocks[: b[1].shape[1]].copy_(b[1].t())
    peers["cuBLASLt 1x128 x 128x128"] = _bind(
        lambda: torch.nn.functional.scaled_mm(
            a[0], b[0].t(), a[1], recipe.BlockWise1x128, blocks, recipe.BlockWise128x128, output_dtype=torch.bfloat16
        )
    )
    one = torch.ones((), device=x.device)
    peers["cuBLASLt tensor-wise (no groups)"] = _bind(
        lambda: torch._scaled_mm(a[0], b[0].t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    )
    try:
        import deep_gemm
    except ImportError:
        return peers
    out = torch.empty(m, n, device=x.device, dtype=torch.bfloat16)
    peers["DeepGEMM"] = lambda: deep_gemm.fp8_gemm_nt(a, b, out, disable_ue8m0_cast=True)
    return peers
