from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import build_model_with_cfg, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.utils import reparameterize_model
from torch import nn

from nas_kd.analysis.stride_reduction import reduce_stride
from nas_kd.costs.cost_table import cost_table
from nas_kd.costs.verification import analyse
from nas_kd.errors import ModelError, OutputError, PlanError
from nas_kd.files.tensors import write_tensors
from nas_kd.networks.convolutions import Shift2d
from nas_kd.networks.fuse import fused
from nas_kd.networks.hub import create_base
from nas_kd.networks.onnx import run_onnx
from nas_kd.results.export import Card, export, load
from nas_kd.students.inheritance import inherit_student

FAMILIES = ("test_resnet", "mobilenetv2_050", "test_efficientnet", "test_byobnet", "vgg11_bn", "regnetx_002")
BASE_ARGS: dict[str, dict[str, Any]] = {"vgg11_bn": {"mlp_ratio": 1 / 128}}
Make = Callable[..., nn.Module]
GOLDEN = Path(__file__).parents[1] / "golden"
HAS_ONNX = all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxruntime", "onnxscript"))


def student(name: str, *, in_chans: int = 3, reduction: int | None = None) -> nn.Module:
    """A student of random weights and narrow in every block, in eval mode."""
    torch.manual_seed(0)
    base = timm.create_model(name, num_classes=10, in_chans=in_chans, **BASE_ARGS.get(name, {}))
    if reduction is not None:
        base = reduce_stride(base, reduction, in_chans)
    analysis = analyse(base, (in_chans, 32, 32), name=name)
    table = cost_table(analysis, base)
    choices = [len(block.choices) for block in table.blocks]
    genotype = table.genotype([(7 * index + 5) % count for index, count in enumerate(choices)])
    return inherit_student(base, analysis, genotype).eval()


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return {**{name: student(name) for name in FAMILIES}, "reduced": student("mobilenetv2_050", reduction=8)}


@pytest.fixture(scope="module")
def folders(networks: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every network exported; beside each what it gives for one image."""
    root = tmp_path_factory.mktemp("exports")
    image = torch.linspace(-2, 2, 3 * 32 * 32).reshape(1, 3, 32, 32)
    for name, network in networks.items():
        card = Card(input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), label_names=("a", "b"))
        export(network, root / name, card)
        with torch.no_grad():
            torch.save({"image": image, "logits": network(image)}, root / f"{name}.pt")
    return {name: root / name for name in networks}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Students of our own bases, and one in its inference form, as in `folders`."""
    root, image = tmp_path_factory.mktemp("own"), torch.linspace(-2, 2, 3 * 32 * 32).reshape(1, 3, 32, 32)
    networks = {name: student(name) for name in ("cifar_resnet20", "cifar_resnet20_cheap", "cifar_vgg16_bn")}
    networks["fused"] = fused(student("mobileone_s0"))
    for name, network in networks.items():
        export(network, root / name)
        with torch.no_grad():
            torch.save({"image": image, "logits": network(image)}, root / f"{name}.pt")
    return {name: root / name for name in networks}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of one export, to be damaged."""
    return Path(shutil.copytree(folders["test_resnet"], tmp_path / "export"))


# any warning is an error, but for that of the folder that torch 2.6 leaves to the interpreter
STRICT = (sys.executable, "-W", "error", "-W", "ignore:Implicitly cleaning up:ResourceWarning")
IN_A_NEW_PROCESS = """
import sys, timm, torch, nas_kd.models
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    make = lambda **kwargs: timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()
    known = torch.load(f"{folder}.pt", weights_only=True)
    image = known["image"]
    with torch.no_grad():
        whole = make()
        assert torch.equal(whole(image), known["logits"]), folder
        assert make(num_classes=7)(image).shape == (1, 7), folder
        assert make(num_classes=0)(image).ndim == 2, folder
        features = make(features_only=True)
        maps = features(image)
        assert [m.shape[1] for m in maps] == features.feature_info.channels(), folder
        picked = make(features_only=True, out_indices=(1, 2))
        assert [m.shape[1] for m in picked(image)] == picked.feature_info.channels(), folder
        whole.reset_classifier(5)
        assert whole(image).shape == (1, 5), folder
        assert whole.forward_features(image).shape[1] == whole.num_features, folder
    assert "optuna" not in sys.modules and "sklearn" not in sys.modules and "nas_kd.training" not in sys.modules
print("fine")
"""


WITHOUT_NAS_KD = """
import importlib.util, sys, torch
class Without:
    def find_spec(self, name, path=None, target=None):
        assert name != "nas_kd" and not name.startswith("nas_kd."), "it imports nas_kd"
sys.meta_path.insert(0, Without())
torch.set_num_threads(1)
for number, folder in enumerate(sys.argv[1:]):
    spec = importlib.util.spec_from_file_location(f"model{number}", f"{folder}/model.py")
    module = importlib.util.module_from_spec(spec)  # and not into sys.modules
    spec.loader.exec_module(module)
    known = torch.load(f"{folder}.pt", weights_only=True)
    with torch.no_grad():
        network = module.create_model(pretrained=True).eval()
        assert torch.equal(network(known["image"]), known["logits"]), folder
        assert module.create_model(num_classes=7).eval()(known["image"]).shape == (1, 7), folder
        assert module.create_model(num_classes=0).eval()(known["image"]).ndim == 2, folder
        for level, features in zip(network.feature_info, network.forward_intermediates(known["image"])[1]):
            assert level["num_chs"] == features.shape[1], folder
print("fine")
"""


def test_one_file_needs_torch_and_timm_alone(folders: dict[str, Path], own: dict[str, Path]) -> None:
    command = [*STRICT, "-c", WITHOUT_NAS_KD, *map(str, (*folders.values(), *own.values()))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("fine\n", "")


def test_one_file_can_be_read(folders: dict[str, Path], own: dict[str, Path], tmp_path: Path) -> None:
    text = (folders["vgg11_bn"] / "model.py").read_text()
    assert text.startswith('"""vgg11_bn: vgg11_bn as a search left it')
    assert "\n    'features.0': {'shapes': {'weight': {0: 8}, 'bias': {0: 8}}, 'sizes': {'out_channels': 8}},\n" in text
    assert (
        "IMAGES: dict[str, Any] = {'mean': (0.1, 0.2, 0.3), 'std': (0.5, 0.6, 0.7), 'input_size': (3, 32, 32)}" in text
    )
    assert "class BasicBlock" not in text
    assert "class BasicBlock" in (own["cifar_resnet20"] / "model.py").read_text()
    plain = export(timm.create_model("test_resnet"), tmp_path / "plain", Card(title='a "quoted" title'))
    assert "Shift2d" not in (plain / "model.py").read_text()  # what a network has none of
    assert (plain / "model.py").read_text().startswith('"""a quoted title: test_resnet')


@register_model
def own_resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A base of a user's own."""
    shape = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (8, 16, 16, 32)}
    network: nn.Module = build_model_with_cfg(ResNet, "own_resnet", pretrained, **shape, **kwargs)
    return network


def test_a_base_of_ones_own_is_imported_from_where_it_is_registered(tmp_path: Path) -> None:
    network = student("own_resnet")
    folder = export(network, tmp_path / "model")
    assert f"\nimport {own_resnet.__module__}  # registers the base\n" in (folder / "model.py").read_text()
    image = torch.zeros(1, 3, 32, 32)
    assert torch.equal(load(folder).eval()(image), network(image))


def test_every_export_loads_in_a_new_process_in_every_variant(folders: dict[str, Path]) -> None:
    command = [*STRICT, "-c", IN_A_NEW_PROCESS, *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("fine\n", "")


@pytest.mark.parametrize("name", [*FAMILIES, "reduced"])
def test_an_export_takes_images_of_other_channels(name: str, folders: dict[str, Path]) -> None:
    model = timm.create_model(f"local-dir:{folders[name]}", pretrained=True, in_chans=1).eval()
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("name", [*FAMILIES, "reduced"])
def test_costs_and_weights_survive(name: str, networks: dict[str, nn.Module], folders: dict[str, Path]) -> None:
    loaded = load(folders[name])
    assert type(loaded) is type(networks[name])
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in networks[name].parameters())
    assert weights_equal(folders[name], loaded)


@pytest.mark.parametrize("name", [*FAMILIES, "reduced"])
def test_a_loaded_model_exports_to_the_same_files(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    again = export(load(folders[name]), tmp_path / "again")
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (folders[name], again))
    assert second["model_args"] == first["model_args"]
    assert second["architecture"] == "nas_kd_student"
    one, two = (load_file(folder / "model.safetensors") for folder in (folders[name], again))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_changed_classifier_and_other_channels_export_again(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders["test_resnet"], num_classes=7, in_chans=1).eval()
    image = torch.randn(1, 1, 32, 32)
    again = load(export(model, tmp_path / "seven")).eval()
    with torch.no_grad():
        assert torch.equal(again(image), model(image))
    model.reset_classifier(3)  # type: ignore[operator]
    three = load(export(model, tmp_path / "three")).eval()
    with torch.no_grad():
        assert torch.equal(three(image), model(image))


def test_a_student_of_an_export_is_exported(folders: dict[str, Path], tmp_path: Path) -> None:
    base = create_base(f"local-dir:{folders['mobilenetv2_050']}", pretrained=True).eval()
    analysis = analyse(base, (3, 32, 32))
    smaller = inherit_student(base, analysis, cost_table(analysis, base).cheapest("params")).eval()
    image = torch.randn(1, 3, 32, 32)
    loaded = load(export(smaller, tmp_path / "smaller")).eval()
    with torch.no_grad():
        assert torch.equal(loaded(image), smaller(image))
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in base.parameters())


def test_a_base_itself_is_exported(tmp_path: Path) -> None:
    base = timm.create_model("test_resnet", num_classes=10, in_chans=1).eval()
    image = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(load(export(base, tmp_path / "base")).eval()(image), base(image))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_gives(umask: int, networks: dict[str, nn.Module], tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        folder = export(networks["test_resnet"], tmp_path / "model", Card(input_size=(3, 32, 32)), onnx=HAS_ONNX)
        write_tensors(tmp_path / "cached", {"one": torch.zeros(1)})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (*folder.iterdir(), tmp_path / "cached")}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize(
    "change",
    [
        lambda network: network.half(),
        lambda network: network.to(memory_format=torch.channels_last),
        nn.DataParallel,
        torch.compile,
        nn.SyncBatchNorm.convert_sync_batchnorm,
    ],
    ids=["half", "channels last", "DataParallel", "compiled", "SyncBN"],
)
def test_a_student_is_exported_however_it_was_trained(change: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    network = student("test_resnet")
    trained = change(network).eval()
    folder = export(trained, tmp_path / "model", Card(input_size=(3, 32, 32)), onnx=HAS_ONNX)
    image = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    with torch.no_grad():
        # kernels of another layout may round otherwise
        expected = network.float().to(memory_format=torch.contiguous_format)(image)
        assert torch.equal(load(folder).eval()(image), expected)
    assert not HAS_ONNX or torch.allclose(run_onnx(folder / "model.onnx", image), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["shifts_resnet", "shifts_efficientnet"])
def test_shifts_that_were_exported_as_slices_give_the_same_outputs(name: str, tmp_path: Path) -> None:
    """Of version 0.1, where a shift put its channels in the order of their taps; once between two 1×1, once alone."""
    folder = GOLDEN / name
    assert any(key.endswith(".order") for key in load_file(folder / "model.safetensors"))
    known, network = load_file(folder / "expected.safetensors"), load(folder).eval()
    again = load(export(network, tmp_path / "again")).eval()
    with torch.no_grad():
        torch.testing.assert_close(network(known["images"].float()), known["outputs"], atol=1e-5, rtol=1e-5)
        assert torch.equal(again(known["images"].float()), network(known["images"].float()))
    count = sum(9 * sum(module.shares) for module in network.modules() if isinstance(module, Shift2d))
    assert f"{count:,} fixed weights" in (tmp_path / "again" / "README.md").read_text()


def test_the_network_is_not_changed_and_may_still_train(tmp_path: Path) -> None:
    network = student("test_resnet").train()
    before = {key: value for key, value in network.__dict__.items() if key[0] != "_"}
    export(network, tmp_path / "model", Card(input_size=(3, 64, 64)))
    assert {key: value for key, value in network.__dict__.items() if key[0] != "_"} == before
    assert network.training


def test_the_card_says_how_to_prepare_images(folders: dict[str, Path]) -> None:
    model = load(folders["test_resnet"])
    config = timm.data.resolve_data_config({}, model=model)
    assert config["input_size"] == (3, 32, 32)
    assert tuple(config["mean"]) == (0.1, 0.2, 0.3)
    assert tuple(config["std"]) == (0.5, 0.6, 0.7)
    assert model.pretrained_cfg["label_names"] == ["a", "b"]


def test_facts_are_in_the_config_and_the_readme(tmp_path: Path) -> None:
    card = Card(facts={"params": 123, "command": "python -m nas_kd.study"}, title="small")
    folder = export(student("test_resnet"), tmp_path / "model", card)
    assert json.loads((folder / "config.json").read_text())["nas_kd"] == dict(card.facts)
    readme = (folder / "README.md").read_text()
    assert readme.startswith("# small\n")
    assert "| params | 123 |" in readme
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.py",
        "model.safetensors",
    ]


class TestFolders:
    def test_an_earlier_export_is_replaced(self, folder: Path) -> None:
        (folder / "old.txt").write_text("old")
        network = timm.create_model("test_resnet", num_classes=3)
        export(network, folder)
        assert weights_equal(folder, network)
        assert not (folder / "old.txt").exists()
        assert list(folder.parent.iterdir()) == [folder]

    @pytest.mark.parametrize("relative", ["file", "file/model", "full"])
    def test_what_is_in_the_way_is_never_touched(self, tmp_path: Path, relative: str) -> None:
        (tmp_path / "file").write_text("mine")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.txt").write_text("mine")
        with pytest.raises(OutputError, match=r"cannot write .*choose another folder") as caught:
            export(timm.create_model("test_resnet"), tmp_path / relative)
        assert "\n" not in str(caught.value)
        assert (tmp_path / "file").read_text() == (tmp_path / "full" / "thesis.txt").read_text() == "mine"

    @pytest.mark.parametrize("change", ["stride", "pooling", "channels", "folded"])
    def test_a_network_that_was_changed_by_hand_is_refused(self, tmp_path: Path, change: str) -> None:
        """Its export would fail to load or, worse, load and compute something else."""
        network: Any = timm.create_model("repvgg_a0" if change == "folded" else "resnet18", num_classes=10)
        if change == "stride":
            network.layer4[0].conv1.stride = network.layer4[0].downsample[0].stride = (1, 1)
        elif change == "pooling":
            network.maxpool = nn.Identity()
        elif change == "channels":
            network.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
        else:
            network = reparameterize_model(network)
        with pytest.raises(
            ModelError, match=r"was changed after timm created it \(.* is .*, not .*register the changed"
        ):
            export(network, tmp_path / "model")
        assert not list(tmp_path.iterdir())

    def test_a_network_that_timm_did_not_make_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"Sequential is no model of timm.create_model: register it"):
            export(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "model")
        assert not list(tmp_path.iterdir())


def weights_equal(folder: Path, network: nn.Module) -> bool:
    """Whether the weights of an exported folder are bit-equal to those of `network`."""
    saved, own = load_file(folder / "model.safetensors"), network.state_dict()
    return saved.keys() == own.keys() and all(torch.equal(saved[name], own[name].cpu()) for name in own)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


class TestDamage:
    def refused(self, folder: Path) -> str:
        with pytest.raises(PlanError) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_no_folder(self, tmp_path: Path) -> None:
        assert "is no exported model: it has no config.json" in self.refused(tmp_path / "nowhere")

    def test_no_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        assert "is damaged" in self.refused(folder)

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
    def test_truncated_weights(self, folder: Path, share: float) -> None:
        weights = folder / "model.safetensors"
        data = weights.read_bytes()
        weights.write_bytes(data[: int(share * len(data))])
        assert "is damaged" in self.refused(folder)

    @pytest.mark.parametrize("size", [0, 5, 5000])
    def test_timm_says_it_as_clearly(self, folder: Path, size: int) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:size])
        with pytest.raises(
            PlanError, match=r"cannot be built: .* the export is damaged: export the model again"
        ) as caught:
            timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert "\n" not in str(caught.value)

    def test_other_weights(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        name = next(key for key in weights if key.endswith("weight"))
        save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors")
        assert name in self.refused(folder)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '"text"', "\x00\x01"])
    def test_a_config_that_is_none(self, folder: Path, text: str) -> None:
        (folder / "config.json").write_text(text)
        assert "is damaged" in self.refused(folder)

    @pytest.mark.parametrize(
        "change",
        [
            lambda config: config.pop("architecture"),
            lambda config: config.pop("model_args"),
            lambda config: config["model_args"].pop("base"),
            lambda config: config["model_args"].pop("plan"),
            lambda config: config["model_args"].update(plan=None),
            lambda config: config["model_args"].update(plan=[]),
            lambda config: config["model_args"].update(base="no_such_model"),
            lambda config: config["model_args"].update(base="nas_kd_student"),
            lambda config: config["model_args"].update(base="test_vit"),
            lambda config: config["model_args"].update(base_args={"no_such_argument": 1}),
            lambda config: config["model_args"]["plan"].update(version=99),
            lambda config: config["model_args"]["plan"].pop("edits"),
            lambda config: config["model_args"]["plan"].update(edits={}),
            lambda config: config["model_args"]["plan"]["edits"].update(nowhere={"drop": True}),
            lambda config: config["model_args"]["plan"].update(features=[1]),
        ],
    )
    def test_a_mangled_config(self, folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
        rewritten(folder, change)
        with pytest.raises((PlanError, ModelError)) as caught:
            load(folder)
        assert "\n" not in str(caught.value)

    def test_a_plan_sets_nothing_but_sizes(self, folder: Path) -> None:
        def smuggle(config: dict[str, Any]) -> None:
            config["model_args"]["plan"]["edits"][""] = {"sizes": {"forward": 1}}

        rewritten(folder, smuggle)
        assert "'forward', which is no size of a module" in self.refused(folder)


def test_onnx_beside_the_weights_is_written_once(
    networks: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(input_size=(3, 32, 32))
    folder = export(networks["test_resnet"], tmp_path / "model", card, onnx=True)
    written = (folder / "model.onnx").read_bytes()
    image = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    with torch.no_grad():
        expected = networks["test_resnet"](image)
    assert torch.allclose(run_onnx(folder / "model.onnx", image), expected, atol=1e-4)
    monkeypatch.setattr("nas_kd.results.export.write_model", lambda *_: pytest.fail("written again"))
    export(networks["test_resnet"], folder, Card(input_size=(3, 32, 32), title="again"), onnx=True)
    assert (folder / "model.onnx").read_bytes() == written
    monkeypatch.undo()
    monkeypatch.setattr("nas_kd.networks.onnx.difference", lambda *_: 0.5)
    with pytest.raises(ModelError, match=r"ResNet (differs by 0\.5|cannot be written) as ONNX"):
        export(networks["test_resnet"], folder, Card(input_size=(3, 64, 64)), onnx=True)  # other images
    assert (folder / "model.onnx").read_bytes() == written  # the earlier export stays
    export(networks["test_resnet"], folder, card)
    assert not (folder / "model.onnx").exists()
