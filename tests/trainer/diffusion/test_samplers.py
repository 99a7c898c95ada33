"""Samplers against the exact finite-T recursion, against each other, and in the precision that networks really have."""

import functools
import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freeguide.configs.schema import SamplerName, SamplingConfig
from freeguide.trainer.diffusion.guidance import classifier_free, interval
from freeguide.trainer.diffusion.oracles import GaussianClasses, finite_t
from freeguide.trainer.diffusion.parametrisation import KINDS, output_of, predict
from freeguide.trainer.diffusion.randomness import Purpose, normal
from freeguide.trainer.diffusion.samplers import SAMPLERS, State, ancestral, ddim, dpmpp_2m, heun, integrate, sample
from freeguide.trainer.diffusion.schedule import CosineSchedule, alpha_sigma, levels, posterior, reverse_variance

ORACLE = GaussianClasses(means=(0.8,), variance=0.25, mean=0.0, total_variance=1.0)
WEIGHTS = torch.tensor([0.0, 0.1, 0.3, 1.0, 4.0], dtype=torch.float64)
STEPS = [1, 2, 3, 8, 64, 256, 1024]
MAKES = [functools.partial(kind.make, SamplingConfig()) for kind in SAMPLERS.values()]
SLOW_STEPS = [1, 2, 3, 8, 64, pytest.param(256, marks=pytest.mark.slow), pytest.param(1024, marks=pytest.mark.slow)]


def cfg(network, w, null_label=1):
    return classifier_free(network, w, null_label=null_label, p_uncond=0.1)


def response(sampler, ladder, noisy):
    """Mean and variance of the sampler's result, exactly: (5,) each, by feeding one unit of each source of randomness.

    The result is affine in z_1 and in the noise of each step, all independent and standard: the constant part is its mean, and the
    squares of the coefficients add up to its variance. One row of the batch per source, for all weights at once.
    """
    rows = len(ladder) + 1 if noisy else 2  # nothing, z_1, and the T - 1 transitions
    z = torch.zeros(rows, len(WEIGHTS), 1, dtype=torch.float64)
    z[1] = 1

    def noise(step):
        unit = torch.zeros_like(z)
        if noisy:
            unit[step + 2] = 1
        return unit.flatten(0, 1)

    denoise = cfg(ORACLE, WEIGHTS.repeat(rows))
    labels = torch.zeros(rows * len(WEIGHTS), dtype=torch.int64)
    x = integrate(denoise, labels, State(0, z.flatten(0, 1)), levels=ladder, sampler=sampler, noise=noise)
    x = x.reshape(rows, len(WEIGHTS))
    return x[0], (x[1:] - x[0]).square().sum(0)


def recursion(ladder, **options):
    found = [finite_t(ORACLE, 0, ladder, w, **options) for w in WEIGHTS.tolist()]
    return tuple(torch.tensor(column, dtype=torch.float64) for column in zip(*found, strict=True))


@pytest.mark.parametrize("v", [0.0, 0.2, 0.3, 1.0])
@pytest.mark.parametrize("steps", STEPS)
def test_algorithm_2_has_exactly_the_mean_and_variance_of_the_recursion(steps, v):
    ladder = levels(CosineSchedule(), steps)
    found, exact = response(ancestral(v), ladder, noisy=True), recursion(ladder, v=v)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)  # float64 rounding, amplified by e^10 at lambda = -20


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", STEPS)
def test_ddim_has_exactly_the_mean_and_variance_of_the_recursion(steps, eta):
    ladder = levels(CosineSchedule(), steps)
    found, exact = response(ddim(eta), ladder, noisy=eta > 0), recursion(ladder, eta=eta)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)  # as above


@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
def test_the_recursion_holds_at_other_spacings(spacing):
    ladder = levels(CosineSchedule(-14.0, 12.0), 24, spacing)
    torch.testing.assert_close(response(ancestral(0.3), ladder, noisy=True), recursion(ladder, v=0.3), rtol=0, atol=1e-9)


def check_monte_carlo(sampler, ladder, **options):
    """Draws with the real noise of `sample`: 8000 numbers per weight, four from each image."""
    images = 2000
    labels = torch.zeros(images * len(WEIGHTS), dtype=torch.int64)
    denoise = cfg(ORACLE, WEIGHTS.repeat_interleave(images))
    x = sample(
        denoise,
        labels,
        torch.arange(len(labels)),
        (4,),
        levels=ladder,
        sampler=sampler,
        seed=5,
        clip=False,
        dtype=torch.float64,
    ).reshape(len(WEIGHTS), -1)
    mean, variance = recursion(ladder, **options)
    count = x.shape[1]
    # 4 standard errors of the mean and of the variance of normal draws; 1e-9 for T = 1, where the spread is 1e-9 itself
    assert ((x.mean(1) - mean).abs() <= 4 * (variance / count).sqrt() + 1e-9).all()
    assert ((x.var(1) - variance).abs() <= 4 * variance * math.sqrt(2 / (count - 1)) + 1e-9).all()


@pytest.mark.parametrize("v", [0.0, 0.2, 0.3, 1.0])
@pytest.mark.parametrize("steps", SLOW_STEPS)
def test_samples_of_algorithm_2_follow_the_recursion(steps, v):
    ladder = levels(CosineSchedule(), steps)
    check_monte_carlo(ancestral(v), ladder, v=v)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", SLOW_STEPS)
def test_samples_of_ddim_follow_the_recursion(steps, eta):
    ladder = levels(CosineSchedule(), steps)
    check_monte_carlo(ddim(eta), ladder, eta=eta)


def test_v_0_under_disperses_and_v_1_over_disperses():
    ladder = levels(CosineSchedule(), 64)
    variance = [response(ancestral(v), ladder, noisy=True)[1][0].item() for v in (0.0, 0.3, 1.0)]
    assert [round(value, 4) for value in variance] == [0.2243, 0.2331, 0.2575]  # the data's is 0.25


@pytest.mark.parametrize(("make", "order"), [(ddim, 1), (dpmpp_2m, 2), (heun, 2)])
def test_deterministic_solvers_have_their_order(make, order):
    """On the guided Gaussian ODE: halving the step divides the change between step sizes by 2 to the order."""
    ends = []
    for steps in (129, 257, 513, 1025):
        z = torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64)
        ladder = levels(CosineSchedule(-12.0, 12.0), steps, "logsnr")
        ends.append(
            integrate(cfg(ORACLE, 1.0), torch.zeros(3).long(), State(0, z), levels=ladder, sampler=make(), noise=torch.zeros_like)
        )
    change = [(b - a).abs().max().item() for a, b in itertools.pairwise(ends)]
    measured = math.log2(change[1] / change[2])
    assert abs(measured - order) < 0.05, change


def run(sampler, network=ORACLE, *, w=1.0, count=6, steps=12, dtype=torch.float64, index=None, **options):
    index = torch.arange(count) if index is None else index
    labels = torch.zeros(len(index), dtype=torch.int64)
    options = {"levels": levels(CosineSchedule(), steps), "seed": 1, **options}
    return sample(cfg(network, w), labels, index, (2, 3), sampler=sampler, dtype=dtype, **options)


def test_ddim_with_full_noise_is_algorithm_2_with_v_0():
    # The same formula in another order: rounding, amplified by e^10 at lambda = -20.
    torch.testing.assert_close(run(ddim(1.0), clip=False), run(ancestral(0.0), clip=False), rtol=0, atol=1e-10)


def test_the_first_order_solver_is_ddim():
    """DPM-Solver++(1) is DDIM, so the first of two levels, where 2M has no history, must agree."""
    torch.testing.assert_close(run(dpmpp_2m(), steps=2, clip=False), run(ddim(), steps=2, clip=False), rtol=1e-11, atol=1e-11)


def test_every_sampler_ends_with_the_prediction_at_the_last_level():
    z = torch.tensor([[0.3, -2.0]], dtype=torch.float64)
    ladder = levels(CosineSchedule(), 5)
    for make in MAKES:
        x = integrate(
            cfg(ORACLE, 0.0),
            torch.zeros(1).long(),
            State(4, z),
            levels=ladder,
            sampler=make(),
            noise=lambda _: pytest.fail("noise"),
        )
        eps = ORACLE(z, ladder[4:], torch.zeros(1).long())
        assert torch.equal(x, predict("eps", eps, z, ladder[4]).x)


@pytest.mark.parametrize(("make", "evaluations"), [(ancestral, 9), (ddim, 9), (dpmpp_2m, 9), (heun, 17)])
def test_network_evaluations(make, evaluations):
    calls = []

    def network(z, logsnr, labels):
        calls.append((len(z), logsnr))
        return ORACLE(z, logsnr, labels)

    run(make(), network, steps=9)
    assert [rows for rows, _ in calls] == [12] * evaluations
    for _, logsnr in calls:
        assert (logsnr == logsnr[0]).all()
    if evaluations == 9:
        assert torch.equal(torch.stack([logsnr[0] for _, logsnr in calls]), levels(CosineSchedule(), 9))


def test_each_sampler_that_a_config_can_name_is_there():
    assert set(SAMPLERS) == set(get_args(SamplerName))


@pytest.mark.parametrize("make", MAKES)
def test_image_i_is_image_i_in_any_batch(make):
    whole = run(make(), count=6, dtype=torch.float32)
    alone = torch.cat([run(make(), index=torch.tensor([i]), dtype=torch.float32) for i in range(6)])
    assert torch.equal(whole, alone)
    assert torch.equal(run(make(), index=torch.tensor([4, 1, 5]), dtype=torch.float32), whole[[4, 1, 5]])
    assert not torch.equal(run(make(), count=6, dtype=torch.float32, seed=2), whole)


@pytest.mark.parametrize("make", MAKES)
def test_a_sample_can_go_on_from_any_state_bit_for_bit(make):
    states = []
    whole = run(make(), on_step=states.append)
    assert [state.step for state in states] == list(range(1, 12))
    for state in states[::3]:
        assert torch.equal(run(make(), start=state), whole)


def bf16(kind):
    """The best network of this kind, with its output rounded to bf16."""

    def network(z, logsnr, labels):
        z, logsnr = z.double(), logsnr.double()
        p = predict("eps", ORACLE(z, logsnr, labels), z, logsnr)
        # In float64, v and edm from eps lose e^20 * 1e-16 at lambda = -20: far below bf16.
        return output_of(kind, p.x, p.eps, logsnr).bfloat16()

    return network


def spread_of_z_2(kind, clip, count=200_000):
    """Standard deviation of z_2 for T = 256 with a bf16 network, and the closed form for the exact one."""
    ladder = levels(CosineSchedule(), 256)
    states = []
    labels = torch.zeros(count, dtype=torch.int64)
    denoise = classifier_free(bf16(kind), 0.0, null_label=1, p_uncond=0.1, kind=kind)
    sample(
        denoise,
        labels,
        torch.arange(count),
        (1,),
        levels=ladder[:2],
        sampler=ancestral(0.3),
        seed=0,
        clip=clip,
        on_step=states.append,
    )
    alpha, sigma = alpha_sigma(ladder[0])
    k = posterior(ladder[0], ladder[1])
    gain = k.z_scale + k.x_scale * alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
    exact = (gain**2 + reverse_variance(ladder[0], ladder[1], 0.3)).sqrt().item()
    return states[0].z.double().std().item(), exact


def test_a_bf16_network_does_not_disturb_the_first_step_of_the_clipped_sampler():
    found, exact = spread_of_z_2("eps", clip=True)
    # 4 standard errors of a standard deviation; clipped x has |x| <= 1 and enters z_2 with alpha' = 0.0062, 2e-5 in deviation.
    assert abs(found - exact) < 4 * exact / math.sqrt(2 * 200_000) + 2e-5


@pytest.mark.parametrize("kind", ["x", "v", "edm"])
def test_a_bf16_network_of_another_kind_needs_no_clipping(kind):
    found, exact = spread_of_z_2(kind, clip=False)
    # 4 standard errors; x itself is rounded by 2^-9 of order 1 and enters with 0.0062.
    assert abs(found - exact) < 4 * exact / math.sqrt(2 * 200_000) + 2e-5


def test_without_clipping_bf16_eps_adds_noise_of_the_predicted_size():
    """Why clipping is the default: the rounding of eps to 8 bits enters z_2 amplified 137 times."""
    found, exact = spread_of_z_2("eps", clip=False)
    gain = (posterior(*levels(CosineSchedule(), 256)[:2]).x_scale / alpha_sigma(torch.tensor(-20.0))[0]).item()
    assert 136 < gain < 138
    eps = normal(1, Purpose.SAMPLE_PRIOR, torch.arange(200_000))
    added = gain * (eps.bfloat16().float() - eps).std().item()
    assert added > 0.2
    assert abs(found**2 - exact**2 - added**2) < 4 * found**2 * math.sqrt(2 / 200_000)  # 4 standard errors of a variance


@pytest.mark.parametrize("make", MAKES)
def test_the_float32_sampler_follows_the_float64_one(make):
    narrow, wide = (run(make(), steps=64, dtype=dtype, w=1.0, count=64) for dtype in (torch.float32, torch.float64))
    # Same noise up to rounding. Clipped x at lambda = -20 hides e^10 * 6e-8; what is left at the end is a hundred roundings.
    assert (narrow.double() - wide).abs().max() < 2e-4


def test_clipping_bounds_the_images():
    assert run(ancestral(0.3), w=8.0).abs().max() <= 1
    assert run(ancestral(0.3), w=8.0, clip=False).abs().max() > 1


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(SAMPLERS)),
    steps=st.integers(1, 9),
    w=st.floats(0, 8),
    v=st.floats(0, 1),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    kind=st.sampled_from(KINDS),
    spacing=st.sampled_from(["u", "logsnr", "karras"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    network_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    batch=st.integers(1, 4),
)
def test_any_sampler_gives_finite_images_of_the_asked_shape_and_dtype(
    name, steps, w, v, shape, kind, spacing, dtype, network_dtype, batch
):
    def network(z, logsnr, labels):
        assert z.dtype == logsnr.dtype == dtype
        assert z.shape[1:] == shape
        p = predict("eps", ORACLE(z.double(), logsnr.double(), labels), z.double(), logsnr.double())
        return output_of(kind, p.x, p.eps, logsnr.double()).to(network_dtype)

    x = sample(
        classifier_free(network, w, null_label=1, p_uncond=0.1, kind=kind),
        torch.zeros(batch, dtype=torch.int64),
        torch.arange(batch),
        shape,
        levels=levels(CosineSchedule(), steps, spacing),
        sampler=ddim(v) if name == "ddim" else SAMPLERS[name].make(SamplingConfig(v=v)),
        seed=0,
        dtype=dtype,
    )
    assert x.shape == (batch, *shape)
    assert x.dtype == dtype
    assert x.abs().max() <= 1


def test_sampling_records_no_gradients():
    scale = torch.ones((), requires_grad=True)
    assert not run(ancestral(0.3), lambda z, logsnr, labels: scale * z).requires_grad


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: run(ancestral(0.3), steps=0), "steps is 0"),
        (lambda: ancestral(1.1), "v is 1.1"),
        (lambda: ancestral(-0.1), "v is -0.1"),
        (lambda: ddim(2.0), "eta is 2"),
        (lambda: run(ddim(), levels=levels(CosineSchedule(), 4).flip(0)), "levels must increase"),
        (lambda: run(ddim(), levels=levels(CosineSchedule(), 4).float()), "float64 vector"),
        (lambda: run(ddim(), levels=torch.zeros(0, dtype=torch.float64)), "at least one"),
        (lambda: run(ddim(), start=State(12, torch.zeros(6, 2, 3))), "the start has step 12"),
        (lambda: run(ddim(), start=State(0, torch.zeros(5, 2, 3))), "the start has step 0"),
        (lambda: run(ddim(), dtype=torch.bfloat16), "dtype is torch.bfloat16"),
        (lambda: run(ddim(), w=interval(1.0, 3.0, 1.0)), "guidance interval"),
        (
            lambda: sample(
                cfg(ORACLE, 0),
                torch.zeros(2).long(),
                torch.arange(3),
                (1,),
                levels=levels(CosineSchedule(), 2),
                sampler=ddim(),
                seed=0,
            ),
            "2 labels but 3 indices",
        ),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
