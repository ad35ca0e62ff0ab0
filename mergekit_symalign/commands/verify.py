"""``mergekit-symalign verify``: does an aligned checkpoint compute what the original computes?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_symalign.activations.agreement import Agreement, hidden_deviation
from mergekit_symalign.activations.runner import Batch, Recorded
from mergekit_symalign.card import stream_moved
from mergekit_symalign.commands.common import progress
from mergekit_symalign.commands.inputs import inputs_for
from mergekit_symalign.commands.model_options import model_options
from mergekit_symalign.commands.models import StoredModel, require_comparable, use_cache_of
from mergekit_symalign.commands.outcome import Command
from mergekit_symalign.errors import CalibrationError
from mergekit_symalign.graph.merge_report import REPORT

DEFAULT_TOKENS = 2048
TOLERANCE = 1e-3
ROUNDINGS = (
    20  # of the aligned weights; measured on SmolLM2-135M in bfloat16: the exact alignment is off by 6, full by 480
)


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        agreement: of the outputs.
        layers: how many the models have.
        left: the first layer after which the hidden states differ by more than the tolerance; None if there is none.
        left_by: their deviation there.
        tolerance: what was asked for.
        stream: what the report beside the aligned model says of its residual stream; None if it does not.
    """

    agreement: Agreement
    layers: int
    left: int | None
    left_by: float
    tolerance: float
    stream: str | None = None

    @property
    def deviation(self) -> float:
        """Largest deviation of the outputs in standard deviations of the original's (`Agreement.relative`)."""
        return self.agreement.relative(self.agreement.largest)

    @property
    def same(self) -> bool:
        return self.deviation <= self.tolerance


@click.command(cls=Command)
@click.argument("original")
@click.argument("aligned")
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="A .jsonl or .txt file; default: a set in the package."
)
@click.option("--random", is_flag=True, help="Random tokens (images for vision models) instead of prompts.")
@click.option(
    "--tokens", type=click.IntRange(1), default=DEFAULT_TOKENS, show_default=True, help="Run this many at most."
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    help="Largest allowed deviation: of logits in standard deviations, of hidden states relative to their size. "
    "Default: 0.001; 0.02 for weights in float16, 0.16 in bfloat16.",
)
@model_options
@click.option("--quiet", is_flag=True, help="Only the verdict, and no progress bars.")
def verify(
    original: str,
    aligned: str,
    prompts: Path | None,
    random: bool,
    tokens: int,
    tolerance: float | None,
    quiet: bool,
    models: dict[str, Any],
) -> None:
    """Check that ALIGNED computes what ORIGINAL computes; exit code 1 if it does not.

    Both run layer by layer in float32, so neither is ever in memory as a whole.

    \b
    Example: mergekit-symalign verify ./tuned ./tuned-in-anchor-coordinates
    """
    if random and prompts is not None:
        raise click.UsageError("give --random or --prompts, not both")
    options = MergeOptions(**models, quiet=quiet)
    verdict = run_verify(original, aligned, options, prompts=prompts, random=random, tokens=tokens, bound=tolerance)
    click.echo(verdict_line(verdict) if quiet else report(verdict))
    if not verdict.same:
        raise click.exceptions.Exit(1)


def run_verify(
    original: str,
    aligned: str,
    options: MergeOptions,
    *,
    prompts: Path | None = None,
    random: bool = False,
    tokens: int = DEFAULT_TOKENS,
    bound: float | None = None,
) -> Verdict:
    """Compare two checkpoints of one architecture, layer by layer and after the last layer.

    Raises:
        ModelError, ArchitectureError, CheckpointError: if a model cannot be run.
        GeometryError: if the two are of different architectures or sizes.
        CalibrationError: if there is nothing to run them on.
    """
    use_cache_of(options)
    models = (StoredModel.open(original, options), StoredModel.open(aligned, options))
    require_comparable(*models)
    bound = _tolerance(models[1]) if bound is None else bound
    batches = inputs_for(models[0], prompts, tokens, options, random=random)
    recorded = [_record(model, batches) for model in models]
    hidden = [[r.hidden for r in of_one] for of_one in recorded]
    left, left_by = None, 0.0
    for layer in progress(range(models[0].layers), "Layers", quiet=options.quiet):
        hidden = [_run(layer, *one) for one in zip(models, hidden, recorded, strict=True)]
        off = max(hidden_deviation(a[b.valid], o[b.valid]) for a, o, b in zip(*hidden, batches, strict=True))
        if left is None and off > bound:
            left, left_by = layer, off
    agreement = _agreement(models, hidden, batches, quiet=options.quiet)
    if agreement.tokens == 0:
        raise CalibrationError("prompts", "they leave the models nothing to compare", "Give longer prompts")
    return Verdict(agreement, models[0].layers, left, left_by, bound, _stream_moved(aligned))


def _stream_moved(aligned: str) -> str | None:
    """What the report of the merge that wrote a local model says of its residual stream."""
    try:
        report = json.loads((Path(aligned) / REPORT).read_text("utf-8"))
        streams = [entry["residual"] for entry in report["models"].values() if "residual" in entry]
        return "; ".join(map(stream_moved, streams)) or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _tolerance(aligned: StoredModel) -> float:
    """What an exact alignment may be off by: its weights were rounded to the dtype they are stored in."""
    return max(TOLERANCE, ROUNDINGS * torch.finfo(aligned.stored_dtype()).eps)


def _record(model: StoredModel, batches: list[Batch]) -> list[Recorded]:
    weights = model.outside()
    return [model.runner.record(batch, weights) for batch in batches]


def _run(layer: int, model: StoredModel, hidden: list[Tensor], recorded: list[Recorded]) -> list[Tensor]:
    weights = model.layer(layer)
    return [model.runner.run(layer, weights, x, r, frozenset())[0] for x, r in zip(hidden, recorded, strict=True)]


def _agreement(
    models: tuple[StoredModel, StoredModel], hidden: list[list[Tensor]], batches: list[Batch], *, quiet: bool
) -> Agreement:
    """Norms and head of both models, one prompt at a time: logits are larger than anything else."""
    weights = [model.outside() for model in models]
    result = Agreement(distribution=False)
    total = sum(len(batch.valid) for batch in batches)
    rows = ((i, j) for i, batch in enumerate(batches) for j in range(len(batch.valid)))
    for i, j in progress(rows, "Logits", quiet=quiet, total=total):
        row = type(batches[i])(batches[i].ids[j : j + 1], batches[i].valid[j : j + 1])
        sides = [
            model.runner.finish(row, w, x[i][j : j + 1]) for model, w, x in zip(models, weights, hidden, strict=True)
        ]
        result.distribution = "logits" in sides[0]
        result.add(*(_by_token(side[0], row) for side in sides))
    return result


def _by_token(out: Tensor, row: Batch) -> Tensor:
    """[tokens, outputs] without padding; a classifier has one output row for the whole prompt."""
    each_token = out.ndim == 3 and out.shape[:2] == row.valid.shape
    return out[row.valid] if each_token else out.flatten(0, -2)


def report(verdict: Verdict) -> str:
    """The table that is printed."""
    return "\n".join([*_lines(verdict), "", verdict_line(verdict)])


def _lines(verdict: Verdict) -> Iterator[str]:
    a = verdict.agreement
    what = "logits" if a.distribution else "last hidden states"
    yield f"{what:<22}{'absolute':>12}{'in std':>12}"
    for name, value in (("  largest deviation", a.largest), ("  median deviation", a.median)):
        yield f"{name:<22}{value:>12.2e}{a.relative(value):>12.2e}"
    if a.distribution:
        yield f"{'KL divergence':<22}{a.divergence / a.tokens:>12.2e} nats per token"
        yield f"{'top-1 agreement':<22}{a.same_first / a.tokens:>12.2%} of {a.tokens} tokens"
    inside = f"within {verdict.tolerance:.2g} after all {verdict.layers} layers"
    gone = f"beyond {verdict.tolerance:.2g} from layer {verdict.left} on ({verdict.left_by:.2e})"
    if verdict.left is not None and verdict.same:
        gone = f"in other coordinates from layer {verdict.left} on, with the same outputs"
    yield f"{'hidden states':<24}{inside if verdict.left is None else gone}"
    if verdict.stream is not None:
        yield f"{'residual stream':<24}moved, as its report says: {verdict.stream}"


def verdict_line(verdict: Verdict) -> str:
    compared = f"largest deviation {verdict.deviation:.1e} std, tolerance {verdict.tolerance:.2g}"
    return f"The same function: {compared}." if verdict.same else f"NOT the same function: {compared}."
