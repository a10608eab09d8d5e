"""DESIGN.md's snippet for people with their own study and their own training loop, on real digits."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import timm
import torch
from optuna.trial import TrialState
from sklearn.datasets import load_digits
from torch import Tensor, nn

import nas_kd


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """240 digits N×1×32×32 and their labels."""
    data = load_digits()
    images = torch.tensor(data.images[:240], dtype=torch.float32)[:, None] / 16
    return nn.functional.interpolate(images, size=(32, 32)), torch.tensor(data.target[:240])


@pytest.fixture(scope="module")
def teacher(digits: tuple[Tensor, Tensor]) -> nn.Module:
    """The user's own instance of a timm model, trained in the user's own way."""
    torch.manual_seed(0)
    network: nn.Module = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    my_own_training(network, digits, epochs=12)
    return network


def my_own_training(network: nn.Module, digits: tuple[Tensor, Tensor], *, epochs: int) -> float:
    """Plain SGD; gives the accuracy on the last 40 digits."""
    images, labels = digits
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    network.train()
    for _ in range(epochs):
        for batch, target in zip(images[:200].split(50), labels[:200].split(50), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(batch), target).backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        return float((network(images[200:]).argmax(1) == labels[200:]).float().mean())


@pytest.fixture(autouse=True)
def quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def test_the_snippet_runs_as_it_stands(digits: tuple[Tensor, Tensor], teacher: nn.Module, tmp_path: Path) -> None:
    space = nas_kd.Space(teacher, budget="params=100K", img_size=32)

    def objective(trial: optuna.Trial) -> float:
        student = space.suggest(trial)
        return my_own_training(student, digits, epochs=1)

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    space.enqueue(study)
    study.optimize(objective, n_trials=8)

    student = space.student(study.best_trial)
    my_own_training(student, digits, epochs=1)
    nas_kd.export(student, tmp_path / "small")

    loaded = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(digits[0]), student(digits[0]))
    assert sum(p.numel() for p in loaded.parameters()) <= 100_000
    states = {trial.state for trial in study.trials}
    assert states <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert sum(trial.state == TrialState.COMPLETE for trial in study.trials) >= 5


def test_a_study_of_several_objectives(digits: tuple[Tensor, Tensor], teacher: nn.Module) -> None:
    space = nas_kd.Space(teacher, budget="macs=50%", img_size=32, options=nas_kd.parse_options("width,conv"))

    def objective(trial: optuna.Trial) -> tuple[float, int]:
        student = space.suggest(trial)
        return my_own_training(student, digits, epochs=1), trial.user_attrs["macs"]

    study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.NSGAIISampler(seed=0))
    space.enqueue(study, 3)
    study.optimize(objective, n_trials=6)
    assert study.best_trials
    for trial in study.best_trials:
        student = space.student(trial)
        assert space.cost(space.genotype(trial.params)).macs == trial.values[1]
        assert isinstance(student, type(teacher))


def test_students_inherit_from_their_teacher(digits: tuple[Tensor, Tensor], teacher: nn.Module) -> None:
    """Without any training, the widest student knows more than a network of random weights does."""
    space = nas_kd.Space(teacher, budget="params=90%", img_size=32)
    images, labels = digits
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = space.student(space.starts()[-1]).eval()
    with torch.no_grad():
        accuracy = float((student(images).argmax(1) == labels).float().mean())
    assert accuracy > 0.2
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_an_error_of_the_users_is_one_family(teacher: nn.Module) -> None:
    with pytest.raises(nas_kd.NasKdError, match="smallest reachable"):
        nas_kd.Space(teacher, budget="params=1", img_size=32)


def test_the_readme_s_snippet_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    snippet = readme.split("## As a library")[1].split("```python\n")[1].split("```")[0]
    data = load_digits()
    images = torch.tensor(data.images[:240], dtype=torch.float32)[:, None] / 16
    small = (nn.functional.interpolate(images, size=(16, 16)), torch.tensor(data.target[:240]))
    names = {"my_own_training": lambda network, epochs: my_own_training(network, small, epochs=epochs)}
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), names)  # the README is ours
    loaded = timm.create_model("local-dir:small", pretrained=True)
    assert sum(parameter.numel() for parameter in loaded.parameters()) <= 1_000_000


def test_a_space_takes_a_library(digits: tuple[Tensor, Tensor], teacher: nn.Module, tmp_path: Path) -> None:
    few = nas_kd.parse_options("width=0.25/0.5/1,conv=standard/depthwise")
    space = nas_kd.Space(teacher, budget="params=50%", img_size=32, options=few)
    images = nas_kd.Images((digits[0][:96] * 255).byte(), digits[1][:96], (0.0,), (1.0,))
    without = space.student(space.starts(1)[0])
    spec = nas_kd.LibrarySpec(images=64, holdout=32, rounds=(2,), batch_size=16)
    space = space.with_library(nas_kd.build_library(teacher, space.analysis, images, spec, tmp_path))
    study = optuna.create_study()
    assert space.enqueue(study) > 3
    study.optimize(lambda trial: float(sum(p.numel() for p in space.suggest(trial).parameters())), n_trials=3)
    assert all(trial.value <= space.cost(space.analysis.identity).params / 2 for trial in study.trials[:3])
    assert type(space.student(space.starts(1)[0])) is type(without) is type(teacher)
