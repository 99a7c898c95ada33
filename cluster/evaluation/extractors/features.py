"""Extractor: what turns images into features. Inception, DINOv2 and freeguide's own small evaluators are extractors.

A distance between image sets is a property of the extractor as much as of the images, so an extractor carries its name, the hash
of its weights and its resize rule into every row that it measured. Weights are never downloaded: the user names a file or an
object, and the file's hash says what it is. `load.py` has the dictionary of what there is.
"""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from freeguide.configs.errors import DataError

INCEPTION = "inception-2015-12-05"  # the only extractor whose distances are called FID
WEIGHTS_BYTES = 2**33  # of published networks: DINOv2 has 1.2 GB
UNIT = 1024  # images measured at a time where no work unit says otherwise; it decides the order in which moments are added


@dataclass(frozen=True, eq=False)
class Measured:
    """What an extractor says of N images."""

    features: NDArray[np.float32]  # (N, d)
    probabilities: NDArray[np.float32] | None = None  # (N, K) of its classes, if it has any
    spatial: NDArray[np.float32] | None = None  # (N, s) for sFID, if it has such features
    others: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # features (N, ...) of others, see `roles`

    def to_arrays(self) -> dict[str, Any]:
        """Its arrays by name, for `np.savez`; those that are None are left out."""
        own = {name: array for name in _PARTS if (array := getattr(self, name)) is not None}
        return own | {f"{_OF}{role}": array for role, array in self.others.items()}

    @staticmethod
    def from_arrays(arrays: Any) -> "Measured":
        """From a mapping or an open `.npz` that holds what `to_arrays` gave, possibly among other things."""
        others = {name.removeprefix(_OF): arrays[name] for name in arrays if name.startswith(_OF)}
        return Measured(**{name: arrays[name] for name in _PARTS if name in arrays}, others=others)


_PARTS = ("features", "probabilities", "spatial")
_OF = "features of "


class Extractor(Protocol):
    """The own `Evaluator`, `Inception` and `DinoV2` are extractors."""

    @property
    def name(self) -> str:
        """What rows call it. `inception-2015-12-05` is reserved for the weights of that name."""

    @property
    def hash(self) -> str:
        """sha256 of the weights, hexadecimal."""

    @property
    def resize(self) -> str:
        """The rule by which an image becomes its input; "none" where it takes the image as it is."""

    @property
    def channels(self) -> int:
        """Channels that images should be decoded to: 1 or 3."""

    @property
    def width(self) -> int:
        """Number of features of an image, d."""

    @property
    def has_classes(self) -> bool:
        """Whether it says how probable classes are. Without, there is no Inception score and no accuracy."""

    def measure(self, images: NDArray[np.uint8], device: str = "cpu") -> Measured:
        """Measure images uint8 (N, H, W, C). Raises DataError for images that it cannot take."""


@dataclass(frozen=True)
class Loader:
    """How a kind of extractor is made of its weights."""

    files: str  # which names the files of its weights have, as a shell's pattern
    example: str  # a name that its users give such a file
    read: Callable[[bytes, str], Extractor]  # of a file's bytes, and where they stand; raises DataError for anything else
    source: str  # what to do if the file does not exist
    most: int = WEIGHTS_BYTES  # bytes that such a file may have


def measure_with(extractors: Mapping[str, Extractor], images: NDArray[np.uint8], device: str = "cpu") -> Measured:
    """What the extractor of the role "" says of images uint8 (N, H, W, C), with the features of all others by their roles."""
    measured = extractors[""].measure(images, device)
    others = {role: extractor.measure(images, device).features for role, extractor in extractors.items() if role}
    return replace(measured, others=others)


def load_weights(data: bytes, network: torch.nn.Module, where: str) -> str:
    """Fill `network` with the state dict in `data` and return the file's sha256.

    Only tensors are read (`weights_only`), so a file cannot run code. Raises DataError for damaged files and other networks.
    """
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        network.load_state_dict(state, assign=True)
    except Exception as error:  # torch raises a dozen types for damaged files, and RuntimeError for other networks
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":. ")
        raise DataError(f"{where} does not hold these weights ({reason}); download the file again") from None
    network.eval().requires_grad_(False)
    return hashlib.sha256(data).hexdigest()


def to_rgb(images: NDArray[np.uint8], name: str) -> Tensor:
    """Images uint8 (N, H, W, 1 or 3) as float32 (N, 3, H, W) of levels 0 .. 255; grey becomes three equal channels."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:3]:
        raise DataError(f"{name} measures images uint8 (N, H, W, 1 or 3), not {images.dtype} {images.shape}; decode them first")
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(torch.float32)
    return x.expand(-1, 3, -1, -1)


def concatenated(units: Sequence[Measured]) -> Measured:
    """All units as one, in the order given. Parts that a unit lacks are left out."""
    joined = {
        name: np.concatenate([getattr(unit, name) for unit in units])
        for name in _PARTS
        if all(getattr(unit, name) is not None for unit in units)
    }
    roles = set.intersection(*(set(unit.others) for unit in units)) if units else set()
    return Measured(**joined, others={role: np.concatenate([unit.others[role] for unit in units]) for role in sorted(roles)})
