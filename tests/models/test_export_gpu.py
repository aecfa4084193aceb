"""An FP8 export in transformers' own FP8 linears, on a GPU.

transformers takes their kernel from the package `kernels` and, through it, from a hub; without a network LOCAL_KERNELS
(kernels-community/finegrained-fp8=FOLDER) names a copy and TRANSFORMERS_DISABLE_DEEPGEMM_LINEAR=1 keeps it from asking
for another.
"""

import importlib.util

import pytest
import torch
import transformers
from safetensors.torch import load_file

from eightfold import cli
from eightfold.models import Decoder, DecoderConfig, load_decoder, save_decoder
from eightfold.nn import functional as fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("kernels") is None, reason="transformers' FP8 needs the package kernels"
    ),
]


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def same_bytes(a, b):
    return a.dtype == b.dtype and torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


@pytest.fixture(params=["qwen3", "llama"])
def exported(request, tmp_path):
    config = DecoderConfig(request.param, 4000, 512, 1024, 3, 4, 2, 128, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = Decoder(config, "fp8")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * 0.1
    save_decoder(model, tmp_path / "random")
    for source, target in (("random", "fp8"), ("fp8", "again")):
        assert cli.main(["export", str(tmp_path / source), str(tmp_path / target), "--format", "fp8"]) == 0
    return tmp_path / "fp8"


def test_bytes_come_back(exported):
    first, again = (load_file(folder / "model.safetensors") for folder in (exported, exported.parent / "again"))
    assert first.keys() == again.keys()
    assert all(same_bytes(first[name], again[name]) for name in first)


@pytest.mark.timeout(180)  # Triton tunes its kernel
def test_logits_in_transformers(exported):
    """On the same inputs a linear differs by the rounding of its output. Along the layers one flipped rounding changes
    codes, so that logits end as far apart as two roundings to FP8 do: their errors are of one size and independent."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, device_map="cuda", dtype=torch.bfloat16)
    stored = load_file(exported / "model.safetensors")
    codes = [name for name, p in theirs.named_parameters() if p.dtype == torch.float8_e4m3fn]
    assert len(codes) == 7 * 3
    assert all(same_bytes(theirs.get_parameter(name).contiguous(), stored[name]) for name in codes)

    ours, exact = (load_decoder(exported, precision, device="cuda")[0] for precision in ("fp8", "fp32"))
    weights, errors = {name: p.detach() for name, p in ours.named_parameters()}, {}

    def watch(name):
        def hook(_, inputs, output):
            errors[name] = relative(output, fused.fp8_linear(inputs[0], weights[f"{name}.weight"]))

        return hook

    for name in codes:
        linear = name.removesuffix(".weight")
        theirs.get_submodule(linear).register_forward_hook(watch(linear))
    tokens = torch.randint(3, 4000, (1, 256), device="cuda")
    with torch.inference_mode():
        found, own, wanted = theirs(tokens).logits, ours(tokens), exact(tokens)
    assert len(errors) == len(codes)
    assert max(errors.values()) < 2**-8, errors
    assert relative(found, own) < 1.25 * 2**0.5 * relative(own, wanted)
