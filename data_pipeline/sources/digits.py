"""scikit-learn's handwritten digits: real images that need no download."""

import numpy as np

from freeguide.configs.errors import ConfigError
from freeguide.configs.schema import DataConfig
from freeguide.data_pipeline.manifest import Schema
from freeguide.data_pipeline.shards import Source
from freeguide.data_pipeline.sources.shuffle import from_arrays


def open_digits(data: DataConfig) -> Source:
    """`digits`. Raises ConfigError if the options ask for something else."""
    if (data.image_size, data.channels, data.classes or 10) != (8, 1, 10):
        raise ConfigError("data.source=digits is 8x8 grey with 10 classes; set data.image_size=8, channels=1 and classes=10")
    return digits()


def digits() -> Source:
    """The 1 797 handwritten digits that scikit-learn carries (UCI optdigits): 8x8, values 0..16 spread to 0..255."""
    import sklearn.datasets  # a second of imports that no other source needs

    table = sklearn.datasets.load_digits()
    images = np.round(table.images * (255 / 16)).astype(np.uint8)[..., None]
    return from_arrays(images, table.target, Schema(8, 1, 10, tuple(str(digit) for digit in range(10))))
