"""The one order in which a source deals its items, so that each shard and each chunk holds a mixture of the classes.

It is a keyed bijection, see `order.permute`. What can only be read in blocks (row groups of Parquet, chunks of tars) is shuffled
twice: the blocks, and then the samples within windows of neighbouring blocks, of which a reader holds one window at a time. An
unfinished `prepare` goes on with the shards that it has, so none of this may change.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from freeguide.data_pipeline.decode import Pixels
from freeguide.data_pipeline.manifest import Schema
from freeguide.data_pipeline.order import DEALT, FIRST_ROUNDS, Ints, key, permute
from freeguide.data_pipeline.shards import Sample, Source

WINDOW_BYTES = 256 * 2**20  # encoded bytes of the blocks among which samples are shuffled, and which a reader holds


def shuffled(read: Callable[[int], Sample], items: int) -> Callable[[int], Sample]:
    """`read`, with its items in the order in which they are dealt."""
    order = _dealt(np.arange(items), items)
    return lambda item: read(int(order[item]))


def from_arrays(images: Pixels, labels: npt.NDArray[np.int64], schema: Schema) -> Source:
    """The source of images, uint8 (N, H, W, C), and labels, int64 (N,), that are in memory."""
    digest = hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    read = shuffled(lambda item: Sample(images[item], int(labels[item])), len(images))
    return Source(schema, len(images), read, f"arrays {digest}")


def _dealt(places: Ints, items: int, window: int = 0) -> Ints:
    """What stands at these places of the whole (window 0), or of the window whose number counts from 1."""
    return permute(places, items, key(0, DEALT, np.array([window])), FIRST_ROUNDS)


class Blockwise:
    """Reads items out of blocks: the blocks permuted, then the rows of each window of blocks.

    One window of loaded blocks is kept; they do not travel to other processes.
    """

    def __init__(
        self, load: Callable[[int], Sequence[Any]], use: Callable[[Any, int, int], Sample], rows: Sequence[int], total_bytes: int
    ) -> None:
        self.arguments = load, use, rows, total_bytes
        self.load, self.use = load, use
        self.window = max(1, min(len(rows), WINDOW_BYTES * len(rows) // max(1, total_bytes)))  # blocks
        self.blocks = _dealt(np.arange(len(rows)), len(rows))
        self.firsts = np.cumsum([0, *np.asarray(rows, np.int64)[self.blocks]])  # rows before each block
        self.kept: OrderedDict[int, Sequence[Any]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Blockwise, self.arguments

    def __call__(self, item: int) -> Sample:
        block, row = self.place(item)
        if block not in self.kept:
            while len(self.kept) >= self.window:
                self.kept.popitem(last=False)
            self.kept[block] = self.load(block)
        self.kept.move_to_end(block)
        return self.use(self.kept[block][row], block, row)

    def place(self, item: int) -> tuple[int, int]:
        """Block and row of an item."""
        window = self._at(item) // self.window
        first, end = self.firsts[window * self.window], self.firsts[min((window + 1) * self.window, len(self.blocks))]
        item = int(first + _dealt(np.array([item - first]), int(end - first), window + 1)[0])
        return int(self.blocks[self._at(item)]), item - int(self.firsts[self._at(item)])

    def _at(self, item: int) -> int:
        return int(np.searchsorted(self.firsts, item, side="right")) - 1
