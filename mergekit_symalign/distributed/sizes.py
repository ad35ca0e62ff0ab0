"""How many bytes the loads of a merge read, from the headers of the checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache, LoadTensor

from mergekit_symalign.errors import SymalignError
from mergekit_symalign.graph.headers import Header, read_headers

Sizes = dict[ModelReference, Mapping[str, Header]]


class LoadSizes:
    """Sizes of loads; each checkpoint's headers are read once."""

    def __init__(self) -> None:
        self._headers: Sizes = {}

    def __call__(self, load: LoadTensor) -> int:
        """Bytes of the tensor as it is stored. One byte where that is not known: such loads count the same."""
        header = self.header(load)
        return 1 if header is None else header.size

    def header(self, load: LoadTensor) -> Header | None:
        """Of the tensor as it is stored; None where that is not known."""
        loader = LoaderCache().get(load.model)
        if load.model not in self._headers:
            self._headers[load.model] = _headers(Path(loader.index.base_path))
        return self._headers[load.model].get(load._resolve_name(loader) or "")


def _headers(folder: Path) -> Mapping[str, Header]:
    try:
        return read_headers(folder).listed
    except SymalignError:  # MergeKit reads what this reader does not
        return {}
