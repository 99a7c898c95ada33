"""Algorithm 1: the law of its loss with a known best network, and its independence from the batch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freeguide.configs.schema import Config, DataConfig, DiffusionConfig
from freeguide.trainer.diffusion.objective import noised, objective_of, training_loss
from freeguide.trainer.diffusion.oracles import GaussianClasses
from freeguide.trainer.diffusion.parametrisation import KINDS, output_of, predict
from freeguide.trainer.diffusion.randomness import Purpose, normal
from freeguide.trainer.diffusion.schedule import SCHEDULES, CosineSchedule, FlowSchedule, alpha_sigma, broadcast

ORACLE = GaussianClasses(means=(0.8, -0.4), variance=0.25, mean=0.2, total_variance=0.61)  # the exact mixture's first two moments
SETTINGS = {"schedule": CosineSchedule(), "p_uncond": 0.1, "null_label": 2, "seed": 7}


def data(count, shape=(2, 3, 3), start=0, dtype=torch.float64):
    """Draws from the two Gaussian classes, keyed by index like everything else."""
    index = start + torch.arange(count)
    labels = index % 2
    means = torch.tensor(ORACLE.means, dtype=torch.float64)[labels]
    x = broadcast(means, torch.empty(count, *shape)) + 0.5 * normal(99, Purpose.SAMPLE_PRIOR, index, shape, dtype=torch.float64)
    return x.to(dtype), labels, index


def as_kind(oracle, kind):
    """The oracle as a network of another output kind, in float64 inside."""

    def network(z, logsnr, labels):
        p = predict("eps", oracle(z.double(), logsnr.double(), labels), z.double(), logsnr.double())
        return output_of(kind, p.x, p.eps, logsnr.double()).to(z.dtype)

    return network


def test_z_follows_the_forward_process_and_labels_are_dropped_to_null():
    x, labels, index = data(64)
    n = noised(x, labels, index, **SETTINGS)
    alpha, sigma = (broadcast(c, x) for c in alpha_sigma(n.logsnr))
    torch.testing.assert_close(n.z, alpha * x + sigma * n.eps, rtol=0, atol=0)
    assert torch.equal(n.labels, torch.where(n.dropped, 2, labels))
    assert torch.equal(n.eps, normal(7, Purpose.TRAIN_NOISE, index, x.shape[1:], dtype=x.dtype))


def test_the_objective_of_a_config_is_algorithm_1_with_its_options():
    x, labels, index = data(5)
    diffusion = DiffusionConfig(-9.0, 8.0, p_uncond=0.5, schedule="flow", prediction="v", loss_weight="min_snr")
    config = Config(seed=7, data=DataConfig(classes=2), diffusion=diffusion)
    options = {"schedule": FlowSchedule(-9.0, 8.0), "p_uncond": 0.5, "null_label": 2, "seed": 7, "kind": "v", "weight": "min_snr"}
    found = objective_of(config).losses(config, ORACLE, x, labels, index)
    assert all(map(torch.equal, found, training_loss(ORACLE, x, labels, index, **options)))
    assert not torch.equal(found.loss, training_loss(ORACLE, x, labels, index, **SETTINGS).loss)


@pytest.mark.parametrize("p_uncond", [0.0, 0.1, 0.5, 1.0])
def test_the_share_of_dropped_conditions_is_p_uncond_on_any_number_of_ranks(p_uncond):
    count = 40_000
    x, labels = torch.zeros(count, 1), torch.zeros(count, dtype=torch.int64)
    index = torch.arange(count)

    def dropped(part):
        return noised(x[part], labels[part], index[part], **{**SETTINGS, "p_uncond": p_uncond}).dropped

    whole = dropped(slice(None))
    assert abs(whole.double().mean() - p_uncond) <= 4 * math.sqrt(
        p_uncond * (1 - p_uncond) / count
    )  # 4 standard errors; exact at 0, 1
    for world_size in (2, 3):
        merged = torch.empty_like(whole)
        for rank in range(world_size):
            merged[rank::world_size] = dropped(slice(rank, None, world_size))
        assert torch.equal(merged, whole)


@pytest.mark.parametrize("schedule", [make() for make in SCHEDULES.values()], ids=repr)
def test_logsnr_is_drawn_from_the_schedule(schedule):
    count = 20_000
    n = noised(
        torch.zeros(count, 1), torch.zeros(count, dtype=torch.int64), torch.arange(count), **{**SETTINGS, "schedule": schedule}
    )
    u = schedule.u(n.logsnr.double()).sort().values
    distance = (u - (torch.arange(count) + 0.5) / count).abs().max()
    assert distance < 1.63 / math.sqrt(count)  # Kolmogorov-Smirnov at the 1 % level


def test_the_best_networks_loss_is_the_posterior_variance_of_the_noise():
    x, labels, index = data(20_000)
    losses = training_loss(ORACLE, x, labels, index, **{**SETTINGS, "p_uncond": 0.0})
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    alpha, sigma = alpha_sigma(CosineSchedule().logsnr(u))
    expected = (alpha**2 * 0.25 / (alpha**2 * 0.25 + sigma**2)).mean().item()  # the variance of eps given z
    error = losses.loss.double().std().item() / math.sqrt(len(x))
    assert abs(losses.loss.double().mean().item() - expected) < 4 * error  # 4 standard errors


def test_any_change_of_the_best_network_raises_the_loss():
    x, labels, index = data(4000)
    best = training_loss(ORACLE, x, labels, index, **{**SETTINGS, "p_uncond": 0.0}).loss.mean()
    changes = [
        lambda z, logsnr, labels: 1.1 * ORACLE(z, logsnr, labels),
        lambda z, logsnr, labels: ORACLE(z, logsnr, labels) + 0.1,
        lambda z, logsnr, labels: ORACLE(z, logsnr, 1 - labels),
        lambda z, logsnr, labels: ORACLE(z, logsnr, torch.full_like(labels, 2)),
        lambda z, logsnr, labels: ORACLE(z, logsnr + 0.5, labels),
    ]
    for network in changes:
        assert training_loss(network, x, labels, index, **{**SETTINGS, "p_uncond": 0.0}).loss.mean() > best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_kind_of_output_has_the_same_loss(dtype):
    x, labels, index = data(200, dtype=dtype)
    first = training_loss(ORACLE, x, labels, index, **SETTINGS)
    for kind in KINDS[1:]:
        other = training_loss(as_kind(ORACLE, kind), x, labels, index, kind=kind, **SETTINGS)
        assert torch.equal(other.logsnr, first.logsnr)
        # Outputs of order 1 rounded to float32 in another space: relative 1e-3 of the small losses at high noise, 1e-6 of the rest.
        torch.testing.assert_close(other.loss, first.loss, rtol=2e-3 if dtype == torch.float32 else 1e-6, atol=1e-6)


def test_weights_multiply_the_papers_loss():
    x, labels, index = data(100)
    plain = training_loss(ORACLE, x, labels, index, **SETTINGS)
    snr = training_loss(ORACLE, x, labels, index, weight="min_snr", gamma=3.0, **SETTINGS)
    torch.testing.assert_close(
        snr.loss.double(), plain.loss.double() * (3 * torch.exp(-plain.logsnr)).clamp(max=1), rtol=1e-6, atol=0
    )
    v = training_loss(ORACLE, x, labels, index, weight="v", **SETTINGS)
    torch.testing.assert_close(v.loss.double(), plain.loss.double() * (1 + torch.exp(-plain.logsnr)), rtol=1e-6, atol=0)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 7),
    start=st.integers(0, 2**40),
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    network_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    p_uncond=st.floats(0, 1),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**64 - 1),
)
def test_an_example_has_the_same_loss_alone_and_in_any_batch(batch, start, shape, dtype, network_dtype, p_uncond, kind, seed):
    x, labels, index = data(batch, shape, start, dtype)

    def network(z, logsnr, labels):
        assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        return (z * 0.5 + broadcast(labels + logsnr, z)).to(network_dtype)

    def run(part):
        s = {**SETTINGS, "p_uncond": p_uncond, "seed": seed}
        return training_loss(network, x[part], labels[part], index[part], kind=kind, **s)

    whole = run(slice(None))
    assert whole.loss.dtype == torch.float32
    assert whole.loss.shape == whole.logsnr.shape == whole.dropped.shape == (batch,)
    assert torch.isfinite(whole.loss).all()
    for i in range(batch):
        alone = run(slice(i, i + 1))
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, whole, strict=True))


def test_gradients_reach_the_network_through_the_loss():
    x, labels, index = data(16, dtype=torch.float32)
    scale = torch.zeros((), requires_grad=True)
    losses = training_loss(lambda z, logsnr, labels: scale * z, x, labels, index, **SETTINGS)
    losses.loss.mean().backward()
    n = noised(x, labels, index, **SETTINGS)
    torch.testing.assert_close(scale.grad, -2 * (n.z * n.eps).mean(), rtol=1e-5, atol=0)  # float32 sums in another order


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"p_uncond": 1.1}, "p_uncond is 1.1"),
        ({"p_uncond": -0.1}, "p_uncond is -0.1"),
        ({"labels": torch.tensor([0, 2])}, "labels reach from 0 to 2, but they must be from 0 to 1"),
        ({"labels": torch.tensor([-1, 0])}, "labels reach from -1 to 0"),
        ({"labels": torch.tensor([0])}, r"must be \(2,\) int64"),
        ({"labels": torch.tensor([0.0, 1.0])}, "int64"),
        ({"x": torch.zeros(2, 3, dtype=torch.uint8)}, "floating-point batch"),
        ({"index": torch.arange(1)}, "1 indices for 2 examples"),
        ({"kind": "score"}, "output kind is 'score'"),
        ({"weight": "snr"}, "loss weight is 'snr'"),
        ({"network": lambda z, logsnr, labels: z[:, :1]}, "must agree"),
    ],
)
def test_bad_arguments_are_named(change, words):
    given = {
        "network": ORACLE,
        "x": torch.zeros(2, 3),
        "labels": torch.tensor([0, 1]),
        "index": torch.arange(2),
        **SETTINGS,
        **change,
    }
    with pytest.raises(ValueError, match=words):
        training_loss(given.pop("network"), given.pop("x"), given.pop("labels"), given.pop("index"), **given)
