"""DiT: the published sizes, positions, adaLN-Zero, and the same behaviour as the U-Net."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freeguide.configs.schema import ModelConfig
from freeguide.trainer.networks.build import build_network, count_parameters, forward_flops
from freeguide.trainer.networks.dit import DiT, sine_cosine_positions
from freeguide.trainer.networks.layers import zeroed

TINY = ModelConfig("dit", channels=32, depth=2, heads=4, patch=2)
XL: dict[str, Any] = {"channels": 1152, "depth": 28, "heads": 16, "learn_sigma": True}
LATENT: dict[str, int] = {"image_size": 32, "channels": 4, "classes": 1000}  # 256x256 images in the published models' latent space


def tiny(*, random: bool = True) -> DiT:
    network = build_network(TINY, image_size=8, channels=3, classes=3)
    assert isinstance(network, DiT)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if random and not parameter.any():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def batch(size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return z, torch.linspace(-20, 20, size), torch.arange(size) % 4


def reached(network: nn.Module) -> set[str]:
    """Names of the parameters that the last backward gave a gradient other than 0."""
    return {name for name, parameter in network.named_parameters() if parameter.grad is not None and parameter.grad.any()}


def test_parameters_of_dit_xl_2_are_composed_as_published() -> None:
    """675 129 632 are published, with learn_sigma, 1001 class ids (the null class is the last) and 256 fixed positions, which are
    no parameters here."""
    c = 1152
    patches = 16 * c + c
    condition = (256 * c + c) + (c * c + c) + 1001 * c
    block = (3 * c * c + 3 * c) + (c * c + c) + (4 * c * c + 4 * c) + (4 * c * c + c) + (6 * c * c + 6 * c)
    output = (2 * c * c + 2 * c) + (32 * c + 32)
    with torch.device("meta"):
        network = DiT(ModelConfig("dit", **XL), **LATENT)
    assert count_parameters(network) == patches + condition + 28 * block + output == 675_129_632 - 256 * c
    assert network.positions.numel() == 256 * c


@pytest.mark.parametrize(
    ("config", "gmac"),
    [
        (ModelConfig("dit", channels=384, depth=12, heads=6, learn_sigma=True), 6.06),
        (ModelConfig("dit", channels=768, depth=12, heads=12, learn_sigma=True), 23.01),
        (ModelConfig("dit", channels=1024, depth=24, heads=16, learn_sigma=True), 80.71),
        (ModelConfig("dit", patch=2, **XL), 118.64),
        (ModelConfig("dit", patch=4, **XL), 29.05),
        (ModelConfig("dit", patch=8, **XL), 7.39),
    ],
    ids=["S/2", "B/2", "L/2", "XL/2", "XL/4", "XL/8"],
)
def test_cost_is_the_published_one(config: ModelConfig, gmac: float) -> None:
    """Table 4 of the DiT paper counts multiply-accumulates, the layer norms' included, which we leave out: within 0.1 %."""
    assert forward_flops(config, **LATENT) / 2e9 == pytest.approx(gmac, rel=1e-3)


def test_positions_are_sines_and_cosines_of_the_column_and_then_of_the_row() -> None:
    """Tolerance: one rounding to fp32."""
    positions = sine_cosine_positions(3, 8)
    column, row, omega = 2, 1, (1.0, 0.01)
    expected = [f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in omega]
    torch.testing.assert_close(positions[3 * row + column], torch.tensor(expected), rtol=0, atol=1e-7)


def test_untrained_blocks_are_the_identity_and_the_prediction_is_zero() -> None:
    network = tiny(random=False)
    x, emb = torch.randn(2, 16, 32), torch.randn(2, 32)
    for block in network.blocks:
        assert torch.equal(block(x, emb), x)
    assert not network(*batch()).any()


def test_a_pixel_goes_out_where_it_came_in() -> None:
    """With zero gates and an output that copies the token's first 12 channels, patches return to their places."""
    network = tiny(random=False)
    with torch.no_grad():
        network.positions.zero_()
        network.embed.weight.copy_(torch.eye(32, 12))
        network.embed.weight[12:24].copy_(-torch.eye(12))  # the opposite beside it: tokens of mean zero, which the norm only scales
        network.out.weight.copy_(torch.eye(12, 32))
    z = torch.zeros(2, 3, 8, 8)
    z[0, 2, 5, 3], z[1, 0, 0, 7] = 1.0, -1.0
    out = network(z, torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(out, 4 * z, rtol=0, atol=1e-3)  # the token's variance is 2 / 32, and the norm adds 1e-6 to it


def test_label_and_logsnr_both_change_the_prediction() -> None:
    network = tiny()
    z, logsnr, labels = batch()
    with torch.no_grad():
        out = network(z, logsnr, labels)
        for other in (network(z, logsnr, (labels + 1) % 4), network(z, -logsnr, labels)):
            assert ((out - other).flatten(1).abs().amax(dim=1) > 0.01 * out.std()).all()


def test_rows_do_not_depend_on_the_batch_they_are_in() -> None:
    """To fp32 rounding: 1e-5 of predictions of size 1, as other batch sizes may choose other kernels."""
    network = tiny()
    z, logsnr, labels = batch(6)
    with torch.no_grad():
        together = network(z, logsnr, labels)
        alone = torch.cat([network(z[i : i + 1], logsnr[i : i + 1], labels[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


def test_gradient_reaches_every_parameter_after_two_steps() -> None:
    """First the output layer alone, behind whose zeros all else is; then the zero modulations; then everything."""
    network = tiny(random=False)
    z, logsnr, labels = batch(8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    steps: list[set[str]] = []
    for _ in range(3):
        optimizer.zero_grad()
        (network(z, logsnr, labels) - z).square().mean().backward()
        steps.append(reached(network))
        optimizer.step()
    assert steps[0] == {"out.weight", "out.bias"}
    assert any("modulation" in name for name in steps[1])
    assert steps[2] == {name for name, _ in network.named_parameters()}
    assert network.get_parameter("conditioning.classes.weight").grad.any(dim=1).all()  # type: ignore[union-attr]


def test_recomputing_gives_the_same_bits() -> None:
    def gradients(recompute: bool) -> list[Tensor]:
        network = tiny()
        network.recompute = recompute
        network(*batch()).square().mean().backward()
        return [p.grad for p in network.parameters() if p.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(list(tiny().parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_initialisation_is_the_published_one() -> None:
    """N(0, 0.02^2) in the condition's MLP and table: 5 % is at least four deviations of the estimate. Xavier-uniform elsewhere: the
    bound is respected, and 10 000 numbers or more come within 1 % of it."""
    network = build_network(ModelConfig("dit", channels=64, depth=1, heads=4), image_size=8, channels=3, classes=63)
    for name in ("conditioning.hidden", "conditioning.out", "conditioning.classes"):
        assert network.get_parameter(f"{name}.weight").std().item() == pytest.approx(0.02, rel=0.05)
    for name, fan_in, fan_out in (("blocks.0.qkv", 64, 192), ("blocks.0.expand", 64, 256), ("blocks.0.contract", 256, 64)):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.99 * bound < network.get_parameter(f"{name}.weight").abs().max().item() <= bound
        assert not network.get_parameter(f"{name}.bias").any()


def test_bf16_weights_give_an_fp32_prediction_close_to_the_fp32_network_s() -> None:
    """Same bf16 numbers as weights in both; 3 % of the deviation for rounding to 8 bits at each layer. From the last norm on
    nothing is rounded to bf16: without its modulation, the norm's own digits reach the output layer."""
    narrow, wide = tiny().bfloat16(), tiny()
    zeroed(narrow.out_modulation)
    wide.load_state_dict(narrow.state_dict())
    seen: list[Tensor] = []
    narrow.out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        low, high = narrow(*batch()), wide(*batch())
    assert not torch.equal(seen[0], seen[0].bfloat16().float())
    assert low.dtype == torch.float32
    assert (low - high).std() < 0.03 * high.std()
    assert not torch.equal(low, low.bfloat16().float())
