"""Rounding to eight bits: exact on the levels of training, half up between them, never silent about NaN."""

import numpy as np
import pytest
import torch

from freeguide.configs.errors import DataError
from freeguide.trainer.rounding import to_uint8


def test_every_level_comes_back_as_itself():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert np.array_equal(to_uint8(levels.float() / 127.5 - 1.0)[0, :, :, 0], levels[0, 0].numpy())


def test_rounds_to_the_nearest_level_and_clips():
    x = torch.tensor([-1.0, 1.0, -7.0, 7.0, 0.4 / 127.5, -0.4 / 127.5, 0.6 / 127.5, 0.0]).reshape(1, 1, 2, 4)
    # 127.5 x + 127.5 = 0, 255, below, above, 127.9, 127.1, 128.1, and 127.5 itself, which goes up.
    assert to_uint8(x).reshape(-1).tolist() == [0, 255, 0, 255, 128, 127, 128, 128]


def test_channels_go_last():
    x = torch.zeros(2, 3, 4, 5)
    x[1, 2, 3, 4] = 1.0
    images = to_uint8(x)
    assert images.shape == (2, 4, 5, 3)
    assert images[1, 3, 4, 2] == 255
    assert (images == 255).sum() == 1


def test_bfloat16_samples_are_rounded_in_float32():
    x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).to(torch.bfloat16)
    assert np.array_equal(to_uint8(x), to_uint8(x.float()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_are_refused(value):
    x = torch.zeros(4, 1, 8, 8)
    x[2, 0, 1, 1] = value
    with pytest.raises(DataError, match="sample 2 of 4 is not finite"):
        to_uint8(x)
