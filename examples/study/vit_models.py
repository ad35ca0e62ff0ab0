"""Part 6: the vision transformers, trained when they are first wanted."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from . import digits
from .settings import HERE
from .store import Row

WARMUP = 50
LOW, HIGH = range(5), range(5, digits.DIGITS)
HALVES = {"low": LOW, "high": HIGH}
Name = Literal["one", "other", "base", "low", "high"]


@dataclass(frozen=True)
class Training:
    """Batches, and the learning rate of AdamW at its peak."""

    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Vits:
    """How the models are trained and measured (``vits.yml``).

    Attributes:
        model: what the config of the ViT has beyond the images.
        apart: of each of two models that have nothing in common; base, halves: of a base, and its two fine-tunes.
        after: of a merged model, to see how fast it recovers.
        calibration: training images from which statistics are measured.
    """

    seeds: tuple[int, ...]
    model: dict[str, int]
    batch: int
    apart: Training
    base: Training
    halves: Training
    after: Training
    calibration: int

    @staticmethod
    def read(name: str = "vits") -> Vits:
        content: dict[str, Any] = yaml.safe_load((HERE / f"{name}.yml").read_text("utf-8"))
        trainings = {key: Training(**content[key]) for key in ("apart", "base", "halves", "after")}
        return Vits(**content | trainings | {"seeds": tuple(content["seeds"])})


@dataclass(frozen=True)
class Models:
    """The models of one seed."""

    settings: Vits
    seed: int
    work: Path

    def folder(self, name: Name) -> Path:
        """Where this model lies, trained now if it was not before."""
        folder = self.work / f"{name}-{self.seed}"
        if not folder.exists():
            save(self._trained(name), folder)
        return folder

    def _trained(self, name: Name) -> ViTForImageClassification:
        make: dict[Name, Callable[[], ViTForImageClassification]] = {
            "one": lambda: self._from_scratch(2 * self.seed, self.settings.apart),
            "other": lambda: self._from_scratch(2 * self.seed + 1, self.settings.apart),
            "base": lambda: self._from_scratch(2 * self.seed, self.settings.base),
            "low": lambda: self._tuned(LOW),
            "high": lambda: self._tuned(HIGH),
        }
        return make[name]()

    def _from_scratch(self, seed: int, training: Training) -> ViTForImageClassification:
        model = new_model(self.settings, seed)
        return train(model, training, self.settings.batch, seed)

    def _tuned(self, shown: Sequence[int]) -> ViTForImageClassification:
        return train(load(self.folder("base")), self.settings.halves, self.settings.batch, self.seed, shown)


def new_model(settings: Vits, seed: int) -> ViTForImageClassification:
    """A freshly initialised model; the seed decides every weight."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=digits.SIDE,
        patch_size=2,
        num_channels=digits.CHANNELS,
        id2label={digit: str(digit) for digit in range(digits.DIGITS)},
        label2id={str(digit): digit for digit in range(digits.DIGITS)},
        attn_implementation="eager",
        **settings.model,
    )
    return ViTForImageClassification(config)


def load(folder: Path) -> ViTForImageClassification:
    """A model from its files, which keep the older names of its tensors.

    Raises:
        ValueError: if tensors are missing.
    """
    model, found = ViTForImageClassification.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    if found["missing_keys"]:
        raise ValueError(f"{folder} lacks {sorted(found['missing_keys'])}")
    return model.eval()


def save(model: ViTForImageClassification, folder: Path) -> None:
    """Write a model and its image processor; the directory appears when it is complete."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    digits.processor().save_pretrained(unfinished)
    unfinished.rename(folder)


def train(
    model: ViTForImageClassification,
    training: Training,
    batch: int,
    seed: int,
    shown: Sequence[int] = range(digits.DIGITS),
) -> ViTForImageClassification:
    """Train all weights on the training images that show one of these digits."""
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = digits.pixels("train"), digits.labels("train")
    among = torch.isin(targets, torch.tensor(list(shown))).nonzero().flatten()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, weight_decay=0.01, fused=True)
    model.train()
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _share(step, training.steps)
        drawn = among[torch.randint(len(among), (batch,), generator=generator)]
        cross_entropy(model(inputs[drawn]).logits, targets[drawn]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _share(step: int, steps: int) -> float:
    """Of the peak learning rate: up over the first steps, then down to a tenth along a cosine."""
    return min(1.0, (step + 1) / min(WARMUP, steps)) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


@torch.inference_mode()
def abilities(model: ViTForImageClassification) -> Row:
    """Share of the held-out images that are recognised, of all and of each half of the digits, and the loss in nats."""
    targets = digits.labels("test")
    logits: Tensor = model.eval()(digits.pixels("test")).logits
    right = (logits.argmax(1) == targets).float()
    halves = {name: float(right[torch.isin(targets, torch.tensor(list(half)))].mean()) for name, half in HALVES.items()}
    return {"accuracy": float(right.mean()), "loss": float(cross_entropy(logits, targets))} | halves
