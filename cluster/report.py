"""The report of an evaluation: tables, figures, the samples, and a page that holds them all.

Rows are sorted and checked first: all that share a table agree in every condition but w and those the caller names as varying
(an experiment over p_uncond, say); each combination of these is a series with its own curve. Series are compared at equal Inception
score, never at equal w. Published numbers stand beside ours where the conditions match and are grey, with the reason, where not.

Equal rows and grids give equal bytes, file by file: nothing here knows the date or the machine. What does depend on the machine
(seconds, images/s) goes into `times.json` and `cost.md` and nowhere else.

Files: report.json (rows, readable by `rows.from_json`), report.csv (every field of every row), table.md, fid_over_w.png,
frontier.png (FID against IS, the paper's figure 4), samples_w<w>.png for each w, samples.png (several w side by side), index.html
(all of it in one file).
"""

import base64
import csv
import html
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cluster import figures
from cluster.figures import COLOURS, GREY, INK, Series, best_of, distance
from cluster.metrics.frontier import common_scores, fid_at, over_seeds
from cluster.metrics.published import beside, rows_of, same_setting, why_not_beside
from cluster.metrics.rows import Row, require_comparable, require_same_instrument, to_json
from configs.errors import DataError


@dataclass(frozen=True)
class Cost:
    """What the sweep took. One network evaluation is one forward pass for one image."""

    images: int  # made, over all w
    evaluations: int  # of the network, as they were made: shared prefixes once, unguided steps with one forward
    naive_evaluations: int  # of sampling every w by itself with both predictions at every step where w is not 0
    device_seconds: float  # of sampling and measuring, added over actors
    device: str  # what the actors ran on: "NVIDIA H100", "CPU"


@dataclass(frozen=True)
class _Table:
    heading: str
    heads: list[str]
    lines: list[list[str]]
    bold: frozenset[tuple[int, int]] = frozenset()  # (line, column)
    note: str = ""
    grey: bool = False  # not comparable with the rest; the note says why


def write_report(
    rows: Iterable[Row],
    grids: Mapping[float, NDArray[np.uint8]],
    out_dir: Path,
    *,
    title: str,
    classes: Sequence[str] = (),
    varying: Sequence[str] = (),
    others: Sequence[Row] = (),
    cost: Cost | None = None,
    times: Mapping[str, float] | None = None,
) -> list[Path]:
    """Write the report of `rows` into the folder `out_dir` and return the files written, in a fixed order.

    `grids[w]` is uint8 (rows, columns, H, W, C): a column for each class of `classes`, and at each place the same noise for every
    w. `varying` names the conditions besides w in which rows may differ; the grids are then of whichever series the caller chose.
    `others` are rows of other people's images (`cluster.score`), measured alike. `times` (name -> seconds or rate) becomes
    times.json, with the seconds of `cost`. Raises DataError for no rows, two rows of one w, rows that do not compare, and grids
    that are not of one shape.
    """
    series = _series(list(rows), varying)
    ordered = [row for _, members in series for row in members]
    require_same_instrument([ordered[0], *others])
    _check_grids(grids, classes)
    tables = _tables(series, ordered, varying, others, cost)
    files: dict[str, bytes] = {
        "report.json": _json(ordered, title, varying, series).encode(),
        "report.csv": _csv([*ordered, *others]).encode(),
        "table.md": _markdown(title, tables).encode(),
        "fid_over_w.png": figures.curves(series),
    }
    matching = [number for number in rows_of(ordered[0].dataset) if why_not_beside(ordered[0]) is None and number.w is None]
    files["frontier.png"] = figures.frontier(series, others, matching)
    for w in sorted(grids):
        files[f"samples_w{w:g}.png"] = figures.png(Image.fromarray(figures.tiled(grids[w])))
    if grids:
        files["samples.png"] = figures.png(figures.side_by_side(grids, classes, series))
    files["index.html"] = _page(files, title, tables).encode()
    seconds = dict(times or {})
    if cost is not None:
        files["cost.md"] = _cost_in_seconds(cost).encode()
        seconds |= {"device_seconds": cost.device_seconds, "images_per_device_second": cost.images / cost.device_seconds}
    if times is not None or cost is not None:
        files["times.json"] = (json.dumps(dict(sorted(seconds.items())), indent=1, allow_nan=False) + "\n").encode()
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (out_dir / name).write_bytes(data)
    return [out_dir / name for name in files]


def _series(rows: list[Row], varying: Sequence[str]) -> list[Series]:
    if not rows:
        raise DataError("a report needs at least one metric row; evaluate at least one w")
    require_comparable(rows, varying)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (*((v is not None, isinstance(v, str), v) for v in _key(row, varying)), row.w)):
        members = groups.setdefault(_key(row, varying), [])
        if members and members[-1].w == row.w:
            raise DataError(f"run {row.run!r} has two rows for w = {row.w:g} under the same conditions; keep one of them")
        members.append(row)
    return [
        (", ".join(f"{name} {_plain(value)}" for name, value in zip(varying, key, strict=True)), g) for key, g in groups.items()
    ]


def _key(row: Row, varying: Sequence[str]) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in varying)


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


# --- tables ---


def _tables(
    series: list[Series], ordered: list[Row], varying: Sequence[str], others: Sequence[Row], cost: Cost | None
) -> list[_Table]:
    tables = [_metrics(series, ordered, varying)]
    if len(series) > 1:
        tables += _matched(series)
    tables += [_seeds(ordered, name) for name in ("seed", "run") if tuple(varying) == (name,) and len(series) > 1]
    if others:
        tables.append(_others(others))
    tables.append(_published(ordered))
    if cost is not None:
        tables.append(_evaluations(cost))
    return tables


def _metrics(series: list[Series], ordered: list[Row], varying: Sequence[str]) -> _Table:
    """The paper's table: a line for each w, the best FID of each series bold, the paper's own numbers where they match."""
    shown = _columns(ordered)
    heads = [*varying, "w", *(head for head, _ in shown)]
    best = {id(best_of(members)) for _, members in series}
    printed = [[number for number in rows_of(row.dataset) if beside(row, number)] for row in ordered]
    if any(printed):
        heads += ["paper's FID", "paper's IS"]
    lines = []
    for row, numbers in zip(ordered, printed, strict=True):
        cells = [_plain(value) for value in _key(row, varying)] + [f"{row.w:g}"] + [form(row) for _, form in shown]
        if any(printed):
            cells.append(" / ".join(distance(number.fid) for number in numbers) or "-")
            cells.append(" / ".join(f"{number.inception_score:g}" for number in numbers if number.inception_score) or "-")
        lines.append(cells)
    bold = frozenset((line, len(varying) + 1) for line, row in enumerate(ordered) if id(row) in best)
    return _Table("", heads, lines, bold, _caption(ordered[0], varying))


def _columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """Heads and forms of the values that at least one row has."""

    def number(name: str, form: Callable[[float], str]) -> Callable[[Row], str]:
        return lambda row: "-" if getattr(row, name) is None else form(getattr(row, name))

    def with_spread(row: Row) -> str:
        return distance(row.fid) + ("" if row.fid_std is None else f" ± {row.fid_std:.2g}")

    name = rows[0].fid_name
    columns: list[tuple[str, str, Callable[[Row], str]]] = [
        (f"{name} ↓", "fid", with_spread),
        ("IS ↑", "inception_score", lambda row: f"{row.inception_score:.2f} ± {row.inception_score_std:.2f}"),
        ("accuracy", "accuracy", number("accuracy", "{:.3f}".format)),
        ("precision", "precision", number("precision", "{:.3f}".format)),
        ("recall", "recall", number("recall", "{:.3f}".format)),
        ("KID × 1000", "kid", number("kid", lambda kid: f"{1000 * kid:.3f}")),
        (f"{name} ∞", "fid_infinity", number("fid_infinity", distance)),
        ("sFID", "sfid", number("sfid", distance)),
        ("FD-DINOv2", "fd_dinov2", number("fd_dinov2", distance)),
        ("NFE", "nfe", number("nfe", str)),
    ]
    return [(head, form) for head, field, form in columns if any(getattr(row, field) is not None for row in rows)]


def _matched(series: list[Series]) -> list[_Table]:
    """FID of every series at the Inception scores that all of them reach; empty where they share none."""
    members = [rows for _, rows in series]
    scores = common_scores(members)
    found = [[fid_at(rows, score) for rows in members] for score in scores]
    lowest = [min(value for value in values if value is not None) for values in found]
    bold = frozenset((line, 1 + i) for line, values in enumerate(found) for i, value in enumerate(values) if value == lowest[line])
    lines = [
        [f"{score:g}", *("-" if value is None else distance(value) for value in values)]
        for score, values in zip(scores, found, strict=True)
    ]
    name = members[0][0].fid_name
    note = (
        f"{name} on straight lines between neighbouring w, at Inception scores that all curves reach. Guidance trades one for the "
        "other, so models compare here and not at equal w."
    )
    return (
        [_Table(f"{name} at equal Inception score", ["IS", *(label for label, _ in series)], lines, bold, note)] if scores else []
    )


def _seeds(ordered: list[Row], name: str) -> _Table:
    gathered = over_seeds(ordered, (name,))

    def spread(mean: float, std: float | None) -> str:
        return distance(mean) if std is None else f"{distance(mean)} ± {std:.2g}"

    lines = [
        [f"{g.w:g}", spread(g.fid.mean, g.fid.std), spread(g.inception_score.mean, g.inception_score.std), str(g.fid.k)]
        for g in gathered
    ]
    what = {"seed": "sampling seeds", "run": "runs"}[name]
    note = f"Mean ± standard deviation of one value (denominator k - 1) over k {what}; never the best of them."
    return _Table(f"Over {what}", ["w", ordered[0].fid_name, "IS", "k"], lines, note=note)


def _others(others: Sequence[Row]) -> _Table:
    shown = _columns(others)
    lines = [[row.run, *(form(row) for _, form in shown)] for row in others]
    note = "Images made by others, measured here with the same n, reference and extractor. How they were rounded is not known."
    return _Table("Other models, measured here", ["images", *(head for head, _ in shown)], lines, note=note)


def _published(ordered: Sequence[Row]) -> _Table:
    """What papers printed for this data set and does not stand beside a row already: other models, or all if nothing compares."""
    reason, numbers = why_not_beside(ordered[0]), rows_of(ordered[0].dataset)
    if not numbers:
        return _Table("", [], [], note=f"No published numbers stand here because {reason}.", grey=True)
    if reason is None:
        numbers = [number for number in numbers if number.w is None]
    else:
        numbers = [number for number in numbers if number.w is None or any(same_setting(row, number) for row in ordered)]

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:g}"

    lines = [
        [n.model, cell(n.w), cell(n.p_uncond), cell(n.steps), f"{n.fid:g}", cell(n.inception_score), n.source] for n in numbers
    ]
    note = "Printed by the papers named; each measured 50 000 images with Inception's features."
    if reason is not None:
        note = f"Not comparable with the rows above because {reason}. " + note
    heads = ["model", "w", "p_uncond", "T", "FID", "IS", "source"]
    return _Table(f"Published for {ordered[0].dataset}", heads, lines, note=note, grey=reason is not None)


def _evaluations(cost: Cost) -> _Table:
    lines = [
        ["this sweep", f"{cost.evaluations:,}", f"{cost.evaluations / cost.images:.1f}"],
        ["every w by itself", f"{cost.naive_evaluations:,}", f"{cost.naive_evaluations / cost.images:.1f}"],
    ]
    share = cost.evaluations / cost.naive_evaluations
    note = f"{share:.0%} of the naive sweep, which runs both predictions at every step of every w > 0. Seconds are in cost.md."
    return _Table("Cost", ["", "network evaluations", "per image"], lines, note=note)


def _cost_in_seconds(cost: Cost) -> str:
    naive = cost.device_seconds * cost.naive_evaluations / cost.evaluations
    rows = [
        ("device", cost.device),
        ("images", f"{cost.images:,}"),
        ("network evaluations", f"{cost.evaluations:,}"),
        ("device-seconds", f"{cost.device_seconds:,.1f}"),
        ("images per device-second", f"{cost.images / cost.device_seconds:.3g}"),
        ("device-seconds of a naive sweep at this speed", f"{naive:,.1f}"),
    ]
    return "\n".join(["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)]) + "\n"


# --- words ---


def _plain(value: Any) -> str:
    return "not known" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _json(ordered: list[Row], title: str, varying: Sequence[str], series: list[Series]) -> str:
    best = [{"series": label, "w": best_of(members).w, "fid": best_of(members).fid} for label, members in series]
    document = {"title": title, "varying": list(varying), "best": best} | json.loads(to_json(ordered))
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in asdict(row).items()} for row in rows)
    return text.getvalue()


def _caption(row: Row, varying: Sequence[str]) -> str:
    """Every condition that all rows share, in words."""
    clip = {True: "x clipped to [-1, 1]", False: "x not clipped", None: "clipping of x not known"}
    said = {
        "run": f"run {row.run}",
        "checkpoint_step": f"checkpoint of step {_plain(row.checkpoint_step)}",
        "ema": "raw weights" if row.ema in (0.0, "master") else f"EMA {_plain(row.ema)}",
        "p_uncond": f"p_uncond {_plain(row.p_uncond)}",
        "sampler": f"sampler {row.sampler}",
        "steps": f"T = {_plain(row.steps)}",
        "v": f"v = {_plain(row.v)}",
        "clip": clip[row.clip],
        "options": row.options,
        "seed": f"sampling seed {_plain(row.seed)}",
        "code_version": f"code {row.code_version}",
    }
    model = ", ".join(words for name, words in said.items() if words and name not in varying)
    real = f"{row.reference_n} images" if row.reference_n else "a number of images that its file does not say"
    measured = (
        f"n = {row.n} images, labels {row.labels}, rounding {row.rounding}, resize {row.resize}; reference "
        f"{row.dataset or 'without a name'}, of {real} ({row.reference[:12]}); features of {row.extractor} "
        f"({row.extractor_hash[:12]})"
    )
    if row.dinov2:
        measured += f"; DINOv2 ({row.dinov2[:12]}) against its reference ({row.dinov2_reference[:12]})"
    words = [f"{model}; {measured}."]
    if row.fid_std is not None:
        words.append(f"± after {row.fid_name}: standard deviation over sets of n images of one network, by jackknife.")
    if row.fid_name != "FID":
        words.append(f"{row.fid_name} is the Fréchet distance of these features and compares with no other FID.")
    return " ".join(words)


def _markdown(title: str, tables: Sequence[_Table]) -> str:
    parts = [f"# {title}"]
    for table in tables:
        if table.heading:
            parts.append(f"## {table.heading}")
        if table.lines:
            lines = ["| " + " | ".join(table.heads) + " |", "|" + "---:|" * len(table.heads)]
            for i, cells in enumerate(table.lines):
                marked = [f"**{cell}**" if (i, column) in table.bold else cell for column, cell in enumerate(cells)]
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in marked) + " |")
            parts.append("\n".join(lines))
        if table.note:
            parts.append(f"*{table.note}*" if table.grey else table.note)
    return "\n\n".join(parts) + "\n"


# --- the page ---


def _page(files: Mapping[str, bytes], title: str, tables: Sequence[_Table]) -> str:
    pictures = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(files[name]).decode()}">\n'
        for name in ("fid_over_w.png", "frontier.png", "samples.png")
        if name in files
    )
    first, *rest = (_section(table) for table in tables)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; max-width: 84rem; margin: 2rem auto; padding: 0 1rem }}
section {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap }}
th {{ border-bottom: 2px solid {INK}; font-weight: 600 }}
.left {{ text-align: left }}
.best {{ font-weight: 700; color: {COLOURS[1]} }}
.grey, .grey th, .grey td {{ color: #999 }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem }}
p {{ color: {GREY}; max-width: 60rem }}
img {{ display: block; max-width: 100%; margin: 2rem 0 }}
</style>
<h1>{html.escape(title)}</h1>
{first}
{pictures}{"".join(rest)}</html>
"""


def _section(table: _Table) -> str:
    text = f"<h2>{html.escape(table.heading)}</h2>\n" if table.heading else ""
    if table.lines:
        left = ["" if head not in ("", "images", "model", "source") else " class=left" for head in table.heads]
        lines = "".join(f"<th{side}>{html.escape(head)}</th>" for side, head in zip(left, table.heads, strict=True))
        for i, cells in enumerate(table.lines):
            lines += "</tr>\n<tr>"
            for column, (side, cell) in enumerate(zip(left, cells, strict=True)):
                lines += f"<td{' class=best' if (i, column) in table.bold else side}>{html.escape(cell)}</td>"
        text += f"<table><tr>{lines}</tr></table>\n"
    if table.note:
        text += f"<p>{html.escape(table.note)}</p>\n"
    return f"<section{' class=grey' if table.grey else ''}>\n{text}</section>\n"
