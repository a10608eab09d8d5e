"""How ONNX Runtime's time is shared between the layers of a network, by its own profile of the operators."""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nas_kd.networks.onnx import open_session

_WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})
# what ONNX Runtime adds to the name of a value or an operator when it rewrites it: a fused one, a blocked layout
_ADDED = re.compile(r"^fused |(_nchwc|_token_\d+|_kernel_time)+$")
_LEAST = 0.1  # of an operator's time that is left when what its profile costs is taken off


class LayerProfile:
    """A session that notes how long each operator takes. Medians over its runs are hardly touched by other work on the
    machine: each operator is short."""

    def __init__(
        self, path: Path, feed: Mapping[str, Any], layers: Sequence[str], *, threads: int, device: str
    ) -> None:
        self._owners, self._first, self._feed = _owners(path, layers), layers[0], feed
        self._session = open_session(path, threads=threads, device=device, profile=path.with_suffix(""))

    def run(self) -> None:
        """Runs the network once."""
        self._session.run(None, self._feed)

    def shares(self, milliseconds: float) -> dict[str, float]:
        """What of these milliseconds is each layer's, with what follows it until the next; by paths of modules, only
        those that the file has. Ends the session."""
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        spent: dict[str, list[int]] = defaultdict(list)
        for event in events:
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
                spent[event["name"]].append(event["dur"])
        times = {name: statistics.mean(sorted(own)[: len(own) // 2 + 1]) / 1000 for name, own in spent.items()}
        own_cost = (sum(times.values()) - milliseconds) / max(1, len(times))  # of noting an operator
        left = {name: max(time - own_cost, _LEAST * time) for name, time in times.items()}
        shares: dict[str, float] = defaultdict(float)
        owner = self._first
        for name, time in left.items():  # in the order in which they run
            owner = self._owners.get(_ADDED.sub("", name), owner)
            shares[owner] += time * milliseconds / sum(left.values())
        return dict(shares)


def _owners(path: Path, layers: Sequence[str]) -> dict[str, str]:
    """By the name of each operator of a file and of each value, the layer that it is of: of a convolution or matrix
    product its own, of what follows the last of those that it reads from."""
    import onnx

    order = {layer: index for index, layer in enumerate(layers)}
    owners: dict[str, str] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        read = [owners[name] for name in node.input if name in owners]
        own = _layer(node.name, layers) if node.op_type in _WEIGHTED else None
        owner = own or max(read, key=order.__getitem__, default=None)
        if owner is not None:
            owners.update(dict.fromkeys((node.name, *node.output), owner))
    return owners


def _layer(name: str, layers: Sequence[str]) -> str | None:
    """The layer that an operator is of, by its name ("/layer1/layer1.0/conv1/Conv"): the module around it that is one,
    or the first layer of the nearest module that holds some (its branches may be folded into one)."""
    path = _module_path(name)
    while path:
        within = f"{path}."
        if path in layers:
            return path
        found = next((layer for layer in layers if layer.startswith(within)), None)
        if found is not None:
            return found
        path = path.rpartition(".")[0]
    return None


def _module_path(name: str) -> str:
    """The path of the module that an operator's name tells of: of nested modules a name repeats the one before it where
    that is a sequence ("/layer1/layer1.0")."""
    parts: list[str] = []
    for part in name.split("/")[1:-1]:
        if parts and part.startswith(f"{parts[-1]}."):
            parts[-1] = part
        else:
            parts.append(part)
    return ".".join(parts)
