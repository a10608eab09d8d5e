"""Results that survive a kill: an append-only file of JSON lines."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from nas_kd.errors import OutputError

Record = dict[str, Any]
_logger = logging.getLogger(__name__)


class Records:
    """Records by key, each written to the disk as it comes; the last line of a killed run may be torn and is ignored.

    Several processes may append to one file. Raises OutputError when the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Record] = {}
        try:
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        except OSError as error:
            raise OutputError(f"cannot read {path}: {error.strerror or error}") from error
        self._torn = bool(text) and not text.endswith("\n")
        for number, line in enumerate(text.splitlines(), 1):
            self._read(line, number)

    def _read(self, line: str, number: int) -> None:
        try:
            entry = json.loads(line)
            self._known[entry["key"]] = entry["record"]
        except (ValueError, KeyError, TypeError):
            if line.strip():
                _logger.warning("line %d of %s is damaged: what it held is done again", number, self.path)

    def __getitem__(self, key: str) -> Record:
        return self._known[key]

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def values(self) -> tuple[Record, ...]:
        """All records, in the order in which their keys came first."""
        return tuple(self._known.values())

    def __setitem__(self, key: str, record: Record) -> None:
        line = json.dumps({"key": key, "record": record}, separators=(",", ":")) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("\n" if self._torn else "") + line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._torn = False
        self._known[key] = record
