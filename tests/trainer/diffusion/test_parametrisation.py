"""eps, x, v and EDM's F as names of one thing: conversions, error identities, and loss weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freeguide.trainer.diffusion.parametrisation import KINDS, WEIGHTS, eps_error_scale, loss_weight, output_of, predict
from freeguide.trainer.diffusion.schedule import SCHEDULES, CosineSchedule, NormalSchedule, alpha_sigma, broadcast


def scene(logsnr, seed=0, shape=(3, 4, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logsnr = torch.as_tensor(logsnr, dtype=dtype)
    x, eps = torch.randn(2, len(logsnr), *shape, generator=generator, dtype=torch.float64).to(dtype)
    alpha, sigma = (broadcast(c, x) for c in alpha_sigma(logsnr))
    return x, eps, alpha * x + sigma * eps, logsnr


def squared(a):
    return a.square().flatten(1).sum(1)


@pytest.mark.parametrize("kind", KINDS)
def test_predict_inverts_output_of(kind):
    x, eps, z, logsnr = scene([-8.0, -1.0, 0.0, 1.0, 8.0])
    p = predict(kind, output_of(kind, x, eps, logsnr), z, logsnr)
    # x from eps, and eps from x, amplify rounding by e^4 at |lambda| = 8; 1e-13 covers it in float64.
    torch.testing.assert_close(p.x, x, rtol=0, atol=1e-13)
    torch.testing.assert_close(p.eps, eps, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["v", "edm"])
def test_v_and_edm_lose_nothing_at_either_end(kind):
    x, eps, z, logsnr = scene([-20.0, 20.0], dtype=torch.float32)
    p = predict(kind, output_of(kind, x, eps, logsnr), z, logsnr)
    # Float32 rounding of numbers below 5, without amplification; the eps-kind is 22026 times worse in x.
    torch.testing.assert_close(p.x, x, rtol=0, atol=5e-6)
    torch.testing.assert_close(p.eps, eps, rtol=0, atol=5e-6)


def test_v_is_the_rotation_of_x_and_eps():
    x, eps, z, logsnr = scene([-3.0, 0.0, 5.0])
    alpha, sigma = (broadcast(c, x) for c in alpha_sigma(logsnr))
    v = output_of("v", x, eps, logsnr)
    torch.testing.assert_close(alpha * z - sigma * v, x, rtol=0, atol=1e-13)
    torch.testing.assert_close(sigma * z + alpha * v, eps, rtol=0, atol=1e-13)


def test_edm_is_karras_preconditioning_in_its_own_coordinates():
    x, _, z, logsnr = scene([-6.0, 0.0, 6.0])
    s = 0.5
    alpha, _ = (broadcast(c, x) for c in alpha_sigma(logsnr))
    level, y = broadcast(torch.exp(-logsnr / 2), x), z / alpha
    c_skip, c_out = s**2 / (level**2 + s**2), level * s / (level**2 + s**2).sqrt()
    f = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    torch.testing.assert_close(predict("edm", f, z, logsnr, s).x, c_skip * y + c_out * f, rtol=1e-12, atol=1e-12)


def test_edm_with_unit_data_is_minus_v():
    x, eps, _, logsnr = scene([-20.0, -1.0, 3.0, 20.0])
    torch.testing.assert_close(output_of("edm", x, eps, logsnr, 1.0), -output_of("v", x, eps, logsnr), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_the_kinds_differ_by_a_factor_of_lambda(kind):
    x, eps, z, logsnr = scene([-9.0, -2.0, 0.0, 2.0, 9.0])
    truth = output_of(kind, x, eps, logsnr)
    output = truth + torch.randn(truth.shape, generator=torch.Generator().manual_seed(2), dtype=truth.dtype)
    p = predict(kind, output, z, logsnr)
    scale = eps_error_scale(kind, logsnr)
    torch.testing.assert_close(squared(p.eps - eps), scale * squared(output - truth), rtol=1e-9, atol=0)
    torch.testing.assert_close(squared(p.x - x), torch.exp(-logsnr) * squared(p.eps - eps), rtol=1e-9, atol=0)
    if kind == "v":
        torch.testing.assert_close(squared(output - truth), (1 + torch.exp(-logsnr)) * squared(p.eps - eps), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_named_weights_undo_the_factor_of_their_kind(dtype):
    logsnr = torch.linspace(-20, 20, 81, dtype=dtype)
    tolerance = 8 * torch.finfo(dtype).eps  # a handful of roundings
    for kind, name in (("eps", "paper"), ("v", "v"), ("edm", "edm")):
        product = eps_error_scale(kind, logsnr) * loss_weight(name, logsnr, CosineSchedule())
        torch.testing.assert_close(product, torch.ones_like(logsnr), rtol=tolerance, atol=0)


def test_min_snr_is_the_eps_loss_when_noisy_and_the_x_loss_times_gamma_when_clean():
    logsnr = torch.linspace(-20, 20, 81, dtype=torch.float64)
    weight = loss_weight("min_snr", logsnr, CosineSchedule(), gamma=5.0)
    assert torch.equal(weight[logsnr < 1.6], torch.ones_like(weight[logsnr < 1.6]))
    x_weight = weight * eps_error_scale("x", logsnr)
    torch.testing.assert_close(x_weight, torch.exp(logsnr).clamp(max=5.0), rtol=1e-14, atol=0)


def test_weight_times_density_has_the_published_shapes():
    logsnr = torch.linspace(-15, 15, 61, dtype=torch.float64)

    def shape(weight, schedule, known):
        ratio = loss_weight(weight, logsnr, schedule) * schedule.density(logsnr) / known
        torch.testing.assert_close(ratio / ratio[0], torch.ones_like(ratio), rtol=1e-12, atol=0)

    shape("paper", CosineSchedule(), 1 / torch.cosh(logsnr / 2))
    shape("v", CosineSchedule(), torch.exp(-logsnr / 2))
    normal = torch.exp(-(((logsnr - 2.4) / 2.4) ** 2) / 2)
    shape("edm", NormalSchedule(), normal * (torch.exp(-logsnr) + 0.25) / 0.25)
    for make in SCHEDULES.values():
        shape("elbo", make(), torch.ones_like(logsnr))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    logsnr=st.lists(st.floats(-20, 20), min_size=1, max_size=4),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    wide=st.booleans(),
    network_dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_predictions_keep_the_shape_and_dtype_of_z_whatever_the_network_returns(kind, logsnr, shape, wide, network_dtype):
    dtype = torch.float64 if wide else torch.float32
    x, eps, z, logsnr = scene(logsnr, shape=shape, dtype=dtype)
    p = predict(kind, output_of(kind, x, eps, logsnr).to(network_dtype), z, logsnr)
    assert p.x.shape == p.eps.shape == z.shape
    assert p.x.dtype == p.eps.dtype == dtype
    alpha, sigma = (broadcast(c, z) for c in alpha_sigma(logsnr))
    # The pair always explains z. Dividing by alpha or sigma and multiplying back costs a few roundings of z and of the output.
    error = (alpha * p.x + sigma * p.eps - z).abs().max()
    assert error < 64 * torch.finfo(dtype).eps


def test_unknown_names_and_wrong_shapes_are_refused():
    x, eps, z, logsnr = scene([0.0])
    for call in (
        lambda: predict("epsilon", z, z, logsnr),
        lambda: output_of("score", x, eps, logsnr),
        lambda: eps_error_scale("F", logsnr),
    ):
        with pytest.raises(ValueError, match="must be one of eps, x, v, edm"):
            call()
    with pytest.raises(ValueError, match="must be one of " + ", ".join(WEIGHTS)):
        loss_weight("snr", logsnr, CosineSchedule())
    with pytest.raises(ValueError, match=r"returned shape \(1, 6, 4, 4\) for z of shape \(1, 3, 4, 4\)"):
        predict("eps", torch.cat((z, z), 1), z, logsnr)
