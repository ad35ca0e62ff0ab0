"""``mergekit-symalign apply``: write a checkpoint in the coordinates that a saved alignment leads to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import click
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.graph import Executor, Task
from mergekit.io.tasks import FinalizeModel, LoaderCache, SaveTensor, TensorWriterTask
from mergekit.options import MergeOptions, add_merge_options

from mergekit_symalign.alignment_file import AlignmentFile, block_name
from mergekit_symalign.alignments.fit import STREAM_BLOCK, require_fits
from mergekit_symalign.commands.apply_stream import Others, opened, stream_alone
from mergekit_symalign.commands.common import parsed, require_one_family
from mergekit_symalign.commands.outcome import Command, bars
from mergekit_symalign.errors import CheckpointError, ConfigError
from mergekit_symalign.families.resolve import Placed
from mergekit_symalign.families.towers import index_of
from mergekit_symalign.graph.alignments import ReadBlock, has_halves
from mergekit_symalign.graph.apply import ApplyBlock
from mergekit_symalign.graph.checkpoint_checks import Checkpoint
from mergekit_symalign.graph.fingerprint import fingerprint_of
from mergekit_symalign.graph.headers import Header
from mergekit_symalign.graph.latent_gains import require_gains
from mergekit_symalign.graph.leftovers import shortened
from mergekit_symalign.graph.load import LoadFinite, LoadStored
from mergekit_symalign.graph.stream_alone import StreamAlone
from mergekit_symalign.graph.untie import untie_config_file
from mergekit_symalign.sharing.fetch import ALIGNMENT, local_file
from mergekit_symalign.whole_file import require_writable_folder

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


@click.command(cls=Command)
@click.argument("alignment")
@click.argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The directory to write.")
@click.option(
    "--anchor",
    help="The model that MODEL was aligned to. A rotation of the residual stream needs it: MODEL gets its norms.",
)
@click.option("--invert", is_flag=True, help="Undo the alignment: from the anchor's coordinates back to the model's.")
@click.option(
    "--norms-of",
    help="With --invert, where the residual stream was rotated: the model that was aligned, whose norms come back.",
)
@click.option(
    "--dtype", type=click.Choice(["float16", "bfloat16", "float32", "float64"]), help="Store all tensors in this dtype."
)
@add_merge_options
def apply(
    alignment: str,
    model: str,
    out: Path,
    anchor: str | None,
    invert: bool,
    norms_of: str | None,
    dtype: str | None,
    merge_options: MergeOptions,
) -> None:
    """Write MODEL aligned by ALIGNMENT: the same function, in the anchor's coordinates.

    ALIGNMENT: a file, or its address on the Hub, hf://user/repo/file.safetensors.

    \b
    Example: mergekit-symalign apply tuned.safetensors ./tuned -o tuned-in-anchor-coordinates
    """
    if norms_of is not None and not invert:
        raise click.UsageError("--norms-of belongs to --invert; the anchor is given by --anchor")
    merge_options.apply_global_options()
    file = local_file(alignment, ALIGNMENT, merge_options.transformers_cache)
    require_one_family([name for name in (anchor, norms_of, model) if name is not None], merge_options)
    others = Others(*(None if name is None else parsed(name) for name in (anchor, norms_of)))
    run_apply(file, parsed(model), out, merge_options, others, invert=invert, dtype=dtype)
    click.echo(f"wrote {out}")


def run_apply(
    alignment: Path,
    model: ModelReference,
    out: Path,
    options: MergeOptions,
    others: Others | None = None,
    *,
    invert: bool,
    dtype: str | None,
) -> None:
    """Transform every tensor of a checkpoint by its block's element, and the residual stream's, or by the inverses.

    The checkpoint is written beside ``out`` and renamed when it is whole.

    Raises:
        ConfigError: if ``out`` holds something already, or a model is not given whose norms are needed.
        AlignmentFileError: if the file does not belong to the models, lacks a block, or has no symmetry there. With
            ``invert`` only family and size are compared: an aligned model has other weights than the fingerprint.
    """
    require_writable_folder(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"output {out}", "it exists and is not empty", "Name a new directory")
    file = AlignmentFile.open(alignment)
    LoaderCache().setup(options)
    checkpoint = _checked(file, model, options, invert=invert)
    halves = has_halves(checkpoint) if dtype is None else dtype == "float16"
    if not require_fits(file, checkpoint.layout, halves=halves):
        click.echo(f"{file.label}: it was solved with rotation: full, which changes what the model computes", err=True)
    for layer in range(checkpoint.layout.layers):
        require_gains(file, checkpoint, layer, invert=invert)
    stream = stream_alone(file, checkpoint, others or Others(), options, invert=invert)
    left = () if stream is None else _left(stream)

    def read(block: str, label: str | None = None) -> ReadBlock:
        return ReadBlock(path=str(file.path), sha256=file.sha256, block=block, label=label, inverse=invert)

    moved = _moved(checkpoint, read) if stream is None else _moved_along(stream, read)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".symalign-", dir=out.parent, ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch) / "model"
        device = options.device or "cpu"
        new = frozenset() if stream is None else stream.new_heads
        executor = Executor(_tasks(checkpoint, moved, left, new, folder, options, dtype), math_device=device)
        for _ in executor.run(quiet=not bars(options.quiet), desc="Applying"):
            pass
        for source in _sources(model, options):
            _copy_the_rest(source, folder)
        if new:
            untie_config_file(folder / "config.json")
        if out.exists():
            out.rmdir()
        folder.rename(out)


def _checked(file: AlignmentFile, model: ModelReference, options: MergeOptions, *, invert: bool) -> Checkpoint:
    checkpoint = opened(model, file, options)
    if not invert:
        file.require_model(str(model), fingerprint_of(model))
    for placed in checkpoint.layout.in_layers():
        name, header = placed.name, checkpoint.stored(_info(placed.name))
        if header is None and not placed.claim.spec.optional:
            raise CheckpointError(f"tensor {name} of model {model}", "it is missing", "Download the model again")
        if header is not None and header.dtype is None:
            raise CheckpointError(f"tensor {name} of model {model}", "it is quantised", "Use plain weights")
    return checkpoint


def _tasks(
    checkpoint: Checkpoint,
    moved: Mapping[str, Task],
    left: Collection[str],
    new: Collection[str],
    folder: Path,
    options: MergeOptions,
    dtype: str | None,
) -> list[Task]:
    """The tasks that write the moved tensors by their names in the family, and all others but those that are left.

    New ones are read from tensors of other names.
    """
    writer = TensorWriterTask(
        out_path=str(folder),
        max_shard_size=options.out_shard_size,
        safe_serialization=options.safe_serialization,
        use_async=options.async_write,
        max_write_threads=options.write_threads,
    )
    used = {stored for name in moved for stored in checkpoint.read_for(_info(name))} | set(left)
    rest = {name: LoadStored(model=checkpoint.model, tensor=name) for name in checkpoint.headers if name not in used}
    saves = tuple(
        SaveTensor(
            tensor_name=name if name in new else checkpoint.stored_name(_info(name)) or name,  # pieces are joined
            tensor_task=task,
            writer_task=writer,
            clone=options.clone_tensors,
            dtype=_dtype(checkpoint.stored(_info(name)), dtype),
        )
        for name, task in {**moved, **rest}.items()
    )
    return [*saves, FinalizeModel(tensor_save_tasks=saves, writer_task=writer)]


def _left(stream: StreamAlone) -> tuple[str, ...]:
    """The stored tensors that are not written, because nothing moves them along; the user is told what is lost."""
    found = stream.check()
    if found.unread:
        names, model = shortened(found.unread), stream.checkpoint.model
        click.echo(f"model {model}: {names} not written: its architecture has no place for them", err=True)
    return (*found.unread, *found.copies)


def _moved_along(stream: StreamAlone, read: Callable[..., ReadBlock]) -> Mapping[str, Task]:
    """Every tensor that moves with the residual stream or its block, by its name in the family."""
    layout = stream.checkpoint.layout
    blocks = {
        (layer, kind.value): read(block_name(layer, kind.value), layout.name(layer, ""))
        for layer in range(layout.layers)
        for kind in layout.kinds(layer)
    }
    towers = [placed for placed in layout.in_layers() if placed.tower]
    return {**stream.tasks(read(STREAM_BLOCK), blocks), **_tasks_of(towers, stream.checkpoint, read)}


def _moved(checkpoint: Checkpoint, read: Callable[..., ReadBlock]) -> dict[str, Task]:
    """The tensors of every block of the file, by their names in the family, as the alignment leaves them."""
    return _tasks_of(checkpoint.layout.in_layers(), checkpoint, read)


def _tasks_of(tensors: Iterable[Placed], checkpoint: Checkpoint, read: Callable[..., ReadBlock]) -> dict[str, Task]:
    """The same of some of them."""
    tasks: dict[str, Task] = {}
    for placed in tensors:
        name, layout = placed.name, placed.layout
        if placed.block is None or checkpoint.stored(_info(name)) is None:
            continue
        layer, kind = placed.block
        load = LoadFinite(model=checkpoint.model, tensor=name, aliases=checkpoint.other_names(_info(name)) or None)
        solution = read(block_name(layer, kind.value), layout.name(index_of(layer), ""))
        tasks[name] = ApplyBlock(load=load, axes=layout.axes(placed.claim.spec), solution=solution)
    return tasks


def _info(name: str) -> WeightInfo:
    return WeightInfo(name=name)


def _dtype(header: Header | None, wanted: str | None) -> str | None:
    """What a tensor is written in: what the user asked for, else as it was stored."""
    if header is None or header.dtype is None:
        return None
    return wanted or str(header.dtype).removeprefix("torch.")


def _sources(model: ModelReference, options: MergeOptions) -> list[Path]:
    """The directories that a model's other files are in; an adapter's merge has its config and no tokenizer."""
    base = [] if model.lora is None else [Path(model.local_path(options.transformers_cache, ignore_lora=True))]
    return [*base, Path(LoaderCache().get(model).index.base_path)]


def _copy_the_rest(source: Path, folder: Path) -> None:
    """Config, tokenizer and whatever else is no weight, unless it is there already."""
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS) and not (folder / file.name).exists():
            shutil.copy2(file, folder / file.name)
