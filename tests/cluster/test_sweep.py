"""The evaluation without Ray: what series there are, what is made of them, what is shared, screened and shown."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from threadpoolctl import threadpool_limits

from freeguide.cluster.evaluation import fold, units
from freeguide.cluster.evaluation import series as sweep_module
from freeguide.cluster.evaluation.executor import Resources
from freeguide.cluster.evaluation.extractors.evaluator import fit_evaluator
from freeguide.cluster.evaluation.extractors.features import Measured
from freeguide.cluster.evaluation.extractors.load import load_extractor
from freeguide.cluster.evaluation.fold import Folded, RowWorker, planned
from freeguide.cluster.evaluation.measure import Yardstick
from freeguide.cluster.evaluation.reference import Reference, Statistics
from freeguide.cluster.evaluation.rows import Row, from_json, to_json
from freeguide.cluster.evaluation.series import Item, Series, Worker, items, trained_series
from freeguide.cluster.evaluation.statistics import moments
from freeguide.cluster.evaluation.units import Unit
from freeguide.cluster.jobs import evaluate as evaluation
from freeguide.cluster.jobs.evaluate import evaluate
from freeguide.cluster.jobs.export import export
from freeguide.cluster.jobs.inspect import inspect
from freeguide.cluster.jobs.score import score
from freeguide.configs.errors import CheckpointError, ConfigError, DataError, UserError
from freeguide.configs.load import load_config
from freeguide.configs.schema import Config, SamplingConfig
from freeguide.configs.stored import from_yaml, to_yaml
from freeguide.configs.sweep import screen_images
from freeguide.configs.sweep import sweep as combinations
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import load_manifest
from freeguide.trainer.rounding import to_uint8
from freeguide.trainer.sampler import Sampler, evaluations, sweep_evaluations
from freeguide.trainer.weights import Weights, weights_of
from tests.cluster.untrained import DIGITS, HALF_LIFE, small, write_run

P_UNCOND = (0.1, 0.2, 0.5)


@pytest.fixture
def runs(lab: Path, tmp_path: Path) -> list[str]:
    """Runs of three p_uncond."""
    for seed, p in enumerate(P_UNCOND):
        write_run(small(lab, tmp_path / f"p{p}", f"diffusion.p_uncond={p}"), seed)
    return [str(tmp_path / f"p{p}") for p in P_UNCOND]


@pytest.fixture(autouse=True)
def made(in_process: list[Item], words_only: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Item]:
    """The items that the one worker was given, in their order."""
    monkeypatch.chdir(tmp_path)
    return in_process


def report(folder: Path) -> dict[str, bytes]:
    """The files of a report that depend on nothing but the rows and grids."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("times.json", "cost.md")}


def rows_of(folder: Path) -> list[Row]:
    return from_json((folder / "report.json").read_text())


def over(**axes: list[object]) -> str:
    return "evaluate.sweep=" + json.dumps({name.replace("__", "."): values for name, values in axes.items()})


# --- series ---


def test_a_sweep_is_the_product_of_its_lists_and_an_empty_one_is_the_config_itself(lab: Path) -> None:
    config = small(lab, "a", over(run=["a", "b"], sampling__interval=[[], [-1, 2]], sampling__steps=[4, 6]))
    series = combinations(config)
    found = [(each.run, each.sampling.interval, each.sampling.steps) for each in series]
    assert found == [(str(Path(r).absolute()), i, s) for r in "ab" for i in ([], [-1.0, 2.0]) for s in (4, 6)]
    assert all(each.evaluate.sweep == {} for each in series)
    assert from_yaml(to_yaml(config)) == config
    plain = small(lab, "a")
    assert combinations(plain) == [plain]


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"run": "a"}, "run is 'a'; give a list of values, each once"),
        ({"sampling.steps": []}, r"sampling.steps is \[\]; give a list"),
        ({"sampling.steps": [4, 4]}, "each once"),
        ({"sampling.stepz": [4]}, "did you mean sampling.steps?"),
        ({"sampling.labels": ["random"]}, "sampling.labels cannot be swept"),
        ({"evaluate.w": [[0]]}, "evaluate.w cannot be swept"),
        ({"sampling.steps": ["many"]}, "sampling.steps takes a whole number, not 'many'"),
        ({"sampling.steps": [4, 0]}, "sampling.steps=0: must be a whole number from 1"),
    ],
)
def test_what_cannot_be_swept_is_refused_when_the_config_is_read(lab: Path, axes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small(lab, "a", f"evaluate.sweep={json.dumps(axes)}")


def test_a_run_says_itself_how_it_was_trained(lab: Path, runs: list[str], tmp_path: Path) -> None:
    """The config that measures says p_uncond = 0.3, another network and another decay: all of that is the run's to say."""
    write_run(small(lab, runs[1], "diffusion.p_uncond=0.2", "train.ema_decay=0.5", "diffusion.prediction=v"))
    mine = [over(run=runs), "diffusion.p_uncond=0.3", "model.channels=16"]
    found = [
        trained.config for trained in trained_series(small(lab, tmp_path, *mine), load_manifest(open_store(str(lab / "data"))))
    ]
    assert [config.diffusion.p_uncond for config in found] == list(P_UNCOND)
    assert [config.train.ema_decay for config in found] == [0.995, 0.5, 0.995]
    assert [config.diffusion.prediction for config in found] == ["eps", "v", "eps"]
    assert {config.model.channels for config in found} == {8}
    assert [config.name for config in found] == ["p0.1", "p0.2", "p0.5"]


def fails(config: Config, kind: type[UserError], words: str) -> None:
    with pytest.raises(kind, match=words):
        evaluate(config)


def test_runs_that_cannot_be_measured_together_end_in_one_sentence_before_anything_is_made(
    lab: Path, runs: list[str], tmp_path: Path, made: list[Item]
) -> None:
    fails(small(lab, tmp_path, over(run=[runs[0], str(tmp_path / "no")])), CheckpointError, "no checkpoint")
    fails(small(lab, runs[0], "sampling.ema=half_life_7"), CheckpointError, "no average half_life_7; set sampling.ema to one of")
    fails(small(lab, runs[0], "sampling.interval=[5,5.01]"), ConfigError, "holds none of the . log-SNR levels, so no w would guide")
    fails(small(lab, runs[0], over(sampling__checkpoint=[0, 8])), ConfigError, "two of its series are the checkpoint of step 8")
    unguided = small(lab, tmp_path / "unguided", "diffusion.p_uncond=0", "evaluate.w=[0]")
    write_run(unguided)
    fails(small(lab, tmp_path, over(run=[runs[0], unguided.run])), ConfigError, "p_uncond=0 leaves the network without")
    manifest = json.loads(open_store(runs[2]).get("checkpoints/step-00000008/manifest.json"))
    manifest["identity"]["data.fingerprint"] = "f" * 64
    open_store(runs[2]).put("checkpoints/step-00000008/manifest.json", json.dumps(manifest).encode())
    fails(small(lab, tmp_path, over(run=runs)), DataError, "p0.5: trained on the data ffffffffffff, but ")
    open_store(runs[0]).put("config.yaml", b"of: another version\n")
    fails(small(lab, runs[0]), ConfigError, r"p0.1/config.yaml: a stored config cannot be read")
    open_store(runs[0]).delete("config.yaml")
    fails(small(lab, runs[0]), CheckpointError, "its config.yaml is gone")
    assert made == []


# --- units ---


def test_items_hold_all_w_that_share_a_beginning_and_those_of_a_network_follow_each_other(lab: Path) -> None:
    store = open_store(str(lab))
    swept = combinations(small(lab, "a", over(sampling__interval=[[], [-2, 3]], run=["a", "b"])))
    series = [Series(config, Weights(config.run, 8, "ema", (), ""), store) for config in swept]
    todo = [units.split([0.0, 1.0], 40, 20)] * 3 + [units.split([1.0], 20, 20)]
    found = items(series, todo)
    name = {config.run: config.run[-1] for config in swept}
    assert [(name[swept[i.series].run], swept[i.series].sampling.interval != [], i.first, i.weights) for i in found] == [
        *(("a", False, first, (w,)) for first in (0, 20) for w in (0.0, 1.0)),
        *(("a", True, first, (0.0, 1.0)) for first in (0, 20)),
        *(("b", False, first, (w,)) for first in (0, 20) for w in (0.0, 1.0)),
        ("b", True, 0, (1.0,)),
    ]
    assert sorted(u for i in found for u in i.units) == sorted(u for plan in todo for u in plan)


def test_the_report_does_not_depend_on_the_order_or_the_company_in_which_units_were_made(
    lab: Path, runs: list[str], made: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    def afresh() -> dict[str, bytes]:
        store = open_store(runs[0])
        for info in store.list("evaluate/"):
            store.delete(info.key)
        return report(evaluate(small(lab, runs[0])))

    whole = afresh()
    assert {len(item.weights) for item in made} == {3}
    apart = [Item(0, first, first + 20, (w,)) for first in (40, 0, 20) for w in (4.0, 0.0, 0.5)]
    monkeypatch.setattr(evaluation, "items", lambda *_: apart)
    assert afresh() == whole


def test_an_interrupted_item_keeps_the_w_it_has_published_and_makes_the_rest_alike(
    lab: Path, runs: list[str], made: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = evaluate(small(lab, runs[0]))
    whole, series = report(folder), open_store(runs[0])
    kept = {info.key: series.get(info.key) for info in series.list("evaluate/") if "/units/w0/" in info.key}
    for info in series.list("evaluate/"):
        if info.key not in kept:
            series.delete(info.key)
    made.clear()
    # As Ray does it: the same item again, with the w that are there already.
    again = [Item(0, first, first + 20, (0.0, 0.5, 4.0)) for first in (0, 20, 40)]
    monkeypatch.setattr(evaluation, "items", lambda *_: again)
    assert report(evaluate(small(lab, runs[0]))) == whole
    assert {info.key: series.get(info.key) for info in series.list("evaluate/") if "/units/w0/" in info.key} == kept


def test_a_worker_keeps_the_network_it_has(lab: Path, runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, str]] = []
    load = Sampler.from_weights

    def counted(config: Config, *rest: Any) -> Sampler:
        loaded.append((config.run, config.sampling.ema))
        return load(config, *rest)

    monkeypatch.setattr(Sampler, "from_weights", counted)
    axes = over(sampling__steps=[3, 6], sampling__ema=["ema", HALF_LIFE], run=runs[:2])
    evaluate(small(lab, tmp_path / "report", axes, "evaluate.images=40"))
    assert sorted(loaded) == sorted((run, ema) for run in runs[:2] for ema in ("ema", HALF_LIFE))


def test_an_actor_measures_with_the_weights_that_the_driver_saw_or_not_at_all(lab: Path, tmp_path: Path) -> None:
    there = tmp_path / "evaluator.safetensors"
    there.write_bytes((lab / "evaluator.safetensors").read_bytes())
    seen = load_extractor(str(there)).hash
    assert Worker([], {"": (str(there), seen)}, Resources(1, 0)).extractors[""].hash == seen
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    there.write_bytes(fit_evaluator(images, np.arange(40) % 10, 10, 1, name="another").to_bytes())
    with pytest.raises(DataError, match=f"and not {seen}"):
        Worker([], {"": (str(there), seen)}, Resources(1, 0))


def test_a_grid_shows_the_first_classes_only_where_there_are_many(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sweep_module, fold, evaluation):
        monkeypatch.setattr(module, "COLUMNS", 4)
    seen: dict[Row, Any] = {}
    write = evaluation.report_files

    def noted(rows: Any, grids: Any, *rest: Any, **more: Any) -> dict[str, bytes]:
        seen.update(grids)
        return write(rows, grids, *rest, **more)

    monkeypatch.setattr(evaluation, "report_files", noted)
    config = small(lab, tmp_path / "run", "evaluate.w=[0.5]")
    write_run(config)
    evaluate(config)
    ((_, grid),) = seen.items()
    index = torch.tensor([[10 * row + column for column in range(4)] for row in range(2)])
    expected = to_uint8(Sampler.load(config.run).sample(index.flatten(), index.flatten() % 10, 0.5))
    assert np.array_equal(grid, expected.reshape(2, 4, 8, 8, 1))


# --- weights, while the training goes on ---


def test_a_sweep_goes_on_when_the_training_has_deleted_its_checkpoint(
    lab: Path, runs: list[str], made: list[Item], capsys: pytest.CaptureFixture[str]
) -> None:
    config, store = small(lab, runs[0]), open_store(runs[0])
    whole = report(evaluate(config))
    assert "is at step 8 of 600: sampling.checkpoint=8 goes on with this later" in capsys.readouterr().out
    for info in store.list():
        if "/w4" in info.key or info.key.startswith("checkpoints/"):
            store.delete(info.key)
    write_run(config, seed=7, step=12)
    made.clear()
    again = small(lab, runs[0], "sampling.checkpoint=8")
    assert report(evaluate(again)) == whole
    assert {item.weights for item in made} == {(4.0,)}
    assert safetensors.torch.load(Path(export(again)).read_bytes()).keys() == weights_of(config).read().keys()
    fails(
        small(lab, runs[0], "sampling.checkpoint=8", f"sampling.ema={HALF_LIFE}"), CheckpointError, "no whole checkpoint of step 8"
    )


def test_weights_are_those_of_the_checkpoint_that_was_chosen_or_none(lab: Path, runs: list[str]) -> None:
    config = small(lab, runs[0])
    chosen = weights_of(config)
    write_run(config, seed=7)  # the run went back, and came to the same step again
    with pytest.raises(CheckpointError, match="the checkpoint of step 8 has been replaced meanwhile; start again"):
        chosen.keep()
    assert not open_store(runs[0]).list("weights/")


def test_kept_weights_of_a_reconstructed_average_know_their_distance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Weights, "_average", lambda *_: {"x": torch.zeros(2)})
    Weights(str(tmp_path), 8, "sigma_rel_0.2", ("a", "b"), "data", distance=0.29).keep()
    config = Config(run=str(tmp_path), sampling=SamplingConfig(checkpoint=8, ema="sigma_rel_0.2"))
    assert (weights_of(config).distance, weights_of(config).of) == (0.29, ("a", "b"))


def test_weights_of_another_average_are_kept_under_another_name(lab: Path, runs: list[str], tmp_path: Path) -> None:
    evaluate(small(lab, tmp_path / "report", over(run=runs[:1], sampling__ema=["ema", HALF_LIFE]), "evaluate.images=20"))
    kept = [info.key.rsplit("-", 1)[0] for info in open_store(runs[0]).list("weights/") if ".json" not in info.key]
    assert kept == ["weights/step-00000008-ema", f"weights/step-00000008-{HALF_LIFE}"]


# --- rows ---


def test_rows_are_folded_once_and_their_units_are_not_needed_any_more(
    lab: Path, runs: list[str], made: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = report(evaluate(small(lab, runs[0])))
    store = open_store(runs[0])
    for info in store.list("evaluate/"):
        if "/units/" in info.key:
            store.delete(info.key)
    made.clear()
    monkeypatch.setattr(fold, "_fold", lambda *_: pytest.fail("folded again"))
    assert report(evaluate(small(lab, runs[0]))) == whole
    assert made == []
    with pytest.raises(pytest.fail.Exception, match="folded again"):  # more images are another row
        evaluate(small(lab, runs[0], "evaluate.images=80"))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_of_a_row_do_not_depend_on_the_threads_that_blas_would_take(lab: Path, tmp_path: Path, threads: int) -> None:
    """At 512 features OpenBLAS shares its sums among the threads it has; an actor gives it those of `cluster.cpus_per_worker`."""
    random = np.random.default_rng(0)
    judge = load_extractor(str(lab / "evaluator.safetensors"))
    features = random.standard_normal((1000, 512)).astype(np.float32)
    pool = moments.from_features(features[:600])
    real = Reference("digits", Statistics(pool.mean, pool.covariance, pool.n))
    unit = Measured(features[400:], np.full((600, 10), 0.1, np.float32))
    config = small(lab, tmp_path, "evaluate.images=600", "evaluate.unit=600")
    series = Series(config, Weights(config.run, 8, "ema", (), ""), open_store(str(tmp_path / "series")))
    labels = np.arange(600) % 10
    content = {"labels": labels, "images": np.zeros((20, 8, 8, 1), np.uint8), "device": "CPU", "seconds": 0.0, "evaluations": 1}
    np.savez(buffer := io.BytesIO(), **unit.to_arrays(), **content)
    series.store.put(Unit(0.5, 0, 600).key("npz"), buffer.getvalue())
    yardsticks = [Yardstick(judge, real)]
    (asked,) = planned([[0.5]], 600, yardsticks)
    with threadpool_limits(1):
        expected = fold._fold(series, asked, yardsticks)
    with threadpool_limits(threads):
        RowWorker([series], yardsticks, Resources(1, 0))(asked)
    assert Folded.read(series.store, asked.key).values == expected.values


@pytest.mark.parametrize("damaged", ["/units/w4/000000020-000000040.npz", "/rows/w4-n60"])
def test_a_damaged_unit_or_row_is_named(lab: Path, runs: list[str], damaged: str) -> None:
    evaluate(small(lab, runs[0]))
    store = open_store(runs[0])
    (key,) = [info.key for info in store.list("evaluate/") if damaged in info.key]
    store.put(key, store.get(key)[:1000])
    if "/units/" in damaged:
        (row,) = [info.key for info in store.list("evaluate/") if "/rows/w4-n60" in info.key]
        store.delete(row)
    fails(
        small(lab, runs[0]),
        DataError,
        f"{key.rsplit('/', 1)[1]} is not an .npz of plain arrays .*; delete it and give the command again",
    )


# --- what it costs ---


def test_the_cost_is_what_networks_were_asked_for(lab: Path, runs: list[str], tmp_path: Path) -> None:
    config = small(lab, tmp_path / "report", over(run=runs[:2], sampling__interval=[[], [-2, 3]]))
    folder = evaluate(config)
    weights = config.evaluate.w
    plain, guided = replace(config, sampling=replace(config.sampling, interval=[])), config
    naive = 4 * 60 * sum(evaluations(plain, w) for w in weights)
    planned = 2 * 60 * (sum(evaluations(plain, w) for w in weights) + sweep_evaluations(guided, weights))
    text = (folder / "table.md").read_text()
    assert f"| this sweep | 720 | {planned:,} | {planned / naive:.0%} |" in text
    assert f"| every w by itself | 720 | {naive:,} | 100% |" in text
    assert f"| network evaluations, counted | {planned:,} |" in (folder / "cost.md").read_text()
    assert planned < naive
    rows = rows_of(folder)
    assert [row.nfe for row in rows if row.options == ""] == [6, 12, 12] * 2
    assert all(row.nfe == evaluations(guided, row.w) for row in rows if row.options)


def test_what_an_interruption_makes_twice_is_counted_and_stays_out_of_the_report(lab: Path, runs: list[str]) -> None:
    config = small(lab, runs[0])
    folder = evaluate(config)
    whole, planned = report(folder), 60 * sweep_evaluations(config, config.evaluate.w)
    store = open_store(runs[0])
    for info in store.list("evaluate/"):
        if "/w4" in info.key:  # its units and its row
            store.delete(info.key)
    assert report(evaluate(config)) == whole
    counted = 60 * (sweep_evaluations(config, [0.0, 0.5]) + evaluations(config, 4.0))
    assert counted > planned
    assert f"| network evaluations, counted | {counted:,} |" in (folder / "cost.md").read_text()


# --- the report ---


def test_series_are_called_by_their_p_uncond_and_any_sweep_finds_the_units_there_are(
    lab: Path, runs: list[str], tmp_path: Path, made: list[Item]
) -> None:
    alone = rows_of(evaluate(small(lab, runs[1])))
    made.clear()
    folder = evaluate(small(lab, tmp_path / "report", over(run=runs)))
    assert {runs[0], runs[2]} == {runs[item.series] for item in made}
    document = json.loads((folder / "report.json").read_text())
    assert document["varying"] == ["run", "p_uncond"]
    assert [best["series"] for best in document["best"]] == [f"p_uncond {p}" for p in P_UNCOND]
    rows = rows_of(folder)
    assert [row for row in rows if row.p_uncond == 0.2] == [replace(row, run="p0.2") for row in alone]
    home = open_store(str(tmp_path / "report"))
    place = json.loads(home.get("evaluate/latest.json"))["report"]
    assert {info.key.removeprefix(place) for info in home.list(place)} == {path.name for path in folder.iterdir()}
    made.clear()
    evaluate(small(lab, tmp_path / "report", over(run=runs)))
    assert made == []


def _scored(lab: Path, file: Path, images: int, dataset: str = "data") -> str:
    """Where the row of another model's images stands, as `freeguide score --json` writes it."""
    noise = np.random.default_rng(1).integers(0, 256, (images, 8, 8, 1), np.uint8)
    np.savez(file.with_suffix(".npz"), noise)
    measured = {"reference": f"{lab}/reference.npz", "extractor": f"{lab}/evaluator.safetensors", "dataset": dataset}
    file.write_text(to_json([score(str(file.with_suffix(".npz")), **measured, name="noise")]))
    return str(file)


def test_other_models_that_were_scored_stand_in_the_report_without_a_new_unit(
    lab: Path, runs: list[str], tmp_path: Path, made: list[Item]
) -> None:
    alone = report(evaluate(small(lab, runs[0])))
    made.clear()
    other = _scored(lab, tmp_path / "noise.json", 60)
    folder = evaluate(small(lab, runs[0], f"evaluate.others=[{other}]"))
    assert made == []
    (row,) = from_json(Path(other).read_text())
    section = (folder / "table.md").read_text().split("## Other models, measured here")[1]
    assert f"| noise | {row.fid:.2f} |" in section
    assert "noise" in (folder / "index.html").read_text()
    assert report(folder)["report.json"] == alone["report.json"]
    with open(folder / "report.csv", newline="") as file:
        assert [line["run"] for line in csv.DictReader(file)] == ["digits"] * 3 + ["noise"]


def test_other_models_that_cannot_stand_there_are_refused_before_any_work(
    lab: Path, runs: list[str], tmp_path: Path, made: list[Item]
) -> None:
    (tmp_path / "text.json").write_text("hello")
    (row,) = from_json(Path(_scored(lab, tmp_path / "noise.json", 60)).read_text())
    (tmp_path / "more.json").write_text(to_json([replace(row, dinov2="a1" * 32)]))
    found = {
        str(tmp_path / "more.json"): r"dinov2 of 'noise' in evaluate\.others is 'a1a1.*' and here it is ''",
        str(tmp_path / "none.json"): r"none\.json does not exist; score the images first .* or correct evaluate\.others",
        str(tmp_path / "text.json"): r"text\.json does not hold metric rows",
        _scored(lab, tmp_path / "few.json", 40): r"n of 'noise' in evaluate\.others is 40 and here it is 60; score .* the same n",
        _scored(lab, tmp_path / "named.json", 60, "x"): r"dataset of 'noise' in evaluate\.others is 'x' and here it is 'data'",
    }
    for uri, words in found.items():
        with pytest.raises(DataError, match=words) as error:
            evaluate(small(lab, runs[0], f"evaluate.others=[{uri}]"))
        assert "\n" not in str(error.value)
    assert made == []


@pytest.mark.parametrize(
    ("axes", "varying"),
    [
        ({"sampling.ema": ["ema", HALF_LIFE]}, ["ema"]),
        ({"sampling.steps": [3, 6], "sampling.sampler": ["ddim", "heun"]}, ["sampler", "steps"]),
        ({"sampling.seed": [0, 1], "sampling.precision": ["fp32", "bf16"]}, ["options", "seed"]),
    ],
)
def test_whatever_is_swept_is_a_condition_of_the_row(
    lab: Path, runs: list[str], axes: dict[str, list[object]], varying: list[str]
) -> None:
    folder = evaluate(small(lab, runs[0], f"evaluate.sweep={json.dumps(axes)}", "evaluate.images=40"))
    document = json.loads((folder / "report.json").read_text())
    assert document["varying"] == varying
    assert len(document["best"]) == np.prod([len(values) for values in axes.values()])
    assert len({row.fid for row in rows_of(folder)}) == len(rows_of(folder))


# --- the screen ---


@pytest.mark.parametrize(("screen", "images"), [(0, 0), (-1, 20), (1, 20), (20, 20), (21, 40), (41, 0), (500, 0)])
def test_a_screen_is_whole_units_and_fewer_images_than_all(lab: Path, screen: int, images: int) -> None:
    assert screen_images(small(lab, "a", f"evaluate.screen={screen}").evaluate) == images


def test_inspect_counts_what_a_sweep_takes_before_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["sampling.sampler=ddim", "evaluate.w=[0,1,4]", "evaluate.images=2000", "evaluate.unit=500", "evaluate.screen=600"]
    inspect(load_config(DIGITS, [*asked, "evaluate.sweep={sampling.steps: [8, 16]}"]))
    printed = capsys.readouterr().out
    assert f"2 series x 3 values of w x 2000 images, {(8 + 16) * (1 + 2 + 2) * 2000:,} network evaluations" in printed
    assert "less where the screen of 1000 images leaves a w out" in printed
    shared = ["sampling.interval=[-2,3]", "sampling.steps=16", "sampling.spacing=logsnr"]
    inspect(config := load_config(DIGITS, [*asked, *shared]))
    taken = 2000 * sweep_evaluations(config, [0.0, 1.0, 4.0])
    assert f"evaluation                3 values of w x 2000 images, {taken:,} network" in capsys.readouterr().out


def test_the_flag_is_an_override_so_that_it_travels_with_the_job() -> None:
    from freeguide.cluster.cli import _parse

    parsed = _parse(["evaluate", "x.yaml", "--screen", "evaluate.images=40"])
    assert load_config(DIGITS, parsed.overrides, "evaluate").evaluate.screen == -1


def test_a_screen_gives_all_images_to_the_frontier_only_and_makes_nothing_twice(
    lab: Path, runs: list[str], tmp_path: Path, made: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [[4.0], [0.0, 0.5], []]
    asked: list[Any] = []
    monkeypatch.setattr(evaluation, "near_frontier", lambda rows: asked.append(rows) or chosen)
    config = small(lab, tmp_path / "report", over(run=runs), "evaluate.screen=40")
    folder = evaluate(config)
    full = rows_of(folder)
    assert {(row.run, row.w, row.n) for row in full} == {("p0.1", 4.0, 60), ("p0.2", 0.0, 60), ("p0.2", 0.5, 60)}
    assert [[(row.w, row.n) for row in curve] for curve in asked[0]] == [[(w, 40) for w in (0.0, 0.5, 4.0)]] * 3
    keys = [(item.series, unit) for item in made for unit in item.units]
    assert len(keys) == len(set(keys)) == 3 * 3 * 2 + 3
    text = (folder / "table.md").read_text()
    planned = 3 * 40 * sweep_evaluations(config, [0.0, 0.5, 4.0])
    planned += 20 * (sweep_evaluations(config, [4.0]) + sweep_evaluations(config, [0.0, 0.5]))
    assert f"| this sweep | {3 * 3 * 40 + 3 * 20} | {planned:,} |" in text
    assert f"| network evaluations, counted | {planned:,} |" in (folder / "cost.md").read_text()
    head, tail = text.split("## The screen: n = 40")
    assert head.count("n = 60 images") == 1
    assert tail.count("n = 40 images") == 1
    plain = rows_of(evaluate(small(lab, runs[1])))
    assert [replace(row, run="digits") for row in full if row.run == "p0.2"] == plain[:2]


# --- TensorBoard ---


def test_tensorboard_shows_each_w_at_the_step_of_its_checkpoint(lab: Path, runs: list[str]) -> None:
    folder = evaluate(small(lab, runs[0], over(sampling__steps=[3, 6])))
    rows = rows_of(folder)
    events = sorted(Path(runs[0]).glob("events/*/*/events.out.tfevents.0000000008"))
    assert len(events) == len(rows)
    for row in rows:
        (place,) = [path.parent for path in events if f"-T{row.steps}-" in str(path) and path.parent.name == f"w{row.w:g}"]
        log = EventAccumulator(str(place))
        log.Reload()
        for tag, value in (("FID-digits", row.fid), ("inception_score", row.inception_score), ("accuracy", row.accuracy)):
            (event,) = log.Scalars(f"evaluate/{tag}")
            assert (event.step, event.value) == (8, pytest.approx(value, rel=1e-6))  # events hold float32
        (image,) = log.Images("evaluate/samples")
        width, height = Image.open(io.BytesIO(image.encoded_image_string)).size
        assert (width, height) == (10 * 59 + 3, 2 * 59 + 3)  # two rows of ten classes, 8 pixels enlarged to 56, gaps of 3
