"""`nas-kd push` against a hub of our own on this machine: what is sent, what its card says, and that it loads again."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard, constants

import nas_kd
from nas_kd.__main__ import main

FIGURES = {"test accuracy": 0.9, "dataset": "torch/cifar10", "command": "python -m nas_kd.study --pretrained"}


@dataclass
class Hub:
    """What a hub holds and how it answers."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    refuses: int = 0  # with this status
    token: str = ""
    commits: int = 0


def _answer_to(hub: Hub, path: str, sent: bytes) -> Any:
    if path == "/api/repos/create":
        return {"url": f"{hub.url}/me/small", "name": "me/small", "id": "1"}
    if path == "/api/validate-yaml":
        return {"errors": [], "warnings": []}
    if path == "/api/models/me/small/preupload/main":
        names = [file["path"] for file in json.loads(sent)["files"]]
        return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
    assert path.startswith("/api/models/me/small/commit/main")
    lines = [json.loads(line)["value"] for line in sent.splitlines() if b'"file"' in line]
    hub.files = {line["path"]: base64.b64decode(line["content"]) for line in lines}
    hub.commits += 1
    return {"success": True, "commitOid": "a" * 40, "commitUrl": f"{hub.url}/me/small/commit/{'a' * 40}"}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """The few addresses of huggingface.co that one commit and its download ask for."""

        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            hub.token = self.headers.get("Authorization", "")
            if hub.refuses:
                return self._answer(hub.refuses, b'{"error": "no"}', Content_Type="application/json")
            self._answer(200, json.dumps(_answer_to(hub, self.path, sent)).encode(), Content_Type="application/json")

        def do_GET(self) -> None:
            if hub.refuses and self.path.startswith("/api/"):
                return self._answer(hub.refuses, b"{}", Content_Type="application/json")
            name = self.path.rpartition("/")[2]
            body = hub.files.get(name, b"")
            if "/resolve/" in self.path and not body:
                return self._answer(404, X_Error_Code="EntryNotFound")
            self._answer(200, body, ETag=hashlib.sha1(body).hexdigest(), X_Repo_Commit="a" * 40)

        do_HEAD = do_GET

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    state.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", state.url)
    template = state.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def space() -> nas_kd.Space[torch.nn.Module]:
    return nas_kd.Space(timm.create_model("test_resnet", num_classes=2), budget="params=50%", img_size=64)


@pytest.fixture(scope="module")
def student(space: nas_kd.Space[torch.nn.Module]) -> torch.nn.Module:
    return space.student(space.starts(1)[0]).eval()


@pytest.fixture(scope="module")
def result(
    space: nas_kd.Space[torch.nn.Module], student: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An export as a study makes it, with its figures."""
    genotype = space.starts(1)[0]
    costs = {kind: space.cost(genotype)[kind] for kind in ("params", "macs", "size", "peak_memory")}
    facts = {"genotype": genotype.to_json(), **costs, **FIGURES}
    folder = tmp_path_factory.mktemp("results") / "student"
    return nas_kd.export(student, folder, nas_kd.Card(input_size=(3, 64, 64), facts=facts), onnx=True)


def test_a_result_goes_up_and_comes_down_again(
    hub: Hub, result: Path, student: torch.nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(result), "me/small"]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/me/small\nload it: ")
    assert (hub.token, hub.commits) == ("Bearer hf_secret", 1)
    assert set(hub.files) == {"README.md", "blocks.svg", "config.json", "model.onnx", "model.py", "model.safetensors"}
    again = timm.create_model("hf-hub:me/small", pretrained=True).eval()
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(image), student(image), rtol=0, atol=0)


def test_its_card_says_what_it_is(hub: Hub, result: Path) -> None:
    assert main(["push", str(result), "me/small"]) == 0
    card = ModelCard(hub.files["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "timm/test_resnet.r160_in1k")
    assert card.data.tags == ["image-classification", "timm", "nas_kd", "onnx"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    figures = {figure.metric_type: figure.metric_value for figure in card.data.eval_results}
    facts = json.loads((result / "config.json").read_text())["nas_kd"]
    assert figures == {"accuracy": 0.9, **{kind: facts[kind] for kind in ("params", "macs", "size", "peak_memory")}}
    assert {figure.dataset_name for figure in card.data.eval_results} == {"torch/cifar10"}
    assert "](blocks.svg)" in card.content
    assert hub.files["blocks.svg"].startswith(b"<svg")
    assert 'timm.create_model("hf-hub:me/small", pretrained=True)' in card.content


def test_a_license_of_ones_own(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(result), "me/small", "--license", "mit", "--card-only"]) == 0
    assert ModelCard(capsys.readouterr().out).data.license == "mit"


def test_weights_that_began_here_have_no_license_from_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = nas_kd.Card(facts={"command": "python -m nas_kd.study --budget params=1M"})
    nas_kd.export(timm.create_model("test_resnet", num_classes=2), tmp_path / "own", card)
    assert main(["push", str(tmp_path / "own"), "me/small", "--card-only"]) == 0
    data = ModelCard(capsys.readouterr().out).data
    assert (data.license, data.base_model) == (None, None)


@pytest.mark.parametrize(
    ("status", "reason"), [(401, "the token is not valid"), (403, "the token may not write there"), (500, "no")]
)
def test_a_refusal_is_one_line(
    hub: Hub, result: Path, capsys: pytest.CaptureFixture[str], status: int, reason: str
) -> None:
    hub.refuses = status
    assert main(["push", str(result), "me/small"]) == 2
    assert capsys.readouterr().err.startswith(f"nas_kd: the hub refused me/small: {reason}")


def test_mistakes_are_one_line(
    hub: Hub, result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: str) -> str:
        assert main(["push", *words]) == 2
        return capsys.readouterr().err.removeprefix("nas_kd: ")

    assert told(str(result), "no such/name/at all").startswith("'no such/name/at all' names no repository")
    assert "is no exported model" in told(str(tmp_path), "me/small")
    assert "is no exported model" in told(str(tmp_path / "nowhere"), "me/small")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached; push again" in told(str(result), "me/small")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert told(str(result), "me/small").startswith("the hub does not know you: log in by `hf auth login`")
    assert hub.commits == 0
