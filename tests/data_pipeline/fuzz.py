"""Coverage-guided fuzzing of what meets bytes from strangers: the tar walk and the decoders.

    python -m tests.data_pipeline.fuzz tar|image|picture|npy|latents|label CORPUS [libFuzzer's options]

Any exception but DataError, a hang, or memory over the cap ends it with an exit code that is not 0.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["freeguide.data_pipeline.tar", "freeguide.data_pipeline.decode"]):
    from freeguide.data_pipeline import decode, tar

import contextlib

from freeguide.configs.errors import DataError
from freeguide.data_pipeline.manifest import Schema

SCHEMA = Schema(8, 3, 10)
LATENTS = Schema(8, 4, 10, dtype="float16")


def walk(data: bytes) -> None:
    """Whatever the walk accepts lies inside the bytes, in order, and without overlap."""
    end = 0
    for span in tar.samples(data):
        for start, size in span.fields.values():
            assert span.start < start
            assert end <= start <= start + size <= len(data)
            end = start + size
        span.read(data)


def image(data: bytes) -> None:
    pixels = decode.decode_image(data, 3)
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.dtype == "uint8"
    assert decode.fit(pixels, 8).shape == (8, 8, 3)


def picture(data: bytes) -> None:
    assert decode.decode_picture(data, 3, 128).shape[2] == 3
    assert decode.decode_picture(data, 1).shape[2] == 1


def npy(data: bytes) -> None:
    assert decode.decode_sample({"npy": data, "cls": b"1"}, SCHEMA)[0].shape == (8, 8, 3)


def latents(data: bytes) -> None:
    values = decode.decode_latents(data, LATENTS)
    assert values.shape == (4, 8, 8)
    assert values.dtype == "float16"


def label(data: bytes) -> None:
    for ext in ("cls", "json"):
        with contextlib.suppress(DataError):
            assert 0 <= decode.decode_label({ext: data}, 10) < 10


TARGETS = {"tar": walk, "image": image, "picture": picture, "npy": npy, "latents": latents, "label": label}


def seeds(target: str) -> list[bytes]:
    """Valid inputs to start from."""
    import io
    import tarfile

    import numpy as np

    from tests.data_pipeline.tars import make_tar, pairs, png

    if target == "tar":
        formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
        return [make_tar([("x" * 120 + "/a.png", png(1)), *pairs(range(2))], format_, 0.5) for format_ in formats]
    found = []
    if target == "image":
        for codec in ("PNG", "JPEG", "WEBP"):
            decode.Image.fromarray(np.zeros((9, 7, 3), np.uint8)).save(out := io.BytesIO(), codec)
            found.append(out.getvalue())
        return found
    if target == "picture":
        exif = decode.Image.Exif()
        exif[274] = 6
        for codec in decode.PICTURE_CODECS:
            options = {"exif": exif} if codec not in ("GIF", "BMP") else {}
            decode.Image.fromarray(np.zeros((9, 7, 3), np.uint8)).save(out := io.BytesIO(), codec, **options)
            found.append(out.getvalue())
        for mode, codec in (("RGBA", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("1", "BMP")):
            decode.Image.new(mode, (7, 9)).save(out := io.BytesIO(), codec)
            found.append(out.getvalue())
        return found
    if target == "npy":
        np.save(out := io.BytesIO(), np.zeros((9, 8, 3), np.uint8))
        return [out.getvalue()]
    if target == "latents":
        return [decode.encode_npy(np.zeros((4, 8, 8), np.float16)), decode.encode_npy(np.full((4, 8, 8), np.nan, np.float32))]
    return [b"7", b'{"label": 3}', b'{"cls": [[1]]}']


def main() -> None:
    target, corpus = sys.argv.pop(1), Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(target)):
        (corpus / f"seed{number}").write_bytes(data)

    def one(data: bytes) -> None:
        with contextlib.suppress(DataError):
            TARGETS[target](data)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
