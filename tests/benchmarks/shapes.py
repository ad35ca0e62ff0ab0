"""One layer of one model, alone: seconds to solve its MLP and its attention, for models of several sizes."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import click
import tables
import torch
from checkpoints import LLAMA_1B, LLAMA_8B, LLAMA_70B, SMALL, Recipe, Shape, foreign, weights
from results import machine, save
from transformers import LlamaForCausalLM

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.graph.solve import block_rows
from mergekit_symalign.symmetry.neurons.products import measured
from mergekit_symalign.symmetry.options import BlockShape, Sides, Symmetries
from mergekit_symalign.symmetry.solve import align_block
from mergekit_symalign.symmetry.threads import one_thread

RUNS = 3
KINDS = (BlockKind.mlp, BlockKind.attention)
CASES = {
    "sibling, 10 % noise": Recipe(1, 0.1),
    "the same, permuted, rotated, rescaled": Recipe(1, 0.1, foreign=True),
    "unrelated": Recipe(11),
}
LARGE = ("8B", "70B")  # unrelated models of these shapes take minutes for a layer


@click.command(help=__doc__)
@click.option("--small", is_flag=True, help="A tiny shape: checks that it runs, not how fast.")
@click.option("--out", type=Path, default=Path(".cache/benchmarks/results.json"), help="The file of results.")
def main(small: bool, out: Path) -> None:
    shapes = {"small": SMALL} if small else {"1B": LLAMA_1B, "8B": LLAMA_8B, "70B": LLAMA_70B}
    click.echo(f"\nOne layer of one model, {torch.get_num_threads()} threads, medians of {RUNS}\n")
    click.echo(tables.HEADS["layers"])
    for name, shape in shapes.items():
        for case, recipe in CASES.items():
            if name in LARGE and recipe.noise is None:
                continue
            with torch.inference_mode():
                seconds = layer(replace(shape, layers=1, vocabulary=64), recipe)
            times = {"mlp": seconds[BlockKind.mlp], "attention": seconds[BlockKind.attention]}
            line = {"name": f"{name}, {case}", "shape": name, "model": case, **times}
            save(out, {"machine": machine(), "layers": [line], "products": measured()})
            click.echo(tables.cells("layers", line))


def layer(shape: Shape, recipe: Recipe) -> dict[BlockKind, float]:
    """Seconds to align each block of a layer to the base's."""
    seconds = {}
    for kind in KINDS:
        sides, of_block = rows_of_layer(shape, recipe, kind)
        seconds[kind] = median(_seconds(sides, of_block) for _ in range(RUNS))
    return seconds


def rows_of_layer(
    shape: Shape, recipe: Recipe, kind: BlockKind, device: torch.device | None = None
) -> tuple[Sides, BlockShape]:
    """The rows of a block of the base and of a model, and its shape."""
    config = shape.config()
    layout = resolve(config, model="benchmark")
    with torch.device("meta"):
        sizes = {name: x.shape for name, x in LlamaForCausalLM(config).state_dict().items() if ".layers." in name}
    finish = foreign(config, recipe.seed) if recipe.foreign else lambda name, x: x.bfloat16()
    claims = {name: layout.claim(name) for name in sizes}
    own = {name: claim.spec for name, claim in claims.items() if claim and claim.spec.block is kind}
    axes = tuple(layout.axes(spec) for spec in own.values())
    anchor = block_rows(kind, axes, [weights(Recipe(), name, sizes[name], device).bfloat16() for name in own])
    model = block_rows(kind, axes, [finish(name, weights(recipe, name, sizes[name], device)) for name in own])
    sides: Sides = {axis: list(zip(rows, model[axis], strict=True)) for axis, rows in anchor.items()}
    return sides, layout.mlp_shape() if kind is BlockKind.mlp else layout.head_shape(0)


def _seconds(sides: Sides, shape: BlockShape) -> float:
    start = time.perf_counter()
    with one_thread():  # as the merge's own task does: the pieces share the threads
        align_block(sides, shape, Symmetries())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
