"""Checkpoints for the benchmarks: Llama-shaped random weights, written once into a cache folder."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import random_elements, transform

STD = 0.02  # of every weight matrix
BASE_SEED = 0


@dataclass(frozen=True)
class Shape:
    """The size of a Llama model with tied embeddings."""

    hidden: int
    neurons: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.neurons,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=True,
            dtype="bfloat16",
            architectures=["LlamaForCausalLM"],
        )

    def scaled(self, up: int, down: int) -> Shape:
        """Of another width, with more or fewer heads of the same size."""
        sizes = ("hidden", "neurons", "heads", "kv_heads")
        return replace(self, **{name: getattr(self, name) * up // down for name in sizes})

    def with_layers(self, layers: int) -> Shape:
        return replace(self, layers=layers)


LLAMA_1B = Shape(hidden=2048, neurons=8192, layers=16, heads=32, kv_heads=8)
LLAMA_8B = Shape(hidden=4096, neurons=14336, layers=32, heads=32, kv_heads=8, vocabulary=128256)
LLAMA_70B = Shape(hidden=8192, neurons=28672, layers=80, heads=64, kv_heads=8, vocabulary=128256)
LLAMA_8B_LAYER = Shape(hidden=4096, neurons=14336, layers=1, heads=32, kv_heads=8, vocabulary=1000)
SMALL = Shape(hidden=256, neurons=768, layers=3, heads=8, kv_heads=4, vocabulary=1000)


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is made.

    Attributes:
        seed: of the base, for a model that is not a sibling; of the noise, for a sibling.
        noise: relative to the standard deviation of each tensor; None for a model of its own.
        foreign: then brought into foreign coordinates (every symmetry: neurons, heads, rotations, scales).
    """

    seed: int = BASE_SEED
    noise: float | None = None
    foreign: bool = False


BASE = Recipe()


def checkpoint(cache: Path, shape: Shape, recipe: Recipe) -> Path:
    """The folder of a checkpoint, written if it is not there yet."""
    name = "-".join(f"{key}={value}" for key, value in (asdict(shape) | asdict(recipe)).items())
    folder = cache / f"{zlib.crc32(name.encode()):08x}-{'foreign' if recipe.foreign else recipe.noise or 'own'}"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write(folder, shape, recipe)
        (folder / "complete").write_text(name + "\n", "utf-8")
    return folder


def weights(recipe: Recipe, name: str, size: torch.Size, device: torch.device | None = None) -> Tensor:
    """One tensor of a recipe, float32, in the base's coordinates. Each device draws numbers of its own."""
    std, mean = (0.1, 1.0) if name.endswith("norm.weight") else (STD, 0.0)
    own = recipe.seed if recipe.noise is None else BASE_SEED
    x = mean + std * _normal(own, name, size, device)
    return x if recipe.noise is None else x + recipe.noise * std * _normal(recipe.seed, name, size, device)


def _write(folder: Path, shape: Shape, recipe: Recipe) -> None:
    config = shape.config()
    config.save_pretrained(folder)
    with torch.device("meta"):
        sizes = {name: x.shape for name, x in LlamaForCausalLM(config).state_dict().items() if name != "lm_head.weight"}
    finish = foreign(config, recipe.seed) if recipe.foreign else _as_it_is
    state = {name: finish(name, weights(recipe, name, size)) for name, size in sizes.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _as_it_is(name: str, x: Tensor) -> Tensor:
    return x.bfloat16()


def foreign(config: LlamaConfig, seed: int) -> Callable[[str, Tensor], Tensor]:
    """What brings a tensor, by its name, into foreign coordinates."""
    layout = resolve(config, model="benchmark")
    elements = random_elements(layout, seed)
    return lambda name, x: transform({name: x}, layout, elements)[name].bfloat16().contiguous()


def _normal(seed: int, name: str, size: torch.Size, device: torch.device | None) -> Tensor:
    # torch's generator takes 32 bits of a seed: seed and name have to be mixed within them
    generator = torch.Generator(device or "cpu").manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randn(size, generator=generator, device=device)


def load(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")
