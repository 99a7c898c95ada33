"""The forward process in log-SNR (section 2 of the paper), and the distributions of log-SNR that training may draw from.

With lambda = log(alpha^2 / sigma^2) and variance preserving, alpha^2 = sigmoid(lambda) and sigma^2 = sigmoid(-lambda):

    q(z_lambda | x)          = N(alpha x, sigma^2)                                                       (equation 1)
    q(z_lambda | z_lambda')  = N((alpha / alpha') z', (1 - e^(lambda - lambda')) sigma^2),  lambda < lambda'   (equation 2)
    q(z_lambda' | z_lambda, x) = N(e^(lambda - lambda') (alpha' / alpha) z + (1 - e^(lambda - lambda')) alpha' x,
                                   (1 - e^(lambda - lambda')) sigma'^2)                                   (equation 3)

At lambda = -20, alpha^2 is 2e-9. So nothing here forms 1 - alpha^2 or 1 - e^x: the sigmoid of either sign, expm1, and sines of
small angles keep every digit at both ends.

A schedule is a density p(lambda) on [logsnr_min, logsnr_max] written as a decreasing function lambda(u) of u ~ U(0, 1), with
u = 0 at logsnr_max. Training draws u; sampling walks u from 1 to 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from freeguide.configs.schema import DiffusionConfig


def alpha_sigma(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of the forward process (below equation 1), each of the shape and dtype of `logsnr`."""
    return logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()


def broadcast(coefficient: Tensor, z: Tensor) -> Tensor:
    """A coefficient () or (B,) shaped to multiply z (B, ...), in z's dtype. A 0-dimensional one may stay on the CPU."""
    if coefficient.ndim == 0:
        return coefficient
    return coefficient.to(z.dtype).reshape(-1, *[1] * (z.ndim - 1))


class Transition(NamedTuple):
    """q(z_lambda | z_lambda') = N(scale z', variance)."""

    scale: Tensor
    variance: Tensor


class Posterior(NamedTuple):
    """q(z_lambda' | z_lambda, x) = N(z_scale z + x_scale x, variance)."""

    z_scale: Tensor
    x_scale: Tensor
    variance: Tensor


def transition(logsnr: Tensor, cleaner: Tensor) -> Transition:
    """The forward transition from log-SNR `cleaner` down to `logsnr` (equation 2); needs logsnr <= cleaner, not checked."""
    alpha, sigma = alpha_sigma(logsnr)
    return Transition(alpha / alpha_sigma(cleaner)[0], -torch.expm1(logsnr - cleaner) * sigma**2)


def posterior(logsnr: Tensor, cleaner: Tensor) -> Posterior:
    """The reverse transition from `logsnr` up to `cleaner` when x is known (equation 3); needs logsnr <= cleaner, not checked."""
    alpha, _ = alpha_sigma(logsnr)
    alpha_cleaner, sigma_cleaner = alpha_sigma(cleaner)
    ratio, rest = torch.exp(logsnr - cleaner), -torch.expm1(logsnr - cleaner)
    return Posterior(ratio * alpha_cleaner / alpha, rest * alpha_cleaner, rest * sigma_cleaner**2)


def reverse_variance(logsnr: Tensor, cleaner: Tensor, v: float) -> Tensor:
    """Variance of the sampler's transition (equation 4): posterior's variance^(1 - v) times forward transition's variance^v."""
    return posterior(logsnr, cleaner).variance ** (1 - v) * transition(logsnr, cleaner).variance ** v


class Schedule(Protocol):
    """A distribution of training log-SNR. `u` and `logsnr` keep shape and dtype of their argument and invert each other."""

    @property
    def logsnr_min(self) -> float:
        """The noisiest log-SNR."""

    @property
    def logsnr_max(self) -> float:
        """The cleanest log-SNR."""

    def logsnr(self, u: Tensor) -> Tensor:
        """lambda(u), decreasing, from logsnr_max at u = 0 to logsnr_min at u = 1."""

    def u(self, logsnr: Tensor) -> Tensor:
        """The inverse of `logsnr`: the probability of a larger lambda, one minus the distribution function."""

    def density(self, logsnr: Tensor) -> Tensor:
        """p(lambda), zero outside the range."""


@dataclass(frozen=True)
class CosineSchedule:
    """The paper's p(lambda) = sech(lambda / 2) / (4 a) (section 2): lambda = -2 log tan(a u + b).

    With b = arctan(e^(-logsnr_max / 2)) and a = arctan(e^(-logsnr_min / 2)) - b. It is the cosine schedule of Nichol & Dhariwal
    2021, truncated. As pi/2 - a - b = arctan(e^(logsnr_min / 2)) =: c, the tangent is sin(a u + b) / sin(a (1 - u) + c), which
    loses nothing at either end.
    """

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0

    def __post_init__(self) -> None:
        _check_range(self)

    def _angles(self) -> tuple[float, float, float]:
        b, c = math.atan(math.exp(-self.logsnr_max / 2)), math.atan(math.exp(self.logsnr_min / 2))
        return math.pi / 2 - b - c, b, c

    def logsnr(self, u: Tensor) -> Tensor:
        a, b, c = self._angles()
        return 2 * torch.log(torch.sin(a * (1 - u) + c) / torch.sin(a * u + b))

    def u(self, logsnr: Tensor) -> Tensor:
        a, b, _ = self._angles()
        return (torch.atan(torch.exp(-logsnr / 2)) - b) / a

    def density(self, logsnr: Tensor) -> Tensor:
        return _inside(self, logsnr) / (4 * self._angles()[0] * torch.cosh(logsnr / 2))


@dataclass(frozen=True)
class UniformSchedule:
    """Uniform p(lambda): the unweighted objective is then the variational bound (section 2; Kingma et al. 2021)."""

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0

    def __post_init__(self) -> None:
        _check_range(self)

    def logsnr(self, u: Tensor) -> Tensor:
        return self.logsnr_min * u + self.logsnr_max * (1 - u)

    def u(self, logsnr: Tensor) -> Tensor:
        return (self.logsnr_max - logsnr) / (self.logsnr_max - self.logsnr_min)

    def density(self, logsnr: Tensor) -> Tensor:
        return _inside(self, logsnr) / (self.logsnr_max - self.logsnr_min)


@dataclass(frozen=True)
class NormalSchedule:
    """A normal p(lambda) truncated to the range. The default is EDM's ln sigma ~ N(-1.2, 1.2^2) (Karras et al. 2022, table 1).

    EDM's noise level is sigma / alpha = e^(-lambda / 2), hence mean and standard deviation 2.4. Truncation to +-20 cuts off 1e-13.
    """

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0
    mean: float = 2.4
    std: float = 2.4

    def __post_init__(self) -> None:
        _check_range(self)
        if not self.std > 0:
            raise ValueError(f"std is {self.std}, but the standard deviation of the log-SNR must be positive.")

    def _tails(self) -> tuple[float, float, float]:
        above = _normal_cdf((self.mean - self.logsnr_max) / self.std)
        below = _normal_cdf((self.logsnr_min - self.mean) / self.std)
        return above, below, 1 - above - below

    def logsnr(self, u: Tensor) -> Tensor:
        above, below, mass = self._tails()
        upper = -torch.special.ndtri(above + mass * u)  # each tail is inverted from its own end
        lower = torch.special.ndtri(below + mass * (1 - u))
        value = self.mean + self.std * torch.where(u < 0.5, upper, lower)
        return value.clamp(self.logsnr_min, self.logsnr_max)

    def u(self, logsnr: Tensor) -> Tensor:
        above, _, mass = self._tails()
        return (torch.special.ndtr((self.mean - logsnr) / self.std) - above) / mass

    def density(self, logsnr: Tensor) -> Tensor:
        scale = self.std * math.sqrt(2 * math.pi) * self._tails()[2]
        return _inside(self, logsnr) * torch.exp(-(((logsnr - self.mean) / self.std) ** 2) / 2) / scale


@dataclass(frozen=True)
class FlowSchedule:
    """Flow matching with uniform time (Lipman et al. 2023): z = (1 - t) x + t eps, lambda = 2 log((1 - t) / t).

    p(lambda) = sech(lambda / 4)^2 / 8, truncated. A flow-matching z is this module's z times sqrt(t^2 + (1 - t)^2).
    """

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0

    def __post_init__(self) -> None:
        _check_range(self)

    def _times(self) -> tuple[float, float, float]:
        first, rest = 1 / (1 + math.exp(self.logsnr_max / 2)), 1 / (1 + math.exp(-self.logsnr_min / 2))
        return first, rest, 1 - first - rest

    def logsnr(self, u: Tensor) -> Tensor:
        first, rest, span = self._times()
        return 2 * torch.log((rest + span * (1 - u)) / (first + span * u))

    def u(self, logsnr: Tensor) -> Tensor:
        first, _, span = self._times()
        return (torch.sigmoid(-logsnr / 2) - first) / span

    def density(self, logsnr: Tensor) -> Tensor:
        return _inside(self, logsnr) / (8 * self._times()[2] * torch.cosh(logsnr / 4) ** 2)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": CosineSchedule,
    "uniform": UniformSchedule,
    "normal": NormalSchedule,
    "flow": FlowSchedule,
}


def noise_schedule(options: DiffusionConfig) -> Schedule:
    """The training distribution of log-SNR that a config names."""
    return SCHEDULES[options.schedule](logsnr_min=options.logsnr_min, logsnr_max=options.logsnr_max)


def levels(schedule: Schedule, steps: int, spacing: str = "u", rho: float = 7.0) -> Tensor:
    """The T log-SNRs of Algorithm 2, increasing from logsnr_min to logsnr_max: (T,) float64 on the CPU. T = 1 gives logsnr_min.

    Args:
        schedule: gives the range, and lambda(u) for the spacing "u".
        steps: T, the number of network levels.
        spacing: "u" is uniform in u, as in the paper; "logsnr" is uniform in lambda; "karras" is uniform in
            (sigma / alpha)^(1 / rho) (Karras et al. 2022, equation 5).
        rho: exponent of "karras".

    Raises:
        ValueError: T < 1, rho <= 0, or an unknown spacing.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, but a sampler needs at least one network level.")
    if not rho > 0:
        raise ValueError(f"rho is {rho}, but the exponent of the Karras spacing must be positive.")
    low, high = schedule.logsnr_min, schedule.logsnr_max
    u = torch.linspace(1, 0, steps, dtype=torch.float64)
    if spacing == "u":
        value = schedule.logsnr(u)
    elif spacing == "logsnr":
        value = low * u + high * (1 - u)
    elif spacing == "karras":
        value = -2 * rho * torch.log(math.exp(-low / 2 / rho) * u + math.exp(-high / 2 / rho) * (1 - u))
    else:
        raise ValueError(f"spacing is {spacing!r}, but it must be one of u, logsnr, karras.")
    value[-1], value[0] = high, low
    return value


def _check_range(schedule: Schedule) -> None:
    low, high = schedule.logsnr_min, schedule.logsnr_max
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"the log-SNR range is [{low}, {high}], but logsnr_min must be below logsnr_max and both finite.")


def _inside(schedule: Schedule, logsnr: Tensor) -> Tensor:
    return ((logsnr >= schedule.logsnr_min) & (logsnr <= schedule.logsnr_max)).to(logsnr.dtype)


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2
