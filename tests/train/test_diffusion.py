"""Masked and block diffusion: losses and gradients against a dense fp64 loop, noise, answers, and whole runs."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dense_decoder import log_probs, parameters_of
from eightfold.models import Decoder, DecoderConfig, load_decoder
from eightfold.train import checkpoint, diffusion
from eightfold.train.config import DiffusionConfig, parse_config
from eightfold.train.data import Sequences
from eightfold.train.diffusion import BlockDiffusion, MaskedDiffusion, NoisyBlocks
from eightfold.train.loop import train

CPU = torch.device("cpu")
MASK = 5
TINY = DecoderConfig("llama", 48, 32, 48, 2, 4, 2, 8, tie_word_embeddings=True, mask_token_id=MASK)


def sequences(count=3, length=14, isolate=True, prompt=0, seed=0):
    """Random tokens; of each document (two to a sequence) the first ``prompt`` tokens do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 48, (count, length), generator=generator, dtype=torch.int32)
    cut = 4 + 2 * prompt
    documents = (torch.arange(length) >= cut).int().expand(count, length).contiguous()
    place = torch.where(documents == 1, torch.arange(length) - cut, torch.arange(length))
    return Sequences(ids, torch.zeros_like(ids), documents if isolate else None, place >= prompt)


def decoder(block, shifted=False):
    torch.manual_seed(2)
    model = Decoder(dataclasses.replace(TINY, attention_block=block, shifted_logits=shifted), "fp32")
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.ndim == 2 else 1).add_(0.1 if parameter.ndim == 1 else 0)
    return model


def objective(kind=MaskedDiffusion, shifted=False, seed=0, **options):
    return kind(DiffusionConfig(**options), MASK, shifted, seed)


def whole_loss_and_gradients(model, batch, places):
    loss = batch.loss(model, places, CPU)
    model.zero_grad()
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def expect_equal(model, batch, dense):
    """The batch's loss and gradients, of all sequences and summed over parts, and those of a dense one."""
    dense.backward()
    count = len(batch.ids)
    for parts in ([list(range(count))], [[place] for place in range(count)]):
        losses, grads = zip(*(whole_loss_and_gradients(model, batch, part) for part in parts), strict=True)
        assert sum(loss.item() for loss in losses) == pytest.approx(dense.item(), rel=1e-5)
        for name, parameter in dense.parameters.items():
            got = sum(grad[name].double() for grad in grads)
            torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-4 * parameter.grad.abs().max(), msg=name)


class Dense:
    """A loss being summed, with the fp64 parameters that its gradients go to."""

    def __init__(self, model):
        self.config, self.parameters, self.total = model.config, parameters_of(model), 0.0

    def log_probs(self, ids, positions, visible):
        return log_probs(self.config, self.parameters, torch.tensor(ids), torch.tensor(positions), visible)

    def add(self, weight, log_prob):
        self.total = self.total - float(weight) * log_prob

    def backward(self):
        self.total.backward()

    def item(self):
        return self.total.item()


def documents_of(batch, row):
    """[(first, last + 1)] of the documents of a sequence."""
    if batch.document_ids is None:
        return [(0, batch.ids.shape[1])]
    numbers = batch.document_ids[row].tolist()
    edges = [i for i in range(len(numbers)) if i == 0 or numbers[i] != numbers[i - 1]]
    return list(zip(edges, [*edges[1:], len(numbers)], strict=True))


# ---- the loss ----


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("shifted", [False, True])
def test_masked_diffusion_equals_a_dense_loop(shifted, isolate):
    """Each document by itself: masked tokens replaced, all of it seen, -log p / p(mask) of each masked token."""
    model = decoder(0, shifted)
    batch = objective(shifted=shifted).batch(sequences(isolate=isolate), [0, 1, 2], 3)
    dense = Dense(model)
    for row in range(3):
        for first, end in documents_of(batch, row):
            tokens, masked = batch.ids[row, first:end].tolist(), batch.masked[row, first:end].tolist()
            noisy = [MASK if hidden else token for token, hidden in zip(tokens, masked, strict=True)]
            everything = torch.ones(len(noisy), len(noisy), dtype=torch.bool)
            log_p = dense.log_probs(noisy, list(range(len(noisy))), everything)
            assert not (shifted and masked[0])
            for i, hidden in enumerate(masked):
                if hidden:
                    dense.add(batch.weights[row, first + i], log_p[i - shifted, tokens[i]])
    assert batch.masked.sum() > 5
    expect_equal(model, batch, dense)


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("shifted", [False, True])
def test_block_diffusion_equals_a_dense_loop(shifted, isolate):
    """[noisy ; clean] of each document, with a mask and its complement, and who sees whom decided pair by pair."""
    block = 3
    model = decoder(block, shifted)
    batch = objective(BlockDiffusion, shifted, block=block).batch(sequences(isolate=isolate), [0, 1, 2], 3)
    dense = Dense(model)
    for row in range(3):
        for first, end in documents_of(batch, row):
            tokens, masks = batch.ids[row, first:end].tolist(), batch.masked[row, first:end].tolist()
            n, learned = end - first, 0
            for other in (False, True):
                masked = [m != other and not (shifted and i == 0) for i, m in enumerate(masks)]
                noisy = [MASK if hidden else token for token, hidden in zip(tokens, masked, strict=True)]
                visible = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
                for q in range(2 * n):
                    for k in range(2 * n):
                        q_clean, k_clean, q_block, k_block = q >= n, k >= n, q % n // block, k % n // block
                        if not q_clean:
                            visible[q, k] = k_block < q_block if k_clean else k_block == q_block
                        else:
                            visible[q, k] = k_clean and k_block <= q_block
                log_p = dense.log_probs(noisy + tokens, list(range(n)) * 2, visible)
                for i, hidden in enumerate(masked):
                    if hidden:
                        source = i - shifted + (n if shifted and i % block == 0 else 0)
                        dense.add(1.0, log_p[source, tokens[i]])
                        learned += 1
            assert learned == n - shifted
    expect_equal(model, batch, dense)


def test_weights_and_logits_of_some_rows_only():
    """The head's share: summed weighted losses and both gradients, in chunks, against fp64."""
    from eightfold.models.head import token_loss

    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(11, 16, generator=generator, requires_grad=True)
    weight = torch.randn(30, 16, generator=generator, requires_grad=True)
    labels = torch.randint(0, 30, (11,), generator=generator)
    labels[4] = -100
    weights = torch.rand(11, generator=generator) * 50
    total, count = token_loss(hidden, weight, labels, 4, weights)
    total.backward()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    log_p = (wide[0] @ wide[1].T).log_softmax(-1)
    expected = -sum(weights[i].double() * log_p[i, labels[i]] for i in range(11) if i != 4)
    expected.backward()
    assert count == 10
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    for got, want in zip((hidden, weight), wide, strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-5, atol=1e-4)


def test_no_masked_token_gives_no_loss():
    model = decoder(0)
    batch = objective().batch(sequences(), [0, 1], 0)
    empty = dataclasses.replace(batch, masked=torch.zeros_like(batch.masked))
    loss, grads = whole_loss_and_gradients(model, empty, [0, 1])
    assert loss == 0
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"rows, labels, weights: expected one shape \[N\], got"),
        ({"clean": torch.zeros(1, 5, dtype=torch.int64)}, r"clean: expected torch.int64 \(1, 4\), got .* \(1, 5\)"),
        ({"clean": torch.zeros(1, 4, dtype=torch.int64)}, "clean: expected a model of blocks, got attention_block 0"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    two = torch.zeros(2, dtype=torch.int64)
    values = {"ids": torch.zeros(1, 4, dtype=torch.int64), "rows": two, "labels": two, "weights": two.float()}
    with pytest.raises(ValueError, match=message):
        decoder(0).denoising_loss(**(values | arguments))


# ---- the noise ----


@pytest.mark.parametrize("kind", [MaskedDiffusion, BlockDiffusion])
@pytest.mark.parametrize("stratified", [True, False])
def test_masking_statistics(kind, stratified):
    many = sequences(count=400, length=40, isolate=False)
    shares, learned = [], []
    for step in range(100):
        batch = objective(kind, stratified=stratified, block=8).batch(many, list(range(400)), step)
        shares.append(batch.masked.float().mean().item())
        learned.append((batch.weights * batch.masked).mean().item())
    # t is uniform: half of the tokens are masked, and inverse probabilities make up for the others.
    assert np.mean(shares) == pytest.approx(0.5, abs=0.01)
    assert np.mean(learned) == pytest.approx(1.0 if kind is MaskedDiffusion else 0.5, abs=0.03)
    if stratified:  # what is left is chance of the single tokens
        assert np.std(shares) < 1.3 * (1 / 6 / 16000) ** 0.5


def test_noise_of_a_document_follows_its_t(monkeypatch):
    levels = np.array([1.0, 0.25, 1e-9, 0.5, 1.0, 1.0])
    monkeypatch.setattr(diffusion, "noise_levels", lambda generator, count, stratified: levels[:count])
    batch = objective(least_probability=0.01).batch(sequences(), [0, 1, 2], 0)
    p = 0.01 + 0.99 * levels
    documents = torch.tensor([[0] * 4 + [1] * 10, [2] * 4 + [3] * 10, [4] * 4 + [5] * 10])
    torch.testing.assert_close(batch.weights, torch.tensor(1 / p, dtype=torch.float32)[documents])
    assert batch.masked[0, :4].all()
    assert batch.masked[2].all()
    assert not batch.masked[1, :4].any()


def test_levels_are_uniform_and_stratified_ones_even():
    generator = np.random.default_rng(0)
    for stratified in (True, False):
        t = np.concatenate([diffusion.noise_levels(generator, 50, stratified) for _ in range(200)])
        assert t.min() > 0
        assert t.max() <= 1
        assert np.histogram(t, 10, (0, 1))[0] == pytest.approx(1000, rel=0.15)
    even = np.sort(diffusion.noise_levels(generator, 50, True))
    assert np.diff(even) == pytest.approx(1 / 50)
    assert list(diffusion.noise_levels(generator, 50, True)) != sorted(diffusion.noise_levels(generator, 50, True))


def test_noise_depends_on_seed_and_step_alone():
    def masked(seed, step):
        return objective(seed=seed).batch(sequences(), [0, 1, 2], step).masked

    assert torch.equal(masked(1, 7), masked(1, 7))
    others = [masked(1, 8), masked(2, 7), masked(1, None), masked(1, 0)]
    assert not any(torch.equal(masked(1, 7), other) for other in others)
    assert not torch.equal(masked(1, 0), masked(1, None))


@pytest.mark.parametrize("isolate", [True, False])
def test_complementary_masks_cover_each_token_once(isolate):
    batch = objective(BlockDiffusion, block=4).batch(sequences(prompt=2, isolate=isolate), [0, 1, 2], 0)
    assert isinstance(batch, NoisyBlocks)
    rows, labels = [], []

    class Model:
        def denoising_loss(self, ids, row, label, weights, documents, clean):
            seen = torch.where(ids == MASK, -1, ids)
            assert torch.equal(torch.maximum(seen[:3], seen[3:]), clean[:3])  # a token is visible in one at least
            rows.extend(row.tolist())
            labels.extend(label.tolist())
            assert weights.eq(1).all()

    batch.loss(Model(), [0, 1, 2], CPU)
    token = [(row // 28 % 3, row % 28) for row in rows]
    assert sorted(token) == [tuple(place) for place in batch.maskable.nonzero().tolist()]
    assert [batch.ids[place].item() for place in token] == labels
    assert batch.targets == len(rows)


def test_answers_alone_are_masked_and_count_by_answer():
    given = sequences(prompt=3)
    for average in ("tokens", "answers"):
        batch = objective(average=average, stratified=False).batch(given, [0, 2], 1)
        assert torch.equal(batch.maskable, given.counts[[0, 2]])
        assert not (batch.masked & ~batch.maskable).any()
        if average == "tokens":
            assert batch.targets == batch.maskable.sum()
            by_token = batch
    assert batch.targets == 4  # two documents in each sequence
    lengths = torch.tensor([[7] * 10 + [1] * 4] * 2)
    torch.testing.assert_close(batch.weights * lengths, by_token.weights)


# ---- runs ----


@pytest.fixture(params=["masked-diffusion", "block-diffusion"])
def diffusing(request, settings):
    return settings | {"objective": request.param, "diffusion": {"mask_token": 270, "block": 8}}


def test_loss_falls_and_the_folder_is_a_diffusion_model(diffusing):
    result = train(parse_config(diffusing | {"steps": 40, "eval_every": 20, "checkpoint_every": 0}))
    assert result.held_out[40] < 0.8 * result.held_out[0]
    model, _ = load_decoder(result.checkpoint)
    block = 0 if diffusing["objective"] == "masked-diffusion" else 8
    assert (model.config.attention_block, model.config.mask_token_id, model.config.shifted_logits) == (block, 270, True)
    assert json.loads((result.checkpoint / "config.json").read_text())["attention_block"] == block


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_resume_repeats_every_bit(diffusing, tmp_path, precision):
    diffusing["model"]["precision"] = precision
    straight = train(parse_config(diffusing))
    shutil.copytree(checkpoint.folder_of(tmp_path / "run", 3), checkpoint.folder_of(tmp_path / "again", 3))
    resumed = train(parse_config({**diffusing, "output": str(tmp_path / "again"), "resume": "latest"}))
    assert resumed.losses == straight.losses[3:]
    assert resumed.held_out[6] == straight.held_out[6]
    weights = "step-00000006/model.safetensors"
    whole, parts = (tmp_path / name / "checkpoints" / weights for name in ("run", "again"))
    assert whole.read_bytes() == parts.read_bytes()


def test_precisions_agree(diffusing, tmp_path):
    losses = {}
    for precision in ("fp32", "bf16", "fp8"):
        diffusing["model"] = diffusing["model"] | {"precision": precision}
        losses[precision] = train(parse_config(diffusing | {"output": str(tmp_path / precision)})).losses
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["fp8"] == pytest.approx(losses["fp32"], rel=0.05)


def test_evaluations_share_their_noise(diffusing):
    """At a rate of next to nothing the held-out loss stands still, while the training loss varies."""
    diffusing["optimizer"] = {"lr": 1e-30, "weight_decay": 0.0}
    result = train(parse_config(diffusing | {"steps": 4, "eval_every": 2}))
    assert len(set(result.held_out.values())) == 1
    assert len(set(result.losses)) == 4


def test_accumulation_does_not_change_the_update(diffusing):
    whole = train(parse_config(diffusing | {"micro_batch_size": 4, "output": diffusing["output"] + "1"}))
    parts = train(parse_config(diffusing | {"micro_batch_size": 1, "output": diffusing["output"] + "2"}))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)


def test_answers_of_a_jsonl_file(settings, tmp_path):
    """Answers alone are learned, filled with end tokens; a further run reads from the folder what model it is."""
    lines = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(9) for b in range(9)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings["data"] = {"path": str(path), "sequence_length": 28, "fill_answers": 4, "whole_documents": True}
    settings |= {"objective": "masked-diffusion", "diffusion": {"mask_token": 271, "average": "answers"}}
    settings["model"]["init"] = "random"
    first = train(parse_config(settings | {"steps": 40, "eval_every": 0}))
    assert first.losses[-1] < first.losses[0]
    assert load_decoder(first.checkpoint)[0].config.shifted_logits is False
    del settings["diffusion"]["mask_token"]  # the folder says it
    settings["model"] = {"path": str(first.checkpoint)}
    second = train(parse_config(settings | {"output": settings["output"] + "2"}))
    assert load_decoder(second.checkpoint)[0].config == load_decoder(first.checkpoint)[0].config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "flow"}, "key 'objective': input should be 'next-token', .*'block-diffusion', got 'flow'"),
        (
            {"diffusion": {}},
            "diffusion.mask_token: the model has no mask token; name a token that its text never holds",
        ),
        ({"diffusion": {"mask_token": "<nix>"}}, "diffusion.mask_token: '<nix>' is no token of the model's tokenizer"),
        ({"diffusion": {"mask_token": 272}}, "diffusion.mask_token: expected an id from 0 to 271, got 272"),
        ({"diffusion": {"block": 1}}, "key 'diffusion.block': input should be greater than or equal to 2"),
        ({"diffusion": {"least_probability": 0}}, "key 'diffusion.least_probability': .* greater than 0"),
    ],
)
def test_clear_errors(settings, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        train(parse_config(settings | {"objective": "masked-diffusion"} | changes))
    assert "\n" not in str(error.value)


def test_next_tokens_of_a_diffusion_model(settings, make_model, tmp_path):
    settings["model"]["path"] = str(make_model(tmp_path / "dllm", attention_block=0, mask_token_id=270))
    with pytest.raises(ValueError, match=r"objective=next-token: the model's attention is not causal \(attention_blo"):
        train(parse_config(settings))


def test_a_llada_folder_goes_on(settings, make_model, tmp_path):
    """Its own names and mask token; its logits are not shifted."""
    llada = {"model_type": "llada", "num_key_value_heads": 4, "tie_word_embeddings": False, "mask_token_id": 270}
    settings["model"]["path"] = str(make_model(tmp_path / "llada", **llada))
    settings["objective"] = "masked-diffusion"
    straight = train(parse_config(settings))
    assert "model.transformer.wte.weight" in load_file(straight.checkpoint / "model.safetensors")
    shutil.copytree(checkpoint.folder_of(tmp_path / "run", 3), checkpoint.folder_of(tmp_path / "again", 3))
    resumed = train(parse_config({**settings, "output": str(tmp_path / "again"), "resume": "latest"}))
    assert resumed.losses == straight.losses[3:]
    config = load_decoder(resumed.checkpoint)[0].config
    assert (config.model_type, config.attention_block, config.shifted_logits) == ("llada", 0, False)


def test_named_mask_token(settings):
    settings |= {"objective": "masked-diffusion", "diffusion": {"mask_token": "<end>"}, "steps": 1}
    result = train(parse_config(settings))
    assert load_decoder(result.checkpoint)[0].config.mask_token_id == 0
