"""A small convolutional classifier of pictures: a judge of generated ones, and the features of a Frechet distance.

It is trained by the experiment itself, on the pictures the flow model is trained on, so that nothing is downloaded.
Distances on its features compare runs of one experiment; they are no FID, which has Inception's features.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eightfold.train.run import determinism

_PADDING = 4  # pixels by which pictures are moved in training, of 32
_AT_ONCE = 512


class Classifier(nn.Module):
    """Logits [B, classes] of pictures uint8 [B, 3, H, W]: three stages of residual blocks, each half as large and twice
    as wide as the one before; `features` [B, 4 * width] are the means over places of the last one."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        widths = [width, width, 2 * width, 4 * width]
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        pairs = pairwise(widths)
        self.blocks = nn.Sequential(
            *(_Block(before, after, 1 + (stage > 0)) for stage, (before, after) in enumerate(pairs))
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def features(self, pictures: Tensor) -> Tensor:
        x = self.stem(pictures.float() / 127.5 - 1)
        return F.relu(self.norm(self.blocks(x))).mean(dim=(2, 3))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.features(pictures))


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ready = F.relu(self.norm1(x))
        return self.skip(ready) + self.conv2(F.relu(self.norm2(self.conv1(ready))))


def train_classifier(
    pictures: Tensor, labels: Tensor, classes: int, seed: int, width: int, epochs: int, batch: int, lr: float
) -> Classifier:
    """Trained on pictures uint8 [N, 3, H, W] with labels [N], on their device: AdamW under a one-cycle rate, pictures
    mirrored and moved at random; under bf16 autocast on CUDA."""
    device, generator = pictures.device, torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = Classifier(classes, width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    batches = -(-len(pictures) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
    with determinism(True):
        for _ in range(epochs):
            for places in torch.randperm(len(pictures), generator=generator).split(batch):
                places = places.to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logits = model(_moved(pictures[places], generator))
                F.cross_entropy(logits.float(), labels[places]).backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
    return model.eval()


def _moved(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Each mirrored with probability 1/2 and moved by up to an eighth of its size, black moving in."""
    count, _, height, width = pictures.shape
    reach = max(1, _PADDING * height // 32)
    down, right = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator).to(pictures.device)
    mirrored = (torch.rand(count, generator=generator) < 0.5).to(pictures.device)
    rows = down + torch.arange(height, device=pictures.device)
    columns = right + torch.arange(width, device=pictures.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(pictures, (reach,) * 4).permute(0, 2, 3, 1)
    every = torch.arange(count, device=pictures.device)[:, None, None]
    moved = padded[every, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return moved.contiguous()  # torch 2.13's backward of a channels-last stem overruns its memory on one CPU thread


@torch.no_grad()
def look_at(model: Classifier, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [N, classes] and features [N, 4 * width] of pictures uint8 [N, 3, H, W], both float64 on the
    CPU."""
    device, seen = model.head.weight.device, []
    for part in pictures.split(_AT_ONCE):
        features = model.features(part.to(device))
        seen.append((model.head(features).double().softmax(-1).cpu(), features.double().cpu()))
    probabilities, features = zip(*seen, strict=True)
    return torch.cat(probabilities), torch.cat(features)


def save_classifier(model: Classifier, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    work = file.with_suffix(".part")
    save_file({name: tensor.cpu() for name, tensor in model.state_dict().items()}, work)
    work.rename(file)


def load_classifier(file: Path, classes: int, width: int, device: torch.device | str) -> Classifier:
    model = Classifier(classes, width)
    model.load_state_dict(load_file(file))
    return model.to(device).eval()


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Of two sets of features [N, F] and [M, F], N and M above 1: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of their
    means and covariances, in float64."""
    one, other = one.double(), other.double()
    c1, c2 = one.T.cov(), other.T.cov()
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    distance = (one.mean(0) - other.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * shared
    return distance.item()
