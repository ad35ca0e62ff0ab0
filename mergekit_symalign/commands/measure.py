"""``mergekit-symalign measure``: what a model's tensors read, and how its loss depends on them, as a file."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_symalign.activations.calibration import tokenizer_digest
from mergekit_symalign.activations.defaults import DEFAULT_LENGTH, DEFAULT_PROMPTS, DEFAULT_TOKENS
from mergekit_symalign.activations.fisher import FisherPass
from mergekit_symalign.activations.gram import Gram
from mergekit_symalign.activations.images import prepare_images, processor_digest
from mergekit_symalign.activations.inputs import find_inputs
from mergekit_symalign.activations.objectives import Objective
from mergekit_symalign.activations.samples import How, Prepared, moved, prepare_texts
from mergekit_symalign.activations.spill import Spill
from mergekit_symalign.activations.stream import Loss, sum_inputs
from mergekit_symalign.activations.wanted import Wanted, bytes_of, shapes_of, wanted
from mergekit_symalign.commands.common import progress
from mergekit_symalign.commands.inputs import reads_text
from mergekit_symalign.commands.model_options import model_options
from mergekit_symalign.commands.models import StoredModel, use_cache_of
from mergekit_symalign.commands.outcome import Command
from mergekit_symalign.commands.sizes import Size, human
from mergekit_symalign.errors import ArchitectureError, CalibrationError, ConfigError
from mergekit_symalign.graph.alignments import package_versions, sizes_of
from mergekit_symalign.graph.fingerprint import fingerprint_of
from mergekit_symalign.graph.readers import image_processor_of, require_embedded_ids, require_positions, tokenizer_of
from mergekit_symalign.statistics.file import Measured, Origin
from mergekit_symalign.statistics.places import plain_path
from mergekit_symalign.statistics.writer import StatisticsWriter, require_statistics_or_nothing, writing
from mergekit_symalign.whole_file import require_writable

GRAMS = ("full", "diagonal", "none")
FISHERS = ("none", "empirical", "sampled", "hard", "kronecker")


@dataclass(frozen=True)
class Asked:
    """What the user wants.

    Attributes:
        gram, fisher: kinds of statistics.
        calibration: ``default``, a file of prompts or a folder of images.
        tokens: how many to use at most.
        length: how many of a prompt to use at most.
        only: a regular expression that names of tensors have to match.
        labels: whether the calibration has labels for the model's task head.
        seed: of what is drawn.
        shard_size: bytes of a file at most.
    """

    gram: str = "full"
    fisher: str = "none"
    calibration: str = "default"
    tokens: int = DEFAULT_TOKENS
    length: int = DEFAULT_LENGTH
    only: str | None = None
    labels: bool = False
    seed: int = 0
    shard_size: int = 5 * 10**9


@click.command(cls=Command)
@click.argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The file to write.")
@click.option(
    "--calibration",
    required=True,
    help="A .jsonl or .txt file of prompts, a folder of images, or default: a small set in the package.",
)
@click.option(
    "--gram", type=click.Choice(GRAMS), default="full", show_default=True, help="For regmean: Σ x xᵀ of inputs."
)
@click.option(
    "--fisher",
    type=click.Choice(FISHERS),
    default="none",
    show_default=True,
    help="For fisher: squared gradients of the true token (empirical), of one drawn from the model (sampled) or of the "
    "likeliest (hard); kronecker: two factors for each linear layer.",
)
@click.option(
    "--tokens", type=click.IntRange(1), default=DEFAULT_TOKENS, show_default=True, help="Use this many at most."
)
@click.option(
    "--sequence-length", type=click.IntRange(1), default=DEFAULT_LENGTH, show_default=True, help="Tokens of a prompt."
)
@click.option("--only", metavar="REGEX", help="Measure only tensors whose name matches.")
@click.option("--labels", is_flag=True, help="The calibration has labels: the loss is the task head's.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Of tokens that are drawn.")
@click.option("--shard-size", type=Size(), default="5GB", show_default=True, help="Of one file at most.")
@functools.partial(model_options, device="auto")
@click.option("--quiet", is_flag=True, help="No progress bars, and no sizes.")
def measure(
    model: str,
    out: Path,
    calibration: str,
    gram: str,
    fisher: str,
    tokens: int,
    sequence_length: int,
    only: str | None,
    labels: bool,
    seed: int,
    shard_size: int,
    quiet: bool,
    models: dict[str, Any],
) -> None:
    """Measure statistics of MODEL for merges that use data, and save them.

    The model runs layer by layer, so it is never in memory as a whole.

    \b
    Example: mergekit-symalign measure ./tuned -o tuned.safetensors --calibration prompts.jsonl
    """
    device = _device(models.pop("device"))
    options = MergeOptions(**models, device=device, quiet=quiet)
    asked = Asked(gram, fisher, calibration, tokens, sequence_length, only, labels, seed, shard_size)
    for path in run_measure(model, out, options, asked, say=(lambda _: None) if quiet else click.echo):
        click.echo(f"wrote {path}")


def run_measure(
    name: str, out: Path, options: MergeOptions, asked: Asked, *, say: Callable[[str], object] = lambda _: None
) -> list[Path]:
    """Check everything, then measure.

    Returns:
        What was written; the index first where there are shards.

    Raises:
        ConfigError: if the output cannot be written, or the options do not fit together or match nothing.
        ModelError, ArchitectureError, CheckpointError, ValueInTensorError: if the model cannot be run.
        CalibrationError: if there is nothing to run it on.
    """
    out = plain_path(out)
    _require_sensible(asked)
    require_statistics_or_nothing(out)
    require_writable(out)
    use_cache_of(options)
    model = StoredModel.open(name, options, "sdpa")
    objective = _objective(model, asked)
    prepared, reader = _prepared(model, asked, objective, options)
    samples = moved(prepared, model.device)
    inputs = find_inputs(model, samples.batches[0])
    around = model.checkpoint.layout.is_around_text
    shapes = {tensor: shape for tensor, shape in shapes_of(model.runner).items() if not around(tensor)}
    vocabulary = {at for at, spec in model.checkpoint.layout.outside.items() if "vocabulary" in spec.axes}
    what = wanted(
        inputs,
        shapes,
        gram=asked.gram,
        fisher=asked.fisher,
        only=asked.only,
        seed=asked.seed,
        vocabulary=frozenset(vocabulary),
    )
    if what.is_empty:
        raise ConfigError(f"--only {asked.only}", f"it matches no tensor of {name} that can be measured", _like(shapes))
    hidden = model.checkpoint.layout.geometry.hidden
    waiting = 4 * prepared.tokens * hidden * (model.layers + 1) if asked.fisher != "none" else 0
    _require_room(out, bytes_of(what, shapes), waiting, asked.shard_size, say)
    for layer in progress(range(model.layers), "Reading", quiet=options.quiet):
        model.layer(layer)  # finite, or refused before anything is measured
    with writing(out, asked.shard_size) as writer:
        loss = _measured(model, samples, what, writer, prepared.tokens, quiet=options.quiet)
        origin = Origin(
            model=name,
            fingerprint=fingerprint_of(model.checkpoint.model),
            family=model.checkpoint.layout.family.name,
            sizes=sizes_of(model.checkpoint),
            tokenizer=reader,
            versions=package_versions(),
        )
        return writer.finish(origin, _told(asked, prepared, loss, objective))


def _require_sensible(asked: Asked) -> None:
    """
    Raises:
        ConfigError: if options do not fit together.
    """
    if asked.gram == "none" and asked.fisher == "none":
        raise ConfigError("--gram none --fisher none", "there is nothing to measure", "Ask for one of them")
    if asked.fisher == "kronecker" and asked.gram != "full":
        reason = "Gram matrices are one of the two factors of kronecker"
        raise ConfigError(f"--gram {asked.gram}", reason, "Leave it out")
    try:
        re.compile(asked.only or "")
    except re.error as error:
        raise ConfigError(f"--only {asked.only}", f"it is no regular expression ({error})", "Correct it") from error


def _objective(model: StoredModel, asked: Asked) -> Objective:
    """What the loss is of; nothing where none is wanted.

    Raises:
        ArchitectureError: if the model predicts nothing, or nothing that has labels.
        ConfigError: if labels are needed, or of no use.
    """
    config = model.runner.model.config
    found = model.objective()
    wants = asked.fisher != "none"
    if found is Objective.nothing and (wants or asked.labels):
        option = f"--fisher {asked.fisher}" if wants else "--labels"
        reason = f"{option} needs a loss, and {type(model.runner.model).__name__} has no head that predicts anything"
        raise ArchitectureError(f"model {model.name}", reason, "Use a model with its head, or --gram alone")
    if found.needs_labels and wants and not asked.labels:
        where, reason = f"--fisher {asked.fisher}", f"{model.name} predicts labels, and none are given"
        raise ConfigError(where, reason, "Add --labels, and a label to each input")
    if asked.labels and not found.needs_labels:
        reason = f"{model.name} predicts a {found.value}, which the calibration itself holds"
        raise ConfigError("--labels", reason, "Leave it out")
    if asked.labels and (config.num_labels < 2 or config.problem_type not in (None, "single_label_classification")):
        reason = f"--labels needs a classifier with one label for each input, not {config.problem_type or 'regression'}"
        raise ArchitectureError(f"model {model.name}", reason, "Leave --labels and --fisher out")
    if found is Objective.masked_token and not wants:
        return Objective.nothing  # Gram matrices of the texts as they are
    return Objective.nothing if found.needs_labels and not asked.labels else found


def _prepared(model: StoredModel, asked: Asked, objective: Objective, options: MergeOptions) -> tuple[Prepared, str]:
    """The inputs, and the digest of what reads them.

    Raises:
        CalibrationError: if they cannot be used.
    """
    reference, config = model.checkpoint.model, model.runner.model.config
    labels = {str(label): int(number) for label, number in (config.label2id or {}).items()}
    alone = asked.fisher != "none"
    how = How(asked.tokens, asked.length, objective, labels, alone, asked.seed)
    if not reads_text(model):
        if asked.calibration == "default":
            raise CalibrationError("--calibration default", f"{model.name} reads images", "Name a folder of images")
        processor = image_processor_of(reference, options)
        return prepare_images(Path(asked.calibration), processor, config, how), processor_digest(processor)
    tokenizer = tokenizer_of(reference, options)
    path = DEFAULT_PROMPTS if asked.calibration == "default" else Path(asked.calibration)
    prepared = prepare_texts(path, tokenizer, how)
    require_embedded_ids(prepared.largest or 0, model.checkpoint)
    require_positions(max(batch.ids.shape[1] for batch in prepared.samples.batches), model.checkpoint)
    if alone and all(target is not None and bool((target < 0).all()) for target in prepared.samples.targets):
        raise CalibrationError(
            f"calibration {path}", "its prompts are too short to predict anything", "Give longer prompts"
        )
    return prepared, tokenizer_digest(tokenizer)


def _require_room(
    out: Path, sizes: Mapping[str, int], waiting: int, shard_size: int, say: Callable[[str], object]
) -> None:
    """Say how large the file will be.

    Raises:
        ConfigError: if the disk has less room.
    """
    size = sum(sizes.values())
    say(f"{out}: {human(size)} ({', '.join(f'{kind} {human(part)}' for kind, part in sizes.items())})")
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    needed, free = size + min(size, shard_size) + waiting, shutil.disk_usage(folder).free
    if needed > free:
        states = f", and {human(waiting)} of hidden states meanwhile" if waiting else ""
        raise ConfigError(
            f"output {out}",
            f"{human(size)} of statistics need {human(needed)} while they are written{states}; the disk has "
            f"{human(free)}",
            "Make room, or measure less: --gram diagonal, --only REGEX",
        )


def _measured(
    model: StoredModel, samples: Any, what: Wanted, writer: StatisticsWriter, tokens: int, *, quiet: bool
) -> Loss:
    """Run the model, and hand its statistics to the writer."""

    def put_gram(gram: Gram) -> None:
        writer.put("gram", gram.names, gram.squares)
        writer.put("mean", gram.names, gram.mean)
        writer.count(gram.names, gram.tokens)

    def put(kind: str, names: tuple[str, ...], x: Tensor) -> None:
        writer.put(kind, names, x)
        writer.count(names, tokens, unless_known=True)

    passes = 1 if what.whose == "none" else 2
    steps = iter(progress(range(passes * model.layers), "Measuring", quiet=quiet))
    if what.whose == "none":
        return sum_inputs(model, samples, what.inputs, full=what.full, put=put_gram, step=lambda: next(steps))
    spill = Spill(writer.folder, torch.device(model.device))
    return FisherPass(model, samples, what, spill, gram=put_gram, put=put, step=lambda: next(steps)).run()


def _told(asked: Asked, prepared: Prepared, loss: Loss, objective: Objective) -> Measured:
    return Measured(
        gram=asked.gram,  # type: ignore[arg-type]
        fisher=asked.fisher,  # type: ignore[arg-type]
        tokens=prepared.tokens,
        sequences=prepared.sequences,
        sequence_length=asked.length,
        only=asked.only,
        loss=loss.mean,
        labels=objective.needs_labels,
        calibration=prepared.digest,
        seed=asked.seed,
    )


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _like(names: Sequence[str] | Mapping[str, Any]) -> str:
    return f"Names look like {list(names)[-1]}"
