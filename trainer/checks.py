"""What the options of diffusion, training and sampling ask of each other and of the data."""

from freeguide.configs.checks import Checks
from freeguide.configs.schema import Config, TrainConfig
from freeguide.data_pipeline import checks as of_data


def contradictions(config: Config, command: str) -> Checks:
    """Everything that has to hold of the data, of training and of sampling for `command`."""
    yield from of_data.contradictions(config, command)
    yield from _diffusion_checks(config, command)
    yield from _train_checks(config, command)
    yield from _average_checks(config, command)
    yield from _sampling_checks(config, command)


def _diffusion_checks(config: Config, command: str) -> Checks:
    diffusion = config.diffusion
    yield (
        diffusion.p_uncond < 1 or command not in ("evaluate", "generate"),
        f"diffusion.p_uncond=1 trains no class at all, so {command} cannot sample one at any w: train with p_uncond < 1",
    )
    low, high = diffusion.logsnr_min, diffusion.logsnr_max
    yield low < high, f"diffusion.logsnr_min={low} is not below diffusion.logsnr_max={high}: swap them"
    asked = {
        "evaluate": ("evaluate.w", config.evaluate.w),
        "generate": ("generate.w", [config.generate.w]),
        "train": ("train.sample_w", [config.train.sample_w]),
    }
    key, weights = asked.get(command, ("", []))
    guided = next((w for w in weights if w), None)
    yield (
        diffusion.p_uncond > 0 or guided is None,
        f"diffusion.p_uncond=0 leaves the network without an unconditional mode, so {key}={guided} cannot be sampled: "
        f"train with p_uncond > 0 or ask for w=0",
    )


def _train_checks(config: Config, command: str) -> Checks:
    train = config.train
    yield from share_checks(train, config.cluster.workers, "cluster.workers")
    yield (
        train.precision == "fp32" or train.zero_stage >= 1,
        f"train.precision={train.precision} with train.zero_stage=0: DeepSpeed keeps fp32 masters from stage 1 on; "
        f"use stage 1 or fp32",
    )
    yield (
        command != "train" or not config.model.learn_sigma,
        "model.learn_sigma=true cannot be trained: the objective fixes the variance with v (sampling.v); set it to false",
    )
    yield (
        command != "train" or config.data.dtype == "uint8" or train.sample_every == 0,
        f"train.sample_every={train.sample_every} with data.dtype={config.data.dtype}: latents are no pictures without their "
        f"decoder; set it to 0",
    )


def share_checks(train: TrainConfig, workers: int, whose: str) -> Checks:
    """Whether so many workers can share the batch; `whose` says what their number is."""
    batch, micro, share = train.global_batch, train.micro_batch, train.global_batch // workers
    yield batch % workers == 0, f"train.global_batch={batch} is not divisible by {whose}={workers}: workers take equal shares"
    yield (
        micro == 0 or (micro <= share and share % micro == 0),
        f"train.micro_batch={micro} does not divide a worker's share of {share} images "
        f"(train.global_batch={batch} over {whose}={workers})",
    )
    yield (
        train.precision == "fp32" or train.zero_stage != 1 or micro in (0, share),
        f"train.micro_batch={micro} with train.precision={train.precision} at train.zero_stage=1 would add gradients up in "
        f"{train.precision}; use stage 2 or 3, where they are added up in fp32",
    )


def _average_checks(config: Config, command: str) -> Checks:
    train = config.train
    for name in ("ema_half_lives", "ema_sigma_rel"):
        values = getattr(train, name)
        yield len(set(values)) == len(values), f"train.{name}={values}: each value once"
    sampled = config.sampling.ema
    kept = ["ema", "master", *(f"half_life_{n}" for n in train.ema_half_lives)]
    yield (
        command != "train" or sampled in kept or (sampled.startswith("sigma_rel_") and bool(train.ema_sigma_rel)),
        f"sampling.ema={sampled} is not kept by this training, whose sample grids need it: "
        f"add it to train.ema_half_lives or train.ema_sigma_rel",
    )


def _sampling_checks(config: Config, command: str) -> Checks:
    interval, dtype = config.sampling.interval, config.data.dtype
    yield (
        len(interval) in (0, 2) and interval == sorted(set(interval)),
        f"sampling.interval={interval}: two log-SNRs, the lower one first, or an empty list",
    )
    yield (
        command != "generate" or dtype == "uint8" or not config.sampling.clip,
        f"sampling.clip=true with data.dtype={dtype} would clamp latents to [-1, 1]; set sampling.clip=false",
    )
