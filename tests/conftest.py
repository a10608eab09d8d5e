from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest
import torch

_LOGGERS = ("nas_kd", "timm", "huggingface_hub")


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """The networks of the tests are too small for more: threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def restore_logging() -> Iterator[None]:
    """Puts back what the command line configures for its whole process."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.level, logger.handlers[:], logger.propagate) for logger in loggers]
    with warnings.catch_warnings():
        yield
    for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate
