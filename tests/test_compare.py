"""``mergekit-symalign compare``: what it prints, what it remembers, what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from conftest import load, merge_config, merged
from mergekit.options import MergeOptions
from models import make_model, perturbed, planted_twin, save, word_tokenizer
from transformers import AutoModelForCausalLM

from mergekit_symalign.cli import main
from mergekit_symalign.commands import compare_merges
from mergekit_symalign.commands.compare_merges import arguments
from mergekit_symalign.comparing import merging

WORDS = word_tokenizer(97)
Files = dict[str, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """An anchor, its near sibling, the sibling's twin, and what the anchor itself would write."""
    folder = tmp_path_factory.mktemp("models")
    anchor = make_model("llama", 0)
    sibling = perturbed(anchor, 0.05, 1)
    twin = planted_twin(sibling)
    paths = {name: save(m, folder / name) for name, m in (("anchor", anchor), ("sibling", sibling), ("twin", twin))}
    for path in paths.values():
        WORDS.save_pretrained(path)
    torch.manual_seed(0)
    start = torch.arange(3, 23).unsqueeze(1)
    written = anchor.float().generate(start, max_length=24, do_sample=True, pad_token_id=0, eos_token_id=None)
    texts = [[f"w{max(3, i)}" for i in row] for row in written.tolist()]
    (folder / "texts.txt").write_text("\n".join(map(" ".join, texts)), "utf-8")
    answers = [{"prompt": " ".join(text[:10]), "answer": " " + " ".join(text[10:])} for text in texts]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)), "utf-8")
    return paths | {name: folder / name for name in ("texts.txt", "answers.jsonl")}


class Merged(list[str]):
    """The labels of the merges that were made, and what each is to do instead of a merge."""

    instead: dict[str, Any]


@pytest.fixture(autouse=True)
def merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Merged:
    """Merges run in this process: a start of Python with all it imports takes longer than a small merge."""
    found, real = Merged(), merging.run_alone
    found.instead = {}

    def run_alone(call: list[str], log: Path) -> merging.Cost:
        at = call.index("yaml")
        label = Path(call[at + 1]).stem.rpartition("-")[0]
        found.append(label)
        if (instead := found.instead.get(label)) is not None:
            return instead(call, log, real)  # type: ignore[no-any-return]
        done = CliRunner().invoke(main, call[at:])
        log.write_text(done.output, "utf-8")
        return merging.Cost(done.exit_code, 2.0, 300.0)

    monkeypatch.setattr(compare_merges.merging, "run_alone", run_alone)
    monkeypatch.chdir(tmp_path)
    return found


def command(*args: Any) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, args)])


def config(made: Files, file: Path, method: str = "linear", **rest: Any) -> Path:
    """A merge of anchor and sibling."""
    models = [{"model": made[name], "parameters": {"weight": 0.5}} for name in ("anchor", "sibling")]
    base = {"base_model": str(made["anchor"])}
    file.write_text(yaml.safe_dump(merge_config(method, None, models) | base | rest), "utf-8")
    return file


def _rows(output: str) -> dict[str, list[str]]:
    """The cells of the table by label."""
    lines = output.split("Loss: lower")[0].splitlines()[2:]
    return {line.split()[0]: line.split()[1:] for line in lines if "…" not in line}


def _loss(model: Path, lines: list[list[str]], start: int = 1) -> float:
    """transformers' own loss, per token over all lines."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    total, count = 0.0, 0
    for words in lines:
        ids = torch.tensor([WORDS.convert_tokens_to_ids(words)])
        labels = ids.clone()
        labels[:, :start] = -100
        with torch.no_grad():
            total += float(loaded(input_ids=ids, labels=labels).loss) * (len(words) - start)
        count += len(words) - start
    return total / count


# What it prints


def test_plain_against_aligned_by_one_command(made: Files, merges: Merged, tmp_path: Path) -> None:
    """The twin is the sibling in other coordinates: its aligned average is the sibling's."""
    data = ["--data", made["texts.txt"], "--data", made["answers.jsonl"]]
    done = command(
        "--average", made["anchor"], made["twin"], *data, "--json", "n.json", "--plot", "p.png", "--keep", "all"
    )
    assert done.exit_code == 0, done.output
    rows = _rows(done.stdout)
    assert list(rows) == ["anchor", "twin", "linear", "rotation_match"]
    assert merges == ["linear", "rotation_match"]
    lines = [line.split() for line in made["texts.txt"].read_text("utf-8").splitlines()]
    for name, folder in (("anchor", made["anchor"]), ("twin", made["twin"]), *_kept(tmp_path)):
        assert float(rows[name][0].rstrip("*")) == pytest.approx(_loss(folder, lines), abs=6e-5)
        answers = next(cell for cell in rows[name][1:] if not cell.startswith("±"))
        assert float(answers.rstrip("*")) == pytest.approx(_loss(folder, lines, start=10), abs=6e-5)
    file = config(made, tmp_path / "c.yml", "rotation_match")
    half = merged(yaml.safe_load(file.read_text("utf-8")), tmp_path / "half")
    aligned = load(dict(_kept(tmp_path))["rotation_match"])
    assert all((half[name] - aligned[name]).abs().max() < 1e-4 for name in half)
    assert "texts.txt: rotation_match is better than linear by " in done.stdout
    assert rows["rotation_match"][0].endswith("*")
    told = json.loads(Path("n.json").read_text("utf-8"))
    assert [row["kind"] for row in told["rows"]] == ["model", "model", "merge", "merge"]
    assert told["columns"][0] == {
        "name": "texts.txt", "unit": "nats/token", "higher_is_better": False, "documents": 20, "tokens": 20 * 23
    }  # fmt: skip
    assert told["columns"][1]["tokens"] == 20 * 14
    assert told["rows"][3]["seconds"] == 2.0
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")


def _kept(folder: Path) -> list[tuple[str, Path]]:
    found = sorted(path for path in (folder / "symalign-compare").iterdir() if path.is_dir())
    return [(path.name.rpartition("-")[0], path) for path in found]


def test_values_to_try_and_what_is_noise(made: Files, merges: Merged, tmp_path: Path) -> None:
    """Merges that are equal but for their label are no different; a folder that is there is measured as it is."""
    file = config(made, tmp_path / "c.yml")
    done = command(file, "--set", "models.1.parameters.weight=0.5,0.50001", "--data", made["texts.txt"])
    assert done.exit_code == 0, done.output
    assert list(_rows(done.stdout)) == ["anchor", "sibling", "weight=0.5", "weight=0.50001"]
    assert "*" not in done.stdout.split("Loss")[0]
    assert "texts.txt: no difference larger than its error between the merges\n" in done.stdout
    assert {path.suffix for path in Path("symalign-compare").iterdir()} == {".yml", ".json"}  # no merge stays
    reused = command(made["sibling"], made["twin"], "--data", made["texts.txt"], "--out", "other", "--quiet")
    assert reused.exit_code == 0, reused.output
    assert list(_rows(reused.stdout)) == ["sibling", "twin"]
    assert reused.stderr == ""
    assert len(merges) == 2


def test_a_merge_runs_in_a_process_of_its_own(made: Files, merges: Merged, tmp_path: Path) -> None:
    file = config(made, tmp_path / "c.yml")
    merges.instead["c"] = lambda call, log, real: real(call, log)
    done = command(file, "--data", made["texts.txt"], "--json", "n.json", "--keep", "best")
    assert done.exit_code == 0, done.output
    row = json.loads(Path("n.json").read_text("utf-8"))["rows"][-1]
    assert row["seconds"] > 0.1
    assert row["peak_mib"] is None or 50 < row["peak_mib"] < 8192
    ((_, kept),) = _kept(tmp_path)
    again = merged(yaml.safe_load(file.read_text("utf-8")), tmp_path / "again")
    assert all(torch.equal(x, again[name]) for name, x in load(kept).items())


def test_models_with_another_tokenizer_are_measured_per_token_of_the_first(made: Files, tmp_path: Path) -> None:
    """The same nats of a document, divided by the same count, however many tokens a row itself reads."""
    other = shutil.copytree(made["anchor"], tmp_path / "other")
    halves = {"<unk>": 0, "<s>": 1, "</s>": 2, "w": 3} | {str(i): i for i in range(4, 97)}
    text = made["texts.txt"].read_text("utf-8")
    _splitting(halves).save_pretrained(other)
    (tmp_path / "t.txt").write_text("\n".join(line for line in text.splitlines() if "w3" not in line.split()), "utf-8")
    done = command(made["anchor"], other, "--data", "t.txt", "--json", "n.json")
    assert done.exit_code == 0, done.output
    told = json.loads(Path("n.json").read_text("utf-8"))
    lines = Path("t.txt").read_text("utf-8").splitlines()
    assert told["columns"][0]["tokens"] == 23 * len(lines)
    tokenizer, total = _splitting(halves), 0.0
    loaded = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    for line in lines:
        ids = tokenizer(line, return_tensors="pt")["input_ids"]
        assert ids.shape[1] == 48
        with torch.no_grad():
            total += float(loaded(input_ids=ids, labels=ids).loss) * 47
    assert told["rows"][1]["measured"]["t.txt"]["value"] == pytest.approx(total / (23 * len(lines)), rel=1e-5)


def _splitting(vocabulary: dict[str, int]) -> Any:
    """A tokenizer that reads `w7` as `w` and `7`."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Sequence, Split, Whitespace
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Sequence([Whitespace(), Split(Regex("w"), "isolated")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


# What it remembers


def _try_three(made: Files, file: Path, *more: Any) -> Result:
    return command(file, "--set", "models.1.parameters.weight=0.1,0.5,0.9", "--data", made["texts.txt"], *more)


def test_stopped_it_goes_on_with_what_is_missing(made: Files, merges: Merged, tmp_path: Path) -> None:
    file = config(made, tmp_path / "c.yml")

    def stopped(call: list[str], log: Path, real: Any) -> merging.Cost:
        half = Path(call[call.index("yaml") + 2])
        half.mkdir()
        (half / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    merges.instead["weight=0.5"] = stopped
    assert _try_three(made, file).exit_code != 0
    assert merges == ["weight=0.1", "weight=0.5"]
    merges.clear()
    merges.instead.clear()
    done = _try_three(made, file)
    assert done.exit_code == 0, done.output
    assert merges == ["weight=0.5", "weight=0.9"]
    assert "measuring anchor" not in done.output
    whole = _try_three(made, file, "--out", "another")
    assert whole.stdout == done.stdout
    assert merges == ["weight=0.5", "weight=0.9", "weight=0.1", "weight=0.5", "weight=0.9"]
    merges.clear()
    assert _try_three(made, file).stdout == done.stdout
    assert merges == []


def test_stopped_between_merge_and_measurement_it_merges_nothing_twice(
    made: Files, merges: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_symalign.commands import comparison

    file, real = config(made, tmp_path / "c.yml"), comparison.losses_of

    def stopped(model: Any, *rest: Any) -> Any:
        if "merging" in str(model):
            raise KeyboardInterrupt
        return real(model, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(comparison, "losses_of", stopped)
        assert command(file, "--data", made["texts.txt"]).exit_code != 0
    done = command(file, "--data", made["texts.txt"])
    assert done.exit_code == 0, done.output
    assert merges == ["c"]
    assert not Path("symalign-compare/merging").exists()


def test_what_has_changed_is_measured_anew_and_nothing_else(made: Files, merges: Merged, tmp_path: Path) -> None:
    file, text = config(made, tmp_path / "c.yml"), tmp_path / "texts.txt"
    shutil.copy(made["texts.txt"], text)
    data = ["--data", text, "--data", made["answers.jsonl"]]
    before = command(file, *data)
    merges.clear()
    text.write_text("\n".join(text.read_text("utf-8").splitlines()[:15]), "utf-8")
    after = command(file, *data)
    assert merges == ["c"]
    cells = [_rows(done.stdout)["sibling"] for done in (before, after)]
    assert cells[0][0] != cells[1][0]
    assert cells[0][-2:] == cells[1][-2:]
    merges.clear()
    assert command(file, "--data", text, "--dtype", "bfloat16").exit_code == 0
    assert merges == ["c"]  # another dtype, other numbers
    config(made, file, parameters={"normalize": False})
    assert command(file, "--data", text).exit_code == 0
    assert merges == ["c", "c"]
    model = AutoModelForCausalLM.from_pretrained(made["anchor"])
    copied = dict(made) | {"sibling": save(perturbed(model, 0.2, 9), tmp_path / "sibling")}
    WORDS.save_pretrained(copied["sibling"])
    config(copied, file)
    first = command(file, "--data", text)
    save(perturbed(model, 0.2, 8), tmp_path / "sibling")
    assert _rows(command(file, "--data", text).stdout)["sibling"] != _rows(first.stdout)["sibling"]
    assert merges == ["c"] * 4


def test_another_config_changes_nothing_of_the_first(made: Files, merges: Merged, tmp_path: Path) -> None:
    first = config(made, tmp_path / "first.yml")
    assert command(first, "--data", made["texts.txt"]).exit_code == 0
    second = config(dict(made) | {"sibling": made["twin"]}, tmp_path / "second.yml")
    done = command(first, second, "--data", made["texts.txt"])
    assert list(_rows(done.stdout)) == ["anchor", "sibling", "twin", "first", "second"]
    assert merges == ["first", "second"]


def test_the_best_stays_and_is_made_again_if_nobody_kept_it(made: Files, merges: Merged, tmp_path: Path) -> None:
    """The anchor wrote the texts, so the least of the sibling is best."""
    file = config(made, tmp_path / "c.yml")
    assert _try_three(made, file).exit_code == 0
    assert _kept(tmp_path) == []
    merges.clear()
    done = _try_three(made, file, "--keep", "best")
    assert merges == ["weight=0.1"]
    ((name, folder),) = _kept(tmp_path)
    assert name == "weight=0.1"
    assert f"kept weight=0.1: {folder.relative_to(tmp_path)}" in done.stdout
    assert _try_three(made, file).exit_code == 0  # not asked for now, and still there
    assert [name for name, _ in _kept(tmp_path)] == ["weight=0.1"]
    fresh = _try_three(made, file, "--keep", "best", "--out", "fresh")
    assert merges == ["weight=0.1", "weight=0.1", "weight=0.5", "weight=0.9"]
    assert sum(path.is_dir() for path in Path("fresh").iterdir()) == 1
    assert "kept weight=0.1" in fresh.stdout


def test_a_merge_that_fails_is_a_line_and_not_the_end(made: Files, merges: Merged, tmp_path: Path) -> None:
    file = config(made, tmp_path / "c.yml")

    def broken(call: list[str], log: Path, real: Any) -> merging.Cost:
        log.write_text("much\nError: tensor w: it broke. Mend it.\n", "utf-8")
        return merging.Cost(1, 1.0, 1.0)

    merges.instead["weight=0.1"] = broken
    merges.instead["weight=0.5"] = lambda call, log, real: merging.Cost(-9, 1.0, 1.0)
    done = _try_three(made, file)
    assert done.exit_code == 1
    assert _rows(done.stdout)["weight=0.1"] == ["failed"]
    assert float(_rows(done.stdout)["weight=0.9"][0]) > 0
    assert (
        "weight=0.1: it could not be merged: tensor w: it broke. Mend it. (all of it: symalign-compare" in done.stdout
    )
    assert "weight=0.5: it could not be merged: signal 9 ended it" in done.stdout
    merges.instead.clear()
    again = _try_three(made, file)
    assert again.exit_code == 0
    assert merges[3:] == ["weight=0.1", "weight=0.5"]


def test_a_merge_whose_loss_is_no_number_is_a_line(made: Files, tmp_path: Path) -> None:
    file = config(made, tmp_path / "c.yml", parameters={"normalize": False})
    done = command(file, "--set", "models.1.parameters.weight=0.5,1e39", "--data", made["texts.txt"])
    assert done.exit_code == 1, done.output
    assert "weight=1e39: it could not be measured: model " in done.stdout
    assert "its loss is not a number" in done.stdout


# What it refuses


def test_everything_is_checked_before_any_work(
    made: Files, merges: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    good, text = config(made, tmp_path / "good.yml"), ["--data", made["texts.txt"]]
    bert = save(make_model("bert", 0), tmp_path / "bert")
    WORDS.save_pretrained(bert)
    bare = save(make_model("llama", 0), tmp_path / "bare")
    for name, content in {
        "empty.yml": "", "broken.yml": "a: [", "short.yml": "merge_method: linear", "bad.jsonl": "{}", "bad.csv": "a",
        "one.txt": "w3", "blank.txt": "\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content, "utf-8")
    config(made, tmp_path / "method.yml", method="linaer")
    config(made, tmp_path / "ours.yml", method="aligned_tise")
    config(
        made,
        tmp_path / "slices.yml",
        models=None,
        slices=[{"sources": [{"model": str(made["anchor"]), "layer_range": [0, 9]}]}],
    )
    config(made, tmp_path / "wrong.yml", method="rotation_match", parameters={"rotaton": "none"})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    cases: list[tuple[list[Any], str]] = [
        ([good], "there is nothing to measure"),
        (text, "there is nothing to compare"),
        ([tmp_path / "absent.yml", *text], "there is no such file or folder"),
        ([good, tmp_path / "empty.yml", *text], "it holds no merge config"),
        ([good, tmp_path / "broken.yml", *text], "it cannot be read as YAML"),
        ([good, tmp_path / "short.yml", *text], "MergeKit does not take it"),
        ([good, tmp_path / "method.yml", *text], "linaer"),
        ([good, tmp_path / "ours.yml", *text], "aligned_ties"),
        ([good, tmp_path / "wrong.yml", *text], "parameter rotaton"),
        ([good, tmp_path / "slices.yml", *text], "slices"),
        ([good, "--data", tmp_path / "absent.txt"], "it cannot be read"),
        ([good, "--data", tmp_path / "bad.jsonl"], "line 1: it has no text, answer or messages"),
        ([good, "--data", tmp_path / "bad.csv"], "it is neither .jsonl nor .txt"),
        ([good, "--data", tmp_path / "one.txt"], "no document has a second token"),
        ([good, "--data", tmp_path / "blank.txt"], "it holds no text"),
        ([good, *text, "--set", "parameters.wieght=1"], "linear has no parameter wieght"),
        ([good, *text, "--set", "models.5.parameters.weight=1"], "5 is no index of a list of 2"),
        ([made["anchor"], *text, "--set", "parameters.weight=1"], "there is no config whose values it could change"),
        ([good, *text, "--device", "nowhere"], "--device nowhere: it cannot be used"),
        ([good, *text, "--max-length", 129], "the models have 128 positions"),
        ([good, *text, "--plot", "p.gif"], ".png, .svg, .pdf"),
        ([good, *text, "--json", "no/n.json"], "its directory does not exist"),
        ([good, *text, "--out", good], "is a file"),
        ([good, *text, "--keep", "some"], "--keep"),
        ([good, *text, "--tasks", "x"], "lm-eval"),
        ([bert, *text], "does not predict the next token"),
        ([bare, *text], "its tokenizer cannot be loaded"),
        (["--average", made["anchor"], tmp_path / "absent", *text], "it cannot be opened"),
    ]
    for args, message in cases:
        done = command(*args)
        assert done.exit_code == 2, (args, done.output)
        assert isinstance(done.exception, SystemExit)
        assert message in " ".join(done.output.split()), done.output
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert merges == []


def test_without_the_harness_it_says_how_to_install_it(made: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    done = command(made["anchor"], "--tasks", "gsm8k")
    assert done.exit_code == 2
    assert "--tasks gsm8k: lm-eval is not installed. pip install 'mergekit-symalign[eval]'" in done.output


def test_options_of_a_merge_reach_its_command_line() -> None:
    given = ["--cuda", "--lora-merge-cache", "a b", "-v", "-v", "--no-copy-tokenizer", "--random-seed", "3"]
    wanted = MergeOptions(
        cuda=True, lora_merge_cache="a b", verbosity=2, copy_tokenizer=False, random_seed=3, quiet=True
    )
    for line in (given, arguments(wanted)):
        read = compare_merges.merge_yaml.make_context("yaml", ["c.yml", "out", *line, "--quiet"]).params
        options = {name: x for name, x in read.items() if name in MergeOptions.model_fields}
        assert MergeOptions(**options) == wanted


# The command that `inspect` ends with


@pytest.mark.parametrize(
    ("models", "more", "expected"),
    [
        (("anchor", "twin"), [], []),
        (("anchor", "sibling"), [], ["merge_method=linear", "models.1.parameters.weight=0.25,0.5,1"]),
        (
            ("anchor", "twin"),
            ["--rotation", "none", "--no-scaling"],
            ["parameters.rotation=none", "parameters.scaling=false"],
        ),
        (("anchor", "twin"), ["--lora-merge-cache", "some cache"], []),
    ],
)
def test_inspect_ends_with_a_command_that_runs(
    models: tuple[str, str], more: list[str], expected: list[str], made: Files, tmp_path: Path
) -> None:
    paths = [shutil.copytree(made[name], tmp_path / f"the {name}") for name in models]
    done = CliRunner().invoke(main, ["inspect", *map(str, paths), *more])
    assert done.exit_code == 0, done.output
    program, name, *call = shlex.split(done.stdout.splitlines()[-1])
    assert (program, name) == ("mergekit-symalign", "compare")
    read = main.commands["compare"].make_context("compare", list(call), parent=click.Context(main)).params
    assert read["average"] == tuple(map(str, paths))
    assert sorted(read["settings"]) == sorted(expected)
    assert read["lora_merge_cache"] == ("some cache" if "some cache" in more else None)
    texts = [json.dumps({"text": line}) for line in made["texts.txt"].read_text("utf-8").splitlines()]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts), "utf-8")
    compared = CliRunner().invoke(main, [name, *call])
    assert compared.exit_code == 0, compared.output


def test_inspect_of_encoders_ends_with_another_command(tmp_path: Path) -> None:
    model = make_model("bert", 0)
    twin = planted_twin(model)
    paths = [str(save(m, tmp_path / name)) for name, m in (("a", model), ("b", twin))]
    shown = CliRunner().invoke(main, ["inspect", *paths, "--no-scaling"]).stdout.splitlines()
    program, *call = shlex.split(shown[-1])
    assert program == "mergekit-symalign"
    assert call == ["solve", *paths, "-o", "b.safetensors", "--no-scaling"]
    same = (
        CliRunner().invoke(main, ["inspect", paths[0], shutil.copytree(paths[0], f"{paths[0]}2")]).stdout.splitlines()
    )
    assert same[-2:] == ["next: merge them with a plain method", "  mergekit-yaml merge.yml merged"]
