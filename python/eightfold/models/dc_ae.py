"""DC-AE, the autoencoder of SANA: images to latents of 1/32 of their height and width, and back (arXiv 2410.10733)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eightfold.models.dc_ae_blocks import (
    Activation,
    Downsample,
    EfficientViTBlock,
    ResBlock,
    RMSNorm,
    Upsample,
    channels,
    pixels,
)
from eightfold.models.dc_ae_config import DCAEConfig
from eightfold.models.tiles import Tiling, tiled

DTYPES = (torch.bfloat16, torch.float32)
INDEX_LIMIT = 2**31  # elements of a tensor that torch's and cuDNN's image kernels count in 32 bits
_TILING = Tiling()


def check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        why = ": float16 overflows in DC-AE and gives black images" if dtype == torch.float16 else ""
        raise ValueError(f"{name}: expected torch.bfloat16 or torch.float32, got {dtype}{why}")


class Encoder(nn.Module):
    """Images [B, in_channels, H, W] to latents [B, latent_channels, H / ratio, W / ratio], not scaled."""

    def __init__(self, config: DCAEConfig):
        super().__init__()
        widths, layers = config.encoder_block_out_channels, config.encoder_layers_per_block
        kind = config.downsample_block_type
        if layers[0]:
            self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        else:
            self.conv_in = Downsample(config.in_channels, widths[1], kind, shortcut=False)
        self.down_blocks = nn.ModuleList()
        for stage, depth in enumerate(layers):
            blocks = [_block(config, "encoder", stage, "rms_norm", "silu") for _ in range(depth)]
            if depth and stage + 1 < len(widths):
                blocks.append(Downsample(widths[stage], widths[stage + 1], kind))
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)
        self.shortcut = config.encoder_out_shortcut

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for blocks in self.down_blocks:
            x = blocks(x)
        latents = self.conv_out(x)
        if self.shortcut:
            latents = latents + channels(pixels(x).unflatten(-1, (latents.shape[1], -1)).mean(dim=-1))
        return latents


class Decoder(nn.Module):
    """Latents [B, latent_channels, h, w], not scaled, to images [B, in_channels, ratio * h, ratio * w]."""

    def __init__(self, config: DCAEConfig):
        super().__init__()
        widths, layers = config.decoder_block_out_channels, config.decoder_layers_per_block
        kind = config.upsample_block_type
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.shortcut = config.decoder_in_shortcut
        self.up_blocks = nn.ModuleList()  # from the image to the latents: they run in reverse
        for stage, depth in enumerate(layers):
            blocks = []
            if depth and stage + 1 < len(widths):
                blocks.append(Upsample(widths[stage + 1], widths[stage], kind))
            norm, activation = config.decoder_norm_types[stage], config.decoder_act_fns[stage]
            blocks += [_block(config, "decoder", stage, norm, activation) for _ in range(depth)]
            self.up_blocks.append(nn.Sequential(*blocks))
        last = widths[0] if layers[0] else widths[1]
        self.norm_out = RMSNorm(last)
        self.activation = Activation(config.decoder_conv_act_fn)
        if layers[0]:
            self.conv_out = nn.Conv2d(last, config.in_channels, 3, padding=1)
        else:
            self.conv_out = Upsample(last, config.in_channels, kind, shortcut=False)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.conv_in(latents)
        if self.shortcut:
            x = x + latents.repeat_interleave(x.shape[1] // latents.shape[1], dim=1)
        for blocks in reversed(self.up_blocks):
            x = blocks(x)
        return self.conv_out(self.activation(self.norm_out(x)))


def _block(config: DCAEConfig, side: str, stage: int, norm: str, activation: str) -> nn.Module:
    width = getattr(config, f"{side}_block_out_channels")[stage]
    if getattr(config, f"{side}_block_types")[stage] == "ResBlock":
        return ResBlock(width, norm, activation)
    sizes = getattr(config, f"{side}_qkv_multiscales")[stage]
    return EfficientViTBlock(width, config.attention_head_dim, sizes, norm)


class DCAE(nn.Module):
    """A deep-compression autoencoder, in the dtype of its parameters (float32 or bfloat16) and channels-last memory.

    Latents outside of this class are scaled for a diffusion model: `encode` multiplies by `config.scaling_factor`,
    `decode` divides by it, and nothing else does. Encoding is deterministic. Images are in [-1, 1]; decoded ones are
    not clipped to it.
    """

    def __init__(self, config: DCAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.to(memory_format=torch.channels_last)

    def encode(self, images: Tensor, tiling: Tiling | None = _TILING) -> Tensor:
        """Scaled latents [B, latent_channels, H / ratio, W / ratio] of images [B, in_channels, H, W], float32 or
        bfloat16; H and W are multiples of `config.ratio`.

        What is larger than a tile goes through in overlapping tiles, which are blended, and batches in parts no larger
        than one; without `tiling` all at once. One tile, or none, gives the same bits. ValueError naming the argument.
        """
        ratio = self.config.ratio
        self._check("images", images, self.config.in_channels)
        if images.shape[2] % ratio or images.shape[3] % ratio:
            raise ValueError(f"images: expected height and width in multiples of {ratio}, got {tuple(images.shape)}")
        return self._run("encoder", images, tiling, (ratio, 1)) * self.config.scaling_factor

    def decode(self, latents: Tensor, tiling: Tiling | None = _TILING) -> Tensor:
        """Images [B, in_channels, ratio * h, ratio * w] of scaled latents [B, latent_channels, h, w], float32 or
        bfloat16. Tiles, batches and errors as in `encode`."""
        self._check("latents", latents, self.config.latent_channels)
        return self._run("decoder", latents / self.config.scaling_factor, tiling, (1, self.config.ratio))

    def forward(self, images: Tensor, tiling: Tiling | None = _TILING) -> Tensor:
        """The reconstruction of images: decode(encode(images))."""
        return self.decode(self.encode(images, tiling), tiling)

    def _check(self, name: str, x: Tensor, width: int) -> None:
        weight = self.encoder.conv_out.weight
        check_dtype("parameters", weight.dtype)
        check_dtype(name, x.dtype)
        if x.dim() != 4 or x.shape[1] != width or 0 in x.shape[2:]:
            raise ValueError(f"{name}: expected [B, {width}, H, W], got {tuple(x.shape)}")
        if x.device != weight.device:
            raise ValueError(f"{name}: expected on {weight.device} like the parameters, got {x.device}")

    def _run(self, side: str, x: Tensor, tiling: Tiling | None, scales: tuple[int, int]) -> Tensor:
        ratio, width = self.config.ratio, self.config.latent_channels if side == "encoder" else self.config.in_channels
        x = x.to(self.encoder.conv_out.weight.dtype).contiguous(memory_format=torch.channels_last)
        height, breadth = (size // scales[0] for size in x.shape[2:])
        if x.shape[0] == 0:
            return x.new_empty(0, width, height * scales[1], breadth * scales[1])
        if tiling is None:
            self._check_elements("tiling: expected one", side, x.shape[0] * height * breadth)
            return getattr(self, side)(x)
        tile, overlap = tiling.cells(ratio)
        area = min(tile, height) * min(tile, breadth)
        self._check_elements("tile: expected one", side, area * min(x.shape[0], tile * tile // area))
        return tiled(getattr(self, side), x, tile, overlap, scales)

    def _check_elements(self, expected: str, side: str, cells: int) -> None:
        elements = int(cells * self.config.ratio**2 * largest_tensor(self.config, side))
        if elements >= INDEX_LIMIT:
            raise ValueError(
                f"{expected} with which this {side}'s tensors have less than 2^31 elements, got {elements:,}"
            )


def largest_tensor(config: DCAEConfig, side: str) -> float:
    """Elements, for each pixel of the image, of the largest tensor in the encoder or the decoder."""
    widths = getattr(config, f"{side}_block_out_channels")
    kinds = getattr(config, f"{side}_block_types")
    largest = [float(config.in_channels)]
    for stage, (kind, width) in enumerate(zip(kinds, widths)):
        if not getattr(config, f"{side}_layers_per_block")[stage]:
            continue
        # In an EfficientViTBlock, what its depthwise convolution reads.
        largest.append((8 * width if kind == "EfficientViTBlock" else width) / 4**stage)
        if side == "decoder" and stage + 1 < len(widths):  # at this stage's resolution, before its convolution
            largest.append(widths[stage + 1] / 4**stage)
    return max(largest)
