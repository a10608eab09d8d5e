"""Images per second of the training loop on this device, beside what a practitioner would write by hand.

    python studies/gpu_throughput.py --out FILE [--rehearse]

For each network and batch size, bf16, all data on the device, one process:

- `constant`: forward, backward and optimiser on one batch that never changes, eager: no data, no schedule
- `by hand`: the same with random crops, mirrored images, distillation and a schedule, as one writes it in 40 lines
- `loop, eager`: our loop on cached views with the teacher's logits, no graphs
- `loop`: the same as it is: steps are recorded once and replayed (nas_kd/training/step_graph.py)

`busy` is the share of the time of the loop in which the device ran kernels (torch.profiler). A row per network, batch
size and way goes to FILE (JSON lines).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from paper_tables import hardware
from torch import Tensor, nn

import nas_kd.models  # noqa: F401  the CIFAR networks
from nas_kd.analysis.stride_reduction import reduce_stride
from nas_kd.files.records import Records
from nas_kd.training import step_graph
from nas_kd.training.evaluation import amp_dtype, suits_channels_last
from nas_kd.training.loop import train
from nas_kd.training.recipe import Recipe
from nas_kd.training.views import Views

NETWORKS = (("cifar_resnet20", 32), ("cifar_resnet56", 32), ("mobilenetv2_100", 32), ("tf_efficientnet_lite0", 128))
BATCHES = (128, 512)
SECONDS = 1.2  # of each measurement, at least
CLASSES, TEMPERATURE, WEIGHT = 10, 4.0, 0.9


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A network at an image size and a batch size, on a device, for so many seconds."""

    name: str
    side: int
    batch: int
    device: torch.device
    seconds: float

    @property
    def amp(self) -> bool:
        """A rehearsal does without: a processor may take minutes for bf16."""
        return self.device.type == "cuda"

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        network = timm.create_model(self.name, num_classes=CLASSES)
        if self.name == "mobilenetv2_100":  # its first strides are for 224 pixels
            network = reduce_stride(network, 8, 3)
        return network.to(self.device)

    def views(self, batches: int) -> Views:
        """Random images, of which an epoch has so many batches."""
        count = batches * self.batch
        pixels = torch.randint(0, 256, (1, count, 3, self.side, self.side), dtype=torch.uint8)
        logits = torch.randn(1, count, CLASSES).half()
        return Views(pixels, torch.randint(0, CLASSES, (count,)), logits, (0.5,) * 3, (0.25,) * 3)


def constant(setting: Setting) -> float:
    """Images per second on one batch."""
    network, channels = setting.network().train(), torch.channels_last
    if suits_channels_last(network):
        network = network.to(memory_format=channels)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, nesterov=True, fused=True)
    images = torch.randn(setting.batch, 3, setting.side, setting.side, device=setting.device)
    if suits_channels_last(network):
        images = images.contiguous(memory_format=channels)
    labels = torch.randint(0, CLASSES, (setting.batch,), device=setting.device)

    def step(_: int) -> None:
        with torch.autocast(setting.device.type, dtype=amp_dtype(setting.device), enabled=setting.amp):
            loss = F.cross_entropy(network(images).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return rate(step, setting)


def by_hand(setting: Setting) -> float:
    """Images per second of a loop as one writes it: data on the device, shift and flip per batch, KD, a schedule."""
    network, views = setting.network().train(), setting.views(8)
    last = suits_channels_last(network)
    network = network.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    pixels, labels = views.pixels[0].to(setting.device), views.labels.to(setting.device)
    assert views.logits is not None
    teacher = views.logits[0].to(setting.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, nesterov=True, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=1_000_000)

    def step(number: int) -> None:
        indices = torch.randint(0, len(labels), (setting.batch,), device=setting.device)
        images = augmented(pixels[indices])
        if last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(setting.device.type, dtype=amp_dtype(setting.device), enabled=setting.amp):
            logits = network(images).float()
        optimizer.zero_grad(set_to_none=True)
        distilled(logits, teacher[indices].float(), labels[indices]).backward()
        optimizer.step()
        schedule.step()

    return rate(step, setting)


def augmented(pixels: Tensor) -> Tensor:
    """One shift for the batch and a mirror for each image, normalised."""
    images = (pixels.float() / 255 - 0.5) / 0.25
    padded = F.pad(images, (4, 4, 4, 4))
    down, right = torch.randint(0, 9, (2,)).tolist()
    moved = padded[:, :, down : down + images.shape[2], right : right + images.shape[3]]
    mirrored = torch.rand(len(moved), 1, 1, 1, device=moved.device) < 0.5
    return torch.where(mirrored, moved.flip(3), moved)


def distilled(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    soft = F.kl_div(F.log_softmax(logits / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1), reduction="batchmean")
    return (1 - WEIGHT) * F.cross_entropy(logits, labels) + WEIGHT * soft * TEMPERATURE**2


def rate(step: Callable[[int], None], setting: Setting) -> float:
    """Images per second after three steps of warming up."""
    for number in range(3):
        step(number)
    wait(setting.device)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < setting.seconds:
        for number in range(5):
            step(number)
        count += 5
        wait(setting.device)
    return count * setting.batch / (time.perf_counter() - started)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loop(setting: Setting, *, graphs: bool) -> float:
    """Images per second of our loop, from epochs of 50 batches: as many as take the time, the first left out."""
    network, views, ends = setting.network(), setting.views(50 if setting.device.type == "cuda" else 4), []
    epochs = 2

    def report(epoch: int, accuracy: float) -> None:
        ends.append(time.perf_counter())

    def measure() -> float:
        recipe = Recipe(
            epochs=epochs, batch_size=setting.batch, lr=1e-4, amp=setting.amp, eval_epochs=tuple(range(1, epochs))
        )
        ends.clear()
        train(network, views, recipe, val=views.sample(2), report=report)
        return (ends[-1] - ends[0]) / (epochs - 1)

    with patch.object(step_graph, "EAGER", step_graph.EAGER if graphs else 10**9):
        each = measure()
        epochs = 2 + max(1, min(200, int(setting.seconds / each)))
        return len(views) / measure()


def busy(setting: Setting, *, graphs: bool) -> float:
    """The share of the time in which kernels ran, over 40 steps of our loop after it has begun."""
    network, views = setting.network(), setting.views(20)
    recipe = Recipe(epochs=2, batch_size=setting.batch, lr=1e-4, amp=setting.amp)
    with patch.object(step_graph, "EAGER", step_graph.EAGER if graphs else 10**9):
        train(network, views, recipe)  # compiled and warm
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            started = time.perf_counter()
            train(network, views, recipe)
            wait(setting.device)
            wall = time.perf_counter() - started
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / wall


def rows(setting: Setting) -> Iterator[dict[str, object]]:
    what = {"network": setting.name, "side": setting.side, "batch": setting.batch}
    ways: dict[str, Callable[[], float]] = {
        "constant": lambda: constant(setting),
        "by hand": lambda: by_hand(setting),
        "loop, eager": lambda: loop(setting, graphs=False),
        "loop": lambda: loop(setting, graphs=True),
    }
    for way, measure in ways.items():
        yield {**what, "way": way, "images per second": round(measure(), 1)}
    if setting.device.type == "cuda":
        for graphs in (False, True):
            yield {**what, "way": "busy" if graphs else "busy, eager", "share": round(busy(setting, graphs=graphs), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--rehearse", action="store_true", help="one network, a moment each")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records, seconds = Records(arguments.out), 0.1 if arguments.rehearse else SECONDS
    for name, side in NETWORKS[: 1 if arguments.rehearse else None]:
        for batch in (16,) if arguments.rehearse else BATCHES:
            setting = Setting(name=name, side=side, batch=batch, device=device, seconds=seconds)
            key = f"{name} {side} {batch} {hardware()}"
            if key in records:
                continue
            found = list(rows(setting))
            records[key] = {"hardware": hardware(), "rows": found}
            for row in found:
                print(row, flush=True)


if __name__ == "__main__":
    main()
