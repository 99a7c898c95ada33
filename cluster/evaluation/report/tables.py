"""The tables of a report: what stands in each line, what is bold, and the sentences below.

The metrics of a series as the paper prints them, all series at equal Inception score, means over seeds, the screen, other people's
images, published numbers, and the cost. Each is made of rows alone; `report.page` writes them as Markdown and HTML.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from freeguide.cluster.evaluation.extractors.roles import ROLES
from freeguide.cluster.evaluation.frontier import Spread, common_scores, fid_at, over_seeds, spread
from freeguide.cluster.evaluation.metrics import METRICS
from freeguide.cluster.evaluation.published import beside, rows_of, same_setting, sampled_otherwise, why_not_beside
from freeguide.cluster.evaluation.report.figures import Series, best_of
from freeguide.cluster.evaluation.rows import Row
from freeguide.cluster.evaluation.statistics.metric import Metric, deviation, distance


@dataclass(frozen=True)
class Cost:
    """What the sweep took. One network evaluation is one forward pass for one image."""

    images: int  # made, over all w and series
    evaluations: int  # that they take: shared prefixes once, unguided steps with one forward
    counted: int  # that the actors made for them: more, where a job was interrupted between two w of a shared prefix
    naive_images: int  # of every w of every series, all with the full n
    naive_evaluations: int  # of sampling these one by one with both predictions at every step where w is not 0
    device_seconds: float  # of sampling and measuring, added over actors
    device: str  # what the actors ran on: "NVIDIA H100", "CPU"


@dataclass(frozen=True)
class Table:
    heading: str
    heads: list[str]
    lines: list[list[str]]
    bold: frozenset[tuple[int, int]] = frozenset()  # (line, column)
    note: str = ""
    grey: bool = False  # not comparable with the rest; the note says why
    file: str = ""  # beside the report, with which the note ends


def tables_of(
    series: list[Series],
    varying: Sequence[str],
    screened: Sequence[Row] = (),
    others: Sequence[Row] = (),
    cost: Cost | None = None,
) -> list[Table]:
    """All tables of a report, in their order; `screened` are sorted as the rows of `series` are."""
    ordered = [row for _, members in series for row in members]
    tables = [_metrics(ordered, varying)]
    if len(series) > 1:
        tables += _matched([(label, [members]) for label, members in series])
    names = names_of(ordered, varying)
    for name in ("seed", "run"):
        tables += _repeated(series, name, varying, screened)
    if len(names) < len(varying):
        tables.append(_facts(series, varying))
    if screened:
        tables.append(_screen(screened, varying))
    if others:
        tables.append(_others(others))
    tables.append(_published(ordered))
    if cost is not None:
        tables.append(_evaluations(cost))
    return tables


def _screen(ordered: Sequence[Row], varying: Sequence[str]) -> Table:
    """The table of the first look: other n, so another table."""
    table = _metrics(ordered, varying)
    better = "a" if ordered[0].inception_score is None else "at least its IS and a"
    note = (
        "A first look at every w. More images went to those that may lie on the frontier, and their neighbours in w: a w is left "
        f"out where another has {better} {ordered[0].fid_name} lower by more than both spreads. "
    )
    return replace(table, heading=f"The screen: n = {ordered[0].n}", note=note + table.note)


def _facts(series: list[Series], varying: Sequence[str]) -> Table:
    """What else differs between series than their names say."""
    heads = ["series", *varying]
    return Table("Series", heads, [[label, *(plain(v) for v in key_of(members[0], varying))] for label, members in series])


def _metrics(ordered: Sequence[Row], varying: Sequence[str]) -> Table:
    """The paper's table: a line for each w, the best FID of each series bold, the paper's own numbers where they match."""
    names = names_of(ordered, varying)
    shown = _columns(ordered)
    heads = [*names, "w", *(head for head, _ in shown)]
    best = {best_of([other for other in ordered if key_of(other, varying) == key_of(row, varying)]) for row in ordered}
    printed = [[number for number in rows_of(row.dataset) if beside(row, number)] for row in ordered]
    if any(printed):
        heads += ["paper's FID", "paper's IS"]
    lines = []
    for row, numbers in zip(ordered, printed, strict=True):
        cells = [plain(value) for value in key_of(row, names)] + [f"{row.w:g}"] + [form(row) for _, form in shown]
        if any(printed):
            cells.append(" / ".join(distance(number.fid) for number in numbers) or "-")
            cells.append(" / ".join(f"{number.inception_score:g}" for number in numbers if number.inception_score) or "-")
        lines.append(cells)
    bold = frozenset((line, len(names) + 1) for line, row in enumerate(ordered) if row in best)
    return Table("", heads, lines, bold, _caption(ordered, varying))


def _columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """Heads and forms of the values that at least one row has, each with its spread where the row has one."""
    measured = [(name, metric) for name, metric in METRICS.items() if any(row.value(name) is not None for row in rows)]
    columns: list[tuple[str, Callable[[Row], str]]] = []
    columns += [(metric.head(rows[0].fid_name), partial(_cell, name, metric)) for name, metric in measured]
    if any(row.nfe is not None for row in rows):
        columns.append(("NFE", lambda row: "-" if row.nfe is None else str(row.nfe)))
    return columns


def _cell(name: str, metric: Metric, row: Row) -> str:
    return metric.cell(row.value(name), _spread_of(row, name))


def _spread_of(row: Row, name: str) -> float | None:
    spread: float | None = row.value(f"{name}_std") if METRICS[name].spread else None
    return spread


def _matched(groups: Sequence[tuple[str, list[list[Row]]]], repeats: str = "") -> list[Table]:
    """FID of every group at the Inception scores that all its curves reach, a mean where it has several; empty for no such score.

    `repeats` says what the curves of a group are repetitions by.
    """
    scores = common_scores([rows for _, curves in groups for rows in curves])
    found = [[_at(curves, score) for _, curves in groups] for score in scores]
    lowest = [min(value.mean for value in line) for line in found]
    bold = frozenset((i, 1 + j) for i, line in enumerate(found) for j, value in enumerate(line) if value.mean == lowest[i])
    lines = [[f"{score:g}", *map(_with_deviation, line)] for score, line in zip(scores, found, strict=True)]
    name = groups[0][1][0][0].fid_name
    note = (
        f"{name} on straight lines between neighbouring w, at Inception scores that all curves reach. Guidance trades one for the "
        "other, so models compare here and not at equal w."
    )
    heading = f"{name} at equal Inception score"
    if repeats:
        heading, note = f"{heading}, over {repeats}", f"Mean ± standard deviation of one value over {repeats} of the table above."
    return [Table(heading, ["IS", *(label for label, _ in groups)], lines, bold, note)] if scores else []


def _at(curves: Sequence[Sequence[Row]], score: float) -> Spread:
    return spread([value for rows in curves if (value := fid_at(rows, score)) is not None])


def _repeated(series: list[Series], name: str, varying: Sequence[str], screened: Sequence[Row]) -> list[Table]:
    """What repetitions by `name`, sampling seeds or training runs, say together, for every combination of the other conditions.

    Nothing where nothing is repeated. Curves that the screen left out whole are missed like single w of them: a mean over those
    that stayed would be a mean over the best.
    """
    others = [other for other in varying if other != name]
    groups: dict[tuple[Any, ...], list[list[Row]]] = {}
    for _, members in series:
        groups.setdefault(key_of(members[0], others), []).append(members)
    asked = Counter(key_of(row, others) for row in {key_of(row, varying): row for row in screened}.values())
    groups = {key: curves for key, curves in groups.items() if len(curves) >= asked[key]}
    firsts = [curves[0][0] for curves in groups.values()]
    names = names_of(firsts, others)
    rows = [
        (first, found)
        for first, curves in zip(firsts, groups.values(), strict=True)
        for found in over_seeds([row for rows in curves for row in rows], (name,))
    ]
    if not rows or max(map(len, groups.values())) < 2:
        return []
    shown = [(each, metric) for each, metric in METRICS.items() if all(each in found.values for _, found in rows)]
    lines = []
    for first, found in rows:
        values = [_with_deviation(found.values[each], metric.scale) for each, metric in shown]
        lines.append([*map(plain, key_of(first, names)), f"{found.w:g}", *values, str(found.values["fid"].k)])
    what = {"seed": "sampling seeds", "run": "runs"}[name]
    note = f"Mean ± standard deviation of one value (denominator k - 1) over k {what}; never the best of them."
    if screened:
        note += " What the screen left out of one of them is left out here."
    tables = [
        Table(f"Over {what}", [*names, "w", *(metric.titled(firsts[0].fid_name) for _, metric in shown), "k"], lines, note=note)
    ]
    labels = [label_of(first, names) for first in firsts]
    return tables + (_matched(list(zip(labels, groups.values(), strict=True)), what) if len(groups) > 1 else [])


def _with_deviation(value: Spread, scale: int = 1) -> str:
    mean = distance(scale * value.mean)
    return mean if value.std is None else f"{mean} ± {deviation(scale * value.std)}"


def _others(others: Sequence[Row]) -> Table:
    shown = _columns(others)
    lines = [[row.run, *(form(row) for _, form in shown)] for row in others]
    note = "Images made by others, measured here with the same n, reference and extractor. How they were rounded is not known."
    return Table("Other models, measured here", ["images", *(head for head, _ in shown)], lines, note=note)


def _published(ordered: Sequence[Row]) -> Table:
    """What papers printed for this data set and does not stand beside a row already: other models, or all if nothing compares."""
    reason, numbers = why_not_beside(ordered[0]), rows_of(ordered[0].dataset)
    if not numbers:
        return Table("", [], [], note=f"No published numbers stand here because {reason}.", grey=True)
    note = "Printed by the papers named; each measured 50 000 images with Inception's features."
    if reason is None:
        otherwise = [sampled_otherwise(row) for row in ordered if any(same_setting(row, number) for number in numbers)]
        if words := [word for word in dict.fromkeys(otherwise) if word]:
            note += f" The paper's own stand beside rows sampled alike only: {'; '.join(words)}."
        numbers = [number for number in numbers if number.w is None]
    else:
        note = f"Not comparable with the rows above because {reason}. {note}"
        numbers = [number for number in numbers if number.w is None or any(same_setting(row, number) for row in ordered)]

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:g}"

    lines = [
        [n.model, cell(n.w), cell(n.p_uncond), cell(n.steps), f"{n.fid:g}", cell(n.inception_score), n.source] for n in numbers
    ]
    heads = ["model", "w", "p_uncond", "T", "FID", "IS", "source"]
    return Table(f"Published for {ordered[0].dataset}", heads, lines, note=note, grey=reason is not None)


def _evaluations(cost: Cost) -> Table:
    share = cost.evaluations / cost.naive_evaluations
    lines = [
        ["this sweep", f"{cost.images:,}", f"{cost.evaluations:,}", f"{share:.0%}"],
        ["every w by itself", f"{cost.naive_images:,}", f"{cost.naive_evaluations:,}", "100%"],
    ]
    note = (
        "The naive sweep measures every w of every series with the full n and runs both predictions at every step of every w > 0. "
        "Device-seconds, images per second and the evaluations that were counted are in"
    )
    return Table("Cost", ["", "images", "network evaluations", "share"], lines, note=note, file="cost.md")


def cost_in_seconds(cost: Cost) -> str:
    naive = cost.device_seconds * cost.naive_evaluations / cost.counted
    rows = [
        ("device", cost.device),
        ("images", f"{cost.images:,}"),
        ("network evaluations, counted", f"{cost.counted:,}"),
        ("share of a naive sweep", f"{cost.counted / cost.naive_evaluations:.1%}"),
        ("device-seconds", f"{cost.device_seconds:,.1f}"),
        ("images per device-second", f"{cost.images / cost.device_seconds:.3g}"),
        ("device-seconds of a naive sweep at this speed", f"{naive:,.1f}"),
    ]
    return "\n".join(["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)]) + "\n"


# --- words ---


def names_of(rows: Sequence[Row], varying: Sequence[str]) -> list[str]:
    """Those of `varying` by which series are called: the run and its checkpoint only where nothing else tells them apart.

    Where networks or diffusion differ, the run stands for them, or their hash where `varying` has no run: such series are never
    called by their p_uncond alone.
    """
    names = list(varying)
    kept = ("run" if "run" in varying else "trained") if len({row.trained for row in rows}) > 1 else None
    for name in ("checkpoint_step", "trained", "run"):
        rest = [other for other in names if other != name]
        if name != kept and rest and len({key_of(row, rest) for row in rows}) == len({key_of(row, varying) for row in rows}):
            names = rest
    return names


def label_of(row: Row, names: Sequence[str]) -> str:
    """What a series is called: `options` says its own names, and nothing where they have their defaults."""
    said = [(name, plain(getattr(row, name))) for name in names]
    words = [value if name == "options" else f"{name} {value}" for name, value in said if value]
    return ", ".join(words or ["defaults"] * bool(names))


def key_of(row: Row, varying: Sequence[str]) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in varying)


def plain(value: Any) -> str:
    return "not known" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _caption(ordered: Sequence[Row], varying: Sequence[str]) -> str:
    """Every condition that all rows share, in words, and what stands after ±."""
    row = ordered[0]
    clip = {True: "x clipped to [-1, 1]", False: "x not clipped", None: "clipping of x not known"}
    said = {
        "run": f"run {row.run}",
        "checkpoint_step": f"checkpoint of step {plain(row.checkpoint_step)}",
        "ema": "raw weights" if row.ema in (0.0, "master") else f"EMA {plain(row.ema)}",
        "p_uncond": f"p_uncond {plain(row.p_uncond)}",
        "sampler": f"sampler {row.sampler}",
        "steps": f"T = {plain(row.steps)}",
        "v": f"v = {plain(row.v)}",
        "clip": clip[row.clip],
        "options": row.options,
        "seed": f"sampling seed {plain(row.seed)}",
        "trained": f"network and training {row.trained}" if row.trained else "",
        "device": f"made on {row.device}" if row.device else "",
        "ema_distance": f"a profile met to {row.ema_distance:.1e}" if row.ema_distance else "",
        "code_version": f"code {row.code_version}",
    }
    model = ", ".join(words for name, words in said.items() if words and name not in varying)
    real = f"{row.reference_n} images" if row.reference_n else "a number of images that its file does not say"
    measured = (
        f"n = {row.n} images, labels {row.labels}, rounding {row.rounding}, resize {row.resize}; reference "
        f"{row.dataset or 'without a name'}, of {real} ({row.reference[:12]}); features of {row.extractor} "
        f"({row.extractor_hash[:12]})"
    )
    for name, role in ROLES.items():
        if row.value(name):
            measured += f"; {role.title} ({row.value(name)[:12]}) against its reference ({row.value(f'{name}_reference')[:12]})"
    words = [f"{model}; {measured}."]
    surer = [name for name, metric in METRICS.items() if metric.spread == "jackknife"]
    surer.sort(key=lambda name: METRICS[name].scale)  # what stands in units of its own is named last
    if names := [METRICS[n].titled(row.fid_name) for n in surer if any(_spread_of(each, n) is not None for each in ordered)]:
        words.append(f"± after {', '.join(names)}: standard deviation over sets of n images of one network, by jackknife.")
    if row.fid_name != "FID":
        words.append(f"{row.fid_name} is the Fréchet distance of these features and compares with no other FID.")
    if row.inception_score is None:
        words.append(
            f"{row.extractor} tells no classes apart: there is no Inception score, and no curve of {row.fid_name} over it."
        )
    return " ".join(words)
