from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# examples build networks, and a machine may be busy
settings.register_profile("models", deadline=None, max_examples=3, derandomize=True)
settings.load_profile("models")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
