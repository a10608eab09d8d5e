"""How a network is timed: the arguments, and the value that holds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nas_kd.arguments.parsing import number
from nas_kd.arguments.parts import argument

RUNTIMES = ("onnx", "torch")  # that time a network


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySettings:
    """Where and by what a network is timed; by a `command` of the user's where there is one."""

    runtime: str | None = argument("latency_runtime", None)
    device: str = argument("latency_device", "cpu")
    batch: int = argument("latency_batch", 1)
    threads: int = argument("latency_threads", 1)
    command: str = argument("latency_command", "")
    timeout: int = argument("latency_timeout", 600)


def add_latency(add: Callable[..., object]) -> None:
    """The arguments that say how a network is timed."""
    add(
        "--latency-runtime",
        choices=RUNTIMES,
        help="what runs a network while it is timed: onnx (ONNX Runtime) or torch (onnx)",
    )
    add("--latency-device", metavar="D", help="where it is timed: cpu, cuda, cuda:1, … (%(default)s)")
    add("--latency-batch", type=number(1), metavar="N", help="images that go through it at once (%(default)s)")
    add("--latency-threads", type=number(1), metavar="N", help="CPU threads that it may use (%(default)s)")
    add(
        "--latency-command",
        metavar="CMD",
        help="a command of yours that is given an ONNX file and prints the milliseconds of one forward pass",
    )
    add("--latency-timeout", type=number(1), metavar="S", help="seconds that this command may take (%(default)s)")
