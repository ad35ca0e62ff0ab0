"""Checkpoints of random weights, drawn on the device and written a layer at a time."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from checkpoints import Recipe, Shape, foreign, weights

INDEX = "model.safetensors.index.json"


def write(folder: Path, shape: Shape, recipe: Recipe, device: torch.device) -> Path:
    """A checkpoint in shards of a layer each; one that is there already is kept."""
    if (folder / INDEX).exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shape.config().save_pretrained(folder)
    where: dict[str, str] = {}
    for number, shard in enumerate(_shards(shape, recipe, device)):
        file = f"model-{number:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}), "utf-8")
    return folder


def size(shape: Shape) -> int:
    """Bytes of a checkpoint."""
    attention = 2 * shape.hidden**2 * (1 + shape.kv_heads / shape.heads)
    layer = attention + 3 * shape.hidden * shape.neurons
    return int(2 * (shape.layers * layer + shape.vocabulary * shape.hidden))


def _shards(shape: Shape, recipe: Recipe, device: torch.device) -> Iterator[dict[str, Tensor]]:
    config = shape.config()
    with torch.device("meta"):
        sizes = {name: x.shape for name, x in LlamaForCausalLM(config).state_dict().items() if name != "lm_head.weight"}
    finish = foreign(config, recipe.seed) if recipe.foreign else lambda _, x: x.bfloat16()
    for _, names in groupby(sizes, lambda name: name.split(".layers.")[-1].split(".")[0]):
        drawn = {name: finish(name, weights(recipe, name, sizes[name], device)) for name in names}
        yield {name: x.cpu().contiguous() for name, x in drawn.items()}
