"""What images are measured with: the feature network, and the statistics of the real images.

Both stand beside the data, under a name that says what made them, so that every run on that data is measured with the same ones;
the first evaluation makes them.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch

from cluster import units
from cluster.metrics import evaluator as evaluators
from cluster.metrics import reference as references
from cluster.metrics.evaluator import Evaluator
from cluster.metrics.features import Extractor, load_extractor
from cluster.metrics.reference import Reference
from cluster.session import Resources
from configs.errors import UserError
from configs.load import from_yaml, to_yaml
from configs.schema import Config
from data_pipeline.manifest import Manifest, load_manifest
from data_pipeline.scan import scan_all
from data_pipeline.store import MissingObject, Store, open_store

EVALUATOR, REFERENCE = "evaluator.safetensors", "reference.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class Yardstick:
    """What images are measured with. What the job makes of it stands beside the data, so that every run on that data shares it."""

    store: Store
    extractor: Extractor
    reference: Reference  # the real images

    @staticmethod
    def load(config: Config, store: Store) -> "Yardstick":
        """Raises MissingObject where it has to be made first, DataError for weights or statistics that cannot be used."""
        extractor = extractor_of(config, store)
        if config.evaluate.reference:
            return Yardstick(store, extractor, references.load_npz(config.evaluate.reference, extractor, dataset_name(config)))
        return Yardstick(store, extractor, references.from_npz(store.get(REFERENCE), f"{store.uri}/{REFERENCE}", extractor))


def extractor_of(config: Config, store: Store) -> Extractor:
    """The weights that `evaluate.extractor` names, or the data's own evaluator, which stands in `store`."""
    if config.evaluate.extractor:
        return load_extractor(config.evaluate.extractor)
    return evaluators.from_bytes(store.get(EVALUATOR), f"{store.uri}/{EVALUATOR}")


def dataset_name(config: Config) -> str:
    """What tables call the real images."""
    return config.evaluate.dataset or Path(config.data.uri).name


def yardstick_of(config: Config, data: Store, manifest: Manifest, connect: Callable[[], Resources]) -> Yardstick:
    """The yardstick that `config.evaluate` names; where it does not stand beside the data yet, a task makes it first.

    Raises UserError for weights, statistics or images that cannot be used.
    """
    options: dict[str, Any] = {"format": 2, "data": manifest.fingerprint, "dataset": dataset_name(config)}
    if config.evaluate.extractor:
        options |= {"extractor": load_extractor(config.evaluate.extractor).hash}
    else:
        options |= {"epochs": config.evaluate.evaluator_epochs, "seed": config.evaluate.evaluator_seed}
    store = data.child(f"evaluators/{units.fingerprint(options)}/")
    with contextlib.suppress(MissingObject):
        return Yardstick.load(config, store)
    print(f"{'measuring' if config.evaluate.extractor else 'training the evaluator on'} {manifest.samples} real images", flush=True)
    resources = connect()
    task = ray.remote(_make_yardstick).options(num_cpus=resources.cpus, num_gpus=resources.gpus or None)
    if failure := ray.get(task.remote(to_yaml(config), store, resources)):
        raise UserError(failure)
    made = Yardstick.load(config, store)
    if isinstance(made.extractor, Evaluator):
        accuracy = f"{100 * made.extractor.accuracy:.1f} % accuracy on held-out images"
        print(f"evaluator {made.extractor.hash[:12]}: {accuracy}", flush=True)
    return made


def _make_yardstick(text: str, store: Store, resources: Resources) -> str:
    """Returns the sentence of a UserError, or "": Ray would wrap the error in its traceback."""
    torch.set_num_threads(resources.threads)
    try:
        _publish_yardstick(from_yaml(text), store, "cuda" if resources.gpus else "cpu")
    except UserError as error:
        return str(error)
    return ""


def _publish_yardstick(config: Config, store: Store, device: str) -> None:
    data = open_store(config.data.uri)
    manifest = load_manifest(data)
    made = None
    if not config.evaluate.extractor:
        images, labels = scan_all(data, manifest)
        epochs, seed = config.evaluate.evaluator_epochs, config.evaluate.evaluator_seed
        made = evaluators.fit_evaluator(images, labels, config.data.classes, epochs, seed, name=dataset_name(config), device=device)
    extractor = made or load_extractor(config.evaluate.extractor)
    if not config.evaluate.reference:
        reference = references.from_manifest(data, manifest, extractor, dataset_name(config), device)
        store.put(REFERENCE, reference.to_bytes(extractor))
    if made:
        store.put(EVALUATOR, made.to_bytes())
