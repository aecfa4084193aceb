"""Models: one decoder for Llama, Qwen2, Qwen3, LLaDA and Dream, from Hugging Face folders and GGUF files; SANA's
diffusion transformer, from diffusers folders and NVlabs files; its autoencoder DC-AE, from diffusers folders and
efficientvit checkpoints."""

from eightfold.models.attention import KVCache
from eightfold.models.config import DecoderConfig
from eightfold.models.dc_ae import DCAE
from eightfold.models.dc_ae_config import SANA_F32C32, DCAEConfig
from eightfold.models.dc_ae_loading import load_dc_ae, save_dc_ae
from eightfold.models.decoder import Decoder
from eightfold.models.loading import load_decoder, save_decoder
from eightfold.models.packaged import smollm2
from eightfold.models.sana import Sana, SanaConfig
from eightfold.models.sana_loading import load_sana, save_sana
from eightfold.models.tiles import Tiling

__all__ = [
    "DCAE",
    "SANA_F32C32",
    "DCAEConfig",
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "Sana",
    "SanaConfig",
    "Tiling",
    "load_dc_ae",
    "load_decoder",
    "load_sana",
    "save_dc_ae",
    "save_decoder",
    "save_sana",
    "smollm2",
]
