"""The oracles themselves: exact scores, and the three continuous limits of guided sampling."""

import itertools
import math

import pytest
import torch

from freeguide.trainer.diffusion.oracles import TRIANGLE, GaussianClasses, Moments, ancestral_limit, finite_t, ode_limit, tilted
from freeguide.trainer.diffusion.schedule import CosineSchedule, alpha_sigma, levels

ORACLE = GaussianClasses(means=(0.8,), variance=0.25, mean=0.0, total_variance=1.0)


def extrapolated(w, **options):
    """The limit of the recursion as T grows, by two Richardson steps over T = 256, 512, 1024 transitions."""
    first = []
    for steps in (257, 513, 1025):
        # lambda = +-30 instead of the paper's +-20, because the prior's mismatch leaves an error e^(logsnr_min / 2) in DDIM's mean
        ladder = levels(CosineSchedule(-30.0, 30.0), steps, "logsnr")
        first.append(torch.tensor(finite_t(ORACLE, 0, ladder, w, **options), dtype=torch.float64))
    second = [2 * b - a for a, b in itertools.pairwise(first)]
    return Moments(*((4 * second[1] - second[0]) / 3).tolist())


@pytest.mark.parametrize("w", [0.0, 0.1, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("v", [0.0, 0.3, 1.0])
def test_algorithm_2_tends_to_the_reverse_diffusion_for_any_v(w, v):
    assert extrapolated(w, v=v) == pytest.approx(ancestral_limit(ORACLE, 0, w), abs=2e-5)  # the third order left by extrapolation


@pytest.mark.parametrize("w", [0.0, 0.1, 0.3, 1.0, 4.0])
def test_ddim_tends_to_the_probability_flow(w):
    assert extrapolated(w, eta=0.0) == pytest.approx(ode_limit(ORACLE, 0, w), abs=2e-5)  # the third order left by extrapolation


@pytest.mark.parametrize("steps", [256, 1024])
def test_the_errors_of_a_finite_number_of_levels_are_first_order(steps):
    for w in (0.3, 1.0):
        error = [
            finite_t(ORACLE, 0, levels(CosineSchedule(), t), w).variance - ancestral_limit(ORACLE, 0, w).variance
            for t in (steps, 2 * steps)
        ]
        assert error[0] / error[1] == pytest.approx(2, abs=0.1)


def test_the_tilted_density_is_the_product_of_powers():
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)

    def log_normal(mean, variance):
        return -((x - mean) ** 2) / (2 * variance)

    for w in (0.0, 0.3, 4.0):
        p = ((1 + w) * log_normal(0.8, 0.25) - w * log_normal(0.0, 1.0)).softmax(0)
        mean = (p * x).sum()
        grid = Moments(mean.item(), (p * (x - mean) ** 2).sum().item())
        assert tilted(ORACLE, 0, w) == pytest.approx(grid, abs=1e-10)  # the trapezoid rule converges exponentially here


def test_the_three_laws_agree_without_guidance_and_differ_with_it():
    laws = [law(ORACLE, 0, 0.0) for law in (tilted, ancestral_limit, ode_limit)]
    assert laws == [pytest.approx((0.8, 0.25), abs=1e-12)] * 3
    variances = [law(ORACLE, 0, 1.0).variance for law in (tilted, ancestral_limit, ode_limit)]
    assert variances == pytest.approx([1 / 7, 0.109375, 0.0625], abs=1e-12)


def test_the_recursion_does_not_depend_on_where_the_data_lie():
    """Moving all data by a constant moves the samples by it, up to the prior, which stays at 0 and matters by e^-10."""
    moved = GaussianClasses(means=(2.8,), variance=0.25, mean=2.0, total_variance=1.0)
    ladder = levels(CosineSchedule(), 64)
    for options in ({"v": 0.3}, {"eta": 0.0}):
        there, here = finite_t(moved, 0, ladder, 1.0, **options), finite_t(ORACLE, 0, ladder, 1.0, **options)
        assert there.mean - 2 == pytest.approx(here.mean, abs=2 * math.exp(-10))
        assert there.variance == pytest.approx(here.variance, abs=1e-12)
    for law in (tilted, ancestral_limit, ode_limit):
        assert law(moved, 0, 1.0).mean - 2 == pytest.approx(law(ORACLE, 0, 1.0).mean, abs=1e-12)


def test_gaussian_classes_return_the_score_of_each_class_and_of_the_null_label():
    oracle = GaussianClasses(means=(0.8, -0.4), variance=0.25, mean=0.2, total_variance=0.61)
    z = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(3, 2, 2).requires_grad_()
    logsnr, labels = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64), torch.tensor([0, 1, 2])
    alpha, sigma = (c[:, None, None] for c in alpha_sigma(logsnr))
    means, variances = torch.tensor([[0.8, -0.4, 0.2], [0.25, 0.25, 0.61]], dtype=torch.float64)[..., None, None]
    log_p = -((z - alpha * means) ** 2) / (2 * (alpha**2 * variances + sigma**2))
    (score,) = torch.autograd.grad(log_p.sum(), z)
    torch.testing.assert_close(oracle(z.detach(), logsnr, labels), -sigma * score, rtol=0, atol=1e-14)


def test_the_mixtures_densities_and_posterior_are_one_law():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(50) % 3
    posterior = TRIANGLE.log_posterior(x, torch.full((50,), math.inf, dtype=torch.float64))
    bayes = TRIANGLE.log_density(x, labels) - math.log(3) - TRIANGLE.log_density(x)
    torch.testing.assert_close(posterior.gather(1, labels[:, None])[:, 0], bayes, rtol=0, atol=1e-12)
    grid = torch.linspace(-5, 5, 401, dtype=torch.float64)
    square = torch.cartesian_prod(grid, grid)
    assert TRIANGLE.log_density(square).exp().sum().item() * 0.025**2 == pytest.approx(1, abs=1e-9)


def test_laws_that_do_not_exist_are_refused():
    narrow = GaussianClasses(means=(0.8,), variance=1.0, mean=0.0, total_variance=0.25)
    with pytest.raises(ValueError, match="no finite integral"):
        tilted(narrow, 0, 1.0)
    for law in (ancestral_limit, ode_limit):
        with pytest.raises(ValueError, match="between 0 and 1"):
            law(narrow, 0, 1.0)
    with pytest.raises(ValueError, match="levels is empty"):
        finite_t(ORACLE, 0, torch.zeros(0), 1.0)
