"""The evaluation job: sample every w with the averaged weights, measure, and report.

    evaluator (trained once on the real data) -> reference moments -> work units (one w, one range of images) -> rows -> report

`evaluate.sweep` asks for several series (runs, averages, samplers, ...), each with a curve over w; without it there is one. With
`evaluate.screen` every w is measured on few images first, and those near the frontier on all of them.

A unit holds what a row needs of its images: features, class probabilities, labels, and the first images for the grids. Units are
folded in their order, so the report does not depend on who made which unit. Noise and labels of image i are the
same for every w, so differences between rows are differences of w. The report stands with `run`, as do the events of each series
with its own run.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from freeguide.cluster.evaluation import units
from freeguide.cluster.evaluation.executor import Executor
from freeguide.cluster.evaluation.fold import Fold, Folded, Made, RowWorker, planned
from freeguide.cluster.evaluation.frontier import near_frontier
from freeguide.cluster.evaluation.kept import delete_old, needed_by
from freeguide.cluster.evaluation.measure import Yardstick
from freeguide.cluster.evaluation.metrics import METRICS
from freeguide.cluster.evaluation.report import figures
from freeguide.cluster.evaluation.report.page import (
    check_others,
    checksums,
    name_latest,
    read_latest,
    read_others,
    read_part,
    report_files,
    save_report,
)
from freeguide.cluster.evaluation.report.tables import Cost
from freeguide.cluster.evaluation.rows import Row
from freeguide.cluster.evaluation.series import COLUMNS, Series, Worker, items, placed, trained_series, varying
from freeguide.cluster.evaluation.units import Unit
from freeguide.cluster.evaluation.yardstick import warn_of_few, yardsticks_of
from freeguide.cluster.runtime.engines import executor
from freeguide.cluster.runtime.progress import progress
from freeguide.configs.errors import StoreError, counted
from freeguide.configs.schema import Config
from freeguide.configs.sweep import screen_images
from freeguide.data_pipeline.artifact import fingerprint
from freeguide.data_pipeline.store.base import MissingObject
from freeguide.data_pipeline.store.open import access_to, open_data, open_store
from freeguide.data_pipeline.stored import load_manifest
from freeguide.trainer.sampler import evaluations, sweep_evaluations
from freeguide.trainer.training.loop import fitted, misguided
from freeguide.trainer.training.telemetry import event_file


def evaluate(config: Config) -> Path:
    """Measure every w of every series, write the report to its store and to `runs/<name>/`, and return that folder.

    Finished units are not made again. Raises UserError before any expensive work for whatever can be known before.
    """
    began = time.monotonic()
    home, data = open_store(config.run), open_data(config.data)
    home.check()
    home.clean_up()
    data.check(write=False)  # evaluators and references that cannot go there stand beside the run
    manifest = load_manifest(data)
    config = fitted(config, manifest)
    for sentence in misguided(config, "evaluate"):
        print(f"WARNING: {sentence}", file=sys.stderr, flush=True)
    found, others = trained_series(config, manifest), read_others(config)
    with executor(config, config.cluster.actors) as engine:
        yardsticks = yardsticks_of(config, data, manifest, engine)
        check_others(others, yardsticks)

        def measured(kind: str, engine: Executor) -> tuple[_Job, list[list[Row]], list[Row]]:
            job = _Job(config, placed(found, yardsticks, kind), yardsticks, engine)
            return job, *_measured(job)

        job, rows, screened = units.on_one_kind(home, engine, measured)
    flat = [row for curve in rows for row in curve]
    files = report_files(
        flat,
        job.grids,
        title=f"{config.name}: {flat[0].fid_name}{'' if flat[0].inception_score is None else ' and IS'} over w",
        classes=manifest.schema.class_names[:COLUMNS] if manifest.schema.classes > 1 else (),
        varying=varying(config, [*screened, *flat]),
        screened=screened,
        others=others,
        times={"job_seconds": time.monotonic() - began},
        cost=_cost(job, rows),
    )
    # Other rows make another report: two commands at once never mix theirs.
    sums = checksums(files)
    place = f"evaluate/{fingerprint({'series': [series.store.uri for series in job.series], 'files': sums})}"
    for name, content in files.items():
        home.put(f"{place}/report/{name}", content)
    name_latest(home, f"{place}/report/", sums)
    for series, curve in zip(job.series, rows, strict=True):
        try:
            _show(series, curve, job.grids)
        except (StoreError, OSError) as error:  # only for watching
            print(f"WARNING: TensorBoard does not get these rows ({error})", file=sys.stderr, flush=True)
    for uri, steps in {series.config.run: series.config.train.keep_checkpoints for series in job.series}.items():
        delete_old(open_store(uri), steps)
    print(files["table.md"].decode())
    folder = Path("runs") / config.name
    if _copied(files, folder, f"{home.uri}/{place}/report"):
        print(f"report: {folder}/index.html  (also in {home.uri}/{place}/report)")
    return folder


def fetch_report(config: Config) -> Path:
    """Copy the newest report of a run from its store to `runs/<name>/`. Raises StoreError if there is none."""
    run = open_store(config.run)
    try:
        place, sums = read_latest(run)
    except MissingObject as error:
        raise StoreError(f"{config.run}: no report; run `freeguide evaluate` first") from error
    names = {**sums, **dict.fromkeys(info.key.removeprefix(place) for info in run.list(place))}
    folder = Path("runs") / config.name
    _copied({name: read_part(run, place, name, sums) for name in names}, folder, f"{run.uri}/{place.rstrip('/')}")
    return folder


def _copied(files: Mapping[str, bytes], folder: Path, place: str) -> bool:
    """Copy a report to where the command was given. A folder that refuses it costs a warning: the report is at `place`."""
    try:
        save_report(files, folder)
    except OSError as error:
        print(f"WARNING: {folder} cannot be written ({error.strerror}); the report is in {place}", file=sys.stderr, flush=True)
        return False
    return True


@dataclass(frozen=True)
class _Job:
    """What is measured, with what, by whom; and what is known of it so far."""

    config: Config
    series: list[Series]
    yardsticks: list[Yardstick]
    engine: Executor
    grids: dict[Row, NDArray[np.uint8]] = field(default_factory=dict)
    made: dict[tuple[int, Unit], Made] = field(default_factory=dict)


def _measured(job: _Job) -> tuple[list[list[Row]], list[Row]]:
    """The rows of each series, and those of the screen where there was one."""
    options = job.config.evaluate
    warn_of_few(screen_images(options) or options.images, job.config.data.classes, job.yardsticks)
    weights = [sorted(options.w) for _ in job.series]
    screened: list[list[Row]] = []
    if few := screen_images(options):
        print(f"screening every w with {few} of {options.images} images", flush=True)
        screened = _rows(job, weights, few)
        weights = near_frontier(screened)
        job.grids.clear()
        print(f"{sum(map(len, weights))} of {sum(map(len, screened))} w are near the frontier and get all images", flush=True)
    return _rows(job, weights, options.images), [row for curve in screened for row in curve]


def _rows(job: _Job, weights: Sequence[Sequence[float]], images: int) -> list[list[Row]]:
    """The rows of images [0, `images`) of each series at its `weights`; what is there already is not made again."""
    folds = planned(weights, images, job.yardsticks)
    there = [{info.key for info in series.store.list("rows/")} for series in job.series]
    left = [fold for fold in folds if fold.key not in there[fold.series]]
    _make_units(job, folds, left)
    if left:
        make = functools.partial(RowWorker, job.series, [each.described() for each in job.yardsticks])
        for _ in progress(job.engine.run(left, make, gpus=False), len(left), "row", job.engine.at_once):
            pass
    found: list[list[Row]] = [[] for _ in job.series]
    for fold in folds:
        series = job.series[fold.series]
        folded = Folded.read(series.store, fold.key)
        found[fold.series].append(row := folded.row(series, fold, job.yardsticks))
        job.made.update({(fold.series, unit): took for unit, took in folded.made.items()})
        if folded.grid is not None:
            job.grids[row] = folded.grid
    return found


def _make_units(job: _Job, folds: Sequence[Fold], left: Sequence[Fold]) -> None:
    """Make the units that the rows `left` still lack; those of all `folds` are counted."""
    unit = job.config.evaluate.unit
    plans = [[fold for fold in left if fold.series == number] for number in range(len(job.series))]
    todo = [
        units.missing(series.store, [u for fold in plan for u in units.split([fold.w], fold.images, unit)], "npz")
        for series, plan in zip(job.series, plans, strict=True)
    ]
    total, count = sum(-(-fold.images // unit) for fold in folds), sum(map(len, todo))
    where = job.series[0].store.uri if len(job.series) == 1 else f"{len(job.series)} series"
    print(f"{counted(total, 'work unit')}, {total - count} of them done: {where}", flush=True)
    if not count:
        return
    for series, lacks in zip(job.series, todo, strict=True):
        if lacks:
            needed_by(series.store, series.weights)
    extractors = {
        each.role: (each.weights, each.extractor.hash, access_to(job.config.data, each.weights)) for each in job.yardsticks
    }
    done = job.engine.run(items(job.series, todo), functools.partial(Worker, job.series, extractors))
    for _ in progress((unit for item in done for unit in item.units), count, "unit", job.engine.at_once):
        pass


def _cost(job: _Job, rows: Sequence[Sequence[Row]]) -> Cost:
    """What the sweep takes by plan and what its units counted, beside every w of every series by itself at the full n."""
    options, few = job.config.evaluate, screen_images(job.config.evaluate)
    planned = naive = 0
    for series, curve in zip(job.series, rows, strict=True):
        planned += few * sweep_evaluations(series.config, sorted(options.w))
        planned += (options.images - few) * sweep_evaluations(series.config, [row.w for row in curve])
        everywhere = dataclasses.replace(series.config, sampling=dataclasses.replace(series.config.sampling, interval=[]))
        naive += options.images * sum(evaluations(everywhere, w) for w in options.w)
    took = job.made.values()
    return Cost(
        images=sum(made.images for made in took),
        evaluations=planned,
        counted=sum(made.evaluations for made in took),
        naive_images=options.images * len(options.w) * len(job.series),
        naive_evaluations=naive,
        device_seconds=sum(made.seconds for made in took),
        device=", ".join(sorted({made.device for made in took})),
    )


def _show(series: Series, curve: Sequence[Row], grids: dict[Row, NDArray[np.uint8]]) -> None:
    """Rows for TensorBoard at the step of their checkpoint, beside the training's events: a line for each w over the steps."""
    sampling = dataclasses.asdict(series.config.sampling) | {"checkpoint": 0}
    for row in curve:
        what = {"sampling": sampling, "n": row.n, "extractor": row.extractor_hash, "reference": row.reference}
        line = f"evaluate-{row.sampler}-T{row.steps}-{series.config.sampling.ema}-{fingerprint(what)[:6]}/w{row.w:g}"
        with event_file(open_store(series.config.run), f"events/{line}/events.out.tfevents.{series.weights.step:010d}") as writer:
            for name, metric in METRICS.items():
                if metric.tensorboard and row.value(name) is not None:
                    called = metric.tensorboard.replace("{fid}", row.fid_name)
                    writer.add_scalar(f"evaluate/{called}", row.value(name), series.weights.step)
            if row in grids:
                writer.add_image("evaluate/samples", figures.tiled(grids[row]), series.weights.step, dataformats="HWC")
