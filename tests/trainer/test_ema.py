"""Averages against their closed forms."""

import numpy as np
import pytest
import torch
from torch import Tensor

from freeguide.configs.schema import TrainConfig
from freeguide.trainer.checkpoints.profiles import Profile, power, profile_product, profiles, reconstruction, sigma_rel_of
from freeguide.trainer.training.ema import Ema
from freeguide.trainer.training.engine import Fragment

UPDATES = 60


class Weights:
    """What `Ema` sees of an engine: one parameter of four float64 values, all owned."""

    def __init__(self) -> None:
        self.values_ = torch.zeros(4, dtype=torch.float64)

    def owned(self) -> list[Fragment]:
        return [Fragment("w", 0, 4, torch.nn.Parameter(self.values_), 0)]

    def values(self, fragment: Fragment, kind: str) -> Tensor:
        return self.values_


def averaged(profile: Profile) -> tuple[Tensor, Tensor]:
    """(the average after UPDATES updates, all weights (UPDATES, 4)) of a random walk."""
    weights, steps = Weights(), torch.randn(UPDATES, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)
    ema = Ema(weights, [profile])  # type: ignore[arg-type]
    for t, step in enumerate(steps, start=1):
        weights.values_.copy_(step)
        ema.update(t)
    return ema.values[profile.name][0], steps


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_a_power_function_average_weighs_update_s_with_the_integral_of_its_profile(sigma_rel: float) -> None:
    average, steps = averaged(Profile("p", sigma_rel=sigma_rel))
    edges = (torch.arange(UPDATES + 1, dtype=torch.float64) / UPDATES) ** (power(sigma_rel) + 1)
    # 60 roundings of float64.
    torch.testing.assert_close(average, (edges.diff()[:, None] * steps).sum(0), rtol=1e-13, atol=1e-13)


def test_an_exponential_average_weighs_update_s_with_its_decay() -> None:
    average, steps = averaged(Profile("e", decay=0.9))
    weights = 0.1 * 0.9 ** torch.arange(UPDATES - 1, -1, -1, dtype=torch.float64)  # and 0.9^60 of the zeros it began with
    torch.testing.assert_close(average, (weights[:, None] * steps).sum(0), rtol=1e-13, atol=1e-13)


def test_half_a_life_keeps_half() -> None:
    config = TrainConfig(global_batch=64, ema_half_lives=[640], ema_decay=0.5)
    ema, half = profiles(config)
    assert (ema, half.name) == (Profile("ema", decay=0.5), "half_life_640")
    assert half.kept(7) ** 10 == pytest.approx(0.5, rel=1e-12)


def test_published_exponents() -> None:
    # EDM2 gives gamma = 16.97 and 6.94 for the widths 0.05 and 0.10 that it stores.
    assert power(0.05) == pytest.approx(16.97, abs=0.005)
    assert power(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_sigma_rel_is_the_standard_deviation_of_the_profile(sigma_rel: float) -> None:
    gamma = power(sigma_rel)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)  # the first two moments of (gamma + 1) s^gamma on [0, 1]
    assert np.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.289, 1.0])
def test_a_width_that_no_profile_has_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"between 0 and 0\.2886"):
        power(sigma_rel)


def test_names_of_widths() -> None:
    names = [p.name for p in profiles(TrainConfig(ema_sigma_rel=[0.05, 0.10, 0.125]))]
    assert names == ["ema", "sigma_rel_0.05", "sigma_rel_0.1", "sigma_rel_0.125"]
    assert [sigma_rel_of(name) for name in names] == [0.0, 0.05, 0.1, 0.125]
    assert sigma_rel_of("sigma_rel_.07") == 0.07


@pytest.mark.parametrize(("t_a", "t_b"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.3)])
def test_the_product_of_two_profiles_is_its_integral(t_a: float, t_b: float) -> None:
    gamma_a, gamma_b = power(0.05), power(0.1)
    edges = np.linspace(0, min(t_a, t_b), 200_001)
    s = (edges[:-1] + edges[1:]) / 2
    p_a, p_b = (gamma_a + 1) * s**gamma_a / t_a ** (gamma_a + 1), (gamma_b + 1) * s**gamma_b / t_b ** (gamma_b + 1)
    product = profile_product(np.array(t_a), np.array(gamma_a), np.array(t_b), np.array(gamma_b))
    # The midpoint rule with 200 000 intervals: relative error below 1e-8 for s^24.
    assert float(product) == pytest.approx(float((p_a * p_b).sum() * s[0] * 2), rel=1e-8)


def test_a_stored_average_is_its_own_reconstruction() -> None:
    stored = [(t, width) for t in range(100, 1100, 100) for width in (0.05, 0.1)]
    x, distance = reconstruction(stored, 700, 0.1)
    expected = np.zeros(len(stored))
    expected[stored.index((700, 0.1))] = 1
    np.testing.assert_allclose(x, expected, atol=1e-6)  # the condition number of the products, 1e9, times float64's rounding
    assert distance < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.2, 0.25])
def test_other_widths_are_reconstructed_and_more_snapshots_come_closer(sigma_rel: float) -> None:
    distances = []
    for every in (400, 100, 25):
        stored = [(t, width) for t in range(every, 1601, every) for width in (0.05, 0.1)]
        x, distance = reconstruction(stored, 1600, sigma_rel)
        assert x.sum() == pytest.approx(1, abs=1e-9)
        distances.append(distance)
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.02


def test_the_distance_of_a_reconstruction_is_that_of_the_profiles() -> None:
    stored = [(400, 0.05), (800, 0.05), (800, 0.1)]
    x, distance = reconstruction(stored, 800, 0.15)
    s = (np.arange(400_000) + 0.5) / 400_000 * 800
    made = sum(c * np.where(s < t, (power(w) + 1) * (s / t) ** power(w) / t, 0) for c, (t, w) in zip(x, stored, strict=True))
    wanted = (power(0.15) + 1) * (s / 800) ** power(0.15) / 800
    # Midpoint rule; the profile of t = 400 jumps at one of 400 000 points.
    assert distance == pytest.approx(np.sqrt(((made - wanted) ** 2).sum() / (wanted**2).sum()), rel=1e-5)


def test_nothing_stored_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one snapshot"):
        reconstruction([], 10, 0.1)
