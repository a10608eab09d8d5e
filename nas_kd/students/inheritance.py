"""What a student takes over from its base, in closed form: the channels that matter most, and for each cheap
convolution the best approximation of the one that it replaces.

Nothing is trained here and no image is needed. Batch-norm statistics still describe the base's activations: run
`nas_kd.training.evaluation.recalibrate` afterwards.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

from nas_kd.analysis.labels import Axes, Labels
from nas_kd.analysis.structure import Analysis, Site, is_replaced
from nas_kd.analysis.trace import named_tensors
from nas_kd.genotype import Choice, group_count
from nas_kd.networks.convolutions import ConvSpec, Shift2d
from nas_kd.networks.plan import plan_of, resize
from nas_kd.students.assignment import deal
from nas_kd.students.building import build_student
from nas_kd.students.unit_importance import unit_importance

Network = TypeVar("Network", bound=nn.Module)
Mask = NDArray[np.bool_]


@torch.inference_mode(False)
def inherit_student(
    base: Network,
    analysis: Analysis,
    genotype: Mapping[str, Choice],
    *,
    importance: NDArray[np.float64] | None = None,
    shared: Collection[nn.Module] = (),
) -> Network:
    """The student of `genotype` with weights inherited from `base`; a fraction of a second.

    For callers who make many students of one base: `importance` orders the channels, by default
    `unit_importance(base, analysis)`; `shared` modules, which the genotype leaves alone, stay the base's own.
    Raises GenotypeError when the genotype does not fit the analysed base.
    """
    student = build_student(base, analysis, genotype, shared=shared)
    mask = analysis.keep_mask(genotype, unit_importance(base, analysis) if importance is None else importance)
    inherit_tensors(student, base, analysis, mask)
    for block in analysis.blocks:
        for site in block.sites:
            if genotype[block.name].keep and is_replaced(site, genotype[block.name]):
                _inherit_site(student, base, analysis, site, mask)
    return student


@torch.no_grad()
def _inherit_site(student: nn.Module, base: nn.Module, analysis: Analysis, site: Site, mask: Mask) -> None:
    """Weights for the cheap convolution that took the place of the base's at `site`."""
    conv, spec = base.get_submodule(site.module), replaced_spec(student, site.module)
    assert isinstance(conv, nn.Conv2d)
    weight = _select(effective_weight(conv), site, mask)
    bias = None if conv.bias is None else conv.bias[_index(site.outputs, mask).to(conv.bias.device)]
    module = student.get_submodule(site.module)
    approximate(module, spec, weight, bias)
    norm = analysis.trace.norms.get(site.module)
    if isinstance(module, Shift2d) and norm is not None:
        taps = tap_weights(module, resize_kernel(weight, spec.kernel_size))
        _fold_taps(student.get_submodule(norm), taps, module.bias)


def replaced_spec(student: nn.Module, path: str) -> ConvSpec:
    """The specification by which the convolution at `path` of a student was built."""
    spec = plan_of(student).edits[path].conv
    assert isinstance(spec, ConvSpec)
    return spec


def _index(labels: Labels, mask: Mask) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask[labels]))


def _select(weight: Tensor, site: Site, mask: Mask) -> Tensor:
    weight = weight[_index(site.outputs, mask).to(weight.device)]
    return weight if site.spec.channelwise else weight[:, _index(site.inputs, mask).to(weight.device)]


def tap_weights(shift: Shift2d, weight: Tensor) -> Tensor:
    """For each channel of a channelwise shift, what the C×1×k×k kernel that it stands for has at its tap (C)."""
    return weight.flatten(1).gather(1, shift.taps[:, None].to(weight.device))[:, 0]


def _fold_taps(norm: nn.Module, taps: Tensor, bias: Tensor | None) -> None:
    """Moves the factor of each channel, which a shift has not, into the batch norm behind it: BN(w·x) as BN'(x)."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        return
    size = taps.abs().clamp_min(1e-3 * taps.abs().max().clamp_min(1e-12))  # a dead channel would divide by zero
    sign = torch.where(taps < 0, -1.0, 1.0).to(taps)
    norm.running_mean.mul_(sign / size)
    norm.running_var.add_(norm.eps).div_(size.square()).sub_(norm.eps).clamp_min_(0)
    if norm.weight is not None:
        norm.weight.mul_(sign)
    if bias is not None:
        bias.mul_(sign / size)


@torch.no_grad()
def inherit_tensors(student: nn.Module, base: nn.Module, analysis: Analysis, mask: Mask) -> None:
    """Copies every tensor that student and base share, cut to the kept channels; larger kernels are zero-padded."""
    old = named_tensors(base)
    for name, target in named_tensors(student).items():
        source = old.get(name)
        if source is None or source is target:
            continue
        source = drop_channels(source, analysis.trace.axes.get(name, ()), mask)
        if source.shape != target.shape:
            source = resize_kernel(source, target.shape[-1])
        target.copy_(source)


def drop_channels(tensor: Tensor, axes: Axes, mask: Mask, *, had: Mask | None = None) -> Tensor:
    """A tensor without the channels whose labels `mask` drops; `axes` label its dimensions in the base. It has the
    labels of the base, or of those only what `had` kept."""
    for dim, labels in enumerate(axes):
        left = labels if labels is None or had is None else labels[had[labels]]
        if left is not None and not mask[left].all():
            tensor = tensor.index_select(dim, _index(left, mask).to(tensor.device))
    return tensor


def resize_kernel(weight: Tensor, kernel_size: int) -> Tensor:
    """An O×I×k×k kernel with another size around the same centre: zero-padded or cropped."""
    old = weight.shape[-1]
    if kernel_size < old:
        drop_channels = (old - kernel_size) // 2
        return weight[..., drop_channels : drop_channels + kernel_size, drop_channels : drop_channels + kernel_size]
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


# closed forms for the cheap convolutions


def approximate(conv: nn.Module, spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> None:
    """Gives a cheap convolution the weights that come closest to the dense `weight` (O×I×k×k) it stands for."""
    if spec.kind == "shift" or spec.kernel_size < weight.shape[-1]:
        weight = resize_kernel(weight, spec.kernel_size)  # else only the spatial factor needs the zeros around it
    if spec.channelwise:
        assert isinstance(conv, Shift2d)
        conv.taps.copy_(assign_taps(weight.flatten(1).square(), conv.shares))
        if bias is not None and conv.bias is not None:
            conv.bias.copy_(bias)
        return
    spatial, pointwise = conv.get_submodule("spatial"), conv.get_submodule("pointwise")
    assert isinstance(pointwise, nn.Conv2d)
    if isinstance(spatial, Shift2d):
        energy = weight.square().sum(0).flatten(1)
        spatial.taps.copy_(assign_taps(energy, spatial.shares))
        pointwise.weight.copy_(shifted_weight(weight, spatial.taps))
    elif spec.kind == "blueprint":
        assert isinstance(spatial, nn.Conv2d)
        first, second = split_blueprint(weight)
        pointwise.weight.copy_(first)
        spatial.weight.copy_(resize_kernel(second, spec.kernel_size))
    else:
        assert isinstance(spatial, nn.Conv2d)
        first, second = split_grouped(weight, group_count(spec.kind) or spec.in_channels)
        spatial.weight.copy_(resize_kernel(first, spec.kernel_size))
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
    # single precision will do: the product of the factors is a projection, exact whatever the eigenvalues' error
    work = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    peak = work.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(work.dtype).tiny)
    work = work / peak
    values, vectors = _eigh(work @ work.mT)
    best = min(rank, rows)
    floor = torch.finfo(work.dtype).eps ** 2  # of the largest eigenvalue, which is at least 1 now
    scale = values[..., -best:].clamp_min(floor).pow(0.25)  # √σ: the square root of each singular value
    basis = vectors[..., -best:]
    left = basis * scale[..., None, :] * peak.sqrt()
    right = (basis / scale[..., None, :]).mT @ work * peak.sqrt()
    padding = rank - best
    return F.pad(left, (0, padding)).to(matrix.dtype), F.pad(right, (0, 0, 0, padding)).to(matrix.dtype)


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and -vectors; LAPACK's single precision now and then gives up on a rank-deficient matrix."""
    try:
        values, vectors = torch.linalg.eigh(gram)
    except RuntimeError:  # torch.linalg.LinAlgError
        values, vectors = (part.to(gram.dtype) for part in torch.linalg.eigh(gram.double()))
    return values, vectors


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

    Returns the tap of each channel (C).
    """
    return torch.from_numpy(deal(energy.detach().double().cpu().numpy(), shares)).to(energy.device)


def shifted_weight(weight: Tensor, taps: Tensor) -> Tensor:
    """The 1×1 weights (O×I×1×1) behind a shift: for each input channel, the kernel's values at its tap."""
    return weight.flatten(2)[:, torch.arange(len(taps), device=weight.device), taps.to(weight.device)][:, :, None, None]
