"""The pictures of a report: curves over w, the frontier of FID and IS, and sample grids.

Equal rows and grids give equal bytes: fonts are matplotlib's own, files carry no text chunks, and nothing knows the date. A user's
matplotlib settings change nothing.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from freeguide.cluster.evaluation.metrics import METRICS
from freeguide.cluster.evaluation.published import Published
from freeguide.cluster.evaluation.rows import Row
from freeguide.cluster.evaluation.statistics.metric import distance
from freeguide.configs.errors import visible

Series = tuple[str, list[Row]]  # label ("" where nothing varies) and rows in the order of w

COLOURS = ("#2f5d8c", "#c8553d", "#4a7c59", "#7d5ba6", "#b8860b", "#3c8d93")
MARKERS = "os^Dv"
INK, GREY = "#222222", "#666666"
LONGEST = 60  # characters of a name in a picture
LINES = ("o-", "s--", "^:", "D-.")  # of shares of images, by their places
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.labelcolor": INK,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "grid.color": "#ececec",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


def best_of(rows: Sequence[Row]) -> Row:
    return min(rows, key=lambda row: row.fid)


def curves(series: list[Series]) -> bytes:
    """FID and, if there are any, IS with their spreads, and accuracy, precision and recall, each over w."""
    with _style():
        return _curves(_shortened(series))


def frontier(series: list[Series], others: Sequence[Row] = (), published: Sequence[Published] = ()) -> bytes:
    """FID against IS of rows that have both, one curve per series, points labelled with w; single points for `others`, grey ones
    for `published`.
    """
    with _style():
        return _frontier(_shortened(series), others, published)


@contextlib.contextmanager
def _style() -> Iterator[None]:
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box is drawn instead
        yield


def _shortened(series: list[Series]) -> list[Series]:
    return [(visible(label, LONGEST), rows) for label, rows in series]


def _curves(series: list[Series]) -> bytes:
    scored = any(row.inception_score is not None for _, rows in series for row in rows)
    figure = Figure(figsize=(13.5 if scored else 9.0, 3.9), layout="constrained")
    left, *middle, right = figure.subplots(1, 3 if scored else 2)
    for (colour, marker), (label, rows) in zip(_styles(series), series, strict=True):
        w = [row.w for row in rows]
        left.plot(w, [row.fid for row in rows], f"{marker}-", color=colour, label=label)
        known = [row for row in rows if row.fid_std is not None]
        if known:
            error = [row.fid_std or 0.0 for row in known]
            left.errorbar([row.w for row in known], [row.fid for row in known], error, fmt="none", color=colour, capsize=2)
        best = best_of(rows)
        left.plot(best.w, best.fid, "o", markersize=11, markerfacecolor="none", markeredgecolor=colour)
        for axes in middle:
            score = np.array([row.inception_score for row in rows], float)
            spread = np.array([row.inception_score_std for row in rows], float)
            axes.plot(w, score, f"{marker}-", color=colour, label=label)
            axes.fill_between(w, score - spread, score + spread, color=colour, alpha=0.15, linewidth=0)
        for name, line, colour_ in _shares():
            points = [(row.w, row.value(name)) for row in rows if row.value(name) is not None]
            if points:
                right.plot(*zip(*points, strict=True), line, color=colour if len(series) > 1 else colour_)
    _log_if_wide(left, [row.fid for _, rows in series for row in rows])
    name = series[0][1][0].fid_name
    if len(series) == 1:
        best = best_of(series[0][1])
        left.set_title(f"{name}: best {distance(best.fid)} at w = {best.w:g}")
    else:
        left.set_title(f"{name} (ring: best)")
        left.legend()
    for axes in middle:
        axes.set_title("Inception score, ± std of the splits")
    right.set_title("shares of images")
    measured = [share for share in _shares() if any(row.value(share[0]) is not None for _, rows in series for row in rows)]
    for name, line, colour in measured:
        right.plot([], [], line, color=GREY if len(series) > 1 else colour, label=METRICS[name].title)
    if measured:
        right.legend(fontsize=9)
    for axes in (left, *middle, right):
        _guidance_axis(axes, sorted({row.w for _, rows in series for row in rows}))
    return _drawn(figure)


def _shares() -> list[tuple[str, str, str]]:
    """The metrics that are shares of images, in their places, each with its line and its colour."""
    placed = sorted((metric.curve, name) for name, metric in METRICS.items() if metric.curve is not None)
    return [(name, LINES[place % len(LINES)], COLOURS[place % len(COLOURS)]) for place, name in placed]


def _frontier(series: list[Series], others: Sequence[Row], published: Sequence[Published]) -> bytes:
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    axes = figure.subplots()
    for (colour, marker), (label, rows) in zip(_styles(series), series, strict=True):
        axes.plot(*zip(*map(_point, rows), strict=True), f"{marker}-", color=colour, label=label)
        axes.plot(*_point(best_of(rows)), "o", markersize=11, markerfacecolor="none", markeredgecolor=colour)
    rows = [row for _, members in series for row in members]
    _log_if_wide(axes, [row.fid for row in rows])
    places = [(visible(row.run, LONGEST), row.inception_score, row.fid) for row in others if row.inception_score is not None]
    places += [(number.model, number.inception_score, number.fid) for number in published if number.inception_score is not None]
    for _, score, fid in places:
        axes.plot(score, fid, "D", color=GREY, markersize=4)
    axes.set_xlabel("Inception score (higher is better)")
    axes.set_ylabel(f"{rows[0].fid_name} (lower is better)")
    axes.set_title("What guidance trades: points are labelled with w, the ring is the best FID")
    axes.margins(0.12, 0.08)
    if len(series) > 1:
        axes.legend()
    FigureCanvasAgg(figure).draw()  # the layout must stand before labels can be kept apart
    _label_points(axes, series, places)
    return _drawn(figure)


def _point(row: Row) -> tuple[float, float]:
    """Where a row stands in the frontier, which rows without a score have no place in."""
    assert row.inception_score is not None
    return row.inception_score, row.fid


def _label_points(axes: Axes, series: list[Series], places: Sequence[tuple[str, float, float]]) -> None:
    """Write names beside single points and w beside those of curves, the ends and the best first, where nothing is in the way."""
    curves = [axes.transData.transform([_point(row) for row in rows]) for _, rows in series]
    single = axes.transData.transform([(score, fid) for _, score, fid in places]) if places else np.empty((0, 2))
    obstacles = np.concatenate([*(_dense(points) for points in curves), single])
    sideways = np.array([1.0, 0.0])
    wanted = [(-1, name, point, sideways, GREY) for (name, _, _), point in zip(places, single, strict=True)]
    for (colour, _), (_, rows), points in zip(_styles(series), series, curves, strict=True):
        first = {0, len(rows) - 1, rows.index(best_of(rows))}
        for index, row in enumerate(rows):
            along = points[min(index + 1, len(rows) - 1)] - points[max(index - 1, 0)]
            normal = np.array([along[1], -along[0]]) / (np.hypot(*along) or 1.0)
            words = f"w = {row.w:g}" if index in (0, len(rows) - 1) else f"{row.w:g}"
            wanted.append((int(index not in first), words, points[index], normal, colour))
    taken = np.empty((0, 4))  # centre and half size of each label's box
    for rank, words, point, normal, colour in sorted(wanted, key=lambda label: label[0]):
        half = np.array([3.5 * len(words) + 2.0, 8.0])
        for outward in (normal, -normal) if rank >= 0 else (normal, -normal, normal[::-1], -normal[::-1]):
            centre = point + outward * (10.0 + np.abs(outward) @ half)
            inside = axes.bbox.contains(*(centre - half)) and axes.bbox.contains(*(centre + half))
            clear = inside and (np.abs(obstacles - centre) > half + 2.0).any(axis=1).all()
            if clear and (np.abs(taken[:, :2] - centre) > half + taken[:, 2:]).any(axis=1).all():
                taken = np.vstack([taken, [*centre, *half]])
                place = axes.transData.inverted().transform(centre)
                axes.text(place[0], place[1], words, ha="center", va="center", fontsize=9, color=colour)
                break


def _dense(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points on the polyline `points` (n, 2), 25 to a stretch."""
    steps = np.linspace(0.0, 1.0, 25)[:, None]
    stretches = [a + steps * (b - a) for a, b in pairwise(points)]
    return np.concatenate([points, *stretches])


def _styles(series: list[Series]) -> list[tuple[str, str]]:
    """A colour and a marker for each series. Series of one p_uncond, where there are several of them, share its colour."""
    keys: list[object] = [rows[0].p_uncond for _, rows in series]
    if not 1 < len(set(keys)) < len(keys):
        keys = list(range(len(series)))
    order, styles = list(dict.fromkeys(keys)), []
    for i, key in enumerate(keys):
        number = order.index(key)
        again = number // len(COLOURS) + keys[:i].count(key)
        styles.append((COLOURS[number % len(COLOURS)], MARKERS[again % len(MARKERS)]))
    return styles


def _log_if_wide(axes: Axes, values: list[float]) -> None:
    """A logarithmic axis where the values span more than a factor of eight, with ticks at 1, 2, 3, 5, 10."""
    if min(values) > 0 and max(values) / min(values) > 8:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _guidance_axis(axes: Axes, w: list[float]) -> None:
    """The axis of w: linear near 0, where the paper's list is dense, logarithmic beyond; ticks at measured values."""
    axes.set_xlabel("guidance weight w")
    axes.set_xscale("asinh", linear_width=0.5)
    position = np.arcsinh(np.array(w) / 0.5)
    span = float(position[-1] - position[0]) or 1.0
    axes.set_xlim(*(0.5 * np.sinh([position[0] - 0.05 * span, position[-1] + 0.05 * span])))
    apart = 0.07 * span
    ticks: list[int] = []
    for index in sorted(
        range(len(w)), key=lambda i: (i not in (0, len(w) - 1), w[i] != round(w[i]))
    ):  # the ends, whole numbers, the rest
        if all(abs(position[index] - position[other]) >= apart for other in ticks):
            ticks.append(index)
    axes.xaxis.set_major_locator(FixedLocator([w[i] for i in sorted(ticks)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _drawn(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


# --- samples ---


def tiled(grid: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A grid (R, K, H, W, C) as one RGB picture on white, each pixel enlarged to a square so that small images can be seen."""
    scale = max(1, 56 // grid.shape[2])
    large = grid.repeat(scale, axis=2).repeat(scale, axis=3)
    rows, columns, height, width, _ = large.shape
    gap = 3
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for r in range(rows):
        for c in range(columns):
            top, left = gap + r * (height + gap), gap + c * (width + gap)
            canvas[top : top + height, left : left + width] = large[r, c]
    return canvas


def side_by_side(
    rows: Sequence[Row], grids: Mapping[Row, NDArray[np.uint8]], classes: Sequence[str], label: str = "", most: int = 4
) -> Image.Image:
    """Up to `most` grids of a series in even lines of at most 1960 pixels, each under its w and FID; below, the series' name."""
    chosen = _chosen(rows, most)
    tiles = [tiled(grids[row]) for row in chosen]
    height, width, _ = tiles[0].shape
    margin, head, foot = 36, 96 if classes else 66, 64
    lines = -(-len(tiles) // max(1, (1960 - margin) // (width + margin)))
    across = -(-len(tiles) // lines)
    canvas = Image.new("RGB", (margin + across * (width + margin), lines * (head + height) + foot), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (row, tile) in enumerate(zip(chosen, tiles, strict=True)):
        left, top = margin + index % across * (width + margin), index // across * (head + height) + head
        canvas.paste(Image.fromarray(tile), (left, top))
        baseline = top - head + 54
        draw.text((left + 3, baseline), f"w = {row.w:g}", INK, _font(26, bold=True), anchor="ls")
        fid = f"{row.fid_name} {distance(row.fid)}"
        both = fid if row.inception_score is None else f"{fid}   IS {row.inception_score:.2f}"
        room = width - 14 - draw.textlength(f"w = {row.w:g}", _font(26, bold=True))
        fitting = [words for words in (both, fid) if draw.textlength(words, _font(19)) <= room]
        if fitting:
            draw.text((left + width - 3, baseline), fitting[0], GREY, _font(19), anchor="rs")
        cell = (width - 3) / grids[row].shape[1]
        for column, name in enumerate(classes):
            draw.text((left + 3 + (column + 0.5) * cell, top - 6), _fitted(draw, name, cell - 2), GREY, _font(15), anchor="ms")
    foot, left = lines * (head + height) + 38, margin + 3.0
    if label := visible(label, LONGEST):
        draw.text((left, foot), label, INK, _font(17, bold=True), anchor="ls")
        left += draw.textlength(f"{label}   ", _font(17, bold=True))
    draw.text((left, foot), "The same noise at the same place for every w.", GREY, _font(17), anchor="ls")
    return canvas


def _fitted(draw: ImageDraw.ImageDraw, name: str, width: float) -> str:
    """As much of the name of a class as fits above its column: neighbours would be drawn over each other."""
    most = len(name)
    while most > 2 and draw.textlength(visible(name, most), _font(15)) > width:
        most -= 1
    return visible(name, most)


def _chosen(rows: Sequence[Row], most: int) -> list[Row]:
    """At most `most`: the smallest w, the best FID, the largest w, and those nearest the middle of the others."""
    if len(rows) <= most:
        return list(rows)
    kept = {0, len(rows) - 1, list(rows).index(best_of(rows))}
    for candidate in sorted(range(len(rows)), key=lambda i: abs(i - len(rows) / 2)):
        if len(kept) < most:
            kept.add(candidate)
    return [rows[i] for i in sorted(kept)]


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Matplotlib's own font: the same on every machine, unlike the system's."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
