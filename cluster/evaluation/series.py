"""What a sweep is made of: series, and the units of their curves. `cluster/evaluation/fold.py` makes rows of them.

A series is one run and one way to sample it. Its units stand with the run whose weights make them, under a fingerprint of all that
decides them, so that every sweep which asks for a series finds what was made of it before.

Where guidance is kept to an interval, an item of work is one range of images at all w that it lacks, because they share the steps
before guidance begins; each w is published as soon as it is there. Elsewhere an item is one unit. Items that need the same network
follow each other, so that an actor rarely changes it.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from freeguide.cluster.evaluation import units
from freeguide.cluster.evaluation.checks import contradictions
from freeguide.cluster.evaluation.conditions import decisive, sampled
from freeguide.cluster.evaluation.executor import Resources
from freeguide.cluster.evaluation.extractors.features import measure_with
from freeguide.cluster.evaluation.extractors.load import load_extractor
from freeguide.cluster.evaluation.measure import Yardstick
from freeguide.cluster.evaluation.rows import MODEL, Row
from freeguide.cluster.evaluation.units import Unit
from freeguide.configs.errors import ConfigError, DataError
from freeguide.configs.load import validate
from freeguide.configs.schema import Config
from freeguide.configs.sweep import sweep
from freeguide.data_pipeline.artifact import fingerprint, to_npz
from freeguide.data_pipeline.closure import code_version
from freeguide.data_pipeline.manifest import Manifest
from freeguide.data_pipeline.store.base import Access, Store
from freeguide.data_pipeline.store.open import open_store
from freeguide.trainer.networks.kernels import choose_kernels
from freeguide.trainer.rounding import to_uint8
from freeguide.trainer.sampler import Sampler, check_interval, image_labels, shared_steps
from freeguide.trainer.weights import Weights, stored_config, weights_of

COLUMNS = 10  # classes that a sample grid shows: a thousand would be a picture of a gigabyte
NETWORKS = 2  # that an actor holds: the one in use, and the one before it where the items of two meet
_STATED = ("image_size", "channels", "classes", "dtype", "latent_scale")  # options of data that a config may not state otherwise
# Conditions of a row that an option of the sweep may change, where it is not the one of its own name.
_CHANGES = {
    "run": ("run", "checkpoint_step", "trained", "p_uncond", "ema", "ema_distance"),
    "sampling.ema": ("ema", "ema_distance"),
    "sampling.checkpoint": ("checkpoint_step", "ema_distance"),
}


@dataclass(frozen=True)
class Trained:
    """A series before it is known what it is measured with."""

    config: Config  # sampled as the sweep says; network, diffusion and training as they were
    weights: Weights
    origin: Config  # the run's own


@dataclass(frozen=True)
class Series:
    """One run and one way to sample it: a curve over w."""

    config: Config
    weights: Weights
    store: Store  # of its units
    origin: Config | None = None  # the run's own config; None = the same
    kind: str = ""  # of the devices that make its images, see `units.kind_of`

    @property
    def network(self) -> tuple[Any, ...]:
        """Which network it needs; equal for series that can share it."""
        return self.weights, self.config.sampling.compile

    def load(self, device: torch.device) -> Sampler:
        """Its sampler."""
        return Sampler.of(self.config, self.weights, device)


@dataclass(frozen=True)
class Item:
    """What one actor does in one go: the images [first, last) of a series at some w."""

    series: int
    first: int
    last: int
    weights: tuple[float, ...]

    @property
    def units(self) -> list[Unit]:
        return [Unit(w, self.first, self.last) for w in self.weights]


# --- series ---


def trained_series(config: Config, manifest: Manifest) -> list[Trained]:
    """What `evaluate.sweep` names, each as its own run was trained. Raises UserError for runs that do not fit this data."""
    configs = sweep(config)
    runs = list(dict.fromkeys(series.run for series in configs))
    tails = [run.rstrip("/").rsplit("/", 1)[-1] for run in runs]
    names = dict(zip(runs, tails if len(set(tails)) == len(runs) else runs, strict=True)) if len(runs) > 1 else {}
    return [_trained(dataclasses.replace(series, name=names.get(series.run, series.name)), manifest) for series in configs]


def _trained(config: Config, manifest: Manifest) -> Trained:
    trained = as_trained(config, "evaluate")
    then, now = trained.weights.data, manifest.fingerprint
    if then not in (now, manifest.content):
        raise DataError(
            f"{config.run}: trained on the data {then[:12]}, but {config.data.uri} holds {now[:12]}; name the run's own data.uri"
        )
    return trained


def as_trained(config: Config, command: str) -> Trained:
    """The run's own config says what its network is and how it was trained: one config samples runs that differ in these.

    Raises UserError where there is no such checkpoint or average, or `command` asks for what the run cannot give.
    """
    open_store(config.run).check()
    weights = weights_of(config)
    stored = stored_config(config.run)
    decides = {key.removeprefix("data.") for key in decisive(stored, "data")} - set(_STATED)
    data = dataclasses.replace(config.data, **{name: getattr(stored.data, name) for name in decides})
    config = dataclasses.replace(config, data=data, model=stored.model, diffusion=stored.diffusion, train=stored.train)
    for name in _STATED:
        made, asked = getattr(stored.data, name), getattr(config.data, name)
        if (name, asked) == ("classes", 0):
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, classes=made))
        elif made != asked:
            raise ConfigError(f"{config.run} was trained with data.{name}={made}, now it is {asked}; set data.{name}={made}")
    validate(config, command, contradictions)
    step, steps = weights.step, config.train.steps
    if not config.sampling.checkpoint and step < steps and command != "export":
        print(f"{config.run} is at step {step} of {steps}: sampling.checkpoint={step} goes on with this later", flush=True)
    check_interval(config)
    return Trained(config, weights, stored)


def placed(found: Sequence[Trained], yardsticks: Sequence[Yardstick], kind: str) -> list[Series]:
    """The series, made on devices of `kind`, with the places of their units. Raises ConfigError where two of them are the same."""
    series: list[Series] = []
    for trained in found:
        conditions = {  # all that decides what a unit holds, but its w and range
            "options": sampled(trained.config),
            "weights": trained.weights.all_of,
            "extractors": [each.extractor.hash for each in yardsticks],
            "threads": trained.config.cluster.cpus_per_worker,
            "device": kind,
            "code": code_version(units.MAKING),
        }
        store = open_store(trained.config.run).child(f"evaluate/{fingerprint(conditions)}/")
        if any(store.uri == other.store.uri for other in series):
            raise ConfigError(f"evaluate.sweep: two of its series are the checkpoint of step {trained.weights.step}; leave one out")
        series.append(Series(trained.config, trained.weights, store, trained.origin, kind))
    return series


def varying(config: Config, rows: Sequence[Row]) -> list[str]:
    """The conditions of rows that the sweep varies, and that do differ."""
    named: set[str] = set()
    for key in config.evaluate.sweep:
        name = key.removeprefix("sampling.")
        named.update(_CHANGES.get(key, (name if name in MODEL else "options",)))
    return [name for name in MODEL if name in named and len({getattr(row, name) for row in rows}) > 1]


# --- units ---


def items(series: Sequence[Series], todo: Sequence[Sequence[Unit]]) -> list[Item]:
    """The units `todo` of each series as items, those of the same network together."""
    found = []
    for number, (each, left) in enumerate(zip(series, todo, strict=True)):
        ranges: dict[tuple[int, int], list[float]] = {}
        for unit in left:
            ranges.setdefault((unit.first, unit.last), []).append(unit.w)
        for (first, last), weights in ranges.items():
            shared = shared_steps(each.config, weights) > 0
            found += [Item(number, first, last, w) for w in ([tuple(weights)] if shared else [(w,) for w in weights])]
    networks = [each.network for each in series]
    return sorted(found, key=lambda item: (networks.index(networks[item.series]), item.series, item.first))


class Worker:
    """Samples and measures items: one per actor."""

    def __init__(
        self, series: Sequence[Series], weights: Mapping[str, tuple[str, str] | tuple[str, str, Access]], resources: Resources
    ) -> None:
        """`weights` are, by role, the places of the extractors', their hashes, and how S3 is asked for them.

        An actor must not measure with what stands there later.
        """
        choose_kernels()
        torch.set_num_threads(resources.threads)
        self.series = series
        self.device = resources.device
        self.kind = units.kind_of(self.device)
        self.extractors = {role: load_extractor(*each) for role, each in weights.items()}
        self._sampler = functools.lru_cache(maxsize=NETWORKS)(self._load)

    def __call__(self, item: Item) -> None:
        series = self.series[item.series]
        # Ray gives the item of a dead actor to another one, and the dead one may have published some of it.
        left = [unit for unit in item.units if not series.store.exists(unit.key("npz"))]
        if not left:
            return
        units.check_kind(series.kind, self.kind)
        first = next(number for number, other in enumerate(self.series) if other.network == series.network)
        sampler = dataclasses.replace(self._sampler(first), config=series.config)
        index = torch.arange(item.first, item.last)
        labels = image_labels(series.config, index)
        rows, classes = series.config.evaluate.grid, series.config.data.classes
        shown = np.flatnonzero((index < rows * classes) & (index % classes < COLUMNS))
        began = time.perf_counter()
        for unit, drawn in zip(left, sampler.sweep(index, labels, [u.w for u in left]), strict=True):
            images = to_uint8(drawn.images)
            arrays = {
                **measure_with(self.extractors, images, self.device.type).to_arrays(),
                "labels": labels.numpy(),
                "images": images[shown],
                "device": np.str_(self.kind),
                "seconds": np.float64(time.perf_counter() - began),
                "evaluations": np.int64(drawn.evaluations),
            }
            series.store.create(unit.key("npz"), to_npz(arrays))  # of two evaluations, both fold what the first has made
            began = time.perf_counter()

    def _load(self, number: int) -> Sampler:
        return self.series[number].load(self.device)
