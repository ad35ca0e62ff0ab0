"""Files on the Hub in merges and commands: fetched once, checked as local ones, refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from conftest import BIN, OFFLINE, load, merge_config, merged
from hub_server import TOKEN, Hub, as_the_hub, environment, hub_server, nowhere
from huggingface_hub import file_download
from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.options import MergeOptions
from models import make_model, perturbed, planted_twin, save
from whole_statistics import measure

from mergekit_symalign.cli import main
from mergekit_symalign.errors import AlignmentFileError, HubError, HubFailureError, StatisticsFileError
from mergekit_symalign.graph.shared_files import SharedFiles
from mergekit_symalign.hub.address import address_of, called, parsed, published, written_again
from mergekit_symalign.statistics.file import StatisticsFile
from mergekit_symalign.statistics.writer import write_statistics

REPO, FILE = "somebody/alignments", "folder/twin.safetensors"
ADDRESS = f"hf://{REPO}/{FILE}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An anchor, a planted twin, the alignment between them, and statistics of both."""
    folder = tmp_path_factory.mktemp("models")
    model = make_model("llama", 0, num_hidden_layers=1)
    twin = planted_twin(perturbed(model, 0.1, 1))
    paths = {"anchor": save(model, folder / "anchor"), "twin": save(twin, folder / "twin")}
    paths["file"] = folder / "twin.safetensors"
    done = CliRunner().invoke(main, ["solve", *map(str, (paths["anchor"], paths["twin"])), "-o", str(paths["file"])])
    assert done.exit_code == 0, done.output
    for name, of in (("anchor", model), ("twin", twin)):
        paths[f"{name} statistics"] = folder / f"{name}-statistics.safetensors"
        measure(of, paths[name], paths[f"{name} statistics"])
    return paths


@pytest.fixture
def hub(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with the alignment in a folder of a repository."""
    with hub_server() as found:
        found.new(REPO, {FILE: models["file"].read_bytes()})
        as_the_hub(monkeypatch, found.url, tmp_path / "home")
        yield found


def _config(models: dict[str, Path], alignment: str) -> dict[str, Any]:
    twin = {"model": models["twin"], "parameters": {"alignment": alignment}}
    return merge_config("rotation_match", models["anchor"], [models["anchor"], twin])


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def _apply(models: dict[str, Path], alignment: str, out: Path) -> Result:
    return CliRunner().invoke(main, ["apply", alignment, str(models["twin"]), "-o", str(out)])


# What is fetched


def test_a_merge_from_the_hub_is_the_merge_from_the_file(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    local = merged(_config(models, str(models["file"])), tmp_path / "local")
    assert _same(local, merged(_config(models, ADDRESS), tmp_path / "out", write_model_card=True))
    assert hub.downloads("twin") == 1
    commit = hub.repos[REPO].branches["main"]
    report = json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))
    pinned = f"{ADDRESS}@{commit}"
    assert report["alignment_files"][str(models["twin"])]["file"] == pinned
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"[`{pinned}`]({hub.url}/{REPO}/blob/{commit}/{FILE})" in card
    for name in ("README.md", "symalign_report.json", "mergekit_config.yml"):
        assert str(tmp_path / "home") not in (tmp_path / "out" / name).read_text("utf-8"), name
    again = yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text("utf-8"))
    assert again["models"][1]["parameters"]["alignment"] == pinned


def test_what_a_card_shows_gives_the_same_merge_when_the_branch_has_moved_on(
    models: dict[str, Path], hub: Hub, tmp_path: Path
) -> None:
    first = merged(_config(models, ADDRESS), tmp_path / "a", write_model_card=True)
    hub.repos[REPO].commit({FILE: b"something else"})
    (snippet,) = (tmp_path / "a" / "README.md").read_text("utf-8").split("```yaml\n")[1:]
    asked = len(hub.asked)
    assert _same(first, merged(yaml.safe_load(snippet.partition("```")[0]), tmp_path / "b"))
    assert len(hub.asked) == asked  # the commit is in the cache, so the Hub is not asked
    with pytest.raises(AlignmentFileError, match="cannot be read") as refused:
        merged(_config(models, ADDRESS), tmp_path / "c")
    assert refused.value.where == f"alignment {ADDRESS}@{hub.repos[REPO].branches['main']}"


@pytest.mark.parametrize("revision", ["v1", "refs/pr/7"])
def test_a_revision_may_be_a_branch_a_tag_or_a_pull_request(
    models: dict[str, Path], hub: Hub, tmp_path: Path, revision: str
) -> None:
    hub.repos[REPO].commit({FILE: models["file"].read_bytes()}, revision)
    hub.repos[REPO].commit({FILE: b"something else"})
    done = _apply(models, f"{ADDRESS}@{revision}", tmp_path / "out")
    assert done.exit_code == 0, done.output
    expected = _apply(models, str(models["file"]), tmp_path / "local")
    assert expected.exit_code == 0
    assert _same(load(tmp_path / "out"), load(tmp_path / "local"))


def test_offline_what_was_fetched_before_is_used_and_nothing_else(
    models: dict[str, Path], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = merged(_config(models, ADDRESS), tmp_path / "online")
    as_the_hub(monkeypatch, hub.url, tmp_path / "home", offline=True)
    asked = len(hub.asked)
    assert _same(online, merged(_config(models, ADDRESS), tmp_path / "offline"))
    as_the_hub(monkeypatch, hub.url, tmp_path / "other home", offline=True)
    with pytest.raises(HubError, match="not in the cache, and the Hub is not asked offline") as refused:
        merged(_config(models, ADDRESS), tmp_path / "out")
    assert "hf download" in refused.value.remedy
    assert len(hub.asked) == asked
    assert not (tmp_path / "out").exists()


def test_the_cache_is_the_one_that_mergekit_is_told_to_use(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    merged(_config(models, ADDRESS), tmp_path / "out", transformers_cache=str(tmp_path / "elsewhere"))
    (found,) = (tmp_path / "elsewhere").rglob("twin.safetensors")
    assert address_of(found) == parsed(ADDRESS).at(hub.repos[REPO].branches["main"])
    assert not (tmp_path / "home" / "hub").exists()


def test_learn_starts_from_a_file_on_the_hub(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    """As far as the file: the models have no tokenizer."""
    (tmp_path / "t.txt").write_text("some text\n", "utf-8")
    call = ["learn", str(models["anchor"]), str(models["twin"]), "--data", str(tmp_path / "t.txt"), "-o", "o"]
    done = CliRunner().invoke(main, [*call, "--init", ADDRESS.replace("twin", "absent")])
    assert (done.exit_code, "has no file folder/absent.safetensors" in done.output) == (2, True), done.output
    CliRunner().invoke(main, [*call, "--init", ADDRESS])
    assert hub.downloads("twin") == 1


# Statistics


def _regmean(models: dict[str, Path], *files: str) -> dict[str, Any]:
    names = ("anchor", "twin")
    listed = [{"model": models[m], "parameters": {"statistics": f}} for m, f in zip(names, files, strict=True)]
    return merge_config("regmean", None, listed)


def _with_statistics(hub: Hub, files: dict[str, Path]) -> list[str]:
    hub.new("me/statistics", {name: path.read_bytes() for name, path in files.items()})
    return [f"hf://me/statistics/{name}.safetensors" for name in ("anchor", "twin")]


def test_statistics_come_from_the_hub(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    files = {f"{name}.safetensors": models[f"{name} statistics"] for name in ("anchor", "twin")}
    addresses = _with_statistics(hub, files)
    local = merged(_regmean(models, *map(str, files.values())), tmp_path / "a")
    assert _same(local, merged(_regmean(models, *addresses), tmp_path / "b", write_model_card=True))
    commit = hub.repos["me/statistics"].branches["main"]
    report = json.loads((tmp_path / "b" / "symalign_report.json").read_text("utf-8"))
    told = [of["file"] for of in report["data"]["statistics"].values()]
    assert told == [f"{address}@{commit}" for address in addresses]
    card = (tmp_path / "b" / "README.md").read_text("utf-8")
    assert all(f"[`{file}`](" in card and f"statistics: {file}" in card for file in told)
    assert str(tmp_path / "home") not in card


def _in_shards(path: Path, folder: Path) -> list[Path]:
    file = StatisticsFile.open(path)
    numbers = {name: {kind: file.read(name, kind) for kind in file.kinds(name)} for name in file.names}
    tokens = {name: file.tokens(name) for name in file.names}
    folder.mkdir(exist_ok=True)
    written = write_statistics(folder / path.name, file.origin, file.measured, numbers, tokens, shard_size=20_000)
    assert len(written) > 2
    return written


@pytest.mark.parametrize("suffix", [".safetensors", ".safetensors.index.json"])
def test_statistics_in_shards_come_with_all_shards_and_are_found_offline(
    models: dict[str, Path], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    parts = _in_shards(models["twin statistics"], tmp_path / "shards")
    hub.new("me/statistics", {f"deep/{path.name}": path.read_bytes() for path in parts})
    address = f"hf://me/statistics/deep/twin-statistics{suffix}"
    anchor = str(models["anchor statistics"])
    local = merged(_regmean(models, anchor, str(models["twin statistics"])), tmp_path / "a")
    assert _same(local, merged(_regmean(models, anchor, address), tmp_path / "b"))
    assert all(hub.downloads(path.name) == 1 for path in parts[1:])
    as_the_hub(monkeypatch, hub.url, tmp_path / "home", offline=True)
    assert _same(local, merged(_regmean(models, anchor, address), tmp_path / "c"))


def test_an_index_that_names_other_files_is_refused_before_they_are_fetched(
    models: dict[str, Path], hub: Hub, tmp_path: Path
) -> None:
    index, *shards = _in_shards(models["twin statistics"], tmp_path / "shards")
    text = index.read_text("utf-8").replace(shards[0].name, "../../somewhere.safetensors")
    hub.new("me/statistics", {index.name: text.encode()})
    with pytest.raises(StatisticsFileError, match="not one of its shards") as refused:
        merged(_regmean(models, str(models["anchor statistics"]), f"hf://me/statistics/{index.name}"), tmp_path / "out")
    assert refused.value.where.startswith(f"statistics hf://me/statistics/{index.name}@")
    assert not any("somewhere" in path for _, path in hub.asked)


# What is refused, in one line


def _cases() -> list[Any]:
    own = ("me/absent/a.safetensors", "no repository me/absent, or it is private and not yours", HubError)
    return [
        pytest.param(*own, id="missing repository"),
        pytest.param("me/private/a.safetensors", "no repository me/private, or it is private", HubError, id="private"),
        pytest.param("me/gated/a.safetensors", "me/gated has to be granted by its owner", HubError, id="gated"),
        pytest.param("me/disabled/a.safetensors", "has disabled repository me/disabled", HubError, id="disabled"),
        pytest.param(f"{REPO}/a.safetensors", "has no file a.safetensors in revision main", HubError, id="no file"),
        pytest.param(f"{REPO}/{FILE}@v9", f"{REPO} has no revision v9", HubError, id="no revision"),
        pytest.param("me/broken/a.safetensors", "answers with an error", HubFailureError, id="broken"),
    ]


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub does not wait before it tries again."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda _: None)


@pytest.mark.parametrize(("address", "says", "kind"), _cases())
def test_what_is_not_to_be_had_is_one_line(
    models: dict[str, Path], hub: Hub, tmp_path: Path, address: str, says: str, kind: type, hurried: None
) -> None:
    for access in ("private", "gated", "disabled", "broken"):
        hub.new(f"me/{access}", {"a.safetensors": models["file"].read_bytes()}, access)
    with pytest.raises(HubError, match=says) as refused:
        merged(_config(models, f"hf://{address}"), tmp_path / "out")
    assert type(refused.value) is kind
    assert not (tmp_path / "out").exists()
    done = _apply(models, f"hf://{address}", tmp_path / "out")
    assert done.exit_code == (2 if kind is HubError else 1)
    assert done.output.splitlines()[-1].startswith(f"Error: alignment hf://{address}: ")
    assert says in done.output.splitlines()[-1]


def test_with_a_token_private_and_gated_files_are_read(
    models: dict[str, Path], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_the_hub(monkeypatch, hub.url, tmp_path / "home", token=TOKEN)
    for access in ("private", "gated"):
        hub.new(f"me/{access}", {"a.safetensors": models["file"].read_bytes()}, access)
        done = _apply(models, f"hf://me/{access}/a.safetensors", tmp_path / access)
        assert done.exit_code == 0, done.output


def test_a_wrong_token_is_one_line(
    models: dict[str, Path], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_the_hub(monkeypatch, hub.url, tmp_path / "home", token="hf_wrong")
    done = _apply(models, ADDRESS, tmp_path / "out")
    assert (done.exit_code, "refuses your token" in done.output) == (2, True), done.output


def test_no_connection_is_one_line(
    models: dict[str, Path], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hurried: None
) -> None:
    as_the_hub(monkeypatch, nowhere(), tmp_path / "home")
    done = _apply(models, ADDRESS, tmp_path / "out")
    assert (done.exit_code, f"{nowhere()} cannot be reached" in done.output) == (1, True), done.output
    assert done.output.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize(("number", "code"), [(28, 1), (13, 2)])
def test_a_cache_that_cannot_be_written_is_one_line(
    models: dict[str, Path], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, "the system's words")

    monkeypatch.setattr(file_download, "_download_to_tmp_and_move", fail)
    done = _apply(models, ADDRESS, tmp_path / "out")
    assert done.exit_code == code
    assert "it cannot be stored in the Hub's cache (the system's words)" in done.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("hf://me/files", "it names no file that ends in .safetensors"),
        ("hf://me", "it names no repository user/repo, but me/"),
        ("hf://", "it names no repository"),
        ("hf://me/files/a.bin", "it names no file that ends in .safetensors"),
        ("hf://datasets/me/files/a.safetensors", "datasets are not repositories of models"),
        ("hf://me/files@main/a.safetensors", "the revision stands before the file"),
        ("hf://me/files/../a.safetensors", "no file can have the name"),
        ("hf://me/files//a.safetensors", "no file can have the name"),
        ("hf://me/files/a b.safetensors", "no file can have the name"),
        ("hf://me/files/a.safetensors@", "it has no revision that can be"),
        ("hf://me/files/a.safetensors@../x", "it has no revision that can be"),
        ("hf://me/a--b/a.safetensors", "it names no repository"),
    ],
)
def test_a_malformed_address_is_refused_without_asking(
    models: dict[str, Path], hub: Hub, tmp_path: Path, address: str, says: str
) -> None:
    with pytest.raises(HubError, match="not the address of a file on the Hub") as refused:
        merged(_config(models, address), tmp_path / "out")
    assert says in refused.value.reason
    assert "hf://user/repo/file.safetensors" in refused.value.remedy
    assert not hub.asked


def test_a_damaged_file_on_the_hub_is_refused(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    content = bytearray(models["file"].read_bytes())
    content[-3] ^= 64
    hub.repos[REPO].commit({FILE: bytes(content)})
    with pytest.raises(AlignmentFileError, match="damaged") as refused:
        merged(_config(models, ADDRESS), tmp_path / "out")
    assert refused.value.where == f"alignment {ADDRESS}@{hub.repos[REPO].branches['main']}"
    assert str(tmp_path) not in str(refused.value)


def test_a_file_for_other_models_is_refused_by_its_address(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    swapped = {"model": models["anchor"], "parameters": {"alignment": ADDRESS}}
    with pytest.raises(AlignmentFileError, match="other weights") as refused:
        merged(merge_config("rotation_match", models["twin"], [swapped]), tmp_path / "out")
    assert refused.value.where.startswith(f"alignment {ADDRESS}@")
    assert refused.value.remedy.endswith("-o twin.safetensors")


@pytest.mark.parametrize("where", ["save_alignment", "-o"])
def test_nothing_is_written_to_an_address(models: dict[str, Path], hub: Hub, tmp_path: Path, where: str) -> None:
    if where == "-o":
        call = ["solve", *map(str, (models["anchor"], models["twin"])), "-o", "hf://me/files/a.safetensors"]
        done = CliRunner().invoke(main, call)
        assert (done.exit_code, "mergekit-symalign push" in done.output) == (2, True), done.output
        return
    config = merge_config("rotation_match", models["anchor"], [models["twin"]])
    with pytest.raises(Exception, match="mergekit-symalign push"):
        merged(config | {"parameters": {where: "hf://me/files"}}, tmp_path / "out")


# As users run it


def test_mergekit_yaml_reads_from_the_hub_and_says_in_one_line_what_is_wrong(
    models: dict[str, Path], hub: Hub, tmp_path: Path, mergekit_yaml: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    env = OFFLINE | environment(hub.url, tmp_path / "home")
    text = f"""
merge_method: rotation_match
base_model: {models["anchor"]}
models:
  - model: {models["anchor"]}
  - model: {models["twin"]}
    parameters: {{alignment: {ADDRESS}}}   # from somebody
dtype: float32
"""
    done = mergekit_yaml(text, tmp_path / "out", "--no-copy-tokenizer", env=env)
    assert done.returncode == 0, done.stderr
    assert _same(merged(_config(models, str(models["file"])), tmp_path / "local"), load(tmp_path / "out"))
    pinned = f"{{alignment: {ADDRESS}@{hub.repos[REPO].branches['main']}}}   # from somebody"
    for name in ("mergekit_config.yml", "README.md"):
        assert pinned in (tmp_path / "out" / name).read_text("utf-8")
    missing = mergekit_yaml(text.replace("twin.safetensors}", "absent.safetensors}"), tmp_path / "no", env=env)
    assert missing.returncode == 1
    assert "Traceback" not in missing.stderr
    assert f"Error: alignment hf://{REPO}/folder/absent.safetensors: repository {REPO} has no file" in missing.stderr


def test_commands_start_without_the_parts_of_huggingface_hub_that_upload() -> None:
    code = "import mergekit_symalign.hub.address, mergekit_symalign.sharing.fetch, sys; "
    code += "assert not {m for m in sys.modules if m.startswith('huggingface_hub')}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=BIN)
    assert done.returncode == 0, done.stderr


# Names


def test_addresses_come_back_from_the_cache() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    path = Path("/x/models--me--files-of_all/snapshots") / commit / "deep" / "a.safetensors"
    assert called(path) == published(path) == f"hf://me/files-of_all/deep/a.safetensors@{commit}"
    assert written_again(path) == "a.safetensors"
    assert parsed(called(path)) == address_of(path)
    other = Path("/x/models--me--files/snapshots/main/a.safetensors")  # no commit
    assert (called(other), published(other), written_again(other)) == (str(other), "a.safetensors", str(other))


def test_addresses_in_filters_gradients_slices_and_comments_get_their_commits(hub: Hub) -> None:
    other = f"hf://{REPO}/b.safetensors"
    hub.repos[REPO].commit({"b.safetensors": b""}, "v1")
    hub.repos[REPO].commit({"b.safetensors": b""})
    main_commit, tagged = (hub.repos[REPO].branches[name] for name in ("main", "v1"))
    text = f"""
merge_method: aligned_linear
base_model: a
slices:
  - sources:
      - {{model: a, layer_range: [0, 1]}}
      - model: b
        layer_range: [0, 1]
        parameters:
          alignment: [{{filter: mlp, value: "{other}"}}, {{value: {other}@v1}}]
"""
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    shared = SharedFiles.of(config, MergeOptions())
    assert shared.commits == {other: f"{other}@{main_commit}", f"{other}@v1": f"{other}@{tagged}"}
    new = shared.config(config)
    assert config.slices is not None
    assert new.slices is not None
    first, second = new.slices[0].sources[1].parameters["alignment"]  # type: ignore[index,misc]
    assert isinstance(first, ConditionalParameter)
    assert (first.value, second.value) == (f"{other}@{main_commit}", f"{other}@{tagged}")
    assert config.slices[0].sources[1].parameters["alignment"][0].value == other  # type: ignore[index]
    assert MergeConfiguration.model_validate(yaml.safe_load(shared.text(text))) == new
    assert SharedFiles.of(new, MergeOptions()).config(new) is new


def test_the_config_of_the_docs_merges(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "activations.md").read_text("utf-8")
    (text,) = (block for block in page.split("```yaml\n") if "hf://" in block.partition("```")[0])
    text = text.partition("```")[0].replace("org/base", str(models["anchor"])).replace("org/tuned", str(models["twin"]))
    address = "hf://user/alignments/tuned.safetensors"
    assert address in text
    hub.new("user/alignments", {"tuned.safetensors": models["file"].read_bytes()})
    ours = merged(yaml.safe_load(text), tmp_path / "a")
    expected = merged(yaml.safe_load(text.replace(address, str(models["file"]))), tmp_path / "b")
    assert _same(ours, expected)
