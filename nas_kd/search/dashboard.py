"""What Optuna dashboard shows of a study beside its trials: a note, plots, and files of single trials."""

from __future__ import annotations

import json
import mimetypes
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from nas_kd.files.digests import sha256_of
from nas_kd.search.artifacts import Store

NOTE = "note"  # the study's user attribute, where the dashboard is not installed
_FILES = "dashboard:artifacts:{}:"  # where the dashboard itself keeps what is attached to a finished trial
_KINDS = {".safetensors": "application/octet-stream", ".onnx": "application/octet-stream", ".md": "text/markdown"}


def show_note(study: optuna.Study, text: str) -> None:
    """The study's note (Markdown), instead of an earlier one; a user attribute where the dashboard is not installed."""
    dashboard = _dashboard()
    if dashboard is None:
        study.set_user_attr(NOTE, text)
    elif dashboard.get_note(study) != text:
        dashboard.save_note(study, text)


def show_plot(study: optuna.Study, name: str, figure: Any) -> None:
    """A plotly figure among the study's plots, instead of an earlier one of this name (letters, digits, hyphens).
    Nothing where the dashboard is not installed."""
    dashboard = _dashboard()
    if dashboard is not None:
        dashboard.save_plotly_graph_object(study, figure, graph_object_id=name)


def attach(study: optuna.Study, trial: FrozenTrial, path: Path, store: Store) -> None:
    """Keeps a file as an artifact of a finished trial, instead of an earlier one of its name.

    Optuna itself takes artifacts of running trials only, so it is noted where the dashboard notes its own uploads. The
    artifact is named by its content: attached again, it is the same. Raises OutputError as the store does.
    """
    prefix, identity = _FILES.format(trial._trial_id), sha256_of(path)
    kind = _KINDS.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    store.put_as(identity, path)
    for key, meta in _attached(study, prefix).items():
        if meta["filename"] == path.name and meta["artifact_id"] != identity:
            study._storage.set_study_system_attr(study._study_id, key, json.dumps(None))  # as the dashboard removes
    meta = {"artifact_id": identity, "filename": path.name, "mimetype": kind, "encoding": None}
    study._storage.set_study_system_attr(study._study_id, f"{prefix}{identity}", json.dumps(meta))


def _attached(study: optuna.Study, prefix: str) -> dict[str, dict[str, Any]]:
    attributes = study._storage.get_study_system_attrs(study._study_id)
    noted = {key: json.loads(value) for key, value in attributes.items() if key.startswith(prefix)}
    return {key: meta for key, meta in noted.items() if meta}


def _dashboard() -> Any:
    """The package, None where it is not installed."""
    try:
        import optuna_dashboard
    except ImportError:
        return None
    return optuna_dashboard
