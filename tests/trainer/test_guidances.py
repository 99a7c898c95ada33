"""A guidance that nothing but its entry knows is drawn, counted, shared and named as the built-in one is."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from freeguide.cluster.evaluation.series import Trained, placed
from freeguide.configs.errors import CheckpointError, ConfigError
from freeguide.configs.load import load_config
from freeguide.configs.schema import Config
from freeguide.data_pipeline.shards import write_shards
from freeguide.data_pipeline.sources.digits import digits
from freeguide.data_pipeline.store.open import open_store
from freeguide.trainer.diffusion.guidance import Denoiser, Weight, autoguidance, increasing
from freeguide.trainer.diffusion.guidances import GUIDANCES, Guidance, by_classifier_free
from freeguide.trainer.diffusion.parametrisation import Network
from freeguide.trainer.diffusion.samplers import SAMPLERS, sample
from freeguide.trainer.diffusion.schedule import noise_schedule
from freeguide.trainer.sampler import Sampler, evaluations, sampling_levels, shared_steps, sweep_evaluations
from freeguide.trainer.weights import weights_of
from tests.cluster.untrained import DIGITS, SMALL, write_run

INDEX = torch.arange(7)
WEIGHTS = [0.0, 0.5, 4.0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with two checkpoints of different weights."""
    folder = tmp_path_factory.mktemp("guidances")
    write_shards(digits(), open_store(str(folder / "data")), shard_samples=600)
    config = load_config(DIGITS, [*SMALL, f"data.uri={folder}/data", f"run={folder}/run", "sampling.sampler=heun"])
    write_run(config, seed=1, step=4)
    write_run(config)
    return config


def at(config: Config, step: int, run: str = "") -> Config:
    return dataclasses.replace(
        config, run=run or config.run, sampling=dataclasses.replace(config.sampling, checkpoint=step, lost_snapshots=False)
    )


def from_earlier(config: Config, networks: Sequence[Network], w: Weight) -> Denoiser:
    return autoguidance(*networks, w, kind=config.diffusion.prediction)


def guided_by(monkeypatch: pytest.MonkeyPatch, other: Config) -> None:
    monkeypatch.setitem(GUIDANCES, "cfg", Guidance(from_earlier, others=lambda config: [other]))


def drawn(sampler: Sampler, w: float) -> Tensor:
    return sampler.sample(INDEX, INDEX % 10, w)


def test_a_second_network_is_found_kept_loaded_asked_and_named(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, strong, weak = weights_of(run), Sampler.load(run.run).network, Sampler.of(at(run, 4), weights_of(at(run, 4))).network
    guided_by(monkeypatch, at(run, 4))
    weights = weights_of(run)
    assert [other.step for other in weights.others] == [4]
    assert weights.all_of == (*plain.of, *weights.others[0].of)
    assert weights.key == plain.key  # its own values are the same
    weights.keep()
    assert {weights.key, weights.others[0].key} <= {info.key for info in open_store(run.run).list("weights/")}
    loaded = Sampler.load(run.run)
    expected = sample(
        autoguidance(strong, weak, GUIDANCES["cfg"].weight(run, 2.0)),
        INDEX % 10,
        INDEX,
        (1, 8, 8),
        levels=sampling_levels(run),
        sampler=SAMPLERS["heun"].make(run.sampling),
        seed=run.sampling.seed,
        clip=run.sampling.clip,
    )
    assert torch.equal(drawn(loaded, 2.0), expected)
    assert not torch.equal(drawn(loaded, 2.0), drawn(loaded, 0.0))
    sweep = list(loaded.sweep(INDEX, INDEX % 10, WEIGHTS))
    assert sum(one.evaluations for one in sweep) == len(INDEX) * sweep_evaluations(run, WEIGHTS)
    places = {placed([Trained(run, each, run)], [], "cpu")[0].store.uri for each in (plain, weights)}
    assert len(places) == 2  # units of another second network are other units


def test_the_other_network_may_be_that_of_another_run_but_not_of_another_kind(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wider = dataclasses.replace(run, run=str(tmp_path / "wider"), model=dataclasses.replace(run.model, channels=16))
    write_run(wider)
    guided_by(monkeypatch, at(run, 0, wider.run))
    loaded = Sampler.load(run.run)
    parameters = [sum(p.numel() for p in network.parameters()) for network in (loaded.network, *loaded.others)]
    assert parameters[1] > 2 * parameters[0]
    assert drawn(loaded, 1.0).isfinite().all()
    other = dataclasses.replace(run, run=str(tmp_path / "v"), diffusion=dataclasses.replace(run.diffusion, prediction="v"))
    write_run(other)
    guided_by(monkeypatch, at(run, 0, other.run))
    with pytest.raises(ConfigError, match=r"v was trained with diffusion\.prediction=v, so it cannot guide .*run, which has eps"):
        Sampler.load(run.run)
    guided_by(monkeypatch, at(run, 0, str(tmp_path)))
    with pytest.raises(CheckpointError, match="no run stands here"):
        Sampler.load(run.run)


def test_calls_and_shared_steps_follow_from_the_record(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three forwards where it guides, and a weight that is nothing in the noisier half."""

    def denoiser(config: Config, networks: Sequence[Network], w: Weight) -> Denoiser:
        inner = by_classifier_free(config, networks, w)

        def denoise(z, logsnr, labels, previous=None):  # type: ignore[no-untyped-def]
            p = inner(z, logsnr, labels, previous)
            if w(logsnr.item()):  # type: ignore[operator]
                networks[0](z, logsnr.to(z).expand(len(z)), labels)
            return p

        return denoise

    def weight(config: Config, w: float) -> Weight:
        grown = increasing(w, noise_schedule(config.diffusion))
        return lambda logsnr: grown(logsnr) if logsnr > 0 else 0.0  # type: ignore[operator]

    monkeypatch.setitem(GUIDANCES, "cfg", Guidance(denoiser, weight=weight, calls=lambda config, weight: 3 if weight else 1))
    loaded, ladder = Sampler.load(run.run), sampling_levels(run).tolist()
    guided = [logsnr > 0 for logsnr in ladder]
    assert shared_steps(run, WEIGHTS) == guided.index(True) - 1 > 0
    assert evaluations(run, 1.0) == sum(1 + 2 * g for g in [*guided, *guided[1:]])
    alone = {w: drawn(loaded, w) for w in WEIGHTS}
    for one in loaded.sweep(INDEX, INDEX % 10, WEIGHTS):
        assert torch.equal(one.images, alone[one.w])
    sweep = list(loaded.sweep(INDEX, INDEX % 10, WEIGHTS))
    assert sum(one.evaluations for one in sweep) == len(INDEX) * sweep_evaluations(run, WEIGHTS)
