"""TensorFlow Lite Micro, the interpreter that runs int8 files on microcontrollers, and Vela, Arm's compiler of such
files for its Ethos-U: both as they run on this machine."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nas_kd.errors import ModelError
from nas_kd.networks.onnx import first_line
from nas_kd.networks.tflite_file import Array, Quantisation, need_tools

_ROOM = 64 << 20  # bytes of an arena in which anything has room
_VELA_OPTIONS = """
[compiler]
enable_db=true
output_format=TFLite
cop_format=COP1

[scheduler]
optimize=Performance
arena_size_limit={arena}
disable_feature=
cpu_tensor_alignment=16
tensor_allocator=HillClimb

[graph]
softmax_int16_neg_exp_range=10.0
"""  # what its command passes on by default
_ARENA = re.compile(r"Arena allocation (total|head|tail) (\d+) bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arena:
    """The bytes of RAM that an interpreter took: activations at the `head`, structures of operators at the `tail`."""

    total: int
    head: int
    tail: int


class MicroInterpreter:
    """An int8 file in TensorFlow Lite Micro. Raises NasKdError where that is not installed, ModelError when it refuses
    the file, or when the file does not fit an arena of `arena` bytes."""

    def __init__(self, path: Path, arena: int = _ROOM) -> None:
        need_tools("tflite_micro")
        from tflite_micro.python.tflite_micro import runtime

        self.path = path
        self._interpreter: Any = None
        words = _stderr_of(lambda: self._open(runtime, arena))
        if self._interpreter is None:
            reason = [line for line in words.splitlines() if line.strip()] or ["it gives no reason"]
            raise ModelError(
                f"TensorFlow Lite Micro does not run {path} in an arena of {arena} bytes: {reason[-1].strip()[:200]}"
            )
        details = self._interpreter.get_input_details(0), self._interpreter.get_output_details(0)
        self._shape = tuple(int(length) for length in details[0]["shape"])
        self._input: Quantisation = _form(details[0])
        self._output: Quantisation = _form(details[1])
        self.run(np.zeros((1, self._shape[3], *self._shape[1:3]), dtype=np.float32))  # what is lazy is done now

    def _open(self, runtime: Any, arena: int) -> None:
        try:
            self._interpreter = runtime.Interpreter.from_file(str(self.path), arena_size=arena)
        except Exception as error:  # of any kind: it reads the file before it looks at it
            sys.stderr.write(f"{first_line(error)}\n")
            sys.stderr.flush()

    @property
    def step(self) -> float:
        """The smallest difference between two outputs."""
        return float(self._output.scale)

    def run(self, images: Array) -> Array:
        """The outputs (N×K, float32) for normalised images (N×C×H×W, float32)."""
        steps = self.outputs(self.rounded(images)).astype(np.float32) - int(self._output.zero_point)
        answers: Array = steps * np.float32(self.step)
        return answers

    def rounded(self, images: Array) -> Array:
        """Normalised images as the file takes them: N×H×W×C int8."""
        form = self._input
        rounded = np.rint(images.transpose(0, 2, 3, 1) / form.scale) + form.zero_point
        return np.clip(rounded, -128, 127).astype(np.int8)

    def outputs(self, images: Array) -> Array:
        """The outputs (N×K int8) for rounded images."""
        outputs = []
        for image in images:
            self._interpreter.set_input(image[None], 0)
            self._interpreter.invoke()
            outputs.append(self._interpreter.get_output(0).reshape(1, -1))
        return np.concatenate(outputs)

    def arena(self) -> Arena:
        """What it has taken of its arena."""
        words = _stderr_of(self._interpreter.print_allocations)
        found = {name: int(amount) for name, amount in _ARENA.findall(words)}
        if found.keys() != {"total", "head", "tail"}:
            raise ModelError("TensorFlow Lite Micro does not tell how large its arena is: install tflite-micro anew")
        return Arena(**found)


def _form(details: Any) -> Quantisation:
    own = details["quantization_parameters"]
    return Quantisation(scale=float(own["scales"][0]), zero_point=int(own["zero_points"][0]))


def _stderr_of(call: Callable[[], object]) -> str:
    """What a call writes to the process's standard error: the interpreter tells what it has to say there alone."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                call()
            finally:
                os.dup2(kept, 2)
            file.seek(0)
            return file.read().decode(errors="replace")
    finally:
        os.close(kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What Vela estimates of a file on an accelerator: bytes of SRAM and of flash (its weights are compressed), cycles
    and images per second; and how many operators it leaves to the processor."""

    accelerator: str
    system: str
    sram: int
    flash: int
    cycles: int
    images_per_second: float
    cpu_operators: int


def compile_file(path: Path, accelerator: str) -> Compiled:
    """What Vela makes of an int8 file, optimised for speed, by its own defaults of clock and memories.

    Raises NasKdError where Vela is not installed, ModelError when it refuses the file.
    """
    need_tools("ethosu")
    with tempfile.TemporaryDirectory() as folder:
        options = ("--accelerator-config", accelerator, "--optimise", "Performance", "--output-dir", folder)
        done = subprocess.run(
            [sys.executable, "-m", "ethosu.vela", str(path), *options], capture_output=True, text=True, check=False
        )
        summaries = list(Path(folder).glob("*_summary_*.csv"))
        if done.returncode or not summaries:
            reason = (done.stderr.strip() or done.stdout.strip() or "it gives no reason").splitlines()[-1]
            raise ModelError(f"Vela cannot compile {path} for {accelerator}: {reason[:200]}")
        with summaries[0].open(encoding="utf-8", newline="") as file:
            row = next(csv.DictReader(file))
    left = re.search(r"CPU operators = (\d+)", done.stdout)
    return Compiled(
        accelerator=accelerator,
        system=f"{row['system_config']}, {row['memory_mode']}, {float(row['core_clock']) / 1e6:.0f} MHz",
        sram=round(1024 * float(row["sram_memory_used"])),
        flash=round(1024 * (float(row["off_chip_flash_memory_used"]) + float(row["on_chip_flash_memory_used"]))),
        cycles=round(float(row["cycles_total"])),
        images_per_second=float(row["inferences_per_second"]),
        cpu_operators=int(left[1]) if left else 0,
    )


class Estimator:
    """Vela within this process: what it estimates of files that are known to be whole, in some hundredths of a second.

    Raises NasKdError where it is not installed.
    """

    def __init__(self, accelerator: str) -> None:
        need_tools("ethosu")
        from ethosu.vela import architecture_features as features

        with contextlib.redirect_stdout(io.StringIO()):  # it tells that nothing was said of clock and memories
            own = features.ArchitectureFeatures(
                vela_config_files=None,
                accelerator_config=accelerator,
                system_config=features.ArchitectureFeatures.DEFAULT_CONFIG,
                memory_mode=features.ArchitectureFeatures.DEFAULT_CONFIG,
                max_blockdep=features.ArchitectureFeatures.MAX_BLOCKDEP,
                verbose_config=False,
                arena_cache_size=None,
            )
        self._family = "".join(part.capitalize() for part in accelerator.split("-")[:-1])
        self._system = "\n".join(
            (
                f"[architecture]\nmacs={own.num_macs_per_cycle}\ncores={own.ncores}",
                f"[vela]\nsystem_config_name={own.system_config}\nmemory_mode_name={own.memory_mode}",
                *(Path(file).read_text(encoding="utf-8") for file in own.vela_config_files),
            )
        )
        self.accelerator = accelerator
        self.facts = version("ethos-u-vela"), accelerator, own.system_config, own.memory_mode
        self._options = _VELA_OPTIONS.format(arena=own.arena_cache_size)

    def cycles(self, content: bytes) -> list[int]:
        """The cycles of each operator of a file, by its place there. Raises ModelError where Vela refuses the file."""
        from ethosu import regor

        try:
            compiled = regor.compile(self._family, content, "TFLITE", self._system, options=self._options)
        except Exception as error:  # of any kind: a library in C++
            raise ModelError(f"Vela cannot compile a network for {self._family}: {first_line(error)}") from error
        tables = {
            name: [dict(zip(table.header, row, strict=True)) for row in table.data]
            for name, table in compiled.opt_database.tables.items()
            if name in ("source", "perf")
        }
        places = {row["id"]: int(row["ext_key"]) for row in tables["source"]}
        spent = [0] * (1 + max(places.values()))
        for row in tables["perf"]:
            spent[places[row["source_id"]]] += int(row["op_cycles"])
        return spent
