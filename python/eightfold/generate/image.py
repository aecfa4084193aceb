"""Images from a SANA transformer: Flow-DPM-Solver or Euler steps from noise, then a decoder."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eightfold.generate.flow import FlowSchedule, flow_dpm, flow_euler
from eightfold.generate.image_step import ImageStep, step_rows
from eightfold.models.precision import KeptWeights
from eightfold.models.sana import Sana, TextStates
from eightfold.ops import kernels_run_on

SOLVERS: dict[str, Callable[[int, float], FlowSchedule]] = {"flow-dpm": flow_dpm, "flow-euler": flow_euler}
SEEDS = 2**32  # torch's generator on the CPU reads no more bits of a seed
_KEPT = 4  # batches, sizes and lengths of text whose buffers and graphs are kept

OnStep = Callable[[int, int], None]


class ImageSampler:
    """An engine over one transformer. Weights must not change while `sample` runs; between two calls they may."""

    def __init__(
        self,
        model: Sana,
        decode: Callable[[Tensor], Tensor] | None = None,
        ratio: int | None = None,
        cuda_graphs: bool | None = None,
    ):
        """decode: images [B, 3, H, W] in [-1, 1] of latents [B, channels, H / ratio, W / ratio], float32, as a
        `DCAE.decode`; None: the latents are the pixels. ratio: default 32, without `decode` 1. cuda_graphs: None takes
        them where the kernels run. ValueError for a model that does not fit."""
        config = model.config
        if config.out_channels != config.in_channels:
            raise ValueError(
                f"model: expected out_channels {config.in_channels} as in_channels, got {config.out_channels}"
            )
        if decode is None and config.in_channels != 3:
            raise ValueError(f"decode: expected one for latents of {config.in_channels} channels, no pixels, got None")
        if decode is None and ratio not in (None, 1):
            raise ValueError(f"ratio: expected 1 without decode, got {ratio}")
        self.model, self.decode = model, decode
        self.ratio = ratio or (1 if decode is None else 32)
        self._graphs = kernels_run_on(model.device) if cuda_graphs is None else cuda_graphs
        self._steps: OrderedDict[tuple, ImageStep] = OrderedDict()
        self._addresses: list[int] | None = None
        self._kept = KeptWeights(model.compute.dtype)

    @torch.inference_mode()
    def sample(
        self,
        text: Tensor | TextStates,
        mask: Tensor | None = None,
        negative: Tensor | TextStates | None = None,
        negative_mask: Tensor | None = None,
        *,
        height: int,
        width: int,
        steps: int = 20,
        guidance: float = 4.5,
        solver: str = "flow-dpm",
        shift: float = 3.0,
        seeds: Sequence[int] | None = None,
        batch: int = 16,
        as_latents: bool = False,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Images, uint8 [N, height, width, 3] on the CPU, one for each of `seeds` (default 0, 1 and so on, one for each
        text); with `as_latents` what the decoder would be given, float32 [N, channels, rows, columns] on the device.

        text, mask: as of `Sana.forward`, or what `Sana.text_states` makes of them; with fewer texts than seeds the
        first is that of as many seeds as fall to each, and so on. negative: likewise, what guidance leads away from:
        velocity = negative + guidance * (text - negative), both in one batch. Guidance 1 is the text's velocity alone,
        and `negative` is not read; nor is it by models that embed the guidance scale, which get it times their
        `guidance_embeds_scale`. Of texts of two lengths the shorter one is padded.

        height, width: pixels, multiples of `ratio` times the patch. solver: "flow-dpm" or "flow-euler", with `steps`
        and `shift` (`generate.flow`). batch: images at once.

        An image's noise is drawn by its own seed (0 to 2^32 - 1) and size alone: on the CPU, in float32, by
        torch.Generator, so that it is the same on every device. Also its text is embedded by itself. What stands
        beside an image then changes it by no more than the last bits of those products and convolutions of the model
        for which a library chooses another kernel with another number of rows.

        `on_step(done, all)` is called after each step, when at most one more is on its way; without it the host waits
        for nothing before the last step. Raises ValueError naming the argument, RuntimeError if the model gives NaN.
        """
        size = self._size(height, width)
        schedule = self._schedule(solver, steps, shift)
        if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not math.isfinite(guidance):
            raise ValueError(f"guidance: expected a finite number, got {guidance!r}")
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch: expected 1 or more, got {batch!r}")
        pair = guidance != 1 and not self.model.config.guidance_embeds
        if pair and negative is None:
            raise ValueError(f"negative: expected a text to lead away from with guidance {guidance}, got None")
        texts = [_Texts(self.model, "negative", negative, negative_mask)] if pair else []
        texts.append(_Texts(self.model, "text", text, mask))
        seeds = _checked_seeds(range(texts[-1].rows) if seeds is None else seeds)
        length = max(states.tokens for states in texts)
        for states in texts:
            states.fit(len(seeds), length)

        self._refresh()
        made, groups = [], range(0, len(seeds), batch)
        with self.model.compute.constant_weights(self._kept):
            rows = step_rows(self.model, schedule, guidance)
            for number, begin in enumerate(groups):
                group = range(begin, min(begin + batch, len(seeds)))
                step = self._step(len(group), size, length, pair)
                noise = torch.stack([self.noise(seeds[i], size) for i in group])
                step.load(noise, [states[i] for states in texts for i in group], guidance)
                self._run(step, rows, on_step, number * steps, len(groups) * steps)
                latents = step.latents.clone()
                if not bool(latents.isfinite().all()):
                    raise RuntimeError("sample: the model gave values that are not finite")
                made.append(latents if as_latents else self.images(latents).cpu())
        return torch.cat(made)

    def noise(self, seed: int, size: tuple[int, int]) -> Tensor:
        """What the image of a seed begins with: float32 [channels, rows, columns], on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.model.config.in_channels, *size, generator=generator)

    @torch.inference_mode()
    def images(self, latents: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] of latents [B, channels, H / ratio, W / ratio], decoded; [-1, 1] to 0 to 255, clipped."""
        pictures = latents if self.decode is None else self.decode(latents)
        want = (len(latents), 3, *(self.ratio * side for side in latents.shape[2:]))
        if tuple(pictures.shape) != want:
            raise ValueError(f"decode: expected images {want} of ratio {self.ratio}, got {tuple(pictures.shape)}")
        levels = (pictures.float().clamp(-1, 1) + 1) * 127.5
        return levels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def _run(self, step: ImageStep, rows: Tensor, on_step: OnStep | None, done: int, total: int) -> None:
        waits = on_step is not None and self.model.device.type == "cuda"
        flying = None
        for count, row in enumerate(rows, start=done + 1):
            step.step(row)
            if waits:
                if flying is not None:
                    flying.synchronize()
                flying = torch.cuda.Event()
                flying.record(torch.cuda.current_stream(self.model.device))
            if on_step is not None:
                on_step(count, total)

    def _step(self, images: int, size: tuple[int, int], tokens: int, pair: bool) -> ImageStep:
        key = (images, size, tokens, pair)
        if key not in self._steps:
            if len(self._steps) == _KEPT:
                self._steps.popitem(last=False)  # before the memory of the next one is taken
            self._steps[key] = ImageStep(self.model, *key, self._graphs)
        self._steps.move_to_end(key)
        return self._steps[key]

    def _refresh(self) -> None:
        """What is kept of the weights is made again of those of the moment; graphs go if weights have moved."""
        addresses = [parameter.data_ptr() for parameter in self.model.parameters()]
        if addresses != self._addresses:
            self._steps.clear()
            self._kept = KeptWeights(self.model.compute.dtype)
        self._addresses = addresses
        self._kept.refresh()

    def _size(self, height: int, width: int) -> tuple[int, int]:
        unit = self.ratio * self.model.config.patch_size
        for name, value in (("height", height), ("width", width)):
            if not isinstance(value, int) or value < 1 or value % unit:
                raise ValueError(f"{name}: expected a multiple of {unit} pixels, got {value!r}")
        return height // self.ratio, width // self.ratio

    def _schedule(self, solver: str, steps: int, shift: float) -> FlowSchedule:
        if solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
        return SOLVERS[solver](steps, shift)


class _Texts:
    """Texts, each for as many images in a row; embedded one by one when they are asked for."""

    def __init__(self, model: Sana, name: str, text: Tensor | TextStates, mask: Tensor | None):
        self._model, self._name, self._text, self._mask = model, name, text, mask
        self._row, self._last = -1, None
        mask_name, made = "mask" if name == "text" else f"{name}_mask", isinstance(text, TextStates)
        if made and mask is not None:
            raise ValueError(f"{mask_name}: expected None with states of a text, which have it, got a tensor")
        if not made and (text.dim() != 3 or 0 in text.shape or text.shape[-1] != model.config.caption_channels):
            wanted = f"embeddings [N, T, {model.config.caption_channels}], not empty"
            raise ValueError(f"{name}: expected {wanted}, got {tuple(text.shape)}")
        if mask is not None and mask.shape != text.shape[:2]:
            raise ValueError(f"{mask_name}: expected {tuple(text.shape[:2])} as of {name}, got {tuple(mask.shape)}")
        keys = text.layers[0][0].transpose(1, 2) if made else text
        self.rows, self.tokens = keys.shape[:2]

    def fit(self, images: int, length: int) -> None:
        """Shares the texts out among so many images; shorter ones will be padded to `length`."""
        if images % self.rows:
            raise ValueError(f"{self._name}: expected a number that divides {images} seeds, got {self.rows}")
        if isinstance(self._text, TextStates) and self.tokens != length:
            raise ValueError(f"{self._name}: expected states of {length} tokens as of the other, got {self.tokens}")
        self._images, self._missing = images // self.rows, length - self.tokens

    def __getitem__(self, image: int) -> TextStates:
        row = image // self._images
        if row != self._row:
            self._row, self._last = row, self._states(row)
        return self._last

    def _states(self, row: int) -> TextStates:
        rows = slice(row, row + 1)
        if isinstance(self._text, TextStates):
            bias = None if self._text.bias is None else self._text.bias[rows]
            return TextStates([(keys[rows], values[rows]) for keys, values in self._text.layers], bias)
        text, mask = self._text[rows], None if self._mask is None else self._mask[rows]
        if self._missing:
            mask = text.new_ones(text.shape[:2]) if mask is None else mask
            text, mask = F.pad(text, (0, 0, 0, self._missing)), F.pad(mask, (0, self._missing))
        device = self._model.device
        return self._model.text_states(text.to(device), None if mask is None else mask.to(device))


def _checked_seeds(seeds: Sequence[int]) -> list[int]:
    seeds = list(seeds)
    wrong = [seed for seed in seeds if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEEDS]
    if wrong or not seeds:
        raise ValueError(f"seeds: expected integers from 0 to {SEEDS - 1}, got {wrong[0] if wrong else 'none'}")
    return seeds
