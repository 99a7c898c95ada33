"""Parquet files with a column of images, as those of Hugging Face's data sets."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from freeguide.configs.errors import DataError, counted, visible
from freeguide.configs.schema import DataConfig
from freeguide.data_pipeline.decode import RECORDED, BadSample, decode_picture, fit
from freeguide.data_pipeline.manifest import Schema
from freeguide.data_pipeline.shards import Sample, Source
from freeguide.data_pipeline.sources.labels import numbered, read_class_names
from freeguide.data_pipeline.sources.shuffle import Blockwise

IMAGE = "image"  # the column of images


def open_parquet(data: DataConfig) -> Source:
    """A Parquet file or a folder of them: encoded images (bytes, or Hugging Face's {bytes, path}) in the column `image`; labels.

    Labels are held in memory, images by the row group. A label is a number from 0, or one of data.class_names, whose place is the
    number; data.label_key names its column, and `a.b` is the field b of the column a. Raises DataError if the files, their columns
    or labels do not fit.
    """
    path, names, label = data.path, read_class_names(data), data.label_key or "label"
    root = Path(path)
    files = sorted(root.glob("*.parquet")) if root.is_dir() else [root] if root.is_file() else []
    if not path or not files:
        raise DataError(f"There are no Parquet files at {path!r}; set data.path to a file or a folder of them")
    groups = _row_groups(path, files, label)
    firsts = np.cumsum([0, *(len(group.labels) for group in groups)])
    labels, count = numbered([each for group in groups for each in group.labels], path, data.classes, names)

    def use(content: bytes | None, group: int, row: int) -> Sample:
        try:
            image = fit(decode_picture(content or b"", data.channels), data.image_size, data.resize)
        except BadSample as error:
            raise BadSample(error.cause, f"row {firsts[group] + row} of {path}: {error}") from error
        return Sample(image, int(labels[firsts[group] + row]))

    read = Blockwise(lambda group: groups[group].images(), use, np.diff(firsts).tolist(), sum(group.size for group in groups))
    digest = hashlib.sha256("".join(f"{file.name}\0{file.stat().st_size}\0" for file in files).encode()).hexdigest()
    schema = Schema(data.image_size, data.channels, count, names)
    by = "" if label == "label" else f" by {label}"
    return Source(schema, len(labels), read, f"parquet {RECORDED[data.resize]} {digest}{by}")


@dataclass(frozen=True, eq=False)
class _RowGroup:
    file: Path
    number: int
    size: int  # bytes
    labels: list[Any]

    def images(self) -> list[bytes | None]:
        import pyarrow.parquet

        cells = pyarrow.parquet.ParquetFile(self.file).read_row_group(self.number, columns=[IMAGE]).column(IMAGE).to_pylist()
        return [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]


def _row_groups(path: str, files: Sequence[Path], label: str) -> list[_RowGroup]:
    import pyarrow
    import pyarrow.parquet

    groups = []
    try:
        for file in files:
            table = pyarrow.parquet.ParquetFile(file)
            columns = table.schema_arrow.names
            if IMAGE not in columns:
                raise DataError(f"{file} has no column {IMAGE!r} of images, but {_quoted(columns)}; rename it")
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
