"""What a merge says of itself: the report beside the output and the section in the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load, merge_config, merged
from huggingface_hub import ModelCard
from models import make_model, perturbed, save, with_weights

from mergekit_symalign.card import verdict
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.planting import Planted, random_elements, transform


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    anchor = make_model("llama", 0)
    sibling, skill = perturbed(anchor, 0.1, 1), perturbed(anchor, 0.1, 2)
    layout = resolve(anchor.config, model="m")
    twin = with_weights(sibling, transform(sibling.state_dict(), layout, random_elements(layout, 3)))
    models = {"anchor": anchor, "sibling": sibling, "skill": skill, "twin": twin}
    return {name: save(model, folder / name) for name, model in models.items()}


def _config(paths: dict[str, Path], **parameters: Any) -> dict[str, Any]:
    models = [
        {"model": paths["twin"], "parameters": {"weight": 1.0}},
        {"model": paths["skill"], "parameters": {"weight": 1.0, "align": False}},
    ]
    return merge_config("aligned_task_arithmetic", paths["anchor"], models, parameters=parameters)


def test_report_and_card_say_what_was_done(paths: dict[str, Path], mergekit_yaml, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = mergekit_yaml(_config(paths), out, "--no-copy-tokenizer")
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "symalign_report.json").read_text("utf-8"))
    assert report["method"] == "aligned_task_arithmetic"
    assert report["anchor"] == [str(paths["anchor"])]
    assert report["exact"] is True
    assert report["settings"]["rotation"] == "exact"
    assert list(report["models"]) == [str(paths["twin"])]  # the other was not aligned
    entry = report["models"][str(paths["twin"])]
    expected = [(layer, block) for layer in range(3) for block in ("attention", "mlp")]
    assert [(b["layer"], b["block"]) for b in entry["blocks"]] == expected

    anchor, twin, sibling = (load(paths[name]) for name in ("anchor", "twin", "sibling"))
    for block in entry["blocks"]:
        part = {"attention": "self_attn", "mlp": "mlp"}[block["block"]]
        names = [name for name in anchor if f"layers.{block['layer']}.{part}." in name]
        before, original = (
            sum(float((anchor[n].double() - m[n].double()).square().sum()) for n in names) for m in (twin, sibling)
        )
        assert block["distance_before"] == pytest.approx(before, rel=1e-5)
        assert block["distance_after"] <= 1.001 * original
    totals = entry["totals"]
    assert totals["distance_before"] == pytest.approx(sum(b["distance_before"] for b in entry["blocks"]))
    assert totals["neurons"] == 3 * 80
    assert totals["neurons_moved"] > 200
    assert 0.5 <= totals["scale_min"] < totals["scale_max"] <= 2.0
    assert "coordinates differ" in verdict(totals)

    card = ModelCard.load(out / "README.md")
    assert card.data.tags == ["mergekit", "merge", "mergekit-symalign"]
    assert card.data.library_name == "transformers"
    assert "### Parameter alignment" in card.text
    assert "coordinates differ" in card.text
    assert "https://arxiv.org/abs/2511.10850" in card.text
    assert "https://arxiv.org/abs/2502.00264" in card.text
    assert "<details>" in card.text
    assert card.text.index("### Parameter alignment") < card.text.index("### Configuration")


def test_everything_else_stays_byte_for_byte(paths: dict[str, Path], tmp_path: Path) -> None:
    """With nothing aligned the aligned method writes what the plain one writes, and its report and section."""
    for method, models in (
        ("task_arithmetic", [{"model": paths["skill"], "parameters": {"weight": 1.0}}]),
        ("aligned_task_arithmetic", [{"model": paths["skill"], "parameters": {"weight": 1.0, "align": False}}]),
    ):
        config = merge_config(method, paths["anchor"], models)
        merged(config, tmp_path / method, write_model_card=True)
    plain, aligned = (
        {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()}
        for name in ("task_arithmetic", "aligned_task_arithmetic")
    )
    assert aligned.keys() - plain.keys() == {"symalign_report.json"}
    for name in plain.keys() - {"README.md", "mergekit_config.yml"}:
        assert aligned[name] == plain[name], name
    assert b"symalign" not in plain["README.md"]


def test_planted_numbers_are_reported(tmp_path: Path) -> None:
    """A planted turn of known angles and factors, without noise, comes back in the report."""
    anchor = make_model("llama", 0)
    layout = resolve(anchor.config, model="m")
    elements = random_elements(layout, 4, Planted(heads=False, permutation=False))
    paths = [save(anchor, tmp_path / "a")]
    paths.append(save(with_weights(anchor, transform(anchor.state_dict(), layout, elements)), tmp_path / "b"))
    merged(merge_config("rotation_match", paths[0], [paths[1]]), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))
    for block in report["models"][str(paths[1])]["blocks"]:
        if block["block"] == "mlp":
            assert block["neurons_moved"] == 0
            continue
        planes = elements[block["layer"], BlockKind.attention].actions["query"].inverse()
        angles = torch.rad2deg((torch.remainder(planes.angle + torch.pi, 2 * torch.pi) - torch.pi).abs())
        assert block["query_angle_max"] == pytest.approx(float(angles.max()), abs=1e-2)
        assert block["query_angle_median"] == pytest.approx(float(angles.flatten().median()), abs=20)
        assert block["kv_heads_moved"] == block["query_heads_moved"] == 0


def test_verdicts() -> None:
    def said(before: float, after: float) -> str:
        return verdict({"distance_before": before**2, "distance_after": after**2})

    assert said(1.0, 0.9998) == "nothing to align: matching lowers the distance by 0.02 %; the plain method will do"
    assert said(1.0, 0.95) == "little to align: 5 % of the distance is symmetry"
    assert said(1.0, 0.69) == "coordinates differ: 31 % of the distance is symmetry"
    assert said(0.0, 0.0) == "nothing to align: the weights are equal"
    assert "rises" in said(1.0, 1.1)
    assert "not known" in verdict({})
