"""Tests of tar.py: every honest dialect reads as Python's tarfile reads it, and nothing else gets through."""

import gzip
import io
import sys
import tarfile

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from freeguide.data_pipeline import tar
from freeguide.data_pipeline.tar import TarError
from tests.data_pipeline.tars import make_tar, pairs, patch_header, special_tar

GOOD = make_tar(pairs(range(4)))


def read(data: bytes, ended: bool = True) -> list[tuple[str, dict[str, bytes]]]:
    return [(span.key, span.read(data)) for span in tar.samples(data, ended)]


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1.5])
@pytest.mark.parametrize("folder", ["", "a/b/", "x" * 90 + "/" + "y" * 80 + "/", "ü/"])
def test_members_are_those_of_tarfile(format_: int, mtime: float, folder: str) -> None:
    if format_ == tarfile.USTAR_FORMAT and mtime:
        mtime = 1
    written = [(folder + name, data) for name, data in pairs(range(3))]
    data = make_tar(written, format_, mtime)
    assert [(member.name, data[member.start : member.start + member.size]) for member in tar.members(data, ended=True)] == written
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        theirs = [(info.name, info.offset, info.offset_data, info.size) for info in archive]
    ours = [(member.name, member.header, member.start, member.size) for member in tar.members(data)]
    assert ours == theirs


def test_samples_group_as_webdataset_groups(tmp_path: object) -> None:
    members = [
        ("a/x.cls", b"1"), ("a/x.png", b"2"), ("a/x.seg.png", b"3"), ("b/x.cls", b"4"),
        ("noextension", b"5"), ("b/x.PNG", b"6"), ("__meta__.json/__q__", b"8"), (".hidden", b"7"), ("c.cls", b"9"),
    ]  # fmt: skip
    data = make_tar(members)
    stream = webdataset.tariterators.tar_file_iterator(io.BytesIO(data))
    theirs = [
        (sample["__key__"], {ext: value for ext, value in sample.items() if not ext.startswith("__")})
        for sample in webdataset.tariterators.group_by_keys({**member, "__url__": ""} for member in stream)
    ]
    assert read(data) == theirs
    assert [key for key, _ in theirs] == ["a/x", "b/x", "c"]


def test_folders_and_global_headers_are_passed_over() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "git"}) as archive:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in pairs(range(2)):
            info = tarfile.TarInfo(f"a/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert [key for key, _ in read(out.getvalue())] == ["a/000000", "a/000001"]


def headers(data: bytes) -> list[tar.Member]:
    return list(tar.members(data))


MEMBER = headers(GOOD)[2]  # the first member of the second sample
HOSTILE = {
    "cut in a header": (GOOD[: MEMBER.header + 100], "cut inside a header"),
    "cut in a payload": (GOOD[: headers(GOOD)[3].start + 20], "cut inside a member"),
    "cut between members": (GOOD[: headers(GOOD)[3].header], "without its end-of-archive mark"),
    "cut between samples": (GOOD[: MEMBER.header], "without its end-of-archive mark"),
    "zeroed header": (GOOD[: MEMBER.header] + bytes(512) + GOOD[MEMBER.header + 512 :], "data after a zeroed header"),
    "flipped bit in a header": (GOOD[: MEMBER.header] + b"\x31" + GOOD[MEMBER.header + 1 :], "wrong checksum"),
    "noise for a header": (GOOD[: MEMBER.header] + bytes(range(256)) * 2 + GOOD[MEMBER.header + 512 :], "no tar header"),
    "hard link": (special_tar(tarfile.LNKTYPE), "a hard link"),
    "symbolic link": (special_tar(tarfile.SYMTYPE), "a symbolic link"),
    "link with a long name": (special_tar(tarfile.SYMTYPE, link="l" * 200), "a link with a long name"),
    "character device": (special_tar(tarfile.CHRTYPE), "a device"),
    "block device": (special_tar(tarfile.BLKTYPE), "a device"),
    "pipe": (special_tar(tarfile.FIFOTYPE), "a pipe"),
    "sparse file": (special_tar(tarfile.GNUTYPE_SPARSE), "a sparse file"),
    "unknown type": (patch_header(GOOD, MEMBER.header, slice(156, 157), b"Z"), "unknown type"),
    "absolute name": (make_tar([("/etc/passwd.png", b"1")]), "not allowed"),
    "name that climbs": (make_tar([("a/../../b.png", b"1")]), "not allowed"),
    "name with two dots inside": (make_tar([("a/..", b"1")]), "not allowed"),
    "huge member": (patch_header(GOOD, MEMBER.header, slice(124, 136), b"77777777777\0"), "over the cap"),
    "huge member in base 256": (patch_header(GOOD, MEMBER.header, slice(124, 136), b"\x80" + b"\xff" * 11), "over the cap"),
    "negative size": (patch_header(GOOD, MEMBER.header, slice(124, 136), b"\xff" * 12), "over the cap"),
    "size that is no number": (patch_header(GOOD, MEMBER.header, slice(124, 136), b"12x45678901\0"), "no tar header"),
    "gzip": (gzip.compress(GOOD), "compressed with gzip"),
    "zstd": (b"\x28\xb5\x2f\xfd" + GOOD, "compressed with zstd"),
    "extension twice": (make_tar([("a.png", b"1"), ("a.cls", b"2"), ("a.png", b"3")]), "two members 'png'"),
    "name that is not UTF-8": (patch_header(GOOD, MEMBER.header, slice(0, 2), b"\xff\xfe"), "not UTF-8"),
    "long name and nothing after": (make_tar([("n" * 200 + ".png", b"1")], tarfile.GNU_FORMAT)[:1024] + bytes(1024), "long-name"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_cannot_be_trusted_is_refused_with_its_place(case: str) -> None:
    data, reason = HOSTILE[case]
    with pytest.raises(TarError, match=reason) as caught:
        read(data)
    assert 0 <= caught.value.offset <= len(data)


@pytest.mark.parametrize("record", ["size=5", "GNU.sparse.major=1", "GNU.sparse.name=x"])
def test_pax_headers_that_change_the_bytes_of_a_member_are_refused(record: str) -> None:
    line = f"{len(record) + 4:d} {record}\n".encode()
    assert len(line) == len(record) + 4
    data = make_tar([("header", line), *pairs([0])])
    with pytest.raises(TarError, match="not allowed"):
        read(patch_header(data, 0, slice(156, 157), b"x"))


@pytest.mark.parametrize("line", [b"9 path=", b"99 path=a\n", b"0 path=a\n", b"path=a\n", b"-9 path=a\n", b"10 path=ab", b"5 \n  "])
def test_malformed_pax_headers_are_refused(line: bytes) -> None:
    data = make_tar([("header", line), *pairs([0])])
    with pytest.raises(TarError, match="PAX"):
        read(patch_header(data, 0, slice(156, 157), b"x"))


def test_a_long_end_is_walked_at_once() -> None:
    """The walk of 2 MiB of zeros, 4 096 blocks, runs no more lines of Python than that of two blocks."""

    def lines(data: bytes) -> int:
        count = 0

        def trace(*_: object) -> object:
            nonlocal count
            count += 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            assert len(read(data)) == 4
        finally:
            sys.settrace(before)
        return count

    assert lines(GOOD + bytes(2 * 2**20)) == lines(GOOD)


def check(data: bytes) -> None:
    """Either samples inside the bytes, or a TarError: never another exception, never a place outside."""
    spans = tar.samples(data)
    while True:
        try:
            span = next(spans, None)
        except TarError as error:
            place = error.offset
            break
        if span is None:
            return
        assert all(0 <= start <= start + size <= len(data) for start, size in span.fields.values())
    assert 0 <= place <= len(data)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=4096))
def test_random_bytes_never_crash_the_walk(data: bytes) -> None:
    check(data)


# One kind of damage: where it is (a share of the length), what it does, the bytes it brings, how much it takes.
Damage = tuple[float, str, bytes, int]
DAMAGE = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["set", "cut", "double", "header"]),
    st.binary(min_size=1, max_size=12),
    st.integers(1, 600),
)


NAMES = st.sampled_from(["a", "n" * 80 + "/" + "m" * 80, "ü"])
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
DAMAGES = st.lists(DAMAGE, min_size=1, max_size=6)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(NAMES, FORMATS, DAMAGES)
def test_damaged_tars_never_crash_the_walk(name: str, format_: int, damages: list[Damage]) -> None:
    """Bytes overwritten, cut out or doubled anywhere, checksums mended or not, in tars of all three dialects."""
    members = [(f"{name}{i}.{ext}", b"12345" * i) for i in range(3) for ext in ("cls", "png")]
    data = make_tar(members, format_, 1.5 if format_ == tarfile.PAX_FORMAT else 0)
    for place, kind, value, length in damages:
        at = int(place * len(data))
        if kind == "set":
            data = data[:at] + value + data[at + len(value) :]
        elif kind == "cut":
            data = data[:at] + data[at + length :]
        elif kind == "double":
            data = data[: at + 512] + data[at:]
        elif len(data) >= 512:
            block, field = min(at, len(data) - 512) // 512 * 512, [0, 124, 156, 345][length % 4]
            data = patch_header(data, block, slice(field, field + len(value)), value)
    check(data)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, database=None)
@given(NAMES, FORMATS, DAMAGES)
def test_damaged_tars_never_crash_the_walk_at_length(name: str, format_: int, damages: list[Damage]) -> None:
    test_damaged_tars_never_crash_the_walk.hypothesis.inner_test(name, format_, damages)  # type: ignore[attr-defined]
