"""An exported folder sent to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    validate_repo_id,
)

from nas_kd.errors import ArtifactError
from nas_kd.networks.weights import problem_with
from nas_kd.results.hub_card import PICTURE, HubCard

_NETWORK = ("httpx", "httpx2", "httpcore", "requests", "urllib3")  # whose errors say that no answer came
_REASONS = {401: "the token is not valid, log in again with `hf auth login`", 403: "the token may not write there"}


def publish(folder: Path, repo: str, card: HubCard, *, private: bool = False, message: str = "") -> str:
    """Sends an exported folder with this card to a repository of the hub, which is made where it is not there, in one
    commit, and returns its address. Raises ArtifactError, in one line, for a bad name, without a login or a connection,
    and where the hub refuses."""
    check_repository(repo)
    if get_token() is None:
        raise ArtifactError(
            "the hub does not know you: log in by `hf auth login`, or set HF_TOKEN to a token that may write"
        )
    if problem := problem_with(constants.ENDPOINT):
        raise ArtifactError(f"cannot send {repo}: {problem}; push again when it can be")
    try:
        return _send(HfApi(library_name="nas_kd"), _operations(folder, card), repo, private, message)
    except HfHubHTTPError as error:
        raise ArtifactError(f"the hub refused {repo}: {_reason(error)}") from error
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _NETWORK:
            raise
        raise ArtifactError(f"lost the hub while {repo} was sent ({_first_line(error)}): push again") from error


def check_repository(repo: str) -> None:
    """Raises ArtifactError for what the hub takes for no repository."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ArtifactError(
            f"{repo!r} names no repository: write OWNER/NAME, of letters, digits, -, _ and ."
        ) from error


def _operations(folder: Path, card: HubCard) -> list[CommitOperationAdd]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name not in ("README.md", PICTURE))
    operations = [CommitOperationAdd(file.name, str(file)) for file in files]
    operations.append(CommitOperationAdd("README.md", card.text.encode()))
    if card.picture is not None:
        operations.append(CommitOperationAdd(PICTURE, card.picture.encode()))
    return operations


def _send(api: HfApi, operations: list[CommitOperationAdd], repo: str, private: bool, message: str) -> str:
    made = api.create_repo(repo, private=private, exist_ok=True)
    api.create_commit(made.repo_id, operations, commit_message=message or "A model found by nas_kd")
    return str(made)


def _reason(error: HfHubHTTPError) -> str:
    status = getattr(error.response, "status_code", 0)
    return _REASONS.get(status) or getattr(error, "server_message", None) or _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
