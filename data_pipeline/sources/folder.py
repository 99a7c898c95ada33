"""Folders on this machine: pictures in class folders, or raw latents."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from freeguide.configs.errors import DataError
from freeguide.configs.schema import DataConfig
from freeguide.data_pipeline.decode import (
    MAX_PICTURE_BYTES,
    RECORDED,
    WHITE,
    BadSample,
    Pixels,
    Values,
    decode_latents,
    decode_picture,
    fit,
)
from freeguide.data_pipeline.manifest import Schema
from freeguide.data_pipeline.pictures import PICTURES, RAW, File, Found, count_of, find, listed, named
from freeguide.data_pipeline.shards import Sample, Source
from freeguide.data_pipeline.sources.labels import check_classes, read_class_names
from freeguide.data_pipeline.sources.shuffle import shuffled

LATENTS = {".npy"}


def open_folder(data: DataConfig) -> Source:
    """Pictures below the class folders of data.path, as a person sees them (see `decode_picture`), brought to data.image_size.

    The folders data.class_depth levels down are the classes, numbered 0, 1, ... by their sorted names or as in data.class_names.
    With class_depth=0, or if there are no class folders, all are of one class. With another dtype than uint8: latents, `.npy`,
    taken as they are. Raises DataError if the folder, its class folders or their files are missing, or are not data.classes in
    number.
    """
    root, raw = Path(data.path), data.dtype == "uint8"
    found, count = _found(data, read_class_names(data))
    digest = hashlib.sha256()
    for file in found.files:
        digest.update(os.fsencode(f"{file.path}\0{file.bytes}\0"))
    if not raw:  # latents that were made anew have the names and sizes of the old ones
        for file in found.files[:: max(1, len(found.files) // 64)]:
            digest.update((root / file.path).read_bytes())
    schema = Schema(data.image_size, data.channels, count, found.classes, data.dtype)

    def decoded(file: File) -> Values:
        if not raw:
            return decode_latents((root / file.path).read_bytes(), schema)
        return fit(picture(file, (root / file.path).read_bytes, data.channels, data.background), data.image_size, data.resize)

    def read(item: int) -> Sample:
        file = found.files[item]
        try:
            return Sample(decoded(file), file.label)
        except BadSample as error:
            raise BadSample(error.cause, f"{named(root / file.path)}: {error}") from error
        except OSError as error:
            raise BadSample("image", f"{named(root / file.path)}: {error.strerror}") from error

    old = f"folder {RECORDED[data.resize]} {digest.hexdigest()}"
    seen = f"pictures {RECORDED[data.resize]} {digest.hexdigest()}" + (f" on {data.background}" if data.background != WHITE else "")
    # Earlier versions took these files only, as they are stored: if there are no others, theirs is the same folder.
    formerly = old if raw and all(_taken_before(file.path) for file in found.files) else ""
    return Source(
        schema, len(found.files), shuffled(read, len(found.files)), seen if raw else old, found.passed_over, formerly=formerly
    )


def _found(data: DataConfig, class_names: Sequence[str]) -> tuple[Found, int]:
    """The files of a folder, and how many classes they have. Raises DataError if they are not those of a data set."""
    path, raw = data.path, data.dtype == "uint8"
    root, where = Path(path), named(path)
    if not path or not root.is_dir():
        what = "is on a store" if "://" in str(path) else "is a file" if root.exists() else "does not exist"
        raise DataError(f"The image folder {where!r} {what}; set data.path to a folder of class folders on this machine")
    found = find(root, PICTURES if raw else LATENTS, data.class_depth, class_names)
    if not found.files:
        over = f" (passed over: {count_of(found.passed_over)})" if found.passed_over else ""
        kind = "images" if raw else "latents (.npy)"
        if not found.folders:
            raise DataError(f"{where} has no class folders and no {kind}{over}; put those of each class into {where}/CLASS/")
        raise DataError(f"The class folders of {where} hold no {kind}{over}; check data.path")
    count = 1 if found.flat else len(found.classes) + len(found.empty)
    check_classes(f"{where} has {count} class folders" if found.classes else f"{where} has no classes", count, data.classes)
    if found.empty:
        raise DataError(
            f"{where} has class folders without images: {listed(found.empty)}; put some there, or move the folders away"
        )
    return found, count


def picture(file: File, read: Callable[[], bytes], channels: int, background: int = WHITE) -> Pixels:
    """The picture of a file as a person sees it, uint8 (H, W, channels). Raises BadSample, before `read` if the name says it."""
    if file.bytes > MAX_PICTURE_BYTES:
        raise BadSample("size", f"it has {file.bytes} bytes, over the cap of {MAX_PICTURE_BYTES}")
    if file.path.lower().endswith(tuple(RAW)):
        raise BadSample("codec", "it is a camera's raw file; develop it to JPEG or PNG")
    return decode_picture(read(), channels, background)


def _taken_before(path: str) -> bool:
    return path.count("/") == 1 and path.lower().endswith((".png", ".jpg", ".jpeg", ".webp"))
