"""`residual` with `objective: activations`: one run on prompts gives the stream's element and those of all blocks."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import load, merge_config, merged, squared_distance
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from models import EverythingInFloat64, logits, relative_deviation, save, word_tokenizer
from PIL import Image
from streams import case
from test_activations import prompts
from test_residual_merge import Twins
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ViTImageProcessorPil

from mergekit_symalign.alignment_file import AlignmentFile
from mergekit_symalign.cli import main
from mergekit_symalign.errors import CalibrationError, ConfigError
from mergekit_symalign.graph import readers
from mergekit_symalign.graph.activations import RunLayer
from mergekit_symalign.graph.load import LoadFinite
from mergekit_symalign.graph.stream_activations import SolveSeenStream

WORDS = 97
PLANTED = [
    ("llama", "rotation"),
    ("gpt2-untied", "rotation"),
    ("gemma2", "permutation"),
    ("olmo2", "permutation"),
    ("phi3", "rotation"),
    ("mixtral", "rotation"),
    ("bert-classifier", "permutation"),
    ("modernbert", "permutation"),
    ("vit-classifier", "rotation"),
]


@pytest.fixture(autouse=True)
def _tokenizers_as_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """For some model types transformers puts a class of its own around any tokenizer file, and reads no words."""
    monkeypatch.setattr(readers, "AutoTokenizer", PreTrainedTokenizerFast)


class OnPrompts(Twins):
    """Twins in float64 with what it takes to run them on prompts, or on images."""

    def __init__(self, family: str, wanted: str, folder: Path, layers: int = 2) -> None:
        super().__init__(family, wanted, folder, layers)
        self.settings = {"residual": wanted, "objective": "activations"}
        models = {"anchor": self.anchor, "sibling": self.sibling, "twin": self.twin}
        for name, model in models.items():
            save(model, folder / name, torch.float64)
            if family.startswith("vit"):
                ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / name)
            else:
                word_tokenizer(WORDS).save_pretrained(folder / name)
        read = images if family.startswith("vit") else prompts
        self.settings["calibration"] = str(read(folder / "calibration.jsonl"))

    def config(self, *names: str, **parameters: Any) -> dict[str, Any]:
        paths = [self.folder / name for name in names]
        settings = self.settings | parameters
        return merge_config("rotation_match", self.folder / "anchor", paths, parameters=settings, dtype="float64")

    def at(self, path: Path) -> PreTrainedModel:
        how = {"dtype": torch.float64, "experts_implementation": "eager"}
        return type(self.anchor).from_pretrained(path, **how).eval()


def images(folder: Path) -> Path:
    """A folder of noise."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


def _residual(out: Path) -> dict[str, Any]:
    report = json.loads((out / "symalign_report.json").read_text("utf-8"))
    assert report["exact"]
    (entry,) = report["models"].values()
    found: dict[str, Any] = entry["residual"]
    return found


@pytest.mark.parametrize(("family", "wanted"), PLANTED)
def test_a_planted_twin_comes_back(family: str, wanted: str, tmp_path: Path) -> None:
    models = OnPrompts(family, wanted, tmp_path, layers=1 if family == "modernbert" else 2)
    merged(models.config("twin"), tmp_path / "out")
    merged(models.config("sibling"), tmp_path / "reference")
    out, reference = models.at(tmp_path / "out"), models.at(tmp_path / "reference")
    assert relative_deviation(logits(models.at(tmp_path / "sibling")), logits(out)) < 1e-9
    anchor = dict(models.anchor.state_dict())
    distances = [squared_distance(anchor, dict(model.state_dict())) for model in (out, reference, models.twin)]
    assert distances[0] == pytest.approx(distances[1], rel=5e-3)
    assert distances[0] < 0.2 * distances[2]
    facts, wanted_facts = _residual(tmp_path / "out"), _residual(tmp_path / "reference")
    assert facts["objective"] == "activations"
    assert facts["distance_after"] < 0.1 * facts["distance_before"]
    assert facts["distance_after"] == pytest.approx(wanted_facts["distance_after"], rel=5e-3)
    assert facts["stream_agreement_after"] == pytest.approx(wanted_facts["stream_agreement_after"], abs=1e-3)
    assert facts["stream_agreement_before"] < 0.3 < 0.85 < facts["stream_agreement_after"] <= 1


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> OnPrompts:
    """With a third model, of another initialisation."""
    models = OnPrompts("llama", "rotation", tmp_path_factory.mktemp("llama"))
    save(case("llama", 9, num_hidden_layers=2), models.folder / "other", torch.float64)
    word_tokenizer(WORDS).save_pretrained(models.folder / "other")
    return models


def test_through_the_command_two_times_alike(
    llama: OnPrompts, tmp_path: Path, mergekit_yaml: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = mergekit_yaml(llama.config("twin"), tmp_path / "out", "--no-copy-tokenizer")
    assert done.returncode == 0, done.stderr
    again = merged(llama.config("twin"), tmp_path / "again")
    out = load(tmp_path / "out")
    assert all(torch.equal(x, again[name]) for name, x in out.items())
    assert relative_deviation(logits(llama.sibling), logits(llama.at(tmp_path / "out"))) < 1e-9


def _mean_cosine(a: list[Tensor], b: list[Tensor]) -> float:
    """Over the tokens of several streams [tokens, hidden]."""
    cosines = [torch.cosine_similarity(x.double(), y.double(), dim=-1) for x, y in zip(a, b, strict=True)]
    return float(torch.cat(cosines).mean())


@torch.no_grad()
def _at_norms(model: PreTrainedModel, file: Path) -> list[Tensor]:
    """What each norm of a whole Llama reads, prompt by prompt."""
    found: list[Tensor] = []
    norms = [m for name, m in model.named_modules() if name.endswith("norm")]
    handles = [m.register_forward_pre_hook(lambda _, args: found.append(args[0][0])) for m in norms]
    for line in file.read_text("utf-8").splitlines():
        model(torch.tensor([[int(word[1:]) for word in json.loads(line)["text"].split()]]))
    for handle in handles:
        handle.remove()
    return found


def test_streams_of_two_initialisations_agree_more_and_as_the_report_says(llama: OnPrompts, tmp_path: Path) -> None:
    """Compared with plain forward passes of the anchor, the model, and the output."""
    file = prompts(tmp_path / "few.jsonl", tokens=200)
    merged(llama.config("other", calibration=str(file)), tmp_path / "out")
    other, out = llama.at(llama.folder / "other"), llama.at(tmp_path / "out")
    with EverythingInFloat64():
        anchor, before, after = (_at_norms(m, file) for m in (llama.anchor, other, out))
    agreement = [_mean_cosine(anchor, x) for x in (before, after)]
    assert agreement[1] > agreement[0] + 0.1
    facts = _residual(tmp_path / "out")
    assert [facts[f"stream_agreement_{x}"] for x in ("before", "after")] == pytest.approx(agreement, abs=1e-6)
    assert relative_deviation(logits(other), logits(out)) < 1e-9
    gains = [name for name in load(tmp_path / "out") if "norm" in name]
    assert gains
    for name in gains:
        torch.testing.assert_close(load(tmp_path / "out")[name], load(llama.folder / "anchor")[name])


def test_where_tokens_show_nothing_the_weights_decide(llama: OnPrompts, tmp_path: Path) -> None:
    """One token shows a handful of the stream's directions, and hardly any of a head."""
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "w9"}', "utf-8")
    merged(llama.config("twin", calibration=str(one)), tmp_path / "out")
    merged(llama.config("sibling", calibration=str(one)), tmp_path / "reference")
    anchor = load(llama.folder / "anchor")
    distances = [squared_distance(anchor, load(tmp_path / name)) for name in ("out", "reference")]
    assert distances[0] < 0.05 * squared_distance(anchor, load(llama.folder / "twin"))
    assert distances[0] < 2 * distances[1]


class Reads:
    """Counts how often each stored tensor is read, and which layers run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tensors: Counter[tuple[str, str]] = Counter()
        self.layers: list[int] = []
        load_one, run = LoadFinite.execute, RunLayer.execute

        def counted(task: LoadFinite) -> Any:
            self.tensors[Path(str(task.model)).name, task.tensor] += 1
            return load_one(task)

        def ran(task: RunLayer, **given: Any) -> Any:
            self.layers.append(task.layer)
            return run(task, **given)

        monkeypatch.setattr(LoadFinite, "execute", counted)
        monkeypatch.setattr(RunLayer, "execute", ran)


def test_one_run_serves_all_models(llama: OnPrompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer runs once for all models; a tensor is read once for the run and once for the merge.

    The merge itself needs nothing of the anchor but its norms.
    """
    reads = Reads(monkeypatch)
    both = merged(llama.config("twin", "other", save_alignment=str(tmp_path / "saved")), tmp_path / "out")
    assert reads.layers == [0, 1]
    assert {model for model, _ in reads.tensors} == {"anchor", "twin", "other"}
    times = {one: 1 if one[0] == "anchor" and "norm" not in one[1] else 2 for one in reads.tensors}
    assert reads.tensors == times
    monkeypatch.undo()
    monkeypatch.setattr(readers, "AutoTokenizer", PreTrainedTokenizerFast)
    alone = [merged(llama.config(name), tmp_path / name) for name in ("twin", "other")]
    for name, x in both.items():
        torch.testing.assert_close(x, (alone[0][name] + alone[1][name]) / 2, rtol=0, atol=1e-9)


def test_a_file_repeats_the_merge_that_saved_it(llama: OnPrompts, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    out = merged(llama.config("twin", save_alignment=str(saved)), tmp_path / "out")
    models = [{"model": llama.folder / "twin", "parameters": {"alignment": str(saved / "twin.safetensors")}}]
    config = merge_config("rotation_match", llama.folder / "anchor", models, dtype="float64")
    again = merged(config, tmp_path / "again")
    assert all(torch.equal(x, again[name]) for name, x in out.items())


def test_solve_reads_each_tensor_once(llama: OnPrompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch)
    paths, file = [str(llama.folder / name) for name in ("anchor", "twin")], tmp_path / "a.safetensors"
    options = [f"--{name}={value}" for name, value in llama.settings.items()]
    result = CliRunner().invoke(main, ["solve", *paths, "-o", str(file), "--quiet", *options])
    assert result.exit_code == 0, result.output
    assert set(reads.tensors.values()) == {1}
    saved = AlignmentFile.open(file)
    assert saved.facts["residual"]["stream_agreement_after"] > 0.85
    assert saved.settings_of("residual")["objective"] == "activations"
    assert saved.settings_of("residual")["calibration"] == llama.settings["calibration"]


def test_layers_that_are_not_aligned_move_along(llama: OnPrompts, tmp_path: Path) -> None:
    models = [{"model": llama.folder / "twin", "parameters": {"align": [True, False]}}]
    config = merge_config("rotation_match", llama.folder / "anchor", models, parameters=llama.settings, dtype="float64")
    merged(config, tmp_path / "out")
    assert relative_deviation(logits(llama.sibling), logits(llama.at(tmp_path / "out"))) < 1e-9
    report = json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))
    (entry,) = report["models"].values()
    assert {block["layer"] for block in entry["blocks"]} == {0}


def test_one_layer_of_each_model_is_held_at_a_time(tmp_path: Path) -> None:
    """Replay the executor's schedule: the run takes layer after layer, and then the merge starts to read."""
    paths = [save(case("llama", i, num_hidden_layers=12), tmp_path / str(i)) for i in range(2)]
    for path in paths:
        word_tokenizer(WORDS).save_pretrained(path)
    settings = {"residual": "rotation", "objective": "activations"}
    settings["calibration"] = str(prompts(tmp_path / "p.jsonl", tokens=50))
    merge = MergeConfiguration.model_validate(merge_config("rotation_match", paths[0], paths[1:], parameters=settings))
    options = MergeOptions()
    LoaderCache().setup(options)
    planner = MergePlanner(merge, get_architecture_info(merge, options), options, merge.base_model.config())
    schedule = Executor(planner.plan_to_disk(str(tmp_path / "out"))).schedule
    alive: dict[Any, int] = {}
    ran, solved, most = [], 0, 0
    for step, handle in enumerate(schedule.tasks):
        task = handle.task()
        if isinstance(task, LoadFinite) and ".layers." in task.tensor:
            alive[handle] = int(task.tensor.split(".")[2])
        if isinstance(task, RunLayer):
            ran.append(task.layer)
            assert set(alive.values()) == {task.layer}
        solved += isinstance(task, SolveSeenStream)
        assert len(set(alive.values())) <= 1, (step, set(alive.values()))
        most = max(most, len(alive))
        alive = {h: layer for h, layer in alive.items() if schedule.last_use_index[h] > step}
        assert solved == 0 or len(ran) == 12
    assert ran == list(range(12))
    assert most == 2 * 9


Change = Callable[[OnPrompts], dict[str, Any]]
REFUSED: dict[str, tuple[Change, type[Exception], str]] = {
    "no prompts": (lambda _: {"calibration": None}, CalibrationError, "none are given"),
    "consensus": (lambda _: {"anchor": "consensus"}, ConfigError, "towards one anchor, but anchor is consensus"),
    "general values": (lambda _: {"value_output": "general"}, ConfigError, "objective is activations"),
    "two objectives": (
        lambda t: {"objective": [{"filter": "mlp", "value": "weights"}, {"value": "activations"}]},
        ConfigError,
        "parameter objective: it is .*one for the whole merge",
    ),
    "no rounds": (lambda _: {"residual_rounds": 0}, ConfigError, "residual_rounds: it is 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_combined_is_refused(llama: OnPrompts, tmp_path: Path, name: str) -> None:
    change, error, message = REFUSED[name]
    config = llama.config("twin")
    config["parameters"] = {k: v for k, v in (llama.settings | change(llama)).items() if v is not None}
    with pytest.raises(error, match=message):
        merged(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layers", "message"), [([0, 1], "the merge leaves out layer 1"), ([1, 2], "the merge leaves out layer 0")]
)
def test_slices_that_leave_out_layers_are_refused(
    llama: OnPrompts, tmp_path: Path, layers: list[int], message: str
) -> None:
    sources = [{"model": str(llama.folder / name), "layer_range": layers} for name in ("anchor", "twin")]
    config = llama.config("twin") | {"slices": [{"sources": sources}]}
    del config["models"]
    with pytest.raises(ConfigError, match=message):
        merged(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rounds_have_no_effect_and_a_warning_says_so(
    llama: OnPrompts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = merged(llama.config("twin"), tmp_path / "out")
    assert "residual_rounds" not in caplog.text
    again = merged(llama.config("twin", residual_rounds=3), tmp_path / "again")
    assert "residual_rounds has no effect with objective: activations" in caplog.text
    assert all(torch.equal(x, again[name]) for name, x in out.items())
