"""Pickling for processes that see the same files: of arrays that are mapped into memory the names of the files travel.

The module is a `pickle_module` for `torch.save`.
"""

from __future__ import annotations

import pickle
import weakref
from pickle import HIGHEST_PROTOCOL as HIGHEST_PROTOCOL
from pickle import Unpickler as Unpickler
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nas_kd.errors import DataError

Place = tuple[str, int, int]  # a file, the first byte in it, how many
_files: weakref.WeakValueDictionary[int, np.memmap[Any, Any]] = weakref.WeakValueDictionary()  # by their address


def note(array: Any) -> None:
    """Remembers an array that `np.load` mapped, as long as it is mapped; any other one is left alone."""
    if isinstance(array, np.memmap):
        _files[array.ctypes.data] = array


class Pickler(pickle.Pickler):
    """Writes where in which file mapped memory is, instead of its content."""

    def reducer_override(self, obj: Any) -> Any:
        """How tensors and arrays in mapped files are made again; NotImplemented for all else."""
        if type(obj) is Tensor and obj.device.type == "cpu" and obj.layout == torch.strided:
            storage = obj.untyped_storage()
            if (place := _place(storage.data_ptr(), storage.nbytes())) is not None:
                form = obj.shape, obj.stride(), obj.storage_offset()
                return _tensor, (place, obj.dtype, form)
        if isinstance(obj, np.ndarray) and obj.flags.c_contiguous:
            if (place := _place(obj.ctypes.data, obj.nbytes)) is not None:
                return _array, (place, obj.dtype, obj.shape)
        return NotImplemented


def _place(address: int, size: int) -> Place | None:
    """Where mapped memory comes from; None for memory of another kind."""
    for start, array in list(_files.items()):
        if size and start <= address and address + size <= start + array.nbytes:
            return str(array.filename), array.offset + address - start, size
    return None


def _bytes(place: Place) -> np.memmap[Any, Any]:
    path, offset, size = place
    try:
        return np.memmap(path, dtype=np.uint8, mode="c", offset=offset, shape=(size,))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: put --out into a folder that all machines share") from error


def _tensor(place: Place, dtype: torch.dtype, form: tuple[Any, ...]) -> Tensor:
    return torch.from_numpy(_bytes(place)).view(dtype).as_strided(*form)


def _array(place: Place, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    return _bytes(place).view(dtype).reshape(shape)
