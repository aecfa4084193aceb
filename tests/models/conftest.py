"""Small random models of each family, built by transformers and saved as folders."""

import pytest
import torch
import transformers

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 5e5,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama-mha-biased": lambda: transformers.LlamaConfig(
        **{**SIZES, "num_key_value_heads": 4}, attention_bias=True, mlp_bias=True
    ),
    "llama-linear-tied": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=LINEAR, tie_word_embeddings=True),
    "llama3-head-dim": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3, head_dim=32),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32),
}


def random_model(family):
    """A transformers model whose norms and biases are random too, so that none of them can be dropped unnoticed."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "embed" not in name:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved(family) -> (transformers model, folder)."""
    made = {}

    def make(family):
        if family not in made:
            model, folder = random_model(family), tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[family] = model, folder
        return made[family]

    return make


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param
