"""What images can come from before they are shards: one file here for each kind, and one entry in `SOURCES`."""

from collections.abc import Callable
from dataclasses import dataclass

from freeguide.configs.errors import ConfigError
from freeguide.configs.schema import DataConfig
from freeguide.data_pipeline.shards import Source
from freeguide.data_pipeline.sources.digits import open_digits
from freeguide.data_pipeline.sources.folder import open_folder
from freeguide.data_pipeline.sources.idx import open_idx
from freeguide.data_pipeline.sources.parquet import open_parquet
from freeguide.data_pipeline.sources.webdataset import open_tars


@dataclass(frozen=True)
class Kind:
    """A kind of input. `open` reads what the options say and raises ConfigError or DataError if they and the data do not fit."""

    open: Callable[[DataConfig], Source]
    latents: bool = False  # whether it can hold latents, not only images
    path: bool = True  # whether it reads what stands at data.path


SOURCES = {  # by data.source
    "digits": Kind(open_digits, path=False),
    "folder": Kind(open_folder, latents=True),
    "idx": Kind(open_idx),
    "parquet": Kind(open_parquet),
    "webdataset": Kind(open_tars, latents=True),
}


def open_source(data: DataConfig) -> Source:
    """The source that the options name. Raises ConfigError or DataError."""
    kind = SOURCES.get(data.source)
    if kind is None:
        raise ConfigError(f"data.source={data.source} is unknown; choose {_or(list(SOURCES))}")
    if data.dtype != "uint8" and not kind.latents:
        able = _or([name for name, kind in SOURCES.items() if kind.latents])
        raise ConfigError(f"data.source={data.source} holds images; latents (data.dtype={data.dtype}) come from {able}")
    return kind.open(data)


def _or(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
