"""Where images come from before they are shards: scikit-learn's digits, folders of class folders, IDX files, Parquet.

Every source deals its items in one fixed shuffle (a keyed bijection, see `order.permute`), so that each shard and each chunk holds
a mixture of the classes.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from configs.errors import ConfigError, DataError
from configs.schema import DataConfig
from data_pipeline.decode import BadSample, Pixels, decode_image, fit
from data_pipeline.manifest import Schema
from data_pipeline.order import key, permute
from data_pipeline.shards import Sample, Source

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp"}


def open_source(data: DataConfig) -> Source:
    """The source that the configuration names. Raises ConfigError or DataError."""
    if data.source == "digits":
        if (data.image_size, data.channels, data.classes) != (8, 1, 10):
            raise ConfigError("data.source=digits is 8x8 grey with 10 classes; set data.image_size=8, channels=1 and classes=10.")
        return digits()
    if data.source == "folder":
        return image_folder(data.path, data.image_size, data.channels, data.classes)
    if data.source == "idx":
        if data.channels != 1:
            raise ConfigError("data.source=idx is grey; set data.channels=1.")
        return idx(data.path, data.image_size, data.classes)
    if data.source == "parquet":
        return parquet(data.path, data.image_size, data.channels, data.classes)
    raise ConfigError(f"data.source={data.source} is unknown; choose digits, folder, idx or parquet.")


def digits() -> Source:
    """The 1 797 handwritten digits that scikit-learn carries (UCI optdigits): 8x8, values 0..16 spread to 0..255."""
    import sklearn.datasets  # a second of imports that no other source needs

    table = sklearn.datasets.load_digits()
    images = np.round(table.images * (255 / 16)).astype(np.uint8)[..., None]
    return _from_arrays(images, table.target, Schema(8, 1, 10, tuple(str(digit) for digit in range(10))))


def image_folder(path: str, image_size: int, channels: int, classes: int | None = None) -> Source:
    """Images at `path/class/name.png` (or jpg, jpeg, webp), fitted to image_size as ADM does. Sorted class names become 0, 1, ...

    Raises DataError where the folder, its class folders or their images are missing, or there are more than `classes` of them.
    """
    root = Path(path)
    if not path or not root.is_dir():
        raise DataError(f"The image folder {path!r} does not exist; set data.path to a folder of class folders.")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{path} has no class folders; put the images of each class into {path}/CLASS/.")
    if classes is not None and len(names) > classes:
        raise DataError(f"{path} has {len(names)} class folders, but data.classes is {classes}; set data.classes={len(names)}.")
    files = [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted((root / name).iterdir())
        if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")
    ]
    if not files:
        raise DataError(f"The class folders of {path} hold no images ({', '.join(sorted(EXTENSIONS))}); check data.path.")
    digest = hashlib.sha256()
    for file, _ in files:
        digest.update(f"{file.relative_to(root)}\0{file.stat().st_size}\0".encode())

    def read(item: int) -> Sample:
        file, label = files[item]
        try:
            return Sample(fit(decode_image(file.read_bytes(), channels), image_size), label)
        except BadSample as error:
            raise BadSample(error.cause, f"{file}: {error}") from error
        except OSError as error:
            raise BadSample("image", f"{file}: {error.strerror}") from error

    schema = Schema(image_size, channels, classes or len(names), tuple(names))
    return Source(schema, len(files), _shuffled(read, len(files)), f"folder {digest.hexdigest()}")


def idx(path: str, image_size: int | None = None, classes: int | None = None, split: str = "train") -> Source:
    """IDX files as of MNIST and Fashion-MNIST, `SPLIT-images-idx3-ubyte` and `SPLIT-labels-idx1-ubyte` in a folder, gz or not.

    Larger images are brought down to image_size by area (each new pixel is the mean of what it covers).
    """
    images = _read_idx(Path(path), f"{split}-images", 3)
    labels = _read_idx(Path(path), f"{split}-labels", 1)
    if len(images) != len(labels) or images.shape[1] != images.shape[2] or len(images) == 0:
        raise DataError(f"{path} holds images {images.shape} and labels {labels.shape}, which do not fit; check data.path.")
    size = image_size or images.shape[1]
    if size > images.shape[1]:
        raise DataError(f"The images of {path} are {images.shape[1]} pixels wide; set data.image_size to that or less.")
    if size < images.shape[1]:
        images = np.stack([_area(image, size) for image in images])
    found = int(labels.max()) + 1
    if classes is not None and found > classes:
        raise DataError(f"{path} has {found} classes, but data.classes is {classes}; set data.classes={found}.")
    return _from_arrays(images[..., None], labels, Schema(size, 1, classes or found))


def parquet(
    path: str, image_size: int, channels: int, classes: int | None = None, image: str = "image", label: str = "label"
) -> Source:
    """A Parquet file or a folder of them: a column of encoded images (bytes, or Hugging Face's {bytes, path}) and one of labels.

    The encoded images are held in memory. Raises DataError where the files, their columns or their labels do not fit.
    """
    import pyarrow
    import pyarrow.parquet

    root = Path(path)
    files = sorted(root.glob("*.parquet")) if root.is_dir() else [root] if root.is_file() else []
    if not path or not files:
        raise DataError(f"There are no Parquet files at {path!r}; set data.path to a file or a folder of them.")
    try:
        table = pyarrow.concat_tables([pyarrow.parquet.read_table(file, columns=[image, label]) for file in files])
        images, numbers = table.column(image), table.column(label)
        if numbers.null_count:
            raise ValueError(f"{numbers.null_count} labels are missing")
        labels = numbers.to_numpy().astype(np.int64)
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"The Parquet files at {path} need columns {image!r} and {label!r} ({str(error).splitlines()[0]})."
        ) from error
    found = int(labels.max(initial=-1)) + 1
    if (classes is not None and found > classes) or labels.min(initial=0) < 0:
        raise DataError(f"{path} has labels {labels.min()} to {found - 1}; set data.classes={found}, and number classes from 0.")
    digest = hashlib.sha256("".join(f"{file.name}\0{file.stat().st_size}\0" for file in files).encode()).hexdigest()

    def read(item: int) -> Sample:
        try:
            cell = images[item].as_py()
            data = cell["bytes"] if isinstance(cell, dict) else cell
            return Sample(fit(decode_image(data or b"", channels), image_size), int(labels[item]))
        except BadSample as error:
            raise BadSample(error.cause, f"row {item} of {path}: {error}") from error

    return Source(Schema(image_size, channels, classes or found), len(labels), _shuffled(read, len(labels)), f"parquet {digest}")


def _area(image: Pixels, size: int) -> Pixels:
    wide = Image.fromarray(image.astype(np.float32))  # in whole numbers Pillow would round twice, once per axis
    return np.rint(np.asarray(wide.resize((size, size), Image.Resampling.BOX))).astype(np.uint8)


def _read_idx(folder: Path, name: str, dimensions: int) -> Pixels:
    """An IDX file of unsigned bytes: 0, 0, 8, the number of dimensions, their sizes as big-endian uint32, the values."""
    for file in (folder / f"{name}-idx{dimensions}-ubyte{suffix}" for suffix in ("", ".gz")):
        if file.is_file():
            break
    else:
        raise DataError(f"{folder} has no {name}-idx{dimensions}-ubyte or .gz; check data.path.")
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
        raise DataError(f"{file} cannot be read ({error}); download it again.") from error
    return np.frombuffer(values, np.uint8).reshape(shape)


def _from_arrays(images: Pixels, labels: np.ndarray, schema: Schema) -> Source:
    digest = hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    read = _shuffled(lambda item: Sample(images[item], int(labels[item])), len(images))
    return Source(schema, len(images), read, f"arrays {digest}")


def _shuffled(read: Callable[[int], Sample], items: int) -> Callable[[int], Sample]:
    order = permute(np.arange(items), items, key(0, 3, np.zeros(1, np.int64)))
    return lambda item: read(int(order[item]))
