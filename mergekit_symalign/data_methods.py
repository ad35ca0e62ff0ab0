"""The registered merge methods that use data: their parameters, and what they do where no data tells anything.

How each of them merges is in `graph/data_plans.py`: it plans the tensors of a whole merge at once, because a linear
layer's weight and bias belong together, and its statistics come from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

from mergekit_symalign.planned_methods import CALIBRATION_PARAMETERS, PlannedMethod

REGMEAN_TITLE = "Dataless Knowledge Fusion by Merging Weights of Language Models"
REGMEAN_PAPER = "https://arxiv.org/abs/2212.09849"
FISHER_TITLE = "Merging Models with Fisher-Weighted Averaging"
FISHER_PAPER = "https://arxiv.org/abs/2111.09832"
KRONECKER_TITLE = "Merging by Matching Models in Task Parameter Subspaces"
KRONECKER_PAPER = "https://arxiv.org/abs/2312.04339"
WUDI_TITLE = "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors"
WUDI_PAPER = "https://arxiv.org/abs/2503.08099"

OT_TITLE = "Model Fusion via Optimal Transport"
OT_PAPER = "https://arxiv.org/abs/1910.05653"
TRANSFORMER_OT_TITLE = "Transformer Fusion with Optimal Transport"
TRANSFORMER_OT_PAPER = "https://arxiv.org/abs/2310.05719"

TASK_VECTORS = "task_vectors"

PAPERS: dict[str, tuple[tuple[str, str], ...]] = {
    "regmean": ((REGMEAN_TITLE, REGMEAN_PAPER),),
    "regmean_task_arithmetic": ((REGMEAN_TITLE, REGMEAN_PAPER), (WUDI_TITLE, WUDI_PAPER)),
    "fisher": ((FISHER_TITLE, FISHER_PAPER), (KRONECKER_TITLE, KRONECKER_PAPER)),
    "ot_fusion": ((OT_TITLE, OT_PAPER), (TRANSFORMER_OT_TITLE, TRANSFORMER_OT_PAPER)),
}
"""Title and address of the papers behind a method, for reports and model cards."""


class DataMethod(PlannedMethod):
    """A merge method that reads data beside the weights: statistics from a file, or prompts.

    Attributes:
        elsewhere: MergeKit's method for the tensors that the data says nothing of. It takes its parameters from
            those of the same name, then from ``fixed``, then its own defaults.
        fixed: parameters of ``elsewhere`` that a user does not set.
        needs_base: why it cannot do without ``base_model``, and which model that is, for messages.
        layer_by_layer: one layer has to be merged before the next, so loads come in their order.
        extra: a module that it needs, with the optional extra that installs it.
    """

    aligns = False
    layer_by_layer = False
    extra: tuple[str, str] | None = None

    def __init__(
        self,
        spec: MergeMethodSpec,
        elsewhere: MergeMethod,
        fixed: Mapping[str, Any] | None = None,
        needs_base: tuple[str, str] = (
            "adds what the models learned to base_model, but none is given",
            "that they are fine-tunes of",
        ),
    ) -> None:
        self.spec = spec
        self.needs_base = needs_base
        self.elsewhere = elsewhere
        self.fixed = fixed or {}
        self.anchor_is_base = spec.contract.base is BasePolicy.REQUIRED

    @property
    def inner(self) -> DataMethod:
        return self

    @property
    def alone(self) -> str:
        return "was called on it alone, and would merge it without its data: it needs the whole model"

    def with_unlisted_anchor(self) -> DataMethod:
        """The same: an unlisted base_model is not even planned (graph/planner.py)."""
        return self

    def given_elsewhere(self, p: ParameterSpec, bound: Mapping[str, Any]) -> Any:
        """The value of a parameter of ``elsewhere``.

        Args:
            p: the parameter.
            bound: values of our own parameters by name.
        """
        return bound[p.name] if p.name in bound else self.fixed.get(p.name, p.default)

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
        results = []
        for group, bound, dtype in zip(groups, parameters, input_dtypes, strict=True):
            given = {p.name: self.given_elsewhere(p, bound) for p in self.elsewhere.spec.parameters}
            results += self.elsewhere(
                [group], parameters=given, dtype=dtype, out_dtype=out_dtype, batch_options=options
            )
        return tuple(results)


def _weight(scope: ParameterScope, more: str = ", relative to the others") -> ParameterSpec:
    return ParameterSpec("weight", float, scope, default=1.0, description=f"of this model{more}")


_IN_SOLVES = ": relative to the others in linear layers; elsewhere its update is multiplied by it"


def _off_diagonal(default: float) -> ParameterSpec:
    return ParameterSpec(
        "off_diagonal",
        float,
        ParameterScope.SHARED,
        default=default,
        description="multiplies what a Gram matrix says of two different inputs: 1 uses it as it is, 0 leaves only "
        "the size of each input",
    )


def regmean(linear: MergeMethod) -> DataMethod:
    """Every linear layer nearest to all models' outputs, as their inputs' Gram matrices tell (Jin et al. 2023)."""
    ridge = ParameterSpec(
        "ridge",
        float,
        ParameterScope.SHARED,
        default=0.0,
        description="pulls inputs that were hardly seen to the average: this, times the mean of the diagonal, is "
        "added to the diagonal",
    )
    statistics = ParameterSpec(
        "statistics",
        str | None,
        ParameterScope.INPUT,
        default=None,
        description="required: this model's file from mergekit-symalign measure: a path, or "
        "hf://user/repo/file.safetensors",
    )
    spec = MergeMethodSpec(
        name="regmean",
        parameters=(_weight(ParameterScope.INPUT), statistics, _off_diagonal(0.9), ridge),
        contract=InputContract(base=BasePolicy.IGNORED),
        pretty_name=f"RegMean ({REGMEAN_TITLE})",
        reference_url=REGMEAN_PAPER,
    )
    return DataMethod(spec, linear)


def fisher(linear: MergeMethod) -> DataMethod:
    """Every weight averaged by how much each model's loss depends on it (Matena & Raffel 2022)."""
    own = (
        ParameterSpec(
            "statistics",
            str | None,
            ParameterScope.INPUT,
            default=None,
            description="required: this model's file from mergekit-symalign measure --fisher: a path, or "
            "hf://user/repo/file.safetensors",
        ),
        ParameterSpec(
            "normalize_fisher",
            Literal["none", "tensor", "model"],
            ParameterScope.SHARED,
            default="none",
            description="divide each model's Fisher information by its mean: over the tensor, or over the model",
        ),
        ParameterSpec(
            "epsilon",
            float,
            ParameterScope.SHARED,
            default=1e-6,
            description="pulls weights that no loss depends on to the average: this, times the tensor's mean, is "
            "added to the Fisher information",
        ),
    )
    spec = MergeMethodSpec(
        name="fisher",
        parameters=(_weight(ParameterScope.INPUT), *own),
        contract=InputContract(base=BasePolicy.IGNORED),
        pretty_name=f"Fisher-weighted averaging ({FISHER_TITLE})",
        reference_url=FISHER_PAPER,
    )
    return DataMethod(spec, linear)


def regmean_task_arithmetic(task_arithmetic: MergeMethod) -> DataMethod:
    """RegMean's solve on task vectors: what each model learned for its own inputs, added to the base."""
    own = (
        ParameterSpec(
            "statistics",
            str,
            ParameterScope.NON_BASE,
            default=TASK_VECTORS,
            description="this model's file from mergekit-symalign measure: a path, or hf://user/repo/file.safetensors. "
            "task_vectors needs no file: the model's own update shows which inputs it was trained on",
        ),
        ParameterSpec("lambda", float, ParameterScope.SHARED, default=1.0, description="how much of it is added"),
        _off_diagonal(1.0),
        ParameterSpec(
            "ridge",
            float,
            ParameterScope.SHARED,
            default=0.1,
            description="pulls inputs that no model was trained on to the base: this, times the mean of the diagonal, "
            "is added to the diagonal",
        ),
    )
    spec = MergeMethodSpec(
        name="regmean_task_arithmetic",
        parameters=(_weight(ParameterScope.NON_BASE, _IN_SOLVES), *own),
        contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2),
        pretty_name=f"RegMean on task vectors ({REGMEAN_TITLE}; {WUDI_TITLE}: {WUDI_PAPER})",
        reference_url=REGMEAN_PAPER,
    )
    return DataMethod(spec, task_arithmetic)


def ot_fusion(linear: MergeMethod) -> DataMethod:
    """Every layer's units brought to the anchor's by optimal transport, then averaged (Singh & Jaggi 2020)."""
    own = (
        ParameterSpec(
            "cost",
            Literal["weights", "activations"],
            ParameterScope.SHARED,
            default="weights",
            description="what units are compared by: their weights (OT-WTS), or what they put out on prompts (OT-ACTS)",
        ),
        ParameterSpec(
            "regularization",
            float,
            ParameterScope.SHARED,
            default=0.0,
            description="of the transport's entropy, with costs from 0 to 1; 0: exact, one unit for one unit; the "
            "papers' values are 0.06 for weights and 0.08 for activations",
        ),
        ParameterSpec(
            "residual",
            Literal["mean", "branch", "skip", "identity", "weighted"],
            ParameterScope.SHARED,
            default="mean",
            description="which map the residual stream carries on: the mean of its own and the added block's, the "
            "block's, its own, none at all, or the mean weighted by their size on the prompts",
        ),
        ParameterSpec(
            "heads",
            Literal["ignore", "respect"],
            ParameterScope.SHARED,
            default="ignore",
            description="ignore: query, key and value are matched over their full width, as in the papers; respect: "
            "the attention is aligned exactly, head by head",
        ),
    )
    calibration = tuple(replace(p, description=_FOR_COST.get(p.name, p.description)) for p in CALIBRATION_PARAMETERS)
    spec = MergeMethodSpec(
        name="ot_fusion",
        parameters=(_weight(ParameterScope.INPUT), *own, *calibration),
        contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2),
        pretty_name=f"Optimal transport fusion ({OT_TITLE}; {TRANSFORMER_OT_TITLE}: {TRANSFORMER_OT_PAPER})",
        reference_url=OT_PAPER,
    )
    method = DataMethod(
        spec,
        linear,
        needs_base=("transports every model to base_model, but none is given", "that all others are brought to"),
    )
    method.layer_by_layer, method.extra = True, ("ot", "ot")
    return method


_FOR_COST = {
    "calibration": "prompts for cost: activations: a .jsonl or .txt file, or default for the set in the package"
}

MAKERS: tuple[tuple[Callable[[MergeMethod], DataMethod], str], ...] = (
    (regmean, "linear"),
    (fisher, "linear"),
    (regmean_task_arithmetic, "task_arithmetic"),
    (ot_fusion, "linear"),
)
"""Each method, and the method of MergeKit's that merges what the data says nothing of."""


def data_methods(known: Mapping[str, MergeMethod]) -> list[DataMethod]:
    """All methods that use data.

    Args:
        known: MergeKit's methods by name.
    """
    return [make(known[elsewhere]) for make, elsewhere in MAKERS]
