"""The paper's figure 2 as a drawing; its numbers are those of `freeguide.trainer.diffusion.theory`."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from freeguide.trainer.diffusion.theory import EXTENT, Comparison, Statistics, compare

WINDOW = 3.2  # half-width of the square that is drawn


def draw_figure_2(
    path: str | Path, w: tuple[float, ...] = (0.0, 1.0, 4.0), *, images: int = 2000, steps: int = 256, v: float = 0.3, seed: int = 0
) -> list[Comparison]:
    """Draw figure 2 of the paper (top) and the samples of Algorithm 2 (bottom) for each w into a PNG; returns the comparisons.

    Arguments and errors as for `compare`.
    """
    rows = [compare(each, images=images, steps=steps, v=v, seed=seed) for each in w]
    figure = Figure(figsize=(3 * len(rows), 6.8), layout="constrained")
    axes = figure.subplots(2, len(rows), squeeze=False)
    for (above, below), row in zip(axes.T, rows, strict=True):
        box = (-EXTENT, EXTENT, -EXTENT, EXTENT)
        above.imshow(row.density.mean(0).T, origin="lower", extent=box, cmap="Blues")
        counts = torch.histogramdd(row.samples.reshape(-1, 2), bins=[row.density.shape[-1] // 2] * 2, range=list(box)).hist
        below.imshow(counts.T, origin="lower", extent=box, cmap="Blues")
        above.set_title(f"w = {row.w:g}\n{_caption(row.tilted)}", fontsize=9)
        below.set_title(_caption(row.sampled), fontsize=9)
        for axis in (above, below):
            axis.set(xticks=[], yticks=[], xlim=(-WINDOW, WINDOW), ylim=(-WINDOW, WINDOW))
    axes[0, 0].set_ylabel("density  p(x|c)$^{1+w}$ p(x)$^{-w}$")
    axes[1, 0].set_ylabel("samples of Algorithm 2, exact scores")
    figure.savefig(path, dpi=120, format="png")
    return rows


def _caption(s: Statistics) -> str:
    return f"|mean| {s.distance:.2f}   tr cov {s.trace:.2f}\nE log p(c|x) {s.log_posterior:.4f}"
