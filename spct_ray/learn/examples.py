"""Tokenised training examples on disk, memory-mapped by all ranks, and the order in which they are drawn.

The step number alone determines the batch, so a resumed run neither repeats nor skips data.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from spct_ray.chat import encode_example
from spct_ray.files import replacing
from spct_ray.judge.seeds import derive_seed
from spct_ray.records import Message

if TYPE_CHECKING:
    from spct_ray.learn.batch import Tokens

_SCHEMA = pa.schema([("ids", pa.large_list(pa.int32())), ("prompt_length", pa.int32()), ("label", pa.float32())])
_ROWS = 4096  # rows written at once


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids whose first `prompt_length` are not trained on; `label` is 0 or 1 for the meta RM, for a pair (see
    `make_pair`) the length of the chosen response, else 0."""

    ids: Tokens
    prompt_length: int
    label: float = 0.0


def make_example(tokenizer: Any, messages: Sequence[Message], completion: str, label: float = 0.0) -> Example:
    """A prompt, up to where the assistant starts to write, and its completion with the end of the turn."""
    ids, prompt_length = encode_example(tokenizer, messages, completion)
    return Example(np.array(ids, np.int32), prompt_length, label)


def make_pair(tokenizer: Any, messages: Sequence[Message], chosen: str, rejected: str) -> Example:
    """Both responses to one query as one example: prompt, chosen, rejected; `label` is the length of the chosen one."""
    ids, prompt_length = encode_example(tokenizer, messages, chosen)
    other, _ = encode_example(tokenizer, messages, rejected)
    joined = np.array([*ids, *other[prompt_length:]], np.int32)
    return Example(joined, prompt_length, float(len(ids) - prompt_length))


class ExampleFiles:
    """The examples of Arrow files, one file after the other, read on demand: `ids` are views of the mapped files."""

    def __init__(self, *paths: str) -> None:
        tables = [pa.ipc.open_file(pa.memory_map(path)).read_all() for path in paths]
        self.sizes: list[int] = [table.num_rows for table in tables]
        self._ids, self._prompt_lengths, self._labels = pa.concat_tables(tables).columns

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        ids = self._ids[index].values.to_numpy()
        return Example(ids, self._prompt_lengths[index].as_py(), self._labels[index].as_py())


def write_examples(path: str, examples: Iterable[Example]) -> int:
    """Write an Arrow file, whole or not at all; returns the number of examples."""
    count, stream = 0, iter(examples)
    with replacing(path) as temporary, pa.ipc.new_file(temporary, _SCHEMA) as writer:
        while rows := list(itertools.islice(stream, _ROWS)):
            ids = [np.asarray(example.ids, np.int32) for example in rows]
            offsets = np.cumsum([0, *map(len, ids)])
            columns = [
                pa.LargeListArray.from_arrays(offsets, np.concatenate(ids)),
                pa.array([example.prompt_length for example in rows], pa.int32()),
                pa.array([example.label for example in rows], pa.float32()),
            ]
            writer.write_batch(pa.record_batch(columns, _SCHEMA))
            count += len(rows)
    return count


@dataclass(frozen=True)
class MixedOrder:
    """`num_drawn` draws from examples of one or two kinds, of which there are `sizes`; the second kind is stored after
    the first.

    `shares` are the second kind's shares of a batch, one per equal part of the training. Each kind is drawn epoch by
    epoch, each epoch in its own random order.
    """

    sizes: tuple[int, ...]
    num_drawn: int
    batch_size: int
    seed: int
    shares: tuple[float, ...] = (0.0,)

    @property
    def num_steps(self) -> int:
        """Batches in all; the last may be smaller."""
        return -(-self.num_drawn // self.batch_size)

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of batch `step` (from 0)."""
        second = [self._num_second(s) for s in range(step + 1)]
        before, after = sum(second[:-1]), sum(second)
        drawn = step * self.batch_size, min((step + 1) * self.batch_size, self.num_drawn)
        first = self._draw(0, range(drawn[0] - before, drawn[1] - after))
        return first + [self.sizes[0] + place for place in self._draw(1, range(before, after))]

    def _num_second(self, step: int) -> int:
        size = min(self.batch_size, self.num_drawn - step * self.batch_size)
        return round(self.shares[step * len(self.shares) // self.num_steps] * size)

    def _draw(self, kind: int, draws: range) -> list[int]:
        epochs = [divmod(draw, self.sizes[kind]) for draw in draws]
        return [_permutation(self.sizes[kind], self.seed, kind, epoch)[place] for epoch, place in epochs]


@functools.lru_cache(maxsize=4)
def _permutation(num: int, seed: int, kind: int, epoch: int) -> list[int]:
    order = list(range(num))
    random.Random(derive_seed(seed, "epoch", kind, epoch)).shuffle(order)
    return order
