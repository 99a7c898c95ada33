"""The evaluator: accurate on real digits, the same bits from the same seed, honest about what it held out."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from cluster.metrics.evaluator import FEATURES, HELD_OUT, HELD_OUT_SEED, Evaluator, fit_evaluator, from_bytes
from cluster.metrics.inception_score import inception_score
from configs.errors import DataError


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
