"""Which guidance a config asks for: from its options to a denoiser at any w. The mathematics stand in `trainer.diffusion.guidance`.

Nothing else knows a guidance by name: `trainer.sampler` draws and counts with what a `Guidance` says, and `trainer.weights` finds
the weights of the networks that it asks beside the run's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from freeguide.configs.schema import Config
from freeguide.trainer.diffusion.guidance import Denoiser, Rule, Weight, classifier_free, interval, is_zero, linear
from freeguide.trainer.diffusion.parametrisation import Network


def in_interval(config: Config, w: float) -> Weight:
    """w everywhere, or inside `sampling.interval` only."""
    bounds = config.sampling.interval
    return interval(w, bounds[0], bounds[1]) if bounds and w else w


def one_or_two(config: Config, weight: float | Tensor) -> int:
    """Network evaluations of an image at a level: the weak prediction is made where it counts."""
    return 1 if is_zero(weight) else 2


@dataclass(frozen=True)
class Guidance:
    """A way to guide. At levels where the weight is the number 0 it must predict the same at every w: a sweep shares such steps."""

    denoiser: Callable[[Config, Sequence[Network], Weight], Denoiser]  # of the run's own network, and the others in their order
    others: Callable[[Config], Sequence[Config]] = lambda config: ()  # for each other network a config that `weights_of` can find
    weight: Callable[[Config, float], Weight] = in_interval  # w as a function of lambda
    calls: Callable[[Config, float | Tensor], int] = one_or_two  # network evaluations of an image at a level with this weight


def by_classifier_free(
    config: Config, networks: Sequence[Network], w: Weight, *, rule: Rule = linear, space: str = "eps"
) -> Denoiser:
    """Classifier-free guidance of a run as it was trained. Errors as `classifier_free`."""
    return classifier_free(
        networks[0],
        w,
        null_label=config.data.classes,
        p_uncond=config.diffusion.p_uncond,
        rule=rule,
        space=space,
        kind=config.diffusion.prediction,
    )


GUIDANCES = {"cfg": Guidance(by_classifier_free)}


def guidance_of(config: Config) -> Guidance:
    """The guidance that a config asks for."""
    return GUIDANCES["cfg"]
