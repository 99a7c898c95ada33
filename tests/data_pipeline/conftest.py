"""An S3 server of one's own for the room's tests: moto's, on a free loopback port."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from freeguide.configs.schema import DataConfig
from freeguide.data_pipeline.fetch import Fetcher
from freeguide.data_pipeline.manifest import Manifest, Schema, build_manifest
from freeguide.data_pipeline.shards import Sample, Source, pack_shard, write_shards
from freeguide.data_pipeline.sources.open import open_source
from freeguide.data_pipeline.store.base import Store
from freeguide.data_pipeline.store.open import create_bucket, open_store
from freeguide.data_pipeline.stored import save_manifest

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Against a real server (FREEGUIDE_TEST_S3) only what talks to it is run: the rest is `make test`'s."""
    if not os.environ.get("FREEGUIDE_TEST_S3"):
        return
    kept, left = [], []
    for item in items:
        assert isinstance(item, pytest.Function)
        parameters = item.callspec.id.split("-") if hasattr(item, "callspec") else []
        (kept if "s3_endpoint" in item.fixturenames or "s3" in parameters else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3 server with a bucket `freeguide`; AWS_ENDPOINT_URL points to it for the whole session.

    It is a moto server, or, where FREEGUIDE_TEST_S3 is set, the server at that URL with the credentials of the environment.
    """
    real = os.environ.get("FREEGUIDE_TEST_S3", "")
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", real)
        if not real:
            server.start()
            for name, value in KEYS.items():
                patch.setenv(name, value)
            patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        create_bucket("s3://freeguide")
        yield os.environ["AWS_ENDPOINT_URL"]
    if not real:
        server.stop()


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind: what holds for one must hold for the other."""
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    request.getfixturevalue("s3_endpoint")
    return open_store(s3_uri(tmp_path))


def s3_uri(path: Path) -> str:
    """A prefix of its own, also on a server that remembers earlier sessions."""
    return f"s3://freeguide/{path.name}-{random.getrandbits(48):012x}"


def noise_source(items: int, size: int = 8, channels: int = 3, classes: int = 10, seed: int = 0) -> Source:
    """Random pixels: they do not compress, and a wrong byte anywhere changes an image."""
    images = np.random.default_rng(seed).integers(0, 256, (items, size, size, channels), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.arange(items) // 256, np.arange(items) % 256  # the image says which item it is
    schema = Schema(size, channels, classes)
    return Source(schema, items, lambda item: Sample(images[item], item % classes), f"noise {items} {size} {channels} {seed}")


def item_of(images: np.ndarray) -> np.ndarray:
    """The item numbers that noise_source wrote into its images, uint8 (..., H, W, C)."""
    return images[..., 0, 0, 0].astype(int) * 256 + images[..., 0, 1, 0]


def write_noise(store: Store, items: int, *, shard_samples: int = 50, chunk_samples: int | None = None, size: int = 8) -> Manifest:
    """A data set of noise. `chunk_samples` overrides the choice, since small data would always get chunks of one sample."""
    source = noise_source(items, size)
    if chunk_samples is None:
        return write_shards(source, store, shard_samples=shard_samples)
    indexes = []
    for number, first in enumerate(range(0, items, shard_samples)):
        packed = pack_shard([source.read(item) for item in range(first, min(items, first + shard_samples))], first)
        indexes.append(packed.index(key := f"shards/{number:06d}.tar", store.put(key, packed.data)))
    manifest = build_manifest(source.schema, indexes, "test", chunk_samples)
    save_manifest(store, manifest)
    return manifest


def data_config(**options: object) -> DataConfig:
    return DataConfig(**{"uri": "unused", "image_size": 8, "classes": 10, **options})  # type: ignore[arg-type]


def image_folder(path: Path | str, image_size: int = 8, channels: int = 3, classes: int = 0, **options: object) -> Source:
    given = {"image_size": image_size, "channels": channels, "classes": classes, **options}
    return open_source(data_config(source="folder", path=str(path), **given))


def names_file(path: Path, names: Sequence[str]) -> str:
    """A file of class names, for data.class_names."""
    path.write_text("\n".join(names))
    return str(path)


@pytest.fixture
def no_hedges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read a second time because a busy machine read it slowly: bytes can be counted."""
    monkeypatch.setattr(Fetcher, "_patience", lambda _: None)


def killed_while_writing(code: str, kills: int) -> None:
    """Runs the lines in as many processes, each of which kills itself when it would give a finished file its name."""
    dies = "os.replace = os.link = lambda *_: os.kill(os.getpid(), 9)\n"
    lines = "import os\nfrom pathlib import Path\nfrom freeguide.data_pipeline.store.open import open_store\n" + dies + code
    started = [subprocess.Popen([sys.executable, "-c", lines]) for _ in range(kills)]
    assert [process.wait(timeout=120) for process in started] == [-9] * kills
