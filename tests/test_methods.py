"""Every method that MergeKit has, aligned: scrambled inputs merge like unscrambled ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State, load, merge_config, merged
from mergekit import merge_methods
from mergekit.card import method_md
from mergekit.merge_methods import MergeMethod, TensorGroup, merge_method
from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase
from models import ROUNDINGS, make_model, off_by, perturbed, save, with_weights

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.methods import ALIGNMENT_NAMES, ALIGNMENT_PARAMETERS, PlannedMethod
from mergekit_symalign.planting import random_elements, transform

INNER = {m.spec.name: m for m in merge_methods.registered_methods() if not isinstance(m, PlannedMethod)}
PARAMETERS = {"weight": 0.6, "t": 0.4, "density": 0.5}
# A weight is kept if its change times the divergence of its row is large. Of rows that are nearly equal, float32 leaves
# that divergence a few digits, so single weights that lie at the threshold fall to either side.
TIPPING = {"arcee_fusion"}
Paths = dict[str, Path]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """The anchor; two siblings already in its coordinates (b, c); the same in foreign coordinates (twin-b, twin-c)."""
    folder = tmp_path_factory.mktemp("models")
    anchor = make_model("llama", 0)
    layout = resolve(anchor.config, model="m")
    result = {"a": save(anchor, folder / "a")}
    for seed, name in enumerate("bc", 1):
        path = save(perturbed(anchor, 0.1, seed), folder / f"raw-{name}")
        state = merged(merge_config("rotation_match", result["a"], [path]), folder / f"out-{name}")
        result[name] = save(with_weights(anchor, state), folder / name)
        planted = transform({k: x.double() for k, x in state.items()}, layout, random_elements(layout, 10 + seed))
        result[f"twin-{name}"] = save(with_weights(anchor, planted), folder / f"twin-{name}")
    return result


def _inputs(method: MergeMethod, paths: Paths, prefix: str) -> dict[str, Any]:
    """Base and models that a method can merge: the anchor as base where one is required, two models where it may."""
    contract = method.spec.contract
    two = contract.max_inputs is None or contract.max_inputs > 2
    models = [paths[f"{prefix}{name}"] for name in ("bc" if two else "b")]
    if contract.base is BasePolicy.REQUIRED:
        models = [paths["a"], *models]
    parameters = {p.name: PARAMETERS[p.name] for p in method.spec.parameters if p.name in PARAMETERS}
    return {"models": models, "parameters": parameters}


def _merge(name: str, base: Path | None, inputs: dict[str, Any], out: Path) -> State:
    config = merge_config(name, base, inputs["models"], parameters=inputs["parameters"])
    return merged(config, out, random_seed=0)


@pytest.mark.parametrize("name", sorted(INNER.keys() - {"passthrough"}))
def test_scrambled_inputs_merge_like_unscrambled_ones(name: str, paths: Paths, tmp_path: Path) -> None:
    method = INNER[name]
    base = paths["a"] if method.spec.contract.base is BasePolicy.REQUIRED else None
    wanted = _merge(name, base, _inputs(method, paths, ""), tmp_path / "wanted")
    got = _merge(f"aligned_{name}", paths["a"], _inputs(method, paths, "twin-"), tmp_path / "got")
    plain = _merge(name, base, _inputs(method, paths, "twin-"), tmp_path / "plain")
    assert wanted.keys() == got.keys()
    if name in TIPPING:
        got = {key: _without_tips(x, wanted[key]) for key, x in got.items()}
    assert off_by(got, wanted) < ROUNDINGS
    assert off_by(plain, wanted) > 1000 * ROUNDINGS


def _without_tips(x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """A tensor without the few weights that came down on the other side of the method's threshold."""
    rounded = ROUNDINGS * torch.finfo(x.dtype).eps * wanted.abs().max()
    tipped = (x - wanted).abs() > 8 * rounded
    assert float(tipped.float().mean()) < 1e-3
    return torch.where(tipped, wanted, x)


def test_every_method_is_there_with_its_parameters() -> None:
    for name, method in INNER.items():
        if name == "passthrough":
            with pytest.raises(RuntimeError, match="aligned_passthrough"):
                merge_methods.get("aligned_passthrough")
            continue
        ours = merge_methods.get(f"aligned_{name}").spec
        assert {p.name for p in ours.parameters} == {p.name for p in method.spec.parameters} | ALIGNMENT_NAMES
        card = method_md(ours.name)
        assert "https://arxiv.org/abs/2511.10850" in card
        assert (method.spec.pretty_name or name) in card
        assert not method.spec.reference_url or method.spec.reference_url in card


def test_the_anchor_takes_part_in_a_baseless_method_only_if_listed(paths: Paths, tmp_path: Path) -> None:
    def karcher(models: list[str], out: str) -> State:
        return merged(merge_config("aligned_karcher", paths["a"], [paths[m] for m in models]), tmp_path / out)

    without, with_anchor = karcher(["twin-b", "twin-c"], "without"), karcher(["a", "twin-b", "twin-c"], "with")
    plain = merged(merge_config("karcher", None, [paths[m] for m in "abc"]), tmp_path / "plain")
    assert off_by(with_anchor, plain) < ROUNDINGS
    assert off_by(without, plain) > 1000 * ROUNDINGS


def test_a_method_registered_later_is_aligned_as_well(paths: Paths, tmp_path: Path) -> None:
    @merge_method(name="first_of_all", contract=InputContract(base=BasePolicy.REQUIRED))
    def first_of_all(group: TensorGroup, strength: PerNonBase[float]) -> torch.Tensor:
        entry = group.non_base[0]
        return entry.tensor * strength[entry.id]

    with pytest.raises(RuntimeError, match="first_of_all"):
        merge_methods.get("aligned_first_of_all")
    merge_methods.register(first_of_all)
    config = merge_config("aligned_first_of_all", paths["a"], [paths["twin-b"]], parameters={"strength": 2.0})
    out = merged(config, tmp_path)
    halved = {name: x / 2 for name, x in out.items()}
    assert off_by(halved, load(paths["b"])) < ROUNDINGS


def test_a_method_with_a_parameter_of_ours_is_left_alone() -> None:
    @merge_method(name="turning", contract=InputContract(base=BasePolicy.REQUIRED))
    def turning(group: TensorGroup, rotation: float) -> torch.Tensor:
        return group.entries[0].tensor * rotation

    merge_methods.register(turning)
    with pytest.raises(RuntimeError, match="aligned_turning"):
        merge_methods.get("aligned_turning")


def test_the_documented_parameters_are_those_of_the_code() -> None:
    """`make methods` writes them."""
    import write_methods

    for path, written in (
        (write_methods.PAGE, write_methods.table()),
        (write_methods.DATA_PAGE, write_methods.data_table()),
    ):
        page = path.read_text("utf-8")
        assert write_methods.page(page, written) == page
    text = write_methods.PAGE.read_text("utf-8")
    assert all(f"| `{p.name}` |" in text for p in ALIGNMENT_PARAMETERS)
    assert all(p.description for p in ALIGNMENT_PARAMETERS)
