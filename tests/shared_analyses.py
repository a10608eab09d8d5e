from __future__ import annotations

import os

import families
import pytest


@pytest.fixture(scope="session", autouse=True)
def analyses(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one process of pytest-xdist has analysed the others read."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = tmp_path_factory.getbasetemp().parent / "analyses"
        folder.mkdir(exist_ok=True)
        families.shared.append(folder)
