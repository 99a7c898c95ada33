"""The paper's figure 2, beside what the sampler really does.

The figure shows three Gaussian classes in the plane and, for growing w, the normalized densities p(x|c)^(1 + w) p(x)^-w, which it
takes for the laws of guided samples. With exact scores both can be computed. Guided sampling moves the classes apart and narrows
them as the densities do, but further: the guided scores of the noisy levels are not the scores of any one noised density.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from freeguide.trainer.diffusion.guidance import classifier_free
from freeguide.trainer.diffusion.oracles import TRIANGLE, GaussianMixture
from freeguide.trainer.diffusion.samplers import ancestral, sample
from freeguide.trainer.diffusion.schedule import CosineSchedule, levels

EXTENT = 4.5  # half-width of the square that is integrated over, which holds all of the mass to 1e-8


class Statistics(NamedTuple):
    """Of the law of one class, averaged over classes: |mean|, the trace of the covariance, and E log p(c | x).

    In the paper's terms the first two are overshoot and diversity, the third is what the Inception score rewards.
    """

    distance: float
    trace: float
    log_posterior: float


class Comparison(NamedTuple):
    """At one w: the tilted density on a grid (classes, side, side), samples (classes, n, 2), and the statistics of both."""

    w: float
    density: Tensor
    samples: Tensor
    tilted: Statistics
    sampled: Statistics


def compare(
    w: float,
    *,
    mixture: GaussianMixture = TRIANGLE,
    images: int = 2000,
    steps: int = 256,
    v: float = 0.3,
    seed: int = 0,
    side: int = 181,
) -> Comparison:
    """Tilted densities of a mixture in the plane, and samples of Algorithm 2 with its exact scores.

    Args:
        w: guidance weight, at least 0.
        mixture: classes in two dimensions; TRIANGLE is in the manner of the paper's.
        images: samples per class.
        steps, v, seed: T, v and the seed of Algorithm 2.
        side: grid points per axis, over [-EXTENT, EXTENT].

    Raises:
        ValueError: w < 0, or a mixture that is not in the plane.
    """
    if w < 0 or any(len(mean) != 2 for mean in mixture.means):
        raise ValueError(f"w is {w} and the means are {mixture.means}, but w must be at least 0 and the classes in the plane.")
    classes = mixture.null_label
    axis = torch.linspace(-EXTENT, EXTENT, side, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    density, tilted = [], []
    for c in range(classes):
        log_p = (1 + w) * mixture.log_density(grid, torch.full((len(grid),), c)) - w * mixture.log_density(grid)
        mass = log_p.softmax(0)
        density.append(mass.reshape(side, side) / (axis[1] - axis[0]) ** 2)
        tilted.append(_statistics(mixture, grid, mass, c))
    labels = torch.arange(classes).repeat_interleave(images)
    denoise = classifier_free(mixture, w, null_label=classes, p_uncond=0.1)
    x = sample(
        denoise,
        labels,
        torch.arange(len(labels)),
        (2,),
        levels=levels(CosineSchedule(), steps),
        sampler=ancestral(v),
        seed=seed,
        clip=False,
        dtype=torch.float64,
    ).reshape(classes, images, 2)
    even = torch.full((images,), 1 / images, dtype=torch.float64)
    sampled = [_statistics(mixture, x[c], even, c) for c in range(classes)]
    return Comparison(w, torch.stack(density), x, _mean(tilted), _mean(sampled))


def _statistics(mixture: GaussianMixture, x: Tensor, mass: Tensor, c: int) -> Statistics:
    mean = mass @ x
    trace = mass @ (x - mean).square().sum(1)
    clean = torch.full((len(x),), torch.inf, dtype=x.dtype)
    return Statistics(mean.norm().item(), trace.item(), (mass @ mixture.log_posterior(x, clean)[:, c]).item())


def _mean(each: list[Statistics]) -> Statistics:
    return Statistics(*(sum(column) / len(each) for column in zip(*each, strict=True)))
