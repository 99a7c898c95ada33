"""Random folders as people have them: what stands there is taken as a person sees it, or counted by a reason, to the last file."""

import io
import os
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from freeguide.cluster.jobs.prepare import prepare
from freeguide.cluster.jobs.score import load_samples
from freeguide.configs.errors import DataError
from freeguide.configs.load import load_config
from freeguide.data_pipeline.index import index_shards
from freeguide.data_pipeline.manifest import Schema
from freeguide.data_pipeline.pictures import find_in, named
from freeguide.data_pipeline.scan import scan_all
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import load_manifest

CONFIG = Path(__file__).parents[2] / "configs" / "image_folder.yaml"
SIZE = 8
LEFT = "hidden files and what systems left"

STEMS = [
    "plain", "with space", " leading", "quote'\"", "new\nline", "tab\there", "-rf", "--help", "a.b.c", "dots..in", "100%", "#",
    "$(x)",     "back\\slash", "emoji 🦜", unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é"), "Twin", "twin",
    "TWIN", "n" * 200, "*", "?", "[a]", "{0..9}", "~", "CON", "\u202eright", "0",
]  # fmt: skip


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


class Maker:
    """Makes files of all kinds, from one seed."""

    def __init__(self, seed: int, one_size: bool) -> None:
        self.random, self.one_size = np.random.default_rng(seed), one_size

    def choice(self, some: list[str]) -> str:
        return some[int(self.random.integers(len(some)))]

    def pixels(self, channels: int) -> np.ndarray:
        side = SIZE if self.one_size else SIZE * int(self.random.integers(1, 5))
        more = (0, 0) if self.one_size else self.random.integers(0, 12, 2) * int(self.random.integers(0, 2))
        high, wide = (side + int(more[0]), side) if self.random.random() < 0.5 else (side, side + int(more[1]))
        return self.random.integers(0, 256, (high, wide, channels), dtype=np.uint8)

    def picture(self, mode: str) -> Image.Image:
        if mode == "P":
            return Image.fromarray(self.pixels(3)).quantize(16)
        if mode == "1":
            return Image.fromarray(self.pixels(1)[..., 0]).convert("1")
        channels = self.pixels(len(mode))
        return Image.fromarray(channels[..., 0] if mode == "L" else channels, mode if mode == "CMYK" else None)

    def good(self) -> tuple[str, bytes]:
        """An extension that fits, and a file that every viewer shows."""
        kinds: dict[str, Callable[[], tuple[Image.Image, str, dict[str, object]]]] = {
            "png": lambda: (self.picture(self.choice(["RGB", "L", "LA", "RGBA", "P", "1"])), "PNG", {}),
            "jpg": lambda: (
                self.picture(self.choice(["RGB", "L"])),
                "JPEG",
                {"progressive": self.random.random() < 0.5, "quality": int(self.random.integers(20, 101))},
            ),
            "jpeg": lambda: (self.picture("CMYK"), "JPEG", {"restart_marker_blocks": 1}),
            "webp": lambda: (self.picture(self.choice(["RGB", "RGBA"])), "WEBP", {"lossless": self.random.random() < 0.5}),
            "gif": lambda: (self.picture("P"), "GIF", {"save_all": True, "append_images": [self.picture("P")]}),
            "bmp": lambda: (self.picture(self.choice(["RGB", "L", "1"])), "BMP", {}),
            "tif": lambda: (
                self.picture(self.choice(["RGB", "L", "CMYK", "RGBA"])),
                "TIFF",
                {"save_all": True, "append_images": [self.picture("RGB")], "compression": self.choice(["raw", "tiff_lzw"])},
            ),
            "mpo": lambda: (self.picture("RGB"), "MPO", {"save_all": True, "append_images": [self.picture("RGB")]}),
        }
        ext = self.choice(list(kinds))
        image, codec, options = kinds[ext]()
        if codec in ("JPEG", "PNG", "WEBP") and self.random.random() < 0.4:
            exif = Image.Exif()
            exif[274] = int(self.random.integers(0, 10))  # 0 and 9 mean nothing
            options["exif"] = exif
        if image.mode == "P" and codec == "PNG" and self.random.random() < 0.5:
            options["transparency"] = int(self.random.integers(16))
        image.save(out := io.BytesIO(), codec, **options)
        return f".{ext}", out.getvalue()

    def bad(self) -> tuple[str, bytes]:
        """What is called a picture and cannot be read as one."""
        deep = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(8 * 49)))
        huge = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b""))
        Image.fromarray(self.random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(out := io.BytesIO(), "JPEG")
        jpeg = out.getvalue()
        kinds = {
            ".png": b"",
            ".PNG": b"\x89PNG\r\n\x1a\n" + deep + chunk(b"IEND", b""),
            ".apng": b"\x89PNG\r\n\x1a\n" + huge + chunk(b"IEND", b""),
            ".jpg": b"<!DOCTYPE html><html>404</html>",
            ".jpeg": jpeg[: len(jpeg) // 2] + b"\xff\xd9",
            ".jfif": jpeg[: len(jpeg) // 3],
            ".heic": b"\0\0\0\x18ftypheic" + bytes(99),
            ".nef": b"MM\0*" + bytes(99),
            ".gif": b"version https://git-lfs.github.com/spec/v1\n",
            ".tiff": self.random.bytes(300),
        }
        ext = self.choice(list(kinds))
        return ext, kinds[ext]


def seen(data: bytes) -> np.ndarray:
    """What a person sees, read with Pillow alone, in the middle square, each new pixel the mean of what it covers."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        pixels = np.asarray(upright.convert("RGB"), np.int64)
    side = min(pixels.shape[:2])
    top, left, ratio = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2, side // SIZE
    assert ratio * SIZE == side
    square = pixels[top : top + side, left : left + side].reshape(SIZE, ratio, SIZE, ratio, 3)
    return np.rint(square.sum((1, 3)) / ratio**2).astype(np.uint8)


class Tree:
    """A folder that is filled, and what should be made of it."""

    def __init__(self, root: Path, maker: Maker) -> None:
        self.root, self.maker = root, maker
        self.taken: Counter[tuple[str, bytes]] = Counter()  # (class, pixels)
        self.passed: Counter[str] = Counter()
        root.mkdir()

    def free(self, folder: Path, ext: str) -> Path:
        while True:
            path = folder / (self.maker.choice(STEMS) + str(self.maker.random.integers(100)) + ext)
            if not os.path.lexists(path):
                return path

    def fill(self, name: str, folder: Path, depth: int = 0) -> None:
        folder.mkdir()
        make = self.maker
        for _ in range(int(make.random.integers(1, 6))):
            self.add_picture(name, folder)
        if not make.one_size:
            for _ in range(int(make.random.integers(0, 5))):
                self.add_other(folder)
        for ext, kind in (
            (".txt", ".txt"),
            (".json", ".json"),
            ("", "no extension"),
            (".weird", ".weird"),
            (".é", "other extensions"),
        ):
            if make.random.random() < 0.3:
                path = self.free(folder, ext)
                if "." in path.name and not ext:
                    continue  # the name has an extension of its own
                path.write_bytes(make.random.bytes(20) if make.random.random() < 0.8 else b"")
                self.passed[kind] += 1
        for left in (".DS_Store", "Thumbs.db", "._x.png", "desktop.ini"):
            if make.random.random() < 0.2:
                (folder / left).write_bytes(b"\x89PNG\r\n\x1a\n")
                self.passed[LEFT] += 1
        if make.random.random() < 0.15:  # a whole folder of droppings counts once
            (folder / "__MACOSX").mkdir()
            (folder / "__MACOSX" / "0.png").write_bytes(make.good()[1])
            self.passed[LEFT] += 1
        if make.random.random() < 0.15:
            os.mkfifo(self.free(folder, ".png"))
            self.passed["pipes and devices"] += 1
        if make.random.random() < 0.15:
            self.free(folder, "").symlink_to(self.root)
            self.passed["links that lead back"] += 1
        if depth < 4 and make.random.random() < 0.4:
            self.fill(name, self.free(folder, make.choice(["", ".png", ".d"])), depth + 1)

    def add_picture(self, name: str, folder: Path) -> None:
        ext, data = self.maker.good()
        ext = self.maker.choice([ext, ext, ext.upper(), "", ".png", ".jpg", ".dat", ".unknown"])
        path = self.free(folder, ext)
        if self.maker.random.random() < 0.1:  # it stands elsewhere
            real = self.root.parent / "elsewhere" / str(len(os.listdir(self.root.parent / "elsewhere")))
            real.write_bytes(data)
            path.symlink_to(real)
        else:
            path.write_bytes(data)
        self.taken[name, seen(data).tobytes()] += 1

    def add_other(self, folder: Path) -> None:
        ext, data = self.maker.bad()
        path = self.free(folder, ext)
        if self.maker.random.random() < 0.2:
            path.symlink_to(self.root.parent / "nowhere")
        else:
            path.write_bytes(data)
        self.passed["cannot be read"] += 1


def check(seed: int, place: Path, said: Callable[[], str]) -> None:
    make = Maker(seed, one_size=seed % 3 == 0)
    (place / "elsewhere").mkdir(parents=True)
    tree = Tree(place / "images", make)
    names = [f"{make.choice(STEMS)}{number}" for number in range(int(make.random.integers(1, 5)))]
    for name in names:
        tree.fill(named(name), tree.root / name)
    total = sum(tree.taken.values())
    overrides = [
        f"data.path={tree.root}",
        f"data.uri={place / 'data'}",
        f"data.image_size={SIZE}",
        "data.resize=area",
        "data.bad_images=0.99",
        "data.shard_samples=7",
    ]
    said()
    manifest = prepare(load_config(CONFIG, overrides, "prepare"))
    text = said()
    assert manifest.passed_over == {kind: tree.passed[kind] for kind in tree.passed}
    assert manifest.samples == total
    assert text.count("\nleft out: ") + text.startswith("left out: ") == tree.passed["cannot be read"]
    assert f"{total} image" in text
    assert manifest.schema.class_names == tuple(map(named, sorted(names)))
    store = open_store(str(place / "data"))
    images, labels = scan_all(store, manifest)
    classes = manifest.schema.class_names
    found = Counter((classes[label], image.tobytes()) for image, label in zip(images, labels.tolist(), strict=True))
    assert found == tree.taken  # to the pixel
    store.delete("manifest.json")
    indexed, broken = index_shards(store, Schema(SIZE, 3, manifest.schema.classes), report=lambda line: None)
    assert (indexed.samples, broken, indexed.passed_over) == (total, [], {})
    assert load_manifest(store).samples == total
    scored = find_in(open_store(str(tree.root)))
    bad = tree.passed["cannot be read"]
    assert len(scored.files) == total + bad
    assert scored.passed_over == {kind: count for kind, count in tree.passed.items() if kind != "cannot be read"}
    samples, refused = None, ""
    try:
        samples = load_samples(str(tree.root), 3)
    except DataError as error:  # one is damaged, or they are of several sizes
        refused = str(error)
    assert "\n" not in refused
    assert refused == "" or not make.one_size, refused
    if samples is not None and samples.images.shape[1:3] == (SIZE, SIZE):
        assert samples.labels is not None
        pairs = zip(samples.images, samples.labels.tolist(), strict=True)
        assert Counter((samples.names[label], image.tobytes()) for image, label in pairs) == tree.taken


@pytest.mark.parametrize("seed", range(6))
def test_a_random_folder_adds_up_to_the_last_file(seed: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check(seed, tmp_path / "x", lambda: capfd.readouterr().out)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_hundreds_of_random_folders_add_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for seed in range(6, 306):
        try:
            check(seed, tmp_path / str(seed), lambda: capfd.readouterr().out)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
