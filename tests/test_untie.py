"""``untie``: tied models get a head of their own, and then a rotation of their residual stream is exact."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import State, load, merge_config, merged, squared_distance
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge
from mergekit.scripts.multimerge import main as mergekit_multi
from mergekit.scripts.run_yaml import main as mergekit_yaml
from models import logits, make_model, perturbed, relative_deviation, save, with_weights, word_tokenizer
from streams import in_other_coordinates, stored
from transformers import Gemma3Config, PreTrainedModel

from mergekit_symalign.alignment_file import AlignmentFile
from mergekit_symalign.cli import main
from mergekit_symalign.errors import ArchitectureError, ConfigError, ParameterError, SymalignError, UnalignedCallError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.families.stream import embedding_name, head_name, residual_kind
from mergekit_symalign.graph.untie import untie_config
from mergekit_symalign.symmetry.residual.kinds import Residual

NO_ALIGNMENT = {"permutation": False, "heads": False, "rotation": "none", "scaling": False}
TIED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-tied", {"num_hidden_layers": 1}),
    "qwen2": ("qwen2-tied", {"num_hidden_layers": 1}),
    "gpt2": ("gpt2", {"n_layer": 1, "n_head": 3}),
    "cohere": ("cohere", {"num_hidden_layers": 1}),  # MergeKit does not know what its head is tied to
    "phi4-mini": ("phi4-mini", {"num_hidden_layers": 1, "tie_word_embeddings": True}),  # MergeKit always plans its head
    "phi2": ("phi2", {"num_hidden_layers": 1, "tie_word_embeddings": True}),  # its head has a bias
    "smollm3": ("smollm3", {"num_hidden_layers": 1, "tie_word_embeddings": True, "no_rope_layers": [1]}),  # inferred
}


def tied_model(name: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    family, overrides = TIED[name]
    return make_model(family, seed, **overrides | more)


def untied_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with a head of its own."""
    config = type(model.config).from_dict(model.config.to_dict() | {"tie_word_embeddings": False})
    copy = type(model)(config).to(model.dtype).eval()
    copy.load_state_dict(model.state_dict())
    return copy


def rotated(model: PreTrainedModel, norms: State) -> PreTrainedModel:
    """An untied model in other coordinates of its residual stream and of all its blocks, with other norms."""
    layout = resolve(model.config, model="m")
    kind = residual_kind(layout, tied=False, wanted=Residual.rotation)
    return with_weights(model, model.state_dict() | in_other_coordinates(layout, stored(model), kind, norms))


def opened(like: PreTrainedModel, path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model as transformers loads it, all of its tensors from the checkpoint and all of them used."""
    model, info = type(like).from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def has_own_head(model: PreTrainedModel) -> bool:
    assert not model.config.tie_word_embeddings
    return model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def says_untied(path: Path) -> bool:
    return json.loads((path / "config.json").read_text("utf-8"))["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", TIED)
def test_an_untied_copy_computes_the_same(tmp_path: Path, name: str) -> None:
    anchor = tied_model(name)
    model = perturbed(anchor, 0.1, 3)
    paths = [save(x, tmp_path / part, torch.float64) for part, x in (("anchor", anchor), ("model", model))]
    parameters = {"untie": True} | NO_ALIGNMENT
    merged(
        merge_config("rotation_match", *paths[:1], paths[1:], parameters=parameters, dtype="float64"), tmp_path / "o"
    )
    out = opened(model, tmp_path / "o", torch.float64)
    assert says_untied(tmp_path / "o")
    assert has_own_head(out)
    assert relative_deviation(logits(model), logits(out)) < 1e-9


class Tied:
    """A tied anchor, a tied sibling, and the sibling untied and in other coordinates."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder, self.anchor = folder, tied_model(name)
        self.sibling = perturbed(self.anchor, 0.1, 7)
        self.twin = rotated(untied_copy(self.sibling), stored(untied_copy(tied_model(name, 5))))
        self.other = tied_model(name, 9)
        for part in ("anchor", "sibling", "twin", "other"):
            save(getattr(self, part), folder / part)
            word_tokenizer(97).save_pretrained(folder / part)

    def path(self, name: str) -> Path:
        return self.folder / name

    def config(self, *names: str, method: str = "rotation_match", anchor: str = "anchor", **parameters: Any) -> Any:
        asked = {"residual": "rotation", "untie": True, "residual_rounds": 2} | parameters
        return merge_config(method, self.path(anchor), [self.path(name) for name in names], parameters=asked)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def tied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tied:
    return Tied(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tied:
    return Tied("llama", tmp_path_factory.mktemp("llama"))


def test_a_rotated_twin_of_a_tied_model_comes_back(tied: Tied, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(json.dumps(tied.config("twin")), "utf-8")
    args = [str(tmp_path / "config.yml"), str(tmp_path / "out"), "--no-copy-tokenizer", "--quiet"]
    done = CliRunner().invoke(mergekit_yaml, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    merged(tied.config("sibling"), tmp_path / "reference")
    assert says_untied(tmp_path / "out")
    out = opened(tied.twin, tmp_path / "out")
    assert has_own_head(out)
    assert relative_deviation(logits(tied.sibling), logits(out)) < 1e-3
    anchor = {name: x.float() for name, x in untied_copy(tied.anchor).state_dict().items()}
    reference = opened(tied.twin, tmp_path / "reference")
    distances = [squared_distance(anchor, model.state_dict()) for model in (out, reference, tied.twin)]
    assert distances[0] == pytest.approx(distances[1], rel=5e-3)
    assert distances[0] < 0.2 * distances[2]


def test_a_tied_model_of_another_initialisation_keeps_its_function(tied: Tied, tmp_path: Path) -> None:
    merged(tied.config("other"), tmp_path / "out")
    out = opened(tied.twin, tmp_path / "out")
    assert relative_deviation(logits(tied.other), logits(out)) < 1e-3
    assert json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))["exact"]
    head, embedding = out.get_output_embeddings().weight, out.get_input_embeddings().weight
    assert not torch.allclose(head, embedding, atol=0.1)


def test_equal_models_give_the_model(tied: Tied, tmp_path: Path) -> None:
    copy = shutil.copytree(tied.path("anchor"), tmp_path / "copy")
    out = merged(tied.config("anchor", str(copy), method="aligned_linear", weight=0.5), tmp_path / "out")
    for name, x in untied_copy(tied.anchor).state_dict().items():
        assert torch.allclose(out[name], x.float(), atol=1e-5), name


def test_apply_writes_the_head_that_a_merge_writes(tied: Tied, tmp_path: Path) -> None:
    merged(tied.config("other", save_alignment=str(tmp_path)), tmp_path / "out")
    file, other = str(tmp_path / "other.safetensors"), str(tied.path("other"))
    args = ["apply", file, other, "-o", str(tmp_path / "applied"), "--anchor", str(tied.path("anchor")), "--quiet"]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    assert says_untied(tmp_path / "applied")
    applied, merge = (opened(tied.twin, tmp_path / name) for name in ("applied", "out"))
    assert has_own_head(applied)
    for (name, x), y in zip(applied.state_dict().items(), merge.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    back = ["apply", file, str(tmp_path / "applied"), "-o", str(tmp_path / "back"), "--invert", "--norms-of", other]
    done = CliRunner().invoke(main, [*back, "--quiet"])
    assert done.exit_code == 0, done.output
    assert relative_deviation(logits(tied.other), logits(opened(tied.twin, tmp_path / "back"))) < 1e-3


@pytest.mark.parametrize(("anchor", "model"), [("anchor", "twin"), ("twin", "anchor")])
def test_tied_and_untied_models_merge(llama: Tied, tmp_path: Path, anchor: str, model: str) -> None:
    """Each model's head is its own, or its embedding; with ``untie`` alone the heads are averaged as any tensor."""
    parameters = {"residual": "none", "weight": 0.5} | NO_ALIGNMENT
    config = llama.config(anchor, model, method="aligned_linear", anchor=anchor, **parameters)
    out, untied = merged(config, tmp_path / "out"), load(llama.path("twin"))
    wanted = (load(llama.path("anchor"))["model.embed_tokens.weight"] + untied["lm_head.weight"]) / 2
    assert torch.allclose(out["lm_head.weight"], wanted, atol=1e-6)
    assert has_own_head(opened(llama.twin, tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))
    assert report["exact"]
    assert report["settings"]["untie"]


def test_a_tied_model_of_an_untied_anchor_keeps_its_head_under_a_rotation(llama: Tied, tmp_path: Path) -> None:
    """The output has one model's config, which says that its embedding is its head."""
    with pytest.raises(ParameterError, match="untie: true"):
        merged(llama.config("other", anchor="twin", untie=False), tmp_path / "refused")
    merged(llama.config("other", anchor="twin"), tmp_path / "out")
    assert relative_deviation(logits(llama.other), logits(opened(llama.twin, tmp_path / "out"))) < 1e-3


def test_a_file_repeats_the_merge_that_saved_it(llama: Tied, tmp_path: Path) -> None:
    args = ["solve", *(str(llama.path(name)) for name in ("anchor", "other")), "-o", str(tmp_path / "a.safetensors")]
    done = CliRunner().invoke(main, [*args, "--quiet", "--residual", "rotation", "--untie", "--residual-rounds", "2"])
    assert done.exit_code == 0, done.output
    file = AlignmentFile.open(tmp_path / "a.safetensors")
    assert file.settings_of("residual")["untie"] is True
    model = [{"model": llama.path("other"), "parameters": {"alignment": str(file.path)}}]
    plain = merge_config("rotation_match", llama.path("anchor"), model)
    with pytest.raises(SymalignError, match=r"its head is its embedding.*Add untie: true to the merge"):
        merged(plain, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    again = merged(plain | {"parameters": {"untie": True}}, tmp_path / "again")
    out = merged(llama.config("other"), tmp_path / "out")
    assert all(torch.equal(x, again[name]) for name, x in out.items())
    assert has_own_head(opened(llama.twin, tmp_path / "again"))


@pytest.mark.parametrize("names", [("anchor", "other"), ("anchor", "twin"), ("twin", "other")])
def test_inspect_and_barrier_untie(llama: Tied, tmp_path: Path, names: tuple[str, str]) -> None:
    asked = [*(str(llama.path(name)) for name in names), "--residual", "rotation", "--residual-rounds", "1"]
    refused = CliRunner().invoke(main, ["inspect", *asked, "--quiet"])
    assert refused.exit_code == 2, refused.output
    assert "untie: true" in refused.output
    found = CliRunner().invoke(main, ["inspect", *asked, "--untie", "--quiet"])
    assert found.exit_code == 0, found.output
    (tmp_path / "text.txt").write_text("w3 w4 w5 w6 w7 w8\nw9 w8 w7 w6\n", "utf-8")
    text = ["--text", str(tmp_path / "text.txt"), "--points", "3", "--quiet"]
    done = CliRunner().invoke(main, ["barrier", *asked, "--untie", *text])
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if line.strip()[:1].isdigit()]
    start, _, end = ([float(x) for x in row[1:]] for row in rows)
    assert start[0] == start[1]
    assert end[0] == pytest.approx(end[1], abs=5e-3)  # the aligned model computes what the model does


def test_stages_pass_an_untied_model_on(llama: Tied, tmp_path: Path) -> None:
    """mergekit-multi: the second merge finds a head in what the first one wrote."""
    first = llama.config("other") | {"name": "first"}
    second = merge_config("rotation_match", llama.path("anchor"), ["first"], parameters={"untie": True} | NO_ALIGNMENT)
    file = tmp_path / "stages.yml"
    file.write_text("\n---\n".join(json.dumps(config) for config in (first, second)), "utf-8")
    args = [str(file), "-I", str(tmp_path / "between"), "--out-path", str(tmp_path / "out"), "--no-copy-tokenizer"]
    done = CliRunner().invoke(mergekit_multi, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    out = opened(llama.twin, tmp_path / "out")
    assert has_own_head(out)
    assert relative_deviation(logits(llama.other), logits(out)) < 1e-3


def test_nothing_is_untied_where_nothing_is_tied(llama: Tied, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bert = save(make_model("bert-classifier", 0, num_hidden_layers=1), tmp_path / "bert")  # its config says tied
    for anchor in (llama.path("twin"), bert):
        copy = shutil.copytree(anchor, tmp_path / f"{anchor.name}-copy")
        with caplog.at_level(logging.INFO):
            outs = [
                merged(merge_config("rotation_match", anchor, [copy], parameters=given), tmp_path / anchor.name / name)
                for name, given in (("untied", {"untie": True}), ("plain", {}))
            ]
        assert outs[0].keys() == outs[1].keys()
        assert all(torch.equal(x, outs[1][name]) for name, x in outs[0].items())
        configs = [(tmp_path / anchor.name / name / "config.json").read_text("utf-8") for name in ("untied", "plain")]
        assert configs[0] == configs[1]
        assert "there is nothing to untie" in caplog.text
        caplog.clear()


FAMILIES_REFUSED = {
    "gemma": "untie with Gemma .*have their embedding for a head",
    "roberta": r"untie with RoBERTa.*more is tied .*lm_head.bias, lm_head.decoder.bias",
    "deberta-v3": "untie with DeBERTa.*more is tied .*cls.predictions.bias",
}


@pytest.mark.parametrize("family", FAMILIES_REFUSED)
def test_families_that_must_stay_tied_are_refused(tmp_path: Path, family: str) -> None:
    path = save(make_model(family, 0, num_hidden_layers=1), tmp_path / "model")
    copy = shutil.copytree(path, tmp_path / "copy")
    with pytest.raises(ArchitectureError, match=FAMILIES_REFUSED[family]):
        merged(merge_config("rotation_match", path, [copy], parameters={"untie": True}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "value", [[{"filter": "mlp", "value": True}, {"value": False}], [{"filter": "lm_head", "value": True}]]
)
def test_one_value_for_the_whole_merge(llama: Tied, tmp_path: Path, value: Any) -> None:
    with pytest.raises(ParameterError, match=r"parameter untie: it is .*the output has one config"):
        merged(llama.config("other", residual="none", untie=value), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_refusal_of_a_rotation_names_the_remedy(llama: Tied, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"its head is its embedding.* or untie: true"):
        merged(llama.config("other", untie=False), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merges_that_write_no_config_are_refused(llama: Tied, tmp_path: Path) -> None:
    config, options = MergeConfiguration.model_validate(llama.config("other")), MergeOptions()
    LoaderCache().setup(options)
    planner = MergePlanner(config, get_architecture_info(config, options), options, llama.anchor.config)
    with pytest.raises(ParameterError, match=r"parameter untie: the merge is planned in memory"):
        planner.plan_in_memory()
    file = str(llama.path("anchor") / "model.safetensors")
    raw = {"merge_method": "rotation_match", "base_model": file, "models": [{"model": file}]}
    flat = RawPyTorchMergeConfig.model_validate(raw | {"parameters": {"untie": True}})
    with pytest.raises(UnalignedCallError, match=r"mergekit-yaml"):
        plan_flat_merge(flat, str(tmp_path / "out"), False, False, options)


def test_a_config_inside_a_config() -> None:
    config = Gemma3Config()
    assert config.text_config.tie_word_embeddings
    untie_config(config)
    assert config.tie_word_embeddings is False
    assert config.text_config.tie_word_embeddings is False


@pytest.mark.parametrize("name", TIED)
def test_names_of_head_and_embedding(name: str) -> None:
    model = tied_model(name)
    layout = resolve(model.config, model="m")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert parameters[head_name(layout) or ""] is model.get_output_embeddings().weight
    assert parameters[embedding_name(layout) or ""] is model.get_input_embeddings().weight


def test_a_merge_without_untie_stays_tied(llama: Tied, tmp_path: Path) -> None:
    out = merged(llama.config("other", residual="permutation", untie=False), tmp_path / "out")
    assert "lm_head.weight" not in out
    with pytest.raises(ConfigError, match="untie"):
        merged(llama.config("other", residual="permutation", untie="perhaps"), tmp_path / "refused")
