"""diffusers' models of images with the weights of ours: what the benchmark of images is measured against."""

import torch
from torch import Tensor, nn

from eightfold.models.dc_ae import DCAE
from eightfold.models.dc_ae_names import diffusers_layout, scattered
from eightfold.models.sana import Sana
from eightfold.models.sana_loading import sana_tensors

from .step import default_dtype


class DiffusersSana(nn.Module):
    """SanaTransformer2DModel in bf16, its parameters views of those of `model`; arguments and result as of
    `Sana.forward`. ImportError where diffusers is not installed."""

    def __init__(self, model: Sana):
        super().__init__()
        from diffusers import SanaTransformer2DModel

        with model.device, default_dtype(torch.bfloat16):
            self.peer = SanaTransformer2DModel.from_config(model.config.to_diffusers())
        self.peer.load_state_dict(sana_tensors(model), assign=True)

    def forward(self, latents: Tensor, times: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        latents, text, mask = (x.to(torch.bfloat16) for x in (latents, text, mask))
        return self.peer(latents, text, times, encoder_attention_mask=mask, return_dict=False)[0].float()

    def compile_blocks(self) -> None:
        """Puts the blocks and the last norm under torch.compile: code is made for one block, which takes seconds."""
        for part in (*self.peer.transformer_blocks, self.peer.norm_out):
            part.compile(dynamic=False)

    def qkv_gradient(self) -> Tensor:
        """The first block's gradient of what is `LinearAttention.qkv` in ours."""
        attn = self.peer.transformer_blocks[0].attn1
        return torch.cat([layer.weight.grad for layer in (attn.to_q, attn.to_k, attn.to_v)])


def diffusers_dc_ae(model: DCAE) -> nn.Module:
    """An AutoencoderDC with the weights of `model`, in their dtype. ImportError where diffusers is not installed."""
    from diffusers import AutoencoderDC

    weight = model.decoder.conv_in.weight
    with weight.device, default_dtype(weight.dtype):
        peer = AutoencoderDC.from_config(model.config.to_diffusers())
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    peer.load_state_dict(scattered(tensors, diffusers_layout))
    return peer.eval()


def left_out(name: str, reason: Exception) -> None:
    print(f"  peer {name} left out: {(str(reason).splitlines() or [type(reason).__name__])[0][:90]}")
