"""What runs a network while its latency is measured: torch, ONNX Runtime, or a command of the user's."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import platform
import shlex
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nas_kd.costs.latency import Timing, existing, limited_threads, synchronised, take_turns
from nas_kd.costs.onnx_layers import LayerProfile
from nas_kd.errors import NasKdError
from nas_kd.networks.folding import fold, fold_norms
from nas_kd.networks.onnx import first_line, need, open_session, write_onnx
from nas_kd.networks.plain import copied

Runtime = Literal["torch", "onnx"]
_LAYER_RUNS = 10
_LEAST_PROFILED, _MOST_PROFILED = 10, 40  # runs by layer in ONNX Runtime
REFERENCE = "reference"  # the subject of this name is what the others' times are taken beside


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySpec:
    """What a latency is: one forward pass of `batch` images by a runtime on a device, on the CPU with so many threads.

    With `command` it is what that command prints (milliseconds) when it is given the path of an ONNX file, within
    `limit_s` seconds. Raises ValueError for a number below 1.
    """

    runtime: Runtime = "onnx"
    device: str = "cpu"
    batch: int = 1
    threads: int = 1
    command: str = ""
    limit_s: float = 600.0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.threads < 1:
            raise ValueError(f"batch and threads must be ≥ 1, got {self}")

    def __str__(self) -> str:
        images = f"{self.batch} image{'s' if self.batch > 1 else ''}"
        if self.command:
            return f"{self.command!r}, {images}"
        name = "ONNX Runtime" if self.runtime == "onnx" else "torch"
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.device == "cpu" else ""
        return f"{name} on {self.device}, {images}{threads}"

    def facts(self) -> dict[str, str]:
        """What a measurement depends on besides the network: this, the machine and the versions."""
        facts = {"what": str(self), "machine": f"{platform.node()} {platform.machine()} {_processor()}"}
        facts["cores"] = str(os.cpu_count())
        facts["torch"] = torch.__version__
        if self.runtime == "torch" and not self.command:
            facts["norms"] = "folded"
        elif not self.command:
            need("onnx", "onnxruntime")
            import onnxruntime

            facts["onnxruntime"] = onnxruntime.__version__
        if self.device.startswith("cuda"):
            facts["gpu"] = torch.cuda.get_device_name(existing(self.device))
        return facts


def _processor() -> str:
    """The processor's name, where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """A module in evaluation mode, what it is called with, and the paths of the layers whose share is wanted too."""

    module: nn.Module
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = ()

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [leaf for leaf in pytree.tree_leaves((self.arguments, self.keywords)) if isinstance(leaf, Tensor)]

    def ready(self, device: torch.device) -> Subject:
        """This subject as people deploy it, on a device: a copy in its inference form, its batch norms folded."""
        arguments, keywords = pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(device), (self.arguments, dict(self.keywords))
        )
        module = copied(self.module).to(device).eval()
        fold(module)
        fold_norms(module, arguments, keywords)
        return replace(self, module=module, arguments=arguments, keywords=keywords)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The milliseconds of a forward pass, and of each layer with what follows it, where the runtime tells."""

    milliseconds: float
    layers: Mapping[str, float] = field(default_factory=dict)

    def times(self, factor: float) -> Measured:
        """What this is at another pace."""
        layers = {name: factor * time for name, time in self.layers.items()}
        return Measured(milliseconds=factor * self.milliseconds, layers=layers)


Measure = Callable[[Mapping[str, Subject], Timing], dict[str, Measured]]


def measurer(spec: LatencySpec) -> Measure:
    """What measures subjects as `spec` says; those of one call take turns, so that their ratios hold. The last
    reference stays ready for the next call."""
    if spec.command:
        return lambda subjects, timing: {name: _ask(spec, subject) for name, subject in subjects.items()}
    kept: list[tuple[Subject, Callable[[], object]]] = []
    measure = _measure_onnx if spec.runtime == "onnx" else _measure_torch

    def measured(subjects: Mapping[str, Subject], timing: Timing) -> dict[str, Measured]:
        reference = subjects.get(REFERENCE)
        others = {name: subject for name, subject in subjects.items() if name != REFERENCE}
        if reference is None:
            return measure(spec, others, timing, {})
        if not kept or kept[0][0] is not reference:
            kept[:] = [(reference, _runner(spec, reference))]
        return measure(spec, others, timing, {REFERENCE: kept[0][1]})

    return measured


_Runs = Mapping[str, Callable[[], object]]


def _runner(spec: LatencySpec, subject: Subject) -> Callable[[], object]:
    if spec.runtime == "onnx":
        with _folder() as folder:
            return _session(spec, subject, folder / "model.onnx")[0]
    prepared = subject.ready(existing(spec.device))
    return lambda: prepared.module(*prepared.arguments, **prepared.keywords)


def _measure_torch(
    spec: LatencySpec, subjects: Mapping[str, Subject], timing: Timing, kept: _Runs
) -> dict[str, Measured]:
    place = existing(spec.device)
    clock = synchronised(_clock(spec), place)
    with torch.inference_mode(), limited_threads(spec.threads):
        prepared = {name: subject.ready(place) for name, subject in subjects.items()}
        runs = dict(kept)
        for name, subject in prepared.items():
            runs[name] = functools.partial(subject.module, *subject.arguments, **subject.keywords)
        times = take_turns(_warm(runs, timing), timing, clock, REFERENCE if kept else None)
        shares = {name: _hooked(subject, runs[name], clock) for name, subject in prepared.items()}
    return {
        name: Measured(milliseconds=time, layers=_summing_to(time, shares.get(name, {})))
        for name, time in times.items()
    }


def _summing_to(milliseconds: float, shares: Mapping[str, float]) -> dict[str, float]:
    return {path: share * milliseconds / sum(shares.values()) for path, share in shares.items()}


def _hooked(subject: Subject, run: Callable[[], object], clock: Callable[[], float]) -> dict[str, float]:
    """The milliseconds from the start of each layer to the start of the next one: medians of some runs."""
    starts: list[tuple[str, float]] = []
    times: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        for path, module in subject.module.named_modules():
            if path in subject.layers:
                hook = module.register_forward_pre_hook(lambda *_, path=path: starts.append((path, clock())))
                stack.callback(hook.remove)
        for _ in range(_LAYER_RUNS if subject.layers else 0):
            starts.clear()
            run()
            starts.append(("", clock()))
            for path, spent in _between(starts).items():
                times[path].append(spent)
    return {path: 1000 * statistics.median(spent) for path, spent in times.items() if path}


def _between(starts: Sequence[tuple[str, float]]) -> dict[str, float]:
    spent: dict[str, float] = defaultdict(float)
    for (path, start), (_, end) in itertools.pairwise(starts):
        spent[path] += end - start
    return spent


def _measure_onnx(
    spec: LatencySpec, subjects: Mapping[str, Subject], timing: Timing, kept: _Runs
) -> dict[str, Measured]:
    runs, profiles = dict(kept), {}
    with _folder() as folder:
        for index, (name, subject) in enumerate(subjects.items()):
            path = folder / f"{index}.onnx"
            runs[name], feed = _session(spec, subject, path)
            if subject.layers:
                profiles[name] = LayerProfile(path, feed, subject.layers, threads=spec.threads, device=spec.device)
        times = take_turns(_warm(runs, timing), timing, _clock(spec), REFERENCE if kept else None)
        _profile(profiles.values(), timing, _clock(spec))
        shares = {name: profile.shares(times[name]) for name, profile in profiles.items()}
    wanted = [*kept, *subjects]
    return {name: Measured(milliseconds=times[name], layers=shares.get(name, {})) for name in wanted}


def _profile(profiles: Collection[LayerProfile], timing: Timing, clock: Callable[[], float]) -> None:
    """Runs each by layer, turn by turn: what a run notes is read back slowly, and some runs tell enough."""
    end = clock() + timing.limit_s * len(profiles)
    for number in range(_MOST_PROFILED):
        if number >= _LEAST_PROFILED and clock() >= end:
            return
        for profile in profiles:
            profile.run()


def _session(spec: LatencySpec, subject: Subject, path: Path) -> tuple[Callable[[], object], dict[str, Any]]:
    """What runs a subject once, and what its file is fed with."""
    inputs = _write(subject, path)
    session = open_session(path, threads=spec.threads, device=spec.device)
    names = [entry.name for entry in session.get_inputs()]
    feed = dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True))
    return functools.partial(session.run, None, feed), feed


def _write(subject: Subject, path: Path) -> list[Tensor]:
    """Writes a subject as ONNX, and returns what the file is fed with, in its order."""
    prepared = subject.ready(torch.device("cpu"))
    write_onnx(prepared.module, prepared.arguments, path, keywords=prepared.keywords)
    return prepared.tensors()


def _warm(runs: _Runs, timing: Timing) -> _Runs:
    for run in runs.values():
        for _ in range(timing.warmup):
            run()
    return runs


def default_runtime(device: str = "cpu") -> tuple[Runtime, str]:
    """What times networks on a device when nothing is said: ONNX Runtime, or torch and why."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except (ImportError, OSError) as error:
        return "torch", f"ONNX Runtime is not there ({first_line(error)}): pip install onnx onnxruntime"
    if device.startswith("cuda") and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "torch", "this ONNX Runtime has no CUDA: pip install onnxruntime-gpu"
    return "onnx", ""


def _clock(spec: LatencySpec) -> Callable[[], float]:
    """The clock of one thread where all is done in one, so that what else runs on the machine is not counted."""
    return time.thread_time if spec.device == "cpu" and spec.threads == 1 else time.perf_counter


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nas_kd-latency-") as folder:
        yield Path(folder)


def _ask(spec: LatencySpec, subject: Subject) -> Measured:
    """The milliseconds that the user's command prints for a network."""
    command = spec.command
    with _folder() as folder:
        path = folder / "model.onnx"
        _write(subject, path)
        try:
            done = subprocess.run(
                [*shlex.split(command), str(path)], capture_output=True, text=True, timeout=spec.limit_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise NasKdError(
                f"--latency-command {command!r} took longer than {spec.limit_s:g} s for one network: it hangs, or give "
                "it more with --latency-timeout"
            ) from error
        except (OSError, ValueError) as error:
            raise NasKdError(f"--latency-command {command!r} cannot be run: {error}") from error
    return Measured(milliseconds=_milliseconds(command, done))


def _milliseconds(command: str, done: subprocess.CompletedProcess[str]) -> float:
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NasKdError(f"--latency-command {command!r} failed with exit code {done.returncode}: {reason[:200]}")
    try:
        value = float(lines[-1])
    except (IndexError, ValueError):
        value = math.nan
    if not 0 < value < math.inf:
        last = lines[-1][:80] if lines else ""
        raise NasKdError(
            f"--latency-command {command!r} printed {last!r}: its last line must be the milliseconds of a forward pass"
        )
    return value
