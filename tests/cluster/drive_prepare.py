"""A driver of `prepare` in a process of its own, which never ends: `python drive_prepare.py key=value ...` (of image_folder.yaml).

Whoever reads image 50 hangs at it.
"""

import sys
import time
from pathlib import Path

from freeguide.cluster.jobs.prepare import prepare
from freeguide.configs.load import load_config
from freeguide.data_pipeline.sources import read as sources

IMAGE_FOLDER = Path(__file__).parents[2] / "configs" / "image_folder.yaml"


def hanging(source: sources.Source) -> sources.Source:
    def read(item: int) -> sources.Sample:
        if item == 50:
            time.sleep(600)
        return source.read(item)

    return sources.Source(source.schema, source.items, read, source.identity)


if __name__ == "__main__":
    original = sources.image_folder
    sources.image_folder = lambda *arguments: hanging(original(*arguments))
    prepare(load_config(IMAGE_FOLDER, sys.argv[1:], "prepare"))
