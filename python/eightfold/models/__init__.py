"""Language models: one decoder for Llama, Qwen2 and Qwen3, read from Hugging Face folders and GGUF files."""

from .attention import KVCache
from .config import DecoderConfig
from .decoder import Decoder
from .loading import load_decoder, save_decoder
from .packaged import smollm2

__all__ = ["Decoder", "DecoderConfig", "KVCache", "load_decoder", "save_decoder", "smollm2"]
