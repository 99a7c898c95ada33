"""Labels as the sources have them, and the numbers of the classes that they become; for all kinds of input alike."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from freeguide.configs.errors import DataError
from freeguide.configs.schema import DataConfig
from freeguide.configs.untrusted import JSON_BYTES
from freeguide.data_pipeline.decode import ANY_LABEL, BadSample, number_of
from freeguide.data_pipeline.pictures import without_pictures
from freeguide.data_pipeline.store.open import access_to, open_store


def read_class_names(data: DataConfig) -> tuple[str, ...]:
    """The names of the classes in their order from a text file, one a line, or a JSON list. Empty if none is named."""
    if not (uri := data.class_names):
        return ()
    place, _, name = uri.rpartition("/")
    try:
        text = open_store(place or "/", access=access_to(data, uri)).get(name, JSON_BYTES).decode("utf-8-sig")
        names = json.loads(text) if text.lstrip().startswith("[") else [line.strip() for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.class_names={uri} is neither text nor a JSON list; write one name a line") from error
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise DataError(f"data.class_names={uri} must name every class once; write one name a line")
    return tuple(names)


def numbered(labels: list[Any], path: str, classes: int | None, names: tuple[str, ...]) -> tuple[npt.NDArray[np.int64], int]:
    """The numbers of the labels, and how many classes there are. Raises DataError for no labels, and classes without pictures."""
    known: dict[Any, int] = {}
    for row, label in enumerate(labels):
        try:
            if label not in known:
                known[label] = number_of(label, len(names) or ANY_LABEL, names)
        except BadSample as error:
            raise DataError(f"row {row} of {path}: {error}") from None
        except TypeError:
            raise DataError(
                f"row {row} of {path}: its label is a list or an object; name a column of labels with data.label_key"
            ) from None
    numbers = np.array([known[label] for label in labels], np.int64)
    count = len(names) or max(known.values(), default=-1) + 1
    check_classes(f"{path} has {len(names)} names of classes" if names else f"{path} has labels up to {count - 1}", count, classes)
    lacking = without_pictures(known.values(), count)
    if lacking and not classes:
        raise DataError(f"These classes of {path} have no picture: {lacking}; set data.classes={count} if that is meant")
    return numbers, count


def check_classes(what: str, found: int, stated: int | None) -> None:
    """Raises DataError if a number is stated that is not the one of the data: a class without images would be sampled."""
    if stated and stated != found:
        raise DataError(f"{what}, but data.classes is {stated}; set data.classes={found}, or leave it out")
