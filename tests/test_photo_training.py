"""Photos through the commands: cropped from their originals, mixed, with cached logits and without."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from injection import Count, watched_files
from PIL import Image, ImageFilter
from safetensors.torch import load_file

from nas_kd.data.augment import PhotoAugmentation
from nas_kd.data.images import AugmentedImages
from nas_kd.data.splits import DataSpec, load_splits
from nas_kd.distill import main
from nas_kd.study import main as study_main
from nas_kd.workers.bundle import Bundle, images_of


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 12 blurred coloured photos, 160 × 120 pixels."""
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, colour in (("red", 0), ("blue", 2)):
        (root / name).mkdir()
        for number in range(12):
            pixels = generator.integers(0, 128, (120, 160, 3), dtype=np.uint8)
            pixels[..., colour] += 100
            Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2)).save(root / name / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Distils a small network; the trained teacher is shared by all runs."""
    cache = tmp_path_factory.mktemp("cache")

    def distil(out: Path, *options: str) -> Path:
        small = f"test_resnet --teacher test_resnet --img-size 64 --epochs 1 --batch-size 8 --cache {cache} -q"
        assert main([*small.split(), "--data-dir", str(photos), "--out", str(out), *options]) == 0
        return cache

    return distil


def test_crops_come_from_originals_and_mixed_views_are_cached(run: Callable[..., Path], tmp_path: Path) -> None:
    cache = run(tmp_path / "plain", "--views=1")
    assert [path.parent.name[:7] for path in cache.glob("*/originals_pixels.npy")] == ["images-"]
    assert not list(cache.glob("views-*/shares.npy"))
    run(tmp_path / "mixed", "--views=1", "--mixup=0.2", "--cutmix=1", "--aa=rand-m5", "--reprob=0.5")
    assert len(list(cache.glob("views-*/shares.npy"))) == 1
    assert len(list(cache.glob("refined-*.safetensors"))) == 2  # another augmentation is another model


def test_without_a_cache_the_same_model_comes_out(run: Callable[..., Path], tmp_path: Path) -> None:
    weights = []
    for out in (tmp_path / "1", tmp_path / "0"):
        run(out, f"--views={out.name}", "--cutmix=1", "--smoothing=0.1")
        path = json.loads((out / "distill.json").read_text())["path"]
        weights.append(load_file(out / path / "model.safetensors"))
    for name, tensor in weights[0].items():  # logits are cached in 16 bits
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-2, atol=1e-3)


def test_images_that_stream_give_the_same_model_also_after_an_interruption(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = "test_resnet --no-teacher --img-size 64 --epochs 2 --batch-size 8 -q --cutmix 1"
    files = []
    for name, options in (("kept", []), ("streamed", ["--data-memory", "0"])):
        arguments = [*small.split(), "--data-dir", str(photos), "--out", str(tmp_path / name), *options]
        if options:  # after what was looked through and the state of the first epoch, before that of the second
            stop = Count((3,), lambda: signal.raise_signal(signal.SIGINT))
            with watched_files(stop, monkeypatch):
                assert main(arguments) == 130
        assert main(arguments) == 0
        path = json.loads((tmp_path / name / "distill.json").read_text())["path"]
        files.append((tmp_path / name / path / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert [path.name[:7] for path in (tmp_path / "streamed/cache").glob("*/")] == ["stream-"]


def test_a_study_streams_what_its_trials_do_not_look_at(photos: Path, tmp_path: Path) -> None:
    small = "--model test_resnet --img-size 64 --budget params=60% --no-base-bounds --proxy-images 6 --batch-size 8 -q"
    less = "--trials 1 --proxy-epochs 1 --refine-epochs 1 --front 1 --teacher-epochs 1 --library-budget 0 --jobs 1"
    none = "--no-baselines --no-onnx"
    arguments = [*f"{small} {less} {none}".split(), "--data-dir", str(photos), "--out", str(tmp_path)]
    assert study_main([*arguments, "--data-memory", "0"]) == 0
    (pixels,) = tmp_path.glob("cache/images-*/train_pixels.npy")
    assert np.load(pixels, mmap_mode="r").shape == (6, 3, 64, 64)
    assert len(list(tmp_path.glob("cache/views-*"))) == 1  # those of trials
    front = (tmp_path / "front.csv").read_text()
    assert study_main(arguments) == 0  # with memory enough the same study goes on
    assert (tmp_path / "front.csv").read_text() == front


def spec(photos: Path, **form: float) -> DataSpec:
    return DataSpec(data_dir=str(photos), img_size=64, originals=2.0, **form)  # type: ignore[arg-type]


def test_splits_bring_originals_of_the_same_images(photos: Path, tmp_path: Path) -> None:
    train = load_splits(spec(photos), tmp_path).train
    assert train.originals is not None
    for index in range(len(train)):
        original = train.picture(index)
        assert original.size == (160, 120)
        small = original.crop((20, 0, 140, 120)).resize((64, 64))  # the middle, of which nothing else is cut
        error = np.asarray(small).astype(int) - train.pixels[index].permute(1, 2, 0).numpy()
        assert np.abs(error).mean() < 2


def test_where_originals_are_too_much_it_is_said(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = load_splits(spec(photos, originals_bytes=10_000), tmp_path).train
    assert train.originals is None
    assert "crops are cut from the training images at 64 pixels, not from their originals" in caplog.text
    crops = AugmentedImages(train, PhotoAugmentation()).batch(0, torch.arange(4)).pixels
    assert crops.shape == (4, 3, 64, 64)


def test_workers_without_views_get_the_originals(photos: Path, tmp_path: Path) -> None:
    splits = load_splits(spec(photos), tmp_path)
    assert splits.folder is not None
    bundle = Bundle(
        version="", settings={}, num_classes=2, mean=splits.mean, std=splits.std, proxy_images=6, teacher="t",
        weights="w", images=splits.folder.name, views=None, library=None, folder="", originals=True,
    )  # fmt: skip
    assert f"{bundle.images}/originals_pixels.npy" in bundle.paths()
    train = images_of(bundle, tmp_path)["train"]
    seen = [
        AugmentedImages(images, PhotoAugmentation(), 3).batch(0, torch.arange(6)) for images in (train, splits.train)
    ]
    assert len(train) == 6
    assert torch.equal(seen[0].pixels, seen[1].pixels)


def test_a_policy_that_timm_cannot_read_is_told_before_any_work(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model=test_resnet", "--budget=macs=50%", "--img-size=64", f"--data-dir={photos}", "--aa=best"]
    assert study_main([*arguments, f"--out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "nas_kd: timm cannot read auto_augment 'best': write it like rand-m9-mstd0.5, augmix-m3, original, v0 or 3a\n"
    )
