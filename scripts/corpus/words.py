"""Word lists and name makers for the generated corpus.

Closed word classes are plain lists.  Names are built from syllables, so that there
are far more names than a small model can memorise: the only way to predict a name
the second time is to copy it, which is the skill that the corpus has to teach.
"""

from __future__ import annotations

from random import Random


def several(text: str) -> list[str]:
    """The words of ``text``: long lists read better as running text."""
    return text.split()


ONSETS = several("b br c ch d dr f fl g gr h j k kl l m n p pr r s sh st t th tr v w y z")
VOWELS = several("a e i o u ai ea ei oo a e i o")
CODAS = several("n r l s m t nd rn ll x th ck")
PLACE_ENDINGS = several("ville ford ton bridge mouth field port stad burg haven dale")

FIRST_NAMES = several(
    "Anna Tom Mira Ben Clara Omar Lena Jack Nora Felix Ivy Hugo Sara Leo Ruth Max Ella Sam "
    "Rosa Paul Dora Karl Tess Adam June Noel Vera Alan Gina Mark Lucy Ian Eva Fred Kate Yuri"
)
CITIES = several(
    "Oslo Paris Rome Lima Cairo Delhi Tokyo Berlin Madrid Lisbon Vienna Prague Dublin Athens "
    "Boston Quito Seoul Hanoi Warsaw Geneva Milan Turin Lyon Ghent Porto Seville Bergen Kyoto"
)
COUNTRIES = several(
    "Norway France Italy Peru Egypt India Japan Germany Spain Portugal Austria Ireland Greece "
    "Korea Vietnam Poland Kenya Chile Canada Brazil Mexico Turkey"
)
CUISINES = several(
    "Italian French Indian Thai Greek Turkish Mexican Chinese Japanese Spanish Korean English "
    "Vietnamese Persian Lebanese German Polish Peruvian"
)
NAME_ADJECTIVES = several(
    "Golden Silver Old Little Red Blue Green Quiet Happy Royal Hidden White Black Lucky Merry "
    "Copper Rusty Wild Brave Crooked"
)
NAME_NOUNS = several(
    "Lamp River Anchor Lion Garden Bridge Crown Swan Fox Kettle Barrel Mill Star Rose Oak "
    "Lantern Harbor Spoon Table Door Wheel Bell Tower Whale"
)
OBJECTS = several(
    "lamp river tin cloud door apple chair stone boat candle ladder mirror basket hammer bottle "
    "pencil blanket ring clock map coin rope shell key bucket brush drum feather kite wheel"
)
COLOURS = several("red blue green yellow white black grey brown orange purple pink")
ROOMS = several("kitchen garden attic cellar library hall office stable workshop market station")
NUMBER_WORDS = several("zero one two three four five six seven eight nine ten eleven twelve")

# Things that can be judged, with plural flags where the verb has to agree.
THINGS = several(
    "soup waiter room view film plot music service bread coffee acting hotel staff story ending "
    "bed garden breakfast dinner dessert menu script cast song book tour guide museum shop food "
    "place show concert phone camera battery screen sound price design lesson teacher train"
)
GOOD = several(
    "good great superb lovely wonderful excellent delightful charming brilliant fresh warm kind "
    "friendly perfect splendid pleasant tasty clever funny moving gripping clean comfortable "
    "bright elegant amazing fantastic impressive enjoyable beautiful sharp graceful thrilling"
)
BAD = several(
    "bad poor awful terrible dreadful horrible boring dull stale cold rude dirty noisy bland "
    "clumsy slow tedious weak disappointing unpleasant ugly broken shabby sour careless messy "
    "confusing lifeless annoying painful mediocre greasy lazy"
)
LIKED = several("loved enjoyed liked adored admired praised")
DISLIKED = several("hated disliked regretted loathed criticised resented")
INTENSIFIERS = ["very", "really", "quite", "so", "rather", "truly", "absolutely", "simply"]


def _syllable(rng: Random) -> str:
    coda = rng.choice(CODAS) if rng.random() < 0.35 else ""
    return rng.choice(ONSETS) + rng.choice(VOWELS) + coda


def invented(rng: Random) -> str:
    """An invented capitalised name of two or three syllables."""
    return "".join(_syllable(rng) for _ in range(rng.choice((2, 2, 3)))).capitalize()


def person(rng: Random) -> str:
    """A person's name, sometimes with an invented surname."""
    first = rng.choice(FIRST_NAMES) if rng.random() < 0.6 else invented(rng)
    return first if rng.random() < 0.6 else f"{first} {invented(rng)}"


def city(rng: Random) -> str:
    """A town, real or invented."""
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(CITIES)
    if kind < 0.75:
        return invented(rng) + rng.choice(PLACE_ENDINGS)
    return invented(rng)


def venue(rng: Random) -> str:
    """The name of an inn, a shop, a ship and the like."""
    kind = rng.random()
    if kind < 0.45:
        return f"The {rng.choice(NAME_ADJECTIVES)} {rng.choice(NAME_NOUNS)}"
    if kind < 0.65:
        return (
            f"{rng.choice(NAME_NOUNS)} {rng.choice(['House', 'Hall', 'Court', 'Corner', 'Place'])}"
        )
    if kind < 0.85:
        return invented(rng)
    return f"{invented(rng)} {rng.choice(NAME_NOUNS)}"


def number(rng: Random) -> str:
    """A whole number of one to four digits."""
    return str(rng.randrange(1, 10 ** rng.choice((1, 2, 2, 3, 4))))


def some(rng: Random, words: list[str], low: int, high: int) -> list[str]:
    """Between ``low`` and ``high`` different words in random order."""
    return rng.sample(words, rng.randint(low, min(high, len(words))))


def article(word: str) -> str:
    """``a`` or ``an``, as the word asks."""
    return "an" if word[0].lower() in "aeiou" else "a"


def listed(words: list[str]) -> str:
    """``x, y and z``."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
