"""Rewrites `golden/costs.json`: the costs of every covered base at timm's default input size.

`python tests/update_golden.py`. A changed number is a line in the CHANGELOG.
"""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from families import CIFAR, COVERED

from nas_kd.budget import COUNTED
from nas_kd.costs.cost_table import cost_table
from nas_kd.costs.verification import analyse

GOLDEN = Path(__file__).parent / "golden" / "costs.json"


def main() -> None:
    GOLDEN.write_text(json.dumps({name: _entry(name) for name in sorted((*COVERED, *CIFAR))}, indent=1) + "\n")


def _entry(name: str) -> dict[str, int | list[int]]:
    with torch.device("meta"):
        network = timm.create_model(name)
    size = network.pretrained_cfg["input_size"]
    table = cost_table(analyse(network, size, name=name), network)
    entry: dict[str, int | list[int]] = {"input_size": list(size)}
    for kind in COUNTED:
        entry[kind] = table.base()[kind]
        entry[f"min_{kind}"] = table.cost(table.cheapest(kind))[kind]
    return entry


if __name__ == "__main__":
    main()
