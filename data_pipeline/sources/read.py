"""Where images come from before they are shards: scikit-learn's digits, folders of class folders, IDX files, Parquet, WebDataset.

Every source deals its items in one fixed shuffle (a keyed bijection, see `order.permute`), so that each shard and each chunk holds
a mixture of the classes. What can only be read in blocks (row groups of Parquet, chunks of tars) is shuffled twice: the blocks, and
then the samples within windows of neighbouring blocks, of which a reader holds one window at a time.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from freeguide.configs.errors import ConfigError, DataError, counted, visible
from freeguide.configs.schema import DataConfig
from freeguide.configs.untrusted import JSON_BYTES
from freeguide.data_pipeline.decode import (
    ANY_LABEL,
    MAX_PICTURE_BYTES,
    RECORDED,
    WHITE,
    BadSample,
    Pixels,
    Values,
    decode_latents,
    decode_picture,
    decode_sample,
    fit,
    number_of,
)
from freeguide.data_pipeline.fetch import Fetch, Fetcher, Fields
from freeguide.data_pipeline.manifest import Manifest, Schema
from freeguide.data_pipeline.order import FIRST_ROUNDS, key, permute
from freeguide.data_pipeline.shards import Sample, Source
from freeguide.data_pipeline.sources.folder import PICTURES, RAW, File, Found, count_of, find, listed, named, without_pictures
from freeguide.data_pipeline.store.base import Access, Store
from freeguide.data_pipeline.store.open import access_to, open_store
from freeguide.data_pipeline.stored import load_manifest

LATENTS = {".npy"}
WINDOW_BYTES = 256 * 2**20  # encoded bytes of the blocks among which samples are shuffled, and which a reader holds
BLOCK_BYTES = 4 * 2**20  # of tars that are read in blocks


def open_source(data: DataConfig) -> Source:
    """The source that the configuration names. Raises ConfigError or DataError."""
    if data.dtype != "uint8" and data.source not in ("folder", "webdataset"):
        raise ConfigError(
            f"data.source={data.source} holds images; latents (data.dtype={data.dtype}) come from folder or webdataset."
        )
    if data.source == "digits":
        if (data.image_size, data.channels, data.classes or 10) != (8, 1, 10):
            raise ConfigError("data.source=digits is 8x8 grey with 10 classes; set data.image_size=8, channels=1 and classes=10.")
        return digits()
    if data.source == "folder":
        return image_folder(
            data.path,
            data.image_size,
            data.channels,
            data.classes,
            data.resize,
            data.dtype,
            data.class_depth,
            data.background,
            read_class_names(data),
        )
    if data.source == "idx":
        if data.channels != 1:
            raise ConfigError("data.source=idx is grey; set data.channels=1.")
        return idx(data.path, data.image_size, data.classes, names=read_class_names(data))
    if data.source == "parquet":
        names, label = read_class_names(data), data.label_key or "label"
        return parquet(data.path, data.image_size, data.channels, data.classes, label=label, resize=data.resize, names=names)
    if data.source == "webdataset":
        return tars(
            data.path,
            data.image_size,
            data.channels,
            data.classes,
            data.resize,
            data.dtype,
            data.background,
            access_to(data, data.path),
        )
    raise ConfigError(f"data.source={data.source} is unknown; choose digits, folder, idx, parquet or webdataset.")


def digits() -> Source:
    """The 1 797 handwritten digits that scikit-learn carries (UCI optdigits): 8x8, values 0..16 spread to 0..255."""
    import sklearn.datasets  # a second of imports that no other source needs

    table = sklearn.datasets.load_digits()
    images = np.round(table.images * (255 / 16)).astype(np.uint8)[..., None]
    return _from_arrays(images, table.target, Schema(8, 1, 10, tuple(str(digit) for digit in range(10))))


def image_folder(
    path: str,
    image_size: int,
    channels: int,
    classes: int | None = None,
    resize: str = "adm",
    dtype: str = "uint8",
    class_depth: int = 1,
    background: int = WHITE,
    class_names: Sequence[str] = (),
) -> Source:
    """Pictures below the class folders of `path`, as a person sees them (see `decode_picture`), brought to image_size.

    The folders `class_depth` levels down are the classes, numbered 0, 1, ... by their sorted names or as in `class_names`. With
    class_depth=0, or where there are no class folders, all are of one class. With another dtype than uint8: latents, `.npy`, taken
    as they are. Raises DataError where the folder, its class folders or their files are missing, or are not `classes` in number.
    """
    root, raw = Path(path), dtype == "uint8"
    found, count = _found(path, raw, classes, class_depth, class_names)
    digest = hashlib.sha256()
    for file in found.files:
        digest.update(os.fsencode(f"{file.path}\0{file.bytes}\0"))
    if not raw:  # latents that were made anew have the names and sizes of the old ones
        for file in found.files[:: max(1, len(found.files) // 64)]:
            digest.update((root / file.path).read_bytes())
    schema = Schema(image_size, channels, count, found.classes, dtype)

    def decoded(file: File) -> Values:
        if not raw:
            return decode_latents((root / file.path).read_bytes(), schema)
        return fit(picture(file, (root / file.path).read_bytes, channels, background), image_size, resize)

    def read(item: int) -> Sample:
        file = found.files[item]
        try:
            return Sample(decoded(file), file.label)
        except BadSample as error:
            raise BadSample(error.cause, f"{named(root / file.path)}: {error}") from error
        except OSError as error:
            raise BadSample("image", f"{named(root / file.path)}: {error.strerror}") from error

    old = f"folder {RECORDED[resize]} {digest.hexdigest()}"
    seen = f"pictures {RECORDED[resize]} {digest.hexdigest()}" + (f" on {background}" if background != WHITE else "")
    # Earlier versions took these files only, as they are stored: if there are no others, theirs is the same folder.
    formerly = old if raw and all(_taken_before(file.path) for file in found.files) else ""
    return Source(
        schema, len(found.files), _shuffled(read, len(found.files)), seen if raw else old, found.passed_over, formerly=formerly
    )


def _found(path: str, raw: bool, classes: int | None, class_depth: int, class_names: Sequence[str]) -> tuple[Found, int]:
    """The files of a folder, and how many classes they have. Raises DataError where they are not those of a data set."""
    root, where = Path(path), named(path)
    if not path or not root.is_dir():
        what = "is on a store" if "://" in str(path) else "is a file" if root.exists() else "does not exist"
        raise DataError(f"The image folder {where!r} {what}; set data.path to a folder of class folders on this machine")
    found = find(root, PICTURES if raw else LATENTS, class_depth, class_names)
    if not found.files:
        over = f" (passed over: {count_of(found.passed_over)})" if found.passed_over else ""
        kind = "images" if raw else "latents (.npy)"
        if not found.folders:
            raise DataError(f"{where} has no class folders and no {kind}{over}; put those of each class into {where}/CLASS/")
        raise DataError(f"The class folders of {where} hold no {kind}{over}; check data.path")
    count = 1 if found.flat else len(found.classes) + len(found.empty)
    _check_classes(f"{where} has {count} class folders" if found.classes else f"{where} has no classes", count, classes)
    if found.empty:
        raise DataError(
            f"{where} has class folders without images: {listed(found.empty)}; put some there, or move the folders away."
        )
    return found, count


def picture(file: File, read: Callable[[], bytes], channels: int, background: int = WHITE) -> Pixels:
    """The picture of a file as a person sees it, uint8 (H, W, channels). Raises BadSample, before `read` where the name says it."""
    if file.bytes > MAX_PICTURE_BYTES:
        raise BadSample("size", f"it has {file.bytes} bytes, over the cap of {MAX_PICTURE_BYTES}")
    if file.path.lower().endswith(tuple(RAW)):
        raise BadSample("codec", "it is a camera's raw file; develop it to JPEG or PNG")
    return decode_picture(read(), channels, background)


def _taken_before(path: str) -> bool:
    return path.count("/") == 1 and path.lower().endswith((".png", ".jpg", ".jpeg", ".webp"))


def read_class_names(data: DataConfig) -> tuple[str, ...]:
    """The names of the classes in their order from a text file, one a line, or a JSON list. Empty where none is named."""
    if not (uri := data.class_names):
        return ()
    place, _, name = uri.rpartition("/")
    try:
        text = open_store(place or "/", access=access_to(data, uri)).get(name, JSON_BYTES).decode("utf-8-sig")
        names = json.loads(text) if text.lstrip().startswith("[") else [line.strip() for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.class_names={uri} is neither text nor a JSON list; write one name a line") from error
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise DataError(f"data.class_names={uri} must name every class once; write one name a line")
    return tuple(names)


def idx(
    path: str, image_size: int | None = None, classes: int | None = None, split: str = "train", names: tuple[str, ...] = ()
) -> Source:
    """IDX files as of MNIST and Fashion-MNIST, `SPLIT-images-idx3-ubyte` and `SPLIT-labels-idx1-ubyte` in a folder, gz or not.

    Larger images are brought down to image_size by area (each new pixel is the mean of what it covers). `names` are those of the
    classes, in their order: "1", "2", ... for labels that begin at 1. Raises DataError where the files or their labels do not fit.
    """
    images = _read_idx(Path(path), f"{split}-images", 3)
    labels = _read_idx(Path(path), f"{split}-labels", 1)
    if len(images) != len(labels) or images.shape[1] != images.shape[2] or len(images) == 0:
        raise DataError(f"{path} holds images {images.shape} and labels {labels.shape}, which do not fit; check data.path.")
    size = image_size or images.shape[1]
    if size > images.shape[1]:
        raise DataError(f"The images of {path} are {images.shape[1]} pixels wide; set data.image_size to that or less.")
    if size < images.shape[1]:
        images = np.stack([fit(image[..., None], size, "area")[..., 0] for image in images])
    numbers, count = _numbered(labels.tolist(), path, classes, names)
    return _from_arrays(images[..., None], numbers, Schema(size, 1, count, names))


def _numbered(labels: list[Any], path: str, classes: int | None, names: tuple[str, ...]) -> tuple[npt.NDArray[np.int64], int]:
    """The numbers of the labels, and how many classes there are. Raises DataError for no labels, and classes without pictures."""
    known: dict[Any, int] = {}
    for row, label in enumerate(labels):
        try:
            if label not in known:
                known[label] = number_of(label, len(names) or ANY_LABEL, names)
        except BadSample as error:
            raise DataError(f"row {row} of {path}: {error}") from None
        except TypeError:
            raise DataError(
                f"row {row} of {path}: its label is a list or an object; name a column of labels with data.label_key"
            ) from None
    numbers = np.array([known[label] for label in labels], np.int64)
    count = len(names) or max(known.values(), default=-1) + 1
    _check_classes(f"{path} has {len(names)} names of classes" if names else f"{path} has labels up to {count - 1}", count, classes)
    lacking = without_pictures(known.values(), count)
    if lacking and not classes:
        raise DataError(f"These classes of {path} have no picture: {lacking}; set data.classes={count} if that is meant")
    return numbers, count


def parquet(
    path: str,
    image_size: int,
    channels: int,
    classes: int | None = None,
    image: str = "image",
    label: str = "label",
    resize: str = "adm",
    names: tuple[str, ...] = (),
) -> Source:
    """A Parquet file or a folder of them: a column of encoded images (bytes, or Hugging Face's {bytes, path}) and one of labels.

    Labels are held in memory, images by the row group. A label is a number from 0, or one of `names`, whose place is the number;
    `a.b` is the field b of the column a. Raises DataError where the files, their columns or labels do not fit.
    """
    root = Path(path)
    files = sorted(root.glob("*.parquet")) if root.is_dir() else [root] if root.is_file() else []
    if not path or not files:
        raise DataError(f"There are no Parquet files at {path!r}; set data.path to a file or a folder of them.")
    groups = _row_groups(path, files, image, label)
    firsts = np.cumsum([0, *(len(group.labels) for group in groups)])
    labels, count = _numbered([each for group in groups for each in group.labels], path, classes, names)

    def use(data: bytes | None, group: int, row: int) -> Sample:
        try:
            return Sample(fit(decode_picture(data or b"", channels), image_size, resize), int(labels[firsts[group] + row]))
        except BadSample as error:
            raise BadSample(error.cause, f"row {firsts[group] + row} of {path}: {error}") from error

    read = _Blockwise(lambda group: groups[group].images(image), use, np.diff(firsts).tolist(), sum(group.size for group in groups))
    digest = hashlib.sha256("".join(f"{file.name}\0{file.stat().st_size}\0" for file in files).encode()).hexdigest()
    schema = Schema(image_size, channels, count, names)
    by = "" if label == "label" else f" by {label}"
    return Source(schema, len(labels), read, f"parquet {RECORDED[resize]} {digest}{by}")


def _check_classes(what: str, found: int, stated: int | None) -> None:
    """Raises DataError where a number is stated that is not the one of the data: a class without images would be sampled."""
    if stated and stated != found:
        raise DataError(f"{what}, but data.classes is {stated}; set data.classes={found}, or leave it out.")


@dataclass(frozen=True, eq=False)
class _RowGroup:
    file: Path
    number: int
    size: int  # bytes
    labels: list[Any]

    def images(self, column: str) -> list[bytes | None]:
        import pyarrow.parquet

        cells = pyarrow.parquet.ParquetFile(self.file).read_row_group(self.number, columns=[column]).column(column).to_pylist()
        return [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]


def _row_groups(path: str, files: Sequence[Path], image: str, label: str) -> list[_RowGroup]:
    import pyarrow
    import pyarrow.parquet

    groups = []
    try:
        for file in files:
            table = pyarrow.parquet.ParquetFile(file)
            columns = table.schema_arrow.names
            if image not in columns:
                raise DataError(f"{file} has no column {image!r} of images, but {_quoted(columns)}; rename it")
            top, *inside = [label] if label in columns else label.split(".")
            if top not in columns:
                raise DataError(f"{file} has no column {label!r} of labels, but {_quoted(columns)}; name it with data.label_key")
            for number in range(table.num_row_groups):
                labels = table.read_row_group(number, columns=[top]).column(top).to_pylist()
                for part in inside:
                    labels = [each.get(part) if isinstance(each, dict) else None for each in labels]
                if missing := labels.count(None):
                    raise DataError(
                        f"{file}: {counted(missing, 'label is', 'labels are')} missing in {label!r}; leave those rows out, or name "
                        "another column with data.label_key"
                    )
                groups.append(_RowGroup(file, number, table.metadata.row_group(number).total_byte_size, labels))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}); download it again") from error
    return groups


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(visible(name)) for name in names[:8]) + (", ..." if len(names) > 8 else "")


def tars(
    uri: str,
    image_size: int,
    channels: int,
    classes: int | None = None,
    resize: str = "adm",
    dtype: str = "uint8",
    background: int = WHITE,
    access: Access | None = None,
) -> Source:
    """WebDataset tars in a folder or bucket that `freeguide index` has been run on, read in blocks of about 4 MiB.

    Images are read as a person sees them (see `decode_picture`), labels as the manifest says.

    Raises DataError where there is no manifest, or it speaks of another number of classes or another dtype.
    """
    store = open_store(uri, access=access)
    manifest = load_manifest(store)
    _check_classes(f"{uri} has {manifest.schema.classes} classes", manifest.schema.classes, classes)
    if manifest.schema.dtype != dtype:
        raise DataError(f"{uri} has samples of {manifest.schema.dtype}, but data.dtype is {dtype}; set it to that.")
    schema = Schema(image_size, channels, manifest.schema.classes, manifest.schema.class_names, dtype)
    stored = replace(schema, label_key=manifest.schema.label_key)
    chunk_bytes = max(1, manifest.bytes * manifest.chunk_samples // manifest.samples)
    per_block = manifest.chunk_samples * max(1, BLOCK_BYTES // chunk_bytes)
    rows = [min(per_block, manifest.samples - first) for first in range(0, manifest.samples, per_block)]

    def load(block: int) -> list[Fields | BadSample]:
        return _read_tars(store, manifest, range(block * per_block, block * per_block + rows[block]))

    def use(fields: Fields | BadSample, block: int, row: int) -> Sample:
        try:
            if isinstance(fields, BadSample):
                raise fields
            image, label = decode_sample(fields, stored, resize, background)
        except BadSample as error:
            raise BadSample(error.cause, f"{manifest.describe(block * per_block + row)}: {error}") from error
        return Sample(image, label)

    old = f"tars {RECORDED[resize]} {manifest.fingerprint}"
    seen = f"seen {old}" + (f" on {background}" if background != WHITE else "")
    return Source(
        schema,
        manifest.samples,
        _Blockwise(load, use, rows, manifest.bytes),
        seen if dtype == "uint8" else old,
        manifest.passed_over,
        formerly=old if dtype == "uint8" else "",
    )


def _read_tars(store: Store, manifest: Manifest, ids: range) -> list[Fields | BadSample]:
    """The samples with these neighbouring ids, read and checked as for training."""
    q = manifest.chunk_samples
    chunks = tuple(range(ids.start // q, -(-ids.stop // q)))
    wanted = tuple(tuple((id_ - chunk * q, id_) for id_ in range(chunk * q, min(chunk * q + q, ids.stop))) for chunk in chunks)
    fetcher = Fetcher(store, manifest, 1)
    try:
        found = fetcher.read(Fetch(0, 0, chunks, wanted))
    finally:
        fetcher.close()
    return [found[id_] for id_ in ids]


class _Blockwise:
    """Reads items out of blocks: the blocks permuted, then the rows of each window of blocks.

    One window of loaded blocks is kept; they do not travel to other processes.
    """

    def __init__(
        self, load: Callable[[int], Sequence[Any]], use: Callable[[Any, int, int], Sample], rows: Sequence[int], total_bytes: int
    ) -> None:
        self.arguments = load, use, rows, total_bytes
        self.load, self.use = load, use
        self.window = max(1, min(len(rows), WINDOW_BYTES * len(rows) // max(1, total_bytes)))  # blocks
        self.blocks = permute(np.arange(len(rows)), len(rows), key(0, 3, np.zeros(1, np.int64)), FIRST_ROUNDS)
        self.firsts = np.cumsum([0, *np.asarray(rows, np.int64)[self.blocks]])  # rows before each block
        self.kept: OrderedDict[int, Sequence[Any]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Blockwise, self.arguments

    def __call__(self, item: int) -> Sample:
        block, row = self.place(item)
        if block not in self.kept:
            while len(self.kept) >= self.window:
                self.kept.popitem(last=False)
            self.kept[block] = self.load(block)
        self.kept.move_to_end(block)
        return self.use(self.kept[block][row], block, row)

    def place(self, item: int) -> tuple[int, int]:
        """Block and row of an item."""
        window = self._at(item) // self.window
        first, end = self.firsts[window * self.window], self.firsts[min((window + 1) * self.window, len(self.blocks))]
        keys = key(0, 3, np.array([window + 1]))
        item = int(first + permute(np.array([item - first]), int(end - first), keys, FIRST_ROUNDS)[0])
        return int(self.blocks[self._at(item)]), item - int(self.firsts[self._at(item)])

    def _at(self, item: int) -> int:
        return int(np.searchsorted(self.firsts, item, side="right")) - 1


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
    # An unfinished `prepare` goes on with the shards that it has, so this shuffle may not change.
    order = permute(np.arange(items), items, key(0, 3, np.zeros(1, np.int64)), FIRST_ROUNDS)
    return lambda item: read(int(order[item]))
