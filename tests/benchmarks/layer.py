"""One MLP layer alone: the certificate against the full product and the Hungarian algorithm."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import torch
from checkpoints import BASE, LLAMA_8B_LAYER, SMALL, Recipe, Shape, weights
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergekit_symalign.symmetry.neurons.costs import NeuronPairs
from mergekit_symalign.symmetry.neurons.match import Assignment, best_permutation
from mergekit_symalign.symmetry.options import NeuronScale


@dataclass(frozen=True)
class LayerResult:
    """Seconds of both ways, the route of the certificate, and whether the permutations are the same."""

    noise: float
    certificate: float
    product: float
    hungarian: float
    routes: dict[str, int]
    same: bool


def layer(shape: Shape, noise: float) -> LayerResult:
    """A sibling's MLP with permuted neurons, bfloat16."""
    order = torch.randperm(shape.neurons, generator=torch.Generator().manual_seed(0))
    sides = [_rows(shape, BASE), [x[order] for x in _rows(shape, Recipe(1, noise))]]
    sides = [[gate, up, down.mT.contiguous().mT] for gate, up, down in sides]  # stored as [hidden, neurons]
    gate, up, down = zip(*sides, strict=True)
    pairs = NeuronPairs([gate], [up], [down])
    start = time.perf_counter()
    found: Assignment = best_permutation(pairs, scale=NeuronScale.none)
    certificate = time.perf_counter() - start
    start = time.perf_counter()
    score = sum(a.float() @ b.float().T for a, b in zip(*sides, strict=True))
    product = time.perf_counter() - start
    start = time.perf_counter()
    _, reference = linear_sum_assignment(score.numpy(), maximize=True)
    hungarian = time.perf_counter() - start
    same = bool((found.index == torch.from_numpy(reference)).all())
    return LayerResult(noise, certificate, product, hungarian, found.routes, same)


def _rows(shape: Shape, recipe: Recipe) -> list[Tensor]:
    size = torch.Size((shape.neurons, shape.hidden))
    return [weights(recipe, f"layer.{name}", size).bfloat16() for name in ("gate", "up", "down")]


def main(small: bool, noises: tuple[float, ...] = (0.05, 0.1, 0.3)) -> None:
    shape = SMALL if small else LLAMA_8B_LAYER
    print(
        f"\nOne MLP layer, {shape.neurons} neurons, hidden {shape.hidden}, {torch.get_num_threads()} threads, seconds\n"
    )
    print("| noise | certificate | full product | Hungarian | times faster | same permutation | settled by |")
    print("|---|---:|---:|---:|---:|---|---|")
    for noise in noises:
        r = layer(shape, noise)
        faster = (r.product + r.hungarian) / r.certificate
        route = ", ".join(f"{name.removeprefix('neurons_')} {count}" for name, count in r.routes.items())
        cells = (f"{r.noise:.0%}", f"{r.certificate:.2f}", f"{r.product:.1f}", f"{r.hungarian:.1f}", f"{faster:.0f}")
        print(f"| {' | '.join(cells)} | {'yes' if r.same else 'NO'} | {route} |", flush=True)
        if not r.same:
            raise SystemExit("the certificate and the Hungarian algorithm disagree")


if __name__ == "__main__":
    with torch.inference_mode():
        main("--small" in sys.argv)
