"""References: from a manifest, from other tools' files, from ours; never from a pickle, and never silently wrong."""

import io
import pickle
from dataclasses import dataclass

import numpy as np
import pytest

from freeguide.cluster.evaluation import reference
from freeguide.cluster.evaluation.extractors.features import UNIT, Measured
from freeguide.cluster.evaluation.reference import from_manifest, from_npz, load_npz
from freeguide.cluster.evaluation.statistics.fid import fid
from freeguide.cluster.evaluation.statistics.moments import from_features, merged
from freeguide.configs.errors import DataError
from freeguide.data_pipeline.manifest import Schema, build_manifest
from freeguide.data_pipeline.shards import Sample, pack_shard
from freeguide.data_pipeline.store.open import open_store


@dataclass(frozen=True)
class Means:
    """An extractor with an answer known beforehand: the mean of each quarter of the image, and one spatial feature."""

    name: str = "means"
    hash: str = "c3" * 32
    resize: str = "none"
    channels: int = 1
    width: int = 4

    def measure(self, images: np.ndarray, device: str = "cpu") -> Measured:
        n, size = len(images), images.shape[1]
        quarters = images.astype(np.float32).reshape(n, 2, size // 2, 2, size // 2).mean(axis=(2, 4)).reshape(n, 4)
        return Measured(quarters, None, quarters[:, :1] - quarters[:, 1:2])


JUDGE = Means()
GENERATOR = np.random.default_rng(0)


def _images(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 8, 8, 1), np.uint8)


def _npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _gaussian(d: int = 4) -> dict[str, np.ndarray]:
    a = np.random.default_rng(d).normal(size=(d, 2 * d))
    return {"mu": np.arange(d, dtype=np.float64), "sigma": a @ a.T}


def test_a_manifest_is_measured_in_its_order_and_survives_its_file(tmp_path):
    store, images = open_store(str(tmp_path)), _images(UNIT + 300)
    shards = []
    for name, rows in (("a.tar", slice(0, 700)), ("b.tar", slice(700, None))):
        packed = pack_shard([Sample(image, 0) for image in images[rows]])
        shards.append(packed.index(name, store.put(name, packed.data)))
    found = from_manifest(store, build_manifest(Schema(8, 1, 2), shards), JUDGE, "toys")
    features = JUDGE.measure(images).features
    units = merged([from_features(features[:UNIT]), from_features(features[UNIT:])])
    assert np.array_equal(found.pool.mean, units.mean)
    assert np.array_equal(found.pool.covariance, units.covariance)
    assert found.features is not None
    assert np.array_equal(found.features, features)
    assert found.spatial is not None
    np.testing.assert_allclose(found.spatial.covariance, np.cov((features[:, :1] - features[:, 1:2]).T).reshape(1, 1), rtol=1e-9)
    back = from_npz(found.to_bytes(JUDGE), "reference.npz", JUDGE)
    assert (back.sha256, back.pool.n, back.dataset) == (found.sha256, UNIT + 300, "toys")
    assert fid(units, back.pool) < 1e-9  # traces of 1400 that cancel


def test_features_are_kept_evenly_from_large_sets(monkeypatch):
    monkeypatch.setattr(reference, "KEPT", 10)
    images = _images(95)
    found = from_npz(_npz(arr_0=images), "x", JUDGE)
    assert found.features is not None
    assert np.array_equal(found.features, JUDGE.measure(images[np.arange(10) * 95 // 10]).features)
    assert found.pool.n == 95


def test_adms_file_gives_its_statistics_to_fid_and_its_images_to_the_rest():
    images, known = _images(20), _gaussian()
    spatial = {"mu_s": np.ones(1), "sigma_s": np.ones((1, 1))}
    found = from_npz(_npz(**known, **spatial, arr_0=images, arr_1=np.zeros(20)), "VIRTUAL.npz", JUDGE, "imagenet64")
    assert np.array_equal(found.pool.mean, known["mu"])
    assert np.array_equal(found.pool.covariance, (known["sigma"] + known["sigma"].T) / 2)
    assert found.pool.n == 0
    assert found.features is not None
    assert np.array_equal(found.features, JUDGE.measure(images).features)
    assert found.spatial is not None
    assert found.spatial.mean.tolist() == [1.0]
    edm = from_npz(_npz(**known), "edm.npz", JUDGE)
    assert edm.features is None
    assert edm.spatial is None


def test_the_fingerprint_sees_every_part():
    known = _gaussian()
    spatial = {"mu_s": np.ones(1), "sigma_s": np.ones((1, 1))}
    features = {"features": np.zeros((3, 4), np.float32)}
    files = [known, known | spatial, known | features, known | {"n": np.int64(5)}, known | {"mu": known["mu"] + 1e-12}]
    prints = [from_npz(_npz(**arrays), "x", JUDGE).sha256 for arrays in files]
    assert len(set(prints)) == len(files)
    assert prints[0] == from_npz(_npz(**known), "elsewhere", JUDGE, "another name").sha256


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sigma": None}, "holds mu but not sigma"),
        ({"mu": np.arange(3.0)}, r"needs mu \(d,\) and sigma \(d, d\) as floats, not float64 \(3,\)"),
        ({"mu": np.array([0, 1, np.nan, 3])}, "holds NaN or infinity in mu or sigma"),
        ({"sigma": np.full((4, 4), np.inf)}, "holds NaN or infinity"),
        ({"sigma": np.triu(np.ones((4, 4)))}, "sigma of bad.npz is not symmetric"),
        ({"mu": np.array(["a"] * 4)}, "as floats, not <U1"),
        ({"features": np.zeros((3, 5), np.float32)}, r"features \(3, 5\) beside statistics of 4, or NaN among them"),
        ({"features": np.full((3, 4), np.nan, np.float32)}, r"features \(3, 4\) beside statistics of 4, or NaN among them"),
        ({"arr_0": np.zeros((3, 8, 8, 1))}, "arr_0 of bad.npz must hold two images or more, uint8"),
        ({"extractor": np.array("d4" * 32)}, "was measured with the weights d4d4d4d4d4d4 and not with those of means"),
        ({"mu": None, "sigma": None}, "neither mu and sigma nor images"),
        ({"mu": np.array([{}, 1, 2, 3], object)}, "a pickle could run code"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_sentence(change, words):
    arrays = {name: array for name, array in (_gaussian() | change).items() if array is not None}
    with pytest.raises(DataError, match=words) as error:
        from_npz(_npz(**arrays), "bad.npz", JUDGE)
    assert "\n" not in str(error.value)


def test_pickles_and_damaged_files_are_refused(tmp_path):
    for data in (pickle.dumps(_gaussian()), b"", _npz(**_gaussian())[:200]):
        with pytest.raises(DataError, match=r"img\.npz is not an \.npz of plain arrays"):
            from_npz(data, "img.npz", JUDGE)
    (tmp_path / "img64.pkl").write_bytes(pickle.dumps(_gaussian()))
    with pytest.raises(DataError, match="is a pickle, which could run code and is never read"):
        load_npz(str(tmp_path / "img64.pkl"), JUDGE)
    with pytest.raises(DataError, match="does not exist; correct the path of the reference"):
        load_npz(str(tmp_path / "none.npz"), JUDGE)


def test_statistics_of_another_dimension_are_refused_before_anything_is_measured():
    with pytest.raises(DataError, match=r"x\.npz holds statistics of 6 features and means gives 4; use the extractor that made"):
        from_npz(_npz(**_gaussian(6)), "x.npz", JUDGE)
