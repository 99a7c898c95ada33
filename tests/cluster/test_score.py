"""Anyone's images get our rows: from a file, a folder or shards, the same values, and the truth about what is not known."""

import argparse
import dataclasses
import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from freeguide.cluster.evaluation.extractors import dinov2
from freeguide.cluster.evaluation.extractors.dinov2 import VisionTransformer
from freeguide.cluster.evaluation.extractors.evaluator import Evaluator, fit_evaluator, fit_rotations
from freeguide.cluster.evaluation.extractors.load import load_beside
from freeguide.cluster.evaluation.measure import Yardstick, values
from freeguide.cluster.evaluation.reference import from_npz
from freeguide.cluster.evaluation.rows import from_json, to_json
from freeguide.cluster.evaluation.statistics.fid import frechet_distance
from freeguide.cluster.evaluation.statistics.inception_score import inception_score
from freeguide.cluster.evaluation.statistics.moments import from_features
from freeguide.cluster.jobs import score as scores
from freeguide.cluster.jobs.score import Samples, command, facts_of, load_reference, load_samples, score, score_samples
from freeguide.configs.errors import ConfigError, DataError
from freeguide.data_pipeline.decode import encode_png
from freeguide.data_pipeline.manifest import Schema, build_manifest
from freeguide.data_pipeline.shards import Sample, pack_shard
from freeguide.data_pipeline.store.base import READERS
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import save_manifest
from tests.data_pipeline.conftest import image_folder

N = 240
LABELS = np.arange(N, dtype=np.int64) % 2


def _images(seed: int) -> np.ndarray:
    """Two classes that a classifier can tell apart: bright above or bright below, with noise."""
    images = np.random.default_rng(seed).integers(0, 120, (N, 8, 8, 1), np.uint8)
    images[LABELS == 0, :4] += 120
    images[LABELS == 1, 4:] += 120
    return images


REAL, FAKE = _images(0), _images(1)


@pytest.fixture(scope="module")
def judge() -> Evaluator:
    return fit_evaluator(REAL, LABELS, 2, epochs=40, name="toys")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, judge: Evaluator) -> Path:
    """A folder with an evaluator, real images as reference, and the same samples in three forms."""
    folder = tmp_path_factory.mktemp("score")
    (folder / "toys.safetensors").write_bytes(judge.to_bytes())
    np.savez(folder / "real.npz", REAL)
    np.savez(folder / "fake.npz", FAKE, LABELS)
    (folder / "png").mkdir()
    for i, image in enumerate(FAKE):
        (folder / "png" / f"{i:04d}.png").write_bytes(encode_png(image))
    store = open_store(str(folder / "shards"))
    packed = pack_shard([Sample(image, int(label)) for image, label in zip(FAKE, LABELS, strict=True)])
    save_manifest(store, build_manifest(Schema(8, 1, 2), [packed.index("0.tar", store.put("0.tar", packed.data))]))
    return folder


def _score(place: Path, samples: str, **options: object):
    return score(
        str(place / samples),
        reference=str(place / "real.npz"),
        extractor=str(place / "toys.safetensors"),
        dataset="toys",
        name="theirs",
        **options,
    )


def test_the_same_images_give_the_same_row_in_every_form(place, judge):
    rows = {form: _score(place, form) for form in ("fake.npz", "png", "shards")}
    npz = rows["fake.npz"]
    assert rows["shards"] == npz
    assert npz.accuracy == pytest.approx(1.0, abs=0.05)
    # Without labels nobody knows that they are balanced, so other subsets are drawn.
    known = {"accuracy": None, "fid_infinity": rows["png"].fid_infinity, "fid_std": rows["png"].fid_std}
    without_labels = {name: getattr(npz, name) for name in npz.__dataclass_fields__} | known
    assert {name: getattr(rows["png"], name) for name in npz.__dataclass_fields__} == without_labels
    # And they are the values of the measurement, in the order of the file.
    yardstick = Yardstick(judge, from_npz((place / "real.npz").read_bytes(), "real", judge, "toys"))
    assert values([judge.measure(FAKE)], LABELS, yardstick)["fid"] == npz.fid
    assert npz.fid < values([judge.measure(REAL[::-1] // 2)], LABELS, yardstick)["fid"]


def test_what_their_maker_did_not_say_is_not_known_and_what_we_know_is_said(place):
    row = _score(place, "fake.npz")
    assert (row.rounding, row.labels, row.sampler, row.steps, row.p_uncond, row.seed, row.w) == (
        *("not known",) * 3,
        *(None,) * 3,
        0.0,
    )
    told = _score(place, "fake.npz", w=0.3, facts=facts_of(["steps=256", "p_uncond=0.1", "sampler=ancestral", "clip=true"]))
    assert (told.w, told.steps, told.p_uncond, told.sampler, told.clip) == (0.3, 256, 0.1, "ancestral", True)
    assert told.fid == row.fid
    assert from_json(to_json([row, told])) == [row, told]


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (["fid=1.0"], "fid is measured and cannot be given"),
        (["n=50000"], "n is measured"),
        (["colour=red"], "'colour' is no fact of a model"),
        (["steps=many"], "steps is 'many', and a row holds another type"),
    ],
)
def test_facts_that_are_none_are_refused(place, facts, words):
    with pytest.raises(ConfigError, match=words):
        _score(place, "fake.npz", facts=facts_of(facts))


def test_words_that_are_no_facts_are_refused():
    with pytest.raises(DataError, match="'steps' is no fact of the samples; write key=value"):
        facts_of(["steps"])


def test_images_sorted_by_class_are_dealt_so_that_every_split_holds_all_classes(judge, place):
    yardstick = Yardstick(judge, from_npz((place / "real.npz").read_bytes(), "real", judge))
    order = np.argsort(LABELS, kind="stable")
    in_turn = score_samples(Samples(FAKE, LABELS), yardstick, name="x")
    by_class = score_samples(Samples(FAKE[order], LABELS[order]), yardstick, name="x")
    unaware = score_samples(Samples(FAKE[order], None), yardstick, name="x")
    assert by_class.inception_score == pytest.approx(in_turn.inception_score, rel=0.05)  # other splits of 24 images
    assert unaware.inception_score < 1.2 < by_class.inception_score
    assert by_class.fid == pytest.approx(in_turn.fid, rel=1e-5)  # float32 features of other batches
    mixed = Samples(FAKE, LABELS)
    assert mixed.dealt is mixed


@pytest.mark.parametrize("rule", ["descending", "shuffled blocks", "two shards"])
def test_class_blocks_in_any_order_are_dealt(rule):
    """Of ten certain classes the score is 10, and 1 where each split holds one of them."""
    classes = {
        "descending": np.arange(10)[::-1].repeat(100),
        "shuffled blocks": np.array([3, 7, 0, 9, 1, 8, 2, 6, 5, 4]).repeat(100),
        "two shards": np.tile(np.arange(10).repeat(50), 2),
    }[rule].astype(np.int64)
    images = np.broadcast_to(classes.astype(np.uint8)[:, None, None, None], (1000, 1, 1, 1))
    dealt = Samples(images, classes).dealt
    assert dealt.labels is not None
    assert np.array_equal(dealt.images[:, 0, 0, 0], dealt.labels)
    assert sorted(dealt.labels) == sorted(classes)
    assert inception_score(np.eye(10)[dealt.labels]).mean > 9  # 9.6: the splits of 100 are dealt, not balanced


@pytest.mark.parametrize("labels", [np.arange(1000) % 10, *(np.random.default_rng(0).integers(0, k, 1000) for k in (10, 2))])
def test_labels_that_are_not_in_blocks_keep_their_order(labels):
    """Balanced ones, and random ones of ten classes and of two, of which half are like their neighbour."""
    samples = Samples(np.zeros((1000, 1, 1, 1), np.uint8), labels.astype(np.int64))
    assert samples.dealt is samples


def test_class_folders_give_labels_and_lossy_files_are_said(tmp_path):
    for i in range(6):
        folder = tmp_path / ("b", "a")[i % 2]
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.png").write_bytes(encode_png(FAKE[i]))
    found = load_samples(str(tmp_path), 1)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(found.images, FAKE[[1, 3, 5, 0, 2, 4]])
    assert not found.lossy
    buffer = io.BytesIO()
    Image.fromarray(FAKE[0, ..., 0]).save(buffer, "JPEG")
    (tmp_path / "a" / "7.jpg").write_bytes(buffer.getvalue())
    assert load_samples(str(tmp_path), 1).lossy
    assert load_samples(str(tmp_path), 3).images.shape == (7, 8, 8, 3)


def _class_folders(folder: Path, names: dict[int, str]) -> str:
    for i, image in enumerate(FAKE):
        if int(LABELS[i]) in names:
            place = folder / names[int(LABELS[i])]
            place.mkdir(exist_ok=True, parents=True)
            (place / f"{i:04d}.png").write_bytes(encode_png(image))
    return str(folder)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory, judge: Evaluator) -> Yardstick:
    """The real images as a data set whose classes have names, in an order that is not that of their names."""
    store = open_store(str(tmp_path_factory.mktemp("named")))
    packed = pack_shard([Sample(image, int(label)) for image, label in zip(REAL, LABELS, strict=True)])
    index = packed.index("0.tar", store.put("0.tar", packed.data))
    save_manifest(store, build_manifest(Schema(8, 1, 2, ("top", "bottom")), [index]))
    reference = load_reference(store.uri, judge)
    again = from_npz(reference.to_bytes(judge), "kept", judge)
    assert (again.class_names, again.sha256) == (("top", "bottom"), reference.sha256)
    return Yardstick(judge, again)


@pytest.mark.parametrize(
    ("names", "accuracy"),
    [
        ({0: "top", 1: "bottom"}, 1.0),  # in the order of their names they are swapped
        ({1: "bottom"}, 1.0),  # a subset of the classes
        ({0: "up", 1: "down"}, None),
        ({0: "top", 1: "below"}, None),
        ({0: "0", 1: "1"}, None),  # the reference does not call them so
    ],
)
def test_class_folders_are_classes_by_their_names(tmp_path, capsys, named, names, accuracy):
    row = score_samples(load_samples(_class_folders(tmp_path, names), 1), named, name="x")
    assert row.accuracy == (None if accuracy is None else pytest.approx(accuracy, abs=0.02))
    said = capsys.readouterr().out
    assert ("no accuracy" in said) == (accuracy is None)
    if accuracy is None:
        assert "not classes of the reference ('top', 'bottom')" in said
    assert row.inception_score > (1.5 if len(names) == 2 else 1.0)  # dealt, whatever the classes are called


def test_without_names_in_the_reference_only_numbers_are_classes(tmp_path, capsys, place, judge):
    yardstick = Yardstick(judge, from_npz((place / "real.npz").read_bytes(), "real", judge))
    numbers = load_samples(_class_folders(tmp_path / "numbers", {0: "00", 1: "1"}), 1)
    assert score_samples(numbers, yardstick, name="x").accuracy == pytest.approx(1.0, abs=0.02)
    words = load_samples(_class_folders(tmp_path / "words", {0: "a", 1: "b"}), 1)
    assert score_samples(words, yardstick, name="x").accuracy is None
    assert "no accuracy: the samples' classes 'a', 'b' are not known to the reference" in capsys.readouterr().out


def test_shards_with_other_names_for_their_numbers_are_matched_by_name(named):
    swapped = Samples(FAKE, 1 - LABELS, names=("bottom", "top"))
    assert score_samples(swapped, named, name="x").accuracy == pytest.approx(1.0, abs=0.02)


def test_classes_may_have_folders_of_their_own(tmp_path):
    (tmp_path / "b" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a").mkdir()
    for i, where in enumerate(("a/x", "b/y", "b/deep/z", "b/deep/er/0")):
        (tmp_path / f"{where}.png").write_bytes(encode_png(FAKE[i]))
    found = load_samples(str(tmp_path), 1)
    assert (found.names, found.labels.tolist()) == (("a", "b"), [0, 1, 1, 1])


def test_the_files_are_those_that_prepare_takes_and_what_is_passed_over_is_said(tmp_path, capsys):
    """Without an extension, with a wrong one, with any name; on a store as in a folder; and a camera's raw file is no picture."""
    (tmp_path / "animal" / "cat").mkdir(parents=True)
    (tmp_path / "animal" / "dog").mkdir()
    (tmp_path / "animal" / "eel").mkdir()  # without pictures: samples may be of some classes
    names = ["cat/none", "cat/a.weird", "dog/b.png", "dog/back\\slash\n.png", b"dog/caf\xe9".decode(errors="surrogateescape")]
    for i, name in enumerate(names):
        (tmp_path / "animal" / name).write_bytes(encode_png(FAKE[i]))
    for name in ("cat/notes.txt", "cat/words", "dog/.DS_Store", "dog/._b.png"):
        (tmp_path / "animal" / name).write_bytes(b"x")
    found = load_samples(str(tmp_path / "animal"), 1)
    assert (found.names, found.labels.tolist()) == (("cat", "dog"), [0, 0, 1, 1, 1])
    order = [1, 0, 2, 3, 4]
    assert np.array_equal(found.images, FAKE[order])
    said = "passed over: hidden files and what systems left 2, .txt 1, no extension 1\n"
    assert capsys.readouterr().out == said
    deeper = load_samples(str(tmp_path), 1, class_depth=2)
    assert (deeper.names, deeper.labels.tolist()) == (("animal/cat", "animal/dog"), [0, 0, 1, 1, 1])
    assert load_samples(str(tmp_path), 1).names == ("animal",)
    prepared = image_folder(str(tmp_path), 8, 1, class_depth=0)
    assert (prepared.items, prepared.passed_over) == (5, {"hidden files and what systems left": 2, ".txt": 1, "no extension": 1})
    (tmp_path / "animal" / "dog" / "x.nef").write_bytes(b"MM\0*" + bytes(99))
    with pytest.raises(DataError, match=r"dog/x\.nef: it is a camera's raw file"):
        load_samples(str(tmp_path), 1)


def test_on_a_store_the_same_files_are_taken(s3, capsys):
    place = "s3://lab/samples-of-score"
    store = open_store(place)
    for i, name in enumerate(["cat/none", "cat/a.weird", "dog/b.png"]):
        store.put(name, encode_png(FAKE[i]))
    for name in ("cat/notes.txt", "cat/words", "dog/._b.png", "dog/empty"):
        store.put(name, b"" if name.endswith("empty") else b"x")
    found = load_samples(place, 1)
    assert (found.names, found.labels.tolist()) == (("cat", "dog"), [0, 0, 1])
    assert np.array_equal(found.images, FAKE[[1, 0, 2]])
    assert capsys.readouterr().out == "passed over: no extension 2, .txt 1, hidden files and what systems left 1\n"


def test_images_beside_folders_of_images_are_refused(tmp_path):
    (tmp_path / "thumbnails").mkdir()
    for name in ("0.png", "1.png", "thumbnails/0.png"):
        (tmp_path / name).write_bytes(encode_png(FAKE[0]))
    with pytest.raises(
        DataError, match=r"holds 2 images beside its class folders, such as 0\.png; move them, or set --class-depth 0"
    ):
        load_samples(str(tmp_path), 1)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda", "torch .* sees no GPU"),
        ("cuda:7", "torch .* sees (no GPU|only . GPU)"),
        ("gpu", "give cpu, cuda, or cuda:N"),
        ("meta", "give cpu, cuda, or cuda:N"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(monkeypatch, device, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=words):
        score("none.npz", reference="none.npz", extractor="none", device=device)


def test_image_files_are_read_several_at_a_time_and_keep_their_order(place, monkeypatch):
    read, together = scores._read, threading.Barrier(READERS)

    def slow(store, path):
        if int(Path(path).stem) < READERS:
            together.wait(60)  # for all of the first: one after the other, they would wait in vain
        return read(store, path)

    monkeypatch.setattr(scores, "_read", slow)
    assert np.array_equal(load_samples(str(place / "png"), 1).images, FAKE)


def test_lossy_files_say_so_in_the_row(judge, place):
    yardstick = Yardstick(judge, from_npz((place / "real.npz").read_bytes(), "real", judge))
    row = score_samples(Samples(FAKE, None, lossy=True), yardstick, name="x")
    assert row.rounding == "not known, compressed with loss"


def _bad(folder: Path) -> dict[str, str]:
    np.savez(folder / "floats.npz", FAKE.astype(np.float32))
    np.savez(folder / "short.npz", FAKE, LABELS[:5])
    np.savez(folder / "named.npz", images=FAKE)
    np.savez(folder / "objects.npz", np.array([{}, 1], object))
    (folder / "text.npz").write_bytes(b"hello")
    for name, images in (("sizes", [FAKE[0], FAKE[1][:4, :4]]), ("broken", [])):
        (folder / name).mkdir()
        for i, image in enumerate(images):
            (folder / name / f"{i}.png").write_bytes(encode_png(image))
    (folder / "broken" / "0.png").write_bytes(b"no image")
    (folder / "empty").mkdir()
    return {
        "floats.npz": r"must be images uint8 \(N, H, W, C\), not float32",
        "short.npz": "arr_1 of .* must be one whole number for each of 240 images",
        "named.npz": "has no arr_0",
        "objects.npz": "pickled objects are never read",
        "text.npz": "is not an .npz of plain arrays",
        "none.npz": "does not exist; correct the path of the samples",
        "sizes": "1.png is 4 x 4 pixels and 0.png is 8 x 8",
        "broken": "broken/0.png: its image is neither PNG, JPEG, WebP, GIF, BMP nor TIFF; leave it out",
        "empty": "holds no images and no manifest.json; give the place",
    }


def test_samples_that_cannot_be_measured_are_refused_in_one_sentence(tmp_path):
    for name, words in _bad(tmp_path).items():
        with pytest.raises(DataError, match=words) as error:
            load_samples(str(tmp_path / name), 1)
        assert "\n" not in str(error.value)


def test_with_the_unit_of_an_evaluation_a_score_has_its_bits(judge, place):
    yardstick = Yardstick(judge, from_npz((place / "real.npz").read_bytes(), "real", judge))
    row = score_samples(Samples(FAKE, LABELS), yardstick, name="x", unit=100)
    units = [judge.measure(FAKE[first : first + 100]) for first in (0, 100, 200)]
    assert {name: getattr(row, name) for name in values(units, LABELS, yardstick)} == values(units, LABELS, yardstick)


def test_half_a_dinov2_is_refused(place):
    with pytest.raises(DataError, match="give both or neither"):
        _score(place, "fake.npz", dinov2="dinov2_vitl14_pretrain.pth")


def test_dinov2_stands_beside_the_rest_which_it_leaves_alone(place, judge, tmp_path, monkeypatch):
    monkeypatch.setattr(dinov2, "VisionTransformer", lambda: VisionTransformer(width=16, depth=1, heads=2))
    torch.manual_seed(0)
    torch.save(VisionTransformer(width=16, depth=1, heads=2).state_dict(), tmp_path / dinov2.FILE)
    weights, real = str(tmp_path / dinov2.FILE), str(place / "real.npz")
    plain, row = _score(place, "fake.npz"), _score(place, "fake.npz", dinov2=weights, dinov2_reference=real)
    network = load_beside("dinov2", weights)
    a, b = (from_features(network.measure(images).features) for images in (REAL, FAKE))
    assert row.fd_dinov2 == frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert row.fd_dinov2_std is not None
    assert row.dinov2 == network.hash
    pinned = {"dinov2": weights, "dinov2_reference": real}
    assert _score(place, "fake.npz", **pinned, dinov2_hash=network.hash) == row
    with pytest.raises(DataError, match=f"has the hash {network.hash} and not {'c3' * 32}"):
        _score(place, "fake.npz", **pinned, dinov2_hash="c3" * 32)
    without = {"fd_dinov2": None, "fd_dinov2_std": None, "dinov2": "", "dinov2_reference": ""}
    assert {name: getattr(row, name) for name in row.__dataclass_fields__} | without == {
        name: getattr(plain, name) for name in plain.__dataclass_fields__
    }


def test_an_extractor_of_another_hash_is_refused(place, judge):
    assert _score(place, "fake.npz", extractor_hash=judge.hash).extractor_hash == judge.hash
    with pytest.raises(DataError, match=f"has the hash {judge.hash} and not {'c3' * 32}"):
        _score(place, "fake.npz", extractor_hash="c3" * 32)


def test_the_command_prints_the_row_and_writes_it(place, tmp_path, capsys):
    row = _score(place, "fake.npz", w=0.5, facts={"steps": 8})
    options = argparse.Namespace(
        samples=str(place / "fake.npz"),
        reference=str(place / "real.npz"),
        extractor=str(place / "toys.safetensors"),
        extractor_hash="",
        dinov2="",
        dinov2_hash="",
        dinov2_reference="",
        dataset="toys",
        name="theirs",
        w=0.5,
        overrides=["steps=8"],
        device="cpu",
        json=str(tmp_path / "row.json"),
        request_payer=False,
        unsigned=False,
        class_depth=1,
    )
    command(options)
    printed = capsys.readouterr().out
    assert f"fid                  {row.fid:.6g}\n" in printed
    assert "not known" not in printed
    assert from_json((tmp_path / "row.json").read_text()) == [row]


# --- without classes ---


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set of one class, the evaluator that learned its turns, and samples: a flat folder, shards, an .npz."""
    folder = tmp_path_factory.mktemp("flat")
    turner = fit_rotations(REAL[LABELS == 0], epochs=5, name="photos-rotations")
    (folder / "turns.safetensors").write_bytes(turner.to_bytes())
    for name, images in (("real", REAL[LABELS == 0]), ("shards", FAKE[LABELS == 0])):
        store = open_store(str(folder / name))
        packed = pack_shard([Sample(image, 0) for image in images])
        save_manifest(store, build_manifest(Schema(8, 1, 1), [packed.index("0.tar", store.put("0.tar", packed.data))]))
    (folder / "png").mkdir()
    for i, image in enumerate(FAKE[LABELS == 0]):
        (folder / "png" / f"{i:04d}.png").write_bytes(encode_png(image))
    np.savez(folder / "fake.npz", FAKE[LABELS == 0], np.zeros(N // 2, np.int64))
    return folder


@pytest.mark.parametrize("samples", ["png", "shards", "fake.npz"])
def test_a_flat_folder_is_scored_against_a_flat_folder_without_a_score_or_an_accuracy(flat, capsys, samples):
    row = score(str(flat / samples), reference=str(flat / "real"), extractor=str(flat / "turns.safetensors"), name="theirs")
    assert (row.fid_name, row.reference_n, row.n) == ("FID-photos-rotations", N // 2, N // 2)
    assert (row.inception_score, row.inception_score_std, row.accuracy) == (None, None, None)
    assert None not in (row.fid, row.fid_std, row.precision, row.recall, row.kid)
    said = capsys.readouterr()
    assert "no accuracy" not in said.out + said.err
    assert from_json(to_json([row])) == [row]
    other = score(str(flat / samples), reference=str(flat / "shards"), extractor=str(flat / "turns.safetensors"))
    assert abs(other.fid) < 1e-3 < row.fid  # the very images


def test_class_folders_have_no_accuracy_by_an_evaluator_without_classes(flat, tmp_path, capsys):
    folders = _class_folders(tmp_path, {0: "top", 1: "bottom"})
    row = score(folders, reference=str(flat / "real"), extractor=str(flat / "turns.safetensors"))
    assert (row.n, row.accuracy, row.inception_score) == (N, None, None)
    assert "no accuracy" not in capsys.readouterr().out


def test_one_class_has_no_accuracy_by_an_evaluator_of_other_data(flat, place, judge):
    """Its label 0 is not class 0 of that evaluator; only the Inception score needs no labels."""
    for samples in (flat / "shards", flat / "png"):
        row = score(str(samples), reference=str(place / "real.npz"), extractor=str(place / "toys.safetensors"))
        assert (row.accuracy, row.inception_score is None) == (None, False)
    one = Yardstick(judge, from_npz((place / "real.npz").read_bytes(), "real", judge))
    one = Yardstick(judge, dataclasses.replace(one.reference, class_names=("photos",)))
    for samples in (Samples(FAKE, LABELS), Samples(FAKE, 0 * LABELS, names=("photos",), numbered=False)):
        assert score_samples(samples, one, name="x").accuracy is None


def test_pictures_that_are_not_square_are_refused_by_an_evaluator_of_turns(flat, tmp_path):
    np.savez(tmp_path / "wide.npz", np.zeros((20, 8, 10, 1), np.uint8))
    with pytest.raises(DataError, match=r"'photos-rotations' measures uint8 \(N, 8, 8, 1\), not uint8 \(20, 8, 10, 1\)"):
        score(str(tmp_path / "wide.npz"), reference=str(flat / "real"), extractor=str(flat / "turns.safetensors"))


def test_an_evaluator_that_can_hardly_tell_turns_says_so(flat, tmp_path, capsys):
    noise = fit_rotations(np.random.default_rng(0).integers(0, 256, (200, 8, 8, 1), np.uint8), epochs=1, name="noise-rotations")
    (tmp_path / "noise.safetensors").write_bytes(noise.to_bytes())
    score(str(flat / "png"), reference=str(flat / "real"), extractor=str(tmp_path / "noise.safetensors"))
    accuracy = f"{100 * noise.accuracy:.1f} % rotation accuracy on held-out images"
    assert f"WARNING: noise-rotations has {accuracy}, and guessing has 25 %" in capsys.readouterr().err
