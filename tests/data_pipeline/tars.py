"""Tars that strangers make: well-formed ones of every dialect, and hostile ones."""

import io
import tarfile
from collections.abc import Iterable

import numpy as np

from freeguide.data_pipeline.decode import encode_png


def png(number: int, size: int = 8) -> bytes:
    """A noise image that carries its number in its first two pixels, as conftest.noise_source writes it."""
    image = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    image[0, 0, 0], image[0, 1, 0] = number // 256, number % 256
    return encode_png(image)


def pairs(numbers: Iterable[int]) -> list[tuple[str, bytes]]:
    """The members of samples: NUMBER.cls and NUMBER.png."""
    return [member for n in numbers for member in ((f"{n:06d}.cls", str(n % 10).encode()), (f"{n:06d}.png", png(n)))]


def make_tar(members: Iterable[tuple[str, bytes]], format_: int = tarfile.USTAR_FORMAT, mtime: float = 0) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format_) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime  # type: ignore[assignment]
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def special_tar(kind: bytes, name: str = "000001.png", link: str = "/etc/passwd") -> bytes:
    """A tar with one member of the given type between two good samples."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for number in (0, 2):
            for member, data in pairs([number]):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            if number == 0:
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, link
                archive.addfile(info)
    return out.getvalue()


def patch_header(data: bytes, at: int, field: slice, value: bytes) -> bytes:
    """Overwrites a field of the header at byte `at` and mends its checksum: damage that a checksum does not show."""
    header = bytearray(data[at : at + 512])
    header[field] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]
