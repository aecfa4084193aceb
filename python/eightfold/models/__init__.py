"""Models: one decoder for Llama, Qwen2, Qwen3, LLaDA and Dream, from Hugging Face folders and GGUF files, and SANA's
diffusion transformer, from diffusers folders and NVlabs files."""

from eightfold.models.attention import KVCache
from eightfold.models.config import DecoderConfig
from eightfold.models.decoder import Decoder
from eightfold.models.loading import load_decoder, save_decoder
from eightfold.models.packaged import smollm2
from eightfold.models.sana import Sana, SanaConfig
from eightfold.models.sana_loading import load_sana, save_sana

__all__ = [
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "Sana",
    "SanaConfig",
    "load_decoder",
    "load_sana",
    "save_decoder",
    "save_sana",
    "smollm2",
]
