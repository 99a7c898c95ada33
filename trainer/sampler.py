"""A trained run, ready to sample: its averaged weights, its schedule, and Algorithm 2 with the run's sampling options.

Image i of a seed depends on (seed, i), its label and w only: its noise is keyed by i, so any machine may draw any part.
"""

import dataclasses

import torch
from torch import Tensor, nn

from configs.schema import Config
from data_pipeline.store import open_store
from trainer import checkpoint
from trainer.diffusion.guidance import Weight, classifier_free, interval, weight_at
from trainer.diffusion.randomness import Purpose, bits
from trainer.diffusion.samplers import SAMPLERS, ancestral, sample
from trainer.diffusion.schedule import SCHEDULES, Schedule, levels
from trainer.networks.build import build_network


@dataclasses.dataclass(frozen=True)
class Sampler:
    """`network(z, logsnr, labels)` in evaluation mode, and the config it samples by."""

    network: nn.Module
    config: Config
    checkpoint: checkpoint.Checkpoint
    device: torch.device

    @staticmethod
    def from_run(config: Config, step: int = 0, device: torch.device | None = None) -> "Sampler":
        """Load the weights `sampling.ema` of checkpoint `step`, 0 for the newest. Raises CheckpointError if there are none."""
        store = open_store(config.run)
        found = checkpoint.find(store, step)
        data, device = config.data, device or torch.device("cpu")
        network = build_network(config.model, image_size=data.image_size, channels=data.channels, classes=data.classes)
        checkpoint.check_shapes(store, found, {name: tuple(p.shape) for name, p in network.named_parameters()})
        network.load_state_dict(checkpoint.average(store, found, config.sampling.ema), strict=False)
        return Sampler(network.eval().requires_grad_(False).to(device), config, found, device)

    def sample(self, index: Tensor, labels: Tensor, w: float) -> Tensor:
        """Images `index` (N,) of the seed, with `labels` (N,), at guidance weight w: (N, C, H, W) float32 on the CPU."""
        config = self.config
        options, data = config.sampling, config.data
        network = self.network
        denoise = classifier_free(
            lambda z, logsnr, labels: network(z, logsnr, labels),
            guidance_weight(config, w),
            null_label=data.classes,
            p_uncond=config.diffusion.p_uncond,
            kind=config.diffusion.prediction,
        )
        transition = ancestral(options.v) if options.sampler == "ancestral" else SAMPLERS[options.sampler]()
        with torch.inference_mode():
            images = [
                sample(
                    denoise,
                    rows.to(self.device),
                    i.to(self.device),
                    (data.channels, data.image_size, data.image_size),
                    levels=sampling_levels(config),
                    sampler=transition,
                    seed=options.seed,
                    clip=options.clip,
                ).cpu()
                for rows, i in zip(labels.split(options.batch), index.split(options.batch), strict=True)
            ]
        return torch.cat(images)


def guidance_weight(config: Config, w: float) -> Weight:
    """w everywhere, or inside `sampling.interval` only."""
    bounds = config.sampling.interval
    return interval(w, bounds[0], bounds[1]) if bounds and w else w


def sampling_levels(config: Config) -> Tensor:
    """The log-SNR levels of the config's sampler, (T,) float64."""
    return levels(noise_schedule(config), config.sampling.steps, config.sampling.spacing)


def evaluations(config: Config, w: float) -> int:
    """Network evaluations per image: one per level, two where it is guided, and Heun's second ones."""
    weight = guidance_weight(config, w)
    guided = [weight_at(weight, logsnr) != 0 for logsnr in sampling_levels(config).tolist()]
    again = guided[1:] if config.sampling.sampler == "heun" else []
    return sum(1 + bool(g) for g in [*guided, *again])


def noise_schedule(config: Config) -> Schedule:
    """The training distribution of log-SNR that the config names."""
    return SCHEDULES[config.diffusion.schedule](logsnr_min=config.diffusion.logsnr_min, logsnr_max=config.diffusion.logsnr_max)


def image_labels(config: Config, index: Tensor) -> Tensor:
    """Label of image i, (N,) int64: i mod classes, or drawn uniformly by (seed, i)."""
    if config.sampling.labels == "balanced":
        return index % config.data.classes
    words = bits(config.sampling.seed, Purpose.SAMPLE_LABEL, index, ())
    return words * config.data.classes >> 32  # multiply-shift: uniform to within classes / 2**32


def grid(images: Tensor, columns: int) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] as one picture (C, rows * H, columns * W) in [0, 1], row by row."""
    n, c, h, w = images.shape
    rows = n // columns
    tiles = images[: rows * columns].view(rows, columns, c, h, w).permute(2, 0, 3, 1, 4)
    return (tiles.reshape(c, rows * h, columns * w).clamp(-1, 1) + 1) / 2
