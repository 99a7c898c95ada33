"""What the options of evaluation ask of each other and of what is sampled."""

from freeguide.cluster.evaluation.extractors.roles import ROLES, options_of
from freeguide.configs.checks import Checks
from freeguide.configs.schema import Config
from freeguide.trainer import checks as of_trainer

UNITS = 10**7  # of work in one job


def contradictions(config: Config, command: str) -> Checks:
    """Everything that has to hold of the data, of training, of sampling and of evaluation for `command`."""
    yield from of_trainer.contradictions(config, command)
    yield from _evaluate_checks(config, command)
    yield from _unit_checks(config)


def _evaluate_checks(config: Config, command: str) -> Checks:
    evaluate, weights, dtype = config.evaluate, config.evaluate.w, config.data.dtype
    yield (
        command != "evaluate" or dtype == "uint8",
        f"data.dtype={dtype}: evaluate measures images, and there is no decoder here; generate the latents, decode them, and use "
        f"score",
    )
    for role, wanted in ROLES.items():
        of_weights, sha256, reference = options_of(role)
        for name in (reference, sha256):
            given = getattr(evaluate, name)
            yield (
                getattr(evaluate, of_weights) != "" or given == "",
                f"evaluate.{name}={given} needs {wanted.title}'s weights: set evaluate.{role} to their path",
            )
    yield (
        command != "fit-evaluator" or evaluate.extractor == "",
        f"evaluate.extractor={evaluate.extractor} names weights that are there already: leave it out to fit an evaluator",
    )
    yield (
        len({f"{w:g}" for w in weights}) == len(weights),
        f"evaluate.w={weights}: weights, each once to six digits",
    )


def _unit_checks(config: Config) -> Checks:
    evaluate, generate = config.evaluate, config.generate
    for group, images, unit, curves in (
        ("evaluate", evaluate.images, evaluate.unit, len(evaluate.w)),
        ("generate", generate.images, generate.unit, 1),
    ):
        count = -(-images // unit) * curves
        yield (
            count <= UNITS,
            f"{group}.images={images} in units of {group}.unit={unit} are {count:,} work units, and {UNITS:,} are the most that a "
            f"driver can hold: raise {group}.unit",
        )
