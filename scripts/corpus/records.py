"""Documents about things with attributes: records, prose about them, questions, tables."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from . import words as w

Maker = Callable[[Random], str]

# For every kind of thing: what its attributes are called, how a value is made, and the
# ways to say it.  {n} is the thing's name, {v} the value.
Attribute = tuple[str, Maker, tuple[str, ...]]

_CITY: Attribute = (
    "city",
    w.city,
    ("{n} is in {v}", "{n} can be found in {v}", "{n} stands in {v}", "in {v} there is {n}"),
)
_YEAR: Attribute = (
    "year",
    lambda r: str(r.randrange(1800, 2030)),
    ("{n} dates from {v}", "{n} began in {v}", "the year of {n} is {v}"),
)
_OWNER: Attribute = (
    "owner",
    w.person,
    ("{n} belongs to {v}", "{v} owns {n}", "the owner of {n} is {v}"),
)
_COLOUR: Attribute = (
    "colour",
    lambda r: r.choice(w.COLOURS),
    ("{n} is painted {v}", "the colour of {n} is {v}", "{n} is {v}"),
)
_COUNTRY: Attribute = (
    "country",
    lambda r: r.choice(w.COUNTRIES),
    ("{n} comes from {v}", "the country of {n} is {v}", "{n} is known all over {v}"),
)
_PRICE: Attribute = (
    "price",
    lambda r: r.choice(["low", "cheap", "moderate", "fair", "high", "average"]),
    ("the prices at {n} are {v}", "{n} has {v} prices", "{n} asks {v} prices"),
)
_RATING: Attribute = (
    "rating",
    lambda r: r.choice(["low", "poor", "average", "good", "high", "excellent"]),
    (
        "{n} has {article} {v} rating",
        "the rating of {n} is {v}",
        "guests give {n} {article} {v} rating",
    ),
)
_KITCHEN: Attribute = (
    "cuisine",
    lambda r: r.choice(w.CUISINES),
    ("{n} serves {v} food", "{n} offers {v} dishes", "the cook at {n} prepares {v} meals"),
)
_NEAR: Attribute = (
    "neighbour",
    w.venue,
    ("{n} is near {v}", "{n} is next to {v}", "{n} lies close to {v}", "beside {n} is {v}"),
)
_AREA: Attribute = (
    "quarter",
    lambda r: r.choice(
        ["city centre", "riverside", "old town", "harbour", "north side", "suburbs"]
    ),
    ("{n} is in the {v}", "the {v} is where {n} is", "{n} lies in the {v}"),
)
_FAMILIES: Attribute = (
    "families",
    lambda r: r.choice(["welcome", "not welcome"]),
    ("{n} is a place where families are {v}", "families are {v} at {n}", "at {n} children are {v}"),
)


def _count(noun: str) -> Attribute:
    sayings = (
        f"{{n}} has {{v}} {noun}",
        f"there are {{v}} {noun} in {{n}}",
        f"{{v}} {noun} belong to {{n}}",
    )
    return noun, w.number, sayings


KINDS: dict[str, tuple[Maker, list[Attribute]]] = {
    "inn": (w.venue, [_CITY, _KITCHEN, _PRICE, _RATING, _NEAR, _AREA, _FAMILIES, _OWNER]),
    "restaurant": (w.venue, [_KITCHEN, _PRICE, _RATING, _NEAR, _AREA, _FAMILIES, _CITY]),
    "hotel": (w.venue, [_CITY, _count("rooms"), _PRICE, _RATING, _NEAR, _YEAR, _FAMILIES]),
    "museum": (w.venue, [_CITY, _YEAR, _count("paintings"), _COUNTRY, _NEAR, _RATING]),
    "ship": (w.venue, [_COLOUR, _count("sailors"), _OWNER, _YEAR, _COUNTRY, _CITY]),
    "farm": (w.venue, [_OWNER, _count("cows"), _count("fields"), _CITY, _COLOUR]),
    "school": (w.invented, [_CITY, _count("pupils"), _count("teachers"), _YEAR, _RATING]),
    "band": (w.venue, [_COUNTRY, _count("songs"), _YEAR, _CITY, _RATING]),
    "town": (w.city, [_COUNTRY, _count("bridges"), _count("people"), _YEAR]),
}


def _sentence(rng: Random, attribute: Attribute, name: str, value: str) -> str:
    sayings = [s for s in attribute[2] if name[0].isupper() or s.startswith("{n}")]
    text = rng.choice(sayings).format(n=name, v=value, article=w.article(value))
    return text[0].upper() + text[1:] + "."


def _thing(rng: Random) -> tuple[str, str, list[tuple[Attribute, str]]]:
    kind = rng.choice(list(KINDS))
    make_name, attributes = KINDS[kind]
    chosen = rng.sample(attributes, rng.randint(2, min(5, len(attributes))))
    return kind, make_name(rng), [(a, a[1](rng)) for a in chosen]


def _prose(rng: Random, kind: str, name: str, facts: list[tuple[Attribute, str]]) -> str:
    """Sentences about the facts in their order; often two facts share one sentence."""
    opening = rng.choice(
        [f"{name} is {w.article(kind)} {kind}", f"There is {w.article(kind)} {kind} called {name}"]
    )
    parts = [opening + "."] if rng.random() < 0.6 else []
    position = 0
    while position < len(facts):
        subject = name if position == 0 or rng.random() < 0.3 else rng.choice(["it", f"the {kind}"])
        first = _sentence(rng, facts[position][0], subject, facts[position][1])
        position += 1
        if position < len(facts) and rng.random() < 0.4:
            second = _sentence(
                rng, facts[position][0], rng.choice(["it", f"the {kind}"]), facts[position][1]
            )
            first = (
                first[:-1]
                + rng.choice([" and ", ", and ", ", while "])
                + second[0].lower()
                + second[1:]
            )
            position += 1
        parts.append(first)
    return " ".join(parts)


def _record(rng: Random, kind: str, name: str, facts: list[tuple[Attribute, str]]) -> str:
    """The facts in one of several layouts, never one that the demo's tasks use."""
    key = rng.choice(["name", kind, "called"])
    pairs = [(key, name)] + [(a[0], value) for a, value in facts]
    layout = rng.randrange(6)
    if layout == 0:
        return "\n".join(f"{k.capitalize()}: {v}" for k, v in pairs)
    if layout == 1:
        return "; ".join(f"{k} = {v}" for k, v in pairs) + "."
    if layout == 2:
        return "\n".join(f"- {k}: {v}" for k, v in pairs)
    if layout == 3:
        return f"{name} ({', '.join(f'{k} {v}' for k, v in pairs[1:])})"
    if layout == 4:
        return (
            "| "
            + " | ".join(k for k, _ in pairs)
            + " |\n| "
            + " | ".join(v for _, v in pairs)
            + " |"
        )
    return "{" + ", ".join(f'"{k}": "{v}"' for k, v in pairs) + "}"


def record_and_prose(rng: Random) -> str:
    """A record and the same in prose, in either order."""
    kind, name, facts = _thing(rng)
    told = [f for f in facts if rng.random() < 0.9] or facts
    if rng.random() < 0.3:
        rng.shuffle(told)
    record, prose = _record(rng, kind, name, facts), _prose(rng, kind, name, told)
    if rng.random() < 0.7:
        return record + rng.choice(["\n", "\n\n", "\nIn words: ", " That is to say: "]) + prose
    return prose + rng.choice(["\n", "\n\n", "\nIn short: ", "\nNotes:\n"]) + record


def prose_and_questions(rng: Random) -> str:
    """A paragraph about one thing and questions that it answers."""
    kind, name, facts = _thing(rng)
    opening = (
        _prose(rng, kind, name, facts) if rng.random() < 0.6 else _record(rng, kind, name, facts)
    )
    lines = [opening]
    asked = rng.sample(facts, min(len(facts), rng.randint(1, 3)))
    question, answer = rng.choice(
        [("Q: ", "A: "), ("Question: ", "Answer: "), ("", ""), ("Guest: ", "Guide: ")]
    )
    for attribute, value in asked:
        ask = rng.choice([f"What is the {attribute[0]} of {name}?", f"And the {attribute[0]}?"])
        reply = rng.choice(
            [value, _sentence(rng, attribute, name, value), f"The {attribute[0]} is {value}."]
        )
        lines.append(f"{question}{ask}\n{answer}{reply}")
    return "\n".join(lines)


def comparison(rng: Random) -> str:
    """Two or three things of one kind, told apart by their values."""
    kind = rng.choice(list(KINDS))
    make_name, attributes = KINDS[kind]
    attribute = rng.choice(attributes)
    rows = [(make_name(rng), attribute[1](rng)) for _ in range(rng.randint(2, 4))]
    lines = [_sentence(rng, attribute, name, value) for name, value in rows]
    name, value = rng.choice(rows)
    closing = rng.choice(
        [
            f"What about {name}? {_sentence(rng, attribute, name, value)}",
            f"Remember {name}: {attribute[0]}, {value}.",
            f"The {kind} with {attribute[0]} {value} is {name}.",
        ]
    )
    return " ".join([*lines, closing])
