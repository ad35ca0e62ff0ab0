"""The driver's end of a merge: the workers' shards under their final names, with one index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit.io.tasks import TensorWriterTask
from mergekit.io.tensor_writer import TensorWriter

from mergekit_symalign.distributed.job import Done


def join(task: TensorWriterTask, scratch: Path, done: Sequence[Done]) -> None:
    """Move all shards into the folder of the output, and let MergeKit's writer name them and write the index.

    An error, or an interruption, takes back what was moved.

    Args:
        task: the writer of the merge as it was planned.
        scratch: folder of the workers' folders.
        done: by all parts, in order.
    """
    out = Path(task.out_path)
    writer = TensorWriter(
        task.out_path, safe_serialization=task.safe_serialization, override_basename=task.override_basename
    )
    shards = [(scratch / one.folder / shard, one) for one in done for shard in sorted(set(one.weight_map.values()))]
    stem, suffix = writer._get_name_components()
    names = [f"{stem}-{number}.{suffix}" for number in range(1, len(shards) + 1)]
    with _taken_back(out / name for name in (*names, *_final(stem, suffix, len(shards)))):
        for name, (path, one) in zip(names, shards, strict=True):
            path.replace(out / name)
            writer.weight_map |= {tensor: name for tensor, shard in one.weight_map.items() if shard == path.name}
        writer.shards_written = len(shards)
        writer.total_size = sum(one.size for one in done)
        writer.finalize()


def _final(stem: str, suffix: str, count: int) -> Iterator[str]:
    """The names that MergeKit's writer gives, and the index."""
    yield f"{stem}.{suffix}"
    yield f"{stem}.{suffix}.index.json"
    yield from (f"{stem}-{number:05d}-of-{count:05d}.{suffix}" for number in range(1, count + 1))


@contextmanager
def _taken_back(paths: Iterable[Path]) -> Iterator[None]:
    """Remove files if something goes wrong."""
    try:
        yield
    except BaseException:
        for path in paths:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise
