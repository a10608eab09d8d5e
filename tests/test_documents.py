"""What the documents tell people to type is what the commands understand, and do."""

from __future__ import annotations

import ast
import hashlib
import pickle
import re
import shlex
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from torchvision.datasets import CIFAR10

from nas_kd import distill, mcu, quantize, rank_check, space, structure, study, worker
from nas_kd.arguments.distill import parse_distill
from nas_kd.arguments.study import parse_study
from nas_kd.arguments.worker import parse_worker
from nas_kd.learnt_widths.arguments import parse_structure
from nas_kd.quantize import parse_quantize
from nas_kd.rank_check.arguments import parse_rank_check
from nas_kd.results.export import Card, export
from nas_kd.space import parse_space

ROOT = Path(__file__).parent.parent
PARSE: dict[str, Callable[[Sequence[str]], Any]] = {
    "study": parse_study,
    "space": parse_space,
    "distill": parse_distill,
    "structure": parse_structure,
    "rank_check": parse_rank_check,
    "worker": parse_worker,
    "quantize": parse_quantize,
    "mcu": mcu.parse_mcu,
}
MAIN: dict[str, Callable[[Sequence[str]], int]] = {
    "study": study.main,
    "space": space.main,
    "distill": distill.main,
    "structure": structure.main,
    "rank_check": rank_check.main,
    "worker": worker.main,
    "quantize": quantize.main,
}
# what makes a command short, and changes nothing of what it is about
_SEARCH = "--trials 1 --proxy-epochs 1 --front 1 --library-budget 0 --no-onnx --no-baselines"
_TRAIN = "--teacher-epochs 1 --views 1 --train-images 12 -q --device cpu"
SHORT = {
    # here alone (tests/test_workers.py has processes), and nothing timed before it, but by the first command
    "study": f"{_SEARCH} {_TRAIN} --refine-epochs 1 --jobs 1",
    "space": "",
    "distill": "--epochs 1 --train-images 12 -q --device cpu",
    "structure": f"{_TRAIN} --learn-epochs 1 --refine-epochs 1 --no-onnx --no-baselines",
    "rank_check": f"{_TRAIN} --library-budget 0 --genotypes 3 --truth-images 24 --proxy-images 8 --val-images 8",
    "worker": "--wait 0 -q --device cpu",
    "quantize": "--train-images 12 -q",
}
MAIN_COMMAND = "--budget params=1M"
BLOCK = re.compile(r"```(?:bash|sh)\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"(?:-m nas_kd\.|^nas-kd )(\w+)(.*)", re.MULTILINE)  # torchrun's are run by one process here


def commands() -> list[tuple[str, str, str]]:
    """(document, command, arguments) of every command in a block of shell."""
    found = []
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in BLOCK.findall(document.read_text(encoding="utf-8")):
            for name, arguments in COMMAND.findall(block.replace("\\\n", " ")):
                if name in PARSE:  # tests/test_run.py has the other
                    found.append((document.name, name, arguments))
    return found


@pytest.mark.parametrize(("document", "name", "arguments"), commands())
def test_every_command_is_understood(document: str, name: str, arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_KD_STORAGE", "postgresql+psycopg://me@db/nas")  # as docs/workers.md says to
    PARSE[name](words_of(arguments))


def words_of(arguments: str) -> list[str]:
    """The words of one command, without what the shell keeps for itself."""
    words = shlex.split(arguments, comments=True)
    end = next((place for place, word in enumerate(words) if word in ("&", "&&", "|", ">", "\\")), len(words))
    return words[:end]


def write_images(folder: Path, side: int, each: int = 10) -> None:
    """Image folders of two classes."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def write_fashion_mnist(folder: Path) -> None:
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 60), ("t10k", 20)):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = np.array([0x0800 + array.ndim, *array.shape], dtype=">i4").tobytes()
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())


def write_cifar10(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchvision lays CIFAR-10 out, but smaller; so its checksums are those of these files."""
    place = folder / "cifar-10-batches-py"
    place.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 3072), dtype=np.uint8)
    batch = {"data": pixels, "labels": [index % 10 for index in range(60)]}
    files = {
        "data_batch_1": batch,
        "test_batch": batch,
        "batches.meta": {"label_names": [f"class {number}" for number in range(10)]},
    }
    sums = {}
    for name, content in files.items():
        (place / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((place / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})


def write_hub(folder: Path, model: str) -> None:
    """Random weights of a model where the hub keeps those that it has fetched."""
    hub = timm.models.get_pretrained_cfg(model).hf_hub_id
    place = folder / f"models--{hub.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    (place / "snapshots" / "abc").mkdir(parents=True)
    save_file(timm.create_model(model).state_dict(), place / "snapshots" / "abc" / "model.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run, one after the other: workers join the study of the command before."""
    return tmp_path_factory.mktemp("documented")


def make_what_they_name(words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes the files and servers that a command speaks of, small, and puts their names into it."""
    options = dict(pairwise(words))
    dataset = options.get("--dataset", "")
    data = place / (dataset.replace("/", "-") or "folder")
    if "--data-dir" in words:
        writers: dict[str, Callable[[], None]] = {
            "torch/fashion_mnist": lambda: write_fashion_mnist(data),
            "torch/cifar10": lambda: write_cifar10(data, monkeypatch),
            "": lambda: write_images(data, 64),
        }
        if not data.exists():
            writers[dataset]()
    if "--pretrained" in words:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
        write_hub(place / "hub", options["--model"])
    if "FILE" in words:
        torch.save(timm.create_model(options["--model"], num_classes=2).state_dict(), place / "weights.pth")
    result = place / "result"
    if "results/STUDY/MODEL" in words and not result.exists():
        export(timm.create_model("test_resnet", num_classes=2), result, Card(input_size=(3, 64, 64)))
    names = {
        "results/STUDY/MODEL": str(result),
        "my_images": str(data),
        "DIR": str(data),
        "FILE": str(place / "weights.pth"),
        "MODEL": "test_resnet",
        "imagenet": str(data),
        "160": "64",  # pixels
        "224": "64",
        "s3://bucket": str(place / "bucket"),
        "postgresql+psycopg://me@db/nas": f"sqlite:///{place / 'server.db'}",
    }
    pixels = ["--img-size", "64"] if "--data-dir" in words and "--img-size" not in words else []  # not a network's own
    return [names.get(word, word) for word in (*words, *pixels)]


def inline_commands() -> list[tuple[str, str, str]]:
    """Whole commands within the README's sentences."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"`python -m nas_kd\.(space|structure)( [^`]*)`", BLOCK.sub("", text))
    return [("README.md", name, arguments) for name, arguments in found]


ELSEWHERE = ("--ray", "--latency-command")  # tests/test_workers.py, tests/test_examples.py
RUN = [
    case
    for case in {case[1:]: case for case in reversed((*commands(), *inline_commands()))}.values()
    if case[1] != "mcu" and not any(option in case[2] for option in ELSEWHERE)  # mcu: tests/pipeline/test_device.py
][::-1]


@pytest.mark.parametrize(("document", "name", "arguments"), RUN)
def test_every_command_runs(
    document: str, name: str, arguments: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = make_what_they_name(words_of(arguments), place, monkeypatch)
    if name == "worker":
        monkeypatch.setenv("NAS_KD_STORAGE", f"sqlite:///{place / 'server.db'}")
    monkeypatch.chdir(place)
    untimed = name == "study" and not arguments.strip().startswith(MAIN_COMMAND) and "latency" not in arguments
    assert MAIN[name]([*words, *SHORT[name].split(), *["--no-base-bounds"] * untimed]) == 0


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_there_are_commands_of_all_kinds() -> None:
    assert {name for _, name, _ in commands()} >= {"study", "distill", "rank_check"}


LINKING = ("*.md", "docs/*.md", "docs/results/*.md", "examples/*.md")


@pytest.mark.parametrize(
    "document",
    sorted(path for pattern in LINKING for path in ROOT.glob(pattern)),
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_what_is_linked_is_there(document: Path) -> None:
    """Files, and the headings in them."""
    for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", document.read_text(encoding="utf-8")):
        linked = document.parent / link if link else document
        assert linked.exists(), link
        assert not anchor or anchor in anchors(linked), f"{link}#{anchor}"


def anchors(document: Path) -> set[str]:
    """The headings of a page, as GitHub links them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_map_names_every_file_once() -> None:
    """The table of docs/design.md: `room/`: `file`, …; a file with its folder, or a path, stands for itself."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = text.split("| you want to change | look in |")[1].split("\n\n")[0]
    named = []
    for row in table.splitlines()[2:]:
        for part in row.split("|")[2].split(";"):
            room = ""
            for word in re.findall(r"`([^`]+)`", part):
                if word.endswith("/"):
                    room = word
                else:
                    named.append(word if word.endswith(".py") else f"{room}{word}.py")
    package = ROOT / "nas_kd"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert sorted(named) == sorted(files - {"rank_check/__main__.py"})


# each the same wherever it stands
SAME = {"main": "runs a command", "ignore": "tells nobody", "pass_over": "tells nobody"}


def test_a_name_has_one_meaning_in_all_rooms() -> None:
    """Classes, and functions that other files use: a name stands for one thing."""
    homes: dict[str, list[str]] = {}
    for path in sorted((ROOT / "nas_kd").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) or (isinstance(node, ast.FunctionDef) and node.name[0] != "_"):
                homes.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in homes.items() if len(found) > 1 and name not in SAME} == {}
