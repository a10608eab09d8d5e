"""How much memory a training step takes: on a CPU nothing says no before the machine swaps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

STEP_BYTES = 1152 << 20  # that a step on a CPU may keep for its way back
LARGE_STEP = 512 << 20  # of which less is kept at the price of some hundredths of the time (`recomputing`)
_LEAST = 32  # images of a piece: batch norms that see fewer cost accuracy, docs/results/photos.md


def kept_bytes(network: nn.Module, images: Tensor) -> float:
    """The bytes per image that a forward pass of `network` over N×C×H×W normalised images keeps for its backward pass;
    changes nothing in the network."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(images)  # it keeps alive what was counted
    del outputs
    return sum(kept.values()) / len(images)


def step_bytes(device: torch.device) -> int:
    """What a step may keep on a device for its way back: of a GPU half of what is free."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else STEP_BYTES


def pieces_for(batch_size: int, image_bytes: float, most: int = STEP_BYTES) -> int:
    """In how many pieces a batch goes forth and back, so that each keeps at most so many bytes, or 32 images.

    >>> pieces_for(64, 2 << 20), pieces_for(64, 20 << 20), pieces_for(256, 1 << 30)
    (1, 2, 8)
    """
    return max(1, min(math.ceil(batch_size * image_bytes / most), batch_size // _LEAST))
