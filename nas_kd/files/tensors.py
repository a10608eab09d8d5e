"""Tensors in a file: replaced in one step, and compared with a checksum when they are read."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nas_kd.errors import CheckpointError
from nas_kd.files.atomic import replace_file

_CHECKSUM = "sha256"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> None:
    """Keeps tensors as safetensors, with `facts` and a SHA-256 of the tensors in the header. Raises OutputError when
    that cannot be."""
    own = _written(tensors)
    metadata = {**(facts or {}), _CHECKSUM: _digest(own)}
    replace_file(path, lambda draft: _save(own, draft, metadata))


def save_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as safetensors, in the order and precision that they have."""
    _save(_written(tensors), path, None)


def _written(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: on the CPU, in rows, and no two of them in one memory."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    with path.open("wb") as file:  # as anyone's file is made, for the umask: safetensors' are private since 0.8
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and the facts beside them. Raises CheckpointError when they are not what was written,
    OSError or SafetensorError for a file that cannot be read."""
    with safe_open(path, framework="pt") as file:
        facts = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if facts.pop(_CHECKSUM, None) not in (None, _digest(tensors)):  # files of earlier versions have none
        raise CheckpointError("its checksum is wrong")
    return tensors, facts


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
