"""Tests of sources/: real digits, folders, IDX files, and what is wrong with them in one sentence."""

import gzip
import io
import pickle
from pathlib import Path
from typing import Any, get_args

import cloudpickle
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sklearn.datasets
from PIL import Image

from freeguide.configs import schema
from freeguide.configs.errors import ConfigError, DataError
from freeguide.data_pipeline.decode import BadSample, decode_image, fit
from freeguide.data_pipeline.index import index_shards
from freeguide.data_pipeline.manifest import Schema
from freeguide.data_pipeline.shards import Source
from freeguide.data_pipeline.sources.digits import digits
from freeguide.data_pipeline.sources.open import SOURCES, open_source
from freeguide.data_pipeline.store.open import open_store
from tests.data_pipeline.conftest import data_config, image_folder, names_file
from tests.data_pipeline.tars import make_tar, png


def test_digits_are_scikit_learns() -> None:
    source = digits()
    table = sklearn.datasets.load_digits()
    samples = [source.read(item) for item in range(source.items)]
    ours = sorted((sample.image.tobytes(), sample.label) for sample in samples)
    theirs = sorted(
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(table.images, table.target, strict=True)
    )
    assert ours == theirs
    assert samples[0].image.shape == (8, 8, 1)
    assert source.schema.class_names == tuple("0123456789")
    assert {sample.label for sample in samples[:100]} == set(range(10))  # shuffled, so that every shard has all classes


def folder(path: Path, classes: dict[str, int], size: tuple[int, int] = (12, 10)) -> Path:
    random = np.random.default_rng(0)
    for name, count in classes.items():
        (path / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path / name / f"{number}.png")
    return path


def test_classes_are_the_sorted_folder_names(tmp_path: Path) -> None:
    source = image_folder(str(folder(tmp_path, {"dog": 3, "cat": 2, "eel": 1})), 8, 3)
    assert source.schema.class_names == ("cat", "dog", "eel")
    assert sorted(source.read(item).label for item in range(6)) == [0, 0, 1, 1, 1, 2]
    assert source.read(0).image.shape == (8, 8, 3)


def test_resize_is_adms(tmp_path: Path) -> None:
    """Against the steps of guided-diffusion's center_crop_arr, written out here for an image of 67 x 45 brought to 8."""
    (tmp_path / "a").mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 67, 3), dtype=np.uint8))
    picture.save(tmp_path / "a" / "0.png")
    box = picture.resize((33, 22), Image.Resampling.BOX).resize((16, 11), Image.Resampling.BOX)
    small = np.asarray(box.resize((round(16 * 8 / 11), 8), Image.Resampling.BICUBIC))
    expected = small[:, (small.shape[1] - 8) // 2 :][:, :8]
    assert np.array_equal(image_folder(str(tmp_path), 8, 3).read(0).image, expected)


def test_grey_images_of_a_colour_folder(tmp_path: Path) -> None:
    source = image_folder(str(folder(tmp_path, {"a": 1})), 8, 1)
    assert source.read(0).image.shape == (8, 8, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_area_resize_is_the_mean_of_what_each_pixel_covers(tmp_path: Path, channels: int) -> None:
    """A 24 x 40 image: its centre square of 24, in blocks of 3 x 3; against means in float64, rounded to half a grey value."""
    (tmp_path / "a").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    pixels = pixels if channels == 3 else np.repeat(pixels[..., :1], 3, axis=2)
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    source = open_source(data_config(source="folder", path=str(tmp_path), classes=0, channels=channels, resize="area"))
    means = pixels[:, 8:32].reshape(8, 3, 8, 3, 3).mean((1, 3))[..., :channels]
    assert np.abs(source.read(0).image - means).max() <= 0.5
    adm = image_folder(str(tmp_path), 8, channels)
    assert adm.identity != source.identity
    assert not np.array_equal(adm.read(0).image, source.read(0).image)


def test_an_image_that_is_no_image_is_named(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 1})
    (tmp_path / "a" / "0.png").write_bytes(b"not an image")
    with pytest.raises(BadSample, match=r"a/0\.png"):
        image_folder(str(tmp_path), 8, 3).read(0)


def test_the_identity_follows_the_files(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 2})
    before = image_folder(str(tmp_path), 8, 3).identity
    assert image_folder(str(tmp_path), 8, 3).identity == before
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "2.png")
    assert image_folder(str(tmp_path), 8, 3).identity != before


def test_missing_empty_and_overfull_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist; set data\.path"):
        image_folder(str(tmp_path / "none"), 8, 3)
    with pytest.raises(DataError, match="has no class folders"):
        image_folder(str(tmp_path), 8, 3)
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="hold no images"):
        image_folder(str(tmp_path), 8, 3)
    folder(tmp_path, {"b": 1, "c": 1})
    with pytest.raises(DataError, match=r"has 3 class folders, but data\.classes is 2; set data\.classes=3"):
        image_folder(str(tmp_path), 8, 3, 2)
    with pytest.raises(DataError, match=r"has 3 class folders, but data\.classes is 4; set data\.classes=3"):
        image_folder(str(tmp_path), 8, 3, 4)


def idx(path: str, image_size: int = 28, **options: object) -> Source:
    return open_source(data_config(source="idx", path=path, image_size=image_size, channels=1, **{"classes": 0, **options}))


def parquet(path: str, image_size: int, channels: int, classes: int = 0, **options: object) -> Source:
    given = {"image_size": image_size, "channels": channels, "classes": classes, **options}
    return open_source(data_config(source="parquet", path=path, **given))


def tars(path: str, image_size: int, channels: int, classes: int) -> Source:
    return open_source(data_config(source="webdataset", path=path, image_size=image_size, channels=channels, classes=classes))


def write_idx(path: Path, name: str, values: np.ndarray, compress: bool) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    data = header + values.tobytes()
    (path / (name + ".gz" if compress else name)).write_bytes(gzip.compress(data) if compress else data)


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files(tmp_path: Path, compress: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 7
    write_idx(tmp_path, "train-images-idx3-ubyte", images, compress)
    write_idx(tmp_path, "train-labels-idx1-ubyte", labels, compress)
    source = idx(str(tmp_path))
    samples = [source.read(item) for item in range(20)]
    assert source.schema.classes == 7
    ours = sorted((sample.image.tobytes(), sample.label) for sample in samples)
    assert ours == sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))
    small = idx(str(tmp_path), 14)
    means = images.reshape(20, 14, 2, 14, 2).astype(float).mean((2, 4))
    by_item = {sample.image.tobytes(): number for number, sample in enumerate(samples)}
    for number, image in enumerate(images):
        area = small.read(by_item[image.tobytes()]).image[..., 0]
        assert np.abs(area - means[number]).max() <= 0.5  # rounding to whole grey values


def test_damaged_idx_files_are_named(tmp_path: Path) -> None:
    images = np.zeros((20, 28, 28), np.uint8)
    write_idx(tmp_path, "train-labels-idx1-ubyte", np.zeros(20, np.uint8), False)
    with pytest.raises(DataError, match="has no train-images-idx3-ubyte"):
        idx(str(tmp_path))
    path = tmp_path / "train-images-idx3-ubyte"
    write_idx(tmp_path, path.name, images, False)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"\0", b"\x1f\x8b" + whole, b"", whole[:3] + b"\1" + whole[4:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="train-images-idx3-ubyte cannot be read"):
            idx(str(tmp_path))
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"28 pixels wide; set data\.image_size"):
        idx(str(tmp_path), 32)
    write_idx(tmp_path, "train-labels-idx1-ubyte", np.zeros(19, np.uint8), False)
    with pytest.raises(DataError, match="do not fit"):
        idx(str(tmp_path))


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """The header states 20 images; whatever follows them is not read."""
    write_idx(tmp_path, "train-labels-idx1-ubyte", np.zeros(20, np.uint8), False)
    out = io.BytesIO()
    with gzip.open(out, "wb") as stream:
        stream.write(bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (20, 28, 28)))
        for _ in range(64):
            stream.write(bytes(2**20))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(out.getvalue())
    with pytest.raises(DataError, match="should hold 15680 values"):
        idx(str(tmp_path))


def write_parquet(path: Path, images: list[bytes | None], labels: list[int], struct: bool) -> None:
    cells = [{"bytes": data, "path": "x.png"} for data in images] if struct else images
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": labels, "other": [0] * len(labels)}), path)


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_files_with_an_image_column(tmp_path: Path, struct: bool) -> None:
    images = [png(number) for number in range(10)]
    write_parquet(tmp_path / "data" / "a.parquet", list(images[:6]), list(range(6)), struct)
    write_parquet(tmp_path / "data" / "b.parquet", list(images[6:]), list(range(6, 10)), struct)
    source = parquet(str(tmp_path / "data"), 8, 3)
    assert (source.items, source.schema.classes) == (10, 10)
    for sample in map(source.read, range(10)):
        assert np.array_equal(sample.image, decode_image(images[sample.label], 3))
    assert sorted(source.read(item).label for item in range(10)) == list(range(10))
    assert parquet(str(tmp_path / "data" / "b.parquet"), 8, 3, 10).items == 4


def test_parquet_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Parquet files"):
        parquet(str(tmp_path), 8, 3)
    write_parquet(tmp_path / "a.parquet", [png(0), b"no image", None], [0, 1, 2], True)
    source = parquet(str(tmp_path), 8, 3)
    outcomes = []
    for item in range(3):
        try:
            outcomes.append(source.read(item).label)
        except BadSample as error:
            outcomes.append(str(error).split(" of ")[0])
    assert sorted(map(str, outcomes)) == ["0", "row 1", "row 2"]
    with pytest.raises(DataError, match=r"set data\.classes=3"):
        parquet(str(tmp_path), 8, 3, 2)
    pyarrow.parquet.write_table(pyarrow.table({"picture": [png(0)], "label": [0], "other": [0]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has no column 'image' of images, but 'picture', 'label', 'other'; rename it"):
        parquet(str(tmp_path), 8, 3)
    pyarrow.parquet.write_table(pyarrow.table({"image": [png(0)], "label": pyarrow.array([None], "int64")}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError,
        match=r"a\.parquet: 1 label is missing in 'label'; leave those rows out, or",
    ):
        parquet(str(tmp_path), 8, 3)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        parquet(str(tmp_path), 8, 3)


def write_labels(path: Path, **columns: object) -> str:
    images = [png(number) for number in range(6)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, **columns}), path, row_group_size=4)
    return str(path)


def labels_by_image(source: Source) -> list[int]:
    """The labels in the order of the rows, whose images carry their numbers."""
    samples = [source.read(item) for item in range(source.items)]
    return [sample.label for sample in sorted(samples, key=lambda sample: int(sample.image[0, 1, 0]))]


def test_parquet_labels_of_other_kinds_are_quoted_and_read_by_the_options_that_the_sentence_names(tmp_path: Path) -> None:
    text = ["cat", "eel", "dog", "dog", "cat", "eel"]
    path = write_labels(tmp_path / "a.parquet", label=text, meta=[{"class": word} for word in text], n=[1, 3, 2, 2, 1, 3])
    words = r"row 0 of .*a\.parquet: its label 'cat' is not a number from 0; list the names of the classes in data\.class_names"
    with pytest.raises(DataError, match=words):
        parquet(path, 8, 3)
    names = tmp_path / "names"
    names.write_text("eel\ndog\ncat\n")
    for key in ("", "label", "meta.class"):
        given = {"source": "parquet", "path": path, "class_names": str(names), "label_key": key, "classes": 0}
        source = open_source(data_config(**given))
        assert (source.schema.classes, source.schema.class_names) == (3, ("eel", "dog", "cat"))
        assert labels_by_image(source) == [2, 0, 1, 1, 2, 0]
    with pytest.raises(DataError, match=r"row 2 of .*: its label 'dog' is none of data\.class_names"):
        parquet(path, 8, 3, class_names=names_file(tmp_path / "names", ["cat", "eel"]))
    with pytest.raises(
        DataError, match=r"no column 'lbl' of labels, but 'image', 'label', 'meta', 'n'; name it with data\.label_key"
    ):
        parquet(path, 8, 3, label_key="lbl")
    with pytest.raises(DataError, match=r"4 labels are missing in 'meta\.x'"):
        parquet(path, 8, 3, label_key="meta.x")
    with pytest.raises(DataError, match=r"row 0 of .*: its label is a list or an object; name a column"):
        parquet(path, 8, 3, label_key="meta")


def test_parquet_labels_that_begin_at_1_or_leave_classes_without_a_picture(tmp_path: Path) -> None:
    path = write_labels(tmp_path / "a.parquet", label=[1, 3, 2, 2, 1, 3], gap=[0, 2, 5, 5, 0, 2], low=[-1, 0, 0, 0, 0, 0])
    words = r"no picture: 0; if labels begin at 1, list them in data\.class_names, one a line; set data\.classes=4 if that is meant"
    with pytest.raises(DataError, match=words):
        parquet(path, 8, 3)
    source = parquet(path, 8, 3, class_names=names_file(tmp_path / "names", "123"))
    assert (source.schema.classes, labels_by_image(source)) == (3, [0, 2, 1, 1, 0, 2])
    assert parquet(path, 8, 3, 4).schema.classes == 4
    with pytest.raises(DataError, match=r"no picture: 1, 3, 4; set data\.classes=6 if that is meant"):
        parquet(path, 8, 3, label_key="gap")
    assert parquet(path, 8, 3, 6, label_key="gap").identity != parquet(path, 8, 3, 4).identity
    with pytest.raises(DataError, match="its label -1 is not a number from 0"):
        parquet(path, 8, 3, label_key="low")


def test_idx_labels_that_begin_at_1_are_read_by_their_names(tmp_path: Path) -> None:
    """As EMNIST's letters."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    labels = (np.arange(20) % 5 + 1).astype(np.uint8)
    write_idx(tmp_path, "train-images-idx3-ubyte", images, False)
    write_idx(tmp_path, "train-labels-idx1-ubyte", labels, False)
    with pytest.raises(DataError, match=r"have no picture: 0; if labels begin at 1, list them in data\.class_names"):
        idx(str(tmp_path), 8)
    source = idx(str(tmp_path), 8, class_names=names_file(tmp_path / "names", "12345"))
    assert (source.schema.classes, source.schema.class_names) == (5, tuple("12345"))
    ours = sorted((sample.image.tobytes(), sample.label) for sample in map(source.read, range(20)))
    assert ours == sorted((image.tobytes(), int(label) - 1) for image, label in zip(images, labels, strict=True))


def counted_loads(source: Source, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that the source loads from now on."""
    loads: list[int] = []
    original = source.read.load  # type: ignore[attr-defined]
    monkeypatch.setattr(source.read, "load", lambda block: loads.append(block) or original(block))
    return loads


def test_parquet_is_read_by_the_row_group_and_one_window_of_them_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 row groups of 5 images in windows of 4 groups: one pass loads each group once, and holds no more than 4."""
    images = [png(number, 32) for number in range(100)]
    table = pyarrow.table({"image": images, "label": list(range(100))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5, compression="none")
    whole = parquet(str(tmp_path), 32, 3)
    metadata = pyarrow.parquet.read_metadata(tmp_path / "a.parquet")
    total = sum(metadata.row_group(number).total_byte_size for number in range(20))
    monkeypatch.setattr("freeguide.data_pipeline.sources.shuffle.WINDOW_BYTES", total // 20 * 9 // 2)
    source = parquet(str(tmp_path), 32, 3)
    blocks: Any = source.read
    assert blocks.window == 4
    loads = counted_loads(source, monkeypatch)
    held, labels = 0, []
    for item in range(100):
        labels.append(source.read(item).label)
        held = max(held, len(blocks.kept))
    assert sorted(labels) == list(range(100))
    assert (sorted(loads), held) == (list(range(20)), 4)
    assert len({label // 5 for label in labels[:20]}) == 4  # a window is a mixture of its four groups
    assert labels[:20] != sorted(labels[:20])
    assert labels != [whole.read(item).label for item in range(100)]
    copy: Any = pickle.loads(cloudpickle.dumps(source))  # what an actor gets: the same items, and none of the bytes
    assert copy.read.kept == {}
    assert [copy.read(item).label for item in range(100)] == labels


def foreign(path: Path, tars: int = 6, each: int = 7) -> Path:
    """WebDataset tars of 12 x 12 images in label order, with a manifest as `freeguide index` writes it."""
    path.mkdir()
    for number in range(tars):
        first = number * each
        members = [
            member for n in range(first, first + each) for member in ((f"{n}.cls", str(n // 5).encode()), (f"{n}.png", png(n, 12)))
        ]
        (path / f"part-{number}.tar").write_bytes(make_tar(members))
    index_shards(open_store(str(path)), Schema(12, 3, 10))
    return path


def test_foreign_tars_are_decoded_resized_and_shuffled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = foreign(tmp_path / "tars")
    monkeypatch.setattr("freeguide.data_pipeline.sources.webdataset.BLOCK_BYTES", 4096)
    source = open_source(data_config(source="webdataset", path=str(path)))
    loads = counted_loads(source, monkeypatch)
    samples = [source.read(item) for item in range(source.items)]
    expected = {fit(decode_image(png(n, 12), 3), 8).tobytes(): n // 5 for n in range(42)}
    assert {sample.image.tobytes(): sample.label for sample in samples} == expected
    assert len(loads) == len(set(loads)) > 5
    assert [sample.label for sample in samples] != sorted(sample.label for sample in samples)


def test_foreign_tars_need_a_manifest_whose_labels_fit(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="freeguide index"):
        tars(str(tmp_path / "none"), 8, 3, 10)
    with pytest.raises(DataError, match=r"has 10 classes, but data\.classes is 3"):
        tars(str(foreign(tmp_path / "tars")), 8, 3, 3)


def test_a_damaged_foreign_sample_is_named(tmp_path: Path) -> None:
    path = foreign(tmp_path / "tars")
    data = bytearray((path / "part-2.tar").read_bytes())
    data[600] ^= 1
    (path / "part-2.tar").write_bytes(bytes(data))
    source = tars(str(path), 8, 3, 10)
    bad = []
    for item in range(42):
        try:
            source.read(item)
        except BadSample as error:
            bad.append(str(error))
    assert len(bad) == 1
    assert "Sample 0 of part-2.tar" in bad[0]


def test_the_configuration_names_the_source(tmp_path: Path) -> None:
    assert open_source(data_config(source="digits", channels=1)).items == 1797
    with pytest.raises(ConfigError, match=r"set data\.image_size=8, channels=1"):
        open_source(data_config(source="digits", image_size=16, channels=1))
    with pytest.raises(ConfigError, match="choose digits, folder, idx, parquet or webdataset"):
        open_source(data_config(source="imagenet"))
    assert set(SOURCES) == set(get_args(schema.Source))
    folder(tmp_path, {"a": 2})
    assert open_source(data_config(source="folder", path=str(tmp_path), classes=1)).items == 2
    with pytest.raises(DataError, match=r"has 1 class folders, but data\.classes is 10; set data\.classes=1, or leave it out"):
        open_source(data_config(source="folder", path=str(tmp_path)))
