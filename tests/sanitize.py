"""Every op once on small ragged shapes, for compute-sanitizer: `make sanitize`. It checks memory only, no numbers."""

import torch

from eightfold import ops  # noqa: F401
from eightfold.ops.layouts import GROUPS

op = torch.ops.eightfold
FORMATS = (torch.bfloat16, torch.float32)


def casts(rows: int, cols: int, dtype: torch.dtype) -> None:
    wide = torch.randn(rows, cols + 3, device="cuda", dtype=dtype)
    for x in (wide[:, :cols].contiguous(), wide[:, 3:]):  # aligned, and a view that is not
        for group in GROUPS:
            codes, scales = op.quantize(x, group)
            op.dequantize(codes, scales, group, dtype)
        codes, scales, _, _ = op.quantize_both(x)
        op.requantize(codes, scales)
        for flag in (False, True):
            op.quantize_stacked([x.new_ones(128, cols), x], flag)
            op.quantize_beside([x.new_ones(rows, 128), x], flag)
        op.transpose_codes(op.quantize(x, (128, 128))[0])


def fused(rows: int, cols: int, dtype: torch.dtype) -> None:
    x, residual, dy = (torch.randn(rows, cols, device="cuda", dtype=dtype) for _ in range(3))
    weight = torch.rand(cols, device="cuda", dtype=dtype)
    for training in (False, True):
        op.rms_norm_quantize(x, weight, 1e-5, training)
        op.add_rms_norm_quantize(x, residual, weight, 1e-5, training)
        op.swiglu_quantize(x, residual, training)
    op.swiglu(x, residual)
    op.add_rms_norm(x, residual, weight, 1e-5)
    _, codes, scales, rstd = op.rms_norm(x, weight, 1e-5, True)
    op.rms_norm_columns(codes, scales, rstd, weight, dtype)
    op.rms_norm_backward(dy, codes, scales, rstd, weight, residual)
    op.rms_norm_backward(dy, x, None, rstd, weight, None)
    op.swiglu_backward_quantize(dy, *op.swiglu_quantize(x, residual, True)[2:])
    x, residual, dy = (torch.randn(rows, 256, device="cuda", dtype=dtype) for _ in range(3))
    op.swiglu_backward_quantize(dy, *op.swiglu_quantize(x, residual, True)[2:], True)


def products(m: int, n: int, k: int) -> None:
    x, w, dy = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (n, k), (m, n)))
    a, b = op.quantize(x, (1, 128)), op.quantize(w, (128, 128))
    bias = torch.randn(n, device="cuda")
    for dtype in FORMATS:
        op.fp8_gemm(*a, *b, 128, bias, dtype)
    left, right = ([t.t() for t in op.quantize(t, (128, 1))] for t in (dy, x))
    for dtype in FORMATS:
        op.fp8_gemm_accumulate_(torch.zeros(n, k, device="cuda", dtype=dtype), *left, *right, 1)


def plain_products(m: int, n: int, k: int) -> None:
    a, b = (torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for rows in (m, n))
    for dtype in FORMATS:
        op.gemm(a, b, dtype)


def draws(rows: int, vocabulary: int) -> None:
    wide = torch.randn(rows, vocabulary + 3, device="cuda").round()
    seeds, top_k = torch.arange(rows, device="cuda"), torch.full((rows,), 3, dtype=torch.int32, device="cuda")
    for logits in (wide[:, :vocabulary].contiguous(), wide[:, 3:]):  # aligned, and a view that is not
        for temperature, k, p in ((0.0, 0, 1.0), (0.7, 0, 1.0), (0.7, 1, 1.0), (0.7, 0, 0.9), (0.7, 1, 0.9)):
            temperatures, top_p = (torch.full((rows,), value, device="cuda") for value in (temperature, p))
            op.sample(logits, seeds, seeds, temperatures, top_k * k, top_p)


def heads(rows: int, vocabulary: int, size: int) -> None:
    hidden, weight = (torch.randn(n, size, device="cuda", dtype=torch.bfloat16) for n in (rows, vocabulary))
    codes = *op.quantize(hidden, (1, 128)), *op.quantize(weight, (128, 128))
    active, seeds = torch.rand(rows, device="cuda") < 0.7, torch.arange(rows, device="cuda")
    forbidden = torch.tensor([0, vocabulary - 1, vocabulary, -1], device="cuda")
    for operands in ((hidden, None, weight, None), codes):
        for flags in (None, active, torch.zeros_like(active)):
            op.lm_head_confidence(*operands, flags, forbidden)
            op.lm_head_confidence(*operands, flags, forbidden, active.float(), seeds, seeds)


def uncovers(batch: int, rows: int) -> None:
    tokens = torch.randint(0, 3, (batch, rows + 5), device="cuda")
    at = torch.arange(-1, batch - 1, device="cuda", dtype=torch.int32)
    ids, confidence = torch.ones(batch, rows, device="cuda").long(), torch.rand(batch, rows, device="cuda")
    for rule in ((0.5,), (None, 1.0), (None, None, at)):
        op.uncover_(tokens[:, :-1], at, ids, confidence, at.clone(), 2, *rule)
        op.uncover_(tokens, at, ids, confidence, at.clone(), 2, *rule, eos_ids=ids[0, :1].clone(), ended=at.clone())


def attention_and_loss(tokens: int, heads: int, head_size: int, vocabulary: int) -> None:
    x = torch.randn(1, tokens, heads, head_size, device="cuda", dtype=torch.bfloat16)
    angle = torch.rand(1, tokens, 1, head_size // 2, device="cuda")
    labels = torch.randint(-1, vocabulary, (tokens,), device="cuda")
    labels[labels < 0] = -100
    for inverse in (False, True):
        op.rotary(x, angle.cos(), angle.sin(), inverse)
    for dtype in FORMATS:
        for weight in (torch.rand(head_size, device="cuda"), torch.rand(head_size, device="cuda", dtype=dtype)):
            part = torch.randn(1, tokens, heads + 2, head_size, device="cuda", dtype=dtype)[:, :, 1:-1]
            _, *saved = op.rms_norm_rotary(part, weight, 1e-6, angle.cos(), angle.sin(), True)
            op.rms_norm_rotary(part, weight, 1e-6, angle.cos(), angle.sin(), False)
            op.rms_norm_rotary_backward(part, *saved, weight, angle.cos(), angle.sin())
    for dtype in FORMATS:
        for rows in (tokens, 8 * tokens):  # with 8 * tokens the fused kernel, at the edges of its tiles
            tables = [t(torch.rand(1, rows, 1, head_size // 2, device="cuda")) for t in (torch.cos, torch.sin)]
            shapes = [(2, h, rows, head_size) for h in (32, 32, 3)]
            grads = [torch.randn(s, device="cuda", dtype=dtype).transpose(1, 2) for s in shapes]
            for flag in (False, True):
                op.rotary_backward_quantize(*grads, *tables, flag, True)
                op.rotary_backward_quantize(*grads, *tables, True, flag)
    for dtype in FORMATS:
        for training in (False, True):
            for few in (False, True):  # a cluster takes a row of few
                rows, classes = (tokens, vocabulary) if not few else (3, 9001)
                logits, temperatures = torch.randn(rows, classes, device="cuda"), torch.rand(rows, device="cuda")
                grad_output = torch.rand(rows, device="cuda") if training else None
                op.cross_entropy(logits, labels[:rows].clone(), training, dtype, temperatures, grad_output)


def optimizer(shapes: list[tuple[int, int]], dtype: torch.dtype) -> None:
    # One element past the aligned start of its storage: the scalar path.
    params = [torch.randn(a * b + 1, device="cuda").to(dtype)[1:].view(a, b) for a, b in shapes]
    grads = [torch.randn(p.shape, device="cuda", dtype=dtype) for p in params]
    first, second = ([op.dre_quantize(torch.rand(s, device="cuda"), s[1]) for s in shapes] for _ in range(2))
    op.dre_dequantize(*first[0], shapes[0][1])
    states = [[s[i] for s in moment] for moment in (first, second) for i in range(3)]
    steps = [torch.ones((), device="cuda") for _ in params]
    lr, scale = torch.tensor(1e-3, device="cuda"), torch.tensor(0.5, device="cuda")
    rows = [s[1] for s in shapes]
    for stochastic in (False, True):
        op.adamw_dre_(
            params,
            grads,
            [torch.empty(0, device="cuda")] * len(rows),
            *states,
            rows,
            [0] * len(rows),
            steps,
            lr,
            scale,
            0.9,
            0.95,
            1e-8,
            0.1,
            stochastic,
            7,
        )
    for quantized in (True, False):
        for matrices in (True, False):
            rows, cols = ([torch.rand(s[i] if matrices else 0, device="cuda") for s in shapes] for i in range(2))
            in_bytes = quantized and matrices
            op.came8bit_(
                params,
                grads,
                [torch.zeros(p.shape, device="cuda", dtype=torch.uint8 if in_bytes else torch.float32) for p in params],
                [torch.zeros(-(-p.numel() // 2048) if in_bytes else 0, 2, device="cuda") for p in params],
                rows if matrices else [torch.rand(p.shape, device="cuda") for p in params],
                cols,
                [t.clone() for t in rows],
                [t.clone() for t in cols],
                [0] * len(params),
                steps,
                lr,
                scale,
                0.9,
                0.999,
                0.9999,
                1e-30,
                1e-16,
                1.0,
                0.1,
                7,
            )


def attends(lengths, heads, kv_heads, dim, page_size):
    """Packed sequences, into pages by both ways, and their last one, three and all rows over pages."""
    op = torch.ops.eightfold
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    tokens, count = sum(lengths), len(lengths)
    q, k, v = (torch.randn(tokens, h, dim, device="cuda", dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads))
    for mask in ((True, 32), (False, 1), (True, 1)):
        out, lse = op.attention(q, k, v, starts, max(lengths), 0.1, *mask)
        op.attention_backward(out, q, k, v, out, lse, starts, max(lengths), 0.1, *mask)
    most = -(-max(lengths) // page_size)
    pages = torch.randperm(count * most, device="cuda", dtype=torch.int32).view(count, most)
    places = torch.cat([torch.arange(n, device="cuda") for n in lengths])
    owners = torch.repeat_interleave(torch.arange(count, device="cuda"), torch.tensor(lengths, device="cuda"))
    slots = pages[owners, places // page_size].long() * page_size + places % page_size
    shape = (count * most, kv_heads, page_size, dim)
    k_pages, v_pages = (torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    op.paged_store_(k, v, k_pages, v_pages, None, None, slots)
    op.kv_round(k)
    codes = [torch.zeros(shape, device="cuda").to(torch.float8_e4m3fn) for _ in range(2)]
    codes += [torch.zeros(shape[:3], device="cuda") for _ in range(2)]
    op.paged_store_(k, v, *codes, slots)
    wide = torch.randn(tokens, (heads + 2 * kv_heads) * dim, device="cuda", dtype=torch.bfloat16).unflatten(
        1, (-1, dim)
    )
    parts = wide.split([heads, kv_heads, kv_heads], 1)
    angle = torch.rand(tokens, dim // 2, device="cuda")
    for weight in (None, torch.rand(dim, device="cuda"), torch.rand(dim, device="cuda", dtype=torch.bfloat16)):
        norm = weight, weight, 1e-6
        for cache in ((k_pages, v_pages, None, None), codes):
            op.rope_cache_write(*parts, angle.cos(), angle.sin(), *cache, slots, *norm)
    for rows in (1, 3, max(lengths)):
        few = [min(rows, n) for n in lengths]
        asked = torch.cat([q[int(end) - n : int(end)] for end, n in zip(starts[1:], few, strict=True)])
        begins = torch.tensor([0, *few], device="cuda").cumsum(0).int()
        sizes = torch.tensor(lengths, device="cuda", dtype=torch.int32)
        for cache in ((k_pages, v_pages, None, None), codes):
            for mask in ((True, 1), (True, 32), (False, 1)):
                where = pages, begins, sizes, rows, 0.1, *mask
                op.paged_attention(asked, *cache, *where, True)  # settled: the stores are far behind
                if dim == 128:
                    op.paged_attention_quantize(asked, *cache, *where)


def blocks(places, rows, heads, kv_heads, dim, room):
    """A block of rows at each (first key, length), its keys given and in the cache, over both kinds of cache."""
    batch = len(places)
    wide = torch.randn(batch, rows, heads + 2 * kv_heads, dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = wide.split([heads, kv_heads, kv_heads], 2)
    at, lengths = torch.tensor(places, device="cuda", dtype=torch.int32).t().contiguous()
    shape = (batch, kv_heads, room, dim)
    cache = [torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    codes = [torch.zeros(shape, device="cuda").to(torch.float8_e4m3fn) for _ in range(2)]
    codes += [torch.zeros(shape[:3], device="cuda") for _ in range(2)]
    for caches in ((*cache, None, None), codes):
        for own in ((k, v), (None, None)):
            op.block_attention(q, *own, *caches, at, lengths, 0.1)


def linear(batch: int, tokens: int, heads: int, dim: int) -> None:
    """Rows of a packed projection, with and without a mask and carried states."""
    qkv = torch.randn(batch, tokens, 3, heads, dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = qkv.unbind(2)
    mask = torch.rand(batch, tokens, device="cuda") < 0.5
    out, *states = op.linear_attention(q, k, v)
    for rest in ((), (mask, *states)):
        op.linear_attention(q, k, v, *rest)
        op.linear_attention_quantize(q, k, v, *rest)
        op.linear_attention_backward(out, q, k, v, *states, *rest)


def modulates(samples: int, tokens: int, features: int, dtype: torch.dtype) -> None:
    shape = samples, tokens, features
    x, branch, dy = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
    odd = torch.randn(x.numel() + 1, device="cuda", dtype=dtype)[1:].view(shape)
    gate, scale, shift = torch.randn(samples, 3, features, device="cuda").unbind(1)
    for training in (False, True):
        for source in (x, odd):
            op.layer_norm_modulate(source, scale, shift, 1e-6, training)
            op.layer_norm_modulate_quantize(source, scale, shift, 1e-6, training)
            for g in (gate, None):
                rest = branch, g, scale, shift, 1e-6, training
                op.gated_residual_layer_norm_modulate(source, *rest)
                op.gated_residual_layer_norm_modulate_quantize(source, *rest)
    _, mean, rstd = op.layer_norm_modulate(x, scale, shift, 1e-6, True)
    for source in (x, odd):
        op.layer_norm_modulate_backward(dy, source, mean, rstd, scale, None, None, None)
        op.layer_norm_modulate_backward(dy, source, mean, rstd, scale, dy, branch, gate)


def images(batch: int, height: int, width: int, channels: int) -> None:
    x = torch.randn(batch, height, width, 2 * channels, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(2 * channels, 3, 3, device="cuda"), torch.randn(2 * channels, device="cuda")
    op.depthwise_glu_quantize(x, weight, bias)
    op.depthwise_glu_backward(op.depthwise_glu(x, weight, bias), x, weight, bias)


if __name__ == "__main__":
    torch.manual_seed(0)
    for dtype in FORMATS:
        for rows, cols in ((1, 16), (7, 272), (129, 144), (300, 1168)):
            casts(rows, cols, dtype)
            fused(rows, cols, dtype)
        for size in ((1, 1, 8), (3, 43, 520), (2, 70, 2240), (1, 5, 8192)):
            modulates(*size, dtype)
        optimizer([(1, 1), (3, 130), (40, 128), (17, 1000)], dtype)
    for m, n, k in ((1, 16, 16), (7, 144, 272), (64, 128, 128), (100, 400, 640), (130, 272, 400), (2100, 2064, 272)):
        products(m, n, k)
        plain_products(m, n, k)
    for rows, vocabulary in ((1, 1), (3, 7), (5, 1000), (2, 8192), (3, 50257)):
        draws(rows, vocabulary)
    for rows, vocabulary, size in ((1, 16, 16), (7, 144, 272), (64, 1040, 128), (100, 400, 640), (300, 8208, 144)):
        heads(rows, vocabulary, size)
    for batch, rows in ((1, 1), (3, 33), (9, 64)):
        uncovers(batch, rows)
    attends([1, 130, 17, 700], 4, 2, 64, 16)
    attends([33, 513], 7, 1, 128, 64)
    attends([129], 3, 3, 96, 128)
    blocks([(0, 32), (37, 160), (100, 132), (0, 0)], 32, 4, 4, 64, 160)
    blocks([(700, 1312), (1, 33)], 32, 28, 4, 128, 1312)
    blocks([(16, 17), (47, 48), (-9, 40), (90, 90)], 1, 6, 2, 96, 48)
    blocks([(3, 100)], 64, 5, 5, 128, 112)
    for shape in ((1, 1, 1, 32), (2, 300, 5, 32), (1, 4200, 3, 64), (1, 130, 2, 128)):
        linear(*shape)
    for size in ((1, 1, 1, 8), (2, 5, 7, 24), (2, 33, 20, 136), (1, 40, 65, 200)):
        images(*size)
    attention_and_loss(9, 3, 36, 1003)
    attention_and_loss(130, 4, 128, 2048)
    attention_and_loss(19, 2, 64, 40)
    attention_and_loss(21, 5, 96, 40)
    torch.cuda.synchronize()
    print("every op ran")
