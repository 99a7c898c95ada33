"""Data whose best network is known, and what guided samplers must do with it. Check a sampler here before any image.

The best eps-network is eps*(z) = -sigma grad log p(z). For a Gaussian x ~ N(m, s^2) in every dimension, z has variance
D = alpha^2 s^2 + sigma^2 and eps* = sigma (z - alpha m) / D. So with Gaussian classes and a Gaussian unconditional model, guidance
is affine in z at every level, and each transition of a sampler maps a Gaussian to a Gaussian: `finite_t` follows its mean and
variance exactly, at any T, v and w. As T grows they tend to closed forms (`ancestral_limit`, `ode_limit`). Neither limit is the
tilted density p(x|c)^(1 + w) p(x)^-w that guidance is often said to sample (`tilted`).

Every oracle is a network: oracle(z (B, ...), logsnr (B,), labels (B,)) -> eps, with the null label for the unconditional one.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from freeguide.trainer.diffusion.schedule import alpha_sigma, broadcast, posterior, reverse_variance


class Moments(NamedTuple):
    """Mean and variance of each dimension of a Gaussian."""

    mean: float
    variance: float


@dataclass(frozen=True)
class GaussianClasses:
    """x | c ~ N(means[c], variance) and x ~ N(mean, total_variance), in every dimension of z alike.

    The unconditional Gaussian is what the null label returns. It need not be the mixture of the classes: with one class drawn from
    N(mean, total_variance - variance) it is.
    """

    means: tuple[float, ...]
    variance: float
    mean: float
    total_variance: float

    @property
    def null_label(self) -> int:
        """The label of the unconditional model, the number of classes."""
        return len(self.means)

    def __call__(self, z: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
        means = torch.tensor([*self.means, self.mean], dtype=z.dtype, device=z.device)[labels]
        variances = torch.tensor([self.variance] * len(self.means) + [self.total_variance], dtype=z.dtype, device=z.device)[labels]
        alpha, sigma = (broadcast(c, z) for c in alpha_sigma(logsnr))
        means, variances = broadcast(means, z), broadcast(variances, z)
        return sigma * (z - alpha * means) / (alpha**2 * variances + sigma**2)


@dataclass(frozen=True)
class GaussianMixture:
    """K classes x | c ~ N(means[c], std^2 I) in D dimensions, equally likely; z has shape (B, D).

    The unconditional model is exact, so eps(z) = sum over c of p(c | z) eps(z, c) (section 5), and `log_posterior` is the exact
    noise-aware classifier.
    """

    means: tuple[tuple[float, ...], ...]
    std: float

    @property
    def null_label(self) -> int:
        """The label of the unconditional model, the number of classes."""
        return len(self.means)

    def _means(self, z: Tensor) -> Tensor:
        return torch.tensor(self.means, dtype=z.dtype, device=z.device)

    def log_posterior(self, z: Tensor, logsnr: Tensor) -> Tensor:
        """log p(c | z): (B, K)."""
        alpha, sigma = (broadcast(c, z) for c in alpha_sigma(logsnr))
        distance = (z[:, None] - alpha[..., None] * self._means(z)).square().sum(-1)
        return (-distance / (2 * (alpha**2 * self.std**2 + sigma**2))).log_softmax(1)

    def __call__(self, z: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
        alpha, sigma = (broadcast(c, z) for c in alpha_sigma(logsnr))
        # Each class' eps is affine in its mean, so a weighting of classes is a weighting of means.
        one_hot = torch.nn.functional.one_hot(labels, self.null_label + 1)[:, :-1].to(z.dtype)
        weights = torch.where((labels == self.null_label)[:, None], self.log_posterior(z, logsnr).exp(), one_hot)
        return sigma * (z - alpha * (weights @ self._means(z))) / (alpha**2 * self.std**2 + sigma**2)

    def log_density(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """log p(x | c), or log p(x) without labels, of clean data (B, D): (B,)."""
        d = x.shape[1]
        each = -(x[:, None] - self._means(x)).square().sum(-1) / (2 * self.std**2) - d * math.log(self.std * math.sqrt(2 * math.pi))
        if labels is None:
            return each.logsumexp(1) - math.log(self.null_label)
        return each.gather(1, labels[:, None])[:, 0]


TRIANGLE = GaussianMixture(means=((0.0, 1.3), (-1.3 * 0.87, -1.3 * 0.5), (1.3 * 0.87, -1.3 * 0.5)), std=0.45)
"""Three Gaussians in the plane, in the manner of the paper's figure 2 (whose numbers the paper does not give)."""


def finite_t(oracle: GaussianClasses, label: int, levels: Tensor, w: float, *, v: float = 0.3, eta: float | None = None) -> Moments:
    """Mean and variance that Algorithm 2 must give with this network, unclipped, exactly at these T levels.

    Guided eps~ = P z + Q gives x = g z + o with g = (1 - sigma P) / alpha and o = -sigma Q / alpha. A transition
    z' = G z + H + noise of variance N maps (mean, variance) to (G mean + H, G^2 variance + N); the start is (0, 1) and the end
    (g mean + o, g^2 variance).

    Args:
        oracle, label: the data and the class that is sampled.
        levels: (T,) float64 log-SNRs (schedule.levels).
        w: guidance weight.
        v: of Algorithm 2; without effect when `eta` is given.
        eta: when given, the sampler is DDIM with this eta.
    """
    m, big = oracle.means[label], oracle.total_variance
    mean, variance = 0.0, 1.0
    for step, logsnr in enumerate(levels):
        alpha, sigma = (c.item() for c in alpha_sigma(logsnr))
        d_c, d_u = alpha**2 * oracle.variance + sigma**2, alpha**2 * big + sigma**2
        p = sigma * ((1 + w) / d_c - w / d_u)
        q = -sigma * alpha * ((1 + w) * m / d_c - w * oracle.mean / d_u)
        # (1 - sigma P) / alpha, without the cancellation of 1 - sigma^2 / D = alpha^2 s^2 / D
        g = alpha * ((1 + w) * oracle.variance / d_c - w * big / d_u)
        o = -sigma * q / alpha
        if step == len(levels) - 1:
            return Moments(g * mean + o, g**2 * variance)
        then = levels[step + 1]
        if eta is None:
            k = posterior(logsnr, then)
            z_scale, x_scale, eps_scale = k.z_scale.item(), k.x_scale.item(), 0.0
            noise = reverse_variance(logsnr, then, v).item()
        else:
            alpha_then, sigma_then = (c.item() for c in alpha_sigma(then))
            noise = eta**2 * posterior(logsnr, then).variance.item()
            z_scale, x_scale, eps_scale = 0.0, alpha_then, math.sqrt(sigma_then**2 - noise)
        gain, offset = z_scale + x_scale * g + eps_scale * p, x_scale * o + eps_scale * q
        mean, variance = gain * mean + offset, gain**2 * variance + noise
    raise ValueError("levels is empty, but a sampler needs at least one network level.")


def tilted(oracle: GaussianClasses, label: int, w: float) -> Moments:
    """The density proportional to p(x | c)^(1 + w) p(x)^-w, which exists while (1 + w) / s^2 > w / S^2."""
    precision = (1 + w) / oracle.variance - w / oracle.total_variance
    if precision <= 0:
        raise ValueError(f"the tilted density at w = {w} has no finite integral, because its precision would be {precision}.")
    mean = ((1 + w) * oracle.means[label] / oracle.variance - w * oracle.mean / oracle.total_variance) / precision
    return Moments(mean, 1 / precision)


def ancestral_limit(oracle: GaussianClasses, label: int, w: float) -> Moments:
    """Algorithm 2 as T grows, for any v: the reverse diffusion with guided scores. Needs 0 < r = s^2 / S^2 < 1 and w > -1/2.

    variance s^2 (1 - r^(1 + 2 w)) / ((1 - r) (1 + 2 w)), mean m_u + (m_c - m_u) (1 + r (1 - r^w) / (1 - r)).
    """
    r = _ratio(oracle)
    shift = oracle.means[label] - oracle.mean
    variance = oracle.variance * (1 - r ** (1 + 2 * w)) / ((1 - r) * (1 + 2 * w))
    return Moments(oracle.mean + shift * (1 + r * (1 - r**w) / (1 - r)), variance)


def ode_limit(oracle: GaussianClasses, label: int, w: float) -> Moments:
    """DDIM, and every deterministic sampler, as T grows: the probability-flow ODE with guided scores. Needs 0 < r < 1.

    variance s^2 r^w, mean m_u + (m_c - m_u) (1 + w/2 r^((1 + w)/2) (1 - r)^(-1/2) J) with J the integral from r to 1 of
    rho^(-(1 + w)/2) (1 - rho)^(-1/2). With rho = sech(t)^2, J is twice the integral of cosh(t)^(w - 1) from 0 to
    artanh((1 - r)^(1/2)), which is smooth.
    """
    r = _ratio(oracle)
    end = math.atanh(math.sqrt(1 - r))
    nodes, weights = np.polynomial.legendre.leggauss(200)
    integral = end * float(weights @ np.cosh(end * (nodes + 1) / 2) ** (w - 1))
    gain = 1 + w / 2 * r ** ((1 + w) / 2) / math.sqrt(1 - r) * integral
    return Moments(oracle.mean + (oracle.means[label] - oracle.mean) * gain, oracle.variance * r**w)


def _ratio(oracle: GaussianClasses) -> float:
    r = oracle.variance / oracle.total_variance
    if not 0 < r < 1:
        raise ValueError(f"the ratio of class variance to total variance is {r}, but the limits hold between 0 and 1.")
    return r
