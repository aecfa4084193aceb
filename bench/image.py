"""Images by SANA (arXiv 2410.10629, 2501.18427), random weights: a step of sampling, the decoder, whole images; and a
step of training (image_training.py).

A step is the CUDA graph that ImageSampler replays: classifier-free guidance (two rows), 300 tokens of text, the
solver. The peer is diffusers' transformer with the same weights in bf16, guidance but no solver, under torch.compile,
with and without a CUDA graph; at 4096 px and of the 4.8B its blocks are compiled one by one, which takes seconds and
costs nothing where the host is ahead. Checked first: the mean of the two velocities of the replayed step against the
peer's (without diffusers, against ours in fp32). Floor of a step: its products, at the E4M3 rate also in bf16.
"""

import copy
import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eightfold.generate.flow import flow_dpm
from eightfold.generate.image import ImageSampler
from eightfold.generate.image_step import ImageStep, step_rows
from eightfold.models.dc_ae import DCAE
from eightfold.models.dc_ae_config import SANA_F32C32, DCAEConfig
from eightfold.models.precision import KeptWeights, Precision
from eightfold.models.sana import Sana, SanaConfig
from eightfold.models.sana_loading import build_sana, sana_tensors

from .common import Bench, Case, Run, relative_error, replayed
from .image_peers import DiffusersSana, diffusers_dc_ae, left_out
from .kernel_times import KernelTimes
from .step import default_dtype, wall_seconds

STEPS, GUIDANCE = 20, 4.5
ROUNDS = 3  # of whole images
MEAN = 0.5  # the guidance that gives the mean of the two velocities
QUEUE_CYCLES = 2_000_000  # 1 ms: more than the host takes to ask for a graph
DECODER_QUEUE_CYCLES = 20_000_000  # 11 ms: decoders are launched kernel by kernel
TOLERANCES = {"fp8": 0.08, "bf16": 0.03}
DECODER_TOLERANCE = 0.05


@dataclass(frozen=True)
class Sizes:
    name: str
    transformer: SanaConfig
    large_name: str
    large: SanaConfig  # with positions, for `large_side`
    others: dict[str, SanaConfig]
    autoencoder: DCAEConfig
    side: int  # of latents
    large_side: int
    text: int  # tokens
    batches: tuple[int, ...]  # of whole images
    training_batch: int


GPU = Sizes(
    name="1.6B 1024 px",
    transformer=SanaConfig.named("1.6B"),
    large_name="1.6B 4096 px",
    large=SanaConfig.named("1.6B", sample_size=128, interpolation_scale=2.0),
    others={"0.6B 1024 px": SanaConfig.named("0.6B"), "4.8B 1024 px": SanaConfig.named("4.8B")},
    autoencoder=SANA_F32C32,
    side=32,
    large_side=128,
    text=300,
    batches=(1, 16),
    training_batch=8,
)
_SMALL = SanaConfig(2, 2, 32, 2, 32, in_channels=4, out_channels=4, caption_channels=16, sample_size=4)
CPU = Sizes(
    name="small",
    transformer=_SMALL,
    large_name="small large",
    large=replace(_SMALL, sample_size=8, interpolation_scale=2.0),
    others={"small narrow": SanaConfig(1, 1, 32, 1, 32, in_channels=4, out_channels=4, caption_channels=16)},
    autoencoder=DCAEConfig(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    ),
    side=4,
    large_side=8,
    text=5,
    batches=(1, 2),
    training_batch=2,
)


def parts(cuda: bool) -> dict[str, Callable[[Bench], None]]:
    """By name, in the order in which they run."""
    sizes = GPU if cuda else CPU
    return {
        "image-step": partial(_steps, sizes=sizes, models={sizes.name: sizes.transformer}, whole_peer=True),
        "image-step-4k": partial(_steps, sizes=sizes, models={sizes.large_name: sizes.large}),
        "image-step-others": partial(_steps, sizes=sizes, models=sizes.others),
        "image-decode": partial(_decode, sizes=sizes),
        "image-training": partial(_training, sizes=sizes),
        "image-whole": partial(_whole, sizes=sizes),
    }


def random_sana(config: SanaConfig, device: torch.device, precision: Precision = "fp8") -> Sana:
    """Of random bf16 parameters made on the device, the same each time."""
    torch.manual_seed(0)
    with device, default_dtype(torch.bfloat16):
        return Sana(config, precision)


def random_dc_ae(config: DCAEConfig, device: torch.device) -> DCAE:
    torch.manual_seed(0)
    with device, default_dtype(torch.bfloat16):
        return DCAE(config).eval()


def random_texts(config: SanaConfig, rows: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings [rows, tokens, channels] in bf16 and their mask: the last third of the first half of them is not."""
    text = torch.randn(rows, tokens, config.caption_channels, device=device, dtype=torch.bfloat16)
    mask = torch.ones(rows, tokens, device=device)
    mask[: rows // 2, -(tokens // 3) :] = 0
    return text, mask


def step_flop(config: SanaConfig, rows: int, tokens: int, text: int) -> int:
    """Of the blocks' products and attentions for `rows` pictures of `tokens`, the text's keys and values there."""
    matrices = 6 * config.width**2 + 3 * config.width * config.ffn_width
    attention = 2 * config.width * (config.attention_head_dim + text)
    return 2 * rows * tokens * config.num_layers * (matrices + attention)


def free(device: torch.device) -> None:
    """What compiled functions and the allocator keep goes."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _kernels(bench: Bench, name: str, run: Run) -> None:
    if bench.kernels and bench.device.type == "cuda":
        print(f"  {name}:\n{KernelTimes(run).table(bench.kernels)}")


# ---- a step of sampling ----


@torch.no_grad()
def _steps(bench: Bench, sizes: Sizes, models: dict[str, SanaConfig], whole_peer: bool = False) -> None:
    for name, config in models.items():
        free(bench.device)
        side = sizes.large_side if config is sizes.large else sizes.side
        model = random_sana(config, bench.device)
        noise = torch.randn(1, config.in_channels, side, side, device=bench.device)
        texts = random_texts(config, 2, sizes.text, bench.device)
        velocity, peers = _peers(model, noise, texts, whole_peer)
        for precision, tolerance in TOLERANCES.items():
            ours = model if precision == "fp8" else build_sana(config, sana_tensors(model), precision)
            with _image_step(ours, noise, texts) as (run, found):
                case = Case(
                    f"image step {precision}",
                    name,
                    ours=run,
                    error=partial(relative_error, found, velocity),
                    tolerance=tolerance,
                    flop=step_flop(config, 2, side**2 // config.patch_size**2, sizes.text),
                    peers=peers,
                    graph=False,
                    queue_cycles=QUEUE_CYCLES,
                )
                bench.add(case)
                _kernels(bench, f"{case.op} {name}", run)
            del ours, run, case
        del model, peers


@contextmanager
def _image_step(model: Sana, noise: Tensor, texts: tuple[Tensor, Tensor]) -> Iterator[tuple[Run, Tensor]]:
    """A step somewhere in a schedule, and the mean velocity that a replayed step at its begin gave."""
    text, mask = texts
    with model.compute.constant_weights(KeptWeights(model.compute.dtype)):
        step = ImageStep(model, 1, tuple(noise.shape[2:]), text.shape[1], True, noise.is_cuda)
        states = [model.text_states(text[i : i + 1], mask[i : i + 1]) for i in range(2)]
        once = flow_dpm(1)  # its one step leads to noise - sigma * velocity
        for _ in range(3):  # as it is, captured, replayed
            step.load(noise, states, MEAN)
            step.step(step_rows(model, once, MEAN)[0])
        velocity = (noise - step.latents) / once.sigmas[0]
        step.load(noise, states, GUIDANCE)
        row = step_rows(model, flow_dpm(STEPS), GUIDANCE)[STEPS // 2]
        yield lambda: step.step(row), velocity


def _peers(model: Sana, noise: Tensor, texts: tuple[Tensor, Tensor], whole: bool) -> tuple[Tensor, dict[str, Run]]:
    """The mean velocity at the begin of a schedule, and diffusers' steps. `whole`: compiled as one, also timed without
    a graph."""
    times = torch.full((2,), flow_dpm(1).times[0], device=noise.device)
    try:
        peer = DiffusersSana(model).eval()
    except ImportError as reason:
        left_out("diffusers", reason)
        exact = build_sana(model.config, sana_tensors(model), "fp32")
        return _guided(exact, noise, times, *texts, MEAN), {}
    velocity, runs = _guided(peer, noise, times, *texts, MEAN), {}

    def step(*inputs: Tensor) -> Tensor:
        return _guided(peer, *inputs, GUIDANCE)

    try:
        if not whole:
            peer.compile_blocks()
        call = torch.compile(step, dynamic=False) if whole else step
        run = partial(call, noise, times, *texts)
        run()
        runs["diffusers compiled, in a CUDA graph"] = replayed([run]) if noise.is_cuda else run
        if whole:
            runs["diffusers compiled"] = run
    except Exception as reason:
        left_out("diffusers compiled", reason)
    return velocity, runs


def _guided(model, latents: Tensor, times: Tensor, text: Tensor, mask: Tensor, guidance: float) -> Tensor:
    away, towards = model(torch.cat((latents, latents)), times, text, mask).chunk(2)
    return away + guidance * (towards - away)


# ---- the decoder ----


@torch.no_grad()
def _decode(bench: Bench, sizes: Sizes) -> None:
    free(bench.device)
    config = sizes.autoencoder
    model = random_dc_ae(config, bench.device)
    latents = torch.randn(1, config.latent_channels, sizes.side, sizes.side, device=bench.device)
    latents = latents.to(torch.bfloat16)
    run, peers = partial(model.decode, latents), {}
    try:
        peer, unscaled = diffusers_dc_ae(model), latents / config.scaling_factor
        peers["diffusers eager"] = partial(peer.decoder, unscaled)
        peers["diffusers compiled"] = partial(torch.compile(peer.decoder, dynamic=False), unscaled)
        image = peers["diffusers eager"]()
    except ImportError as reason:
        left_out("diffusers", reason)
        image = copy.deepcopy(model).float().decode(latents)
    with FlopCounterMode(display=False) as counter:
        run()
    name = f"{config.ratio * sizes.side} px"
    bench.add(
        Case(
            "image decoder bf16",
            name,
            ours=run,
            error=lambda: relative_error(run(), image),
            tolerance=DECODER_TOLERANCE,
            flop=counter.get_total_flops(),
            peers=peers,
            graph=False,
            queue_cycles=DECODER_QUEUE_CYCLES,
        )
    )
    _kernels(bench, f"image decoder {name}", run)


# ---- whole images ----


def _whole(bench: Bench, sizes: Sizes) -> None:
    """From embeddings of texts to pixels on the host, with the host's time: all, and the decoder of it."""
    free(bench.device)
    config, device = sizes.transformer, bench.device
    model, autoencoder = random_sana(config, device), random_dc_ae(sizes.autoencoder, device)
    models = {"ours": model, "ours, bf16": build_sana(config, sana_tensors(model), "bf16")}
    ratio = sizes.autoencoder.ratio
    samplers = {name: ImageSampler(each, autoencoder.decode, ratio) for name, each in models.items()}
    options = {"height": ratio * sizes.side, "width": ratio * sizes.side, "steps": STEPS, "guidance": GUIDANCE}
    for batch in sizes.batches:
        text, mask = random_texts(config, 1 + batch, sizes.text, device)
        texts, runs = (text[1:], mask[1:], text[:1], mask[:1]), {}
        for name, sampler in samplers.items():
            images = partial(sampler.sample, *texts, seeds=range(batch), batch=batch, **options)
            latents = images(as_latents=True)  # captures the step
            decoded = sampler.images(latents)
            if not decoded.float().std() > 0:
                raise SystemExit(f"image-whole {name}: images of one colour; not timed")
            seconds, of_decoder = (
                statistics.median(wall_seconds(run, device, 1) for _ in range(ROUNDS))
                for run in (images, lambda sampler=sampler, latents=latents: sampler.images(latents).cpu())
            )
            runs[name] = {
                "ms": 1e3 * seconds,
                "decoder_ms": 1e3 * of_decoder,
                "images_per_second": batch / seconds,
            }
        bench.note("step", name=f"images {sizes.name}, {STEPS} steps, batch {batch}", runs=runs)


def _training(bench: Bench, sizes: Sizes) -> None:
    from . import image_training

    image_training.run(bench, sizes)
