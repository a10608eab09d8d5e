"""Files that workers on other machines fetch: kept in an Optuna artifact store under the SHA-256 of what they hold."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound

from nas_kd.errors import ArtifactError, OutputError
from nas_kd.files.atomic import replace_file
from nas_kd.files.digests import sha256_of

_CHUNK = 1 << 22
_PACKED = ".zip"  # what a folder of many small files is kept as


class ArtifactStore(Protocol):
    """What Optuna's artifact stores can do."""

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """The content."""

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Keeps a content."""


@dataclass(frozen=True, slots=True)
class Store:
    """An artifact store and the address that it was opened by."""

    address: str
    inner: ArtifactStore

    def put(self, path: Path) -> str:
        """Keeps a file, and returns the SHA-256 that it is found by. Raises OutputError when the store cannot be
        written."""
        digest = sha256_of(path)
        self.put_as(_name(digest), path)
        return digest

    def put_as(self, name: str, path: Path) -> None:
        """Keeps a file under a name. Raises OutputError when the store cannot be written."""
        with _store_errors(f"cannot write the artifact store {self.address}", OutputError), path.open("rb") as file:
            self.inner.write(name, file)

    def get(self, digest: str, path: Path) -> None:
        """Fetches the file of this SHA-256 to `path`, in one step. Raises ArtifactError when it is missing or was
        altered."""
        where = f"the artifact store {self.address}"
        with _store_errors(f"cannot fetch {path.name} from {where}", ArtifactError):
            with self.inner.open_reader(_name(digest)) as content:
                replace_file(path, lambda draft: _copy_checked(content, draft, digest, f"{path.name} in {where}"))


def open_store(address: str) -> Store:
    """The store of a folder, of `s3://BUCKET` or of `gs://BUCKET`. Raises OutputError when there is none."""
    scheme, _, bucket = address.partition("://")
    kinds: Mapping[str, Callable[[str], ArtifactStore]] = {"s3": _open_s3, "gs": _open_gcs}
    if not bucket:
        folder = Path(address).resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write the artifact store {folder}: {error.strerror or error}") from error
        return Store(str(folder), FileSystemArtifactStore(folder))
    if scheme not in kinds or "/" in bucket.rstrip("/"):
        raise OutputError(f"cannot read the artifact store {address!r}: give FOLDER, s3://BUCKET or gs://BUCKET")
    with _store_errors(f"cannot open the artifact store {address}", OutputError):
        return Store(address, kinds[scheme](bucket.rstrip("/")))


def _open_s3(bucket: str) -> ArtifactStore:
    from optuna.artifacts import Boto3ArtifactStore

    return Boto3ArtifactStore(bucket)


def _open_gcs(bucket: str) -> ArtifactStore:
    from optuna.artifacts import GCSArtifactStore

    return GCSArtifactStore(bucket)


def pack(folder: Path) -> Path:
    """One file with all that is in a folder, beside it; the same bytes for the same content."""
    packed = folder.with_name(folder.name + _PACKED)
    pack_files(sorted(folder.iterdir()), packed)
    return packed


def pack_files(paths: Iterable[Path], packed: Path) -> None:
    """Keeps files by their names alone in one file, `packed`."""

    def write(draft: Path) -> None:
        with zipfile.ZipFile(draft, "w") as archive:  # no compression: weights have nothing to give
            for path in paths:
                archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes())

    replace_file(packed, write)


def unpack(packed: Path, folder: Path | None = None) -> None:
    """Puts what was packed into a folder: the one that it was, beside it, unless another one is given. Raises
    ArtifactError for a file that is none of its own."""
    folder = folder or packed.with_name(packed.name.removesuffix(_PACKED))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(packed) as archive:
            for name in archive.namelist():
                if Path(name).name != name:
                    raise ArtifactError(f"{packed} was altered: it holds a file {name!r}")
                _write(folder / name, archive.read(name))
    except (OSError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"cannot unpack {packed}: {error}") from error


def _write(path: Path, content: bytes) -> None:
    replace_file(path, lambda draft: draft.write_bytes(content))


def _name(digest: str) -> str:
    return f"nas_kd-{digest}"


def _copy_checked(content: BinaryIO, draft: Path, digest: str, what: str) -> None:
    found = hashlib.sha256()
    with draft.open("wb") as file:
        while piece := content.read(_CHUNK):
            found.update(piece)
            file.write(piece)
    if found.hexdigest() != digest:
        raise ArtifactError(f"{what} was altered: its SHA-256 is wrong; run the study's command again, which mends it")


@contextmanager
def _store_errors(what: str, kind: type[ArtifactError] | type[OutputError]) -> Iterator[None]:
    """One line for whatever a store or the client of a cloud raises."""
    try:
        yield
    except (ArtifactError, OutputError):
        raise
    except ArtifactNotFound as error:
        raise kind(f"{what}: it is not there; run the study's command again, which puts it back") from error
    except Exception as error:  # every cloud's client has errors of its own
        if type(error).__module__.startswith("nas_kd"):
            raise
        text: Any = str(error).strip().splitlines() or [type(error).__name__]
        raise kind(f"{what}: {text[0][:200]}") from error
