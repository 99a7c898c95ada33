"""Tests of untrusted.py: hostile JSON and safetensors headers are a ValueError with a short reason, before they cost anything."""

import json
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from freeguide.configs.untrusted import parse_json, safetensors_header

HOSTILE = {
    "deep lists": "[" * 100_000 + "]" * 100_000,
    "lists deeper than sense": "[" * 40 + "]" * 40,
    "deep tables": '{"a":' * 5_000 + "1" + "}" * 5_000,
    "unclosed": "[" * 100_000,
    "nan": "[NaN]",
    "infinity": '{"a": -Infinity}',
    "a float that overflows": "[1e999]",
    "a huge integer": "[" + "9" * 4_000 + "]",
    "an integer beyond 64 bits": str(2**64),
    "a key twice": '{"a": 1, "b": {"c": 1, "c": 2}}',
    "no JSON": "pickle",
    "nothing": "",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_json_is_a_short_reason(text: str) -> None:
    for data in (text, text.encode()):
        with pytest.raises(ValueError, match=r"\w") as raised:
            parse_json(data)
        assert len(str(raised.value)) < 150


def test_what_is_too_large_is_not_parsed() -> None:
    with pytest.raises(ValueError, match=r"1,002 bytes, and 1,000 are the most"):
        parse_json(json.dumps("x" * 1000), most=1000)
    with pytest.raises(ValueError, match="utf"):
        parse_json("[1]".encode("utf-16"))


def test_honest_json_is_what_it_was() -> None:
    value = {"a": [1, 2.5, "é", None, True, {"b": [-(2**63), 2**64 - 1]}], "empty": [[], {}]}
    assert parse_json(json.dumps(value)) == value
    assert parse_json("3") == 3
    assert parse_json("[Infinity]", finite=False) == [float("inf")]
    assert parse_json("[" * 32 + "]" * 32)


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def tensor(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BOMBS = {
    "shape bomb": header(a=tensor([2**31, 2**31], 0, 16)),
    "product that wraps": header(a=tensor([2**32, 2**32], 0, 0)),
    "negative offset": header(a=tensor([4], -16, 0)),
    "end before begin": header(a=tensor([4], 16, 0)),
    "overlap": header(a=tensor([4], 0, 16), b=tensor([4], 0, 16)),
    "hole": header(a=tensor([2], 8, 16)),
    "past the end": header(a=tensor([400], 0, 1600)),
    "negative shape": header(a=tensor([-2, -2], 0, 16)),
    "fraction": header(a=tensor([4.0], 0, 16)),
    "truth as a number": header(a=tensor([True, 4], 0, 16)),
    "unknown type": header(a=tensor([4], 0, 16, "Q128")),
    "no shape": header(a={"dtype": "F32", "data_offsets": [0, 16]}),
    "shape of a thousand sides": header(a=tensor([1] * 1000 + [4], 0, 16)),
    "a list": struct.pack("<Q", 2) + b"[]",
    "metadata of numbers": header(__metadata__={"a": 1}, a=tensor([4], 0, 16)),
    "header longer than the file": struct.pack("<Q", 2**62) + b"{}",
    "header that does not end": struct.pack("<Q", 5) + b"{}",
    "deep header": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "no file": b"abc",
}


@pytest.mark.parametrize("start", BOMBS.values(), ids=BOMBS.keys())
def test_hostile_safetensors_headers_are_a_short_reason_and_allocate_nothing(start: bytes) -> None:
    data = start + bytes(16)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"\w") as raised:
            safetensors_header(data, len(data))
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
    assert len(str(raised.value)) < 150


def test_an_honest_header_is_read_from_the_beginning_of_its_file() -> None:
    data = safetensors.numpy.save({"x": np.zeros((2, 3), np.float32), "y": np.zeros(5, np.uint8)}, {"who": "we"})
    tensors, metadata, begin = safetensors_header(data[:-20], len(data))
    assert ({name: entry["shape"] for name, entry in tensors.items()}, metadata) == ({"x": [2, 3], "y": [5]}, {"who": "we"})
    assert begin + 29 == len(data)
