"""The evaluation job: sample every w with the averaged weights, measure, and report.

    evaluator (trained once on the real data) -> reference moments -> work units (one w, one range of images) -> rows -> report

A unit holds what a row needs of its images: moments and features, class probabilities, labels, and the first images for the
grids. Rows are folded in unit order, so the report does not depend on who made which unit. Noise and labels of image i are the
same for every w, so differences between rows are differences of w.
"""

import contextlib
import dataclasses
import functools
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster import units
from cluster.metrics import measure
from cluster.metrics.features import Measured
from cluster.metrics.images import to_uint8
from cluster.metrics.rows import Row, model_conditions
from cluster.report import Cost, write_report
from cluster.session import Resources, progress, session
from cluster.units import Unit
from cluster.yardstick import Yardstick, extractor_of, yardstick_of
from configs.errors import StoreError
from configs.load import from_yaml, to_yaml
from configs.schema import Config
from data_pipeline.manifest import load_manifest
from data_pipeline.store import MissingObject, Store, open_store
from trainer import checkpoint
from trainer.loop import check_data
from trainer.sampler import Sampler, evaluations, image_labels

LATEST = "evaluate/latest.json"


def evaluate(config: Config) -> Path:
    """Measure `config.run` at every w of `evaluate.w`; returns the local folder of the report. Finished units are not made again.

    Raises UserError before Ray starts for whatever can be known before.
    """
    run, data = open_store(config.run), open_store(config.data.uri)
    for place in (data, run):
        place.check()
    manifest = load_manifest(data)
    check_data(config, manifest)
    trained = checkpoint.find(run, config.sampling.checkpoint)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        # Where all is done already, Ray is not started.
        connect = functools.cache(lambda: stack.enter_context(session(config, config.cluster.actors)))
        yardstick = yardstick_of(config, data, manifest, connect)
        prefix = f"evaluate/{units.fingerprint(_conditions(config, trained, yardstick))}/"
        store = run.child(prefix)
        plan = units.split(config.evaluate.w, config.evaluate.images, config.evaluate.unit)
        todo = units.missing(store, plan, "npz")
        print(f"{len(plan)} work units, {len(plan) - len(todo)} of them done: {store.uri}", flush=True)
        if todo:
            make = functools.partial(_Measure, to_yaml(config), store, trained.step, yardstick.store, connect())
            for _ in progress(units.run(todo, make, config, connect()), len(todo), "unit"):
                pass
    rows, grids, cost = _fold(config, store, plan, trained, yardstick)
    folder = Path("runs") / config.name
    written = write_report(
        rows,
        grids,
        folder,
        title=f"{config.name}: {rows[0].fid_name} and IS over w",
        classes=manifest.schema.class_names,
        times={"job_seconds": time.monotonic() - began},
        cost=cost,
    )
    for path in written:
        store.put(f"report/{path.name}", path.read_bytes())
    run.put(LATEST, json.dumps({"report": f"{prefix}report/"}).encode())
    print((folder / "table.md").read_text())
    print(f"report: {folder}/index.html  (also in {store.uri}/report)")
    return folder


def fetch_report(config: Config) -> Path:
    """Copy the newest report of a run from its store to `runs/<name>/`. Raises StoreError if there is none."""
    run = open_store(config.run)
    try:
        prefix = json.loads(run.get(LATEST))["report"]
    except MissingObject as error:
        raise StoreError(f"{config.run}: no report; run `freeguide evaluate` first") from error
    folder = Path("runs") / config.name
    folder.mkdir(parents=True, exist_ok=True)
    for info in run.list(prefix):
        (folder / Path(info.key).name).write_bytes(run.get(info.key))
    return folder


def _conditions(config: Config, trained: checkpoint.Checkpoint, yardstick: Yardstick) -> dict[str, Any]:
    """Everything that decides what a unit holds, but its w and range."""
    return {
        "sampling": dataclasses.asdict(config.sampling) | {"checkpoint": trained.sha256},
        "unit": config.evaluate.unit,
        "grid": config.evaluate.grid,
        "evaluator": yardstick.extractor.hash,
        "threads": config.cluster.cpus_per_worker,
        "code": units.code_version(),
    }


# --- work units ---


class _Measure:
    """Samples and measures units: one per actor."""

    def __init__(self, text: str, store: Store, step: int, yardstick: Store, resources: Resources) -> None:
        torch.set_num_threads(resources.threads)
        self.config, self.store = from_yaml(text), store
        self.device = torch.device("cuda" if resources.gpus else "cpu")
        self.sampler = Sampler.from_run(self.config, step, self.device)
        self.extractor = extractor_of(self.config, yardstick)

    def __call__(self, unit: Unit) -> None:
        began = time.perf_counter()
        index = torch.arange(unit.first, unit.last)
        labels = image_labels(self.config, index)
        images = to_uint8(self.sampler.sample(index, labels, unit.w))
        measured = self.extractor.measure(images, self.device.type)
        kept = max(0, min(unit.last, self.config.evaluate.grid * self.config.data.classes) - unit.first)
        buffer = io.BytesIO()
        np.savez(
            buffer,
            **measured.to_arrays(),
            labels=labels.numpy(),
            images=images[:kept],
            device=np.str_(torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"),
            seconds=np.float64(time.perf_counter() - began),
        )
        self.store.put(unit.key("npz"), buffer.getvalue())


def _fold(
    config: Config,
    store: Store,
    plan: list[Unit],
    trained: checkpoint.Checkpoint,
    yardstick: Yardstick,
) -> tuple[list[Row], dict[float, NDArray[np.uint8]], Cost]:
    """Rows and sample grids from published units, in unit order, and what they cost."""
    rows, grids, seconds, devices = [], {}, 0.0, set()
    nfe = {w: evaluations(config, w) for w in config.evaluate.w}
    against = measure.Yardstick(yardstick.extractor, yardstick.reference)
    made = model_conditions(config, trained.step, units.code_version())
    for w in sorted(config.evaluate.w):
        parts = [np.load(io.BytesIO(store.get(u.key("npz"))), allow_pickle=False) for u in plan if u.w == w]
        seconds += sum(float(p["seconds"]) for p in parts)
        devices |= {str(p["device"]) for p in parts}
        labels = np.concatenate([p["labels"] for p in parts])
        found = measure.values([Measured.from_arrays(p) for p in parts], labels, against)
        rows.append(Row(w=w, nfe=nfe[w], n=len(labels), **found, **measure.conditions(against), **made))  # type: ignore[arg-type]
        if config.sampling.labels == "balanced":
            shown = np.concatenate([p["images"] for p in parts])
            whole = len(shown) // config.data.classes * config.data.classes
            grids[w] = shown[:whole].reshape(-1, config.data.classes, *shown.shape[1:])
    images = config.evaluate.images
    full = evaluations(dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, interval=[])), 1.0)
    naive = sum(full if w else full // 2 for w in nfe)
    cost = Cost(images * len(rows), images * sum(nfe.values()), images * naive, seconds, ", ".join(sorted(devices)))
    return rows, grids, cost
