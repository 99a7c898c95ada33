"""From noise to images: Algorithm 2 of the paper, and the deterministic solvers of the same process.

A sampler is a function that makes one transition, from log-SNR lambda to the next, larger lambda':

    sampler(evaluate, state, levels, noise) -> the next state

`sample` starts from z ~ N(0, I) at T levels, makes T - 1 transitions and ends with a noiseless prediction of x at the last level.
Network evaluations: T, each of 2B rows with guidance (Heun: 2T - 1).

h = (lambda' - lambda) / 2 is the step in half-log-SNR. A quantity with a prime belongs to lambda'. Coefficients are made in float64
and meet z in its own dtype, float32 at least, whatever the network's precision.

With the eps-parametrisation, an error d of eps at lambda = -20 becomes 22026 d in x, and after the first transition 137 d in z
(T = 256). Rounding to bf16 is enough to spoil an image, so x is clamped to [-1, 1] unless told otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from freeguide.configs.schema import SamplingConfig
from freeguide.trainer.diffusion.guidance import Denoiser, clipped
from freeguide.trainer.diffusion.parametrisation import Prediction
from freeguide.trainer.diffusion.randomness import Purpose, normal
from freeguide.trainer.diffusion.schedule import alpha_sigma, posterior, reverse_variance


class State(NamedTuple):
    """A point of a trajectory: z (B, ...) about to be denoised at levels[step], and the prediction made just before."""

    step: int
    z: Tensor
    previous: Prediction | None = None


Evaluate = Callable[[Tensor, int, Prediction | None], Prediction]
"""evaluate(z, step, previous) -> the guided prediction at levels[step]."""

Noise = Callable[[int], Tensor]
"""noise(step) -> standard normal noise of that transition, shaped like z."""

Sampler = Callable[[Evaluate, State, Tensor, Noise], State]
"""One transition: sampler(evaluate, state, levels (T,) float64, noise) -> state at the next level."""


def ancestral(v: float = 0.3) -> Sampler:
    """Algorithm 2: z' ~ N(mu~(z, x), posterior variance^(1 - v) forward variance^v) (equation 4).

    v = 0 and v = 1 are DDPM's lower and upper bounds. The paper uses 0.3 at 64x64 and 0.2 at 128x128.

    Raises:
        ValueError: v outside [0, 1].
    """
    if not 0 <= v <= 1:
        raise ValueError(f"v is {v}, but the interpolation of the sampler's log-variance must be from 0 to 1.")

    def transition(evaluate: Evaluate, state: State, levels: Tensor, noise: Noise) -> State:
        step, z, previous = state
        p = _tied(evaluate(z, step, previous))
        mean = posterior(levels[step], levels[step + 1])
        std = reverse_variance(levels[step], levels[step + 1], v).sqrt()
        return State(step + 1, mean.z_scale * z + mean.x_scale * p.x + std * noise(step), p)

    return transition


def ddim(eta: float = 0.0) -> Sampler:
    """DDIM (Song et al. 2021, arXiv 2010.02502, equation 12): z' = alpha' x + sqrt(sigma'^2 - s^2) eps + s noise.

    s^2 = eta^2 times the posterior variance: eta = 0 is deterministic and first order, eta = 1 is `ancestral(0)`.

    Raises:
        ValueError: eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, but the share of DDIM's noise must be from 0 to 1.")

    def transition(evaluate: Evaluate, state: State, levels: Tensor, noise: Noise) -> State:
        step, z, previous = state
        p = evaluate(z, step, previous)
        alpha, sigma = alpha_sigma(levels[step + 1])
        gone = -torch.expm1(levels[step] - levels[step + 1])
        z = alpha * p.x + sigma * (1 - eta**2 * gone).sqrt() * p.eps
        if eta:
            z = z + eta * gone.sqrt() * sigma * noise(step)
        return State(step + 1, z, p)

    return transition


def dpmpp_2m() -> Sampler:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): z' = (sigma'/sigma) z - alpha' (e^-h - 1) D.

    D = x + h / (2 h_before) (x - x_before). Second order with one evaluation a step; the first step, which has nothing before it,
    is DDIM's.
    """

    def transition(evaluate: Evaluate, state: State, levels: Tensor, noise: Noise) -> State:
        step, z, previous = state
        p = _tied(evaluate(z, step, previous))
        h = (levels[step + 1] - levels[step]) / 2
        d = p.x
        if previous is not None:
            d = d + h / (levels[step] - levels[step - 1]) * (p.x - previous.x)
        alpha, sigma_next = alpha_sigma(levels[step + 1])
        sigma = alpha_sigma(levels[step])[1]
        return State(step + 1, sigma_next / sigma * z - alpha * torch.expm1(-h) * d, p)

    return transition


def heun() -> Sampler:
    """Heun's method (Karras et al. 2022, arXiv 2206.00364, algorithm 1) on d(z/alpha) / d(sigma/alpha) = eps. Second order.

    Euler's step is DDIM's. The correction is alpha' (sigma'/alpha' - sigma/alpha) (eps' - eps) / 2, whose factor is
    -sigma' (e^h - 1) / 2. Two evaluations a step.
    """

    def transition(evaluate: Evaluate, state: State, levels: Tensor, noise: Noise) -> State:
        step, z, previous = state
        p = _tied(evaluate(z, step, previous))
        alpha, sigma = alpha_sigma(levels[step + 1])
        euler = alpha * p.x + sigma * p.eps
        ahead = _tied(evaluate(euler, step + 1, p))
        factor = -sigma * torch.expm1((levels[step + 1] - levels[step]) / 2) / 2
        return State(step + 1, euler + factor * (ahead.eps - p.eps), p)

    return transition


@dataclass(frozen=True)
class Kind:
    """A sampler that `sampling.sampler` can name."""

    make: Callable[[SamplingConfig], Sampler]
    asks_at: tuple[int, ...] = (0,)  # levels at which one transition asks the network, counted from its own: one call for each


SAMPLERS = {
    "ancestral": Kind(lambda options: ancestral(options.v)),
    "ddim": Kind(lambda options: ddim()),
    "dpmpp_2m": Kind(lambda options: dpmpp_2m()),
    "heun": Kind(lambda options: heun(), asks_at=(0, 1)),
}


@torch.no_grad()
def sample(
    denoise: Denoiser,
    labels: Tensor,
    index: Tensor,
    shape: tuple[int, ...],
    *,
    levels: Tensor,
    sampler: Sampler,
    seed: int,
    clip: bool = True,
    dtype: torch.dtype = torch.float32,
    start: State | None = None,
    on_step: Callable[[State], None] | None = None,
) -> Tensor:
    """Algorithm 2: images (B, *shape) in `dtype`, on the device of `labels`.

    All noise of image i is a function of (seed, i), so it is the same image in any batch and on any worker, up to what the
    network itself does with another batch.

    Args:
        denoise: a guidance around a network, such as `classifier_free`.
        labels: (B,) int64.
        index: (B,) int64, the numbers of the images, on the device of `labels`.
        shape: shape of one image.
        levels: (T,) float64 on the CPU, increasing log-SNRs (schedule.levels).
        sampler: the transition, such as `ancestral(v=0.3)`.
        seed: 0 <= seed < 2**64.
        clip: clamp x to [-1, 1] in every prediction.
        dtype: float32 or float64.
        start: go on from this state, of the same labels and indices, instead of from noise: an unguided beginning can be shared.
        on_step: called with every state after the first, for progress, or to keep a state to start from.

    Raises:
        ValueError: levels that do not increase, labels and index of different lengths, or a start that does not fit.
    """
    _check(labels, index, shape, levels, start)
    if start is None:
        start = State(0, normal(seed, Purpose.SAMPLE_PRIOR, index, shape, dtype=dtype))

    def noise(step: int) -> Tensor:
        return normal(seed, Purpose.SAMPLE_STEP, index, shape, stream=step, dtype=dtype)

    return integrate(
        clipped(denoise) if clip else denoise, labels, start, levels=levels, sampler=sampler, noise=noise, on_step=on_step
    )


def integrate(
    denoise: Denoiser,
    labels: Tensor,
    state: State,
    *,
    levels: Tensor,
    sampler: Sampler,
    noise: Noise,
    on_step: Callable[[State], None] | None = None,
) -> Tensor:
    """The loop of `sample`, with the start and the noise given by the caller: x (B, ...) predicted at the last level."""

    def evaluate(z: Tensor, step: int, previous: Prediction | None) -> Prediction:
        return denoise(z, levels[step], labels, previous)

    while state.step < len(levels) - 1:
        state = sampler(evaluate, state, levels, noise)
        if on_step is not None:
            on_step(state)
    return evaluate(state.z, state.step, state.previous).x


def _tied(p: Prediction) -> Prediction:
    if not p.tied:
        raise ValueError("CFG++ renoises with another eps than x implies, which only the sampler ddim knows how to use.")
    return p


def _check(labels: Tensor, index: Tensor, shape: tuple[int, ...], levels: Tensor, start: State | None) -> None:
    if levels.ndim != 1 or len(levels) < 1 or levels.dtype != torch.float64 or levels.device.type != "cpu":
        raise ValueError("levels must be a float64 vector on the CPU with at least one log-SNR, as schedule.levels makes it.")
    if not bool((levels.diff() > 0).all()):
        raise ValueError("levels must increase from the noisiest to the cleanest log-SNR.")
    if labels.shape != index.shape:
        raise ValueError(f"there are {len(labels)} labels but {len(index)} indices: give each image one of both.")
    if start is not None and (start.z.shape != (len(labels), *shape) or not 0 <= start.step < len(levels)):
        raise ValueError(
            f"the start has step {start.step} and shape {tuple(start.z.shape)}, which does not fit the levels and shape."
        )
