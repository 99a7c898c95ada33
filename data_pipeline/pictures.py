"""People's own folders: which files are pictures, which folders are classes, and what is passed over.

The bytes decide what is a picture. Only if an extension leaves it open are they looked at; what is not one is counted by its
kind and never forgotten. Names may have any bytes: they are kept as the system gives them and shown as `named` shows them.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from freeguide.configs.errors import DataError, visible
from freeguide.data_pipeline.store.base import Store
from freeguide.data_pipeline.store.folder import FolderStore

PICTURES = {
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".mpo", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
}  # fmt: skip
# Pictures too, but none that could be read: taken, so that reading them says so.
UNREAD = {".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".psd"}
# Of cameras: they hold a small preview as TIFF, which is not the picture.
RAW = {".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".orf", ".rw2", ".pef", ".raf", ".srw"}
# No picture, without a look at the bytes.
OTHERS = {
    ".txt", ".md", ".rst", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".csv", ".tsv", ".html", ".htm", ".svg", ".pdf",
    ".log", ".py", ".ipynb", ".mat", ".npy", ".npz", ".pkl", ".pt", ".pth", ".safetensors", ".parquet", ".tar", ".tgz",
    ".gz", ".zst", ".zip", ".mp4", ".mov", ".avi", ".mp3", ".wav", ".url", ".lnk", ".db", ".ini",
}  # fmt: skip
SNIFF_BYTES = 32
MAGIC = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP|GIF8[79]a|BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0{3}|II[*+]\0|MM\0[*+]"
    rb"|....ftyp(?:hei|hev|mif|msf|avi)|\0\0\0\x0c(?:jP  |JXL )|\xff\x4f\xff\x51|8BPS",
    re.DOTALL,
)
DROPPINGS = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "lost+found", "$recycle.bin", "system volume information",
}  # fmt: skip
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
READERS = 16  # files whose first bytes are read at a time
MOST_FOLDERS = 200  # one inside the other
ASKED = "data.class_depth="  # how `prepare` is told the depth of the classes


def is_dropping(path: str) -> bool:
    """Whether a system or a tool left it there: a hidden file, or what macOS, Windows, a NAS or an archive adds."""
    return any(part.lower() in DROPPINGS or (part.startswith(".") and part not in (".", "..")) for part in path.split("/") if part)


def named(path: str | Path) -> str:
    """A path for sentences and tables: bytes that are not UTF-8 as \\xe9, and nothing that moves the cursor."""
    return visible(os.fsencode(path).decode("utf-8", "backslashreplace"))


@dataclass(frozen=True)
class File:
    path: str  # below the folder, with /
    bytes: int
    label: int = 0


@dataclass(frozen=True)
class Found:
    files: tuple[File, ...]  # class by class, by their paths
    classes: tuple[str, ...]  # names, as `named` shows them; none if there are no class folders
    empty: tuple[str, ...]  # class folders without a picture
    flat: bool  # whether there are no class folders, and all pictures are of one class
    folders: int  # below the root
    passed_over: dict[str, int]  # by kind


def find(root: Path, extensions: set[str] = PICTURES, depth: int = 1, names: Sequence[str] = ()) -> Found:
    """The pictures below `root` with the numbers of their classes, the folders `depth` levels down (0: no classes).

    Classes are numbered by their sorted names, or as in `names`. With other extensions than those of pictures, exactly they are
    taken. Raises DataError if a folder cannot be read, or nobody could tell what the classes are.
    """
    paths, folders, passed = _listed(root)
    taken = _pictures(paths, passed, extensions, lambda file: _is_picture(root / file.path))
    return _classified(named(root), taken, folders, passed, depth, names, ASKED)


def find_in(store: Store, depth: int = 1) -> Found:
    """`find` in a folder or below a prefix of a bucket, for `freeguide score`. Raises DataError, StoreError."""
    if isinstance(store, FolderStore):
        root = store.folder
        paths, folders, passed = _listed(root)
        taken = _pictures(paths, passed, PICTURES, lambda file: _is_picture(root / file.path))
        return _classified(named(root), taken, folders, passed, depth, (), "--class-depth ")

    def is_picture(file: File) -> bool:
        return MAGIC.match(store.get_range(file.path, 0, min(SNIFF_BYTES, file.bytes)) if file.bytes else b"") is not None

    infos = store.list()
    paths = [(info.key, info.bytes) for info in infos if not is_dropping(info.key)]
    passed = Counter({"hidden files and what systems left": len(infos) - len(paths)})
    folders = sorted({path[:at] for path, _ in paths for at, sign in enumerate(path) if sign == "/"})
    taken = _pictures(paths, passed, PICTURES, is_picture)
    return _classified(store.uri, taken, folders, passed, depth, (), "--class-depth ")


def _pictures(
    paths: list[tuple[str, int]], passed: Counter[str], extensions: set[str], is_picture: Callable[[File], bool]
) -> list[File]:
    """Those of the files that are pictures; the others are counted in `passed`."""
    taken, sniffed, raw = [], [], extensions is PICTURES
    for path, size in paths:
        ext = os.path.splitext(path)[1].lower()
        if ext in extensions or (raw and ext in UNREAD | RAW):
            taken.append(File(path, size))
        elif raw and ext not in OTHERS:
            sniffed.append(File(path, size))
        else:
            passed[_kind(path)] += 1
    with ThreadPoolExecutor(READERS) as pool:
        for file, yes in zip(sniffed, pool.map(is_picture, sniffed), strict=True):
            if yes:
                taken.append(file)
            else:
                passed[_kind(file.path)] += 1
    return taken


def _classified(
    where: str, taken: list[File], folders: list[str], passed: Counter[str], depth: int, names: Sequence[str], asked: str
) -> Found:
    """The pictures by their classes; `asked` is how the user gives the depth."""
    inside = [file for file in taken if file.path.count("/") >= depth]
    counted = {kind: passed[kind] for kind in sorted(passed) if passed[kind]}
    if depth == 0 or (depth == 1 and taken and not inside):
        return Found(tuple(sorted(taken, key=lambda file: file.path.split("/"))), (), (), True, len(folders), counted)
    if len(inside) < len(taken):
        beside = min(file.path for file in taken if file.path.count("/") < depth)
        raise DataError(
            f"{where} holds {len(taken) - len(inside)} images beside its class folders, such as {named(beside)}; move them, or set "
            f"{asked}0 to take all images as one class"
        )
    classes = {"/".join(file.path.split("/")[:depth]) for file in inside}
    _check_classes(where, classes, depth, names)
    above = {"/".join(name.split("/")[:level]) for name in classes for level in range(1, depth + 1)}
    empty = tuple(name for name in folders if name.count("/") < depth and name not in above)
    order = {named(name): number for number, name in enumerate(sorted(classes))}
    if names:
        order = {name: number for number, name in enumerate(names)}
    labelled = [File(file.path, file.bytes, order[named("/".join(file.path.split("/")[:depth]))]) for file in inside]
    labelled.sort(key=lambda file: (file.label, file.path.split("/")))
    return Found(tuple(labelled), tuple(order), empty, False, len(folders), counted)


def count_of(passed_over: Mapping[str, int]) -> str:
    """The kinds, the most frequent first: ".txt 12, no extension 3"."""
    return ", ".join(f"{kind} {count}" for kind, count in sorted(passed_over.items(), key=lambda pair: (-pair[1], pair[0])))


def without_pictures(labels: Iterable[int], classes: int) -> str:
    """The first classes that have no label, and what to do if it is only that labels begin at 1; "" if each has one."""
    there = set(labels)
    lacking = list(itertools.islice((label for label in range(classes) if label not in there), 6)) if classes > len(there) else []
    begin = "; if labels begin at 1, list them in data.class_names, one a line" if lacking[:1] == [0] else ""
    return f"{', '.join(map(str, lacking[:5]))}{', ...' if len(lacking) > 5 else ''}{begin}"


def _check_classes(where: str, classes: set[str], depth: int, names: Sequence[str]) -> None:
    if depth == 1 and not names and classes and all(name.lower() in SPLITS for name in classes):
        parts = sorted(map(named, classes), key=lambda name: (not name.lower().startswith("train"), name))
        raise DataError(
            f"{where} holds {' and '.join(parts)}, parts of a data set and not classes; name one of them, data.path={where}/"
            f"{parts[0]}, or, if these are classes, list them with data.class_names"
        )
    alike = Counter(name.lower() for name in classes)
    same = sorted(name for name in classes if alike[name.lower()] > 1)
    if same:
        raise DataError(f"{where} has class folders that differ in capitals only: {listed(same)}; merge or rename them")
    if names and (wrong := sorted({named(name) for name in classes} ^ set(names))):
        raise DataError(
            f"The class folders of {where} and data.class_names differ in {listed(wrong)}; list every class folder once, and no "
            "other"
        )


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first names of many."""
    return ", ".join(map(named, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _listed(root: Path) -> tuple[list[tuple[str, int]], list[str], Counter[str]]:
    """Every file below root with its size, every folder, and what is passed over. Links are followed, loops are not."""
    files: list[tuple[str, int]] = []
    folders: list[str] = []
    passed: Counter[str] = Counter()
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while waiting:
        place, above = waiting.pop()
        try:
            status = os.stat(root / place)
            here = (status.st_dev, status.st_ino)
            if here in above:
                passed["links that lead back"] += 1
                continue
            if len(above) > MOST_FOLDERS:
                raise DataError(f"{named(root / place)[:200]}... is deeper than {MOST_FOLDERS} folders; check data.path")
            with os.scandir(root / place) as entries:
                inside = list(entries)
        except OSError as error:
            raise DataError(
                f"The folder {visible(named(root / place), 300)} cannot be read ({error.strerror}); let it be read"
            ) from error
        if place:
            folders.append(place)
        for entry in inside:
            path = f"{place}/{entry.name}" if place else entry.name
            if is_dropping(entry.name):
                passed["hidden files and what systems left"] += 1
            elif entry.is_dir():
                waiting.append((path, (*above, here)))
            else:
                try:
                    status = entry.stat()
                except OSError:  # a link to nothing: it counts as a file, so that whoever reads it says so
                    files.append((path, -1))
                    continue
                if stat.S_ISREG(status.st_mode):
                    files.append((path, status.st_size))
                else:
                    passed["pipes and devices"] += 1
    return files, sorted(folders), passed


def _is_picture(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return MAGIC.match(file.read(SNIFF_BYTES)) is not None
    except OSError:  # whoever reads it says so
        return True


def _kind(path: str) -> str:
    ext = os.path.splitext(path)[1].lower()
    return ext if re.fullmatch(r"[.][a-z0-9_+-]{1,12}", ext) else "other extensions" if ext else "no extension"
