"""Classes that differ in their head alone, in what runs a model: activations, statistics, comparison, transport."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import merge_config, merged
from models import save, word_tokenizer
from more_models import more_model
from test_more_families import perturbed_copy

from mergekit_symalign.cli import main
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import random_elements, transform
from mergekit_symalign.trial.models import outputs, relative_deviation, with_weights


def _run(*arguments: object) -> str:
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("name", ["reward", "qwen3-embedding", "bert-choice"])
def test_a_class_with_another_head_in_every_use(tmp_path: Path, name: str) -> None:
    anchor = more_model(name)
    sibling, layout = perturbed_copy(anchor), resolve(anchor.config, model=name)
    twin = with_weights(sibling, transform(sibling.state_dict(), layout, random_elements(layout, 3)))
    models = (with_weights(model, model.state_dict()) for model in (anchor, twin))
    one, other = (save(model, tmp_path / path) for path, model in zip("ab", models, strict=True))
    for path in (one, other):
        word_tokenizer(97, "w").save_pretrained(path)
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"w{i + 3} w{(i * 7) % 80 + 3} w{(i * 5) % 80 + 3}\n" for i in range(60)), "utf-8")
    seen = {"objective": "activations", "calibration": str(texts)}
    merged(merge_config("rotation_match", one, [other], parameters=seen), tmp_path / "out")
    found = type(anchor).from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    result = with_weights(anchor, {key: x.double() for key, x in found.items()})
    assert relative_deviation(outputs(twin), outputs(result)) < 1e-4
    assert "The same function" in _run("verify", other, tmp_path / "out", "--prompts", texts)
    sources = []
    for path in (one, other):
        file = tmp_path / f"{path.name}.safetensors"
        _run("measure", path, "-o", file, "--calibration", texts, "--quiet")
        sources.append({"model": path, "parameters": {"statistics": str(file), "weight": 0.5}})
    for method, listed, base in (("regmean", sources, None), ("ot_fusion", [one, other], one)):
        out = merged(merge_config(method, base, listed), tmp_path / method)
        assert all(x.isfinite().all() for x in out.values())
