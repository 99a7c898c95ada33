"""What the options of the cluster ask of the others: whether so many workers can do the work."""

from freeguide.cluster.evaluation import checks as of_evaluation
from freeguide.configs.checks import Checks
from freeguide.configs.schema import Config


def contradictions(config: Config, command: str) -> Checks:
    """Everything that has to hold of a whole config for `command`."""
    yield from of_evaluation.contradictions(config, command)
    batch, micro, workers = config.train.global_batch, config.train.micro_batch, config.cluster.workers
    yield (
        command != "train" or config.cluster.engine != "local" or workers == 1,
        f"cluster.engine=local trains in one process and cluster.workers={workers}; set cluster.workers=1, or cluster.engine=ray",
    )
    fewest = config.cluster.min_workers
    yield 0 <= fewest <= workers, f"cluster.min_workers={fewest}: must lie between 0 and cluster.workers={workers}"
    for count in range(fewest, workers) if fewest else ():
        yield (
            batch % count == 0 and (micro == 0 or batch // count % micro == 0),
            f"train.global_batch={batch} cannot be shared by {count} workers, which cluster.min_workers={fewest} allows: "
            f"every number of workers from there to cluster.workers={workers} must divide it (in micro-batches, where set)",
        )
