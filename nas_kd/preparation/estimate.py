"""What a study is going to do and about how long that takes on this machine, said before it begins."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nas_kd.arguments.study import Settings
from nas_kd.costs.forward_time import STEP, forward_seconds
from nas_kd.library.effort import ENTRY, PASSES, UNBEATEN
from nas_kd.library.frame_training import MOST_IMAGES
from nas_kd.library.library import made_choices
from nas_kd.library.spec import LibrarySpec, plan_library
from nas_kd.preparation.effort import more_epochs, student_share
from nas_kd.preparation.job import Job
from nas_kd.training.evaluation import LOOK_CALIBRATION, memory_layout, suits_channels_last
from nas_kd.training.small_maps import reached_taps

_BASELINES = 3  # that are refined beside the front
PROBE = 0.4  # of an epoch does it take to anchor a network from elsewhere and to fit its head
_LOOK_SECONDS = 1.2  # that one pass may take while the machine is timed: few images would fit into caches
_FIT, _DAMAGE = 0.04, 0.4  # that a pass through a frame, and one through the base, take for a library at most
_LAYER_SECONDS = 3e-4  # that a layer takes in a training step besides its arithmetic
_TRIAL_SECONDS = 1.0  # for its proposal, for timing and building its student
# seconds of a GPU's host, which no fast GPU shortens (docs/results/gpu.md): for each layer of a new student, whose
# kernels are chosen, and for each layer and entry of a library, in small passes
_CHOSEN, _SMALL_PASSES = 0.02, 3e-3
_STEP = 3  # a training step costs about three forward passes: by that a library's share was measured
_KINDS = ("teacher", "views", "library", "search", "refine")


def time_step(base: nn.Module, images: Tensor, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float]:
    """The seconds of a forward pass and of a training step on a batch, on this machine as busy as it is; the second of
    two each. `base` is copied."""
    network = copy.deepcopy(base).requires_grad_(True)
    images = memory_layout(images, suits_channels_last(network))
    forward, step = 0.0, 0.0
    with reached_taps(network):
        for _ in range(2):
            network.eval()
            started = clock()
            with torch.inference_mode():
                network(images)
                _wait(images.device)
            forward = clock() - started
            network.train()
            started = clock()
            torch.autograd.backward(network(images).square().mean())
            _wait(images.device)
            step = clock() - started
    return forward, step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slowness(job: Job, clock: Callable[[], float] = time.perf_counter) -> float:
    """How many times the predicted seconds of one ordinary core a training step takes here: a second or two to see."""
    base = job.space.base.to(job.device)
    each = forward_seconds(base, job.space.analysis)
    count = max(2, min(job.settings.training.batch_size, int(_LOOK_SECONDS / (STEP * max(each, 1e-9)))))
    images = torch.randn(count, *job.space.input_size, device=job.device)
    forward, step = time_step(base, images, clock)
    return (forward + step) / (count * (1 + STEP) * each)


def refined_models(settings: Settings) -> int:
    """How many models are refined at most."""
    return settings.refinement.front + (_BASELINES if settings.refinement.baselines else 0)


def predicted_seconds(job: Job, teacher_epochs: int, refine_epochs: int) -> Mapping[str, float]:
    """Seconds by stage on one ordinary core, with nothing kept from before."""
    settings, images = job.settings, job.train_images
    each = forward_seconds(job.space.base, job.space.analysis)
    step, val = STEP * each, settings.data.val_fraction / (1 - settings.data.val_fraction) * images
    proxy = min(settings.proxy.images, images)
    most = settings.training.views
    views = min(most, settings.proxy.epochs) * proxy + min(most, refine_epochs) * images
    entries = sum(len(made_choices(block)) for block in job.space.blocks)
    once = min(_FIT, MOST_IMAGES * each / len(job.space.blocks))
    library = entries * (ENTRY + PASSES * once + UNBEATEN * (ENTRY + min(_DAMAGE, MOST_IMAGES * each) / 2))
    spec = plan_library(LibrarySpec(), job.space.analysis, library_images(job, images, teacher_epochs, refine_epochs))
    library += step * UNBEATEN * entries / len(job.space.blocks) * spec.batch_size * sum(spec.rounds)
    student, small = student_share(job.space), _LAYER_SECONDS * _layers(job.space.base) / settings.training.batch_size
    trial = student * (settings.proxy.epochs * proxy * step + each * (val + LOOK_CALIBRATION))
    trial += settings.proxy.epochs * proxy * small + _TRIAL_SECONDS
    more = 1.0 if settings.refinement.epochs else more_epochs(job.effort, student)
    model = more * refine_epochs * (student * (images * step + val * each) + images * small)
    transfer = PROBE * images * step if job.transferred else 0.0
    return {
        "teacher": teacher_epochs * (images * step + val * each) + transfer,
        "views": views * each,
        "library": library if settings.search.library_budget else 0.0,
        "search": settings.search.trials * trial,
        "refine": refined_models(settings) * model,
    }


def library_images(job: Job, images: int, teacher_epochs: int, refine_epochs: int) -> float:
    """How much the library may cost, in images that the base would see in the meantime (forward alone): its share of
    everything else, on so many training images."""
    settings = job.settings
    trials = settings.search.trials * settings.proxy.epochs * min(settings.proxy.images, images)
    students = student_share(job.space) * (trials + refine_epochs * refined_models(settings) * images)
    share = settings.search.library_budget / (1 - settings.search.library_budget)
    return share * _STEP * (teacher_epochs * images + students)


def _host_seconds(job: Job) -> Mapping[str, float]:
    """By stage, what comes on top where a GPU computes."""
    if job.device.type == "cpu":
        return {}
    layers = _layers(job.space.base)
    entries = sum(len(made_choices(block)) for block in job.space.blocks)
    return {
        "library": _SMALL_PASSES * layers * entries if job.settings.search.library_budget else 0.0,
        "search": _CHOSEN * layers * job.settings.search.trials,
        "refine": _CHOSEN * layers * refined_models(job.settings),
    }


def _layers(network: nn.Module) -> int:
    return sum(not any(module.children()) for module in network.modules())


def plan_line(job: Job, teacher_epochs: int, refine_epochs: int) -> str:
    """One line: what the study does and about how long each stage takes on this machine."""
    settings, factor, host = job.settings, slowness(job), _host_seconds(job)
    predicted = predicted_seconds(job, teacher_epochs, refine_epochs)
    seconds = {kind: factor * own + host.get(kind, 0.0) for kind, own in predicted.items()}
    proxy = min(settings.proxy.images, job.train_images)
    trials = _count(settings.search.trials, "trial")
    beside = " and baselines" if settings.refinement.baselines else ""
    does = {
        "teacher": f"teacher {_count(teacher_epochs, 'epoch')}" if teacher_epochs else "teacher as it is",
        "views": "views",
        "library": "library",
        "search": f"{trials} of {_count(settings.proxy.epochs, 'epoch')} on {proxy} images",
        "refine": f"{_count(settings.refinement.front, 'model')}{beside} {_count(refine_epochs, 'epoch')} each",
    }
    parts = [f"{does[kind]} ({_duration(seconds[kind])})" for kind in _KINDS if seconds[kind]]
    size = "×".join(map(str, job.space.input_size[1:]))
    return (
        f"plan: {settings.network.model} on about {job.train_images} images of {size}: {', '.join(parts)}; "
        f"about {_duration(sum(seconds.values()))} here, less where something is kept from before"
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' if number > 1 else ''}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
