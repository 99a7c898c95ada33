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

from freeguide.data_pipeline.decode import (
    MAX_PIXELS,
    BadSample,
    decode_image,
    decode_label,
    decode_picture,
    decode_sample,
    encode_png,
    fit,
    seen_otherwise,
)
from freeguide.data_pipeline.manifest import Schema

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


def png16(colour: int) -> bytes:
    """An 8 x 8 PNG of 16 bits per channel whose values are those of 12 bits: cut to 8 they would be nearly black."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    row = b"\0" + (np.arange(8 * channels, dtype=">u2") * 100).tobytes()
    return png_of(8, 8, zlib.compress(row * 8), 16, colour)


@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_16_bits_per_channel_are_refused_in_every_colour(colour: int) -> None:
    for decode in (decode_image, decode_picture):
        with pytest.raises(BadSample, match="more than 8 bits per channel") as caught:
            decode(png16(colour), 3)
        assert caught.value.cause == "codec"


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
@pytest.mark.parametrize("interlaced", [False, True])
def test_a_png_that_stops_early_is_damaged_and_a_black_one_is_not(mode: str, interlaced: bool) -> None:
    """10 of 64 rows, in a whole compressed stream with right checksums: Pillow shows the others as black."""
    colour, bits = {"L": (0, 8), "RGB": (2, 8), "RGBA": (6, 8), "P": (3, 8), "1": (0, 1)}[mode]
    wide = -(-64 * bits * {0: 1, 2: 3, 3: 1, 6: 4}[colour] // 8)
    passes = [(8, 8), (8, 8), (16, 8), (16, 16), (32, 16), (32, 32), (64, 32)]  # width and height of each of an interlaced one
    rows = [bytes(1 + -(-w * wide // 64)) for w, h in passes for _ in range(h)] if interlaced else [bytes(1 + wide)] * 64
    black, short = (png_of(64, 64, zlib.compress(b"".join(some)), bits, colour, interlaced) for some in (rows, rows[:10]))
    grey = png_of(64, 64, zlib.compress(b"".join(b"\0" + b"\1" * (len(row) - 1) for row in rows[:-1])), bits, colour, interlaced)
    for decode in (decode_image, decode_picture):
        assert decode(black, 3).shape == (64, 64, 3)
        for damaged in (short, grey):
            with pytest.raises(BadSample, match="its PNG stops after") as caught:
                decode(damaged, 3)
            assert caught.value.cause == "image"


SEEN = np.zeros((40, 24, 3), np.uint8)  # upright: red above blue, and a green corner at the upper left
SEEN[:20, :, 0], SEEN[20:, :, 2], SEEN[:8, :8] = 255, 255, (0, 255, 0)


def stored(orientation: int) -> np.ndarray:
    """What a camera stores of SEEN with this tag: row 0 and column 0 of it are the sides that the EXIF standard names."""
    if orientation >= 5:
        return np.swapaxes(stored({5: 1, 6: 2, 7: 3, 8: 4}[orientation]), 0, 1)
    return SEEN[:: -1 if orientation in (3, 4) else 1, :: -1 if orientation in (2, 3) else 1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("codec", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_upright_whatever_the_camera_stored(codec: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(codec, np.ascontiguousarray(stored(orientation)), exif=exif)
    shown = decode_picture(data, 3).astype(int)
    assert shown.shape == SEEN.shape
    assert np.abs(shown - SEEN).mean() < 12  # JPEG and WebP blur the edges
    if codec != "TIFF":
        assert seen_otherwise(data) == (orientation != 1)
        assert decode_image(data, 3).shape[:2] == stored(orientation).shape[:2]  # shards keep the pixels that they have


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # pytest has filters of its own
def test_damaged_exif_costs_no_picture() -> None:
    assert np.array_equal(decode_picture(encoded("PNG", exif=b"Exif\0\0MM\0*garbage"), 3), IMAGE)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB+tRNS", "L+tRNS", "GIF", "WEBP", "TIFF"])
def test_what_is_transparent_is_laid_on_the_background(mode: str) -> None:
    """Colours that nobody sees, under alpha 0, do not come through."""
    hidden = np.random.default_rng(0).integers(0, 250, (8, 8), dtype=np.uint8)
    hidden[:4] = 251
    alpha = np.where(hidden == 251, 255, 0).astype(np.uint8)
    if mode == "RGBA" or mode in ("WEBP", "TIFF"):
        codec, options = mode.replace("RGBA", "PNG"), {"lossless": True, "exact": True} if mode == "WEBP" else {}
        data = encoded(codec, np.dstack([hidden] * 3 + [alpha]), **options)
    elif mode == "LA":
        data = encoded("PNG", np.dstack([hidden, alpha]))
    elif mode in ("P", "GIF"):
        picture = Image.fromarray(np.where(alpha > 0, 1, 2).astype(np.uint8)).convert("P")
        picture.putpalette([0, 0, 0, 251, 251, 251, 9, 99, 199])
        picture.save(out := io.BytesIO(), "PNG" if mode == "P" else "GIF", transparency=2)
        data = out.getvalue()
    else:
        flat = np.where(alpha > 0, 251, 9).astype(np.uint8)
        channels = np.dstack([flat] * 3) if mode == "RGB+tRNS" else flat
        data = encoded("PNG", channels, transparency=(9, 9, 9) if mode == "RGB+tRNS" else 9)
    for background in (255, 128, 0):
        for channels in (1, 3):
            expected = np.broadcast_to(np.where(alpha > 0, 251, background)[..., None], (8, 8, channels))
            assert np.array_equal(decode_picture(data, channels, background), expected)
    assert mode in ("GIF", "TIFF") or seen_otherwise(data)


def test_half_transparent_pixels_are_mixed() -> None:
    pixel = np.full((8, 8, 4), (100, 0, 200, 51), np.uint8)  # a fifth of it
    assert decode_picture(encoded("PNG", pixel), 3)[0, 0].tolist() == [224, 204, 244]


def test_cmyk_is_read_as_it_is_printed() -> None:
    """Of Adobe's JPEG, which is stored inverted, of one that does not say that it is Adobe's, and of TIFF: no ink is white."""
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[4:, :, 3] = 255
    picture = Image.fromarray(ink, "CMYK")
    picture.save(jpeg := io.BytesIO(), "JPEG", quality=100)
    picture.save(tiff := io.BytesIO(), "TIFF")
    adobe = jpeg.getvalue()
    at = adobe.index(b"Adobe") - 4
    plain = Image.fromarray(255 - ink, "CMYK")
    plain.save(other := io.BytesIO(), "JPEG", quality=100)
    bare = other.getvalue()[:at] + other.getvalue()[at + 16 :]
    for data in (adobe, bare, tiff.getvalue()):
        shown = decode_picture(data, 3).astype(int)
        assert np.abs(shown[:3] - 255).max() < 6
        assert shown[5:].max() < 6


def test_of_several_frames_or_pages_the_first_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for codec in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):
        frames[0].save(out := io.BytesIO(), codec, save_all=True, append_images=frames[1:])
        assert np.abs(decode_picture(out.getvalue(), 3)[4, 4].astype(int) - (255, 0, 0)).max() < 6, codec


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
@pytest.mark.parametrize("codec", ["PNG", "GIF", "BMP", "TIFF"])
def test_pictures_of_few_colours(codec: str, mode: str) -> None:
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, 4:] = 255
    assert np.array_equal(decode_picture(encoded(codec, half, mode=mode), 3), half)


def test_progressive_jpeg_and_plain_pictures_keep_their_pixels() -> None:
    """Where nothing is turned or transparent, a person sees what is stored, to the bit."""
    noise = np.random.default_rng(0).integers(0, 256, (33, 20, 3), dtype=np.uint8)
    for data in (
        encode_png(noise),
        encoded("JPEG", noise, progressive=True),
        encoded("WEBP", noise),
        encoded("PNG", noise, mode="P"),
    ):
        for channels in (1, 3):
            assert np.array_equal(decode_picture(data, channels), decode_image(data, channels))
        assert not seen_otherwise(data)


@pytest.mark.parametrize("codec", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_that_was_cut_is_damaged(codec: str) -> None:
    data = encoded(codec, np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(BadSample):
            decode_picture(data[: int(len(data) * share)], 3)


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


def png_of(width: int, height: int, data: bytes, bits: int = 8, colour: int = 0, interlaced: bool = False) -> bytes:
    """A PNG with any header and any compressed data; one with a palette has the first two greys."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    palette = chunk(b"PLTE", bytes([0, 0, 0, 1, 1, 1])) if colour == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + chunk(b"IDAT", data) + chunk(b"IEND", b"")


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
    test_damaged_images_never_crash.hypothesis.inner_test(ext, noise, at, patch)  # type: ignore[attr-defined]
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
