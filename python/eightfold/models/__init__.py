"""Language models: one decoder for Llama, Qwen2, Qwen3, LLaDA and Dream, from Hugging Face folders and GGUF files."""

from eightfold.models.attention import KVCache
from eightfold.models.config import DecoderConfig
from eightfold.models.decoder import Decoder
from eightfold.models.loading import load_decoder, save_decoder
from eightfold.models.packaged import smollm2

__all__ = ["Decoder", "DecoderConfig", "KVCache", "load_decoder", "save_decoder", "smollm2"]
