"""From the bytes of a sample to pixels or latents and a label, safely: they may come from strangers.

Codecs are an allow-list (PNG, JPEG, WebP, npy without pickle); the file's own header decides, and its pixels are counted before
they are decoded. Raw latents are npy only, and are taken as they are: nothing could resize or convert them truthfully. Labels are
a number in `.cls`, or the key "label" (or "cls") of a JSON object. Whatever does not fit raises BadSample with a cause from a
small set, so that a reader can count it and put a donor in its place.
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from configs.errors import DataError
from data_pipeline.manifest import Schema

IMAGE_FIELDS = ("png", "jpg", "jpeg", "webp", "npy")
MAX_BYTES = 32 * 2**20  # encoded bytes of one image
MAX_PIXELS = 64 * 10**6
MAX_LABEL_BYTES = 64 * 2**10

NPY_HEADER = re.compile(
    rb"\{'descr': '(\|u1|<f2|<f4)', 'fortran_order': False, 'shape': \((\d{1,8}), (\d{1,8}), (\d{1,8})\), \} *\n"
)
NPY_TYPES = {b"|u1": "uint8", b"<f2": "float16", b"<f4": "float32"}

Pixels = npt.NDArray[np.uint8]
Latents = npt.NDArray[np.floating]
Values = npt.NDArray[Any]  # of a sample: Pixels or Latents

# Our own cap is below Pillow's, and follows its warning; a filter set per call would not be safe in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadSample(DataError):
    """A sample that cannot be used; `cause` is one of: fields, codec, size, image, label."""

    def __init__(self, cause: str, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause


def decode_sample(fields: Mapping[str, bytes], schema: Schema, resize: str = "adm") -> tuple[Values, int]:
    """The image, uint8 (H, W, C), or the latents, float (C, H, W), as the schema says, and the label.

    An image of another size is fitted, see `fit`. Where the schema speaks of latents, images beside them are passed over.
    """
    wanted = IMAGE_FIELDS if schema.dtype == "uint8" else ("npy",)
    present = [ext for ext in wanted if ext in fields]
    if len(present) != 1:
        raise BadSample("fields", f"it needs one of {', '.join(wanted)}, and has {', '.join(sorted(fields)) or 'none'}")
    data = fields[present[0]]
    label = decode_label(fields, schema.classes)
    if schema.dtype != "uint8":
        return decode_latents(data, schema), label
    image = _decode_npy(data, schema.channels) if present[0] == "npy" else decode_image(data, schema.channels)
    return fit(image, schema.image_size, resize), label


def decode_latents(data: bytes, schema: Schema) -> Latents:
    """An npy of exactly the schema's dtype and shape (C, H, W), all of it finite."""
    latents = _load_npy(data)
    if latents.dtype != schema.dtype or latents.shape != schema.shape:
        raise BadSample("codec", f"its npy is {latents.dtype} {latents.shape}, not {schema.dtype} {schema.shape}")
    if not np.isfinite(latents).all():
        raise BadSample("image", "its latents are not finite")
    return latents


def decode_image(data: bytes, channels: int) -> Pixels:
    """PNG, JPEG or WebP bytes as uint8 (H, W, channels), at the size they have."""
    if len(data) > MAX_BYTES:
        raise BadSample("size", f"its image has {len(data)} bytes, over the cap of {MAX_BYTES}")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSample("size", f"its image has {image.width} x {image.height} pixels, over the cap of {MAX_PIXELS}")
            if image.mode.startswith(("I", "F")):
                raise BadSample("codec", f"its image has more than 8 bits per channel (mode {image.mode})")
            mode = "L" if channels == 1 else "RGB"
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))  # converting would copy those that fit
    except UnidentifiedImageError as error:
        raise BadSample("codec", "its image is neither PNG, JPEG nor WebP") from error
    except Image.DecompressionBombError as error:
        raise BadSample("size", "its image is a decompression bomb") from error
    except BadSample:
        raise
    except Exception as error:  # decoders meet hostile bytes with many kinds of error, SyntaxError among them
        raise BadSample("image", f"its image does not decode ({type(error).__name__}: {error})") from error
    return pixels[..., None] if channels == 1 else pixels


def _decode_npy(data: bytes, channels: int) -> Pixels:
    image = _load_npy(data)
    if image.dtype != np.uint8 or image.shape[2] != channels:
        raise BadSample("codec", f"its npy is {image.dtype} {image.shape}, not uint8 (height, width, {channels})")
    return image


def _load_npy(data: bytes) -> npt.NDArray[Any]:
    """Exactly what `np.save` writes for three axes of uint8, float16 or float32: its header is matched, never evaluated."""
    start = 10 + int.from_bytes(data[8:10], "little")
    if not data.startswith(b"\x93NUMPY\x01\x00") or len(data) < start:
        raise BadSample("image", "its npy header cannot be read")
    header = NPY_HEADER.fullmatch(data[10:start])
    shape = tuple(map(int, header.groups()[1:])) if header else (0,)
    if header is None or min(shape) < 1:
        raise BadSample("codec", "its npy is not uint8, float16 or float32 with three axes in C order")
    dtype = np.dtype(NPY_TYPES[header.group(1)])
    if len(data) > MAX_BYTES or len(data) - start != math.prod(shape) * dtype.itemsize:
        raise BadSample("size", f"its npy of shape {shape} has {len(data)} bytes")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def decode_label(fields: Mapping[str, bytes], classes: int) -> int:
    raw = fields.get("cls", fields.get("json"))
    if raw is None:
        raise BadSample("label", "it has no label (.cls or .json)")
    if len(raw) > MAX_LABEL_BYTES:
        raise BadSample("label", f"its label has {len(raw)} bytes")
    label: object = None
    if "cls" in fields:
        label = int(raw) if re.fullmatch(rb"\s*[0-9]{1,9}\s*", raw) else None
    else:
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BadSample("label", "its JSON cannot be read") from error
        if isinstance(content, dict):
            label = content.get("label", content.get("cls"))
    if type(label) is not int or not 0 <= label < classes:
        raise BadSample("label", f"its label {str(label)[:40]} is not a number from 0 to {classes - 1}")
    return label


# What the identity of a source calls each way to resize. Data sets that were prepared with `area` when it was Pillow's box filter
# are found again as `box`.
RECORDED = {"adm": "adm", "area": "coverage", "box": "area"}


def fit(image: Pixels, size: int, resize: str = "adm") -> Pixels:
    """uint8 (H, W, C) brought to (size, size, C).

    adm: halve by box while the short side is at least twice `size`, then bicubic, then the centre. area: the centre square, of
    which each new pixel is the mean of what it covers, parts of pixels by their part. box: Pillow's box filter on that square,
    which takes whole pixels only, so it is `area` where the side is a multiple of `size`.
    """
    if image.shape[:2] == (size, size):
        return image
    if resize == "area":
        return _area(_square(image), size)
    if resize == "box":
        return _box(_square(image), size)
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    wide = (round(picture.width * scale), round(picture.height * scale))
    if wide[0] * wide[1] > MAX_PIXELS:
        raise BadSample("size", f"its image of {image.shape[1]} x {image.shape[0]} pixels is too long and thin")
    pixels = np.asarray(picture.resize(wide, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size].reshape(size, size, image.shape[2])


def _square(image: Pixels) -> Pixels:
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


def _area(square: Pixels, size: int) -> Pixels:
    side = len(square)
    # In units in which an old pixel is `size` wide and a new one `side`, every overlap is a whole number, and so is every sum: of
    # a column at most 255 side, which float32 holds exactly for every image of MAX_PIXELS.
    new, old = np.arange(size)[:, None] * side, np.arange(side)[None, :] * size
    overlap = np.clip(np.minimum(new + side, old + size) - np.maximum(new, old), 0, None).astype(np.float32)
    columns = (overlap @ square[..., c].astype(np.float32) for c in range(square.shape[2]))
    totals = np.stack([column.astype(np.float64) @ overlap.T.astype(np.float64) for column in columns], axis=-1)
    return np.rint(totals / side**2).astype(np.uint8)


def _box(square: Pixels, size: int) -> Pixels:
    planes = square.astype(np.float32)  # in whole numbers Pillow would round once per axis
    resized = [Image.fromarray(planes[..., c]).resize((size, size), Image.Resampling.BOX) for c in range(square.shape[2])]
    return np.rint(np.stack([np.asarray(plane) for plane in resized], axis=-1)).astype(np.uint8)


def encode_npy(latents: Latents) -> bytes:
    """float16 or float32 (C, H, W) as npy."""
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(latents, latents.dtype.newbyteorder("<")), allow_pickle=False)
    return out.getvalue()


def encode_png(image: Pixels) -> bytes:
    """uint8 (H, W, 1) or (H, W, 3) as PNG."""
    out = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(out, "PNG")
    return out.getvalue()
