"""A safe walk over tar bytes in memory: nothing is extracted, nothing is followed, and nothing is guessed.

A tar is a row of 512-byte headers, each followed by its member's bytes, padded to 512, and ended by two zero blocks. Samples are
runs of members whose names agree up to the first dot of the base name, WebDataset's rule. The walk takes regular files with
ustar, PAX or GNU long names. Folders and names without an extension are passed over, as webdataset does, and so is what systems
leave (`folder.is_dropping`), what has neither an image nor a label, such as README.md, and a .json without its picture, which may
be of the whole shard. Everything else is an error at a byte: a bad header, a member cut short, a link, a device, a sparse file, an
absolute name or one with `..`, a compressed tar, a member over the cap, one extension twice in a sample.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from freeguide.configs.errors import DataError
from freeguide.data_pipeline.pictures import OTHERS, is_dropping

BLOCK = 512
MAX_MEMBER = 64 * 2**20  # bytes of one member
MAX_META = 64 * 2**10  # bytes of one PAX or GNU header
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
FIELDS = {"png", "jpg", "jpeg", "webp", "npy", "cls"}  # what a sample has at least one of
RULE = 3  # of what a sample is; manifests of earlier versions followed 1, all groups of members, or 2, also a .json by itself
SAMPLE_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # webdataset.tariterators.base_plus_ext

Bytes = bytes | bytearray | memoryview
T = TypeVar("T")


class TarError(DataError):
    """Tar bytes that cannot be trusted; `offset` is the byte of the header at fault."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(f"The tar is unusable at byte {offset}: {reason}")
        self.reason, self.offset = reason, offset


class Member(NamedTuple):
    name: str
    header: int  # first byte of its headers, PAX and GNU ones included
    start: int  # first byte of its content
    size: int


class Span(NamedTuple):
    """One sample: where it begins and which bytes belong to which extension."""

    key: str
    start: int
    fields: dict[str, tuple[int, int]]  # extension -> (start, size)

    def read(self, data: Bytes) -> dict[str, bytes]:
        view = memoryview(data)
        return {ext: bytes(view[start : start + size]) for ext, (start, size) in self.fields.items()}


def samples(data: Bytes, ended: bool = False, rule: int = RULE, passed: Counter[str] | None = None) -> Iterator[Span]:
    """The samples of a tar, or of a piece that begins and ends between samples, in order.

    With `ended`, the bytes must close with the end-of-archive mark; without it a cut between two members cannot be seen. `passed`
    counts by its kind what `rule` takes for no sample. Raises TarError.
    """
    key, start, fields = "", 0, dict[str, tuple[int, int]]()
    passed = Counter() if passed is None else passed
    for member in members(data, ended):
        if rule > 1 and is_dropping(member.name):
            passed["hidden files and what systems left"] += 1
            continue
        match = SAMPLE_NAME.fullmatch(member.name)
        base = member.name.rpartition("/")[2]
        if match is None or (base.startswith("__") and base.endswith("__")):
            passed["no extension"] += 1
            continue
        prefix, ext = match.group(1), match.group(2).lower()
        if fields and prefix != key:
            if _is_sample(fields, rule):
                yield Span(key, start, fields)
            else:
                passed.update(map(_kind, fields))
            fields = {}
        if not fields:
            key, start = prefix, member.header
        if ext in fields:
            raise TarError(f"the sample {prefix!r} has two members {ext!r}", member.header)
        fields[ext] = (member.start, member.size)
    if fields and _is_sample(fields, rule):
        yield Span(key, start, fields)
    else:
        passed.update(map(_kind, fields))


def _is_sample(fields: Mapping[str, object], rule: int) -> bool:
    """A .json is a sample's if something is there that may be its picture, of a kind that is not read too: that is said then."""
    if rule == 1 or not FIELDS.isdisjoint(fields):
        return True
    return "json" in fields and (rule == 2 or any(f".{ext.rpartition('.')[2]}" not in OTHERS for ext in fields))


def _kind(ext: str) -> str:
    return ".json without a picture" if ext == "json" else f".{ext}"[:20]


def counted(data: Bytes, count: int, ended: bool = False) -> list[Span]:
    """The samples of a tar or a piece that holds `count` by its manifest, which an earlier version may have made by its rule."""
    return at_least(count, lambda rule: samples(data, ended, rule))


def at_least(count: int, found: Callable[[int], Iterator[T]]) -> list[T]:
    """What is found by the first rule, of the latest to the earliest, that finds `count`."""
    every = list(found(RULE))
    for rule in range(RULE - 1, 0, -1):
        if len(every) >= count:
            break
        with contextlib.suppress(TarError):
            every = list(found(rule))
    return every


def members(data: Bytes, ended: bool = False) -> Iterator[Member]:
    """The regular files of a tar, in order. See `samples`."""
    view = memoryview(data)
    _refuse_compressed(view)
    at, first, long_name = 0, None, None
    while at < len(view):
        header = bytes(view[at : at + BLOCK])
        if len(header) < BLOCK:
            raise TarError("it is cut inside a header", at)
        if not any(header):
            if bytes(view[at:]).count(0) < len(view) - at:
                raise TarError("there is data after a zeroed header", at)
            if first is not None:
                raise TarError("it ends after a long-name header", at)
            return
        size, kind = _size(header, at), header[156:157]
        if size > (MAX_META if kind in b"xgLK" else MAX_MEMBER):
            raise TarError(f"a member of {size} bytes is over the cap", at)
        start = at + BLOCK
        if start + size > len(view):
            raise TarError("it is cut inside a member", at)
        following = start + -(-size // BLOCK) * BLOCK
        first = at if first is None else first
        if kind == b"x":
            long_name = _pax_name(bytes(view[start : start + size]), at) or long_name
        elif kind == b"L":
            long_name = _text(bytes(view[start : start + size]).rstrip(b"\0"), at)
        elif kind in (b"0", b"\0", b"7"):
            name = _safe(long_name or _name(header, at), at)
            if not name.endswith("/"):
                yield Member(name, first, start, size)
            first = long_name = None
        elif kind == b"5":
            first = long_name = None
        elif kind != b"g":  # global headers speak of time and comments; a path in one would name every member
            raise TarError(f"{_KINDS.get(kind, 'a member of unknown type')} is not allowed", at)
        at = following
    if ended or first is not None:
        raise TarError("it ends without its end-of-archive mark", len(view))


_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"K": "a link with a long name",
    b"S": "a sparse file",
}


def _refuse_compressed(view: memoryview) -> None:
    head = bytes(view[:8])
    if head.startswith(tuple(COMPRESSED)):
        name = next(name for magic, name in COMPRESSED.items() if head.startswith(magic))
        raise TarError(f"it is compressed with {name}; unpack it, since shards are read by range", 0)


def _size(header: bytes, at: int) -> int:
    """The size field, after the checksum of the whole header has been confirmed."""
    blank = header[:148] + b" " * 8 + header[156:]  # the checksum counts its own field as blanks
    # The low half of an Adler-32 is 1 plus the sum of the bytes, exact up to 256 of them, and ten times faster than sum().
    total = (zlib.adler32(blank[:256]) & 0xFFFF) + (zlib.adler32(blank[256:]) & 0xFFFF) - 2
    stated = _octal(header[148:156], at)
    if stated != total and stated != total - 256 * sum(byte > 127 for byte in blank):  # old tars sum signed bytes
        raise TarError("a header has a wrong checksum", at)
    field = header[124:136]
    if field[0] & 0x80:  # GNU: base 256; a negative one fails the cap
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else 2**63
    return _octal(field, at)


def _octal(field: bytes, at: int) -> int:
    digits = field.partition(b"\0")[0].strip(b" ")
    if not digits:
        return 0
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise TarError("a header holds no tar header", at)
    return int(digits, 8)


def _name(header: bytes, at: int) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name, at)


def _text(raw: bytes, at: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise TarError("a name is not UTF-8", at) from None


def _pax_name(records: bytes, at: int) -> str | None:
    """The path of a PAX header: records of the form 'LENGTH KEY=VALUE\\n'. Keys that change a member's bytes are refused."""
    name = None
    while records:
        digits, _, _ = records.partition(b" ")
        length = int(digits) if re.fullmatch(rb"[1-9][0-9]{0,5}", digits) else 0
        record, records = records[:length], records[length:]
        if not record.endswith(b"\n") or len(record) != length:
            raise TarError("a PAX header is malformed", at)
        keyword, mark, value = record[len(digits) + 1 : -1].partition(b"=")
        if not mark or keyword == b"size" or keyword.startswith(b"GNU.sparse"):
            raise TarError(f"a PAX header with {_text(keyword, at)!r} is not allowed", at)
        if keyword == b"path":
            name = _text(value, at)
    return name


def _safe(name: str, at: int) -> str:
    if not name or name.startswith("/") or "\0" in name or len(name) > 4096 or ".." in name.split("/"):
        raise TarError(f"the name {name[:80]!r} is not allowed", at)
    return name
