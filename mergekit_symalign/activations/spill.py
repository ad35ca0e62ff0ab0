"""Hidden states that wait on disk until they are needed again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class Spill:
    """Lists of tensors by number, in a folder.

    Args:
        folder: for one file each; it is there.
        device: where they are needed.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device

    def keep(self, number: int, tensors: Sequence[Tensor]) -> None:
        save_file({str(i): x.detach().contiguous().cpu() for i, x in enumerate(tensors)}, self._path(number))

    def read(self, number: int) -> list[Tensor]:
        found = load_file(self._path(number))
        return [found[str(i)].to(self._device) for i in range(len(found))]

    def take(self, number: int) -> list[Tensor]:
        """Read, and remove."""
        found = self.read(number)
        self._path(number).unlink()
        return found

    def _path(self, number: int) -> Path:
        return self._folder / f"hidden-{number}.safetensors"
