"""From a configuration to a network: check it, build it the same way everywhere, and say what it costs.

Weights depend on the configuration and the seed only: they are drawn on the CPU, from a generator of their own, and are therefore
the same on every rank and in every process, and nothing else that draws random numbers is disturbed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from freeguide.configs.errors import ConfigError
from freeguide.configs.schema import ModelConfig
from freeguide.trainer.networks import adm, dit
from freeguide.trainer.networks.adm import ADM
from freeguide.trainer.networks.classifier import Classifier
from freeguide.trainer.networks.dit import DiT


@dataclass(frozen=True)
class Kind:
    """A network that `model.network` can name."""

    make: Callable[..., nn.Module]  # make(model, image_size=, channels=, classes=); raises ConfigError for options that do not fit
    options: tuple[str, ...]  # of `ModelConfig`, those that it reads, and so the meaning of its weights


NETWORKS = {"adm": Kind(ADM, adm.OPTIONS), "dit": Kind(DiT, dit.OPTIONS)}
MOST_PARAMETERS = 10**12  # a slip of the pen: four terabytes


def build_network(model: ModelConfig, *, image_size: int, channels: int, classes: int, seed: int = 0) -> nn.Module:
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
    _check_images(image_size, channels, classes)
    kind = _kind(model)
    with _seeded(seed):
        return kind.make(model, image_size=image_size, channels=channels, classes=classes)


def build_classifier(model: ModelConfig, *, image_size: int, channels: int, classes: int, seed: int = 0) -> Classifier:
    """The noise-aware classifier on the CPU, in fp32: `classifier(z, logsnr)` -> logits. Arguments as `build_network`."""
    _check_images(image_size, channels, classes)
    with _seeded(seed):
        return Classifier(model, image_size=image_size, channels=channels, classes=classes)


def network_options(model: ModelConfig) -> list[str]:
    """Names of the options that decide the network `model.network`, and so the meaning of its weights."""
    return [name for name in vars(model) if name in ("network", *_kind(model).options)]


def count_parameters(module: nn.Module) -> int:
    """Number of parameters; fixed tables are not parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def forward_flops(model: ModelConfig, image_size: int, channels: int, classes: int) -> int:
    """Floating-point operations of one forward of one image: 2 per multiply-accumulate of convolutions, matrices and attention.

    It is counted on the meta device: no memory is taken and nothing is computed. A backward costs twice as much again. Raises
    ConfigError for options that do not fit each other or the images, and for a network that no machine could hold.
    """
    _check_images(image_size, channels, classes)
    kind = _kind(model)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = kind.make(model, image_size=image_size, channels=channels, classes=classes)
        if (parameters := count_parameters(network)) > MOST_PARAMETERS:
            raise ConfigError(f"model.*: the network would have {parameters:,} parameters; lower model.channels or the depth")
        network(torch.zeros(1, channels, image_size, image_size), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops()


def _kind(model: ModelConfig) -> Kind:
    if model.network not in NETWORKS:
        raise ConfigError(f"model.network is {model.network!r}, which does not exist: choose one of {', '.join(NETWORKS)}")
    return NETWORKS[model.network]


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
            raise ConfigError(f"data.{name} is {value}: set it to at least 1")
