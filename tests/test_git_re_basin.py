"""The Git Re-Basin examples find planted orders of neurons and heads, and leave a planted rotation alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from conftest import load, merged
from models import make_model, save, with_weights, word_tokenizer

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import Planted, random_elements, transform

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("git_re_basin*.yml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_permutations_are_found_and_nothing_else(example: Path, tmp_path: Path) -> None:
    anchor = make_model("llama", 0)
    layout = resolve(anchor.config, model="a test")
    out = {}
    for rotation in (False, True):
        what = Planted(rotation=rotation, scaling=False)
        twin = transform(anchor.state_dict(), layout, random_elements(layout, 3, what))
        folder = tmp_path / str(rotation)
        paths = [save(anchor, folder / "anchor"), save(with_weights(anchor, twin), folder / "twin")]
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(3, 97, (40, 24), generator=generator).tolist()
        (folder / "prompts.txt").write_text("\n".join(" ".join(f"w{i}" for i in row) for row in rows), "utf-8")
        for path in paths:
            word_tokenizer(97).save_pretrained(path)
        models = [{"model": str(path)} for path in paths]
        config = yaml.safe_load(example.read_text("utf-8")) | {"base_model": str(paths[0]), "models": models}
        if "calibration" in config["parameters"]:
            config["parameters"]["calibration"] = str(folder / "prompts.txt")
        out[rotation] = merged(config | {"dtype": "float32"}, folder / "out")
    wanted = load(tmp_path / "False" / "anchor")
    assert all(torch.equal(out[False][name], x) for name, x in wanted.items())
    value = "model.layers.0.self_attn.v_proj.weight"
    assert float((out[True][value] - wanted[value]).abs().max()) > 0.1


def test_there_is_one_for_weights_and_one_for_activations() -> None:
    assert [yaml.safe_load(e.read_text("utf-8"))["parameters"].get("objective") for e in EXAMPLES] == [
        "activations",
        None,
    ]
