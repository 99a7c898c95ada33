"""What the options of data ask of each other."""

from freeguide.configs.checks import Checks
from freeguide.configs.schema import Config, DataConfig


def contradictions(config: Config, command: str) -> Checks:
    """Everything that has to hold of the data for `command`."""
    data = config.data
    if data.dtype == "uint8":
        yield data.channels in (1, 3), f"data.channels={data.channels}: 1 (grey) or 3 (RGB)"
    yield (
        command != "train" or data.dtype == "uint8" or not data.flip,
        f"data.flip=true with data.dtype={data.dtype}: a mirrored latent is not the latent of the mirrored image; "
        f"set data.flip=false",
    )
    if command == "prepare" and data.path == "":
        yield not _needs_path(data), f"data.path is empty: name what data.source={data.source} reads"


def _needs_path(data: DataConfig) -> bool:
    from freeguide.data_pipeline.sources.open import SOURCES  # which imports torch

    return SOURCES[data.source].path
