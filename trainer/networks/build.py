"""From a configuration to a network: check it, build it the same way everywhere, and say what it costs.

Weights depend on the configuration and the seed only: they are drawn on the CPU, from a generator of their own, and are therefore
the same on every rank and in every process, and nothing else that draws random numbers is disturbed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from freeguide.configs.errors import ConfigError
from freeguide.configs.schema import ModelConfig
from freeguide.trainer.networks.adm import ADM
from freeguide.trainer.networks.classifier import Classifier
from freeguide.trainer.networks.dit import DiT, DiTConfig

NETWORKS = ("adm", "dit")  # names that `model.network` may have
MOST_PARAMETERS = 10**12  # a slip of the pen: four terabytes
_DIT = ("network", "channels", "heads", "depth", "patch", "learn_sigma")  # the options that a DiT reads


def build_network(model: ModelConfig | DiTConfig, *, image_size: int, channels: int, classes: int, seed: int = 0) -> nn.Module:
    """The network `model.network` on the CPU, in fp32: `network(z, logsnr, labels, dropout=None)`, see `ADM.forward`.

    Within `torch.device("meta")` it has shapes only, and takes no memory.

    Args:
        model: the options of the network.
        image_size: pixels per side.
        channels: channels of an image.
        classes: number of classes; the network has one id more, `classes`, for the null class.
        seed: seed of the weights.

    Raises:
        ConfigError: the options do not fit each other or the images.
    """
    network = _constructor(model, image_size, channels, classes)
    with _seeded(seed):
        return network()


def build_classifier(model: ModelConfig, *, image_size: int, channels: int, classes: int, seed: int = 0) -> Classifier:
    """The noise-aware classifier on the CPU, in fp32: `classifier(z, logsnr)` -> logits. Arguments as `build_network`."""
    _check_images(image_size, channels, classes)
    _check_adm(model, image_size)
    with _seeded(seed):
        return Classifier(model, image_size=image_size, channels=channels, classes=classes)


def network_options(model: ModelConfig) -> list[str]:
    """Names of the options that decide the network `model.network`, and so the meaning of its weights."""
    return [name for name in vars(model) if (name in _DIT if model.network == "dit" else name not in ("depth", "patch"))]


def count_parameters(module: nn.Module) -> int:
    """Number of parameters; fixed tables are not parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def forward_flops(model: ModelConfig | DiTConfig, image_size: int, channels: int, classes: int) -> int:
    """Floating-point operations of one forward of one image: 2 per multiply-accumulate of convolutions, matrices and attention.

    It is counted on the meta device: no memory is taken and nothing is computed. A backward costs twice as much again. Raises
    ConfigError for options that do not fit each other or the images, and for a network that no machine could hold.
    """
    constructor = _constructor(model, image_size, channels, classes)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = constructor()
        if (parameters := count_parameters(network)) > MOST_PARAMETERS:
            raise ConfigError(f"model.*: the network would have {parameters:,} parameters; lower model.channels or the depth.")
        network(torch.zeros(1, channels, image_size, image_size), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops()


def _constructor(model: ModelConfig | DiTConfig, image_size: int, channels: int, classes: int) -> Callable[[], nn.Module]:
    _check_images(image_size, channels, classes)
    if isinstance(model, DiTConfig):
        _check_dit(model, image_size)
        return lambda: DiT(model, image_size=image_size, channels=channels, classes=classes)
    if model.network not in NETWORKS:
        raise ConfigError(f"model.network is {model.network!r}, which does not exist: choose one of {', '.join(NETWORKS)}.")
    if model.network == "dit":
        dit = DiTConfig(model.channels, model.depth, model.heads, model.patch, model.learn_sigma)
        return _constructor(dit, image_size, channels, classes)
    _check_adm(model, image_size)
    return lambda: ADM(model, image_size=image_size, channels=channels, classes=classes)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    place = "meta" if torch.get_default_device().type == "meta" else "cpu"
    # torch.manual_seed would also reseed the generators of the GPUs, which fork_rng does not give back here.
    with torch.random.fork_rng(devices=[]), torch.device(place):
        torch.default_generator.manual_seed(seed)
        yield


def _check_images(image_size: int, channels: int, classes: int) -> None:
    for name, value in (("image_size", image_size), ("channels", channels), ("classes", classes)):
        if value < 1:
            raise ConfigError(f"data.{name} is {value}: set it to at least 1.")


def _check_adm(model: ModelConfig, image_size: int) -> None:
    if model.channels < 2 or model.channels % 2:
        raise ConfigError(f"model.channels is {model.channels}: set it to an even number of at least 2.")
    if not model.channel_mult or min(model.channel_mult) < 1:
        raise ConfigError(f"model.channel_mult is {list(model.channel_mult)}: give one whole number of at least 1 for each level.")
    if model.res_blocks < 1:
        raise ConfigError(f"model.res_blocks is {model.res_blocks}: set it to at least 1.")
    if not 0 <= model.dropout < 1:
        raise ConfigError(f"model.dropout is {model.dropout}: set it to a probability of at least 0 and below 1.")
    levels = len(model.channel_mult)
    if image_size % 2 ** (levels - 1):
        raise ConfigError(
            f"data.image_size is {image_size}, which model.channel_mult halves {levels - 1} times: "
            f"use images divisible by {2 ** (levels - 1)} or fewer levels."
        )
    sizes = [image_size >> level for level in range(levels)]
    for size in model.attention:
        if size not in sizes:
            raise ConfigError(
                f"model.attention names feature maps of {size} pixels, which do not occur: "
                f"choose among {', '.join(map(str, sizes))} (data.image_size and its halves, one for each level)."
            )
    attended = {mult for mult, size in zip(model.channel_mult, sizes, strict=True) if size in model.attention}
    option = "head_channels" if model.head_channels else "heads"
    divisor = getattr(model, option)
    for width in sorted(mult * model.channels for mult in attended | {model.channel_mult[-1]}):
        if divisor < 1 or width % divisor:
            raise ConfigError(f"model.{option} is {divisor}: set it to a divisor of {width}, a width at which the network attends.")


def _check_dit(model: DiTConfig, image_size: int) -> None:
    # Named as in `model.*`, where `width` is `channels`.
    for option, value in (("channels", model.width), ("depth", model.depth), ("heads", model.heads), ("patch", model.patch)):
        if value < 1:
            raise ConfigError(f"model.{option} is {value}: set it to at least 1.")
    if image_size % model.patch:
        raise ConfigError(f"model.patch is {model.patch}: set it to a divisor of data.image_size, which is {image_size}.")
    if model.width % model.heads:
        raise ConfigError(f"model.heads is {model.heads}: set it to a divisor of model.channels, which is {model.width}.")
    if model.width % 4:
        raise ConfigError(f"model.channels is {model.width}: set it to a multiple of 4, as positions take a quarter each.")
