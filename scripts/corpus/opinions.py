"""Reviews, and what the reviewer did next: the words decide it, and so do negations.

The corpus never names the classes that the demo's sentiment task asks for; it only lets
an opinion have consequences, so that the model has a reason to keep track of it.
"""

from __future__ import annotations

from random import Random

from . import words as w

AFTER_GOOD = (
    "We will come back soon",
    "I would go again tomorrow",
    "I told all my friends to try it",
    "It was worth every penny",
    "We left with a smile",
    "I thanked everyone at the end",
    "We have already booked again",
    "I give it five stars",
    "Do not miss it",
)
AFTER_BAD = (
    "We will never come back",
    "I would not go again",
    "I told all my friends to avoid it",
    "It was a waste of money",
    "We left before the end",
    "I asked for my money back",
    "We wrote a long complaint",
    "I give it one star",
    "Stay away from it",
)
ASKED_AFTERWARDS = (
    " Would I go again?",
    "\nWorth the money?",
    " Should you go?",
    "\nDid we like it?",
)


def _judgement(rng: Random, good: bool) -> str:
    """A clause without a full stop whose opinion is ``good`` or not; often by negation."""
    thing = rng.choice(w.THINGS)
    kind = rng.randrange(9)
    same, other = (w.GOOD, w.BAD) if good else (w.BAD, w.GOOD)
    liked, disliked = (w.LIKED, w.DISLIKED) if good else (w.DISLIKED, w.LIKED)
    if kind <= 2:
        how = rng.choice(["", "", rng.choice(w.INTENSIFIERS) + " "])
        return f"the {thing} was {how}{rng.choice(same)}"
    if kind == 3:
        denial = rng.choice(["not", "never", "not at all", "hardly", "far from", "anything but"])
        return f"the {thing} was {denial} {rng.choice(other)}"
    if kind == 4:
        return f"{rng.choice(['I', 'we'])} {rng.choice(liked)} the {thing}"
    if kind == 5:
        return f"nobody {rng.choice(disliked)} the {thing}"
    if kind == 6:
        word = rng.choice(same)
        return f"it was {w.article(word)} {word} {thing}"
    if kind == 7:
        word = rng.choice(other)
        return f"this was not {w.article(word)} {word} {thing}"
    return f"the {thing} was {rng.choice(same)} and {rng.choice(same)}"


def _blemish(rng: Random, good: bool) -> str:
    """Something named in passing that speaks against the opinion."""
    return f"the {rng.choice(w.BAD if good else w.GOOD)} {rng.choice(w.THINGS)}"


def _mixed(rng: Random, good: bool) -> str:
    """Two opposite clauses, of which the main one decides."""
    weak, strong = _judgement(rng, not good), _judgement(rng, good)
    return rng.choice(
        [
            f"although {weak}, {strong}",
            f"{weak}, but {strong}",
            f"even though {weak}, {strong}",
            f"{strong}, even if {weak}",
            f"{weak}; still, {strong}",
            f"despite {_blemish(rng, good)}, {strong}",
        ]
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def review(rng: Random) -> str:
    """A review of one to three sentences and its consequence."""
    good = rng.random() < 0.5
    makers = [_judgement, _judgement, _mixed]
    sentences = [_sentence(rng.choice(makers)(rng, good)) for _ in range(rng.choice((1, 1, 2, 3)))]
    consequence = rng.choice(AFTER_GOOD if good else AFTER_BAD)
    author = rng.choice(["", "", f"{w.person(rng)} writes: ", f"A visit to {w.venue(rng)}. "])
    if rng.random() < 0.5:
        # One word that hangs on the whole review: the plainest reason to keep track of it.
        ask = rng.choice(ASKED_AFTERWARDS)
        return author + " ".join(sentences) + f"{ask} {'Yes' if good else 'No'}."
    joint = rng.choice([". ", ", so ", "\n"])
    if joint == ", so ":
        tail = (
            consequence
            if consequence.startswith("I ")
            else consequence[0].lower() + consequence[1:]
        )
        return author + " ".join(sentences)[:-1] + joint + tail + "."
    return author + " ".join(sentences)[:-1] + "." + joint.replace(".", "") + consequence + "."


def verdicts(rng: Random) -> str:
    """Short reviews one after another, each with its verdict at once: many lessons a line."""
    ask = rng.choice(ASKED_AFTERWARDS)
    lines = []
    for _ in range(rng.randint(3, 6)):
        good = rng.random() < 0.5
        text = _judgement(rng, good) if rng.random() < 0.75 else _mixed(rng, good)
        lines.append(f"{_sentence(text)}{ask} {'Yes' if good else 'No'}.")
    return rng.choice([" ", "\n"]).join(lines)


def sorted_words(rng: Random) -> str:
    """Words of praise and of blame, each with what it is."""
    asked = rng.sample(w.GOOD + w.BAD, rng.randint(4, 9))
    link = rng.choice([" is ", ": ", " = ", " means "])
    return rng.choice([", ", "; ", "\n"]).join(
        f"{word}{link}{'praise' if word in w.GOOD else 'blame'}" for word in asked
    )


def word_notes(rng: Random) -> str:
    """A note on words that say much the same, or the opposite."""
    good = rng.random() < 0.5
    same, other = (w.GOOD, w.BAD) if good else (w.BAD, w.GOOD)
    first, second = rng.sample(same, 2)
    praise = "praise" if good else "blame"
    return rng.choice(
        [
            f"{first} and {second} are both words of {praise}.",
            f"Nobody calls a thing {first} and {rng.choice(other)} in one breath.",
            f"To call a {rng.choice(w.THINGS)} {first} is to {praise} it, as much as {second}.",
            f"Words of {praise}: {', '.join(w.some(rng, same, 3, 6))}.",
            f"If it is not {first}, it may be {rng.choice(other)}.",
        ]
    )
