from __future__ import annotations

from hypothesis import settings

# examples build networks, and a machine may be busy
settings.register_profile("models", deadline=None, max_examples=3, derandomize=True)
settings.load_profile("models")
