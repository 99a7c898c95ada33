"""From the bytes of a sample to pixels or latents and a label, safely: they may come from strangers.

Codecs are an allow-list (PNG, JPEG, WebP, npy without pickle); the file's own header decides, and its pixels are counted before
they are decoded. Samples of shards are decoded as they are stored (`decode_image`), what people have as a person sees it
(`decode_picture`). Raw latents are npy only, and are taken as they are: nothing could resize or convert them truthfully. Labels are
a number in `.cls`, or the key "label" (or "cls") of a JSON object. Whatever does not fit raises BadSample with a cause from a
small set, so that a reader can count it and put a donor in its place.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageFile, UnidentifiedImageError

from freeguide.configs.errors import DataError, visible
from freeguide.data_pipeline import whole
from freeguide.data_pipeline.manifest import Schema

IMAGE_FIELDS = ("png", "jpg", "jpeg", "webp", "npy")
CODECS = ("PNG", "JPEG", "WEBP")  # of shards; a camera's MPO is a JPEG
PICTURE_CODECS = (*CODECS, "GIF", "BMP", "TIFF")  # of sources
WHITE = 255
MAX_BYTES = 32 * 2**20  # encoded bytes of one image
MAX_PICTURE_BYTES = 256 * 2**20  # of one file of a source: scanners do not compress
MAX_PIXELS = 64 * 10**6
MAX_LABEL_BYTES = 64 * 2**10
ANY_LABEL = 2**31  # classes, if nobody knows how many there are

NPY_HEADER = re.compile(
    rb"\{'descr': '(\|u1|<f2|<f4)', 'fortran_order': False, 'shape': \((\d{1,8}), (\d{1,8}), (\d{1,8})\), \} *\n"
)
NPY_TYPES = {b"|u1": "uint8", b"<f2": "float16", b"<f4": "float32"}

Pixels = npt.NDArray[np.uint8]
Latents = npt.NDArray[np.floating]
Values = npt.NDArray[Any]  # of a sample: Pixels or Latents

# Our own cap is below Pillow's, and follows its warning; a filter set per call would not be safe in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of damaged metadata, which pictures can do without


class BadSample(DataError):
    """A sample that cannot be used; `cause` is one of: fields, codec, size, image, label."""

    def __init__(self, cause: str, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause


def decode_sample(
    fields: Mapping[str, bytes], schema: Schema, resize: str = "adm", background: int | None = None, strict: bool = True
) -> tuple[Values, int]:
    """The image, uint8 (H, W, C), or the latents, float (C, H, W), as the schema says, and the label.

    An image of another size is fitted, see `fit`; with a `background` it is read as a person sees it. Where the schema speaks of
    latents, images beside them are passed over. Without `strict` it is not searched for damage that takes long to find, see
    `whole.load`: for bytes that have been checked already.
    """
    wanted = IMAGE_FIELDS if schema.dtype == "uint8" else ("npy",)
    present = [ext for ext in wanted if ext in fields]
    if len(present) != 1:
        raise BadSample("fields", f"it needs one of {', '.join(wanted)}, and has {', '.join(sorted(fields)) or 'none'}")
    data = fields[present[0]]
    label = decode_label(fields, schema.classes, schema.label_key, schema.class_names)
    if schema.dtype != "uint8":
        return decode_latents(data, schema), label
    if present[0] == "npy":
        image = _decode_npy(data, schema.channels)
    elif background is None:
        image = decode_image(data, schema.channels, strict)
    else:
        image = decode_picture(data, schema.channels, background)
    return fit(image, schema.image_size, resize), label


def decode_latents(data: bytes, schema: Schema) -> Latents:
    """An npy of exactly the schema's dtype and shape (C, H, W), all of it finite."""
    latents = _load_npy(data)
    if latents.dtype != schema.dtype or latents.shape != schema.shape:
        raise BadSample("codec", f"its npy is {latents.dtype} {latents.shape}, not {schema.dtype} {schema.shape}")
    if not np.isfinite(latents).all():
        raise BadSample("image", "its latents are not finite")
    return latents


def decode_image(data: bytes, channels: int, strict: bool = True) -> Pixels:
    """PNG, JPEG or WebP bytes as uint8 (H, W, channels), at the size they have. As they are stored: alpha and EXIF do not count."""
    with _opened(data, CODECS, MAX_BYTES, strict) as image:
        return _pixels(image, channels)


def decode_picture(data: bytes, channels: int, background: int = WHITE) -> Pixels:
    """A file of a camera, a scanner or a web page as a person sees it, uint8 (H, W, channels), at the size it then has.

    Of animations and of files with several pages the first. EXIF's orientation is applied, what is transparent is laid on the grey
    value `background`, palettes and CMYK become RGB. Colour profiles do not count: numbers stay as they are stored.
    """
    with _opened(data, PICTURE_CODECS, MAX_PICTURE_BYTES) as image:
        turn = TURNS.get(_orientation(image))
        shown: Image.Image = image
        if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
            shown = ImageChops.invert(image)  # Pillow takes every such file for one of Adobe's, which are stored inverted
        if shown.has_transparency_data:
            shown = shown.convert("RGBA")
            shown = Image.alpha_composite(Image.new("RGBA", shown.size, (background, background, background, 255)), shown)
        return _pixels(shown if turn is None else shown.transpose(turn), channels)


# How to turn what is stored into what was seen, by EXIF's tag 274. (TIFF's own tag of that number is Pillow's business.)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(274, 1))
    except Exception:  # whatever else damaged EXIF raises: viewers show such a picture as it is stored
        return 1


def seen_otherwise(data: bytes | memoryview) -> bool:
    """Whether a person sees another picture than `decode_image` gives: one that is turned, or transparent somewhere."""
    try:
        with Image.open(io.BytesIO(data), formats=CODECS) as image:
            return image.has_transparency_data or _orientation(image) in TURNS
    except Exception:  # it is not a picture at all, which decoding it says better
        return False


@contextlib.contextmanager
def _opened(data: bytes, codecs: tuple[str, ...], most: int, strict: bool = True) -> Iterator[ImageFile.ImageFile]:
    """The image of these bytes, of which only the header has been read. Whatever goes wrong with it raises BadSample."""
    if len(data) > most:
        raise BadSample("size", f"its image has {len(data)} bytes, over the cap of {most}")
    try:
        with Image.open(io.BytesIO(data), formats=codecs) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSample("size", f"its image has {image.width} x {image.height} pixels, over the cap of {MAX_PIXELS}")
            if image.mode.startswith(("I", "F")) or any(map(_is_deep, image.tile)):
                raise BadSample("codec", f"its image has more than 8 bits per channel (mode {image.mode}); convert it to 8")
            whole.load(image, data, strict)
            yield image
    except UnidentifiedImageError as error:
        raise BadSample("codec", f"its image is neither {_listed(codecs)}{_what_it_is(data)}") from error
    except Image.DecompressionBombError as error:
        raise BadSample("size", "its image is a decompression bomb") from error
    except BadSample:
        raise
    except whole.Damaged as error:
        raise BadSample("image", str(error)) from error
    except Exception as error:  # decoders meet hostile bytes with many kinds of error, SyntaxError among them
        raise BadSample("image", f"its image does not decode ({type(error).__name__}: {error})") from error


def _is_deep(tile: Any) -> bool:
    """Whether Pillow would cut this tile from 16 bits per channel to 8. (16 bits per pixel of a BMP are 5 or 6 per channel.)"""
    packed = tile[3][0] if isinstance(tile[3], tuple) and tile[3] else tile[3]
    return isinstance(packed, str) and ";16" in packed and not packed.startswith("BGR")


def _listed(codecs: Sequence[str]) -> str:
    names = ["WebP" if codec == "WEBP" else codec for codec in codecs]
    return f"{', '.join(names[:-1])} nor {names[-1]}"


# What stands where an image should: the first bytes, and what to call them.
NO_IMAGES: tuple[tuple[bytes, str], ...] = (
    (rb"\Z", "it is empty"),
    (rb"version https://git-lfs", "it is a pointer of Git LFS; fetch the file"),
    (rb"(?is)\s*(<!--.*?-->\s*)?<(!doctype html|html|head|body)", "it is a web page"),
    (rb"(?is)\s*(<\?xml.*?\?>\s*)?(<!--.*?-->\s*)?(<!doctype svg.*?>\s*)?<svg", "it is SVG; draw it as PNG"),
    (rb"(?s)....ftyp(hei[cxms]|he[vi][cms]|mif1|msf1)", "it is HEIC; convert it"),
    (rb"(?s)....ftypavi[fs]", "it is AVIF; convert it"),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "it is JPEG 2000; convert it"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "it is JPEG XL; convert it"),
    (rb"8BPS", "it is a Photoshop file; convert it"),
)


def _what_it_is(data: bytes) -> str:
    found = next((words for start, words in NO_IMAGES if re.match(start, data[:1024])), "")
    return f": {found}" if found else ""


def _pixels(image: Image.Image, channels: int) -> Pixels:
    mode = "L" if channels == 1 else "RGB"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))  # converting would copy those that fit
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


def decode_label(fields: Mapping[str, bytes], classes: int, key: str = "", names: tuple[str, ...] = ()) -> int:
    """The label of a sample: the number in `.cls`, or of the key "label" (or "cls") of `.json`.

    A `key` names another member (`txt`), or another key of the JSON object (`a.b` is b inside a). With it, what stands there may
    also be one of `names`, whose place is the number.
    """
    member = key if key in fields else "json" if key not in ("", "label") or "cls" not in fields else "cls"
    raw = fields.get(member)
    if raw is None:
        raise BadSample("label", "it has no label (.cls or .json)" if not key else f"it has no label ({key} or .json)")
    if len(raw) > MAX_LABEL_BYTES:
        raise BadSample("label", f"its label has {len(raw)} bytes")
    label: object
    if member == "json":
        label = _json_label(raw, key)
    elif re.fullmatch(rb"\s*[0-9]{1,9}\s*", raw):
        label = int(raw)
    else:
        label = raw[:200].decode("utf-8", "backslashreplace").strip()
    return number_of(label, classes, names if key else (), raw)


def number_of(label: object, classes: int, names: tuple[str, ...], raw: object = None) -> int:
    """The number of a class, by its number or, if there are names, by its name. Raises BadSample, which quotes it (or `raw`)."""
    if names:
        place = _places(names).get(str(label))
        if place is None and (type(label) is not int or any(map(str.isdigit, names))):
            raise BadSample("label", f"its label {_quoted(label if raw is None else raw)} is none of data.class_names")
        label = label if place is None else place
    if type(label) is not int or not 0 <= label < classes:
        hint = "; list the names of the classes in data.class_names" if isinstance(label, str) and not names else ""
        most = f" to {classes - 1}" if classes < ANY_LABEL else ""
        raise BadSample("label", f"its label {_quoted(label)} is not a number from 0{most}{hint}")
    return label


def _json_label(raw: bytes, key: str) -> object:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadSample("label", "its JSON cannot be read") from error
    if not isinstance(content, dict):
        raise BadSample("label", "its JSON is no object with a label")
    found: object = content
    for part in [key] if key in content else (key or "label").split("."):
        found = found.get(part) if isinstance(found, dict) else None
    found = content.get("cls") if found is None and key in ("", "label") else found
    if found is None:
        keys = ", ".join(map(_quoted, list(content)[:8])) or "no keys"
        raise BadSample("label", f"its JSON has no {key or 'label'!r}, but {keys[:120]}; name the key with data.label_key")
    return found


@functools.lru_cache(maxsize=8)
def _places(names: tuple[str, ...]) -> dict[str, int]:
    return {name: place for place, name in enumerate(names)}


def _quoted(label: object) -> str:
    text = label.decode("utf-8", "backslashreplace").strip() if isinstance(label, bytes) else label
    return visible(repr(text)[:40])


# What the identity of a source calls each way to resize. Data sets that were prepared with `area` when it was Pillow's box filter
# are found again as `box`.
RECORDED = {"adm": "adm", "area": "coverage", "box": "area"}


def fit(image: Pixels, size: int, resize: str = "adm") -> Pixels:
    """uint8 (H, W, C) brought to (size, size, C).

    adm: halve by box while the short side is at least twice `size`, then bicubic, then the centre. area: the centre square, of
    which each new pixel is the mean of what it covers, parts of pixels by their part. box: Pillow's box filter on that square,
    which takes whole pixels only, so it is `area` if the side is a multiple of `size`.
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
