"""Building: the same weights everywhere, one-sentence errors, cost without memory."""

from typing import Any, get_args

import pytest
import torch

from freeguide.configs.errors import ConfigError
from freeguide.configs.schema import ModelConfig, Network
from freeguide.trainer.networks.build import (
    NETWORKS,
    build_classifier,
    build_network,
    count_parameters,
    forward_flops,
    network_options,
)

TINY: dict[str, Any] = {"channels": 16, "channel_mult": [1, 2], "res_blocks": 1, "attention": [4], "head_channels": 8}
DATA: dict[str, int] = {"image_size": 8, "channels": 1, "classes": 3}


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("model", [ModelConfig(**TINY), ModelConfig("dit", channels=32, depth=1, heads=4)], ids=["adm", "dit"])
def test_weights_depend_on_the_seed_alone(model: ModelConfig) -> None:
    torch.manual_seed(1)
    first = build_network(model, **DATA, seed=5)
    torch.manual_seed(2)
    torch.rand(10)
    second = build_network(model, **DATA, seed=5)
    assert same_weights(first, second)
    assert not same_weights(first, build_network(model, **DATA, seed=6))


def test_network_built_on_the_meta_device_has_shapes_only() -> None:
    with torch.device("meta"):
        network = build_network(ModelConfig(), image_size=64, channels=3, classes=1000)
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in build_network(ModelConfig(**TINY), **DATA).parameters()} == {"cpu"}


def test_building_leaves_the_callers_generator_alone() -> None:
    state = torch.get_rng_state()
    build_network(ModelConfig(**TINY), **DATA)
    build_classifier(ModelConfig(**TINY), **DATA)
    assert torch.equal(torch.get_rng_state(), state)


def test_classifiers_of_a_seed_are_the_same() -> None:
    build = lambda seed: build_classifier(ModelConfig(**TINY), **DATA, seed=seed)  # noqa: E731
    assert same_weights(build(1), build(1))
    assert not same_weights(build(1), build(2))


@pytest.mark.parametrize(
    ("options", "data", "words"),
    [
        ({"network": "unet"}, {}, ["model.network", "'unet'", *NETWORKS]),
        ({}, {"image_size": 9, "channels": 1}, ["data.image_size", "9", "divisible by 2"]),
        ({"channel_mult": [1, 1, 1, 1, 1]}, {}, ["data.image_size", "8", "divisible by 16"]),
        ({"attention": [16]}, {}, ["model.attention", "16 pixels", "8, 4"]),
        ({"head_channels": 12}, {}, ["model.head_channels", "12", "32"]),
        ({"head_channels": 24, "attention": []}, {}, ["model.head_channels", "24", "32"]),
        ({"head_channels": 32, "attention": [8]}, {}, ["model.head_channels", "32", "divisor of 16"]),
        ({"head_channels": 0, "heads": 3}, {}, ["model.heads", "3", "32"]),
        ({"head_channels": 0, "heads": 0}, {}, ["model.heads", "0", "32"]),
        ({"head_channels": -1}, {}, ["model.head_channels", "-1"]),
        ({"channels": 15}, {}, ["model.channels", "15", "even"]),
        ({"channel_mult": []}, {}, ["model.channel_mult", "[]"]),
        ({"channel_mult": [1, 0]}, {}, ["model.channel_mult", "[1, 0]"]),
        ({"res_blocks": 0}, {}, ["model.res_blocks", "0"]),
        ({"dropout": 1.0}, {}, ["model.dropout", "1.0"]),
        ({}, {"classes": 0}, ["data.classes", "0"]),
        ({}, {"channels": 0}, ["data.channels", "0"]),
    ],
)
def test_a_network_that_cannot_be_is_one_sentence(options: dict[str, Any], data: dict[str, int], words: list[str]) -> None:
    for use in (build_network, forward_flops):
        with pytest.raises(ConfigError) as error:
            use(ModelConfig(**{**TINY, **options}), **{**DATA, **data})
        message = str(error.value)
        assert all(word in message for word in words), message
        assert not message.endswith(".")
        assert ". " not in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch": 3}, ["model.patch", "3", "8"]),
        ({"heads": 5}, ["model.heads", "5", "32"]),
        ({"channels": 34, "heads": 2}, ["model.channels", "34", "4"]),
        ({"depth": 0}, ["model.depth", "0"]),
    ],
)
def test_a_dit_that_cannot_be_is_one_sentence(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        build_network(ModelConfig(**{"network": "dit", "channels": 32, "depth": 1, "heads": 4, **options}), **DATA)
    assert all(word in str(error.value) for word in words)


def test_a_dit_is_built_from_the_options_of_the_model() -> None:
    model = ModelConfig(network="dit", channels=32, depth=2, heads=4, patch=4)
    ours = build_network(model, **DATA)
    assert same_weights(ours, build_network(ModelConfig("dit", channels=32, depth=2, heads=4, patch=4), **DATA))
    assert network_options(model) == ["network", "channels", "heads", "learn_sigma", "depth", "patch"]
    assert not {"depth", "patch"} & set(network_options(ModelConfig()))


def test_each_network_that_a_config_can_name_reads_options_that_there_are() -> None:
    assert set(NETWORKS) == set(get_args(Network))
    for name, kind in NETWORKS.items():
        assert set(kind.options) < set(vars(ModelConfig()))
        assert set(network_options(ModelConfig(name))) == {"network", *kind.options}  # type: ignore[arg-type]
    assert {"network", "depth", "patch"}.isdisjoint(NETWORKS["adm"].options)


def test_parameters_are_counted_once() -> None:
    linear = torch.nn.Linear(3, 4)
    assert count_parameters(torch.nn.Sequential(linear, linear)) == 3 * 4 + 4


def test_flops_count_two_per_multiply_accumulate() -> None:
    """A network without depth but for its patches, its condition and its output, by hand: one block of width 4 on 4 tokens."""
    c, tokens, features = 4, 4, 256
    condition = features * c + c * c
    block = tokens * (3 + 1 + 4 + 4) * c * c + 6 * c * c + 2 * tokens * tokens * c
    ends = tokens * (4 * c) + 2 * c * c + tokens * (c * 4)
    assert forward_flops(ModelConfig("dit", channels=c, depth=1, heads=1), 4, 1, 3) == 2 * (condition + block + ends)


def test_flops_of_a_network_far_larger_than_memory_can_be_counted() -> None:
    """50 blocks of width 16384 hold 2.4e11 parameters, a terabyte. The matrices of a block cost 2 * 12 * width^2 a token."""
    flops = forward_flops(ModelConfig("dit", channels=16384, depth=50, heads=128), image_size=8, channels=3, classes=10)
    assert flops > 50 * 16 * 2 * 12 * 16384**2


def test_a_network_that_no_machine_holds_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"the network would have [\d,]{17,} parameters; lower model\.channels"):
        forward_flops(ModelConfig(channels=65536), image_size=64, channels=3, classes=10)
