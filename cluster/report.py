"""The report of an evaluation: one table, two figures, the samples, and a page that holds them all.

Rows are sorted and checked first: all that share a table agree in every condition but w and those the caller names as varying
(an experiment over p_uncond, say); each combination of these is a series with its own curve. Equal rows and grids give equal
bytes, file by file: nothing here knows the date or the machine. What does depend on the machine (seconds, images/s) goes into
`times.json` and nowhere else.

Files: report.json (rows, readable by `rows.from_json`), table.md, fid_over_w.png, frontier.png (FID against IS, the paper's
figure 4), samples_w<w>.png for each w, samples.png (several w side by side), index.html (all of it in one file).
"""

import base64
import html
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
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

from cluster.metrics.rows import Row, require_comparable, to_json
from configs.errors import DataError

Series = tuple[str, list[Row]]  # label ("" where nothing varies) and rows in the order of w

COLOURS = ("#2f5d8c", "#c8553d", "#4a7c59", "#7d5ba6", "#b8860b", "#3c8d93")
INK, GREY = "#222222", "#666666"
SHARES = (("precision", "o-"), ("recall", "s--"), ("accuracy", "^:"))  # quantities between 0 and 1 and their lines
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
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


def write_report(
    rows: Iterable[Row],
    grids: Mapping[float, NDArray[np.uint8]],
    out_dir: Path,
    *,
    title: str,
    classes: Sequence[str] = (),
    varying: Sequence[str] = (),
    times: Mapping[str, float] | None = None,
) -> list[Path]:
    """Write the report of `rows` into the folder `out_dir` and return the files written, in a fixed order.

    `grids[w]` is uint8 (rows, columns, H, W, C): a column for each class of `classes`, and at each place the same noise for every
    w. `varying` names the conditions besides w in which rows may differ; the grids are then of whichever series the caller chose.
    `times` (name -> seconds or rate) becomes times.json. Raises DataError for no rows, two rows of one w, rows that do not
    compare, and grids that are not of one shape.
    """
    series = _series(list(rows), varying)
    ordered = [row for _, members in series for row in members]
    _check_grids(grids, classes)
    files: dict[str, bytes] = {
        "report.json": _json(ordered, title, varying, series).encode(),
        "table.md": _markdown(ordered, title, varying, series).encode(),
    }
    with matplotlib.style.context(["default", STYLE]):
        files["fid_over_w.png"] = _curves(series)
        files["frontier.png"] = _frontier(series)
    for w in sorted(grids):
        files[f"samples_w{w:g}.png"] = _png(Image.fromarray(_tiled(grids[w])))
    if grids:
        files["samples.png"] = _png(_side_by_side(grids, classes, series))
    files["index.html"] = _page(files, ordered, title, varying, series).encode()
    if times is not None:
        files["times.json"] = (json.dumps(dict(sorted(times.items())), indent=1, allow_nan=False) + "\n").encode()
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (out_dir / name).write_bytes(data)
    return [out_dir / name for name in files]


def _series(rows: list[Row], varying: Sequence[str]) -> list[Series]:
    if not rows:
        raise DataError("a report needs at least one metric row; evaluate at least one w")
    require_comparable(rows, varying)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (*(getattr(row, name) for name in varying), row.w)):
        members = groups.setdefault(tuple(getattr(row, name) for name in varying), [])
        if members and members[-1].w == row.w:
            raise DataError(f"run {row.run!r} has two rows for w = {row.w:g} under the same conditions; keep one of them")
        members.append(row)
    return [
        (", ".join(f"{name} {_plain(value)}" for name, value in zip(varying, key, strict=True)), g) for key, g in groups.items()
    ]


def _check_grids(grids: Mapping[float, NDArray[np.uint8]], classes: Sequence[str]) -> None:
    shapes = {grid.shape for grid in grids.values()}
    if len(shapes) > 1 or any(grid.dtype != np.uint8 or grid.ndim != 5 or grid.shape[4] not in (1, 3) for grid in grids.values()):
        raise DataError(
            f"sample grids must be uint8 (rows, columns, H, W, C) of one shape, not {sorted(shapes)}; draw one grid at every w"
        )
    if shapes and classes and next(iter(shapes))[1] != len(classes):
        raise DataError(
            f"sample grids of {next(iter(shapes))[1]} columns need as many class names, not {len(classes)}; name each column"
        )


# ----------------------------------------------------------------------------------------------------------------- words


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _distance(value: float) -> str:
    """Two decimals, as the paper prints FID; three significant digits below one."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _best(members: list[Row]) -> Row:
    return min(members, key=lambda row: row.fid)


def _json(ordered: list[Row], title: str, varying: Sequence[str], series: list[Series]) -> str:
    best = [{"series": label, "w": _best(members).w, "fid": _best(members).fid} for label, members in series]
    document = {"title": title, "varying": list(varying), "best": best} | json.loads(to_json(ordered))
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _cells(ordered: list[Row], varying: Sequence[str], series: list[Series]) -> tuple[list[str], list[tuple[list[str], int]]]:
    """Heads of the table, and for each row its cells and the column to be set bold (-1: none)."""

    def optional(value: float | None, form: Callable[[float], str]) -> str:
        return "-" if value is None else form(value)

    columns: list[tuple[str, Callable[[Row], float | None], Callable[[Row], str]]] = [
        (f"{ordered[0].fid_name} ↓", lambda row: row.fid, lambda row: _distance(row.fid)),
        ("IS ↑", lambda row: row.inception_score, lambda row: f"{row.inception_score:.2f} ± {row.inception_score_std:.2f}"),
        ("accuracy", lambda row: row.accuracy, lambda row: f"{row.accuracy:.3f}"),
        ("precision", lambda row: row.precision, lambda row: optional(row.precision, "{:.3f}".format)),
        ("recall", lambda row: row.recall, lambda row: optional(row.recall, "{:.3f}".format)),
        ("KID × 1000", lambda row: row.kid, lambda row: optional(row.kid, lambda kid: f"{1000 * kid:.3f}")),
        (f"{ordered[0].fid_name} ∞", lambda row: row.fid_infinity, lambda row: optional(row.fid_infinity, _distance)),
        ("NFE", lambda row: row.nfe, lambda row: str(row.nfe)),
    ]
    shown = [column for column in columns if any(column[1](row) is not None for row in ordered)]
    heads = [*varying, "w", *(head for head, _, _ in shown)]
    best = {id(_best(members)) for _, members in series}
    lines = []
    for row in ordered:
        conditions = [_plain(getattr(row, name)) for name in varying]
        cells = [*conditions, f"{row.w:g}", *(form(row) for _, _, form in shown)]
        lines.append((cells, len(varying) + 1 if id(row) in best else -1))
    return heads, lines


def _caption(row: Row, varying: Sequence[str]) -> str:
    """Every condition that all rows share, in words."""
    said = {
        "run": f"run {row.run}",
        "checkpoint_step": f"checkpoint of step {row.checkpoint_step}",
        "ema": f"EMA {row.ema:g}" if row.ema else "raw weights",
        "p_uncond": f"p_uncond {row.p_uncond:g}",
        "sampler": f"sampler {row.sampler}",
        "steps": f"T = {row.steps}",
        "v": f"v = {row.v:g}",
        "clip": "x clipped to [-1, 1]" if row.clip else "x not clipped",
        "seed": f"sampling seed {row.seed}",
        "code_version": f"code {row.code_version}",
    }
    model = ", ".join(words for name, words in said.items() if name not in varying)
    measured = (
        f"n = {row.n} images, labels {row.labels}, rounding {row.rounding}, resize {row.resize}; reference of {row.reference_n} "
        f"images ({row.reference[:12]}); features of {row.extractor} ({row.extractor_hash[:12]})"
    )
    if row.fid_name == "FID":
        return f"{model}; {measured}."
    return f"{model}; {measured}. {row.fid_name} is the Fréchet distance of these features and compares with no other FID."


def _markdown(ordered: list[Row], title: str, varying: Sequence[str], series: list[Series]) -> str:
    heads, lines = _cells(ordered, varying, series)
    table = ["| " + " | ".join(heads) + " |", "|" + "---:|" * len(heads)]
    for cells, bold in lines:
        marked = [f"**{cell}**" if column == bold else cell for column, cell in enumerate(cells)]
        table.append("| " + " | ".join(cell.replace("|", "\\|") for cell in marked) + " |")
    return f"# {title}\n\n" + "\n".join(table) + f"\n\n{_caption(ordered[0], varying)}\n"


def _page(files: Mapping[str, bytes], ordered: list[Row], title: str, varying: Sequence[str], series: list[Series]) -> str:
    heads, lines = _cells(ordered, varying, series)
    table = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    for cells, bold in lines:
        tags = "".join(
            f"<td{' class=best' if column == bold else ''}>{html.escape(cell)}</td>" for column, cell in enumerate(cells)
        )
        table += f"</tr>\n<tr>{tags}"
    pictures = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(files[name]).decode()}">\n'
        for name in ("fid_over_w.png", "frontier.png", "samples.png")
        if name in files
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .9rem; text-align: right; border-bottom: 1px solid #eee }}
th {{ border-bottom: 2px solid {INK}; font-weight: 600 }}
.best {{ font-weight: 700; color: {COLOURS[1]} }}
p {{ color: {GREY}; max-width: 60rem }}
img {{ display: block; max-width: 100%; margin: 2rem 0 }}
</style>
<h1>{html.escape(title)}</h1>
<table><tr>{table}</tr></table>
<p>{html.escape(_caption(ordered[0], varying))}</p>
{pictures}</html>
"""


# --------------------------------------------------------------------------------------------------------------- figures


def _curves(series: list[Series]) -> bytes:
    """FID, IS with its spread, and accuracy, precision and recall, each over w."""
    figure = Figure(figsize=(13.5, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for colour, (label, rows) in zip(_colours(series), series, strict=True):
        w = [row.w for row in rows]
        left.plot(w, [row.fid for row in rows], "o-", color=colour, label=label)
        best = _best(rows)
        left.plot(best.w, best.fid, "o", markersize=11, markerfacecolor="none", markeredgecolor=colour)
        score = np.array([row.inception_score for row in rows])
        spread = np.array([row.inception_score_std for row in rows])
        middle.plot(w, score, "o-", color=colour, label=label)
        middle.fill_between(w, score - spread, score + spread, color=colour, alpha=0.15, linewidth=0)
        for (name, line), colour_ in zip(SHARES, COLOURS, strict=False):
            points = [(row.w, getattr(row, name)) for row in rows if getattr(row, name) is not None]
            if points:
                right.plot(*zip(*points, strict=True), line, color=colour if len(series) > 1 else colour_)
    _log_if_wide(left, [row.fid for _, rows in series for row in rows])
    name = series[0][1][0].fid_name
    if len(series) == 1:
        best = _best(series[0][1])
        left.set_title(f"{name}: best {_distance(best.fid)} at w = {best.w:g}")
    else:
        left.set_title(f"{name} (ring: best)")
        left.legend()
    middle.set_title("Inception score, ± std of the splits")
    right.set_title("shares of images")
    measured = [(name, line) for name, line in SHARES if any(getattr(row, name) is not None for _, rows in series for row in rows)]
    for name, line in measured:
        colour = GREY if len(series) > 1 else COLOURS[SHARES.index((name, line))]
        right.plot([], [], line, color=colour, label=name)
    right.legend(fontsize=9)
    for axes in (left, middle, right):
        _guidance_axis(axes, sorted({row.w for _, rows in series for row in rows}))
    return _drawn(figure)


def _frontier(series: list[Series]) -> bytes:
    """FID against IS, one curve per series, points labelled with w."""
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    axes = figure.subplots()
    for colour, (label, rows) in zip(_colours(series), series, strict=True):
        axes.plot([row.inception_score for row in rows], [row.fid for row in rows], "o-", color=colour, label=label)
        best = _best(rows)
        axes.plot(best.inception_score, best.fid, "o", markersize=11, markerfacecolor="none", markeredgecolor=colour)
    rows = [row for _, members in series for row in members]
    _log_if_wide(axes, [row.fid for row in rows])
    axes.set_xlabel("Inception score (higher is better)")
    axes.set_ylabel(f"{rows[0].fid_name} (lower is better)")
    axes.set_title("What guidance trades: points are labelled with w, the ring is the best FID")
    axes.margins(0.12, 0.08)
    if len(series) > 1:
        axes.legend()
    FigureCanvasAgg(figure).draw()  # the layout must stand before labels can be kept apart
    _label_points(axes, series)
    return _drawn(figure)


def _label_points(axes: Axes, series: list[Series]) -> None:
    """Write w beside the points, the ends and the best first, wherever neither a curve nor another label is in the way."""
    curves = [axes.transData.transform([(row.inception_score, row.fid) for row in rows]) for _, rows in series]
    obstacles = np.concatenate([_dense(points) for points in curves])
    wanted = []
    for colour, (_, rows), points in zip(_colours(series), series, curves, strict=True):
        first = {0, len(rows) - 1, rows.index(_best(rows))}
        for index, row in enumerate(rows):
            along = points[min(index + 1, len(rows) - 1)] - points[max(index - 1, 0)]
            normal = np.array([along[1], -along[0]]) / (np.hypot(*along) or 1.0)
            words = f"w = {row.w:g}" if index in (0, len(rows) - 1) else f"{row.w:g}"
            wanted.append((index not in first, words, points[index], normal, colour))
    taken = np.empty((0, 4))  # centre and half size of each label's box
    for _, words, point, normal, colour in sorted(wanted, key=lambda label: label[0]):
        half = np.array([3.5 * len(words) + 2.0, 8.0])
        for outward in (normal, -normal):
            centre = point + outward * (10.0 + np.abs(outward) @ half)
            clear = (np.abs(obstacles - centre) > half + 2.0).any(axis=1).all()
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


def _colours(series: list[Series]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(series))]


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


# --------------------------------------------------------------------------------------------------------------- samples


def _tiled(grid: NDArray[np.uint8]) -> NDArray[np.uint8]:
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


def _side_by_side(grids: Mapping[float, NDArray[np.uint8]], classes: Sequence[str], series: list[Series]) -> Image.Image:
    """Up to four grids in lines of at most 1800 pixels, each under its w and, where one series makes it unambiguous, its FID."""
    measured = {row.w: row for row in series[0][1]} if len(series) == 1 else {}
    chosen = _chosen(sorted(grids), _best(series[0][1]).w)
    tiles = [_tiled(grids[w]) for w in chosen]
    height, width, _ = tiles[0].shape
    margin, head, foot = 36, 96 if classes else 66, 64
    across = min(len(tiles), max(1, (1800 - margin) // (width + margin)))
    lines = -(-len(tiles) // across)
    canvas = Image.new("RGB", (margin + across * (width + margin), lines * (head + height) + foot), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (w, tile) in enumerate(zip(chosen, tiles, strict=True)):
        left, top = margin + index % across * (width + margin), index // across * (head + height) + head
        canvas.paste(Image.fromarray(tile), (left, top))
        baseline = top - head + 54
        draw.text((left + 3, baseline), f"w = {w:g}", INK, _font(26, bold=True), anchor="ls")
        if w in measured:
            words = f"{measured[w].fid_name} {_distance(measured[w].fid)}   IS {measured[w].inception_score:.2f}"
            draw.text((left + width - 3, baseline), words, GREY, _font(19), anchor="rs")
        cell = (width - 3) / grids[w].shape[1]
        for column, name in enumerate(classes):
            draw.text((left + 3 + (column + 0.5) * cell, top - 6), name, GREY, _font(15), anchor="ms")
    words = "The same noise at the same place for every w."
    draw.text((margin + 3, lines * (head + height) + 38), words, GREY, _font(17), anchor="ls")
    return canvas


def _chosen(w: list[float], best: float) -> list[float]:
    """At most four: the smallest, the best if it was drawn, the largest, and the one nearest the middle of the others."""
    if len(w) <= 4:
        return w
    chosen = {w[0], w[-1], *([best] if best in w else [])}
    for candidate in sorted(w, key=lambda value: abs(w.index(value) - len(w) / 2)):
        if len(chosen) < 4:
            chosen.add(candidate)
    return sorted(chosen)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Matplotlib's own font: the same on every machine, unlike the system's."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
