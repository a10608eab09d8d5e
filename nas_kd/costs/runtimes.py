"""What runs a network while its latency is measured: torch, ONNX Runtime, or a command of the user's."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nas_kd.costs.latency import Timing, existing, limited_threads, synchronised, take_turns
from nas_kd.errors import NasKdError
from nas_kd.networks.onnx import need, open_session, write_onnx

Runtime = Literal["torch", "onnx"]
_COMMAND_LIMIT = 600.0  # seconds that a user's command may take for one file


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySpec:
    """What a latency is: one forward pass of `batch` images by a runtime on a device, on the CPU with so many threads.

    With `command` it is what that command prints (milliseconds) when it is given the path of an ONNX file. Raises
    ValueError for a number below 1.
    """

    runtime: Runtime = "torch"
    device: str = "cpu"
    batch: int = 1
    threads: int = 1
    command: str = ""

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
        if self.runtime == "onnx" and not self.command:
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
    """A module in evaluation mode and what it is called with."""

    module: nn.Module
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [leaf for leaf in pytree.tree_leaves((self.arguments, self.keywords)) if isinstance(leaf, Tensor)]

    def to(self, device: torch.device) -> Subject:
        """This subject on a device; its module is moved."""
        arguments, keywords = pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(device), (self.arguments, dict(self.keywords))
        )
        return Subject(module=self.module.to(device).eval(), arguments=arguments, keywords=keywords)


Measure = Callable[[Mapping[str, Subject], Timing], dict[str, float]]  # milliseconds of each


def measurer(spec: LatencySpec) -> Measure:
    """What measures subjects as `spec` says; those of one call take turns, so that their ratios hold."""
    if spec.command:
        return lambda subjects, timing: {name: _ask(spec.command, subject) for name, subject in subjects.items()}
    if spec.runtime == "onnx":
        return lambda subjects, timing: _measure_onnx(spec, subjects, timing)
    return lambda subjects, timing: _measure_torch(spec, subjects, timing)


def _measure_torch(spec: LatencySpec, subjects: Mapping[str, Subject], timing: Timing) -> dict[str, float]:
    place = existing(spec.device)

    def runner(subject: Subject) -> Callable[[], object]:
        return lambda: subject.module(*subject.arguments, **subject.keywords)

    with torch.inference_mode(), limited_threads(spec.threads):
        runs = {name: runner(subject.to(place)) for name, subject in subjects.items()}
        return take_turns(_warm(runs, timing), timing, synchronised(_clock(), place))


def _measure_onnx(spec: LatencySpec, subjects: Mapping[str, Subject], timing: Timing) -> dict[str, float]:
    def runner(subject: Subject, path: Path) -> Callable[[], object]:
        write_onnx(subject.module, subject.arguments, path, keywords=subject.keywords)
        session = open_session(path, threads=spec.threads, device=spec.device)
        names = [entry.name for entry in session.get_inputs()]
        values = [tensor.numpy() for tensor in subject.tensors()]
        feed = dict(zip(names, values, strict=True))
        return lambda: session.run(None, feed)

    with _folder() as folder:
        cpu = {name: subject.to(torch.device("cpu")) for name, subject in subjects.items()}
        runs = {name: runner(subject, folder / f"{index}.onnx") for index, (name, subject) in enumerate(cpu.items())}
        return take_turns(_warm(runs, timing), timing, _clock())


def _warm(runs: Mapping[str, Callable[[], object]], timing: Timing) -> Mapping[str, Callable[[], object]]:
    for run in runs.values():
        for _ in range(timing.warmup):
            run()
    return runs


def _clock() -> Callable[[], float]:
    import time

    return time.perf_counter


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nas_kd-latency-") as folder:
        yield Path(folder)


def _ask(command: str, subject: Subject) -> float:
    """The milliseconds that the user's command prints for a network."""
    with _folder() as folder:
        path = folder / "model.onnx"
        cpu = subject.to(torch.device("cpu"))
        write_onnx(cpu.module, cpu.arguments, path, keywords=cpu.keywords)
        try:
            done = subprocess.run(
                [*shlex.split(command), str(path)], capture_output=True, text=True, timeout=_COMMAND_LIMIT, check=False
            )
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            raise NasKdError(f"--latency-command {command!r} cannot be run: {error}") from error
    return _milliseconds(command, done)


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
