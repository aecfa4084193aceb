"""Small DC-AEs of random weights, of diffusers and ours, for the tests."""

import dataclasses

import diffusers
import torch

from eightfold.models import DCAEConfig
from eightfold.models.dc_ae_loading import build_dc_ae

BLOCKS = ("ResBlock", "EfficientViTBlock", "EfficientViTBlock")
# Heads of 16: attention is discontinuous where relu(q) is 0, and with fewer channels some query of a random model is so
# near to it that rounding errors of 1e-5 come of it (against fp64, in diffusers' model too).
SMALL = DCAEConfig(
    latent_channels=4,
    attention_head_dim=16,
    encoder_block_types=BLOCKS,
    decoder_block_types=BLOCKS,
    encoder_block_out_channels=(16, 32, 32),
    decoder_block_out_channels=(16, 32, 32),
    encoder_layers_per_block=(1, 1, 2),
    decoder_layers_per_block=(2, 1, 1),
    encoder_qkv_multiscales=((), (5,), (5,)),
    decoder_qkv_multiscales=((), (5,), (5,)),
    downsample_block_type="conv",
    upsample_block_type="interpolate",
    scaling_factor=0.41407,
)
CONFIGS = {
    "sana": SMALL,
    # Shortcuts that average 1 and 8 channels, and repeat 8 and 1.
    "other-widths": dataclasses.replace(
        SMALL, encoder_block_out_channels=(8, 32, 16), decoder_block_out_channels=(8, 32, 16)
    ),
    # Of the kind of the ImageNet models: first stage empty, batch norms.
    "shuffled": dataclasses.replace(
        SMALL,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(0, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), (3, 5)),
        decoder_norm_types=("batch_norm", "batch_norm", "rms_norm"),
        decoder_act_fns=("relu", "relu", "silu"),
    ),
    "no-shortcuts": dataclasses.replace(
        SMALL,
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(0, 1, 1),
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        decoder_conv_act_fn="silu",
        decoder_act_fns="gelu",
    ),
}
RESNET = dataclasses.replace(SMALL, encoder_block_types="ResBlock", decoder_block_types="ResBlock")


def random_peer(config):
    """diffusers' model whose norms, biases and statistics are random too, so that none can be dropped unnoticed."""
    torch.manual_seed(7)
    model = diffusers.AutoencoderDC.from_config(config.to_diffusers()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


def random_model(config):
    return build_dc_ae(config, random_peer(config).state_dict())


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
