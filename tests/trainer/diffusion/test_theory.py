"""Figure 2 of the paper: the tilted densities, and what Algorithm 2 samples instead."""

import itertools
import math

import pytest
import torch

from freeguide.trainer.diffusion.oracles import GaussianMixture
from freeguide.trainer.diffusion.theory import compare

SMALL = {"images": 1500, "steps": 64, "side": 121}


@pytest.fixture(scope="module")
def sweep():
    return [compare(w, **SMALL) for w in (0.0, 0.3, 1.0, 4.0)]


def test_without_guidance_density_and_samples_are_the_classes(sweep):
    row = sweep[0]
    # |mean| of the three classes: 1.3 and twice 1.3 sqrt(0.87^2 + 0.5^2); trace 2 * 0.45^2. The grid sum converges exponentially.
    assert row.tilted.distance == pytest.approx((1.3 + 2 * 1.3 * math.hypot(0.87, 0.5)) / 3, abs=1e-8)
    assert row.tilted.trace == pytest.approx(2 * 0.45**2, abs=1e-7)
    # Samples: 4 standard errors of a mean over 4500 of deviation 0.45, plus 1/T of finite-T bias in the variance.
    assert row.sampled.distance == pytest.approx(row.tilted.distance, abs=4 * 0.45 / math.sqrt(4500))
    assert row.sampled.trace == pytest.approx(row.tilted.trace, abs=4 * 0.405 / math.sqrt(4500) + 0.405 * 5 / 64)


def test_densities_are_normalized(sweep):
    for row in sweep:
        cell = (9.0 / 120) ** 2
        torch.testing.assert_close(row.density.sum((1, 2)) * cell, torch.ones(3, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("law", ["tilted", "sampled"])
def test_guidance_trades_diversity_for_certainty(sweep, law):
    statistics = [getattr(row, law) for row in sweep]
    for before, after in itertools.pairwise(statistics):
        assert after.log_posterior > before.log_posterior
        assert after.trace < before.trace
        assert after.distance > before.distance


def test_algorithm_2_overshoots_the_tilted_density(sweep):
    for row in sweep[1:]:
        # The smallest gap, at w = 0.3, is 0.06 in the distance: 9 standard errors of the samples' mean.
        assert row.sampled.distance > row.tilted.distance + 0.03
        assert row.sampled.log_posterior > row.tilted.log_posterior
        assert row.sampled.trace < row.tilted.trace


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="w is -1"):
        compare(-1.0)
    with pytest.raises(ValueError, match="in the plane"):
        compare(1.0, mixture=GaussianMixture(means=((0.0,), (1.0,)), std=0.5))
