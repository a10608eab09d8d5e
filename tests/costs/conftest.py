from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def short_timing() -> None:
    """What is measured here is measured as a study does."""
