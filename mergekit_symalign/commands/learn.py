"""``mergekit-symalign learn``: an alignment by gradient descent on the group elements alone."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from mergekit.options import MergeOptions
from tqdm import tqdm

from mergekit_symalign.alignments.destinations import require_alignment_or_nothing
from mergekit_symalign.commands.alignment import alignment_options
from mergekit_symalign.commands.common import require_one_family
from mergekit_symalign.commands.learn_inputs import (
    DEFAULT_LENGTH,
    DTYPES,
    Asked,
    read_texts,
    require_memory,
    text_length,
)
from mergekit_symalign.commands.learning import Pair, Start, between, save_learned, started, symmetries
from mergekit_symalign.commands.model_options import model_options
from mergekit_symalign.commands.models import StoredModel, require_comparable, use_cache_of
from mergekit_symalign.commands.outcome import Command, bars
from mergekit_symalign.commands.solve import run_solve
from mergekit_symalign.graph.fingerprint import fingerprint_of
from mergekit_symalign.graph.untie import UNTIE
from mergekit_symalign.learning.between import Between
from mergekit_symalign.learning.descent import Plan, State, descend, held_out_loss
from mergekit_symalign.learning.descent import start as beginning
from mergekit_symalign.learning.progress import load_state, save_state
from mergekit_symalign.learning.texts import Data
from mergekit_symalign.sharing.fetch import ALIGNMENT, local_file
from mergekit_symalign.symmetry.residual.kinds import Residual
from mergekit_symalign.whole_file import require_writable

_STATE = "state.safetensors"
_UNSET = {
    "residual": "the strongest that the models admit",
    "neuron_scaling": "where the activation admits it",
}


@dataclass(frozen=True)
class Outcome:
    """What came of it: held-out losses, nats per token.

    Attributes:
        steps: how many were made.
        before, after: at the midpoint.
        anchor, model: of the two models themselves.
    """

    steps: int
    before: float
    after: float
    anchor: float
    model: float

    @property
    def lines(self) -> list[str]:
        return [
            "held-out loss, nats per token:",
            f"{'anchor':>10}{self.anchor:>10.4f}",
            f"{'model':>10}{self.model:>10.4f}",
            f"{'midpoint':>10}{self.before:>10.4f} before",
            f"{'':>10}{self.after:>10.4f} after {self.steps} steps",
        ]


@click.command(cls=Command)
@click.argument("anchor")
@click.argument("model")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="A .txt file (a text a line) or .jsonl to learn from.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The file to write.")
@click.option("--init", help="Start from this alignment file, a path or hf:// address, instead of solving one.")
@click.option("--steps", type=click.IntRange(1), default=Plan().steps, show_default=True, help="At most.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Texts of a step.")
@click.option(
    "--sequence-length",
    type=click.IntRange(2),
    show_default=f"{DEFAULT_LENGTH}, or as many as the models have positions",
    help="Tokens of a text; longer ones are cut in pieces.",
)
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), default=Plan().rate, show_default=True, help="Of learning."
)
@click.option(
    "--patience",
    type=click.IntRange(1),
    default=Plan().patience,
    show_default=True,
    help=f"Stop when the held-out loss, taken every {Plan().every} steps, was so many times no better.",
)
@click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="In which models compute."
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Of all that is drawn.")
@click.option(
    "--gradient-checkpointing", is_flag=True, help="Run each layer twice, which takes far less memory and more time."
)
@click.option(
    "--permutations", is_flag=True, help="Learn orders of neurons and heads too, by a straight-through estimator."
)
@functools.partial(alignment_options, unset=_UNSET)
@functools.partial(model_options, device="auto")
@click.option("--quiet", is_flag=True, help="Only the name of the file, and no progress bars.")
def learn(
    anchor: str,
    model: str,
    data: Path,
    out: Path,
    init: str | None,
    steps: int,
    batch_size: int,
    sequence_length: int | None,
    rate: float,
    patience: int,
    dtype: str,
    seed: int,
    gradient_checkpointing: bool,
    permutations: bool,
    models: dict[str, Any],
    quiet: bool,
    **parameters: Any,
) -> None:
    """Learn the alignment of MODEL to ANCHOR for which the models between them have the least loss on texts.

    Only group elements are learned, so the aligned model computes what MODEL computes, whatever is learned.
    Needs memory for both models in float32, and for gradients. Stopped, it goes on where it was when called again.

    \b
    Example: mergekit-symalign learn ./base ./other --data texts.txt -o other.safetensors
    """
    device = models.pop("device")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    options = MergeOptions(**models, device=device, quiet=quiet)
    plan = Plan(steps=steps, rate=rate, seed=seed, patience=patience)
    asked = Asked(plan, batch_size, sequence_length, dtype, gradient_checkpointing, permutations)
    say = (lambda _: None) if quiet else click.echo
    start = None if init is None else local_file(init, ALIGNMENT, options.transformers_cache)
    outcome = run_learn(anchor, model, data, out, options, asked, parameters=parameters, init=start, say=say)
    if not quiet:
        click.echo("\n".join(outcome.lines))
    click.echo(f"wrote {out}")


def run_learn(
    anchor: str,
    model: str,
    data: Path,
    out: Path,
    options: MergeOptions,
    asked: Asked | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    init: Path | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Outcome:
    """Check everything, then learn and write the alignment.

    Args:
        anchor, model: as a merge names them.
        data: texts, as `measure` and `barrier` read them.
        out: the alignment file to write.
        options: of MergeKit.
        asked: how to learn.
        parameters: of the alignment, as in a merge; what is missing or None is chosen here.
        init: an alignment file to start from.
        say: gets what a user may want to read.

    Raises:
        ConfigError: if the output cannot be written, options do not fit, memory is short or another run's state is
            there.
        ParameterError: if an option is not exact, or just one of the models has a head of its own.
        ModelError, ArchitectureError, CheckpointError, GeometryError: if the models cannot be run, or not together.
        CalibrationError: if the texts cannot be used, or the tokenizers differ.
        AlignmentFileError: if ``init`` does not belong to the models.
    """
    asked, parameters = asked or Asked(), dict(parameters or {})
    require_writable(out)
    require_alignment_or_nothing(out)
    symmetries(parameters)
    use_cache_of(options)
    require_one_family((anchor, model), options)
    ours, theirs = (StoredModel.open(name, options, "sdpa") for name in (anchor, model))
    require_comparable(ours, theirs)
    pair = Pair.of(ours, theirs, untie=bool(parameters.get(UNTIE)))
    if parameters.get("residual") is not None:
        pair.kind(Residual(parameters["residual"]))
    asked = replace(asked, length=text_length(pair, asked.length))
    read = read_texts(pair, data, asked, options)
    require_memory(pair, asked, say)
    with _progress_beside(out) as folder:
        start = _start(pair, folder, init, options, parameters, orders=asked.orders)
        found = between(pair, start, DTYPES[asked.dtype], checkpoints=asked.checkpoints)
        state, outcome = _learned(pair, found, read, folder, asked, start, quiet=options.quiet)
        told = {"learned_steps": state.step, "loss_before": outcome.before, "loss_after": outcome.after}
        save_learned(out, pair, start, found, state, told, told)
    return outcome


@contextmanager
def _progress_beside(out: Path) -> Iterator[Path]:
    """A folder for what lets a stopped run go on; it is removed at the end, or if there is nothing to go on with."""
    folder = out.with_name(f"{out.name}.state")
    folder.mkdir(parents=True, exist_ok=True)
    done = False
    try:
        yield folder
        done = True
    finally:
        if done or not (folder / _STATE).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _start(
    pair: Pair,
    folder: Path,
    init: Path | None,
    options: MergeOptions,
    parameters: Mapping[str, Any],
    *,
    orders: bool,
) -> Start:
    """The file to start from, solved if need be."""
    if init is not None:
        return started(pair, init, parameters, orders=orders)
    solved, residual = folder / "start.safetensors", parameters.get("residual") or pair.strongest().value
    if not solved.exists():
        closed = {**parameters, "residual": residual, "neuron_scaling": False}
        run_solve(pair.anchor.name, pair.model.name, solved, options, closed, say=lambda _: None)
    return started(pair, solved, {**parameters, "residual": residual}, orders=orders)


def _learned(
    pair: Pair, found: Between, read: Data, folder: Path, asked: Asked, start: Start, *, quiet: bool
) -> tuple[State, Outcome]:
    device, plan = torch.device(pair.anchor.device), asked.plan
    held_out = read.batches_held_out(device)
    what = _what(pair, read, asked, start)
    state = beginning(found, held_out, device)
    ends = [held_out_loss(found, state.numbers, held_out, t) for t in (0.0, 1.0)]
    path = folder / _STATE
    if path.exists():
        state = load_state(path, state, what)
    with tqdm(
        total=plan.steps, initial=state.step, desc="Learning", disable=not bars(quiet), leave=False, ncols=79
    ) as bar:

        def tell(state: State) -> None:
            bar.update()
            bar.set_postfix_str(f"midpoint {state.least:.4f}, was {state.before:.4f}", refresh=False)
            if state.step % plan.every == 0:
                save_state(path, state, what)

        state = descend(found, lambda step: read.batch(step, device), held_out, plan, state, tell=tell)
    return state, Outcome(state.step, state.before, state.least, *ends)


def _what(pair: Pair, read: Data, asked: Asked, start: Start) -> dict[str, Any]:
    """What two runs must share for one to go on with the other's state."""
    prints = {
        role: fingerprint_of(of.checkpoint.model) for role, of in (("anchor", pair.anchor), ("model", pair.model))
    }
    plan = {name.replace("_", "-"): x for name, x in asdict(asked.plan).items()}
    how = {
        "batch-size": asked.batch_size,
        "sequence-length": asked.length,
        "dtype": asked.dtype,
        "permutations": asked.orders,
    }
    use = {name: str(x) for name, x in asdict(start.use).items()}
    return {**prints, **plan, **how, **use, "residual": start.residual.value, "texts": read.digest}
