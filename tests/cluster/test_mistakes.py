"""More than two hundred mistakes at the command line: each is one sentence and exit code 2, and nothing is printed or written else.

A mistake stands as it is typed, in a folder that holds what mistakes are made of (see `here`), beside words of the sentence. Ray
may not start.
"""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from freeguide.cluster.cli import COMMANDS, main
from freeguide.configs.checks import value_of
from freeguide.configs.load import load_config
from freeguide.configs.stored import to_yaml
from tests.cluster.untrained import small, write_lab, write_run

OF_CONFIGS = "those that come with freeguide are: digits, fashion_mnist"
MEASURE = "--extractor lab/evaluator.safetensors --reference lab/reference.npz"

MISTAKES = {
    # --- the words themselves ---
    "": "required: COMMAND; see `freeguide --help`",
    "--nonsense": "required: COMMAND",
    "trian good.yaml": "unknown command trian; did you mean train?",
    "fit_evaluator good.yaml": "did you mean fit-evaluator?",
    "resume good.yaml": "unknown command resume; the commands are: prepare, index, train",
    "train good.yaml --nonsense": "unknown option --nonsense; the options are: --help, --submit, --dry-run; see `freeguide train",
    "train good.yaml --dryrun": "did you mean --dry-run?",
    "train good.yaml --dry_run train.steps=5": "did you mean --dry-run?",
    "train good.yaml --dry-run=yes": "argument --dry-run: ignored explicit argument 'yes'",
    "train good.yaml -x": "unknown option -x",
    "train good.yaml --submit": "argument --submit: expected one argument; see `freeguide train --help`",
    "train good.yaml --order": "unknown option --order",
    "evaluate good.yaml --screen=5": "ignored explicit argument '5'",
    "export good.yaml --json x": "unknown option --json",
    "inspect good.yaml --submit http://127.0.0.1:9": "unknown option --submit",
    "inspect good.yaml --theory": "argument --theory: expected one argument",
    "demo --nonsense": "unknown option --nonsense",
    "train @nowhere": "No such file or directory: 'nowhere'",
    "train good.yaml @nowhere": "No such file or directory: 'nowhere'",
    **dict.fromkeys(COMMANDS, "required: CONFIG; see"),
    "score": "required: samples, --extractor, --reference",
    # --- the config ---
    "train nowhere.yaml": OF_CONFIGS,
    "train digitz": "digitz: no such config file; did you mean digits? (those",
    "train digits.yml": "did you mean digits?",
    "train goood.yaml": "did you mean good.yaml?",
    "train ''": f"the name of the config is empty: no such config file; {OF_CONFIGS}",
    "train ' '": "the name of the config is empty",
    "train emptyfolder": "emptyfolder: not a file; a config is a YAML file",
    "train folder.yaml": "folder.yaml: not a file",
    "train run": "run: not a file; a config is a YAML file, such as that of a run, run/config.yaml",
    "train s3://bucket/config.yaml": "s3://bucket/config.yaml: a config is a file of this machine",
    "train empty.yaml": "empty.yaml: name has no value; set it in the file or as name=",
    "train list.yaml": "a config is a mapping of keys to values, this file holds a list",
    "train number.yaml": "this file holds a single value",
    "train scores.csv": "this file holds a text: 'w,fid 0,3.1'",
    "train twice.yaml": "twice.yaml: not valid YAML: line 2, column 1: found duplicate key name",
    "train tab.yaml": "tab.yaml: not valid YAML: line 2, column 1: found character that cannot start any token",
    "train image.yaml": "image.yaml: not valid YAML: its byte 128 is no text in UTF-8",
    "train latin.yaml": "its byte 9 is no text in UTF-8",
    "train samples.npz": "is no text in UTF-8",
    "evaluate typo.yaml": "typo.yaml: unknown key train.stepz; did you mean train.steps?",
    "evaluate wrong.yaml": "wrong.yaml: train.steps takes a whole number, not 'soon'",
    "train /dev/null": "not a file",
    "inspect scores.csv": "this file holds a text",
    "export run": "run/config.yaml",
    # --- overrides ---
    "train good.yaml train.lrr=1": "argument 'train.lrr=1': unknown key train.lrr; did you mean train.lr?",
    "train good.yaml trian.lr=1": "did you mean train.lr?",
    "train good.yaml lr=1": "did you mean train.lr?",
    "train good.yaml trâin.lr=1": "did you mean train.lr?",
    "train good.yaml ναμε=1": "unknown key ναμε; the keys are: name, run, seed",
    "train good.yaml '${oc.env:HOME}=1'": "unknown key",
    "train good.yaml train=1": "train is a group of options, not a value; set for example train.steps=",
    "train good.yaml train.lr": "an override has the form key=value, without spaces, for example train.lr=1e-4",
    "train good.yaml train.lr = 1": "argument 'train.lr': an override has the form key=value, without spaces",
    "train good.yaml train.lr= 1": "argument 'train.lr=': train.lr has no value; it takes a number",
    "train good.yaml =1": "an override has the form key=value",
    "train good.yaml train.lr=fast": "train.lr takes a number, not 'fast'",
    "train good.yaml train.lr=nan": "train.lr=nan: must be a number above 0",
    "train good.yaml train.lr=-1": "must be a number above 0",
    "train good.yaml train.steps=1.5": "train.steps takes a whole number, not 1.5",
    "train good.yaml train.steps=1e3": "train.steps takes a whole number, not 1e3",
    "train good.yaml train.steps=0100": "train.steps takes a whole number, not 0100",
    "train good.yaml train.steps=12:30": "train.steps takes a whole number, not 12:30",
    "train good.yaml train.steps=0": "must be a whole number from 1",
    "train good.yaml train.steps=99999999999999999999": "must be a whole number from 1 to 10,000,000,000",
    "train good.yaml train.precision=float32": "the values are: fp32, bf16, fp16",
    "train good.yaml data.flip=maybe": "data.flip takes true or false, not 'maybe'",
    "train good.yaml data.flip=2": "data.flip takes true or false, not 2",
    "train good.yaml train.betas=0.9": "train.betas takes a list of numbers, not 0.9; write train.betas=[0.9]",
    "train good.yaml train.betas=[0.9]": "must hold 2 values",
    "train good.yaml train.betas=[0.9,x]": "train.betas takes a list of numbers, not [0.9, 'x']",
    "train good.yaml 'train.betas=[0.9'": "not a value in YAML (line 2, column 1: did not find expected ',' or ']')",
    "evaluate good.yaml evaluate.w=[0, 1]": "quote one with spaces: 'evaluate.w=[0, 1]'",
    "train good.yaml 'name=a b'": "name=a b: must name a folder under runs/, of letters, digits, '_', '-' and '.'",
    "train good.yaml name=../x": "must name a folder under runs/",
    "train good.yaml name=": "name=: must name a folder under runs/",
    "train good.yaml 'train.lr=${oc.env:NOT_THERE}'": "train.lr refers to something that is not there",
    "train good.yaml cluster.env=5": "cluster.env takes a mapping of names to texts, not 5",
    "train good.yaml cluster.workers=0": "must be a whole number from 1",
    "train good.yaml train.global_batch=7 cluster.workers=2": "not divisible by cluster.workers=2",
    "train good.yaml seed=-1": "must be a whole number from 0",
    "train good.yaml model.channels=7": "set it to an even number of at least 2",
    "train good.yaml model.head_channels=3": "set it to a divisor of 8",
    "train good.yaml model.channel_mult=[]": "must hold 1 to 16 values",
    "train good.yaml model.attention=[5]": "which do not occur: choose among 8",
    "train good.yaml sampling.ema=half_life_9": "is not kept by this training",
    "train good.yaml diffusion.logsnr_min=20 diffusion.logsnr_max=-20": "swap them",
    # --- locations ---
    "train good.yaml run=": "run: A location is empty; give s3://bucket/prefix or a folder",
    "train good.yaml run=s3:/bucket/x": "run: s3:/bucket/x has no // after s3:",
    "train good.yaml run=s3//bucket/x": "run: s3//bucket/x looks like a URI without the colon before its slashes",
    "train good.yaml 'run=s3;//bucket/x'": "looks like a URI without the colon",
    "train good.yaml run=S4://bucket/x": "has the unknown scheme s4:",
    "train good.yaml run=http://host/x": "has the unknown scheme http:",
    "train good.yaml run=s3://b/x": "names no bucket",
    "train good.yaml run=samples.npz": "samples.npz is a file; give a folder",
    "train good.yaml data.uri=samples.npz": "samples.npz is a file; give a folder",
    "train good.yaml data.uri=nowhere": "There is no manifest at HERE/nowhere/manifest.json; run `freeguide prepare`",
    "train good.yaml data.uri=emptyfolder": "There is no manifest",
    "train good.yaml data.uri=run": "run is a run, and no data set; set data.uri to where `freeguide prepare` wrote the data",
    "train good.yaml run=lab/data": "lab/data holds a data set, and a run needs a place of its own; name another run=URI",
    "train good.yaml run=new --submit http://127.0.0.1:9": "with --submit, a path from here means another place",
    "train good.yaml --submit http://127.0.0.1:9": "with --submit, a folder of this machine is not what the cluster's nodes see",
    "train good.yaml --submit localhost:8265": "no address of a dashboard",
    # --- what does not fit to the data or the run ---
    "train good.yaml data.classes=7": "set data.classes=10",
    "train good.yaml data.image_size=16": "set data.image_size=8",
    "train good.yaml data.channels=3": "set data.channels=1",
    "train good.yaml cluster.gpus_per_worker=1 run=new": "GPU",
    "generate good.yaml data.image_size=16": "was trained with data.image_size=8, now it is 16; set data.image_size=8",
    "generate image_folder run=run data.uri=lab/data": "was trained with data.image_size=8, now it is 32",
    # --- prepare ---
    "prepare good.yaml data.source=folder": "data.path is empty: name what data.source=folder reads",
    "prepare good.yaml data.source=folder data.uri=new data.path=nowhere": "nowhere' does not exist; set data.path",
    "prepare good.yaml data.source=folder data.uri=new data.path=samples.npz": "samples.npz' is a file; set data.path",
    "prepare good.yaml data.source=folder data.uri=new data.path=s3://bucket/x": "is on a store; set data.path to a folder",
    "prepare good.yaml data.source=folder data.uri=new data.path=emptyfolder": "has no class folders and no images",
    "prepare good.yaml data.source=folder data.uri=new data.path=run": "hold no images",
    "prepare good.yaml data.source=folder data.uri=new data.path=pictures data.classes=5": "has 2 class folders",
    "prepare good.yaml data.source=folder data.uri=new data.path=pictures data.class_names=nowhere": "nowhere does not exist",
    "prepare good.yaml data.source=folder data.uri=new data.path=pictures data.class_names=lab": "lab is a folder",
    "prepare good.yaml data.source=idx data.uri=new data.path=emptyfolder": "has no train-images-idx3-ubyte",
    "prepare good.yaml data.source=parquet data.uri=new data.path=emptyfolder": "There are no Parquet files",
    "prepare good.yaml data.source=parquet data.uri=new data.path=scores.csv": "not a parquet file",
    "prepare good.yaml data.source=webdataset data.uri=new data.path=emptyfolder": "There is no manifest",
    "prepare good.yaml data.source=csv data.uri=new data.path=scores.csv": "the values are: digits, folder, idx, parquet",
    "prepare good.yaml data.uri=run": "run is a run, and a data set needs a place of its own; name another data.uri",
    "prepare good.yaml data.uri=/proc/nowhere/x": "cannot be used|does not exist|may not be written",
    "prepare good.yaml data.image_size=100000": "must be a whole number from 1 to 4,096",
    "prepare good.yaml data.bad_images=2": "must be a number from 0 to 1",
    # --- index ---
    "index good.yaml data.uri=emptyfolder": "There are no tars in HERE/emptyfolder",
    "index good.yaml data.uri=nowhere": "There are no tars in HERE/nowhere",
    "index good.yaml data.uri=run": "run is a run, and a data set needs a place of its own",
    "index good.yaml data.uri=lab/data data.shards=none-{00..03}.tar": "4 of 4 tars are missing in HERE/lab/data, first none-00",
    "index good.yaml data.uri=lab/data data.shards=a-{00..x": "do not match",
    "index good.yaml data.uri=new data.mixture=lab/data": "data.mixture takes a mapping of names to whole numbers",
    "index good.yaml data.uri=new 'data.mixture={lab/data: 0}'": "must be a whole number from 1",
    "index good.yaml data.uri=new 'data.mixture={nowhere: 1}'": "There is no manifest",
    "index good.yaml data.uri=new 'data.mixture={lab/data: 1, ./lab/data: 2}'": "names one place twice",
    "index good.yaml data.uri=lab/data 'data.mixture={lab/data: 1}'": "whose manifest would be lost; name another data.uri",
    # --- generate, evaluate, export, fit-evaluator ---
    **{
        f"{command} good.yaml {override}": words
        for command in ("generate", "evaluate", "export")
        for override, words in {
            "run=nowhere": "nowhere: no checkpoint; run `freeguide train` first, or name the run as run=URI",
            "run=emptyfolder": "no checkpoint",
            "run=lab/data": "no checkpoint",
            "run=samples.npz": "samples.npz is a file; give a folder",
            "sampling.checkpoint=5": "no whole checkpoint of step 5, only of 8",
            "sampling.ema=half_life_7": "holds no average half_life_7; set sampling.ema to one of ema, half_life_50, master",
            "sampling.ema=sigma_rel_0.1": "holds no average sigma_rel_0.1",
            "sampling.ema=emma": "one of ema, master, half_life_N",
        }.items()
    },
    "generate good.yaml generate.images=0": "must be a whole number from 1",
    "generate good.yaml generate.images=1e9": "takes a whole number, not 1e9",
    "generate good.yaml generate.images=100000000000": "must be a whole number from 1 to 1,000,000,000",
    "generate good.yaml generate.images=1000000000 generate.unit=1": "raise generate.unit",
    "generate good.yaml generate.w=-1": "must be a number from 0 to 1,000",
    "generate good.yaml generate.w=nan": "must be a number from 0 to 1,000",
    "generate good.yaml generate.w=[0,1]": "generate.w takes a number, not [0, 1]",
    "generate good.yaml sampling.sampler=euler": "the values are: ancestral, ddim",
    "generate good.yaml sampling.interval=[3,-3]": "two log-SNRs, the lower one first",
    "generate good.yaml diffusion.p_uncond=0 generate.w=1": "cannot be sampled",
    "evaluate good.yaml evaluate.w=[]": "evaluate.w=[]: must hold 1 to 1000 values",
    "evaluate good.yaml evaluate.w=": "evaluate.w has no value; it takes a list of numbers",
    "evaluate good.yaml evaluate.w=0.5": "write evaluate.w=[0.5]",
    "evaluate good.yaml evaluate.w=0,1": "write evaluate.w=[0,1]",
    "evaluate good.yaml evaluate.w=[-1]": "each must be a number from 0 to 1,000",
    "evaluate good.yaml evaluate.w=[nan]": "each must be a number from 0 to 1,000",
    "evaluate good.yaml evaluate.w=[1,1]": "each once",
    "evaluate good.yaml evaluate.images=0": "must be a whole number from 10",
    "evaluate good.yaml evaluate.images=1000000000 evaluate.unit=1": "raise evaluate.unit",
    "evaluate good.yaml evaluate.extractor=nowhere.safetensors": "nowhere.safetensors does not exist",
    "evaluate good.yaml evaluate.extractor=scores.csv": "does not say which extractor it holds",
    "evaluate good.yaml evaluate.extractor_hash=abc": "a sha256 has 64 hexadecimal digits",
    f"evaluate good.yaml evaluate.extractor_hash={'0' * 64}": f"and not {'0' * 64}; correct the path, or the hash",
    "evaluate good.yaml evaluate.reference=nowhere.npz": "nowhere.npz does not exist; correct the path of the reference",
    "evaluate good.yaml evaluate.reference=lab/data": "lab/data is a folder, and a file is looked for",
    "evaluate good.yaml evaluate.reference=scores.csv": "is not an .npz of plain arrays",
    "evaluate good.yaml evaluate.others=[nowhere.json]": "nowhere.json does not exist; score the images first",
    "evaluate good.yaml evaluate.others=scores.csv": "write evaluate.others=[scores.csv]",
    "evaluate good.yaml evaluate.others=[scores.csv]": "does not hold metric rows",
    "evaluate good.yaml evaluate.others=[emptyfolder]": "emptyfolder is a folder, and a file is looked for",
    "evaluate good.yaml evaluate.dinov2_reference=x.npz": "needs DINOv2's weights: set evaluate.dinov2",
    "evaluate good.yaml 'evaluate.sweep={train.lr: [1]}'": "train.lr cannot be swept",
    "evaluate good.yaml 'evaluate.sweep={sampling.stepz: [8]}'": "did you mean sampling.steps?",
    "evaluate good.yaml 'evaluate.sweep={sampling.steps: 8}'": "give a list of values, each once",
    "evaluate good.yaml 'evaluate.sweep={sampling.steps: []}'": "give a list of values, each once",
    "evaluate good.yaml 'evaluate.sweep={run: [nowhere]}'": "nowhere: no checkpoint",
    "evaluate good.yaml data.uri=run": "is a run, and no data set",
    "evaluate good.yaml data.uri=nowhere": "There is no manifest",
    "evaluate good.yaml evaluate.screen=-2": "or -1",
    "fit-evaluator good.yaml": "names weights that are there already: leave it out to fit an evaluator",
    "fit-evaluator digits data.uri=nowhere": "There is no manifest",
    "fit-evaluator digits data.uri=run": "is a run, and no data set",
    "fit-evaluator digits data.uri=lab/data evaluate.evaluator_epochs=0": "must be a whole number from 1",
    # --- inspect ---
    "inspect nowhere/x": "no run stands here; give a config file, or the URI that a config calls `run`",
    "inspect emptyfolder": "no run stands here",
    "inspect lab/data": "no run stands here",
    "inspect ./samples.npz": "not valid YAML",
    "inspect s3:/bucket": "has no // after s3:",
    "inspect s3://b": "names no bucket",
    "inspect run train.lr=1": "of a run, train.lr=1 cannot be asked; give a config file, or the run alone",
    "inspect run --order": "of a run, --order cannot be asked",
    "inspect run --theory x.png": "of a run, --theory cannot be asked",
    "inspect good.yaml --theory nowhere/x.png": "--theory 'nowhere/x.png' is no file in a folder that exists",
    "inspect good.yaml --theory emptyfolder": "is no file in a folder that exists",
    "inspect good.yaml --order data.uri=nowhere": "There is no manifest",
    # --- score ---
    "score samples.npz --extractor lab/evaluator.safetensors": "required: --reference",
    f"score nowhere.npz {MEASURE}": "nowhere.npz does not exist; correct the path of the samples",
    f"score nowhere {MEASURE}": "HERE/nowhere cannot be read (No such file or directory)",
    f"score emptyfolder {MEASURE}": "emptyfolder holds no images",
    f"score scores.csv {MEASURE}": "scores.csv is a file; give a folder",
    f"score run {MEASURE}": "run holds no images",
    f"score float.npz {MEASURE}": "must be images uint8 (N, H, W, C), not float32",
    f"score large.npz {MEASURE}": "measures uint8 (N, 8, 8, 1), not uint8 (12, 16, 16, 1)",
    f"score pictures {MEASURE}": "score images of one size",
    "score samples.npz --extractor nowhere.safetensors --reference lab/reference.npz": "nowhere.safetensors does not exist",
    "score samples.npz --extractor samples.npz --reference lab/reference.npz": "does not say which extractor it holds",
    "score samples.npz --extractor lab/evaluator.safetensors --reference nowhere": "There is no manifest",
    "score samples.npz --extractor lab/evaluator.safetensors --reference run": "is a run, and no data set",
    "score samples.npz --extractor lab/evaluator.safetensors --reference scores.csv": "scores.csv is a file; give a folder",
    f"score samples.npz {MEASURE} --device cuda": "sees no GPU",
    f"score samples.npz {MEASURE} --device gpu": "give cpu, cuda, or cuda:N",
    f"score samples.npz {MEASURE} --w x": "argument --w: 'x' is no number",
    f"score samples.npz {MEASURE} --w nan": "argument --w: 'nan' is no number",
    f"score samples.npz {MEASURE} w=0.5": "give the guidance weight as an option, --w 0.5",
    f"score samples.npz {MEASURE} steps": "'steps' is no fact of the samples; write key=value",
    f"score samples.npz {MEASURE} stepz=5": "'stepz' is no fact of a model",
    f"score samples.npz {MEASURE} steps=x": "steps is 'x', and a row holds another type of value there",
    f"score samples.npz {MEASURE} fid=5": "fid is measured and cannot be given",
    f"score samples.npz {MEASURE} --json nowhere/x.json": "--json 'nowhere/x.json' is no file in a folder that exists",
    f"score samples.npz {MEASURE} --json emptyfolder": "is no file in a folder that exists",
    f"score samples.npz {MEASURE} --extractor-hash x": "and not x; correct the path, or the hash",
    f"score samples.npz {MEASURE} --dinov2 x": "give both or neither",
    # --- demo ---
    "demo good.yaml": "an override has the form key=value",
    "demo train.lrr=1": "did you mean train.lr?",
    "demo evaluate.w=[]": "must hold 1 to 1000 values",
    "demo data.source=folder": "data.path is empty",
    "demo run=s3://mine/x": "give both data.uri and run on your store, or neither",
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a run of 8 steps and a config for them (lab/, run/, good.yaml), beside what is none of these."""
    folder = tmp_path_factory.mktemp("here")
    write_lab(folder / "lab")
    config = small(folder / "lab", folder / "run", "train.steps=8", "cluster.engine=ray")
    write_run(config)
    (folder / "good.yaml").write_text(to_yaml(config))
    texts = {
        "empty.yaml": "",
        "list.yaml": "- name\n- run\n",
        "number.yaml": "7\n",
        "twice.yaml": "name: a\nname: b\n",
        "tab.yaml": "name:\n\ta: 1\n",
        "typo.yaml": "name: a\ntrain:\n  stepz: 5\n",
        "wrong.yaml": "name: a\ntrain: {steps: soon}\n",
        "scores.csv": "w,fid\n0,3.1\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "image.yaml").write_bytes(bytes(range(256)))
    (folder / "latin.yaml").write_bytes("name: café\n".encode("latin-1"))
    (folder / "folder.yaml").mkdir()
    (folder / "emptyfolder").mkdir()
    np.savez(folder / "samples.npz", np.zeros((12, 8, 8, 1), np.uint8))
    np.savez(folder / "float.npz", np.zeros((12, 8, 8, 1), np.float32))
    np.savez(folder / "large.npz", np.zeros((12, 16, 16, 1), np.uint8))
    for name, size in (("a", 8), ("b", 9)):
        (folder / "pictures" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((size, 8), np.uint8)).save(folder / "pictures" / name / "0.png")
    return folder


@pytest.fixture(autouse=True)
def stands_here(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command runs in that folder, which is afterwards what it was."""
    monkeypatch.chdir(here)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    before = _seen(here)
    yield
    assert _seen(here) == before


def _seen(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_one_sentence_and_nothing_else(typed: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(typed)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("freeguide: error: ")
    assert printed.err.count("\n") == 1, printed.err
    assert not printed.err.rstrip("\n").endswith(".") or printed.err.endswith("...\n")
    assert any(words in printed.err for words in MISTAKES[typed].replace("HERE", str(here)).split("|")), printed.err


def test_a_config_that_may_not_be_read_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    Path("closed.yaml").write_text("name: a\n")
    Path("closed.yaml").chmod(0)
    root = os.geteuid() == 0  # for whom rights mean nothing
    assert main(["train", "nowhere.yaml"]) == 2  # so that all is imported
    capsys.readouterr()
    if root:
        os.seteuid(65534)
    try:
        assert main(["train", "closed.yaml"]) == 2
    finally:
        if root:
            os.seteuid(0)
    assert capsys.readouterr().err == "freeguide: error: closed.yaml: Permission denied\n"


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["name=007"], "name", "007"),
        (["name=1e3"], "name", "1e3"),
        (["name=on"], "name", "on"),
        (["cluster.env={A: on, B: 010, C: 1.0}"], "cluster.env", {"A": "on", "B": "010", "C": "1.0"}),
        (["cluster.env.A=1", "cluster.env.B=no"], "cluster.env", {"A": "1", "B": "no"}),
        (["data.label_key="], "data.label_key", ""),
        (["data.label_key=null"], "data.label_key", ""),
        (["evaluate.w=[0, 1e0]"], "evaluate.w", [0.0, 1.0]),
        (["seed=0x10"], "seed", 16),
        (["seed=0"], "seed", 0),
        (["train.lr=0.5e-3"], "train.lr", 0.5e-3),
    ],
)
def test_a_text_is_what_is_typed_and_a_mapping_is_added_to(overrides: list[str], key: str, value: object, tmp_path: Path) -> None:
    config = load_config("good.yaml", overrides)
    assert value_of(config, key) == value
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
