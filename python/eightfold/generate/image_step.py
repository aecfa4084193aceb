"""One step of a flow over a batch of images, on the device from end to end, and captured once for all its replays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eightfold.generate.flow import FlowSchedule, flow_step
from eightfold.generate.replay import Replay
from eightfold.models.sana import Sana, TextStates, TimeStates

_COEFFICIENTS = 4  # of a FlowStep


class ImageStep:
    """Images of one size, in a number that stays, with texts of one length. What steps differ in is copied to the
    device's own buffers before each of them; the guidance scale lies there too, so that every value of it and every
    schedule replay one graph. Weights stay at their addresses."""

    def __init__(self, model: Sana, images: int, size: tuple[int, int], tokens: int, pair: bool, graphs: bool):
        """size: rows and columns of the latents. tokens: of a text. pair: whether each image is guided, by the
        velocity with another text beside the one with its own."""
        config, dtype, on = model.config, model.compute.dtype, {"device": model.device}
        rows = 2 * images if pair else images
        self._model, self._images, self._rows, self._pair = model, images, rows, pair
        self._replay = Replay(graphs, model.device)
        self._x, self._previous = torch.zeros(2, images, config.in_channels, *size, **on).unbind()
        self._now = torch.zeros(_COEFFICIENTS + 7 * config.width, **on)
        self._guidance = torch.zeros((), **on)
        heads, dim = config.num_cross_attention_heads, config.cross_attention_head_dim
        # Heads behind tokens in memory, as keys and values come from their product.
        text = torch.zeros(config.num_layers, 2, rows, tokens, heads, dim, dtype=dtype, **on).transpose(3, 4)
        bias = torch.zeros(rows, 1, 1, tokens, dtype=dtype, **on)
        self._text = TextStates([tuple(layer.unbind()) for layer in text.unbind()], bias)

    def load(self, noise: Tensor, texts: Sequence[TextStates], guidance: float) -> None:
        """Begins with `noise` [images, channels, rows, columns]. texts: a row each; of a pair, first those of all
        images that guidance leads away from."""
        self._x.copy_(noise)
        self._previous.zero_()
        self._guidance.fill_(guidance)
        for begin in range(0, self._rows, self._images):
            part, rows = texts[begin : begin + self._images], slice(begin, begin + self._images)
            for layer, kept in enumerate(self._text.layers):
                for which, target in enumerate(kept):
                    target[rows].copy_(_joined([text.layers[layer][which] for text in part]))
            self._text.bias[rows].copy_(_joined([_bias(text) for text in part]))

    def step(self, row: Tensor) -> None:
        """The step of a row of `step_rows`."""
        self._now.copy_(row)
        self._replay("step", self._step)

    @property
    def latents(self) -> Tensor:
        """After the steps so far: float32, and changed by the next one."""
        return self._x

    def _step(self) -> None:  # runs while the graph is captured
        coefficients, embedding, modulation = self._now.split_with_sizes(
            [_COEFFICIENTS, self._model.config.width, 6 * self._model.config.width]
        )
        time = TimeStates(embedding.expand(self._rows, -1), modulation.view(6, -1).expand(self._rows, -1, -1))
        latents = torch.cat((self._x, self._x)) if self._pair else self._x
        velocity = self._model.velocity(latents, time, self._text)
        if self._pair:
            away, towards = velocity.chunk(2)
            velocity = away + self._guidance * (towards - away)
        x, previous = flow_step(self._x, velocity, self._previous, coefficients)
        self._x.copy_(x)
        self._previous.copy_(previous)


def step_rows(model: Sana, schedule: FlowSchedule, guidance: float) -> Tensor:
    """What the steps of a schedule differ in, float32 [steps, 4 + 7 * width]: the coefficients, and the time as the
    model reads it. guidance: embedded with the time, in models that do so."""
    config = model.config
    times, coefficients = schedule.tensors(model.device)
    embedded = torch.full_like(times, guidance * config.guidance_embeds_scale) if config.guidance_embeds else None
    states = model.time_states(times * config.timestep_scale, embedded)
    return torch.cat((coefficients, states.embedding, states.modulation.flatten(1)), dim=1)


def _joined(rows: list[Tensor]) -> Tensor:
    """The rows below each other; one alone, if all are the same tensor: it is broadcast."""
    return rows[0] if all(row is rows[0] for row in rows) else torch.cat(rows)


def _bias(text: TextStates) -> Tensor:
    return text.layers[0][0].new_zeros(1, 1, 1, 1) if text.bias is None else text.bias
