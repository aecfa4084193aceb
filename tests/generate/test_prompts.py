"""Texts of an image model: files of embeddings, and text encoders against diffusers' pipeline of SANA."""

import pytest
import torch
import transformers
from diffusers import SanaPipeline
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from eightfold.generate.prompts import PromptEncoder, Prompts, read_prompts, save_prompts

SIZES = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
INSTRUCTION = ["Given a User prompt, make it better:", "- A Cat -> a cat on a sofa", "User Prompt: "]


def tokenizer(**options):
    """One token a byte, after a token for the beginning."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocab, "<bos>": 256, "<pad>": 257, "</s>": 258}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 256)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", **options)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A decoder-only encoder, stored as one that writes text."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("gemma")
    config = transformers.Gemma2Config(**SIZES, sliding_window=64, pad_token_id=257, bos_token_id=256)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer(pad_token="<pad>", padding_side="left").save_pretrained(folder)
    return folder


@torch.no_grad()
def theirs(folder, prompts, instruction):
    """What SanaPipeline makes of them, with the empty negative prompt."""
    parts = {"tokenizer": transformers.AutoTokenizer.from_pretrained(folder)}
    parts["text_encoder"] = transformers.AutoModel.from_pretrained(folder)
    pipeline = SanaPipeline(**parts, vae=None, transformer=None, scheduler=None)
    return pipeline.encode_prompt(prompts, True, device="cpu", complex_human_instruction=instruction)


@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
@pytest.mark.parametrize("prompt", [" A Cat on the Moon ", "many words " * 60])
def test_encoder_is_diffusers(gemma, prompt, instruction):
    encoder = PromptEncoder(gemma, instruction="\n".join(instruction or []))
    found = encoder.encode([prompt])
    want = theirs(gemma, [prompt], instruction)
    assert tuple(found.embeddings.shape) == tuple(found.negative.shape) == (1, 300, 16)
    for got, theirs_of_it in zip((found.embeddings, found.mask, found.negative, found.negative_mask), want):
        torch.testing.assert_close(got.float(), theirs_of_it.float(), rtol=1e-5, atol=1e-5)
    assert found.negative_mask.sum() == 1  # the beginning alone
    assert found.captions == (prompt,)


def test_prompts_are_encoded_by_themselves(gemma):
    encoder = PromptEncoder(gemma, positions=12)
    both, negative = encoder.encode(["one", "another one, longer"], "Blurry"), encoder.encode(["blurry"])
    for row, prompt in enumerate(("one", "another one, longer")):
        assert torch.equal(both.embeddings[row], encoder.encode([prompt]).embeddings[0])
    assert both.mask.sum(1).tolist() == [4, 12]
    assert torch.equal(both.negative, negative.embeddings)


def test_encoder_of_an_encoder_decoder_in_a_pipeline(tmp_path):
    config = transformers.T5Config(vocab_size=259, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    model = transformers.T5EncoderModel(config).eval()
    model.save_pretrained(tmp_path / "text_encoder")
    tokenizer(pad_token="<pad>").save_pretrained(tmp_path / "tokenizer")
    found = PromptEncoder(tmp_path, positions=8).encode(["a cat"])
    ids = torch.tensor([[*tokenizer().encode("a cat"), 257, 257]])
    with torch.no_grad():
        want = model(ids, attention_mask=(ids != 257).long())[0]
    torch.testing.assert_close(found.embeddings, want, rtol=1e-5, atol=1e-5)


def test_errors_of_encoders(gemma, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        PromptEncoder(tmp_path / "absent")
    tokenizer().save_pretrained(tmp_path)
    transformers.AutoConfig.from_pretrained(gemma).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no token to pad with"):
        PromptEncoder(tmp_path)


def made(rows=2):
    return Prompts(torch.randn(rows, 3, 4), torch.ones(rows, 3), torch.randn(1, 2, 4), torch.ones(1, 2), ("a", "b"))


def test_files(tmp_path):
    prompts, file = made(), tmp_path / "p.safetensors"
    save_prompts(prompts, file)
    found = read_prompts(file)
    assert found.captions == prompts.captions
    for name in ("embeddings", "mask", "negative", "negative_mask"):
        assert torch.equal(getattr(found, name), getattr(prompts, name))
    picked = found.rows([1, 0, 1])
    assert picked.captions == ("b", "a", "b")
    assert torch.equal(picked.embeddings, prompts.embeddings[[1, 0, 1]])
    save_file({"embeddings": torch.zeros(2, 3, 4), "negative": torch.ones(2, 4), "negative_mask": torch.ones(2)}, file)
    bare = read_prompts(file)
    assert (bare.mask, bare.captions) == (None, ("text 0", "text 1"))
    assert (tuple(bare.negative.shape), tuple(bare.negative_mask.shape)) == ((1, 2, 4), (1, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


@pytest.mark.parametrize(
    ("tensors", "captions", "line"),
    [
        ({"embedding": torch.zeros(2, 3, 4)}, None, "expected embeddings, and no tensors but mask"),
        ({"embeddings": torch.zeros(2, 3, 4), "x": torch.zeros(1)}, None, "negative_mask beside, got embeddings, x"),
        ({"embeddings": torch.zeros(3, 4)}, None, r"embeddings: expected floating point \[N, T, channels\], got"),
        ({"embeddings": torch.zeros(2, 3, 4).int()}, None, r"embeddings: .*, got torch.int32 \(2, 3, 4\)"),
        ({"embeddings": torch.zeros(2, 0, 4)}, None, r"embeddings: .*, got torch.float32 \(2, 0, 4\)"),
        (
            {"embeddings": torch.zeros(2, 3, 4), "mask": torch.ones(2, 4)},
            None,
            r"mask: expected \(2, 3\), got \(2, 4\)",
        ),
        (
            {"embeddings": torch.zeros(2, 3, 4), "negative": torch.zeros(2, 3, 4)},
            None,
            r"negative: expected floating point \[1, T, channels\], got torch.float32 \(2, 3, 4\)",
        ),
        (
            {"embeddings": torch.zeros(2, 3, 4), "negative_mask": torch.ones(1, 3)},
            None,
            r"negative_mask: expected none without negative, got \(1, 3\)",
        ),
        ({"embeddings": torch.zeros(2, 3, 4)}, '["a"]', "captions: expected a JSON list of 2 texts, got"),
        ({"embeddings": torch.zeros(2, 3, 4)}, "a, b", "captions: expected a JSON list of 2 texts, got 'a, b'"),
    ],
)
def test_wrong_files(tensors, captions, line, tmp_path):
    file = tmp_path / "wrong.safetensors"
    save_file(tensors, file, metadata=None if captions is None else {"captions": captions})
    with pytest.raises(ValueError, match=rf"wrong\.safetensors: .*{line}|wrong\.safetensors: {line}"):
        read_prompts(file)


def test_cut_and_absent_files(tmp_path):
    file = save_prompts(made(), tmp_path / "p.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"p\.safetensors: truncated or not a safetensors file"):
        read_prompts(file)
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors: no such file"):
        read_prompts(tmp_path / "absent.safetensors")
    with pytest.raises(OSError, match=r"p\.safetensors: not saved"):
        save_prompts(made(), tmp_path / "absent" / "p.safetensors")
    with pytest.raises(ValueError, match="classes: expected 0 to 1, got 2"):
        made().rows([2])
