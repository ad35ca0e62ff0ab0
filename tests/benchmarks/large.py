"""`make bench-8b`: a merge of models with eight billion parameters, plainly and aligned, in fresh processes.

    python tests/benchmarks/large.py [--small] [--runs 1] [--cache FOLDER] [--out FILE]

A base and one sibling of Llama-3.1-8B's shape (random, bfloat16, in files of 5 GB) are written once: 32 GB. Each
merge writes 16 GB more, which are removed afterwards. The numbers go to standard output and to FILE.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from checkpoints import LLAMA_8B, SMALL, STD, Shape
from measure import merge
from results import machine, save, whole
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

SHARD = 5 * 10**9  # bytes
NOISE = 0.1  # of the sibling, relative to each matrix
_POOL = 1 << 27  # random numbers, of which every tensor takes a part that begins elsewhere
_SPARE = 2 * 10**9  # bytes of disk that stay free
_BYTES = 2  # of a number in bfloat16


@click.command(help=__doc__)
@click.option("--small", is_flag=True, help="Tiny models: checks that the benchmark runs, not how fast.")
@click.option("--runs", default=1, show_default=True, help="Runs of each merge, in turn.")
@click.option("--cache", type=Path, default=Path(".cache/benchmarks"), help="Where the checkpoints are kept.")
@click.option("--out", type=Path, default=Path(".cache/benchmarks/8b.json"), help="The file of results.")
def main(small: bool, runs: int, cache: Path, out: Path) -> None:
    shape, shard = (SMALL, 10**6) if small else (LLAMA_8B, SHARD)
    folders = [cache.resolve() / f"{shape.hidden}x{shape.layers}-{name}" for name in ("base", "sibling")]
    size = _BYTES * sum(x.numel() for x in _sizes(shape).values())
    _require_space(cache, size * (1 + sum(not _complete(folder) for folder in folders)))
    for folder, noise in zip(folders, (0.0, NOISE), strict=True):
        if not _complete(folder):
            _write(folder, shape, noise, shard)
    costs: dict[str, list[Any]] = {"plain": [], "aligned": []}
    for _ in range(runs):
        for way, method in (("plain", "task_arithmetic"), ("aligned", "aligned_task_arithmetic")):
            found = merge(_config(method, *folders), cache.resolve() / "out", "--out-shard-size", "5B")
            click.echo(f"{way}: {found.wall:.0f} s, {found.cpu:.0f} s of CPU, {found.peak_rss / 2**30:.1f} GiB")
            costs[way].append(found)
    line = whole("base and one sibling, 10 % noise", costs["plain"], costs["aligned"])
    save(out, {"machine": machine(), "shape": vars(shape), "bytes_of_a_model": size, "whole": [line]})
    click.echo(json.dumps(line, indent=1))


def _require_space(cache: Path, needed: int) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < needed + _SPARE:
        raise click.ClickException(
            f"{cache} has {free / 1e9:.0f} GB free, and this needs {(needed + _SPARE) / 1e9:.0f}. Name another folder "
            "with --cache."
        )


def _complete(folder: Path) -> bool:
    return (folder / "model.safetensors.index.json").exists()


def _sizes(shape: Shape) -> dict[str, torch.Size]:
    """Every tensor that is stored."""
    config = shape.config()
    config.tie_word_embeddings = False
    with torch.device("meta"):
        return {name: x.shape for name, x in LlamaForCausalLM(config).state_dict().items()}


def _write(folder: Path, shape: Shape, noise: float, shard: int) -> None:
    """A checkpoint in files of at most so many bytes; the index comes last."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = shape.config()
    config.tie_word_embeddings = False
    config.save_pretrained(folder)
    sizes = _sizes(shape)
    parts = list(_parts(sizes, shard))
    base, other = (torch.randn(_POOL, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    table = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        state = {name: _weights(name, sizes[name], base, other, noise) for name in names}
        save_file(state, folder / file, metadata={"format": "pt"})
        table |= dict.fromkeys(names, file)
    total = _BYTES * sum(x.numel() for x in sizes.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": table})
    (folder / "model.safetensors.index.json").write_text(text, "utf-8")


def _parts(sizes: dict[str, torch.Size], shard: int) -> Iterator[list[str]]:
    """Names of tensors that go into one file."""
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + _BYTES * size.numel() > shard:
            yield names
            names, held = [], 0
        names.append(name)
        held += _BYTES * size.numel()
    yield names


def _weights(name: str, size: torch.Size, base: Tensor, other: Tensor, noise: float) -> Tensor:
    """A tensor in bfloat16: its part of the pools, which goes on from the beginning where they end."""
    std, mean = (0.1, 1.0) if name.endswith("norm.weight") else (STD, 0.0)
    start = _hash(name) % _POOL
    x = torch.empty(size.numel(), dtype=torch.bfloat16)
    done = 0
    while done < len(x):
        at = (start + done) % _POOL
        part = slice(at, min(_POOL, at + len(x) - done))
        values = base[part] if noise == 0 else base[part] + noise * other[part]
        x[done : done + len(values)] = mean + std * values
        done += len(values)
    return x.reshape(size)


def _hash(name: str) -> int:
    """A number that is the same in every process."""
    return zlib.crc32(name.encode()) * 2654435761


def _config(method: str, base: Path, sibling: Path) -> dict[str, Any]:
    models = [{"model": str(sibling), "parameters": {"weight": 1.0}}]
    return {"merge_method": method, "base_model": str(base), "models": models, "dtype": "bfloat16"}


if __name__ == "__main__":
    main()
