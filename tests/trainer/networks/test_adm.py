"""The U-Net: the published sizes to the last parameter, conditioning, dropout by sample, gradients, precision."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freeguide.configs.schema import ModelConfig
from freeguide.trainer.networks import layers
from freeguide.trainer.networks.adm import ADM, ResBlock
from freeguide.trainer.networks.build import build_network, count_parameters, forward_flops
from freeguide.trainer.networks.layers import DropoutKey

ADM_64: dict[str, Any] = {"learn_sigma": True}
ADM_128: dict[str, Any] = {
    "channels": 256,
    "channel_mult": [1, 1, 2, 3, 4],
    "res_blocks": 2,
    "heads": 4,
    "head_channels": 0,
    "dropout": 0.0,
    "learn_sigma": True,
}
TINY: dict[str, Any] = {"channels": 16, "channel_mult": [1, 2], "res_blocks": 1, "attention": [4], "head_channels": 8}


def tiny(*, random: bool = True, **options: Any) -> ADM:
    """A small network for 8x8 grey images of 3 classes; `random` fills the layers that start at zero, so that all of it matters."""
    network = build_network(ModelConfig(**{**TINY, **options}), image_size=8, channels=1, classes=3)
    assert isinstance(network, ADM)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if random and not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def batch(size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """z, logsnr and labels that cover the range of log-SNR and all class ids, the null id 3 included."""
    z = torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return z, torch.linspace(-20, 20, size), torch.arange(size) % 4


def reached(network: nn.Module) -> set[str]:
    """Names of the parameters that the last backward gave a gradient other than 0."""
    return {name for name, parameter in network.named_parameters() if parameter.grad is not None and parameter.grad.any()}


# Parameters of the published models with the flags of their README: learn_sigma (6 output channels), 1000 classes, no null class.
PUBLISHED = [
    pytest.param(ADM_64, 64, 295_904_454, id="ADM-64"),
    pytest.param(ADM_128, 128, 421_529_606, id="ADM-128"),
]


@pytest.mark.parametrize(("options", "image_size", "published"), PUBLISHED)
def test_parameters_are_those_of_the_published_network_and_the_null_class(
    options: dict[str, Any], image_size: int, published: int
) -> None:
    """The null class adds a row to the class table (4 * channels); without learn_sigma the last convolution loses 3 channels."""
    channels = ModelConfig(**options).channels
    null_row, sigma_channels = 4 * channels, 3 * (9 * channels + 1)
    with torch.device("meta"):
        learned = ADM(ModelConfig(**options), image_size=image_size, channels=3, classes=1000)
        fixed = ADM(ModelConfig(**{**options, "learn_sigma": False}), image_size=image_size, channels=3, classes=1000)
    assert count_parameters(learned) == published + null_row
    assert count_parameters(fixed) == published + null_row - sigma_channels


@pytest.mark.parametrize(
    ("options", "image_size", "published"),
    [pytest.param(ADM_64, 64, 219_356_037_120, id="ADM-64"), pytest.param(ADM_128, 128, 613_855_789_056, id="ADM-128")],
)
def test_forward_costs_what_the_published_network_costs(options: dict[str, Any], image_size: int, published: int) -> None:
    """219.4 and 613.9 GFLOP at 2 per multiply-accumulate, counted on the published code. The null row costs nothing."""
    size = {"image_size": image_size, "channels": 3, "classes": 1000}
    sigma_channels = 2 * 3 * 9 * ModelConfig(**options).channels * image_size**2
    assert forward_flops(ModelConfig(**options), **size) == published
    assert forward_flops(ModelConfig(**{**options, "learn_sigma": False}), **size) == published - sigma_channels


@pytest.mark.parametrize(
    ("options", "image_size", "channels"),
    [
        ({}, 8, 1),
        ({"resblock_updown": False}, 8, 3),
        ({"scale_shift_norm": False}, 8, 3),
        ({"head_channels": 0, "heads": 2, "attention": []}, 8, 1),
        ({"channel_mult": [1], "attention": [7], "res_blocks": 2}, 7, 1),
        ({"channel_mult": [1, 2, 1], "attention": [24, 6]}, 24, 3),
        ({"learn_sigma": True}, 8, 3),
    ],
)
def test_every_option_gives_an_image_that_is_zero_before_training(options: dict[str, Any], image_size: int, channels: int) -> None:
    network = build_network(ModelConfig(**{**TINY, **options}), image_size=image_size, channels=channels, classes=3)
    z = torch.randn(2, channels, image_size, image_size)
    out = network(z, torch.tensor([-20.0, 20.0]), torch.tensor([0, 3]))
    assert out.shape == (2, (2 if options.get("learn_sigma") else 1) * channels, image_size, image_size)
    assert not out.any()


def test_the_paper_s_default_network_runs_at_a_size_of_its_own() -> None:
    """Default options but for the width: four levels, attention at 32, 16 and 8 pixels, 64 channels per head."""
    network = build_network(ModelConfig(channels=64, res_blocks=1), image_size=64, channels=3, classes=2)
    assert network(torch.randn(1, 3, 64, 64), torch.zeros(1), torch.tensor([2])).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("options", [{}, {"scale_shift_norm": False}])
def test_label_and_logsnr_both_change_the_prediction(options: dict[str, Any]) -> None:
    network = tiny(**options)
    z, logsnr, labels = batch()
    with torch.no_grad():
        out = network(z, logsnr, labels)
        scale = out.std()
        for other in (network(z, logsnr, (labels + 1) % 4), network(z, -logsnr, labels)):
            assert ((out - other).flatten(1).abs().amax(dim=1) > 0.01 * scale).all()


def test_rows_do_not_depend_on_the_batch_they_are_in() -> None:
    """To fp32 rounding: 1e-5 of predictions of size 1, as other batch sizes may choose other kernels."""
    network = tiny()
    z, logsnr, labels = batch(6)
    key = DropoutKey(3, torch.arange(6) + 100)
    with torch.no_grad():
        together = network(z, logsnr, labels, key)
        alone = [network(z[i : i + 1], logsnr[i : i + 1], labels[i : i + 1], DropoutKey(3, key.index[i : i + 1])) for i in range(6)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-5)


def test_dropout_masks_of_a_sample_are_the_same_bits_alone_and_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: dict[int, list[Tensor]] = {}
    draw = layers.keep_mask

    def record(seed: int, index: Tensor, shape: tuple[int, ...], p: float, stream: int, key: Tensor) -> Tensor:
        mask = draw(seed, index, shape, p, stream, key)
        masks.setdefault(stream, []).append(mask)
        return mask

    monkeypatch.setattr(layers, "keep_mask", record)
    network = tiny()
    z, logsnr, labels = batch(3)
    index = torch.tensor([5, 10**12, 0])
    network(z, logsnr, labels, DropoutKey(7, index))
    network(z[1:2], logsnr[1:2], labels[1:2], DropoutKey(7, index[1:2]))
    blocks = [module for module in network.modules() if isinstance(module, ResBlock)]
    assert sorted(masks) == list(range(len(blocks)))
    for together, alone in masks.values():
        assert torch.equal(together[1:2], alone)
    assert not torch.equal(masks[0][0][0], masks[0][0][2])


def test_dropout_takes_nothing_from_torch_s_generator_and_is_off_without_a_key() -> None:
    network = tiny().train()
    z, logsnr, labels = batch()
    state = torch.get_rng_state()
    plain, dropped = network(z, logsnr, labels), network(z, logsnr, labels, DropoutKey(0, torch.arange(4)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(plain, network.eval()(z, logsnr, labels))
    assert not torch.equal(plain, dropped)


def test_gradient_reaches_every_parameter_after_two_steps() -> None:
    """First only the output convolution learns, all else being behind its zeros; then the zero layers of the blocks and the path
    that avoids them; then everything. Labels hold every class and the null class, so each row of the table learns."""
    network = tiny(random=False)
    z, logsnr, labels = batch(8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    steps: list[set[str]] = []
    for _ in range(3):
        optimizer.zero_grad()
        (network(z, logsnr, labels) - z).square().mean().backward()
        steps.append(reached(network))
        optimizer.step()
    names = {name for name, _ in network.named_parameters()}
    in_branch = {n for n in names if n.startswith("conditioning.") or n.split(".")[-2] in ("in_norm", "emb", "norm", "qkv")}
    in_branch |= {n for n in names if n.split(".")[-2] in ("out_norm", "in_conv") and n.count(".") > 2}
    assert steps[0] == {"out_conv.weight", "out_conv.bias"}
    assert steps[1] == names - in_branch
    assert steps[2] == names
    assert network.get_parameter("conditioning.classes.weight").grad.any(dim=1).all()  # type: ignore[union-attr]


def test_null_examples_teach_the_null_row_alone() -> None:
    network = tiny()
    z, logsnr, _ = batch()
    network(z, logsnr, torch.full((4,), 3)).square().mean().backward()
    gradient = network.get_parameter("conditioning.classes.weight").grad
    assert gradient is not None
    assert gradient.any(dim=1).tolist() == [False, False, False, True]


def test_recomputing_gives_the_same_bits_and_keeps_less() -> None:
    kept: list[int] = []

    def gradients(recompute: bool) -> list[Tensor]:
        network = tiny()
        network.recompute = recompute
        z, logsnr, labels = batch()
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = network(z, logsnr, labels, DropoutKey(0, torch.arange(4))).square().mean()
        kept.append(sum(sizes))
        loss.backward()
        return [loss.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, again)
    assert kept[1] < kept[0] / 2


def test_bf16_weights_give_an_fp32_prediction_close_to_the_fp32_network_s() -> None:
    """Both networks hold the same bf16 numbers as weights. The torso rounds to 8 bits at each layer: 3 % of the deviation here is
    far below a layer gone wrong. From the last norm on nothing is rounded to bf16."""
    narrow = tiny().bfloat16()
    wide = tiny()
    wide.load_state_dict(narrow.state_dict())
    seen: list[torch.dtype] = []
    narrow.out_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.no_grad():
        low, high = narrow(*batch()), wide(*batch())
    assert seen == [torch.float32]
    assert low.dtype == torch.float32
    assert (low - high).std() < 0.03 * high.std()
    assert not torch.equal(low, low.bfloat16().float())


def test_bf16_network_trains() -> None:
    network = tiny().bfloat16()
    network(*batch(), DropoutKey(0, torch.arange(4))).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.parameters())


def test_compiles_into_one_graph() -> None:
    """With dropout and its masks: `fullgraph` refuses any break. The graph runs the same operations, hence the same bits."""
    network = tiny()
    key = DropoutKey(0, torch.arange(4))
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*batch(), key), network(*batch(), key))


def test_channels_last_gives_the_same_prediction() -> None:
    network = tiny()
    with torch.no_grad():
        expected = network(*batch())
        z, logsnr, labels = batch()
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        actual = network(z.to(memory_format=torch.channels_last), logsnr, labels)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
