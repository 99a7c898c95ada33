"""How far another set of n images of the same model would lie: the standard deviation of a metric, by leaving out groups of images.

A bootstrap is the wrong tool here: each resample adds a bias of its own, so that its interval can lie wholly above the estimate,
and it breaks up the balance of the labels. Leaving out one group in twenty at a time shifts every estimate by the same small bias,
which the standard deviation does not see. It covers the sampling noise of one trained network; the noise of training needs runs
of several seeds.

Where the label of image i is i mod classes, every set of n images has the same labels, so groups are of whole cycles of them: in
groups that are not balanced, the differences between classes would pass for spread.
"""

import numpy as np
from numpy.typing import NDArray

GROUPS = 20  # at most
_FEWEST = 5  # groups: with their 4 degrees of freedom a deviation is known to 1 / sqrt(8), a third of itself; with fewer, worse


def edges(n: int, cycle: int = 1) -> list[int] | None:
    """Where the groups of n images begin, and where the last one ends. None where there would be fewer than 5.

    The groups are consecutive and of whole cycles of `cycle` images (1 where labels have no order), 20 of them that differ by one
    cycle at most, or one for each cycle. What is left of a last cycle is in none.
    """
    cycles = n // cycle
    groups = min(GROUPS, cycles)
    return [i * cycles // groups * cycle for i in range(groups + 1)] if groups >= _FEWEST else None


def fewest_left(edges: list[int]) -> int:
    """Images that stay where the largest group is left out."""
    return edges[-1] - int(np.diff(edges).max())


def deviation(whole: float, without: NDArray[np.float64], edges: list[int], n: int) -> float:
    """The standard deviation over sets of n images, from the metric of all N grouped images and that without each group.

    With F_j the metric without the m images of group j, the pseudo-values are P_j = (N / m) F - (N / m - 1) F_j, P is the jackknife
    estimate, and the variance is the mean of (P_j - P)^2 / (N / m - 1) (Busing et al. 1999), times N / n.
    """
    grouped, groups = edges[-1], len(edges) - 1
    ratio = grouped / np.diff(edges)
    pseudo = ratio * whole - (ratio - 1.0) * without
    centre = groups * whole - ((1.0 - 1.0 / ratio) * without).sum()
    return float(np.sqrt(((pseudo - centre) ** 2 / (ratio - 1.0)).sum() / groups * (grouped / n)))
