"""A process beside a rank check, which measures some of its genotypes: `python -m nas_kd.rank_check.helper FOLDER
--device DEVICE`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from optuna.storages import InMemoryStorage

from nas_kd.arguments.study import Settings
from nas_kd.pipeline.helper import Do, quiet, serve
from nas_kd.pipeline.helpers import Claims
from nas_kd.preparation.job import prepare
from nas_kd.preparation.materials import gather
from nas_kd.rank_check.arguments import RankSettings
from nas_kd.rank_check.measuring import ground_of, measure_shared


@contextlib.contextmanager
def begun(study: Settings, more: Mapping[str, Any]) -> Iterator[Do]:
    """What helps the check of these settings, with what the check has made until now, from its cache."""
    settings = RankSettings(study=study, **more)

    def do(stage: str, plan: Mapping[str, Any], claims: Claims) -> None:
        job = prepare(study, InMemoryStorage())
        measure_shared(ground_of(job, settings, gather(job, quiet())), plan, claims)

    yield do


if __name__ == "__main__":
    serve(begun)
