"""Two of the same command at once on one place: both end well with the same result, or one ends with one sentence."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from freeguide.configs.errors import DataError
from freeguide.data_pipeline.claim import BEGUN, claim
from freeguide.data_pipeline.index import index_shards
from freeguide.data_pipeline.manifest import Manifest
from freeguide.data_pipeline.scan import scan
from freeguide.data_pipeline.shards import Sample, Source, write_shards
from freeguide.data_pipeline.store.base import Store
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.store.unfinished import writer
from freeguide.data_pipeline.stored import load_manifest, save_mixture
from tests.data_pipeline.conftest import noise_source, write_noise

OTHER = r"^Another (prepare|index) writes to .*, or was broken off there; let it end .*, or delete .*/parts and start again$"


def together(*jobs: Callable[[], Manifest]) -> list[Manifest | DataError]:
    """What came of jobs that begin at the same time."""
    found: dict[int, Manifest | DataError] = {}
    start = threading.Barrier(len(jobs))

    def run(number: int) -> None:
        start.wait()
        try:
            found[number] = jobs[number]()
        except DataError as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(len(jobs))]


def content(store: Store) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list()}


def whole(store: Store) -> int:
    """The samples that are really there."""
    return sum(1 for _ in scan(store, load_manifest(store)))


def test_two_jobs_of_one_source_both_end_well(store: Store) -> None:
    source = noise_source(60)
    write_shards(source, store.child("expected"), shard_samples=10)
    target = store.child("target")
    for made in together(*[lambda: write_shards(source, target, shard_samples=10)] * 3):
        assert isinstance(made, Manifest)
    assert content(target) == content(store.child("expected"))


def test_of_two_sources_one_ends_with_a_sentence(store: Store) -> None:
    sources = [noise_source(60, seed=seed) for seed in range(2)]
    met = threading.Barrier(2, timeout=60)  # neither is done before the other has begun, or has been refused

    def slow(source: Source) -> Source:
        def read(item: int) -> Sample:
            if item == 0:
                met.wait()
            return source.read(item)

        return replace(source, read=read)

    def job(source: Source) -> Manifest:
        try:
            return write_shards(slow(source), store, shard_samples=10)
        except DataError:
            met.wait()
            raise

    found = together(*[lambda source=source: job(source) for source in sources])  # type: ignore[misc]
    (refused,) = (each for each in found if isinstance(each, DataError))
    (made,) = (each for each in found if isinstance(each, Manifest))
    with pytest.raises(DataError, match=OTHER):
        raise refused
    assert load_manifest(store).fingerprint == made.fingerprint
    assert whole(store) == 60
    assert not store.list("parts/")
    for source in sources:  # afterwards, in turn
        if found[sources.index(source)] is made:
            assert write_shards(source, store, shard_samples=10).fingerprint == made.fingerprint
        else:
            with pytest.raises(DataError, match="holds another data set"):
                write_shards(source, store, shard_samples=10)
    assert not store.list("parts/")


def test_two_indexes_agree_or_one_ends_with_a_sentence(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    written = write_noise(store, 60, shard_samples=20)
    schema = written.schema
    store.delete("manifest.json")
    for made in together(*[lambda: index_shards(store, schema)[0]] * 3):
        assert isinstance(made, Manifest)
        assert made.fingerprint == written.fingerprint
    assert not store.list("parts/")

    def while_another(job: Callable[[], object]) -> str:
        """What `job` says while an index of the first tar is half done."""
        said: list[str] = []

        def progress(*_: int) -> None:
            with pytest.raises(DataError, match=OTHER) as caught:
                job()
            said.append(str(caught.value))

        assert index_shards(store, schema, "shards/000000.tar", progress=progress)[0].samples == 20
        return said[0]

    assert "Another index" in while_another(lambda: index_shards(store, schema))
    assert "Another index" in while_another(lambda: index_shards(store, replace(schema, classes=11)))
    store.delete("manifest.json")  # no mixture takes the place of a data set
    other = open_store(f"{tmp_path}-other")
    write_noise(other, 20)
    assert "Another index" in while_another(lambda: save_mixture(store, {other.uri: 1}))
    assert not store.list("parts/")


def test_prepare_and_index_do_not_meet(tmp_path: Path) -> None:
    store, source, said = open_store(str(tmp_path)), noise_source(60), []

    def progress(done: int, of: int, bad: tuple[str, ...]) -> None:
        with pytest.raises(DataError, match=OTHER) as caught:
            index_shards(store, source.schema)
        said.append(str(caught.value))

    made = write_shards(source, store, shard_samples=20, progress=progress)
    assert len(said) == 3
    assert load_manifest(store).fingerprint == made.fingerprint


def test_a_job_that_failed_before_it_wrote_is_in_nobodys_way(store: Store) -> None:
    def broken(item: int) -> Sample:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        write_shards(replace(noise_source(30, seed=1), read=broken), store)
    assert write_shards(noise_source(30), store).samples == 30


def test_a_job_that_was_killed_is_in_nobodys_way_where_that_is_sure(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    claim(store, "prepare", "killed")
    mark = json.loads(store.get(BEGUN))
    with pytest.raises(DataError, match=OTHER):
        write_shards(noise_source(30), store)
    store.put(BEGUN, json.dumps({**mark, "writer": [*writer()[:2], str(2**22 + 1), "1"]}).encode())  # above any process number
    assert write_shards(noise_source(30), store).samples == 30
    other = open_store(str(tmp_path / "other"))
    other.put(BEGUN, b"not JSON")
    with pytest.raises(DataError, match="Another job writes to"):
        write_shards(noise_source(30), other)
