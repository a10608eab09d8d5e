"""timm's scripts run on a result, as docs/timm_tools.md says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from nas_kd.__main__ import main
from nas_kd.results.export import Card, export

DOCUMENT = Path(__file__).parent.parent / "docs" / "timm_tools.md"
# what timm's train.py and validate.py do with a model's name; they are no part of the package timm
SCRIPT = """
import argparse, json, sys, timm
from beside_it import THREE
parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--pretrained", action="store_true")
known, others = parser.parse_known_args()
model = timm.create_model(known.model, pretrained=known.pretrained, in_chans=THREE, drop_rate=0.1, drop_path_rate=None,
                          drop_block_rate=None, global_pool=None, scriptable=False, checkpoint_path="")
config = timm.data.resolve_data_config({}, model=model)
print(json.dumps([sys.argv[0], __name__, known.model, config["input_size"], others]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timm")
    for name in ("train", "validate", "benchmark"):
        (folder / "pytorch-image-models").mkdir(exist_ok=True)
        (folder / "pytorch-image-models" / f"{name}.py").write_text(SCRIPT)
    (folder / "pytorch-image-models" / "beside_it.py").write_text("THREE = 3\n")
    export(
        timm.create_model("test_resnet", num_classes=2), folder / "results/STUDY/MODEL", Card(input_size=(3, 48, 48))
    )
    return folder


def documented() -> list[list[str]]:
    text = DOCUMENT.read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^nas-kd run (.*)$", text, re.MULTILINE)]


@pytest.mark.parametrize("arguments", documented(), ids=lambda words: Path(words[0]).stem)
def test_documented_commands(
    arguments: list[str], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.delitem(sys.modules, "beside_it", raising=False)
    assert main(["run", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f'["{arguments[0]}", "__main__", "local-dir:results/STUDY/MODEL", ')
    assert "[3, 48, 48]" in printed


def test_it_is_a_script_of_its_own_in_another_process(place: Path) -> None:
    """As torchrun starts it; nothing but the launcher tells timm of our networks."""
    words = ["pytorch-image-models/train.py", "my_images", "--model=results/STUDY/MODEL", "--pretrained", "-b", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "nas_kd.run", *words], cwd=place, capture_output=True, text=True, check=True
    )
    assert done.stdout.rstrip().endswith('["my_images", "-b", "8"]]')


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere/train.py"]) == 2
    assert capsys.readouterr().err == (
        "nas_kd: there is no script nowhere/train.py: clone github.com/huggingface/pytorch-image-models for timm's "
        "train.py\n"
    )
    assert main(["run"]) == 2
    assert capsys.readouterr().err.startswith("usage: nas-kd run SCRIPT")
