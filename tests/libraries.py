"""Libraries that were built in two ways."""

from __future__ import annotations

from dataclasses import replace

import torch

from nas_kd.library.entries import EntryFile
from nas_kd.library.library import Library


def assert_same_library(library: Library, alone: Library) -> None:
    """All entries are the same to the bit, but for the seconds that they took."""
    files = sorted(path.name for path in alone.folder.glob("*.safetensors"))
    assert sorted(path.name for path in library.folder.glob("*.safetensors")) == files
    for name in files:
        (_, tensors), (_, wanted) = (EntryFile(own.folder / name).read() or (None, {}) for own in (library, alone))
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in wanted.items())
    assert library.entries.keys() == alone.entries.keys()
    for key, entry in library.entries.items():
        assert replace(entry, seconds=0.0) == replace(alone.entries[key], seconds=0.0)
