"""`eightfold demo`: SmolLM2-135M-Instruct learns the Python language reference, once in bf16 and once in FP8.

Both runs start from the same weights and read the same sequences in the same order. Every figure in the table is
measured in this run. The text is the language reference that CPython itself carries (pydoc_data.topics).
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eightfold.train.config import ModelConfig, TrainConfig, parse_config
from eightfold.train.data import Corpus
from eightfold.train.loop import Result, train
from eightfold.train.report import plot_curves, read_log

STEPS = 24
SEQUENCE_LENGTH = 256
PRECISIONS = ("bf16", "fp8")
PROMPTS = ('The "with" statement is used to', "A generator expression is")


def run(output: Path, steps: int | None = None) -> int:
    """Runs the demo into ``output`` and prints its table; returns an exit code."""
    from eightfold.models.loading import build_decoder, load_decoder, save_decoder

    start = time.perf_counter()
    source = ModelConfig(path="smollm2").resolved()
    text = write_text(output / "text")
    print(f"{source.name} learns {sum(p.stat().st_size for p in text.iterdir()) / 1e3:,.0f} kB of the Python language")
    print("reference, with the same data in the same order in bf16 and in FP8.\n", flush=True)
    original, tokenizer = load_decoder(source, dtype=torch.float32)

    rows, records, model = {}, {}, original
    for precision in PRECISIONS:
        config = demo_config(source, text, output / precision, precision, steps or STEPS)
        shutil.rmtree(config.output, ignore_errors=True)
        weights = {name: tensor.detach().clone() for name, tensor in original.state_dict().items()}
        model = build_decoder(original.config, weights, precision)
        saved = saved_bytes_per_token(model, Corpus.load(config.data, tokenizer, config.seed))
        result = train(config, model, tokenizer, name=precision)
        rows[precision] = measured(result, saved)
        records[precision] = read_log(Path(config.output) / "log.jsonl")

    figures = {"model": source.name, "torch": torch.__version__, "threads": torch.get_num_threads(), "runs": rows}
    figures["held_out_difference"] = rows["fp8"]["held_out_after"] - rows["bf16"]["held_out_after"]
    (output / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    plot_curves(output / "loss.png", records, "SmolLM2-135M on the Python language reference", baseline=PRECISIONS[0])
    print_table(figures)
    tuned = save_decoder(model, output / "tuned", tokenizer)
    print(f"\nThe FP8-tuned model ({tuned}) continues:")
    for prompt in PROMPTS:
        print(f"  {prompt}{continue_text(model, tokenizer, prompt)}")
    print(
        f"\nCurve: {output / 'loss.png'}; figures: {output / 'demo.json'}; {time.perf_counter() - start:.0f} s in all."
    )
    return 0


def demo_config(source: Path, text: Path, output: Path, precision: str, steps: int) -> TrainConfig:
    """The settings of both runs; only ``precision`` differs, and with it the optimizer's state."""
    return parse_config(
        {
            "model": {"path": str(source), "precision": precision},
            "data": {"path": str(text), "sequence_length": SEQUENCE_LENGTH, "held_out": 0.05},
            "optimizer": {"lr": 2e-4, "warmup_steps": min(3, steps - 1), "min_lr_ratio": 0.1},
            "output": str(output),
            "steps": steps,
            "batch_size": 2,
            "eval_every": 0,
            "eval_sequences": 8,
            "checkpoint_every": 0,
            "checkpoint_at_end": False,
        }
    )


def write_text(folder: Path) -> Path:
    """One file a topic of the language reference."""
    from pydoc_data.topics import topics

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, text in topics.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def saved_bytes_per_token(model: nn.Module, corpus: Corpus) -> float:
    """Bytes that autograd keeps for the backward pass for each further token of a batch.

    The difference between batches of two sequences and of one, so that what does not grow with the tokens (weights)
    drops out. Tensors that share memory count once.
    """
    one, two = (_saved_bytes(lambda n=n: model.loss(*corpus.train.batch(list(range(n))))) for n in (1, 2))
    return (two - one) / corpus.train.ids.shape[1]


def _saved_bytes(forward: Callable[[], torch.Tensor]) -> int:
    storages: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    total = sum(storage.nbytes() for storage in storages.values())
    del loss
    return total


def measured(result: Result, saved: float) -> dict[str, float]:
    """The figures of one run."""
    steps = sorted(result.held_out)
    return {
        "held_out_before": result.held_out[steps[0]],
        "held_out_after": result.held_out[steps[-1]],
        "optimizer_bytes_per_parameter": result.optimizer_bytes_per_parameter,
        "saved_bytes_per_token": saved,
        "tokens_per_second": result.tokens_per_second,
        "tokens": result.tokens,
    }


def print_table(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = figures["runs"]
    table = Table(title=f"SmolLM2-135M-Instruct, {rows['bf16']['tokens']:,} tokens each")
    table.add_column("")
    for precision in PRECISIONS:
        table.add_column(precision, justify="right")
    for label, key, form in (
        ("held-out loss before (nats/token)", "held_out_before", "{:.4f}"),
        ("held-out loss after (nats/token)", "held_out_after", "{:.4f}"),
        ("optimizer state (bytes/parameter)", "optimizer_bytes_per_parameter", "{:.2f}"),
        ("saved activations (bytes/token)", "saved_bytes_per_token", "{:,.0f}"),
        ("training speed (tokens/s)", "tokens_per_second", "{:,.0f}"),
    ):
        table.add_row(label, *(form.format(rows[precision][key]) for precision in PRECISIONS))
    Console().print(table)
    print(f"FP8 minus bf16, held-out loss after training: {figures['held_out_difference']:+.4f} nats/token")


def continue_text(model: nn.Module, tokenizer: Any, prompt: str, tokens: int = 40) -> str:
    """The likeliest continuation, on one line."""
    from eightfold.generate import generate

    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    out = generate(model.eval(), ids, tokens, stop_ids=[tokenizer.eos_token_id])
    return " ".join(tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True).split("\n"))
