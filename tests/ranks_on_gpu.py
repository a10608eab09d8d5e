"""A training on the first GPU by processes as torchrun starts them, `ranks_on_gpu.py DATA FILE`: two share the device
and talk by gloo, since NCCL wants a GPU for each; one that is alone adds its gradients up by NCCL, as with others."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from shared_trainings import tensors, trained

from nas_kd.arguments.parsing import guarded
from nas_kd.arguments.torchrun import led
from nas_kd.training.ranks import together


def main(arguments: Sequence[str]) -> int:
    data, made = map(Path, arguments)
    save_file(tensors(trained(data, device="cuda")), made)
    return 0


def alone(arguments: Sequence[str]) -> int:
    with together() as ranks:
        ranks.group = dist.new_group()
        assert isinstance(ranks.group._get_backend(torch.device("cuda")), dist.ProcessGroupNCCL)
        return main(arguments)


def by_gloo(_: str, **given: Any) -> None:
    _init(backend="gloo", **given)


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = False
    os.environ["LOCAL_RANK"] = "0"
    if os.environ["WORLD_SIZE"] == "1":
        sys.exit(guarded(alone, None))
    _init, dist.init_process_group = dist.init_process_group, by_gloo
    sys.exit(guarded(led(main), None))
