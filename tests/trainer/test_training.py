"""Invariants 1 and 2: any world size computes the same steps, and a resumed run is the undisturbed one."""

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from freeguide.configs.load import load_config
from freeguide.configs.schema import TrainConfig
from freeguide.data_pipeline.manifest import Schema
from freeguide.data_pipeline.shards import Sample, Source, write_shards
from freeguide.data_pipeline.store.open import open_store
from freeguide.trainer.checkpoints import search
from freeguide.trainer.checkpoints.profiles import profiles
from freeguide.trainer.checkpoints.values import load
from freeguide.trainer.sampler import Sampler
from freeguide.trainer.training.loop import learning_rate
from tests.runs import assert_same_bits, losses, state

STAGES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def runs(tiny: Tiny, launch: Callable[..., object]) -> dict[str, Path]:
    """Straight runs of 6 steps, and runs stopped after 3 and continued, at each stage, on 2 processes; and others from there."""
    made: dict[str, Path] = {}
    first, second = [], []
    for stage, precision in STAGES:
        options = {"zero_stage": stage, "precision": precision}
        name = f"{stage}-{precision}"
        made[name] = tiny(f"straight-{name}", train=options | {"steps": 6, "checkpoint_every": 1, "keep_checkpoints": 9})
        begun = tiny(f"begun-{name}", train=options | {"steps": 3})
        run = load_config(begun).run
        made[f"{name} resumed"] = tiny(f"resumed-{name}", run=run, train=options | {"steps": 6})
        first += [made[name], begun]
        second.append(made[f"{name} resumed"])
    made["again"] = tiny("again", train={"zero_stage": 2, "precision": "bf16", "deterministic": True})  # on a CPU always the case
    made["accumulated"] = tiny("accumulated", train={"zero_stage": 2, "precision": "fp32", "micro_batch": 2})
    moved = tiny("moved-begun", train={"zero_stage": 2, "precision": "fp32", "steps": 3})
    made["moved"] = tiny("moved", run=load_config(moved).run, train={"zero_stage": 3, "precision": "fp32"})
    for stage in (2, 3):
        options = {"zero_stage": stage, "precision": "bf16", "micro_batch": 3}
        made[f"{stage}-bf16 accumulated"] = tiny(f"accumulated-bf16-{stage}", train=options)
    made["recomputed"] = tiny("recomputed", train={"zero_stage": 3, "precision": "fp32", "recompute": True})
    dit = {"network": "dit", "channels": 32, "depth": 2, "heads": 2}
    made["dit"] = tiny("dit", model=dit, train={"zero_stage": 3, "precision": "fp32", "sample_w": 0.5}, generate={"w": 2.0})
    others = [made[name] for name in ("again", "accumulated", "2-bf16 accumulated", "3-bf16 accumulated", "recomputed", "dit")]
    launch(2, *first, *others, moved)
    launch(2, *second)
    made["alone"] = tiny("alone", train={"zero_stage": 2, "precision": "fp32"})
    launch(1, made["alone"], made["moved"])
    made["three"] = tiny("three", train={"zero_stage": 1, "precision": "fp32"})
    launch(3, made["three"])
    return made


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_a_resumed_run_has_the_bits_of_the_undisturbed_one(runs: dict[str, Path], stage: int, precision: str) -> None:
    straight, resumed = runs[f"{stage}-{precision}"], runs[f"{stage}-{precision} resumed"]
    assert_same_bits(state(straight, 6), state(resumed, 6))
    assert losses(straight) == losses(resumed)


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))])
def test_twenty_steps_of_the_demo_repeat_to_the_bit_also_where_the_run_is_killed_on_the_way(
    tiny: Tiny, launch: Callable[..., list[subprocess.CompletedProcess[str]]], stage: int
) -> None:
    shipped = load_config(Path(__file__).parents[2] / "configs/digits.yaml")
    changed = {"steps": 20, "global_batch": 32, "log_every": 4, "checkpoint_every": 5, "precision": "fp32", "zero_stage": stage}
    groups = {"model": vars(shipped.model), "train": vars(shipped.train) | changed}
    straight, again, killed = (tiny(f"{name}-{stage}", **groups) for name in ("demo", "twice", "killed"))
    codes = [rank.returncode for rank in launch(2, straight, again, killed, check=False, KILL="18")]
    assert codes[0] == -signal.SIGKILL
    assert codes[1] != 0
    first, _ = launch(2, killed)
    assert re.search(r"resuming from step (10|15) of 20", first.stdout), first.stdout
    assert len(losses(straight)) == 20
    for other in (again, killed):
        assert losses(other) == losses(straight)
        assert_same_bits(state(other), state(straight))


def test_two_runs_of_one_config_have_the_same_bits(runs: dict[str, Path]) -> None:
    assert_same_bits(state(runs["2-bf16"], 6), state(runs["again"], 6))


@pytest.mark.parametrize("other", ["0-fp32", "1-fp32", "3-fp32", "accumulated", "alone", "three", "moved"])
def test_losses_do_not_depend_on_world_size_stage_or_micro_batch(runs: dict[str, Path], other: str) -> None:
    # In fp32 only the order of sums differs: 1e-5 relative is some 100 roundings. "moved" went from stage 2 on two processes to
    # stage 3 on one after step 3.
    assert losses(runs[other]) == pytest.approx(losses(runs["2-fp32"]), rel=1e-5, abs=0)


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_every_average_follows_the_fp32_weights_to_the_bit(runs: dict[str, Path], stage: int, precision: str) -> None:
    """The averages of the ranks' fragments are those of the gathered weights, at every stage."""
    config = load_config(runs[f"{stage}-{precision}"])
    store = open_store(config.run)
    followed = {p: load(store, search.find(store, 1), p.name) for p in profiles(config.train)}
    assert [p.name for p in followed] == ["ema", "half_life_24", "sigma_rel_0.1"]
    for step in range(1, 7):
        found = search.find(store, step)
        weights = load(store, found, "master")
        for profile, average in followed.items():
            if step > 1:
                for name, values in average.items():
                    values.lerp_(weights[name], 1 - profile.kept(step))
                assert_same_bits(load(store, found, profile.name), average)
            # Exponential averages begin with the untrained weights, power functions give those no weight.
            begun = [torch.equal(average[name], weights[name]) for name in average]
            assert all(begun) if step == 1 and profile.sigma_rel else not all(begun)


@pytest.mark.parametrize("stage", [2, 3])
def test_low_precision_gradients_are_added_up_in_fp32(runs: dict[str, Path], stage: int) -> None:
    # Rounding of single gradients to 8 bits remains: it moves a loss by some 1e-3.
    one, many = losses(runs[f"{stage}-bf16"]), losses(runs[f"{stage}-bf16 accumulated"])
    assert many == pytest.approx(one, rel=5e-3, abs=0)
    assert many != one


def test_recomputing_activations_changes_nothing(runs: dict[str, Path]) -> None:
    assert_same_bits(state(runs["3-fp32"], 6), state(runs["recomputed"], 6))


def test_every_parameter_of_a_dit_is_trained(runs: dict[str, Path]) -> None:
    weights, averages = ({n: v for n, v in state(runs["dit"], 6).items() if n.startswith(k)} for k in ("master ", "ema "))
    for (name, after), before in zip(weights.items(), averages.values(), strict=True):
        assert torch.isfinite(after).all(), name
        assert not torch.equal(after, before), f"{name} did not move"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_do_not_depend_on_four_processes_or_one_at_any_stage(tiny: Tiny, launch: Callable[..., object], stage: int) -> None:
    """From the start, and across a resume on another number of processes."""
    options = {"zero_stage": stage, "precision": "fp32", "steps": 6}
    four, one = tiny(f"four-{stage}", train=options), tiny(f"one-{stage}", train=options)
    begun = tiny(f"begun4-{stage}", train=options | {"steps": 3})
    went_on = tiny(f"went-on-{stage}", run=load_config(begun).run, train=options)
    launch(4, four, begun)
    launch(3, went_on)
    launch(1, one)
    for other in (four, went_on):
        assert losses(other) == pytest.approx(losses(one), rel=1e-5, abs=0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_compiled_network_has_the_same_losses(tiny: Tiny, launch: Callable[..., object], stage: int) -> None:
    options = {"zero_stage": stage, "precision": "fp32"}
    plain, compiled = (tiny(f"compile-{stage}-{c}", train=options | {"compile": c}) for c in (False, True))
    launch(1, plain, compiled)
    # The compiler fuses and reorders: some 100 roundings.
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5, abs=0)


@pytest.mark.slow
def test_a_compiled_run_resumes_with_the_bits_of_the_undisturbed_one(
    tiny: Tiny, launch: Callable[..., object], tmp_path: Path
) -> None:
    """With the network of configs/fashion_mnist.yaml, at its stage and precision; the image size differs from the other tests'."""
    shipped = load_config(Path(__file__).parents[2] / "configs/fashion_mnist.yaml")
    schema = Schema(shipped.data.image_size, shipped.data.channels, shipped.data.classes)
    pixels = torch.randint(256, (96, *schema.shape), generator=torch.Generator().manual_seed(0)).byte().numpy()
    write_shards(Source(schema, 96, lambda i: Sample(pixels[i], i % 10), "noise"), open_store(str(tmp_path)), shard_samples=96)
    data = {"uri": str(tmp_path), "image_size": schema.image_size}
    options = {"zero_stage": shipped.train.zero_stage, "precision": shipped.train.precision, "compile": True}

    def made(name: str, steps: int, run: str | None = None) -> Path:
        return tiny(name, run=run, data=data, model=vars(shipped.model), train=options | {"steps": steps})

    straight, begun = made("compiled", 6), made("compiled-begun", 3)
    launch(1, straight)
    launch(1, begun)
    resumed = made("compiled-resumed", 6, run=load_config(begun).run)
    launch(1, resumed)
    assert_same_bits(state(straight, 6), state(resumed, 6))
    assert losses(straight) == losses(resumed)
    plain = tiny("uncompiled", data=data, model=vars(shipped.model), train=options | {"steps": 6, "compile": False})
    launch(1, plain)
    # The compiler fuses and reorders: some 100 roundings.
    assert losses(straight) == pytest.approx(losses(plain), rel=1e-5, abs=0)


def test_sample_grids_have_a_w_of_their_own(runs: dict[str, Path]) -> None:
    for name, w in (("alone", "0"), ("dit", "0.5")):
        log = EventAccumulator(str(Path(load_config(runs[name]).run) / "events"))
        log.Reload()
        assert log.Tags()["images"] == [f"samples/w={w}"]
        assert [image.step for image in log.Images(f"samples/w={w}")] == [6]


def test_a_trained_run_is_sampled_by_its_uri_alone(runs: dict[str, Path]) -> None:
    trained = load_config(runs["dit"])
    index = torch.arange(20)
    drawn = Sampler.load(trained.run, device="cpu").sample(index, index % 10, 0.5)
    store = open_store(trained.run)
    direct = Sampler.from_weights(trained, load(store, search.find(store), "ema"))
    assert drawn.shape == (20, 1, 8, 8)
    assert torch.equal(drawn, direct.sample(index, index % 10, 0.5))
    longer = Sampler.load(trained.run, "sampling={steps: 3}", device="cpu").sample(index, index % 10, 0.5)
    assert not torch.equal(drawn, longer)


def test_weights_move_and_every_parameter_is_trained(runs: dict[str, Path]) -> None:
    begin, end = state(runs["2-fp32"], 1), state(runs["2-fp32"], 6)
    for name, values in end.items():
        assert torch.isfinite(values).all(), name
        assert not torch.equal(values, begin[name]), f"{name} did not move"


def test_learning_rates_against_their_closed_forms() -> None:
    def rates(schedule: str, *steps: int) -> list[float]:
        config = TrainConfig(steps=110, lr=8.0, warmup_steps=10, lr_schedule=schedule, decay_steps=20)
        return [learning_rate(config, step) for step in steps]

    for schedule in ("constant", "cosine", "inverse_sqrt"):
        assert rates(schedule, 0, 4, 9) == pytest.approx([0.8, 4.0, 8.0])
    assert rates("constant", 10, 109) == [8.0, 8.0]
    assert rates("cosine", 10, 35, 60, 85, 110) == pytest.approx([8.0, 4 + 8**0.5, 4.0, 4 - 8**0.5, 0.0], abs=1e-12)
    assert rates("inverse_sqrt", 20, 80, 180) == pytest.approx([8.0, 4.0, 8 / 3])
