"""Tests of whole.py: files that were cut or changed are damaged, also if somebody closed them neatly; whole ones never are."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from freeguide.configs.errors import DataError
from freeguide.data_pipeline.decode import BadSample, decode_image, decode_picture, decode_sample
from freeguide.data_pipeline.index import index_shards
from freeguide.data_pipeline.manifest import Schema
from freeguide.data_pipeline.order import choose_order
from freeguide.data_pipeline.scan import scan
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import load_manifest
from freeguide.data_pipeline.stream import Reader
from freeguide.data_pipeline.whole import _markers
from tests.data_pipeline.conftest import data_config
from tests.data_pipeline.tars import make_tar, png

END = b"\xff\xd9"


def noise(wide: int, high: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Waves and noise, as a photograph compresses; never exactly mid-grey at the end."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:high, :wide]
    waves = [120 + 90 * np.sin(x / (7 + 3 * c) + y / (11 + seed % 5)) for c in range(4)]
    pixels = np.clip(np.stack(waves, -1) + random.normal(0, 15, (high, wide, 4)), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels, "CMYK") if mode == "CMYK" else Image.fromarray(pixels[..., :3]).convert(mode)


def jpeg(picture: Image.Image, **options: object) -> bytes:
    picture.save(out := io.BytesIO(), "JPEG", **options)
    return out.getvalue()


def thumbnail() -> bytes:
    """EXIF with a small JPEG in it, which has markers of its own."""
    exif = Image.Exif()
    exif[274] = 1
    return exif.tobytes() + jpeg(noise(16, 16))


def end_of(data: bytes) -> int:
    """Where the end marker of the first picture is."""
    return next(at for at, code in _markers(data, 0) if code == 0xD9)


def good_jpegs(count: int) -> Iterator[tuple[str, bytes]]:
    """Whole JPEGs of all the kinds that cameras, editors and web pages make."""
    random = np.random.default_rng(0)
    for seed in range(count):
        wide, high = random.integers(1, 90, 2).tolist()
        mode = str(random.choice(["RGB", "RGB", "L", "CMYK"]))
        picture = noise(wide, high, mode, seed)
        if seed % 11 == 0:  # exactly what libjpeg makes of missing blocks
            picture = Image.new(mode, (wide, high), 128 if mode == "L" else (128,) * len(picture.getbands()))
        options: dict[str, object] = {"quality": int(random.integers(1, 101))}
        options |= {"progressive": True} if random.random() < 0.4 else {}
        options |= {"optimize": True} if random.random() < 0.3 else {}
        options |= {"subsampling": int(random.integers(0, 3))} if mode == "RGB" else {}
        options |= {"restart_marker_blocks": int(random.integers(1, 9))} if random.random() < 0.2 else {}
        options |= {"exif": thumbnail()} if random.random() < 0.3 else {}
        options |= {"comment": b"not the end: " + END + b"\xff\xda"} if random.random() < 0.2 else {}
        data = jpeg(picture, **options)
        assert data.endswith(END)
        tail = [b"", b"\0" * 40, b"\r\n", jpeg(noise(9, 9)), b"SEFT" + bytes(range(256)), END, b"\xff\xd8\xff"][seed % 7]
        before = [b"", b"", b"\0\0\0", b"\xff\xff"][seed % 4]  # padding before the end marker
        yield f"{seed}: {wide}x{high} {mode} {options}", data[:-2] + before + END + tail
    frames = [noise(64, 48, seed=seed) for seed in range(2)]
    frames[0].save(out := io.BytesIO(), "MPO", save_all=True, append_images=frames[1:])
    yield "of a phone, two pictures", out.getvalue()
    yield "one scan per colour", in_three_scans()


def in_three_scans() -> bytes:
    """A JPEG whose colours come one after the other: three grey ones of the same tables, joined."""
    greys = [jpeg(noise(40, 40, "L", seed)) for seed in range(3)]
    markers = [{code: at for at, code in _markers(data, 0)} for data in greys]
    at = markers[0]
    frame = greys[0][at[0xC0] + 4 : at[0xC0] + 9] + b"\3\1\x11\0\2\x11\0\3\x11\0"
    data = greys[0][: at[0xC0]] + b"\xff\xc0" + struct.pack(">H", 2 + len(frame)) + frame + greys[0][at[0xC4] : at[0xDA]]
    for number, (grey, places) in enumerate(zip(greys, markers, strict=True), 1):
        start, end = places[0xDA], end_of(grey)
        data += b"\xff\xda\0\x08\1" + bytes([number]) + grey[start + 6 : end]
    return data + END


def by_pillow(data: bytes, channels: int = 3) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("L" if channels == 1 else "RGB"))


def test_whole_jpegs_of_every_kind_are_taken_as_pillow_reads_them() -> None:
    count = 0
    for name, data in good_jpegs(300):
        assert np.array_equal(decode_image(data, 3), by_pillow(data)), name
        count += 1
    assert count == 302


KINDS: dict[str, dict[str, object]] = {
    "baseline": {},
    "full colour": {"subsampling": 0},
    "optimized": {"optimize": True},
    "restarts": {"restart_marker_blocks": 5},
    "progressive": {"progressive": True},
    "with a thumbnail": {"exif": thumbnail()},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_that_was_cut_and_closed_is_damaged(kind: str, mode: str) -> None:
    """Pillow shows the rows that are missing in grey, and says nothing."""
    shown = 0
    for seed in range(4):
        data = jpeg(noise(97 + seed, 66, mode, seed), quality=[30, 75, 95, 100][seed], **KINDS[kind])
        end, begin = end_of(data), next(at for at, code in _markers(data, 0) if code == 0xDA) + 20
        for share in (0.02, 0.3, 0.5, 0.7, 0.9):
            cut = data[: begin + int((end - begin) * share)]
            for closed in (cut + END, cut + END + data[:300], cut + b"\0" * 5 + END):
                try:
                    by_pillow(closed)
                    shown, words = shown + 1, r"its JPEG (stops early|lacks scans): it was cut, and closed"
                except OSError:  # cut in the tables between two scans
                    words = "its JPEG|does not decode"
                for decode in (decode_image, decode_picture):
                    with pytest.raises(BadSample, match=words) as caught:
                        decode(closed, 3)
                    assert caught.value.cause == "image"
            with pytest.raises(BadSample):
                decode_image(cut, 3)
    assert shown > 50


def test_a_jpeg_of_several_scans_or_pictures_that_was_cut_is_damaged() -> None:
    data = in_three_scans()
    scans = [at for at, code in _markers(data, 0) if code == 0xDA]
    for cut in (scans[1], scans[2], scans[2] + 40, len(data) - 60):
        with pytest.raises(BadSample, match=r"stops early|lacks scans"):
            decode_image(data[:cut] + END, 3)
    noise(64, 48).save(out := io.BytesIO(), "MPO", save_all=True, append_images=[noise(64, 48, seed=1)])
    end = end_of(out.getvalue())
    with pytest.raises(BadSample, match="stops early"):
        decode_picture(out.getvalue()[: end // 2] + out.getvalue()[end:], 3)


def chunks(data: bytes) -> Iterator[tuple[int, int]]:
    """Start and size of the content of each IDAT of a PNG."""
    at = 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"IDAT":
            yield at + 8, size
        at += 12 + size


def stored_png(pixels: np.ndarray, pieces: int = 3) -> bytes:
    """A PNG without compression, in several pieces: a changed byte is a changed pixel, and all else stays.

    There is more in it than its rows, as with damage of lengths too: Pillow stops before it meets the checksum of the whole.
    """
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels) + bytes(200), 0)
    step = -(-len(packed) // pieces)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 0)
    parts = b"".join(chunk(b"IDAT", packed[at : at + step]) for at in range(0, len(packed), step))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + parts + chunk(b"IEND", b"")


def changed_png(number: int = 0, size: int = 32) -> bytes:
    """A PNG of noise with one pixel changed: Pillow shows it."""
    data = bytearray(stored_png(np.random.default_rng(number).integers(1, 256, (size, size, 3), dtype=np.uint8)))
    start, length = list(chunks(bytes(data)))[1]
    data[start + length // 2] ^= 0x40
    return bytes(data)


def test_a_png_whose_pixels_are_not_those_of_its_checksum_is_damaged() -> None:
    good = stored_png(np.random.default_rng(0).integers(1, 256, (32, 32, 3), dtype=np.uint8))
    assert np.array_equal(decode_image(good, 3), by_pillow(good))
    data = changed_png()
    assert (by_pillow(data) != by_pillow(good)).sum() == 1
    start, size = list(chunks(data))[1]
    for decode in (decode_image, decode_picture):
        with pytest.raises(BadSample, match=f"its PNG is damaged between the bytes {start} and {start + size}: their checksum"):
            decode(data, 3)
    fields = {"png": data, "cls": b"1"}
    with pytest.raises(BadSample, match="checksum"):
        decode_sample(fields, Schema(32, 3, 10))
    assert decode_sample(fields, Schema(32, 3, 10), strict=False)[1] == 1  # of bytes that a CRC covers already


@pytest.mark.parametrize("kind", ["png", "jpeg", "progressive"])
def test_damage_in_tars_of_others_is_found_by_whoever_reads_them(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    """By `index` in the first sample of a tar, by `scan` and the reader everywhere."""
    if kind == "png":
        ext, bad = "png", changed_png(1, 32)
    else:
        ext, bad = "jpg", jpeg(noise(96, 96), progressive=kind == "progressive")
        bad = bad[: len(bad) * 3 // 4] + END
    members = [member for n in range(20) for member in ((f"{n}.cls", b"1"), (f"{n}.png", png(n, 32)))]
    place = str(tmp_path_factory.mktemp("tars"))
    store = open_store(place)
    store.put("a.tar", make_tar([("x.cls", b"1"), (f"x.{ext}", bad), *members]))
    with pytest.raises(DataError, match=r"the first sample is unusable, its (PNG|JPEG)"):
        index_shards(store, Schema(32, 3, 10))
    store.put("a.tar", make_tar([*members, ("x.cls", b"1"), (f"x.{ext}", bad)]))
    index_shards(store, Schema(32, 3, 10))
    manifest = load_manifest(store)
    with pytest.raises(DataError, match=r"sample 21 cannot be read: its (PNG|JPEG)"):
        list(scan(store, manifest))
    order = choose_order(manifest, 7, seed=0)
    place_of = {"global_batch": 7, "rank": 0, "world_size": 1, "start_step": 0}
    with Reader(store, manifest, order, **place_of, data=data_config(decode_threads=0, bad_samples=0.1)) as reader:
        for _ in range(3):
            next(reader)
        assert reader.stats()["bad_samples"] == {"image": 1}


@pytest.mark.parametrize("codec", ["WEBP", "lossless WEBP", "GIF", "BMP", "TIFF", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_pictures_of_other_kinds_that_were_cut_are_damaged(codec: str) -> None:
    format_, options = {"lossless WEBP": ("WEBP", {"lossless": True})}.get(codec, (codec, {}))
    format_, options = ("TIFF", {"compression": codec}) if codec.islower() else (format_, options)
    noise(64, 64).save(out := io.BytesIO(), format_, **options)
    data = out.getvalue()
    decode_picture(data, 3)
    for share in (0.4, 0.7, 0.9):
        cut = data[: int(len(data) * share) & ~1]
        if format_ == "WEBP":  # with lengths that fit
            cut = b"RIFF" + struct.pack("<I", len(cut) - 8) + data[8:16] + struct.pack("<I", len(cut) - 20) + cut[20:]
        for damaged in (cut, cut + b"\0;" if format_ == "GIF" else cut):
            with pytest.raises(BadSample):
                decode_picture(damaged, 3)


def test_a_jpeg_in_a_tiff_that_was_cut_is_damaged() -> None:
    noise(64, 64).save(out := io.BytesIO(), "TIFF", compression="jpeg")
    data = bytearray(out.getvalue())
    assert np.array_equal(decode_picture(bytes(data), 3), by_pillow(bytes(data)))
    with Image.open(io.BytesIO(data)) as image:
        (start,), (size,) = image.tag_v2[273], image.tag_v2[279]  # type: ignore[attr-defined]
    data[start + size // 2 : start + size // 2 + 2] = END
    by_pillow(bytes(data))  # it is content
    with pytest.raises(BadSample, match="its JPEG stops early"):
        decode_picture(bytes(data), 3)
