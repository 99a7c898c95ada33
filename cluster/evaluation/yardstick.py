"""What images are measured with: feature networks, and the statistics of the real images as each of them sees these.

A yardstick is weights and a reference. Weights are named by the user, or are those of the data's own evaluator, which is trained
here where the data have none yet: on their labels, or on the turns of their pictures if they have one class only. A reference is
named by the user, or measured here on the data. Whatever is made here stands beside the data, under a name that says what made it,
so that every run on that data is measured with the same; if the data may only be read, it stands beside the run.

An evaluator is trained in the memory of one worker, on PIXELS bytes of images at most. References are measured image by image.
"""

import contextlib
import functools
import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from freeguide.cluster.evaluation import reference as references
from freeguide.cluster.evaluation.executor import Executor, Resources
from freeguide.cluster.evaluation.extractors import evaluator as evaluators
from freeguide.cluster.evaluation.extractors.evaluator import Evaluator
from freeguide.cluster.evaluation.extractors.features import Extractor
from freeguide.cluster.evaluation.extractors.load import load_beside, load_extractor, load_judge
from freeguide.cluster.evaluation.extractors.roles import ROLES, options_of
from freeguide.cluster.evaluation.measure import Yardstick
from freeguide.configs.errors import StoreError
from freeguide.configs.schema import Config
from freeguide.data_pipeline.artifact import fingerprint
from freeguide.data_pipeline.closure import code_version
from freeguide.data_pipeline.manifest import Manifest
from freeguide.data_pipeline.scan import scan_all
from freeguide.data_pipeline.store.base import MissingObject, Store
from freeguide.data_pipeline.store.open import access_to, open_data, open_store
from freeguide.data_pipeline.stored import load_manifest
from freeguide.trainer.networks.kernels import choose_kernels

EVALUATOR = "evaluator.safetensors"
WEAK = 0.4  # accuracy in telling turns below which features say little; guessing has 0.25
FITTING = "freeguide.cluster.evaluation.yardstick:_fit"  # decides the weights of an evaluator
SEEING = "freeguide.cluster.evaluation.yardstick:_see"  # decides a reference
PIXELS = 4 * 2**30  # bytes of decoded images that an evaluator is trained on: 350 000 images of 64x64x3


def yardsticks_of(config: Config, data: Store, manifest: Manifest, executor: Executor) -> list[Yardstick]:
    """What `config.evaluate` measures with: one yardstick for FID, IS and the rest, and one for each role that is asked for.

    What does not stand beside the data yet is made first, as a work item. Raises UserError for weights, statistics or
    images that cannot be used.
    """
    options = config.evaluate
    given = None
    if options.extractor:
        given = load_judge(options.extractor, options.extractor_hash, access_to(config.data, options.extractor))
    found = [_yardstick(config, data, manifest, executor, given, options.extractor, options.reference)]
    for role in ROLES:
        weights, sha256, reference = (getattr(options, name) for name in options_of(role))
        if weights:
            given = load_beside(role, weights, sha256, access_to(config.data, weights))
            found.append(replace(_yardstick(config, data, manifest, executor, given, weights, reference), role=role))
    return found


def own_yardstick(config: Config, data: Store, manifest: Manifest, executor: Executor) -> Yardstick:
    """The data's own evaluator and the data as it sees them, made first if they are not there yet. Raises UserError."""
    return _yardstick(config, data, manifest, executor, None, "", "")


def dataset_name(config: Config) -> str:
    """What tables call the real images."""
    return config.evaluate.dataset or Path(config.data.uri).name


def evaluator_name(config: Config, manifest: Manifest) -> str:
    """What tables call the features of the data's own evaluator, so that they say which these are."""
    return dataset_name(config) if has_labels(manifest) else f"{dataset_name(config)}-{evaluators.ROTATIONS}"


def has_labels(manifest: Manifest) -> bool:
    """Whether the labels of the data tell anything: one class is none."""
    return manifest.schema.classes > 1


def warn_of_few(images: int, classes: int, yardsticks: list[Yardstick]) -> None:
    """One line on standard error for each yardstick whose features are as many as the images, or more, or say little, and one where
    a split of the Inception score, of which there are 10, has fewer images than classes.
    """
    if images < 10 * classes and any(each.extractor.has_classes for each in yardsticks):
        print(
            f"WARNING: {images} images of {classes} classes: a split of the Inception score, a tenth of them, cannot hold "
            f"all classes and scores low; take {10 * classes} images or more to compare it",
            file=sys.stderr,
            flush=True,
        )
    for each in yardsticks:
        warn_of_symmetry(each.extractor)
        d = each.extractor.width
        if images <= d:
            print(
                f"WARNING: {images} images for the {d} features of {each.extractor.name}: their covariance is singular and a "
                f"distance mostly bias; take more than {d} images, and {3 * (d + 1)} for FID-infinity beside it",
                file=sys.stderr,
                flush=True,
            )


def warn_of_symmetry(extractor: Extractor) -> None:
    """One line on standard error if `extractor` learned the turns of pictures and can hardly tell them."""
    if isinstance(extractor, Evaluator) and extractor.rotations and extractor.accuracy < WEAK:
        print(
            f"WARNING: {extractor.name} has {accuracy_of(extractor)}, and guessing has 25 %: pictures that look alike when they "
            "are turned, or are too few, teach it little, and its distances say little; set evaluate.extractor to Inception's "
            "weights",
            file=sys.stderr,
            flush=True,
        )


def accuracy_of(evaluator: Evaluator) -> str:
    """In words."""
    of = "rotation accuracy" if evaluator.rotations else "accuracy"
    return f"{100 * evaluator.accuracy:.1f} % {of} on held-out images"


def _yardstick(
    config: Config,
    data: Store,
    manifest: Manifest,
    executor: Executor,
    given: Extractor | None,
    weights: str,
    reference: str,
) -> Yardstick:
    """The extractor `given`, whose weights stand at `weights`, or the data's own; and `reference`, or that of the data."""
    options: dict[str, Any] = {"format": 3, "data": manifest.fingerprint, "dataset": dataset_name(config)}
    if given:
        options |= {"extractor": given.hash}
    else:
        options |= {
            "epochs": config.evaluate.evaluator_epochs,
            "seed": config.evaluate.evaluator_seed,
            "code": code_version(FITTING),
        }
        if not has_labels(manifest):
            options |= {"learned": evaluators.ROTATIONS}
    name = f"evaluators/{fingerprint(options)}/"
    places = [data.child(name), open_store(config.run).child(name)]  # beside the run if the data may only be read
    with contextlib.suppress(MissingObject):
        return _load(config, places, given, weights, reference)
    _check_writable(places)
    if not given and not _holding(places, EVALUATOR):
        evaluators.check_shape(manifest.schema.image_size, manifest.schema.channels)
        evaluators.check_name(evaluator_name(config, manifest))
        what = "" if has_labels(manifest) else ", to tell how they are turned, as they have no classes"
        print(f"training the evaluator on {manifest.samples} real images{what}", flush=True)
    else:
        print(f"measuring {reference or f'{manifest.samples} real images'}", flush=True)
    what = f"the {'reference' if given else 'evaluator'} of {dataset_name(config)}"
    make = functools.partial(_Maker, config, places, (weights, given.hash) if given else None, reference)
    for _ in executor.run([what], make):
        pass
    made = _load(config, places, given, weights, reference)
    if isinstance(made.extractor, Evaluator) and not given:
        print(f"evaluator {made.extractor.hash[:12]}: {accuracy_of(made.extractor)}", flush=True)
    return made


def _load(config: Config, places: Sequence[Store], given: Extractor | None, weights: str, reference: str) -> Yardstick:
    """Raises MissingObject where something has to be made first, DataError for weights or statistics that cannot be used."""
    if given:
        extractor = given
    else:
        if not (there := _holding(places, EVALUATOR)):
            raise MissingObject(EVALUATOR)
        weights = f"{there.uri}/{EVALUATOR}"
        extractor = load_extractor(weights, config.evaluate.extractor_hash, access_to(config.data, weights))
    data = _file(config, reference)
    if reference and not references.has_images(data):
        return Yardstick(extractor, references.from_npz(data, reference, extractor, dataset_name(config)), weights)
    key = _reference_key(extractor, data)
    if not (there := _holding(places, key)):
        raise MissingObject(key)
    return Yardstick(extractor, references.from_npz(there.get(key), f"{there.uri}/{key}", extractor), weights)


def _file(config: Config, reference: str) -> bytes:
    """The file that is named as a reference, empty where none is."""
    return references.read_file(reference, access_to(config.data, reference)) if reference else b""


def _reference_key(extractor: Extractor, data: bytes) -> str:
    """Where the real images stand as `extractor` sees them: those of the file `data`, or where that is empty of the data set."""
    options = {"extractor": extractor.hash, "file": hashlib.sha256(data).hexdigest(), "code": code_version(SEEING)}
    return f"reference-{fingerprint(options)}.npz"


class _Maker:
    """Makes what is missing of one yardstick, whose item only says in words what that is."""

    def __init__(
        self, config: Config, places: Sequence[Store], given: tuple[str, str] | None, reference: str, resources: Resources
    ) -> None:
        torch.set_num_threads(resources.threads)
        self._publish = functools.partial(_publish, config, places, given, reference, resources.device.type)

    def __call__(self, what: str) -> None:
        self._publish()


def _publish(config: Config, places: Sequence[Store], given: tuple[str, str] | None, reference: str, device: str) -> None:
    """Put into the first of `places` that can be written what none of them holds: the data's own evaluator, unless the weights and
    their hash are `given`; and how the extractor sees the images of the file `reference`, or of the data.

    What another job has put there first is taken, never replaced: its units name it.
    """
    data = open_data(config.data)
    manifest = load_manifest(data)
    if given:
        extractor = load_extractor(*given, access_to(config.data, given[0]))
    else:
        there = _holding(places, EVALUATOR) or _put(places, EVALUATOR, lambda: _fit(config, data, manifest, device).to_bytes())
        weights = f"{there.uri}/{EVALUATOR}"
        extractor = load_extractor(weights, access=access_to(config.data, weights))
    file = _file(config, reference)
    key = _reference_key(extractor, file)
    if not (reference and not references.has_images(file)) and not _holding(places, key):
        _put(places, key, lambda: _see(config, data, manifest, extractor, reference, file, device).to_bytes(extractor))


def _holding(places: Sequence[Store], key: str) -> Store | None:
    """The first of `places` that holds an object of that name. One that does not let us look holds none that we could use."""
    for place in places:
        with contextlib.suppress(StoreError):
            if place.exists(key):
                return place
    return None


def _check_writable(places: Sequence[Store]) -> None:
    """Raises the StoreError of the last of `places` where none can be written, before minutes are spent on what goes there."""
    for place in places[:-1]:
        with contextlib.suppress(StoreError):
            place.check()
            return
    places[-1].check()


def _put(places: Sequence[Store], key: str, make: Callable[[], bytes]) -> Store:
    """Where the object stands now: in the first of `places` that can be written. Raises the StoreError of the last."""
    made = make()
    for place in places[:-1]:
        try:
            place.create(key, made)  # or take what another job has put there meanwhile: it took minutes
        except StoreError as error:
            print(f"{str(error).partition(';')[0]}: {key} goes to {places[-1].uri} instead", flush=True)
        else:
            return place
    places[-1].create(key, made)
    return places[-1]


def _see(
    config: Config, data: Store, manifest: Manifest, extractor: Extractor, reference: str, file: bytes, device: str
) -> references.Reference:
    """The images of the file `reference`, or of the data, as `extractor` sees them."""
    choose_kernels()
    if reference:
        return references.from_npz(file, reference, extractor, dataset_name(config), device)
    return references.from_manifest(data, manifest, extractor, dataset_name(config), device)


def _fit(config: Config, data: Store, manifest: Manifest, device: str) -> Evaluator:
    choose_kernels()
    every = max(1, -(-manifest.samples * math.prod(manifest.schema.shape) // PIXELS))
    images, labels = scan_all(data, manifest, every)  # evenly spread, as data may be sorted by class
    if every > 1:
        print(f"the evaluator is trained on one shard in {every}: {len(images)} of {manifest.samples} images", flush=True)
    epochs, seed, name = config.evaluate.evaluator_epochs, config.evaluate.evaluator_seed, evaluator_name(config, manifest)
    if not has_labels(manifest):
        return evaluators.fit_rotations(images, epochs, seed, name=name, device=device)
    return evaluators.fit_evaluator(images, labels, config.data.classes, epochs, seed, name=name, device=device)
