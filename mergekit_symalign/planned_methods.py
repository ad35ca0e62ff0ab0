"""What our registered merge methods have in common: our planner plans their merges (graph/planner.py)."""

from __future__ import annotations

from abc import abstractmethod

from mergekit.merge_methods.base import MergeMethod

from mergekit_symalign.errors import UnalignedCallError
from mergekit_symalign.families.resolve import is_block_tensor


class PlannedMethod(MergeMethod):
    """A merge method that needs more than one tensor at a time.

    Attributes:
        anchor_is_base: whether ``base_model`` is the base of what merges; otherwise it takes part in the merge only if
            it is listed as a model.
        aligns: whether models are aligned to ``base_model`` first.
    """

    anchor_is_base: bool
    aligns: bool

    @property
    @abstractmethod
    def inner(self) -> MergeMethod:
        """The method that merges, of the models that take part."""

    @abstractmethod
    def with_unlisted_anchor(self) -> PlannedMethod:
        """The same method for a merge whose ``base_model`` is no listed model."""

    @property
    @abstractmethod
    def alone(self) -> str:
        """Why it cannot merge a single tensor of a block, in words that follow its name."""

    def require_unblocked(self, name: str | None) -> None:
        """Refuse a tensor that cannot be merged without the rest of its attention block or MLP.

        Raises:
            UnalignedCallError: if a family takes ``name`` for part of a block, or there is no name to tell.
        """
        if name is None or is_block_tensor(name):
            raise UnalignedCallError(
                f"tensor {name}" if name is not None else "a tensor without a name",
                f"{self.spec.name} {self.alone}",
                "Merge whole models with mergekit-yaml" + self._plain_remedy(),
            )

    def _plain_remedy(self) -> str:
        """How the remedy goes on."""
        return ""
