"""The arms of studies/versus.py: how each gets from the base to a network within the bound, and what that costs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import peers
import plain_optuna
import torch
from optuna.storages import InMemoryStorage
from pruned import METHODS, prune
from rich.console import Console
from torch import nn

from nas_kd import Space
from nas_kd.arguments.parts import changed
from nas_kd.arguments.study import parse_study
from nas_kd.budget import LATENCY, Cost
from nas_kd.costs.verification import measure
from nas_kd.data.augment import derive_seed
from nas_kd.data.images import Images
from nas_kd.errors import ModelError
from nas_kd.files.records import Records
from nas_kd.genotype import Genotype
from nas_kd.library.building import LibrarySpec, build_library
from nas_kd.library.library import Library
from nas_kd.pipeline.choosing import choose_front
from nas_kd.pipeline.search import search
from nas_kd.preparation.job import prepare
from nas_kd.preparation.materials import gather
from nas_kd.progress import Stages
from nas_kd.results.export import Card, export
from nas_kd.search.options import parse_options
from nas_kd.search.solver import solve
from nas_kd.training.evaluation import CALIBRATION, evaluate, recalibrate
from nas_kd.training.views import Views

OURS, PRUNED, FRESH = "ours", "pruned", "fresh"  # what an arm's network begins with
TORCH_PRUNING = {
    str(method): method for method in (*METHODS, *(dataclasses.replace(method, multiple=8) for method in METHODS))
}
PLAIN, FASTNAS, TIMM = "Optuna and timm alone", "ModelOpt FastNAS", "timm "
SCORED = 1000  # validation images that FastNAS scores a network by


class OutOfReachError(Exception):
    """An arm has no network within the bound."""


@dataclass(frozen=True, kw_only=True)
class Ours:
    """One of our arms: which choices its library holds, with the widths of residual streams or not, for how many steps
    entries are trained, how many trials."""

    space: str = "width,kernel,conv"
    rounds: tuple[int, ...] = LibrarySpec().rounds
    trials: int = 0
    stages: bool = False

    @property
    def library(self) -> str:
        """The key of its library; several arms may share one."""
        return f"library {self.space} {self.rounds}{' stages' if self.stages else ''}"


@dataclass(frozen=True, kw_only=True)
class Made:
    """A network that is ready to be trained, and the CPU seconds that it took to get it: of a library, and of all else
    (trials, pruning, another search). `lr` where the arm itself chose one."""

    network: nn.Module
    library: float = 0.0
    other: float = 0.0
    lr: float | None = None
    words: str = ""


class Bench:
    """A base with its teacher, images and logits, its budget of one bound, and what was made of it already.

    `study` are arguments of `python -m nas_kd.study`; `plain_seconds` of CPU time are given to the plain search."""

    def __init__(self, study: list[str], ours: Mapping[str, Ours], plain_seconds: float, out: Path) -> None:
        self.ours, self.plain_seconds, self.out = ours, plain_seconds, out
        own = ["--maximize", "accuracy", "--no-base-bounds", "--library-budget", "0", "--seed", "0", "-q"]
        self.stages = Stages(Console(stderr=True), quiet=True)
        self.job = prepare(parse_study([*study, *own, "--out", str(out)]), InMemoryStorage())
        self.job, self.materials = gather(self.job, self.stages)
        self.base = self.materials.base.network
        self.records = Records(out / "rows.jsonl", latest=True)

    @property
    def amp(self) -> bool:
        return self.job.settings.training.amp

    @property
    def views(self) -> Views:
        """The training images with the teacher's logits."""
        views = self.materials.refine_views
        assert isinstance(views, Views)
        return views

    def cost(self, network: nn.Module) -> Cost:
        """What a network costs; its latency is measured where that is the bound."""
        counted, latency = measure(network, self.job.space.input_size), self.job.space.costs.latency
        if LATENCY not in self.job.budget or latency is None:
            return counted
        return dataclasses.replace(counted, latency=latency.other(copy.deepcopy(network)))

    def keep(self, network: nn.Module, name: str) -> None:
        """Exports what was trained, where that is a network of ours."""
        with contextlib.suppress(ModelError):
            card = Card(input_size=self.job.space.input_size)
            export(network, self.out / "models" / name.replace(" ", "-"), card)

    def plain_data(self) -> plain_optuna.Data:
        """The same images and logits as plain tensors."""
        views, val = self.views, self.materials.splits.val
        assert views.logits is not None
        return plain_optuna.Data(
            views.pixels, views.labels, views.logits, val.pixels, val.labels, views.mean, views.std
        )

    def family(self, arm: str) -> str:
        """What an arm's network begins with."""
        return OURS if arm in self.ours else FRESH if arm == PLAIN or arm.startswith(TIMM) else PRUNED

    def made(self, arm: str, seed: int) -> Made:
        """The network of an arm before its training; made once, later runs read it."""
        key = f"made {arm} {seed}"
        path = self.out / "made" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
        if key not in self.records or not path.exists():
            made = self._make(arm, seed)
            assert self.job.budget.admits(self.cost(made.network)), f"{arm} is over its budget"
            path.parent.mkdir(exist_ok=True)
            torch.save(made.network, path)
            facts = {field.name: getattr(made, field.name) for field in dataclasses.fields(Made)}
            self.records[key] = {name: fact for name, fact in facts.items() if name != "network"}
        return Made(network=torch.load(path, weights_only=False), **self.records[key])

    def _make(self, arm: str, seed: int) -> Made:
        calibration = self.views.sample(CALIBRATION)
        if arm in self.ours:
            return self._ours(self.ours[arm], seed, calibration)
        if arm == PLAIN:
            return self._plain(seed)
        torch.manual_seed(derive_seed(seed, "fresh weights"))
        if arm.startswith(TIMM):
            classes = self.materials.splits.num_classes
            return Made(network=peers.small_model(arm.removeprefix(TIMM), calibration, classes))
        started = time.process_time()
        network = self._pruned(arm, calibration)
        if network is None:
            raise OutOfReachError(f"{arm} cannot get within the budget")
        recalibrate(network, calibration)
        return Made(network=network, other=time.process_time() - started)

    def _pruned(self, arm: str, calibration: Images) -> nn.Module | None:
        if arm in TORCH_PRUNING:
            base = copy.deepcopy(self.base).cpu()  # torch-pruning's own images are there
            pruned = prune(base, TORCH_PRUNING[arm], self.job.budget, calibration, self.cost)
            return None if pruned is None else pruned.to(self.job.device)
        few = self.materials.splits.val[:SCORED]
        macs = self.job.budget["macs"]
        return peers.fastnas(self.base, macs, calibration, lambda network: evaluate(network, few, batch_size=250))

    def _plain(self, seed: int) -> Made:
        started = time.process_time()
        images = min(plain_optuna.TRIAL_IMAGES, len(self.views))
        training = plain_optuna.Training(images, 0.1, seed, self.amp)
        found = plain_optuna.Search(self.job.budget["macs"], self.plain_seconds, training).run(self.plain_data())
        other, size = time.process_time() - started, self.job.space.input_size
        network = plain_optuna.build(found, size, self.materials.splits.num_classes, seed)
        words = f"{found.trials} trials: {found.params}, width {found.width}"
        return Made(network=network, other=other, lr=found.params["lr"], words=words)

    def _ours(self, ours: Ours, seed: int, calibration: Images) -> Made:
        space = self._space(ours)
        started = time.process_time()
        if ours.trials:
            settings = changed(self.job.settings, seed=seed, trials=ours.trials)
            job = dataclasses.replace(self.job, settings=settings, space=space, storage=InMemoryStorage())
            study = search(job, self.materials, self.stages)
            (genotype,) = choose_front(study, 1, job.budget)
            words = f"{len(study.trials)} trials; "
        else:
            genotype, words = self._solved(space), ""
        network = space.student(genotype)
        recalibrate(network, calibration)
        return Made(
            network=network,
            library=self.records[ours.library]["seconds"],
            other=time.process_time() - started,
            words=f"{words}{genotype.to_json()}",
        )

    def _solved(self, space: Space[nn.Module]) -> Genotype:
        """The knapsack's solution; where latency is the bound, measured and solved again until it is within."""
        if LATENCY in self.job.budget:
            return space.starts(1)[-1]
        genotype = solve(space.table, self.job.budget, space.damages(), seconds=60)
        assert genotype is not None
        return genotype

    def _space(self, ours: Ours) -> Space[nn.Module]:
        """What the base may become, with the library of that."""
        options, side = parse_options(ours.space, search_stages=ours.stages), self.job.space.input_size[1]
        space = Space(self.base, img_size=side, options=options)
        if (latency := self.job.space.costs.latency) is not None:
            space = space.with_costs(space.costs.with_latency(latency.meter))
        return space.with_budget(self.job.budget).with_library(self._library(space, ours))

    def _library(self, space: Space[nn.Module], ours: Ours) -> Library:
        """A library. Its CPU time is noted as it is built, over kills too; reading one that is there is not counted."""
        known = self.records[ours.library] if ours.library in self.records else {"seconds": 0.0, "done": False}
        started, spec = time.process_time(), LibrarySpec(rounds=ours.rounds)

        def note(words: str, done: bool = False) -> None:
            if not known["done"]:
                seconds = known["seconds"] + time.process_time() - started
                self.records[ours.library] = {"seconds": seconds, "done": done}

        folder = self.out / "cache" / hashlib.sha256(ours.library.encode()).hexdigest()[:8]
        images = self.views.sample(spec.images + spec.holdout)
        library = build_library(self.base, space.analysis, images, spec, folder, note)
        note("", done=True)
        return library
