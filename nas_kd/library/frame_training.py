"""Training one frame of a network alone, to write what the teacher's writes when it reads the same."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nas_kd.library.refit import batch_statistics
from nas_kd.students.frames import Recording, run_frame
from nas_kd.training.evaluation import averaging_statistics, contiguous_where_it_overflows, even_split
from nas_kd.training.small_maps import reached_taps

MOST_IMAGES = 256  # that a layer is fitted or measured on
PART = 64  # images that pass a frame at a time where it does not matter: more do not stay in a processor's cache
_POSITIONS = 65_536  # and positions in them
_BATCH_POSITIONS = 16_384  # of one training step, where a batch has more


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameRecipe:
    """How a frame is trained: Adam at a peak rate `lr` that falls by a cosine, batches of `batch_size` at most."""

    steps: int
    batch_size: int
    lr: float
    seed: int


def images_for(recorded: Recording, positions: int = _POSITIONS, most: int = MOST_IMAGES) -> int:
    """How many images have so many positions in the outputs of a frame: an eighth of `most` to `most`."""
    each = min(tensor[0, 0].numel() if tensor.ndim == 4 else tensor[0].numel() for tensor in recorded.outputs)
    return max(most // 8, min(most, -(-positions // each)))


def variances(recorded: Recording) -> list[Tensor]:
    """Of each output of a frame, over everything."""
    return [output.var().clamp_min(1e-12) for output in recorded.outputs]


def frame_error(got: Sequence[Tensor], wanted: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """The mean squared error over the variance, `scales`, of each output of a frame; the sum of them, a scalar."""
    errors = [(ours - theirs).square().mean() / scale for ours, theirs, scale in zip(got, wanted, scales, strict=True)]
    return torch.stack(errors).sum()


@torch.no_grad()
def run_in_parts(module: nn.Module, recorded: Recording, at_once: int = PART) -> tuple[Tensor, ...]:
    """What a frame in eval mode writes for a recording, `at_once` images at a time."""
    with reached_taps(module):
        parts = [run_frame(module, recorded[part]) for part in torch.split(torch.arange(len(recorded)), at_once)]
    return tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))


@torch.no_grad()
def recalibrate_frame(
    module: nn.Module, recorded: Recording, at_once: int = 128, *, spared: Collection[nn.Module] = ()
) -> None:
    """Recomputes the running statistics of a frame's batch norms but `spared` ones as averages over a recording; ends
    in eval mode."""
    with averaging_statistics(module, spared) as found, reached_taps(module):
        if found:
            for part in even_split(torch.arange(len(recorded)), at_once):
                run_frame(module, recorded[part])


def distil_frame(
    module: nn.Module, parameters: Sequence[nn.Parameter], recorded: Recording, recipe: FrameRecipe
) -> None:
    """Trains some parameters of a frame to write what passed out of the teacher's: `frame_error`, batch norms on batch
    statistics."""
    scales = variances(recorded)
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.Adam(parameters, lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    batch_size = images_for(recorded, _BATCH_POSITIONS, recipe.batch_size)
    order = torch.empty(0, dtype=torch.int64)
    module.eval()
    with batch_statistics(module), reached_taps(module), contiguous_where_it_overflows(module):
        for _ in range(recipe.steps):
            if len(order) < batch_size:
                order = torch.randperm(len(recorded), generator=generator)
            batch, order = recorded[order[:batch_size]], order[batch_size:]
            loss = frame_error(run_frame(module, batch), batch.outputs, scales)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
