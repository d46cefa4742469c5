"""Plain sentences about everyday life: the ordinary vocabulary around the special documents."""

from __future__ import annotations

from random import Random

from . import words as w

PEOPLE = w.several(
    "sailor farmer teacher doctor baker singer painter child mother father neighbour king queen "
    "student driver gardener soldier writer tailor judge hunter guest stranger brother sister "
    "captain waiter nurse clerk postman"
)
NOUNS = w.several(
    "letter table window street forest mountain village bridge wall road island field house tree "
    "horse dog cat bird fish sentence word line page answer question list order name sign number "
    "place market price box bag coat hat shoe glass plate knife cup bread cheese egg fruit rice "
    "meal cafe bistro restaurant pub hotel concert garden hill river city centre machine train "
    "picture story game song sound light fire water wind rain snow stone metal paper cloth oil "
    "evening morning summer winter review report message notice label summary result total"
)
PLURALS = w.several(
    "guests children families people rooms words lines sentences hours days years friends coins "
    "books trees birds letters streets houses questions answers statements columns tables rows"
)
ADJECTIVES = w.several(
    "tall short heavy light young old new long round square soft hard quiet loud early late rich "
    "cheap expensive average fair simple strange common rare famous empty full deep narrow wide "
    "delighted tired angry proud afraid careful busy free ready open closed positive negative "
    "neutral useful certain whole several"
)
DID = w.several(
    "carried found lost opened closed watched painted sold bought built mended wrote read counted "
    "saved spoiled decided praised described named feared expected forgot remembered followed "
    "wanted needed called asked cleaned cooked served moved hid sent kept sorted compared"
)
WENT = w.several("walked ran sailed travelled returned hurried moved climbed wandered looked went")
WHERE = [
    "along the river",
    "up in the hills",
    "by the sea",
    "in the city centre",
    "under the bridge",
    "near the mill",
    "behind the house",
    "across the field",
    "outside the town",
    "at the market",
    "into the forest",
    "by the fire",
    "down the street",
    "over the wall",
    "through the gate",
    "in front of the church",
    "anywhere else",
]
WHEN = [
    "before noon",
    "after dark",
    "every day",
    "last summer",
    "once a week",
    "at last",
    "this evening",
    "in the morning",
    "when the rain stopped",
    "until the lamps were lit",
    "for a long time",
    "only once",
    "all at once",
]
THOUGHT = w.several("thinks said believed knew hoped wrote complains told_us explained")


def _noun(rng: Random) -> str:
    noun = rng.choice(NOUNS)
    if rng.random() < 0.5:
        noun = f"{rng.choice(ADJECTIVES)} {noun}"
    return f"{rng.choice(['the', 'the', 'his', 'her', 'every', w.article(noun)])} {noun}"


def _who(rng: Random) -> str:
    if rng.random() < 0.3:
        return w.person(rng)
    adjective = rng.choice(ADJECTIVES) + " " if rng.random() < 0.3 else ""
    return f"the {adjective}{rng.choice(PEOPLE)}"


def _clause(rng: Random) -> str:
    kind = rng.randrange(6)
    if kind == 0:
        return f"{_who(rng)} {rng.choice(WENT)} {rng.choice(WHERE)} {rng.choice(WHEN)}"
    if kind == 1:
        return f"{_who(rng)} {rng.choice(DID)} {_noun(rng)} {rng.choice(WHERE)}"
    if kind == 2:
        plural = rng.choice(PLURALS)
        number = rng.choice(w.NUMBER_WORDS[2:])
        return f"there were {number} {rng.choice(ADJECTIVES)} {plural} {rng.choice(WHERE)}"
    if kind == 3:
        how = rng.choice(["", "not ", "often "])
        return f"{rng.choice(PLURALS)} are {how}{rng.choice(ADJECTIVES)}"
    if kind == 4:
        return f"{rng.choice(WHEN)}, {_who(rng)} {rng.choice(DID)} {_noun(rng)}"
    return f"what {_who(rng)} {rng.choice(DID)} was {_noun(rng)}"


def sentences(rng: Random) -> str:
    """Two to four loosely joined sentences."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        text = _clause(rng)
        if rng.random() < 0.4:
            joint = rng.choice([" and ", " but ", " because ", ", where ", ", so ", " while "])
            text += joint + _clause(rng)
        if rng.random() < 0.15:
            text = f"{_who(rng)} {rng.choice(THOUGHT).replace('_', ' ')} that {text}"
        lines.append(text[0].upper() + text[1:] + rng.choice([".", ".", ".", "!", "?"]))
    return " ".join(lines)
