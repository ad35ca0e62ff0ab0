"""``mergekit-symalign push``: an alignment or a file of statistics on the Hub, with a card."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
from safetensors import SafetensorError, safe_open

from mergekit_symalign.alignment_file import AlignmentFile
from mergekit_symalign.alignments import numbers
from mergekit_symalign.card import stream_distance, stream_moved, verdict
from mergekit_symalign.commands.outcome import Command
from mergekit_symalign.errors import ConfigError, HubError
from mergekit_symalign.graph.merge_report import totals
from mergekit_symalign.hub.address import (
    FORM,
    INDEX,
    SUFFIX,
    Address,
    problem_of_file,
    problem_of_repo,
    problem_of_revision,
)
from mergekit_symalign.sharing import card, publish
from mergekit_symalign.sharing.fetch import ALIGNMENT, STATISTICS
from mergekit_symalign.sharing.public import Role, public_alignment, public_statistics, role_of
from mergekit_symalign.sharing.sections import with_section
from mergekit_symalign.statistics import schema
from mergekit_symalign.statistics.file import StatisticsFile, stored_once
from mergekit_symalign.statistics.places import index_path, plain_path

Shared = AlignmentFile | StatisticsFile


@click.command(cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--path-in-repo", help="The file's name in the repository.  [default: its own name]")
@click.option("--revision", help="The branch to write to; it has to exist.  [default: main]")
@click.option("--private", is_flag=True, help="Make the repository private, if there is none yet.")
@click.option("--message", help="Of the commit.")
@click.option("--anchor", help="What to call the anchor in file and card, user/repo, in place of a path.")
@click.option("--model", help="The same of the model.")
@click.option("--quiet", is_flag=True, help="Print the address only, and no progress bars.")
def push(
    file: Path,
    repo: str,
    path_in_repo: str | None,
    revision: str | None,
    private: bool,
    message: str | None,
    anchor: str | None,
    model: str | None,
    quiet: bool,
) -> None:
    """Upload FILE, an alignment or statistics, to REPO on the Hugging Face Hub, with a card.

    REPO: user/repo; it is made if there is none. The last line printed is the address for a merge.

    \b
    Example: mergekit-symalign push tuned.safetensors user/alignments
    """
    address = _address(file, repo, path_in_repo, revision)
    say: Callable[[str], object] = (lambda _: None) if quiet else (lambda text: click.echo(text, err=True))
    found = _opened(file)
    publish.require_login(repo)
    roles = _roles(found, anchor, model)
    for role in roles:
        if role.name != role.known:
            say(f"{role.role} {role.known} is published as {role.name}, not by its path")
        if not role.on_the_hub:
            say(f"{role.role} {role.name} names no repository; --{role.role} user/repo gives it a public name")
    with tempfile.TemporaryDirectory(prefix="symalign-", ignore_cleanup_errors=True) as scratch:
        ready = _ready(found, address, roles, Path(scratch))
        target = publish.Target(repo, revision)
        standing = publish.made(target, private=private)
        readme = with_section(standing.readme, repo, address.file, ready.front, ready.section)
        files: dict[str, Path | bytes] = {**ready.files, publish.CARD: readme.encode()}
        commit = publish.committed(target, standing, files, message or f"Add {address.file}")
    click.echo(str(address.at(commit)))


@dataclass(frozen=True)
class Ready:
    """What is to be uploaded of a file.

    Attributes:
        files: by path in the repository; the file, or the index and its shards.
        section: of the card.
        front: of the card's front matter.
    """

    files: dict[str, Path]
    section: str
    front: dict[str, list[str]]


def _address(file: Path, repo: str, name: str | None, revision: str | None) -> Address:
    """
    Raises:
        HubError: if the Hub knows no such names.
    """
    name = plain_path(file).name if name is None else name
    if (problem := problem_of_repo(repo)) is not None:
        raise HubError(f"repository {repo}", problem, "Write user/repo")
    if (problem := problem_of_file(name)) is not None or name.endswith(INDEX):
        reason = problem or "an index is named after its shards"
        raise HubError(f"--path-in-repo {name}", reason, f"Name it as in folder/name{SUFFIX}")
    if revision is not None and problem_of_revision(revision):
        raise HubError(f"--revision {revision}", "no branch can have this name", FORM)
    return Address(repo, name, revision)


def _opened(path: Path) -> Shared:
    """A file whose text and numbers were all checked.

    Raises:
        AlignmentFileError, StatisticsFileError: if it is damaged, or absent.
        ConfigError: if it is something else.
    """
    if path.name.endswith(INDEX) or (not path.exists() and index_path(path).exists()):
        return _all_read(StatisticsFile.open(path))
    entries = _entries(path)
    if entries is None or numbers.ENTRY in entries:
        return AlignmentFile.open(path)
    if schema.ENTRY in entries:
        return _all_read(StatisticsFile.open(path))
    raise ConfigError(
        f"file {path}",
        "it is neither an alignment nor a file of statistics",
        "Give a file that mergekit-symalign solve, learn or measure wrote",
    )


def _entries(path: Path) -> frozenset[str] | None:
    """The names of a file's metadata; None if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(file.metadata() or {})
    except (OSError, SafetensorError):
        return None


def _all_read(file: StatisticsFile) -> StatisticsFile:
    for kind, names in stored_once(file).values():
        file.read(names[0], kind)
    return file


def _roles(file: Shared, anchor: str | None, model: str | None) -> list[Role]:
    """The models of a file, each with the name to publish.

    Raises:
        HubError: if a given name is none, or the Hub cannot be asked.
    """
    if isinstance(file, StatisticsFile):
        if anchor is not None:
            raise click.UsageError("--anchor belongs to alignments; statistics are of one model")
        return [role_of("model", file.origin.model, model, publish.exists)]
    known = (("anchor", file.origin.anchor, anchor), ("model", file.origin.model, model))
    return [role_of(*of, publish.exists) for of in known]


def _ready(file: Shared, address: Address, roles: list[Role], scratch: Path) -> Ready:
    """What is to be uploaded; a new file in ``scratch`` where names change."""
    path, on_hub = scratch / Path(address.file).name, [role.name.partition("@")[0] for role in roles if role.on_the_hub]
    if isinstance(file, AlignmentFile):
        anchor, model = (role.name for role in roles)
        public = public_alignment(file, anchor, model, path)
        section = card.of_alignment(public, address, _told(public))
        return Ready({address.file: public.path}, section, card.front_matter(ALIGNMENT, on_hub))
    told = public_statistics(file, roles[0].name, path)
    return Ready(_parts(told, address), card.of_statistics(told, address), card.front_matter(STATISTICS, on_hub))


def _parts(file: StatisticsFile, address: Address) -> dict[str, Path]:
    """The one file, or the index and its shards, by path in the repository."""
    places = sorted(set(file.places.values()))
    if places == [file.path]:
        return {address.file: file.path}
    index = index_path(plain_path(file.path))
    return {address.beside(path.name).file: path for path in (index, *places)}


def _told(file: AlignmentFile) -> str:
    """One sentence on what an alignment does."""
    blocks = [facts for block, facts in file.facts.items() if block != card.STREAM_BLOCK]
    stream = file.facts.get(card.STREAM_BLOCK)
    if stream is None:
        return verdict(totals(blocks))
    kind = file.settings_of(card.STREAM_BLOCK).get("residual")
    parts = (f"residual stream: {stream_moved({'kind': kind, **stream})}", stream_distance(stream))
    return "; ".join(part for part in parts if part is not None)
