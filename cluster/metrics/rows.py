"""One row of metrics with every condition under which it was measured, and the refusal to compare rows that differ.

An FID is a property of the model, and just as much of n, of the reference, of the network that made the features, of the resize
and of the rounding. So a row is never a bare number: it carries all of these, and `require_comparable` refuses a common column to
rows that differ in a condition that the reader has not been told about.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from configs.errors import DataError

INCEPTION = "inception-2015-12-05"  # the only extractor whose distances are called FID
SCHEMA = "freeguide-rows/1"

# What was measured with. Rows that differ in one of these never share a column, whatever the reader has been told.
MEASUREMENT = ("n", "reference", "reference_n", "extractor", "extractor_hash", "resize", "rounding", "labels")
# What was measured. Rows may differ in these where an experiment varies them by name, as the paper varies p_uncond.
MODEL = ("run", "checkpoint_step", "p_uncond", "ema", "sampler", "steps", "v", "clip", "seed", "code_version")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Raises DataError on construction if a number is not finite or a count is not positive."""

    w: float  # guidance weight of the paper: (1 + w) eps_c - w eps_u

    fid: float
    inception_score: float
    inception_score_std: float  # over the splits
    accuracy: float  # share of images that the extractor's classifier gives the label they were made for
    precision: float | None = None
    recall: float | None = None
    kid: float | None = None
    kid_std: float | None = None
    fid_infinity: float | None = None
    nfe: int  # network evaluations per image

    n: int  # generated images
    reference: str  # sha256 of the reference's moments
    reference_n: int
    extractor: str  # name of the feature network: an evaluator's name, or INCEPTION
    extractor_hash: str
    resize: str  # from the image to the extractor's input; "none" where the extractor takes the image as it is
    rounding: str  # from samples to uint8
    labels: str  # rule of the labels: balanced | random

    run: str
    checkpoint_step: int
    p_uncond: float
    ema: float  # decay of the averaged weights; 0 = the raw weights
    sampler: str
    steps: int  # T
    v: float  # interpolation of the log-variance
    clip: bool  # x clamped to [-1, 1] at every step
    seed: int
    code_version: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise DataError(
                    f"{field.name} of the row w = {self.w:g} of run {self.run!r} is {value}; look at that run's samples"
                )
        for name in ("n", "reference_n", "steps", "nfe"):
            if getattr(self, name) < 1:
                raise DataError(
                    f"{name} of the row w = {self.w:g} of run {self.run!r} is {getattr(self, name)}; it must be 1 or more"
                )

    @property
    def fid_name(self) -> str:
        """`FID` for Inception's features, `FID-<evaluator>` for any other."""
        return "FID" if self.extractor == INCEPTION else f"FID-{self.extractor}"


def require_comparable(rows: Sequence[Row], varying: Sequence[str] = ()) -> None:
    """Raise DataError unless all rows agree in every condition but w and the MODEL conditions named in `varying`.

    The sentence names the first condition that differs and both values. Raises ValueError if `varying` names anything else.
    """
    for name in varying:
        if name not in MODEL:
            raise ValueError(f"{name!r} may not vary within a comparison; only {', '.join(MODEL)} may")
    for name in (*MEASUREMENT, *MODEL):
        if name in varying:
            continue
        for row in rows[1:]:
            first, other = getattr(rows[0], name), getattr(row, name)
            if first != other:
                raise DataError(
                    f"rows w = {rows[0].w:g} and w = {row.w:g} cannot be compared because {name} is {first!r} in one and {other!r} "
                    f"in the other; measure both with the same {name}"
                )


def to_json(rows: Iterable[Row]) -> str:
    """Rows as JSON text. Floats are written so that they read back to the same bits."""
    return json.dumps({"schema": SCHEMA, "rows": [asdict(row) for row in rows]}, indent=1, allow_nan=False) + "\n"


def from_json(text: str, where: str = "rows") -> list[Row]:
    """Read what `to_json` wrote. `where` names the file in errors. Raises DataError if fields are missing, unknown or mistyped."""
    try:
        document = json.loads(text)
        if document["schema"] != SCHEMA:
            raise ValueError(f"its schema is {document['schema']!r}, not {SCHEMA!r}")
        return [Row(**{name: _typed(name, value) for name, value in row.items()}) for row in document["rows"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where} does not hold metric rows ({error}); measure again with this version") from None


_TYPES: dict[str, Any] = {field.name: field.type for field in fields(Row)}


def _typed(name: str, value: Any) -> Any:
    """The value, if JSON gave it the type of the field (an int will do for a float). KeyError for an unknown field."""
    kind = _TYPES[name]
    if isinstance(value, int) and not isinstance(value, bool) and kind in (float, float | None):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{name} is {value!r}")
    return value
