"""The registered merge methods and their parameters (aligned_methods.py, data_methods.py), for all but the hook.

MergeKit's methods are imported first: behind them runs the hook, which needs ours, and finds them whole only if nobody
has begun to import them.
"""

from __future__ import annotations

import mergekit.merge_methods  # noqa: F401

from mergekit_symalign.aligned_methods import (
    ALIGNMENT_NAMES,
    ALIGNMENT_PARAMETERS,
    ROTATION_PAPER,
    ROTATION_TITLE,
    TASK_VECTORS_PAPER,
    TASK_VECTORS_TITLE,
    AlignedMethod,
    aligned,
    rotation_match,
)
from mergekit_symalign.data_methods import PAPERS, TASK_VECTORS, DataMethod
from mergekit_symalign.planned_methods import PlannedMethod

__all__ = [
    "ALIGNMENT_NAMES",
    "ALIGNMENT_PARAMETERS",
    "PAPERS",
    "ROTATION_PAPER",
    "ROTATION_TITLE",
    "TASK_VECTORS",
    "TASK_VECTORS_PAPER",
    "TASK_VECTORS_TITLE",
    "AlignedMethod",
    "DataMethod",
    "PlannedMethod",
    "aligned",
    "rotation_match",
]
