"""Benchmark rows in the shapes in which their authors publish them, each turned into the Items that a judge is given.

One row may give several items: single ratings (RewardBench 2 Ties), pairs (PPE correctness), or pairs in place of a
list that is too long for one prompt. `Item.facts` (JSON) then says what belongs together: "question" is the row, and
other keys are read by the official scoring (`spct_ray.evaluation.official`) alone. Rewards are 1 for right
and 0 for wrong responses, the right ones first; balanced orders are the judge's matter.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spct_ray.data.shapes import Cells, UnusableRow, to_item
from spct_ray.data.validate import Limits, Problem
from spct_ray.records import Item, Message

Reader = Callable[[Cells, str, Limits], list[Item]]  # (row, item id, limits) -> items; raises DataError, UnusableRow

RM_BENCH_STYLES = ("concise", "detailed plain text", "detailed markdown")
_PPE_WINNERS: Mapping[Any, int] = {"model_a": 0, "model_b": 1, "response_1": 0, "response_2": 1}
_MAX_PAIRS = 5  # of right and wrong answers of one prompt, where the file names none (as many as PPE samples)


def facts_of(item: Item) -> dict[str, Any]:
    """The facts that a reader noted, and "question", the row that the item came from."""
    found = json.loads(item.facts) if item.facts else {}
    return {"question": item.id, **(found if isinstance(found, dict) else {})}


def layout(items: Sequence[Item]) -> dict[str, int]:
    """How many items have n responses, e.g. {"n = 2": 500}."""
    return dict(sorted(Counter(f"n = {len(item.responses)}" for item in items).items()))


def reward_bench(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """{prompt, chosen, rejected, subset}; one pair."""
    return [_item(cells, item_id, _prompt(cells, "prompt"), [cells.text("chosen")], [cells.text("rejected")])]


def reward_bench_2(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """{id, prompt, chosen: [...], rejected: [...], subset}: best of n, or for Ties every response rated by itself, as
    the authors rate them with generative judges. Ties ids are "ref:<n>" and "tied:<n>"."""
    chosen, rejected = _texts(cells, "chosen"), _texts(cells, "rejected")
    prompt = _prompt(cells, "prompt")
    if cells.text("subset").lower() != "ties":
        return [_item(cells, item_id, prompt, chosen, rejected)]
    kind, colon, number = str(cells.get("id")).partition(":")
    if kind not in ("ref", "tied") or not colon:
        raise cells.error(f"'id' of a Ties row must be ref:<number> or tied:<number>, found {cells.get('id')!r}")
    return [
        Item(f"{item_id}#{i}", prompt, (text,), (float(i < len(chosen)),), subset=cells.text("subset"),
             facts=json.dumps({"question": item_id, "kind": kind, "prompt": number}))
        for i, text in enumerate([*chosen, *rejected])
    ]  # fmt: skip


def rm_bench(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """{prompt, chosen: [3], rejected: [3], domain or subset}, styles in the order of RM_BENCH_STYLES. All six go into
    one prompt, or as 3 x 3 pairs where that is too long."""
    chosen, rejected = _texts(cells, "chosen"), _texts(cells, "rejected")
    for column, texts in (("chosen", chosen), ("rejected", rejected)):
        if len(texts) != len(RM_BENCH_STYLES):
            raise cells.error(f"{column!r} must hold 3 responses ({', '.join(RM_BENCH_STYLES)}), found {len(texts)}")
    prompt = _prompt(cells, "prompt")
    domain = cells.optional("domain") or cells.text("subset")
    six = [*chosen, *rejected]
    if _fits(prompt, six, limits) and len(set(map(str.strip, six))) == len(six):
        return [_item(cells, item_id, prompt, chosen, rejected, subset=domain)]
    return [
        _item(cells, f"{item_id}#{i}{j}", prompt, [chosen[i]], [rejected[j]], domain, question=item_id, cell=[i, j])
        for i in range(3)
        for j in range(3)
    ]


def rmb(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """RMB pairs {conversation_input, chosen, reject, category_path} and best-of-n {conversation_input, bon_best,
    loser_list, category_path}. A best-of-n row that is too long for one prompt is asked pair by pair."""
    prompt, path = cells.as_messages(cells.get("conversation_input"), "conversation_input"), cells.text("category_path")
    goal = next((g for g in ("Helpfulness", "Harmlessness") if g.lower() in path.lower()), "")
    if not goal:
        raise cells.error(f"'category_path' must name Helpfulness or Harmlessness, found {path!r}")
    if "bon_best" not in cells.row:
        best, kind = _answer(cells, cells.get("chosen"), "chosen"), "pairwise"
        others = [_answer(cells, cells.get("reject"), "reject")]
    else:
        best, kind = _answer(cells, cells.get("bon_best"), "bon_best"), "bon"
        others = [_answer(cells, one, "loser_list") for one in cells.as_list(cells.get("loser_list"), "loser_list")]
    subset = f"{goal} {'pairwise' if kind == 'pairwise' else 'best of n'}"
    if kind == "pairwise" or _fits(prompt, [best, *others], limits):
        return [_item(cells, item_id, prompt, [best], others, subset)]
    return [
        _item(cells, f"{item_id}#{j}", prompt, [best], [other], subset, question=item_id)
        for j, other in enumerate(others)
    ]


def judge_bench(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """{question, response_A, response_B, label: "A>B" | "B>A", source, response_model}; one pair."""
    answers, label = [cells.text("response_A"), cells.text("response_B")], cells.text("label")
    if label not in ("A>B", "B>A"):
        raise cells.error(f"'label' must be 'A>B' or 'B>A', found {label!r}")
    right = int(label == "B>A")
    facts = {"response model": name} if (name := cells.optional("response_model")) else {}
    prompt, source = _prompt(cells, "question"), cells.optional("source")
    return [_item(cells, item_id, prompt, [answers[right]], [answers[1 - right]], source, **facts)]


def ppe_preference(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """{prompt, response_1, response_2, winner}; ties have no unique best and are dropped by that name."""
    winner = cells.get("winner")
    if isinstance(winner, str) and winner.startswith("tie"):
        raise UnusableRow(Problem.NO_UNIQUE_BEST)
    if winner not in _PPE_WINNERS:
        raise cells.error(f"'winner' must be model_a, model_b or a tie, found {winner!r}")
    answers = [cells.text("response_1"), cells.text("response_2")]
    right = _PPE_WINNERS[winner]
    return [_item(cells, item_id, _prompt(cells, "prompt"), [answers[right]], [answers[1 - right]])]


def ppe_correctness(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """{prompt, response_1 .. response_k, scores: [right?, ...], sampled_conflict_pairs}: a pair for each conflict, and
    for best of k all responses in one prompt where they fit. Prompts that are always or never answered right have no
    conflict and are dropped."""
    right = [bool(value) for value in cells.as_list(cells.get("scores"), "scores")]
    answers = [cells.text(f"response_{i + 1}") for i in range(len(right))]
    prompt, name = _prompt(cells, "prompt"), cells.where.rpartition(":")[0].partition("[")[0]
    subset = cells.optional("subset") or Path(name).name.partition(".")[0]
    if not any(right) or all(right):
        raise UnusableRow(Problem.NO_UNIQUE_BEST)
    conflicts = cells.row.get("sampled_conflict_pairs")
    if conflicts is None:
        conflicts = [(i, j) for i, r in enumerate(right) for j, s in enumerate(right) if r and not s][:_MAX_PAIRS]
    items = []
    for number, pair in enumerate(cells.as_list(conflicts, "sampled_conflict_pairs")):
        if len(pair) != 2 or not all(0 <= i < len(right) for i in pair) or right[pair[0]] == right[pair[1]]:
            raise cells.error(f"'sampled_conflict_pairs' must pair a right and a wrong response, found {pair!r}")
        good, bad = sorted(pair, key=lambda i: not right[i])
        facts = {"question": item_id, "kind": "pair"}
        items.append(_item(cells, f"{item_id}#{number}", prompt, [answers[good]], [answers[bad]], subset, **facts))
    if _fits(prompt, answers, limits) and len(set(map(str.strip, answers))) == len(answers):
        rights, wrongs = ([a for a, r in zip(answers, right, strict=True) if r == flag] for flag in (True, False))
        items.append(_item(cells, f"{item_id}#all", prompt, rights, wrongs, subset, question=item_id, kind="best of k"))
    return items


def realmistake(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """{input, llm_response, error_label (or label): "error" | "no_error", metadata: {llm_response_model}}; one
    response, right when without error. The subset is the task, which is the file's folder."""
    column = "error_label" if "error_label" in cells.row else "label"
    label = cells.text(column)
    if label not in ("error", "no_error"):
        raise cells.error(f"{column!r} must be 'error' or 'no_error', found {label!r}")
    response, metadata = (cells.text("llm_response"),), cells.row.get("metadata")
    model = metadata.get("llm_response_model") if isinstance(metadata, Mapping) else None
    facts = json.dumps({"response model": model}) if model else ""
    reward = (float(label == "no_error"),)
    return [Item(item_id, _prompt(cells, "input"), response, reward, subset=_subset(cells), facts=facts)]


def llmbar(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """{input, output_1, output_2, label: 1 | 2}; the subset is the file's folder where there is no column."""
    label = cells.get("label")
    if label not in (1, 2):
        raise cells.error(f"'label' must be 1 or 2, found {label!r}")
    answers = [cells.text("output_1"), cells.text("output_2")]
    return [_item(cells, item_id, _prompt(cells, "input"), [answers[label - 1]], [answers[2 - label]])]


def own(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """{messages, responses, rewards, subset}: the shape of this project's own files, of any benchmark."""
    return [to_item(cells.row, "own", item_id, "", cells.where)]


def is_own(row: Mapping[str, Any]) -> bool:
    """Whether a row has this project's own shape, which every benchmark may be kept in."""
    return {"messages", "responses", "rewards"} <= set(row)


def _fits(prompt: Sequence[Message], responses: Sequence[str], limits: Limits) -> bool:
    lengths = [len(text) for text in responses]
    total = sum(len(m.content) for m in prompt) + sum(lengths)
    return len(responses) <= limits.max_responses and total <= limits.max_item_chars


def _item(
    cells: Cells,
    item_id: str,
    prompt: tuple[Message, ...],
    right: Sequence[str],
    wrong: Sequence[str],
    subset: str | None = None,
    **facts: Any,
) -> Item:
    if not right or not wrong:
        raise UnusableRow(Problem.NO_RESPONSES)
    return Item(
        id=item_id,
        messages=prompt,
        responses=(*right, *wrong),
        rewards=(*[1.0] * len(right), *[0.0] * len(wrong)),
        subset=_subset(cells) if subset is None else subset,
        facts=json.dumps(facts) if facts else "",
    )


def _subset(cells: Cells) -> str:
    """The subset of the row, else the folder of its file (LLMBar keeps its subsets so)."""
    if "subset" in cells.row:
        return cells.optional("subset")
    path = Path(cells.where.rpartition(":")[0])
    return path.parent.name if path.suffix else ""


def _prompt(cells: Cells, column: str) -> tuple[Message, ...]:
    value = cells.get(column)
    return (Message("user", value),) if isinstance(value, str) else cells.as_messages(value, column)


def _texts(cells: Cells, column: str) -> list[str]:
    value = cells.get(column)
    values = [value] if isinstance(value, str) else cells.as_list(value, column)
    return [cells.as_text(text, column) for text in values]


def _answer(cells: Cells, value: Any, column: str) -> str:
    if not isinstance(value, Mapping) or "answer" not in value:
        raise cells.error(f"{column!r} must hold {{llm_name, answer}} objects, found {value!r:.80}")
    return cells.as_text(value["answer"], f"{column}.answer")
