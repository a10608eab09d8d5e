"""What looks at a network without training it: logits, accuracies, the statistics of its batch norms."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nas_kd.data.images import Images, ImageSet, normalise
from nas_kd.errors import DataError
from nas_kd.training.small_maps import reached_taps

CALIBRATION = 512  # images are enough to recalibrate batch norms on
LOOK_CALIBRATION = 256  # these before a look at a student whose training has not ended
_SIMD = 16  # channels that oneDNN's kernels take at once
# images that a GPU looks at at once: smaller batches wait for Python, and kernels are chosen anew for each length
_GPU_LOOK = 256
_ERRORS = 2  # standard errors of an accuracy that are no accident


def evaluate(model: nn.Module, images: ImageSet, *, batch_size: int = 64) -> float:
    """The accuracy (fraction 0–1) of `model` on `images`, on the model's device, in eval mode; the mode is restored."""
    logits = predict_logits(model, images, batch_size=batch_size, padded=True)
    return (logits.argmax(1) == images.labels.cpu()).double().mean().item()


def is_below(accuracy: float, other: float, images: int) -> bool:
    """Whether an accuracy on so many images is below another one by more than accident has it."""
    variance = accuracy * (1 - accuracy) + other * (1 - other)
    return other - accuracy > _ERRORS * math.sqrt(max(variance / images, 1e-4))


def predict_logits(model: nn.Module, images: ImageSet, *, batch_size: int = 64, padded: bool = False) -> Tensor:
    """The logits N×K (float32, CPU) of `model`, in inference and eval mode; the model's mode is restored. On a GPU
    batches are larger, and when `padded` all as long as `recalibrate` has them."""
    device, last = device_of(model), suits_channels_last(model)
    if device.type == "cuda":
        batch_size = max(batch_size, _GPU_LOOK)
    length = batch_size if padded and device.type == "cuda" else 0
    with eval_mode(model), reached_taps(model), torch.inference_mode():
        pieces = []
        for pixels in images.chunks(batch_size):
            inputs = memory_layout(normalise(_padded(pixels, length), images.mean, images.std, device), last)
            pieces.append(model(inputs)[: len(pixels)].float().cpu())
    return torch.cat(pieces).clone()


def _padded(pixels: Tensor, length: int) -> Tensor:
    """Images with the first one once more as often as they lack of this length."""
    missing = max(0, length - len(pixels))
    return torch.cat([pixels, pixels[:1].expand(missing, *pixels.shape[1:])]) if missing else pixels


def recalibrate(model: nn.Module, images: Images, *, batch_size: int = 128) -> None:
    """Recomputes every batch norm's running mean and variance as the average over images, in place; ends in eval mode.

    Does nothing to a model without batch norms.

    Args:
        model: Such as a student that has just inherited its weights.
        images: They went through the training augmentation (`Views.sample`, `AugmentedImages.sample`): on clean ones
            even an untouched teacher loses points. A few hundred are enough.
        batch_size: Images at once.

    Raises:
        DataError: For fewer than 2 images.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from nas_kd import Images, recalibrate
        >>> images = Images(torch.full((4, 1, 2, 2), 255, dtype=torch.uint8), torch.arange(4), (0.0,), (1.0,))
        >>> model = nn.Sequential(nn.BatchNorm2d(1))
        >>> recalibrate(model, images)
        >>> model[0].running_mean, model.training
        (tensor([1.]), False)
    """
    device = device_of(model)
    if device.type == "cuda":
        batch_size = max(batch_size, _GPU_LOOK)
    with averaging_statistics(model) as found, reached_taps(model), torch.no_grad():
        if found:
            for indices in even_split(torch.arange(len(images)), batch_size):
                model(normalise(images.pixels[indices], images.mean, images.std, device))


@contextmanager
def averaging_statistics(model: nn.Module, spared: Collection[nn.Module] = ()) -> Iterator[bool]:
    """Inside the block every batch norm that is not `spared` collects its mean and variance anew, as averages over the
    batches that pass; the rest is in eval mode, and so is all of it afterwards. Gives whether there are any."""
    model.eval()
    left_alone = {id(module) for module in spared}
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    norms = [norm for norm in norms if id(norm) not in left_alone]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch: the cumulative average
        norm.train()
    try:
        yield bool(norms)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer; the CPU when it has none."""
    tensor = next(model.parameters(), None)
    return next(model.buffers(), torch.empty(0)).device if tensor is None else tensor.device


def amp_dtype(device: torch.device) -> torch.dtype:
    """The 16-bit type for automatic mixed precision: bfloat16, or float16 on a GPU that has no bfloat16."""
    return torch.float16 if device.type == "cuda" and not torch.cuda.is_bf16_supported() else torch.bfloat16


def even_split(indices: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """Cuts indices into batches of nearly equal length ≤ `batch_size`, and never of 1: batch norm cannot train on it.

    Raises DataError for fewer than 2 indices.

    >>> [len(batch) for batch in even_split(torch.arange(65), 64)]
    [33, 32]
    """
    if len(indices) < 2:
        raise DataError(f"batch norm needs at least 2 images, got {len(indices)}")
    return indices.tensor_split(max(1, min(math.ceil(len(indices) / batch_size), len(indices) // 2)))


def equal_split(indices: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """`even_split` with every batch as long as the longest: the first few indices come once more, in the last one. A
    GPU chooses its kernels, and records a step, anew for every length.

    >>> [batch.tolist() for batch in equal_split(torch.arange(5), 4)]
    [[0, 1, 2], [3, 4, 0]]
    """
    batches = even_split(indices, batch_size)
    missing = len(batches[0]) * len(batches) - len(indices)
    return torch.split(torch.cat([indices, indices[:missing]]), len(batches[0]))


def suits_channels_last(network: nn.Module) -> bool:
    """Whether a network runs faster with channels last in memory (`has_groups`), and may do so as a whole."""
    return has_groups(network) and not overflows(network)


def has_groups(network: nn.Module) -> bool:
    """Whether a network has grouped or depthwise convolutions: it trains faster with channels last in memory, a dense
    one on small feature maps is slower (docs/results/memory_layout.md)."""
    return any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in network.modules())


def overflows(network: nn.Module) -> bool:
    """Whether training it on a CPU with channels last in memory may write beyond a buffer: oneDNN does (torch 2.14) in
    the way back of a pointwise convolution that strides over fewer than 16 channels of 64 pixels a side or more."""
    return any(True for _ in _overflowing(network))


@contextmanager
def contiguous_where_it_overflows(network: nn.Module) -> Iterator[None]:
    """Inside the block such convolutions have weights, and read images, that are laid out channels first, whatever the
    others do."""
    with ExitStack() as stack:
        for convolution in _overflowing(network):
            weight = convolution.weight.data
            convolution.weight.data = torch.empty(weight.shape, dtype=weight.dtype).copy_(weight)  # strides of no other
            stack.callback(convolution.register_forward_pre_hook(_contiguous).remove)
        yield


def _contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in inputs)


def _overflowing(network: nn.Module) -> Iterator[nn.Conv2d]:
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.stride != (1, 1):
            if module.in_channels < _SIMD and module.weight.device.type == "cpu":
                yield module


def memory_layout(pixels: Tensor, channels_last: bool | None) -> Tensor:
    """The same images, laid out channels-last in memory when asked for."""
    return pixels.contiguous(memory_format=torch.channels_last) if channels_last else pixels


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, every module's own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
