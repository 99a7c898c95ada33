"""Tests of pictures.py and of what `prepare` makes of people's own folders: names, classes, droppings, links, what is counted."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from freeguide.cluster.jobs.prepare import prepare
from freeguide.configs.errors import DataError
from freeguide.configs.load import load_config
from freeguide.data_pipeline import pictures
from freeguide.data_pipeline.pictures import is_dropping
from freeguide.data_pipeline.scan import scan_all
from freeguide.data_pipeline.shards import Plan, write_shards
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import load_manifest, save_manifest
from tests.data_pipeline.conftest import image_folder, names_file

CONFIG = Path(__file__).parents[2] / "configs" / "image_folder.yaml"


def picture(path: "Path | bytes", grey: int = 100, size: tuple[int, int] = (12, 10), codec: str = "PNG") -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        Image.new("RGB", size, (grey, grey, grey)).save(file, codec)


def tree(root: Path, *paths: str) -> Path:
    for number, path in enumerate(paths):
        picture(root / path, number)
    return root


ODD: list[str | bytes] = [
    "with space.png", "umläut é.jpg", "emoji 🦜.png", b"caf\xe9.png", "-rf.png", "--help.jpeg", "n" * 251 + ".png", "Same.png",
    "same.png",    "SAME.PNG", "dots.in.the.name.v2.png", "no extension", "deep/er/and deeper/x.JPEG",
    "quote'\".png", "new\nline.png", "100%.webp", "#.png",
]  # fmt: skip


def test_a_folder_with_odd_names_is_prepared_without_stating_its_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures of mixed sizes in three classes of the oddest names, and `prepare` as the README has it, to the last one."""
    random, expected = np.random.default_rng(0), {}
    for label, name in enumerate([b"- dash \xff", b"sch\xc3\xb6n & gut", "zebra 🦓".encode()]):
        for number, odd in enumerate(ODD):
            raw = odd if isinstance(odd, bytes) else odd.encode()
            size = tuple(random.integers(5, 90, 2).tolist())
            ext = os.path.splitext(raw)[1].lower()
            codec = {b".jpg": "JPEG", b".jpeg": "JPEG", b".webp": "WEBP"}.get(ext, "PNG")
            picture(os.path.join(os.fsencode(tmp_path), b"images", name, raw), 10 * number, size, codec)
            expected[label, number] = 10 * number
    overrides = [f"data.path={tmp_path / 'images'}", f"data.uri={tmp_path / 'data'}"]
    manifest = prepare(load_config(CONFIG, overrides, "prepare"))
    assert (manifest.samples, manifest.schema.classes) == (3 * len(ODD), 3)
    assert manifest.schema.class_names == ("- dash \\xff", "schön & gut", "zebra 🦓")
    images, labels = scan_all(open_store(str(tmp_path / "data")), manifest)
    found = sorted(zip(labels.tolist(), np.rint(images.mean((1, 2, 3)) / 10).astype(int).tolist(), strict=True))
    assert found == sorted(expected)
    assert "51 images 32x32x3, 3 classes" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["jpeg", "PNG", "bin", "heic", ""])
def test_the_bytes_decide_what_a_file_is(tmp_path: Path, name: str) -> None:
    for number, codec in enumerate(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]):
        picture(tmp_path / "a" / (f"{number}.{name}" if name else str(number)), 40 * number, codec=codec)
    source = image_folder(str(tmp_path), 8, 1)
    assert sorted(round(float(source.read(item).image.mean()) / 40) for item in range(6)) == list(range(6))
    assert source.passed_over == {}


def test_what_is_no_picture_is_counted_by_kind_and_kept_in_the_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path / "images", "a/0.png", "a/1.png", "b/sub/0.png", "b/1.png")
    for path in ("a/notes.txt", "b/labels.txt", "wnids.txt", "a/readme", "a/x.weird", "b/.DS_Store", "b/._0.png", "a/Thumbs.db"):
        (root / path).write_bytes(b"BMI of a person")
    (root / "b" / "broken.png").write_bytes(b"<!DOCTYPE html><html>404</html>")
    tree(root, "__MACOSX/a/0.png", "a/.ipynb_checkpoints/0.png", "@eaDir/a.png", ".git/x/y.png", "b/lost+found/x.png")
    os.mkfifo(root / "a" / "pipe.png")
    overrides = [f"data.path={root}", f"data.uri={tmp_path / 'data'}"]
    with pytest.raises(DataError, match=r"1 of 5 images cannot be read, .*broken\.png: its image is neither .*: it is a web page"):
        prepare(load_config(CONFIG, overrides, "prepare"))
    manifest = prepare(load_config(CONFIG, [*overrides, "data.bad_images=0.2"], "prepare"))
    expected = {".txt": 3, ".weird": 1, "cannot be read": 1, "hidden files and what systems left": 8, "no extension": 1}
    assert manifest.passed_over == {**expected, "pipes and devices": 1}
    assert load_manifest(open_store(str(tmp_path / "data"))).passed_over == manifest.passed_over
    assert manifest.schema.class_names == ("a", "b")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "passed over: hidden files and what systems left 8, .txt 3, .weird 1, cannot be read 1, no extension 1, pipes and devices 1"
    )


@pytest.mark.parametrize(
    ("path", "left"),
    [
        ("__MACOSX/a/._x.png", True), ("a/._0.png", True), (".DS_Store", True), ("a/.ipynb_checkpoints/0.png", True),
        ("a/THUMBS.DB", True),
        ("desktop.ini", True), ("@eaDir/x", True), ("lost+found", True), ("./a/0.png", False), ("a/0.png", False), ("a.b/c", False),
        ("_a/x", False),
    ],
)  # fmt: skip
def test_droppings(path: str, left: bool) -> None:
    assert is_dropping(path) == left


def test_classes_are_the_folders_of_a_level_at_any_depth(tmp_path: Path) -> None:
    root = tree(tmp_path, "n0/images/0.png", "n0/images/1.png", "n1/images/0.png", "n1/more/x/1.png")
    (root / "n0" / "n0_boxes.txt").write_text("")
    first, second, none = (image_folder(str(root), 8, 3, class_depth=depth) for depth in (1, 2, 0))
    assert (first.schema.class_names, first.items) == (("n0", "n1"), 4)
    assert second.schema.class_names == ("n0/images", "n1/images", "n1/more")
    assert (none.schema.classes, {none.read(item).label for item in range(4)}) == (1, {0})
    with pytest.raises(DataError, match=r"holds 3 images beside its class folders, such as n0/images/0\.png.*class_depth=0"):
        image_folder(str(root), 8, 3, class_depth=3)
    assert len({first.identity, second.identity, none.identity}) == 1  # the classes are the schema's, which `prepare` adds


def test_a_flat_folder_is_one_class(tmp_path: Path) -> None:
    source = image_folder(str(tree(tmp_path, "0.png", "1.png")), 8, 3)
    assert (source.schema.classes, source.schema.class_names, source.items) == (1, (), 2)
    assert {source.read(item).label for item in range(2)} == {0}
    tree(tmp_path, "a/2.png")
    with pytest.raises(
        DataError, match=r"2 images beside its class folders, such as 0\.png; move them, or set data\.class_depth=0"
    ):
        image_folder(str(tmp_path), 8, 3)
    assert image_folder(str(tmp_path), 8, 3, class_depth=0).items == 3


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "test"), ("training", "validation", "test"), ("train",)])
def test_parts_of_a_data_set_are_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    tree(tmp_path, *(f"{name}/cat/0.png" for name in names), *(f"{name}/dog/0.png" for name in names))
    with pytest.raises(DataError, match=rf"parts of a data set and not classes; name one of them, data\.path=.*/{names[0]}"):
        image_folder(str(tmp_path), 8, 3)
    assert image_folder(str(tmp_path / names[0]), 8, 3).schema.class_names == ("cat", "dog")
    assert image_folder(tmp_path, class_names=names_file(tmp_path.with_suffix(".names"), names)).schema.class_names == names
    tree(tmp_path, "bus/0.png")  # a train beside a bus is a train
    assert "bus" in image_folder(str(tmp_path), 8, 3).schema.class_names


def test_classes_without_pictures_and_names_that_differ_in_capitals_are_named(tmp_path: Path) -> None:
    tree(tmp_path, "a/0.png", "c/0.png")
    (tmp_path / "b" / "album.png").mkdir(parents=True)
    with pytest.raises(DataError, match=r"class folders without images: b; put some there, or move the folders away"):
        image_folder(str(tmp_path), 8, 3)
    tree(tmp_path, "b/album.png/0.png", "A/0.png")
    with pytest.raises(DataError, match="differ in capitals only: A, a; merge or rename them"):
        image_folder(str(tmp_path), 8, 3)
    shutil.rmtree(tmp_path / "A")
    assert image_folder(str(tmp_path), 8, 3).items == 3


def test_a_file_of_names_numbers_the_classes(tmp_path: Path) -> None:
    tree(tmp_path / "images", "cat/0.png", "dog/0.png", "eel/0.png")
    base = [f"data.path={tmp_path / 'images'}", f"data.class_names={tmp_path / 'names'}"]

    def names(text: str, uri: str) -> tuple[str, ...]:
        (tmp_path / "names").write_text(text)
        return prepare(load_config(CONFIG, [*base, f"data.uri={tmp_path / uri}"], "prepare")).schema.class_names

    assert names("eel\ncat\n\ndog\r\n", "x") == ("eel", "cat", "dog")
    assert names('["dog", "eel", "cat"]', "y") == ("dog", "eel", "cat")
    store = open_store(str(tmp_path / "x"))
    images, labels = scan_all(store, load_manifest(store))
    assert {int(label): round(float(image.mean())) for image, label in zip(images, labels, strict=True)} == {0: 2, 1: 0, 2: 1}
    with pytest.raises(DataError, match=r"data\.class_names differ in eel, fox; list every class folder once"):
        names("cat\ndog\nfox", "z")
    with pytest.raises(DataError, match="must name every class once"):
        names("cat\ndog\ncat", "z")
    with pytest.raises(DataError, match="neither text nor a JSON list"):
        names("[cat", "z")


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    tree(tmp_path / "elsewhere", "0.png", "1.png")
    tree(tmp_path / "images", "a/0.png")
    (tmp_path / "images" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "a" / "1.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "images" / "a" / "back").symlink_to(tmp_path / "images")
    source = image_folder(str(tmp_path / "images"), 8, 3)
    assert (source.items, source.schema.class_names) == (4, ("a", "b"))
    assert source.passed_over == {"links that lead back": 1}
    (tmp_path / "images" / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    store = open_store(str(tmp_path / "data"))
    with pytest.raises(DataError, match=r"1 of 5 images cannot be read, .*gone\.png: No such file"):
        write_shards(image_folder(str(tmp_path / "images"), 8, 3), store)


def test_what_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, scandir = tree(tmp_path, "a/0.png", "b/secret/0.png"), os.scandir

    def guarded(path: "os.PathLike[str]") -> object:
        if os.fspath(path).endswith("secret"):  # root may list everything
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(pictures.os, "scandir", guarded)
    with pytest.raises(DataError, match=r"b/secret cannot be read \(Permission denied\)"):
        image_folder(str(root), 8, 3)


def test_a_folder_in_a_folder_without_end_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, "a/0.png", "a/" + "d/" * 300 + "0.png")
    with pytest.raises(DataError, match="deeper than 200 folders") as caught:
        image_folder(str(tmp_path), 8, 3)
    assert len(str(caught.value)) < 400


def test_pictures_that_cannot_be_read_yet_are_refused_by_name(tmp_path: Path) -> None:
    tree(tmp_path, "a/0.png")
    files = {
        "1.heic": (b"\0\0\0\x18ftypheic" + bytes(99), "it is HEIC; convert it"),
        "2": (b"\0\0\0\x18ftypavif" + bytes(99), "it is AVIF; convert it"),
        "3.jp2": (b"\0\0\0\x0cjP  " + bytes(99), "it is JPEG 2000; convert it"),
        "4.png": (b"", "it is empty"),
        "5.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS"),
        "6.jpg": (b"\n<html><body>Not found", "it is a web page"),
        "7.NEF": (b"MM\0*" + bytes(99), "camera's raw file"),
    }
    for name, (data, _) in files.items():
        (tmp_path / "a" / name).write_bytes(data)
    source, store = image_folder(str(tmp_path), 8, 3), open_store(str(tmp_path / "data"))
    with pytest.raises(DataError):
        write_shards(source, store)
    shards: list[str] = []
    write_shards(source, store, bad_images=0.9, progress=lambda done, of, bad: shards.extend(bad))
    for name, (_, words) in files.items():
        assert any(f"/{name}: " in line and words in line for line in shards), name


def test_the_same_folder_elsewhere_is_the_same_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied, and listed in another order: the same items in the same order under the same identity."""
    one = tree(tmp_path / "one", *(f"{name}/{number % 3}/{number}.png" for name in "ab" for number in range(9)))
    shutil.copytree(one, tmp_path / "two")
    before = image_folder(str(one), 8, 3)
    listed = pictures._listed
    monkeypatch.setattr(pictures, "_listed", lambda root: (listed(root)[0][::-1], *listed(root)[1:]))
    after = image_folder(str(tmp_path / "two"), 8, 3)
    assert after.identity == before.identity
    assert all(np.array_equal(before.read(item).image, after.read(item).image) for item in range(18))
    (tmp_path / "two" / "a" / "0" / "0.png").rename(tmp_path / "two" / "a" / "0" / "00.png")
    assert image_folder(str(tmp_path / "two"), 8, 3).identity != before.identity


def test_what_an_earlier_version_prepared_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree(tmp_path / "images", "a/0.png", "b/1.png")
    overrides = [f"data.path={tmp_path / 'images'}", f"data.uri={tmp_path / 'data'}"]
    config = load_config(CONFIG, overrides, "prepare")
    prepare(config)
    source = image_folder(str(tmp_path / "images"), 32, 3)
    place = tmp_path / "data" / "manifest.json"
    store = open_store(str(tmp_path / "data"))
    manifest, plan = load_manifest(store), Plan.make(source, config.data.shard_samples)
    assert manifest.source == plan.identity != plan.formerly
    save_manifest(store, replace(manifest, source=plan.formerly))
    before = place.read_bytes()
    prepare(config)
    assert place.read_bytes() == before
    assert "was prepared by an earlier version" in capsys.readouterr().out
    assert image_folder(str(tree(tmp_path / "images", "a/deep/2.png")), 32, 3).formerly == ""


@pytest.mark.slow
def test_a_hundred_thousand_files_are_listed_in_seconds(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    picture(tmp_path / "a" / "x", 1)
    data = (tmp_path / "a" / "x").read_bytes()
    for number in range(100_000):
        (tmp_path / "a" / (f"{number}.png" if number % 2 else str(number))).write_bytes(data)
    began = time.monotonic()
    assert image_folder(str(tmp_path), 8, 3).items == 100_001
    print(f"{time.monotonic() - began:.1f} s")
