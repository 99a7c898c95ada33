"""Tests of sources.py: real digits, folders, IDX files, and what is wrong with them in one sentence."""

import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sklearn.datasets
from PIL import Image

from configs.errors import ConfigError, DataError
from data_pipeline.decode import BadSample, decode_image
from data_pipeline.sources import digits, idx, image_folder, open_source, parquet
from tests.data_pipeline.conftest import data_config
from tests.data_pipeline.tars import png


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
    assert parquet(str(tmp_path / "data" / "b.parquet"), 8, 3).items == 4


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
    with pytest.raises(DataError, match="need columns 'picture' and 'label'"):
        parquet(str(tmp_path), 8, 3, image="picture")
    pyarrow.parquet.write_table(pyarrow.table({"image": [png(0)], "label": pyarrow.array([None], "int64")}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="1 labels are missing"):
        parquet(str(tmp_path), 8, 3)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="need columns"):
        parquet(str(tmp_path), 8, 3)


def test_the_configuration_names_the_source(tmp_path: Path) -> None:
    assert open_source(data_config(source="digits", channels=1)).items == 1797
    with pytest.raises(ConfigError, match=r"set data\.image_size=8, channels=1"):
        open_source(data_config(source="digits", image_size=16, channels=1))
    with pytest.raises(ConfigError, match="choose digits, folder, idx or parquet"):
        open_source(data_config(source="imagenet"))
    folder(tmp_path, {"a": 2})
    assert open_source(data_config(source="folder", path=str(tmp_path))).items == 2
