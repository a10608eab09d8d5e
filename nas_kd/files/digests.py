"""Digests, by which things are known: what a file depends on names it, and its content is compared with what was."""

from __future__ import annotations

import hashlib
from pathlib import Path

_CHUNK = 1 << 22  # bytes read at once


def digest_of(facts: str | bytes, length: int = 16) -> str:
    """The first `length` hexadecimal digits (of 64) of the SHA-256 of what is told of something."""
    return hashlib.sha256(facts.encode() if isinstance(facts, str) else facts).hexdigest()[:length]


def sha256_of(path: Path, skip: int = 0) -> str:
    """The SHA-256 of a file after its first `skip` bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(skip)
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()
