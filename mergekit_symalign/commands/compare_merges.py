"""The merges of a comparison on disk: made when they are needed, and let go when they were measured."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from mergekit.options import MergeOptions

from mergekit_symalign.commands.merge_yaml import yaml as merge_yaml
from mergekit_symalign.comparing import merging
from mergekit_symalign.comparing.store import Store
from mergekit_symalign.comparing.variants import Variant

_SCRATCH = "merging"  # the folder of merges that are not kept, or not yet


class MergeFailedError(click.ClickException):
    """A merge ended with an error, which is told in its row."""


@dataclass(frozen=True)
class ToMerge:
    """A merge.

    Attributes:
        variant: its config and its label.
        key: digest of all that it depends on.
    """

    variant: Variant
    key: str

    @property
    def name(self) -> str:
        """Of its folder, its config and its log."""
        return f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', self.variant.label)[:60]}-{self.key[:8]}"


class Merges:
    """Where the merges of one run are.

    A merge is written under a name of its own, which it changes for its final one when it is whole. What a killed run
    left half made is therefore never taken for a merge.

    Args:
        out: the folder of the comparison.
        options: of MergeKit.
        store: remembers what merges cost.
        say: gets a line for each merge.
    """

    def __init__(self, out: Path, options: MergeOptions, store: Store, say: Callable[[str], object]) -> None:
        self._out, self._scratch = out, out / _SCRATCH
        self._options, self._store, self._say = options, store, say

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """What was left half made goes at the beginning, and at a good end whatever nobody keeps."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        for left in self._scratch.glob(".*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
        shutil.rmtree(self._scratch, ignore_errors=True)

    def made(self, merge: ToMerge, place: str) -> Path:
        """The folder of a merge, which is made unless it is there.

        Raises:
            MergeFailedError: with the last line that the merge said.
        """
        for folder in (self._out / merge.name, self._scratch / merge.name):
            if folder.is_dir():
                return folder
        return self._make(merge, place)

    def let_go(self, merge: ToMerge) -> None:
        """Remove a merge that this or a stopped run made; one that was kept before stays."""
        shutil.rmtree(self._scratch / merge.name, ignore_errors=True)

    def keep(self, merge: ToMerge) -> Path:
        """The merge under a name that stays, made once more if need be."""
        folder = self._out / merge.name
        made = self.made(merge, "to keep it")
        if made != folder:
            made.rename(folder)
        return folder

    def _make(self, merge: ToMerge, place: str) -> Path:
        config, log = (self._out / f"{merge.name}.{kind}" for kind in ("yml", "log"))
        config.write_text(merge.variant.text, "utf-8")
        half = self._scratch / f".{merge.name}"
        self._say(f"merging {merge.variant.label} ({place})")
        call = [*merging.command("mergekit-symalign"), "yaml", str(config), str(half), *arguments(self._options)]
        cost = merging.run_alone(call, log)
        if cost.exit_code != 0:
            shutil.rmtree(half, ignore_errors=True)
            ended = f"signal {-cost.exit_code} ended it" if cost.exit_code < 0 else merging.last_words(log)
            raise MergeFailedError(f"it could not be merged: {ended} (all of it: {log})")
        self._store.put_cost(merge.key, asdict(cost))
        log.unlink(missing_ok=True)
        whole = self._scratch / merge.name
        half.rename(whole)
        return whole


def arguments(options: MergeOptions) -> list[str]:
    """The options of a merge as its command line takes them."""
    default, found = MergeOptions(), ["--quiet"]
    for option in merge_yaml.params:
        name = option.name or ""
        if not isinstance(option, click.Option) or name not in MergeOptions.model_fields or name == "quiet":
            continue
        value = getattr(options, name)
        if value == getattr(default, name):
            continue
        if option.count:
            found += [option.opts[0]] * value
        elif option.is_flag:
            found.append(option.opts[0] if value else option.secondary_opts[0])
        else:
            found += [option.opts[0], str(value)]
    return found
