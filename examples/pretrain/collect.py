"""Gathers text found on this machine into OUTPUT/text/*.jsonl, and trains a byte-level BPE tokenizer on it.

Python sources and documentation of the installation and its packages, C and CUDA headers, manuals; each text once (by
its hash), in an order that depends on the texts alone. OUTPUT/model gets the tokenizer and the model's config.json.
"""

import argparse
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
KINDS = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh", ".cu", ".c", ".cc", ".cpp"}
SMALLEST, LARGEST = 200, 1 << 20  # bytes of a file
LONGEST_LINE = 200  # characters of a line on average: above, it is data or generated
SHARD = 64 << 20
END = "<|endoftext|>"
SAMPLE_EVERY = 5  # the tokenizer learns from each fifth text


def roots() -> list[Path]:
    paths = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib", "include")}
    found = [Path(p) for p in (*sorted(paths), "/usr/lib/python3", "/usr/share/doc", "/usr/include", "/usr/local/cuda")]
    return [path for path in found if path.is_dir()]


def texts(folders: list[Path]) -> Iterator[tuple[str, str]]:
    """(hash, text) of every file worth reading, each text once."""
    seen = set()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix not in KINDS or path.is_symlink() or not path.is_file():
                continue
            if not SMALLEST <= path.stat().st_size <= LARGEST:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            name = hashlib.sha256(text.encode()).hexdigest()
            if name not in seen and "\0" not in text and len(text) <= LONGEST_LINE * (text.count("\n") + 1):
                seen.add(name)
                yield name, text


def write_shards(found: list[tuple[str, str]], folder: Path) -> None:
    folder.mkdir(parents=True)
    out, size, number = None, SHARD, 0
    for _, text in found:
        if size >= SHARD:
            if out is not None:
                out.close()
            out, size, number = open(folder / f"{number:03}.jsonl", "w", encoding="utf-8"), 0, number + 1  # noqa: SIM115
        size += out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    out.close()


def train_tokenizer(sample: list[str], vocab: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sample, trainer, len(sample))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--root", type=Path, action="append", help="read these folders instead")
    parser.add_argument("--megabytes", type=float, default=420, help="of text, at most")
    parser.add_argument("--vocab", type=int, help="tokens of the tokenizer; default: the config's")
    parser.add_argument("--config", type=Path, default=HERE / "smollm2-135m.json", help="config.json of the model")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} is there already")
    folders = options.root or roots()
    found, total = [], 0
    for name, text in texts(folders):
        found.append((name, text))
        total += len(text)
        if total >= options.megabytes * 1e6:
            break
    if not found:
        parser.error(f"no text under {', '.join(map(str, folders))}")
    found.sort()  # by hash: the order of folders shows in nothing
    write_shards(found, options.output / "text")
    config = json.loads(options.config.read_text())
    tokenizer = train_tokenizer([text for _, text in found[::SAMPLE_EVERY]], options.vocab or config["vocab_size"])
    model = options.output / "model"
    tokenizer.save_pretrained(model)
    (model / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    sample = [text for _, text in found[:: max(1, len(found) // 200)]]
    tokens = sum(len(ids) for ids in tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"])
    density = tokens / sum(map(len, sample))
    print(f"{len(found):,} texts, {total / 1e6:,.1f} M characters, about {density * total / 1e6:,.1f} M tokens")


if __name__ == "__main__":
    main()
