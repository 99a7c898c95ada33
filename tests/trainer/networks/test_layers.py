"""Conditioning, precision and dropout of the layers that the networks share."""

import math

import pytest
import torch
import torch.nn.functional as F

from freeguide.trainer.diffusion.randomness import keep_mask
from freeguide.trainer.networks.layers import Conditioning, Conv32, DropoutKey, GroupNorm, Linear32, attend, drop, logsnr_features

BF16_EPS = 2.0**-8  # twice the largest relative rounding error of bf16


def test_features_at_logsnr_zero_are_those_of_adm_at_step_500() -> None:
    """u(0) = (2 / pi) arctan(1) = 1/2, hence t = 500 of ADM's 1000. Tolerance: 3 ulp of the phase 500 in fp32 (3e-5 each)."""
    frequencies = [10_000 ** (-k / 4) for k in range(4)]
    expected = [math.cos(500 * f) for f in frequencies] + [math.sin(500 * f) for f in frequencies]
    torch.testing.assert_close(logsnr_features(torch.zeros(1), 8)[0], torch.tensor(expected), atol=1e-4, rtol=0)


def test_features_tell_apart_neighbouring_levels_of_1024_step_sampling_over_the_whole_range() -> None:
    """Levels are uniform in u between logsnr +-20: t moves by 1000 / 1024 a step, 0.98 radians of the first frequency."""
    low, high = math.atan(math.exp(-10)), math.atan(math.exp(10))
    logsnr = -2 * torch.linspace(low, high, 1024, dtype=torch.float64).tan().log()
    features = logsnr_features(logsnr.float(), 64)
    assert features.isfinite().all()
    assert (features[1:] - features[:-1]).norm(dim=1).min() > 0.9


def test_logsnr_is_embedded_in_fp32_when_the_weights_are_bf16() -> None:
    conditioning = Conditioning(32, 64, rows=3).bfloat16()
    logsnr, labels = torch.tensor([-20.0, 19.9, 20.0]), torch.tensor([0, 1, 2])
    wide = Conditioning(32, 64, rows=3)
    wide.load_state_dict(conditioning.state_dict())
    assert conditioning(logsnr, labels).dtype == torch.bfloat16
    assert torch.equal(conditioning(logsnr, labels), wide(logsnr, labels).bfloat16())


@pytest.mark.parametrize(
    ("channels", "groups"), [(192, 32), (1344, 32), (128, 32), (96, 24), (64, 16), (32, 8), (100, 25), (34, 2), (6, 1), (2, 1)]
)
def test_groups_are_32_where_they_hold_four_channels_and_else_the_most_that_do(channels: int, groups: int) -> None:
    assert GroupNorm(channels).num_groups == groups


def test_group_norm_of_bf16_features_far_from_zero_is_exact_to_one_rounding() -> None:
    """Mean 50, deviation 1, against float64. Statistics kept in bf16 would put the mean wrong by up to 0.125, in the output or in
    the gradient. The exact values are rounded to bf16 once; fp32 adds 1e-4 to values near 0."""
    generator = torch.Generator().manual_seed(0)
    h = (50 + torch.randn(2, 32, 8, 8, generator=generator)).bfloat16().requires_grad_()
    upstream = torch.randn(2, 32, 8, 8, generator=generator).bfloat16()
    norm = GroupNorm(32).bfloat16()
    out = norm(h)
    (gradient,) = torch.autograd.grad(out, h, upstream)
    exact_h = h.detach().double().requires_grad_()
    exact_out = F.group_norm(exact_h, norm.num_groups, eps=norm.eps)
    (exact_gradient,) = torch.autograd.grad(exact_out, exact_h, upstream.double())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact_out, rtol=BF16_EPS, atol=1e-4)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=BF16_EPS, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_softmax_average_of_the_values_per_head(dtype: torch.dtype) -> None:
    """Against the definition in float64. fp32: 1e-5; bf16: the output is rounded, and so may be the softmax weights (sum 1)."""
    heads, width = 4, 32
    qkv = (4 * torch.randn(2, 10, 3 * width, generator=torch.Generator().manual_seed(0))).to(dtype)
    q, k, v = (part.double().unflatten(2, (heads, -1)) for part in qkv.chunk(3, dim=2))
    weight = (torch.einsum("bnhc,bmhc->bhnm", q, k) / math.sqrt(width // heads)).softmax(dim=-1)
    exact = torch.einsum("bhnm,bmhc->bnhc", weight, v).flatten(2)
    tolerance = 1e-5 if dtype == torch.float32 else 2 * BF16_EPS * qkv.abs().max().item()
    torch.testing.assert_close(attend(qkv, heads).double(), exact, rtol=0, atol=tolerance)


def test_output_layers_compute_in_fp32_whatever_their_weights() -> None:
    h = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    conv, linear = Conv32(8, 3, 3, padding=1).bfloat16(), Linear32(4, 5).bfloat16()
    assert conv.bias is not None
    assert torch.equal(conv(h), F.conv2d(h, conv.weight.float(), conv.bias.float(), padding=1))
    assert torch.equal(linear(h), F.linear(h, linear.weight.float(), linear.bias.float()))


def test_dropout_keeps_what_the_key_says_and_scales_it() -> None:
    h = torch.full((3, 4, 5, 5), 2.0)
    index = torch.tensor([7, 2**40, 0])
    keep = keep_mask(5, index, shape=(4, 5, 5), p=0.25, stream=9)
    assert torch.equal(drop(h, 0.25, DropoutKey(5, index), 9), torch.where(keep, 2 / 0.75, 0.0))
    assert 0 < keep.sum() < keep.numel()


def test_nothing_is_drawn_without_a_key_or_without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a mask was drawn")

    monkeypatch.setattr("freeguide.trainer.networks.layers.keep_mask", refuse)
    h = torch.ones(1, 2)
    assert drop(h, 0.5, None, 0) is h
    assert drop(h, 0.0, DropoutKey(0, torch.tensor([0])), 0) is h


def test_fp32_layers_stay_fp32_under_autocast() -> None:
    """`sampling.precision=bf16` is autocast over fp32 weights, which casts inside linear layers and convolutions."""
    torch.manual_seed(0)
    h = torch.randn(2, 8, 4, 4)
    for layer, x in ((Linear32(8, 8), h.flatten(2).mT), (Conv32(8, 3, 3, padding=1), h), (GroupNorm(8), h)):
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), expected)
