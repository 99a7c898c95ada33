"""Whether the file of an image is whole: what decoders are content with, and a person calls damaged.

Pillow and the libraries below it show what there is, and grey or black for the rest. A JPEG that was cut and closed with an end
marker is found by leaving the marker out: then libjpeg makes nothing up, and asks for more.
"""

from __future__ import annotations

import bisect
import io
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFile

SOI, EOI, SOS = 0xD8, 0xD9, 0xDA
FRAMES = {0xC0, 0xC1, 0xC2}  # Huffman coded; libjpeg reads arithmetic codes only where they end
PROGRESSIVE = 0xC2
ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
IS_MARKER = np.ones(256, bool)  # after 0xFF: all but a byte of data, a restart, padding
IS_MARKER[[0x00, *range(0xD0, 0xD8), 0xFF]] = False
AHEAD = b"\xff\0" * 8  # libjpeg reads 64 bits ahead; ones, as they mean next to nothing in any code
# Of each pass of an interlaced PNG: the first column and row, and the steps to the next ones.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


class Damaged(Exception):
    """Bytes of pixels are missing or changed."""


def load(image: ImageFile.ImageFile, data: bytes, strict: bool) -> None:
    """Decodes the pixels of an image that was opened from `data`. Raises Damaged, or what Pillow raises.

    Damage of the last block or two of a JPEG cannot be seen, nor that of a WebP whose length is right. Without `strict` only what
    is seen at once is found: the checksums of a PNG's pixels and the scans of a progressive JPEG take 3 % of decoding it and more.
    """
    if image.format not in ("JPEG", "MPO"):
        image.load()
        if image.format == "PNG":
            _check_png(image, data, strict)
        elif image.format == "TIFF":
            _check_tiff(image, data)
    elif _in_several_scans(image, data):
        if strict:
            _load_jpeg(image, data)
        else:
            image.load()
    else:
        image.load()
        if _ends_grey(image):
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as again:
                _load_jpeg(again, data)


def _in_several_scans(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether a JPEG's last block says nothing of the others. Its header has been read, with that of the first scan."""
    if "progressive" in image.info or image.format == "MPO" or image.fp is None:
        return True
    parts = len(image.getbands())
    at = image.fp.tell() - 8 - 2 * parts  # where the header of a scan of all of them begins
    return data[at : at + 5] != bytes([0xFF, SOS, 0, 6 + 2 * parts, parts])


def _ends_grey(image: Image.Image) -> bool:
    """Whether the last block may be missing: then libjpeg makes its brightness 128, and mixes its colours with its neighbours."""
    if image.mode not in ("L", "RGB"):
        return True
    right, low = image.width - 1, image.height - 1
    for corner in ((right, low), (right & ~7, low), (right, low & ~7), (right & ~7, low & ~7)):  # nearly always one is enough
        value = image.getpixel(corner)
        grey = 0.299 * value[0] + 0.587 * value[1] + 0.114 * value[2] if isinstance(value, tuple) else value or 0.0
        if not 127 <= grey < 129.5:
            return False
    return True


def _load_jpeg(image: ImageFile.ImageFile, data: bytes) -> None:
    """Decodes without the end marker. Raises Damaged if a scan is missing or one stops early."""
    codec, extents, start, arguments = image.tile[0]
    end, scans = _scans(data, start)
    if end is None:
        image.load()  # there is no end, or the code is of a kind that libjpeg does not read so
        return
    decoder = Image._getdecoder(image.mode, codec, arguments, image.decoderconfig)
    try:
        image.load_prepare()
        decoder.setimage(image.im, extents)
        rest = data[start:end] + AHEAD
        used, error = decoder.decode(rest)
        if used >= 0 and scans > 1:  # nothing is shown before the end marker, and after the last scan any byte is skipped
            rest = rest[used:] + b"\0"
            used, error = decoder.decode(rest)
            if used == len(rest):
                used, error = decoder.decode(bytes([0xFF, EOI]))
    finally:
        decoder.cleanup()
    if used >= 0:
        raise Damaged("its JPEG stops early: it was cut, and closed afterwards")
    if error < 0:
        raise OSError("broken data stream")
    image.tile = []


def _scans(data: bytes, start: int) -> tuple[int | None, int]:
    """Where the end marker of the JPEG at `start` is (None if it cannot be told), and how many scans stand before it.

    Raises Damaged if scans are missing.
    """
    names = b""  # of its components
    lacking: list[int] = []  # of each component the coefficients, as bits, of which not every bit has been seen
    progressive, scans = False, 0
    for at, code in _markers(data, start):
        if code == EOI:
            if any(lacking):
                raise Damaged("its JPEG lacks scans: it was cut, and closed afterwards")
            return at, scans
        if code == SOS:
            body = data[at + 4 : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
            first, last, bits = body[-3:] if progressive else (0, 63, 0)
            scans += 1
            if bits & 15 == 0:
                for name in body[1:-3:2]:
                    lacking[names.index(name)] &= ~((1 << last + 1) - (1 << first))
        elif 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            if code not in FRAMES or names:
                break
            progressive = code == PROGRESSIVE
            names = data[at + 10 : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") : 3]
            lacking = [2**64 - 1] * len(names)
    return None, 0


def _markers(data: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Place and code of each marker of the JPEG at `start`, up to its end; those of thumbnails inside it are not its own."""
    values = np.frombuffer(data, np.uint8)
    candidates = np.flatnonzero(values[:-1] == 0xFF)
    places = candidates[IS_MARKER[values[candidates + 1]]].tolist()
    at, found = start, 0
    while (found := bisect.bisect_left(places, at, found)) < len(places):
        at = places[found]
        code = data[at + 1]
        yield at, code
        if code == EOI:
            return
        at += 2 if code in ALONE else 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def _check_png(image: Image.Image, data: bytes, strict: bool) -> None:
    """Raises Damaged for a PNG whose pixels are not those of its checksums, or whose rows end early.

    Pillow is content if the compressed stream ends anywhere. Rows that are not there are zero, so the bytes are counted only if the
    last row is zero, or rows come in several passes.
    """
    interlaced = data[28] == 1
    last = image.crop((0, image.height - 1, image.width, image.height))
    counting = interlaced or not np.asarray(last).any()
    if not (counting or strict):
        return
    bits = data[24] * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[data[25]]
    whole = 0
    for left, top, right, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        wide, high = -(-(image.width - left) // right), -(-(image.height - top) // down)
        whole += high * (1 + -(-wide * bits // 8)) if wide > 0 else 0
    view, at, found, unpacker = memoryview(data), 8, 0, zlib.decompressobj()
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 8 + size
        if kind == b"IDAT":
            if strict and zlib.crc32(view[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
                raise Damaged(f"its PNG is damaged between the bytes {at + 8} and {end}: their checksum is another")
            piece: bytes | memoryview = view[at + 8 : end] if counting else b""
            while piece and found < whole:
                found += len(unpacker.decompress(piece, 2**20))
                piece = unpacker.unconsumed_tail
        elif kind == b"IEND":
            break
        at = end + 4
    if counting and found < whole:
        raise Damaged(f"its PNG stops after {found} of {whole} bytes of pixels")


def _check_tiff(image: ImageFile.ImageFile, data: bytes) -> None:
    """Raises Damaged for a TIFF with JPEGs inside, one of which was cut."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(259) != 7:
        return
    tables = tags.get(347, b"")[:-2]  # without its end marker
    starts, sizes = (tags.get(strips, tags.get(tiles, ())) for strips, tiles in ((273, 324), (279, 325)))
    for start, size in zip(starts, sizes, strict=True):
        strip = data[start : start + size]
        strip = tables + strip[2:] if tables else strip
        with Image.open(io.BytesIO(strip), formats=("JPEG",)) as inside:
            _load_jpeg(inside, strip)
