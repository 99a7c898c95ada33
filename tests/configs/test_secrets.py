"""Secrets: what a config refers to is used, and never shown, stored or told; stored configs are data."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from freeguide.configs.errors import ConfigError, UserError
from freeguide.configs.load import load_config
from freeguide.configs.secrets import HIDDEN, masked
from freeguide.configs.stored import from_yaml, to_yaml
from freeguide.configs.sweep import sweep

MINIMAL = "name: a\nrun: /tmp/run\ndata: {uri: /tmp/data}\n"
SECRET = "hunter2/correct horse" + "\n"  # of no known shape
AWS = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"  # the example of AWS's documentation


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", SECRET)
    monkeypatch.setenv("SOME_BUCKET", "bucket-of-mine")
    monkeypatch.setenv("SOME_NUMBER", "24")
    monkeypatch.setenv("SOME_WORD", "flow")


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def test_what_the_user_refers_to_is_used_and_shown_as_he_wrote_it(minimal: Path) -> None:
    minimal.write_text(
        "name: a\nrun: s3://${oc.env:SOME_BUCKET}/run\ndata: {uri: /tmp/data, image_size: '${oc.env:SOME_NUMBER}'}\n"
        "cluster: {env: {LOGIN: '${oc.env:SOME_SECRET}', PLAIN: info}}\n"
    )
    overrides = ["evaluate.others=['${run}/rows.json', /tmp/rows.json]", "diffusion.schedule=${oc.env:SOME_WORD}"]
    overrides += [
        "evaluate.sweep={run: ['s3://${oc.env:SOME_BUCKET}/b', /tmp/c]}",
        "train.deepspeed={a: {key: '${oc.env:SOME_SECRET}'}}",
    ]
    config = load_config(minimal, overrides)
    assert (config.run, config.data.image_size, config.diffusion.schedule) == ("s3://bucket-of-mine/run", 24, "flow")
    assert config.cluster.env == {"LOGIN": SECRET, "PLAIN": "info"}
    assert config.train.deepspeed == {"a": {"key": SECRET}}
    assert config.evaluate.others == ["s3://bucket-of-mine/run/rows.json", "/tmp/rows.json"]
    assert [series.run for series in sweep(config)] == ["s3://bucket-of-mine/b", "/tmp/c"]
    text = to_yaml(config)
    assert SECRET not in text
    assert "bucket-of-mine" not in text
    tree = yaml.safe_load(text)
    assert tree["run"] == "s3://${oc.env:SOME_BUCKET}/run"
    assert tree["cluster"]["env"] == {"LOGIN": "${oc.env:SOME_SECRET}", "PLAIN": "info"}
    assert tree["train"]["deepspeed"] == {"a": {"key": "${oc.env:SOME_SECRET}"}}
    assert tree["evaluate"]["others"] == ["${run}/rows.json", "/tmp/rows.json"]
    assert tree["evaluate"]["sweep"] == {"run": ["s3://${oc.env:SOME_BUCKET}/b", "/tmp/c"]}
    # Without these a run could not be read, and they are no secrets: numbers, and words of the schema.
    assert (tree["data"]["image_size"], tree["diffusion"]["schedule"]) == (24, "flow")
    minimal.write_text(text)
    assert load_config(minimal) == config


def test_a_stored_config_never_resolves_anything(minimal: Path) -> None:
    for line in ("run: ${oc.env:SOME_SECRET}", "evaluate: {dataset: '${oc.decode:${oc.env:SOME_SECRET}}'}", "run: ${name}"):
        config = from_yaml(f"{MINIMAL}{line}\n" if "run" not in line else MINIMAL.replace("run: /tmp/run", line))
        assert SECRET not in repr(config)
        assert "${" in config.run + config.evaluate.dataset
        assert SECRET not in to_yaml(config)
        assert SECRET not in repr(sweep(config))
    # Nor does what is made of it later.
    config = from_yaml(MINIMAL + "evaluate: {sweep: {run: ['${oc.env:SOME_SECRET}', b]}}\n")
    assert [series.run for series in sweep(config)] == ["${oc.env:SOME_SECRET}", "b"]
    for key in (
        "diffusion: {schedule: '${oc.env:SOME_SECRET}'}",
        "train: {steps: '${oc.env:SOME_NUMBER}'}",
        "train: {betas: '${oc.env:X}'}",
    ):
        with pytest.raises(ConfigError, match="a stored config cannot be read") as caught:
            from_yaml(f"{MINIMAL}{key}\n")
        assert SECRET not in str(caught.value)


@settings(max_examples=20, deadline=None)
@given(st.text(alphabet="a$ {}\\:.,'\"", max_size=20), st.text(alphabet="a$ {}\\:.,'\"", max_size=20))
def test_a_stored_text_comes_back_as_it_was(name: str, value: str) -> None:
    config = from_yaml(MINIMAL)
    config.evaluate.dataset = name
    config.cluster.env = {"A": value}
    config.evaluate.others = [value, name]
    again = from_yaml(to_yaml(config))
    if masked(name) == name and masked(value) == value:
        assert again == config


@pytest.mark.parametrize(
    "override",
    [
        "diffusion.schedule=${oc.env:SOME_SECRET}",
        "train.steps=${oc.env:SOME_SECRET}",
        "train.betas=['${oc.env:SOME_SECRET}', 1]",
        "name=${oc.env:SOME_SECRET}",
        "sampling.ema=${oc.env:SOME_SECRET}",
        "run=s3:/${oc.env:SOME_SECRET}",
        "data.uri=${oc.env:${oc.env:SOME_SECRET}}",
        "data.image_size=${oc.decode:${oc.env:SOME_SECRET}}",
        "evaluate.extractor_hash=x${oc.env:SOME_SECRET}x",
        "evaluate.sweep={sampling.sampler: ['${oc.env:SOME_SECRET}']}",
        "cluster.workers=${oc.env:SOME_SECRET}",
    ],
)
def test_no_sentence_tells_what_a_reference_stands_for(minimal: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, [override], "evaluate")
    sentence = str(caught.value)
    assert SECRET not in sentence
    assert "hunter2" not in sentence
    assert "oc.env" in sentence
    assert caught.value.__cause__ is None, "a traceback would tell it"


def test_a_variable_that_is_not_set_is_named(minimal: Path) -> None:
    with pytest.raises(ConfigError, match=r"run refers to something that is not there.*\$\{oc.env:NOT_SET\}"):
        load_config(minimal, ["run=${oc.env:NOT_SET}"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            (name, "correct-horse")
            for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MYSQL_PASSWORD", "DB_PASSWD")
        ],
        *[(name, "correct-horse") for name in ("AWS_SESSION_TOKEN", "MY_CREDENTIALS", "key", "GH_PAT", "AUTHORIZATION", "APIKEY")],
        *[("X", shape) for shape in ("AKIAIOSFODNN7EXAMPLE", "ghp_" + "a1" * 18, "hf_" + "aB" * 17, "sk-" + "a1" * 20, AWS)],
        *[
            ("X", shape)
            for shape in ("xoxb-1234567890-abc", "eyJhbGciOiJI.eyJzdWIiOiIx.c2ln", "glpat-" + "a" * 20, "AIza" + "b" * 35)
        ],
        ("X", "Bearer abcdefgh12345678"),
        ("X", "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----"),
        ("HTTP_PROXY", "http://user:pa@ss@proxy:8080"),
        ("X", "https://bucket.s3.amazonaws.com/k?X-Amz-Credential=AKIDEXAMPLE&X-Amz-Signature=0a1b2c"),
        ("X", "https://host/blob?sv=2020&sig=abc%2Fdef&se=2030"),
    ],
)
def test_what_looks_like_a_secret_is_hidden_wherever_a_config_is_shown(minimal: Path, name: str, value: str) -> None:
    minimal.write_text(
        MINIMAL + yaml.safe_dump({"cluster": {"env": {name: value}}, "train": {"deepspeed": {"wandb": {name: [value]}}}})
    )
    config = load_config(minimal)
    assert config.cluster.env == {name: value}, "it is used as it is"
    text = to_yaml(config)
    assert text.count(HIDDEN) >= 2
    for part in (
        "correct-horse",
        "EXAMPLE",
        "a1a1",
        "aBaB",
        "pa@ss",
        "ss@",
        "0a1b2c",
        "def",
        "MIIE",
        "abcdefgh",
        "eyJz",
        "bbbb",
        "12345678",
    ):
        assert part not in text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "NCCL_DEBUG=INFO",
            "data.label_key=class",
            "s3://bucket/a@b/tokens.txt",
            "TOKENIZERS_PARALLELISM=false",
            "http://127.0.0.1:8265",
        ),
        *(
            "RAY_AUTH_TOKEN_PATH=/home/me/token",
            "AWS_WEB_IDENTITY_TOKEN_FILE=/var/token",
            "train.lr=1e-4: must be a number",
            "a key that",
        ),
        *("no checkpoint at s3://bucket/runs/x/checkpoints/step-00000500/manifest.json", "sha256 " + "0a" * 32),
        "/home/someone/pictures/AbCdEfGhIjKlMnOpQrStUvWx0123/train",
    ],
)
def test_what_is_no_secret_stays_readable(text: str) -> None:
    assert masked(text) == text


def test_sentences_hold_no_secrets() -> None:
    for text in (
        "http://me:pass@host:8265 does not answer",
        "argument 'cluster.env.HF_TOKEN=hf_abc'",
        "GET https://b.s3.amazonaws.com/k?X-Amz-Signature=abcdef failed",
        "AWS_SECRET_ACCESS_KEY=pass is not known",
        "train.deepspeed.wandb.api_key=pass",
    ):
        sentence = str(UserError(text))
        assert HIDDEN in sentence
        assert not any(secret in sentence for secret in ("pass", "hf_abc", "abcdef"))
