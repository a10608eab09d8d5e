"""A result as int8: calibrated, measured in ONNX Runtime beside its float form, brought back where it loses."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas_kd.costs.latency import Timing, take_turns
from nas_kd.data.images import AugmentedImages, Images, ImageSet, normalise
from nas_kd.data.splits import Splits
from nas_kd.errors import OutputError
from nas_kd.files.atomic import write_text
from nas_kd.files.digests import digest_of
from nas_kd.files.tensors import write_tensors
from nas_kd.networks.int8 import LayerError, quantise
from nas_kd.networks.onnx import PRECISE, need, open_session, write_model
from nas_kd.results.rows import Int8Row
from nas_kd.training.fake_quantisation import fake_quantised
from nas_kd.training.loop import train
from nas_kd.training.recipe import Recipe
from nas_kd.training.teacher import Teacher
from nas_kd.training.views import OnlineViews, weights_digest

FLOAT, INT8, WEIGHTS, RECORD = "model.onnx", "model.int8.onnx", "model.int8.safetensors", "int8.json"
_TOLERATED = 0.003  # of accuracy that calibration alone may lose before it is brought back
_TOO_MUCH = 0.01  # with which an int8 file is not to be deployed, however fast it is
_RATE, _BATCH = 2e-4, 64  # of AdamW; SGD with momentum ended in NaN on folded weights
_RECOVERY_IMAGES = 6_000  # that a recovery sees
_WORST = 5  # layers that are named
_ARITHMETIC = "exact"  # as int8 is measured: without the overflows of old x86 processors, once part of it
# for model cards
_ADVICE = f"{INT8} on x86 without VNNI: session option {PRECISE} = 1, else sums overflow"
_TIMING = Timing(warmup=3, repeats=10, limit_s=2.0)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredFile:
    """One file of a network: what it scores on the test images (a fraction), bytes, and milliseconds of one image."""

    file: str
    test_accuracy: float
    bytes: int
    milliseconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """A network in float and in int8.

    `exact` is the float form. `worst` are the layers that int8 hurts most. `recovered` says whether the weights behind
    the int8 file were trained on: calibration alone had lost `calibration_loss` (a fraction) of the accuracy on
    validation images, of which `loss` is left.
    """

    exact: MeasuredFile
    int8: MeasuredFile
    worst: tuple[LayerError, ...]
    calibration_loss: float
    loss: float
    recovered: bool

    @property
    def deploy(self) -> MeasuredFile:
        """The file to deploy: int8 where that is faster and keeps its accuracy on validation images."""
        faster = self.int8.milliseconds < self.exact.milliseconds
        return self.int8 if faster and self.loss <= _TOO_MUCH else self.exact

    @property
    def row(self) -> Int8Row:
        """What tables say of it."""
        return Int8Row(
            test_accuracy=self.int8.test_accuracy,
            bytes=self.int8.bytes,
            latency_ms=self.int8.milliseconds,
            float_bytes=self.exact.bytes,
            float_latency_ms=self.exact.milliseconds,
            deploy=self.deploy.file,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What a model card says of it."""
        forms = {"ONNX": self.exact, "ONNX int8": self.int8}
        return {
            "int8 test accuracy": round(self.int8.test_accuracy, 4),
            **{name: f"{form.bytes:,} bytes, {form.milliseconds:.3f} ms" for name, form in forms.items()},
            "deploy": self.deploy.file,
            "ONNX Runtime": _ADVICE,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {**asdict(self), "deploy": self.deploy.file}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Quantised:
        """The inverse of `to_json`. Raises KeyError or TypeError for anything else."""
        return cls(
            exact=MeasuredFile(**values["exact"]),
            int8=MeasuredFile(**values["int8"]),
            worst=tuple(LayerError(**layer) for layer in values["worst"]),
            **{name: values[name] for name in ("calibration_loss", "loss", "recovered")},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Spec:
    """How a network becomes int8: the number of training images that calibrate it, the layers (module paths or
    patterns) that stay float, whether a loss is trained away, threads that time it, and the seed."""

    calibration_images: int = 300
    keep_float: tuple[str, ...] = ()
    recover: bool = True
    threads: int = 1
    seed: int = 0


def quantised_once(
    network: nn.Module, splits: Splits, cache: Path, spec: Int8Spec, train_images: AugmentedImages
) -> tuple[Quantised, tuple[Path, ...]]:
    """What `quantise_network` makes of a network, and its files: in a folder of `cache` that its weights, images and
    the runtime name, so that an interrupted study makes nothing twice. Raises what that raises."""
    need("onnx", "onnxruntime")
    runtime = importlib.metadata.version("onnxruntime")
    about = (train_images.augmentation, train_images.mixing, _ARITHMETIC)
    facts = (weights_digest(network), splits.digest, spec, *about)
    machine = (platform.node(), runtime)
    folder = cache / f"int8-{digest_of(repr((facts, machine)))}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}; choose another folder with --out") from error
    result = _noted(folder) or quantise_network(network, splits, folder, spec, train_images)
    return result, tuple(path for name in (FLOAT, INT8, WEIGHTS, RECORD) if (path := folder / name).is_file())


def _noted(folder: Path) -> Quantised | None:
    """What an earlier run made; the record is written last."""
    try:
        if not (folder / RECORD).is_file():
            return None
        result = Quantised.from_json(json.loads((folder / RECORD).read_text(encoding="utf-8")))
        sizes = [(folder / form.file).stat().st_size == form.bytes for form in (result.exact, result.int8)]
        return result if all(sizes) else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _logger.warning("the int8 files in %s are damaged (%s): making them again", folder, error)
        return None


def quantise_network(
    network: nn.Module, splits: Splits, folder: Path, spec: Int8Spec, train_images: AugmentedImages
) -> Quantised:
    """Writes the float and the int8 file of a network into `folder` and measures both.

    Calibration and recovery see training images, the choice between them validation images, the result test images.
    Raises DataError for images of another size than the network's, NasKdError without ONNX Runtime,
    ModelError when a file cannot be written.
    """
    network = copy.deepcopy(network).cpu().eval()
    size = splits.train.shape
    images = inputs_of(splits.train[: spec.calibration_images].decoded())
    write_model(network, size, folder / FLOAT)
    layers = quantise(folder / FLOAT, images, folder / INT8, keep_float=spec.keep_float)
    exact, rounded = (accuracy_of(folder / name, splits.val) for name in (FLOAT, INT8))
    calibrated, recovered = rounded, False
    if exact - calibrated > _TOLERATED and spec.recover:
        lost = 100 * (exact - calibrated)
        _logger.info("calibration alone loses %.1f points of validation accuracy: training it back", lost)
        rounded = max(calibrated, _recover(network, splits, folder, spec, train_images))
        recovered = rounded > calibrated
    milliseconds = time_files([folder / FLOAT, folder / INT8], size, spec.threads)
    forms = [
        MeasuredFile(
            file=name,
            test_accuracy=accuracy_of(folder / name, splits.test),
            bytes=(folder / name).stat().st_size,
            milliseconds=milliseconds[name],
        )
        for name in (FLOAT, INT8)
    ]
    result = Quantised(
        exact=forms[0],
        int8=forms[1],
        worst=tuple(layers[:_WORST]),
        calibration_loss=exact - calibrated,
        loss=exact - rounded,
        recovered=recovered,
    )
    text = json.dumps(result.to_json(), indent=2) + "\n"
    write_text(folder / RECORD, text)
    return result


def _recover(network: nn.Module, splits: Splits, folder: Path, spec: Int8Spec, train_images: AugmentedImages) -> float:
    """Trains a copy of the network under fake quantisation beside the float one, and keeps its int8 file where that is
    better on validation images. Returns its accuracy on these."""
    student = copy.deepcopy(network)
    views = OnlineViews(train_images, Teacher(network))
    epochs = max(1, round(_RECOVERY_IMAGES / len(splits.train)))
    recipe = Recipe(epochs=epochs, lr=_RATE, batch_size=_BATCH, optimizer="adamw", schedule="cosine", seed=spec.seed)
    with fake_quantised(student) as rounded:
        train(rounded, views, recipe)
    drafts = folder / f".{FLOAT}.recovered", folder / f".{INT8}.recovered"
    try:
        write_model(student, splits.train.shape, drafts[0])
        images = inputs_of(splits.train[: spec.calibration_images].decoded())
        quantise(drafts[0], images, drafts[1], keep_float=spec.keep_float)
        accuracy = accuracy_of(drafts[1], splits.val)
        if accuracy <= accuracy_of(folder / INT8, splits.val):
            _logger.info("training brought nothing back: the calibrated file stays")
        else:
            drafts[1].replace(folder / INT8)
            write_tensors(folder / WEIGHTS, student.state_dict(), {"what": f"the float weights behind {INT8}"})
        return accuracy
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def inputs_of(images: Images) -> Tensor:
    """The images as a network takes them: N×C×H×W float32, normalised."""
    return normalise(images.pixels, images.mean, images.std, torch.device("cpu"))


def accuracy_of(path: Path, images: ImageSet, batch: int = 50) -> float:
    """The share of images that an ONNX file classifies rightly in ONNX Runtime."""
    session, right = open_session(path, threads=0), 0
    for pixels, labels in zip(images.chunks(batch), torch.split(images.labels, batch), strict=True):
        logits = session.run(None, {"input": inputs_of(Images(pixels, labels, images.mean, images.std)).numpy()})[0]
        right += int((torch.from_numpy(logits).argmax(1) == labels).sum())
    return right / len(images)


def time_files(paths: Sequence[Path], input_size: Sequence[int], threads: int) -> dict[str, float]:
    """Median milliseconds of one image for each ONNX file by its name, measured turn by turn."""
    image = torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0)).numpy()
    sessions = {path.name: open_session(path, threads=threads) for path in paths}
    runs = {name: functools.partial(session.run, None, {"input": image}) for name, session in sessions.items()}
    return take_turns(runs, _TIMING)
