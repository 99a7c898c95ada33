"""The seam of extractors: known by name, carried through units, named in rows."""

import io

import numpy as np
import pytest

from freeguide.cluster.evaluation.extractors.evaluator import fit_evaluator
from freeguide.cluster.evaluation.extractors.features import Extractor, Measured, concatenated
from freeguide.cluster.evaluation.extractors.load import load_extractor
from freeguide.configs.errors import DataError
from freeguide.data_pipeline.store.open import read_object

RANDOM = np.random.default_rng(0)


def test_measurements_survive_npz_and_join_in_order():
    one = Measured(RANDOM.normal(size=(3, 4)).astype(np.float32), RANDOM.random((3, 2), np.float32))
    two = Measured(RANDOM.normal(size=(2, 4)).astype(np.float32), RANDOM.random((2, 2), np.float32))
    buffer = io.BytesIO()
    np.savez(buffer, seconds=1.0, **one.to_arrays())
    with np.load(io.BytesIO(buffer.getvalue())) as archive:
        back = Measured.from_arrays(archive)
    assert np.array_equal(back.features, one.features)
    assert back.spatial is None
    joined = concatenated([back, two])
    assert np.array_equal(joined.features, np.vstack([one.features, two.features]))
    assert joined.probabilities is not None
    assert np.array_equal(joined.probabilities, np.vstack([one.probabilities, two.probabilities]))


def test_an_evaluator_is_an_extractor_and_is_found_by_its_file(tmp_path):
    images = RANDOM.integers(0, 256, (40, 8, 8, 1), np.uint8)
    made: Extractor = fit_evaluator(images, np.arange(40) % 2, 2, epochs=1, name="noise")
    path = tmp_path / "noise.safetensors"
    path.write_bytes(made.to_bytes())  # type: ignore[attr-defined]
    found = load_extractor(str(path))
    assert (found.name, found.hash, found.resize, found.channels) == ("noise", made.hash, "none", 1)
    features, probabilities = made.features(images)  # type: ignore[attr-defined]
    measured = found.measure(images)
    assert np.array_equal(measured.features, features)
    assert measured.probabilities is not None
    assert np.array_equal(measured.probabilities, probabilities)


def test_a_file_that_does_not_say_what_it_is_is_refused_with_the_names_to_use(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(DataError, match=r"\*\.safetensors.*inception-2015-12-05-6726825d\.pth.*dinov2_vitl14_pretrain\.pth"):
        load_extractor(str(tmp_path / "weights.pth"))
    with pytest.raises(DataError, match="does not exist; fit an evaluator"):
        load_extractor(str(tmp_path / "none.safetensors"))


def test_objects_are_read_by_plain_relative_and_file_paths(tmp_path, monkeypatch):
    (tmp_path / "thing").write_bytes(b"abc")
    monkeypatch.chdir(tmp_path)
    assert [read_object(uri, "") for uri in ("thing", f"{tmp_path}/thing", f"file://{tmp_path}/thing")] == [b"abc"] * 3
