"""The fit-evaluator job: the data's own evaluator and its reference, made before a run needs them, and pinned by a hash."""

from freeguide.cluster.evaluation.extractors.evaluator import Evaluator
from freeguide.cluster.evaluation.yardstick import accuracy_of, dataset_name, own_yardstick, warn_of_symmetry
from freeguide.cluster.runtime.engines import executor
from freeguide.configs.schema import Config
from freeguide.data_pipeline.store.open import open_data
from freeguide.data_pipeline.stored import load_manifest
from freeguide.trainer.training.loop import fitted


def fit_evaluator(config: Config) -> str:
    """Make the data's own evaluator and its reference, where they are not yet; returns its URI.

    Raises UserError before Ray starts for whatever can be known before.
    """
    data = open_data(config.data)
    data.check(write=False)
    manifest = load_manifest(data)
    config = fitted(config, manifest)
    with executor(config, 1) as engine:
        found = own_yardstick(config, data, manifest, engine)
    extractor, reference = found.extractor, found.reference
    assert isinstance(extractor, Evaluator)
    print(f"evaluator {extractor.hash}: {accuracy_of(extractor)}, FID-{extractor.name}")
    print(f"reference {reference.sha256}: {reference.pool.n} images of {dataset_name(config)}, beside it")
    print(f"pin it: evaluate.extractor={found.weights} evaluate.extractor_hash={extractor.hash}")
    warn_of_symmetry(extractor)
    return found.weights
