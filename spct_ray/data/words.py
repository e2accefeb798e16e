"""The vocabulary of the built-in verifiable set: a few hundred plain words, so that a tiny tokenizer covers them.

Words that a query can ask for are split: `ASKED[split]` never overlaps between "train" and "heldout". A word asked for
only in the held-out set may still stand in training texts as an ordinary word; it is never a constraint's value there.
Topics are disjoint in every respect.
"""

from __future__ import annotations

from typing import Literal

Split = Literal["train", "heldout"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words(
    """lantern harbor bridge garden window mirror ladder basket candle blanket kettle hammer pencil bottle carpet
    button pocket saddle anchor barrel castle cabin cellar chapel corner cradle curtain desk drawer engine fence feather
    field forest fountain gate glove guitar hat hill island jacket jar kitchen lake lamp leaf letter library log map
    market meadow mill moon needle nest oven paddle path pebble piano pillow pillar plate pond porch puddle purse quilt
    rail ribbon river road roof rope sack sail shelf shell shovel silo sofa spoon stable stairs statue stone stove
    street table tent thread tower train trunk tunnel valley vase village wagon wall well wheel willow yard attic
    balcony bucket cottage doorway ferry hallway orchard stream temple"""
)
OPENERS = _words(
    """perhaps today often sometimes maybe slowly quietly yesterday tonight again usually rarely once soon later still
    finally suddenly gently outside inside everywhere somewhere nearby afterwards recently clearly softly indeed
    normally meanwhile already always tomorrow lately mostly surely briefly eventually occasionally"""
)
TOPICS = _words(
    """thunder coffee winter music snow chess bread sleep rain football honey paper silver wool summer cheese cotton
    glass sugar jazz fishing painting morning spring autumn wind fire butter salt rice soup cycling sailing history
    cooking knitting dancing travel school weather ocean science traffic laughter friendship
    tea gold fog poetry tennis lightning pottery silence chocolate skiing pepper marble midnight gravity yoga"""
)
KEYS = _words(
    """answer note text line reply story fact idea message summary result remark detail content thought phrase
    sentence saying topic comment body main output point"""
)
ADJECTIVES = _words(
    """old quiet bright small cold warm grey green narrow tall empty gentle heavy distant dusty broken golden hidden
    lonely plain pretty rough round sharp simple smooth soft steep strange tiny wide wooden young calm dark deep dry
    faint fresh pale"""
)
VERBS = _words(
    """waits rests moves turns shines drifts fades grows lingers passes remains returns settles sings stays wanders
    appears arrives begins changes falls glows hides leans sleeps spreads stands travels trembles whispers"""
)
PREPOSITIONS = _words("near behind beside above below across beyond around past under")
ADVERBS = _words("never really barely almost simply truly hardly boldly kindly nearly calmly just")
NUMBER_WORDS = _words("two six ten four five nine")

# Marks that a text can be asked to end in. Each mark stands in each place of a pair in training, so that the held-out
# pairs are new, but made of known parts.
MARKS_OF: dict[Split, tuple[str, ...]] = {
    "train": ("..", "!!", "??", ".!", "!?", "?."),
    "heldout": ("!.", "?!", ".?"),
}

# Two-digit numbers that a text can be asked to end with. Every digit stands in both places in training.
_HELD_NUMBERS = tuple(n for n in range(10, 100) if (n // 10 + 3 * (n % 10)) % 4 == 0)
NUMBERS_OF: dict[Split, tuple[int, ...]] = {
    "train": tuple(n for n in range(10, 100) if n not in _HELD_NUMBERS),
    "heldout": _HELD_NUMBERS,
}

POOLS = {"adj": ADJECTIVES, "noun": NOUNS, "verb": VERBS, "prep": PREPOSITIONS, "adv": ADVERBS}


def _split(words: tuple[str, ...], every: int) -> dict[Split, tuple[str, ...]]:
    held = words[every - 1 :: every]
    return {"train": tuple(w for w in words if w not in held), "heldout": held}


TOPICS_OF = _split(TOPICS, 4)
NOUNS_OF = _split(NOUNS, 4)
OPENERS_OF = _split(OPENERS, 4)
KEYS_OF = _split(KEYS, 3)
