"""The stages of a study, in the order in which the data goes: job → materials → search → models → summary.

Each stage is a function from values to values, made of the package's public pieces.
"""

from __future__ import annotations

import functools

from nas_kd.pipeline.helpers import helping
from nas_kd.pipeline.models import make_results
from nas_kd.pipeline.search import search
from nas_kd.pipeline.sharing import begin_helpers, sharing_library
from nas_kd.pipeline.showcase import show
from nas_kd.pipeline.summary import summarise
from nas_kd.preparation.job import Job as Job
from nas_kd.preparation.job import prepare as prepare
from nas_kd.preparation.materials import gather
from nas_kd.progress import Stages
from nas_kd.results.front import write_front_csv
from nas_kd.results.report import write_report
from nas_kd.results.rows import StudySummary
from nas_kd.search.storage import close_storage


def run(job: Job, stages: Stages) -> StudySummary:
    """Runs every stage, or what is left of them, and writes the results into the output folder. Closes the storage."""
    try:
        with helping(job) as helpers:
            begin_helpers(helpers)
            job, materials = gather(job, stages, functools.partial(sharing_library, helpers))
            study = search(job, materials, stages, helpers)
            models = make_results(job, study, materials, stages, helpers)
        summary = summarise(job, study, models, materials, stages)
        show(job, study, summary)
    finally:
        close_storage(job.storage)
    write_front_csv(job.out / "front.csv", summary.models)
    write_report(job.out / "report.html", summary)
    return summary
