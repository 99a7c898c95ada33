"""A trained run, ready to sample: its averaged weights, its schedule, and Algorithm 2 with the run's sampling options.

Image i of a seed depends on (seed, i), its label and w only: its noise is keyed by i, so any machine may draw any part. If guidance
is kept to an interval of log-SNRs, the trajectories of all w are the same up to the first guided level: `sweep` goes there once and
lets every w continue from that state, with the same bits as by itself.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor, nn

from freeguide.configs.errors import ConfigError
from freeguide.configs.load import overridden
from freeguide.configs.locations import locate
from freeguide.configs.schema import Config
from freeguide.data_pipeline.store.open import open_store
from freeguide.trainer.checkpoints.search import check_shapes
from freeguide.trainer.checks import contradictions
from freeguide.trainer.diffusion.guidance import first_guided, weight_at
from freeguide.trainer.diffusion.guidances import guidance_of
from freeguide.trainer.diffusion.parametrisation import Network
from freeguide.trainer.diffusion.randomness import Purpose, bits
from freeguide.trainer.diffusion.samplers import SAMPLERS, State, sample
from freeguide.trainer.diffusion.schedule import alpha_sigma, levels, noise_schedule, posterior
from freeguide.trainer.networks.build import build_network
from freeguide.trainer.networks.kernels import choose_kernels
from freeguide.trainer.rounding import to_uint8
from freeguide.trainer.weights import Weights, stored_config, weights_of

_log = logging.getLogger("freeguide.sampler")
_ROUNDING = 2.0**-9  # of bf16, relative
_NOISE = 0.01  # standard deviation of noise in z, whose own is about 1, that we do not mention


@dataclass(frozen=True)
class Drawn:
    """Images at one w, and the network evaluations behind them. Evaluations that several w share are counted at the first."""

    w: float
    images: Tensor  # (N, C, H, W) float32 on the CPU
    evaluations: int


@dataclass(frozen=True)
class Sampler:
    """`network(z, logsnr, labels)` in evaluation mode, the config it samples by, and the other networks that its guidance asks."""

    network: nn.Module
    config: Config
    device: torch.device
    others: tuple[nn.Module, ...] = ()

    @staticmethod
    def load(uri: str, *overrides: str, device: torch.device | str | None = None) -> "Sampler":
        """The run at `uri` as it was trained, with its newest weights: the run's own config says all that has to be known.

        Images are those that `freeguide generate` makes of the run, and cuDNN keeps to fp32 for that, in the whole process.
        `overrides` are options of sampling as the commands take them: `Sampler.load("runs/x", "sampling.steps=32")`. `device` is
        the GPU if there is one, unless it is named. Nothing in the stored config is resolved. Raises UserError, one sentence: there
        is no such run, average or checkpoint, or an option is not one of sampling or contradicts the run.
        """
        run = locate(uri).uri
        open_store(run).check(write=False)
        config = overridden(replace(stored_config(run), run=run), "sampling", overrides, "generate", contradictions)
        check_interval(config)
        choose_kernels(torch.are_deterministic_algorithms_enabled())
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return Sampler.of(config, weights_of(config), device)

    @staticmethod
    def of(config: Config, weights: Weights, device: torch.device | None = None) -> "Sampler":
        """With the weights of a run, and those of the others that come with them. Raises CheckpointError as `Weights.read`."""
        own = Sampler.from_weights(config, weights.read(), device)
        others = (
            _loaded(replace(config, run=other.run, model=stored_config(other.run).model), other.read(), own.device)
            for other in weights.others
        )
        return replace(own, others=tuple(others))

    @staticmethod
    def from_weights(config: Config, weights: Mapping[str, Tensor], device: torch.device | None = None) -> "Sampler":
        """With `weights`, by the names of the network's parameters. Raises CheckpointError if they are those of another network."""
        device = device or torch.device("cpu")
        network = _loaded(config, weights, device)
        noise = rounding_noise(config)
        if noise > _NOISE:
            _log.warning(
                "sampling.precision=bf16 rounds eps, which unclipped adds noise of standard deviation %.2g to z in one step; "
                "set sampling.clip=true or sampling.precision=fp32",
                noise,
            )
        return Sampler(network, config, device)

    def sample(self, index: Tensor, labels: Tensor, w: float) -> Tensor:
        """Images `index` (N,) of the seed, with `labels` (N,), at guidance weight w: (N, C, H, W) float32 on the CPU."""
        return next(self.sweep(index, labels, [w])).images

    def sweep(self, index: Tensor, labels: Tensor, weights: Sequence[float]) -> Iterator[Drawn]:
        """The same images at each of `weights`, one w after the other; steps that do not depend on w are made once."""
        fork = shared_steps(self.config, weights) if len(weights) > 1 else 0
        batch = self.config.sampling.batch
        batches = list(zip(index.to(self.device).split(batch), labels.to(self.device).split(batch), strict=True))
        starts: list[State | None] = [None] * len(batches)
        for w in weights:
            yield self._draw(w, batches, fork, starts)

    @torch.inference_mode()
    def _draw(self, w: float, batches: list[tuple[Tensor, Tensor]], fork: int, starts: list[State | None]) -> Drawn:
        """One w of a sweep. Each batch goes on from its state of `starts` where it has one, else keeps its state at step `fork`."""
        options, data, guidance = self.config.sampling, self.config.data, guidance_of(self.config)
        evaluations = 0

        def counted(network: nn.Module) -> Network:
            def call(z: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
                nonlocal evaluations
                evaluations += len(z)
                with torch.autocast(z.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                    output: Tensor = network(z, logsnr, labels)
                    return output

            return call

        networks = [counted(network) for network in (self.network, *self.others)]
        denoise = guidance.denoiser(self.config, networks, guidance.weight(self.config, w))
        transition = SAMPLERS[options.sampler].make(options)
        images = []
        for number, (index, labels) in enumerate(batches):
            passed: dict[int, State] = {}
            x = sample(
                denoise,
                labels,
                index,
                (data.channels, data.image_size, data.image_size),
                levels=sampling_levels(self.config),
                sampler=transition,
                seed=options.seed,
                clip=options.clip,
                start=starts[number],
                on_step=lambda state, passed=passed: passed.update({state.step: state} if state.step == fork else {}),  # type: ignore[misc]
            )
            images.append(x.cpu())
            starts[number] = starts[number] or passed.get(fork)
        return Drawn(w, torch.cat(images), evaluations)


def _loaded(config: Config, weights: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """The network of a run, ready to be asked. Raises CheckpointError if `weights` are those of another network."""
    data = config.data
    network = build_network(config.model, image_size=data.image_size, channels=data.channels, classes=data.classes)
    check_shapes(config.run, _shapes(weights), _shapes(dict(network.named_parameters())))
    network.load_state_dict(weights, strict=False)
    network.eval().requires_grad_(False).to(device)
    if config.sampling.compile:
        network.compile(dynamic=False)
    return network


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(values.shape) for name, values in weights.items()}


def sampling_levels(config: Config) -> Tensor:
    """The log-SNR levels of the config's sampler, (T,) float64."""
    return levels(noise_schedule(config.diffusion), config.sampling.steps, config.sampling.spacing)


def check_interval(config: Config) -> None:
    """Raises ConfigError if guidance is kept to an interval that none of the sampler's levels is in."""
    ladder = sampling_levels(config)
    if config.sampling.interval and _first_guided(config, 1.0, ladder) == len(ladder):
        raise ConfigError(
            f"sampling.interval={config.sampling.interval} holds none of the {len(ladder)} log-SNR levels, so no w would guide: "
            "widen it, or raise sampling.steps"
        )


def shared_steps(config: Config, weights: Sequence[float]) -> int:
    """Transitions at the beginning that are the same at all `weights`, because none guides at a level that they look at."""
    ladder = sampling_levels(config)
    first = min(_first_guided(config, w, ladder) for w in weights)
    return max(0, min(first - max(SAMPLERS[config.sampling.sampler].asks_at), len(ladder) - 1))


def _first_guided(config: Config, w: float, ladder: Tensor) -> int:
    return first_guided(guidance_of(config).weight(config, w), ladder)


def evaluations(config: Config, w: float, start: int = 0) -> int:
    """Network evaluations per image from step `start` on: of each prediction that the sampler asks the guidance for."""
    guidance = guidance_of(config)
    weight = guidance.weight(config, w)
    calls = [guidance.calls(config, weight_at(weight, logsnr)) for logsnr in sampling_levels(config).tolist()]
    asks_at = SAMPLERS[config.sampling.sampler].asks_at
    return sum(calls[step + ahead] for step in range(start, len(calls) - 1) for ahead in asks_at) + calls[-1]


def sweep_evaluations(config: Config, weights: Sequence[float]) -> int:
    """Network evaluations per image of `Sampler.sweep`: the shared steps once, and every w from there."""
    if not weights:
        return 0
    fork = shared_steps(config, weights)
    shared = evaluations(config, weights[0]) - evaluations(config, weights[0], fork)
    return shared + sum(evaluations(config, w, fork) for w in weights)


def rounding_noise(config: Config) -> float:
    """What bf16's rounding of eps adds to z in the worst transition of Algorithm 2, as a standard deviation; 0 where x is clamped.

    x = (z - sigma eps) / alpha multiplies an error of eps by sigma / alpha, 22026 at lambda = -20; the posterior's mean takes
    most of it away again. The other parametrisations do not divide by alpha.
    """
    options = config.sampling
    if options.precision == "fp32" or options.clip or config.diffusion.prediction != "eps" or options.steps == 1:
        return 0.0
    ladder = sampling_levels(config)
    alpha, sigma = alpha_sigma(ladder[:-1])
    return float((posterior(ladder[:-1], ladder[1:]).x_scale * sigma / alpha).max()) * _ROUNDING


def image_labels(config: Config, index: Tensor) -> Tensor:
    """Label of image i, (N,) int64: i mod classes, or drawn uniformly by (seed, i)."""
    if config.sampling.labels == "balanced":
        return index % config.data.classes
    words = bits(config.sampling.seed, Purpose.SAMPLE_LABEL, index, ())
    return words * config.data.classes >> 32  # multiply-shift: uniform to within classes / 2**32


def grid(images: Tensor, columns: int) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] as one picture (C, rows * H, columns * W) in [0, 1], row by row."""
    return (_tiled(images, columns).clamp(-1, 1) + 1) / 2


def picture(images: Tensor, columns: int) -> Image.Image:
    """Images (N, C, H, W) in [-1, 1] as one picture to look at, row by row.

    Raises ValueError unless C is 1 (grey) or 3 (RGB), and DataError as `to_uint8` does.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"samples of {images.shape[1]} channels are no pictures: decode them first.")
    levels = _tiled(torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2), columns).permute(1, 2, 0)
    return Image.fromarray(levels.squeeze(2).numpy() if levels.shape[2] == 1 else levels.numpy())


def _tiled(images: Tensor, columns: int) -> Tensor:
    """Images (N, C, H, W) as one (C, rows * H, columns * W); what does not fill a row is left out."""
    n, c, h, w = images.shape
    rows = n // columns
    tiles = images[: rows * columns].reshape(rows, columns, c, h, w).permute(2, 0, 3, 1, 4)
    return tiles.reshape(c, rows * h, columns * w)
