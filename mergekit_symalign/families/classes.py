"""The transformers classes of a family: a class is a backbone and a head."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from mergekit_symalign.families.schema import Family, TensorSpec, Tower

BARE = "Model"  # how the class without a head ends
LANGUAGE = "ForCausalLM"  # and the one whose head predicts words


def classes_of(family: Family) -> dict[str, Family]:
    """Each class that a family describes, with the tensors of its own head alone.

    Of classes that are not listed but derived, those that the installed transformers has.
    """
    if not family.heads:
        return dict.fromkeys(family.architectures, family)
    listed = {name: _ending(name, family) for name in family.architectures}
    stems = dict.fromkeys(name.removesuffix(ending) for name, ending in listed.items())
    derived = {stem + ending: ending for stem in stems for ending in family.heads} if family.derives else {}
    known = {name: ending for name, ending in derived.items() if name in _of_transformers()}
    return {name: with_head(family, ending) for name, ending in {**known, **listed}.items()}


def class_of(family: Family, name: str) -> Family:
    """A family with the tensors of the head of one class that it lists."""
    return with_head(family, _ending(name, family)) if family.heads else family


def with_head(family: Family, ending: str) -> Family:
    """A family's model with the head of the classes that end so; the bare model's names have no prefix."""
    head, bare = family.heads[ending], ending == BARE
    changes = {
        "heads": {},
        "task_heads": head,
        "tensors": _read_in({**family.tensors, **head}, family.tensors),
        "name": f"{family.name}_bare" if bare else family.name,
        "title": f"{family.title} without a head" if bare else family.title,
        "prefix": "" if bare else family.prefix,
        "towers": family.towers if bare else {k: _behind(family.prefix, of) for k, of in family.towers.items()},
        "stored_prefixes": {family.prefix: "", **family.stored_prefixes} if bare else family.stored_prefixes,
        "stream": family.stream.model_copy(update={"returned": bare or family.stream.returned}),
    }
    return family.model_copy(update=changes)


def _behind(prefix: str, tower: Tower) -> Tower:
    return tower.model_copy(update={"prefix": prefix + tower.prefix})


def _read_in(present: Mapping[str, TensorSpec], tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Norms read by those of their readers that this class has, and that read the stream there."""
    reading = {name for name, spec in present.items() if "residual" in spec.axes}
    return {
        name: spec.model_copy(update={"read_by": tuple(reader for reader in spec.read_by if reader in reading)})
        for name, spec in tensors.items()
    }


def _ending(name: str, family: Family) -> str:
    found = max((ending for ending in family.heads if name.endswith(ending)), key=len, default=None)
    if found is None:
        raise ValueError(f"family {family.name}: none of its heads belongs to {name}")
    return found


@cache
def _of_transformers() -> frozenset[str]:
    import transformers

    return frozenset(dir(transformers))
