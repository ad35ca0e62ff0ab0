"""``residual`` between models whose tokenizers differ: streams are compared by the tokens that both have."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import State, merge_config, merged, squared_distance
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml
from models import make_model, perturbed, relative_deviation, save, with_weights
from streams import in_other_coordinates, stored
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from mergekit_symalign.alignment_file import AlignmentFile
from mergekit_symalign.cli import main
from mergekit_symalign.errors import ConfigError, GeometryError
from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.stream import residual_kind, ties_embeddings
from mergekit_symalign.graph.stream_tokens import matched, vocabulary_of
from mergekit_symalign.symmetry.residual.kinds import Residual

SPECIAL = ["<unk>", "<s>", "</s>"]
ROWS, TWIN_ROWS = 97, 104  # of the embeddings, padding included
WORDS = [f"w{i}" for i in range(80)]
ANCHOR_TOKENS = SPECIAL + WORDS + [f"anchor{i}" for i in range(6)]
_ORDER = torch.randperm(len(WORDS), generator=torch.Generator().manual_seed(3)).tolist()
TWIN_TOKENS = [f"twin{i}" for i in range(5)] + [WORDS[i] for i in _ORDER] + SPECIAL + [f"twin{i}" for i in range(5, 9)]
COMMON = SPECIAL + WORDS


def tokenizer(tokens: list[str]) -> PreTrainedTokenizerFast:
    """Of whole words, each with the number of its place."""
    found = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    found.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def with_tokens(model: PreTrainedModel, tokens: list[str], rows: int) -> PreTrainedModel:
    """A model of the anchor's tokens with other tokens: known ones keep their rows, new ones and padding get noise."""
    copy = type(model)(type(model.config).from_dict(model.config.to_dict() | {"vocab_size": rows})).double().eval()
    generator, state = torch.Generator().manual_seed(11), dict(model.state_dict())
    layout = resolve(model.config, model="m")
    for name, x in model.state_dict().items():
        claim = layout.claim(name)
        if claim is not None and "vocabulary" in claim.spec.axes:
            size = (rows, *x.shape[1:])
            y = x.std() * torch.randn(size, generator=generator, dtype=x.dtype)
            y[len(tokens) :] *= 100  # padding: what is in there must not count
            for i, token in enumerate(tokens):
                if token in ANCHOR_TOKENS:
                    y[i] = x[ANCHOR_TOKENS.index(token)]
            state[name] = y
    copy.load_state_dict(state)
    copy.tie_weights()
    return copy


def moved(model: PreTrainedModel, wanted: str, norms: State) -> PreTrainedModel:
    """In other coordinates of the residual stream and of all blocks."""
    layout: ModelLayout = resolve(model.config, model="m")
    kind = residual_kind(layout, ties_embeddings(model.config, layout), Residual(wanted))
    found = in_other_coordinates(layout, stored(model), kind, norms)
    copy = with_weights(model, model.state_dict() | found)
    copy.tie_weights()
    return copy


class Pair:
    """An anchor and its sibling with the same tokens, and the sibling with other tokens in other coordinates."""

    def __init__(self, family: str, wanted: str, folder: Path, **overrides: Any) -> None:
        self.folder, self.wanted = folder, wanted
        self.anchor = make_model(family, 0, vocab_size=ROWS, **overrides)
        self.sibling = perturbed(self.anchor, 0.1, 7)
        extended = with_tokens(self.sibling, TWIN_TOKENS, TWIN_ROWS)
        norms = make_model(family, 5, vocab_size=TWIN_ROWS, **overrides)
        self.twin = moved(extended, wanted, stored(norms))
        for name, tokens in (("anchor", ANCHOR_TOKENS), ("sibling", ANCHOR_TOKENS), ("twin", TWIN_TOKENS)):
            save(getattr(self, name), folder / name)
            tokenizer(tokens).save_pretrained(folder / name)

    def config(self, name: str = "twin", source: str | None = "base", **parameters: Any) -> dict[str, Any]:
        asked = {"residual": self.wanted, "residual_rounds": 2} | parameters
        rest = {"parameters": asked} | ({} if source is None else {"tokenizer_source": source})
        return merge_config("rotation_match", self.folder / "anchor", [self.folder / name], **rest)


@torch.no_grad()
def scores(model: PreTrainedModel, vocabulary: dict[str, int], tokens: list[str]) -> torch.Tensor:
    """Logits of some tokens, on a prompt of the same tokens."""
    ids = torch.tensor([vocabulary[token] for token in tokens])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    return model(ids[order].reshape(1, -1)[:, :40])[0][..., ids]


def numbered(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def opened(like: PreTrainedModel, path: Path) -> tuple[PreTrainedModel, dict[str, int]]:
    """A merged model with what its tokenizer says."""
    model, info = type(like).from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    return model.eval(), AutoTokenizer.from_pretrained(path).get_vocab()


def residual_facts(out: Path) -> dict[str, Any]:
    (entry,) = json.loads((out / "symalign_report.json").read_text("utf-8"))["models"].values()
    return entry["residual"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair("llama", "rotation", tmp_path_factory.mktemp("llama"), num_hidden_layers=1)


@pytest.mark.parametrize("source", ["base", "union"])
def test_a_planted_twin_with_other_tokens_comes_back(llama: Pair, tmp_path: Path, source: str) -> None:
    (tmp_path / "config.yml").write_text(json.dumps(llama.config(source=source)), "utf-8")
    args = [str(tmp_path / "config.yml"), str(tmp_path / "out"), "--quiet"]
    done = CliRunner().invoke(mergekit_yaml, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    out, vocabulary = opened(llama.anchor, tmp_path / "out")
    kept = COMMON if source == "base" else TWIN_TOKENS
    assert out.config.vocab_size == len(vocabulary) == len({*ANCHOR_TOKENS, *(kept if source == "union" else ())})
    twin = scores(llama.twin, numbered(TWIN_TOKENS), kept)
    assert relative_deviation(twin, scores(out, vocabulary, kept)) < 1e-3
    merged(llama.config("sibling"), tmp_path / "reference")
    reference = type(llama.anchor).from_pretrained(tmp_path / "reference", dtype=torch.float32)
    assert _distance(llama.anchor, out, vocabulary) == pytest.approx(
        _distance(llama.anchor, reference, numbered(ANCHOR_TOKENS)), rel=5e-3
    )
    facts = residual_facts(tmp_path / "out")
    counts = {"tokens": len(COMMON), "tokens_anchor": len(ANCHOR_TOKENS), "tokens_model": len(TWIN_TOKENS)}
    assert counts.items() <= facts.items()
    assert facts["distance_after"] < 0.1 * facts["distance_before"]


def _distance(anchor: PreTrainedModel, model: PreTrainedModel, vocabulary: dict[str, int]) -> float:
    """Of all tensors, and of the rows that belong to tokens of both."""
    one, other = dict(anchor.state_dict()), dict(model.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        one[name] = one[name][[ANCHOR_TOKENS.index(token) for token in COMMON]]
        other[name] = other[name][[vocabulary[token] for token in COMMON]]
    return squared_distance(one, other)


def test_distances_are_those_of_common_tokens(llama: Pair, tmp_path: Path) -> None:
    """The report's distance after is the distance that the merged tensors have, in effective weights, on these rows."""
    merged(llama.config(residual="permutation"), tmp_path / "out")
    out, vocabulary = opened(llama.anchor, tmp_path / "out")
    assert residual_facts(tmp_path / "out")["distance_after"] == pytest.approx(
        _distance(llama.anchor, out, vocabulary), rel=1e-4
    )


def test_positions_are_no_tokens(tmp_path: Path) -> None:
    """GPT-2: learned positions move with the stream, and all of them count."""
    pair = Pair("gpt2", "permutation", tmp_path, n_layer=1, n_head=3)
    merged(pair.config(), tmp_path / "out")
    out, vocabulary = opened(pair.anchor, tmp_path / "out")
    twin = scores(pair.twin, numbered(TWIN_TOKENS), COMMON)
    assert relative_deviation(twin, scores(out, vocabulary, COMMON)) < 1e-3
    positions = "transformer.wpe.weight"
    wanted = pair.sibling.state_dict()[positions].float()
    assert torch.allclose(out.state_dict()[positions], wanted, atol=1e-5)


def test_rows_in_another_order_are_found_and_said(
    llama: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As many rows, other tokens in them, and nothing in the configuration that matches them."""
    reversed_tokens = ANCHOR_TOKENS[::-1]
    twin = moved(with_tokens(llama.sibling, reversed_tokens, ROWS), "rotation", stored(llama.anchor))
    save(twin, tmp_path / "twin")
    tokenizer(reversed_tokens).save_pretrained(tmp_path / "twin")
    with caplog.at_level(logging.WARNING):
        merged(llama.config(str(tmp_path / "twin"), source=None), tmp_path / "out")
    assert "has tokens in other rows than the anchor" in caplog.text
    facts = residual_facts(tmp_path / "out")
    assert facts["tokens"] == len(ANCHOR_TOKENS)
    assert facts["distance_after"] < 0.1 * facts["distance_before"]
    caplog.clear()
    merged(llama.config(str(tmp_path / "twin")), tmp_path / "matched")
    assert "in other rows" not in caplog.text


def _run(command: str, *args: str) -> str:
    done = CliRunner().invoke(main, [command, *args, "--quiet"])
    assert done.exit_code == 0, done.output
    return done.output


def test_solve_and_inspect_take_models_with_other_tokens(llama: Pair, tmp_path: Path) -> None:
    pair = [str(llama.folder / name) for name in ("anchor", "twin")]
    asked = ["--residual", "rotation", "--residual-rounds", "2"]
    _run("solve", *pair, "-o", str(tmp_path / "a.safetensors"), *asked)
    facts = AlignmentFile.open(tmp_path / "a.safetensors").facts["residual"]
    assert facts["tokens"] == len(COMMON)
    model = {"model": pair[1], "parameters": {"alignment": str(tmp_path / "a.safetensors")}}
    again = merged(merge_config("rotation_match", pair[0], [model], tokenizer_source="base"), tmp_path / "again")
    out = merged(llama.config(), tmp_path / "out")
    assert all(torch.equal(x, again[name]) for name, x in out.items())
    _run("inspect", *pair, "--json", str(tmp_path / "inspected.json"), *asked)
    (entry,) = json.loads((tmp_path / "inspected.json").read_text("utf-8"))["models"].values()
    assert entry["residual"].items() >= facts.items()
    assert entry["residual"]["own_distance_before"] == pytest.approx(facts["distance_before"])  # rows of both only
    _run("inspect", *pair)  # blocks alone
    with pytest.raises(GeometryError, match="its vocabulary differs"):
        merged(llama.config(source=None), tmp_path / "refused")


def test_few_common_tokens_are_said(llama: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = [*WORDS[:10], *(f"other{i}" for i in range(60))]
    save(llama.twin, tmp_path / "twin")
    tokenizer(["<unk>", *few]).save_pretrained(tmp_path / "twin")
    with caplog.at_level(logging.WARNING):
        merged(llama.config(str(tmp_path / "twin"), residual_rounds=1), tmp_path / "out")
    assert "only 13 are in both, fewer than the models' hidden size of 48" in caplog.text
    caplog.clear()
    merged(llama.config(residual_rounds=1), tmp_path / "enough")
    assert "hidden size" not in caplog.text


def test_models_without_a_common_token_are_refused(llama: Pair, tmp_path: Path) -> None:
    save(llama.twin, tmp_path / "twin")
    found = Tokenizer(WordLevel({f"other{i}": i for i in range(70)}, unk_token="other0"))
    PreTrainedTokenizerFast(tokenizer_object=found).save_pretrained(tmp_path / "twin")
    message = rf"of the {len(ANCHOR_TOKENS)} tokens of .* and 70 of .* none is in both"
    with pytest.raises(ConfigError, match=message):
        merged(llama.config(str(tmp_path / "twin")), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merged(llama.config(str(tmp_path / "twin"), residual="none"), tmp_path / "out")  # blocks know no tokens


@pytest.mark.parametrize("bare", ["anchor", "twin"])
def test_rows_that_nothing_names_are_refused(llama: Pair, tmp_path: Path, bare: str) -> None:
    paths = {name: llama.folder / name for name in ("anchor", "twin")}
    paths[bare] = save(getattr(llama, bare), tmp_path / bare)
    message = rf"{ROWS} rows and .*{TWIN_ROWS}, and .*{bare} has no tokenizer"
    args = [str(paths["anchor"]), str(paths["twin"]), "-o", str(tmp_path / "a.safetensors"), "--residual", "rotation"]
    done = CliRunner().invoke(main, ["solve", *args, "--quiet"])
    assert done.exit_code != 0
    assert re.search(message, done.output), done.output
    assert not (tmp_path / "a.safetensors").exists()


def test_rows_that_are_cut_off_do_not_count(llama: Pair, tmp_path: Path) -> None:
    """MergeKit's --unsafe-truncate-embeddings says that equal rows are the same tokens."""
    anchor = save(llama.anchor, tmp_path / "anchor")
    longer = save(with_tokens(llama.sibling, [*ANCHOR_TOKENS], TWIN_ROWS), tmp_path / "longer")
    parameters = {"residual": "permutation", "residual_rounds": 1}
    config = merge_config("rotation_match", anchor, [longer], parameters=parameters)
    merged(config, tmp_path / "out", unsafe_truncate_embeddings=True)
    assert residual_facts(tmp_path / "out")["tokens"] == ROWS


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "bert-classifier"])
def test_a_directory_without_a_tokenizer_has_none(tmp_path: Path, family: str) -> None:
    """transformers makes one without any words for some architectures."""
    path = save(make_model(family, 0, num_hidden_layers=1), tmp_path / "model")
    model = ModelReference.parse(str(path))
    assert vocabulary_of(model, MergeOptions()) is None
    tokenizer(ANCHOR_TOKENS).save_pretrained(path)
    assert numbered(ANCHOR_TOKENS).items() <= (vocabulary_of(model, MergeOptions()) or {}).items()


def test_tokens_without_a_row_are_not_matched() -> None:
    found = matched({"a": 0, "b": 5, "c": 1}, {"b": 0, "c": 9, "a": 3}, (6, 4))
    assert (found.anchor, found.model) == ((0, 5), (3, 0))
    assert found.sizes == (3, 2)
