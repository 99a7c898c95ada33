"""The counter-based generator: published known answers, independence from the layout, and the laws of what it draws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freeguide.trainer.diffusion.randomness import Purpose, bits, integers, keep_mask, mask_keys, normal, philox, uniform

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
KNOWN_ANSWERS = [  # Random123, tests/kat_vectors: philox4x32 10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI[:4], PI[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter, key, answer):
    words = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == answer


def test_bits_lay_seed_index_purpose_and_stream_into_key_and_counter():
    seed, index, stream = (7 << 32) | 5, (3 << 32) | 2, 9
    words = bits(seed, Purpose.SAMPLE_STEP, torch.tensor([index]), (5,), stream)
    for block in (0, 1):
        counter = (block, 2, 3, Purpose.SAMPLE_STEP + 256 * stream)
        expected = [int(w) for w in philox(tuple(torch.tensor([c]) for c in counter), (5, 7))]
        found = words[0, 4 * block : 4 * block + 4].tolist()
        assert found == expected[: len(found)]


def test_purposes_keep_their_numbers():
    assert {p.name: p.value for p in Purpose} == {
        "TRAIN_NOISE": 0,
        "TRAIN_LOGSNR": 1,
        "TRAIN_DROP_CONDITION": 2,
        "TRAIN_FLIP": 3,
        "DROPOUT": 4,
        "SAMPLE_PRIOR": 5,
        "SAMPLE_STEP": 6,
        "SAMPLE_LABEL": 7,
    }


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    start=st.integers(0, 2**62),
    batch=st.integers(1, 9),
    shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    stream=st.integers(0, 2**24 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_an_example_gets_the_same_bits_alone_and_in_any_batch(seed, start, batch, shape, stream, dtype):
    index = start + torch.arange(batch)
    draws = [
        lambda i: bits(seed, Purpose.TRAIN_NOISE, i, shape, stream),
        lambda i: uniform(seed, Purpose.TRAIN_NOISE, i, shape, stream, dtype),
        lambda i: normal(seed, Purpose.TRAIN_NOISE, i, shape, stream, torch.float32),
        lambda i: integers(seed, Purpose.TRAIN_NOISE, i, 1000, shape, stream),
        lambda i: keep_mask(seed, i, shape, 0.3, stream),
    ]
    for draw in draws:
        whole = draw(index)
        assert whole.shape == (batch, *shape)
        assert torch.equal(whole, torch.cat([draw(index[i : i + 1]) for i in range(batch)]))
        assert torch.equal(whole.flip(0), draw(index.flip(0)))


def test_a_longer_example_begins_with_the_shorter_ones_numbers():
    index = torch.arange(3)
    for draw in (bits, uniform, normal):
        assert torch.equal(draw(1, Purpose.TRAIN_NOISE, index, (23,))[:, :6], draw(1, Purpose.TRAIN_NOISE, index, (6,)))


def test_float32_draws_are_the_float64_draws_rounded():
    index = torch.arange(1000)
    wide = normal(3, Purpose.SAMPLE_PRIOR, index, (64,), dtype=torch.float64)
    assert torch.equal(normal(3, Purpose.SAMPLE_PRIOR, index, (64,)), wide.float())
    wide = uniform(3, Purpose.SAMPLE_PRIOR, index, (64,), dtype=torch.float64)
    assert torch.equal(uniform(3, Purpose.SAMPLE_PRIOR, index, (64,)), wide.float().clamp(max=1 - 2.0**-24))


def test_uniform_is_open_at_both_ends_for_every_word(monkeypatch):
    extremes = torch.tensor([[0, 2**32 - 1, 2**32 - 64, 2**32 - 200]])
    monkeypatch.setattr("freeguide.trainer.diffusion.randomness.bits", lambda *_: extremes)
    for dtype in (torch.float32, torch.float64):
        value = uniform(0, Purpose.TRAIN_LOGSNR, torch.tensor([0]), (4,), dtype=dtype)
        assert (value > 0).all()
        assert (value < 1).all()


def test_seeds_purposes_indices_and_streams_never_share_words():
    index = torch.tensor([0, 1, 1 << 32, 1 << 40])
    seen = [
        bits(seed, purpose, index, (64,), stream).flatten()
        for seed in (0, 1, 1 << 32)
        for purpose in (Purpose.TRAIN_NOISE, Purpose.SAMPLE_STEP)
        for stream in (0, 1, 2**24 - 1)
    ]
    words = torch.cat(seen)
    # 4608 words out of 2**32: 0.0025 chance collisions expected, and these draws are fixed.
    assert words.unique().numel() == words.numel()


def test_normal_has_the_moments_and_the_law_of_a_standard_normal():
    n = normal(11, Purpose.TRAIN_NOISE, torch.arange(400), (1000,), dtype=torch.float64).flatten()
    count = n.numel()
    # Standard errors of the first four moments of a standard normal; 4.5 of them allow for four looks at fixed draws.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((n**power).mean() - moment) < 4.5 * math.sqrt(variance / count)
    rank = (torch.arange(count) + 0.5) / count
    distance = (torch.special.ndtr(n.sort().values) - rank).abs().max()
    assert distance < 1.63 / math.sqrt(count)  # Kolmogorov-Smirnov at the 1 % level


def test_neighbours_in_element_index_and_stream_are_uncorrelated():
    index = torch.arange(500)
    n = torch.stack([normal(5, Purpose.SAMPLE_STEP, index, (400,), stream=s, dtype=torch.float64) for s in (0, 1)])
    for a, b in ((n[:, :, 1:], n[:, :, :-1]), (n[:, 1:], n[:, :-1]), (n[1:], n[:-1])):
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())  # 4 standard errors


def test_integers_are_even_and_in_range():
    draws = integers(2, Purpose.SAMPLE_LABEL, torch.arange(200_000), 10)
    counts = torch.bincount(draws, minlength=10)
    assert counts.numel() == 10
    assert (counts - 20_000).abs().max() < 4 * math.sqrt(200_000 * 0.1 * 0.9)  # 4 standard errors


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_keep_mask_keeps_a_share_of_one_minus_p(p):
    mask = keep_mask(4, torch.arange(100), (3, 33, 33), p, stream=17)
    share = mask.double().mean()
    assert abs(share - (1 - p)) <= 4 * math.sqrt(p * (1 - p) / mask.numel())  # 4 standard errors; exact at 0 and 1


def test_keep_masks_of_examples_and_layers_are_independent():
    first = keep_mask(4, torch.arange(64), (4096,), 0.5, stream=0).double() * 2 - 1
    second = keep_mask(4, torch.arange(64), (4096,), 0.5, stream=1).double() * 2 - 1
    signs = torch.cat((first, second))
    pairs = signs @ signs.T / 4096
    pairs.fill_diagonal_(0)
    assert pairs.abs().max() < 5.5 / 64  # 8128 pairs: the largest of as many normals of deviation 1/64 is near 3.9
    shifts = torch.stack([(signs * signs.roll(k, 1)).mean() for k in (1, 2, 4, 16, 64, 1024)])
    assert shifts.abs().max() < 4 / math.sqrt(signs.numel())


def test_keys_of_many_streams_at_once_are_those_of_each():
    index = torch.tensor([0, 5, 2**33 + 1])
    keys = mask_keys(2**40 + 3, index, 9)
    for stream in range(9):
        alone = keep_mask(2**40 + 3, index, (4, 5), 0.5, stream)
        assert torch.equal(keep_mask(2**40 + 3, index, (4, 5), 0.5, stream, keys[:, stream]), alone)
        words = bits(2**40 + 3, Purpose.DROPOUT, index, (2,), stream)
        assert torch.equal(keys[:, stream].long() % 2**32, words)


def test_keep_masks_need_both_key_words_to_agree(monkeypatch):
    """One equal 32-bit word is common among the keys of many examples and layers; it must not repeat a mask, not even permuted."""
    monkeypatch.setattr(
        "freeguide.trainer.diffusion.randomness.bits", lambda *_: torch.tensor([[5, 1], [5, 2], [5, 2**31], [7, 1]])
    )
    masks = keep_mask(0, torch.arange(4), (4096,), 0.5)
    first, others = masks[0].double() * 2 - 1, masks[1:3].double() * 2 - 1
    assert (others @ first).abs().max() / 4096 < 4 / 64  # 4 standard errors of a correlation
    assert (masks.sum(1) - 2048).abs().max() < 4 * 32  # 4 standard errors of a count
    assert torch.equal(masks[3].reshape(-1, 4)[:, [2, 3, 0, 1]].flatten(), masks[0])  # equal second words: 5 and 7 permute by xor 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda i: bits(-1, Purpose.DROPOUT, i, ()), "seed is -1"),
        (lambda i: bits(2**64, Purpose.DROPOUT, i, ()), "seed is"),
        (lambda i: bits(0, Purpose.DROPOUT, i, (), stream=2**24), "stream is"),
        (lambda i: bits(0, Purpose.DROPOUT, i.int(), ()), "vector of int64"),
        (lambda i: bits(0, Purpose.DROPOUT, i[:, None], ()), "vector of int64"),
        (lambda i: normal(0, Purpose.DROPOUT, i, (), dtype=torch.bfloat16), "dtype is torch.bfloat16"),
        (lambda i: keep_mask(0, i, (2,), 1.5), "p is 1.5"),
        (lambda i: integers(0, Purpose.SAMPLE_LABEL, i, 0), "high is 0"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.arange(2))
