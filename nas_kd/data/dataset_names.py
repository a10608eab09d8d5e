"""Which datasets there are, and which one is meant. Standard library only, so that a wrong name is told at once."""

from __future__ import annotations

from nas_kd.errors import DataError, nearest

DIGITS = "digits"
FOLDER = "folder"
WDS = "wds"
FOLDERS = ("", FOLDER, "imagefolder", "image_folder", "torch/folder", "torch/image_folder")
# timm.data.create_dataset's torchvision names
TORCH = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist", "places365", "imagenet", "folder",
         "image_folder")  # fmt: skip
_STREAMS = ("hfds", "hfids", "tfds")


def choose_dataset(dataset: str | None, data_dir: str | None) -> str:
    """The dataset that is meant: a folder alone holds image folders, and without any it is the digits.

    Raises DataError for a folder beside a dataset that reads none, so that nobody trains on other images than those
    pointed at.

    >>> choose_dataset(None, "my_images"), choose_dataset(None, None), choose_dataset("torch/cifar10", "DIR")
    ('folder', 'digits', 'torch/cifar10')
    """
    if data_dir is not None and not data_dir.strip():
        raise DataError("--data-dir is empty: give the folder with the images, or leave it out")
    if dataset is None:
        return DIGITS if data_dir is None else FOLDER
    if dataset.lower().partition("/")[0] == WDS:  # timm's wds/NAME: the folder says all
        return WDS
    if dataset.lower() != DIGITS:
        return FOLDER if dataset.lower() in FOLDERS else dataset
    if data_dir is not None:
        raise DataError(f"--dataset digits reads no folder, but --data-dir is {data_dir!r}: leave one of them out")
    return DIGITS


def check_name(dataset: str) -> None:
    """Raises DataError when no dataset has this name; loads nothing."""
    prefix, slash, rest = dataset.lower().partition("/")
    if prefix in _STREAMS and slash:
        raise DataError(f"{dataset!r} is a stream: save its images as folders, one per class, and give --data-dir")
    if slash and prefix == "torch" and rest in TORCH:
        return
    if not slash and prefix in (DIGITS, WDS, *FOLDERS):
        return
    known = (DIGITS, WDS, *FOLDERS[1:4], *(f"torch/{name}" for name in TORCH))
    hint = nearest(dataset, known) or nearest(f"torch/{dataset}", known)
    raise DataError(f"unknown dataset {dataset!r}: use {DIGITS}, folder, {WDS}, or one of timm's torch/ names{hint}")
