"""Seeded data of the demo: running totals (the skill) and entries of a ship's log (the target's style).

Both generators are deterministic. A checksum of an item's text alone decides its split. So training and held-out items
are disjoint whatever the seeds and the sizes.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

Split = Literal["train", "heldout"]
Item = TypeVar("Item")

HELDOUT_SHARE = 10  # one item in ten is held out


@dataclass(frozen=True)
class Problem:
    """A number below one hundred and two digits to add or take away; the answer is the two running totals."""

    prompt: str
    answer: str


def arithmetic_problems(n: int, seed: int, split: Split = "heldout") -> list[Problem]:
    """Draw `n` different problems such as `47+8-5=>` with the answer `55,50`.

    The running totals have two digits, `00` to `99`. The notation is the demo's own: a model has to be taught it.
    """
    return _distinct(_problem, lambda problem: problem.prompt, n, seed, split)


def style_texts(n: int, seed: int, split: Split = "heldout") -> list[str]:
    """Draw `n` different entries of a ship's log, about fifty tokens each."""
    return _distinct(_log_entry, lambda text: text, n, seed, split)


def split_of(text: str) -> Split:
    """The split a text belongs to, by its checksum."""
    return "heldout" if zlib.crc32(text.encode()) % HELDOUT_SHARE == 0 else "train"


def _distinct(
    draw: Callable[[random.Random], Item], key: Callable[[Item], str], n: int, seed: int, split: Split
) -> list[Item]:
    """Draw items until `n` different ones fall into `split`."""
    generator = random.Random(seed)
    found: dict[str, Item] = {}
    while len(found) < n:
        item = draw(generator)
        if split_of(key(item)) == split:
            found.setdefault(key(item), item)
    return list(found.values())


def _problem(generator: random.Random) -> Problem:
    first = generator.randint(0, 99)
    second, middle = _step(first, generator)
    third, last = _step(middle, generator)
    return Problem(prompt=f"{first:02d}{second}{third}=>", answer=f"{middle:02d},{last:02d}")


def _step(total: int, generator: random.Random) -> tuple[str, int]:
    """Add or take away one digit, staying between 0 and 99: the text of the step and the new total."""
    if generator.random() < 0.5:
        term = generator.randint(0, min(9, 99 - total))
        return f"+{term}", total + term
    term = generator.randint(0, min(9, total))
    return f"-{term}", total - term


_WATCHES = tuple(
    f"{name} watch" for name in ("First", "Middle", "Morning", "Forenoon", "Afternoon", "First dog", "Last dog")
)
_POINTS = ("N", "NNE", "NE", "ENE", "E", "ESE", "SE", "SSE", "S", "SSW", "SW", "WSW", "W", "WNW", "NW", "NNW")
_WINDS = ("light airs", "a gentle breeze", "a fresh breeze", "a stiff breeze", "a near gale", "a full gale")
_TRENDS = ("veering", "backing", "holding steady", "falling away", "freshening")
_SEAS = ("smooth", "slight", "moderate", "rough", "confused", "heavy with a long swell")
_SAILS = ("fore topsail", "main course", "mizzen staysail", "flying jib", "spanker", "main topgallant")
_ORDERS = ("Reefed", "Furled", "Set", "Shook out", "Bent a new", "Split and replaced", "Took in")
_ROLES = ("bosun", "carpenter", "cooper", "sailmaker", "surgeon", "second mate", "cook", "gunner's mate")
_WORKS = (
    "sounding the well",
    "mending the long boat",
    "scraping the fore peak",
    "re-stowing the salt beef",
    "caulking the quarterdeck",
    "overhauling the pumps",
    "painting the hawse pipes",
)
_SIGHTS = (
    "a brig hull down",
    "whales blowing",
    "a drifting spar",
    "low land under cloud",
    "a strange sail",
    "two fishing boats",
    "gannets diving",
    "ice on the horizon",
    "a light, two flashes",
)


def _log_entry(generator: random.Random) -> str:
    pick = generator.choice
    time = f"{generator.randrange(24):02d}{pick(('00', '15', '30', '45'))}"
    wind = f"Wind {pick(_POINTS)}, {pick(_WINDS)}, {pick(_TRENDS)}; sea {pick(_SEAS)}."
    glass = f"Glass {generator.randint(28, 30)}.{generator.randint(0, 99):02d}."
    sail = f"{pick(_ORDERS)} the {pick(_SAILS)}."
    work = f"The {pick(_ROLES)} at {pick(_WORKS)}."
    sight = f"Raised {pick(_SIGHTS)}, bearing {pick(_POINTS)}."
    events = generator.sample((glass, sail, work, sight), 3)
    return f"{pick(_WATCHES)}, {time} hrs. {wind} {' '.join(events)}"
