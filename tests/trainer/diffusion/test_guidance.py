"""Guidance: what it costs, what it reduces to at its neutral settings, and the identities that hold with exact scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freeguide.trainer.diffusion.guidance import (
    autoguidance,
    cfg_plus_plus,
    classifier_free,
    classifier_guided,
    clipped,
    dynamic_threshold,
    first_guided,
    guided,
    increasing,
    interval,
    joint,
    linear,
    posterior_weighted,
    projected,
    rescaled,
    two_networks,
    weight_at,
)
from freeguide.trainer.diffusion.oracles import TRIANGLE, GaussianClasses
from freeguide.trainer.diffusion.parametrisation import KINDS, output_of, predict
from freeguide.trainer.diffusion.samplers import State, ancestral, ddim, dpmpp_2m, heun, integrate, sample
from freeguide.trainer.diffusion.schedule import CosineSchedule, alpha_sigma, levels

ORACLE = GaussianClasses(means=(0.8, -0.4), variance=0.25, mean=0.2, total_variance=0.61)
LABELS = torch.tensor([0, 1, 1, 0, 1])
INDEX = torch.arange(5)
LEVELS = levels(CosineSchedule(), 9)


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Counting:
    """A network that remembers what it was asked."""

    def __init__(self, network):
        self.network, self.calls = network, []

    def __call__(self, z, logsnr, labels):
        self.calls.append((z, logsnr, labels))
        return self.network(z, logsnr, labels)


def cfg(network, w, **options):
    return classifier_free(network, w, null_label=2, p_uncond=0.1, **options)


def run(denoise, sampler=None, *, labels=LABELS, shape=(2, 3), clip=False, **options):
    options = {"levels": LEVELS, "sampler": sampler or ancestral(0.3), "seed": 3, "dtype": torch.float64, **options}
    return sample(denoise, labels, torch.arange(len(labels)), shape, clip=clip, **options)


# --- classifier-free guidance --------------------------------------------------------------------------------------------------


def test_guidance_is_equation_6():
    z, logsnr = noise(5, 2, 3), f64(0.7)
    level = logsnr.expand(5)
    with_c, without = ORACLE(z, level, LABELS), ORACLE(z, level, torch.full_like(LABELS, 2))
    p = cfg(ORACLE, 1.7)(z, logsnr, LABELS, None)
    torch.testing.assert_close(p.eps, 2.7 * with_c - 1.7 * without, rtol=0, atol=1e-14)
    alpha, sigma = alpha_sigma(logsnr)
    torch.testing.assert_close(p.x, (z - sigma * p.eps) / alpha, rtol=0, atol=1e-14)


def test_guidance_costs_one_forward_of_two_batches_and_none_more_without_weight():
    network = Counting(ORACLE)
    run(cfg(network, 1.0))
    assert [len(z) for z, _, _ in network.calls] == [10] * 9
    assert torch.equal(network.calls[0][2], torch.cat((LABELS, torch.full((5,), 2))))
    network = Counting(ORACLE)
    run(cfg(network, 0))
    assert [len(z) for z, _, _ in network.calls] == [5] * 9
    assert all(torch.equal(labels, LABELS) for _, _, labels in network.calls)


@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_is_the_conditional_network_bit_for_bit(kind):
    z, logsnr = noise(5, 2, 3), f64(-1.3)
    output = ORACLE(z, logsnr.expand(5), LABELS)
    p, expected = cfg(lambda *_: output, 0.0, kind=kind)(z, logsnr, LABELS, None), predict(kind, output, z, logsnr)
    assert torch.equal(p.x, expected.x)
    assert torch.equal(p.eps, expected.eps)


def test_one_weight_per_sample_is_each_weight_alone():
    weights = torch.tensor([0.0, 0.1, 0.3, 1.0, 4.0], dtype=torch.float64)
    together = run(cfg(ORACLE, weights))
    for i, w in enumerate(weights.tolist()):
        # w = 0 skips the weak forward; strong + 0 (strong - weak) has the same bits.
        assert torch.equal(run(cfg(ORACLE, w))[i], together[i])


@pytest.mark.parametrize("sampler", [ancestral(0.3), ddim(), dpmpp_2m(), heun()])
def test_linear_guidance_gives_the_same_sample_in_every_space(sampler):
    first = run(cfg(ORACLE, 1.5), sampler)
    for space in KINDS[1:]:
        # Combining in x at lambda = 20 or in eps at -20 amplifies rounding by e^10, to 2e-12 of numbers of order 1 (of order 100
        # inside Heun's at so few levels).
        torch.testing.assert_close(run(cfg(ORACLE, 1.5, space=space), sampler), first, rtol=1e-9, atol=1e-9)


def test_nonlinear_guidance_depends_on_its_space():
    runs = [run(cfg(ORACLE, 1.5, rule=rescaled(0.7), space=space), ddim()) for space in ("eps", "x")]
    assert (runs[0] - runs[1]).abs().max() > 1e-3


# --- weights -------------------------------------------------------------------------------------------------------------------


def test_an_interval_over_everything_is_plain_guidance_and_outside_it_costs_one_batch():
    assert torch.equal(run(cfg(ORACLE, interval(1.0, -math.inf, math.inf))), run(cfg(ORACLE, 1.0)))
    network = Counting(ORACLE)
    run(cfg(network, interval(1.0, -2.13, 2.55)))
    expected = [10 if -2.13 <= logsnr < 2.55 else 5 for logsnr in LEVELS.tolist()]
    assert [len(z) for z, _, _ in network.calls] == expected
    assert set(expected) == {5, 10}


def test_the_unguided_beginning_of_an_interval_can_be_shared_bit_for_bit():
    begin = first_guided(interval(1.0, -1.0, 3.0), LEVELS)
    states = {}
    run(cfg(ORACLE, interval(0.5, -1.0, 3.0)), on_step=lambda s: states.update({s.step: s}))
    assert sorted(states) == list(range(1, 9))
    for sampler in (ancestral(0.3), dpmpp_2m()):
        states = {}
        run(cfg(ORACLE, 0.0), sampler, on_step=lambda s, keep=states: keep.update({s.step: s}))
        for w in (0.5, 4.0):
            denoise = cfg(ORACLE, interval(w, -1.0, 3.0))
            network = Counting(ORACLE)
            assert torch.equal(run(cfg(network, interval(w, -1.0, 3.0)), sampler, start=states[begin]), run(denoise, sampler))
            assert len(network.calls) == len(LEVELS) - begin


def test_first_guided_is_the_first_step_with_weight():
    assert first_guided(1.0, LEVELS) == 0
    assert first_guided(0.0, LEVELS) == len(LEVELS)
    assert first_guided(torch.zeros(2), LEVELS) == 0  # a weight per sample is never looked into
    step = first_guided(interval(1.0, LEVELS[4].item(), 20.0), LEVELS)
    assert step == 4


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_increasing_weights_grow_from_zero_and_keep_the_mean(shape):
    schedule = CosineSchedule()
    weight = increasing(0.7, schedule, shape)
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    values = f64([weight_at(weight, logsnr) for logsnr in schedule.logsnr(u).tolist()])
    assert (values.diff() < 0).all()  # u falls as lambda grows
    assert values[0] == pytest.approx(1.4, abs=1e-3)
    assert values[-1] == pytest.approx(0.0, abs=1e-3)
    assert values.mean().item() == pytest.approx(0.7, abs=1e-9)


# --- pairs ---------------------------------------------------------------------------------------------------------------------


def test_a_separate_unconditional_network_is_joint_training_when_both_are_exact():
    apart = guided(two_networks(ORACLE, ORACLE, weak_label=2), 1.3)
    assert torch.equal(run(apart), run(cfg(ORACLE, 1.3)))


def test_the_posterior_weighted_condition_is_the_unconditional_score():
    """Section 5 of the paper, with exact scores."""
    labels = torch.arange(60) % 3
    levels_ = levels(CosineSchedule(-12.0, 12.0), 16)
    weighted = guided(posterior_weighted(TRIANGLE, TRIANGLE.log_posterior, 3), 1.3)
    plain = classifier_free(TRIANGLE, 1.3, null_label=3, p_uncond=0.1)
    options = {"labels": labels, "shape": (2,), "levels": levels_}
    # Rounding only: e^6 of 1e-16 at lambda = -12, through 16 levels.
    torch.testing.assert_close(run(weighted, **options), run(plain, **options), rtol=0, atol=1e-11)


def test_the_mixtures_eps_is_the_gradient_of_its_density():
    for logsnr in (-6.0, 0.0, 5.0):
        z = noise(12, 2).requires_grad_()
        level = torch.full((12,), logsnr, dtype=torch.float64)
        alpha, sigma = alpha_sigma(f64(logsnr))
        variance = alpha**2 * TRIANGLE.std**2 + sigma**2
        means = f64(TRIANGLE.means)
        log_p = (-(z[:, None] - alpha * means).square().sum(-1) / (2 * variance)).logsumexp(1).sum()
        (score,) = torch.autograd.grad(log_p, z)
        torch.testing.assert_close(TRIANGLE(z.detach(), level, torch.full((12,), 3)), -sigma * score, rtol=0, atol=1e-13)


def test_autoguidance_repairs_a_wide_model_exactly_and_does_not_move_the_mean():
    """With variances a^2 and b^2 and one mean, the ODE ends at a^2 (a^2 / b^2)^w, which a suitable w makes the true s^2."""
    main, weak = (GaussianClasses((0.3,), variance, 0.0, 1.0) for variance in (0.36, 0.81))
    w = math.log(0.25 / 0.36) / math.log(0.36 / 0.81)
    z = f64([[0.0], [1.0]])
    ends = []
    for steps in (128, 256, 512):
        ladder = levels(CosineSchedule(-24.0, 24.0), steps, "logsnr")
        x = integrate(
            autoguidance(main, weak, w), torch.zeros(2).long(), State(0, z), levels=ladder, sampler=heun(), noise=lambda _: z
        )
        ends.append(torch.stack((x[0, 0], (x[1, 0] - x[0, 0]) ** 2)))
    extrapolated = ends[2] + (ends[2] - ends[1]) / 3  # Heun's error is second order
    # What is left is the prior's mismatch at lambda = -24 (1e-6 in the mean) and the next order (3e-6 in the variance).
    torch.testing.assert_close(extrapolated, f64([0.3, 0.25]), rtol=0, atol=1e-5)
    assert (ends[2] - extrapolated).abs().max() > (extrapolated - f64([0.3, 0.25])).abs().max()


# --- rules ---------------------------------------------------------------------------------------------------------------------


def test_apg_is_plain_guidance_at_its_neutral_setting():
    assert torch.equal(run(cfg(ORACLE, 1.5, rule=projected(eta=1.0), space="x")), run(cfg(ORACLE, 1.5, space="x")))


def test_apg_moves_only_across_the_strong_prediction_and_no_further_than_its_radius():
    strong, weak = noise(4, 3, 5), noise(4, 3, 5, seed=1)
    value, _ = projected(eta=0.0)(strong, weak, 2.0, None)
    dot = ((value - strong) * strong).flatten(1).sum(1)
    torch.testing.assert_close(dot, torch.zeros_like(dot), rtol=0, atol=1e-13)
    short, _ = projected(eta=1.0, radius=0.5)(strong, weak, 1.0, None)
    torch.testing.assert_close(
        (short - strong).flatten(1).norm(dim=1), torch.full((4,), 0.5, dtype=torch.float64), rtol=1e-13, atol=0
    )
    long, _ = projected(eta=1.0, radius=100.0)(strong, weak, 1.0, None)
    assert torch.equal(long, linear(strong, weak, 1.0)[0])


def test_apgs_momentum_runs_along_the_trajectory_and_starts_anew_with_each():
    strong, weak = noise(2, 3, 5), noise(2, 3, 5, seed=1)
    rule = projected(eta=1.0, momentum=-0.5)
    first, kept = rule(strong, weak, 1.0, None)
    second, kept = rule(strong, weak, 1.0, kept)
    torch.testing.assert_close(first, strong + (strong - weak), rtol=0, atol=1e-14)
    torch.testing.assert_close(second, strong + 0.5 * (strong - weak), rtol=0, atol=1e-14)
    torch.testing.assert_close(kept, 0.5 * (strong - weak), rtol=0, atol=1e-14)
    denoise = cfg(ORACLE, 1.5, rule=rule, space="x")
    again = run(denoise)
    assert torch.equal(run(denoise), again)
    assert torch.equal(run(clipped(denoise, limit=1e30)), again)
    assert (run(cfg(ORACLE, 1.5, rule=projected(eta=1.0), space="x")) - again).abs().max() > 1e-3


@pytest.mark.parametrize("make", [cfg, lambda network, w, **options: autoguidance(network, ORACLE, w, **options)])
def test_a_rule_in_edms_space_combines_what_edms_network_returns(make):
    """At the sigma_data of the network: with another one, F is another quantity, and a rule that is not linear gives another x."""
    z, logsnr, s, rule = noise(5, 3, 4), f64(0.5), 0.8, projected(eta=0.3, radius=2.0)
    seen = []

    def network(z, logsnr, labels):
        seen.append(noise(*z.shape, seed=1 + len(seen)))
        return seen[-1]

    found = make(network, 1.5, rule=rule, space="edm", kind="edm", sigma_data=s)(z, logsnr, LABELS, None)
    if make is cfg:
        strong, weak = seen[0].chunk(2)
    else:
        weak_x, weak_eps = predict("edm", ORACLE(z, logsnr.expand(5), LABELS), z, logsnr, s)[:2]
        strong, weak = seen[0], output_of("edm", weak_x, weak_eps, logsnr, s)
    expected = predict("edm", rule(strong, weak, 1.5, None)[0], z, logsnr, s)
    # The way through (x, eps) and back rounds some ten times; the wrong sigma_data is 1e-2 and more away.
    torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.eps, expected.eps, rtol=0, atol=1e-12)


def test_apg_survives_equal_predictions():
    strong = noise(2, 3)
    value, _ = projected(eta=0.0, radius=1.0)(strong, strong, 3.0, None)
    assert torch.equal(value, strong)
    zero = torch.zeros(2, 3)
    assert torch.equal(projected(eta=0.0, radius=1.0)(zero, zero, 3.0, None)[0], zero)


def test_rescaling_is_plain_guidance_at_its_neutral_setting_and_restores_the_deviation_at_the_other():
    assert torch.equal(run(cfg(ORACLE, 1.5, rule=rescaled(0.0))), run(cfg(ORACLE, 1.5)))
    strong, weak = noise(4, 3, 5), noise(4, 3, 5, seed=1)
    plain, (value, _) = linear(strong, weak, 2.0)[0], rescaled(1.0)(strong, weak, 2.0, None)
    torch.testing.assert_close(value.flatten(1).std(1), strong.flatten(1).std(1), rtol=1e-13, atol=0)
    part, _ = rescaled(0.7)(strong, weak, 2.0, None)
    torch.testing.assert_close(part, 0.7 * value + 0.3 * plain, rtol=1e-13, atol=1e-13)


def test_rescaling_leaves_a_constant_prediction_as_it_is():
    ones = torch.ones(2, 3)
    assert torch.equal(rescaled(0.7)(2 * ones, ones, 1.0, None)[0], 3 * ones)


def test_rules_compose():
    strong, weak = noise(4, 3, 5), noise(4, 3, 5, seed=1)
    both, _ = rescaled(1.0, projected(eta=0.0))(strong, weak, 2.0, None)
    across, _ = projected(eta=0.0)(strong, weak, 2.0, None)
    torch.testing.assert_close(
        both, across * (strong.flatten(1).std(1) / across.flatten(1).std(1))[:, None, None], rtol=1e-13, atol=0
    )


# --- denoisers -----------------------------------------------------------------------------------------------------------------


def test_thresholds_that_nothing_reaches_are_plain_guidance():
    for sampler in (ancestral(0.3), ddim(), dpmpp_2m(), heun()):
        plain = run(cfg(ORACLE, 1.5), sampler)
        assert torch.equal(run(dynamic_threshold(cfg(ORACLE, 1.5), limit=1e30), sampler), plain)
        assert torch.equal(run(clipped(cfg(ORACLE, 1.5), limit=1e30), sampler), plain)


def test_dynamic_thresholding_is_imagens_formula():
    z, logsnr = 5 * noise(6, 3, 8), f64(3.0)
    plain = cfg(ORACLE, 1.5)(z, logsnr, torch.zeros(6).long(), None)
    found = dynamic_threshold(cfg(ORACLE, 1.5), 0.9)(z, logsnr, torch.zeros(6).long(), None)
    tau = plain.x.flatten(1).abs().quantile(0.9, dim=1).clamp(min=1)[:, None, None]
    assert (tau > 1).all()
    torch.testing.assert_close(found.x, plain.x.clamp(-tau, tau) / tau, rtol=1e-14, atol=0)
    alpha, sigma = alpha_sigma(logsnr)
    torch.testing.assert_close(alpha * found.x + sigma * found.eps, z, rtol=0, atol=1e-13)


def test_clipping_keeps_the_pair_tied_and_the_bits_of_what_it_does_not_touch():
    z, logsnr = 2 * noise(5, 2, 3), f64(1.0)
    plain, found = cfg(ORACLE, 1.5)(z, logsnr, LABELS, None), clipped(cfg(ORACLE, 1.5))(z, logsnr, LABELS, None)
    inside = plain.x.abs() <= 1
    assert inside.any()
    assert not inside.all()
    assert torch.equal(found.x, plain.x.clamp(-1, 1))
    assert torch.equal(found.eps[inside], plain.eps[inside])
    alpha, sigma = alpha_sigma(logsnr)
    torch.testing.assert_close(alpha * found.x + sigma * found.eps, z, rtol=0, atol=1e-14)


def test_cfg_plus_plus_without_scale_is_the_unconditional_sample():
    nothing = torch.full_like(LABELS, 2)
    unconditional = run(guided(two_networks(ORACLE, ORACLE), 0.0), ddim(), labels=nothing)
    assert torch.equal(run(cfg_plus_plus(joint(ORACLE, 2), 0.0), ddim()), unconditional)


def test_cfg_plus_plus_is_guidance_with_a_weight_that_falls_with_the_step():
    """1 + w = scale / (1 - e^-h) at each transition; the last, noiseless step has h = infinity."""
    scale = 0.6
    after = dict(zip(LEVELS.tolist(), [*LEVELS.tolist()[1:], math.inf], strict=True))
    same = cfg(ORACLE, lambda logsnr: scale / -math.expm1((logsnr - after[logsnr]) / 2) - 1)
    torch.testing.assert_close(run(cfg_plus_plus(joint(ORACLE, 2), scale), ddim()), run(same, ddim()), rtol=0, atol=1e-10)


def test_cfg_plus_plus_keeps_its_noise_when_clipped_and_is_refused_elsewhere():
    z, logsnr = 4 * noise(5, 2, 3), f64(1.0)
    denoise = cfg_plus_plus(joint(ORACLE, 2), 0.6)
    assert torch.equal(clipped(denoise)(z, logsnr, LABELS, None).eps, denoise(z, logsnr, LABELS, None).eps)
    for sampler in (ancestral(0.3), dpmpp_2m(), heun()):
        with pytest.raises(ValueError, match="only the sampler ddim"):
            run(denoise, sampler)


def test_classifier_guidance_with_the_exact_classifier_is_classifier_free_guidance():
    labels = torch.arange(30) % 3
    options = {"labels": labels, "shape": (2,), "levels": levels(CosineSchedule(-12.0, 12.0), 16)}
    w = 1.3
    free = run(classifier_free(TRIANGLE, w, null_label=3, p_uncond=0.1), **options)
    conditional = run(classifier_guided(TRIANGLE, TRIANGLE.log_posterior, w), **options)
    unconditional = run(classifier_guided(TRIANGLE, TRIANGLE.log_posterior, w + 1, null_label=3), **options)
    # Rounding only: e^6 of 1e-16 at lambda = -12, through 16 levels.
    torch.testing.assert_close(conditional, free, rtol=0, atol=1e-11)
    torch.testing.assert_close(unconditional, free, rtol=0, atol=1e-11)


def test_classifier_guidance_without_weight_never_asks_the_classifier():
    def classifier(z, logsnr):
        raise AssertionError("asked")

    plain = run(classifier_guided(ORACLE, classifier, 0.0))
    assert torch.equal(plain, run(cfg(ORACLE, 0.0)))


def test_classifier_gradients_are_not_taken_in_autocast():
    seen = []

    def classifier(z, logsnr):
        seen.append((torch.is_autocast_enabled("cpu"), z.dtype))
        return torch.nn.functional.linear(z.flatten(1), torch.ones(2, 6))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(classifier_guided(ORACLE, classifier, 1.0), dtype=torch.float32)
    assert set(seen) == {(False, torch.float32)}


@settings(max_examples=40, deadline=None)
@given(
    w=st.floats(-1, 20),
    logsnr=st.floats(-20, 20),
    space=st.sampled_from(KINDS),
    kind=st.sampled_from(KINDS),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    wide=st.booleans(),
    rule=st.sampled_from([linear, projected(0.3, 2.0, -0.5), rescaled(0.7), rescaled(0.5, projected(1.0))]),
)
def test_every_guidance_keeps_shape_and_dtype_and_stays_finite(w, logsnr, space, kind, shape, wide, rule):
    dtype = torch.float64 if wide else torch.float32
    z = noise(5, *shape).to(dtype)
    exact = predict("eps", ORACLE(z.double(), f64(logsnr).expand(5), LABELS), z.double(), f64(logsnr))
    output = output_of(kind, exact.x, exact.eps, f64(logsnr)).to(torch.bfloat16)
    network = lambda z, logsnr, labels: output.repeat(len(z) // 5, *[1] * len(shape))  # noqa: E731
    p = cfg(network, w, rule=rule, space=space, kind=kind)(z, f64(logsnr), LABELS, None)
    for value in (p.x, p.eps):
        assert value.shape == z.shape
        assert value.dtype == dtype
        assert torch.isfinite(value).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: classifier_free(ORACLE, 0.1, null_label=2, p_uncond=0.0), "w must be 0 for a model trained with p_uncond = 0"),
        (lambda: classifier_free(ORACLE, interval(1, 0, 1), null_label=2, p_uncond=0), "w must be 0"),
        (
            lambda: run(classifier_free(ORACLE, 0.0, null_label=1, p_uncond=0.0)),
            "labels reach from 0 to 1, but they must be from 0 to 0",
        ),
        (lambda: run(cfg(ORACLE, 1.0), labels=-LABELS), "labels reach from -1 to 0"),
        (lambda: run(cfg(ORACLE, 1.0, space="score")), "must be one of eps, x, v, edm"),
        (lambda: interval(1.0, 2.0, -2.0), r"interval is \[2.0, -2.0\)"),
        (lambda: increasing(1.0, CosineSchedule(), "square"), "'square'"),
        (lambda: projected(radius=0.0), "radius is 0"),
        (lambda: rescaled(1.5), "phi is 1.5"),
        (lambda: dynamic_threshold(cfg(ORACLE, 1.0), 2.0), "quantile is 2"),
        (lambda: cfg_plus_plus(joint(ORACLE, 2), 1.2), "scale is 1.2"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
