"""Images that stream: the loader alone, the step alone, both together, and memory over time, beside timm's own loader.

    python studies/streaming.py --images 130000 --seconds 40 --folder DIR > docs/results/streaming.md

Without --data-dir so many JPEGs of random colours are written into --folder first. Each part runs for some
seconds, from its first batch on; CPU time counts its processes too. What was measured is kept there, and the same
command again does what is missing. The last part is one epoch over all images, with the memory (PSS: shared pages
divided) of all its processes at each tenth of it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import platform
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from torch import Tensor, nn

from nas_kd.data.augment import PhotoAugmentation
from nas_kd.data.cutting import DataSpec
from nas_kd.data.images import AugmentedImages, Batch
from nas_kd.data.splits import Splits, load_splits
from nas_kd.training.loop import Task, fit
from nas_kd.training.recipe import Recipe

CLASSES, EPOCH = 100, "an epoch"
AUGMENTATION = PhotoAugmentation()
Row = dict[str, Any]
Done = Callable[[int], None]  # is told how many images are


def write_images(folder: Path, count: int, side: int) -> None:
    """So many JPEGs of 4:3, blurred random colours, in folders of 100 classes, unless they are there."""
    if (last := folder / "train" / f"c{(count - 1) % CLASSES:02}" / f"{count - 1}.jpg").exists():
        return

    def write(number: int) -> None:
        generator = np.random.default_rng(number)
        colours = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        picture = colours.resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
        picture.save(folder / "train" / f"c{number % CLASSES:02}" / f"{number}.jpg", quality=85)

    for name in range(CLASSES):
        (folder / "train" / f"c{name:02}").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        write(number)
    assert last.exists()


def open_images(arguments: argparse.Namespace, data_dir: Path, cache: Path) -> Splits:
    spec = DataSpec(
        data_dir=str(data_dir),
        img_size=arguments.img_size,
        originals=2.0,
        val_fraction=0.02,
        workers=arguments.workers,
        seed=arguments.seed,
        memory=0,
    )
    return load_splits(spec, cache)


def cpu_seconds(whose: int) -> float:
    """Of this process, or of those that it began and that ended."""
    used = resource.getrusage(whose)
    return used.ru_utime + used.ru_stime


def memory_mib() -> tuple[float, float]:
    """What this process holds, and what its children hold, in MiB; pages that they share are divided among them."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    held = [0.0, 0.0]
    for number, pid in enumerate(pids):
        with contextlib.suppress(OSError):  # it has just ended
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            held[number > 0] += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return held[0], held[1]


class TimeIsUp(Exception):
    """Ends a training that was long enough."""


class Feed:
    """Training data that tells how many images of it were used, each batch as `make` has it."""

    def __init__(
        self,
        data: AugmentedImages,
        done: Callable[[int], None],
        make: Callable[[int, Sequence[Tensor]], Iterator[Batch]],
    ) -> None:
        self.data, self.done, self.make = data, done, make
        self.mean, self.std, self.bytes = data.mean, data.std, data.bytes

    def __len__(self) -> int:
        return len(self.data)

    def to(self, device: torch.device) -> Feed:
        return self

    def batch(self, epoch: int, indices: Tensor) -> Batch:
        return self.data.batch(epoch, indices)

    def batches(self, epoch: int, order: Sequence[Tensor]) -> Iterator[Batch]:
        for batch in self.make(epoch, order):
            yield batch
            self.done(len(batch.labels))


def timed(run: Callable[[Done], None], seconds: float) -> Row:
    """Images per second of `run`, which tells how many it has done, from its first batch on, and CPU time per image."""
    seen, begun, first, own = 0, 0.0, 0, 0.0
    others = cpu_seconds(resource.RUSAGE_CHILDREN)

    def done(count: int) -> None:
        nonlocal seen, begun, first, own
        seen += count
        if not begun:
            begun, first, own = time.perf_counter(), count, cpu_seconds(resource.RUSAGE_SELF)
        if time.perf_counter() - begun > seconds:
            raise TimeIsUp

    with contextlib.suppress(TimeIsUp):
        run(done)
    elapsed, counted = time.perf_counter() - begun, seen - first
    own, others = cpu_seconds(resource.RUSAGE_SELF) - own, cpu_seconds(resource.RUSAGE_CHILDREN) - others
    return {"images": seen, "rate": counted / elapsed, "cpu_ms": 1000 * (own / counted + others / seen)}


def train_on(feed: Feed, arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    network: nn.Module = timm.create_model(arguments.model, num_classes=int(feed.data.images.labels.max()) + 1)
    task = Task(network=network, criterion=lambda outputs, labels, _: nn.functional.cross_entropy(outputs, labels))
    fit(task, feed, Recipe(epochs=1, batch_size=arguments.batch_size, lr=0.01, seed=arguments.seed))


def batches_of(data: AugmentedImages, arguments: argparse.Namespace) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(arguments.seed)
    return torch.split(torch.randperm(len(data), generator=generator), arguments.batch_size)


def decoded(data: AugmentedImages, arguments: argparse.Namespace, done: Done) -> None:
    for indices in batches_of(data, arguments):
        done(len(data.batch(0, indices).labels))


def loaded(data: AugmentedImages, arguments: argparse.Namespace, done: Done) -> None:
    for batch in data.batches(0, batches_of(data, arguments)):
        done(len(batch.labels))


def loaded_by_timm(data_dir: Path, arguments: argparse.Namespace, done: Done) -> None:
    """The same files by timm's own loader, with the same augmentation and processes."""
    loader = create_loader(
        create_dataset("folder", str(data_dir / "train")),
        (3, arguments.img_size, arguments.img_size),
        arguments.batch_size,
        is_training=True,
        scale=AUGMENTATION.scale,
        hflip=AUGMENTATION.hflip,
        color_jitter=None,
        interpolation=AUGMENTATION.interpolation,
        num_workers=arguments.workers,
        use_prefetcher=False,
        persistent_workers=False,
    )
    for _, labels in loader:
        done(len(labels))


def stepped(data: AugmentedImages, arguments: argparse.Namespace, done: Done) -> None:
    """The step on one batch, ready in memory, again and again."""
    ready = data.batch(0, torch.arange(arguments.batch_size))
    train_on(Feed(data, done, lambda _, order: itertools.repeat(ready, len(order))), arguments)


def trained(data: AugmentedImages, arguments: argparse.Namespace, done: Done) -> None:
    train_on(Feed(data, done, data.batches), arguments)


def memory_over_an_epoch(data: AugmentedImages, arguments: argparse.Namespace) -> Row:
    """What the process that trains and those that decode hold, in MiB, at each tenth of an epoch, and its rate."""
    seen, held, begun = 0, [], time.perf_counter()

    def done(count: int) -> None:
        nonlocal seen
        seen += count
        if seen * 10 >= len(data) * (len(held) + 1):
            held.append([round(amount) for amount in memory_mib()])

    trained(data, arguments, done)
    return {"images": seen, "rate": seen / (time.perf_counter() - begun), "held": held}


def parts_of(data: AugmentedImages, data_dir: Path, arguments: argparse.Namespace) -> dict[str, Callable[[], Row]]:
    """What is measured, by name."""

    def part(run: Callable[..., None], *given: Any) -> Callable[[], Row]:
        return lambda: timed(functools.partial(run, *given, arguments), arguments.seconds)

    return {
        "decoding, in the process itself": part(decoded, data),
        "loader alone": part(loaded, data),
        "timm's loader alone": part(loaded_by_timm, data_dir),
        "step alone": part(stepped, data),
        "both": part(trained, data),
        EPOCH: lambda: memory_over_an_epoch(data, arguments),
    }


def page(rows: Mapping[str, Row], about: Row) -> Iterator[str]:
    """The table, what it says, and the memory."""
    yield "| part | images seen | images/s | CPU-ms per image |\n|---|---|---|---|"
    for name, row in rows.items():
        if name != EPOCH:
            yield f"| {name} | {row['images']:,} | {row['rate']:.0f} | {row['cpu_ms']:.2f} |"
    loader, step, both = (rows[name] for name in ("loader alone", "step alone", "both"))
    needed = loader["cpu_ms"] + step["cpu_ms"]
    most = min(1000 * about["cores"] / needed, step["rate"])
    yield (
        f"\nBoth take {both['cpu_ms']:.2f} CPU-ms per image, the loader and the step by themselves {needed:.2f}: "
        f"{both['cpu_ms'] / needed - 1:+.0%}. So {about['cores']} cores that do nothing else could do {most:.0f} "
        f"images/s, the step being one thread; it were {both['rate']:.0f}, {both['rate'] / most:.0%}."
    )
    if EPOCH in rows:
        row = rows[EPOCH]
        own, others = zip(*row["held"], strict=True)
        yield f"\nMemory in MiB at each tenth of an epoch of {row['images']:,} images ({row['rate']:.0f} images/s):\n"
        yield f"| | {' | '.join(f'{10 * tenth} %' for tenth in range(1, len(own) + 1))} |\n|---|{'---|' * len(own)}"
        yield f"| the process that trains | {' | '.join(map(str, own))} |"
        yield f"| the processes that decode | {' | '.join(map(str, others))} |"


def measure(arguments: argparse.Namespace, data_dir: Path, folder: Path) -> tuple[dict[str, Row], Row]:
    """The rows, those that are kept and those that are missing, and about what they are."""
    form = ("images", "side", "img_size", "batch_size", "workers", "model", "seed", "seconds")
    about = {name: getattr(arguments, name) for name in form} | {"cores": os.cpu_count(), "data": arguments.data_dir}
    file = folder / "streaming.jsonl"
    kept = file.read_text().splitlines() if file.exists() else []
    known = [json.loads(line) for line in kept]
    rows = {row["part"]: row for row in known if row["about"] == about}
    splits = open_images(arguments, data_dir, folder / "cache")
    data = AugmentedImages(splits.train, AUGMENTATION, arguments.seed)
    for name, run in parts_of(data, data_dir, arguments).items():
        if name not in rows:
            print(name, file=sys.stderr, flush=True)
            rows[name] = {"part": name, **run(), "about": about}
            with file.open("a") as lines:
                lines.write(json.dumps(rows[name]) + "\n")
    return rows, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=int, default=2000)
    add("--side", type=int, default=96, help="shorter side of the JPEGs in pixels")
    add("--data-dir", help="folders of images to take instead, with a train in it")
    add("--img-size", type=int, default=64)
    add("--batch-size", type=int, default=64)
    add("--workers", type=int, default=2)
    add("--model", default="mobilenetv2_050")
    add("--seconds", type=float, default=5.0)
    add("--seed", type=int, default=0)
    add("--folder", type=Path, help="where images, cache and rows are kept (a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        data_dir = Path(arguments.data_dir or folder)
        if not arguments.data_dir:
            write_images(data_dir, arguments.images, arguments.side)
        rows, about = measure(arguments, data_dir, folder)
    what = "the images of a folder" if arguments.data_dir else f"{arguments.images:,} JPEGs of {arguments.side} pixels"
    print("# Images that stream\n")
    print(
        f"`python studies/streaming.py {shlex.join(sys.argv[1:])}`, {datetime.date.today()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, torch {torch.__version__}, timm {timm.__version__}: {what}, seen by "
        f"{arguments.model} at {arguments.img_size} pixels in batches of {arguments.batch_size}, "
        f"{arguments.workers} processes, seed {arguments.seed}.\n"
    )
    for line in page(rows, about):
        print(line)


if __name__ == "__main__":
    main()
