"""``mergekit-symalign families``: the transformers classes that the aligned methods support."""

from __future__ import annotations

import click

from mergekit_symalign.commands.outcome import Command
from mergekit_symalign.families.known import supported_architectures, title_of


@click.command("families", cls=Command)
@click.argument("word", default="")
def families(word: str) -> None:
    """List the transformers classes that the aligned methods support, each with its family.

    WORD: only classes and families whose name has it in it, in small or capital letters.

    \b
    Example: mergekit-symalign families qwen
    """
    rows = [(name, title_of(name)) for name in supported_architectures()]
    rows = [row for row in rows if word.lower() in " ".join(row).lower()]
    width = max((len(name) for name, _ in rows), default=0)
    for name, title in rows:
        click.echo(f"{name:<{width}}  {title}")
