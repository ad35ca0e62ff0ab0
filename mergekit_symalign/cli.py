"""The command ``mergekit-symalign``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import click

from mergekit_symalign import hook
from mergekit_symalign.commands.outcome import Command
from mergekit_symalign.commands.versions import show_versions
from mergekit_symalign.console import show_any_name
from mergekit_symalign.errors import HostError

_COMMANDS = {
    "demo": "demo",
    "inspect": "inspect",
    "measure": "measure",
    "solve": "solve",
    "learn": "learn",
    "apply": "apply",
    "verify": "verify",
    "barrier": "barrier",
    "compare": "compare",
    "families": "list_families",
    "check-family": "check_family",
    "push": "push",
    "yaml": "merge_yaml",
}
"""Each command and its module."""
_NOT_HERE = "Not with the installed MergeKit.\n\n\b\nExample, with another one: mergekit-symalign {} --help"
_ANY_MERGEKIT = ("demo", "yaml")  # these import nothing of MergeKit's but its own command


@click.group()
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=show_versions, help="Print versions."
)
def main() -> None:
    """Align models by the exact symmetries of their architecture, then merge them with MergeKit.

    After installation plain mergekit-yaml knows the aligned methods; these commands are for the rest.

    \b
    Example: mergekit-symalign inspect HuggingFaceTB/SmolLM2-135M ./tuned
    """
    show_any_name()
    hook.install()


def _commands() -> Iterator[click.Command]:
    problem = hook.problem()
    for name, module in _COMMANDS.items():
        if problem is None or name in _ANY_MERGEKIT:
            yield getattr(importlib.import_module(f"mergekit_symalign.commands.{module}"), name.replace("-", "_"))
        else:
            yield _refusing(name, problem)


def _refusing(name: str, problem: str) -> click.Command:
    """A command that cannot even be imported with the installed MergeKit."""

    def refuse() -> None:
        raise HostError(f"mergekit-symalign {name}", *hook.host_error(problem))

    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    return Command(name, callback=refuse, help=_NOT_HERE.format(name), context_settings=anything)


for _command in _commands():
    main.add_command(_command)

if __name__ == "__main__":
    main()
