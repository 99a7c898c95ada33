"""Rows carry every condition, survive JSON to the bit, and refuse company that was measured differently."""

import json
import re
from dataclasses import fields, replace
from typing import Any

import pytest

from freeguide.cluster.evaluation.extractors.features import INCEPTION
from freeguide.cluster.evaluation.rows import (
    INSTRUMENT,
    MEASUREMENT,
    MODEL,
    Row,
    from_json,
    further_options,
    model_conditions,
    require_comparable,
    require_same_instrument,
    to_json,
)
from freeguide.configs.errors import DataError
from freeguide.configs.schema import Config, SamplingConfig

ROW = Row(
    w=0.3,
    fid=1.0 / 3.0,
    inception_score=9.7,
    inception_score_std=0.1,
    accuracy=0.98,
    nfe=128,
    n=2000,
    reference="a1" * 32,
    reference_n=1797,
    extractor="digits",
    extractor_hash="b2" * 32,
    resize="none",
    rounding="round-half-up",
    labels="balanced",
    run="digits",
    checkpoint_step=2500,
    trained="c3" * 6,
    p_uncond=0.1,
    ema=0.999,
    sampler="ancestral",
    steps=64,
    v=0.3,
    clip=True,
    seed=0,
    code_version="0.1.0",
)
VALUES = {
    "fid",
    "inception_score",
    "inception_score_std",
    "accuracy",
    "precision",
    "recall",
    "kid",
    "kid_std",
    "sfid_std",
    "fd_dinov2_std",
    "fid_infinity",
    "fid_std",
    "sfid",
    "fd_dinov2",
    "nfe",
}


def _changed(name: str) -> Row:
    value: Any = getattr(ROW, name)
    other = not value if isinstance(value, bool) else value + "x" if isinstance(value, str) else value + 1
    return replace(ROW, **{name: other}, w=0.4)


def test_every_field_is_w_a_value_or_a_condition_that_is_compared():
    assert {field.name for field in fields(Row)} == {"w", "further"} | VALUES | set(MEASUREMENT) | set(MODEL)


def test_rows_that_differ_in_w_and_values_only_are_comparable():
    require_comparable([ROW, replace(ROW, w=4.0, fid=40.0, nfe=64, precision=0.5), ROW])
    require_comparable([ROW])


@pytest.mark.parametrize("name", [*MEASUREMENT, *MODEL])
def test_one_differing_condition_is_refused_with_its_name_and_both_values(name):
    other = _changed(name)
    with pytest.raises(DataError) as error:
        require_comparable([ROW, replace(ROW, w=1.0), other])
    message = str(error.value)
    assert f"because {name} is {getattr(ROW, name)!r} in one and {getattr(other, name)!r} in the other" in message
    assert "w = 0.3 and w = 0.4" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", MODEL)
def test_a_model_condition_may_vary_if_it_is_named(name):
    require_comparable([ROW, _changed(name)], varying=(name,))


@pytest.mark.parametrize("name", MEASUREMENT)
def test_a_measurement_condition_may_never_vary(name):
    with pytest.raises(ValueError, match=f"'{name}' may not vary"):
        require_comparable([ROW, _changed(name)], varying=(name,))


def test_json_round_trips_to_the_bit():
    rows = [ROW, replace(ROW, w=0.1 + 0.2, precision=2 / 3, recall=0.5, kid=-1e-9, kid_std=1e-300)]
    text = to_json(rows)
    assert from_json(text) == rows
    assert to_json(from_json(text)) == text


def _unsealed(rows=(ROW,)):
    """The JSON of rows as earlier versions wrote it, without a seal."""
    return {name: value for name, value in json.loads(to_json(list(rows))).items() if name != "seal"}


def test_rows_that_were_changed_are_refused():
    text = to_json([ROW])
    for changed in (text.replace('"n": 2000', '"n": 2001'), text.replace("seal", "sea1"), text.replace("digits", "digit5")):
        assert changed != text
        with pytest.raises(DataError, match=r"^mine is damaged \(its checksum does not fit\); measure again, or take out the line"):
            from_json(changed, "mine")


def test_whole_numbers_written_for_floats_are_read_as_floats():
    document = _unsealed()
    document["rows"][0]["w"] = 4
    (row,) = from_json(json.dumps(document))
    assert row.w == 4.0
    assert isinstance(row.w, float)


@pytest.mark.parametrize(
    "change",
    [{"fid": "1.0"}, {"n": 1.5}, {"n": True}, {"clip": 1}, {"colour": "red"}, {"extractor": None}, {"fid": None}],
)
def test_mistyped_and_unknown_fields_are_refused(change):
    document = _unsealed()
    document["rows"][0] |= change
    with pytest.raises(DataError, match=r"old\.json does not hold metric rows"):
        from_json(json.dumps(document), "old.json")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": "freeguide-rows/0", "rows": []}', '{"schema": "freeguide-rows/2", "rows": [{}]}']
)
def test_other_documents_are_refused(text):
    with pytest.raises(DataError, match="does not hold metric rows"):
        from_json(text)


def test_a_row_holds_finite_numbers_only():
    with pytest.raises(DataError, match=r"fid of the row w = 0\.3 of run 'digits' is nan"):
        replace(ROW, fid=float("nan"))
    with pytest.raises(DataError, match=r"n of the row w = 0\.3 of run 'digits' is 0"):
        replace(ROW, n=0)


def test_only_inception_is_called_plain_fid():
    assert ROW.fid_name == "FID-digits"
    assert replace(ROW, extractor=INCEPTION).fid_name == "FID"


def test_what_a_stranger_did_not_state_is_none_and_survives_json():
    facts = ("checkpoint_step", "trained", "p_uncond", "ema", "steps", "v", "clip", "seed", "nfe")
    unknown = replace(ROW, **dict.fromkeys(facts))
    assert from_json(to_json([unknown])) == [unknown]
    with pytest.raises(DataError, match=r"because p_uncond is 0\.1 in one and None in the other"):
        require_comparable([ROW, replace(unknown, checkpoint_step=ROW.checkpoint_step, trained=ROW.trained)])


def test_other_peoples_images_need_the_same_instrument_only():
    stranger = replace(ROW, run="biggan", rounding="not known", labels="not known", steps=None, seed=None)
    require_same_instrument([ROW, stranger])
    for name in INSTRUMENT:
        with pytest.raises(DataError, match=f"because {name} is"):
            require_same_instrument([ROW, _changed(name)])


def test_every_sampling_option_is_a_column_or_an_option_of_the_row():
    assert further_options(SamplingConfig()) == ""
    assert further_options(SamplingConfig(steps=7, v=0.0, clip=False, seed=3, labels="random", sampler="ddim", batch=5)) == ""
    assert further_options(SamplingConfig(spacing="karras", interval=[-1.0, 2.5])) == "interval=[-1.0, 2.5], spacing=karras"
    # An option that is added tomorrow must be found: all fields but the columns, the checkpoint and the batch are looked at.
    columns = {"checkpoint", "batch", "labels", *MODEL}
    for field in fields(SamplingConfig):
        if field.name not in columns:
            changed = replace(SamplingConfig(), **{field.name: "changed"})
            assert further_options(changed) == f"{field.name}=changed"


def test_our_own_conditions_follow_from_the_configuration_alone():
    config = Config(name="digits", run="s3://bucket/digits", sampling=SamplingConfig(steps=9, v=0.2, seed=7, spacing="logsnr"))
    found = model_conditions(config, 2500, "0.1.0+abc")
    assert set(found) == {*MODEL, "labels", "rounding"}
    row = replace(ROW, **found)
    assert (row.run, row.checkpoint_step, row.steps, row.v, row.seed, row.ema) == ("digits", 2500, 9, 0.2, 7, 0.9999)
    assert (row.options, row.rounding, row.labels) == ("spacing=logsnr", "round-half-up", "balanced")
    config.sampling.ema = "sigma_rel_0.1"
    other = replace(ROW, **model_conditions(config, 2500, "0.1.0+abc"))
    assert other.ema == "sigma_rel_0.1"
    far = replace(ROW, **model_conditions(config, 2500, "0.1.0+abc", ema_distance=0.29))  # snapshots were lost
    assert far.ema_distance == 0.29
    with pytest.raises(DataError, match=r"because ema_distance is 0\.0 in one and 0\.29"):
        require_comparable([other, far])
    assert from_json(to_json([row, other])) == [row, other]
    with pytest.raises(DataError, match=r"because ema is 0\.9999 in one and 'sigma_rel_0\.1' in the other"):
        require_comparable([row, other])


def _trained(**changes: object) -> str:
    config = Config(name="digits", run="s3://bucket/digits")
    for key, value in changes.items():
        room, name = key.split("__")
        setattr(getattr(config, room), name, value)
    return model_conditions(config, 2500, "x")["trained"]


def test_what_was_trained_is_network_diffusion_and_training_but_not_p_uncond_or_the_seed():
    assert re.fullmatch("[0-9a-f]{12}", _trained())
    config = Config(name="other", run="elsewhere", seed=5, sampling=SamplingConfig(steps=9))
    assert model_conditions(config, 100, "y")["trained"] == _trained()
    assert _trained(diffusion__p_uncond=0.5, train__zero_stage=3, train__log_every=1, train__ema_decay=0.5) == _trained()
    changes = [
        {"model__network": "dit"},
        {"model__channels": 64},
        {"model__channel_mult": [1, 2]},
        {"model__dropout": 0.0},
        {"diffusion__prediction": "v"},
        {"diffusion__schedule": "flow"},
        {"diffusion__logsnr_max": 10.0},
        {"diffusion__loss_weight": "v"},
        {"train__lr": 1.0},
        {"train__precision": "fp32"},
    ]
    assert len({_trained(), *(_trained(**change) for change in changes)}) == 1 + len(changes)
    assert _trained(model__depth=12) == _trained(), "a U-Net reads no depth"
    assert _trained(model__network="dit", model__depth=12) != _trained(model__network="dit")
    assert _trained(model__network="dit", model__dropout=0.0) == _trained(model__network="dit")


def test_a_row_without_an_inception_score_is_none_and_one_that_has_it_keeps_it():
    without = replace(ROW, inception_score=None, inception_score_std=None, accuracy=None)
    assert from_json(to_json([without, ROW])) == [without, ROW]
    assert without != ROW
    document = _unsealed([without])
    for name in ("inception_score", "inception_score_std"):
        del document["rows"][0][name]
    assert from_json(json.dumps(document)) == [without]
    with pytest.raises(DataError, match=r"inception_score of the row w = 0\.3 of run 'digits' is inf"):
        replace(ROW, inception_score=float("inf"))


def test_rows_from_before_a_condition_was_known_are_read():
    document = _unsealed()
    del document["rows"][0]["trained"]
    assert from_json(json.dumps(document)) == [replace(ROW, trained=None)]
