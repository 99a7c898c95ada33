"""What the network's output means: eps, x, v, or EDM's F. One pair (x, eps) stands behind all of them.

A noisy z = alpha x + sigma eps and any one of these names determine the others, by maps that are affine in the output:

    eps   the paper's                    x = (z - sigma eps) / alpha
    x     the clean image                eps = (z - alpha x) / sigma
    v     alpha eps - sigma x            x = alpha z - sigma v,  eps = sigma z + alpha v        (Salimans & Ho 2022)
    edm   (sigma x / s - alpha s eps) / n with s = sigma_data, n^2 = sigma^2 + alpha^2 s^2      (Karras et al. 2022, section 5)

The last is EDM's preconditioned F, D = c_skip y + c_out F with y = z / alpha, written so that nothing is singular at either end:
x = alpha s^2 z / n^2 + sigma s F / n and eps = sigma z / n^2 - alpha s F / n. At s = 1 it is -v. Its input scale c_in y = z / n
belongs to the network, which sees the same z for every kind; images scaled to unit variance give n = 1.

Errors of the kinds differ by a factor that depends on lambda alone: |x - x*|^2 = e^-lambda |eps - eps*|^2 and
|v - v*|^2 = (1 + e^-lambda) |eps - eps*|^2. Near lambda = -20 the eps-network therefore amplifies rounding by e^10 in x; v, x and
edm do not.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from freeguide.trainer.diffusion.schedule import Schedule, alpha_sigma, broadcast

KINDS = ("eps", "x", "v", "edm")

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""network(z (B, ...), logsnr (B,), labels (B,) int64) -> one number per element of z, of any floating dtype."""


class Prediction(NamedTuple):
    """What is believed of z = alpha x + sigma eps.

    x and eps have the shape of z. A guidance may leave the pair untied (CFG++): then samplers add noise back with eps as it is,
    and clipping x must not move it. `momentum` is what a guidance wants to see again at the next level (APG).
    """

    x: Tensor
    eps: Tensor
    tied: bool = True
    momentum: Tensor | None = None


def predict(kind: str, output: Tensor, z: Tensor, logsnr: Tensor, sigma_data: float = 0.5) -> Prediction:
    """The pair (x, eps) that a network output means, in the dtype of z (float32 at least), whatever the network's.

    Args:
        kind: one of KINDS.
        output: what the network returned, shaped like z.
        z: (B, ...) float32 or float64.
        logsnr: () or (B,).
        sigma_data: standard deviation of the data, for "edm".

    Raises:
        ValueError: an unknown kind, or an output that is not shaped like z.
    """
    if output.shape != z.shape:
        raise ValueError(f"the network returned shape {tuple(output.shape)} for z of shape {tuple(z.shape)}, but they must agree.")
    output = output.to(z.dtype)
    alpha, sigma = (broadcast(c, z) for c in alpha_sigma(logsnr))
    if kind == "eps":
        return Prediction((z - sigma * output) / alpha, output)
    if kind == "x":
        return Prediction(output, (z - alpha * output) / sigma)
    if kind == "v":
        return Prediction(alpha * z - sigma * output, sigma * z + alpha * output)
    if kind == "edm":
        s, n = sigma_data, _edm_norm(alpha, sigma, sigma_data)
        return Prediction(
            alpha * s**2 / n**2 * z + sigma * s / n * output,
            sigma / n**2 * z - alpha * s / n * output,
        )
    raise _unknown(kind)


def output_of(kind: str, x: Tensor, eps: Tensor, logsnr: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The network output that means (x, eps), the inverse of `predict`: the regression target when they are the true ones."""
    alpha, sigma = (broadcast(c, x) for c in alpha_sigma(logsnr))
    if kind == "eps":
        return eps
    if kind == "x":
        return x
    if kind == "v":
        return alpha * eps - sigma * x
    if kind == "edm":
        return (sigma / sigma_data * x - alpha * sigma_data * eps) / _edm_norm(alpha, sigma, sigma_data)
    raise _unknown(kind)


def eps_error_scale(kind: str, logsnr: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The factor c(lambda) in |eps - eps*|^2 = c |output - output*|^2: 1, alpha^2/sigma^2, alpha^2, or (alpha s / n)^2."""
    alpha, sigma = alpha_sigma(logsnr)
    if kind == "eps":
        return torch.ones_like(logsnr)
    if kind == "x":
        return torch.exp(logsnr)
    if kind == "v":
        return logsnr.sigmoid()
    if kind == "edm":
        return (alpha * sigma_data / _edm_norm(alpha, sigma, sigma_data)) ** 2
    raise _unknown(kind)


WEIGHTS = ("paper", "v", "min_snr", "edm", "elbo")


def loss_weight(name: str, logsnr: Tensor, schedule: Schedule, *, gamma: float = 5.0, sigma_data: float = 0.5) -> Tensor:
    """Weight of the eps-error |eps - eps*|^2 at a log-SNR drawn from `schedule`: (B,).

    Args:
        name: "paper" is 1 (Algorithm 1); "v" is 1 + e^-lambda, the v-error; "min_snr" is min(1, gamma e^-lambda) (Hang et al.
            2023); "edm" is 1 + e^-lambda / sigma_data^2, the error of EDM's F; "elbo" is 1 / (p(lambda) (logsnr_max - logsnr_min)),
            which turns any schedule into the variational bound per unit of lambda.
        logsnr: (B,).
        schedule: where logsnr was drawn from; only "elbo" asks.
        gamma: signal-to-noise ratio above which min-SNR holds the x-error's weight constant.
        sigma_data: standard deviation of the data, for "edm".

    Raises:
        ValueError: an unknown name.
    """
    if name == "paper":
        return torch.ones_like(logsnr)
    if name == "v":
        return 1 + torch.exp(-logsnr)
    if name == "min_snr":
        return (gamma * torch.exp(-logsnr)).clamp(max=1)
    if name == "edm":
        return 1 + torch.exp(-logsnr) / sigma_data**2
    if name == "elbo":
        return 1 / (schedule.density(logsnr) * (schedule.logsnr_max - schedule.logsnr_min))
    raise ValueError(f"the loss weight is {name!r}, but it must be one of {', '.join(WEIGHTS)}.")


def check_labels(labels: Tensor, null_label: int, batch: int, *, wait: bool = False) -> None:
    """Raise ValueError unless labels are (batch,) int64 in 0 .. null_label - 1. `wait` also looks at labels on an accelerator."""
    if labels.shape != (batch,) or labels.dtype != torch.int64:
        raise ValueError(f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}, but they must be ({batch},) int64.")
    if batch and (wait or labels.device.type == "cpu"):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= null_label:
            raise ValueError(f"labels reach from {low} to {high}, but they must be from 0 to {null_label - 1}.")


def _edm_norm(alpha: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    return (sigma**2 + (alpha * sigma_data) ** 2).sqrt()


def _unknown(kind: str) -> ValueError:
    return ValueError(f"the network's output kind is {kind!r}, but it must be one of {', '.join(KINDS)}.")
