"""IDX files: MNIST, Fashion-MNIST, EMNIST and their like."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from freeguide.configs.errors import ConfigError, DataError
from freeguide.configs.schema import DataConfig
from freeguide.data_pipeline.decode import Pixels, fit
from freeguide.data_pipeline.manifest import Schema
from freeguide.data_pipeline.shards import Source
from freeguide.data_pipeline.sources.labels import numbered, read_class_names
from freeguide.data_pipeline.sources.shuffle import from_arrays


def open_idx(data: DataConfig, split: str = "train") -> Source:
    """IDX files as of MNIST and Fashion-MNIST, `SPLIT-images-idx3-ubyte` and `SPLIT-labels-idx1-ubyte` in a folder, gz or not.

    Larger images are brought down to data.image_size by area (each new pixel is the mean of what it covers). data.class_names lists
    the classes in their order: "1", "2", ... for labels that begin at 1. Raises ConfigError for another number of channels than 1,
    DataError if the files or their labels do not fit.
    """
    if data.channels != 1:
        raise ConfigError("data.source=idx is grey; set data.channels=1")
    path, size, names = data.path, data.image_size, read_class_names(data)
    images = _read_idx(Path(path), f"{split}-images", 3)
    labels = _read_idx(Path(path), f"{split}-labels", 1)
    if len(images) != len(labels) or images.shape[1] != images.shape[2] or len(images) == 0:
        raise DataError(f"{path} holds images {images.shape} and labels {labels.shape}, which do not fit; check data.path")
    if size > images.shape[1]:
        raise DataError(f"The images of {path} are {images.shape[1]} pixels wide; set data.image_size to that or less")
    if size < images.shape[1]:
        images = np.stack([fit(image[..., None], size, "area")[..., 0] for image in images])
    numbers, count = numbered(labels.tolist(), path, data.classes, names)
    return from_arrays(images[..., None], numbers, Schema(size, 1, count, names))


def _read_idx(folder: Path, name: str, dimensions: int) -> Pixels:
    """An IDX file of unsigned bytes: 0, 0, 8, the number of dimensions, their sizes as big-endian uint32, the values."""
    for file in (folder / f"{name}-idx{dimensions}-ubyte{suffix}" for suffix in ("", ".gz")):
        if file.is_file():
            break
    else:
        raise DataError(f"{folder} has no {name}-idx{dimensions}-ubyte or .gz; check data.path")
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            magic = stream.read(4)
            shape = [int.from_bytes(stream.read(4), "big") for _ in range(dimensions)]
            count = int(np.prod(shape, dtype=object))
            if magic != bytes([0, 0, 8, dimensions]) or count > 2**33:
                raise ValueError("its header is not that of an IDX file of bytes")
            values = stream.read(count + 1)  # one more than stated: a longer file is another file
            if len(values) != count:
                raise ValueError(f"it should hold {count} values")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{file} cannot be read ({error}); download it again") from error
    return np.frombuffer(values, np.uint8).reshape(shape)
