"""Files that are whole or not there: a reader sees the old one or the new one, and a crash leaves the old one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from nas_kd.errors import OutputError


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file and moves it to `path` in one step. Raises OutputError when it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # not tempfile: its files are private to the user; and torch.save refuses names that begin with a dot
        draft = path.with_name(f"{path.name}-{secrets.token_hex(4)}.partial")
        try:
            write(draft)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap a full disk in their own
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {path}: {reason}; choose another folder with --out") from error


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8, as it is, and has it on the disk before it takes the file's place. Raises OutputError."""

    def write(draft: Path) -> None:
        with draft.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    replace_file(path, write)
