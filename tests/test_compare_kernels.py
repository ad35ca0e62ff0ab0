"""What `compare` is made of: errors of differences, losses of documents, values to try, tables and pictures."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import FAMILIES, make_model, word_tokenizer
from more_models import more_model
from scipy.stats import t as student
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mergekit_symalign.comparing import losses, merging
from mergekit_symalign.comparing.documents import Document, Piece, document_of, piece_of, read_file
from mergekit_symalign.comparing.losses import document_losses
from mergekit_symalign.comparing.picture import draw, tried
from mergekit_symalign.comparing.rows import Column, Row, best_overall, rank
from mergekit_symalign.comparing.selection import select
from mergekit_symalign.comparing.statistics import mean_loss, paired, unpaired
from mergekit_symalign.comparing.store import Store
from mergekit_symalign.comparing.table import numbers, sentences, table
from mergekit_symalign.comparing.tasks import score_of
from mergekit_symalign.comparing.variants import Setting, variants
from mergekit_symalign.errors import CalibrationError, ConfigError

WORDS = word_tokenizer(97)


# Statistics


def _documents(seed: int, count: int, difference: float) -> tuple[list[float], list[float], list[int]]:
    """Losses of two models that differ by so much per token, with noise of documents and of lengths."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(5, 60, count)
    common = draw.normal(3, 1, count) * tokens
    own = (difference + draw.normal(0, 0.3, count)) * tokens
    return (common + own).tolist(), common.tolist(), tokens.tolist()


def test_the_error_is_that_of_a_ratio_of_means() -> None:
    """Against the textbook's other form: variances and covariance of differences and lengths."""
    one, other, tokens = _documents(0, 25, 0.1)
    found, d = paired(one, other, tokens), np.subtract(one, other)
    ratio = d.sum() / np.sum(tokens)
    (dd, dn), (_, nn) = np.cov(d, tokens)
    variance = (dd - 2 * ratio * dn + ratio**2 * nn) / (25 * np.mean(tokens) ** 2)
    assert found.value == pytest.approx(ratio)
    assert found.error == pytest.approx(math.sqrt(variance))
    assert found.within == pytest.approx(student.ppf(0.975, 24) * math.sqrt(variance))
    assert found.value == pytest.approx(mean_loss(one, tokens) - mean_loss(other, tokens))


def test_equal_lengths_give_the_error_of_a_mean() -> None:
    one, other = [3.0, 5.0, 4.0, 8.0], [2.0, 5.0, 1.0, 6.0]
    found = paired(one, other, [2, 2, 2, 2])
    d = np.subtract(one, other) / 2
    assert found.error == pytest.approx(d.std(ddof=1) / 2)


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    inside = [abs(paired(*_documents(seed, 30, 0.1)).value - 0.1) for seed in range(400)]
    within = [paired(*_documents(seed, 30, 0.1)).within for seed in range(400)]
    share = np.mean(np.less(inside, within))
    assert 0.95 - 3 * 0.011 < share < 0.95 + 3 * 0.011  # sqrt(0.95 · 0.05 / 400) is 0.011


def test_noise_that_both_have_does_not_count() -> None:
    one, other, tokens = _documents(1, 20, 0.5)
    shared = np.random.default_rng(5).normal(0, 100, 20)
    a, b = paired(one, other, tokens), paired(list(one + shared), list(other + shared), tokens)
    assert b.error == pytest.approx(a.error)
    assert a.is_shown


def test_one_document_tells_nothing_of_the_error() -> None:
    found = paired([5.0], [3.0], [2])
    assert (found.value, found.error, found.within) == (1.0, None, math.inf)
    assert not found.is_shown


def test_what_no_table_shows_is_no_difference() -> None:
    """Every document is worse by 1e-5 nats a token: surely so, and of no use."""
    tokens = [10, 20, 30]
    assert not paired([n + 1e-5 * n for n in tokens], [float(n) for n in tokens], tokens).is_shown
    assert paired([n + 1e-4 * n for n in tokens], [float(n) for n in tokens], tokens).is_shown


def test_scores_are_taken_for_independent() -> None:
    found = unpaired((0.5, 0.03), (0.4, 0.04))
    assert found.error == pytest.approx(0.05)
    assert found.within == pytest.approx(0.05 * student.ppf(0.975, 10**9), rel=1e-6)
    assert not unpaired((0.5, None), (0.1, 0.01)).is_shown


# Losses


def _pieces(seed: int) -> list[Piece]:
    """Documents of many lengths, some of which are answers to prompts."""
    draw = np.random.default_rng(seed)
    lengths = [2, 31, 5, 5, 18, 3, 24, 11]
    starts = [1, 20, 1, 4, 9, 2, 1, 10]
    ids = [tuple(int(x) for x in draw.integers(3, 97, n)) for n in lengths]
    return [Piece(*pair) for pair in zip(ids, starts, strict=True)]


def _reference(model: Any, piece: Piece) -> float:
    """transformers' own loss, which is a mean."""
    ids = torch.tensor([piece.ids])
    labels = ids.clone()
    labels[:, : piece.start] = -100
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss) * piece.counted


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "deepseek-v3.2", "qwen2.5-vl", "jamba"])
def test_losses_are_those_of_transformers_in_the_order_given(family: str) -> None:
    make = make_model if family in FAMILIES else more_model
    model, pieces = make(family, 0).float().eval(), _pieces(0)
    found = document_losses(model, pieces)
    for nats, piece in zip(found, pieces, strict=True):
        assert nats == pytest.approx(_reference(model, piece), rel=1e-5), piece


def test_batches_and_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pieces, counted = make_model("llama", 0).float().eval(), _pieces(1), list[int]()
    together = document_losses(model, pieces, counted.append)
    assert sum(counted) == len(pieces) > len(counted)
    monkeypatch.setattr(losses, "_LOGITS", 97)  # one document at a time
    monkeypatch.setattr(losses, "_AT_ONCE", 3 * 97)  # and three tokens of it
    alone = list[int]()
    assert document_losses(model, pieces, alone.append) == pytest.approx(together, rel=1e-5)
    assert alone == [1] * len(pieces)


def test_only_logits_that_are_needed_are_calculated(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_model("llama", 0).float().eval(), list[int]()
    model.lm_head.register_forward_hook(lambda module, given, logits: seen.append(logits.shape[1]))
    document_losses(model, [Piece(tuple(range(3, 33)), 25)])
    assert seen == [6]


# Documents


def _letters() -> PreTrainedTokenizerFast:
    """Letters are tokens, and so is `ab`; a text begins with a token of its own."""
    vocabulary = {x: i for i, x in enumerate(["<s>", "a", "b", "x", "y", "ab"])}
    tokenizer = Tokenizer(BPE(vocabulary, [("a", "b")]))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.mark.parametrize(
    ("prompt", "answer", "ids", "start"),
    [
        ("", "xyx", (0, 3, 4, 3), 1),
        ("xy", "xx", (0, 3, 4, 3, 3), 3),
        ("xa", "bx", (0, 3, 5, 3), 2),  # the token `ab` holds the end of the prompt and the begin of the answer
        ("xy", "", (0, 3, 4), 3),
    ],
)
def test_the_answer_begins_where_tokens_part_from_those_of_the_prompt(
    prompt: str, answer: str, ids: tuple[int, ...], start: int
) -> None:
    assert piece_of(Document(prompt, answer), _letters()) == Piece(ids, start)


TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"
MESSAGES = [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5 w6"}]


def test_of_a_conversation_only_the_last_answer_counts() -> None:
    tokenizer = word_tokenizer(97)
    tokenizer.chat_template = TEMPLATE
    document = document_of(MESSAGES, tokenizer, "here")
    assert document.prompt == "<user> w3 w4 <assistant>"
    assert document.answer == " w5 w6 "
    assert not document.special
    piece = piece_of(document, tokenizer)
    assert [tokenizer.convert_ids_to_tokens(i) for i in piece.ids[piece.start :]] == ["w5", "w6"]
    tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match="here: the chat template cannot write its messages"):
        document_of(MESSAGES, tokenizer, "here")
    tokenizer.chat_template = "{{ messages | length }}{{ add_generation_prompt }}"
    with pytest.raises(CalibrationError, match="writes the conversation in another way"):
        document_of(MESSAGES, tokenizer, "here")


def test_lines_of_every_form_are_read(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"text": "t"}, {"prompt": "p", "answer": "a"}, {"prompt": "p", "completion": "c"},
        {"prompt": "p", "response": "r", "text": "not this"}, {"messages": MESSAGES},
    ]  # fmt: skip
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n", "utf-8")
    assert read_file(file) == ["t", ("p", "a"), ("p", "c"), ("p", "r"), MESSAGES]
    (tmp_path / "data.txt").write_text("one\n\ntwo\r\n", "utf-8")
    assert read_file(tmp_path / "data.txt") == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: it is not JSON"),
        ("[1]", "line 2: it is no object"),
        ('{"prompt": "p"}', "line 2: it has a prompt and no answer"),
        ('{"question": "p"}', "line 2: it has no text, answer or messages"),
        ('{"messages": [{"role": "user", "content": "c"}]}', "line 2: its last message is not the assistant's"),
    ],
)
def test_a_line_of_another_form_is_named(line: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(f'{{"text": "t"}}\n{line}\n', "utf-8")
    with pytest.raises(CalibrationError, match=reason):
        read_file(tmp_path / "data.jsonl")


def test_documents_are_cut_as_text_and_counted() -> None:
    read = ["w3 w4 w5 w6 w7 w8", "w9", ("w3 w4 w5 w6", " w7"), ("w3", " w4 w5 w6 w7"), "w3 w4", "w5 w6"]
    found = select(read, Path("f"), WORDS, tokens=10, length=4)
    assert [d.text for d in found.documents] == ["w3 w4 w5 w6", "w3 w4 w5 w6", "w3 w4"]
    assert found.tokens == (3, 3, 1)
    assert (found.there, found.cut, found.passed_over) == (6, 2, 2)
    assert found.note == "1 documents are beyond --tokens; 2 are cut at --max-length; 2 leave nothing to count"
    whole = select(["w3 w4", "w5 w6"], Path("f"), WORDS, tokens=10, length=4)
    assert whole.note is None
    assert whole.digest != select(["w3 w4", "w5 w7"], Path("f"), WORDS, tokens=10, length=4).digest
    with pytest.raises(CalibrationError, match="no document has a second token"):
        select(["w3"], Path("f"), WORDS, tokens=10, length=4)


# Values to try

FIELDS = ("merge_method", "models", "parameters", "dtype", "slices")
CONFIG = {
    "merge_method": "linear",
    "models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 1.0}}],
}


def test_every_combination_of_values_is_a_merge() -> None:
    settings = [Setting.parse("models.1.parameters.weight=0.3,0.5"), Setting.parse("parameters.normalize=true,false")]
    found = variants({"c": CONFIG}, settings, FIELDS)
    assert [v.label for v in found] == [
        "weight=0.3 normalize=true", "weight=0.3 normalize=false",
        "weight=0.5 normalize=true", "weight=0.5 normalize=false",
    ]  # fmt: skip
    last = found[-1].config
    assert last["models"] == [{"model": "a"}, {"model": "b", "parameters": {"weight": 0.5}}]
    assert last["parameters"] == {"normalize": False}
    assert found[-1].values == {"models.1.parameters.weight": 0.5, "parameters.normalize": False}
    assert CONFIG["models"][1]["parameters"] == {"weight": 1.0}  # type: ignore[index]


def test_labels_tell_configs_and_places_apart() -> None:
    weights = [Setting.parse(f"models.{i}.parameters.weight=1") for i in range(2)]
    (both,) = variants({"c": CONFIG}, weights, FIELDS)
    assert both.label == "models.0.parameters.weight=1 models.1.parameters.weight=1"
    found = variants({"c": CONFIG, "d": CONFIG | {"dtype": "float32"}}, [Setting.parse("merge_method=ties")], FIELDS)
    assert [v.label for v in found] == ["c ties", "d ties"]
    assert [v.label for v in variants({"c": CONFIG, "d": CONFIG}, [], FIELDS)] == ["c"]  # equal ones once
    (listed,) = variants({"c": CONFIG}, [Setting.parse("parameters.weight=[0, 1]")], FIELDS)
    assert listed.config["parameters"] == {"weight": [0, 1]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("weight", "not of the form"),
        ("parameters.weight=", "not of the form"),
        ("parameters..weight=1", "not of the form"),
        ("parameters.weight={", "not of the form"),
        ("parameter.weight=1", "a merge has no parameter"),
        ("models.2.parameters.weight=1", "2 is no index of a list of 2"),
        ("models.x.parameters.weight=1", "x is no index of a list of 2"),
        ("models.0.weight=1", "models.0 has no weight"),
        ("slices.0.parameters.weight=1", "it has no slices with something inside"),
        ("merge_method.name=1", "it has no merge_method with something inside"),
    ],
)
def test_a_place_that_is_not_there_is_named(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        variants({"c": CONFIG}, [Setting.parse(text)], FIELDS)


# Tables

FILE = Column("f", "nats/token", (10, 10, 10))
TASK = Column("t", "acc", higher_is_better=True)


def _row(label: str, nats: list[float] | None = None, score: float | None = None, **rest: Any) -> Row:
    measured = {} if nats is None else {"f": nats}
    return Row(label, rest.pop("is_merge", True), measured, {} if score is None else {"t": (score, 0.01)}, **rest)


PARENT = _row("p", [21.0, 29.0, 41.0], is_merge=False)
GOOD, FAR, NEAR = _row("good", [20.0, 30.0, 40.0]), _row("far", [30.1, 40.0, 49.9]), _row("near", [20.0, 31.0, 39.5])


def test_a_star_and_a_sentence_where_the_difference_is_larger_than_its_error() -> None:
    rows = [PARENT, GOOD, FAR]
    head, units, *lines = table(rows, [FILE])
    assert head.split() == ["f"]
    assert units.split() == ["nats/token"]
    within = paired(FAR.nats["f"], GOOD.nats["f"], (10, 10, 10)).within
    assert lines[1].split() == ["good", "3.0000*"]
    assert lines[2].split() == ["far", "4.0000", f"±{within:.4f}"]
    assert sentences(rows, [FILE]) == [
        f"f: good is better than far by 1.0000 ± {within:.4f} nats/token",
        "f: no difference larger than its error between good and the best model, p",
    ]


def test_no_star_and_a_plain_sentence_where_it_is_noise() -> None:
    rows = [GOOD, NEAR]
    assert "*" not in "".join(table(rows, [FILE])[2:4])
    assert sentences(rows, [FILE]) == ["f: no difference larger than its error between the merges"]
    assert sentences([GOOD, NEAR, FAR], [FILE]) == ["f: no difference larger than its error between good and near"]
    assert rank([FAR, GOOD, NEAR], FILE).best is GOOD


def test_against_the_best_model_it_says_better_or_worse() -> None:
    better, worse = (_row("p", [x + 20, x + 30, x + 40], is_merge=False) for x in (-5.0, 5.0))
    assert sentences([better, GOOD], [FILE]) == [
        "f: good is worse than the best model, p, by 0.5000 ± 0.0000 nats/token"
    ]
    assert sentences([worse, GOOD], [FILE]) == [
        "f: good is better than the best model, p, by 0.5000 ± 0.0000 nats/token"
    ]


def test_one_document_is_said_to_be_no_evidence() -> None:
    column = Column("f", "nats/token", (10,))
    rows = [_row("a", [1.0]), _row("b", [9.0])]
    assert sentences(rows, [column]) == [
        "f: no difference larger than its error between the merges (it has one document, so there is no error)"
    ]
    assert table(rows, [column])[3].endswith("±?")
    assert numbers(rows, [column])["rows"][1]["measured"]["f"]["worse_than_best"]["within_95"] is None


def test_of_scores_the_highest_is_best() -> None:
    rows = [_row("a", score=0.5), _row("b", score=0.6), _row("c", failed="it broke")]
    assert sentences(rows, [TASK]) == ["t: b is better than a by 0.1000 ± 0.0277 acc", "c: it broke"]
    assert table(rows, [TASK])[4].split() == ["c", "failed"]
    told = numbers(rows, [TASK])
    assert [row["measured"].get("t", {}).get("best") for row in told["rows"]] == [False, True, None]
    assert told["rows"][0]["measured"]["t"]["worse_than_best"]["value"] == pytest.approx(0.1)


def test_the_best_of_all_has_the_least_mean_over_the_files() -> None:
    second = Column("g", "nats/token", (1, 1, 1))
    a = Row("a", True, {"f": [10.0] * 3, "g": [3.0] * 3}, {"t": (0.9, None)})
    b = Row("b", True, {"f": [11.0] * 3, "g": [2.0] * 3}, {"t": (0.1, None)})
    parent, failed = Row("p", False, {"f": [0.0] * 3, "g": [0.0] * 3}), Row("x", True, {"f": [0.0] * 3}, failed="x")
    assert best_overall([parent, a, b, failed], [FILE, second, TASK]) is b
    assert best_overall([a, b], [TASK]) is a
    assert best_overall([parent], [FILE]) is None


def test_the_first_metric_of_a_task_is_its_score() -> None:
    result = {"alias": "t", "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1, "exact_match,loose": 0.5}
    found = score_of(result, {"exact_match": True})
    assert (found.value, found.error, found.metric, found.higher_is_better) == (0.25, 0.1, "exact_match", True)
    lower = score_of({"word_perplexity,none": 12.0, "word_perplexity_stderr,none": "N/A"}, {"word_perplexity": False})
    assert (lower.value, lower.error, lower.higher_is_better) == (12.0, None, False)


def test_a_picture_has_a_line_over_numbers_and_else_a_row_each(tmp_path: Path) -> None:
    rows = [PARENT, *(_row(f"weight={w}", [20 + w, 30.0, 40 - w], values={"parameters.weight": w}) for w in (0.5, 0.3))]
    assert tried(rows) == "parameters.weight"
    assert tried([PARENT, GOOD, FAR]) is None
    assert tried([_row("a", values={"m": "ties"}), _row("b", values={"m": "linear"})]) is None
    for name, drawn in (("line", rows), ("dots", [PARENT, GOOD, _row("$far$", FAR.nats["f"])])):  # type: ignore[arg-type]
        draw(drawn, [FILE], tmp_path / f"{name}.svg")
    line, dots = ((tmp_path / f"{name}.svg").read_text("utf-8") for name in ("line", "dots"))
    assert "<!-- parameters.weight -->" in line
    assert "<!-- $far$ -->" in dots


# What is remembered, and processes


def test_results_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    Store(tmp_path).put_measured("k", {"nats": [1.0]})
    assert Store(tmp_path).measured("k") == {"nats": [1.0]}
    for text in ("{", "[]", '{"format": 0, "costs": {}, "measured": {}}'):
        (tmp_path / "results.json").write_text(text, "utf-8")
        with pytest.raises(ConfigError, match=r"results\.json: it was not written by this version"):
            Store(tmp_path)


def test_a_process_tells_its_cost_and_what_it_said(tmp_path: Path) -> None:
    """Its own memory, whatever the process that started it has taken."""
    held = torch.ones(2**28)  # 1 GiB
    del held
    code = "import sys, time; x = b'x' * 2**26; time.sleep(0.3); print('words'); sys.exit('Error: the last')"
    cost = merging.run_alone([sys.executable, "-c", code], tmp_path / "log")
    assert cost.exit_code == 1
    assert cost.seconds > 0
    assert merging.last_words(tmp_path / "log") == "the last"
    if hasattr(os, "wait4"):
        assert cost.peak_mib is not None
        assert 64 < cost.peak_mib < (512 if sys.platform == "linux" else 2**20)


def test_a_process_ends_with_the_one_that_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def interrupted(process: Any) -> None:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "_peak_mib", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merging.run_alone([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log")
    assert started[0].poll() is not None
