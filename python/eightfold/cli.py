"""The command `eightfold`. Slow modules are imported by the subcommand that needs them."""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from eightfold.cli_images import IMAGE, add_images
from eightfold.train.image.command import add_sana_parts

USER_ERROR, INTERRUPTED = 2, 130
# Flags of generate that not all of its modes take.
_TEXT = ("max_tokens", "top_k", "top_p")
_DIFFUSION = ("canvas", "block", "cache", "refresh_every", "threshold", "factor", "steps")
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code: 0, 2 after an error of the user (one line), 130 after Ctrl-C."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "overrides"):  # overrides may also stand after flags
        args.overrides += [item for item in rest if _OVERRIDE.fullmatch(item)]
        rest = [item for item in rest if not _OVERRIDE.fullmatch(item)]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except (ValueError, OSError, ImportError) as error:
        if args.debug:
            raise
        return _fail(" ".join(str(error).split()) or type(error).__name__, USER_ERROR)


def script() -> int:
    """The console script: ``main``, and for torchrun's processes an end without teardown."""
    code = main()
    if _processes() > 1:
        # DTensor's caches keep gloo's threads past destroy_process_group; one that still lets go of a tensor while the
        # interpreter is being torn down aborts the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _fail(message: str, code: int) -> int:
    if _processes() > 1:
        from eightfold.train.distributed import speaks_first

        if not speaks_first(message):
            return code
    print(f"eightfold: {message}", file=sys.stderr, flush=True)
    return code


def _info(args: argparse.Namespace) -> int:
    from eightfold.info import collect

    facts = collect()
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")
    return 0


def _train(args: argparse.Namespace) -> int:
    from eightfold.train.config import SHORTHANDS, load_config

    if args.demo:
        return _image_demo(args)
    if args.images is not None:
        raise ValueError("--images: expected with --demo image only")
    loaded = load_config(*_settings(args, SHORTHANDS))

    from eightfold.train.interrupt import Interrupted
    from eightfold.train.loop import train

    try:
        result = train(loaded)
    except Interrupted as stop:
        return _fail(str(stop), INTERRUPTED)
    if os.environ.get("RANK", "0") == "0":
        print(f"done: {result.tokens_per_second:,.0f} tokens/s; curve in {loaded.output}/loss.png", end="")
        print(f"; model in {result.checkpoint}" if result.checkpoint else "; no checkpoint (checkpoint_at_end is off)")
    return 0


def _sana_train(args: argparse.Namespace) -> int:
    from eightfold.train.image.config import SHORTHANDS, load_image_config
    from eightfold.train.interrupt import Interrupted

    config, overrides = _settings(args, SHORTHANDS)
    if args.model is not None:  # instead of the one that the file names
        overrides += ["model.released=null", "model.sizes=null"]
    loaded = load_image_config(config, overrides)

    from eightfold.train.image.loop import train_image

    try:
        result = train_image(loaded)
    except Interrupted as stop:
        return _fail(str(stop), INTERRUPTED)
    print(f"done: {result.images_per_second:,.1f} images/s; curve in {loaded.output}/loss.png", end="")
    print(f"; model in {result.model}" if result.model else "; no checkpoint (checkpoint_at_end is off)")
    return 0


def _sana_grow(args: argparse.Namespace) -> int:
    from eightfold.train.image.console import run_grow

    return run_grow(args)


def _sana_prune(args: argparse.Namespace) -> int:
    from eightfold.train.image.console import run_prune

    return run_prune(args)


def _image_demo(args: argparse.Namespace) -> int:
    from eightfold.train.image.demo import run
    from eightfold.train.interrupt import Interrupted

    try:
        return run(Path(args.output or "image_demo_output"), args.steps, args.images and Path(args.images))
    except Interrupted as stop:
        return _fail(str(stop), INTERRUPTED)


def _rl(args: argparse.Namespace) -> int:
    from eightfold.train.config import SHORTHANDS
    from eightfold.train.interrupt import Interrupted

    try:
        if args.demo:
            from eightfold.train.rl.demo import run

            return run(Path(args.output or "rl_demo_output"), args.steps)
        from eightfold.train.rl.config import load_rl_config

        loaded = load_rl_config(*_settings(args, SHORTHANDS))

        from eightfold.train.rl.loop import train_rl

        result = train_rl(loaded)
    except Interrupted as stop:
        return _fail(str(stop), INTERRUPTED)
    if os.environ.get("RANK", "0") == "0":
        print(f"done: curves in {loaded.output}/rewards.png", end="")
        print(f"; model in {result.checkpoint}" if result.checkpoint else "; no checkpoint (checkpoint_at_end is off)")
    return 0


def _settings(args: argparse.Namespace, shorthands: dict[str, str]) -> tuple[str | None, list[str]]:
    """The YAML file and the overrides that a command line with a config, overrides and flags means."""
    config, overrides = args.config, [*args.overrides, *args.set]
    if config is not None and _OVERRIDE.fullmatch(config) and not Path(config).exists():
        config, overrides = None, [config, *overrides]
    if args.resume is not None and _OVERRIDE.fullmatch(args.resume):  # --resume without a folder, then an override
        overrides.append(args.resume)
        args.resume = "latest"
    for flag, key in shorthands.items():
        if getattr(args, flag, None) is not None:
            overrides.append(f"{key}={_quoted(getattr(args, flag))}")
    return config, overrides


def _quoted(value: object) -> str:
    """A flag's value as YAML that reads back as the same text or number."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def _generate(args: argparse.Namespace) -> int:
    if args.image:
        return _generate_images(args)
    others, where = (_TEXT, "not with --diffusion") if args.diffusion else (_DIFFUSION, "only with --diffusion")
    images = [name for name in IMAGE if name not in ("steps", "output")]
    for names, reason in ((others, where), (images, "only with --image")):
        wrong = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
        if wrong:
            raise ValueError(f"{wrong[0]}: {reason}")
    if args.demo:
        if not args.diffusion or args.model is not None:
            raise ValueError("--demo: expected with --diffusion, and no model: it makes its own")
        from eightfold.generate.diffusion_demo import run as run_demo

        return run_demo(Path(args.output or "diffusion_demo_output"))
    if args.output is not None:
        raise ValueError("--output: only with --demo or --image")
    if args.model is None:
        raise ValueError("model: expected a folder, a .gguf file or smollm2, got none")
    if args.max_tokens is None:
        args.max_tokens = 200
    if args.diffusion:
        from eightfold.generate.diffusion_console import run
    else:
        from eightfold.generate.console import run
    from eightfold.train.config import ModelConfig

    args.model = ModelConfig(path=args.model).resolved()
    return run(args)


def _generate_images(args: argparse.Namespace) -> int:
    others = [name for name in (*_TEXT, *_DIFFUSION) if name not in IMAGE and getattr(args, name) is not None]
    others += [name for name in ("diffusion", "demo", "chat", "temperature") if getattr(args, name)]
    if others:
        raise ValueError(f"--{others[0].replace('_', '-')}: not with --image")
    if args.model is None:
        raise ValueError("model: expected a folder or a file of a SANA transformer, got none")
    from eightfold.generate.image_console import run

    return run(args)


def _export(args: argparse.Namespace) -> int:
    from eightfold.models.loading import load_decoder, save_decoder
    from eightfold.train.config import ModelConfig

    model, tokenizer = load_decoder(ModelConfig(path=args.model).resolved())
    folder = save_decoder(model, args.output, tokenizer, args.format)
    size = sum(file.stat().st_size for file in folder.rglob("*"))
    print(f"done: {args.format} model in {folder}, {size / 1e6:,.1f} MB")
    return 0


def _bench(args: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[2]  # of a clone; a wheel holds the same files as eightfold.bench
    in_clone = (root / "bench" / "__main__.py").exists()
    if in_clone:
        sys.path.insert(0, str(root))
    main = importlib.import_module("bench.__main__" if in_clone else "eightfold.bench.__main__").main
    device = ["--device", args.device] if args.device else []
    main([*args.families, *device, *(["--results", args.results] if args.results else [])])
    return 0


def _demo(args: argparse.Namespace) -> int:
    from eightfold.train.demo import run
    from eightfold.train.interrupt import Interrupted

    try:
        return run(Path(args.output), args.steps)
    except Interrupted:
        return _fail("interrupted", INTERRUPTED)


def version() -> str:
    """The installed version."""
    from importlib import metadata

    try:
        return metadata.version("eightfold")
    except metadata.PackageNotFoundError:
        return "(source tree)"


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"eightfold {version()}")
        parser.exit()


def _add_settings(parser: argparse.ArgumentParser, example: str) -> None:
    """What `_settings` reads, but for the flags that a command words itself."""
    parser.add_argument("config", nargs="?", help="YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=f"e.g. {example}")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="key=value", help="as a flag")
    parser.add_argument("--model", help="Hugging Face folder, .gguf file, or smollm2")
    parser.add_argument("--resume", nargs="?", const="latest", metavar="CHECKPOINT", help="go on (default: the latest)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eightfold", description="FP8 training and generation kernels for torch.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what this build contains and what this machine runs")
    info.set_defaults(run=_info)

    train = commands.add_parser(
        "train",
        help="fine-tune a language model",
        description="Fine-tunes a model on text. Settings come from a YAML file, then from key=value overrides, then "
        "from flags. For several processes: torchrun --nproc-per-node N -m eightfold.cli train ...",
    )
    _add_settings(train, "optimizer.lr=1e-4")
    train.add_argument("--data", help="text file, folder, .jsonl file or saved dataset")
    train.add_argument("--output", help="folder for logs, the loss curve and checkpoints (default: run)")
    train.add_argument("--precision", help="fp8, bf16 or fp32")
    train.add_argument("--objective", help="next-token (default), masked-diffusion or block-diffusion")
    train.add_argument("--steps", type=int, help="optimizer steps")
    train.add_argument("--demo", choices=("image",), help="a tiny SANA learns to make pictures on a CPU, in minutes")
    train.add_argument("--images", help="of --demo, folder or .zip of classes of pictures (default: drawn shapes)")
    train.set_defaults(run=_train)

    sana = commands.add_parser("sana", help="train, grow and prune transformers that make pictures")
    runs = {"train": _sana_train, "grow": _sana_grow, "prune": _sana_prune}
    sana_parts = add_sana_parts(sana, runs, _add_settings)

    rl = commands.add_parser(
        "rl",
        help="reinforcement learning of a language model from verified rewards",
        description="GRPO: the model answers prompts, a verifier rewards the answers, the model learns from them. "
        "Settings come from a YAML file, then from key=value overrides, then from flags.",
    )
    _add_settings(rl, "task.name=chain_sum")
    rl.add_argument("--output", help="folder for logs, pictures and checkpoints (default: run)")
    rl.add_argument("--precision", help="of training: fp8, bf16 or fp32")
    rl.add_argument("--steps", type=int, help="steps of rollout and update")
    rl.add_argument("--demo", action="store_true", help="SmolLM2-135M learns sums, in each mode of precision, on a CPU")
    rl.set_defaults(run=_rl)

    generate = commands.add_parser("generate", help="write text or make images with a model")
    generate.add_argument(
        "model",
        nargs="?",
        help="Hugging Face folder, .gguf file, a training run's folder, or smollm2; with --image a SANA transformer",
    )
    generate.add_argument("prompt", nargs="?", help="default: read from standard input")
    generate.add_argument("--chat", action="store_true", help="put the prompt through the model's chat template")
    generate.add_argument("--max-tokens", type=int, help="default: 200")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    generate.add_argument("--top-k", type=int, default=None)
    generate.add_argument("--top-p", type=float, default=None)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--precision", choices=("fp32", "bf16", "fp8"), default="bf16")
    generate.add_argument("--diffusion", action="store_true", help="with a diffusion model: uncovers a canvas of masks")
    generate.add_argument("--canvas", type=int, help="tokens of the canvas (default: 256)")
    generate.add_argument("--block", type=int, help="tokens of a block (default: 32, or the model's)")
    generate.add_argument("--cache", choices=("none", "prefix", "dual"), help="keys and values kept (default: dual)")
    generate.add_argument("--refresh-every", type=int, help="blocks between passes over the whole text (default: 1)")
    generate.add_argument("--threshold", type=float, help="uncover what is at least as probable (default: 0.9)")
    generate.add_argument("--factor", type=float, help="instead: uncover the more, the surer the model is of all")
    generate.add_argument("--steps", type=int, help="instead: uncover a block in so many passes; of images (20)")
    generate.add_argument("--demo", action="store_true", help="with --diffusion: a tiny model learns sums on a CPU")
    generate.add_argument("--output", help="of --demo, folder (diffusion_demo_output); of --image (images.png)")
    add_images(generate)
    generate.set_defaults(run=_generate)

    export = commands.add_parser("export", help="write a model for transformers, vLLM or SGLang, in FP8 or bf16")
    export.add_argument("model", help="Hugging Face folder, .gguf file, a training run's folder, or smollm2")
    export.add_argument("output", help="folder: a new name, empty, or a saved model to replace")
    export.add_argument(
        "--format",
        choices=("fp8", "bf16"),
        default="fp8",
        help="fp8 (default): the codes and 128x128 scales that FP8 products use, the rest bf16",
    )
    export.set_defaults(run=_export)

    bench = commands.add_parser("bench", help="time the kernels of this machine")
    bench.add_argument(
        "families", nargs="*", help="default: all kernels; step and image: layers, models, training, also by part"
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when there is one")
    bench.add_argument("--results", metavar="FOLDER", help="also write JSON lines there")
    bench.set_defaults(run=_bench)

    demo = commands.add_parser("demo", help="fine-tune SmolLM2-135M in bf16 and in FP8 and compare")
    demo.add_argument("--output", default="demo_output", help="folder (default: demo_output)")
    demo.add_argument("--steps", type=int, default=None, help="optimizer steps of each run")
    demo.set_defaults(run=_demo)

    for command in (info, train, *sana_parts, rl, generate, export, bench, demo):
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(script())
