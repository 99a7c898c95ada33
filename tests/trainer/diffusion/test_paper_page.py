"""docs/paper.md names only functions and tests that exist."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/paper.md").read_text()
MODULES = ("guidance", "objective", "oracles", "parametrisation", "randomness", "samplers", "schedule", "theory")


def test_every_function_named_on_the_page_exists():
    names = re.findall(rf"`({'|'.join(MODULES)})\.(\w+)`", PAGE)
    assert len(names) > 30
    for module, name in names:
        assert hasattr(importlib.import_module(f"freeguide.trainer.diffusion.{module}"), name), f"{module}.{name}"


def test_every_test_named_on_the_page_exists():
    named, module = [], ""
    for found, test in re.findall(r"`(test_\w+)?(?:::(\w+))?`", PAGE):
        module = found or module  # `::name` belongs to the module named before it
        if found or test:
            named.append((module, test))
    assert len(named) > 20
    for module, test in named:
        source = (Path(__file__).parent / f"{module}.py").read_text()
        assert f"def {test}(" in source if test else source, f"{module}::{test}"
