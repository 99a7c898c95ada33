"""Tests of decode.py: honest images come out right, hostile ones come out as BadSample with a cause."""

import io
import json
import math
import pickle
import resource
import struct
import tracemalloc
import zlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.decode import MAX_PIXELS, BadSample, decode_image, decode_label, decode_sample, encode_png, fit
from data_pipeline.manifest import Schema

SCHEMA = Schema(8, 3, 10)
IMAGE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def encoded(format_: str, image: np.ndarray = IMAGE, mode: str | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    picture = Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(out, format_, **options)  # type: ignore[arg-type]
    return out.getvalue()


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def cause(fields: dict[str, bytes], schema: Schema = SCHEMA) -> str:
    with pytest.raises(BadSample) as caught:
        decode_sample(fields, schema)
    return caught.value.cause


@pytest.mark.parametrize("ext", ["png", "webp", "npy"])
def test_lossless_codecs_give_the_pixels_back(ext: str) -> None:
    data = {"png": encode_png(IMAGE), "webp": encoded("WEBP", lossless=True), "npy": npy(IMAGE)}[ext]
    image, label = decode_sample({ext: data, "cls": b"7"}, SCHEMA)
    assert np.array_equal(image, IMAGE)
    assert label == 7


def test_jpeg_gives_what_pillow_gives() -> None:
    data = encoded("JPEG")
    assert np.array_equal(decode_sample({"jpg": data, "cls": b"1"}, SCHEMA)[0], np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_become_rgb_or_grey(mode: str) -> None:
    data = encoded("TIFF" if mode == "CMYK" else "PNG", mode=mode) if mode != "CMYK" else encoded("JPEG", mode=mode)
    assert decode_image(data, 3).shape == (8, 8, 3)
    assert decode_image(data, 1).shape == (8, 8, 1)
    assert np.array_equal(decode_image(data, 3), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("fields", [{"cls": b"3"}, {"cls": b" 3\n"}, {"json": b'{"label": 3}'}, {"json": b'{"cls": 3, "x": [1]}'}])
def test_labels(fields: dict[str, bytes]) -> None:
    assert decode_label(fields, 10) == 3


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"cls": b""},
        {"cls": b"-1"}, {"cls": b"10"}, {"cls": b"3.0"}, {"cls": b"9" * 5000}, {"cls": b"1" * 10**6}, {"cls": "٣".encode()},
        {"json": b"{}"}, {"json": b"[3]"}, {"json": b'{"label": "3"}'}, {"json": b'{"label": true}'}, {"json": b'{"label": 1e0}'},
        {"json": b"[" * 60_000}, {"json": b'{"label": ' + b"9" * 5000 + b"}"}, {"json": b"\xff"}, {"json": b" " * 10**6},
    ],
)  # fmt: skip
def test_bad_labels(fields: dict[str, bytes]) -> None:
    with pytest.raises(BadSample) as caught:
        decode_label(fields, 10)
    assert caught.value.cause == "label"
    assert len(str(caught.value)) < 200


def test_a_sample_needs_exactly_one_image() -> None:
    assert cause({"cls": b"1"}) == "fields"
    assert cause({"cls": b"1", "png": encode_png(IMAGE), "jpg": encoded("JPEG")}) == "fields"


@pytest.mark.parametrize("format_", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_codecs_are_refused_whatever_the_name_says(format_: str) -> None:
    assert cause({"png": encoded(format_), "cls": b"1"}) == "codec"


def test_more_than_8_bits_are_refused_rather_than_clipped() -> None:
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    assert cause({"png": encoded("PNG", deep), "cls": b"1"}) == "codec"


class Trap:
    """Unpickling it would be noticed."""

    sprung = False

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return spring, ()


def spring() -> Trap:
    Trap.sprung = True
    return Trap()


def test_pickles_are_never_loaded() -> None:
    """As members of their own, as an npy of objects, and under the name of an image."""
    evil = pickle.dumps(Trap())
    assert decode_sample({"png": encode_png(IMAGE), "cls": b"1", "pyd": evil, "pkl": evil, "pth": evil}, SCHEMA)[1] == 1
    assert cause({"npy": npy(np.array([Trap()], dtype=object)), "cls": b"1"}) == "codec"
    assert cause({"npy": evil, "cls": b"1"}) == "image"
    assert cause({"png": evil, "cls": b"1"}) == "codec"
    assert cause({"png": encode_png(IMAGE), "cls": evil}) == "label"
    assert not Trap.sprung


@pytest.mark.parametrize(
    "array",
    [IMAGE.astype(np.float32), IMAGE[..., :1], IMAGE[0], np.asfortranarray(IMAGE), IMAGE[:0], np.zeros((8, 8, 3, 1), np.uint8)],
)
def test_npy_of_another_kind(array: np.ndarray) -> None:
    assert cause({"npy": npy(array), "cls": b"1"}) == "codec"


def test_npy_cut_or_with_a_hostile_header() -> None:
    good = npy(IMAGE)
    assert cause({"npy": good[:-1], "cls": b"1"}) == "size"
    assert cause({"npy": good + b"x", "cls": b"1"}) == "size"
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 60000) + b"(" * 60000
    assert cause({"npy": header, "cls": b"1"}) == "codec"
    huge = good.replace(b"(8, 8, 3)", b"(99999999, 99999999, 3)")
    assert cause({"npy": huge, "cls": b"1"}) in ("codec", "image")


def png_of(width: int, height: int, data: bytes) -> bytes:
    """A grey PNG with any header and any compressed data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_bombs_are_refused_before_their_pixels_exist() -> None:
    """A 100 000 x 100 000 image in a few bytes, and one whose data unpack to far more than its header says."""
    tracemalloc.start()
    assert cause({"png": png_of(100_000, 100_000, zlib.compress(bytes(10**6))), "cls": b"1"}) == "size"
    assert cause({"png": png_of(60_000_000, 1, zlib.compress(bytes(10**6))), "cls": b"1"}) in ("size", "image")
    decode_image(png_of(8, 8, zlib.compress(bytes(50 * 10**6))), 1)  # Pillow stops at the last row
    assert tracemalloc.get_traced_memory()[1] < 100 * 10**6
    tracemalloc.stop()


def test_long_thin_images_do_not_grow_without_bound() -> None:
    with pytest.raises(BadSample, match="too long and thin"):
        fit(np.zeros((1, 2_000_000, 3), np.uint8), 64)


def test_cut_images_are_bad_not_half_grey() -> None:
    for data in (encode_png(IMAGE), encoded("JPEG", np.tile(IMAGE, (8, 8, 1))), encoded("WEBP", np.tile(IMAGE, (8, 8, 1)))):
        assert cause({"png": data[: len(data) * 2 // 3], "cls": b"1"}) in ("image", "codec")


def test_images_of_another_size_are_fitted() -> None:
    wide = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)
    assert np.array_equal(decode_sample({"png": encode_png(wide), "cls": b"1"}, SCHEMA)[0], fit(wide, 8))


def outcome(fields: dict[str, bytes]) -> str:
    """The cause of failure, or "good" with an image and a label as the schema says. Any other exception escapes."""
    try:
        image, label = decode_sample(fields, SCHEMA)
    except BadSample as error:
        return error.cause
    assert (image.shape, image.dtype) == ((8, 8, 3), np.uint8)
    assert 0 <= label < 10
    return "good"


DAMAGED = st.sampled_from(["png", "jpg", "webp", "npy"]), st.binary(max_size=200), st.integers(0, 400), st.binary(max_size=8)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(*DAMAGED)
def test_damaged_images_never_crash(ext: str, noise: bytes, at: int, patch: bytes) -> None:
    good = {"png": encode_png(IMAGE), "jpg": encoded("JPEG"), "webp": encoded("WEBP"), "npy": npy(IMAGE)}[ext]
    for data in (noise, good[:at], good[:at] + patch + good[at + len(patch) :], good[:at] + patch + good[at:]):
        assert outcome({ext: data, "cls": b"1"}) in ("good", "codec", "size", "image")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
OBJECTS = st.dictionaries(st.sampled_from(["label", "cls", "x"]), SCALARS | st.lists(SCALARS, max_size=3), max_size=3)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=100) | st.integers(-5, 99).map(lambda n: str(n).encode()) | OBJECTS.map(lambda o: json.dumps(o).encode()))
def test_strange_labels_never_crash(raw: bytes) -> None:
    for ext in ("cls", "json"):
        assert outcome({"png": encode_png(IMAGE), ext: raw}) in ("good", "label")


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, database=None)
@given(*DAMAGED)
def test_damaged_images_never_crash_at_length(ext: str, noise: bytes, at: int, patch: bytes) -> None:
    """Memory too: a damaged header may claim up to MAX_PIXELS, which Pillow holds twice with 4 bytes each and NumPy once with 3."""
    test_damaged_images_never_crash.hypothesis.inner_test(ext, noise, at, patch)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - MEMORY) * 1024 < 12 * MAX_PIXELS


MEMORY = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def covered(image: np.ndarray, size: int) -> list[list[Fraction]]:
    """The mean of what each new pixel covers of a grey square, from its definition, without rounding."""
    side = len(image)

    def shares(i: int) -> dict[int, Fraction]:
        first, end = Fraction(i * side, size), Fraction((i + 1) * side, size)
        return {j: (min(end, j + 1) - max(first, j)) / (end - first) for j in range(int(first), math.ceil(end))}

    every = [shares(i) for i in range(size)]
    return [[sum(a * b * int(image[j, k]) for j, a in rows.items() for k, b in cols.items()) for cols in every] for rows in every]


@pytest.mark.parametrize(("wide", "high", "size"), [(500, 375, 64), (110, 110, 64), (28, 28, 12), (24, 40, 8), (9, 7, 12)])
def test_area_is_the_mean_of_what_a_pixel_covers_at_any_ratio(wide: int, high: int, size: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (high, wide, 3), dtype=np.uint8)
    side = min(high, wide)
    top, left = (high - side) // 2, (wide - side) // 2
    found = fit(image, size, "area")
    for c in (0, 2):
        means = covered(image[top : top + side, left : left + side, c], size)
        assert found[..., c].tolist() == [[round(mean) for mean in row] for row in means]  # halves to even, both


@pytest.mark.parametrize(("side", "size"), [(48, 8), (128, 64), (28, 14)])
def test_box_is_area_where_a_pixel_covers_whole_ones(side: int, size: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (side, side, 1), dtype=np.uint8)
    assert np.array_equal(fit(image, size, "box"), fit(image, size, "area"))
    assert not np.array_equal(fit(image, size + 3, "box"), fit(image, size + 3, "area"))


def test_the_mean_of_the_largest_white_image_is_white() -> None:
    assert (fit(np.full((8000, 8000, 1), 255, np.uint8), 7, "area") == 255).all()
