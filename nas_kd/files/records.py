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

    Several processes may append to one file: what one has written the others find when they look for it, and of two
    records with one key the first counts. Of a file with the `latest` the last does: one process alone writes it, and
    brings what it holds up to date. Raises OutputError when the file cannot be read or written.
    """

    def __init__(self, path: Path, *, latest: bool = False) -> None:
        self.path, self.latest = path, latest
        self._known: dict[str, Record] = {}
        self._lines = self._bytes = 0  # of the file that were read
        rest = self._catch_up()
        if rest:  # torn, or whole but for its end
            self._read(rest)
        self._bytes += len(rest)
        self._torn = bool(rest)

    def _catch_up(self) -> bytes:
        """Reads the lines that came since the last time; returns what follows them."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._bytes)
                lines, end, rest = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise OutputError(f"cannot read {self.path}: {error.strerror or error}") from error
        self._bytes += len(lines) + len(end)
        for line in lines.split(b"\n") if end else ():
            self._read(line)
        return rest

    def _read(self, line: bytes) -> None:
        self._lines += 1
        try:
            entry = json.loads(line)
            key, record = entry["key"], entry["record"]
            self._known[key] = record if self.latest else self._known.get(key, record)
        except (ValueError, KeyError, TypeError):
            if line.strip():
                _logger.warning("line %d of %s is damaged: what it held is done again", self._lines, self.path)

    def __getitem__(self, key: str) -> Record:
        return self._known[key]

    def __contains__(self, key: str) -> bool:
        if key not in self._known:
            self._catch_up()
        return key in self._known

    def values(self) -> tuple[Record, ...]:
        """All records, in the order in which their keys came first."""
        return tuple(self._known.values())

    def __setitem__(self, key: str, record: Record) -> None:
        if key in self and not self.latest:  # another process was faster
            return
        line = json.dumps({"key": key, "record": record}, separators=(",", ":")) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("\n" if self._torn else "") + line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._torn = False
        self._known[key] = record  # read again with the next lines, it changes nothing
