"""Weights from elsewhere, made ready for the images at hand before anything is trained."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from nas_kd.data.images import Images
from nas_kd.data.splits import Splits
from nas_kd.training.anchoring import anchor
from nas_kd.training.evaluation import evaluate, is_below
from nas_kd.training.probe import (
    Head,
    HeadInputs,
    Probe,
    answers,
    find_head,
    fit_probe,
    head_inputs,
    install,
    reorder,
    worthwhile,
)

_LOOK = 2048  # training images that a head which came with the weights is judged by
_NEAR_PROBE = 0.1  # an order of classes explains a checkpoint when it comes as near to its linear probe
HeadOrigin = Literal["new", "own", "better"]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What was found of a network: its own `accuracy` on validation images and that of its linear probe, as fractions;
    None where the network has no linear head on features."""

    accuracy: float
    probe: float | None


def settle_weights(network: nn.Module, splits: Splits, seen: Images, *, head: HeadOrigin) -> Settled:
    """Makes a network with weights from elsewhere ready for these images, in place.

    Its batch norms are anchored to `seen`, training images that went through the augmentation. A `new` head becomes a
    logistic regression on the features. One that is the weights' `own` is compared with that: its outputs are put in
    the order of the classes where they clearly stand in another one, with a warning. The `better` one may be its own
    or the new one.
    """
    anchor(network, seen)
    layer = find_head(network, splits.val)
    if layer is None:
        if head == "new":
            _logger.warning(
                "%s has no linear layer on features that makes its logits: its head begins at random",
                type(network).__name__,
            )
        return Settled(accuracy=evaluate(network, splits.val), probe=None)
    images = splits.train[:_LOOK] if head == "own" else worthwhile(splits.train, layer)
    train, val = (head_inputs(network, layer, part) for part in (images, splits.val))
    probe = fit_probe(train, val, layer)
    if head != "new":
        _order(layer, train, val, probe, splits.class_names)
    if head == "new" or (head == "better" and evaluate(network, splits.val) < probe.accuracy):
        install(layer, probe)
    return Settled(accuracy=evaluate(network, splits.val), probe=probe.accuracy)


def _order(head: Head, train: HeadInputs, val: HeadInputs, probe: Probe, names: tuple[str, ...]) -> None:
    """Puts the outputs of a head in the order of the classes, where training and validation images agree that they
    stand in another one."""
    order = _best_order(answers(head, train), train.labels, len(head.weight))
    said = answers(head, val)
    own, ordered = (_share(said == labels) for labels in (val.labels, order[val.labels]))
    if is_below(own, ordered, len(said)) and ordered >= probe.accuracy - _NEAR_PROBE:
        reorder(head, order)
        moved = next(label for label in range(len(names)) if order[label] != label)
        _logger.warning(
            "THE CLASSES OF THE WEIGHTS STAND IN ANOTHER ORDER: so they know %.1f%% of the validation images, in the "
            "order that the training images show %.1f%%, so they were put in that one (%r is their class %d); "
            "--class-map says which order is theirs",
            100 * own,
            100 * ordered,
            names[moved],
            int(order[moved]),
        )


def _share(right: Tensor) -> float:
    return right.double().mean().item()


def _best_order(said: Tensor, labels: Tensor, outputs: int) -> Tensor:
    """For each class the output that stands for it, so that as many answers as possible are right; K int64."""
    classes = int(labels.max()) + 1
    counts = torch.zeros(classes, outputs)
    counts.index_put_((labels, said), torch.ones(len(labels)), accumulate=True)
    _, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    chosen = torch.as_tensor(columns)
    rest = torch.tensor([output for output in range(outputs) if output not in set(columns.tolist())], dtype=torch.int64)
    return torch.cat([chosen, rest])
