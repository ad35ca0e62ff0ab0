"""Part 6: scikit-learn's handwritten digits, 1797 images of 8 by 8 pixels, as arrays and as files."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SIDE, GREYS, CHANNELS, DIGITS = 8, 16, 3, 10
HELD_OUT = 500
Part = Literal["train", "test"]


@cache
def images(part: Part) -> Tensor:
    """Bytes [images, side, side]."""
    return _part(torch.from_numpy(load_digits().images * 255 / GREYS).round().to(torch.uint8), part)


@cache
def labels(part: Part) -> Tensor:
    """Which digit each image shows."""
    return _part(torch.from_numpy(load_digits().target), part)


def _part(of_all: Tensor, part: Part) -> Tensor:
    """The same images are held out for all models."""
    order = torch.randperm(len(of_all), generator=torch.Generator().manual_seed(0))
    return of_all[order[:HELD_OUT] if part == "test" else order[HELD_OUT:]]


@cache
def pixels(part: Part) -> Tensor:
    """What the processor makes of the images: [images, channels, side, side], from -1 to 1."""
    return (images(part) / 255 - 0.5).div(0.5).unsqueeze(1).expand(-1, CHANNELS, -1, -1).contiguous()


def processor() -> Any:
    """The image processor that is stored beside every model."""
    half = [0.5] * CHANNELS
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=half, image_std=half)


def write_images(folder: Path, positions: Tensor) -> Path:
    """Training images as PNG files, those of each digit in a folder of its name."""
    for position in positions.tolist():
        path = folder / str(int(labels("train")[position])) / f"{position:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images("train")[position].numpy()).convert("RGB").save(path)
    return folder
