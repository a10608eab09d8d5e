"""A sampler of the user's own, imported by its path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from torch import nn

from nas_kd.arguments.study import parse_study
from nas_kd.errors import NasKdError, StudyError
from nas_kd.search.own_sampler import check_own_sampler, make_own_sampler
from nas_kd.search.sampler import make_sampler
from nas_kd.search.space import Space

MODULE = """
import optuna

class Plain(optuna.samplers.RandomSampler):
    def __init__(self):
        super().__init__(seed=7)

class Greedy(optuna.samplers.RandomSampler):
    def __init__(self, population):
        super().__init__()

class Broken(optuna.samplers.RandomSampler):
    def sample_independent(self, *arguments):
        raise LookupError("no idea")

class Unrelated:
    pass

def tuned(seed, startup=3):
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)

def wrong():
    return 3
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of a user, in the folder where the command runs."""
    (tmp_path / "own_search").mkdir()
    (tmp_path / "own_search" / "__init__.py").touch()
    (tmp_path / "own_search" / "samplers.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


@pytest.mark.parametrize("path", ["optuna.samplers:RandomSampler", "optuna.samplers.RandomSampler"])
def test_it_gets_the_seed_where_it_takes_one(path: str, small: Space[nn.Module]) -> None:
    def first(seed: int) -> dict[str, object]:
        study = optuna.create_study(sampler=make_sampler(path, small, seed))
        return study.ask(dict(small.distributions)).params

    assert first(1) == first(1) != first(2)


def test_a_class_without_a_seed_and_a_function_will_do() -> None:
    assert type(make_own_sampler("own_search.samplers:Plain", 0)).__name__ == "Plain"
    assert isinstance(make_own_sampler("own_search.samplers.tuned", 0), optuna.samplers.TPESampler)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere_to_be_found:Sampler", "cannot import 'nowhere_to_be_found' .* No module named"),
        ("own_broken:Sampler", "cannot import 'own_broken' .* No module named 'nothing_of_this_name'"),
        ("own_search.samplers:Plian", "has no sampler 'Plian'; did you mean 'Plain'"),
        ("own_search.samplers:Unrelated", "is no optuna.samplers.BaseSampler: derive it from that"),
        ("own_search.samplers:wrong", "gives 'int', which is no optuna.samplers.BaseSampler"),
        ("own_search.samplers:Greedy", "cannot be made: TypeError: .*population.*; it may take a seed, and all else"),
        ("own_search.samplers:Broken", "cannot propose for this study: LookupError: no idea"),
        ("optuna.samplers:CmaEsSampler", "cannot propose for this study: .*multi-objective"),
    ],
)
def test_what_is_no_sampler_for_a_study_is_one_line(path: str, words: str, small: Space[nn.Module]) -> None:
    with pytest.raises(StudyError, match=words) as caught:
        check_own_sampler(path, 0, ["maximize", "minimize"], small.distributions)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [("tpee", "unknown sampler 'tpee': use knapsack, .*did you mean 'tpe'"), ("a:b:c", "unknown")]
)
def test_what_can_be_no_path_is_refused_at_once(text: str, words: str) -> None:
    with pytest.raises(NasKdError, match=words):
        parse_study(["--budget", "params=1M", "--sampler", text])
    assert parse_study(["--budget", "params=1M", "--sampler", "my.own:Sampler"]).search.sampler == "my.own:Sampler"
