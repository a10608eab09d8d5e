"""How long a model takes on this machine: medians of runs in turns, until they are stable."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nas_kd.errors import DeviceError, ModelError

_LEAST_TURNS = 3
_LEAST_TIME = 1e-9  # seconds
_MANY_TURNS = 8  # fewer do not tell that times will not settle
_UNSETTLED = 0.25  # a standard error with which a time means nothing
_OF_MEDIAN = (
    1.4826 * 1.2533
)  # from the median deviation of normal values to the standard error of their median, times √N


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long to measure.

    A turn is the median of `repeats` timed runs after one untimed run, which brings the model back into the caches.
    Three turns or more are made, until the standard error of their median is within `tolerance` (a fraction), or until
    `limit_s` seconds per model are over; at least one is always made. `warmup` runs come before the first turn.
    Raises ValueError for a value outside its range.
    """

    warmup: int = 3
    repeats: int = 10
    tolerance: float = 0.01
    limit_s: float = 3.0

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.repeats < 1 or self.tolerance < 0 or not self.limit_s >= 0:
            raise ValueError(f"warmup, tolerance and limit_s must be ≥ 0 and repeats ≥ 1, got {self}")


def measure_latency(
    model: nn.Module,
    input_size: tuple[int, int, int],
    *,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    timing: Timing | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median milliseconds of the forward pass of one image of `input_size` (C, H, W), in evaluation mode.

    `threads` bounds torch's threads on the CPU while measuring (None leaves them); `clock` gives seconds. A copy of the
    model is measured: its mode, device and gradients stay as they are. Raises DeviceError for a device that is not
    there, ModelError when the model cannot run such an image.
    """
    name = type(model).__name__
    return measure_together({name: model}, input_size, device=device, threads=threads, timing=timing, clock=clock)[name]


def measure_together(
    models: Mapping[str, nn.Module],
    input_size: tuple[int, int, int],
    *,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    timing: Timing | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median milliseconds of one image for each model, in the order of `models`, measured turn by turn.

    The models take turns, so a machine that slows down or speeds up meanwhile treats all alike, and their ratios hold.
    Arguments and errors are those of `measure_latency`; it ends when the medians of all models are stable.
    """
    place, timing = existing(device), timing or Timing()
    image = _image(input_size)
    copies = {name: copy.deepcopy(model).to(place).eval() for name, model in models.items()}
    with torch.inference_mode(), limited_threads(threads):
        runs = {name: _ready(name, model, image.to(place), timing.warmup) for name, model in copies.items()}
        return take_turns(runs, timing, synchronised(clock, place))


def take_turns(
    runs: Mapping[str, Callable[[], object]],
    timing: Timing,
    clock: Callable[[], float] = time.perf_counter,
    reference: str | None = None,
) -> dict[str, float]:
    """The median milliseconds of each of `runs`, called turn by turn until all are known well enough (see `Timing`).

    With a `reference`, one of them, the others' are the medians of what they took beside it in the same turn, times its
    own: a machine that changes its pace meanwhile changes both. Raises DeviceError when times scatter so much that they
    mean nothing."""
    turns: dict[str, list[float]] = {name: [] for name in runs}  # their medians
    end = clock() + timing.limit_s * len(runs)
    while runs:
        for name, run in runs.items():
            turns[name].append(_turn(run, timing.repeats, clock))
        relative = _beside(turns, reference)
        if all(_is_known(own, timing.tolerance) for own in relative.values()):
            break
        if clock() >= end:
            _check_settled(max((_error(own) for own in relative.values() if len(own) >= _MANY_TURNS), default=0.0))
            break
    scale = 1000 * (1.0 if reference is None else statistics.median(turns[reference]))
    return {name: scale * statistics.median(own) for name, own in _beside(turns, reference).items()}


def _beside(turns: Mapping[str, list[float]], reference: str | None) -> Mapping[str, list[float]]:
    """What each took in each turn, as a multiple of what the reference took, where there is one."""
    if reference is None:
        return turns
    return {
        name: [one / max(other, _LEAST_TIME) for one, other in zip(own, turns[reference], strict=True)]
        for name, own in turns.items()
    }


def _turn(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = clock()
        run()
        seconds.append(clock() - start)
    return statistics.median(seconds)


def _is_known(turns: list[float], tolerance: float) -> bool:
    return len(turns) >= _LEAST_TURNS and _error(turns) <= tolerance


def _error(turns: list[float]) -> float:
    """The standard error of the median of some turns, as a fraction of it: by their median deviation, which a few
    disturbed turns do not touch."""
    middle = statistics.median(turns)
    deviation = _OF_MEDIAN * statistics.median(abs(turn - middle) for turn in turns)
    return deviation / math.sqrt(len(turns)) / max(middle, _LEAST_TIME)


def _check_settled(error: float) -> None:
    """Raises DeviceError for times that mean nothing."""
    if error > _UNSETTLED:
        raise DeviceError(
            f"times do not settle on this machine (±{100 * error:.0f} %): other work runs on it; stop that, or measure "
            "with fewer --latency-threads, then give the same command again"
        )


def _ready(name: str, model: nn.Module, image: Tensor, warmup: int) -> Callable[[], object]:
    first = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), None)
    batch = image if first is None else image.to(first.dtype)
    try:
        for _ in range(max(warmup, 1)):  # at least one: it shows whether the model takes such an image
            model(batch)
    except RuntimeError as error:
        size = "×".join(map(str, image.shape[1:]))
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{name} cannot run an image of {size} ({reason}): give it its own input size") from error
    return lambda: model(batch)


def _image(input_size: tuple[int, int, int]) -> Tensor:
    if len(input_size) != 3 or any(size < 1 for size in input_size):
        raise ModelError(f"input_size must be three positive numbers (channels, height, width), got {input_size!r}")
    # Not zeros, which some kernels run faster; a generator of its own, so that the caller's random numbers stay.
    return torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0))


def existing(device: torch.device | str) -> torch.device:
    """The device of this name. Raises DeviceError when it is a GPU that is not there."""
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"cannot measure on {place}: no CUDA device was found; use --device cpu")
    return place


def synchronised(clock: Callable[[], float], place: torch.device) -> Callable[[], float]:
    """A clock that is read when all work on a device is done."""
    if place.type == "cpu":
        return clock

    def read() -> float:
        torch.accelerator.synchronize(place)  # a launch returns before the work is done
        return clock()

    return read


@contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """Inside the block torch uses so many threads on the CPU (None: as many as before)."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
