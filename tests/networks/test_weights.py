"""timm's weights with and without a network: the hub's cache is laid out as the hub itself does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from nas_kd import create_base
from nas_kd.errors import ModelError

MODEL = "test_resnet"
NOBODY = "http://127.0.0.1:9"  # the port of the discard service, which nothing offers


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path


def lay_out(cache: Path) -> nn.Module:
    """Puts weights of our own where the hub's would be."""
    torch.manual_seed(1)
    network = timm.create_model(MODEL)
    hub = timm.models.get_pretrained_cfg(MODEL).hf_hub_id
    folder = cache / f"models--{hub.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    save_file(network.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    return network


def test_cached_weights_need_no_network(cache: Path) -> None:
    network = lay_out(cache)
    loaded = create_base(MODEL, pretrained=True)
    assert torch.equal(loaded.get_parameter("fc.weight"), network.get_parameter("fc.weight"))
    assert not constants.HF_HUB_OFFLINE  # as it was


def test_without_both_there_is_one_line(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"not in the cache .*127\.0\.0\.1:9 cannot be reached.*--initial-checkpoint"):
        create_base(MODEL, pretrained=True)
    with pytest.raises(ModelError, match="weights of hf-hub:someone/something"):
        create_base("hf-hub:someone/something", pretrained=True)


def test_an_offline_hub_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        create_base(MODEL, pretrained=True)


class Refusing(BaseHTTPRequestHandler):
    """A server that is out of order; counts how often it is asked."""

    asked = 0

    def do_HEAD(self) -> None:
        Refusing.asked += 1
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def refusing() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_that_is_out_of_order_is_asked_once(cache: Path, refusing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", refusing)
    with pytest.raises(ModelError, match="cannot be reached"):
        create_base(MODEL, pretrained=True)
    assert Refusing.asked == 1


def test_a_model_without_weights_is_told_so(cache: Path) -> None:
    with pytest.raises(ModelError, match="cifar_resnet20"):
        create_base("cifar_resnet20", pretrained=True)
