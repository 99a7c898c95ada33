"""DINOv2 ViT-L/14: its published shape, its input, and the parts of which it is made."""

import math

import numpy as np
import pytest
import torch

from freeguide.cluster.evaluation.extractors import dinov2
from freeguide.cluster.evaluation.extractors.dinov2 import GRID, MEAN, STD, Attention, DinoV2, VisionTransformer, to_input
from freeguide.cluster.evaluation.extractors.load import load_extractor
from freeguide.configs.errors import DataError


def test_the_parameters_are_as_many_as_published_and_named_as_in_the_checkpoint():
    with torch.device("meta"):
        state = {name: tuple(tensor.shape) for name, tensor in VisionTransformer().state_dict().items()}
    # ViT-L with 24 blocks of 12 d^2 + 13 d weights and two scales of d, patches of 14 x 14 x 3, a 37 x 37 grid.
    d = 1024
    blocks = 24 * (12 * d * d + 13 * d + 2 * d)
    assert sum(math.prod(shape) for shape in state.values()) == blocks + (14 * 14 * 3 + 1) * d + (37 * 37 + 1) * d + 2 * d + 2 * d
    assert sum(math.prod(shape) for shape in state.values()) == 304_368_640
    expected = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 1370, d),
        "mask_token": (1, d),
        "patch_embed.proj.weight": (d, 3, 14, 14),
        "patch_embed.proj.bias": (d,),
        "blocks.0.norm1.weight": (d,),
        "blocks.23.attn.qkv.weight": (3 * d, d),
        "blocks.23.attn.qkv.bias": (3 * d,),
        "blocks.7.attn.proj.weight": (d, d),
        "blocks.7.ls1.gamma": (d,),
        "blocks.7.norm2.bias": (d,),
        "blocks.7.mlp.fc1.weight": (4 * d, d),
        "blocks.7.mlp.fc2.bias": (d,),
        "blocks.7.ls2.gamma": (d,),
        "norm.bias": (d,),
    }
    assert {name: state.get(name) for name in expected} == expected
    assert len(state) == 24 * 14 + 7


def test_it_turns_images_into_one_feature_vector_each():
    torch.manual_seed(0)
    network = VisionTransformer(width=32, depth=2, heads=2).eval()
    torch.nn.init.normal_(network.pos_embed)
    images = np.random.default_rng(0).integers(0, 256, (35, 8, 8, 3), np.uint8)
    measured = DinoV2(network, "0" * 64).measure(images)
    assert measured.features.shape == (35, 32)
    assert measured.probabilities is None
    # Batches of 32 and 3 give what one image alone gives, to rounding of float32.
    np.testing.assert_allclose(measured.features[34], DinoV2(network, "").measure(images[34:]).features[0], atol=1e-5)


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    attention = Attention(8, 2).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    q, k, v = attention.qkv(x)[0].reshape(5, 3, 2, 4).unbind(1)  # (tokens, heads, 4)
    heads = [(q[:, h] @ k[:, h].T / 2.0).softmax(dim=1) @ v[:, h] for h in range(2)]
    assert torch.allclose(attention(x)[0], attention.proj(torch.cat(heads, dim=1)), atol=1e-12)


def _cubic(t: float) -> list[float]:
    """Weights of the pixels at -1, 0, 1, 2 for a point at t in [0, 1): Keys' kernel with a = -3/4."""
    a = -0.75

    def near(x: float) -> float:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1

    def far(x: float) -> float:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a

    return [far(1 + t), near(t), near(1 - t), far(2 - t)]


def test_positions_are_read_from_the_learned_grid_by_the_published_factor():
    network = VisionTransformer(width=1, depth=0, heads=1)
    rows, columns = np.random.default_rng(0).normal(size=(2, GRID))
    network.pos_embed.data[0, 1:, 0] = torch.from_numpy(np.outer(rows, columns).ravel()).float()
    network.pos_embed.data[0, 0] = -7.0
    found = network._positions(16)[0, :, 0].detach().numpy()
    assert found[0] == -7.0

    def smaller(line: np.ndarray) -> np.ndarray:
        out = np.zeros(16)
        for i in range(16):
            position = (i + 0.5) * GRID / 16.1 - 0.5  # 16.1, not 16
            first = math.floor(position)
            for offset, weight in zip(range(-1, 3), _cubic(position - first), strict=True):
                out[i] += weight * line[min(max(first + offset, 0), GRID - 1)]
        return out

    np.testing.assert_allclose(found[1:].reshape(16, 16), np.outer(smaller(rows), smaller(columns)), atol=1e-4)  # float32


def test_levels_are_normalised_by_imagenet():
    x = to_input(torch.full((1, 3, 64, 64), 255.0))
    assert x.shape == (1, 3, 224, 224)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        assert torch.allclose(x[0, channel], torch.tensor((1.0 - mean) / std), atol=1e-5)


def test_missing_and_foreign_weights_are_refused(tmp_path):
    path = tmp_path / dinov2.FILE
    with pytest.raises(DataError, match=r"does not exist; get it from dl\.fbaipublicfiles\.com"):
        load_extractor(str(path))
    torch.save({"cls_token": torch.zeros(1, 1, 384)}, path)
    with pytest.raises(DataError, match="does not hold these weights"):
        load_extractor(str(path))
