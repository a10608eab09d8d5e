"""Numbers, names and paths as people type them."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import timm

from nas_kd.arguments.distill import parse_distill
from nas_kd.arguments.study import parse_study
from nas_kd.arguments.worker import parse_worker
from nas_kd.budget import Cost, parse_budget
from nas_kd.errors import BudgetError, NasKdError
from nas_kd.networks.hub import create_base
from nas_kd.results.export import export, load
from nas_kd.spelling import plain_budget


@pytest.mark.parametrize(
    ("typed", "plain"),
    [
        ("params=1M", "params=1M"),
        ("params=1e6", "params=1M"),
        ("params=1_000_000", "params=1M"),
        ("params=1,000,000,macs=30M", "params=1000000,macs=30M"),
        ("Params=1.5e6, MACs=1e2%", "params=1500K,macs=100%"),
        ("size=1MB", "size=1MB"),
        ("size=1.5 MB,peak_memory=6.4e1KiB", "size=1.5MB,peak_memory=64KiB"),
        ("latency=4 ms", "latency=4ms"),
        ("latency=5e-1ms", "latency=0.5ms"),
    ],
)
def test_budgets_have_one_spelling(typed: str, plain: str) -> None:
    base = Cost(params=10**7, macs=10**9, size=10**8, peak_memory=10**7, latency=10**7)
    assert plain_budget(typed) == plain
    assert parse_budget(typed, base) == parse_budget(plain, base)
    assert parse_study([f"--budget={typed}"]).search.budget == plain


@pytest.mark.parametrize("typed", ["params=1MB", "params=1e", "params=1__0", "latency=1MB", "size=1TB", "macs=1e400"])
def test_what_says_nothing_is_still_refused(typed: str) -> None:
    with pytest.raises(BudgetError, match="cannot read the budget"):
        parse_budget(typed)


@pytest.mark.parametrize("kind", ["flops", "FLOPs", "GFLOPs"])
def test_flops_are_answered_with_macs(kind: str) -> None:
    with pytest.raises(BudgetError, match=f"cannot bound '{kind}': use params or macs, multiply-accumulates"):
        parse_budget(f"{kind}=1G")


def test_numbers_of_options() -> None:
    settings = parse_study(["--budget=params=1M", "--proxy-images", "1e4", "--train-images", "10_000"])
    assert (settings.proxy.images, settings.data.train_images) == (10_000, 10_000)
    with pytest.raises(NasKdError, match=r"'1\.5' is no whole number"):
        parse_study(["--budget=params=1M", "--trials", "1.5"])


def test_models_by_their_name_on_the_hub() -> None:
    assert parse_study(["--budget=params=1M", "--model", "timm/resnet18.a1_in1k"]).network.model == "resnet18.a1_in1k"
    assert type(create_base("timm/test_resnet")) is type(timm.create_model("test_resnet"))


def test_home_is_home_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    export(timm.create_model("test_resnet", num_classes=2), "~/small")
    assert load("~/small").num_classes == 2
    study = ["--budget=params=1M", "--model=~/small", "--out=~/out", "--data-dir=~/data", "--class-map=~/map"]
    settings = parse_study([*study, "--storage=~/study.db", "--artifacts=~/store", "--start-from=~/structure.json"])
    assert settings.network.model == f"local-dir:{tmp_path / 'small'}"
    assert settings.sharing.storage == f"sqlite:///{tmp_path / 'study.db'}"
    given = (
        settings.output.out,
        settings.data.data_dir,
        settings.data.class_map,
        settings.sharing.artifacts,
        *settings.search.start_from,
    )
    assert given == tuple(str(tmp_path / name) for name in ("out", "data", "map", "store", "structure.json"))
    distilled = parse_distill(["local-dir:~/small", "--no-teacher", "--out=~/out", "--cache=~/cache"])
    assert (distilled.network.model, distilled.out) == (f"local-dir:{tmp_path / 'small'}", str(tmp_path / "out"))
    assert distilled.cache == str(tmp_path / "cache")


def test_a_bare_file_is_a_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_worker(["--storage", "study.db"]).storage == "sqlite:///study.db"
    monkeypatch.setenv("NAS_KD_STORAGE", "here/study.db")
    assert parse_study(["--budget=params=1M"]).sharing.storage == "sqlite:///here/study.db"
    assert parse_worker([]).storage == "sqlite:///here/study.db"
    monkeypatch.setenv("NAS_KD_STORAGE", "a#b.db")
    with pytest.raises(NasKdError, match=r"NAS_KD_STORAGE: cannot keep a study in 'a#b\.db'"):
        parse_study(["--budget=params=1M"])
    with pytest.raises(NasKdError, match=r"write study\.db for a file of SQLite, or a URL"):
        parse_worker(["--storage", "study"])


def test_commands_can_be_pasted() -> None:
    typed = ["--budget", "macs=50%", "--out", "my results", "--pin", "layer1.*:conv=standard"]
    command = parse_study([*typed, "--new-study"]).output.command
    assert shlex.split(command) == ["python", "-m", "nas_kd.study", *typed]
