"""Tests of data_store.py: data that one may only read, with what belongs to them in a place of one's own."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from freeguide.configs.errors import DataError, StoreError
from freeguide.data_pipeline.index import index_shards
from freeguide.data_pipeline.order import choose_order
from freeguide.data_pipeline.store.base import Access, Denied, Store
from freeguide.data_pipeline.store.folder import FolderStore
from freeguide.data_pipeline.store.open import open_data, open_store
from freeguide.data_pipeline.stored import load_manifest, save_mixture
from freeguide.data_pipeline.stream import Reader
from tests.data_pipeline.conftest import data_config, item_of, noise_source, write_noise


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of tars that nobody may write to; the tests may run as root, whom no mode of a folder stops."""
    folder = tmp_path / "public"
    store = open_store(str(folder))
    write_noise(store, 60, shard_samples=20)
    for info in store.list():
        if not info.key.endswith(".tar"):
            store.delete(info.key)
    publish, access = FolderStore._publish, os.access

    def refused(self: FolderStore, *arguments: object, **options: object) -> object:
        if self.folder.is_relative_to(folder):
            raise Denied(f"{self.folder} cannot be used (Permission denied); check the disk and its rights.")
        return publish(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(FolderStore, "_publish", refused)
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (mode & os.W_OK and str(path) == str(folder)))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    yield folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert stat.S_ISDIR(folder.stat().st_mode)


def items(store: Store) -> list[int]:
    manifest = load_manifest(store)
    place = {"global_batch": 10, "rank": 0, "world_size": 1, "start_step": 0}
    with Reader(store, manifest, choose_order(manifest, 10, seed=0), **place, data=data_config()) as reader:  # type: ignore[arg-type]
        images = np.concatenate([next(reader).images.numpy() for _ in range(6)])
    return sorted(item_of(((images + 1) * 127.5).round().transpose(0, 2, 3, 1)).tolist())


def test_data_that_may_only_be_read_get_a_manifest_elsewhere(read_only: Path, tmp_path: Path) -> None:
    data = data_config(uri=str(read_only), manifest=str(tmp_path / "mine"))
    store = open_data(data)
    store.check()
    index_shards(store, noise_source(60).schema)
    assert [info.key for info in open_store(data.manifest).list("manifest")] == ["manifest.json"]
    assert items(open_data(data)) == list(range(60))
    evaluators = open_data(data).child("evaluators/1/")
    evaluators.put("weights", b"w")
    assert evaluators.uri == f"{data.manifest}/evaluators/1"
    assert open_store(data.manifest).get("evaluators/1/weights") == b"w"
    before = load_manifest(store)
    assert index_shards(open_data(data), noise_source(60).schema)[0].fingerprint == before.fingerprint


def test_without_such_a_place_one_sentence_names_the_option(read_only: Path) -> None:
    store = open_data(data_config(uri=str(read_only)))
    store.check(write=False)
    for use in (store.check, lambda: index_shards(store, noise_source(60).schema), lambda: store.child("evaluators").put("x", b"")):
        with pytest.raises(Denied, match=r"; or set data\.manifest to a place of your own [^.]*$"):
            use()
    with pytest.raises(DataError, match=f"There is no manifest at {read_only}/manifest.json"):
        load_manifest(store)


def test_a_manifest_among_the_tars_is_read_where_there_is_none_of_ones_own(tmp_path: Path) -> None:
    written = write_noise(open_store(str(tmp_path / "data")), 60, shard_samples=20)
    data = data_config(uri=str(tmp_path / "data"), manifest=str(tmp_path / "mine"))
    assert load_manifest(open_data(data)).fingerprint == written.fingerprint
    open_store(data.uri).delete("manifest.json")
    with pytest.raises(DataError, match=f"There is no manifest at {tmp_path}/mine/manifest.json"):
        load_manifest(open_data(data))


def test_the_data_sets_of_a_mixture_are_asked_in_the_same_way(s3_endpoint: str, tmp_path: Path) -> None:
    from tests.data_pipeline.conftest import s3_uri

    one, two, mixed = (s3_uri(tmp_path) for _ in range(3))
    for uri in (one, two):
        write_noise(open_store(uri), 60, shard_samples=20)
    data = data_config(uri=mixed, request_payer=True)
    store = open_data(data)
    save_mixture(store, {one: 1, two: 2})
    manifest = load_manifest(store)
    place = {"global_batch": 6, "rank": 0, "world_size": 1, "start_step": 0}
    with Reader(store, manifest, choose_order(manifest, 6, seed=0), **place, data=data) as reader:  # type: ignore[arg-type]
        next(reader)
        for part in reader._fetcher.parts.values():
            assert part.access == Access(request_payer=True)  # type: ignore[attr-defined]
            assert part.traffic is store.traffic


def test_locations_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unknown scheme gs:"):
        open_data(data_config(uri=str(tmp_path), manifest="gs://x/y"))
