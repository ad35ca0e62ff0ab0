"""``mergekit-symalign demo``: a real model, merged three ways."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_symalign.commands.outcome import Command, bars
from mergekit_symalign.demo.run import run_demo


@click.command(cls=Command)
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
    Example: mergekit-symalign demo --out symalign-demo
    """
    run_demo(out, bar=bars(quiet=False))
