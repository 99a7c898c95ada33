"""A sweep over w shares what does not depend on w, to the bit, and counts what it asks of the network."""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from freeguide.configs.errors import CheckpointError, DataError, UserError
from freeguide.configs.load import load_config
from freeguide.configs.schema import Config
from freeguide.configs.stored import to_yaml
from freeguide.data_pipeline.shards import write_shards
from freeguide.data_pipeline.sources.digits import digits
from freeguide.data_pipeline.store.open import open_store
from freeguide.trainer.diffusion.oracles import GaussianClasses
from freeguide.trainer.diffusion.samplers import SAMPLERS, Evaluate, Kind, Noise, State
from freeguide.trainer.networks.build import build_network
from freeguide.trainer.rounding import to_uint8
from freeguide.trainer.sampler import (
    Sampler,
    evaluations,
    picture,
    rounding_noise,
    sampling_levels,
    shared_steps,
    sweep_evaluations,
)
from freeguide.trainer.weights import weights_of
from tests.cluster.untrained import HALF_LIFE, SMALL, write_run

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"
WEIGHTS = [0.0, 0.5, 4.0]
INTERVAL = "sampling.interval=[-1.0,3.0]"
INDEX = torch.tensor([5, 0, 17, 3, 4, 9, 11])


class Oracle(nn.Module):
    """The optimal network of Gaussian classes, which counts the rows it is asked for and keeps the dtypes it computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.exact = GaussianClasses(tuple(c / 5 - 1 for c in range(10)), 0.25, 0.0, 1.0)
        self.rows: list[int] = []
        self.dtypes: list[tuple[torch.dtype, torch.dtype]] = []

    def forward(self, z: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
        self.rows.append(len(z))
        self.dtypes.append((z.dtype, torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype))
        return self.exact(z.double(), logsnr.double(), labels).float()


@pytest.fixture
def sampler() -> Callable[..., Sampler]:
    def make(*overrides: str) -> Sampler:
        config = load_config(DIGITS, ["sampling.steps=12", "sampling.batch=3", *overrides], "evaluate")
        return Sampler(Oracle(), config, torch.device("cpu"))

    return make


def alone(sampler: Sampler, w: float) -> Tensor:
    return sampler.sample(INDEX, INDEX % 10, w)


@pytest.mark.parametrize("spacing", ["u", "logsnr"])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sweep_gives_the_bits_of_each_w_by_itself_at_no_more_than_its_plan(
    sampler: Callable[..., Sampler], name: str, spacing: str
) -> None:
    one = sampler(f"sampling.sampler={name}", f"sampling.spacing={spacing}", INTERVAL)
    assert shared_steps(one.config, WEIGHTS) > 0
    expected = [alone(one, w) for w in WEIGHTS]
    assert not torch.equal(expected[0], expected[1])
    assert not torch.equal(expected[1], expected[2])
    one.network.rows.clear()  # type: ignore[union-attr, operator]
    drawn = list(one.sweep(INDEX, INDEX % 10, WEIGHTS))
    asked = sum(one.network.rows)  # type: ignore[arg-type]
    assert [d.w for d in drawn] == WEIGHTS
    assert all(torch.equal(d.images, images) for d, images in zip(drawn, expected, strict=True))
    assert asked == sum(d.evaluations for d in drawn) == len(INDEX) * sweep_evaluations(one.config, WEIGHTS)
    assert asked < len(INDEX) * sum(evaluations(one.config, w) for w in WEIGHTS)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("order", [[4.0, 0.5], [0.5], [2.0, 0.0]])
def test_any_part_of_a_sweep_gives_the_same_images(sampler: Callable[..., Sampler], name: str, order: list[float]) -> None:
    """What an interrupted job makes of its rest."""
    one = sampler(f"sampling.sampler={name}", INTERVAL)
    for drawn in one.sweep(INDEX, INDEX % 10, order):
        assert torch.equal(drawn.images, alone(one, drawn.w))


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("interval", ["sampling.interval=[]", INTERVAL, "sampling.interval=[30,40]"])
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_evaluations_are_those_that_the_network_is_asked_for(
    sampler: Callable[..., Sampler], name: str, interval: str, steps: int
) -> None:
    one = sampler(f"sampling.sampler={name}", interval, f"sampling.steps={steps}")
    for w in WEIGHTS:
        one.network.rows.clear()  # type: ignore[union-attr, operator]
        alone(one, w)
        assert sum(one.network.rows) == len(INDEX) * evaluations(one.config, w)  # type: ignore[arg-type]
    levels = 2 * steps - 1 if name == "heun" else steps
    assert evaluations(one.config, 0.0) == levels  # one forward
    if interval == "sampling.interval=[]":
        assert evaluations(one.config, 1.0) == 2 * levels
        assert shared_steps(one.config, [0.5, 1.0]) == 0
    one.network.rows.clear()  # type: ignore[union-attr, operator]
    list(one.sweep(INDEX, INDEX % 10, WEIGHTS))
    assert sum(one.network.rows) == len(INDEX) * sweep_evaluations(one.config, WEIGHTS)  # type: ignore[arg-type]


@pytest.mark.parametrize("asks_at", [(0,), (0, 0), (0, 1, 1), (1, 0)])
def test_calls_and_shared_steps_follow_from_where_a_transition_asks(
    sampler: Callable[..., Sampler], monkeypatch: pytest.MonkeyPatch, asks_at: tuple[int, ...]
) -> None:
    """A sampler that nothing but its entry knows."""

    def transition(evaluate: Evaluate, state: State, levels: Tensor, noise: Noise) -> State:
        asked = [evaluate(state.z, state.step + ahead, state.previous) for ahead in asks_at]
        return State(state.step + 1, sum(p.x for p in asked) / len(asked) + state.z, asked[0])  # type: ignore[arg-type]

    monkeypatch.setitem(SAMPLERS, "ddim", Kind(lambda options: transition, asks_at))
    one = sampler("sampling.sampler=ddim", INTERVAL)
    expected = [alone(one, w) for w in WEIGHTS]
    one.network.rows.clear()  # type: ignore[union-attr, operator]
    drawn = list(one.sweep(INDEX, INDEX % 10, WEIGHTS))
    assert all(torch.equal(d.images, images) for d, images in zip(drawn, expected, strict=True))
    assert sum(one.network.rows) == len(INDEX) * sweep_evaluations(one.config, WEIGHTS)  # type: ignore[arg-type]
    assert evaluations(one.config, 0.0) == 11 * len(asks_at) + 1
    guided = [-1.0 <= logsnr < 3.0 for logsnr in sampling_levels(one.config).tolist()]
    assert shared_steps(one.config, WEIGHTS) == guided.index(True) - max(asks_at)


def test_the_papers_list_of_w_in_a_published_interval_costs_less_than_six_tenths_of_the_naive_sweep() -> None:
    """The FID interval of EDM2-XXL (arXiv 2404.07724), sigma in (0.19, 1.61], at T = 256 on the paper's own grid."""
    config = load_config(DIGITS, ["sampling.steps=256", "sampling.interval=[-0.95,3.32]"], "evaluate")
    weights = [0.0, *(0.1 * k for k in range(1, 11)), 2.0, 3.0, 4.0]
    plain = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, interval=[]))
    naive = sum(evaluations(plain, w) for w in weights)
    assert naive == 27 * 256
    assert sweep_evaluations(config, weights) / naive < 0.6


def test_bf16_is_the_networks_alone(sampler: Callable[..., Sampler]) -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        one = sampler(f"sampling.precision={precision}")
        assert alone(one, 1.0).dtype == torch.float32
        assert set(one.network.dtypes) == {(torch.float32, dtype)}  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_images() -> None:
    small = ["model.channels=8", "model.head_channels=8", "model.channel_mult=[1]", "model.attention=[]", "sampling.batch=4"]
    config = load_config(DIGITS, ["sampling.steps=3", "sampling.spacing=logsnr", *small], "evaluate")
    network = build_network(config.model, image_size=8, channels=1, classes=10).eval().requires_grad_(False)
    for parameter in network.parameters():  # the last layer begins at zero
        parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    one = Sampler(network, config, torch.device("cpu"))
    plain = alone(one, 1.0)
    network.compile(dynamic=False)
    # Other kernels add in another order; three steps of this network amplify float32's rounding of 6e-8 to below 1e-4.
    torch.testing.assert_close(alone(one, 1.0), plain, rtol=0, atol=1e-4)
    assert plain.std() > 0.1


def noise(*overrides: str) -> float:
    return rounding_noise(load_config(DIGITS, ["sampling.precision=bf16", "sampling.clip=false", *overrides], "evaluate"))


def test_rounding_noise_is_what_bf16_of_eps_adds_to_z() -> None:
    """Measured: eps of the exact network, rounded, through the first transition at lambda = -20."""
    assert noise("sampling.steps=256") == pytest.approx(2**-9 * 137, rel=0.01)  # 137: the growth of z's scale in that step
    assert noise("sampling.steps=1024") == pytest.approx(2**-9 * 35, rel=0.02)
    assert noise("diffusion.prediction=v") == noise("sampling.clip=true") == noise("sampling.precision=fp32") == 0
    config: Config = load_config(DIGITS, ["sampling.steps=256"], "evaluate")
    first, second = sampling_levels(config)[:2]
    eps = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = eps.bfloat16().double() - eps
    growth = (-torch.expm1(first - second)) * torch.sigmoid(second).sqrt() * (torch.sigmoid(-first) / torch.sigmoid(first)).sqrt()
    # 2^-9, half a unit in the last place of 1, stands for the deviation of a normal number's rounding, which is 0.85 of that.
    assert (error * growth).std().item() == pytest.approx(noise("sampling.steps=256"), rel=0.2)


def test_bf16_without_clipping_is_warned_of_once_and_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bf16 = ["sampling.precision=bf16", "sampling.clip=false", "run=/nowhere"]
    with caplog.at_level(logging.WARNING):
        config = load_config(DIGITS, bf16, "evaluate")
        weights = dict(build_network(config.model, image_size=8, channels=1, classes=10).named_parameters())
        Sampler.from_weights(config, weights)
        assert [record.getMessage() for record in caplog.records] == [
            "sampling.precision=bf16 rounds eps, which unclipped adds noise of standard deviation 2.2 to z in one step; "
            "set sampling.clip=true or sampling.precision=fp32"
        ]
        Sampler.from_weights(load_config(DIGITS, [*bf16, "sampling.clip=true"], "evaluate"), weights)
    assert len(caplog.records) == 1


# --- a run as a library finds it ---


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a run that nobody gives a config for."""
    folder = tmp_path_factory.mktemp("library")
    write_shards(digits(), open_store(str(folder / "data")), shard_samples=600)
    config = load_config(DIGITS, [*SMALL, f"data.uri={folder}/data", f"run={folder}/run", "sampling.sampler=ddim"])
    write_run(config)
    return config


def test_a_run_is_sampled_as_its_own_config_says(run: Config) -> None:
    direct = Sampler.from_weights(run, weights_of(run).read())
    assert torch.equal(alone(Sampler.load(run.run, device="cpu"), 0.5), alone(direct, 0.5))
    loaded = Sampler.load(run.run, "sampling.steps=3", "sampling.interval=[]", f"sampling.ema={HALF_LIFE}", device="cpu")
    sampling = dataclasses.replace(run.sampling, steps=3, interval=[], ema=HALF_LIFE)
    assert loaded.config == dataclasses.replace(run, sampling=sampling)
    assert not torch.equal(alone(loaded, 0.5), alone(direct, 0.5))


def test_a_run_may_have_been_copied_and_its_place_may_be_relative(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run.run, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    loaded = Sampler.load("copy", device="cpu")
    assert loaded.config.run == str(tmp_path / "copy")
    assert torch.equal(alone(loaded, 0.5), alone(Sampler.load(run.run, device="cpu"), 0.5))


def test_a_stored_config_resolves_nothing_when_a_library_reads_it(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_SECRET", "hunter2")
    shutil.copytree(run.run, tmp_path / "copy")
    stored = dataclasses.replace(run, evaluate=dataclasses.replace(run.evaluate, dataset="THEIRS"))
    text = to_yaml(stored).replace("THEIRS", "${oc.env:SOME_SECRET}")
    (tmp_path / "copy" / "config.yaml").write_text(text)
    loaded = Sampler.load(str(tmp_path / "copy"), "sampling.steps=${oc.env:STEPS,3}", device="cpu")
    assert loaded.config.evaluate.dataset == "${oc.env:SOME_SECRET}"
    assert loaded.config.sampling.steps == 3  # what the user types is the user's
    assert to_yaml(loaded.config).count("hunter2") == 0


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sampling.step=3", "argument 'sampling.step=3': unknown key sampling.step; did you mean sampling.steps?"),
        ("sampling.steps=0", "sampling.steps=0: must be a whole number from 1 to 100,000"),
        (
            "sampling.steps",
            "argument 'sampling.steps': an override has the form key=value, without spaces, for example train.lr=1e-4",
        ),
        ("model.channels=9", "argument 'model.channels=9': model.channels is settled here; give options of sampling only"),
        ("run=/elsewhere", "argument 'run=/elsewhere': run is settled here; give options of sampling only"),
        ("sampling.interval=[30,40]", "sampling.interval=[30.0, 40.0] holds none of the 6 log-SNR levels, so no w would guide"),
        ("sampling.checkpoint=5", "no whole checkpoint of step 5, only of 8"),
        (
            "sampling.ema=half_life_7",
            "the checkpoint of step 8 holds no average half_life_7; set sampling.ema to one of ema, half_",
        ),
    ],
)
def test_what_a_library_asks_wrongly_is_one_sentence(run: Config, override: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        Sampler.load(run.run, override)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_place_without_a_run_and_a_run_without_its_config_are_named(run: Config, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"{place}: (no run stands here; name the URI|.*does not exist)"):
            Sampler.load(str(place))
    shutil.copytree(run.run, tmp_path / "copy")
    (tmp_path / "copy" / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"copy: its config\.yaml is gone; give `freeguide train` again"):
        Sampler.load(str(tmp_path / "copy"))


def test_weights_of_another_network_are_refused_before_they_are_loaded(run: Config) -> None:
    wider = dataclasses.replace(run, model=dataclasses.replace(run.model, channels=16))
    with pytest.raises(CheckpointError, match=r"parameter \S+ has shape \(.*\) in the checkpoint and \(.*\) in this network"):
        Sampler.from_weights(wider, weights_of(run).read())


def test_a_picture_shows_the_eight_bits_of_each_image_row_by_row() -> None:
    levels = torch.arange(6 * 3 * 4 * 4, dtype=torch.uint8).view(6, 3, 4, 4)
    shown = np.asarray(picture(levels.float() / 127.5 - 1, columns=3))
    assert shown.shape == (8, 12, 3)
    assert np.array_equal(shown[4:, 8:], levels[5].permute(1, 2, 0).numpy())
    assert np.asarray(picture(levels[:, :1].float() / 127.5 - 1, columns=6)).shape == (4, 24)
    between = torch.linspace(-1.2, 1.2, 64).view(1, 1, 8, 8)
    assert np.array_equal(np.asarray(picture(between, columns=1)), to_uint8(between)[0, ..., 0])
    with pytest.raises(DataError, match="sample 1 of 2 is not finite"):
        picture(torch.cat([between, between * float("nan")]), columns=1)
    with pytest.raises(ValueError, match="samples of 4 channels are no pictures"):
        picture(torch.zeros(1, 4, 8, 8), columns=1)
