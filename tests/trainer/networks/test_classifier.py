"""The noise-aware classifier: the published size, fp32 logits, gradients for guidance."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from freeguide.configs.schema import ModelConfig
from freeguide.trainer.networks.build import build_classifier, count_parameters
from freeguide.trainer.networks.classifier import Classifier

TINY = ModelConfig(channels=16, channel_mult=[1, 2], res_blocks=1, attention=[4], head_channels=8, dropout=0.0)


def test_size_and_cost_are_those_of_adm_s_classifier_at_64() -> None:
    """65 438 568 parameters and 38.16 GFLOP on the published code, which projects all 65 tokens to 1000 classes and keeps one."""
    with torch.device("meta"), torch.no_grad():
        classifier = Classifier(ModelConfig(channels=128, res_blocks=4), image_size=64, channels=3, classes=1000)
        with FlopCounterMode(display=False) as counter:
            classifier(torch.zeros(1, 3, 64, 64), torch.zeros(1))
    assert count_parameters(classifier) == 65_438_568
    assert counter.get_total_flops() == 38_158_051_328 - 2 * 64 * 512 * 1000


def test_logits_have_one_column_per_class_and_gradients_by_image() -> None:
    """Guidance needs the gradient by z; no row may touch another's."""
    classifier = build_classifier(TINY, image_size=8, channels=1, classes=5)
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logits = classifier(z, torch.tensor([-5.0, 0.0, 5.0]))
    assert logits.shape == (3, 5)
    (gradient,) = torch.autograd.grad(logits[1].log_softmax(dim=0)[2], z)
    assert gradient.flatten(1).any(dim=1).tolist() == [False, True, False]


def test_logsnr_changes_the_logits_after_training_has_begun() -> None:
    """The blocks' zero layers hide the condition before the first step."""
    classifier = build_classifier(TINY, image_size=8, channels=1, classes=5)
    z = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2)
    before = (classifier(z, torch.full((6,), -5.0)), classifier(z, torch.full((6,), 5.0)))
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(classifier(z, torch.zeros(6)), labels)
        loss.backward()
        optimizer.step()
    assert torch.equal(*before)
    assert loss < 0.1
    assert (classifier(z, torch.full((6,), -5.0)) - classifier(z, torch.full((6,), 5.0))).abs().max() > 1e-3


def test_bf16_weights_give_fp32_logits() -> None:
    """Same bf16 numbers as weights in both; 5 % of the deviation for rounding to 8 bits at each layer."""
    narrow = build_classifier(TINY, image_size=8, channels=1, classes=5).bfloat16()
    wide = build_classifier(TINY, image_size=8, channels=1, classes=5)
    wide.load_state_dict(narrow.state_dict())
    z = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        low, high = narrow(z, torch.zeros(4)), wide(z, torch.zeros(4))
    assert low.dtype == torch.float32
    assert (low - high).std() < 0.05 * high.std()
    assert not torch.equal(low, low.bfloat16().float())


def test_positions_of_the_pool_start_at_deviation_one_over_root_width() -> None:
    """16 tokens and the mean token in width 32: 544 numbers, whose deviation is known to 3 %; 15 % is five times that."""
    position = build_classifier(TINY, image_size=8, channels=1, classes=5).pool.position
    assert position.shape == (17, 32)
    assert 0.85 < position.std().item() * 32**0.5 < 1.15
