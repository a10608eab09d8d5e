"""The short form of studies/faults.py: a study is killed at random moments and loses nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import servers

# slow: deaths after every single write are in search/test_injected_faults.py, this is the long check of the whole
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "studies" / "faults.py"
    spec = importlib.util.spec_from_file_location("faults", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("storage", "kills"), [("sqlite", 2), ("postgresql", 1)])
def test_kills_lose_nothing(faults: ModuleType, storage: str, kills: int, tmp_path: Path) -> None:
    if storage == "postgresql" and servers.postgres_folder() is None:
        pytest.skip("PostgreSQL is not installed")
    campaign = faults.run(tmp_path, kills=kills, storage=storage, trials=3, moments=faults.Moments(longest=25))
    assert campaign.problems == []
