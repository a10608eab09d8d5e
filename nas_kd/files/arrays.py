"""Folders of memory-mapped arrays: content-addressed, written atomically, checked when they are opened."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas_kd.errors import DataError, NasKdError, OutputError
from nas_kd.files.digests import sha256_of
from nas_kd.files.mapped import note

Array = NDArray[Any]

_SIDECAR = "meta.json"
_MARGIN = 64 << 20  # bytes left free on the disk, so that the study's database can still grow
_logger = logging.getLogger(__name__)


class ArrayFile:
    """A `.npy` file written piece by piece in the order of its elements, hashed on the way.

    Plain writes, not a writable memory map: a full disk is then an error here and not a SIGBUS.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str) -> None:
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        self.written, self._hash = 0, hashlib.sha256()

    def __enter__(self) -> ArrayFile:
        self._file = self.path.open("wb")
        self._header()
        return self

    def _header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, piece: Array) -> None:
        """Appends the elements of `piece`."""
        data = np.ascontiguousarray(piece, dtype=self.dtype)
        self.written += data.size
        self._hash.update(data.data)
        self._file.write(data.data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        assert kind is not None or self.written == np.prod(self.shape), f"{self.written} elements for {self.shape}"

    @property
    def summary(self) -> dict[str, Any]:
        """What the sidecar keeps of the file: shape, dtype and the SHA-256 of its data."""
        return {"shape": list(self.shape), "dtype": self.dtype.str, "sha256": self._hash.hexdigest()}


class GrowingFile(ArrayFile):
    """A file of one row that is as long as what is written to it."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shape, before = (self.written,), self._file.tell() - self.written * self.dtype.itemsize
        if kind is None:
            self._file.seek(0)
            self._header()  # numpy leaves room in it for the length
            assert self._file.tell() == before, "the header has grown"
        super().__exit__(kind, error, trace)


@contextmanager
def writing(folder: Path, needed_bytes: int) -> Iterator[Path]:
    """A temporary folder that becomes `folder` in one step when the block ends well, and vanishes when it does not.

    Another process that finished the same folder first wins. Raises DataError when the disk has less than
    `needed_bytes` free, OutputError when it cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        require_space(folder.parent, needed_bytes)
        draft = _sibling(folder)
        draft.mkdir()
        try:
            yield draft
            _publish(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except NasKdError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error


def _publish(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError:
        if not (folder / _SIDECAR).exists():
            raise


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raises DataError when the disk of `folder` cannot take `needed_bytes` more."""
    free = shutil.disk_usage(folder).free
    if needed_bytes + _MARGIN > free:
        raise DataError(
            f"{folder} needs {math.ceil(needed_bytes / 2**20):,} MiB and {_MARGIN / 2**20:.0f} MiB to spare, its disk "
            f"has {free / 2**20:,.0f} MiB free: free some, choose another --out, use fewer or smaller images, or keep "
            "none of them by --data-memory 0"
        )


def finish(draft: Path, files: Mapping[str, ArrayFile], extra: Mapping[str, Any] | None = None) -> None:
    """Writes the sidecar that `load` checks the arrays against; `extra` is returned by `load` as it is."""
    meta = {"version": 1, "arrays": {name: file.summary for name, file in files.items()}, "extra": dict(extra or {})}
    (draft / _SIDECAR).write_text(json.dumps(meta, sort_keys=True), encoding="utf-8")


def load_arrays(folder: Path, only: Collection[str] | None = None) -> tuple[dict[str, Array], dict[str, Any]] | None:
    """The memory-mapped arrays of `folder`, `only` those named, and its extra values; None where there is no folder.

    A damaged folder is removed with a warning, so that the caller builds it again.
    """
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / _SIDECAR).read_text(encoding="utf-8"))
        wanted = {name: about for name, about in meta["arrays"].items() if only is None or name in only}
        return {name: _open(folder / f"{name}.npy", about) for name, about in wanted.items()}, meta["extra"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _logger.warning("the cache %s is damaged (%s): building it again", folder, error)
        _discard(folder)
        return None


def _open(path: Path, about: Mapping[str, Any]) -> Array:
    # copy-on-write: pages stay shared between processes, and torch does not warn about a read-only array
    array: Array = np.load(path, mmap_mode="c", allow_pickle=False)
    if list(array.shape) != about["shape"] or array.dtype.str != about["dtype"]:
        raise ValueError(f"{path.name} has another shape than its sidecar says")
    if sha256_of(path, skip=path.stat().st_size - array.nbytes) != about["sha256"]:
        raise ValueError(f"{path.name} does not match its checksum")
    note(array)
    return array


def _discard(folder: Path) -> None:
    # renamed first: another process never sees half of it
    grave = _sibling(folder)
    try:
        os.rename(folder, grave)
    except OSError as error:
        raise OutputError(f"cannot replace the damaged cache {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(grave, ignore_errors=True)


def _sibling(folder: Path) -> Path:
    # not tempfile: its folders are private to the user, and a cache may be shared
    return folder.with_name(f"{folder.name}-{secrets.token_hex(4)}.partial")
