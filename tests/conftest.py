from __future__ import annotations

import gc
import logging
import os
import signal
import warnings
from collections.abc import Iterator
from dataclasses import replace

# The networks of the tests are too small for more threads: they would only wait for each other. What a test runs in a
# process of its own inherits this, so that both round alike. Read by torch when it is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of them would compile all of the package

import pytest
import torch
from hypothesis import HealthCheck, settings

from nas_kd.costs import latency_table

# the same examples on every machine, however slow
settings.register_profile(
    "anywhere", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("anywhere")

pytest_plugins = ("shared_analyses", "training_fixtures")
_LOGGERS = ("nas_kd", "timm", "huggingface_hub")


# files that take a minute or more, the longest first: begun last, one of them would go on alone
_LONG = "test_workers test_rank_check test_study test_documents test_models_elsewhere test_building".split()


def pytest_configure(config: pytest.Config) -> None:
    """Files go to pytest-xdist's processes in this order, and not those of most tests first; Ctrl-C is heard."""
    config.option.loadscopereorder = False
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background ignores Ctrl-C


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    items.sort(key=lambda item: _LONG.index(item.path.stem) if item.path.stem in _LONG else len(_LONG))


def pytest_collection_finish() -> None:
    """What thousands of modules left behind is not looked through for garbage again and again: a tenth of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Also where a plugin imported torch before this file."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random weights and images whichever tests ran before, in whichever process."""
    torch.manual_seed(0)


def _logging() -> list[tuple[int, list[logging.Handler], bool]]:
    loggers = map(logging.getLogger, _LOGGERS)
    return [(logger.level, logger.handlers[:], logger.propagate) for logger in loggers]


_PRISTINE = _logging()


def _reset_logging() -> None:
    for name, (level, handlers, propagate) in zip(_LOGGERS, _PRISTINE, strict=True):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """Puts back what the command line configures for its whole process, also when a fixture of a module ran it."""
    _reset_logging()
    with warnings.catch_warnings():
        yield
    _reset_logging()


@pytest.fixture(scope="module", autouse=True)
def short_timing() -> Iterator[None]:
    """Latencies are measured for real, but those of fewer students before a search, and not until they are stable,
    which takes seconds a model on a busy machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency_table, "STUDENTS", 5)
        for name in ("ROUGH", "WHOLE"):
            patch.setattr(latency_table, name, replace(getattr(latency_table, name), limit_s=0.05))
        yield
