from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence

import pytest

from nas_kd.arguments.augment import AugmentOptions
from nas_kd.arguments.data import DataSettings
from nas_kd.arguments.distill import parse_distill
from nas_kd.arguments.study import noted_settings, parse_study
from nas_kd.data.augment import Augmentation, PhotoAugmentation
from nas_kd.data.mixing import Mixing
from nas_kd.errors import DataError, NasKdError
from nas_kd.learnt_widths.arguments import parse_structure
from nas_kd.preparation.augmenting import augmentation_of, mixing_of
from nas_kd.rank_check.arguments import parse_rank_check
from nas_kd.workers.bundle import Bundle, settings_of

COMMANDS: dict[str, Callable[[Sequence[str]], DataSettings]] = {
    "study": lambda argv: parse_study(["--budget=params=1M", *argv]).data,
    "distill": lambda argv: parse_distill(["resnet18", "--no-teacher", *argv]).data,
    "structure": lambda argv: parse_structure(["--budget=params=1M", *argv]).study.data,
    "rank_check": lambda argv: parse_rank_check(["--budget=params=1M", *argv]).study.data,
}
ALL = (
    "--scale 0.5 0.9 --ratio 0.8 1.2 --train-interpolation bicubic --hflip 0.1 --vflip 0.2 --aa rand-m9-mstd0.5"
    " --reprob 0.25 --remode const --mixup 0.2 --cutmix 1 --mixup-prob 0.9 --mixup-switch-prob 0.3 --smoothing 0.1"
)
FOLDER = ["--dataset=folder", "--data-dir=photos"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_timms_options(command: str) -> None:
    data = COMMANDS[command]([*FOLDER, *ALL.split()])
    assert augmentation_of(data, 128) == PhotoAugmentation(
        scale=(0.5, 0.9), ratio=(0.8, 1.2), interpolation="bicubic", hflip=0.1, vflip=0.2,
        auto_augment="rand-m9-mstd0.5", re_prob=0.25, re_mode="const",
    )  # fmt: skip
    assert mixing_of(data, 7) == Mixing(
        num_classes=7, mixup=0.2, cutmix=1, mixup_prob=0.9, mixup_switch_prob=0.3, smoothing=0.1
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_the_datas_size_and_kind_decide_by_default(command: str) -> None:
    photos, digits = COMMANDS[command](FOLDER), COMMANDS[command]([])
    assert augmentation_of(photos, 64) == PhotoAugmentation()
    assert augmentation_of(photos, 63) == Augmentation()
    assert augmentation_of(digits, 16) == augmentation_of(digits, 128) == Augmentation(flip=False)
    assert mixing_of(photos, 10) is None
    assert photos.augment.text is None


@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        (FOLDER, "--no-aug", Augmentation(shift=0, flip=False)),
        ([], "--no-aug", Augmentation(shift=0, flip=False)),
        (FOLDER, "--color-jitter 0.4", PhotoAugmentation(color_jitter=0.4)),
        (FOLDER, "--hflip 0", PhotoAugmentation(hflip=0)),
        ([], "--hflip 0.5", Augmentation(flip=True)),
        ([], "--scale 0.5 1", PhotoAugmentation(scale=(0.5, 1), hflip=0)),
        ([], "--mixup 0.2", Augmentation(flip=False)),
        (["--dataset=torch/cifar10", "--data-dir=d"], "--hflip 0", Augmentation(flip=False)),
        (["--dataset=torch/cifar10", "--data-dir=d"], "--aa v0", PhotoAugmentation(auto_augment="v0")),
    ],
)
def test_options_change_what_they_name(data: list[str], options: str, expected: object) -> None:
    size = 128 if data == FOLDER else 32
    assert augmentation_of(COMMANDS["study"]([*data, *options.split()]), size) == expected


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--no-aug --scale 0.5 1", "--no-aug does not go with --scale"),
        ("--no-aug --hflip 0", "--no-aug does not go with --hflip"),
        ("--scale 1 0.5", "give the lower one first"),
        ("--scale 0 1", "give the lower one first, above 0"),
        ("--scale 0.5", "expected 2 arguments"),
        ("--scale 0.5 1.5", "must be at least 0 and below 1"),
        ("--reprob 2", "must be at least 0 and below 1"),
        ("--remode const", "give --reprob above 0 too"),
        ("--color-jitter 0.4 --aa v0", "--color-jitter does not go with --aa"),
        ("--mixup-prob 0.5", "--mixup-prob needs --mixup or --cutmix above 0"),
        ("--mixup 0.2 --mixup-switch-prob 0.5", "--mixup-switch-prob needs --mixup and --cutmix above 0"),
        ("--smoothing 1", "must be at least 0 and below 1"),
        ("--train-interpolation best", "invalid choice: 'best'"),
    ],
)
def test_nonsense_is_one_line(command: str, options: str, message: str) -> None:
    with pytest.raises(NasKdError, match=message):
        COMMANDS[command](options.split())


@pytest.mark.parametrize(
    "parse",
    [
        lambda options: parse_study(["--budget=params=1M", "--distill=dkd", *options]),
        lambda options: parse_structure(["--budget=params=1M", "--distill=dkd", *options]),
        lambda options: parse_distill(["resnet18", "--no-teacher", "--loss=dkd", *options]),
    ],
)
@pytest.mark.parametrize("option", ["--mixup=0.2", "--cutmix=1", "--smoothing=0.1"])
def test_decoupled_kd_takes_no_mixed_images(parse: Callable[[list[str]], object], option: str) -> None:
    with pytest.raises(NasKdError, match=f"{option.partition('=')[0]} does not go with dkd"):
        parse([option])


def test_what_cannot_be_done_is_told_as_well() -> None:
    with pytest.raises(DataError, match="timm cannot read auto_augment 'best'"):
        augmentation_of(COMMANDS["study"]([*FOLDER, "--aa=best"]), 128)
    with pytest.raises(DataError, match=r"--hflip 0\.3: small images are"):
        augmentation_of(COMMANDS["study"](["--hflip=0.3"]), 16)


def test_workers_get_the_options() -> None:
    settings = parse_study(["--budget=params=1M", *FOLDER, *ALL.split()])
    noted = json.loads(json.dumps(noted_settings(settings)))
    bundle = Bundle(
        version="", settings=noted, num_classes=7, mean=(0.5,), std=(0.5,), proxy_images=8, teacher="t",
        weights="w", images="i", views="v", library=None, folder="",
    )  # fmt: skip
    assert settings_of(bundle) == settings
    assert {"v/shares.npy", "v/plain.npy"} <= set(bundle.paths())
    plain = dataclasses.replace(bundle, settings={**noted, "augment": None})
    assert settings_of(plain).data.augment == AugmentOptions()
    assert not {"v/shares.npy", "v/plain.npy"} & set(plain.paths())
