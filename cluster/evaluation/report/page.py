"""The report of an evaluation: tables, figures, the samples, and a page that holds them all.

Rows are sorted and checked first: all that share a table agree in every condition but w and those the caller names as varying
(an experiment over p_uncond, say); each combination of these is a series with its own curve. Series are compared at equal Inception
score, never at equal w. Published numbers stand beside ours where the conditions match and are grey, with the reason, where not.

Equal rows and grids give equal bytes, file by file: nothing here knows the date or the machine. What does depend on the machine or
on interruptions (seconds, images/s, evaluations that were made twice) goes into `times.json` and `cost.md` and nowhere else; the
page links the latter.

Files: report.json (rows, readable by `rows.from_json`), report.csv (every field of every row), screen.csv (the same of a first
look, where there was one), table.md, fid_over_w.png, frontier.png (FID against IS, the paper's figure 4; not without an IS),
samples.png (several w side by side), index.html (all of it in one file). One series also has samples_w<w>.png for each w; several
have samples_1.png, samples_2.png, ... in their order, instead of samples.png. No table mixes n, and no CSV file.
"""

import base64
import csv
import fcntl
import hashlib
import html
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from freeguide.cluster.evaluation.extractors.roles import role_conditions
from freeguide.cluster.evaluation.measure import Yardstick, conditions
from freeguide.cluster.evaluation.published import rows_of, why_not_beside
from freeguide.cluster.evaluation.report import figures
from freeguide.cluster.evaluation.report.figures import COLOURS, GREY, INK, Series, best_of
from freeguide.cluster.evaluation.report.tables import Cost, Table, cost_in_seconds, key_of, label_of, names_of, tables_of
from freeguide.cluster.evaluation.rows import Row, document, from_json, require_comparable, require_same_instrument
from freeguide.configs.errors import DataError, visible
from freeguide.configs.schema import Config
from freeguide.configs.untrusted import JSON_BYTES, parse_json
from freeguide.data_pipeline.artifact import get_sealed, sealed_json
from freeguide.data_pipeline.store.base import Store, checked
from freeguide.data_pipeline.store.open import access_to, read_object

LATEST = "evaluate/latest.json"  # of a run: where its newest report stands, and the checksums of its files
_AGAIN = "run `freeguide evaluate` again"
OF_THE_MACHINE = ("times.json", "cost.md")  # not of the rows: they differ each time, are for people alone, and have no checksum
ROWS = 4  # of a sample grid, where a page shows several series


def write_report(rows: Iterable[Row], grids: Mapping[Row, NDArray[np.uint8]], out_dir: Path, **facts: Any) -> list[Path]:
    """`report_files` and `save_report` in one; returns the files written, in a fixed order."""
    return save_report(report_files(rows, grids, **facts), out_dir)


def save_report(files: Mapping[str, bytes], out_dir: Path) -> list[Path]:
    """Write the files into `out_dir`, where those of another report may stand. Two at once do so one after the other."""
    out_dir.mkdir(parents=True, exist_ok=True)
    folder = os.open(out_dir, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        # Of other w or series, of a report with a screen, of an extractor with classes.
        for old in (path for name in ("samples*.png", "screen.csv", "frontier.png") for path in out_dir.glob(name)):
            old.unlink()
        for name, data in files.items():
            (out_dir / name).write_bytes(data)
    finally:
        os.close(folder)
    return [out_dir / name for name in files]


def report_files(
    rows: Iterable[Row],
    grids: Mapping[Row, NDArray[np.uint8]],
    *,
    title: str,
    classes: Sequence[str] = (),
    varying: Sequence[str] = (),
    screened: Sequence[Row] = (),
    others: Sequence[Row] = (),
    cost: Cost | None = None,
    times: Mapping[str, float] | None = None,
) -> dict[str, bytes]:
    """The files of the report of `rows` by name, in a fixed order.

    `grids[row]` are samples of a row, uint8 (rows, columns, H, W, C): a column for each class of `classes`, and at each place the
    same noise for every w. `varying` names the conditions besides w in which rows may differ. `screened` are the rows of a first
    look with fewer images, which get a table of their own. `others` are rows of other people's images (`cluster.jobs.score`),
    measured alike. `times` (name -> seconds or rate) becomes times.json, with the seconds of `cost`. Raises DataError for no rows,
    two rows of one w, rows that do not compare, and grids that are not of one shape.
    """
    series = _series(list(rows), varying)
    ordered = [row for _, members in series for row in members]
    require_same_instrument([ordered[0], *others])
    _check_grids(grids, classes)
    looked = [row for _, members in _series(list(screened), varying) for row in members] if screened else []
    tables = tables_of(series, varying, looked, others, cost)
    files: dict[str, bytes] = {
        "report.json": _json(ordered, title, varying, series),
        "report.csv": _csv([*ordered, *others]).encode(),
        "table.md": _markdown(title, tables).encode(),
        "fid_over_w.png": figures.curves(series),
    }
    if all(row.inception_score is not None for row in ordered):
        matching = [number for number in rows_of(ordered[0].dataset) if why_not_beside(ordered[0]) is None and number.w is None]
        files["frontier.png"] = figures.frontier(series, others, matching)
    if looked:
        files["screen.csv"] = _csv(looked).encode()
    files |= _pictures(series, grids, classes)
    files["index.html"] = _page(files, title, tables).encode()
    seconds = dict(times or {})
    if cost is not None:
        files["cost.md"] = cost_in_seconds(cost).encode()
        seconds |= {"device_seconds": cost.device_seconds, "images_per_device_second": cost.images / cost.device_seconds}
    if times is not None or cost is not None:
        files["times.json"] = (json.dumps(dict(sorted(seconds.items())), indent=1, allow_nan=False) + "\n").encode()
    return files


def checksums(files: Mapping[str, bytes]) -> dict[str, str]:
    """The sha256 of each file that rows and grids decide."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name not in OF_THE_MACHINE}


def name_latest(run: Store, place: str, sums: Mapping[str, str]) -> None:
    """Say that the report at `place`, whose files have these `checksums`, is the newest of the run."""
    run.put(LATEST, sealed_json({"report": place, "files": sums}))


def read_latest(run: Store) -> tuple[str, dict[str, str]]:
    """What `name_latest` said; no checksums where an earlier version said it. Raises MissingObject, DataError for damage."""
    try:
        found = parse_json(get_sealed(run, LATEST, _AGAIN, JSON_BYTES))
        return checked(f"{found['report']}x")[:-1], {str(name): str(sha256) for name, sha256 in found.get("files", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{run.uri}/{LATEST} does not name a report ({error}); {_AGAIN}") from None


def read_part(run: Store, place: str, name: str, sums: Mapping[str, str]) -> bytes:
    """One file of the report at `place`. Raises MissingObject, and DataError where its checksum does not fit."""
    data = run.get(f"{place}{name}")
    if name in sums and hashlib.sha256(data).hexdigest() != sums[name]:
        raise DataError(f"{run.uri}/{place}{name} is damaged (its checksum does not fit); {_AGAIN}")
    return data


def read_others(config: Config) -> list[Row]:
    """The rows of `evaluate.others`, in their order. Raises DataError for files that hold none, and for rows of another n."""
    remedy = "score the images first (freeguide score --json), or correct evaluate.others"
    rows: list[Row] = []
    for uri in config.evaluate.others:
        rows += from_json(read_object(uri, remedy, access_to(config.data, uri), JSON_BYTES).decode(errors="replace"), uri)
    _require_alike(rows, {"n": config.evaluate.images})
    return rows


def check_others(others: Sequence[Row], yardsticks: Sequence[Yardstick]) -> None:
    """Raise DataError unless the images behind `others` were measured with the same yardsticks as ours."""
    _require_alike(others, dict.fromkeys(role_conditions(), "") | conditions(*yardsticks))


def _require_alike(others: Sequence[Row], instrument: Mapping[str, Any]) -> None:
    for name, ours in instrument.items():
        for row in others:
            if row.value(name) != ours:
                raise DataError(
                    f"{name} of {row.run!r} in evaluate.others is {row.value(name)!r} and here it is {ours!r}; score them with "
                    f"the same {name}, or leave them out"
                )


def _series(rows: list[Row], varying: Sequence[str]) -> list[Series]:
    if not rows:
        raise DataError("a report needs at least one metric row; evaluate at least one w")
    require_comparable(rows, varying)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (*((v is not None, isinstance(v, str), v) for v in key_of(row, varying)), row.w)):
        members = groups.setdefault(key_of(row, varying), [])
        if members and members[-1].w == row.w:
            raise DataError(f"run {row.run!r} has two rows for w = {row.w:g} under the same conditions; keep one of them")
        members.append(row)
    names = names_of(rows, varying)
    return [(label_of(members[0], names), members) for members in groups.values()]


def _pictures(series: list[Series], grids: Mapping[Row, NDArray[np.uint8]], classes: Sequence[str]) -> dict[str, bytes]:
    """Of one series every w, and four side by side; of several the ends and the best of each, a few rows of them."""
    files: dict[str, bytes] = {}
    if len(series) > 1:
        grids = {row: grid[:ROWS] for row, grid in grids.items()}
    for number, (label, members) in enumerate(series, start=1):
        drawn = [row for row in members if row in grids]
        if len(series) == 1:
            files |= {f"samples_w{row.w:g}.png": figures.png(Image.fromarray(figures.tiled(grids[row]))) for row in drawn}
        if drawn:
            name, most = ("samples.png", 4) if len(series) == 1 else (f"samples_{number}.png", 3)
            files[name] = figures.png(figures.side_by_side(drawn, grids, classes, label, most))
    return files


def _check_grids(grids: Mapping[Row, NDArray[np.uint8]], classes: Sequence[str]) -> None:
    shapes = {grid.shape for grid in grids.values()}
    if len(shapes) > 1 or any(grid.dtype != np.uint8 or grid.ndim != 5 or grid.shape[4] not in (1, 3) for grid in grids.values()):
        raise DataError(
            f"sample grids must be uint8 (rows, columns, H, W, C) of one shape, not {sorted(shapes)}; draw one grid at every w"
        )
    if shapes and classes and next(iter(shapes))[1] != len(classes):
        raise DataError(
            f"sample grids of {next(iter(shapes))[1]} columns need as many class names, not {len(classes)}; name each column"
        )


# --- words ---


def _json(ordered: list[Row], title: str, varying: Sequence[str], series: list[Series]) -> bytes:
    best = [{"series": label, "w": best_of(members).w, "fid": best_of(members).fid} for label, members in series]
    return sealed_json({"title": title, "varying": list(varying), "best": best} | document(ordered))


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    said = [row.to_dict() for row in rows]
    writer = csv.DictWriter(text, list(dict.fromkeys(name for one in said for name in one)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in one.items()} for one in said)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A value for a spreadsheet, which would take text that begins like a formula for one and run it."""
    if not isinstance(value, str):
        return "" if value is None else value
    text = visible(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _markdown(title: str, tables: Sequence[Table]) -> str:
    parts = [f"# {_quiet(title)}"]
    for table in tables:
        if table.heading:
            parts.append(f"## {_quiet(table.heading)}")
        if table.lines:
            lines = ["| " + " | ".join(map(_quiet, table.heads)) + " |", "|" + "---:|" * len(table.heads)]
            for i, cells in enumerate(table.lines):
                quiet = list(map(_quiet, cells))
                marked = [f"**{cell}**" if (i, column) in table.bold else cell for column, cell in enumerate(quiet)]
                lines.append("| " + " | ".join(marked) + " |")
            parts.append("\n".join(lines))
        if table.note:
            note = _quiet(table.note)
            note = f"{note} [{table.file}]({table.file})." if table.file else note
            parts.append(f"*{note}*" if table.grey else note)
    return "\n\n".join(parts) + "\n"


def _quiet(text: str) -> str:
    """Text in which Markdown finds no tag, link, picture, code or new cell; whatever people read in a terminal stays as it is."""
    return re.sub(r"[\\<`|]|(?<=\])\(", r"\\\g<0>", visible(text))


# --- the page ---


def _html(text: str) -> str:
    return html.escape(visible(text))


def _page(files: Mapping[str, bytes], title: str, tables: Sequence[Table]) -> str:
    pictures = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(files[name]).decode()}">\n'
        for name in files
        if name.endswith(".png") and not name.startswith("samples_w")
    )
    first, *rest = (_section(table) for table in tables)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{_html(title)}</title>
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
<h1>{_html(title)}</h1>
{first}
{pictures}{"".join(rest)}</html>
"""


def _section(table: Table) -> str:
    text = f"<h2>{_html(table.heading)}</h2>\n" if table.heading else ""
    if table.lines:
        left = ["" if head not in ("", "images", "model", "series", "source") else " class=left" for head in table.heads]
        lines = "".join(f"<th{side}>{_html(head)}</th>" for side, head in zip(left, table.heads, strict=True))
        for i, cells in enumerate(table.lines):
            lines += "</tr>\n<tr>"
            for column, (side, cell) in enumerate(zip(left, cells, strict=True)):
                lines += f"<td{' class=best' if (i, column) in table.bold else side}>{_html(cell)}</td>"
        text += f"<table><tr>{lines}</tr></table>\n"
    if table.note:
        file = f' <a href="{table.file}">{table.file}</a>.' if table.file else ""
        text += f"<p>{_html(table.note)}{file}</p>\n"
    return f"<section{' class=grey' if table.grey else ''}>\n{text}</section>\n"
