"""The training loop: the objective (Algorithm 1 of the paper) on every rank, from wherever the run stands to `train.steps`.

A step's samples come from `data_pipeline.order`, its noise, log-SNRs and dropped conditions from `trainer.diffusion.randomness`;
both depend on the step and the global sample index only. So nothing but weights, moments and the average has to be saved, and
any number of workers computes the same step.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from freeguide.configs.errors import ConfigError, UserError
from freeguide.configs.schema import Config, TrainConfig
from freeguide.configs.stored import sealed, to_yaml
from freeguide.data_pipeline.manifest import Manifest
from freeguide.data_pipeline.order import AnyOrder, choose_order
from freeguide.data_pipeline.store.base import Retry, Store
from freeguide.data_pipeline.store.open import open_data, open_store
from freeguide.data_pipeline.stored import NAME, load_manifest
from freeguide.data_pipeline.stream import Batch, Reader
from freeguide.trainer.checkpoints.manifest import ROUNDS
from freeguide.trainer.checkpoints.profiles import profiles
from freeguide.trainer.checkpoints.search import candidates, check_averages, check_identity
from freeguide.trainer.diffusion.objective import objective_of
from freeguide.trainer.diffusion.randomness import Purpose, uniform
from freeguide.trainer.networks.build import build_network, forward_flops, network_options
from freeguide.trainer.networks.kernels import choose_kernels
from freeguide.trainer.networks.layers import DropoutKey
from freeguide.trainer.sampler import Sampler, grid
from freeguide.trainer.training.ema import Ema
from freeguide.trainer.training.engine import Engine, join_process_group
from freeguide.trainer.training.failures import TERMINATED, Agreement, Incidents, Terminated, Watchdog, limit_collectives
from freeguide.trainer.training.resume import resume
from freeguide.trainer.training.telemetry import Stopwatch, Telemetry, say
from freeguide.trainer.training.writer import Writer
from freeguide.trainer.weights import weights_of

MOST_LOOKS = 5000  # at each sample; EDM's 200 million images of CIFAR-10 (arXiv 2206.00364, table 7) are 4000 of each
GOOD_LOOKS = 1000
_log = logging.getLogger("freeguide.loop")
_PATIENCE = 1800.0  # seconds that ranks wait for each other before the watchdogs' limit holds
GRID_STEPS = 32  # of the sample grids in TensorBoard
PATIENT = Retry(attempts=24)  # a store that is gone for a minute or two does not end a training


@dataclass(frozen=True)
class Run:
    """What the steps of a training work with."""

    config: Config
    store: Store
    engine: Engine
    ema: Ema
    reader: Reader
    telemetry: Telemetry
    writer: Writer
    incidents: Incidents
    identity: dict[str, Any]


def train(config: Config, terminated: Terminated | None = None) -> int:
    """Train until `config.train.steps`, going on from the run's newest checkpoint; returns the step it went on from.

    Every rank calls it. Raises UserError, one sentence, for data, a store or a checkpoint that cannot be used, and SystemExit
    with code 143 where a rank was asked to end (SIGTERM, or `terminated.ask`), once the run is saved.
    """
    try:
        run, start = assemble(config)
        with run.reader, closing(run.telemetry):
            if start < config.train.steps:
                run_steps(run, start, terminated or Terminated())
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the GPU's memory is too small ({str(error).split('. ')[0]}); lower train.micro_batch (the global batch stays), set "
            "train.recompute=true, or raise train.zero_stage"
        ) from error
    return start


def assemble(config: Config) -> tuple[Run, int]:
    """Everything that the steps need, as the run's newest checkpoint left it, and the step to go on from. All ranks call it."""
    objective_of(config).check(config)
    choose_kernels(config.train.deterministic)
    join_process_group()
    store, data = open_store(config.run, PATIENT), open_data(config.data, PATIENT)
    manifest = load_manifest(data)
    config = fitted(config, manifest)
    images = {"image_size": config.data.image_size, "channels": config.data.channels, "classes": config.data.classes}
    engine = Engine(build_network(config.model, **images, seed=config.seed), config.train)
    limit_collectives(_PATIENCE)  # DeepSpeed's own groups would give the first step, which may compile, ten minutes
    ema = Ema(engine, profiles(config.train))
    order = choose_order(manifest, config.train.global_batch, config.seed)
    drop = config.train.lost_averages == "drop"
    found = resume(store, engine, ema, run_identity(config, manifest, order), drop=drop)
    if found:
        order = order.with_rounds(found.rounds)
    identity = run_identity(config, manifest, order)
    start = found.step if found else 0
    reader = Reader(
        data,
        manifest,
        order,
        global_batch=config.train.global_batch,
        rank=engine.rank,
        world_size=engine.world_size,
        start_step=start,
        data=config.data,
    )
    telemetry = Telemetry(config, store, engine.device, start, forward_flops(config.model, **images))
    snapshots = found.snapshots if found else ()
    writer = Writer(store, engine, ema, identity, config.train, start, snapshots, before_manifest=telemetry.upload)
    incidents = Incidents(store, order, found.bad_steps if found else [], config.train, found.undone if found else 0)
    return Run(config, store, engine, ema, reader, telemetry, writer, incidents, identity), start


def run_steps(run: Run, start: int, terminated: Terminated) -> None:
    """The steps themselves, from `start` to `train.steps`."""
    config, options, engine = run.config, run.config.train, run.engine
    if engine.rank == 0:
        run.writer.claim()
        run.store.put("config.yaml", sealed(to_yaml(config)).encode())
        say(f"{'resuming from' if start else 'starting at'} step {start} of {options.steps}")
    agreement = Agreement(3)
    with Watchdog(options.watchdog_seconds) as watchdog, terminated:
        for step in range(start, options.steps):
            take_step(run, step)
            done = step + 1
            # Negative, so that the maximum over the ranks is the step that all of them have uploaded.
            stop, failed, uploaded = agreement.exchange(terminated.asked, bool(run.writer.error), -run.writer.uploaded)
            run.writer.boundary(-uploaded, failed=bool(failed))
            last = done == options.steps
            regular = last or done % options.checkpoint_every == 0
            save = bool(stop) or regular
            if save or done % options.log_every == 0:
                run.incidents.review(run.telemetry.flush(done, run.reader.stats()))
            if regular and (first_bad := run.incidents.over_budget()):  # not on notice: a run's bits know nothing of notices
                go_back(run, done, first_bad)
            if save:
                run.telemetry.saved(done, run.writer.start(done, run.incidents.bad_steps, run.incidents.undone))
            sample = last or (options.sample_every > 0 and save and done % options.sample_every == 0)
            if sample or stop:
                run.writer.finish()
            if sample and config.data.dtype == "uint8":  # latents are no pictures without their decoder
                draw_samples(run, done)
            if done == start + 1:
                limit_collectives(options.watchdog_seconds)
            watchdog.progress(f"step {done}")
            if stop and not last:
                if engine.rank == 0:
                    say(f"asked to end: saved at step {done}; the next start goes on from there")
                raise SystemExit(TERMINATED)
    agreement.close()


def take_step(run: Run, step: int) -> None:
    """One optimizer step: the next batch, the objective on it, the update that follows `step` updates, the averages.

    Raises UserError where fp16 cannot go on.
    """
    began = time.perf_counter()
    batch = next(run.reader)
    waited = time.perf_counter() - began
    lr = learning_rate(run.config.train, step)
    losses, logsnr = accumulate(run.engine, run.config, batch, run.telemetry.forward)
    try:
        norm = run.engine.step(lr)
    except OverflowError as error:
        raise UserError(
            f"the gradients of step {step + 1} overflow in fp16 even with a loss scale of 1; go on with train.precision=bf16, or "
            f"move the checkpoints from where they began out of {run.store.uri}/checkpoints and go on with a lower train.lr"
        ) from error
    run.ema.update(step + 1)
    run.telemetry.record(losses, logsnr, batch.index, norm, lr, waited)


def go_back(run: Run, done: int, first_bad: int) -> None:
    """Undo the updates since the last checkpoint before step `first_bad`: all steps up to `done` become steps that moved nothing.

    It is a regular one, as those saved on notice are not there in every run. The data go on, so that what led there does not come
    again. Raises UserError where there is no such checkpoint.
    """
    run.writer.finish()
    found = resume(run.store, run.engine, run.ema, run.identity, first_bad, run.config.train.checkpoint_every)
    if found is None:
        raise run.incidents.hopeless("and there is no checkpoint before them to go back to")
    for update in range(found.step + 1, done + 1):
        run.ema.update(update)
    if run.engine.rank == 0:
        run.writer.discard(after=found.step)
    run.incidents.undo(found.step, done)


def preflight(config: Config) -> int:
    """Everything about a run that can be checked without workers; returns the step that training would go on from.

    Raises UserError: options that the objective refuses, a store that does not answer, data that is not there or is not what the
    config says, a network that cannot be built, or a run that was started with something else.
    """
    objective_of(config).check(config)
    store, data = open_store(config.run), open_data(config.data)
    data.check(write=False)
    store.check()
    manifest = load_manifest(data)
    config = fitted(config, manifest)
    for sentence in misfits(config, manifest.samples):
        print(f"WARNING: {sentence}", flush=True)
    order = choose_order(manifest, config.train.global_batch, config.seed)
    forward_flops(config.model, image_size=config.data.image_size, channels=config.data.channels, classes=config.data.classes)
    names, drop = [p.name for p in profiles(config.train)], config.train.lost_averages == "drop"
    newest = next(candidates(store, names, drop), None)
    if newest is None:
        if config.run != config.data.manifest and store.exists(NAME):
            raise ConfigError(f"run={config.run} holds a data set, and a run needs a place of its own; name another run=URI")
        return 0
    check_identity(store, newest, run_identity(config, manifest, order))
    check_averages(store, newest, names, drop)
    return newest.step


def accumulate(engine: Engine, config: Config, batch: Batch, forward: Stopwatch) -> tuple[Tensor, Tensor]:
    """Back-propagate one rank's share of the global batch in micro-batches; returns losses and log-SNRs, each (b,).

    `forward` measures the forward passes.
    """
    losses_of = objective_of(config).losses
    kept: list[tuple[Tensor, Tensor]] = []
    for first in range(0, len(batch.index), engine.micro_batch):
        rows = slice(first, first + engine.micro_batch)
        x, c, i = (t[rows].to(engine.device, non_blocking=True) for t in (batch.images, batch.labels, batch.index))
        if config.data.flip:
            x = flipped(x, i, config.seed)
        dropout = DropoutKey(config.seed, i) if config.model.dropout else None
        with forward:
            result = losses_of(
                config,
                lambda z, logsnr, labels, dropout=dropout: engine(z, logsnr, labels, dropout),  # type: ignore[misc]
                x,
                c,
                i,
            )
        engine.accumulate(result.loss.mean())
        kept.append((result.loss.detach(), result.logsnr.detach()))
    return torch.cat([k[0] for k in kept]), torch.cat([k[1] for k in kept])


def flipped(images: Tensor, index: Tensor, seed: int) -> Tensor:
    """Mirror each image (B, C, H, W) left to right with probability 1/2, drawn by its global index (B,)."""
    mirror = uniform(seed, Purpose.TRAIN_FLIP, index, ()) < 0.5
    return torch.where(mirror[:, None, None, None], images.flip(-1), images)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of the update that follows `step` updates: linear warm-up, then what `train.lr_schedule` names.

    constant; cosine to 0 at the last step; inverse_sqrt: lr / sqrt(max(step / decay_steps, 1)), as EDM2.
    """
    warmup = min((step + 1) / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    if config.lr_schedule == "constant" or step < config.warmup_steps:
        return config.lr * warmup
    if config.lr_schedule == "inverse_sqrt":
        return config.lr / math.sqrt(max(step / config.decay_steps, 1.0))
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def run_identity(config: Config, manifest: Manifest, order: AnyOrder) -> dict[str, Any]:
    """What may not change while a run goes on: network, data and their order, noise, batch, average. Anything else may.

    The names of the other averages say what they are (`trainer.checkpoints.profiles`), and those of the classes say nothing that
    trains: data that lost or found them are accepted by their content.
    """
    return {
        "data.fingerprint": manifest.fingerprint,
        "data.content": manifest.content,
        "data.flip": config.data.flip,
        **({} if manifest.schema.dtype == "uint8" else {"data.latent_scale": config.data.latent_scale}),
        "seed": config.seed,
        "train.global_batch": config.train.global_batch,
        "train.ema_decay": config.train.ema_decay,
        "order": order.to_dict(),
        ROUNDS: order.rounds,
        **{f"model.{name}": getattr(config.model, name) for name in network_options(config.model)},
        **objective_of(config).identity(config),
    }


def misfits(config: Config, samples: int) -> Iterator[str]:
    """What is allowed but absurd for a data set of so many samples, each with a number that would do."""
    train, batch = config.train, config.train.global_batch
    if batch > samples:
        better = 1 << max(samples // 4, 1).bit_length() - 1
        yield (
            f"train.global_batch={batch} is more than the {samples:,} samples of the data, so that each step sees some of them "
            f"several times; train.global_batch={better} would do"
        )
    looks = train.steps * batch / samples
    if looks > MOST_LOOKS:
        steps = max(1, GOOD_LOOKS * samples // batch)
        yield (
            f"train.steps={train.steps} of {batch} images look at each of the {samples:,} samples {looks:,.0f} times, which a "
            f"network learns by heart; train.steps={steps} looks {GOOD_LOOKS:,} times"
        )


def misguided(config: Config, command: str) -> Iterator[str]:
    """What is allowed but means nothing: guidance of data with one class, in `command`, which is evaluate or generate."""
    asked, enough = {"evaluate": (config.evaluate.w, [0]), "generate": (config.generate.w, 0)}[command]
    if config.data.classes == 1 and asked != enough:
        yield (
            f"{command}.w={asked}: guidance goes from all images towards those of a class, and the data have one class only, so "
            f"that w > 0 just enlarges the difference of two estimates of the same; {command}.w={enough} would do"
        )


def fitted(config: Config, manifest: Manifest) -> Config:
    """The config with the number of classes that the data have. Raises ConfigError where it speaks of other samples than theirs."""
    for name in ("image_size", "channels", "classes", "dtype"):
        expected, found = getattr(config.data, name), getattr(manifest.schema, name)
        if expected != found and (name, expected) != ("classes", 0):
            raise ConfigError(
                f"data.{name}={expected}, but {config.data.uri} was prepared with {name}={found}; set data.{name}={found}"
            )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, classes=manifest.schema.classes))


def draw_samples(run: Run, step: int) -> None:
    """Put samples of the averaged weights into TensorBoard, a column per class (ten at most). Rank 0 draws, the others wait.

    It is a look, on the device that trains, and must end before the watchdogs do: a fast sampler with GRID_STEPS steps at most.
    """
    if run.engine.rank == 0:
        try:
            _draw(run, step)
        except UserError as error:
            _log.warning("%s; there is no sample grid of step %d", error, step)
    dist.barrier()


def _draw(run: Run, step: int) -> None:
    config, w = run.config, run.config.train.sample_w
    classes, rows = config.data.classes, 4
    columns = min(classes, 10) if classes > 1 else 10  # of one class they are lines of pictures
    sampling = dataclasses.replace(
        config.sampling,
        sampler="dpmpp_2m",
        spacing="logsnr",
        steps=min(config.sampling.steps, GRID_STEPS),
        precision="fp32" if config.train.precision == "fp32" else "bf16",
        compile=False,
        checkpoint=step,
    )
    config = dataclasses.replace(config, sampling=sampling)
    sampler = Sampler.of(config, weights_of(config), run.engine.device)
    index = torch.arange(rows * columns)
    x = sampler.sample(index, index % columns % classes, w)
    run.telemetry.images(step, f"samples/w={w:g}", grid(x, columns))
