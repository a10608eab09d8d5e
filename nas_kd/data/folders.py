"""Image folders as people have them: which folder is which split, which are the classes, and what is neither."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from timm.utils.misc import natural_key

from nas_kd.data.pictures import readable_suffixes
from nas_kd.errors import DataError, nearest

Sample = tuple[Path, str]  # an image and the name of its class
_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tests"),
}
_UNCLEAR = ("trainval", "holdout", "unlabeled", "unlabelled", "pred", "prediction", "predictions")
_PARTS = ("", "set", "data", "images", "imgs")  # trainset, testdata
_WORDS = {word + part: kind for kind, words in _SPLITS.items() for word in words for part in _PARTS}
_SPLIT_LIKE = frozenset({*_WORDS, *(word + part for word in _UNCLEAR for part in _PARTS)})
# words beside these that do not tell one folder from another
_NOISE = frozenset("set data dataset images image imgs img split folder pictures pics photos samples".split())
# the name of a folder that merely gathers images
_NO_CLASS = frozenset(
    {*_NOISE, *_SPLIT_LIKE, "all", "unknown", "jpeg", "jpegs", "jpg", "png"}
)  # alone in a test folder
_SYSTEM = frozenset({"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """What a folder holds: the images of each split with their classes, and lines about what was left out."""

    train: tuple[Sample, ...]
    val: tuple[Sample, ...] | None = None
    test: tuple[Sample, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the training images in timm's order, in which 2 comes before 10 and case does not count."""
        return tuple(sorted({name for _, name in self.train}, key=lambda name: (natural_key(name), name)))


@dataclass(frozen=True, slots=True)
class _Branch:
    """One folder of classes: the images of each, and those that lie beside them."""

    folder: Path
    classes: Mapping[str, Sequence[Path]]
    loose: Sequence[Path]

    @property
    def samples(self) -> tuple[Sample, ...]:
        found = ((path, name) for name, paths in self.classes.items() for path in paths)
        return tuple(sorted(found, key=lambda sample: natural_key(str(sample[0]))))

    @property
    def size(self) -> int:
        return len(self.loose) + sum(map(len, self.classes.values()))


@dataclass(frozen=True, slots=True)
class _Notes:
    """What is left out: lines, and counts by reason."""

    lines: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def summary(self, root: Path) -> tuple[str, ...]:
        parts = [f"{reason}: {count}" for reason, count in sorted(self.skipped.items())]
        return (*self.lines, *([f"skipped in {root}: {', '.join(parts)}"] if parts else []))


def read_tree(root: Path) -> Tree:
    """Reads the folders below `root`, opening no image.

    A class is the first folder below the split, or below `root` where there are no splits, whatever lies deeper.
    Splits go by any usual name; a test or validation folder without classes is left out, unless a list in it
    (`*annotations.txt`) names them. Raises DataError for folders that look like splits and cannot be told, for one
    class alone, and for a folder without images.
    """
    kinds = _kinds(_folders_in(root))
    notes = _Notes()
    splits = [(kind, _look(_unwrapped(child), notes)) for child, kind in kinds.items()]
    if any(kind == "train" and branch.classes for kind, branch in splits):
        _check_others(root, kinds, notes)
        tree = _split_tree(root, splits, notes)
    elif (inner := _only_child(root)) is not None and "train" in _kinds(_folders_in(inner)).values():
        return read_tree(inner)
    else:
        tree = _flat_tree(root, kinds)
    if len(tree.classes) < 2:
        raise DataError(f"{root} has images of one class, {tree.classes[0]!r}: put those of others beside it")
    return tree


def _check_others(root: Path, kinds: Mapping[Path, str], notes: _Notes) -> None:
    """Raises DataError for folders beside the splits that look like splits; notes the others that hold images."""
    for child in (child for child in _folders_in(root, notes) if child not in kinds and _has_images(child)):
        if _is_split_like(child.name) and _class_folders(child):
            raise _unclear(child)
        notes.lines.append(f"{child} is left out: it is no split")


def _split_tree(root: Path, splits: Sequence[tuple[str, _Branch]], notes: _Notes) -> Tree:
    train = _one([branch for kind, branch in splits if kind == "train" and branch.classes])
    notes.skipped["images outside of class folders"] += len(train.loose)
    names = set(train.classes)
    val, test = (
        _held_out([branch for kind, branch in splits if kind == part], names, notes) for part in ("val", "test")
    )
    return Tree(train=train.samples, val=val, test=test, notes=(_Notes(notes.lines, +notes.skipped)).summary(root))


def _one(branches: Sequence[_Branch]) -> _Branch:
    if len(branches) > 1:
        raise DataError(
            f"{branches[0].folder} and {branches[1].folder} are both named like the same split: keep one of them"
        )
    return branches[0]


def _held_out(branches: Sequence[_Branch], classes: set[str], notes: _Notes) -> tuple[Sample, ...] | None:
    """The labelled images of a validation or test split; None where there is none."""
    branches = [_with_list(branch, notes) for branch in branches]
    labelled = [branch for branch in branches if _is_labelled(branch, classes)]
    for branch in branches:
        if branch not in labelled and branch.size:
            notes.lines.append(f"{branch.folder} is left out: its {branch.size} images have no classes")
    if not labelled:
        return None
    branch = _one(labelled)
    notes.skipped["images outside of class folders"] += len(branch.loose)
    if unknown := sorted(set(branch.classes) - classes):
        hint = nearest(unknown[0], classes)
        raise DataError(f"the class {unknown[0]!r} has images in {branch.folder} but no images in train{hint}")
    return branch.samples


def _is_labelled(branch: _Branch, classes: set[str]) -> bool:
    """Whether the folders of a split are classes, not one that merely gathers its images."""
    names = set(branch.classes)
    return bool(names & classes) or len(names) > 1 or any(name.lower() not in _NO_CLASS for name in names)


def _flat_tree(root: Path, kinds: Mapping[Path, str]) -> Tree:
    """Class folders without splits."""
    notes = _Notes()
    whole = _look(root, notes)
    classes = dict(whole.classes)
    for child in _folders_in(root):
        kind = kinds.get(child)
        if (kind or _is_split_like(child.name)) and _class_folders(child):
            raise _unclear(child, without_train=kind is not None)
        if kind in ("val", "test") and (images := classes.pop(child.name, ())):
            notes.lines.append(f"{child} is left out: its {len(images)} images have no classes")
    if not classes or all(kinds.get(root / name) == "train" for name in classes):
        where = (
            f"the {whole.size} images in {root} lie in no class folder"
            if whole.size
            else (f"no images (.jpg, .png, whatever Pillow reads) in {root}")
        )
        if any(root.glob("*.tar")):
            raise DataError(f"{where}, but archives: --dataset wds reads WebDataset shards, others are to be unpacked")
        raise DataError(f"{where}: put them into one folder per class")
    notes.skipped["images outside of class folders"] += len(whole.loose)
    notes.lines.extend(
        f"the folder {child.name!r} of {root} holds no images: it is no class"
        for child in _folders_in(root)
        if child.name not in whole.classes
    )
    samples = _Branch(root, classes, ()).samples
    return Tree(train=samples, notes=_Notes(notes.lines, +notes.skipped).summary(root))


def _unclear(child: Path, *, without_train: bool = False) -> DataError:
    if without_train:
        return DataError(f"{child.parent} has a folder {child.name!r} but none of train, training, …: name that one so")
    return DataError(
        f"{child} looks like a split, and cannot be told: name the splits train, val and test, or take it elsewhere"
    )


def _kinds(children: Sequence[Path]) -> dict[Path, str]:
    """Which of the folders are which splits: by words of their names, where the other words say nothing or are those
    of the training folder too (seg_train beside seg_test)."""
    read = {child: _read_name(child.name) for child in children}
    shared = [rest for kind, rest in read.values() if kind == "train" and rest]
    shared = [rest for rest in shared if [other for _, other in read.values()].count(rest) > 1]
    return {child: kind for child, (kind, rest) in read.items() if kind and (not rest or rest in shared)}


def _read_name(name: str) -> tuple[str, tuple[str, ...]]:
    """The split that a name speaks of, if it is one alone, and the words of it that say something else."""
    words = _words(name)
    found = [_WORDS[word] for word in words if word in _WORDS]
    rest = tuple(word for word in words if word not in _WORDS and word not in _NOISE)
    if not any(word.isalpha() for word in rest):
        rest = rest if any(len(word) > 1 for word in rest) else ()  # test1; but train_2017 is one of a pair
    return (found[0] if len(found) == 1 else ""), rest


def split_of(name: str) -> str:
    """The split that a name speaks of, `train`, `val` or `test`; empty where it is none or not one alone."""
    return _read_name(name)[0]


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W\d_]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def _is_split_like(name: str) -> bool:
    return any(word in _SPLIT_LIKE for word in _words(name))


def _look(folder: Path, notes: _Notes) -> _Branch:
    """The classes of a folder: its own folders that hold images."""
    classes = {child.name: list(_images_below(child, notes)) for child in _folders_in(folder)}
    loose = list(_images_below(folder, notes, deep=False))
    return _Branch(folder, {name: paths for name, paths in classes.items() if paths}, loose)


def _images_below(folder: Path, notes: _Notes, *, deep: bool = True, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The image files of a folder, at any depth; folders that links lead back to are entered once."""
    place = os.path.realpath(folder)
    if place in above:
        return
    suffixes = readable_suffixes()
    for path in _visible(folder, notes):
        if path.is_dir():
            if deep:
                yield from _images_below(path, notes, above=(*above, place))
        elif path.suffix.lower() in suffixes:
            yield path
        elif deep:  # beside the classes there may be lists and descriptions
            notes.skipped[f"{path.suffix.lower() or 'other'} files"] += 1


def _visible(folder: Path, notes: _Notes) -> Iterator[Path]:
    """What lies in a folder but for hidden and system entries and dead links."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    for path in entries:
        if path.name.startswith(".") or path.name in _SYSTEM:
            notes.skipped["hidden and system entries"] += 1
        elif not path.exists():
            notes.skipped["dead links"] += 1
        else:
            yield path


def _folders_in(folder: Path, notes: _Notes | None = None) -> list[Path]:
    return [path for path in _visible(folder, notes or _Notes()) if path.is_dir()]


def _has_images(folder: Path) -> bool:
    return next(_images_below(folder, _Notes()), None) is not None


def _class_folders(folder: Path) -> list[Path]:
    """The folders of a split, or of what looks like one, that may be classes."""
    found = [child for child in _folders_in(_unwrapped(folder)) if _has_images(child)]
    return found if any(child.name.lower() not in _NO_CLASS for child in found) else []


def _only_child(root: Path) -> Path | None:
    children = _folders_in(root)
    return children[0] if len(children) == 1 else None


def _unwrapped(folder: Path) -> Path:
    """The folder of the same name inside, where an archive has wrapped it so (seg_train/seg_train)."""
    inner = folder / folder.name
    return inner if inner.is_dir() and len(_folders_in(folder)) == 1 else folder


def _with_list(branch: _Branch, notes: _Notes) -> _Branch:
    """The split with the classes that a list in it gives to its images, as Tiny-ImageNet has it."""
    lists = sorted(branch.folder.glob("*annotations.txt"))
    if not lists:
        return branch
    named = _read_list(lists[0])
    classes: dict[str, list[Path]] = {}
    for path in (*branch.loose, *(path for paths in branch.classes.values() for path in paths)):
        if path.name in named:
            classes.setdefault(named[path.name], []).append(path)
        else:
            notes.skipped[f"images that {lists[0].name} does not name"] += 1
    return replace(branch, classes=classes, loose=())


def _read_list(path: Path) -> dict[str, str]:
    """File name to class, by the first two columns of a list."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    rows = [re.split(r"[\t, ]+", line.strip()) for line in lines if line.strip()]
    if short := next((number for number, row in enumerate(rows, 1) if len(row) < 2), 0):
        raise DataError(f"{path} names no class in line {short}: write a file's name, a tab and its class")
    return {row[0]: row[1] for row in rows}
