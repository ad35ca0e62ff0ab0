"""``mergekit-symalign push``: what lands on the Hub, what the card says, what is kept and what is never published."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from conftest import load, merge_config, merged
from hub_server import TOKEN, Hub, as_the_hub, hub_server
from models import make_model, perturbed, planted_twin, save
from safetensors.torch import load_file
from whole_statistics import measure

from mergekit_symalign.alignment_file import AlignmentFile, renamed
from mergekit_symalign.cli import main
from mergekit_symalign.hub.address import parsed
from mergekit_symalign.sharing.public import role_of
from mergekit_symalign.sharing.sections import plain, with_section
from mergekit_symalign.statistics.file import StatisticsFile
from mergekit_symalign.statistics.writer import write_statistics

REPO = "me/files"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An anchor, a planted twin, the alignment between them, and statistics of the twin."""
    folder = tmp_path_factory.mktemp("secret-folder")
    model = make_model("llama", 0, num_hidden_layers=1)
    twin = planted_twin(perturbed(model, 0.1, 1))
    paths = {"anchor": save(model, folder / "anchor"), "twin": save(twin, folder / "twin")}
    paths |= {"file": folder / "solved.safetensors", "statistics": folder / "read.safetensors"}
    done = CliRunner().invoke(main, ["solve", *map(str, (paths["anchor"], paths["twin"])), "-o", str(paths["file"])])
    assert done.exit_code == 0, done.output
    measure(twin, paths["twin"], paths["statistics"])
    return paths


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub that this user may write to."""
    with hub_server() as found:
        as_the_hub(monkeypatch, found.url, tmp_path / "home", token=TOKEN)
        yield found


def push(file: Path, *options: str, repo: str = REPO) -> Result:
    return CliRunner().invoke(main, ["push", str(file), repo, *options])


def pushed(file: Path, *options: str, repo: str = REPO) -> str:
    """The address that the command prints."""
    done = push(file, *options, repo=repo)
    assert done.exit_code == 0, done.output
    return done.output.splitlines()[-1]


def _card(hub: Hub, branch: str = "main") -> str:
    return hub.repos[REPO].files(branch)["README.md"].decode()


def _snippet(card: str) -> dict[str, Any]:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", card, flags=re.M | re.S)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


# What lands there


def test_a_merge_from_what_was_pushed_is_the_merge_from_the_file(
    models: dict[str, Path], hub: Hub, tmp_path: Path
) -> None:
    address = pushed(models["file"])
    assert address == f"hf://{REPO}/solved.safetensors@{hub.repos[REPO].branches['main']}"
    merges = []
    for out, alignment in (("local", str(models["file"])), ("hub", address)):
        twin = {"model": models["twin"], "parameters": {"alignment": alignment}}
        merges.append(merged(merge_config("rotation_match", models["anchor"], [twin]), tmp_path / out))
    assert merges[0].keys() == merges[1].keys()
    assert all(torch.equal(x, merges[1][name]) for name, x in merges[0].items())
    assert any(not torch.equal(x, load(models["twin"])[name]) for name, x in merges[0].items())


def test_no_folder_of_this_machine_is_published(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    found = AlignmentFile.open(models["file"])
    settings = {"calibration": str(tmp_path / "secret-folder" / "prompts.jsonl")}
    origin = replace(found.origin, settings={**found.origin.settings, **settings}, settings_by_block={})
    file = renamed(found, tmp_path / "secret-folder" / "a.safetensors", origin).path
    assert b"secret-folder" in file.read_bytes()
    done = push(file)
    assert done.exit_code == 0, done.output
    push(models["statistics"])
    sent = [*hub.received, *(x for of in hub.repos[REPO].commits.values() for x in of.values()), *hub.large.values()]
    assert any(b"fingerprint" in content for content in sent)
    assert not [content for content in sent if b"secret-folder" in content]
    assert f"anchor {models['anchor']} is published as anchor, not by its path" in done.output
    assert "--anchor user/repo gives it a public name" in done.output
    (tmp_path / "new.safetensors").write_bytes(hub.repos[REPO].files()["a.safetensors"])
    new = AlignmentFile.open(tmp_path / "new.safetensors")
    assert (new.origin.anchor, new.origin.model, new.origin.settings["calibration"]) == (
        "anchor",
        "twin",
        "prompts.jsonl",
    )
    assert new.origin == replace(origin, anchor="anchor", model="twin", settings=new.origin.settings)
    old_numbers, new_numbers = load_file(file), load_file(tmp_path / "new.safetensors")
    assert old_numbers.keys() == new_numbers.keys()
    assert all(torch.equal(x, new_numbers[name]) for name, x in old_numbers.items())


def test_given_names_are_published_and_an_unchanged_file_goes_as_it_is(
    models: dict[str, Path], hub: Hub, tmp_path: Path
) -> None:
    names = ("--anchor", "some/base", "--model", "some/tuned@v2")
    pushed(models["file"], *names)
    card = _card(hub)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "library_name": "mergekit-symalign",
        "tags": ["mergekit", "mergekit-symalign", "alignment"],
        "base_model": ["some/base", "some/tuned"],
    }
    (tmp_path / "b.safetensors").write_bytes(hub.repos[REPO].files()["solved.safetensors"])
    pushed(tmp_path / "b.safetensors", *names)
    assert hub.repos[REPO].files()["b.safetensors"] == (tmp_path / "b.safetensors").read_bytes()


def test_pushing_the_same_again_makes_no_second_version_of_the_file(models: dict[str, Path], hub: Hub) -> None:
    pushed(models["file"])
    first = hub.repos[REPO].files()
    pushed(models["file"])
    assert hub.repos[REPO].files() == first


def test_names_that_the_hub_knows_stay(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    hub.new("org/base")
    hub.new("org/closed", access="gated")
    origin = replace(AlignmentFile.open(models["file"]).origin, anchor="org/base", model="org/closed@main")
    file = renamed(AlignmentFile.open(models["file"]), tmp_path / "a.safetensors", origin).path
    done = push(file)
    assert "published as" not in done.output
    assert hub.repos[REPO].files()["a.safetensors"] == file.read_bytes()
    assert yaml.safe_load(_card(hub).split("---\n")[1])["base_model"] == ["org/base", "org/closed"]


@pytest.mark.parametrize(
    ("known", "published"),
    [
        ("/home/me/work/tuned", "tuned"),
        (r"C:\Users\me\tuned", "tuned"),
        ("./tuned/", "tuned"),
        ("..", "model"),
        ("work/tuned", "tuned"),
        ("org/base", "org/base"),
        ("org/base@main+work/adapter", "org/base@main+adapter"),
        ("/x/models--org--base/snapshots/0123", "org/base"),
        ("gpt2", "gpt2"),
    ],
)
def test_paths_of_every_system_lose_their_folders(known: str, published: str) -> None:
    assert role_of("model", known, None, {"org/base"}.__contains__).name == published


def test_a_folder_here_is_no_repository_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert role_of("model", "org/base", None, {"org/base"}.__contains__).name == "base"


# The card


def test_the_card_says_what_the_file_is_and_its_config_and_commands_work(
    models: dict[str, Path], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed(models["file"])
    card, origin = _card(hub), AlignmentFile.open(models["file"]).origin
    for told in (origin.anchor_fingerprint, origin.model_fingerprint, "rotation: exact", "hidden: 48"):
        assert told in card, told
    assert "of the distance is symmetry" in card
    monkeypatch.chdir(models["anchor"].parent)  # where the published names are folders
    expected = {"model": "twin", "parameters": {"alignment": str(models["file"])}}
    config = merge_config("rotation_match", "anchor", ["anchor", expected], dtype="bfloat16")
    ours = merged(_snippet(card), tmp_path / "a")
    assert all(torch.equal(x, ours[name]) for name, x in merged(config, tmp_path / "b").items())
    apply, verify = (shlex.split(line) for line in re.findall(r"^    mergekit-symalign (.*)$", card, flags=re.M))
    done = CliRunner().invoke(main, [x if x != "aligned" else str(tmp_path / "aligned") for x in apply])
    assert done.exit_code == 0, done.output
    verified = [str(tmp_path / "aligned") if x == "aligned" else x for x in verify]
    done = CliRunner().invoke(main, [*verified, "--random", "--tokens", "32"])
    assert (done.exit_code, "The same function" in done.output) == (0, True), done.output


def test_statistics_are_pushed_with_a_card_and_in_shards(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    file = StatisticsFile.open(models["statistics"])
    numbers = {name: {kind: file.read(name, kind) for kind in file.kinds(name)} for name in file.names}
    tokens = {name: file.tokens(name) for name in file.names}
    public = file.origin.model_copy(update={"model": "gpt2"})  # a name that is no path
    parts = write_statistics(tmp_path / "s.safetensors", public, file.measured, numbers, tokens, shard_size=20_000)
    address = pushed(parts[0], "--path-in-repo", "deep/s.safetensors")
    assert parsed(address).file == "deep/s.safetensors"
    there = hub.repos[REPO].files()
    assert {f"deep/{part.name}": part.read_bytes() for part in parts}.items() <= there.items()
    card = _card(hub)
    assert yaml.safe_load(card.split("---\n")[1])["tags"][-1] == "statistics"
    config = _snippet(card)
    assert config["models"][0]["parameters"] == {"statistics": f"hf://{REPO}/deep/s.safetensors"}
    for told in (file.origin.fingerprint, file.origin.tokenizer, file.measured.calibration, "gram: full"):
        assert told in card
    pushed(parts[0], "--path-in-repo", "other.safetensors", "--model", "some/model")
    (tmp_path / "new").mkdir()
    for name, content in hub.repos[REPO].files().items():
        if name.startswith("other"):
            (tmp_path / "new" / name).write_bytes(content)
    new = StatisticsFile.open(tmp_path / "new" / "other.safetensors")
    assert new.origin == public.model_copy(update={"model": "some/model"})
    assert all(torch.equal(new.read(name, kind), x) for name, of in numbers.items() for kind, x in of.items())
    assert all(new.tokens(name) == tokens[name] for name in file.names)


def test_every_file_has_its_own_section_and_only_that_is_replaced(models: dict[str, Path], hub: Hub) -> None:
    pushed(models["file"])
    first = _card(hub)
    pushed(models["statistics"])
    both = _card(hub)
    section = re.compile(r"<!-- mergekit-symalign: solved.*<!-- end of mergekit-symalign: solved.safetensors -->", re.S)
    (own,) = section.findall(first)
    assert own in both
    assert "<!-- mergekit-symalign: read.safetensors -->" in both
    assert yaml.safe_load(both.split("---\n")[1])["tags"] == [
        "mergekit",
        "mergekit-symalign",
        "alignment",
        "statistics",
    ]
    hub.repos[REPO].commit({"README.md": both.replace("# me/files", "# me/files\n\nMy own words.").encode()})
    pushed(models["file"], "--anchor", "some/base")
    third = _card(hub)
    assert "My own words." in third
    assert "some/base" in third
    assert third.count("<!-- mergekit-symalign: solved.safetensors -->") == 1
    assert both[both.index("<!-- mergekit-symalign: read") :] in third


def test_the_card_of_somebody_else_is_kept_to_the_byte(models: dict[str, Path], hub: Hub) -> None:
    theirs = "---\nlicense: mit   # ours\ntags: [a]\n---\r\n# A model\r\n\r\nWords — with *marks*.\n"
    hub.new(REPO, {"README.md": theirs.encode(), "model.bin": b"weights"})
    pushed(models["file"])
    assert _card(hub).startswith(theirs.rstrip() + "\n\n<!-- mergekit-symalign: solved.safetensors -->\n")
    assert hub.repos[REPO].files()["model.bin"] == b"weights"


def test_names_are_shown_and_not_obeyed(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    name = "x](http://evil) <b>`|` $(reboot)"
    origin = replace(AlignmentFile.open(models["file"]).origin, anchor=name, model=name)
    pushed(renamed(AlignmentFile.open(models["file"]), tmp_path / "a.safetensors", origin).path)
    card = _card(hub)
    assert "](http://evil" not in card.replace("\\](", "").replace("\\]\\(", "")
    assert "<b>" not in card.replace("\\<b\\>", "")
    assert _snippet(card)["base_model"] == "ANCHOR"
    assert "$(reboot)" not in card
    assert plain("a|b_c") == r"a\|b\_c"


def test_a_section_goes_where_it_was() -> None:
    facts = {"tags": ["t"]}
    one = with_section(None, REPO, "a.safetensors", facts, "first")
    two = with_section(one, REPO, "b.safetensors", facts, r"second \1")
    assert with_section(two, REPO, "b.safetensors", facts, r"second \1") == two
    assert with_section(two, REPO, "a.safetensors", facts, "changed") == two.replace("first", "changed")
    assert with_section("no front matter", REPO, "a.safetensors", facts, "x").startswith("no front matter\n\n<!--")


# Options


def test_branch_message_and_privacy(models: dict[str, Path], hub: Hub) -> None:
    pushed(models["file"], "--private", "--quiet")
    assert hub.repos[REPO].access == "private"
    hub.repos[REPO].commit({}, "next")
    address = pushed(models["file"], "--revision", "next", "--path-in-repo", "x/y.safetensors", "--message", "mine")
    assert address == f"hf://{REPO}/x/y.safetensors@{hub.repos[REPO].branches['next']}"
    assert "x/y.safetensors" not in hub.repos[REPO].files()
    assert _snippet(_card(hub, "next"))["models"][1]["parameters"]["alignment"] == f"hf://{REPO}/x/y.safetensors@next"
    (header,) = (json.loads(x.splitlines()[0]) for x in hub.received if b'"summary": "mine"' in x or b'"mine"' in x)
    assert header["value"]["summary"] == "mine"


def test_quiet_prints_the_address_only(models: dict[str, Path], hub: Hub) -> None:
    assert push(models["file"], "--quiet").output.splitlines() == [
        f"hf://{REPO}/solved.safetensors@{hub.repos[REPO].branches['main']}"
    ]


# What is refused, with nothing uploaded


def _refused(done: Result, says: str, code: int = 2) -> None:
    assert done.exit_code == code, done.output
    assert says in done.output.splitlines()[-1], done.output
    assert isinstance(done.exception, SystemExit)


def test_other_files_are_refused(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    _refused(push(models["twin"] / "model.safetensors"), "neither an alignment nor a file of statistics")
    _refused(push(tmp_path / "absent.safetensors"), "there is no such file")
    for of in ("file", "statistics"):
        damaged = bytearray(models[of].read_bytes())
        damaged[-3] ^= 64
        (tmp_path / "a.safetensors").write_bytes(damaged)
        _refused(push(tmp_path / "a.safetensors"), "damaged", code=1)
    assert not hub.asked


@pytest.mark.parametrize(
    ("options", "repo", "says"),
    [
        ((), "files", "it names no repository user/repo, but files"),
        (("--path-in-repo", "../a.safetensors"), REPO, "no file can have the name"),
        (("--path-in-repo", "a.bin"), REPO, "it names no file that ends in .safetensors"),
        (("--path-in-repo", "a.safetensors.index.json"), REPO, "an index is named after its shards"),
        (("--revision", "a..b"), REPO, "no branch can have this name"),
        (("--anchor", "/tmp/x"), REPO, "it names no repository user/repo, but /tmp/x"),
    ],
)
def test_names_that_cannot_be_are_refused(
    models: dict[str, Path], hub: Hub, options: tuple[str, ...], repo: str, says: str
) -> None:
    _refused(push(models["file"], *options, repo=repo), says)
    assert not hub.asked


def test_an_anchor_of_statistics_is_refused(models: dict[str, Path], hub: Hub) -> None:
    _refused(push(models["statistics"], "--anchor", "a/b"), "--anchor belongs to alignments")


def test_who_may_not_write_is_told_so(
    models: dict[str, Path], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.writable = False
    _refused(push(models["file"]), f"your account or token may not do this with repository {REPO}")
    as_the_hub(monkeypatch, hub.url, tmp_path / "home", token="hf_wrong")
    _refused(push(models["file"]), "refuses your token")
    as_the_hub(monkeypatch, hub.url, tmp_path / "home")
    _refused(push(models["file"]), "nobody is logged in to write to it")
    as_the_hub(monkeypatch, hub.url, tmp_path / "home", token=TOKEN, offline=True)
    _refused(push(models["file"]), "HF_HUB_OFFLINE")
    assert not hub.large


def test_a_public_repository_is_not_taken_for_a_private_one(models: dict[str, Path], hub: Hub) -> None:
    hub.new(REPO)
    _refused(push(models["file"], "--private"), "it is public, and --private is given")
    assert not hub.large


def test_a_branch_has_to_exist(models: dict[str, Path], hub: Hub) -> None:
    _refused(push(models["file"], "--revision", "v9"), f"repository {REPO} has no revision v9")
    assert not hub.large


def test_a_card_that_somebody_changes_meanwhile_is_not_overwritten(models: dict[str, Path], hub: Hub) -> None:
    hub.new(REPO)
    hub.before_commit = lambda: hub.repos[REPO].commit({"README.md": b"theirs"})
    _refused(push(models["file"]), "was changed in the meantime", code=1)
    assert _card(hub) == "theirs"


# What a card says of alignments of other kinds


def _solved(models: dict[str, Path], out: Path, *options: str) -> Path:
    call = ["solve", str(models["anchor"]), str(models["twin"]), "-o", str(out), *options]
    done = CliRunner().invoke(main, call)
    assert done.exit_code == 0, done.output
    return out


def test_a_card_of_a_moved_stream_has_its_distance_and_settings(
    models: dict[str, Path], hub: Hub, tmp_path: Path
) -> None:
    pushed(_solved(models, tmp_path / "a.safetensors", "--residual", "rotation", "--untie"))
    card = _card(hub)
    assert "distance of all weights" in card
    assert "the plain method will do" not in card
    assert "differs between layers" not in card
    assert "residual: rotation" in card
    assert _snippet(card)["parameters"] == {"untie": True}


def test_a_card_does_not_call_a_full_rotation_exact(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    pushed(_solved(models, tmp_path / "a.safetensors", "--rotation", "full"))
    assert "**It changes what the model computes** (`rotation: full`)." in _card(hub)
    pushed(models["file"])
    assert _card(hub).count("What the model computes does not change.") == 1
