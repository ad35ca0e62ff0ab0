"""``mergekit-symalign compare``: which of several merges is best on one's own data, if that is more than noise."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from mergekit.options import MergeOptions, add_merge_options

from mergekit_symalign.commands.compare_configs import DEFAULT_TOKENS, Asked
from mergekit_symalign.commands.compare_inputs import DEFAULT_LENGTH, DTYPES, Prepared, prepare
from mergekit_symalign.commands.comparison import Compared, compare_all
from mergekit_symalign.commands.models import use_cache_of
from mergekit_symalign.commands.outcome import Command
from mergekit_symalign.commands.plots import require_plot
from mergekit_symalign.comparing.picture import draw
from mergekit_symalign.comparing.table import numbers, sentences, table
from mergekit_symalign.comparing.tasks import Harness, names
from mergekit_symalign.comparing.variants import Setting
from mergekit_symalign.console import say
from mergekit_symalign.whole_file import require_writable, require_writable_folder, written_whole

KEEP = ("none", "best", "all")
_FILE = click.Path(path_type=Path, dir_okay=False)
_DIRECTORY = click.Path(path_type=Path, file_okay=False)


@click.command(cls=Command)
@click.argument("configs", nargs=-1, metavar="[CONFIG]...")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A .txt file (a text a line) or .jsonl (text; prompt and answer; messages). May be given several times.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="PATH=VALUE,...",
    help="Try these values in every config, such as parameters.weight=0.3,0.5. Given twice: every combination.",
)
@click.option(
    "--average",
    nargs=2,
    metavar="ANCHOR MODEL",
    help="Compare the plain average of two models with the aligned one; needs no config.",
)
@click.option("--tasks", metavar="NAME,...", help="Tasks of lm-eval (pip install 'mergekit-symalign[eval]').")
@click.option("--task-search-path", type=_DIRECTORY, help="A folder with tasks of your own.")
@click.option("--limit", type=click.IntRange(1), help="Questions of each task at most.")
@click.option("--num-fewshot", type=click.IntRange(0), help="Examples before each question.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Questions that run together.")
@click.option(
    "--out", type=_DIRECTORY, default=Path("symalign-compare"), show_default=True, help="For results and merges."
)
@click.option(
    "--keep", type=click.Choice(KEEP), default="none", show_default=True, help="Which merges stay in that folder."
)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="In which models compute.")
@click.option(
    "--tokens", type=click.IntRange(2), default=DEFAULT_TOKENS, show_default=True, help="Of each file at most."
)
@click.option(
    "--max-length",
    type=click.IntRange(2),
    show_default=f"{DEFAULT_LENGTH}, or as many as the models have positions",
    help="Tokens of a document; longer ones are cut.",
)
@click.option("--json", "json_file", type=_FILE, help="Write the numbers to this file.")
@click.option("--plot", type=_FILE, help="Draw a picture (.png, .svg or .pdf).")
@add_merge_options
def compare(
    configs: tuple[str, ...],
    data: tuple[Path, ...],
    settings: tuple[str, ...],
    average: tuple[str, str] | None,
    tasks: str | None,
    task_search_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    out: Path,
    keep: str,
    dtype: str,
    tokens: int,
    max_length: int | None,
    json_file: Path | None,
    plot: Path | None,
    merge_options: MergeOptions,
) -> None:
    """Merge by each CONFIG, measure all merges and their models on your data, and say which differences are noise.

    A CONFIG is a file as mergekit-yaml takes it, or the folder of a merge that is there. Stopped, it goes on where it
    was when called again.

    \b
    Example: mergekit-symalign compare merge.yml --set parameters.weight=0.3,0.5 --data texts.jsonl
    """
    harness = None
    if tasks is not None:
        harness = Harness(names(tasks), task_search_path, limit, num_fewshot, batch_size)
    values = tuple(map(Setting.parse, settings))
    asked = Asked(configs, average, values, data, harness, out, keep, dtype, tokens, max_length)
    if plot is not None:
        require_plot(plot)
    if json_file is not None:
        require_writable(json_file, "--json", folder_is_made=False)
    if keep == "none":  # nobody reads the card, for which MergeKit asks the hub
        merge_options = merge_options.model_copy(update={"write_model_card": False})
    prepared, found = run_compare(asked, merge_options, (lambda _: None) if merge_options.quiet else say)
    click.echo("\n".join(shown(prepared, found)))
    if json_file is not None:
        with written_whole(json_file) as scratch:
            scratch.write_text(json.dumps(numbers(found.rows, found.columns), indent=1) + "\n", "utf-8")
    if plot is not None:
        draw(found.rows, found.columns, plot)
        click.echo(f"wrote {plot}")
    if any(row.failed for row in found.rows):
        raise click.exceptions.Exit(1)


def run_compare(
    asked: Asked, options: MergeOptions, say: Callable[[str], object] = lambda _: None
) -> tuple[Prepared, Compared]:
    """Check everything, then merge and measure.

    Raises:
        ConfigError, ModelError, CheckpointError, ArchitectureError, CalibrationError: as `prepare`.
    """
    options.apply_global_options()
    require_writable_folder(asked.out, "--out")
    use_cache_of(options)
    prepared = prepare(asked, options)
    return prepared, compare_all(asked, prepared, options, say)


def shown(prepared: Prepared, found: Compared) -> Iterator[str]:
    """What is printed."""
    yield from table(found.rows, found.columns)
    yield ""
    yield from sentences(found.rows, found.columns)
    for file in prepared.files:
        if (note := file.selection.note) is not None:
            yield f"{file.name}: {note}"
    for label, folder in found.kept.items():
        yield f"kept {label}: {folder}"
