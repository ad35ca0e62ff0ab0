"""``mergekit-symalign barrier``: the loss along the straight line between two models, as they are and aligned."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from mergekit.common import ModelReference
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.utils import logging as transformers_logging

from mergekit_symalign.activations.calibration import Calibration, calibrate
from mergekit_symalign.activations.runner import Batch
from mergekit_symalign.commands.alignment import alignment_config, alignment_options
from mergekit_symalign.commands.common import bars, progress, readable
from mergekit_symalign.commands.models import StoredModel, require_comparable, use_cache_of
from mergekit_symalign.errors import ArchitectureError, ConfigError
from mergekit_symalign.graph.streaming import require_embedded, tokenizer_of
from mergekit_symalign.whole_file import written_whole

DEFAULT_TOKENS = 8192
_FORMATS = (".png", ".svg", ".pdf")
State = dict[str, Tensor]


@dataclass(frozen=True)
class Curve:
    """Losses along a line.

    Attributes:
        name: of the second model.
        at: share of the second model at each point, from 0 to 1.
        losses: nats per token.
    """

    name: str
    at: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def height(self) -> float:
        """Largest rise above the straight line between the losses at both ends (0 if there is none)."""
        first, last = self.losses[0], self.losses[-1]
        return max(loss - (1 - t) * first - t * last for t, loss in zip(self.at, self.losses, strict=True))


@click.command()
@click.argument("model_a")
@click.argument("model_b")
@click.option("--text", type=click.Path(path_type=Path), required=True, help="A .txt file (a text a line) or .jsonl.")
@click.option("--points", type=click.IntRange(2), default=11, show_default=True, help="On the line, with its ends.")
@click.option("--tokens", type=click.IntRange(2), default=DEFAULT_TOKENS, show_default=True, help="Of text, at most.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="A .png, .svg or .pdf file to write.")
@alignment_options
@click.option("--device", default="cpu", show_default=True, help="Where to run the models.")
@click.option("--trust-remote-code", is_flag=True, help="Allow code that comes with a model's config or tokenizer.")
@click.option("--quiet", is_flag=True, help="Only the table, and no progress bars.")
def barrier(
    model_a: str,
    model_b: str,
    text: Path,
    points: int,
    tokens: int,
    plot: Path | None,
    device: str,
    trust_remote_code: bool,
    quiet: bool,
    **parameters: Any,
) -> None:
    """Measure the loss on the line from MODEL_A to MODEL_B, and to MODEL_B aligned to MODEL_A.

    Needs memory for four copies of a model in float32.

    \b
    Example: mergekit-symalign barrier ./base ./tuned --text texts.txt --plot barrier.png
    """
    options = MergeOptions(
        device=device,
        trust_remote_code=trust_remote_code,
        quiet=not bars(quiet),
        copy_tokenizer=False,
        write_model_card=False,
    )
    with readable():
        if plot is not None:
            require_plot(plot)
        curves = run_barrier(model_a, model_b, text, options, points=points, tokens=tokens, parameters=parameters)
        click.echo(table(curves))
        if plot is not None:
            draw(curves, plot)
            click.echo(f"wrote {plot}")


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
        _require_next_token(model)
    batches = _batches(a, b, text, tokens, options)
    with tempfile.TemporaryDirectory(prefix="symalign-barrier-", ignore_cleanup_errors=True) as scratch:
        aligned = Path(scratch)
        run_merge(alignment_config(model_a, model_b, parameters or {}, dtype="float32"), str(aligned), options)
        states = [_state(m.checkpoint.model, options) for m in (a, b)]
        states.append(_state(ModelReference.parse(str(aligned)), options))
    work = _loaded(a.checkpoint.model, options)
    shares = tuple(i / (points - 1) for i in range(points))
    names = ("as it is", "aligned")
    ends = [(name, states[0], other) for name, other in zip(names, states[1:], strict=True)]
    steps = progress([(end, t) for end in ends for t in shares], "Losses", quiet=options.quiet)
    losses = [_loss(_set(work, start, end, t), batches) for (_, start, end), t in steps]
    return Curve(names[0], shares, tuple(losses[:points])), Curve(names[1], shares, tuple(losses[points:]))


def _require_next_token(model: StoredModel) -> None:
    name = type(model.runner.model).__name__
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise ArchitectureError(
            f"model {model.name}",
            f"{name} predicts no next token, and the loss on text is that of the next token",
            "Compare language models that write text",
        )


def _batches(a: StoredModel, b: StoredModel, text: Path, tokens: int, options: MergeOptions) -> list[Batch]:
    tokenizers = [tokenizer_of(model.checkpoint.model, options) for model in (a, b)]
    found: Calibration = calibrate(text, tokenizers[0], {b.name: tokenizers[1]}, tokens=tokens)
    for model in (a, b):
        require_embedded(found, model.checkpoint)
    return [Batch(x.ids.to(a.device), x.valid.to(a.device)) for x in found.batches()]


def _loaded(model: ModelReference, options: MergeOptions) -> Any:
    config = model.config(trust_remote_code=options.trust_remote_code)
    source = model.merged(trust_remote_code=options.trust_remote_code).model
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        kind = getattr(transformers, config.architectures[0], transformers.AutoModelForCausalLM)
        settings = {"dtype": torch.float32, "attn_implementation": "eager"}  # others may lack soft caps
        found = kind.from_pretrained(source.path, revision=source.revision, **settings)
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
    return found.eval().requires_grad_(False).to(options.device)


def _state(model: ModelReference, options: MergeOptions) -> State:
    return dict(_loaded(model, options).state_dict())


@torch.inference_mode()
def _set(work: Any, start: State, end: State, t: float) -> Any:
    """Put the point at ``t`` between two models into a third."""
    for name, x in work.state_dict().items():
        x.copy_(torch.lerp(start[name], end[name], t) if x.is_floating_point() else start[name])
    return work


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
    return total / count if count else math.nan


def table(curves: Sequence[Curve]) -> str:
    """The losses, and how high the barriers are."""
    lines = [f"{'share of B':>10}" + "".join(f"{curve.name:>12}" for curve in curves)]
    for i, t in enumerate(curves[0].at):
        lines.append(f"{t:>10.3g}" + "".join(f"{curve.losses[i]:>12.4f}" for curve in curves))
    lines.append(f"{'barrier':>10}" + "".join(f"{curve.height:>12.4f}" for curve in curves))
    return "\n".join([*lines, "(nats per token; barrier: highest rise above the line between the ends)"])


def require_plot(path: Path) -> None:
    """
    Raises:
        ConfigError: if this file could not be drawn.
    """
    where = f"--plot {path}"
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(where, "matplotlib is not installed", "pip install 'mergekit-symalign[plots]'")
    if path.suffix not in _FORMATS:
        raise ConfigError(where, f"it must end in one of {', '.join(_FORMATS)}", "Give it another name")
    if not path.absolute().parent.is_dir():
        raise ConfigError(where, "its directory does not exist", "Make the directory first")


def draw(curves: Sequence[Curve], path: Path) -> None:
    """One line for each curve, told apart without colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.add_subplot()
    gray: dict[str, Any] = {"linestyle": "--", "marker": "s", "color": "0.45"}
    black: dict[str, Any] = {"linestyle": "-", "marker": "o", "color": "black"}
    for curve, style in zip(curves, (gray, black), strict=True):
        axes.plot(curve.at, curve.losses, label=f"B {curve.name}", markersize=4, **style)
    axes.set_xlabel("share of model B")
    axes.set_ylabel("loss, nats per token")
    axes.set_title("Loss on the line from model A to model B")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    with written_whole(path) as scratch:
        figure.savefig(scratch, dpi=150)
