"""The blocks of a DC-AE (arXiv 2410.10733). Parameters have the names of diffusers' AutoencoderDC, but q, k and v of an
attention are one matrix.

Tensors between blocks are [B, C, H, W] in channels-last memory, so that convolutions take and give them without a
transpose; `pixels` shows such a tensor as [B, H, W, C], where a norm of the channels is one of the last dimension and a
1x1 convolution a matrix product. Branches are changed in place where only their own operations read them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eightfold.models.pixel_ops import attention_kernel_takes, bias_silu, depthwise_glu, rms_norm_add
from eightfold.ops import linear_attention

NORM_EPS = 1e-5
ATTENTION_EPS = 1e-15
_ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "relu": F.relu, "gelu": F.gelu, "mish": F.mish}


def pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] as contiguous [B, H, W, C]: a view, if its memory is channels-last."""
    return x.permute(0, 2, 3, 1).contiguous()


def channels(x: Tensor) -> Tensor:
    """[B, H, W, C] as [B, C, H, W]: a view."""
    return x.permute(0, 3, 1, 2)


class Activation(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return _ACTIVATIONS[self.name](x)

    def extra_repr(self) -> str:
        return self.name


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) * weight + bias over the channels of [B, C, H, W], plus the residual."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = pixels(x)
        if residual is None:
            return channels(F.rms_norm(x, x.shape[-1:], self.weight, NORM_EPS).add_(self.bias))
        return channels(rms_norm_add(x, self, pixels(residual), NORM_EPS))


class BatchNorm(nn.BatchNorm2d):
    def __init__(self, width: int):
        super().__init__(width, NORM_EPS)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return super().forward(x).add_(residual)


NORMS = {"rms_norm": RMSNorm, "batch_norm": BatchNorm}


def relu_attention(qkv: Tensor, head_dim: int) -> Tensor:
    """Attention with the weights relu(q) . relu(k), which sum to 1 over the keys: [B, N, heads * head_dim], in qkv's
    dtype, of qkv [B, N, heads * 3 * head_dim], a head's q, k and v one behind the other.

    Computed in fp32; a query whose weights are all 0 gives 0. Linear in N, but for N <= head_dim, where the weights
    are fewer than the sums over the keys. (arXiv 2205.14756, section 3.1.)
    """
    heads = qkv.unflatten(-1, (-1, 3, head_dim))
    if qkv.shape[1] > head_dim and attention_kernel_takes(heads):
        return linear_attention(*heads.unbind(3), eps=ATTENTION_EPS).flatten(2)
    q, k, v = heads.float().permute(3, 0, 2, 1, 4)  # each [B, heads, N, head_dim]
    q, k = F.relu(q), F.relu(k)
    if qkv.shape[1] > head_dim:
        out = (q @ (k.mT @ v)) / (q @ k.sum(dim=2).unsqueeze(-1) + ATTENTION_EPS)
    else:
        scores = q @ k.mT
        out = (scores / (scores.sum(dim=-1, keepdim=True) + ATTENTION_EPS)) @ v
    return out.transpose(1, 2).flatten(2).to(qkv.dtype)


class Aggregation(nn.Module):
    """Queries, keys and values that see `size` x `size` pixels: a depthwise convolution, then one 1x1 within each of
    the groups of `head_dim` channels."""

    def __init__(self, width: int, head_dim: int, size: int):
        super().__init__()
        self.proj_in = nn.Conv2d(width, width, size, padding=size // 2, groups=width, bias=False)
        self.proj_out = nn.Conv2d(width, width, 1, groups=width // head_dim, bias=False)

    def forward(self, qkv: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(qkv))


class MultiscaleAttention(nn.Module):
    """x + norm(projection of `relu_attention` over all pixels), with heads of its own for each aggregation.

    `to_qkv` gives 3 * heads * head_dim channels, which the heads take in runs of 3 * head_dim.
    """

    def __init__(self, width: int, head_dim: int, sizes: Sequence[int], norm: str):
        super().__init__()
        self.head_dim = head_dim
        inner = width // head_dim * head_dim
        self.to_qkv = nn.Linear(width, 3 * inner, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(Aggregation(3 * inner, head_dim, size) for size in sizes)
        self.to_out = nn.Linear((1 + len(sizes)) * inner, width, bias=False)
        self.norm_out = NORMS[norm](width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(pixels(x))
        scales = [qkv, *(pixels(more(channels(qkv))) for more in self.to_qkv_multiscale)]
        mixed = torch.cat([relu_attention(scale.flatten(1, 2), self.head_dim) for scale in scales], dim=-1)
        mixed = self.to_out(mixed).unflatten(1, qkv.shape[1:3])
        return self.norm_out(channels(mixed), residual=x)


class GLUMBConv(nn.Module):
    """x + norm(1x1 of the gated depthwise 3x3 of a 1x1 to 2 * 4 C channels)."""

    def __init__(self, width: int):
        super().__init__()
        hidden = 4 * width
        self.conv_inverted = nn.Conv2d(width, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, width, 1, bias=False)
        self.norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.linear(pixels(x), self.conv_inverted.weight.flatten(1), self.conv_inverted.bias)
        narrow = F.linear(depthwise_glu(wide, self.conv_depth), self.conv_point.weight.flatten(1))
        return self.norm(channels(narrow), residual=x)


class EfficientViTBlock(nn.Module):
    def __init__(self, width: int, head_dim: int, sizes: Sequence[int], norm: str):
        super().__init__()
        self.attn = MultiscaleAttention(width, head_dim, sizes, norm)
        self.conv_out = GLUMBConv(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(x))


class ResBlock(nn.Module):
    """x + norm(3x3 of the activation of a 3x3)."""

    def __init__(self, width: int, norm: str, activation: str):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.activation = Activation(activation)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = NORMS[norm](width)

    def forward(self, x: Tensor) -> Tensor:
        if (
            self.activation.name == "silu"
        ):  # the bias in its pass: a convolution of cuDNN would add it in one of its own
            wide = F.conv2d(x, self.conv1.weight, padding=1)
            wide = channels(bias_silu(pixels(wide), self.conv1.bias))
        else:
            wide = self.activation(self.conv1(x))
        return self.norm(self.conv2(wide), residual=x)


# ---- Changes of resolution ----
# Pixel (2 h + i, 2 w + j) of channel c and pixel (h, w) of channel 4 c + 2 i + j stand for each other. The shortcuts
# average and repeat runs of the latter's channels: over j first, then i, then c, so that views and means will do.


def unshuffled(x: Tensor) -> Tensor:
    """[B, 2 H, 2 W, C] as a view [B, H, W, C, 2, 2]."""
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 5, 2, 4)


def averaged(x: Tensor, width: int) -> Tensor:
    """[B, H, W, width]: means of runs of 4 C / width channels of the unshuffled [B, 2 H, 2 W, C]."""
    run = 4 * x.shape[-1] // width
    grouped = unshuffled(x).unflatten(3, (-1, max(run // 4, 1)))
    dims = {1: (), 2: (-1,)}.get(run, (-3, -2, -1))
    return (grouped.mean(dim=dims) if dims else grouped).flatten(3)


def repeated(x: Tensor, width: int) -> Tensor:
    """[B, H, W, C] with each channel repeated 4 width / C times and then shuffled, as a tensor that broadcasts to
    [B, H, 2, W, 2, width]."""
    run = 4 * width // x.shape[-1]
    rows, columns = {1: (2, 2), 2: (2, 1)}.get(run, (1, 1))
    x = x.repeat_interleave(max(run // 4, 1), dim=-1) if run > 4 else x
    return shuffled(x, width, rows, columns)


def shuffled(x: Tensor, width: int, rows: int = 2, columns: int = 2) -> Tensor:
    """[B, H, W, width * rows * columns] as a view [B, H, rows, W, columns, width]."""
    return x.unflatten(-1, (width, rows, columns)).permute(0, 1, 4, 2, 5, 3)


class Downsample(nn.Module):
    """Half the resolution: a 3x3 with stride 2 ("conv"), or to width / 4 channels and unshuffled; plus `averaged`."""

    def __init__(self, in_width: int, width: int, kind: str, shortcut: bool = True):
        super().__init__()
        self.width, self.strided, self.shortcut = width, kind == "conv", shortcut
        if self.strided:
            self.conv = nn.Conv2d(in_width, width, 3, stride=2, padding=1)
        else:
            self.conv = nn.Conv2d(in_width, width // 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = pixels(self.conv(x))
        if not self.strided:
            out = unshuffled(out).flatten(3)
        return channels(out + averaged(pixels(x), self.width) if self.shortcut else out)


def phases(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """A window of three over pixels that stand twice beside each other, along `dim`, as windows of two over the pixels
    themselves: of the first of a pair, which sees the pixel before, and of the second, which sees the next."""
    before, here, behind = weight.unbind(dim)
    return torch.stack((before, here + behind), dim), torch.stack((before + here, behind), dim)


def upsampled_conv(x: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """[B, H, 2, W, 2, width]: the 3x3 convolution of x's [B, C, H, W] nearest pixels at twice the resolution, plus
    `offset`, which broadcasts to it. Four windows of 2 x 2 over x do 4 products where the 3x3 does 9."""
    batch, _, height, width = x.shape
    out = x.new_empty(batch, height, 2, width, 2, weight.shape[0])
    offset = offset.expand(out.shape)
    for i, rows in enumerate(phases(weight.float(), 2)):
        for j, taps in enumerate(phases(rows, 3)):
            taps = taps.to(weight.dtype).contiguous(memory_format=torch.channels_last)
            phase = F.conv2d(x, taps, padding=1)[:, :, i : i + height, j : j + width].permute(0, 2, 3, 1)
            torch.add(phase, offset[:, :, i, :, j], out=out[:, :, i, :, j])
    return out


class Upsample(nn.Module):
    """Twice the resolution: a 3x3 of the nearest pixels ("interpolate"), or to 4 * width channels and shuffled; plus
    `repeated`."""

    def __init__(self, in_width: int, width: int, kind: str, shortcut: bool = True):
        super().__init__()
        self.width, self.interpolate, self.shortcut = width, kind == "interpolate", shortcut
        self.conv = nn.Conv2d(in_width, width if self.interpolate else 4 * width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = repeated(pixels(x), self.width) if self.shortcut else None
        if not self.interpolate:
            out = shuffled(pixels(self.conv(x)), self.width)
        elif torch.is_grad_enabled():
            out = pixels(self.conv(F.interpolate(x, scale_factor=2, mode="nearest")))
            out = out.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        else:
            bias = self.conv.bias
            out, shortcut = upsampled_conv(x, self.conv.weight, bias if shortcut is None else shortcut + bias), None
        if shortcut is not None:
            out = out + shortcut
        return channels(out.flatten(3, 4).flatten(1, 2).contiguous())
