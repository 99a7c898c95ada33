"""Reading what somebody else may have written, or a disk have damaged: JSON, and the headers of safetensors files.

Sizes are checked before anything is parsed and everything is checked before it is used, so that no file can cost more memory than
its own size suggests. Whatever is wrong is a ValueError whose text can stand in a sentence: "... is damaged (REASON); ...".
"""

import itertools
import json
import math
from typing import Any

MIB = 2**20
JSON_BYTES = 64 * MIB
HEADER_BYTES = 16 * MIB  # of a safetensors file: some 100 000 tensors
DEPTH = 32  # of lists in lists
# What taking a parsed JSON text for something raises if it is something else, whatever it is.
MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError)
_BEYOND = 2**64  # no count, size, seed or checksum is as large
_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}


def parse_json(data: bytes | str, most: int = JSON_BYTES, finite: bool = True) -> Any:
    """The value of a JSON text of at most `most` bytes, `DEPTH` levels deep, with whole numbers below 2^64 and no key twice.

    Unless `finite` is False, NaN, Infinity and 1e999 are refused. Raises ValueError.
    """
    if len(data) > most:
        raise ValueError(f"it has {len(data):,} bytes, and {most:,} are the most that make sense")
    text = data if isinstance(data, str) else data.decode()
    numbers: dict[str, Any] = {"parse_int": _whole}
    if finite:
        numbers |= {"parse_float": _finite, "parse_constant": _finite}
    try:
        value = json.loads(text, object_pairs_hook=_each_key_once, **numbers)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEPTH} levels deep") from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH):
        inside = (item for held in level for item in (held.values() if isinstance(held, dict) else held))
        level = [item for item in inside if isinstance(item, dict | list)]
        if not level:
            return value
    raise ValueError(f"it is nested more than {DEPTH} levels deep")


def whole(value: Any, least: int = 0, most: int = 2**63 - 1) -> int:
    """`value`, if it is a whole number from `least` to `most`. Raises ValueError."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r:.40} is no whole number from {least} to {most}")
    return value


def safetensors_header(start: bytes, size: int) -> tuple[dict[str, Any], dict[str, str], int]:
    """The tensors of a safetensors file of `size` bytes that begins with `start`, its metadata, and where its values begin.

    A tensor is {"dtype", "shape", "data_offsets"}, offsets from where the values begin. `start` holds the header and maybe more;
    see `header_bytes`. Raises ValueError for what cannot be, as shapes that do not fit to the bytes or bytes that belong to two.
    """
    begin = header_bytes(start, size)
    if len(start) < begin:
        raise ValueError("it ends inside its header")
    header = parse_json(start[8:begin], HEADER_BYTES)
    if not isinstance(header, dict):
        raise ValueError("its header is no table of tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are no texts")
    spans = []
    for name, tensor in header.items():
        if not isinstance(tensor, dict) or tensor.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name!r:.60} is described in another way than safetensors does")
        item = _SIZES.get(str(tensor["dtype"]))
        if item is None:
            raise ValueError(f"tensor {name!r:.60} has values of type {tensor['dtype']!r:.20}")
        shape, span = tensor["shape"], tensor["data_offsets"]
        if not isinstance(shape, list) or len(shape) > 16 or not isinstance(span, list) or len(span) != 2:
            raise ValueError(f"tensor {name!r:.60} has no shape or place")
        first, last = (whole(at, most=size) for at in span)
        if item * math.prod(whole(length, most=size) for length in shape) != last - first:
            raise ValueError(f"tensor {name!r:.60} has a shape that does not fit to its bytes")
        spans.append((first, last))
    at = 0
    for first, last in sorted(spans):
        if first != at:
            raise ValueError("its tensors do not follow each other")
        at = last
    if begin + at != size:
        raise ValueError(f"it has {size:,} bytes, its header says {begin + at:,}")
    return header, metadata, begin


def header_bytes(start: bytes, size: int) -> int:
    """Where the values of a safetensors file of `size` bytes begin, by its first 8 bytes. Raises ValueError for no such file."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(HEADER_BYTES, size - 8):
        raise ValueError("it does not begin with a header of safetensors")
    return 8 + length


def _whole(text: str) -> int:
    if len(text) > 20 or not -_BEYOND < (value := int(text)) < _BEYOND:
        raise ValueError(f"a number has {len(text)} digits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"a number is {text:.20}")
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(one for one, other in itertools.pairwise(names) if one == other)
        raise ValueError(f"it has the key {twice!r:.60} twice")
    return found
