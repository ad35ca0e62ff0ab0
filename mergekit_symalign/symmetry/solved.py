"""What a solver found, and what it knows of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit_symalign.symmetry.element import BlockElement


@dataclass(frozen=True)
class Solved:
    """The alignment of one block.

    Attributes:
        element: what brings the model to the anchor.
        facts: what is known of the solve: plain numbers and strings by name (docs/files.md).
    """

    element: BlockElement
    facts: Mapping[str, Any] = field(default_factory=dict)
