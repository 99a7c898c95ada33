"""Tests of order.py: everything it promises is countable."""

import itertools
import json

import numpy as np
import pytest

from freeguide.data_pipeline.manifest import Manifest, Schema, Shard
from freeguide.data_pipeline.order import Mixture, Order, choose_order, deal, key, permute, slots


def manifest(samples: int, sample_bytes: int, q: int) -> Manifest:
    empty = np.zeros(-(-samples // q), np.uint32)
    return Manifest(Schema(8, 3, 10), (Shard("a", samples * sample_bytes, "", samples),), q, empty, empty)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100, 1797, 4096, 65537])
def test_permute_is_a_bijection_for_every_key(size: int) -> None:
    for epoch in range(3):
        image = permute(np.arange(size), size, key(7, 0, np.array([epoch])))
        assert np.array_equal(np.sort(image), np.arange(size))


def test_permute_of_a_huge_domain_stays_inside_and_has_no_collision() -> None:
    size = 10**10
    x = np.random.default_rng(0).choice(size, 200_000, replace=False)
    image = permute(x, size, key(0, 0, np.zeros(1, np.int64)))
    assert image.min() >= 0
    assert image.max() < size
    assert len(np.unique(image)) == len(np.unique(x))


@pytest.mark.parametrize("size", [10, 64, 1000])
def test_permutations_over_many_keys_send_every_place_everywhere_equally_often(size: int) -> None:
    """Chi-square of the image of one place over 20 000 keys against uniform: within 5 standard deviations of its mean."""
    keys = key(3, 1, np.arange(20_000))
    for x in (0, 1, size - 1):
        counts = np.bincount(permute(np.full(20_000, x), size, keys), minlength=size)
        expected = 20_000 / size
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi2 - (size - 1)) < 5 * np.sqrt(2 * (size - 1))


def test_neighbouring_places_do_not_stay_neighbours() -> None:
    """Over random permutations the distance of two images has mean size / 3 (+- 5 standard errors of 20 000 draws)."""
    size, keys = 1000, key(3, 1, np.arange(20_000))
    distance = np.abs(permute(np.full(20_000, 0), size, keys) - permute(np.full(20_000, 1), size, keys))
    assert abs(distance.mean() - (size + 1) / 3) < 5 * size * np.sqrt(1 / 18) / np.sqrt(20_000)


@pytest.mark.parametrize(
    ("samples", "q", "streams", "window"),
    [(1797, 1, 1, 1797), (96, 4, 2, 3), (1000, 8, 4, 5), (999, 8, 3, 4), (4096, 16, 32, 8), (103, 7, 5, 2)],
)
def test_every_epoch_serves_each_sample_at_most_once_and_all_but_the_remainder(
    samples: int, q: int, streams: int, window: int
) -> None:
    order = Order(samples, q, streams, window, seed=5)
    windows = order.chunks // window
    # All streams end an epoch together after as many generations as it takes for the windows to come out even.
    positions = np.arange(order.generation * windows)
    epochs, ids = order.locate(positions)
    assert ids.min() >= 0
    assert ids.max() < samples
    assert np.array_equal(np.unique(epochs), np.arange(streams))
    for epoch in range(streams):
        seen = ids[epochs == epoch]
        assert len(seen) == len(np.unique(seen)) == order.epoch_samples
    left_out = samples - order.epoch_samples
    assert left_out == samples % q + (samples // q) % window * q


def test_a_single_window_of_single_samples_leaves_nothing_out() -> None:
    order = choose_order(manifest(1797, 2080, 1), 256, seed=0)
    assert (order.streams, order.window_chunks) == (1, 1797)
    epochs, ids = order.locate(np.arange(3 * 1797))
    for epoch in range(3):
        assert np.array_equal(np.sort(ids[epochs == epoch]), np.arange(1797))
    assert not np.array_equal(ids[:1797], ids[1797:3594])


def test_what_is_left_out_changes_with_the_epoch() -> None:
    order = Order(samples=50, chunk_samples=8, streams=1, window_chunks=1, seed=0)
    ids = order.locate(np.arange(order.epoch_samples * 10))[1]
    counts = np.bincount(ids, minlength=50)
    assert np.array_equal(counts[:40], np.full(40, 10))  # all chunks but the last
    assert np.array_equal(counts[40:], np.full(10, 8))  # the last 10 samples share 8 places, each left out equally often


def test_locate_is_a_function_of_the_position_alone() -> None:
    order = Order(10**7, 32, 256, 8, seed=1)
    positions = np.random.default_rng(0).integers(0, 10**12, 2000)
    together = order.locate(positions)
    for i in range(0, 2000, 400):
        alone = order.locate(positions[i : i + 1])
        assert (alone[0][0], alone[1][0]) == (together[0][i], together[1][i])


def test_the_seed_changes_the_order() -> None:
    a, b = (Order(10_000, 4, 8, 8, seed).locate(np.arange(1000))[1] for seed in (0, 1))
    assert (a != b).mean() > 0.9


@pytest.mark.parametrize("size", [60, 256, 1797, 60_000])
def test_as_many_neighbours_stay_together_as_in_random_permutations(size: int) -> None:
    """Of the size - 1 pairs (i, i + 1), a random permutation leaves 2 (size - 1) / size side by side on average, nearly Poisson.

    Within 4 standard errors over so many permutations that four rounds are 5 and more away.
    """
    permutations = max(80, 800_000 // size)
    images = permute(np.arange(size), size, key(1, 0, np.arange(permutations))[:, None])
    together = (np.abs(np.diff(images, axis=1)) == 1).sum(axis=1)
    expected = 2 * (size - 1) / size
    assert abs(together.mean() - expected) < 4 * np.sqrt(expected / permutations)


def test_the_order_is_pinned() -> None:
    """Runs store the order's parameters, not the order: a change of these numbers would silently break every resume."""
    assert Order(1000, 4, 4, 5, seed=42).locate(np.arange(8))[1].tolist() == PINNED
    first = Order(1000, 4, 4, 5, seed=42, rounds=4)
    assert first.locate(np.arange(8))[1].tolist() == PINNED_FOUR_ROUNDS
    assert Mixture((first,), (1,)).locate(np.arange(8))[1].tolist() == PINNED_FOUR_ROUNDS


PINNED = [349, 792, 283, 720, 613, 13, 69, 156]
PINNED_FOUR_ROUNDS = [653, 76, 107, 932, 387, 389, 276, 936]


def test_an_order_is_recorded_by_its_sizes_and_keeps_its_rounds() -> None:
    order = Order(1000, 4, 4, 5, seed=42)
    assert order.to_dict() == {"samples": 1000, "chunk_samples": 4, "streams": 4, "window_chunks": 5, "seed": 42}
    mixture = Mixture((order, order), (1, 2))
    stored = json.dumps(mixture.to_dict())
    assert json.loads(stored) == mixture.to_dict()  # what a checkpoint says is compared with it
    assert "rounds" not in stored
    old = mixture.with_rounds(4)
    assert [old.rounds, *(order.rounds for order in old.orders)] == [4, 4, 4]
    assert old.to_dict() == mixture.to_dict()


@pytest.mark.parametrize("streams", [1, 2, 6, 12, 24, 48, 5])
def test_the_slots_of_all_ranks_are_the_batch(streams: int) -> None:
    order = Order(10_000, 1, streams, 8, 0)
    whole = slots(order, 24, 0, 1)
    assert np.array_equal(np.sort(whole), np.arange(24))
    for world in (2, 3, 4, 6, 8, 12):
        assert np.array_equal(np.concatenate([slots(order, 24, rank, world) for rank in range(world)]), whole)


@pytest.mark.parametrize("streams", [12, 24, 48])
def test_a_rank_always_meets_the_same_share_of_the_streams(streams: int) -> None:
    order = Order(10_000, 1, streams, 8, 0)
    for world in (1, 2, 3, 4, 6):
        met = [
            {int(c) for step in range(8) for c in (step * 24 + slots(order, 24, rank, world)) % streams} for rank in range(world)
        ]
        assert sorted(itertools.chain(*met)) == list(range(streams))


@pytest.mark.parametrize(
    ("samples", "size", "batch"), [(100, 1000, 64), (10**5, 10**5, 256), (1_281_167, 10_000, 2048), (10**10, 10**5, 4096)]
)
def test_choose_keeps_the_windows_of_all_streams_within_256_mib(samples: int, size: int, batch: int) -> None:
    from freeguide.data_pipeline.manifest import choose_chunk

    q = choose_chunk(samples, samples * size)
    order = choose_order(manifest(samples, size, q), batch, seed=0)
    assert order.generation * size <= 256 * 2**20
    assert batch % order.streams == 0
    assert order.window_chunks == 8 or order.streams == 1
    assert q * size <= 4 * 2**20


def test_donors_differ_by_attempt_and_stay_the_same() -> None:
    order = Order(1000, 1, 4, 8, seed=3)
    donors = [order.donor(77, attempt) for attempt in range(8)]
    assert donors == [order.donor(77, attempt) for attempt in range(8)]
    assert len(set(donors)) > 4
    assert all(0 <= donor < 1000 for donor in donors)


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 2, 3), (5, 1, 1, 1, 7), (1000, 1), (2, 3, 5, 7, 11, 13, 17, 19)])
def test_a_mixture_keeps_its_proportions_at_every_prefix(weights: tuple[int, ...]) -> None:
    total = sum(weights)
    data_set, before = deal(np.arange(4 * total), weights)
    for number, weight in enumerate(weights):
        mine = data_set == number
        assert np.array_equal(before[mine], np.arange(4 * weight))  # each takes its windows one after the other
        share = np.cumsum(mine) - np.arange(1, 4 * total + 1) * weight / total
        assert np.abs(share).max() <= np.ceil(np.log2(len(weights))) / 2 + 1e-9


def test_each_data_set_of_a_mixture_keeps_its_own_epochs() -> None:
    orders = (Order(98, 4, 4, 3, seed=0), Order(600, 4, 4, 3, seed=1))
    mixture = Mixture(orders, (1, 2))
    data_set, epoch, ids = mixture.place(np.arange(12 * 8 * 3 * 20))
    assert abs((data_set == 0).mean() - 1 / 3) < 0.01
    for number, order in enumerate(orders):
        for e in range(3):
            seen = ids[(data_set == number) & (epoch == e)]
            assert len(seen) == len(np.unique(seen)) == order.epoch_samples
    joined = mixture.locate(np.arange(12 * 8 * 3 * 20))
    assert np.array_equal(joined[0], epoch)
    assert np.array_equal(joined[1], ids + np.where(data_set == 0, 0, 100))  # 98 samples in 25 chunks of 4
    assert mixture.samples == 700
    donors = [mixture.donor(position, attempt) for position in range(40) for attempt in range(4)]
    assert [donor >= 100 for donor in donors] == np.repeat(data_set[:40] == 1, 4).tolist()


def test_a_mixture_of_one_is_that_order() -> None:
    order = Order(1000, 4, 8, 5, seed=3)
    positions = np.arange(5000)
    assert np.array_equal(Mixture((order,), (7,)).locate(positions), order.locate(positions))


def test_mixtures_that_do_not_fit_are_refused() -> None:
    a, b = Order(96, 4, 4, 3, 0), Order(96, 4, 4, 2, 0)
    for orders, weights in (((a, b), (1, 1)), ((a, a), (1,)), ((a, a), (1, 0)), ((), ())):
        with pytest.raises(ValueError, match="mixture"):
            Mixture(orders, weights)
