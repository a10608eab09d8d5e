"""What a finished study leaves for Optuna dashboard: a note, the true front, and the finalists' files."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from nas_kd.budget import kinds_of
from nas_kd.errors import OutputError
from nas_kd.preparation.job import Job
from nas_kd.results.export import ONNX
from nas_kd.results.front_figure import front_panel
from nas_kd.results.note import command_note, study_note
from nas_kd.results.picture import student_picture
from nas_kd.results.rows import ModelRow, StudySummary
from nas_kd.search.artifacts import Store, open_store
from nas_kd.search.claims import REUSED
from nas_kd.search.dashboard import attach, show_note, show_plot
from nas_kd.search.storage import storage_errors

_FILES = ("model.safetensors", "config.json", ONNX)
_PICTURE = "blocks.svg"
_logger = logging.getLogger(__name__)


def artifact_address(artifacts: str | None, out: Path) -> str:
    """Where a study's finalists are kept: in the store that was given, or in the output folder."""
    return artifacts or str(out / "artifacts")


def announce(job: Job, study: optuna.Study) -> None:
    """Notes on the study by what command it runs."""
    show_note(study, command_note(job.settings.output.command))


def show(job: Job, study: optuna.Study, summary: StudySummary) -> None:
    """Notes the result on the study, with the front as plots and the finalists' models and pictures as artifacts of
    their trials. Whatever of it fails is a warning: the results themselves are files."""
    try:
        with storage_errors("note the results on the study"):
            show_note(study, study_note(summary))
            for name, figure in _plots(summary).items():
                show_plot(study, name, figure)
            store = open_store(artifact_address(job.settings.sharing.artifacts, job.out))
            trials = _trials(study)
            for model in summary.models:
                if model.role == "front" and model.digest in trials:
                    _attach_files(job, study, model, trials[model.digest], store)
    except OutputError as error:
        _logger.warning("Optuna dashboard will not show all: %s", error)


def _plots(summary: StudySummary) -> dict[str, Any]:
    """The report's plots of the front, as the dashboard shows them: with a title and a legend."""
    plots = {}
    for kind, (caption, figure) in zip(kinds_of(summary.budget), front_panel(summary).figures, strict=False):
        figure.update_layout(title=caption, showlegend=True, margin={"l": 60, "r": 20, "t": 60, "b": 50})
        plots[f"front-{kind}"] = figure
    return plots


def _trials(study: optuna.Study) -> dict[str, FrozenTrial]:
    """The trial that trained each genotype to its end, by digest."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {str(trial.user_attrs.get("digest")): trial for trial in done if REUSED not in trial.user_attrs}


def _attach_files(job: Job, study: optuna.Study, model: ModelRow, trial: FrozenTrial, store: Store) -> None:
    folder = job.out / (model.path or "")
    for path in (folder / name for name in _FILES):
        if path.is_file():
            attach(study, trial, path, store)
    with tempfile.TemporaryDirectory() as drafts:
        picture = Path(drafts, _PICTURE)
        picture.write_text(student_picture(model), encoding="utf-8")
        attach(study, trial, picture, store)
