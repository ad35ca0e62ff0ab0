"""`make bench-stream`: what `residual: rotation` costs from weights, next to a plain merge, and memory against depth.

    python tests/benchmarks/stream_cost.py [--hidden 1024] [--depth 4] [--runs 3] [--layers 4 8 16]

Llama shapes in bfloat16 with a head of their own; random weights. Time: the search for the stream's element and a plain
`linear` merge of the same two files take turns in this process. A round ends where the next one reads its first layer.
Memory: merges through `mergekit-yaml`, each a process of its own; pages of the mapped input files do not count.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from checkpoints import BASE, Recipe, weights
from measure import merge
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from run import machine
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.stream import layer_scope, outside_scope
from mergekit_symalign.planting import random_elements, random_stream
from mergekit_symalign.symmetry.residual.alternate import align_stream
from mergekit_symalign.symmetry.residual.kinds import ResidualKind
from mergekit_symalign.symmetry.residual.move import move_scope
from mergekit_symalign.symmetry.residual.scope import Scope, norms_of

MIB = 1 << 20
KIND = ResidualKind.rotation
Parts = list[dict[str, Tensor]]  # what lies outside the layers, then every layer


@dataclass(frozen=True)
class Seconds:
    """Wall and CPU time."""

    wall: float
    cpu: float

    @staticmethod
    def now() -> Seconds:
        return Seconds(time.perf_counter(), time.process_time())

    def since(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)


@dataclass(frozen=True)
class Run:
    """One plain merge, and the search that followed it.

    Attributes:
        plain: of the merge.
        start: of the first reading of embeddings and head, and the element that they give.
        rounds: of each round.
    """

    plain: Seconds
    start: Seconds
    rounds: Sequence[Seconds]


def shape(hidden: int, layers: int, vocabulary: int) -> LlamaConfig:
    """A Llama of this width: four neurons for each coordinate, heads of 64, a KV head for every four of them."""
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256, vocab_size=vocabulary, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def random_state(config: LlamaConfig, recipe: Recipe) -> dict[str, Tensor]:
    with torch.device("meta"):
        sizes = {name: x.shape for name, x in LlamaForCausalLM(config).state_dict().items()}
    return {name: weights(recipe, name, size).bfloat16() for name, size in sizes.items()}


def split(layout: ModelLayout, state: Mapping[str, Tensor]) -> tuple[list[Scope], Parts]:
    """Scopes of a whole model, and its tensors."""
    claims = {name: claim for name in state if (claim := layout.claim(name)) is not None}
    parts = [{name: state[name] for name, claim in claims.items() if claim.layer is None}]
    for layer in range(layout.layers):
        parts.append({claim.part: state[name] for name, claim in claims.items() if claim.layer == layer})
    scopes = [layer_scope(layout, layer, list(state)) for layer in range(layout.layers)]
    return [outside_scope(layout, list(parts[0])), *scopes], parts


def twin_of(layout: ModelLayout, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same model in other coordinates of its stream and of all blocks."""
    scopes, parts = split(layout, state)
    planted, stream = random_elements(layout, 2), random_stream(KIND, layout.geometry.hidden, 1)
    result = {}
    for i, (scope, x) in enumerate(zip(scopes, parts, strict=True)):
        blocks = {kind.value: g for (layer, kind), g in planted.items() if layer == i - 1}
        moved = move_scope(scope, x, KIND, stream, blocks, norms_of(scope, x))
        names = {part: part if i == 0 else layout.name(i - 1, part) for part in moved}
        result.update({names[part]: y.bfloat16().contiguous() for part, y in moved.items()})
    return result


def write(folder: Path, config: LlamaConfig, state: dict[str, Tensor]) -> str:
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def write_models(folder: Path, config: LlamaConfig) -> dict[str, str]:
    """The anchor, a twin of a sibling (10 % noise) in other coordinates, and a model that is not related."""
    layout = resolve(config, model="benchmark")
    makers: dict[str, Callable[[], dict[str, Tensor]]] = {
        "anchor": lambda: random_state(config, BASE),
        "twin": lambda: twin_of(layout, random_state(config, Recipe(1, 0.1))),
        "unrelated": lambda: random_state(config, Recipe(11)),
    }
    return {name: write(folder / name, config, make()) for name, make in makers.items()}


def config_of(method: str, anchor: str, model: str, **parameters: Any) -> dict[str, Any]:
    models = [{"model": path, "parameters": {"weight": 0.5}} for path in (anchor, model)]
    return {"merge_method": method, "models": models, "dtype": "bfloat16", "parameters": parameters} | (
        {} if method == "linear" else {"base_model": anchor}
    )


def plain_merge(anchor: str, model: str, out: Path) -> Seconds:
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    config = MergeConfiguration.model_validate(config_of("linear", anchor, model))
    began = Seconds.now()
    run_merge(config, str(out), options)
    return Seconds.now().since(began)


@torch.inference_mode()
def search(config: LlamaConfig, anchor: str, model: str, rounds: int) -> tuple[Seconds, list[Seconds]]:
    """The first reading, and each round."""
    layout = resolve(config, model="benchmark")
    (scopes, a), (_, b) = (split(layout, load_file(Path(path) / "model.safetensors")) for path in (anchor, model))
    marks = [Seconds.now()]

    def read(i: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if i == 1:
            marks.append(Seconds.now())
        return a[i], b[i]

    align_stream(scopes, read, KIND, rounds)
    marks.append(Seconds.now())
    start, *found = (later.since(earlier) for earlier, later in itertools.pairwise(marks))
    return start, found


def timed(args: argparse.Namespace) -> None:
    config = shape(args.hidden, args.depth, args.vocabulary)
    with tempfile.TemporaryDirectory() as name:
        paths = write_models(Path(name), config)
        for case in ("twin", "unrelated"):
            runs = []
            for i in range(args.runs):
                plain = plain_merge(paths["anchor"], paths[case], Path(name) / f"out-{case}-{i}")
                runs.append(Run(plain, *search(config, paths["anchor"], paths[case], args.rounds)))
            for field in ("wall", "cpu"):
                print(f"| {case}, {field} | {' | '.join(_cells(runs, field))} |", flush=True)


def _cells(runs: Sequence[Run], field: str) -> list[str]:
    """Medians: seconds of the plain merge, of the start and of a round, and the ratio of a round to the merge."""
    plain, start = ([getattr(getattr(run, name), field) for run in runs] for name in ("plain", "start"))
    of_rounds = [median(getattr(x, field) for x in run.rounds) for run in runs]
    ratio = median(r / p for r, p in zip(of_rounds, plain, strict=True))
    return [f"{median(plain):.2f}", f"{median(start):.2f}", f"{median(of_rounds):.2f}", f"{ratio:.2f}"]


def memory(args: argparse.Namespace) -> None:
    for layers in args.layers:
        config = shape(args.hidden, layers, args.vocabulary)
        with tempfile.TemporaryDirectory() as name:
            paths = write_models(Path(name), config)
            cells = []
            for method, parameters in (
                ("linear", {}),
                ("aligned_linear", {"residual": "rotation", "residual_rounds": 1}),
            ):
                merged = config_of(method, paths["anchor"], paths["twin"], **parameters)
                cost = merge(merged, Path(name) / "out", "--out-shard-size", "50M")
                cells.append(f"{cost.peak_own / MIB:.0f}")
        print(f"| {layers} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 8, 16])
    args = parser.parse_args()
    print(f"{machine()}; hidden {args.hidden}, {args.depth} layers; medians of {args.runs}\n")
    print("| model, seconds | plain merge | start | one round | round / plain merge |\n|---|---:|---:|---:|---:|")
    timed(args)
    if args.layers:
        print("\n| layers | plain, anonymous MiB | residual: rotation |\n|---:|---:|---:|", flush=True)
        memory(args)


if __name__ == "__main__":
    main()
