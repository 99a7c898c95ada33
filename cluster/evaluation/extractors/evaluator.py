"""A small classifier, trained on the real data of a run, whose features and probabilities stand in for Inception's.

FID and IS need a feature extractor. The paper's is the Inception network of 2015-12-05; for 8x8 digits or 28x28 clothes it is
neither at hand nor apt. This network takes seconds to minutes to train on a CPU, is fixed by a seed, and is named by the hash of
its weights. Its distances are called `FID-<name>` and compare with others of the same hash only; they are never an FID.

A fifth of the images is held out by a fixed permutation (never by position, since labels may repeat with a period). The weights
are those trained on the other four fifths, so the accuracy stated is the accuracy of the very network that measures.

Data without classes have no labels to learn. There the network learns by how many quarter turns a picture was turned (Gidaris et
al. 2018, arXiv 1803.07728), for which it has to find out what stands upright in it. Its four turns are no classes of the data: such
an evaluator measures features only, and no Inception score or accuracy can be made of it.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from freeguide.cluster.evaluation.extractors.features import Loader, Measured
from freeguide.configs.errors import DataError
from freeguide.data_pipeline.artifact import read_safetensors, to_safetensors

FEATURES = 64  # width of the penultimate layer
HELD_OUT = 5  # one image in so many is held out
HELD_OUT_SEED = 20220726  # of the permutation that decides which; independent of the training seed
PEAK_LR = 3e-3
BATCH = 128
AT_A_TIME = 512  # images measured together
TURNS = 4  # of a picture by a quarter each, with which it is as it was
ROTATIONS = "rotations"  # what an evaluator says that it learned, if it learned turns; one that learned labels says nothing

# The rows (n,) of a training set -> images uint8 (N, H, W, C) to learn from, and what to say of them (N,), N = n or TURNS n.
Lesson = Callable[[NDArray[np.int64]], tuple[NDArray[np.uint8], NDArray[np.int64]]]


class Network(nn.Module):
    """3x3 convolutions, halving the image after each until 4 to 7 pixels are left; then one more, 64 features, and the logits."""

    def __init__(self, size: int, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width_in, width = channels, 32
        while size >= 8:
            layers += [*_convolution(width_in, width), nn.AvgPool2d(2)]
            width_in, width, size = width, min(2 * width, 128), size // 2
        self.convolutions = nn.Sequential(*layers, *_convolution(width_in, width), nn.Flatten())
        self.embedding = nn.Linear(width * size * size, FEATURES)
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, C, H, W) in [-1, 1] -> features (N, 64), logits (N, K)."""
        # SiLU instead of ReLU: no feature can die, so the covariance of the features keeps its full rank.
        features = F.silu(self.embedding(self.convolutions(x)))
        return features, self.head(features)


@dataclass(frozen=True, eq=False)
class Evaluator:
    name: str  # of the data, e.g. "digits": distances are called FID-digits
    size: int  # pixels per side
    channels: int
    classes: int
    epochs: int
    seed: int
    accuracy: float  # on the held-out fifth
    network: Network
    rotations: bool = False  # whether it learned the turns of pictures: its classes are these then, and none of the data

    @property
    def has_classes(self) -> bool:
        return not self.rotations

    @cached_property
    def hash(self) -> str:
        """sha256 over names and little-endian bytes of all weights, in the order of their names."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def features(
        self, images: NDArray[np.uint8], batch: int = AT_A_TIME, device: str = "cpu"
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Images uint8 (N, H, W, C) -> features (N, 64) and probabilities (N, K) of what it learned, both float32.

        Bits repeat for equal `batch`, device and thread count. Raises DataError for images that the network was not made for.
        """
        if images.dtype != np.uint8 or images.shape[1:] != (self.size, self.size, self.channels):
            expected = f"uint8 (N, {self.size}, {self.size}, {self.channels})"
            raise DataError(
                f"evaluator {self.name!r} measures {expected}, not {images.dtype} {images.shape}; use the evaluator of this data"
            )
        network = self.network.to(device).eval()
        features = np.empty((len(images), FEATURES), np.float32)
        probabilities = np.empty((len(images), self.classes), np.float32)
        with torch.inference_mode():
            for start in range(0, len(images), batch):
                rows = slice(start, start + batch)
                f, logits = network(_to_input(images[rows]).to(device))
                features[rows], probabilities[rows] = f.cpu().numpy(), logits.softmax(dim=1).cpu().numpy()
        return features, probabilities

    @property
    def resize(self) -> str:
        return "none"

    @property
    def width(self) -> int:
        return FEATURES

    def measure(self, images: NDArray[np.uint8], device: str = "cpu") -> Measured:
        """`features` in the form that all extractors share; how a picture is turned is nothing that metrics ask."""
        features, probabilities = self.features(images, device=device)
        return Measured(features, probabilities if self.has_classes else None)

    def to_bytes(self) -> bytes:
        """A sealed safetensors file that holds the weights and what `from_bytes` needs; equal evaluators give equal bytes."""
        facts = {field: getattr(self, field) for field in _FACTS} | ({"learned": ROTATIONS} if self.rotations else {})
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        return to_safetensors(tensors, "evaluator", facts)


_FACTS = {"name": str, "size": int, "channels": int, "classes": int, "epochs": int, "seed": int, "accuracy": float}


def fit_evaluator(
    images: NDArray[np.uint8],
    labels: NDArray[np.integer],
    classes: int,
    epochs: int = 30,
    seed: int = 0,
    *,
    name: str,
    device: str = "cpu",
) -> Evaluator:
    """Train an evaluator on images uint8 (N, H, W, C), square, 8 to 64 pixels, 1 or 3 channels, with labels (N,) in 0 .. K - 1.

    On a CPU the same data, seed and thread count give the same weights, bit for bit; the global random state is not touched.
    Raises DataError for images, labels or a name that do not fit.
    """
    _check_images(images, epochs, name)
    _check_labels(images, labels, classes)
    fresh = _fresh(images, classes, epochs, seed, name)
    return _taught(fresh, lambda rows: (images[rows], labels[rows].astype(np.int64)), len(images), device)


def fit_rotations(images: NDArray[np.uint8], epochs: int = 30, seed: int = 0, *, name: str, device: str = "cpu") -> Evaluator:
    """As `fit_evaluator`, without labels: train on every image in its four turns. A held-out image is held out in all of them."""
    _check_images(images, epochs, name)
    fresh = replace(_fresh(images, TURNS, epochs, seed, name), rotations=True)
    return _taught(fresh, lambda rows: (turned(images[rows]), np.repeat(np.arange(TURNS), len(rows))), len(images), device)


def turned(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Square images (N, H, H, C) -> (4 N, H, H, C): all of them as they are, then by one, two and three quarter turns."""
    return np.concatenate([np.rot90(images, turns, axes=(1, 2)) for turns in range(TURNS)])


def from_bytes(data: bytes, where: str = "evaluator") -> Evaluator:
    """Read what `Evaluator.to_bytes` wrote. `where` names the file in errors. Raises DataError if it is not such a file."""
    remedy = "delete it and fit the evaluator again"
    tensors, facts = read_safetensors(data, where, "evaluator", "an evaluator", remedy)
    try:
        values: dict[str, Any] = {field: kind(facts[field]) for field, kind in _FACTS.items()}
        learned = facts.get("learned")
        if learned not in (None, ROTATIONS) or (learned and values["classes"] != TURNS):
            raise ValueError(f"it learned {str(learned)[:40]!r} of {values['classes']} classes")
        check_shape(values["size"], values["channels"], values["classes"])
        check_name(values["name"])
        if tensors["head.weight"].shape != (values["classes"], FEATURES) or not 0 <= values["accuracy"] <= 1:
            raise ValueError(f"{values['classes']} classes, an accuracy of {values['accuracy']:g}")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("weights that are not finite")
        network = Network(values["size"], values["channels"], values["classes"])
        network.load_state_dict(tensors)
    except (DataError, KeyError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(f"{where} is not an evaluator ({reason}); {remedy}") from None
    return Evaluator(**values, network=network.eval(), rotations=learned == ROTATIONS)


LOADER = Loader("*.safetensors", "*.safetensors", from_bytes, "fit an evaluator, or correct its path", most=2**28)  # it has some MB


def _convolution(width_in: int, width_out: int) -> list[nn.Module]:
    return [nn.Conv2d(width_in, width_out, 3, padding=1, bias=False), nn.BatchNorm2d(width_out), nn.SiLU()]


def _to_input(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1.0


def _fresh(images: NDArray[np.uint8], classes: int, epochs: int, seed: int, name: str) -> Evaluator:
    """An evaluator that has learned nothing yet. Raises DataError for images that none takes."""
    size, channels = images.shape[1], images.shape[3]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(size, channels, classes)
    return Evaluator(name, size, channels, classes, epochs, seed, float("nan"), network)


def _taught(fresh: Evaluator, lesson: Lesson, images: int, device: str) -> Evaluator:
    """The evaluator after the lesson of so many images, but for the held-out fifth, on which it is tested."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(HELD_OUT_SEED))
    held_out, kept = order[: images // HELD_OUT].numpy(), order[images // HELD_OUT :].numpy()
    copies = TURNS if fresh.rotations else 1
    _train(fresh.network.to(device), lesson, kept, BATCH // copies, fresh.epochs, fresh.seed, device)
    fresh.network.cpu()
    right = []
    for start in range(0, len(held_out), AT_A_TIME // copies):
        shown, expected = lesson(held_out[start : start + AT_A_TIME // copies])
        right.append(fresh.features(shown)[1].argmax(axis=1) == expected)
    return replace(fresh, accuracy=float(np.mean(np.concatenate(right))))


def _train(network: Network, lesson: Lesson, kept: NDArray[np.int64], batch: int, epochs: int, seed: int, device: str) -> None:
    """AdamW with a one-cycle learning rate on the rows `kept`; batches in the order of a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, len(kept))
    steps = len(kept) // batch  # the remainder of an epoch is left out: batch norm wants full batches
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=epochs * steps)
    network.train()
    for _ in range(epochs):
        order = kept[torch.randperm(len(kept), generator=generator).numpy()]
        for step in range(steps):
            images, targets = lesson(order[step * batch : (step + 1) * batch])
            _, logits = network(_to_input(images).to(device))
            loss = F.cross_entropy(logits, torch.from_numpy(targets).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


def _check_images(images: NDArray[np.uint8], epochs: int, name: str) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2]:
        raise DataError(
            f"an evaluator is trained on square images uint8 (N, H, W, C), not {images.dtype} {images.shape}; decode them first"
        )
    check_shape(images.shape[1], images.shape[3])
    if len(images) < 2 * HELD_OUT:
        raise DataError(f"{len(images)} images are too few to train and test an evaluator; use at least {2 * HELD_OUT}")
    if epochs < 1:
        raise DataError(f"an evaluator needs one epoch or more, not {epochs}; correct evaluate.evaluator_epochs")
    check_name(name)


def _check_labels(images: NDArray[np.uint8], labels: NDArray[np.integer], classes: int) -> None:
    check_shape(images.shape[1], images.shape[3], classes)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{len(images)} images need as many integer labels, not {labels.dtype} {labels.shape}; give one label per image"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"labels {labels.min()} to {labels.max()} do not fit {classes} classes; correct data.classes")


def check_name(name: str) -> None:
    """Raises DataError for what tables cannot call an evaluator."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name.lower().startswith("inception"):
        raise DataError(
            f"{name!r} cannot name an evaluator; use letters, digits, '-', '_' and '.', as evaluate.dataset for example, and leave "
            "'inception' to Inception"
        )


def check_shape(size: int, channels: int, classes: int | None = None) -> None:
    """Raises DataError for images that no evaluator takes; with `classes`, for labels that none learns."""
    if not 8 <= size <= 64 or channels not in (1, 3) or (classes is not None and classes < 2):
        wanted = "8 to 64 pixels per side, 1 or 3 channels" + ("" if classes is None else " and 2 classes or more")
        found = f"{size} pixels, {channels} channels" + ("" if classes is None else f" and {classes} classes")
        raise DataError(
            f"an evaluator takes {wanted}, not {found}; prepare the data so, or set evaluate.extractor to Inception's weights"
        )
