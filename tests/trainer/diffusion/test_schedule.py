"""The forward process and its log-SNR distributions, against closed forms and quadrature-free identities in float64."""

import math

import pytest
import torch

from freeguide.trainer.diffusion.schedule import (
    SCHEDULES,
    CosineSchedule,
    FlowSchedule,
    NormalSchedule,
    UniformSchedule,
    alpha_sigma,
    levels,
    posterior,
    reverse_variance,
    transition,
)

ALL = [make() for make in SCHEDULES.values()] + [CosineSchedule(-12.0, 15.0), NormalSchedule(-8.0, 12.0), FlowSchedule(-15.0, 9.0)]


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_and_sigma_lose_nothing_at_either_end(dtype):
    logsnr = torch.tensor([-20.0, -5.0, 0.0, 5.0, 20.0], dtype=dtype)
    alpha, sigma = alpha_sigma(logsnr)
    exact = f64(*[math.exp(-math.log1p(math.exp(-value)) / 2) for value in logsnr.tolist()])
    bound = 4 * torch.finfo(dtype).eps  # relative: a sigmoid and a root, each correct to about one unit in the last place
    assert ((alpha.double() - exact) / exact).abs().max() < bound
    assert ((sigma.double() - exact.flip(0)) / exact.flip(0)).abs().max() < bound
    assert torch.equal(alpha, sigma.flip(0))


def test_transitions_compose():
    low, mid, high = f64(-20.0, -3.0, 1.0), f64(-19.0, 0.0, 1.0 + 1e-9), f64(15.0, 2.0, 20.0)
    first, second, both = transition(mid, high), transition(low, mid), transition(low, high)
    torch.testing.assert_close(first.scale * second.scale, both.scale, rtol=1e-14, atol=0)
    torch.testing.assert_close(second.scale**2 * first.variance + second.variance, both.variance, rtol=1e-13, atol=0)


def test_the_posterior_is_bayes_rule_of_prior_and_transition():
    low, high = f64(-20.0, -20.0, -3.0, 1.0, 19.0), f64(-19.99, 15.0, 0.0, 1.001, 20.0)
    alpha, sigma = alpha_sigma(high)
    forward, found = transition(low, high), posterior(low, high)
    variance = 1 / (1 / sigma**2 + forward.scale**2 / forward.variance)
    torch.testing.assert_close(found.variance, variance, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.z_scale, variance * forward.scale / forward.variance, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.x_scale, variance * alpha / sigma**2, rtol=1e-12, atol=0)


def test_reverse_variance_runs_from_the_posterior_to_the_forward_variance():
    low, high = f64(-20.0, -1.0, 10.0), f64(-10.0, 0.5, 20.0)
    small, large = posterior(low, high).variance, transition(low, high).variance
    assert torch.equal(reverse_variance(low, high, 0.0), small)
    assert torch.equal(reverse_variance(low, high, 1.0), large)
    middle = torch.exp(0.7 * small.log() + 0.3 * large.log())
    torch.testing.assert_close(reverse_variance(low, high, 0.3), middle, rtol=1e-13, atol=0)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_u_inverts_logsnr_and_reaches_both_ends(schedule):
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    logsnr = schedule.logsnr(u)
    assert (logsnr.diff() < 0).all()
    # At the ends the angle is 4.5e-5, so a rounding of 1e-16 in it moves lambda by 2e-12 times the slope.
    torch.testing.assert_close(logsnr[[0, -1]], f64(schedule.logsnr_max, schedule.logsnr_min), rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.u(logsnr), u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_the_density_is_the_slope_of_u_and_vanishes_outside(schedule):
    logsnr = torch.linspace(schedule.logsnr_min + 0.01, schedule.logsnr_max - 0.01, 801, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(schedule.u(logsnr).sum(), logsnr)
    torch.testing.assert_close(schedule.density(logsnr.detach()), -slope, rtol=1e-9, atol=1e-15)
    outside = f64(schedule.logsnr_min - 1e-6, schedule.logsnr_max + 1e-6)
    assert torch.equal(schedule.density(outside), f64(0.0, 0.0))


def test_the_cosine_schedule_is_the_papers_formula():
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    b = math.atan(math.exp(-10))
    a = math.atan(math.exp(10)) - b
    torch.testing.assert_close(CosineSchedule().logsnr(u), -2 * torch.log(torch.tan(a * u + b)), rtol=0, atol=1e-10)


def test_most_of_the_cosine_schedules_mass_lies_within_eight():
    schedule = CosineSchedule()
    share = schedule.u(f64(-4.0, -8.0)) - schedule.u(f64(4.0, 8.0))
    # The gudermannian: (4 arctan(tanh(m / 4))) / (2 a) for |lambda| < m.
    a = math.pi / 2 - 2 * math.atan(math.exp(-10))
    exact = f64(*[2 * math.atan(math.tanh(m / 4)) / a for m in (4, 8)])
    torch.testing.assert_close(share, exact, rtol=1e-13, atol=0)
    assert [round(100 * s, 1) for s in share.tolist()] == [82.9, 97.7]


def test_the_cosine_schedule_keeps_float32_accurate_at_the_noisy_end():
    u = torch.tensor([1.0, 1 - 2.0**-20, 0.5, 2.0**-20, 0.0])
    found, exact = CosineSchedule().logsnr(u).double(), CosineSchedule().logsnr(u.double())
    assert (found - exact).abs().max() < 1e-5  # the textbook tan(a u + b) is 5e-3 off here


def test_edm_and_flow_matching_are_these_distributions():
    edm, flow = NormalSchedule(), FlowSchedule()
    sigma = torch.exp(-edm.logsnr(torch.linspace(0.001, 0.999, 999, dtype=torch.float64)) / 2)
    quantiles = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    # u rises with sigma: ln sigma has the quantiles of N(-1.2, 1.2^2); the truncation moves them by 1e-12 or less.
    torch.testing.assert_close(sigma.log(), -1.2 + 1.2 * torch.special.ndtri(quantiles), rtol=0, atol=1e-9)
    time = 1 / (1 + torch.exp(flow.logsnr(quantiles) / 2))
    torch.testing.assert_close(time, quantiles, rtol=0, atol=5e-5)  # truncation to +-20 moves t by 4.5e-5 at most


@pytest.mark.parametrize("spacing", ["u", "logsnr", "karras"])
@pytest.mark.parametrize("steps", [2, 3, 256])
def test_levels_increase_from_end_to_end(spacing, steps):
    found = levels(CosineSchedule(-12.0, 15.0), steps, spacing)
    assert found.shape == (steps,)
    assert found.dtype == torch.float64
    assert (found.diff() > 0).all()
    assert (found[0].item(), found[-1].item()) == (-12.0, 15.0)


def test_one_level_is_the_noisiest():
    for spacing in ("u", "logsnr", "karras"):
        assert levels(CosineSchedule(), 1, spacing).tolist() == [-20.0]


def test_karras_spacing_is_equation_5_of_edm():
    low, high = 2 * math.log(1 / 80), 2 * math.log(1 / 0.002)
    found = torch.exp(-levels(UniformSchedule(low, high), 18, "karras") / 2)
    ramp = torch.arange(18, dtype=torch.float64) / 17
    exact = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: CosineSchedule(20.0, -20.0), r"log-SNR range is \[20.0, -20.0\]"),
        (lambda: UniformSchedule(1.0, 1.0), "logsnr_min must be below"),
        (lambda: FlowSchedule(-math.inf, 0.0), "finite"),
        (lambda: CosineSchedule(math.nan, 0.0), "finite"),
        (lambda: NormalSchedule(std=0.0), "std is 0"),
        (lambda: levels(CosineSchedule(), 0), "steps is 0"),
        (lambda: levels(CosineSchedule(), 8, "sigma"), "spacing is 'sigma'"),
        (lambda: levels(CosineSchedule(), 8, "karras", rho=0.0), "rho is 0"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
