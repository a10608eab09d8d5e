"""Tensors in a file: replaced in one step, and compared with a checksum when they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nas_kd.errors import CheckpointError
from nas_kd.training.resume import replace_file

_CHECKSUM = "sha256"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> None:
    """Keeps tensors as safetensors, with `facts` and a SHA-256 of the tensors in the header. Raises OutputError when
    that cannot be."""
    # clone: safetensors refuses tensors that share memory
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    metadata = {**(facts or {}), _CHECKSUM: _digest(own)}
    replace_file(path, lambda draft: save_file(own, draft, metadata=metadata))


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
