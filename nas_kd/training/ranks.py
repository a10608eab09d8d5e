"""One training over several processes, as `torchrun` starts them: who takes part, and what they add up.

Rank 0 runs a command as ever. The others wait, asleep, until it begins a training that is shared; each then has its
part of every batch, and gradients and batch norms' statistics are summed over all of them, so that a step is that of
the whole batch, but for rounding. Gradients go in one piece, in the order of the parameters: the buckets of torch's
DistributedDataParallel are ordered anew after a first step, and a resumed training would be another one.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import signal
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nas_kd.errors import DeviceError, RankError, TrainingError
from nas_kd.files import mapped
from nas_kd.training.synchronised import NormsTogether, reaching

_MEETING = timedelta(minutes=10)  # for all processes to start
_STAGE = timedelta(days=365)  # that rank 0 may be at something else
_ENDED = "ended"  # what rank 0 says in the end


class Ranks:
    """The processes of a training, seen by one of them: its `rank` among `size`, its `place` among those of its machine
    (None where it is alone). `busy` while a training goes on: who leaves then leaves the others in the middle of it."""

    def __init__(self, rank: int = 0, size: int = 1, place: int | None = None) -> None:
        self.rank, self.size, self.place = rank, size, place
        self.group: Any = dist.new_group(timeout=_STAGE) if size > 1 else None
        self.busy = False

    @property
    def seed(self) -> tuple[int, ...]:
        """What makes this rank's random numbers its own: rank 0 has those of a process that is alone."""
        return (self.rank,) if self.rank else ()

    def begin(self, *job: Any) -> AbstractContextManager[None]:
        """Rank 0 tells the others of a training that all begin now; the block is the training."""
        if self.size == 1:
            return nullcontext()
        if self.rank == 0:
            self.from_first(job)
        return self._training()

    @contextmanager
    def _training(self) -> Iterator[None]:
        self.busy = True
        try:
            yield
        except TrainingError:  # which every rank has met
            self.busy = False
            raise
        self.busy = False

    def await_training(self) -> Any:
        """The next training that rank 0 begins; None when it has ended."""
        job = self.from_first()
        return None if job == _ENDED else job

    def from_first(self, value: Any = None) -> Any:
        """Rank 0's value, at every rank; its tensors on this one's device. Raises TrainingError for one that cannot be
        sent."""
        if self.size == 1:
            return value
        sent = [packed(value) if self.rank == 0 else None]
        with reaching():
            dist.broadcast_object_list(sent, src=0, group=self.group, device=torch.device("cpu"))
        if self.rank == 0:
            return value
        assert sent[0] is not None
        # by our own rank 0, which runs the same code: nothing from outside
        return torch.load(io.BytesIO(sent[0]), map_location=self._here, weights_only=False)

    def _here(self, storage: Any, location: str) -> Any:
        """A tensor's memory where this rank has its own."""
        return storage if location == "cpu" else storage.cuda(gpu(self.place or 0).index)

    def part(self, indices: Tensor) -> Tensor:
        """This rank's part of a batch. Raises TrainingError where there is not an image for each."""
        if len(indices) < self.size:
            raise TrainingError(
                f"a batch of {len(indices)} images is too small for {self.size} processes: raise --batch-size, or "
                "start fewer"
            )
        return indices.tensor_split(self.size)[self.rank]

    def most(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        with reaching():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def norms_together(self) -> AbstractContextManager[Any]:
        """Inside the block batch norms that learn have the statistics of all ranks' images."""
        return nullcontext() if self.group is None else NormsTogether(self.group)

    def add_up(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Sums the gradients over all ranks, in place; the sum of the losses (scalars)."""
        if self.group is None:
            return loss
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        whole = torch.cat([loss.reshape(1), *(gradient.reshape(-1) for gradient in gradients)])
        with reaching():
            dist.all_reduce(whole, group=self.group)
        sums = torch.split(whole, [1, *(gradient.numel() for gradient in gradients)])
        for gradient, total in zip(gradients, sums[1:], strict=True):
            gradient.copy_(total.view(gradient.shape))
        return sums[0].reshape(())

    def leave(self) -> None:
        """Ends the waiting of the others; in the middle of a training they see that this one's connections end."""
        if self.busy:
            return
        if self.rank == 0:
            with suppress(RankError):  # what this one ended with says more
                self.from_first(_ENDED)
        dist.destroy_process_group()


class _Process:
    """What this process is part of."""

    ranks = Ranks()


def current() -> Ranks:
    """The processes that train together with this one: itself alone unless `together` says otherwise."""
    return _Process.ranks


def gpu(place: int) -> torch.device:
    """The GPU of the process in this place of its machine. Raises DeviceError where there are fewer."""
    if place >= torch.cuda.device_count():
        raise DeviceError(
            f"process {place + 1} of this machine has no GPU, there are {torch.cuda.device_count()}: give torchrun as "
            "many --nproc-per-node, or the command --device cpu"
        )
    return torch.device("cuda", place)


@contextmanager
def together() -> Iterator[Ranks]:
    """The processes that torchrun started, while the block runs. Raises RankError when they do not find each other."""
    rank, size, place = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if place < torch.cuda.device_count():
        torch.cuda.set_device(place)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_MEETING)
        ranks = _Process.ranks = Ranks(rank, size, place)
    except (RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0][:200]
        raise RankError(
            f"process {rank + 1} of {size} does not find the others that torchrun started: {why}"
        ) from error
    # torchrun ends all processes when one has died: rank 0 says so, the others end without a word
    signal.signal(signal.SIGTERM, signal.SIG_DFL if rank else signal.default_int_handler)
    if rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; rank 0 decides
        logging.disable(logging.WARNING)  # rank 0 says the same
    try:
        yield ranks
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process ends anyway, and has one line to say
        _Process.ranks = Ranks()
        ranks.leave()


def packed(value: Any) -> bytes:
    """Anything with tensors, as bytes; files that are mapped into memory by their names."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer, pickle_module=mapped)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise TrainingError(
            f"this training cannot be sent to other processes ({str(error).splitlines()[0][:200]}): run it without "
            "torchrun"
        ) from error
    return buffer.getvalue()
