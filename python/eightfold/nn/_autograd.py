"""The autograd Functions under `functional`: whole sub-blocks, so that FP8 tensors never enter the autograd graph.

Arguments are checked there. A Function runs only when something needs a gradient, and saves only what that needs.
"""

import torch
from torch.autograd.function import once_differentiable

from eightfold.nn import _products as p
from eightfold.nn._accumulation import kept, sums_so_far
from eightfold.nn._products import ops


def norm_forward(x, residual, weight, eps, training):
    """The sum (None without a residual), row codes and column codes of its norm, and what the norm's backward needs."""
    if residual is None:
        total, out = None, ops.rms_norm_quantize(p.flat(x), weight, eps, training)
    else:
        total, *out = ops.add_rms_norm_quantize(p.flat(x), p.flat(residual), weight, eps, training)
        total = total.view(x.shape)
    return total, (out[0], out[1]), (out[2], out[3]), (out[4], out[5], out[6])


def _norm_backward(dy, codes, scales, rstd, weight, dsum, shape):
    dsum = None if dsum is None else p.flat(dsum)
    dx, dweight = ops.rms_norm_backward(dy, codes, scales, rstd, weight, dsum)
    return dx.view(*shape, weight.shape[0]), dweight.to(weight.dtype)


def swiglu_forward(rows, x, weights, caches, training):
    """Output [..., hidden] and the codes and scales of gate and up."""
    gate, up = p.products(rows, weights[:2], (None, None), x.dtype, caches[:2], as_one=True)
    codes, scales, *saved = ops.swiglu_quantize(gate, up, training)
    out = p.product((codes, scales), weights[2], None, x.dtype, caches[2])
    return out.view(*x.shape[:-1], weights[2].shape[0]), saved


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, save_input, cache, add_to_grad):
        columns = None, None
        if ctx.needs_input_grad[1] and not save_input:
            rows, columns = p.quantize_input(x)
        else:
            rows = p.quantize_rows(x)
        ctx.save_for_backward(weight, x if ctx.needs_input_grad[1] and save_input else None, *columns)
        ctx.cache, ctx.x_shape, ctx.bias_dtype = cache, x.shape, None if bias is None else bias.dtype
        ctx.kept = kept(add_to_grad, weight)
        return p.product(rows, weight, bias, x.dtype, cache).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, x, *columns = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grads = p.output_gradients([p.flat(dy)], [weight], [needs_weight])
        dx = dw = db = None
        if needs_x:
            dx = p.input_gradient(grads, [weight], [ctx.cache], dy.dtype).view(ctx.x_shape)
        if needs_weight:
            make, operand = (p.weight_gradient, columns) if x is None else (p.weight_gradient_of_input, x)
            dw = make(grads[0].columns, operand, weight.dtype, *sums_so_far(ctx))
        if needs_bias:
            db = p.bias_gradient(p.flat(dy), ctx.bias_dtype)
        return dx, dw, db, None, None, None


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, codes, scales, rstd = ops.rms_norm(p.flat(x), weight, eps, True)
        ctx.save_for_backward(weight, codes, scales, rstd)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, codes, scales, rstd = ctx.saved_tensors
        dx, dweight = ops.rms_norm_backward(p.flat(dy), codes, scales, rstd, weight, None)
        return dx.view(dy.shape), dweight.to(weight.dtype), None


class RMSNormRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, cos, sin):
        y, codes, scales, rstd = ops.rms_norm_rotary(x, weight, eps, cos, sin, True)
        ctx.save_for_backward(weight, codes, scales, rstd, cos, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, codes, scales, rstd, cos, sin = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        dx, dweight = ops.rms_norm_rotary_backward(dy, codes, scales, rstd, weight, cos, sin)
        return dx, dweight.to(weight.dtype), None, None, None


class NormLinears(torch.autograd.Function):
    """With tables (cos, sin), the three layers are those before attention: their outputs are heads of ``head_dim``,
    [batch, tokens, heads, dim], the first two rotated."""

    @staticmethod
    def forward(
        ctx, x, residual, norm_weight, eps, save_columns, caches, add_to_grad, cos, sin, head_dim, *weights_and_biases
    ):
        n = len(caches)
        weights, biases = weights_and_biases[:n], weights_and_biases[n:]
        total, rows, columns, normed = norm_forward(x, residual, norm_weight, eps, True)
        if not save_columns or not any(ctx.needs_input_grad[10 : 10 + n]):
            columns = None, None
        ctx.save_for_backward(norm_weight, *normed, *columns, cos, sin, *weights)
        ctx.caches, ctx.has_residual, ctx.kept = caches, residual is not None, kept(add_to_grad, *weights)
        ctx.bias_dtypes = [None if b is None else b.dtype for b in biases]
        out = p.products(rows, weights, biases, x.dtype, caches, as_one=False)
        out = [y.view(*x.shape[:-1], y.shape[1]) for y in out]
        if cos is not None:
            out = p.rotated_heads(out, (cos, sin), head_dim)
        return tuple(out) if total is None else (total, *out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        norm_weight, codes, scales, rstd, col_codes, col_scales, cos, sin, *weights = ctx.saved_tensors
        dsum, grads = (grads[0], grads[1:]) if ctx.has_residual else (None, grads)
        n = len(weights)
        needs, dtype = ctx.needs_input_grad, grads[0].dtype
        needs_weights, needs_biases = needs[10 : 10 + n], needs[10 + n :]
        if cos is None:
            shape, dys = grads[0].shape[:-1], [p.flat(dy) for dy in grads]
            gradients = p.output_gradients(dys, weights, needs_weights)
            sums = [p.column_sums(dy) if needed else None for dy, needed in zip(dys, needs_biases, strict=True)]
        else:
            shape = grads[0].shape[:2]
            gradients, sums = p.attention_gradients(*grads, (cos, sin), weights, needs_weights, any(needs_biases))
        dx = dnorm = None
        if any(needs[:3]):
            dnormed = p.input_gradient(gradients, weights, ctx.caches, dtype)
            dx, dnorm = _norm_backward(dnormed, codes, scales, rstd, norm_weight, dsum, shape)
        columns = col_codes, col_scales
        if col_codes is None and any(needs_weights):
            columns = p.norm_columns(codes, scales, rstd, norm_weight, dtype)
        dweights = p.weight_gradients(gradients, columns, weights, needs_weights, sums_so_far(ctx))
        dbiases = [sums[i].to(ctx.bias_dtypes[i]) if needs_biases[i] else None for i in range(n)]
        return dx, dx if ctx.has_residual else None, dnorm, *[None] * 7, *dweights, *dbiases


def modulate_forward(x, branch, gate, scale, shift, eps, training):
    """The sum (None without a branch), row codes and column codes of its modulated norm, its mean and 1 / deviation."""
    if branch is None:
        total, out = None, ops.layer_norm_modulate_quantize(x, scale, shift, eps, training)
    else:
        total, *out = ops.gated_residual_layer_norm_modulate_quantize(x, branch, gate, scale, shift, eps, training)
    return total, (out[0], out[1]), (out[2], out[3]), (out[4], out[5])


class ModulateLinear(torch.autograd.Function):
    """The linear after a modulated norm, which may follow a gated residual."""

    @staticmethod
    def forward(ctx, x, branch, gate, scale, shift, eps, weight, bias, cache, add_to_grad):
        total, rows, columns, statistics = modulate_forward(x, branch, gate, scale, shift, eps, True)
        if not ctx.needs_input_grad[6]:
            columns = None, None
        ctx.save_for_backward(
            x if total is None else total, *statistics, scale, None if gate is None else branch, gate, *columns, weight
        )
        ctx.cache, ctx.kept = cache, kept(add_to_grad, weight)
        ctx.has_branch, ctx.shift_dtype = branch is not None, shift.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        out = p.product(rows, weight, bias, x.dtype, cache).view(*x.shape[:-1], weight.shape[0])
        return out if total is None else (total, out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        normed, mean, rstd, scale, branch, gate, col_codes, col_scales, weight = ctx.saved_tensors
        needs, dy = ctx.needs_input_grad, p.flat(grads[-1])
        dtotal = grads[0].contiguous() if ctx.has_branch else None
        gradients = p.output_gradients([dy], [weight], [needs[6]])
        dx = dbranch = dgate = dscale = dshift = dw = db = None
        if any(needs[:5]):
            dnormed = p.input_gradient(gradients, [weight], [ctx.cache], dy.dtype).view(normed.shape)
            dx, dbranch, dgate, dscale, dshift = ops.layer_norm_modulate_backward(
                dnormed, normed, mean, rstd, scale, dtotal, branch, gate
            )
            dscale, dshift = dscale.to(scale.dtype), dshift.to(ctx.shift_dtype)
            dbranch, dgate = (dx if ctx.has_branch else None, None) if gate is None else (dbranch, dgate.to(gate.dtype))
        if needs[6]:
            dw = p.weight_gradient(gradients[0].columns, (col_codes, col_scales), weight.dtype, *sums_so_far(ctx))
        if needs[7]:
            db = p.bias_gradient(dy, ctx.bias_dtype)
        return dx, dbranch, dgate, dscale, dshift, None, dw, db, None, None


class SwiGLU(torch.autograd.Function):
    """SwiGLU, with the norm before it when norm_weight is given."""

    @staticmethod
    def forward(ctx, x, residual, norm_weight, eps, gate_weight, up_weight, down_weight, caches, add_to_grad):
        needs_columns = any(ctx.needs_input_grad[4:6])
        total, normed, columns = None, (None, None, None), (None, None)
        if norm_weight is not None:
            total, rows, columns, normed = norm_forward(x, residual, norm_weight, eps, True)
        elif needs_columns:
            rows, columns = p.quantize_input(x)
        else:
            rows = p.quantize_rows(x)
        if not needs_columns:
            columns = None, None
        out, gate_and_up = swiglu_forward(rows, x, (gate_weight, up_weight, down_weight), caches, True)
        ctx.save_for_backward(norm_weight, *normed, *columns, *gate_and_up, gate_weight, up_weight, down_weight)
        ctx.caches, ctx.has_residual = caches, residual is not None
        ctx.kept = kept(add_to_grad, gate_weight, up_weight, down_weight)
        return out if total is None else (total, out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        norm_weight, codes, scales, rstd, *saved = ctx.saved_tensors
        col_codes, col_scales, gate, gate_scales, up, up_scales, gate_weight, up_weight, down_weight = saved
        needs, caches = ctx.needs_input_grad, ctx.caches
        dsum, dy = grads if ctx.has_residual else (None, grads[0])
        dtype, shape = dy.dtype, dy.shape[:-1]

        gradients = p.output_gradients([p.flat(dy)], [down_weight], [needs[6]])
        dh = p.input_gradient(gradients, [down_weight], caches[2:], dtype)
        weights = gate_weight, up_weight
        as_one = p.can_stack(weights)
        out = ops.swiglu_backward_quantize(dh, gate, gate_scales, up, up_scales, as_one)
        dgate, dgate_columns, dup, dup_columns, h_columns = (out[i : i + 2] for i in range(0, 10, 2))

        *totals, down_total = sums_so_far(ctx)
        ddown = None
        if needs[6]:
            ddown = p.weight_gradient(gradients[0].columns, h_columns, down_weight.dtype, down_total)
        gradients = [p.Gradients(dgate, dgate_columns, range(2 if as_one else 1))]
        if not as_one:
            gradients.append(p.Gradients(dup, dup_columns, range(1, 2)))
        dweights = p.weight_gradients(gradients, (col_codes, col_scales), weights, needs[4:6], totals)
        dx = dnorm = None
        if any(needs[:3]):
            dx = p.input_gradient(gradients, weights, caches[:2], dtype)
            if norm_weight is None:
                dx = dx.view(*shape, gate_weight.shape[1])
            else:
                dx, dnorm = _norm_backward(dx, codes, scales, rstd, norm_weight, dsum, shape)
        return dx, dx if ctx.has_residual else None, dnorm, None, *dweights, ddown, None, None


def bf16_product(x, matrix, bias=None):
    """x @ matrix (+ bias), all rounded to bfloat16, multiplied and added in float32, rounded once."""
    with torch.autocast(x.device.type, enabled=False):
        out = x.to(torch.bfloat16).float() @ matrix.to(torch.bfloat16).float()
        if bias is not None:
            out += bias.to(torch.bfloat16).float()
        return out.to(torch.bfloat16)


class BF16Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return bf16_product(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = bf16_product(dy, weight)
        if ctx.needs_input_grad[1]:
            dw = bf16_product(p.flat(dy).t(), p.flat(x)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = p.bias_gradient(p.flat(dy), ctx.bias_dtype)
        return dx, dw, db
