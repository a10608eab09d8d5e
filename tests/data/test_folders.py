"""Image folders as people have them, read without opening an image."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from nas_kd.data.folders import Tree, read_tree
from nas_kd.errors import DataError

Put = Callable[..., Path]
PAIR = ("cat", "dog")


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Makes empty files below the root: `put("train", "cat", count=2, suffix=".png")`."""

    def make(*folders: str, count: int = 2, suffix: str = ".jpg") -> Path:
        folder = tmp_path.joinpath(*folders)
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            (folder / f"{folder.name}{index}{suffix}").touch()
        return tmp_path

    return make


def splits(put: Put, **counts: tuple[str, int]) -> Path:
    """Splits of cats and dogs: `splits(put, train=("Training", 3))`."""
    for folder, count in counts.values():
        for name in PAIR:
            root = put(*folder.split("/"), name, count=count)
    return root


def sizes(tree: Tree) -> tuple[int | None, ...]:
    return tuple(None if part is None else len(part) for part in (tree.train, tree.val, tree.test))


def labels(samples: Iterable[tuple[Path, str]]) -> list[str]:
    return [name for _, name in samples]


@pytest.mark.parametrize("train", ["train", "Training", "TRAIN", "train_set", "trainset", "TrainingData", "img_train"])
@pytest.mark.parametrize("test", ["test", "Testing", "test-set", "TestImages", "test1"])
def test_splits_go_by_any_usual_name(put: Put, train: str, test: str) -> None:
    assert sizes(read_tree(splits(put, a=(train, 3), b=(test, 1)))) == (6, None, 2)


@pytest.mark.parametrize("val", ["val", "Valid", "validation", "validation_set", "dev", "eval"])
def test_validation_and_test_are_told_apart(put: Put, val: str) -> None:
    assert sizes(read_tree(splits(put, a=("train", 3), b=(val, 2), c=("test", 1)))) == (6, 4, 2)


def test_a_word_that_all_splits_share_is_none_of_theirs(put: Put) -> None:
    put("seg_pred", "seg_pred", count=5)  # without classes
    tree = read_tree(splits(put, a=("seg_train/seg_train", 3), b=("seg_test/seg_test", 1)))
    assert sizes(tree) == (6, None, 2)
    assert any("seg_pred is left out" in note for note in tree.notes)


def test_a_folder_around_the_splits_is_entered(put: Put) -> None:
    assert sizes(read_tree(splits(put, a=("archive/train", 3), b=("archive/val", 1)))) == (6, 2, None)


def test_a_class_is_the_first_folder_whatever_lies_deeper(put: Put) -> None:
    for name in PAIR:
        for year in ("2023", "2024"):
            put("train", name, year, "raw")
            root = put("test", name, year, count=1)
    tree = read_tree(root)
    assert tree.classes == PAIR
    assert sizes(tree) == (8, None, 4)


def test_without_splits_each_folder_is_a_class(put: Put) -> None:
    for name in ("10", "2", "zebra", "Ant", "train_station", "test_tube", "train"):
        root = put(name)
    tree = read_tree(root)
    assert tree.classes == ("2", "10", "Ant", "test_tube", "train", "train_station", "zebra")
    assert sizes(tree) == (14, None, None)


def test_every_format_counts_and_the_rest_is_told_in_one_line(put: Put) -> None:
    for suffix in (".webp", ".bmp", ".tif", ".TIFF", ".gif", ".JPEG", ".png", ".ppm", ".avif"):
        put("cat", count=1, suffix=suffix)
    for suffix in (".txt", ".heic"):
        put("cat", count=1, suffix=suffix)
    root = put("dog")
    put("dog", ".ipynb_checkpoints")
    put("__MACOSX", "dog")
    (root / "dog" / "._dog0.jpg").touch()
    (root / "cat" / "Thumbs.db").touch()
    os.symlink("/nowhere/x.jpg", root / "cat" / "dead.jpg")
    (root / "loose.jpg").touch()
    tree = read_tree(root)
    assert labels(tree.train) == ["cat"] * 9 + ["dog"] * 2
    (note,) = tree.notes
    assert note == (
        f"skipped in {root}: .db files: 1, .heic files: 1, .txt files: 1, dead links: 1, hidden and system entries: 3, "
        "images outside of class folders: 1"
    )


def test_links_are_followed_but_not_round_and_round(put: Put, tmp_path: Path) -> None:
    put("elsewhere", "photos")
    root = put("root", "dog") / "root"
    os.symlink(tmp_path / "elsewhere" / "photos", root / "cat")
    os.symlink(root / "dog", root / "dog" / "again")
    assert labels(read_tree(root).train) == ["cat"] * 2 + ["dog"] * 2


def test_tiny_imagenet(put: Put) -> None:
    for name in PAIR:
        put("train", name, "images", count=3)
    put("val", "images", count=4)
    root = put("test", "images", count=5)
    lines = [f"images{index}.jpg\t{PAIR[index % 2]}\t0\t0\t62\t62" for index in range(4)]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines))
    tree = read_tree(root)
    assert sizes(tree) == (6, 4, None)
    assert tree.val is not None
    assert {path.name: name for path, name in tree.val} == {f"images{i}.jpg": PAIR[i % 2] for i in range(4)}
    assert tree.notes == (f"{root / 'test'} is left out: its 5 images have no classes",)


def test_a_flat_test_folder_is_left_out(put: Put) -> None:
    put("test", count=7)
    assert sizes(read_tree(splits(put, a=("train", 3), b=("val", 1)))) == (6, 2, None)
    tree = read_tree(splits(put, a=("train", 3)))
    assert any("its 7 images have no classes" in note for note in tree.notes)


def test_a_flat_test_folder_beside_classes_is_none_of_them(put: Put) -> None:
    put("test", count=7)
    tree = read_tree(splits(put, a=(".", 3)))
    assert (tree.classes, sizes(tree)) == (PAIR, (6, None, None))


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (("train", "train_old_2"), "train_old_2 looks like a split, and cannot be told"),
        (("train", "trainval"), "trainval looks like a split"),
        (("train", "Training", "test"), "both named like the same split"),
        (("train", "test", "Testing"), "both named like the same split"),
        (("test",), "has a folder 'test' but none of train"),
        (("val", "test"), "none of train"),
        ((".", "test"), "none of train"),
        ((".", "holdout"), "holdout looks like a split"),
        ((".", "my_test_images"), "my_test_images looks like a split"),
    ],
)
def test_what_cannot_be_told_is_refused(put: Put, folders: tuple[str, ...], said: str) -> None:
    root = splits(put, **{f"s{number}": (folder, 2) for number, folder in enumerate(folders)})
    with pytest.raises(DataError, match=said):
        read_tree(root)


def test_one_class_or_none_is_refused(put: Put, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        read_tree(tmp_path)
    with pytest.raises(DataError, match="images of one class, 'cat'"):
        read_tree(put("cat"))
    with pytest.raises(DataError, match=r"the 3 images in .* lie in no class folder"):
        read_tree(put("flat", count=3) / "flat")


def test_classes_of_another_spelling_are_refused(put: Put) -> None:
    put("test", "Cat")
    with pytest.raises(DataError, match=r"the class 'Cat' has images in .* but no images in train; did you mean 'cat'"):
        read_tree(splits(put, a=("train", 2), b=("test", 1)))


def test_a_list_without_classes_is_refused(put: Put) -> None:
    root = splits(put, a=("train", 2))
    put("val", "images")
    (root / "val" / "val_annotations.txt").write_text("images0.jpg\tcat\nimages1.jpg\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt names no class in line 2"):
        read_tree(root)
