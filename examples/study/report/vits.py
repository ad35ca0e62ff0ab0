"""Section 6: vision transformers."""

from __future__ import annotations

from itertools import product

from ..digits import HELD_OUT
from ..estimates import Estimate
from ..findings import Findings, Metric, percent, plain_number
from ..vits import ALONE, MATCHES, MERGERS, PLAIN, REBASIN, RESPECTED, TABLE_2
from .claims import ZHANG, Claim, answer
from .markdown import judged, opening, paragraphs, table

TITLES = {
    "simple": "simple (average)",
    "fisher": "Fisher",
    "regmean": "RegMean",
    "ot-acts-emd": "OT-ACTS-EMD",
    "ot-acts": "OT-ACTS",
    "ot-wts": "OT-WTS",
    "task-arithmetic": "task arithmetic",
    "regmean-task-vectors": "RegMean on task vectors, no data",
}
MODELS = {
    "one": "first model",
    "other": "second model",
    "base": "base",
    "low": "trained on with digits 0 to 4",
    "high": "trained on with digits 5 to 9",
}
MATCH_TITLES = {
    PLAIN: "no match",
    "without-rescale": "match without rescale",
    "match": "match",
    "activations": "match from activations",
}
PUBLISHED = {"simple": "7.6 → 10.2", "regmean": "14.2 → 15.4", "ot-acts": "61.2 → 61.3"}  # no match → match, %
ACCURACY, TUNED = percent("accuracy"), percent("tuned_accuracy")
LOSS = plain_number("loss")
SECONDS = plain_number("merge_seconds")


def finished(findings: Findings) -> bool:
    """Whether the averages were measured; the other mergers are shown where they were."""
    return all("simple" in tried(findings, part) for part in MERGERS)


def tried(findings: Findings, part: str) -> list[str]:
    """The mergers that were measured with every match, for all seeds."""
    seeds = set(findings.settings["seeds"])
    return [
        merger
        for merger in MERGERS[part]
        if all(seeds == set(findings.per_seed(part, merger, match, LOSS)) for match in MATCHES[part])
    ]


def section(findings: Findings) -> str:
    return paragraphs(
        "## 6 Vision transformers",
        _verdict(findings),
        _models(findings),
        _alone(findings, "apart"),
        "Accuracy on held-out images, % (higher is better). *Published*: no match → match, on CIFAR-10.",
        _accuracies(findings, "apart"),
        _rebasin(findings),
        _respected(findings),
        "Loss on held-out images, nats (lower is better).",
        _table(findings, "apart", LOSS, -1, 3),
        "Accuracy after one more epoch on all the training images, % (higher is better).",
        _table(findings, "apart", TUNED, 1, 1),
        _halves(findings),
        _alone(findings, "halves"),
        _table(findings, "halves", ACCURACY, 1, 1),
        _table(findings, "halves", LOSS, -1, 3),
        _times(findings),
    )


def claims(findings: Findings) -> list[Claim]:
    rows = []
    for merger in (merger for merger in tried(findings, "apart") if merger in TABLE_2):
        gain = findings.difference("apart", merger, "match", ACCURACY)
        claim = f"matching improves the merge of two ViTs of different initialisation ({TITLES[merger]})"
        rows.append((ZHANG, claim, answer(gain, 1), judged(gain, 1, unit=" points")))
    rescale = findings.difference("apart", "simple", "match", ACCURACY, against="without-rescale")
    said = "the rescaling adds to the match (average of two ViTs)"
    return [*rows, (ZHANG, said, answer(rescale, 1), judged(rescale, 1, unit=" points"))]


def _verdict(findings: Findings) -> str:
    """By match: which mergers it makes better, and which it does not."""
    mergers = tried(findings, "apart")
    gains = {v: {m: findings.difference("apart", m, v, ACCURACY) for m in mergers} for v in ("match", "activations")}
    said = ["Here two vision transformers of different initialisation are merged, with and without matching."]
    for match, of in gains.items():
        said.append(f"The {MATCH_TITLES[match]} changes the accuracy by, in points (higher is better):")
        said.append("; ".join(f"{TITLES[merger]} {judged(gain, 1)}" for merger, gain in of.items()) + ".")
    words = opening(gain.verdict(1) for gain in gains["match"].values())
    return " ".join((words, *said))


def _models(findings: Findings) -> str:
    settings = findings.settings
    sizes, apart = settings["model"], settings["apart"]
    return f"""\
The mergers are those of Zhang et al.'s table 2, each as a method of `mergekit-yaml`. The models are ViTs with
{sizes["num_hidden_layers"]} layers, width {sizes["hidden_size"]} and patches of 2 by 2 pixels. They were trained on
scikit-learn's handwritten digits: images of 8 by 8 pixels, {HELD_OUT} of 1797 held out. Each model took
{apart["steps"]} steps with {settings["batch"]} images at a learning rate of {apart["learning_rate"]:g}, for
{len(settings["seeds"])} pairs of seeds. Statistics and matches from activations come from {settings["calibration"]}
training images. *Match* aligns neurons and heads from the weights, *without rescale* with `scaling: false`. None of
them moves the residual stream. For Fisher the second model is rewritten first and then measured. The
transport plans have the papers' regularisation: 0.08 for OT-ACTS, 0.06 for OT-WTS, none for OT-ACTS-EMD."""


def _rebasin(findings: Findings) -> str:
    """What permutations alone do to the average, next to the whole match."""
    if not findings.has("apart", *REBASIN):
        return ""
    accuracy = findings.estimate("apart", *REBASIN, ACCURACY)
    gain = findings.difference("apart", *REBASIN, ACCURACY)
    behind = findings.difference("apart", "simple", "match", ACCURACY, against=REBASIN[1])
    return f"""\
*Git Re-Basin* permutes neurons and heads and does not rotate. Without the residual stream its average reaches
{accuracy.text()} %, against no match {judged(gain, 1, unit=" points")}. The rotations of the match add
{judged(behind, 1, unit=" points")}."""


def _respected(findings: Findings) -> str:
    """What transport gains when the attention is aligned head by head."""
    said = []
    for merger, ours in RESPECTED.items():
        paired = [findings.per_seed("apart", arm, PLAIN, ACCURACY) for arm in (ours, merger)]
        if all(paired):
            gain = Estimate.of([x - paired[1][seed] for seed, x in paired[0].items()])
            reached = findings.estimate("apart", ours, PLAIN, ACCURACY).text()
            said.append(f"{TITLES[merger]} {reached} %, {judged(gain, 1, unit=' points')}")
    lead = "The papers' transport mixes the coordinates of all heads. With `heads: respect`, and no match, accuracy is:"
    return f"{lead} {'; '.join(said)}." if said else ""


def _halves(findings: Findings) -> str:
    settings = findings.settings
    return f"""\
**Two fine-tunes of one base.** The base took {settings["base"]["steps"]} steps on all digits. The fine-tunes took
{settings["halves"]["steps"]} more at a learning rate of {settings["halves"]["learning_rate"]:g}, one on the digits 0 to
4, the other on 5 to 9; the statistics of each are from its own digits. Accuracy in % (higher is better), then loss in
nats (lower is better), on all digits."""


def _alone(findings: Findings, part: str) -> str:
    metrics: tuple[tuple[Metric, int], ...] = (
        (ACCURACY, 1),
        (percent("low"), 1),
        (percent("high"), 1),
        (LOSS, 3),
        (TUNED, 1),
    )
    rows = [
        (MODELS[name], *(findings.estimate(part, name, "-", metric).text(digits) for metric, digits in metrics))
        for name in ALONE[part]
    ]
    head = ("model", "accuracy, %", "0 to 4, %", "5 to 9, %", "loss, nats", "accuracy after one more epoch, %")
    return table(head, rows)


def _accuracies(findings: Findings, part: str) -> str:
    rows = _rows(findings, part, ACCURACY, 1, 1)
    published = [PUBLISHED.get(merger, "") for merger in tried(findings, part)]
    return table((*_head(part), "published, %"), [(*row, said) for row, said in zip(rows, published, strict=True)])


def _table(findings: Findings, part: str, metric: Metric, favourable: int, digits: int) -> str:
    return table(_head(part), _rows(findings, part, metric, favourable, digits))


def _head(part: str) -> tuple[str, ...]:
    titles = [MATCH_TITLES[match] for match in MATCHES[part]]
    return ("merger", *titles, *(f"{MATCH_TITLES[match]} − no match" for match in _compared(part)))


def _compared(part: str) -> list[str]:
    return [match for match in ("match", "activations") if match in MATCHES[part]]


def _rows(findings: Findings, part: str, metric: Metric, favourable: int, digits: int) -> list[tuple[str, ...]]:
    rows = []
    for merger in tried(findings, part):
        cells = [findings.estimate(part, merger, match, metric).text(digits) for match in MATCHES[part]]
        for match in _compared(part):
            cells.append(judged(findings.difference(part, merger, match, metric), favourable, digits))
        rows.append((TITLES[merger], *cells))
    return rows


def _times(findings: Findings) -> str:
    slowest = max(
        (findings.estimate(part, merger, match, SECONDS).mean, TITLES[merger])
        for part in MERGERS
        for merger, match in product(tried(findings, part), MATCHES[part])
    )
    return f"No merge took more than {slowest[0]:.0f} s on average ({slowest[1]}), statistics included."
