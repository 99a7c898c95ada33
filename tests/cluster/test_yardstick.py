"""What a data set is measured with: made once, the same bits each time, pinned by its hash, refused where it does not fit."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from freeguide.cluster.cli import main
from freeguide.cluster.evaluation import units, yardstick
from freeguide.cluster.evaluation.checks import contradictions
from freeguide.cluster.evaluation.executor import Resources
from freeguide.cluster.evaluation.extractors import dinov2, evaluator, features
from freeguide.cluster.evaluation.extractors import load as loading
from freeguide.cluster.evaluation.extractors.dinov2 import VisionTransformer
from freeguide.cluster.evaluation.extractors.evaluator import Evaluator
from freeguide.cluster.evaluation.extractors.load import load_extractor
from freeguide.cluster.evaluation.measure import Yardstick
from freeguide.cluster.evaluation.reference import load_npz
from freeguide.cluster.evaluation.rows import from_json
from freeguide.cluster.evaluation.statistics.fid import fid
from freeguide.cluster.evaluation.statistics.moments import from_features, merged
from freeguide.cluster.evaluation.yardstick import EVALUATOR, warn_of_few, yardsticks_of
from freeguide.cluster.jobs import evaluate as evaluation
from freeguide.cluster.runtime.engines import ENGINES, executor
from freeguide.cluster.runtime.here import as_worker
from freeguide.configs.errors import ConfigError, DataError, UserError
from freeguide.configs.load import load_config
from freeguide.configs.schema import Config
from freeguide.data_pipeline.artifact import fingerprint
from freeguide.data_pipeline.closure import code_version
from freeguide.data_pipeline.manifest import Schema
from freeguide.data_pipeline.scan import scan_all
from freeguide.data_pipeline.shards import Sample, Source, write_shards
from freeguide.data_pipeline.store.base import Denied
from freeguide.data_pipeline.store.folder import FolderStore
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import load_manifest
from freeguide.trainer.rounding import to_uint8
from freeguide.trainer.sampler import Sampler, image_labels
from tests.cluster.untrained import LOCAL, SMALL, THREADS, small, through, write_lab, write_run

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.yaml")
FACTS = ["data.classes=2", "evaluate.evaluator_epochs=1", "evaluate.images=100", *LOCAL]
Find = Callable[..., list[Yardstick]]


def write_toys(folder: Path, images: int = 90, seed: int = 0) -> str:
    """Noise that is bright above or below, 8x8x1, two classes, in shards of ten."""
    noise = np.random.default_rng(seed).integers(0, 120, (images, 8, 8, 1), np.uint8)
    noise[::2, :4] += 120
    noise[1::2, 4:] += 120
    source = Source(Schema(8, 1, 2), images, lambda i: Sample(noise[i], i % 2), f"toys {seed}")
    write_shards(source, open_store(str(folder)), shard_samples=10)
    return str(folder)


@pytest.fixture
def toys(tmp_path: Path) -> str:
    return write_toys(tmp_path / "toys")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A word for each time that something was made."""
    ran = list[str]()

    def noted(done: Iterator[Any]) -> Iterator[Any]:
        for item in done:
            if isinstance(item, str):
                ran.append("made")
            yield item

    monkeypatch.setitem(ENGINES, "local", through(noted))
    return ran


@pytest.fixture
def find(made: list[str], tmp_path: Path) -> Find:
    """find(uri of the data, "evaluate.option=value", ...) -> the yardsticks of an evaluation."""

    def look(uri: str, *options: str) -> list[Yardstick]:
        options = (f"data.uri={uri}", f"run={tmp_path}/run", *FACTS, *options)
        config = load_config(DIGITS, [*options], "evaluate", contradictions=contradictions)
        data = open_store(uri)
        with executor(config, 1) as engine:
            return yardsticks_of(config, data, load_manifest(data), engine)

    return look


def test_fit_evaluator_makes_it_once_and_says_how_to_pin_it(
    toys: str, made: list[str], find: Find, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit-evaluator", DIGITS, f"data.uri={toys}", f"run={toys}-run", *FACTS]) == 0
    assert made == ["made"]
    printed = capsys.readouterr().out
    pin = printed.splitlines()[-1].removeprefix("pin it: ").split()
    assert main(["fit-evaluator", DIGITS, f"data.uri={toys}", f"run={toys}-run", *FACTS]) == 0
    assert made == ["made"]
    assert capsys.readouterr().out.splitlines() == printed.splitlines()[-3:]
    (own,), (pinned,) = find(toys), find(toys, *pin)
    assert pinned.extractor.hash == own.extractor.hash == pin[1].split("=")[1]
    assert pinned.reference.sha256 == own.reference.sha256
    assert f"reference {own.reference.sha256}: 90 images of toys" in printed


def test_an_evaluation_of_data_that_may_only_be_read_needs_no_other_place_for_them(
    toys: str, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check, publish, refused = FolderStore.check, FolderStore._publish, [toys]

    def only_read(self: FolderStore, write: bool = True) -> None:
        if write and self.uri.startswith(tuple(refused)):
            raise Denied(f"{self.uri} may not be written; choose another folder or change its rights.")
        check(self, write)

    def put(self: FolderStore, *arguments: Any, **options: Any) -> str:
        only_read(self)
        return publish(self, *arguments, **options)

    monkeypatch.setattr(FolderStore, "check", only_read)
    monkeypatch.setattr(FolderStore, "_publish", put)
    command = ["fit-evaluator", DIGITS, f"data.uri={toys}", f"run={tmp_path}/run", *FACTS]
    assert main(command) == 0
    assert f"pin it: evaluate.extractor={tmp_path}/run/evaluators/" in capsys.readouterr().out
    refused.append(str(tmp_path / "run"))
    assert main(command) == 0  # all is there, so nothing has to be written
    assert made == ["made"]
    assert main([*command, "evaluate.evaluator_seed=1"]) == 2
    assert capsys.readouterr().err.count("may not be written") == 1
    assert made == ["made"]  # said before it is trained
    config = load_config(DIGITS, [*command[2:]], "evaluate")
    refused.pop()
    with pytest.raises(UserError, match="no checkpoint"):  # and not that the data may not be written
        evaluation.evaluate(config)


def test_another_evaluator_than_the_pinned_one_is_refused_in_a_sentence_with_both(toys: str, find: Find) -> None:
    (own,) = find(toys)
    other = "c3" * 32
    for options in ([f"evaluate.extractor={own.weights}"], []):
        with pytest.raises(DataError, match=rf"has the hash {own.extractor.hash} and not {other}; correct the path, or the hash"):
            find(toys, f"evaluate.extractor_hash={other}", *options)
    with pytest.raises(ConfigError, match="a sha256 has 64 hexadecimal digits"):
        find(toys, "evaluate.extractor_hash=c3c3")


def test_two_evaluators_of_one_seed_are_equal_to_the_bit(tmp_path: Path, find: Find) -> None:
    places = []
    for name in ("one/toys", "two/toys"):
        (found,) = find(write_toys(tmp_path / name))
        places.append(Path(found.weights).parent)
    one, two = ({path.name: path.read_bytes() for path in place.iterdir()} for place in places)
    assert one == two
    assert len(one) == 2
    (other,) = find(str(tmp_path / "one/toys"), "evaluate.evaluator_seed=1")
    assert Path(other.weights).read_bytes() != (places[0] / EVALUATOR).read_bytes()


def test_a_pinned_evaluator_measures_other_data_too(tmp_path: Path, toys: str, find: Find) -> None:
    (own,) = find(toys)
    uri = write_toys(tmp_path / "others", images=40, seed=1)
    (found,) = find(uri, f"evaluate.extractor={own.weights}", f"evaluate.extractor_hash={own.extractor.hash}")
    assert (found.extractor.hash, found.extractor.name) == (own.extractor.hash, "toys")
    assert (found.reference.dataset, found.reference.pool.n) == ("others", 40)
    images, _ = scan_all(open_store(uri), load_manifest(open_store(uri)))
    assert np.array_equal(found.reference.pool.mean, from_features(own.extractor.measure(images).features).mean)


def test_a_data_set_beyond_the_memory_is_sampled_evenly_for_the_evaluator_and_measured_whole(
    toys: str, find: Find, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(yardstick, "PIXELS", 40 * 64)
    (found,) = find(toys)
    assert "trained on one shard in 3: 30 of 90 images" in capsys.readouterr().out
    images, labels = scan_all(open_store(toys), load_manifest(open_store(toys)))
    rows = np.concatenate([np.arange(first, first + 10) for first in (0, 30, 60)])
    with as_worker(Config(), Resources(THREADS, 0)):
        expected = evaluator.fit_evaluator(images[rows], labels[rows], 2, epochs=1, name="toys")
    assert found.extractor.hash == expected.hash
    assert found.reference.pool.n == 90


def test_what_another_job_has_put_there_is_taken_and_never_replaced(
    toys: str, find: Find, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (own,) = find(toys)
    weights = Path(own.weights)
    (reference,) = set(weights.parent.iterdir()) - {weights}
    reference.unlink()  # as if the first job had died between its two
    (again,) = find(toys)
    assert (again.extractor.hash, again.reference.sha256) == (own.extractor.hash, own.reference.sha256)

    kept = weights.read_bytes()
    weights.unlink()
    fit = yardstick._fit

    def while_another_one_is_faster(*arguments: Any) -> Evaluator:
        weights.write_bytes(kept)
        return replace(fit(*arguments), name="slow")

    monkeypatch.setattr(yardstick, "_fit", while_another_one_is_faster)
    (found,) = find(toys)
    assert weights.read_bytes() == kept
    assert found.extractor.hash == own.extractor.hash
    assert made == ["made"] * 3


def test_images_as_reference_are_measured_once_and_keep_the_name_of_their_file(
    toys: str, find: Find, made: list[str], tmp_path: Path
) -> None:
    (own,) = find(toys)
    images = np.random.default_rng(3).integers(0, 256, (70, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "real.npz", images)
    asked = [f"evaluate.extractor={own.weights}", f"evaluate.reference={tmp_path}/real.npz"]
    (first,), (second,) = find(toys, *asked), find(toys, *asked)
    assert made == ["made"] * 2  # the evaluator, and these images
    file = hashlib.sha256((tmp_path / "real.npz").read_bytes()).hexdigest()
    assert first.reference.sha256 == second.reference.sha256 == file
    assert second.reference.pool.n == 70
    assert np.array_equal(second.reference.pool.mean, from_features(own.extractor.measure(images).features).mean)
    np.savez(tmp_path / "real.npz", images[::-1])
    (other,) = find(toys, *asked)
    assert (len(made), other.reference.sha256 == file) == (3, False)


def test_weights_that_cannot_judge_are_refused_before_anything_is_made(
    toys: str, find: Find, tiny_dinov2: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="holds DINOv2, which has no classes and so no Inception score; name it as dinov2"):
        find(toys, f"evaluate.extractor={tiny_dinov2}")
    noise = np.zeros((20, 65, 65, 1), np.uint8)
    source = Source(Schema(65, 1, 2), 20, lambda i: Sample(noise[i], i % 2), "black")
    write_shards(source, open_store(f"{tmp_path}/large"), shard_samples=10)
    with pytest.raises(DataError, match=r"an evaluator takes 8 to 64 pixels .*, or set evaluate.extractor to Inception's weights"):
        find(f"{tmp_path}/large")


@pytest.fixture
def tiny_dinov2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A transformer of two narrow blocks with random weights, under the published name."""
    monkeypatch.setattr(dinov2, "VisionTransformer", lambda: VisionTransformer(width=16, depth=2, heads=2))
    torch.manual_seed(0)
    network = VisionTransformer(width=16, depth=2, heads=2)
    torch.nn.init.normal_(network.pos_embed)
    torch.save(network.state_dict(), tmp_path / dinov2.FILE)
    return str(tmp_path / dinov2.FILE)


def test_dinov2_is_a_second_yardstick_with_a_reference_of_its_own(toys: str, find: Find, made: list[str], tiny_dinov2: str) -> None:
    first, second = find(toys, f"evaluate.dinov2={tiny_dinov2}")
    assert made == ["made", "made"]
    judge = load_extractor(tiny_dinov2)
    images, _ = scan_all(open_store(toys), load_manifest(open_store(toys)))
    expected = from_features(judge.measure(images).features)
    assert (second.extractor.hash, second.extractor.width) == (judge.hash, 16)
    assert np.array_equal(second.reference.pool.covariance, expected.covariance)
    measured = features.measure_with({each.role: each.extractor for each in (first, second)}, images)
    assert np.array_equal(measured.features, first.extractor.measure(images).features)
    assert np.array_equal(measured.others["dinov2"], judge.measure(images).features)
    (Path(toys) / "named.npz").write_bytes(second.reference.to_bytes(judge))
    _, named = find(toys, f"evaluate.dinov2={tiny_dinov2}", f"evaluate.dinov2_reference={toys}/named.npz")
    assert named.reference.sha256 == second.reference.sha256
    assert made == ["made", "made"]


@pytest.mark.usefixtures("words_only")
def test_an_evaluation_has_fd_dinov2_beside_the_rest(
    made: list[str], tiny_dinov2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lab(tmp_path)
    real = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "real.npz", real)
    asked = [f"evaluate.dinov2={tiny_dinov2}", f"evaluate.dinov2_reference={tmp_path}/real.npz"]
    config = small(tmp_path, tmp_path / "run", *asked, "evaluate.w=[0.5]", "evaluate.images=30")
    write_run(config)
    monkeypatch.chdir(tmp_path)
    (row,) = from_json((evaluation.evaluate(config) / "report.json").read_text())
    judge, sampler = load_extractor(tiny_dinov2), Sampler.load(config.run)
    parts = []
    for unit in units.split([0.5], 30, 20):
        index = torch.arange(unit.first, unit.last)
        images = to_uint8(sampler.sample(index, image_labels(config, index), 0.5))
        parts.append(from_features(judge.measure(images).features))
    reference = load_npz(f"{tmp_path}/real.npz", judge)
    assert row.fd_dinov2 == fid(merged(parts), reference.pool)
    assert (row.dinov2, row.dinov2_reference) == (judge.hash, reference.sha256)
    assert row.extractor == "digits"


def test_dinov2_is_pinned_by_its_hash_as_the_other_extractor_is(toys: str, find: Find, tiny_dinov2: str) -> None:
    sha256, other = hashlib.sha256(Path(tiny_dinov2).read_bytes()).hexdigest(), "c3" * 32
    _, second = find(toys, f"evaluate.dinov2={tiny_dinov2}", f"evaluate.dinov2_hash={sha256}")
    assert second.extractor.hash == sha256
    with pytest.raises(DataError, match=rf"has the hash {sha256} and not {other}; correct the path, or the hash"):
        find(toys, f"evaluate.dinov2={tiny_dinov2}", f"evaluate.dinov2_hash={other}")
    with pytest.raises(ConfigError, match=r"evaluate\.dinov2_hash=c3c3: a sha256 has 64 hexadecimal digits"):
        find(toys, f"evaluate.dinov2={tiny_dinov2}", "evaluate.dinov2_hash=c3c3")


def test_every_extractor_is_read_once(toys: str, find: Find, tiny_dinov2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (own,) = find(toys)
    pinned = (f"evaluate.extractor={own.weights}", f"evaluate.dinov2={tiny_dinov2}")
    find(toys, *pinned)
    read, load = list[str](), loading._load

    def counted(uri: str, access: object) -> features.Extractor:
        read.append(uri)
        return load(uri, access)

    monkeypatch.setattr(loading, "_load", counted)
    find(toys, *pinned)
    assert read == [own.weights, tiny_dinov2]


def test_weights_that_are_missing_or_of_something_else_are_refused_in_a_sentence(toys: str, find: Find) -> None:
    (own,) = find(toys)
    for option, words in (
        ("dinov2=/none/dinov2_vitl14_pretrain.pth", r"does not exist; get it from dl\.fbaipublicfiles\.com/.* and keep the name"),
        (f"dinov2={own.weights}", "holds toys and not DINOv2, which FD-DINOv2 needs"),
        ("extractor=/none/weights-inception-2015-12-05-6726825d.pth", r"does not exist; get it from github\.com/toshas/torch-fid"),
        ("extractor=/none/mine.safetensors", "does not exist; fit an evaluator, or correct its path"),
    ):
        with pytest.raises(DataError, match=words) as error:
            find(toys, f"evaluate.{option}")
        assert "\n" not in str(error.value)
    for needless in ("dinov2_reference=dinov2.npz", f"dinov2_hash={'c3' * 32}"):
        with pytest.raises(ConfigError, match="needs DINOv2's weights: set evaluate"):
            find(toys, f"evaluate.{needless}")


def test_a_reference_that_does_not_fit_is_refused_before_any_image_is_made(toys: str, find: Find, tmp_path: Path) -> None:
    find(toys)
    gaussian = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(tmp_path / "imagenet.npz", **gaussian)
    np.savez(tmp_path / "nan.npz", mu=np.full(64, np.nan), sigma=np.eye(64))
    np.savez(tmp_path / "large.npz", np.zeros((4, 16, 16, 1), np.uint8))
    for name, words in (
        ("imagenet", "imagenet.npz holds statistics of 2048 features and toys gives 64"),
        ("nan", "nan.npz holds NaN or infinity in mu or sigma"),
        ("large", r"measures uint8 \(N, 8, 8, 1\), not uint8 \(4, 16, 16, 1\)"),
    ):
        with pytest.raises(UserError, match=words):
            find(toys, f"evaluate.reference={tmp_path}/{name}.npz")


def test_fewer_images_than_features_are_said_loudly_with_what_would_help(
    toys: str, find: Find, capsys: pytest.CaptureFixture[str]
) -> None:
    found = find(toys)
    warn_of_few(65, 6, found)
    assert capsys.readouterr().err == ""
    warn_of_few(64, 6, found)
    told = capsys.readouterr().err
    assert told.startswith("WARNING: 64 images for the 64 features of toys")
    assert "take more than 64 images, and 195 for FID-infinity beside it" in told


def test_fewer_images_than_ten_for_each_class_are_said_for_the_sake_of_the_inception_score(
    toys: str, find: Find, capsys: pytest.CaptureFixture[str]
) -> None:
    found = find(toys)
    warn_of_few(1000, 100, found)
    assert capsys.readouterr().err == ""
    warn_of_few(999, 100, found)
    told = capsys.readouterr().err
    assert told.startswith(
        "WARNING: 999 images of 100 classes: a split of the Inception score, a tenth of them, cannot hold all classes"
    )
    assert told.endswith("take 1000 images or more to compare it\n")


def test_weights_that_are_there_already_are_not_fitted(toys: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit-evaluator", DIGITS, f"data.uri={toys}", "evaluate.extractor=mine.safetensors"]) == 2
    assert "names weights that are there already: leave it out to fit an evaluator" in capsys.readouterr().err


# --- without classes ---


def write_flat(folder: Path, images: int = 100, symmetric: bool = False) -> str:
    """Pictures of one class, 8x8x1: noise, bright above, or if they are symmetric bright in the middle."""
    noise = np.random.default_rng(0).integers(0, 120, (images, 8, 8, 1), np.uint8)
    noise[:, slice(2, 6) if symmetric else slice(0, 3), slice(2, 6) if symmetric else slice(None)] += 120
    write_shards(Source(Schema(8, 1, 1), images, lambda i: Sample(noise[i], 0), "flat"), open_store(str(folder)), shard_samples=25)
    return str(folder)


FLAT = ["data.classes=0", "evaluate.evaluator_epochs=3", *LOCAL]


def test_data_without_classes_are_measured_by_how_their_pictures_are_turned(
    tmp_path: Path, find: Find, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = write_flat(tmp_path / "photos")
    (found,) = find(uri, *FLAT)
    images, _ = scan_all(open_store(uri), load_manifest(open_store(uri)))
    with as_worker(Config(), Resources(THREADS, 0)):
        expected = evaluator.fit_rotations(images, 3, name="photos-rotations")
    assert isinstance(found.extractor, Evaluator)
    assert found.extractor.to_bytes() == expected.to_bytes()
    assert (found.extractor.has_classes, found.extractor.accuracy > 0.9) == (False, True)
    assert (found.reference.dataset, found.reference.pool.n) == ("photos", 100)
    assert np.array_equal(found.reference.pool.mean, from_features(expected.measure(images).features).mean)
    said = capsys.readouterr()
    assert "training the evaluator on 100 real images, to tell how they are turned, as they have no classes\n" in said.out
    assert f"{100 * expected.accuracy:.1f} % rotation accuracy on held-out images" in said.out
    assert said.err == ""


def test_fit_evaluator_of_data_without_classes_prints_what_pins_it(
    tmp_path: Path, made: list[str], find: Find, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = write_flat(tmp_path / "photos")
    assert main(["fit-evaluator", DIGITS, f"data.uri={uri}", f"run={tmp_path}/run", *FLAT]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"evaluator [0-9a-f]{64}: [\d.]+ % rotation accuracy on held-out images, FID-photos-rotations\n", printed)
    pin = printed.splitlines()[-1].removeprefix("pin it: ").split()
    (own,), (pinned,) = find(uri, *FLAT), find(uri, *FLAT, *pin)
    assert pinned.extractor.hash == own.extractor.hash == pin[1].split("=")[1]
    assert not pinned.extractor.has_classes
    assert made == ["made", "made"]  # of the evaluator, and of the reference of one that is given


def test_only_data_without_classes_have_what_was_learned_in_the_name_of_their_evaluator(
    tmp_path: Path, toys: str, find: Find
) -> None:
    for uri, options, more in ((toys, [], {}), (write_flat(tmp_path / "photos"), FLAT, {"learned": "rotations"})):
        (found,) = find(uri, *options)
        epochs = 3 if options else 1
        decides = {"format": 3, "data": load_manifest(open_store(uri)).fingerprint, "dataset": Path(uri).name, "epochs": epochs}
        name = fingerprint(decides | {"seed": 0, "code": code_version(yardstick.FITTING)} | more)
        assert Path(found.weights).parent.name == name


@pytest.mark.parametrize("command", ["evaluate", "fit-evaluator"])
def test_pictures_that_look_alike_when_they_are_turned_are_said_to_teach_little(
    tmp_path: Path, made: list[str], find: Find, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    uri = write_flat(tmp_path / "dots", symmetric=True)
    if command == "evaluate":
        warn_of_few(1000, 1, find(uri, *FLAT))
    else:
        assert main(["fit-evaluator", DIGITS, f"data.uri={uri}", f"run={tmp_path}/run", *FLAT]) == 0
    told = capsys.readouterr().err
    assert re.fullmatch(
        r"WARNING: dots-rotations has [\d.]+ % rotation accuracy on held-out images, and guessing has 25 %.*\n", told
    )
    assert made == ["made"]


def test_nothing_is_said_of_a_score_that_an_extractor_does_not_have(
    tmp_path: Path, find: Find, capsys: pytest.CaptureFixture[str]
) -> None:
    found = find(write_flat(tmp_path / "photos"), *FLAT)
    capsys.readouterr()
    warn_of_few(999, 100, found)
    assert capsys.readouterr().err == ""


def test_a_name_that_no_evaluator_can_have_is_refused_before_anything_is_made(tmp_path: Path, made: list[str], find: Find) -> None:
    uri = write_flat(tmp_path / "my photos")
    with pytest.raises(DataError, match=r"'my photos-rotations' cannot name an evaluator; .* as evaluate\.dataset for example"):
        find(uri, *FLAT)
    assert made == []
    (found,) = find(uri, *FLAT, "evaluate.dataset=photos")
    assert found.extractor.name == "photos-rotations"


def test_an_evaluation_without_classes_ends_in_a_report_without_a_score(
    made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = write_flat(tmp_path / "photos")
    own = ["sampling.interval=[]", "evaluate.grid=20", "cluster.workers=1"]
    asked = [f"run={tmp_path}/run", f"data.uri={uri}", "data.classes=1", "evaluate.evaluator_epochs=3"]
    config = load_config(DIGITS, [*SMALL, *LOCAL, *own, *asked, "evaluate.w=[0]"], "evaluate")
    write_run(config)
    monkeypatch.chdir(tmp_path)
    folder = evaluation.evaluate(config)
    (row,) = from_json((folder / "report.json").read_text())
    assert (row.fid_name, row.n, row.w) == ("FID-photos-rotations", 60, 0.0)
    assert (row.inception_score, row.inception_score_std, row.accuracy) == (None, None, None)
    assert None not in (row.fid, row.precision, row.recall, row.kid)
    assert not (folder / "frontier.png").exists()
    page = (folder / "index.html").read_text()
    assert "<h1>digits: FID-photos-rotations over w</h1>" in page
    assert "photos-rotations tells no classes apart: there is no Inception score" in page
    assert Image.open(folder / "samples_w0.png").size == (10 * 59 + 3, 2 * 59 + 3)  # lines of ten of the class's 20
    (events,) = Path(config.run).glob("events/*/*/events.out.tfevents.0000000008")
    log = EventAccumulator(str(events.parent))
    log.Reload()
    assert set(log.Tags()["scalars"]) == {"evaluate/FID-photos-rotations", "evaluate/precision", "evaluate/recall"}
    capsys.readouterr()
    evaluation.evaluate(dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, w=[0.0, 1.0])))
    told = capsys.readouterr().err
    assert "WARNING: evaluate.w=[0.0, 1.0]: guidance goes from all images towards those of a class, and the data have one" in told
    assert "evaluate.w=[0] would do" in told
    assert made == ["made"]
