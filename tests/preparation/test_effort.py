"""What a study does where its arguments leave that open, and what it says before it begins."""

from __future__ import annotations

import dataclasses
from io import StringIO

import optuna
import pytest
import torch
from rich.console import Console
from torch import nn

from nas_kd.arguments.study import parse_study
from nas_kd.preparation.effort import Effort, effort_for, note_effort, with_effort
from nas_kd.preparation.estimate import plan_line, predicted_seconds, time_step
from nas_kd.preparation.job import Job, prepare, refine_epochs
from nas_kd.preparation.materials import _teacher_epochs
from nas_kd.progress import Stages
from nas_kd.search.storage import CONFIG

CHEAP, DEAR = 0.3e-3, 11e-3  # seconds of an image through a base: resnet18 at 16 px, a mobile network at 128


def test_cheap_images_change_nothing() -> None:
    assert effort_for(CHEAP, 1150) == Effort()
    settings = parse_study(["--budget", "params=1M"])
    assert (settings.proxy.epochs, settings.proxy.images, settings.refinement.front) == (4, 10_000, 8)
    assert with_effort(settings, effort_for(CHEAP, 1150)) == settings


def test_dear_images_are_seen_less_often() -> None:
    effort = effort_for(DEAR, 1600)
    assert effort.proxy_epochs == 1
    assert 1600 <= effort.proxy_images < 3000
    assert effort.front == 5
    assert 4 * 1600 <= effort.refine_images < 10 * 1600
    student, step = 0.5, 4.2 * DEAR
    trials = 20 * effort.proxy_epochs * 1600 * student * step
    models = 8 * effort.refine_images * student * step
    assert trials + models + 4 * 1600 * step < 45 * 60  # of one core; the rest of a study is less than the second gives


def test_a_gpu_affords_more() -> None:
    slow, fast = effort_for(DEAR, 1600), effort_for(DEAR, 1600, gpu=True)
    assert fast.proxy_epochs * fast.proxy_images > slow.proxy_epochs * slow.proxy_images
    assert fast.front == 8


def test_what_is_given_stays() -> None:
    settings = parse_study(["--budget", "params=1M", "--proxy-epochs", "3", "--front", "6", "--proxy-images", "50"])
    chosen = with_effort(settings, effort_for(DEAR, 1600))
    assert (chosen.proxy.epochs, chosen.proxy.images, chosen.refinement.front) == (3, 50, 6)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    out = tmp_path_factory.mktemp("study")
    command = ["--model", "test_resnet", "--budget", "macs=50%", "--img-size", "32", "--no-base-bounds"]
    return prepare(parse_study([*command, "--out", str(out)]))


def test_a_resumed_study_does_what_it_began_with(job: Job) -> None:
    study = optuna.create_study(storage=job.storage, study_name=job.settings.name, directions=["maximize"] * 3)
    study.set_user_attr(CONFIG, {})
    note_effort(study, dataclasses.replace(job.effort, proxy_epochs=2, front=6))
    note_effort(study, job.effort)  # it was begun with the first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nas_kd.preparation.job.check_study", lambda *arguments: None)
        again = prepare(job.settings, job.storage)
    assert (again.effort.proxy_epochs, again.effort.front) == (2, 6)
    assert (again.settings.proxy.epochs, again.settings.refinement.front) == (2, 6)
    assert again.settings.proxy.images == job.settings.proxy.images


def test_the_plan_names_every_stage(job: Job) -> None:
    line = plan_line(job, 20, refine_epochs(job, job.train_images))
    assert line.startswith("plan: test_resnet on about 1150 images of 32×32: teacher 20 epochs (")
    for words in (
        "views (",
        "library (",
        "20 trials of 4 epochs on 1150 images (",
        "8 models and baselines 15 epochs each (",
    ):
        assert words in line


def test_predictions_follow_what_is_done(job: Job) -> None:
    usual, more = predicted_seconds(job, 4, 5), predicted_seconds(job, 8, 10)
    assert all(seconds > 0 for seconds in usual.values())
    assert more["teacher"] == pytest.approx(2 * usual["teacher"])
    assert more["refine"] == pytest.approx(2 * usual["refine"])


def test_timing_leaves_the_network_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    forward, step = time_step(network, torch.randn(4, 3, 8, 8))
    assert 0 < forward
    assert 0 < step
    assert not network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_steps_that_differ_in_size_are_weighed() -> None:
    text, now = StringIO(), [0.0]
    stages = Stages(Console(file=text, width=200), clock=lambda: now[0])
    with stages.stage("library", 100) as advance:
        now[0] = 30.0
        advance("first", 25.0)
        now[0] = 120.0
        advance("last", 75.0)
    assert "library: 25/100, first, about 90 s left" in text.getvalue()
    assert "library: 100/100, last, about 0 s left" in text.getvalue()


def test_a_teacher_from_elsewhere_sees_no_more_images_than_one_that_is_trained_here(job: Job) -> None:
    given = dataclasses.replace(job, transferred=True)
    assert _teacher_epochs(given, 1600) == 4
    dear = dataclasses.replace(given, effort=dataclasses.replace(job.effort, teacher_images=12_000))
    assert _teacher_epochs(dear, 1600) == 4
    assert _teacher_epochs(dear, 12_000) == 1
