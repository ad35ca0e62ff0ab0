"""The registered merge methods: an inner method of MergeKit's, on aligned inputs.

A planned merge never runs these objects: planning replaces them by the inner method and gives it aligned tensors
(graph/planning.py). Called directly, on one tensor at a time, they cannot align, and refuse the tensors of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Literal

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    BatchOptions,
    InputContract,
    MergeMethod,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)

from mergekit_symalign.data_methods import DataMethod
from mergekit_symalign.planned_methods import CALIBRATION_PARAMETERS, PlannedMethod
from mergekit_symalign.symmetry.options import GREATEST_CONDITION

TASK_VECTORS_TITLE = "Leveraging Parameter Space Symmetries for Reasoning Skill Transfer in LLMs"
TASK_VECTORS_PAPER = "https://arxiv.org/abs/2511.10850"
ROTATION_TITLE = "Beyond the Permutation Symmetry of Transformers: The Role of Rotation for Model Fusion"
ROTATION_PAPER = "https://arxiv.org/abs/2502.00264"
_UNALIGNABLE = frozenset(("passthrough",))

ALIGNMENT_PARAMETERS = (
    ParameterSpec("align", bool, ParameterScope.NON_BASE, default=True, description="false takes this model as it is"),
    ParameterSpec(
        "anchor",
        Literal["base", "consensus"],
        ParameterScope.SHARED,
        default="base",
        description="base: align to base_model; consensus: align to what all models have in common, then turn the "
        "result into the coordinates of base_model",
    ),
    ParameterSpec(
        "permutation",
        bool,
        ParameterScope.SHARED,
        default=True,
        description="reorder the neurons of the MLPs, and the experts",
    ),
    ParameterSpec(
        "heads",
        bool,
        ParameterScope.SHARED,
        default=True,
        description="reorder KV heads as a whole, and query heads within their group",
    ),
    ParameterSpec(
        "rotation",
        Literal["exact", "full", "none"],
        ParameterScope.SHARED,
        default="exact",
        description="exact: every rotation that keeps the function; full: the papers' orthogonal matrix for query and "
        "key, which under RoPE changes the function (with a warning; refused with QK-norm); none: no rotation",
    ),
    ParameterSpec(
        "scaling",
        bool,
        ParameterScope.SHARED,
        default=True,
        description="rescale query against key, and value against output",
    ),
    ParameterSpec(
        "neuron_scaling",
        bool,
        ParameterScope.SHARED,
        default=False,
        description="rescale each neuron's up projection against its down projection: signed in gated MLPs, positive "
        "in plain MLPs with ReLU, refused in other plain MLPs",
    ),
    ParameterSpec(
        "value_output",
        Literal["orthogonal", "general"],
        ParameterScope.SHARED,
        default="orthogonal",
        description="what values may carry while the output projection undoes it. orthogonal: a rotation and a scale "
        "for each KV head; general: any invertible matrix (with objective: weights and anchor: base)",
    ),
    ParameterSpec(
        "condition",
        float,
        ParameterScope.SHARED,
        default=GREATEST_CONDITION,
        description="with value_output: general, the largest condition number of a matrix; above 1, at most 10000",
    ),
    ParameterSpec(
        "residual",
        Literal["none", "permutation", "rotation"],
        ParameterScope.SHARED,
        default="none",
        description="align the residual stream, for models without a common base. permutation: an order of its "
        "coordinates, with signs where norms do not subtract the mean; rotation: any rotation that keeps the function, "
        "with the anchor's norms. One value for the whole merge; refused where it is not exact",
    ),
    ParameterSpec(
        "residual_rounds",
        int,
        ParameterScope.SHARED,
        default=10,
        description="with residual: at most this many rounds over all layers; each reads the models once. No effect "
        "with objective: activations, where one run gives everything",
    ),
    ParameterSpec(
        "untie",
        bool,
        ParameterScope.SHARED,
        default=False,
        description="give the merged model a head of its own where a model's head is its embedding, which "
        "residual: rotation needs. One value for the whole merge",
    ),
    ParameterSpec(
        "objective",
        Literal["weights", "activations"],
        ParameterScope.SHARED,
        default="weights",
        description="what to compare: the weights, or what the models compute on prompts",
    ),
    *CALIBRATION_PARAMETERS,
    ParameterSpec(
        "alignment",
        str | None,
        ParameterScope.NON_BASE,
        default=None,
        description="use this saved alignment file instead of solving: a path, or hf://user/repo/file.safetensors",
    ),
    ParameterSpec(
        "save_alignment",
        str | None,
        ParameterScope.SHARED,
        default=None,
        description="save this merge's alignments in this directory, as <model>.safetensors",
    ),
)
ALIGNMENT_NAMES = frozenset(p.name for p in ALIGNMENT_PARAMETERS)


class AlignedMethod(PlannedMethod):
    """A merge method that aligns every model to ``base_model`` before ``inner`` merges them."""

    aligns = True
    needs_base = ("aligns every model to base_model, but none is given", "that all others are aligned to")

    def __init__(self, inner: MergeMethod, spec: MergeMethodSpec, *, anchor_is_base: bool) -> None:
        self._inner = inner
        self.anchor_is_base = anchor_is_base
        own = {p.name for p in spec.parameters}
        self.spec = replace(
            spec,
            parameters=(*spec.parameters, *(p for p in ALIGNMENT_PARAMETERS if p.name not in own)),
            contract=_contract(inner.spec.contract, anchor_is_base=anchor_is_base),
        )

    @property
    def inner(self) -> MergeMethod:
        return self._inner

    @property
    def alone(self) -> str:
        return "was called on it alone, and would merge it unaligned: it needs the whole block"

    def _plain_remedy(self) -> str:
        return f", or use {self.inner.spec.name} for a plain merge"

    def with_unlisted_anchor(self) -> AlignedMethod:
        """The same method for a merge whose anchor is no listed model.

        An anchor that takes no part has no weight to give: what the inner method asks of every model is asked of the
        others only.
        """
        method = copy(self)
        if not self.anchor_is_base:
            others = {ParameterScope.INPUT: ParameterScope.NON_BASE}
            asked = tuple(replace(p, scope=others.get(p.scope, p.scope)) for p in self.spec.parameters)
            method.spec = replace(self.spec, parameters=asked)
        return method

    @property
    def supports_batching(self) -> bool:  # type: ignore[override]
        return self.inner.supports_batching

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        for group in groups:
            self.require_unblocked(group.metadata.name)
            self.inner.validate_inputs(*self._inner_inputs(group), group_name=group.metadata.name)
        inner = [{k: v for k, v in bound.items() if k not in ALIGNMENT_NAMES} for bound in parameters]
        return self.inner._execute(groups, inner, options, input_dtypes=input_dtypes, out_dtype=out_dtype)

    def _inner_inputs(self, group: TensorGroup) -> tuple[list[Any], Any]:
        """The models of one tensor, and which of them is the base."""
        base = next((entry.id for entry in group.entries if entry.is_base), None)
        return [entry.id for entry in group.entries], base


def _contract(inner: InputContract, *, anchor_is_base: bool) -> InputContract:
    """The inner method's contract with an anchor, which may be one too many for it: an unlisted one takes no part."""
    most = inner.max_inputs
    return replace(inner, base=BasePolicy.REQUIRED, max_inputs=most if anchor_is_base or most is None else most + 1)


def aligned(inner: MergeMethod) -> AlignedMethod | None:
    """``aligned_<name>``: any method of MergeKit's (or of another plugin's) on aligned inputs.

    Where the inner method requires a base, the anchor is that base. Where it needs none, the anchor takes part only if
    it is also listed as a model.

    Returns:
        None for a method that has nothing to align (passthrough, an aligned one) or a parameter of the same name as
        ours; a method of ours that reads data shares its parameter with the alignment.
    """
    names = {p.name for p in inner.spec.parameters}
    if inner.spec.name in _UNALIGNABLE or isinstance(inner, AlignedMethod):
        return None
    if names & ALIGNMENT_NAMES and not isinstance(inner, DataMethod):
        return None
    title = inner.spec.pretty_name or inner.spec.name
    own = f"; {title}: {inner.spec.reference_url}" if inner.spec.reference_url else ""
    spec = replace(
        inner.spec,
        name=f"aligned_{inner.spec.name}",
        pretty_name=f"Aligned {title} ({TASK_VECTORS_TITLE}{own})",
        reference_url=TASK_VECTORS_PAPER,
    )
    return AlignedMethod(inner, spec, anchor_is_base=inner.spec.contract.base is BasePolicy.REQUIRED)


def rotation_match(inner: MergeMethod) -> AlignedMethod:
    """Every model in the anchor's coordinates, averaged like MergeKit's ``linear`` (Zhang et al., section 4)."""
    weight_of_one = tuple(replace(p, default=1.0) if p.name == "weight" else p for p in inner.spec.parameters)
    spec = replace(
        inner.spec,
        name="rotation_match",
        pretty_name=f"Rotation Match ({ROTATION_TITLE})",
        reference_url=ROTATION_PAPER,
        parameters=weight_of_one,
    )
    return AlignedMethod(inner, spec, anchor_is_base=False)
