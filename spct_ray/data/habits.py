"""The habits of judges of the built-in set, read from their judgements and checked by program."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from spct_ray.data.builtin import requirements_of
from spct_ray.data.kinds import KINDS
from spct_ray.records import Item, Trajectory

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
    counts: Counter[str] = Counter()
    for item, t in judged:
        if t.failure:
            continue
        head, _, analysis = t.text.partition("Analysis:")
        required = requirements_of(item)
        known = KINDS | {kind.name: kind for kind in required}
        stated = {name for name in _STATED.findall(head) if name in known}
        counts["judgements"] += 1
        counts["stated"] += len(stated)
        counts["asked"] += len(stated & {kind.name for kind in required})
        if len(item.responses) > 1:
            others = [text for i, text in enumerate(item.responses) if i != item.best]
            deciding = {kind.name for kind in required if not all(kind.check(text) for text in others)}
            counts["compared"] += 1
            counts["named"] += deciding <= stated
            counts["tied"] += t.scores.count(max(t.scores)) > 1
        parts = re.split(r"\[Response (\d+)\]", analysis)[1:]
        for place, text in zip(parts[::2], parts[1::2], strict=True):
            if 1 <= int(place) <= len(t.order):
                response = item.responses[t.order[int(place) - 1]]
                findings = [(name, answer) for name, answer in _FOUND.findall(text) if name in known]
                counts["findings"] += len(findings)
                counts["true"] += sum(known[name].check(response) == (answer == "yes") for name, answer in findings)

    def share(part: str, whole: str) -> float | None:
        return counts[part] / counts[whole] if counts[whole] else None

    counts["alien"] = counts["stated"] - counts["asked"]
    means = [share(part, "judgements") for part in ("stated", "asked", "alien")]
    shares = [share("named", "compared"), share("tied", "compared"), share("true", "findings")]
    return dict(zip(HABITS, means + shares, strict=True))
