"""The lines of Python that docs/evaluation.md prints make a picture of a run, as they are printed."""

import ast
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from freeguide.configs.load import load_config
from freeguide.data_pipeline.shards import write_shards
from freeguide.data_pipeline.sources.digits import digits
from freeguide.data_pipeline.store.open import open_store
from tests.cluster.untrained import DIGITS, SMALL, write_run
from tests.docs.printed import ROOT, blocks


def test_five_lines_of_a_notebook_make_a_picture_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "docs/evaluation.md"
    (block,) = [block for block in blocks(page, (ROOT / page).read_text()) if block.language == "python"]
    write_shards(digits(), open_store(str(tmp_path / "data")), shard_samples=600)
    monkeypatch.chdir(tmp_path)
    write_run(load_config(DIGITS, [*SMALL, f"data.uri={tmp_path}/data", "run=runs/image_folder/store"]))
    tree = ast.parse("\n".join(block.lines))
    assert len(tree.body) == 5
    last = tree.body.pop()
    assert isinstance(last, ast.Expr)
    names: dict[str, Any] = {}
    exec(compile(tree, page, "exec"), names)
    shown = eval(compile(ast.Expression(last.value), page, "eval"), names)  # what a notebook shows
    assert isinstance(shown, Image.Image)
    assert (shown.size, shown.mode) == ((80, 32), "L")
    assert len(set(shown.getdata())) > 20
