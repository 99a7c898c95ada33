"""Scoring images that somebody else made, with the same rows as our own.

    freeguide score SAMPLES --reference REFERENCE --extractor WEIGHTS

SAMPLES is an `.npz` (`arr_0` uint8 NHWC, `arr_1` labels where known: what ADM and others publish), a folder of images of one size,
or shards with a manifest. What their maker did not state (steps, v, rounding) stands in the row as not known.

The Inception score needs every split to hold all classes. Files keep their order, as ADM's evaluator does; images that come in
blocks of one class, as folders do, are dealt in one fixed permutation first.
"""

import argparse
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from freeguide.cluster.evaluation import measure
from freeguide.cluster.evaluation import reference as references
from freeguide.cluster.evaluation.extractors.features import UNIT, Extractor, Measured, measure_with
from freeguide.cluster.evaluation.extractors.load import load_beside, load_judge
from freeguide.cluster.evaluation.extractors.roles import ROLES, options_of
from freeguide.cluster.evaluation.measure import Yardstick
from freeguide.cluster.evaluation.metrics import value_names
from freeguide.cluster.evaluation.reference import Reference
from freeguide.cluster.evaluation.rows import UNKNOWN, Row, to_json, typed
from freeguide.cluster.evaluation.units import code_version
from freeguide.cluster.evaluation.yardstick import warn_of_symmetry
from freeguide.cluster.runtime.progress import progress
from freeguide.configs.errors import ConfigError, DataError
from freeguide.configs.locations import check_target
from freeguide.data_pipeline.artifact import read_npz
from freeguide.data_pipeline.pictures import File, count_of, find_in, named
from freeguide.data_pipeline.scan import scan_all
from freeguide.data_pipeline.sources.folder import picture
from freeguide.data_pipeline.store.base import READERS, Access, Store
from freeguide.data_pipeline.store.folder import FolderStore
from freeguide.data_pipeline.store.open import open_store, read_object
from freeguide.data_pipeline.store.unfinished import unfinished
from freeguide.data_pipeline.stored import NAME, load_manifest
from freeguide.trainer.networks.kernels import choose_kernels

DEAL = 20220726  # seed of the permutation for images in blocks of one class


@dataclass(frozen=True, eq=False)
class Samples:
    images: NDArray[np.uint8]  # (N, H, W, C)
    labels: NDArray[np.int64] | None  # (N,) where known
    lossy: bool = False  # some file was compressed with loss, which moves FID
    names: tuple[str, ...] = ()  # of the classes, by label; () = not known
    numbered: bool = True  # whether the labels are the data set's own numbers; those of class folders are the order of their names

    @property
    def dealt(self) -> "Samples":
        """In a fixed random order if they come in blocks of one class, else as they are.

        In blocks, labels change from one image to the next less than half as often as in a random order of them.
        """
        labels = self.labels
        if labels is None or len(labels) < 2:
            return self
        shares = np.unique(labels, return_counts=True)[1] / len(labels)
        if np.mean(labels[1:] != labels[:-1]) >= (1.0 - np.sum(shares**2)) / 2.0:
            return self
        order = np.random.default_rng(DEAL).permutation(len(labels))
        return replace(self, images=self.images[order], labels=labels[order])

    def labels_by(self, known: tuple[str, ...]) -> NDArray[np.int64] | None:
        """The labels (N,) as numbers of the reference, whose classes are called `known`; () where it does not say.

        None without labels, with a reference of one class, and where the classes of the samples are not classes of the reference,
        which is said.
        """
        if len(known) == 1:
            return None
        if self.labels is None or (self.numbered and not (known and self.names)):
            return self.labels
        if not known and all(re.fullmatch(r"\d{1,9}", name) for name in self.names):
            return np.array([int(name) for name in self.names], np.int64)[self.labels]
        strangers = [name for name in self.names if name not in known]
        if strangers:
            theirs = f"classes of the reference ({listed(known)})" if known else "known to the reference, which names no classes"
            print(f"no accuracy: the samples' classes {listed(strangers)} are not {theirs}", flush=True)
            return None
        return np.array([known.index(name) for name in self.names], np.int64)[self.labels]


def score(
    samples: str,
    *,
    reference: str,
    extractor: str,
    extractor_hash: str = "",
    dataset: str = "",
    name: str = "",
    w: float = 0.0,
    facts: dict[str, Any] | None = None,
    device: str = "cpu",
    unit: int = UNIT,
    access: Access | None = None,
    class_depth: int = 1,
    **beside: str,
) -> Row:
    """Measure images and return their row.

    `samples`, `reference` and `extractor` are paths or URIs (see the module and `load_reference`), and `extractor_hash` is the
    sha256 that the weights have to have ("" = any). `beside` names other extractors in the same way by the options of their roles:
    dinov2, dinov2_hash, dinov2_reference (`extractors.roles`).
    `dataset` names the reference's data, `name` (default: the samples' own) the row's run, `w` the guidance weight (0 = without)
    and `facts` what is known of the model, by the names of a Row's fields (p_uncond, steps, nfe, rounding, ...). `access` is how
    S3 is asked for all of these; the folders `class_depth` levels down are the classes of samples that are files.

    Raises DataError for images, references or weights that cannot be used, StoreError where a store does not answer, ConfigError
    for unknown facts.
    """
    others = {role: [beside.pop(name, "") for name in options_of(role)] for role in ROLES}
    if beside:
        raise TypeError(f"score() has no options {', '.join(beside)}")
    for role, (weights, _, real) in others.items():
        if bool(weights) != bool(real):
            what = f"{ROLES[role].gives} needs {ROLES[role].title}'s weights"
            raise DataError(f"{what} and a reference measured with them; give both or neither")
    check_device(device)
    choose_kernels()
    judge = load_judge(extractor, extractor_hash, access)
    yardsticks = [Yardstick(judge, load_reference(reference, judge, dataset, device, access))]
    for role, (weights, sha256, real) in others.items():
        if weights:
            other = load_beside(role, weights, sha256, access)
            yardsticks.append(Yardstick(other, load_reference(real, other, dataset, device, access), role=role))
    warn_of_symmetry(judge)
    found = load_samples(samples, judge.channels, access, class_depth)
    return score_samples(found, *yardsticks, name=name or samples, w=w, facts=facts, device=device, unit=unit)


def score_samples(
    samples: Samples,
    *yardsticks: Yardstick,
    name: str,
    w: float = 0.0,
    facts: dict[str, Any] | None = None,
    device: str = "cpu",
    unit: int = UNIT,
) -> Row:
    """`score` of images and yardsticks in memory, `unit` images at a time: with the unit of an evaluation, to its bits."""
    samples = samples.dealt
    given = _checked(facts or {}, {"n", "run", "code_version", *value_names(), *measure.conditions(*yardsticks)})
    extractors, first = {each.role: each.extractor for each in yardsticks}, yardsticks[0]
    units = _measured(samples.images, extractors, device, unit)
    asked = first.extractor.has_classes  # else there is no accuracy, and labels only tell the cycles
    labels = samples.labels_by(first.reference.class_names) if asked else samples.labels
    known = {"rounding": f"{UNKNOWN}, compressed with loss" if samples.lossy else UNKNOWN, "labels": UNKNOWN} | given
    return Row.of(
        w=w,
        n=len(samples.images),
        run=name,
        **measure.values(units, labels, *yardsticks),
        **measure.conditions(*yardsticks),
        **known,
        code_version=code_version(),
    )


def _checked(facts: dict[str, Any], measured: set[str]) -> dict[str, Any]:
    for name in facts:
        if name == "w":
            raise ConfigError(f"w={facts[name]}: give the guidance weight as an option, --w {facts[name]}")
        if name in measured:
            raise ConfigError(f"{name} is measured and cannot be given as a fact of the model; leave it out")
    try:
        return {name: typed(name, value) for name, value in facts.items()}
    except TypeError as error:
        raise ConfigError(
            f"{error}, and a row holds another type of value there; give for example steps=256 or p_uncond=0.1"
        ) from None
    except KeyError as error:
        raise ConfigError(f"{error} is no fact of a model; give fields of a metric row such as steps=256 or p_uncond=0.1") from None


def check_device(device: str) -> None:
    """Raises ConfigError for a device that is not there, before anything is read."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise ConfigError(f"--device {device}: give cpu, cuda, or cuda:N for the GPU of number N")
    number, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
    if device != "cpu" and number >= count:
        has = (
            f"only {count} GPUs here" if count else "no GPU here" if torch.version.cuda else "no GPU, as it is a build for the CPU"
        )
        raise ConfigError(f"--device {device}: torch {torch.__version__} sees {has}; give --device cpu")


def load_reference(
    uri: str, extractor: Extractor, dataset: str = "", device: str = "cpu", access: Access | None = None
) -> Reference:
    """The reference at a path or URI: an `.npz` (`metrics.reference` says which) or a data set with a manifest, measured now."""
    if uri.endswith((".npz", ".pkl", ".pickle")):
        return references.load_npz(uri, extractor, dataset, device, access)
    store = open_store(uri, access=access)
    store.check(write=False)
    return references.from_manifest(store, load_manifest(store), extractor, dataset, device)


def load_samples(uri: str, channels: int, access: Access | None = None, class_depth: int = 1) -> Samples:
    """Images at a path or URI, decoded to `channels` where they are files. Raises DataError for whatever is not a set of images."""
    if uri.endswith(".npz"):
        return _from_npz(read_object(uri, "correct the path of the samples", access), uri)
    store = open_store(uri, access=access)
    store.check(write=False)
    if store.exists(NAME):
        manifest = load_manifest(store)
        images, labels = scan_all(store, manifest)
        return Samples(images, labels if manifest.schema.classes > 1 else None, names=manifest.schema.class_names)
    return _from_files(store, uri, channels, class_depth)


def _from_npz(data: bytes, where: str) -> Samples:
    arrays = read_npz(data, where, "save its images again", wanted=("arr_0", "arr_1").__contains__)
    if "arr_0" not in arrays:
        raise DataError(f"{where} has no arr_0; save its images with np.savez as the first array")
    images, labels = arrays["arr_0"], arrays.get("arr_1")
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise DataError(f"arr_0 of {where} must be images uint8 (N, H, W, C), not {images.dtype} {images.shape}; save them so")
    if labels is None:
        return Samples(images, None)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"arr_1 of {where} must be one whole number for each of {len(images)} images, not {labels.dtype} {labels.shape}; "
            "save the labels so"
        )
    return Samples(images, labels.astype(np.int64))


def _from_files(store: Store, folder: str, channels: int, class_depth: int) -> Samples:
    """Image files below a folder or prefix, taken and classified as `prepare` does it; what is passed over is said.

    Raises DataError where some images stand in folders and some beside them: nobody can tell which are the samples.
    """
    found = find_in(store, class_depth)
    over = f"passed over: {count_of(found.passed_over)}"
    if not found.files:
        raise DataError(
            f"{folder} holds no images and no {NAME}{f' ({over})' if found.passed_over else ''}; give the place of the samples"
        )
    if found.passed_over:
        print(over, flush=True)

    def decoded(file: File) -> tuple[NDArray[np.uint8], bool]:
        data = functools.cache(lambda: _read(store, file.path))
        try:
            pixels = picture(file, data, channels)
        except DataError as error:
            raise DataError(f"{folder}/{named(file.path)}: {error}; leave it out or make it again") from None
        except OSError as error:
            raise DataError(f"{folder}/{named(file.path)}: {error.strerror}; leave it out or make it again") from None
        return pixels, data().startswith(b"\xff\xd8\xff") or data()[8:12] == b"WEBP"

    with ThreadPoolExecutor(READERS) as pool:
        images, lossy = zip(*pool.map(decoded, found.files), strict=True)
    for file, image in zip(found.files, images, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"{folder}/{named(file.path)} is {image.shape[1]} x {image.shape[0]} pixels and {named(found.files[0].path)} is "
                f"{images[0].shape[1]} x {images[0].shape[0]}; score images of one size"
            )
    if found.flat:
        return Samples(np.stack(images), None, any(lossy))
    labels = np.array([file.label for file in found.files], np.int64)
    return Samples(np.stack(images), labels, any(lossy), found.classes, numbered=False)


def _read(store: Store, path: str) -> bytes:
    if isinstance(store, FolderStore):
        return (store.folder / path).read_bytes()  # whatever its name, which need not be one of a store
    return store.get(path)


def _measured(images: NDArray[np.uint8], extractors: Mapping[str, Extractor], device: str, unit: int) -> list[Measured]:
    blocks = [images[start : start + unit] for start in range(0, len(images), unit)]
    names = ", ".join(extractor.name for extractor in extractors.values())
    done = progress((measure_with(extractors, block, device) for block in blocks), len(blocks), f"{names}: block of {unit} images")
    return list(done)


# --- the command line ---


def command(options: argparse.Namespace) -> None:
    """`freeguide score`: print the row, and write it to `options.json` where that is given. See `score` for the other options."""
    if options.json:
        check_target("--json", options.json)
    row = score(
        options.samples,
        reference=options.reference,
        extractor=options.extractor,
        extractor_hash=options.extractor_hash,
        dataset=options.dataset,
        name=options.name,
        w=options.w,
        facts=facts_of(options.overrides),
        device=options.device,
        access=Access(request_payer=options.request_payer, unsigned=options.unsigned),
        class_depth=options.class_depth,
        **{name: getattr(options, name) for role in ROLES for name in options_of(role)},
    )
    for field, value in row.to_dict().items():
        if value not in (None, "", UNKNOWN):
            print(f"{field:20} {value:.6g}" if isinstance(value, float) else f"{field:20} {value}")
    if options.json:
        _write(Path(options.json).resolve(), to_json([row]).encode())


def _write(path: Path, data: bytes) -> None:
    """The file whole, or what was there before. Raises ConfigError where it cannot be written."""
    try:
        if path.exists() and not path.is_file():  # a pipe, a terminal
            path.write_bytes(data)
            return
        with unfinished(path.parent) as (temp, file):
            file.write(data)
            file.flush()
            os.replace(temp, path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); make room, or give --json another file: the row stands above"
        ) from None


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names, quoted."""
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def facts_of(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` words of a command line as facts: numbers and true or false where they read so, else text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign:
            raise DataError(f"{pair!r} is no fact of the samples; write key=value, for example steps=256")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found
