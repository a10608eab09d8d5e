"""Whether timm's weights can be had, before anything waits for a network that is not there."""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import timm
from huggingface_hub import constants, try_to_load_from_cache
from torch.hub import get_dir

from nas_kd.errors import ModelError

_SECONDS = 3.0  # until a server that does not answer counts as out of reach
_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB = ("hf-hub:", "hf_hub:")


@contextmanager
def weights_at_hand(name: str) -> Iterator[None]:
    """While timm loads the weights of a model: from the cache alone when they are in it, without asking the hub.

    Raises ModelError when they are neither there nor within reach.
    """
    hub, url = _origin(name)
    if not hub and not url:
        yield  # timm has none, and says so
        return
    cached = _in_cache(hub, name) if hub else _is_downloaded(url)
    if not cached and (problem := problem_with(constants.ENDPOINT if hub else url)):
        raise ModelError(_explain(name, hub or url, problem, constants.HF_HUB_CACHE if hub else get_dir()))
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or cached
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _origin(name: str) -> tuple[str, str]:
    """The repository of the weights on the hub, or their address."""
    if name.startswith(_HUB):
        return name.partition(":")[2].partition("@")[0], ""
    config: Any = timm.models.get_pretrained_cfg(name, allow_unregistered=True) if ":" not in name else None
    if config is None or getattr(config, "file", None):
        return "", ""
    return config.hf_hub_id or "", config.url or ""


def _in_cache(hub: str, name: str) -> bool:
    def has(file: str) -> bool:
        return isinstance(try_to_load_from_cache(hub, file, cache_dir=constants.HF_HUB_CACHE), str)

    return any(map(has, _FILES)) and (not name.startswith(_HUB) or has("config.json"))


def _is_downloaded(url: str) -> bool:
    return os.path.isfile(os.path.join(get_dir(), "checkpoints", os.path.basename(urlsplit(url).path)))


def problem_with(address: str) -> str:
    """Why a server cannot be asked; empty when it can."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    server = f"{urlsplit(address).scheme}://{urlsplit(address).netloc}"
    return "" if _answers(server) else f"{server} cannot be reached"


def _answers(server: str) -> bool:
    """Whether a server answers; asked in a thread of its own, since the search for a name knows no time limit."""
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(_ask(server)), daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return answers == [True]


def _ask(server: str) -> bool:
    try:
        urlopen(Request(server, method="HEAD"), timeout=_SECONDS).close()
    except HTTPError as error:
        error.close()
        return error.code < 500  # what is out of order would be tried again and again
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # another client may know the certificate
    except (OSError, HTTPException, ValueError):
        return False
    return True


def _explain(name: str, origin: str, problem: str, cache: str) -> str:
    return (
        f"the weights of {name} ({origin}) are not in the cache {cache}, and {problem}: load them where there is a "
        "network and bring that folder here, or give a file of them by --initial-checkpoint (--teacher-checkpoint)"
    )
