"""Writes short texts that meet, or just fail, the constraints of `spct_ray.data.constraints`.

A Draft is a text taken apart: words with their role in the sentence, and looks (case, marks, brackets, layout).
`satisfy` and `violate` change the one part that their constraint decides, so that a right and a wrong text differ in
that part only; `render` puts the text together. What a query does not ask for varies freely, so it tells nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from spct_ray.data.constraints import Constraint, Value
from spct_ray.data.words import ADJECTIVES, KEYS, MARKS_OF, NOUNS, NUMBER_WORDS, OPENERS, POOLS

MIN_WORDS, MAX_WORDS = 8, 13  # of the first sentence with its opener; its core needs 8, see `_sentence`
USUAL_WORDS = 10  # at most so many where no constraint counts them: short texts are quick to judge

Word = tuple[str, str]  # (role, word): role "adj", "noun", "verb", "prep", "adv", "topic" or "the"
Case = str  # "sentence", "lower", "upper", or "one_upper" / "one_lower": all but one word


@dataclass
class Draft:
    """One text taken apart. `parts` are its sentences or list items; `day` is a number in digits or letters."""

    parts: list[list[Word]]
    opener: str = ""
    comma: bool = False
    day: str = ""
    mark: str = "."
    case: Case = "sentence"
    odd_word: int = 0  # place of the word that differs in "one_upper" / "one_lower"
    title: tuple[str, str] | None = None  # brackets around the title, if any
    wrap: tuple[str, str] = ("", "")
    bullet: str = ""  # "- ", "* " or "1. " (counts up); not empty means one line a part


def write(topic: str, taken: frozenset[str], rng: Random) -> Draft:
    """A draft about `topic`; looks whose slot is not `taken` by a constraint vary at random."""
    draft = Draft([_sentence(topic, rng)], opener=rng.choice(OPENERS))
    if "count" not in taken and rng.random() < 0.2:
        draft.parts.append(_short_sentence(rng))
    _style(draft, taken, rng, 1.0)
    return draft


def vary(draft: Draft, taken: frozenset[str], rng: Random) -> Draft:
    """A paraphrase: about a third of the words that carry no constraint, and some free looks, drawn again."""
    new = copy.deepcopy(draft)
    for part in new.parts:
        for i, (role, _) in enumerate(part):
            if role in POOLS and rng.random() < 0.35:
                part[i] = (role, rng.choice(POOLS[role]))
    if rng.random() < 0.35:
        new.opener = rng.choice(OPENERS)
    num_words = len(new.parts[0]) + 1 + rng.choice((-1, 0, 1))
    _resize(new.parts[0], min(USUAL_WORDS, max(MIN_WORDS, num_words)) - 1, rng)
    _style(new, taken, rng, 0.25)
    return new


def _style(draft: Draft, taken: frozenset[str], rng: Random, chance: float) -> None:
    def redraw(*slots: str) -> bool:
        return not taken & set(slots) and rng.random() < chance

    if redraw("comma"):
        draft.comma = rng.random() < 0.4
    if redraw("digits"):
        draft.day = rng.choice([_digits(rng), rng.choice(NUMBER_WORDS), "", "", ""])
    if redraw("end"):
        draft.mark = rng.choice("...!?")
    if redraw("case"):
        upper = "sentence" if taken & {"word", "last", "opener"} else "upper"
        draft.case = rng.choice(["lower", upper, *["sentence"] * 8])
    if redraw("start", "title"):
        draft.title = rng.choice([("<<", ">>"), *[None] * 9])
    if redraw("start", "end"):
        draft.wrap = rng.choice([('"', '"'), *[("", "")] * 9]) if draft.title is None else ("", "")


def _digits(rng: Random) -> str:
    return str(rng.randint(10, 99))


def _pick(role: str, rng: Random) -> Word:
    return role, rng.choice(POOLS[role])


def _sentence(topic: str, rng: Random) -> list[Word]:
    """The core of 7 words (8 with the opener) with 0 to 5 optional ones."""
    subject, place = [("the", "the"), _pick("noun", rng)], [("the", "the"), ("topic", topic), _pick("noun", rng)]
    part = [*subject, _pick("verb", rng), _pick("prep", rng), *place]
    _resize(part, rng.randint(MIN_WORDS, USUAL_WORDS) - 1, rng)
    return part


def _short_sentence(rng: Random) -> list[Word]:
    return [_pick("prep", rng), _pick("verb", rng), ("the", "the"), _pick("noun", rng)]


def _resize(part: list[Word], num_words: int, rng: Random) -> None:
    """Add or drop adjectives and the adverb until the sentence has `num_words` words."""
    while len(part) > num_words:
        optional = [i for i, (role, _) in enumerate(part) if role in ("adj", "adv")]
        del part[rng.choice(optional)]
    while len(part) < num_words:
        roles = [role for role, _ in part]
        places = [
            (i + 1, "adj") for i, role in enumerate(roles) if role == "the" and roles[i + 1 : i + 3] != ["adj", "adj"]
        ]
        if "adv" not in roles:
            places.append((roles.index("verb"), "adv"))
        place, role = rng.choice(places)
        part.insert(place, _pick(role, rng))


def render(draft: Draft, topic: str) -> str:
    """The text."""
    lines = [" ".join(word for _, word in part) for part in draft.parts]
    if draft.bullet:
        marks = [f"{i}. " if draft.bullet == "1. " else draft.bullet for i in range(1, len(lines) + 1)]
        text = "\n".join(mark + line for mark, line in zip(marks, _case(lines, draft), strict=True))
    else:
        opener = draft.opener + ("," if draft.comma else "")
        day = f" on day {draft.day}," if draft.day and draft.comma else f" on day {draft.day}" if draft.day else ""
        lines[0] = f"{opener}{day} {lines[0]}"
        text = " ".join(line + "." for line in _case(lines, draft))[:-1] + draft.mark
        if draft.title:
            heading = f"about {topic}"
            heading = (
                heading.upper() if draft.case == "upper" else heading.title() if draft.case == "sentence" else heading
            )
            text = f"{draft.title[0]}{heading}{draft.title[1]} {text}"
    return draft.wrap[0] + text + draft.wrap[1]


def _case(lines: list[str], draft: Draft) -> list[str]:
    if draft.case == "sentence":
        return [line[:1].upper() + line[1:] for line in lines]
    if draft.case in ("upper", "one_lower"):
        lines = [line.upper() for line in lines]
    if draft.case in ("one_upper", "one_lower"):
        words = lines[0].split(" ")
        place = draft.odd_word % len(words)
        words[place] = words[place].lower() if draft.case == "one_lower" else words[place].title()
        lines[0] = " ".join(words)
    return lines


def satisfy(draft: Draft, constraint: Constraint, rng: Random) -> None:
    """Change `draft` so that it meets the constraint. A later change may undo it: check the rendered text."""
    _WRITERS[constraint.kind](draft, constraint.value, True, rng)


def violate(draft: Draft, constraint: Constraint, rng: Random) -> None:
    """Change `draft` so that it just fails the constraint, alike in length and style."""
    _WRITERS[constraint.kind](draft, constraint.value, False, rng)


def _other(pool: tuple[str, ...], value: Value, rng: Random) -> str:
    return rng.choice([word for word in pool if word != value])


def _nouns(draft: Draft) -> list[tuple[int, int]]:
    return [(p, i) for p, part in enumerate(draft.parts) for i, (role, _) in enumerate(part) if role == "noun"]


def _put_noun(draft: Draft, place: tuple[int, int], word: str) -> None:
    draft.parts[place[0]][place[1]] = ("noun", word)


def _write_list(bullet: str, wrong: tuple[str, ...]) -> Callable[[Draft, Value, bool, Random], None]:
    def write_list(draft: Draft, value: Value, ok: bool, rng: Random) -> None:
        miscounted = not ok and rng.random() < 0.7
        num_items = int(value) + (rng.choice((-1, 1)) if miscounted else 0)
        topic = next(word for word in draft.parts[0] if word[0] == "topic")
        draft.parts = [[_pick("adj", rng), _pick("noun", rng)] for _ in range(num_items)]
        draft.parts[0].insert(1, topic)
        draft.bullet = bullet if ok or miscounted else rng.choice(wrong)

    return write_list


def _write_json(draft: Draft, value: Value, ok: bool, rng: Random) -> None:
    right, other = (f'{{"{value}": "', '"}'), (f'{{"{_other(KEYS, value, rng)}": "', '"}')
    draft.wrap = right if ok else rng.choice((other, (right[0], '"'), (f"{{'{value}': '", "'}")))


def _write_num_sentences(draft: Draft, value: Value, ok: bool, rng: Random) -> None:
    wanted = int(value)
    if not ok:
        wanted = 2 if wanted != 2 else rng.choice((1, 3))
    _resize(draft.parts[0], MIN_WORDS - 1, rng)
    draft.parts = [*draft.parts[:1], *(_short_sentence(rng) for _ in range(wanted - 1))]


def _write_num_words(draft: Draft, value: Value, ok: bool, rng: Random) -> None:
    wanted = int(value)
    if not ok:
        wanted = min(MAX_WORDS, max(MIN_WORDS, wanted + rng.choice((-2, -1, 1, 2))))
    _resize(draft.parts[0], wanted - 1, rng)


def _write_include(draft: Draft, value: Value, ok: bool, rng: Random) -> None:
    places = _nouns(draft)
    for part, i in places:
        if draft.parts[part][i][1] == value:
            _put_noun(draft, (part, i), _other(NOUNS, value, rng))
    if ok:
        _put_noun(draft, rng.choice(places), str(value))


def _write_exclude(draft: Draft, value: Value, ok: bool, rng: Random) -> None:
    _write_include(draft, value, not ok, rng)


def _write_first(draft: Draft, value: Value, ok: bool, rng: Random) -> None:
    opener = str(value).lower()
    draft.opener = opener if ok else _other(OPENERS, opener, rng)


def _write_last(draft: Draft, value: Value, ok: bool, rng: Random) -> None:
    _put_noun(draft, _nouns(draft)[-1], str(value) if ok else _other(NOUNS, value, rng))


def _write_commas(draft: Draft, value: Value, ok: bool, rng: Random) -> None:
    draft.comma = not ok
    if draft.bullet:
        role, word = draft.parts[-1][0]
        draft.parts[-1][0] = (role, f"{word}{'' if ok else ','} {rng.choice(ADJECTIVES)}")


def _write_number(draft: Draft, value: Value, ok: bool, rng: Random) -> None:
    draft.day = _digits(rng) if ok else rng.choice(NUMBER_WORDS)


def _write_mark(draft: Draft, value: Value, ok: bool, rng: Random) -> None:
    draft.mark = str(value) if ok else _other(MARKS_OF["train"] + MARKS_OF["heldout"], value, rng)


def _write_end_number(draft: Draft, value: Value, ok: bool, rng: Random) -> None:
    tens, ones = divmod(int(value), 10)
    near = [n for n in range(10, 100) if n != value and (n // 10 == tens or n % 10 == ones)]
    draft.mark = f" {value if ok else rng.choice(near)}"


def _write_title(draft: Draft, value: Value, ok: bool, rng: Random) -> None:
    draft.title = ("<<", ">>") if ok else rng.choice((("<", ">"), ("[[", "]]"), ("((", "))"), ("**", "**")))


def _write_quotes(draft: Draft, value: Value, ok: bool, rng: Random) -> None:
    draft.wrap = ('"', '"') if ok else rng.choice((("'", "'"), ('"', ""), ("", '"'), ("", "")))


def _write_lower(draft: Draft, value: Value, ok: bool, rng: Random) -> None:
    draft.case, draft.odd_word = "lower" if ok else rng.choice(("sentence", "one_upper")), rng.randrange(MAX_WORDS)


def _write_upper(draft: Draft, value: Value, ok: bool, rng: Random) -> None:
    draft.case, draft.odd_word = "upper" if ok else rng.choice(("sentence", "one_lower")), rng.randrange(MAX_WORDS)


_WRITERS: dict[str, Callable[[Draft, Value, bool, Random], None]] = {
    "bullets": _write_list("- ", ("* ", "1. ")),
    "numbered": _write_list("1. ", ("- ", "* ")),
    "json_key": _write_json,
    "num_sentences": _write_num_sentences,
    "num_words": _write_num_words,
    "include": _write_include,
    "exclude": _write_exclude,
    "first_word": _write_first,
    "last_word": _write_last,
    "no_commas": _write_commas,
    "number": _write_number,
    "end_mark": _write_mark,
    "end_number": _write_end_number,
    "title": _write_title,
    "quotes": _write_quotes,
    "lowercase": _write_lower,
    "uppercase": _write_upper,
}
