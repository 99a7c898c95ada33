import ast
import io
import tokenize
from functools import partial
from pathlib import Path

import pytest

from freeguide.cluster.runtime.checks import contradictions
from freeguide.configs import load
from freeguide.configs.errors import ConfigError
from freeguide.configs.load import find_config
from freeguide.configs.schema import Config, options
from freeguide.configs.stored import from_yaml, sealed, to_yaml

load_config = partial(load.load_config, contradictions=contradictions)  # as the commands ask all rooms

ROOT = Path(__file__).parents[2]
MINIMAL = "name: a\nrun: /tmp/run\ndata: {uri: /tmp/data}\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(MINIMAL + "train:\n  lr: 1e-4\n  steps: 7\nmodel: {channel_mult: [1, 2]}\n")
    config = load_config(
        path, ["train.steps=9", "evaluate.w=[0,0.5]", "cluster.env.NCCL_DEBUG=INFO", "train.deepspeed.wall_clock_breakdown=true"]
    )
    assert (config.train.lr, config.train.steps, config.train.global_batch) == (1e-4, 9, 2048)
    assert config.model.channel_mult == [1, 2]
    assert config.evaluate.w == [0.0, 0.5]
    assert config.cluster.env == {"NCCL_DEBUG": "INFO"}
    assert config.train.deepspeed == {"wall_clock_breakdown": True}


def test_the_resolved_config_reads_back_equal(minimal: Path, tmp_path: Path) -> None:
    config = load_config(minimal, ["train.lr=3.3e-5"])
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_is_valid_for_every_command(path: Path) -> None:
    overrides = ["data.path=/images"] if load_config(path).data.path == "" else []
    for command in ("prepare", "train", "evaluate", "generate"):
        assert isinstance(load_config(path, overrides, command), Config)


def test_every_option_is_explained_beside_it() -> None:
    source = (ROOT / "configs" / "schema.py").read_text()
    comments = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    options = [
        field
        for schema in ast.parse(source).body
        if isinstance(schema, ast.ClassDef) and schema.name.endswith("Config")
        for field in schema.body
        if isinstance(field, ast.AnnAssign)
        and not ast.unparse(field.annotation).endswith("Config")
        and field.target.id != "written"
    ]
    assert len(options) > 70
    for option in options:
        assert comments & set(range(option.lineno, (option.end_lineno or 0) + 1)), f"{ast.unparse(option.target)} is not explained"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.learning_rate=1", ["train.learning_rate", "unknown"]),
        ("train.step=1", ["unknown key train.step", "did you mean train.steps?"]),
        ("p_uncond=0.2", ["unknown key p_uncond", "did you mean diffusion.p_uncond?"]),
        ("train.steps=many", ["train.steps takes a whole number, not 'many'"]),
        ("train.lr=fast", ["train.lr takes a number"]),
        ("model.channel_mult=[a]", ["model.channel_mult takes a list of whole numbers"]),
        ("evaluate.others=one.json", ["evaluate.others takes a list of texts, not 'one.json'"]),
        ("data.flip=7up", ["data.flip takes true or false"]),
        ("train=5", ["train is a group", "train.steps"]),
        ("train.zero_stage=4", ["train.zero_stage=4", "0, 1, 2, 3"]),
        ("train.precision=bf61", ["did you mean bf16?"]),
        ("cluster.workers=3", ["train.global_batch=2048 is not divisible by cluster.workers=3"]),
        ("train.micro_batch=3", ["train.micro_batch=3 does not divide"]),
        ("diffusion.p_uncond=1.5", ["diffusion.p_uncond=1.5: must be a number from 0 to 1"]),
        ("diffusion.logsnr_min=21", ["logsnr_min=21.0 is not below"]),
        ("sampling.v=-0.1", ["sampling.v=-0.1"]),
        ("sampling.steps=0", ["sampling.steps=0: must be a whole number from 1 to 100,000"]),
        ("evaluate.w=[0,0]", ["each once"]),
        ("evaluate.w=[0.1234567,0.1234568]", ["each once to six digits"]),
        ("evaluate.w=[.inf]", ["evaluate.w=[inf]: each must be a number from 0 to 1,000"]),
        ("generate.w=.nan", ["generate.w=nan: must be a number from 0 to 1,000"]),
        ("evaluate.images=9", ["evaluate.images=9: must be a whole number from 10 to 1,000,000,000"]),
        ("sampling.seed=-1", ["sampling.seed=-1: must be a whole number from 0 to 2**64 - 1"]),
        ("lr", ["form key=value"]),
        ("name=a/b", ["must name a folder"]),
        ("train.zero_stage=0", ["bf16 with train.zero_stage=0"]),
    ],
)
def test_a_wrong_override_is_refused_in_one_sentence(minimal: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, [override])
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_the_file_that_holds_a_wrong_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(MINIMAL + "trian: {steps: 3}\n")
    with pytest.raises(ConfigError, match=r"wrong.yaml: unknown key trian.steps; did you mean train.steps\?"):
        load_config(path)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "a: 1\na: 2\n", "\x00"])
def test_a_malformed_file_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_missing_value_are_named(tmp_path: Path, minimal: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such config file; did you mean minimal\.yaml\?"):
        load_config(tmp_path / "minimul.yaml")
    (tmp_path / "empty.yaml").write_text("name: a\n")
    with pytest.raises(ConfigError, match="run has no value"):
        load_config(tmp_path / "empty.yaml")


def test_guidance_needs_an_unconditional_mode(minimal: Path) -> None:
    assert load_config(minimal, ["diffusion.p_uncond=0"], "train").diffusion.p_uncond == 0
    assert load_config(minimal, ["diffusion.p_uncond=0", "evaluate.w=[0]"], "evaluate").evaluate.w == [0]
    for command, key in (("evaluate", "evaluate.w=[0,0.1]"), ("generate", "generate.w=0.1"), ("train", "train.sample_w=0.1")):
        name = key.partition("=")[0]
        with pytest.raises(ConfigError, match=f"p_uncond=0 .* so {name}=0.1 cannot be sampled"):
            load_config(minimal, ["diffusion.p_uncond=0", key], command)


ODD = {
    "a number": b"3",
    "text": b"just words",
    "a list": b"- a\n- b\n",
    "nothing": b"",
    "binary": bytes(range(256)),
    "zeros": bytes(100),
    "latin-1": "name: caf\xe9\n".encode("latin-1"),
    "UTF-16": "name: a\n".encode("utf-16"),
    "tabs": b"train:\n\tlr: 1\n",
    "a key twice": b"name: a\nname: b\nrun: /r\ndata: {uri: /d}\n",
    "two documents": b"name: a\n---\nname: b\n",
    "a deep list": b"name: " + b"[" * 3000 + b"]" * 3000,
    "a deep mapping": b"{a: " * 3000 + b"1" + b"}" * 3000,
    "a billion laughs": b"a0: &a0 [x]\n"
    + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 10)),
    "an alias of itself": b"a: &a {b: *a}\n",
    "a key that is a list": b"? [a, b]\n: 1\n",
    "a key that is null": b"~: 1\n",
    "a key that is a number": b"1: 2\n",
    "code": b"name: !!python/object/apply:os.system [exit]\n",
    "a set": b"name: !!set {a, b}\n",
    "a huge number": b"name: a\nrun: /r\ndata: {uri: /d}\ntrain: {steps: 1" + b"0" * 5000 + b"}\n",
    "a group as a number": b"train: 3\n",
    "an open interpolation": b"name: ${a\n",
    "a missing value": b"name: ???\n",
}


@pytest.mark.parametrize("what", ODD)
def test_a_file_that_is_no_config_is_one_sentence(tmp_path: Path, what: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(ODD[what])
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("value", ["[" * 3000, "{a: " * 3000, "1" + "0" * 5000, "\0", "${a", "'a", "!!python/name:os.system"])
def test_an_override_that_is_no_value_is_one_sentence(minimal: Path, value: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(minimal, [f"train.steps={value}"])
    assert "\n" not in str(error.value)


def test_a_packaged_config_is_found_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("digits") == find_config("digits.yaml") == ROOT / "configs" / "digits.yaml"
    assert load_config("digits").name == "digits"
    Path("digits").mkdir()  # a folder is no config
    assert find_config("digits") == ROOT / "configs" / "digits.yaml"
    Path("digits.yaml").write_text(MINIMAL)
    assert find_config("digits") == find_config("digits.yaml") == Path("digits.yaml")  # what the user has wins


@pytest.mark.parametrize("name", ["digitz", "configs/digits", "none/digits.yaml", "", "."])
def test_a_name_of_no_config_is_refused_with_those_that_there_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"not a file|come with freeguide are: digits, fashion_mnist, image_folder, imagenet128, imagenet64"
    ):
        find_config(name)


def test_a_stored_config_that_has_changed_is_refused_unless_it_says_nothing_of_its_content(minimal: Path) -> None:
    config = load_config(minimal)
    stored = sealed(to_yaml(config))
    assert from_yaml(stored) == from_yaml(to_yaml(config)) == config
    assert load_config(_written(minimal, stored)) == config
    for changed in (stored.replace("logsnr_max: 20.0", "logsnr_max: 2.0"), stored[:-9], stored.replace("\n", "\n\ufffd", 1)):
        assert changed != stored
        with pytest.raises(ConfigError, match=r"changed since it was written; undo that, or take out its first line"):
            from_yaml(changed)
    assert from_yaml(stored.partition("\n")[2].replace("logsnr_max: 20.0", "logsnr_max: 2.0")).diffusion.logsnr_max == 2.0


def _written(beside: Path, text: str) -> Path:
    path = beside.with_name("stored.yaml")
    path.write_text(text)
    return path


def test_the_old_name_of_an_option_works_and_the_new_one_is_said(minimal: Path) -> None:
    with pytest.warns(UserWarning, match=r"^argument 'train.schedule=cosine': train.schedule is now called train.lr_schedule$"):
        config = load_config(minimal, ["train.schedule=cosine"])
    assert config == load_config(minimal, ["train.lr_schedule=cosine"])
    assert "train.schedule" not in options()
    with pytest.warns(UserWarning, match=r"stored.yaml: train.schedule is now called train.lr_schedule"):
        assert load_config(_written(minimal, f"{MINIMAL}train: {{schedule: cosine}}\n")) == config


def test_a_config_that_was_stored_with_the_old_name_of_an_option_is_read_as_it_was_meant(minimal: Path) -> None:
    config = load_config(minimal, ["train.lr_schedule=cosine"])
    old = to_yaml(config).replace("  lr_schedule: cosine", "  schedule: cosine")
    assert old != to_yaml(config)
    assert from_yaml(sealed(old)) == config
