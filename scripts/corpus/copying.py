"""Documents that can only be predicted by copying from earlier in the text, and small stories."""

from __future__ import annotations

from random import Random

from . import words as w


def _token(rng: Random) -> str:
    """Any kind of word that a later line may have to repeat."""
    maker = rng.choice(
        [
            w.invented,
            w.number,
            w.person,
            w.venue,
            w.city,
            lambda r: r.choice(w.OBJECTS),
            lambda r: r.choice(w.COLOURS),
            lambda r: r.choice(w.GOOD + w.BAD),
            lambda r: w.invented(r).lower(),
        ]
    )
    return maker(rng)


def said_again(rng: Random) -> str:
    """A list is given and repeated, in other punctuation."""
    items = [_token(rng) for _ in range(rng.randint(2, 8))]
    name, style = rng.choice(w.FIRST_NAMES), rng.randrange(5)
    if style == 0:
        return (
            f"{name} wrote down: {', '.join(items)}. Later {name} read it back: {', '.join(items)}."
        )
    if style == 1:
        return (
            "\n".join(f"{i + 1}. {item}" for i, item in enumerate(items))
            + f"\nAll: {w.listed(items)}"
        )
    if style == 2:
        return f"List: {' / '.join(items)}\nAgain: {' / '.join(items)}\nQuoted: " + " ".join(
            f"'{i}'" for i in items
        )
    if style == 3:
        return f"First comes {items[0]} and last comes {items[-1]}: {', '.join(items)}."
    return f"[{'] ['.join(items)}] means {w.listed(items)}."


def pairs(rng: Random) -> str:
    """Made-up pairs that are asked for again: the plainest lesson in looking back."""
    keys = [_token(rng) for _ in range(rng.randint(2, 5))]
    table = {key: _token(rng) for key in keys}
    arrow = rng.choice([" -> ", ": ", " = ", " is ", " goes with "])
    asked = [rng.choice(keys) for _ in range(rng.randint(2, 6))]
    lines = [f"{key}{arrow}{table[key]}" for key in [*keys, *asked]]
    return rng.choice(["\n", "; ", ", "]).join(lines)


def quoted(rng: Random) -> str:
    """A word moves between plain, quoted and bracketed form."""
    value, name = _token(rng), rng.choice(w.FIRST_NAMES)
    forms = [f"'{value}'", f"[{value}]", f'"{value}"', f"({value})", value, f"<{value}>"]
    chosen = rng.sample(forms, 3)
    return rng.choice(
        [
            f"{name} said {chosen[0]}, then {chosen[1]}, then {chosen[2]}.",
            f"Write {chosen[0]} as {chosen[1]} or as {chosen[2]}.",
            f"Looking for {value}? Type '{value}'. {name} typed '{value}' and found {value}.",
        ]
    )


def where_is(rng: Random) -> str:
    """People move about and the last place counts."""
    people = rng.sample(w.FIRST_NAMES, rng.randint(2, 4))
    place: dict[str, str] = {}
    lines = []
    for _ in range(rng.randint(2, 6)):
        who, where = rng.choice(people), rng.choice(w.ROOMS)
        lines.append(f"{who} {rng.choice(['went to', 'walked into', 'is now in'])} the {where}.")
        place[who] = where
    asked = rng.choice(list(place))
    lines.append(f"Where is {asked}? {asked} is in the {place[asked]}.")
    return " ".join(lines)


def story(rng: Random) -> str:
    """A short tale in which the same people and things come back."""
    who, friend = w.person(rng), w.person(rng)
    thing, town, colour = rng.choice(w.OBJECTS), w.city(rng), rng.choice(w.COLOURS)
    price = w.number(rng)
    beginning = rng.choice(
        [
            f"{who} lived in {town}.",
            f"There was once a child in {town} called {who}.",
            f"{who} came to {town}.",
        ]
    )
    middle = [
        f"One day {who} found {w.article(colour)} {colour} {thing}.",
        f"The {colour} {thing} cost {price} coins.",
        f"{friend} wanted to have the {thing} too.",
        f'"Is this your {thing}?" asked {friend}.',
        f'"No, it is from {town}," said {who}.',
        f"{who} sold the {thing} to {friend} for {price} coins.",
        f"Because it was {colour}, everyone in {town} knew the {thing}.",
    ]
    kept = [line for line in middle if rng.random() < 0.6]
    ending = rng.choice(
        [
            f"In the end {who} gave the {colour} {thing} to {friend}.",
            f"So {friend} and {who} shared the {thing} and stayed in {town}.",
            f"{friend} never forgot {who} of {town}.",
        ]
    )
    return " ".join([beginning, *kept, ending])


def sums(rng: Random) -> str:
    """Counting in words and figures."""
    value = rng.randrange(1, len(w.NUMBER_WORDS))
    thing = rng.choice(w.OBJECTS)
    more = rng.randrange(1, 200)
    return rng.choice(
        [
            f"{value} is written {w.NUMBER_WORDS[value]}; {w.NUMBER_WORDS[value]} is {value}.",
            f"{more + value} is more than {more}, and {more} is less than {more + value}.",
            f"There were {w.NUMBER_WORDS[value]} of the {thing} kind, that is {value}.",
        ]
    )


def talk(rng: Random) -> str:
    """A short exchange in which a request repeats what was said."""
    who, town, thing = w.person(rng), w.city(rng), rng.choice(w.OBJECTS)
    code = w.number(rng)
    return rng.choice(
        [
            f"User: My name is {who}.\nAssistant: Hi {who}.\nUser: Who am I?\nAssistant: {who}.",
            f"User: Keep {code}.\nAssistant: I keep {code}.\nUser: Keep what?\nAssistant: {code}.",
            f"User: I live in {town}.\nAssistant: How is life in {town}?\nUser: {town} is quiet.",
            f"User: Repeat {thing}, {town} and {code}.\nAssistant: {thing}, {town} and {code}.",
            f'{who} asked for a {thing} from {town}. "A {thing} from {town}?" "Yes," said {who}.',
        ]
    )
