"""Rewrites `golden/costs.json`: params and MACs of every covered base at timm's default input size.

`python tests/update_golden.py`. A changed number is a line in the CHANGELOG.
"""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from models.families import COVERED

from nas_kd.models.blocks import analyse
from nas_kd.models.costs import cost_table

GOLDEN = Path(__file__).parent / "golden" / "costs.json"


def main() -> None:
    GOLDEN.write_text(json.dumps({name: _entry(name) for name in sorted(COVERED)}, indent=1) + "\n")


def _entry(name: str) -> dict[str, int | list[int]]:
    with torch.device("meta"):
        network = timm.create_model(name)
    size = network.pretrained_cfg["input_size"]
    table = cost_table(analyse(network, size, name=name), network)
    base = table.base()
    return {
        "input_size": list(size),
        "params": base.params,
        "macs": base.macs,
        "min_params": table.cost(table.cheapest("params")).params,
        "min_macs": table.cost(table.cheapest("macs")).macs,
    }


if __name__ == "__main__":
    main()
