"""``mergekit-symalign barrier``: the loss along the straight line between two models, as they are and aligned."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from mergekit.common import ModelReference
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from torch.nn.functional import cross_entropy

from mergekit_symalign.activations.calibration import Calibration, calibrate
from mergekit_symalign.activations.objectives import Objective
from mergekit_symalign.activations.runner import Batch
from mergekit_symalign.card import stream_moved
from mergekit_symalign.commands.alignment import alignment_config, alignment_options
from mergekit_symalign.commands.common import progress
from mergekit_symalign.commands.model_options import model_options
from mergekit_symalign.commands.models import StoredModel, require_comparable, use_cache_of
from mergekit_symalign.commands.names import short_names
from mergekit_symalign.commands.outcome import Command, bars
from mergekit_symalign.commands.plots import require_plot
from mergekit_symalign.commands.whole_models import has_no_loss, load_whole
from mergekit_symalign.errors import CalibrationError
from mergekit_symalign.families.function import config_differences
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.graph.merge_report import REPORT
from mergekit_symalign.graph.readers import require_embedded, tokenizer_of
from mergekit_symalign.graph.untie import UNTIE
from mergekit_symalign.whole_file import require_writable, written_whole

DEFAULT_TOKENS = 8192
NAMES = ("as it is", "aligned")  # of the second model


@dataclass(frozen=True)
class Curve:
    """Losses along a line.

    Attributes:
        name: of the second model.
        at: share of the second model at each point, from 0 to 1.
        losses: nats per token.
        stream: what the alignment did to the second model's residual stream, as reports say it; None for nothing.
    """

    name: str
    at: tuple[float, ...]
    losses: tuple[float, ...]
    stream: Mapping[str, Any] | None = None

    @property
    def height(self) -> float:
        """Largest rise above the straight line between the losses at both ends (0 if there is none)."""
        first, last = self.losses[0], self.losses[-1]
        return max(loss - (1 - t) * first - t * last for t, loss in zip(self.at, self.losses, strict=True))


@click.command(cls=Command)
@click.argument("model_a")
@click.argument("model_b")
@click.option("--text", type=click.Path(path_type=Path), required=True, help="A .txt file (a text a line) or .jsonl.")
@click.option(
    "--points", type=click.IntRange(2), default=11, show_default=True, help="Points on the line, both ends included."
)
@click.option(
    "--tokens",
    type=click.IntRange(2),
    default=DEFAULT_TOKENS,
    show_default=True,
    help="Use this many tokens of the text at most.",
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="A .png, .svg or .pdf file to write.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the numbers to this file."
)
@alignment_options
@model_options
@click.option("--quiet", is_flag=True, help="Only the table, and no progress bars.")
def barrier(
    model_a: str,
    model_b: str,
    text: Path,
    points: int,
    tokens: int,
    plot: Path | None,
    json_file: Path | None,
    quiet: bool,
    models: dict[str, Any],
    **parameters: Any,
) -> None:
    """Measure the loss on the line from MODEL_A to MODEL_B, and to MODEL_B aligned to MODEL_A.

    Needs memory for four copies of a model in float32.

    \b
    Example: mergekit-symalign barrier ./base ./tuned --text texts.txt --plot barrier.png
    """
    options = MergeOptions(**models, quiet=not bars(quiet), copy_tokenizer=False, write_model_card=False)
    if plot is not None:
        require_plot(plot)
    if json_file is not None:
        require_writable(json_file, "--json", folder_is_made=False)
    curves = run_barrier(model_a, model_b, text, options, points=points, tokens=tokens, parameters=parameters)
    click.echo("\n".join([*config_note(model_a, model_b, options), table(curves), *stream_note(curves)]))
    if plot is not None:
        draw(curves, plot, short_names((model_a, model_b)))
        click.echo(f"wrote {plot}")
    if json_file is not None:
        with written_whole(json_file) as scratch:
            scratch.write_text(json.dumps(numbers(curves, (model_a, model_b), text), indent=1) + "\n", "utf-8")


def run_barrier(
    model_a: str,
    model_b: str,
    text: Path,
    options: MergeOptions,
    *,
    points: int = 11,
    tokens: int = DEFAULT_TOKENS,
    parameters: dict[str, Any] | None = None,
) -> tuple[Curve, Curve]:
    """The losses without and with alignment; everything is checked before the models are loaded.

    Raises:
        ModelError, ArchitectureError, CheckpointError: if a model cannot be run, or predicts no next token.
        GeometryError: if the two are of different architectures or sizes.
        CalibrationError: if the text cannot be read, or the tokenizers differ on it.
    """
    use_cache_of(options)
    a, b = StoredModel.open(model_a, options), StoredModel.open(model_b, options)
    require_comparable(a, b)
    for model in (a, b):
        if model.objective() is not Objective.next_token:
            raise has_no_loss(model.name, type(model.runner.model).__name__)
    batches = _batches(a, b, text, tokens, options)
    with tempfile.TemporaryDirectory(prefix="symalign-barrier-", ignore_cleanup_errors=True) as scratch:
        crimes = options.model_copy(update={"allow_crimes": True})  # Llama and Mistral: one family, so none to us
        asked = parameters or {}
        run_merge(alignment_config(model_a, model_b, asked, dtype="float32"), scratch, crimes)
        aligned, stream = ModelReference.parse(scratch), _stream_of(Path(scratch))
        start, *ends = (
            _in_float32(weights, of.checkpoint.model, options)
            for weights, of in ((a.checkpoint.model, a), (b.checkpoint.model, b), (aligned, b))
        )
    between = _in_float32(a.checkpoint.model, a.checkpoint.model, options)
    if asked.get(UNTIE):
        for model in (start, *ends, between):
            _give_own_head(model)
    shares = tuple(i / (points - 1) for i in range(points))
    steps = [(name, end, t) for name, end in zip(NAMES, ends, strict=True) for t in shares]
    losses: dict[str, list[float]] = {name: [] for name in NAMES}
    for name, end, t in progress(steps, "Losses", quiet=options.quiet):
        losses[name].append(_loss(_at(between, start, end, t), batches))
    first, second = (Curve(name, shares, tuple(found)) for name, found in losses.items())
    return first, replace(second, stream=stream)


def stream_note(curves: Sequence[Curve]) -> list[str]:
    """What was done to the residual stream of the aligned model, if anything, and what that was worth."""
    as_it_is, aligned = curves
    if aligned.stream is None:
        return []
    change = f"barrier {as_it_is.height:.4f} without alignment, {aligned.height:.4f} with it"
    lower = "lower" if aligned.height < as_it_is.height else "not lower: do without it"
    return [f"residual stream: {stream_moved(aligned.stream)}", f"{change} ({lower})"]


def numbers(curves: Sequence[Curve], models: tuple[str, str], text: Path) -> dict[str, Any]:
    """The same for programs."""
    heights = {curve.name: curve.height for curve in curves}
    loss = {"text": text.name, "barrier": heights}
    stream = curves[-1].stream
    return {
        "models": list(models),
        "at": list(curves[0].at),
        "losses": {curve.name: list(curve.losses) for curve in curves},
        "barrier": heights,
        **({} if stream is None else {"residual": {**stream, "loss": loss}}),
    }


def _stream_of(folder: Path) -> Mapping[str, Any] | None:
    """What the report of a merge of one model says of its residual stream."""
    report = json.loads((folder / REPORT).read_text("utf-8"))
    return next((entry["residual"] for entry in report["models"].values() if "residual" in entry), None)


def config_note(model_a: str, model_b: str, options: MergeOptions) -> list[str]:
    """Which config every point runs with, where the two are not the same function of the weights."""
    one, other = (
        ModelReference.parse(m).config(trust_remote_code=options.trust_remote_code) for m in (model_a, model_b)
    )
    found = config_differences(one, other, resolve(one, model=model_a))
    if not found:
        return []
    return [
        "The configs differ: each end runs with its own, the points between with A's.",
        *(f"  {key} is {a!r} in A and {b!r} in B" for key, (a, b) in found.items()),
    ]


def _batches(a: StoredModel, b: StoredModel, text: Path, tokens: int, options: MergeOptions) -> list[Batch]:
    tokenizers = [tokenizer_of(model.checkpoint.model, options) for model in (a, b)]
    found: Calibration = calibrate(text, tokenizers[0], {b.name: tokenizers[1]}, tokens=tokens)
    if all(len(sequence) < 2 for sequence in found.sequences):
        raise CalibrationError(
            f"--text {text}",
            "every text is shorter than two tokens, so there is no next token to predict",
            "Give longer texts",
        )
    for model in (a, b):
        require_embedded(found, model.checkpoint)
    return [Batch(x.ids.to(a.device), x.valid.to(a.device)) for x in found.batches()]


def _in_float32(weights: ModelReference, of: ModelReference, options: MergeOptions) -> Any:
    """The weights of one model with the config of another (or of the same); other attention may lack soft caps."""
    return load_whole(weights, options, torch.float32, config_of=of, attention="eager")


def _give_own_head(model: Any) -> None:
    """Part a head from the embedding that it is."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)


@torch.inference_mode()
def _at(between: Any, start: Any, end: Any, t: float) -> Any:
    """The model at ``t`` between two others: each end itself, and else ``between`` with weights of both.

    A tensor that is tied to another one in ``between`` follows that one.
    """
    if t in (0, 1):
        return end if t else start
    first, last, done = start.state_dict(), end.state_dict(), set()
    for name, x in between.state_dict().items():
        if x.is_floating_point() and x.data_ptr() not in done:
            done.add(x.data_ptr())
            torch.lerp(first[name], last[name], t, out=x)
    return between


@torch.inference_mode()
def _loss(model: Any, batches: Sequence[Batch]) -> float:
    """Mean cross entropy of the next token, in nats; one prompt at a time, as logits are large."""
    total, count = 0.0, 0
    for batch in batches:
        for ids, valid in zip(batch.ids, batch.valid, strict=True):
            prompt = ids[valid].unsqueeze(0)
            logits = model(prompt).logits.squeeze(0)
            following = prompt.squeeze(0)
            total += float(cross_entropy(logits[:-1].float(), following[1:], reduction="sum"))
            count += len(following) - 1
    return total / count


def table(curves: Sequence[Curve]) -> str:
    """The losses, and how high the barriers are."""
    lines = [f"{'share of B':>10}" + "".join(f"{curve.name:>12}" for curve in curves)]
    for i, t in enumerate(curves[0].at):
        lines.append(f"{t:>10.3g}" + "".join(f"{curve.losses[i]:>12.4f}" for curve in curves))
    lines.append(f"{'barrier':>10}" + "".join(f"{curve.height:>12.4f}" for curve in curves))
    return "\n".join([*lines, "(nats per token; barrier: highest rise above the line between the ends)"])


def draw(curves: Sequence[Curve], path: Path, models: Sequence[str]) -> None:
    """One line for each curve, told apart without colours; ``models`` are the names of A and B."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.add_subplot()
    gray: dict[str, Any] = {"linestyle": "--", "marker": "s", "color": "0.45"}
    black: dict[str, Any] = {"linestyle": "-", "marker": "o", "color": "black"}
    for curve, style in zip(curves, (gray, black), strict=True):
        axes.plot(curve.at, curve.losses, label=f"B {curve.name}", markersize=4, **style)
    axes.set_xlabel("share of model B")
    axes.set_ylabel("loss, nats per token")
    title = f"Loss on the line from A to B\nA: {models[0]}\nB: {models[1]}"
    axes.set_title(title, fontsize=10, wrap=True, parse_math=False)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    with written_whole(path) as scratch:
        figure.savefig(scratch, dpi=150)
