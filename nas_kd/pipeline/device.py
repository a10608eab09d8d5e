"""An int8 result on a device: as a TensorFlow Lite file, measured in the interpreter that runs it there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nas_kd.budget import CYCLES
from nas_kd.data.images import Images
from nas_kd.errors import ModelError, NasKdError
from nas_kd.files.atomic import replace_file, write_text
from nas_kd.networks.micro import Arena, Compiled, MicroInterpreter, compile_file
from nas_kd.networks.onnx import run_onnx
from nas_kd.networks.tflite import write_tflite
from nas_kd.networks.tflite_file import operators_of
from nas_kd.pipeline.quantisation import INT8, inputs_of

TFLITE, RECORD = "model.int8.tflite", "mcu.json"
_SAME = 0.9  # of the images on which two interpreters of the same numbers agree at least; rounding costs a few


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Over so many test `images`, the share on which the interpreter's first answer is that of the int8 ONNX file in
    ONNX Runtime (`same`), the largest difference of an output in `steps` of its rounding, and what both score."""

    images: int
    same: float
    steps: float
    accuracy: float
    onnx_accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OnDevice:
    """What an int8 file is on a device.

    `bytes` of the file, the `arena` of its interpreter, its `operators`, its `answers` beside ONNX Runtime's; and what
    an accelerator makes of it.
    """

    bytes: int
    arena: Arena
    operators: dict[str, int]
    answers: Answers
    compiled: Compiled

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return asdict(self)


def check_int8(folder: Path) -> None:
    """Raises NasKdError where a folder has no int8 file."""
    if not (folder / INT8).is_file():
        raise NasKdError(f"there is no {INT8} in {folder}: write it with python -m nas_kd.quantize {folder}")


def write_measured(folder: Path, accelerator: str | None = None) -> dict[str, int]:
    """Writes the int8 ONNX file of a folder as a TensorFlow Lite file beside it and returns, by kind of cost, its
    bytes, the arena in which it runs, and its cycles on an accelerator. Raises as `write_tflite`, `MicroInterpreter`
    and `compile_file` do."""
    target = _write(folder)
    cycles = {} if accelerator is None else {CYCLES: compile_file(target, accelerator).cycles}
    return {"flash": target.stat().st_size, "ram": MicroInterpreter(target).arena().total, **cycles}


def _write(folder: Path) -> Path:
    """Writes the int8 ONNX file of a folder as a TensorFlow Lite file beside it and returns that."""
    target = folder / TFLITE
    replace_file(target, lambda draft: write_tflite(folder / INT8, draft))
    return target


def compared(interpreter: MicroInterpreter, path: Path, test: Images) -> Answers:
    """The answers of an interpreter beside those of the int8 ONNX file that it should give. Raises ModelError for
    others."""
    images, labels = inputs_of(test), torch.as_tensor(test.labels).numpy()
    answers, expected = interpreter.run(images.numpy()), run_onnx(path, images).numpy()
    same = float((answers.argmax(1) == expected.argmax(1)).mean())
    if same < _SAME:
        apart = f"{1 - same:.0%} of {len(test)} images"
        raise ModelError(f"{interpreter.path} answers otherwise than {path.name} on {apart}: do not deploy it")
    return Answers(
        images=len(test),
        same=same,
        steps=round(float(np.abs(answers - expected).max() / interpreter.step), 2),
        accuracy=float((answers.argmax(1) == labels).mean()),
        onnx_accuracy=float((expected.argmax(1) == labels).mean()),
    )


def put_on_device(folder: Path, test: Images, accelerator: str) -> OnDevice:
    """Writes the int8 ONNX file of a folder for microcontrollers, runs some test images, and notes what is found.

    Raises NasKdError without an int8 file or what is to be installed, ModelError when the file cannot be converted, run
    or compiled, or when the interpreter answers otherwise than ONNX Runtime.
    """
    check_int8(folder)
    target = _write(folder)
    interpreter = MicroInterpreter(target)
    result = OnDevice(
        bytes=target.stat().st_size,
        arena=interpreter.arena(),
        operators=operators_of(target),
        answers=compared(interpreter, folder / INT8, test),
        compiled=compile_file(target, accelerator),
    )
    text = json.dumps(result.to_json(), indent=2) + "\n"
    write_text(folder / RECORD, text)
    return result
