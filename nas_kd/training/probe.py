"""A linear probe: logistic regression on the features that a frozen network gives its classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas_kd.data.images import ImageSet
from nas_kd.training.evaluation import predict_logits

_PENALTIES = (0.1, 0.01, 0.001)  # of squared weights, the strongest first: each begins where the one before ended
_WORK = 2e9  # multiplications of one pass over the features: more images are left out
_LEAST, _MOST = 10, 10_000  # images of a class, where there are as many; and of all
_ITERATIONS = 200

Head = nn.Linear | nn.Conv2d


@dataclass(frozen=True, slots=True, eq=False)
class HeadInputs:
    """What N images make a classifier read: `values` N×F, and their `labels` N."""

    values: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A classifier that reads features as they are: `weight` K×F, `bias` K, and its `accuracy` (fraction) on the images
    that its penalty was chosen on."""

    weight: Tensor
    bias: Tensor
    accuracy: float


def find_head(network: nn.Module, images: ImageSet) -> Head | None:
    """The layer that makes the logits of features, linear or a 1×1 convolution of pooled ones; None without such."""
    outputs: dict[Head, Tensor] = {}

    def keep(layer: Head, _: tuple[Tensor, ...], output: Tensor) -> None:
        outputs[layer] = output.detach().flatten(1).float().cpu()

    layers = [module for module in network.modules() if _may_be_head(module)]
    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        logits = predict_logits(network, images[:2])
    finally:
        for handle in handles:
            handle.remove()
    same = [layer for layer, output in outputs.items() if output.shape == logits.shape and torch.equal(output, logits)]
    return same[-1] if same else None


def _may_be_head(module: nn.Module) -> bool:
    is_pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    return is_pointwise or isinstance(module, nn.Linear)


def head_inputs(network: nn.Module, head: Head, images: ImageSet) -> HeadInputs:
    """What `head` reads of each image, in eval mode; float32 on the CPU."""
    pieces: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pieces.append(inputs[0].detach().flatten(1).float().cpu())

    handle = head.register_forward_pre_hook(keep)
    try:
        predict_logits(network, images)
    finally:
        handle.remove()
    return HeadInputs(
        torch.cat(pieces).clone(), images.labels.cpu()
    )  # no tensor of inference mode: a fit differentiates


def worthwhile(images: ImageSet, head: Head) -> ImageSet:
    """As many of the images as a probe of this head can be fitted to within a minute or two."""
    outputs, inputs = head.weight.shape[:2]
    return images[: max(min(int(_WORK / (outputs * inputs)), _MOST), _LEAST * outputs)]


def fit_probe(train: HeadInputs, val: HeadInputs, head: Head) -> Probe:
    """The logistic regression, on standardised features and with the L2 penalty of the least cross-entropy on `val`,
    that could stand in place of `head`."""
    std, mean = torch.std_mean(train.values, dim=0, correction=0)
    std = std.clamp(min=1e-6)
    mean = torch.zeros_like(mean) if head.bias is None else mean
    weight = torch.zeros(head.weight.shape[:2])
    bias = torch.zeros(len(weight))
    standard = HeadInputs((train.values - mean) / std, train.labels)
    best, least = Probe(weight, bias, 0.0), float("inf")
    for penalty in _PENALTIES:
        weight, bias = _descend(standard, weight, bias if head.bias is not None else None, penalty)
        plain = weight / std
        probe = Probe(plain, bias - plain @ mean, 0.0)
        logits = F.linear(val.values, probe.weight, probe.bias)
        loss = F.cross_entropy(logits, val.labels).item()
        if loss < least:
            accuracy = (logits.argmax(1) == val.labels).double().mean().item()
            best, least = Probe(probe.weight, probe.bias, accuracy), loss
    return best


def _descend(data: HeadInputs, weight: Tensor, bias: Tensor | None, penalty: float) -> tuple[Tensor, Tensor]:
    """Minimises the mean cross-entropy + penalty/2 · |W|²; zeros for the bias where there is to be none."""
    free = [weight.clone().requires_grad_(), *([] if bias is None else [bias.clone().requires_grad_()])]
    optimizer = torch.optim.LBFGS(free, max_iter=_ITERATIONS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(data.values, *free), data.labels) + penalty / 2 * free[0].square().sum()
        # a class without images must not send its bias to minus infinity
        loss = loss + 1e-6 * sum(tensor.square().sum() for tensor in free[1:])
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    found = [tensor.detach() for tensor in free]
    return found[0], found[1] if bias is not None else torch.zeros(len(weight))


@torch.no_grad()
def install(head: Head, probe: Probe) -> None:
    """Gives the head the weights of the probe."""
    head.weight.copy_(probe.weight.view_as(head.weight))
    if head.bias is not None:
        head.bias.copy_(probe.bias)


@torch.no_grad()
def reorder(head: Head, order: Tensor) -> None:
    """Makes output `order[k]` of the head its output k; order K int64."""
    head.weight.copy_(head.weight[order.to(head.weight.device)])
    if head.bias is not None:
        head.bias.copy_(head.bias[order.to(head.bias.device)])


def answers(head: Head, features: HeadInputs) -> Tensor:
    """The class that a head as it is says of each image."""
    weight, bias = head.weight.detach().flatten(1).cpu(), None if head.bias is None else head.bias.detach().cpu()
    return F.linear(features.values, weight.float(), None if bias is None else bias.float()).argmax(1)
