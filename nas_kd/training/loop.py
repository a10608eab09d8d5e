"""The one training loop."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nas_kd.data.augment import derive_seed
from nas_kd.data.images import Batch, ImageSet, TrainingData, normalise
from nas_kd.data.memory import give_back
from nas_kd.errors import DeviceError, TrainingError
from nas_kd.training.evaluation import (
    amp_dtype,
    contiguous_where_it_overflows,
    device_of,
    equal_split,
    eval_mode,
    evaluate,
    even_split,
    has_groups,
    memory_layout,
)
from nas_kd.training.losses import student_loss
from nas_kd.training.ranks import Ranks, current
from nas_kd.training.recipe import Recipe
from nas_kd.training.recomputing import recomputing
from nas_kd.training.resume import Keeper, Progress, Stateful
from nas_kd.training.small_maps import reached_taps
from nas_kd.training.step_graph import StepGraphs
from nas_kd.training.step_memory import LARGE_STEP, kept_bytes, pieces_for, step_bytes

Criterion = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # outputs, labels, the teacher's logits → mean loss
_CHECK_STEPS = 50  # between two looks at the loss: each look makes a GPU wait
_RESIDENT = 0.25  # of the free device memory may hold the training data
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a training gave: `accuracies`, (epoch from 1, fraction) per evaluated epoch; `losses`, mean per epoch;
    `images`, how many were seen; `seconds` of this run, without what an earlier, killed one had done."""

    accuracies: tuple[tuple[int, float], ...]
    losses: tuple[float, ...]
    images: int
    seconds: float

    @property
    def accuracy(self) -> float:
        """The last evaluated accuracy; NaN when nothing was evaluated."""
        return self.accuracies[-1][1] if self.accuracies else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Where and how a training runs, as opposed to its recipe: the file it resumes from, and the clock in seconds.

    With `again` a resumed training first reports the accuracies of its state: it may have been killed before the last
    was heard, or have been another process's. One that is `sparing` passes over states of short epochs (`Keeper`): a
    report that nobody counts may hear those again. One that is `shared` goes over all processes that torchrun started
    (`ranks`).
    """

    checkpoint: Path | None = None
    clock: Callable[[], float] = time.monotonic
    again: bool = False
    sparing: bool = False
    shared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """What is trained, and towards what: `network` by `criterion` (see `losses`); `measure` gives the accuracy
    (fraction) that is reported, None for none. One that is `recordable` does the same kernels in every step, so that a
    GPU may replay them (`step_graph`): neither network nor criterion may change with Python's own state."""

    network: nn.Module
    criterion: Criterion
    measure: Callable[[nn.Module], float] | None = None
    recordable: bool = False


def ignore(epoch: int, accuracy: float) -> None:
    """The report that tells nobody."""


def train(
    student: nn.Module,
    data: TrainingData,
    recipe: Recipe,
    *,
    val: ImageSet | None = None,
    report: Callable[[int, float], None] = ignore,
    run: Run = Run(),
) -> TrainResult:
    """Trains `student` in place, beside a teacher where `data` brings its logits: `fit` with the `student_loss`.

    At each of the recipe's `eval_epochs` (and the last) the accuracy on `val` is passed to `report`.
    """
    measure = None if val is None else functools.partial(evaluate, images=val)
    return fit(student_task(student, recipe, measure), data, recipe, report=report, run=run)


def student_task(student: nn.Module, recipe: Recipe, measure: Callable[[nn.Module], float] | None = None) -> Task:
    """Training a student with the recipe's `student_loss`."""
    criterion = functools.partial(student_loss, distill_weight=recipe.distill_weight, soft=recipe.make_soft_loss())
    return Task(network=student, criterion=criterion, measure=measure, recordable=True)


def fit(
    task: Task,
    data: TrainingData,
    recipe: Recipe,
    *,
    report: Callable[[int, float], None] = ignore,
    run: Run = Run(),
) -> TrainResult:
    """Trains the task's network in place, on the device that it is on, and leaves it in eval mode.

    At each of the recipe's `eval_epochs` (and the last) its measure is passed to `report`, which may raise anything to
    stop. With `run.checkpoint` the state is kept there at those epochs and a killed training goes on from it; epochs
    that were reported before are not reported again. The same seed and number of processes give the same weights on a
    CPU. Raises TrainingError when the loss is not finite or one image does not fit the device, DataError for < 2
    images, RankError when another process has ended.
    """
    started, network, ranks = run.clock(), task.network, current() if run.shared else Ranks()
    device = device_of(network)
    if recipe.channels_last is None:
        recipe = replace(recipe, channels_last=has_groups(network))
    lengths = [len(batch) for batch in _batches(data, recipe, 0, device)]
    with (
        ranks.begin(replace(task, measure=None), data, recipe),
        _own_randomness(device),
        _layout(network, recipe),
        _left_in_eval(network),
        closing(_Stepper(task, data, recipe, ranks, steps=len(lengths) * recipe.epochs)) as stepper,
    ):
        data = _resident(data, device)
        keeper = Keeper(run.checkpoint, stepper.parts(), recipe, len(data), sparing=run.sparing)
        progress = _in_step(ranks, keeper.restore(), stepper.parts())
        for epoch, accuracy in progress.accuracies if run.again else ():
            report(epoch, accuracy)
        for epoch in range(progress.epoch, recipe.epochs):
            progress = progress.after_epoch(_run_epoch(stepper, data, epoch))
            if recipe.evaluates(progress.epoch):
                if task.measure is not None:
                    progress = progress.with_accuracy(stepper.measured(task.measure))
                keeper.keep(progress)
                if task.measure is not None:
                    report(progress.epoch, progress.accuracies[-1][1])
        stepper.adopt_average()
    del stepper
    give_back()
    return TrainResult(
        accuracies=progress.accuracies,
        losses=progress.losses,
        images=progress.epoch * sum(lengths),
        seconds=run.clock() - started,
    )


class _Stepper:
    """One optimiser step: learning rate, precision, gradient accumulation when memory is short, moving average."""

    def __init__(self, task: Task, data: TrainingData, recipe: Recipe, ranks: Ranks, *, steps: int) -> None:
        self.network, self.criterion, self.ranks = task.network, task.criterion, ranks
        self.trainable = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        if not self.trainable:
            raise TrainingError("nothing to train: every parameter of the network has requires_grad=False")
        self.recipe, self.steps, self.pieces, self.is_large = recipe, steps, 1, False
        self.mean, self.std, self.device = data.mean, data.std, device_of(self.network)
        self.optimizer = recipe.make_optimizer(self.trainable)
        self.dtype = amp_dtype(self.device) if recipe.amp else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.average = recipe.make_average(self.network)
        self.graphs = StepGraphs(self._descend, self.network, self.device)
        if not task.recordable or self.dtype == torch.float16 or ranks.size > 1:  # its scaler skips steps; they talk
            self.graphs.give_up()
        if (
            self.device.type == "cpu" or ranks.size > 1
        ):  # who has no memory left leaves the others in the middle of a step
            self.pieces = ranks.most(self._pieces(data))

    def _pieces(self, data: TrainingData) -> int:
        """In how many pieces batches go, by what one image of them takes of the memory; notes whether each is large."""
        pixels = normalise(data.batch(0, torch.arange(min(2, len(data)))).pixels, self.mean, self.std, self.device)
        try:
            with eval_mode(self.network):
                each = kept_bytes(self.network, memory_layout(pixels, self.recipe.channels_last))
        except torch.OutOfMemoryError:  # the first step says it
            return 1
        images = math.ceil(min(self.recipe.batch_size, len(data)) / self.ranks.size)
        each /= 2 if self.dtype is not None else 1
        pieces = pieces_for(images, each, step_bytes(self.device))
        self.is_large = self.device.type == "cpu" and self.ranks.size == 1 and images * each / pieces > LARGE_STEP
        if self.is_large:
            give_back()
        return pieces

    def step(self, batch: Batch, step: int, share: float = 1.0) -> Tensor:
        """Descends on one batch, of which this rank has a `share`; its mean loss, still on the device. `step` counts
        from the start of the training."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(step, self.steps)
        loss = self.ranks.add_up(self._backward(batch, share), self.trainable)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.network, step=step)
        return loss

    def _backward(self, batch: Batch, share: float) -> Tensor:
        while True:
            try:
                alone = self.pieces == self.ranks.size == 1
                return self.graphs(self._ready(batch)) if alone else self._accumulate(batch, share)
            except torch.OutOfMemoryError as error:
                self._halve(len(batch.labels), error)

    def _accumulate(self, batch: Batch, share: float) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        for indices in torch.arange(len(batch.labels), device=batch.labels.device).tensor_split(self.pieces):
            logits = None if batch.logits is None else batch.logits[indices]
            piece = self._ready(Batch(batch.pixels[indices], batch.labels[indices], logits))
            loss += self._descend(piece, share * len(indices) / len(batch.labels))
        return loss

    def _ready(self, batch: Batch) -> Batch:
        """The same batch on the device, its pixels normalised (float32) and laid out."""
        pixels = normalise(batch.pixels, self.mean, self.std, self.device)
        labels = batch.labels.to(self.device, non_blocking=True)
        logits = None if batch.logits is None else batch.logits.to(self.device, non_blocking=True)
        return Batch(memory_layout(pixels, self.recipe.channels_last), labels, logits)

    def _descend(self, batch: Batch, share: float = 1.0) -> Tensor:
        """Adds the gradients of a batch that is ready, which counts for this share; that share of its mean loss."""
        autocast = torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)
        lean = recomputing(self.network) if self.is_large else nullcontext()
        with autocast, self.ranks.norms_together(), lean:
            outputs = self.network(batch.pixels)
        loss = self.criterion(outputs, batch.labels, batch.logits) * share
        torch.autograd.backward(self.scaler.scale(loss))
        return loss.detach()

    def _halve(self, batch_size: int, error: torch.OutOfMemoryError) -> None:
        if self.ranks.size > 1:
            raise DeviceError(f"out of memory on {self.device}: lower --batch-size, or start more processes") from error
        self.pieces *= 2
        self.graphs.give_up()
        if batch_size < 2 * self.pieces:
            raise TrainingError(
                f"not even {batch_size // (self.pieces // 2)} images fit the memory of {self.device}: "
                "use smaller images or another device"
            ) from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        _logger.warning(
            "out of memory: batches of %d go on as %d pieces with accumulated gradients", batch_size, self.pieces
        )

    def averaged(self) -> nn.Module:
        """The network to evaluate: the moving average where the recipe has one."""
        return self.network if self.average is None else self.average.module

    def measured(self, measure: Callable[[nn.Module], float]) -> float:
        """The accuracy of the network to evaluate."""
        if not self.is_large:
            return measure(self.averaged())
        give_back()  # else what steps have freed adds to what looks need, and the other way round
        accuracy = measure(self.averaged())
        give_back()
        return accuracy

    def adopt_average(self) -> None:
        """Gives the network the weights of its moving average, if there is one."""
        if self.average is not None:
            self.network.load_state_dict(self.average.module.state_dict())

    def close(self) -> None:
        """Frees what a GPU keeps for it, now: graphs hang in a circle with this."""
        self.graphs.give_up()

    def parts(self) -> dict[str, Stateful]:
        """Everything that holds state between two epochs."""
        parts: dict[str, Stateful] = {"network": self.network, "optimizer": self.optimizer, "scaler": self.scaler}
        if self.average is not None:
            parts["average"] = self.average.module
        return parts


def take_part(ranks: Ranks) -> int:
    """Takes part in every training that rank 0 shares, until it has ended; the exit code of this process."""
    while (job := ranks.await_training()) is not None:
        with suppress(TrainingError):  # rank 0 says it
            fit(*job, run=Run(shared=True))
        del job  # its memory, before hours of waiting
    return 0


def _in_step(ranks: Ranks, progress: Progress, parts: Mapping[str, Stateful]) -> Progress:
    """Rank 0's progress and state, at every rank."""
    kept = {name: part.state_dict() for name, part in parts.items()} if progress.epoch else {}
    progress, kept = ranks.from_first((progress, kept))
    if ranks.rank:
        for name, state in kept.items():
            parts[name].load_state_dict(state)
    return progress


def _run_epoch(stepper: _Stepper, data: TrainingData, epoch: int) -> float:
    """A step on every batch of an epoch; the mean loss."""
    recipe, ranks, total = stepper.recipe, stepper.ranks, torch.zeros((), device=stepper.device)
    torch.manual_seed(derive_seed(recipe.seed, "dropout", epoch, *ranks.seed))
    stepper.network.train()
    batches = _batches(data, recipe, epoch, stepper.device)
    parts = data.batches(epoch, [ranks.part(indices) for indices in batches])
    for step, (indices, batch) in enumerate(zip(batches, parts, strict=True), epoch * len(batches)):
        total += stepper.step(batch, step, len(batch.labels) / len(indices)) * len(indices)
        if step % _CHECK_STEPS == 0:
            _check_loss(total, epoch, recipe)
    return _check_loss(total, epoch, recipe) / sum(map(len, batches))


def _batches(data: TrainingData, recipe: Recipe, epoch: int, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(derive_seed(recipe.seed, "order", epoch))
    split = equal_split if device.type == "cuda" else even_split
    return split(torch.randperm(len(data), generator=generator), recipe.batch_size)


def _check_loss(total: Tensor, epoch: int, recipe: Recipe) -> float:
    value = total.item()
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss became {value} in epoch {epoch + 1} of {recipe.epochs} with {recipe.optimizer} at a peak "
            f"learning rate of {recipe.lr:g}: lower the learning rate, or look for weights that are not finite"
        )
    return value


def _resident(data: TrainingData, device: torch.device) -> TrainingData:
    if device.type != "cuda":
        return data
    free, _ = torch.cuda.mem_get_info(device)
    return data.to(device) if data.bytes <= _RESIDENT * free else data


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    # dropout and drop-path draw from torch's global generators: ours while training, the caller's afterwards
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def _layout(network: nn.Module, recipe: Recipe) -> Iterator[None]:
    if recipe.channels_last:
        network.to(memory_format=torch.channels_last)
    try:
        with reached_taps(network), contiguous_where_it_overflows(network) if recipe.channels_last else nullcontext():
            yield
    finally:
        if recipe.channels_last:  # safetensors refuses weights in another layout
            network.to(memory_format=torch.contiguous_format)


@contextmanager
def _left_in_eval(network: nn.Module) -> Iterator[None]:
    try:
        yield
    finally:
        network.eval()
