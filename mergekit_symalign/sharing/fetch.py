"""Files that are named by their address on the Hub: brought here once, into huggingface_hub's cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mergekit_symalign import __version__
from mergekit_symalign.hub.address import INDEX, SUFFIX, Address, address_of, is_address, parsed
from mergekit_symalign.statistics.places import read_text

ALIGNMENT, STATISTICS = "alignment", "statistics"  # what a file is, in errors
Cache = str | Path | None  # the folder of the cache; None: huggingface_hub's own


def local_file(name: str, what: str, cache: Cache = None) -> Path:
    """Where a file is on this machine; one on the Hub is downloaded, unless the cache has it.

    A file of which the address names a commit is asked for only once.

    Args:
        name: a path, or an address.
        what: `ALIGNMENT` or `STATISTICS`.
        cache: of huggingface_hub.

    Raises:
        HubError: if it is not there, not open to this user, or cannot be reached.
        StatisticsFileError: if it is an index that is damaged.
    """
    return _fetched(parsed(name), what, cache) if is_address(name) else Path(name)


def with_commit(name: str, what: str, cache: Cache = None) -> str:
    """The same file for ever: an address with the commit in place of a branch. A path stays as it is.

    Takes and raises what `local_file` does.
    """
    return str(address_of(local_file(name, what, cache)) or name) if is_address(name) else name


def _fetched(address: Address, what: str, cache: Cache) -> Path:
    """A file in the cache, with all of its shards where it is an index or one stands for it."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from mergekit_symalign.hub.refusals import asking_the_hub

    where = f"{what} {address}"
    with asking_the_hub(where, address.repo, address.revision, address.file):
        try:
            path = _downloaded(address, cache)
        except EntryNotFoundError as error:
            if what != STATISTICS or address.file.endswith(INDEX):
                raise
            index = replace(address, file=address.file.removesuffix(SUFFIX) + INDEX)
            try:
                path = _downloaded(index, cache, only_cached=isinstance(error, LocalEntryNotFoundError))
            except EntryNotFoundError:
                raise error from error.__cause__
    if not path.name.endswith(INDEX):
        return path
    found = address_of(path)
    assert found is not None
    _, places = read_text(path)
    for shard in sorted({place.name for place in places.values()}):
        beside = found.beside(shard)
        with asking_the_hub(where, address.repo, address.revision, beside.file):
            _downloaded(beside, cache)
    return path


def _downloaded(address: Address, cache: Cache, *, only_cached: bool = False) -> Path:
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(
        address.repo,
        address.file,
        revision=address.revision,
        cache_dir=cache,
        local_files_only=only_cached,
        library_name="mergekit-symalign",
        library_version=__version__,
    )
    return Path(path)
