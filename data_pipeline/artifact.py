"""What is made once and used for long: written with a checksum inside, and read as bytes that anybody may have written.

**Seals.** An object holds `freeguide-sha256:` and 64 digits, the SHA-256 of the whole object with zeros in their place. They stand
where its format has room for words (the comment of a zip archive, the metadata of safetensors, a field of JSON), so other tools
read the object as before. Objects of before there were seals have none, and are read with what their formats check.

**Untrusted archives.** A header of a few bytes may ask for any memory. So an array is made only after its archive has been found to
hold as many bytes as the header says, and these are no more than the archive can honestly have been packed from.
"""

import hashlib
import io
import json
import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from freeguide.configs.errors import DataError
from freeguide.configs.untrusted import parse_json, safetensors_header
from freeguide.data_pipeline.store.base import MEMORY, Store

TAG = b"freeguide-sha256:"
BLANK = (TAG + b"0" * 64).decode()  # a seal before it is filled in
EXPANSION = 100  # bytes that one byte of a packed archive may become: pictures become 1 to 10
ROOM = 256 * 2**20  # bytes that any archive may become: flat arrays shrink a thousandfold
_PART = 2**24  # bytes unpacked at a time
_HEADER = 10_000  # bytes of an array's header at most, numpy's own limit
_END = b"PK\x05\x06"  # begins the end of a zip archive
_AGAIN = "delete it and give the command again"


def fingerprint(decides: Mapping[str, Any]) -> str:
    """A short name for everything that decides what is made: 12 hexadecimal digits, equal for equal conditions in any order."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


# --- seals ---


def sealed(data: bytes) -> bytes:
    """The object with its one BLANK filled in."""
    assert data.count(BLANK.encode()) == 1
    return data.replace(BLANK.encode(), TAG + hashlib.sha256(data).hexdigest().encode())


def sealed_json(document: Mapping[str, Any]) -> bytes:
    """As JSON to read and compare, with its seal under "seal". Raises ValueError for numbers that JSON does not have."""
    return sealed((json.dumps({**document, "seal": BLANK}, indent=1, allow_nan=False) + "\n").encode())


def check_seal(data: bytes, where: str, remedy: str = _AGAIN) -> bool:
    """Whether the object has a seal. Raises DataError if it does not fit: some bit is not the one that was written."""
    at = data.rfind(TAG) + len(TAG)
    if at < len(TAG) or at + 64 > len(data):
        return False
    view = memoryview(data)
    digest = hashlib.sha256(view[:at])
    digest.update(b"0" * 64)
    digest.update(view[at + 64 :])
    if digest.hexdigest().encode() != data[at : at + 64]:
        raise DataError(f"{where} is damaged (its checksum does not fit); {remedy}")
    return True


def get_sealed(store: Store, key: str, remedy: str = _AGAIN, most: int = MEMORY) -> bytes:
    """The object, of `most` bytes, checked. Raises MissingObject, and DataError for a damaged one."""
    data = store.get(key, most)
    check_seal(data, f"{store.uri}/{key}", remedy)
    return data


# --- archives of arrays ---


def to_npz(arrays: Mapping[str, Any]) -> bytes:
    """A sealed `.npz` without pickle. Equal arrays give equal bytes."""
    np.savez(buffer := io.BytesIO(), **arrays)
    data, comment = buffer.getvalue(), BLANK.encode()
    return sealed(data[:-2] + len(comment).to_bytes(2, "little") + comment)


def read_npz(
    data: bytes,
    where: str,
    remedy: str = _AGAIN,
    *,
    what: str = "an .npz of plain arrays",
    wanted: Callable[[str], bool] = lambda name: True,
    most: int | None = None,
) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` whose names are `wanted`, each checked against its CRC-32, and all against the seal if there is one.

    They may take `most` bytes together, or else what an honest archive of this size can hold. Raises DataError, one sentence with
    the remedy, for anything else than plain arrays: pickles, archives that are damaged, packed oddly or grow beyond the limit.
    """
    check_seal(data, where, remedy)
    limit = max(ROOM, EXPANSION * len(data)) if most is None else most
    found: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            end = data.rfind(_END) + 20  # there stands how many bytes of comment follow
            if end + 2 + int.from_bytes(data[end : end + 2], "little") != len(data):
                raise ValueError("it is cut short, or goes on after its end")
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if not wanted(name):
                    continue
                if name in found:
                    raise ValueError(f"{name[:40]!r} stands in it twice")
                found[name] = _array(archive, info, limit)
                limit -= found[name].nbytes
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120].rstrip(".")
        raise DataError(f"{where} is not {what} ({reason}); {remedy}") from None
    return found


def read_npy(data: bytes, dtype: str, axes: int) -> NDArray[Any]:
    """The array of an `.npy`, which is of exactly this dtype, in C order, with so many axes. Raises ValueError."""
    file = io.BytesIO(data)
    try:
        shape, fortran, found = _header(file)
    except ValueError as error:
        raise ValueError(str(error).splitlines()[0][:120].rstrip(".")) from None  # numpy's advice is for programmers
    if found != np.dtype(dtype) or fortran or len(shape) != axes:
        raise ValueError(f"it is an array of {found!s:.40} with {len(shape)} axes, not of {dtype} with {axes}")
    left = len(data) - file.tell()
    if math.prod(shape) * found.itemsize != left:
        raise ValueError(f"its shape {shape!s:.60} does not fit to its {left:,} bytes")
    return np.frombuffer(data, found, offset=file.tell()).reshape(shape)


def names_of(data: bytes) -> list[str]:
    """Names of the arrays in an `.npz`, none if it is no archive; not whether they can be read."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError):
        return []


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> NDArray[Any]:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename[:40]!r} is packed in a way that is not read, number {info.compress_type}")
    if info.file_size > limit + _HEADER:
        raise ValueError(f"{info.filename[:40]!r} would take {info.file_size / 2**20:.0f} MiB")
    with archive.open(info) as file:
        shape, fortran, dtype = _header(file)
        nbytes = math.prod(shape) * dtype.itemsize
        if dtype.kind not in "biufSU" or nbytes > info.file_size or nbytes > limit:
            raise ValueError(f"{info.filename[:40]!r} is said to be {dtype} {shape}"[:100] + ", which it cannot hold")
        values = bytearray()
        while part := file.read(min(nbytes - len(values), _PART)):
            values += part
        if len(values) < nbytes:
            raise ValueError(f"{info.filename[:40]!r} ends early")
        if file.read(1):  # and so its CRC-32 has been checked
            raise ValueError(f"{info.filename[:40]!r} goes on after its array")
    return np.frombuffer(values, dtype, math.prod(shape)).reshape(shape, order="F" if fortran else "C")


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type. Raises ValueError for whatever is no header of plain numbers or text."""
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file, max_header_size=_HEADER)
    except (SyntaxError, tokenize.TokenError, TypeError, KeyError, MemoryError, RecursionError, OverflowError) as error:
        raise ValueError(f"a header that cannot be read, {type(error).__name__}") from None
    if dtype.hasobject:
        raise ValueError("pickled objects are never read, as a pickle could run code")
    if dtype.itemsize == 0 or any(not isinstance(n, int) or n < 0 for n in shape):
        raise ValueError(f"an array of {dtype} {shape}"[:100])
    return shape, fortran, dtype


# --- tensors ---


def to_safetensors(tensors: Mapping[str, Any], name: str, facts: Mapping[str, Any]) -> bytes:
    """Sealed safetensors of torch tensors with `facts` as JSON under `name` in the metadata. Equal ones give equal bytes.

    One entry, because safetensors writes several in the random order of a hash map.
    """
    import safetensors.torch

    text = json.dumps({**facts, "seal": BLANK}, sort_keys=True)
    return sealed(safetensors.torch.save(dict(tensors), {name: text}))


def read_safetensors(data: bytes, where: str, name: str, what: str, remedy: str = _AGAIN) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a file that should be `what`, and the facts under `name` in its metadata; checked as `read_npz` does.

    Raises DataError for anything else.
    """
    import safetensors
    import safetensors.torch

    check_seal(data, where, remedy)
    try:
        _, metadata, _ = safetensors_header(data, len(data))
        facts = parse_json(metadata[name])
        return safetensors.torch.load(data), {key: value for key, value in facts.items() if key != "seal"}
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120].rstrip(".")
        raise DataError(f"{where} is not {what} ({reason or type(error).__name__}); {remedy}") from None
