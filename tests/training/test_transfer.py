from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from nas_kd.data.augment import Augmentation
from nas_kd.data.images import AugmentedImages, Images
from nas_kd.data.splits import Splits
from nas_kd.distill import main
from nas_kd.study import main as study
from nas_kd.training.evaluation import evaluate, is_below, predict_logits
from nas_kd.training.loop import train
from nas_kd.training.probe import HeadInputs, find_head, fit_probe, head_inputs, install
from nas_kd.training.recipe import Recipe
from nas_kd.training.teacher import Renormalised, TeacherCache, TeacherResult, Teaching, adopt_teacher, prepare_teacher
from nas_kd.training.transfer import HeadOrigin, settle_weights

MakeNetwork = Callable[..., nn.Module]
AUGMENTATION = Augmentation(flip=False)


def fixed_images(images: Images) -> Images:
    return AugmentedImages(images, AUGMENTATION).sample(512)


@pytest.fixture(scope="module")
def headless(lite0_weights: dict[str, Tensor]) -> nn.Module:
    """ImageNet's weights with a head for four classes, as timm draws it."""
    torch.manual_seed(0)
    network: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=4)
    body = {name: tensor for name, tensor in lite0_weights.items() if not name.startswith("classifier")}
    network.load_state_dict(body, strict=False)
    return network


def teach(
    network: nn.Module, splits: Splits, folder: Path, head: HeadOrigin = "new", lr: float = 0.005
) -> TeacherResult:
    recipe = Recipe(epochs=1, batch_size=16, lr=lr, distill_weight=0)
    teaching = Teaching(recipe=recipe, augmentation=AUGMENTATION, head=head)
    return prepare_teacher(network, splits, teaching, cache=TeacherCache(folder=folder, key="lite0"))


def test_a_pretrained_network_teaches_as_well_as_its_linear_probe(
    headless: nn.Module, textures: Splits, tmp_path: Path
) -> None:
    network = copy.deepcopy(headless)
    found = settle_weights(network, textures, fixed_images(textures.train), head="new")
    assert found.probe == found.accuracy == evaluate(network, textures.val)
    assert found.accuracy > 0.7 > evaluate(headless, textures.val)
    result = teach(copy.deepcopy(headless), textures, tmp_path)
    assert result.trained_here
    assert result.val_accuracy >= found.accuracy
    again = teach(copy.deepcopy(headless), textures, tmp_path)
    assert again.digest == result.digest
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_training_that_makes_it_worse_is_taken_back(headless: nn.Module, textures: Splits, tmp_path: Path) -> None:
    network = copy.deepcopy(headless)
    found = settle_weights(network, textures, fixed_images(textures.train), head="new")
    result = teach(copy.deepcopy(headless), textures, tmp_path, lr=5.0)
    assert result.val_accuracy == found.accuracy
    assert torch.equal(predict_logits(result.network, textures.val), predict_logits(network, textures.val))


def test_other_weights_are_another_teacher(make_network: MakeNetwork, digits: Splits, tmp_path: Path) -> None:
    few = replace(digits, train=digits.train[:40])
    for seed in (0, 1):
        teach(make_network(seed), few, tmp_path)
    teach(make_network(1), few, tmp_path, head="better")
    assert len(list(tmp_path.iterdir())) == 3


@pytest.fixture(scope="module")
def trained(digits: Splits) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    train(
        network,
        AugmentedImages(digits.train, AUGMENTATION),
        Recipe(epochs=10, batch_size=16, lr=0.03, distill_weight=0),
    )
    return network


class TestWithAHeadOfItsOwn:
    def test_it_stays_the_function_that_it_was(self, trained: nn.Module, digits: Splits) -> None:
        network = copy.deepcopy(trained)
        result = adopt_teacher(network, digits, augmentation=AUGMENTATION)
        assert not result.trained_here
        torch.testing.assert_close(
            predict_logits(network, digits.val), predict_logits(trained, digits.val), atol=1e-3, rtol=1e-3
        )

    def test_classes_in_another_order_are_found(
        self, trained: nn.Module, digits: Splits, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Two swapped, a cycle of three, and an order without a fixed point."""
        right = evaluate(trained, digits.val)
        assert right > 0.8
        for order in ((1, 0, 2, 3, 4, 5, 6, 7, 8, 9), (0, 1, 2, 3, 4, 5, 6, 9, 7, 8), (5, 7, 0, 9, 1, 3, 8, 2, 4, 6)):
            network = copy.deepcopy(trained)
            with torch.no_grad():
                network.fc.weight.copy_(trained.fc.weight[list(order)])
                network.fc.bias.copy_(trained.fc.bias[list(order)])
            wrong = evaluate(network, digits.val)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                result = adopt_teacher(network, digits, augmentation=AUGMENTATION)
            assert result.val_accuracy == pytest.approx(right)
            assert "ANOTHER ORDER" in caplog.text
            assert f"so they know {100 * wrong:.1f}% of the validation images" in caplog.text
            assert "--class-map" in caplog.text
            assert torch.allclose(network.fc.weight, trained.fc.weight)

    def test_the_right_order_is_no_warning(
        self, trained: nn.Module, digits: Splits, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            adopt_teacher(copy.deepcopy(trained), digits, augmentation=AUGMENTATION)
        assert caplog.text == ""

    def test_one_below_its_linear_probe_is_a_warning_and_tuned_where_asked_for(
        self, trained: nn.Module, digits: Splits, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        network = copy.deepcopy(trained)
        with torch.no_grad():  # no order of these outputs is right
            network.fc.weight[3:] = network.fc.weight[0]
        spoilt = copy.deepcopy(network)
        with caplog.at_level(logging.WARNING):
            adopt_teacher(network, digits, augmentation=AUGMENTATION)
        assert "THE TEACHER IS BELOW ITS LINEAR PROBE" in caplog.text
        result = teach(spoilt, digits, tmp_path, head="better", lr=1e-6)
        assert not result.trained_here
        assert result.val_accuracy > 0.8


class _ConvHead(nn.Module):
    """A 1×1 convolution of pooled features, without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pool, self.head = (
            nn.Conv2d(1, 24, 5, stride=2),
            nn.AdaptiveAvgPool2d(4),
            nn.Conv2d(384, 10, 1, bias=False),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.body(images).relu()).flatten(1)[:, :, None, None]).flatten(1)


class TestProbe:
    def test_it_is_the_logistic_regression_of_scikit_learn(self, digits: Splits) -> None:
        torch.manual_seed(0)
        train_features, val = (HeadInputs(part.pixels[:, :, ::4, ::4].flatten(1).float(), part.labels)
                               for part in (digits.train, digits.val))  # fmt: skip
        probe = fit_probe(train_features, val, nn.Linear(64, 10))
        mean, std = train_features.values.mean(0), train_features.values.std(0, correction=0).clamp(min=1e-6)
        values, labels = ((train_features.values - mean) / std).numpy(), train_features.labels.numpy()
        theirs = [
            LogisticRegression(C=1 / (penalty * len(labels)), tol=1e-8, max_iter=5000).fit(values, labels)
            for penalty in (0.1, 0.01, 0.001)
        ]
        shown = ((val.values - mean) / std).numpy()
        ours = torch.softmax(val.values @ probe.weight.T + probe.bias, 1).numpy()
        apart = [np.abs(model.predict_proba(shown) - ours).max() for model in theirs]
        losses = [-np.log(model.predict_proba(shown)[np.arange(len(shown)), val.labels]).mean() for model in theirs]
        assert int(np.argmin(apart)) == int(np.argmin(losses))
        assert min(apart) < 0.02

    def test_a_convolution_may_be_the_head(self, digits: Splits) -> None:
        torch.manual_seed(0)
        network = _ConvHead()
        head = find_head(network, digits.val)
        assert head is network.head
        train_features, val = (head_inputs(network, network.head, part) for part in (digits.train, digits.val))
        install(network.head, probe := fit_probe(train_features, val, network.head))
        assert evaluate(network, digits.val) == pytest.approx(probe.accuracy)
        assert probe.accuracy > 0.7

    def test_logits_that_no_layer_makes_have_no_head(self, digits: Splits, caplog: pytest.LogCaptureFixture) -> None:
        network = nn.Sequential(_ConvHead(), nn.Softmax(1))
        assert find_head(network, digits.val) is None
        with caplog.at_level(logging.WARNING):
            assert settle_weights(network, digits, digits.train[:8], head="new").probe is None
        assert "its head begins at random" in caplog.text

    def test_more_outputs_than_classes(self, digits: Splits) -> None:
        few = replace(digits, train=_of_classes(digits.train, 6), val=_of_classes(digits.val, 6))
        network = _ConvHead()
        found = settle_weights(network, few, few.train[:8], head="new")
        logits = predict_logits(network, few.val)
        assert found.accuracy > 0.7
        assert logits.argmax(1).max() < 6
        assert logits.abs().max() < 100


def _of_classes(images: Images, count: int) -> Images:
    return images[torch.nonzero(images.labels < count)[:, 0]]


def test_an_accident_is_not_below() -> None:
    assert not is_below(0.88, 0.92, 100)
    assert is_below(0.5, 1.0, 26)
    assert is_below(0.88, 0.92, 1000)
    assert not is_below(0.92, 0.88, 1000)


@pytest.fixture
def hub(lite0_weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights where the hub's client keeps what it has fetched, and no network."""
    folder = tmp_path / "hub" / "models--timm--tf_efficientnet_lite0.in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    save_file(lite0_weights, folder / "snapshots" / "abc" / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("hub")
def test_pretrained_weights_from_the_cache_of_the_hub(textures: Splits, tmp_path: Path) -> None:
    for index, (pixels, label) in enumerate(zip(textures.train.pixels, textures.train.labels, strict=True)):
        folder = tmp_path / "photos" / textures.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    data = f"--dataset folder --data-dir {tmp_path}/photos --img-size 48 --out {tmp_path}/out -q"
    how = "--pretrained --no-teacher --epochs 1 --lr 1e-6 --batch-size 8"
    assert main(["tf_efficientnet_lite0", *data.split(), *how.split()]) == 0
    (record,) = (tmp_path / "out").glob("*/config.json")
    assert json.loads((tmp_path / "out" / "distill.json").read_text())["test accuracy"] > 0.5
    assert json.loads(record.read_text())["num_classes"] == 4


def test_a_study_of_weights_for_other_classes_beside_another_teacher(make_network: MakeNetwork, tmp_path: Path) -> None:
    """Both begin with a new head, and are tuned for as many epochs as asked for."""
    torch.save(make_network(1, classes=7).state_dict(), tmp_path / "base.pth")
    other = timm.create_model("test_efficientnet", in_chans=1, num_classes=7)
    torch.save(other.state_dict(), tmp_path / "teacher.pth")
    how = (
        "--model test_resnet --img-size 32 --train-images 60 --teacher-epochs 1 --library-budget 0 --trials 1 "
        f"--proxy-epochs 1 --refine-epochs 1 --front 1 --no-onnx --no-base-bounds --no-baselines -q "
        f"--budget params=60% --space width=0.5/1 --no-search-stages --out {tmp_path}/out "
        f"--initial-checkpoint {tmp_path}/base.pth --teacher test_efficientnet "
        f"--teacher-checkpoint {tmp_path}/teacher.pth"
    )
    assert study(how.split()) == 0
    assert len(list((tmp_path / "out" / "cache").glob("teacher-*.safetensors"))) == 2
    report = (tmp_path / "out" / "report.html").read_text()
    assert "learn from test_efficientnet, which knows" in report


def test_a_network_gets_the_normalisation_that_it_wants(digits: Splits) -> None:
    images = digits.val.pixels.float() / 255
    mean, std, own_mean, own_std = (torch.tensor(value).view(-1, 1, 1) for value in (0.2, 0.3, 0.5, 0.25))
    seen = Renormalised(nn.Identity(), ((0.2,), (0.3,)), ((0.5,), (0.25,)))((images - mean) / std)
    torch.testing.assert_close(seen, (images - own_mean) / own_std, rtol=1e-5, atol=1e-5)


def test_weights_of_a_teacher_that_is_not_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert study(["--budget", "params=60%", "--teacher-pretrained"]) == 2
    assert "--teacher-pretrained speaks of a teacher: name one by --teacher" in capsys.readouterr().err
