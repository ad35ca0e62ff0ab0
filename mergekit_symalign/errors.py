"""One family of errors: what is wrong, where, and what to do about it."""

from __future__ import annotations


class SymalignError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        where: the tensor, parameter, model or file that is at fault.
        reason: what is wrong with it.
        remedy: what the user can do.
    """

    def __init__(self, where: str, reason: str, remedy: str) -> None:
        self.where, self.reason, self.remedy = where, reason, remedy
        super().__init__(f"{where}: {reason}. {remedy}" + ("" if remedy.endswith("?") else "."))

    def __reduce__(self) -> tuple[type[SymalignError], tuple[str, str, str]]:
        """Errors travel between processes (mergekit-evolve)."""
        return type(self), (self.where, self.reason, self.remedy)


class ConfigError(SymalignError):
    """The merge configuration asks for something that cannot be done."""


class ParameterError(ConfigError):
    """A parameter is unknown, has a bad value, or disagrees within one block."""


class UnknownMethodError(ConfigError, RuntimeError):
    """There is no such merge method. MergeKit raises RuntimeError there, and catches it in places."""


class ArchitectureError(SymalignError):
    """No family describes this architecture, or not this variant of it."""


class ModelError(SymalignError):
    """There is no such model, or its files cannot be opened."""


class GeometryError(SymalignError):
    """Two models differ in width, heads, layers or neurons."""


class CheckpointError(SymalignError):
    """A checkpoint lacks a tensor, has one too many, or one of a wrong shape or dtype."""


class ValueInTensorError(SymalignError):
    """A weight holds NaN or infinity."""


class AlignmentFileError(SymalignError):
    """A saved alignment is damaged, of a newer format, or belongs to other models."""


class OtherModelsError(AlignmentFileError):
    """A saved alignment is absent, or sound and of other models: the user named the wrong one."""


class StatisticsFileError(SymalignError):
    """A file of statistics is damaged, of a newer format, or belongs to another model."""


class OtherStatisticsError(StatisticsFileError):
    """A file of statistics is absent, or sound and not what is needed: the user named the wrong one."""


class HubError(SymalignError):
    """A file on the Hub is not named right, not there, not open to this user, or not on this machine while offline."""


class HubFailureError(HubError):
    """The Hub cannot be reached, or what it sends cannot be stored: naming another file does not help."""


class SymmetryError(SymalignError):
    """An element of a block is no symmetry of that block: applied, it would change what the model computes."""


class CalibrationError(SymalignError):
    """Prompts cannot be read, or the models' tokenizers read them differently."""


class ShapeError(SymalignError):
    """A kernel was called with tensors whose shapes do not belong together."""


class UnalignedCallError(SymalignError):
    """An aligned method was asked to merge a single tensor of a block, without its siblings."""


class HostError(SymalignError):
    """The installed MergeKit is not one whose internals this package knows."""


class WorkerError(SymalignError):
    """A worker on another machine cannot do its part of a merge, or died too often."""
