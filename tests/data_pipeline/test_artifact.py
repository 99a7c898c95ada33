"""Seals, and archives that somebody made to harm: what is read is what was written, within bounds of memory."""

import io
import json
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from freeguide.configs.errors import DataError
from freeguide.data_pipeline.artifact import (
    BLANK,
    check_seal,
    get_sealed,
    read_npz,
    read_safetensors,
    sealed,
    to_npz,
    to_safetensors,
)
from freeguide.data_pipeline.store.open import open_store

ARRAYS = {
    "mu": np.arange(5.0),
    "sigma": np.eye(5),
    "name": np.str_("digits"),
    "n": np.int64(7),
    "none": np.zeros((0, 3), np.float32),
}


def npy(header: bytes, content: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    size = len(header).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + header + content


def archive(member: bytes, packed: int = zipfile.ZIP_STORED, names: tuple[str, ...] = ("mu.npy",)) -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w", packed) as file:
        for name in names:
            file.writestr(name, member)
    return out.getvalue()


def described(shape: str, descr: str = "'<f8'") -> bytes:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()


def test_sealed_arrays_come_back_and_other_tools_read_them_too() -> None:
    data = to_npz(ARRAYS)
    assert data == to_npz(ARRAYS)
    assert check_seal(data, "it")
    for found in (read_npz(data, "it"), dict(np.load(io.BytesIO(data)))):
        assert found.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert np.array_equal(found[name], array)
            assert found[name].dtype == np.asarray(array).dtype
    assert list(read_npz(data, "it", wanted=lambda name: name == "n")) == ["n"]
    fortran = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    assert np.array_equal(read_npz(to_npz({"x": fortran}), "it")["x"], fortran)


def test_archives_of_before_there_were_seals_are_read() -> None:
    np.savez_compressed(out := io.BytesIO(), **ARRAYS)
    assert not check_seal(out.getvalue(), "it")
    assert np.array_equal(read_npz(out.getvalue(), "it")["sigma"], np.eye(5))


def test_sealed_tensors_come_back_with_their_facts() -> None:
    tensors = {"b": torch.arange(3.0), "a": torch.eye(2)}
    data = to_safetensors(tensors, "facts", {"of": ["x"], "z": 1.5})
    assert data == to_safetensors(dict(reversed(tensors.items())), "facts", {"z": 1.5, "of": ["x"]})
    found, facts = read_safetensors(data, "it", "facts", "weights")
    assert (facts["of"], facts["z"]) == (["x"], 1.5)
    assert torch.equal(found["a"], torch.eye(2))
    assert torch.equal(found["b"], torch.arange(3.0))


@pytest.mark.parametrize(
    ("data", "read"),
    [
        (to_npz(ARRAYS), lambda data: read_npz(data, "it")),
        (to_safetensors({"a": torch.arange(999.0)}, "f", {}), lambda data: read_safetensors(data, "it", "f", "weights")),
        (sealed(json.dumps({"rows": [1, 2], "seal": BLANK}).encode()), lambda data: check_seal(data, "it")),
    ],
    ids=["npz", "safetensors", "json"],
)
def test_every_flipped_bit_every_cut_and_zeros_are_one_sentence_or_change_nothing(
    data: bytes, read: Callable[[bytes], object]
) -> None:
    whole = repr(read(data))
    damaged = [data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :] for at in range(0, len(data), 3)]
    damaged += [data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :] for at in range(0, len(data), 40)]
    damaged += [data[:at] for at in range(0, len(data) - 1, 10) if not data.startswith(b"{")]  # JSON is parsed by its reader
    refused, sentences = 0, set[str]()
    for one in damaged:
        try:
            assert repr(read(one)) in (whole, "False")  # the words before the digits, without which there is no seal
        except DataError as error:
            refused += 1
            sentences.add(str(error))
    assert all(s.startswith("it ") and s.endswith("; delete it and give the command again") and "\n" not in s for s in sentences)
    assert refused > 0.75 * len(damaged)


def test_a_damaged_object_of_a_store_is_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    data = to_npz(ARRAYS)
    store.put("rows/a.npz", data)
    assert get_sealed(store, "rows/a.npz") == data
    middle = len(data) // 2
    store.put("rows/a.npz", data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])
    with pytest.raises(DataError, match=r"/rows/a\.npz is damaged \(its checksum does not fit\); make it again"):
        get_sealed(store, "rows/a.npz", "make it again")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (archive(npy(described("(1000000, 1000000)"))), "said to be float64 (1000000, 1000000)"),
        (archive(npy(described("(99999999999999999999, 99999999999999999999)"))), "which it cannot hold"),
        (archive(npy(described("(-1,)"))), "an array of float64 (-1,)"),
        (archive(npy(described("(True,)"))), ""),
        (archive(npy(described("(2.5,)"))), ""),
        (
            archive(npy(described("(1,)", "'|O'"), pickle.dumps(print))),
            "pickled objects are never read, as a pickle could run code",
        ),
        (archive(npy(described("(1,)", "[('a', '|O')]"), b"x" * 8)), "pickled objects"),
        (archive(npy(described("(1,)", "[('a', '<f8')]"), b"x" * 8)), "which it cannot hold"),
        (archive(npy(described("(9,)", "'<V0'"))), ""),
        (archive(npy(b"(" * 5000)), "header"),
        (archive(npy(b"[" * 9000 + b"]" * 900)), "header"),
        (archive(npy(b"{" * 400)), "header"),
        (archive(npy(described("(" + "1," * 6000 + ")"))), ""),
        (archive(npy(described("(1," * 1 + "1" * 4400 + ")"))), ""),
        (archive(npy(described("(4,)"), b"\0" * 8)), "ends early"),
        (archive(npy(described("(1,)"), b"\0" * 9)), "goes on after its array"),
        (archive(npy(b"x" * 2**20, version=b"\x02\x00")), ""),
        (archive(npy(described("(1,)"), b"\0" * 8, version=b"\x03\x00")), "header"),
        (archive(npy(described("(1,)"), b"\0" * 8), zipfile.ZIP_LZMA), "packed in a way that is not read, number 14"),
        (archive(npy(described("(1,)"), b"\0" * 8), zipfile.ZIP_BZIP2), "packed in a way that is not read, number 12"),
        (archive(npy(described("(270000000,)", "'|u1'"), b"\0" * 27 * 10**7), zipfile.ZIP_DEFLATED), "would take 257 MiB"),
        (archive(npy(described("(1,)"), b"\0" * 8), names=("mu", "mu.npy")), "stands in it twice"),
        (archive(b"mu"), ""),
        (b"", "not a zip file"),
        (b"PK\x05\x06", "not a zip file"),
        (pickle.dumps({"mu": 1}), "not a zip file"),
    ],
)
def test_hostile_archives_end_in_one_sentence_and_take_no_memory(data: bytes, words: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as error:
            read_npz(data, "stats.npz", "save them again")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(error.value).startswith("stats.npz is not an .npz of plain arrays (")
    assert str(error.value).endswith("); save them again")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250
    assert peak < 16 * 2**20


def test_other_ways_to_hide_an_archive_are_refused_too() -> None:
    locked = bytearray(archive(npy(described("(1,)"), b"\0" * 8)))
    for mark in (b"PK\x03\x04", b"PK\x01\x02"):
        locked[locked.index(mark) + (6 if mark[2] == 3 else 8)] |= 1  # the flag that says it is encrypted
    with pytest.raises(DataError, match="password"):
        read_npz(bytes(locked), "it")
    with pytest.raises(DataError, match="would take"):
        read_npz(to_npz({"x": np.zeros(100_000)}), "it", most=1000)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(65536),
        (2**63).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (99).to_bytes(8, "little") + b"[" * 99,
        (9000).to_bytes(8, "little") + b'{"__metadata__":{"f":"' + b"[" * 8975 + b'"}}',
        (10).to_bytes(8, "little") + b'{"a":null}',
    ],
)
def test_hostile_safetensors_end_in_one_sentence(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^it is not an evaluator \(.+\); fit it again$") as error:
        read_safetensors(data, "it", "f", "an evaluator", "fit it again")
    assert "\n" not in str(error.value)
