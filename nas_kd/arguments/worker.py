"""The arguments of `python -m nas_kd.worker`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

from nas_kd.arguments.output import add_quiet
from nas_kd.arguments.parsing import Parser, number, path, storage
from nas_kd.arguments.parts import defaults
from nas_kd.arguments.sharing import STORAGE, SharingSettings, add_workers
from nas_kd.errors import NasKdError

LIBRARY, TRIALS, MODELS = PARTS = "library", "trials", "models"  # of a study's work, in its order
GENOTYPES = "genotypes"  # of a rank check


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """The arguments of `python -m nas_kd.worker`. It does all parts of a study's work, or one `part` of them; with
    `leash` it ends when its standard input does."""

    storage: str
    study_name: str
    device: str | None
    out: str | None
    artifacts: str | None
    jobs: int
    grace_period: int
    ray: str | None
    num_gpus: float | None
    wait: int
    leash: bool
    part: str | None
    quiet: bool
    debug: bool


def worker_parser(prog: str = "python -m nas_kd.worker") -> argparse.ArgumentParser:
    """The parser of the command that joins a study."""
    parser = Parser(
        prog=prog,
        description="Joins a study: blocks of its library, trials and models, beside its others; or a rank check.",
        epilog=f"example: {prog} --storage postgresql+psycopg://me@db/nas --study-name resnet18-digits-params1M",
    )
    add = parser.add_argument
    add(
        "--storage",
        type=storage,
        metavar="URL",
        help="the study's storage: a URL, or SQLite's file ($NAS_KD_STORAGE)",
    )
    add("--study-name", metavar="NAME", help="the study (the only one in the storage)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, … (cuda where there is one)")
    add(
        "--out",
        type=path,
        metavar="DIR",
        help="folder for what is fetched (the study's own where it is on this machine)",
    )
    add("--wait", type=number(0), default=0, metavar="S", help="wait so many seconds for the study to begin (0)")
    add_workers(parser)
    add(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="run the --jobs as tasks of a Ray cluster: auto (the one that this machine is of), its address, or local",
    )
    add(
        "--num-gpus",
        type=number(0, float),
        metavar="F",
        help="GPUs that Ray gives to each, also a share of one (1, or 0 in a cluster without)",
    )
    add("--leash", action="store_true", help=argparse.SUPPRESS)
    add("--part", choices=(*PARTS, GENOTYPES), help=argparse.SUPPRESS)
    add_quiet(add, "print nothing but errors")
    parser.take_defaults({**defaults(SharingSettings), "storage": os.environ.get(STORAGE)})
    return parser


def parse_worker(argv: Sequence[str]) -> WorkerSettings:
    """Reads the arguments of a worker. Raises NasKdError for bad ones."""
    arguments = vars(worker_parser().parse_args(argv))
    if not arguments["storage"]:
        raise NasKdError("a worker needs the study's storage: give --storage URL, or set NAS_KD_STORAGE")
    if arguments["num_gpus"] is not None and arguments["ray"] is None:
        raise NasKdError("--num-gpus is what Ray gives to a worker: add --ray, or use --device")
    return WorkerSettings(**{**arguments, "study_name": arguments["study_name"] or ""})
