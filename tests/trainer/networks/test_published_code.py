"""The same weights in the published implementations give the same predictions.

The numbers were computed in fp32 with openai/guided-diffusion (`UNetModel`, `EncoderUNetModel`) and facebookresearch/DiT, from
the weights and inputs that this file makes, copied there parameter by parameter, at the time t = 1000 u(logsnr). They are printed
to 5 decimals, and fp32 rounding adds less than 1e-6: tolerance 1e-5.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freeguide.configs.schema import ModelConfig
from freeguide.trainer.diffusion.randomness import Purpose, normal
from freeguide.trainer.networks.build import build_classifier, build_network

SMALL: dict[str, Any] = {
    "channels": 128,
    "channel_mult": [1, 2],
    "res_blocks": 1,
    "attention": [4],
    "head_channels": 32,
    "dropout": 0.0,
}
PLAIN = {"resblock_updown": False, "scale_shift_norm": False, "head_channels": 0, "heads": 2, "attention": [8, 4]}
DATA = {"image_size": 8, "channels": 3, "classes": 4}
TOLERANCE = 1e-5


def numbers(k: int, shape: tuple[int, ...]) -> Tensor:
    """The k-th tensor of reproducible standard normal numbers."""
    return normal(0, Purpose.TRAIN_NOISE, torch.tensor([k]), shape)[0]


def filled(network: nn.Module) -> nn.Module:
    """The network with the k-th parameter set to the k-th numbers: a variance of 1 / fan-in for matrices, of 1 / 25 for vectors."""
    with torch.no_grad():
        for k, parameter in enumerate(network.parameters()):
            fan = math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 5
            parameter.copy_(numbers(k, tuple(parameter.shape)) / fan)
    return network


DIT = ModelConfig("dit", channels=48, depth=2, heads=4)
Z, LOGSNR, LABELS = numbers(1000, (2, 3, 8, 8)), torch.tensor([-3.0, 2.0]), torch.tensor([1, 4])


@pytest.mark.parametrize(
    ("model", "published"),
    [
        pytest.param(ModelConfig(**SMALL), [-0.04511, -0.34239, 0.00872, 0.05988, -0.14732, 0.131], id="ADM"),
        pytest.param(ModelConfig(**{**SMALL, **PLAIN}), [0.15085, -0.19564, -0.02005, 0.08188, -0.22706, -0.03209], id="ADM-plain"),
        pytest.param(DIT, [0.79083, 0.20575, 0.88197, -0.69289, -0.60719, -2.11233], id="DiT"),
    ],
)
def test_pixel_of_two_images_is_predicted_as_by_the_published_network(model: ModelConfig, published: list[float]) -> None:
    """Row 2, column 5 of both images, in 3 channels; the second image has the null class."""
    with torch.no_grad():
        out = filled(build_network(model, **DATA))(Z, LOGSNR, LABELS)
    torch.testing.assert_close(out[:, :, 2, 5].flatten(), torch.tensor(published), rtol=0, atol=TOLERANCE)


def test_logits_are_those_of_the_published_classifier() -> None:
    published = [[0.05448, 0.28101, -0.24914, -0.00906], [0.06491, 0.28388, -0.30332, 0.03252]]
    with torch.no_grad():
        out = filled(build_classifier(ModelConfig(**SMALL), **DATA))(Z, LOGSNR)
    torch.testing.assert_close(out, torch.tensor(published), rtol=0, atol=TOLERANCE)
