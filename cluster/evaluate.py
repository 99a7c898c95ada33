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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from cluster import units
from cluster.metrics import evaluator as evaluators
from cluster.metrics import moments
from cluster.metrics.evaluator import Evaluator
from cluster.metrics.fid import fid
from cluster.metrics.images import ROUNDING, to_uint8
from cluster.metrics.inception_score import class_accuracy, inception_score
from cluster.metrics.moments import Moments
from cluster.metrics.precision_recall import precision_recall
from cluster.metrics.rows import Row
from cluster.report import write_report
from cluster.session import Resources, progress, session
from cluster.units import Unit
from configs.errors import StoreError
from configs.load import from_yaml, to_yaml
from configs.schema import Config
from data_pipeline.manifest import Manifest, load_manifest
from data_pipeline.scan import scan_all
from data_pipeline.store import MissingObject, Store, open_store
from trainer import checkpoint
from trainer.loop import check_data
from trainer.sampler import Sampler, evaluations, image_labels

LATEST = "evaluate/latest.json"
EVALUATOR, REFERENCE = "evaluator.safetensors", "reference.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class _Yardstick:
    """What images are measured with. It stands beside the data, so that every run on that data shares it."""

    store: Store
    judge: Evaluator
    reference: Moments  # of the real images
    real: NDArray[np.float32]  # (N, 64) their features

    @staticmethod
    def load(store: Store) -> "_Yardstick":
        """Raises MissingObject where it has not been made."""
        judge = evaluators.from_bytes(store.get(EVALUATOR), f"{store.uri}/{EVALUATOR}")
        with np.load(io.BytesIO(store.get(REFERENCE)), allow_pickle=False) as known:
            return _Yardstick(store, judge, moments.from_bytes(known["moments"].tobytes()), known["features"])


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
        yardstick = _yardstick(config, data, manifest, connect)
        prefix = f"evaluate/{units.fingerprint(_conditions(config, trained, yardstick))}/"
        store = run.child(prefix)
        plan = units.split(config.evaluate.w, config.evaluate.images, config.evaluate.unit)
        todo = units.missing(store, plan, "npz")
        print(f"{len(plan)} work units, {len(plan) - len(todo)} of them done: {store.uri}", flush=True)
        if todo:
            make = functools.partial(_Measure, to_yaml(config), store, trained.step, yardstick.store, connect())
            for _ in progress(units.run(todo, make, config, connect()), len(todo), "unit"):
                pass
    rows, grids, seconds = _fold(config, store, plan, trained, yardstick)
    folder = Path("runs") / config.name
    written = write_report(
        rows,
        grids,
        folder,
        title=f"{config.name}: {rows[0].fid_name} and IS over w",
        classes=manifest.schema.class_names,
        times={
            "sampling_seconds": seconds,
            "images_per_second": len(rows) * config.evaluate.images / seconds,
            "job_seconds": time.monotonic() - began,
        },
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


def _conditions(config: Config, trained: checkpoint.Checkpoint, yardstick: _Yardstick) -> dict[str, Any]:
    """Everything that decides what a unit holds, but its w and range."""
    return {
        "sampling": dataclasses.asdict(config.sampling) | {"checkpoint": trained.sha256},
        "unit": config.evaluate.unit,
        "grid": config.evaluate.grid,
        "evaluator": yardstick.judge.hash,
        "threads": config.cluster.cpus_per_worker,
        "code": units.code_version(),
    }


# --- the evaluator and the reference ---


def _yardstick(config: Config, data: Store, manifest: Manifest, connect: Callable[[], Resources]) -> _Yardstick:
    options = {"epochs": config.evaluate.evaluator_epochs, "seed": config.evaluate.evaluator_seed, "data": manifest.fingerprint}
    store = data.child(f"evaluators/{units.fingerprint(options)}/")
    with contextlib.suppress(MissingObject):
        return _Yardstick.load(store)
    print(f"training the evaluator on {manifest.samples} real images", flush=True)
    resources = connect()
    task = ray.remote(_fit).options(num_cpus=resources.cpus, num_gpus=resources.gpus or None)
    ray.get(task.remote(to_yaml(config), store, resources))
    made = _Yardstick.load(store)
    print(f"evaluator {made.judge.hash[:12]}: accuracy {100 * made.judge.accuracy:.1f} % on held-out images", flush=True)
    return made


def _fit(text: str, store: Store, resources: Resources) -> None:
    torch.set_num_threads(resources.threads)
    config = from_yaml(text)
    data = open_store(config.data.uri)
    manifest = load_manifest(data)
    images, labels = scan_all(data, manifest)
    device = "cuda" if resources.gpus else "cpu"
    options = config.evaluate
    judge = evaluators.fit_evaluator(
        images,
        labels,
        config.data.classes,
        options.evaluator_epochs,
        options.evaluator_seed,
        name=Path(config.data.uri).name,
        device=device,
    )
    features, _ = judge.features(images, device=device)
    buffer = io.BytesIO()
    np.savez(buffer, moments=np.frombuffer(moments.from_features(features).to_bytes(), np.uint8), features=features)
    store.put(REFERENCE, buffer.getvalue())
    store.put(EVALUATOR, judge.to_bytes())


# --- work units ---


class _Measure:
    """Samples and measures units: one per actor."""

    def __init__(self, text: str, store: Store, step: int, yardstick: Store, resources: Resources) -> None:
        torch.set_num_threads(resources.threads)
        self.config, self.store = from_yaml(text), store
        self.device = torch.device("cuda" if resources.gpus else "cpu")
        self.sampler = Sampler.from_run(self.config, step, self.device)
        self.judge = evaluators.from_bytes(yardstick.get(EVALUATOR))

    def __call__(self, unit: Unit) -> None:
        began = time.perf_counter()
        index = torch.arange(unit.first, unit.last)
        labels = image_labels(self.config, index)
        images = to_uint8(self.sampler.sample(index, labels, unit.w))
        features, probabilities = self.judge.features(images, device=self.device.type)
        kept = max(0, min(unit.last, self.config.evaluate.grid * self.config.data.classes) - unit.first)
        buffer = io.BytesIO()
        np.savez(
            buffer,
            features=features,
            probabilities=probabilities,
            labels=labels.numpy(),
            moments=np.frombuffer(moments.from_features(features).to_bytes(), np.uint8),
            images=images[:kept],
            seconds=np.float64(time.perf_counter() - began),
        )
        self.store.put(unit.key("npz"), buffer.getvalue())


def _fold(
    config: Config,
    store: Store,
    plan: list[Unit],
    trained: checkpoint.Checkpoint,
    yardstick: _Yardstick,
) -> tuple[list[Row], dict[float, NDArray[np.uint8]], float]:
    """Rows and sample grids from published units, in unit order, and the seconds that sampling took on one actor."""
    rows, grids, seconds = [], {}, 0.0
    nfe = {w: evaluations(config, w) for w in config.evaluate.w}
    for w in sorted(config.evaluate.w):
        parts = [np.load(io.BytesIO(store.get(u.key("npz"))), allow_pickle=False) for u in plan if u.w == w]
        seconds += sum(float(p["seconds"]) for p in parts)
        features, probabilities, labels = (
            np.concatenate([p[name] for p in parts]) for name in ("features", "probabilities", "labels")
        )
        score = inception_score(probabilities)
        near = precision_recall(features, yardstick.real)
        rows.append(
            Row(
                w=w,
                fid=fid(moments.merged(moments.from_bytes(p["moments"].tobytes()) for p in parts), yardstick.reference),
                inception_score=score.mean,
                inception_score_std=score.std,
                accuracy=class_accuracy(probabilities, labels),
                precision=near.precision,
                recall=near.recall,
                nfe=nfe[w],
                n=len(labels),
                reference=yardstick.reference.sha256,
                reference_n=yardstick.reference.n,
                extractor=yardstick.judge.name,
                extractor_hash=yardstick.judge.hash,
                resize="none",
                rounding=ROUNDING,
                labels=config.sampling.labels,
                run=config.name,
                checkpoint_step=trained.step,
                p_uncond=config.diffusion.p_uncond,
                ema=config.train.ema_decay,
                sampler=config.sampling.sampler,
                steps=config.sampling.steps,
                v=config.sampling.v,
                clip=config.sampling.clip,
                seed=config.sampling.seed,
                code_version=units.code_version(),
            )
        )
        if config.sampling.labels == "balanced":
            shown = np.concatenate([p["images"] for p in parts])
            whole = len(shown) // config.data.classes * config.data.classes
            grids[w] = shown[:whole].reshape(-1, config.data.classes, *shown.shape[1:])
    return rows, grids, seconds
