"""``mergekit-symalign check-family``: a family file against small random models of its classes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import yaml
from transformers import PreTrainedModel

from mergekit_symalign.commands.outcome import Command
from mergekit_symalign.commands.plain import plain_loss
from mergekit_symalign.errors import ConfigError, ParameterError, SymalignError
from mergekit_symalign.families.known import classes_in, family_around
from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.schema import Family, Wrapper
from mergekit_symalign.graph.damaged import describe
from mergekit_symalign.trial.checks import deviation_of_blocks, deviation_of_stream, problems, stream_kinds
from mergekit_symalign.trial.models import class_of, randomise, small_model


@click.command("check-family", cls=Command)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--class", "name", help="Only this transformers class.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A config value of the small model, as YAML."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the weights.")
def check_family(file: Path, name: str | None, settings: tuple[str, ...], seed: int) -> None:
    """Check a family file: build a small random model of each class, claim its tensors, plant every symmetry.

    Prints what is missing; the exit code is 1 if anything is.

    \b
    Example: mergekit-symalign check-family mergekit_symalign/families/qwen3.yaml --class Qwen3ForCausalLM
    """
    classes = classes_in(file)
    if name is not None and name not in classes:
        raise ParameterError("--class", f"{file} does not describe {name}", f"It describes: {', '.join(classes)}")
    given = dict(_setting(text) for text in settings)
    found = {one: check_class(one, classes[one], given, seed) for one in ([name] if name is not None else classes)}
    for one, (lines, wrong) in found.items():
        click.echo(f"{one}: {'wrong' if wrong else 'right'}")
        click.echo("\n".join(f"  {line}" for line in [*wrong, *lines]))
    if any(wrong for _, wrong in found.values()):
        raise click.exceptions.Exit(1)


def check_class(
    name: str, family: Family | Wrapper, settings: Mapping[str, Any], seed: int = 0
) -> tuple[list[str], list[str]]:
    """What was measured of a class, and what is wrong with its family.

    Args:
        name: of a transformers class.
        family: that describes it, or the wrapper of a class around a text model.
        settings: of the small model's config.
        seed: of its weights.

    Raises:
        ConfigError: if transformers cannot build or run a small model of this class.
        ArchitectureError: if the family refuses its config.
    """
    config_class = class_of(name).config_class
    own = family_around(family, config_class(), name) if isinstance(family, Wrapper) else family
    model = randomise(small_model(name, own, settings), seed)
    layout = resolve(model.config, model=name, family=own)
    with _running(name):
        wrong = problems(model, layout)
        return ([] if wrong else list(_measured(model, layout))), wrong


@contextmanager
def _running(name: str) -> Iterator[None]:
    """What transformers' code raises when it runs a model that is too small for it, as our error."""
    try:
        yield
    except SymalignError:
        raise
    except Exception as error:  # whatever the sizes lead it to
        raise ConfigError(
            f"class {name}", f"a small model of it does not run ({describe(error)})", "Say what it needs with --set"
        ) from error


def _measured(model: PreTrainedModel, layout: ModelLayout) -> Iterator[str]:
    yield f"all {len(model.state_dict())} tensors claimed"
    yield f"blocks: random elements move the outputs by {deviation_of_blocks(model, layout):.0e} standard deviations"
    for kind in stream_kinds(model, layout):
        yield f"residual stream: a random {kind.value} moves them by {deviation_of_stream(model, layout, kind):.0e}"
    with tempfile.TemporaryDirectory() as folder:
        yield f"MergeKit's plain merge: {plain_loss(model, Path(folder)) or 'keeps every tensor'}"


def _setting(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ParameterError("--set", f"{text!r} is not KEY=VALUE", "Write, for example, --set num_key_value_heads=2")
    return key, yaml.safe_load(value)
