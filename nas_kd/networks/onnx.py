"""Networks as ONNX files, and ONNX Runtime."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas_kd.errors import ModelError, NasKdError
from nas_kd.networks.plain import plain

BATCH = "batch"  # the name of the number of images
PRECISE = "session.x64quantprecision"  # of ONNX Runtime's options: int8 without overflows
_OPSET = 18
_CLOSE = 1e-3  # of the largest output: sums in another order differ by less
_TURN = threading.RLock()
_logger = logging.getLogger(__name__)


def need(*packages: str) -> None:
    """Raises NasKdError when one of these packages is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise NasKdError(f"ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def write_onnx(
    module: nn.Module, arguments: Sequence[Any], path: Path, *, keywords: Mapping[str, Any] | None = None
) -> None:
    """Writes a module as it runs on these arguments, their shapes fixed, as a file whose latency is measured.

    By torch's older exporter, which takes a fiftieth of the time, as long as it is there and manages. Raises ModelError
    when the module cannot be exported.
    """
    need("onnx")
    given = (*arguments, dict(keywords)) if keywords else tuple(arguments)
    try:
        with _quiet():
            torch.onnx.export(module, given, str(path), dynamo=False)
    except Exception as error:  # of any kind: the exporter runs the module's own code
        _logger.debug("the older exporter failed: %s", error)
        _export(module, given, path)


def write_model(network: nn.Module, input_size: Sequence[int], path: Path) -> None:
    """Writes a network in evaluation mode, for any number of images of `input_size` (C, H, W): `input` → `output`, in
    single precision, whatever the network's own.

    By torch's older exporter, for a tenth of the time, where ONNX Runtime is there and finds the same outputs in its
    file; else by the newer one. Raises NasKdError when ONNX is not installed, ModelError when the network cannot be
    exported or the file's outputs differ from its own.
    """
    need("onnx")
    network = _single(network)
    images = torch.zeros(2, *input_size)
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["output"]}
    if _write_by_tracing(network, images, path, **names):
        return
    _export(network, (images,), path, dynamic_shapes=({0: torch.export.Dim(BATCH)},), **names)
    apart = difference(network, input_size, path)
    if apart is not None and not apart <= _CLOSE:
        raise ModelError(f"{type(network).__name__} differs by {apart:.1g} as ONNX: use its timm form")


def _single(network: nn.Module) -> nn.Module:
    """A copy on the CPU in single precision, in evaluation mode."""
    return copy.deepcopy(plain(network)).cpu().float().eval()


def _write_by_tracing(network: nn.Module, images: Tensor, path: Path, **names: Any) -> bool:
    """Whether torch's older exporter wrote a file that gives a network's outputs for another number of images too: a
    trace can hold the number that it was made with."""
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    axes = {name: {0: BATCH} for key in names for name in names[key]}
    try:
        with _quiet():
            torch.onnx.export(
                network, (images,), str(path), dynamo=False, opset_version=_OPSET, dynamic_axes=axes, **names
            )
        _simplify(path)
        _fold_shapes(path, network, images.shape[1:])
        apart = difference(network, images.shape[1:], path)
    except Exception as error:  # of any kind: the exporter runs the module's own code
        _logger.debug("the older exporter failed: %s", error)
        return False
    return apart is not None and apart <= _CLOSE


def _simplify(path: Path) -> None:
    """Folds what a file computes from constants, by ONNX Runtime's passes that stay within ONNX's own operators."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath, options.log_severity_level = str(path), 3
    onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    model = onnx.load(path)
    used = {node.domain for node in model.graph.node}
    kept = [opset for opset in model.opset_import if opset.domain in used]  # it declares its own, used or not
    del model.opset_import[:]
    model.opset_import.extend(kept)
    onnx.save(model, path)


def _fold_shapes(path: Path, network: nn.Module, input_size: Sequence[int]) -> None:
    """Folds the arithmetic on shapes of paddings "same", which depends on the side of an image alone: a file with it is
    slower by a third. Done for one image, and kept where the file then still gives the outputs of several."""
    import onnx
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

    model = onnx.load(path)
    if not any(node.op_type == "Shape" for node in model.graph.node):
        return
    make_dim_param_fixed(model.graph, BATCH, 1)
    folded = path.with_suffix(".folded")
    try:
        onnx.save(model, folded)
        _simplify(folded)
        free_batch(folded)
        apart = difference(network, input_size, folded)
        if apart is not None and apart <= _CLOSE:
            os.replace(folded, path)
    except ModelError as error:  # it takes one image alone: the file stays as it is
        _logger.debug("shapes stay in %s: %s", path.name, error)
    finally:
        folded.unlink(missing_ok=True)


def free_batch(path: Path) -> None:
    """Lets a file whose number of images was fixed take any number of them again."""
    import onnx

    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH
    del model.graph.value_info[:]
    onnx.save(model, path)


def _export(module: nn.Module, arguments: tuple[Any, ...], path: Path, **options: Any) -> None:
    need("onnx", "onnxscript")
    try:
        with _quiet():
            torch.onnx.export(
                module, arguments, str(path), dynamo=True, external_data=False, opset_version=_OPSET, **options
            )
    except Exception as error:
        raise ModelError(f"{type(module).__name__} cannot be written as ONNX: {first_line(error)}") from error


def is_installed() -> bool:
    """Whether networks can be written as ONNX here."""
    return all(importlib.util.find_spec(package) is not None for package in ("onnx", "onnxscript"))


def difference(network: nn.Module, input_size: Sequence[int], path: Path) -> float | None:
    """The largest difference between a file's and its network's outputs for a few random images, as a fraction of the
    largest output; None where there is no ONNX Runtime to tell."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    images = torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected: Tensor = _single(network)(images)
    return float((run_onnx(path, images) - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def run_onnx(path: Path, images: Tensor) -> Tensor:
    """What ONNX Runtime makes of images (N×C×H×W). Raises NasKdError when it is not installed, ModelError when the
    file does not take the images."""
    session = open_session(path, threads=0)
    try:
        outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    except Exception as error:  # onnxruntime's errors share no class
        raise ModelError(f"ONNX Runtime cannot run a network: {first_line(error)}") from error
    return torch.from_numpy(outputs[0])


def open_session(path: Path, *, threads: int, device: str = "cpu", profile: Path | None = None) -> Any:
    """An ONNX Runtime session with so many threads (0: its own number) on a device; int8 is exact on every processor.
    With `profile` it notes how long each operator takes, in a file whose name begins so."""
    need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # on x86 without VNNI, sums of two int8 products else overflow 16 bits, which they do nowhere else
    options.add_session_config_entry(PRECISE, "1")
    provider = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise NasKdError(f"this ONNX Runtime has no {provider}: install onnxruntime-gpu, or use --latency-device cpu")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # onnxruntime's errors share no class
        raise ModelError(f"ONNX Runtime cannot load a network: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of itself, logs what it cannot do and prints its progress. Threads take turns: it keeps what
    it does in globals, and where a process prints is one too."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with (
        _TURN,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
