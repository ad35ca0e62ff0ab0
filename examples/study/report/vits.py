"""Section 6: vision transformers."""

from __future__ import annotations

from dataclasses import replace

from ..digits import HELD_OUT
from ..estimates import Estimate
from ..findings import Findings, Metric, percent, plain_number
from ..vits import ALONE, PLAIN, REBASIN, RESPECTED
from .claims import ZHANG, Claim, answer
from .markdown import judged, listing, opening, paragraphs, table

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
    "low": "then trained on digits 0 to 4",
    "high": "then trained on digits 5 to 9",
}
MATCH_TITLES = {
    PLAIN: "no match",
    "without-rescale": "match without rescale",
    "match": "match",
    "activations": "match from activations",
}
PARTS = {"apart": "different initialisations", "halves": "fine-tunes of one base"}
PUBLISHED = {"simple": "7.6 → 10.2", "regmean": "14.2 → 15.4", "ot-acts": "61.2 → 61.3"}  # no match → match, %
FEWEST = 3  # seeds for which a merger is shown
ACCURACY, TUNED = percent("accuracy"), percent("tuned_accuracy")
LOSS = plain_number("loss")


def finished(findings: Findings) -> bool:
    """Whether the averages were measured; the other mergers are shown where they were."""
    return all("simple" in tried(findings, part) for part in findings.settings["mergers"])


def tried(findings: Findings, part: str) -> list[str]:
    """The mergers that were measured with every match, for three seeds or all."""
    enough = min(FEWEST, len(findings.settings["seeds"]))
    return [m for m in findings.settings["mergers"][part] if len(_seeds(findings, part, m)) >= enough]


def _seeds(findings: Findings, part: str, merger: str) -> set[int]:
    """Those for which a merger was measured with every match."""
    matches = findings.settings["matches"][part]
    return set.intersection(*(set(findings.per_seed(part, merger, match, LOSS)) for match in matches))


def _complete(findings: Findings) -> Findings:
    """Without the merges of a seed for which the merger was not measured with every match."""
    tables = findings.settings["mergers"]
    seeds = {(part, merger): _seeds(findings, part, merger) for part in tables for merger in tables[part]}
    rows = {key: row for key, row in findings.rows.items() if key[1] in seeds.get((key[0], key[2]), {key[1]})}
    return replace(findings, rows=rows)


def section(found: Findings) -> str:
    findings = _complete(found)
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
        _against_average(findings),
        _fewer(findings),
    )


def claims(findings: Findings) -> list[Claim]:
    rows = []
    for merger in tried(findings, "apart"):
        gain = findings.difference("apart", merger, "match", ACCURACY)
        claim = f"matching improves the merge of two ViTs of different initialisation ({TITLES[merger]})"
        rows.append((ZHANG, claim, answer(gain, 1), judged(gain, 1, unit=" points")))
    rescale = findings.difference("apart", "simple", "match", ACCURACY, against="without-rescale")
    said = "the rescaling adds to the match (average of two ViTs)"
    return [*rows, (ZHANG, said, answer(rescale, 1), judged(rescale, 1, unit=" points"))]


def _verdict(findings: Findings) -> str:
    """By match: which mergers it makes better, and which it does not."""
    mergers = tried(findings, "apart")
    gains = {
        match: {merger: findings.difference("apart", merger, match, ACCURACY) for merger in mergers}
        for match in _compared(findings, "apart")
    }
    said = ["Here two vision transformers of different initialisation are merged, with and without matching."]
    for match, of in gains.items():
        found = {
            word: [f"{TITLES[merger]} ({d.text(signed=True)})" for merger, d in of.items() if d.verdict(1) == word]
            for word in ("better", "worse")
        }
        words = [f"makes {listing(names)} {word}" for word, names in found.items() if names]
        rest = [TITLES[merger] for merger, d in of.items() if d.verdict(1) not in found]
        said.append(f"The {MATCH_TITLES[match]} {' and '.join(words) or 'makes none better'}.")
        said.append(f"For {listing(rest)} no difference is shown." if rest else "")
    said.append("The numbers are points of accuracy, match minus no match.")
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


def _between(findings: Findings, part: str, merger: str, other: str, metric: Metric) -> Estimate:
    """One merger minus another, both without match, seed by seed."""
    ours, others = (findings.per_seed(part, arm, PLAIN, metric) for arm in (merger, other))
    return Estimate.of([x - others[seed] for seed, x in ours.items() if seed in others])


def _respected(findings: Findings) -> str:
    """What transport gains when the attention is aligned head by head."""
    said = []
    for merger, ours in RESPECTED.items():
        if findings.has("apart", ours) and findings.has("apart", merger):
            gain = _between(findings, "apart", ours, merger, ACCURACY)
            reached = findings.estimate("apart", ours, PLAIN, ACCURACY).text()
            said.append(f"{TITLES[merger]} {reached} %, {judged(gain, 1, unit=' points')}")
    lead = "The papers' transport mixes the coordinates of all heads. With `heads: respect`, and no match, accuracy is:"
    return f"{lead} {'; '.join(said)}." if said else ""


def against_average(findings: Findings) -> dict[str, Estimate]:
    """Loss of each merger of the two fine-tunes, without match, minus the loss of their average."""
    others = [merger for merger in tried(findings, "halves") if merger != "simple"]
    return {merger: _between(findings, "halves", merger, "simple", LOSS) for merger in others}


def _against_average(findings: Findings) -> str:
    gaps = against_average(findings)
    said = "; ".join(f"{TITLES[merger]} {judged(gap, -1, 3, ' nats')}" for merger, gap in gaps.items())
    return f"Without match, the loss against that of the average: {said}."


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
    return table(
        (*_head(findings, part), "published, %"), [(*row, said) for row, said in zip(rows, published, strict=True)]
    )


def _table(findings: Findings, part: str, metric: Metric, favourable: int, digits: int) -> str:
    return table(_head(findings, part), _rows(findings, part, metric, favourable, digits))


def _head(findings: Findings, part: str) -> tuple[str, ...]:
    titles = [MATCH_TITLES[match] for match in findings.settings["matches"][part]]
    return ("merger", *titles, *(f"{MATCH_TITLES[match]} − no match" for match in _compared(findings, part)))


def _compared(findings: Findings, part: str) -> list[str]:
    return [match for match in ("match", "activations") if match in findings.settings["matches"][part]]


def _rows(findings: Findings, part: str, metric: Metric, favourable: int, digits: int) -> list[tuple[str, ...]]:
    rows = []
    for merger in tried(findings, part):
        cells = [
            findings.estimate(part, merger, match, metric).text(digits) for match in findings.settings["matches"][part]
        ]
        for match in _compared(findings, part):
            cells.append(judged(findings.difference(part, merger, match, metric), favourable, digits))
        rows.append((TITLES[merger], *cells))
    return rows


def _fewer(findings: Findings) -> str:
    """Mergers that were not measured for all seeds."""
    seeds = len(findings.settings["seeds"])
    found = {(part, m): len(_seeds(findings, part, m)) for part in PARTS for m in tried(findings, part)}
    fewer = [f"{TITLES[m]} ({PARTS[part]}, {n})" for (part, m), n in found.items() if n < seeds]
    return f"Fewer than {seeds} seeds: {listing(fewer)}." if fewer else ""
