"""Whatever the program writes and reads again is the bytes that it wrote, or there is one sentence; for every kind of object."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from freeguide.cluster.evaluation.report.page import read_others
from freeguide.cluster.jobs.evaluate import evaluate, fetch_report
from freeguide.cluster.jobs.export import export
from freeguide.cluster.jobs.generate import generate
from freeguide.configs.errors import UserError
from freeguide.configs.load import load_config
from freeguide.configs.stored import sealed, to_yaml
from freeguide.data_pipeline.scan import scan_all
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import load_manifest
from freeguide.trainer.checkpoints import search
from freeguide.trainer.checkpoints.manifest import checksummed, folder_of
from freeguide.trainer.checkpoints.values import load
from freeguide.trainer.weights import weights_of
from tests.cluster.untrained import DIGITS, HALF_LIFE, LOCAL, options, write_lab, write_run

STORED = ("ema", HALF_LIFE, "master")  # kinds of values in the checkpoint
HUGE = 2**42  # bytes, none of them on the disk


class Place:
    """A run that was evaluated, from which was generated and exported, with its data; and how each thing in it is used."""

    def __init__(self, folder: Path) -> None:
        self.lab, self.run = folder / "lab", folder / "run"
        write_lab(self.lab)
        (self.lab / "data" / "names.txt").write_text("\n".join("abcdefghij"))
        more = ["evaluate.w=[0.5]", "evaluate.images=40", "generate.images=20", "generate.unit=10"]
        self.options = [*options(self.lab, self.run), *LOCAL, *more]
        self.config = load_config(DIGITS, self.options, "evaluate")
        store = write_run(self.config)
        store.put("config.yaml", sealed(to_yaml(self.config)).encode())
        key = f"{folder_of(8)}/manifest.json"
        store.put(key, checksummed(json.loads(store.get(key))))  # as trainings write them now
        evaluate(self.config)
        generate(self.config)
        export(self.config)
        self.whole = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.report = next(Path(path) for path in self.whole if path.endswith("report/report.json"))
        self.scored = self.lab / "scored.json"
        self.scored.write_bytes(self.report.read_bytes())
        self.whole[str(self.scored)] = self.scored.read_bytes()

    def restore(self) -> None:
        for path, data in self.whole.items():
            if not Path(path).is_file() or Path(path).stat().st_size != len(data) or Path(path).read_bytes() != data:
                Path(path).write_bytes(data)

    def without(self, pattern: str) -> None:
        for path in self.whole:
            if re.search(pattern, path):
                Path(path).unlink(missing_ok=True)


def data_of(place: Place) -> object:
    images, labels = scan_all(store := open_store(str(place.lab / "data")), manifest := load_manifest(store))
    assert manifest.samples == 1797
    return images.tobytes(), labels.tobytes(), [(shard.key, shard.samples) for shard in manifest.shards], manifest.fingerprint


def bytes_of(weights: dict[str, Tensor]) -> list[tuple[str, bytes]]:
    return [(name, weights[name].numpy().tobytes()) for name in sorted(weights)]


def kept_values_of(place: Place) -> object:
    place.without("/checkpoints/")
    return bytes_of(weights_of(load_config(DIGITS, [*place.options, "sampling.checkpoint=8"], "evaluate")).read())


def trained_values_of(place: Place) -> object:
    place.without("/weights/")
    found = search.find(store := open_store(str(place.run)))
    return [bytes_of(weights_of(place.config).read()), *(bytes_of(load(store, found, kind)) for kind in STORED)]


def rows_of(place: Place) -> object:
    folder = evaluate(place.config)
    return (folder / "report.json").read_bytes()


def rows_again_of(place: Place) -> object:
    place.without("/rows/")
    return rows_of(place)


def report_of(place: Place) -> object:
    folder = fetch_report(place.config)
    return [(path.name, path.read_bytes()) for path in sorted(folder.iterdir()) if path.name not in ("times.json", "cost.md")]


def card_of(place: Place) -> object:
    return Path(export(place.config)).with_suffix(".md").read_bytes()


def others_of(place: Place) -> object:
    return read_others(load_config(DIGITS, [*place.options, f"evaluate.others=[{place.scored}]"], "evaluate"))


def set_of(place: Place) -> object:
    place.without("samples.npz$")
    arrays = np.load(Path(generate(place.config)) / "samples.npz")
    return arrays["arr_0"].tobytes(), arrays["arr_1"].tobytes()


def set_again_of(place: Place) -> object:
    place.without(r"generate/.*manifest.json$")
    return set_of(place)


# What is written, and what of the program reads it again. None: nothing does.
KINDS: dict[str, tuple[Callable[[Place], object], ...]] = {
    r"lab/data/manifest\.json": (data_of,),
    r"lab/data/index-.*\.npy": (data_of,),
    r"lab/data/shards/.*\.tar": (data_of,),
    r"lab/evaluator\.safetensors": (rows_of,),
    r"lab/reference\.npz": (rows_of,),
    r"lab/scored\.json": (others_of,),
    r"run/config\.yaml": (rows_of, card_of, set_of),
    r"run/checkpoints/.*/manifest\.json": (trained_values_of,),
    r"run/checkpoints/.*/rank-.*": (trained_values_of,),
    r"run/weights/.*safetensors": (kept_values_of,),
    r"run/weights/.*json": (kept_values_of,),
    r"run/evaluate/\w+/units/.*\.npz": (rows_again_of,),
    r"run/evaluate/\w+/rows/.*\.npz": (rows_of,),
    r"run/evaluate/latest\.json": (report_of, card_of),
    r"run/evaluate/\w+/report/(report\.json|table\.md)": (report_of, card_of),
    r"run/evaluate/\w+/report/(?!times\.json|cost\.md|report\.json|table\.md).*": (report_of,),
    r"run/generate/.*/manifest\.json": (set_of,),
    r"run/generate/.*/index-.*\.npy": (set_of,),
    r"run/generate/.*/units/.*\.tar": (set_of,),
    r"run/generate/.*/units/.*\.tar\.npz": (set_again_of,),
}
# For people and other programs: docs/evaluation.md says so.
UNREAD = (
    r"lab/data/names\.txt",
    r"run/evaluate/\w+/report/(times\.json|cost\.md)",
    r"run/generate/.*/samples\.npz",
    r"run/export/.*",
    r"run/events/.*",
    r"run/(evaluate|generate)/.*/weights\.txt",  # what is not readable there keeps all weights
    r"run/sampled_on\.txt",  # where to begin to look: another kind of device on the cluster is found by asking it
)


def flipped(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def zeroed(data: bytes) -> bytes:
    count = min(65536, len(data) // 2)
    return data[: len(data) // 4] + bytes(count) + data[len(data) // 4 + count :]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> list[Place]:
    return []


@pytest.fixture
def place(
    kept: list[Place],
    in_process: list[Any],
    words_only: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Place:
    monkeypatch.chdir(tmp_path)
    if not kept:
        kept.append(Place(tmp_path_factory.mktemp("place")))
    kept[0].restore()
    return kept[0]


def test_every_kind_of_object_is_known_here(place: Place) -> None:
    root = place.lab.parent
    for path in place.whole:
        name = str(Path(path).relative_to(root))
        kinds = [kind for kind in (*KINDS, *UNREAD) if re.fullmatch(kind, name)]
        assert len(kinds) == 1, f"{name} is of the kinds {kinds}: say above who reads it"
    for kind in KINDS:
        assert any(re.fullmatch(kind, str(Path(path).relative_to(root))) for path in place.whole), kind


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_one_sentence(kind: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    root = place.lab.parent
    path = next(Path(path) for path in place.whole if place.whole[path] and re.fullmatch(kind, str(Path(path).relative_to(root))))
    for use in KINDS[kind]:
        place.restore()
        expected = use(place)
        for damage in (flipped, zeroed, lambda data: data[:-7], lambda data: data[: len(data) // 2], lambda data: b"", None):
            place.restore()
            if damage:
                path.write_bytes(damage(place.whole[str(path)]))
            else:
                os.truncate(path, HUGE)
            with pytest.raises(UserError) as error:
                assert use(place) != expected, "it is damaged, and nobody has noticed or needed it"
            assert "\n" not in str(error.value)
            assert str(path.parent) in str(error.value), error.value
