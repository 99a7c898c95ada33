"""A driver of `prepare` in a process of its own, which never ends: `python drive_prepare.py key=value ...` (of image_folder.yaml).

Whoever reads image 50 hangs at it.
"""

import sys
import time
from pathlib import Path

from freeguide.cluster.jobs.prepare import prepare
from freeguide.configs.load import load_config
from freeguide.data_pipeline.shards import Sample, Source
from freeguide.data_pipeline.sources.open import SOURCES, Kind

IMAGE_FOLDER = Path(__file__).parents[2] / "configs" / "image_folder.yaml"


def hanging(source: Source) -> Source:
    def read(item: int) -> Sample:
        if item == 50:
            time.sleep(600)
        return source.read(item)

    return Source(source.schema, source.items, read, source.identity)


if __name__ == "__main__":
    original = SOURCES["folder"].open
    SOURCES["folder"] = Kind(lambda data: hanging(original(data)))
    prepare(load_config(IMAGE_FOLDER, sys.argv[1:], "prepare"))
