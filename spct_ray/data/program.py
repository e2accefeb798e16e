"""The checker program as a judge of the built-in set: stands in for the stronger sampler of the cold start.

It states some of the query's requirements as principles, and sometimes others. It quotes each response, says after each
deciding word whether that meets a principle, and scores by the share that is met. It makes mistakes on purpose, at
configured rates, in its principles, its findings and its format, so that rejection has work to do. `exercises` are the
general instructions of the cold start: given principles, applied without mistakes. Other data have no checkers.
`habits` are read back from judgements in this format, whoever wrote them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from spct_ray.data.builtin import (
    KINDS,
    NAMES,
    PARTS,
    SOURCE,
    Kind,
    kinds_of,
    query,
    random_sentence,
    render,
    requirements_of,
    sentence_of,
)
from spct_ray.judge.judge import JudgeTask, to_trajectory
from spct_ray.judge.modes import MODES
from spct_ray.judge.prompt import JudgeConfig, judge_messages, scale_of
from spct_ray.judge.rule import is_tied
from spct_ray.judge.seeds import derive_seed
from spct_ray.records import Item, Message, Trajectory

FAVOURITES = ("a feeling", "an exclamation mark")  # what a careless judge prefers, asked for or not


@dataclass(frozen=True)
class ProgramConfig:
    """`num_stated_weights` weigh stating 1, 2, ... principles. What a query names first is stated more often: each
    further requirement is `fading` times as likely as the one before. With probability `alien` a principle is not one
    of the requirements, and then one of FAVOURITES with probability `favourite`. `finding_error` is the
    probability that a finding is false (0 with a hint), `format_error` that a judgement breaks the format.
    """

    num_stated_weights: tuple[float, ...] = (0.5, 0.3, 0.13, 0.07)
    fading: float = 0.5
    alien: float = 0.3
    favourite: float = 0.8
    finding_error: float = 0.04
    format_error: float = 0.03


@dataclass(frozen=True, slots=True)
class ProgramJudge:
    """Judges items of the built-in set."""

    config: ProgramConfig
    judge_config: JudgeConfig
    name: str = "program"

    def judge(self, tasks: Sequence[JudgeTask]) -> list[Trajectory]:
        """One trajectory per task, in order; a task's seed determines its errors."""
        return [
            to_trajectory(task, self.judge_config, text=self._write(task), stop_reason="stop", model=self.name)
            for task in tasks
        ]

    def _write(self, task: JudgeTask) -> str:
        rng = random.Random(derive_seed(task.seed, "program"))
        stated = self._state(requirements_of(task.item), rng)
        error = 0.0 if task.hinted else self.config.finding_error
        texts = [task.item.responses[i] for i in task.order]
        met = [[kind.check(text) != (rng.random() < error) for kind in stated] for text in texts]
        text = judgement(stated, texts, met, self.judge_config)
        return _break_format(text, rng) if rng.random() < self.config.format_error else text

    def _state(self, required: Sequence[Kind], rng: random.Random) -> list[Kind]:
        weights = self.config.num_stated_weights
        number = min(rng.choices(range(1, len(weights) + 1), weights)[0], len(required))
        free = [part for part in PARTS if part not in {kind.part for kind in required}]
        num_alien = min(sum(rng.random() < self.config.alien for _ in range(number)), len(free))
        left = list(range(len(required)))
        while len(left) > len(required) - (number - num_alien):
            left.remove(rng.choices(left, [self.config.fading**i for i in left])[0])
        stated = [kind for i, kind in enumerate(required) if i not in left]
        for _ in range(num_alien):
            favourites = [KINDS[name] for name in FAVOURITES if KINDS[name].part in free]
            others = [kind for kind in KINDS.values() if kind.part in free]
            alien = rng.choice(favourites if favourites and rng.random() < self.config.favourite else others)
            free.remove(alien.part)
            stated.insert(rng.randint(0, len(stated)), alien)
        return stated


def exercises(number: int, judge: JudgeConfig, seed: int, outside: tuple[str, ...] = ()) -> Iterator[dict[str, str]]:
    """General instructions, rows {prompt, completion}: judge by the principles that are given, of all words of all
    kinds (also of those at the import paths `outside`), held-out ones too. It is the knowledge of words and the care in
    reading that a language model brings along.
    """
    rng = random.Random(f"{seed}/{SOURCE}/exercises")
    for i in range(number):
        n, num_stated = rng.choice((1, 2, 2, 2, 3, 3)), rng.randint(1, len(PARTS))
        stated, required = (
            [rng.choice(kinds_of(part, outside)) for part in rng.sample(PARTS, m)] for m in (num_stated, 3)
        )
        taken: set[str] = set()
        texts: list[str] = []
        for _ in range(n):
            sentence = random_sentence("heldout", rng, taken, outside)
            taken |= set(sentence.values())
            texts.append(render(sentence))
        request = query(required, rng.choice(NAMES["train"]))
        item = Item(f"exercise-{i}", (Message("user", request),), tuple(texts), principles=criteria(stated))
        met = [[kind.check(text) for kind in stated] for text in texts]
        completion = judgement(stated, texts, met, judge)
        yield {"prompt": judge_messages(item, tuple(range(n)), judge)[0].content, "completion": completion}


def judgement(stated: Sequence[Kind], texts: Sequence[str], met: Sequence[Sequence[bool]], judge: JudgeConfig) -> str:
    """The three parts: weighted criteria; each response [N] with a finding after every deciding word and its total;
    scores. `met` [N][stated] are the findings.

    A total is 2 for a response that meets nothing and 10 for one that meets all (on the 0/1 scale 1 for all, else 0).
    """
    binary = scale_of(len(texts), judge).high == 1
    totals = [int(all(row)) if binary else 2 + round(8 * sum(row) / len(row)) for row in met]
    lines = []
    for place, (text, row) in enumerate(zip(texts, met, strict=True), 1):
        findings = {k.part: f" ({k.name}: {'yes' if ok else 'no'})" for k, ok in zip(stated, row, strict=True)}
        lines.append(f"[Response {place}]\n{_annotated(text, findings)} total {totals[place - 1]}.")
    box = ", ".join(map(str, totals))
    head = [f"Specific Criteria: {criteria(stated)}"] if MODES[judge.mode].criteria else []
    return "\n".join([*head, "Analysis:", *lines, f"Scores: \\boxed{{{box}}}"])


def criteria(stated: Sequence[Kind]) -> str:
    """Principles with equal weights, as a judgement states them."""
    return " ".join(f"{kind.name} ({100 // len(stated)}%);" for kind in stated)


def _annotated(text: str, findings: dict[str, str]) -> str:
    """The text with the finding of each part behind its word; at its end those that have no word in it."""
    left, part_of = dict(findings), {word: part for part, word in sentence_of(text).items()}
    quoted = re.sub(r"\w+|[^\w\s]", lambda word: word[0] + left.pop(part_of.get(word[0], ""), ""), text)
    return quoted + "".join(left.values())


def _break_format(text: str, rng: random.Random) -> str:
    """A typical format error: no box, a word for a score, one score too many, or one out of range."""
    head, _, scores = text.rpartition("\\boxed{")
    numbers = scores.rstrip("}").split(", ")
    return rng.choice(
        [
            f"{head}{', '.join(numbers)}",
            f"{head}\\boxed{{good}}",
            f"{head}\\boxed{{{', '.join([*numbers, '5'])}}}",
            f"{head}\\boxed{{{', '.join(['11', *numbers[1:]])}}}",
        ]
    )


HABITS = (
    "principles stated",
    "of them asked for",
    "of them not asked for",
    "names all that decides (n >= 2)",
    "ties (n >= 2)",
    "findings that are true",
)
_STATED = re.compile(r" ([a-z ]+) \(\d+%\);")
_FOUND = re.compile(r" \(([a-z ]+): (yes|no)\)")


def habits(judged: Iterable[tuple[Item, Trajectory]]) -> dict[str, float | None]:
    """HABITS of parsed judgements of built-in items: means per judgement, the last three as shares; None where there is
    nothing to count."""
    numbers: dict[str, list[float]] = {name: [] for name in HABITS}
    num_stated, num_asked, num_alien, names_all, is_tie, is_true = numbers.values()
    for item, t in judged:
        if t.failure:
            continue
        head, _, analysis = t.text.partition("Analysis:")
        required = requirements_of(item)
        known = KINDS | {kind.name: kind for kind in required}
        stated = {name for name in _STATED.findall(head) if name in known}
        asked = {kind.name for kind in required}
        num_stated.append(len(stated))
        num_asked.append(len(stated & asked))
        num_alien.append(len(stated - asked))
        if len(item.responses) > 1:
            others = [text for i, text in enumerate(item.responses) if i != item.best]
            deciding = {kind.name for kind in required if not all(kind.check(text) for text in others)}
            names_all.append(deciding <= stated)
            is_tie.append(is_tied(t.scores))
        parts = re.split(r"\[Response (\d+)\]", analysis)[1:]
        for place, text in zip(parts[::2], parts[1::2], strict=True):
            if 1 <= int(place) <= len(t.order):
                response = item.responses[t.order[int(place) - 1]]
                findings = [(known[name], answer) for name, answer in _FOUND.findall(text) if name in known]
                is_true += [kind.check(response) == (answer == "yes") for kind, answer in findings]
    return {name: sum(values) / len(values) if values else None for name, values in numbers.items()}
