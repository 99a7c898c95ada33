"""How averages of the weights weigh the past.

After update t = 1, 2, ... every average follows the weights theta,

    average <- k average + (1 - k) theta,      k = decay                        exponential: "ema", "half_life_N"
                                               k = (1 - 1/t)^(gamma + 1)        power function: "sigma_rel_X"

The second kind is EDM2's (Karras et al., arXiv 2312.02696, equation 127). The product of its k telescopes, so that at time t the
weights of update s count with the integral over [s - 1, s] of the profile

    p(s) = (gamma + 1) s^gamma / t^(gamma + 1),      sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^-1/2

(equations 121 and 123): sigma_rel is its standard deviation in units of t. From snapshots of such averages any other one of the
family follows after training by least squares: the combination of their profiles that comes closest to the profile wanted.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from freeguide.configs.schema import TrainConfig

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Profile:
    """How an average weighs the past; `name` is its name in checkpoints and in `sampling.ema`."""

    name: str
    decay: float = 0.0  # per step, of an exponential average
    sigma_rel: float = 0.0  # relative width of a power-function average; 0 = exponential

    def kept(self, update: int) -> float:
        """k: the share of the old average that stays at update number `update` = 1, 2, ... (EDM2's equation 127)."""
        return (1 - 1 / update) ** (power(self.sigma_rel) + 1) if self.sigma_rel else self.decay


def profiles(config: TrainConfig) -> list[Profile]:
    """All averages that a training keeps: "ema", and a "half_life_N" (images) or "sigma_rel_X" for each N and X asked for."""
    half_lives = [Profile(f"half_life_{n}", decay=0.5 ** (config.global_batch / n)) for n in config.ema_half_lives]
    widths = [Profile(power_name(x), sigma_rel=x) for x in config.ema_sigma_rel]
    return [Profile("ema", decay=config.ema_decay), *half_lives, *widths]


def power_name(sigma_rel: float) -> str:
    return f"sigma_rel_{sigma_rel:g}"


def sigma_rel_of(name: str) -> float:
    """X of a profile named "sigma_rel_X", 0 for any other name."""
    found = re.fullmatch(r"sigma_rel_(0?\.\d+)", name)
    return float(found[1]) if found else 0.0


# --- power-function profiles after training ---


def power(sigma_rel: float) -> float:
    """gamma of a relative width, which is below 12^-1/2: the root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2.

    EDM2's equation 126. Raises ValueError for a width that no such average has.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel is {sigma_rel}, but a power-function average has a relative width between 0 and 0.2886.")
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def profile_product(t_a: Floats, gamma_a: Floats, t_b: Floats, gamma_b: Floats) -> Floats:
    """The integral of p_a p_b, elementwise (EDM2, equation 151): only the ratio of the two times is raised to a power.

    (gamma_a + 1)(gamma_b + 1) / (gamma_a + gamma_b + 1) * (earlier / later)^(gamma of the later) / later
    """
    earlier, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    falloff = (earlier / later) ** np.where(t_b > t_a, gamma_b, gamma_a)
    product: Floats = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * falloff / later
    return product


def reconstruction(stored: Sequence[tuple[int, float]], update: int, sigma_rel: float) -> tuple[Floats, float]:
    """How to combine stored averages into the one of width `sigma_rel` at `update` (EDM2, algorithm 3).

    `stored` are (update, sigma_rel) of each. Returns the coefficients (n,) and the relative distance of the profile they make to
    the profile wanted, ||sum_i x_i p_i - p|| / ||p||. Raises ValueError without an average to combine.
    """
    if not stored:
        raise ValueError("there is no stored average to combine: give at least one snapshot.")
    t = np.array([float(time) for time, _ in stored])
    gamma = np.array([power(width) for _, width in stored])
    at, wanted = np.array(float(update)), np.array(power(sigma_rel))
    gram = profile_product(t[:, None], gamma[:, None], t, gamma)
    overlap = profile_product(t, gamma, at, wanted)
    square = float(profile_product(at, wanted, at, wanted))
    # Scaled to a unit diagonal, late and early snapshots weigh alike in the rank decision of the least squares.
    scale = 1 / np.sqrt(np.diag(gram))
    x = scale * np.linalg.lstsq(gram * scale[:, None] * scale, overlap * scale, rcond=1e-13)[0]
    x /= x.sum()  # weights that stand still are their own average
    rest = max(float(square - 2 * x @ overlap + x @ gram @ x), 0.0)
    return x, float(np.sqrt(rest / square))
