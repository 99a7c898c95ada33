"""The global order of the samples: a pure function of the position, so there is nothing to save but one integer.

Samples have ids 0 .. N-1 in manifest order; chunk j is the ids [jq, (j+1)q), and there are M = N // q whole chunks. Position g
(step t of a global batch B consumes the positions tB .. (t+1)B - 1) finds its sample in four steps, all of them closed forms:

    stream  c = g mod C,   k = g div C               C streams advance side by side, so a batch mixes C places of the data
    window  u = i C + c,   i = k div (G q)           a window is G chunks; streams deal the windows among themselves
    epoch   (e, v) = divmod(u, M // G)               window v of epoch e; streams never end, so no epoch ends ragged
    sample  s = sigma_u(k mod (G q)),   chunk = pi_e(v G + s div q),   id = chunk q + s mod q

pi_e permutes the chunks of epoch e and sigma_u the samples of window u. Both are keyed 8-round Feistel networks over the next
power of two, brought down to size by cycle walking (Black & Rogaway 2002), so they are evaluated, never stored. Runs that began
with 4 rounds, which keep more neighbours together than chance does, go on with them.

Every chunk comes at most once per epoch. M mod G chunks are left out of an epoch (pi_e changes which), and N mod q samples: the
last chunk takes its q samples from the last q + N mod q by rotation, so over the epochs each of them is left out equally often.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from freeguide.data_pipeline.manifest import WHOLE_BYTES, Manifest

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

WINDOWS_BYTES = 256 * 2**20  # of the windows of all streams together: half of what data.cache_mib is by default
WINDOW_CHUNKS = 8  # G: below it neighbouring batches share chunks and their means correlate
ROUNDS = 8
FIRST_ROUNDS = 4  # of runs whose checkpoints name no number, and of the shuffle in which `prepare` deals a source
EPOCH, WINDOW, POSITION, DEALT = range(4)  # what a key is for; DEALT: how `prepare` deals the items of a source
MIN_BITS = 8  # in smaller domains four rounds are measurably not uniform
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Order:
    """The order of one data set. Stored with the run; together with the samples consumed it is the whole state of the data."""

    samples: int  # N
    chunk_samples: int  # q
    streams: int  # C
    window_chunks: int  # G
    seed: int
    rounds: int = ROUNDS  # of the Feistel networks

    def __post_init__(self) -> None:
        if min(self.samples, self.chunk_samples, self.streams, self.window_chunks) < 1:
            raise ValueError(f"an order needs positive sizes, got {self}")
        if self.chunks < self.window_chunks:
            raise ValueError(f"a window of {self.window_chunks} chunks does not fit into {self.chunks} chunks")

    @property
    def chunks(self) -> int:
        """M, the whole chunks."""
        return self.samples // self.chunk_samples

    @property
    def window_samples(self) -> int:
        return self.window_chunks * self.chunk_samples

    @property
    def generation(self) -> int:
        """Positions after which every stream has used up its window and takes the next one."""
        return self.streams * self.window_samples

    @property
    def epoch_samples(self) -> int:
        """Samples of one epoch: N less what is left out."""
        return self.chunks // self.window_chunks * self.window_samples

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """Epochs and sample ids (int64, the shape of `positions`) at the given global positions."""
        return self.in_window(*_window_of(positions, self.streams, self.window_samples))

    def in_window(self, u: Ints, offset: Ints) -> tuple[Ints, Ints]:
        """Epochs and sample ids at the places `offset` (0 .. Gq - 1) of the windows u."""
        epoch, v = np.divmod(u, self.chunks // self.window_chunks)
        s = permute(offset, self.window_samples, key(self.seed, WINDOW, u), self.rounds)
        slot, within = np.divmod(s, self.chunk_samples)
        chunk = permute(v * self.window_chunks + slot, self.chunks, key(self.seed, EPOCH, epoch), self.rounds)
        return epoch, self._ids(epoch, chunk, within)

    def _ids(self, epoch: Ints, chunk: Ints, within: Ints) -> Ints:
        rest = self.samples % self.chunk_samples
        pool = self.chunk_samples + rest
        last = (epoch % pool * rest + within) % pool  # the rotation of the last chunk: it moves on by `rest` each epoch
        return chunk * self.chunk_samples + np.where(chunk == self.chunks - 1, last, within)

    def donor(self, position: int, attempt: int) -> int:
        """The id of the sample that takes the place of an unreadable one at `position`; the same on every worker and resume."""
        word = int(key(self.seed, POSITION, np.array([position]))[0]) + attempt * int(GOLDEN)
        return int(_mix(np.array([word % 2**64], dtype=np.uint64))[0]) % self.samples

    def with_rounds(self, rounds: int) -> Order:
        """The same sizes under permutations of so many rounds."""
        return replace(self, rounds=rounds)

    def to_dict(self) -> dict[str, Any]:
        """The sizes by name, as JSON gives them back; `rounds` is recorded beside them."""
        return {name: value for name, value in asdict(self).items() if name != "rounds"}


def _window_of(positions: Ints, streams: int, window_samples: int) -> tuple[Ints, Ints]:
    """The window u that each global position is in, and its place there."""
    k, c = np.divmod(np.asarray(positions, dtype=np.int64), streams)
    i, offset = np.divmod(k, window_samples)
    return i * streams + c, offset


def _fit_windows(manifest: Manifest, global_batch: int, window: int) -> tuple[int, int]:
    """C and G: streams, and chunks in a window of up to `window`, which all together take WINDOWS_BYTES at most."""
    chunk_bytes = manifest.sample_bytes * manifest.chunk_samples
    chunks = manifest.samples // manifest.chunk_samples
    budget = max(1, min(chunks, int(WINDOWS_BYTES / chunk_bytes)))  # chunks that all streams may hold together
    streams = global_batch
    while streams * window > budget and streams % 2 == 0:
        streams //= 2
    if streams * window > budget:
        streams = max(c for c in range(1, streams + 1) if global_batch % c == 0 and (c * window <= budget or c == 1))
    return streams, min(window, max(1, budget // streams))


def slots(order: AnyOrder, global_batch: int, rank: int, world_size: int) -> Ints:
    """Slots (int64 (B / R,)) of the global batch that `rank` serves: a contiguous block, with the slots of a stream side by side.

    So a rank meets the same C / R streams at every step and no chunk is read by two ranks, whenever C or B divides the other and
    R divides C. The blocks of all ranks, one after the other, are the batch of a single rank.
    """
    s = np.arange(global_batch, dtype=np.int64)
    if global_batch % order.streams == 0:
        s = s.reshape(-1, order.streams).T.reshape(-1)
    share = global_batch // world_size
    return s[rank * share : (rank + 1) * share]


@dataclass(frozen=True)
class Mixture:
    """Several data sets in fixed proportions: whole windows are dealt to them, so any prefix of the stream keeps the proportions.

    Weights are whole numbers: (3, 1) is 75 % and 25 %. Each data set has an order and epochs of its own, and all of them agree in
    streams and windows. The ids are those of `mixture.join`: the chunks of all data sets, one data set after the other.
    """

    orders: tuple[Order, ...]
    weights: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.orders) != len(self.weights) or not self.orders or min(self.weights) < 1:
            raise ValueError(f"a mixture needs one positive whole weight per data set, got {self.weights}")
        if len({(order.streams, order.chunk_samples, order.window_chunks) for order in self.orders}) > 1:
            raise ValueError("the data sets of a mixture need equal streams and equal windows")

    @property
    def samples(self) -> int:
        """The number of ids, some of which stand for no sample."""
        return int(self._firsts[-1])

    @property
    def chunk_samples(self) -> int:
        return self.orders[0].chunk_samples

    @property
    def streams(self) -> int:
        return self.orders[0].streams

    @property
    def window_chunks(self) -> int:
        return self.orders[0].window_chunks

    @property
    def rounds(self) -> int:
        return self.orders[0].rounds

    @property
    def generation(self) -> int:
        """As `Order.generation`."""
        return self.orders[0].generation

    def with_rounds(self, rounds: int) -> Mixture:
        return replace(self, orders=tuple(order.with_rounds(rounds) for order in self.orders))

    def to_dict(self) -> dict[str, Any]:
        """The sizes that all have in common, and those of each."""
        orders = [order.to_dict() for order in self.orders]
        return {**orders[0], "samples": self.samples, "orders": orders, "weights": list(self.weights)}

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """As `Order.locate`; the epochs are those of the data set that the sample is from."""
        data_set, epoch, ids = self.place(positions)
        return epoch, ids + self._firsts[data_set]

    def donor(self, position: int, attempt: int) -> int:
        """From the data set that the unreadable sample is from."""
        data_set = int(self.place(np.array([position]))[0][0])
        return self.orders[data_set].donor(position, attempt) + int(self._firsts[data_set])

    @property
    def _firsts(self) -> Ints:
        """(data sets + 1,) the first id of each data set."""
        return np.cumsum(
            [0] + [-(-order.samples // self.chunk_samples) * self.chunk_samples for order in self.orders], dtype=np.int64
        )

    def place(self, positions: Ints) -> tuple[Ints, Ints, Ints]:
        """Data set, its epoch and the sample id in it (int64, the shape of `positions`) at the given global positions."""
        first = self.orders[0]
        u, offset = _window_of(positions, first.streams, first.window_samples)
        data_set, window = deal(u, self.weights)
        epoch, ids = np.empty_like(window), np.empty_like(window)
        for number, order in enumerate(self.orders):
            mine = data_set == number
            epoch[mine], ids[mine] = order.in_window(window[mine], offset[mine])
        return data_set, epoch, ids


AnyOrder: TypeAlias = Order | Mixture


def choose_order(manifest: Manifest, global_batch: int, seed: int) -> AnyOrder:
    """An order whose windows take 256 MiB at most over all workers, for 100 samples as for 10^10.

    A small data set is one window with every sample exactly once per epoch. Otherwise C = B, halved while the windows of all
    streams are more than the data set holds or those bytes; then G shrinks. Of a mixture no window is larger than the smallest
    data set. Neither the world size nor the memory of a worker may change what a run trains on.
    """
    samples, q = manifest.samples, manifest.chunk_samples
    if manifest.parts:
        most = min(WINDOW_CHUNKS, *(part.samples // q for part in manifest.parts))
        streams, window = _fit_windows(manifest, global_batch, most)
        orders = tuple(Order(part.samples, q, streams, window, seed + number) for number, part in enumerate(manifest.parts))
        return Mixture(orders, tuple(part.weight for part in manifest.parts))
    if manifest.bytes <= WHOLE_BYTES:
        return Order(samples, q, 1, samples // q, seed)
    return Order(samples, q, *_fit_windows(manifest, global_batch, min(WINDOW_CHUNKS, samples // q)), seed)


def deal(u: Ints, weights: tuple[int, ...]) -> tuple[Ints, Ints]:
    """The data set that takes the u-th window, and how many windows it has taken before.

    Two parts share n windows as round(n a / (a + b)) and the rest, which is exact in every period and never more than half a
    window off; more data sets are halved again and again, so each is at most log2(data sets) / 2 windows off at any prefix.
    """
    if len(weights) == 1:
        return np.zeros_like(u), u
    half = len(weights) // 2
    left, total = sum(weights[:half]), sum(weights)
    before = (u * left + total // 2) // total
    takes = ((u + 1) * left + total // 2) // total > before
    ours, theirs = deal(before, weights[:half]), deal(u - before, weights[half:])
    return np.where(takes, ours[0], half + theirs[0]), np.where(takes, ours[1], theirs[1])


def permute(x: Ints, size: int, keys: Words, rounds: int = ROUNDS) -> Ints:
    """The image of each x in [0, size) under the bijection of [0, size) that its key names. Shapes of x and keys broadcast."""
    if size == 1:
        return np.zeros(np.broadcast(x, keys).shape, dtype=np.int64)
    bits = max(MIN_BITS, (size - 1).bit_length())
    value, word = np.broadcast_arrays(np.asarray(x).astype(np.uint64), keys)
    value = _feistel(value, bits, word, rounds)
    outside = np.nonzero(value >= size)
    while outside[0].size:  # cycle walking: follow the larger bijection until it comes back inside
        value[outside] = _feistel(value[outside], bits, word[outside], rounds)
        outside = tuple(axis[value[outside] >= size] for axis in outside)
    return value.astype(np.int64)


def _feistel(x: Words, bits: int, keys: Words, rounds: int) -> Words:
    """A keyed bijection of [0, 2^bits). The halves swap every round and may differ by one bit in width; `rounds` is even."""
    low_bits, high_bits = bits // 2, bits - bits // 2
    high, low = x >> np.uint64(low_bits), x & np.uint64(2**low_bits - 1)
    for round_ in range(rounds):
        mask = np.uint64(2**high_bits - 1)
        high, low = low, (high ^ _mix(_mix(keys + np.uint64(round_)) ^ low)) & mask
        low_bits, high_bits = high_bits, low_bits
    return (high << np.uint64(low_bits)) | low


def _mix(z: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014), a bijection in which every bit depends on every bit."""
    z = z + GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def key(seed: int, purpose: int, ordinal: Ints) -> Words:
    """One 64-bit key per ordinal: the number of an epoch, a window, a position or a block, as `purpose` says."""
    root = _mix(np.array([seed % 2**64], dtype=np.uint64)) + np.uint64(purpose)
    return _mix(_mix(root) ^ np.asarray(ordinal).astype(np.uint64))
