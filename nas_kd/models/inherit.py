"""What a student takes over from its base, in closed form: the channels that matter most, and for each cheap
convolution the best approximation of the one that it replaces.

Nothing is trained here and no image is needed. Batch-norm statistics still describe the base's activations: run
`nas_kd.training.loop.recalibrate` afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

from nas_kd.genotype import Choice, group_count
from nas_kd.models.convs import ConvSpec, Shift2d
from nas_kd.models.plan import resize
from nas_kd.models.structure import Analysis, Site, is_replaced
from nas_kd.models.student import build_student, plan_of

Network = TypeVar("Network", bound=nn.Module)


def inherit_student(base: Network, analysis: Analysis, genotype: Mapping[str, Choice]) -> Network:
    """The student of `genotype` with weights inherited from `base`; milliseconds to a second for large bases.

    Raises GenotypeError when the genotype does not fit the analysed base.
    """
    student = build_student(base, analysis, genotype)
    mask = analysis.keep_mask(genotype, unit_importance(base, analysis))
    sites = {
        site.module: site for block in analysis.blocks for site in block.sites if _is_new(block.name, site, genotype)
    }
    with torch.no_grad():
        _copy_kept(student, base, analysis, mask)
        for path, site in sites.items():
            conv = base.get_submodule(path)
            assert isinstance(conv, nn.Conv2d)
            weight = _select(effective_weight(conv), (site.inputs, site.outputs), mask, site)
            bias = None if conv.bias is None else conv.bias[_index(site.outputs, mask)]
            approximate(student.get_submodule(path), replaced_spec(student, path), weight, bias)
    return student


def replaced_spec(student: nn.Module, path: str) -> ConvSpec:
    """The specification by which the convolution at `path` of a student was built."""
    spec = plan_of(student).edits[path].conv
    assert isinstance(spec, ConvSpec)
    return spec


def _is_new(block: str, site: Site, genotype: Mapping[str, Choice]) -> bool:
    return is_replaced(site, genotype[block])


def _index(labels: NDArray[np.int64], mask: NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask[labels]))


def _select(
    weight: Tensor, channels: tuple[NDArray[np.int64], NDArray[np.int64]], mask: NDArray[np.bool_], site: Site
) -> Tensor:
    inputs, outputs = channels
    weight = weight[_index(outputs, mask).to(weight.device)]
    return weight if site.spec.channelwise else weight[:, _index(inputs, mask).to(weight.device)]


def _copy_kept(student: nn.Module, base: nn.Module, analysis: Analysis, mask: NDArray[np.bool_]) -> None:
    """Copies every tensor that student and base share, cut to the kept channels; larger kernels are zero-padded."""
    old = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers(remove_duplicate=False))
    new = dict(student.named_parameters(remove_duplicate=False)) | dict(student.named_buffers(remove_duplicate=False))
    for name, target in new.items():
        source = old.get(name)
        if source is None:
            continue
        for dim, labels in enumerate(analysis.trace.axes.get(name, ())):
            if labels is not None and not mask[labels].all():
                source = source.index_select(dim, _index(labels, mask).to(source.device))
        if source.shape != target.shape:
            source = resize_kernel(source, target.shape[-1])
        target.copy_(source)


def resize_kernel(weight: Tensor, kernel_size: int) -> Tensor:
    """An O×I×k×k kernel with another size around the same centre: zero-padded or cropped."""
    old = weight.shape[-1]
    if kernel_size < old:
        cut = (old - kernel_size) // 2
        return weight[..., cut : cut + kernel_size, cut : cut + kernel_size]
    return resize(weight, ((2, kernel_size), (3, kernel_size)))


def effective_weight(conv: nn.Conv2d) -> Tensor:
    """The O×I×k×k kernel that a convolution applies: weight-standardised layers (NFNet) transform theirs first."""
    weight = conv.weight.detach()
    if isinstance(conv, ScaledStdConv2d | ScaledStdConv2dSame):
        flat, gain = weight.reshape(1, len(weight), -1), (conv.gain * conv.scale).detach().view(-1)
        return F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=conv.eps).view_as(weight)
    if isinstance(conv, StdConv2d | StdConv2dSame):
        flat = weight.reshape(1, len(weight), -1)
        return F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=conv.eps).view_as(weight)
    return weight


def unit_importance(base: nn.Module, analysis: Analysis) -> NDArray[np.float64]:
    """For each label the norm of the weights that produce it times the norm of those that read it.

    Producers count as their batch norm scales them (γ/σ). On a CIFAR ResNet this keeps better channels than |γ|.
    """
    produced, read = np.zeros(analysis.labels), np.zeros(analysis.labels)
    gains = _norm_gains(base, analysis)
    parameters = dict(base.named_parameters())
    for name, axes in analysis.trace.axes.items():
        weight = parameters.get(name)
        if weight is None or weight.ndim < 2 or axes[0] is None:
            continue
        squares = weight.detach().double().square().cpu()
        outputs = squares.flatten(1).sum(1).numpy()
        np.add.at(produced, axes[0], outputs * gains[axes[0]])
        if axes[1] is not None:
            inputs = squares.transpose(0, 1).flatten(1).sum(1).numpy()
            np.add.at(read, axes[1], inputs)
    read[read == 0] = 1.0
    importance: NDArray[np.float64] = np.sqrt(produced * read)
    return importance


def _norm_gains(base: nn.Module, analysis: Analysis) -> NDArray[np.float64]:
    gains = np.ones(analysis.labels)
    for name, module in base.named_modules():
        if not isinstance(module, nn.BatchNorm2d) or module.running_var is None or module.weight is None:
            continue
        labels = analysis.trace.axes.get(f"{name}.weight", (None,))[0]
        if labels is not None:
            gain = module.weight.detach().double().square() / (module.running_var.double() + module.eps)
            gains[labels] = gain.cpu().numpy()
    return gains


# closed forms for the cheap convolutions


def approximate(conv: nn.Module, spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> None:
    """Gives a cheap convolution the weights that come closest to the dense `weight` (O×I×k×k) it stands for."""
    weight = resize_kernel(weight, spec.kernel_size)
    if spec.channelwise:
        assert isinstance(conv, Shift2d)
        conv.order.copy_(assign_taps(weight.flatten(1).square(), conv.shares))
        if bias is not None and conv.bias is not None:
            conv.bias.copy_(bias)
        return
    spatial, pointwise = conv.get_submodule("spatial"), conv.get_submodule("pointwise")
    assert isinstance(pointwise, nn.Conv2d)
    if isinstance(spatial, Shift2d):
        energy = weight.square().sum(0).flatten(1)
        spatial.order.copy_(assign_taps(energy, spatial.shares))
        pointwise.weight.copy_(shifted_weight(weight, spatial.order, spatial.shares))
    elif spec.kind == "blueprint":
        assert isinstance(spatial, nn.Conv2d)
        first, second = split_blueprint(weight)
        pointwise.weight.copy_(first)
        spatial.weight.copy_(second)
    else:
        assert isinstance(spatial, nn.Conv2d)
        first, second = split_grouped(weight, group_count(spec.kind) or spec.in_channels)
        spatial.weight.copy_(first)
        pointwise.weight.copy_(second)
    last = spatial if spec.kind == "blueprint" else pointwise
    if bias is not None:
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        last.bias.copy_(bias)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation of …×A×B in the Frobenius norm, as factors …×A×r and …×r×B of equal norms.

    By the eigenvectors of the smaller Gram matrix (Eckart–Young); for a rank beyond min(A, B) the rest is zero.
    """
    rows, columns = matrix.shape[-2:]
    if rows > columns:
        right, left = low_rank(matrix.mT, rank)
        return left.mT, right.mT
    work = matrix.double()
    values, vectors = torch.linalg.eigh(work @ work.mT)
    best = min(rank, rows)
    scale = values[..., -best:].clamp_min(1e-24).pow(0.25)  # √σ: the square root of each singular value
    basis = vectors[..., -best:]
    left = basis * scale[..., None, :]
    right = (basis / scale[..., None, :]).mT @ work
    padding = rank - best
    return F.pad(left, (0, padding)).to(matrix.dtype), F.pad(right, (0, 0, 0, padding)).to(matrix.dtype)


def split_grouped(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """O×I×k×k as a grouped I→I convolution (I × I/g × k × k; g = I is depthwise) and a 1×1 (O×I×1×1).

    What a group of inputs contributes to the outputs is an O × (I/g)·k² matrix; its best rank-I/g factors.
    """
    outputs, inputs, kernel = weight.shape[:3]
    share = inputs // groups
    matrix = weight.reshape(outputs, groups, share * kernel**2).transpose(0, 1)  # g × O × (I/g)·k²
    left, right = low_rank(matrix, share)
    spatial = right.reshape(inputs, share, kernel, kernel)
    return spatial, left.transpose(0, 1).reshape(outputs, inputs, 1, 1)


def split_blueprint(weight: Tensor) -> tuple[Tensor, Tensor]:
    """O×I×k×k as a 1×1 (O×I×1×1) and a depthwise convolution (O×1×k×k): each output's I×k² matrix at rank 1."""
    outputs, inputs, kernel = weight.shape[:3]
    left, right = low_rank(weight.reshape(outputs, inputs, kernel**2), 1)
    return left.reshape(outputs, inputs, 1, 1), right.reshape(outputs, 1, kernel, kernel)


def assign_taps(energy: Tensor, shares: list[int]) -> Tensor:
    """Deals C channels to the taps: `shares[t]` to tap t, so that the sum of C×k² `energy` kept is the largest.

    Returns the channels in the order of their taps (C).
    """
    taps = np.repeat(np.arange(len(shares)), shares)
    slots, channels = linear_sum_assignment(-energy.detach().double().cpu().numpy()[:, taps].T)
    return torch.from_numpy(channels[np.argsort(slots)]).to(energy.device)


def shifted_weight(weight: Tensor, order: Tensor, shares: list[int]) -> Tensor:
    """The 1×1 weights (O×I×1×1) behind a shift: for the channels in `order`, the kernel's values at their taps."""
    taps = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(shares)).to(weight.device)
    return weight.flatten(2)[:, order, taps][:, :, None, None]
