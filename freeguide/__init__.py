"""Classifier-free guidance at scale. All imports begin with this name: `from freeguide.trainer.sampler import Sampler`.

A wheel lays the rooms (`configs`, `data_pipeline`, `trainer`, `cluster`) into this package. A checkout keeps them beside it.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
if not (_HERE / "configs").is_dir():
    __path__.append(str(_HERE.parent))
