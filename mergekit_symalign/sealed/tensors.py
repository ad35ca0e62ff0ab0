"""Tensors that are known to be those that were saved."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

_NAMES = {torch.int32: "I32", torch.int64: "I64", torch.float32: "F32", torch.float64: "F64"}


def described(x: Tensor) -> tuple[str, list[int]]:
    """The dtype as safetensors calls it, and the shape."""
    return _NAMES.get(x.dtype, str(x.dtype)), list(x.shape)


def raw_bytes(x: Tensor) -> Any:
    """The bytes of a tensor as a file holds them."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def bytes_digest(x: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(raw_bytes(x)).hexdigest()
