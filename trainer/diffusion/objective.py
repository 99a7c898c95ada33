"""Algorithm 1 of the paper: joint training with and without the condition.

    repeat   (x, c) ~ data;  c <- null with probability p_uncond;  lambda ~ p(lambda);  eps ~ N(0, I)
             z = alpha x + sigma eps
             gradient step on |eps_theta(z, lambda, c) - eps|^2                                         (equation 5)

Every draw is a function of (seed, position of the example in the run), so the loss of an example does not depend on its batch.
`OBJECTIVES` holds what a training can minimise, and the training loop knows none of it by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freeguide.configs.schema import Config
from freeguide.trainer.diffusion.parametrisation import Network, check_labels, eps_error_scale, loss_weight, output_of
from freeguide.trainer.diffusion.randomness import Purpose, normal, uniform
from freeguide.trainer.diffusion.schedule import Schedule, alpha_sigma, broadcast, noise_schedule


class Losses(NamedTuple):
    """Per example (B,): the float32 `loss`, a mean over dimensions; the `logsnr` drawn; whether the condition was `dropped`."""

    loss: Tensor
    logsnr: Tensor
    dropped: Tensor


class Noised(NamedTuple):
    """What Algorithm 1 makes in lines 3 to 6: z and eps (B, ...), logsnr (B,), and labels (B,) with the `dropped` ones null."""

    z: Tensor
    eps: Tensor
    logsnr: Tensor
    labels: Tensor
    dropped: Tensor


def noised(x: Tensor, labels: Tensor, index: Tensor, *, schedule: Schedule, p_uncond: float, null_label: int, seed: int) -> Noised:
    """Lines 3 to 6 of Algorithm 1: drop conditions, draw log-SNR and noise, all keyed by (seed, index).

    Arguments and errors as for `training_loss`. Half-precision x is promoted to float32.
    """
    _check(x, labels, index, p_uncond, null_label)
    x = x if x.dtype == torch.float64 else x.float()
    dropped = uniform(seed, Purpose.TRAIN_DROP_CONDITION, index) < p_uncond
    # (B,) numbers are cheap: in float64 they round to the same float32 whatever the batch or the device.
    logsnr = schedule.logsnr(uniform(seed, Purpose.TRAIN_LOGSNR, index, dtype=torch.float64))
    alpha, sigma = (broadcast(c, x) for c in alpha_sigma(logsnr))
    eps = normal(seed, Purpose.TRAIN_NOISE, index, tuple(x.shape[1:]), dtype=x.dtype)
    return Noised(alpha * x + sigma * eps, eps, logsnr.to(x.dtype), labels.masked_fill(dropped, null_label), dropped)


def training_loss(
    network: Network,
    x: Tensor,
    labels: Tensor,
    index: Tensor,
    *,
    schedule: Schedule,
    p_uncond: float,
    null_label: int,
    seed: int,
    kind: str = "eps",
    weight: str = "paper",
    gamma: float = 5.0,
    sigma_data: float = 0.5,
) -> Losses:
    """The loss of Algorithm 1 (equation 5), example by example. Average it over the global batch and step.

    Args:
        network: see `Network`; it is called once, with z in float32 (float64 if x is), and may compute in any precision.
        x: (B, ...) clean data in [-1, 1].
        labels: (B,) int64 in 0 .. null_label - 1.
        index: (B,) int64, the position of each example in the run.
        schedule: p(lambda).
        p_uncond: probability that an example loses its condition.
        null_label: the label that means "no condition", the number of classes.
        seed: 0 <= seed < 2**64.
        kind: what the network predicts (parametrisation.KINDS). The error is taken in its own space and rescaled exactly.
        weight: weight of the eps-error (parametrisation.loss_weight), with its gamma and sigma_data.

    Raises:
        ValueError: shapes that disagree, p_uncond outside [0, 1], an unknown kind or weight, or labels out of range. Labels on an
            accelerator are not looked at, because that would stall it in every step.
    """
    n = noised(x, labels, index, schedule=schedule, p_uncond=p_uncond, null_label=null_label, seed=seed)
    clean = x.to(n.z.dtype)
    target = output_of(kind, clean, n.eps, n.logsnr, sigma_data)
    output = network(n.z, n.logsnr, n.labels)
    if output.shape != target.shape:
        raise ValueError(
            f"the network returned shape {tuple(output.shape)} for z of shape {tuple(n.z.shape)}, but they must agree."
        )
    error = (output.to(target.dtype) - target).square().flatten(1).mean(dim=1)
    scale = eps_error_scale(kind, n.logsnr, sigma_data) * loss_weight(
        weight, n.logsnr, schedule, gamma=gamma, sigma_data=sigma_data
    )
    return Losses((scale * error).float(), n.logsnr, n.dropped)


def by_algorithm_1(config: Config, network: Network, x: Tensor, labels: Tensor, index: Tensor) -> Losses:
    """The loss of Algorithm 1 with the options of a config. Arguments and errors as `training_loss`."""
    return training_loss(
        network,
        x,
        labels,
        index,
        schedule=noise_schedule(config.diffusion),
        p_uncond=config.diffusion.p_uncond,
        null_label=config.data.classes,
        seed=config.seed,
        kind=config.diffusion.prediction,
        weight=config.diffusion.loss_weight,
    )


def all_of_diffusion(config: Config) -> dict[str, Any]:
    """All options of the group `diffusion`, by dotted key."""
    return {f"diffusion.{name}": value for name, value in vars(config.diffusion).items()}


@dataclass(frozen=True)
class Objective:
    """What a training minimises."""

    # losses(config, network, x (B, ...), labels (B,), index (B,)) of examples as `training_loss` has them; it asks the network once
    losses: Callable[[Config, Network, Tensor, Tensor, Tensor], Losses]
    identity: Callable[[Config], dict[str, Any]] = all_of_diffusion  # its options by dotted key: they may not change during a run
    check: Callable[[Config], None] = lambda config: None  # raises ConfigError for options that it cannot be trained with


OBJECTIVES = {"joint": Objective(by_algorithm_1)}


def objective_of(config: Config) -> Objective:
    """The objective that a config asks for."""
    return OBJECTIVES["joint"]


def _check(x: Tensor, labels: Tensor, index: Tensor, p_uncond: float, null_label: int) -> None:
    if not 0 <= p_uncond <= 1:
        raise ValueError(f"p_uncond is {p_uncond}, but a probability must be from 0 to 1.")
    if not x.is_floating_point() or x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)} and dtype {x.dtype}, but it must be a floating-point batch (B, ...).")
    if len(index) != len(x):
        raise ValueError(f"there are {len(index)} indices for {len(x)} examples: give each example its position in the run.")
    check_labels(labels, null_label, len(x))
