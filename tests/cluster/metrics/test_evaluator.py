"""The evaluator: accurate on real digits, the same bits from the same seed, honest about what it held out."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from freeguide.cluster.evaluation.extractors import evaluator as module
from freeguide.cluster.evaluation.extractors.evaluator import (
    FEATURES,
    HELD_OUT,
    HELD_OUT_SEED,
    TURNS,
    Evaluator,
    Network,
    fit_evaluator,
    fit_rotations,
    from_bytes,
    turned,
)
from freeguide.cluster.evaluation.reference import Statistics
from freeguide.cluster.evaluation.statistics.fid import fid
from freeguide.cluster.evaluation.statistics.inception_score import inception_score
from freeguide.cluster.evaluation.statistics.moments import from_features
from freeguide.configs.errors import DataError
from freeguide.data_pipeline.artifact import read_safetensors, to_safetensors


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Of a small network, two threads on a full machine wait for each other longer than one computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = load_digits(return_X_y=True)
    return np.rint(pixels.reshape(-1, 8, 8, 1) / 16 * 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def evaluator(digits) -> Evaluator:
    return fit_evaluator(*digits, classes=10, epochs=10, seed=0, name="digits")


def _held_out(n: int) -> np.ndarray:
    return torch.randperm(n, generator=torch.Generator().manual_seed(HELD_OUT_SEED))[: n // HELD_OUT].numpy()


def _noise(n: int, size: int, channels: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, size=(n, size, size, channels), dtype=np.uint8), np.arange(n) % classes


def test_ten_epochs_on_digits_reach_96_percent_on_images_not_trained_on(digits, evaluator):
    images, labels = digits
    held_out = _held_out(len(images))
    _, probabilities = evaluator.features(images[held_out])
    assert evaluator.accuracy == np.mean(probabilities.argmax(axis=1) == labels[held_out])
    assert evaluator.accuracy >= 0.96


def test_held_out_images_leave_no_trace_in_the_weights(digits):
    images, labels = digits[0][:200], digits[1][:200]
    spoiled = images.copy()
    spoiled[_held_out(200)] = 255 - spoiled[_held_out(200)]
    assert not np.array_equal(spoiled, images)
    first = fit_evaluator(images, labels, 10, epochs=1, name="digits")
    assert fit_evaluator(spoiled, labels, 10, epochs=1, name="digits").hash == first.hash


def test_real_digits_score_nearly_ten(digits, evaluator):
    score = inception_score(evaluator.features(digits[0])[1])
    assert 9.5 < score.mean <= 10.0


def test_features_have_full_rank(digits, evaluator):
    features, _ = evaluator.features(digits[0])
    eigenvalues = np.linalg.eigvalsh(np.cov(features.astype(np.float64), rowvar=False))
    assert eigenvalues[0] > 1e-6 * eigenvalues[-1]


def test_the_seed_fixes_the_weights_and_the_global_random_state_is_left_alone(digits):
    images, labels = digits[0][:300], digits[1][:300]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = fit_evaluator(images, labels, 10, epochs=2, seed=5, name="digits")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = fit_evaluator(images, labels, 10, epochs=2, seed=5, name="digits")
    other = fit_evaluator(images, labels, 10, epochs=2, seed=6, name="digits")
    assert again.to_bytes() == first.to_bytes()
    assert again.hash == first.hash != other.hash


def test_bytes_round_trip_to_the_same_features_and_hash(digits, evaluator):
    data = evaluator.to_bytes()
    again = from_bytes(data)
    assert again.hash == evaluator.hash
    assert again.to_bytes() == data == evaluator.to_bytes()
    facts = ("name", "size", "channels", "classes", "epochs", "seed", "accuracy")
    assert [getattr(again, fact) for fact in facts] == [getattr(evaluator, fact) for fact in facts]
    for mine, theirs in zip(again.features(digits[0][:100]), evaluator.features(digits[0][:100]), strict=True):
        assert np.array_equal(mine, theirs)


def test_every_image_is_measured_whatever_the_batch(digits, evaluator):
    features, probabilities = evaluator.features(digits[0][:130], batch=64)
    assert features.shape == (130, FEATURES)
    assert probabilities.shape == (130, 10)
    assert features.dtype == probabilities.dtype == np.float32
    whole = evaluator.features(digits[0][:130])
    # Another batch size may choose another convolution kernel: float32 rounding of sums of a few hundred terms.
    np.testing.assert_allclose(features, whole[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize(("size", "channels"), [(8, 3), (14, 1), (28, 1), (33, 3), (64, 3)])
def test_any_size_from_8_to_64_and_one_or_three_channels(size, channels):
    images, labels = _noise(20, size, channels, 3)
    fitted = fit_evaluator(images, labels, 3, epochs=1, name="noise")
    features, probabilities = from_bytes(fitted.to_bytes()).features(images)
    assert features.shape == (20, FEATURES)
    assert probabilities.shape == (20, 3)
    assert np.isfinite(features).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((20, 8, 9, 1), np.uint8)}, "square images"),
        ({"images": np.zeros((20, 8, 8, 1), np.float32)}, "square images"),
        ({"images": np.zeros((20, 7, 7, 1), np.uint8)}, "not 7 pixels"),
        ({"images": np.zeros((20, 8, 8, 2), np.uint8)}, "not 8 pixels, 2 channels"),
        ({"classes": 1}, "and 1 classes"),
        ({"classes": 2}, "labels 0 to 2 do not fit 2 classes"),
        ({"labels": np.zeros(19, np.int64)}, "20 images need as many"),
        ({"epochs": 0}, "one epoch or more"),
        ({"name": "Inception-v3"}, "cannot name an evaluator"),
        ({"name": "a/b"}, "cannot name an evaluator"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(change, message):
    images, labels = _noise(20, 8, 1, 3)
    arguments = {"images": images, "labels": labels, "classes": 3, "epochs": 1, "name": "noise"} | change
    with pytest.raises(DataError, match=message):
        fit_evaluator(**arguments)


def test_images_of_another_size_are_refused(evaluator):
    with pytest.raises(DataError, match=r"'digits' measures uint8 \(N, 8, 8, 1\), not uint8 \(2, 16, 16, 1\)"):
        evaluator.features(np.zeros((2, 16, 16, 1), np.uint8))


def test_damaged_files_are_refused_by_name(evaluator):
    data = evaluator.to_bytes()
    for broken in (b"", b"12345678" * 4, data[:-10], data.replace(b"embedding.weight", b"embedding.weighs")):
        with pytest.raises(
            DataError, match=r"store/evaluator.safetensors is (not an evaluator \(|damaged \(its checksum does not fit\))"
        ):
            from_bytes(broken, "store/evaluator.safetensors")


def test_labels_are_learned_in_the_order_that_is_fixed_for_good(digits):
    """The evaluators that stand beside people's data: spelled out, step by step, they have the very same weights."""
    images, labels = digits[0][:300], digits[1][:300]
    order = torch.randperm(300, generator=torch.Generator().manual_seed(HELD_OUT_SEED))[60:].numpy()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = Network(8, 1, 10)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=2)
    generator = torch.Generator().manual_seed(5)
    network.train()
    for _ in range(2):
        rows = order[torch.randperm(240, generator=generator).numpy()][:128]
        logits = network(torch.from_numpy(images[rows].astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1.0)[1]
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[rows].astype(np.int64))).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    found = fit_evaluator(images, labels, 10, epochs=2, seed=5, name="digits")
    assert replace(found, network=network.eval()).hash == found.hash
    facts = read_safetensors(found.to_bytes(), "x", "evaluator", "an evaluator")[1]
    assert set(facts) == {"name", "size", "channels", "classes", "epochs", "seed", "accuracy"}


# --- without labels ---


@pytest.fixture(scope="module")
def halves(digits) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two disjoint halves of the digits."""
    order = np.random.default_rng(0).permutation(len(digits[0]))
    return order[:898], order[898:1796]


@pytest.fixture(scope="module")
def turner(digits, halves) -> Evaluator:
    """It has seen the first half of the digits, and no label."""
    return fit_rotations(digits[0][halves[0]], epochs=3, seed=0, name="digits-rotations")


def test_pictures_are_turned_by_quarters_and_nothing_else():
    image = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    expected = [[[0, 1], [2, 3]], [[1, 3], [0, 2]], [[3, 2], [1, 0]], [[2, 0], [3, 1]]]
    assert turned(image)[..., 0].tolist() == expected
    two = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), np.uint8)
    assert np.array_equal(turned(two)[::2], turned(two[:1]))
    assert np.array_equal(turned(turned(two)[6:])[2:4], two)


def test_turned_digits_that_were_held_out_are_told_and_no_score_is_made_of_it(digits, halves, turner):
    images = digits[0][halves[0]]
    held_out = images[_held_out(len(images))]
    told = turner.features(turned(held_out))[1].argmax(axis=1)
    assert turner.accuracy == np.mean(told == np.repeat(np.arange(TURNS), len(held_out)))
    assert turner.accuracy > 0.8
    measured = turner.measure(images[:10])
    assert np.array_equal(measured.features, turner.features(images[:10])[0])
    assert (measured.probabilities, turner.has_classes) == (None, False)


def test_what_was_learned_is_said_by_the_file_and_not_by_the_name(digits, turner):
    data = replace(turner, name="digits").to_bytes()
    again = from_bytes(data)
    assert (again.name, again.rotations, again.hash, again.accuracy) == ("digits", True, turner.hash, turner.accuracy)
    assert again.to_bytes() == data
    labelled = fit_evaluator(digits[0][:100], digits[1][:100] % 4, 4, epochs=1, name="digits-rotations")
    assert not from_bytes(labelled.to_bytes()).rotations
    for facts in ({"learned": "colours"}, {"learned": "rotations", "classes": 5}, {"learned": [{}]}):
        tensors, known = read_safetensors(data, "x", "evaluator", "an evaluator")
        with pytest.raises(DataError, match=r"x is not an evaluator \(it learned "):
            from_bytes(to_safetensors(tensors, "evaluator", known | facts), "x")


def test_a_picture_is_held_out_in_all_its_turns(digits):
    images = digits[0][:200]
    spoiled = images.copy()
    spoiled[_held_out(200)] = 255 - spoiled[_held_out(200)]
    first = fit_rotations(images, epochs=1, name="digits")
    assert fit_rotations(spoiled, epochs=1, name="digits").hash == first.hash
    kept = images.copy()
    kept[np.setdiff1d(np.arange(200), _held_out(200))[0]] = 0
    assert fit_rotations(kept, epochs=1, name="digits").hash != first.hash


def test_the_seed_fixes_what_is_learned_of_turns_too(digits):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (fit_rotations(digits[0][:100], epochs=2, seed=seed, name="digits") for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert again.to_bytes() == first.to_bytes()
    assert again.hash == first.hash != other.hash


def test_only_what_a_step_needs_is_turned(digits, monkeypatch):
    """All turns of all pictures at once would be four times the memory that the data may take."""
    seen = []
    monkeypatch.setattr(module, "turned", lambda images: seen.append(len(images)) or turned(images))
    fit_rotations(digits[0], epochs=1, name="digits")
    assert max(seen) * TURNS <= module.AT_A_TIME
    assert sum(seen) >= len(digits[0]) - module.BATCH


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((20, 8, 9, 1), np.uint8)}, "square images"),
        (
            {"images": np.zeros((20, 65, 65, 1), np.uint8)},
            r"takes 8 to 64 pixels per side, 1 or 3 channels, not 65 pixels, 1 channels;",
        ),
        ({"images": np.zeros((9, 8, 8, 1), np.uint8)}, "9 images are too few"),
        ({"epochs": 0}, "one epoch or more"),
        ({"name": "a b-rotations"}, "cannot name an evaluator; .*evaluate.dataset"),
    ],
)
def test_what_cannot_be_turned_and_learned_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        fit_rotations(**{"images": _noise(20, 8, 1, 1)[0], "epochs": 1, "name": "noise"} | change)


def test_distances_without_labels_rise_with_noise_and_are_small_between_halves(digits, halves, turner):
    """Their order is known beforehand: FID of real digits is least, each more noise is worse, and so are missing digits."""
    seen, unseen = (digits[0][rows] for rows in halves)

    def measured(images: np.ndarray) -> Statistics:
        moments = from_features(turner.measure(images).features)
        return Statistics(moments.mean, moments.covariance, moments.n)

    real = measured(seen)
    spread = float(np.trace(real.covariance))
    noise = np.random.default_rng(1).normal(size=unseen.shape)
    noisy = [np.clip(np.rint(unseen + sigma * noise), 0, 255).astype(np.uint8) for sigma in (0, 4, 8, 16, 32, 64, 128)]
    distances = [fid(from_features(turner.measure(images).features), real) for images in noisy]
    assert distances == sorted(set(distances))
    assert distances[0] < 0.02 * spread
    assert distances[-1] > 100 * distances[0]
    some = unseen[digits[1][halves[1]] < 5]
    few, as_many = (fid(from_features(turner.measure(images).features), real) for images in (some, unseen[: len(some)]))
    assert few > 3 * as_many
