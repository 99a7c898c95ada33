"""The Inception of 2015-12-05: its published shape, its three peculiarities, and the refusal of any other weights."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from freeguide.cluster.evaluation.extractors.features import INCEPTION
from freeguide.cluster.evaluation.extractors.inception import FILE, HASH, Inception, InceptionV3, Mixed, from_bytes, tf1_bilinear
from freeguide.cluster.evaluation.extractors.load import load_extractor
from freeguide.configs.errors import DataError


@pytest.fixture(scope="module")
def weights() -> bytes:
    """A weight file of the right form with random content."""
    torch.manual_seed(0)
    buffer = io.BytesIO()
    torch.save(InceptionV3().state_dict(), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def network(weights: bytes) -> Inception:
    return from_bytes(weights, "random.pth", hashlib.sha256(weights).hexdigest()[:8])


def test_the_parameters_are_as_many_as_published():
    # torchvision publishes 27 161 264 for its Inception-v3 of 1000 classes with the auxiliary classifier, which counts 3 326 696:
    # two convolutions with batch norm (768 x 128 x 1 and 128 x 768 x 25) and a linear layer. Here 1008 classes and no auxiliary.
    auxiliary = 768 * 128 + 2 * 128 + 128 * 768 * 25 + 2 * 768 + 768 * 1000 + 1000
    with torch.device("meta"):
        found = sum(p.numel() for p in InceptionV3().parameters())
    assert found == 27_161_264 - auxiliary + 8 * (2048 + 1)


def test_names_and_shapes_are_those_of_the_converted_file():
    with torch.device("meta"):
        state = {name: tuple(tensor.shape) for name, tensor in InceptionV3().state_dict().items()}
    assert sum(name.endswith("conv.weight") for name in state) == 94
    assert len(state) == 94 * 6 + 2
    expected = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_2b_3x3.bn.running_var": (64,),
        "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5d.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6b.branch7x7_3.conv.weight": (192, 128, 7, 1),
        "Mixed_6d.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch3x3_2.conv.weight": (320, 192, 3, 3),
        "Mixed_7a.branch7x7x3_2.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch1x1.conv.weight": (320, 1280, 1, 1),
        "Mixed_7c.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3_2b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch3x3dbl_1.conv.weight": (448, 2048, 1, 1),
        "Mixed_7c.branch3x3dbl_3a.bn.bias": (384,),
        "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }
    assert {name: state.get(name) for name in expected} == expected


def test_average_pools_leave_the_padding_out_of_the_mean():
    block = Mixed(3, ((((("only", 1, (1, 1))),),),), "average", 1).eval()
    torch.nn.init.ones_(block.branch_pool.conv.weight)
    pooled = block(torch.ones(1, 3, 5, 5))[:, 1]
    # A mean that counted the padding would be 4/9 in the corners.
    assert torch.allclose(pooled, torch.full_like(pooled, 3 / (1 + 1e-3) ** 0.5), rtol=1e-6)


def test_the_last_block_pools_by_maximum_and_the_one_before_by_mean():
    network = InceptionV3()
    assert (network.Mixed_7b.pool, network.Mixed_7c.pool) == ("average", "max")
    block = Mixed(1, (((("only", 1, (1, 1)),),),), "max", 1).eval()
    torch.nn.init.ones_(block.branch_pool.conv.weight)
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 1.0
    assert int((block(x)[0, 1] > 0.9).sum()) == 9


def test_the_network_measures_what_its_weights_say(network):
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    measured = network.measure(images)
    assert measured.features.shape == (2, 2048)
    assert measured.probabilities is not None
    assert measured.spatial is not None
    assert measured.probabilities.shape == (2, 1008)
    assert measured.spatial.shape == (2, 17 * 17 * 7)
    # Logits leave the bias out.
    fc = network.network.fc
    with torch.inference_mode():
        unbiased = (torch.from_numpy(measured.features) @ fc.weight.T).softmax(dim=1).numpy()
    np.testing.assert_allclose(measured.probabilities, unbiased, rtol=1e-5)  # float32 softmax of another batch
    assert float(fc.bias.abs().max()) > 0
    # The first value of the spatial features' third channel is at index 2: channels run fastest, as TensorFlow has them.
    seen: list[torch.Tensor] = []
    handle = network.network.Mixed_6d.get_submodule("branch1x1").register_forward_hook(lambda *args: seen.append(args[2]))
    network.measure(images[:1])
    handle.remove()
    assert np.array_equal(measured.spatial[0].reshape(17, 17, 7), seen[0][0, :7].permute(1, 2, 0).numpy())


def test_grey_images_are_measured_as_rgb_of_equal_channels(network):
    grey = np.random.default_rng(1).integers(0, 256, (1, 16, 16, 1), np.uint8)
    assert np.array_equal(network.measure(grey).features, network.measure(grey.repeat(3, axis=3)).features)
    with pytest.raises(DataError, match=r"uint8 \(N, H, W, 1 or 3\), not float32"):
        network.measure(grey.astype(np.float32))


def _slow_tf1(image: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's ResizeBilinear with align_corners=False, pixel by pixel in float32."""
    height, width = image.shape
    out = np.empty((size, size), np.float32)
    for i in range(size):
        y = np.float32(i) * (np.float32(height) / np.float32(size))
        top = int(np.floor(y))
        bottom, down = min(top + 1, height - 1), np.float32(y - np.float32(top))
        for j in range(size):
            x = np.float32(j) * (np.float32(width) / np.float32(size))
            left = int(np.floor(x))
            right, across = min(left + 1, width - 1), np.float32(x - np.float32(left))
            above = image[top, left] + (image[top, right] - image[top, left]) * across
            below = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * across
            out[i, j] = above + (below - above) * down
    return out


@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 29), (31, 17, 29), (64, 64, 299), (1, 2, 5), (40, 40, 13)])
def test_the_resize_is_tensorflows_to_the_bit(height, width, size):
    image = np.random.default_rng(2).integers(0, 256, (height, width)).astype(np.float32)
    found = tf1_bilinear(torch.from_numpy(image)[None, None], size)[0, 0].numpy()
    assert np.array_equal(found, _slow_tf1(image, size))


def test_the_resize_has_no_half_pixel_shift():
    ramp = torch.arange(4, dtype=torch.float32).expand(1, 1, 4, 4)
    assert tf1_bilinear(ramp, 8)[0, 0, 0].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0]


def test_only_the_published_weights_are_called_inception(network, weights, tmp_path):
    assert network.name == f"other-inception-{hashlib.sha256(weights).hexdigest()[:8]}"
    assert Inception(network.network, HASH + "0" * 56).name == INCEPTION
    path = tmp_path / FILE
    path.write_bytes(weights)
    with pytest.raises(DataError, match="is not the file of 2015-12-05") as error:
        load_extractor(str(path))
    assert "github.com/toshas/torch-fidelity/releases" in str(error.value)
    assert FILE in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_weights_say_where_to_get_them_and_how_to_name_them(tmp_path):
    with pytest.raises(DataError, match=r"does not exist; get it from github\.com/toshas") as error:
        load_extractor(str(tmp_path / FILE))
    assert "keep the name" in str(error.value)


class _Bomb:
    """Unpickles by calling `Path.touch` on a file: what a hostile weight file could do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_weight_file_cannot_run_code_and_other_networks_are_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save({"fc.weight": _Bomb(tmp_path / "ran")}, buffer)
    for data in (buffer.getvalue(), b"not a file of torch"):
        with pytest.raises(DataError, match=r"x\.pth does not hold these weights"):
            from_bytes(data, "x.pth", "")
    assert not (tmp_path / "ran").exists()
    buffer = io.BytesIO()
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, buffer)
    with pytest.raises(DataError, match=r"x\.pth does not hold these weights"):
        from_bytes(buffer.getvalue(), "x.pth", "")
