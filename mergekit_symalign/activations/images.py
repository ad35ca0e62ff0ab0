"""Images in a folder as inputs of a vision model, through the model's own image processor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_symalign.activations.calibration import BATCH_TOKENS
from mergekit_symalign.activations.objectives import Objective, Samples
from mergekit_symalign.activations.runner import Batch
from mergekit_symalign.activations.samples import How, Prepared, label_id
from mergekit_symalign.errors import CalibrationError

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))
LABELS = "labels.jsonl"
_FORM = 'Give each line an object with file and label: {"file": "a.png", "label": "cat"}'


@dataclass(frozen=True)
class Images(Batch):
    """Images in place of token ids [images, channels, height, width]; every patch is valid."""

    def inputs(self) -> dict[str, Any]:
        return {"pixel_values": self.ids}


@dataclass(frozen=True)
class ImageCalibration:
    """Images on which anchor and model are compared, as a `Calibration` of prompts is.

    Attributes:
        pixels: float32 [images, channels, height, width].
        patches: tokens of each image.
    """

    pixels: Tensor
    patches: int

    @property
    def tokens(self) -> int:
        return len(self.pixels) * self.patches

    @property
    def digest(self) -> str:
        return pixels_digest(self.pixels)

    def batches(self) -> Iterator[Images]:
        yield from in_batches(self.pixels, self.patches, max(1, BATCH_TOKENS // self.patches))

    def kept(self) -> Iterator[None]:
        """Nothing is padding."""
        return (None for _ in self.batches())


def patches_of(config: Any) -> int:
    """How many tokens an image becomes."""
    return (config.image_size // config.patch_size) ** 2 + 1  # type: ignore[no-any-return]


def in_batches(pixels: Tensor, patches: int, size: int) -> Iterator[Images]:
    for some in pixels.split(size):
        yield Images(some, torch.ones(len(some), patches, dtype=torch.bool))


def pixels_digest(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.contiguous().numpy().data).hexdigest()


def processor_digest(processor: Any) -> str:
    """What an image processor does, as SHA-256 of its settings."""
    return hashlib.sha256(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode()).hexdigest()


def calibrate_images(folder: Path, config: Any, processors: Mapping[str, Any], tokens: int) -> ImageCalibration:
    """Images until there are enough patches; the processors of all models must give equal pixels.

    Args:
        folder: of the images.
        config: of the models.
        processors: by name of the model, the anchor's first.
        tokens: how many patches to use at most, at least one image.

    Raises:
        CalibrationError: if there are no images, one cannot be read, or the processors differ.
    """
    paths = spread(image_files(folder), tokens // patches_of(config))
    (anchor, first), *others = processors.items()
    pixels = read_pixels(paths, first, config)
    for name, processor in others:
        if not torch.equal(pixels, read_pixels(paths, processor, config)):
            raise CalibrationError(
                f"calibration {folder}",
                f"the image processors of {anchor} and {name} turn its images into different numbers",
                "Activations can be compared for equal inputs only: use objective: weights",
            )
    return ImageCalibration(pixels, patches_of(config))


def prepare_images(folder: Path, processor: Any, config: Any, how: How) -> Prepared:
    """
    Raises:
        CalibrationError: if the folder cannot be used, or has no labels where they are needed.
    """
    patches = patches_of(config)
    paths = spread(image_files(folder), how.tokens // patches)
    wanted = how.objective is Objective.label
    labels = labels_of(folder, paths, how.labels) if wanted else None
    pixels = read_pixels(paths, processor, config)
    batches = tuple(in_batches(pixels, patches, 1 if how.alone else max(1, BATCH_TOKENS // patches)))
    targets: Sequence[Tensor | None] = [None] * len(batches)
    if labels is not None:
        targets = torch.tensor(labels).split([len(batch.ids) for batch in batches])
    said = hashlib.sha256(f"{pixels_digest(pixels)} {labels}".encode()).hexdigest()
    return Prepared(Samples(batches, tuple(targets)), len(pixels) * patches, len(pixels), said)


def image_files(folder: Path) -> list[Path]:
    """The images below a folder, in the order of their names.

    Raises:
        CalibrationError: if there is none.
    """
    if not folder.is_dir():
        raise CalibrationError(
            f"calibration {folder}", "it is not a folder, and the model reads images", "Name a folder of images"
        )
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise CalibrationError(
            f"calibration {folder}", "it holds no images", f"Put images there ({', '.join(sorted(SUFFIXES))})"
        )
    return found


def spread(paths: Sequence[Path], most: int) -> list[Path]:
    """At most so many, and at least one, evenly over them all: folders of labels lie one after another."""
    count = min(len(paths), max(1, most))
    return [paths[i * len(paths) // count] for i in range(count)]


def labels_of(folder: Path, paths: Sequence[Path], known: Mapping[str, int]) -> list[int]:
    """The label of each image: what ``labels.jsonl`` says of it, or the name of the folder that it lies in.

    Raises:
        CalibrationError: if an image has none.
    """
    table = _table(folder / LABELS) if (folder / LABELS).exists() else None
    found = []
    for path in paths:
        name, where = path.relative_to(folder).as_posix(), f"image {path}"
        if table is not None and name not in table:
            raise CalibrationError(where, f"{LABELS} has no label of it", _FORM)
        if table is None and path.parent == folder:
            raise CalibrationError(
                where, "it has no label", f"Put it into a folder of its label's name, or write {LABELS}"
            )
        found.append(label_id(path.parent.name if table is None else table[name], known, where))
    return found


def _table(path: Path) -> dict[str, Any]:
    table = {}
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
        if line.strip():
            try:
                entry = json.loads(line)
                table[entry["file"]] = entry["label"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CalibrationError(f"calibration {path}, line {number}", "it is of another form", _FORM) from error
    return table


def read_pixels(paths: Sequence[Path], processor: Any, config: Any) -> Tensor:
    """[images, channels, height, width] in float32.

    Raises:
        CalibrationError: if an image cannot be read, pillow is missing, or the processor gives another size.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError(
            "calibration", "images need pillow, which is not installed", "pip install pillow"
        ) from error
    mode = "L" if config.num_channels == 1 else "RGB"
    found = []
    for path in paths:
        try:
            with Image.open(path) as image:
                pixels = processor(images=[image.convert(mode)], return_tensors="pt")["pixel_values"]
        except Exception as error:  # pillow and the processors raise what they like
            raise CalibrationError(
                f"image {path}", f"it cannot be read ({error})", "Remove it, or save it again"
            ) from error
        expected = (1, config.num_channels, config.image_size, config.image_size)
        if tuple(pixels.shape) != expected:
            raise CalibrationError(
                f"image {path}",
                f"the image processor gives {tuple(pixels.shape)}, and the model reads {expected}",
                "Check its preprocessor_config.json",
            )
        found.append(pixels.float())
    return torch.cat(found)
