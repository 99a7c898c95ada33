"""One row of metrics with every condition under which it was measured, and the refusal to compare rows that differ.

An FID is a property of the model, and just as much of n, of the reference, of the network that made the features, of the resize
and of the rounding. So a row is never a bare number: it carries all of these, and `require_comparable` refuses a common column to
rows that differ in a condition that the reader has not been told about.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from freeguide.cluster.evaluation.conditions import trained
from freeguide.cluster.evaluation.extractors.features import INCEPTION
from freeguide.cluster.evaluation.extractors.roles import role_conditions
from freeguide.cluster.evaluation.metrics import value_names
from freeguide.configs.errors import DataError
from freeguide.configs.schema import Config, SamplingConfig
from freeguide.configs.untrusted import parse_json
from freeguide.data_pipeline.artifact import check_seal, sealed_json
from freeguide.trainer.rounding import ROUNDING

SCHEMA = "freeguide-rows/2"


def instrument() -> tuple[str, ...]:
    """What was measured with. Rows that differ in one of these never share a column, whatever the reader has been told."""
    first = ("n", "dataset", "reference", "reference_n", "extractor", "extractor_hash", "resize")
    return (*first, *role_conditions())


INSTRUMENT = instrument()
MEASUREMENT = (*INSTRUMENT, "rounding", "labels")
# What was measured. Rows may differ in these where an experiment varies them by name, as the paper varies p_uncond.
MODEL = (
    *("run", "checkpoint_step", "trained", "p_uncond", "ema"),
    *("sampler", "steps", "v", "clip", "options", "seed", "device", "ema_distance", "code_version"),
)
UNKNOWN = "not known"  # rounding or labels of images that somebody else made


@dataclass(frozen=True, kw_only=True)
class Row:
    """A value that was not measured is None, and so is a fact of the model that its maker did not state (see `cluster.jobs.score`).

    Raises DataError on construction if a number is not finite or a count is not positive.
    """

    w: float  # guidance weight of the paper: (1 + w) eps_c - w eps_u; 0 = without guidance

    fid: float
    fid_std: float | None = None  # over sets of n images of the same network, by jackknife; not over training runs
    inception_score: float | None = None  # of an extractor with classes
    inception_score_std: float | None = None  # over the splits
    accuracy: float | None = None  # share of images that the extractor's classifier gives the label they were made for
    precision: float | None = None
    recall: float | None = None
    kid: float | None = None
    kid_std: float | None = None
    fid_infinity: float | None = None
    sfid: float | None = None  # of Inception's spatial features
    sfid_std: float | None = None  # as fid_std
    fd_dinov2: float | None = None
    fd_dinov2_std: float | None = None  # as fid_std
    nfe: int | None = None  # network evaluations per image

    n: int  # generated images
    dataset: str = ""  # of the reference, as published tables name it; "" = not named, and so beside no published number
    reference: str  # sha256 of the reference's statistics and features
    reference_n: int  # images behind the statistics; 0 = their file does not say
    extractor: str  # name of the feature network: an evaluator's name, or INCEPTION
    extractor_hash: str
    resize: str  # from the image to the extractor's input; "none" where the extractor takes the image as it is
    dinov2: str = ""  # sha256 of DINOv2's weights where fd_dinov2 was measured
    dinov2_reference: str = ""  # sha256 of its reference
    rounding: str  # from samples to uint8
    labels: str  # rule of the labels: balanced | random

    run: str
    checkpoint_step: int | None = None
    trained: str | None = None  # hash of what was trained and how, see `conditions.trained`
    p_uncond: float | None = None
    ema: float | str | None = None  # decay per step of the averaged weights, 0 = the raw ones; another average by its name
    sampler: str = UNKNOWN
    steps: int | None = None  # T
    v: float | None = None  # interpolation of the log-variance
    clip: bool | None = None  # x clamped to [-1, 1] at every step
    options: str = ""  # sampling options without a column of their own that differ from the paper's, see `further_options`
    seed: int | None = None
    device: str = ""  # the kind that made the images, its torch and precision; "" = not known. Kinds round differently
    ema_distance: float = 0.0  # of a reconstructed average to the profile that its name says, relative; 0 = not reconstructed
    code_version: str
    # Values of metrics, and conditions of roles, that have no field above, by their names; in JSON they stand among the fields.
    further: Mapping[str, float | str | None] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, **facts: Any) -> "Row":
        """A row of facts by name, whether they have a field or not. Raises TypeError for what no row has."""
        further = {name: value for name, value in facts.items() if name not in _TYPES}
        if strangers := [name for name in further if name not in (*value_names(), *role_conditions())]:
            raise TypeError(f"no row has {', '.join(strangers)}")
        return cls(**{name: value for name, value in facts.items() if name in _TYPES}, further=further)

    def value(self, name: str) -> Any:
        """The value or condition of that name; None or "" if it was not measured."""
        if name in _TYPES:
            return getattr(self, name)
        return self.further.get(name, "" if name in role_conditions() else None)

    def to_dict(self) -> dict[str, Any]:
        """All that the row says, by name."""
        return {name: getattr(self, name) for name in _TYPES} | dict(self.further)

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            if isinstance(value, float) and not math.isfinite(value):
                raise DataError(f"{name} of the row w = {self.w:g} of run {self.run!r} is {value}; look at that run's samples")
        for name, least in (("n", 1), ("reference_n", 0), ("steps", 1), ("nfe", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise DataError(f"{name} of the row w = {self.w:g} of run {self.run!r} is {value}; it must be {least} or more")

    @property
    def fid_name(self) -> str:
        """`FID` for Inception's features, `FID-<evaluator>` for any other."""
        return "FID" if self.extractor == INCEPTION else f"FID-{self.extractor}"


def model_conditions(
    config: Config,
    checkpoint_step: int,
    code_version: str,
    *,
    origin: Config | None = None,
    device: str = "",
    ema_distance: float = 0.0,
) -> dict[str, Any]:
    """The conditions of our own samples, by the names of a row's fields: what made the images and how they became 8 bits.

    `config` samples the run, whose own config is `origin`; None = the same.
    """
    sampling = config.sampling
    return {
        "run": config.name,
        "checkpoint_step": checkpoint_step,
        "trained": trained(origin or config),
        "p_uncond": config.diffusion.p_uncond,
        "ema": config.train.ema_decay if sampling.ema == "ema" else sampling.ema,
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "v": sampling.v,
        "clip": sampling.clip,
        "options": further_options(sampling),
        "seed": sampling.seed,
        "device": device,
        "ema_distance": ema_distance,
        "labels": sampling.labels,
        "rounding": ROUNDING,
        "code_version": code_version,
    }


def further_options(sampling: SamplingConfig) -> str:
    """The options that have no column in a row and differ from their defaults, as "key=value, ...".

    Whatever is added to the configuration is so part of the row's conditions from the first day.
    """
    columns = {*MODEL, "labels", "checkpoint", "batch"}  # the checkpoint has its step; the batch decides memory, not images
    defaults = type(sampling)()
    names = sorted(field.name for field in fields(sampling) if field.name not in columns)
    changed = [name for name in names if getattr(sampling, name) != getattr(defaults, name)]
    return ", ".join(f"{name}={getattr(sampling, name)}" for name in changed)


def require_same_instrument(rows: Sequence[Row]) -> None:
    """Raise DataError unless all rows were measured with the same n, reference and extractors, whoever made their images."""
    for name in instrument():
        _require_equal(rows, name)


def require_comparable(rows: Sequence[Row], varying: Sequence[str] = ()) -> None:
    """Raise DataError unless all rows agree in every condition but w and the MODEL conditions named in `varying`.

    The sentence names the first condition that differs and both values. Raises ValueError if `varying` names anything else.
    """
    for name in varying:
        if name not in MODEL:
            raise ValueError(f"{name!r} may not vary within a comparison; only {', '.join(MODEL)} may")
    for name in dict.fromkeys((*instrument(), *MEASUREMENT, *MODEL)):
        if name not in varying:
            _require_equal(rows, name)


def _require_equal(rows: Sequence[Row], name: str) -> None:
    for row in rows[1:]:
        first, other = rows[0].value(name), row.value(name)
        if first != other:
            raise DataError(
                f"rows w = {rows[0].w:g} and w = {row.w:g} cannot be compared because {name} is {first!r} in one and {other!r} "
                f"in the other; measure both with the same {name}"
            )


def to_json(rows: Iterable[Row]) -> str:
    """Rows as JSON text. Floats are written so that they read back to the same bits."""
    return sealed_json(document(rows)).decode()


def document(rows: Iterable[Row]) -> dict[str, Any]:
    """What stands in that JSON."""
    return {"schema": SCHEMA, "rows": [row.to_dict() for row in rows]}


def from_json(text: str, where: str = "rows") -> list[Row]:
    """Read what `to_json` wrote. `where` names the file in errors.

    Raises DataError if fields are missing, unknown or mistyped, and if anything has changed since.
    """
    check_seal(text.encode(errors="replace"), where, "measure again, or take out the line of its seal if the change is meant")
    try:
        found = parse_json(text)
        if found["schema"] != SCHEMA:
            raise ValueError(f"its schema is {found['schema']!r:.60}, not {SCHEMA!r}")
        return [Row.of(**{name: typed(name, value) for name, value in row.items()}) for row in found["rows"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where} does not hold metric rows ({error}); measure again with this version") from None


_TYPES: dict[str, Any] = {each.name: each.type for each in fields(Row) if each.name != "further"}


def typed(name: str, value: Any) -> Any:
    """The value, if it has the type that a row has there (an int will do for a float).

    Raises KeyError for what no row has and TypeError for another type.
    """
    further = dict.fromkeys(value_names(), float | None) | dict.fromkeys(role_conditions(), str)
    kind = (further | _TYPES)[name]
    kinds = get_args(kind) or (kind,)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and float in kinds:
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{name} is {value!r}")
    return value
