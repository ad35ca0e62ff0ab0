"""The command ``mergekit-symalign``."""

from __future__ import annotations

from pathlib import Path

import click
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_symalign import hook
from mergekit_symalign.commands.apply import apply
from mergekit_symalign.commands.barrier import barrier
from mergekit_symalign.commands.console import show_any_name
from mergekit_symalign.commands.inspect import inspect
from mergekit_symalign.commands.solve import solve
from mergekit_symalign.commands.verify import verify
from mergekit_symalign.commands.versions import show_versions


@click.group()
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=show_versions, help="Print versions."
)
def main() -> None:
    """Align models by the exact symmetries of their architecture, then merge them with MergeKit.

    After installation plain mergekit-yaml knows the aligned methods; these commands are for the rest.
    """
    show_any_name()
    hook.install()


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("symalign-demo"),
    show_default=True,
    help="Where models, configs and merges are written.",
)
def demo(out: Path) -> None:
    """Merge a real model three ways and print what each merge can do.

    \b
    Example: mergekit-symalign demo --out /tmp/demo
    """
    from mergekit_symalign.demo.run import run_demo

    run_demo(out)


main.add_command(inspect)
main.add_command(solve)
main.add_command(apply)
main.add_command(verify)
main.add_command(barrier)

# The same options as mergekit-yaml, without the autoload: for environments that strip .pth files.
main.add_command(mergekit_yaml, "yaml")

if __name__ == "__main__":
    main()
