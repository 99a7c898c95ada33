"""The Inception score at its closed forms: K for certain and balanced, 1 for constant, exp(mutual information) between."""

import numpy as np
import pytest

from freeguide.cluster.evaluation.statistics.inception_score import class_accuracy, inception_score
from freeguide.configs.errors import DataError


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_one_hot_and_balanced_scores_the_number_of_classes(classes):
    score = inception_score(np.tile(np.eye(classes, dtype=np.float32), (10, 1)))
    assert score.mean == pytest.approx(classes, rel=1e-12)  # K logarithms and one exponential
    assert score.std == pytest.approx(0.0, abs=1e-9 * classes)


def test_constant_probabilities_score_one():
    p = np.random.default_rng(0).dirichlet(np.ones(10))
    score = inception_score(np.tile(p, (200, 1)))
    assert score.mean == pytest.approx(1.0, abs=1e-12)


def test_two_uncertain_classes_score_their_mutual_information():
    q = 0.8
    p = np.tile([[q, 1 - q], [1 - q, q]], (50, 1))
    entropy = -(q * np.log(q) + (1 - q) * np.log(1 - q))
    assert inception_score(p).mean == pytest.approx(np.exp(np.log(2) - entropy), rel=1e-12)


@pytest.mark.parametrize("concentration", [0.001, 0.1, 10.0])
def test_the_score_stays_between_one_and_the_number_of_classes(concentration):
    p = np.random.default_rng(1).dirichlet(np.full(7, concentration), size=500)
    score = inception_score(p)
    assert 1.0 - 1e-12 <= score.mean <= 7.0 * (1 + 1e-12)


def test_splits_are_contiguous_and_their_spread_is_reported():
    one_class = np.tile(np.eye(4)[0], (40, 1))
    balanced = np.tile(np.eye(4), (10, 1))
    score = inception_score(np.concatenate([one_class, balanced]), splits=2)
    assert score.mean == pytest.approx((1 + 4) / 2, rel=1e-12)
    assert score.std == pytest.approx(1.5, rel=1e-12)


def test_every_image_counts_where_the_splits_are_uneven():
    p = np.tile(np.eye(2), (6, 1))[:11]  # splits of 3, 4 and 4 images: classes (2, 1), (2, 2), (2, 2)
    uneven = np.exp(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)))
    assert inception_score(p, splits=3).mean == pytest.approx((uneven + 2 + 2) / 3, rel=1e-12)


def test_class_accuracy_is_the_share_of_labels_met():
    p = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]])
    assert class_accuracy(p, np.array([0, 1, 1, 1])) == 0.75


def test_what_are_not_probabilities_is_refused():
    with pytest.raises(DataError, match="row 1 is not a probability"):
        inception_score(np.array([[0.5, 0.5], [2.0, -1.0], [3.0, 4.0]]), splits=1)
    with pytest.raises(DataError, match="row 0 is not a probability"):
        inception_score(np.full((20, 2), np.nan))
    with pytest.raises(DataError, match=r"\(N, K\)"):
        inception_score(np.ones(20))
    with pytest.raises(DataError, match="not 9; generate more"):
        inception_score(np.tile(np.eye(3), (3, 1)))
    with pytest.raises(DataError, match="need 2 labels"):
        class_accuracy(np.eye(2), np.array([0]))
    with pytest.raises(DataError, match="do not fit 2 classes"):
        class_accuracy(np.eye(2), np.array([0, 2]))


@pytest.mark.parametrize(("n", "score"), [(1000, 100.0), (500, 50.0)])
def test_a_split_that_cannot_hold_every_class_has_a_lower_score(n, score):
    """Certain predictions of 100 balanced classes: ten splits of 100 images hold all of them, of 50 images half of them."""
    assert inception_score(np.eye(100)[np.arange(n) % 100]).mean == pytest.approx(score, rel=1e-12)
