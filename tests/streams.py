"""Models for tests of the residual stream, and their state dicts as scopes and back."""

from __future__ import annotations

from typing import Any

from models import FAMILIES, make_model
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.families.stream import layer_scope, outside_scope, untied
from mergekit_symalign.planting import Planted, random_elements, random_stream
from mergekit_symalign.symmetry.options import Symmetries
from mergekit_symalign.symmetry.residual.kinds import ResidualKind
from mergekit_symalign.symmetry.residual.move import move_scope
from mergekit_symalign.symmetry.residual.scope import VOCABULARY, Scope, Tensors, norms_of

State = dict[str, Tensor]

VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-tokens": ("bert-classifier", "BertForTokenClassification", {}),
    "roberta-classifier": ("roberta", "RobertaForSequenceClassification", {}),
    "distilbert-classifier": ("distilbert", "DistilBertForSequenceClassification", {}),
    "distilbert-tokens": ("distilbert", "DistilBertForTokenClassification", {}),
    "modernbert-classifier": ("modernbert", "ModernBertForSequenceClassification", {}),
    "modernbert-tokens": ("modernbert", "ModernBertForTokenClassification", {}),
    "modernbert-biased": ("modernbert", "ModernBertForMaskedLM", {"norm_bias": True}),
    "deberta-classifier": ("deberta-v3", "DebertaV2ForSequenceClassification", {}),
    "deberta-tokens": ("deberta-v3", "DebertaV2ForTokenClassification", {}),
    "stablelm-unbiased": ("stablelm", "StableLmForCausalLM", {"use_qkv_bias": False}),
    "starcoder2-unbiased": ("starcoder2", "Starcoder2ForCausalLM", {"use_bias": False}),
    "neox-sequential": ("gpt-neox", "GPTNeoXForCausalLM", {"use_parallel_residual": False}),
    "gpt2-untied": ("gpt2", "GPT2LMHeadModel", {"tie_word_embeddings": False}),
}
CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {name: (name, None, {}) for name in FAMILIES} | VARIANTS


def case(name: str, seed: int = 0, **more: object) -> PreTrainedModel:
    """A random model of one of the cases."""
    family, class_name, overrides = CASES[name]
    return make_model(family, seed, **({"class_name": class_name} if class_name else {}), **overrides | more)


def stored(model: PreTrainedModel) -> State:
    """A state dict without the tensors that are tied to another one."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: x for name, x in model.state_dict().items() if name not in tied}


def split(
    layout: ModelLayout, state: State, *, untie: bool = False, use: Symmetries | None = None
) -> tuple[list[Scope], list[State]]:
    """Outside first, then each layer by the names inside it."""
    claims = {name: layout.claim(name) for name in state}
    outside = {name: state[name] for name, claim in claims.items() if claim is not None and claim.layer is None}
    parts = [untied(layout, outside) if untie else outside]
    scopes = [outside_scope(layout, parts[0])]
    for layer in range(layout.layers):
        parts.append({c.part: state[name] for name, c in claims.items() if c is not None and c.layer == layer})
        scopes.append(layer_scope(layout, layer, state, use and {"attention": use, "mlp": use}))
    return scopes, parts


def in_other_coordinates(
    layout: ModelLayout, state: State, kind: ResidualKind, norms: State, what: Planted | None = None
) -> State:
    """A state dict under a random element of its stream and of every block, the same for every call.

    Args:
        layout: of the model.
        state: its tensors, as `stored` gives them.
        kind: of the stream's element.
        norms: tensors whose norms the result gets where the stream turns.
        what: may be planted in the blocks.
    """
    planted = random_elements(layout, 2, *([] if what is None else [what]))
    stream = random_stream(kind, layout.geometry.hidden, 1)
    (scopes, parts), (_, others) = split(layout, state), split(layout, norms)
    moved = []
    for i, (scope, x, other) in enumerate(zip(scopes, parts, others, strict=True)):
        blocks = {block.value: g for (layer, block), g in planted.items() if layer == i - 1}
        moved.append(move_scope(scope, x, kind, stream, blocks, norms_of(scope, other)))
    return joined(layout, moved)


def at_tokens(scope: Scope, tensors: Tensors, rows: Tensor) -> dict[str, Tensor]:
    """Embedding, head and what else has a row for each token, with some of the rows, in the order given.

    Models whose tokenizers differ are compared by the tokens that both have.
    """
    result = dict(tensors)
    for name, x in tensors.items():
        if VOCABULARY in scope.axes[name].names:
            result[name] = x.index_select(scope.axes[name].names.index(VOCABULARY), rows.to(x.device))
    return result


def joined(layout: ModelLayout, parts: list[State]) -> State:
    """The inverse of `split`."""
    inside = {layout.name(i, part): x for i, layer in enumerate(parts[1:]) for part, x in layer.items()}
    return parts[0] | inside
