"""What a worker needs to join a study: noted on the study, with files in its cache or in an artifact store."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from nas_kd import __version__
from nas_kd.arguments.augment import AugmentOptions
from nas_kd.arguments.study import Settings, restore_settings
from nas_kd.data.arrays import load
from nas_kd.data.images import Images
from nas_kd.data.originals import open_originals
from nas_kd.errors import ArtifactError, CheckpointError, StudyError
from nas_kd.library.entries import EntryFile
from nas_kd.library.library import Library, entry_file, made_choices
from nas_kd.preparation.augmenting import fresh_images
from nas_kd.preparation.job import Job, choices_made, in_chans_of, make_base, proxy_recipe_of
from nas_kd.preparation.materials import Materials
from nas_kd.preparation.opening import make_space
from nas_kd.search.artifacts import Store, open_store, pack, unpack
from nas_kd.search.space import Space
from nas_kd.search.storage import CONFIG, storage_errors
from nas_kd.search.trials import Proxy
from nas_kd.training.checkpoint import load_exactly
from nas_kd.training.teacher import Teacher
from nas_kd.training.tensor_files import write_tensors
from nas_kd.training.views import OnlineViews, Views, open_views, weights_digest

KIT = "nas_kd kit"  # the study's user attribute
PRIVATE = {"storage": None, "quiet": False, "debug": False, "device": None}  # nothing of other workers' concern


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """What a worker needs. Paths are relative to the study's cache, which is `folder` on the machine that began it.

    `files` maps what is in the artifact store `artifacts` to its SHA-256. `images` are those of all splits, of which
    trials train on the first `proxy_images`; without `views` the teacher itself is asked in every step.
    """

    version: str
    settings: Mapping[str, Any]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    proxy_images: int
    teacher: str
    weights: str
    images: str
    views: str | None
    library: str | None
    folder: str
    artifacts: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    originals: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The arrays of images that a worker reads: those to train on only where there are no views of them."""
        originals = ("originals_pixels", "originals_sizes") if self.originals else ()
        return "train_labels", "val_pixels", "val_labels", *(() if self.views else ("train_pixels", *originals))

    def paths(self) -> Iterator[str]:
        """Every file that a worker reads; a library as one packed file."""
        yield self.weights
        yield from (f"{self.images}/{name}" for name in ("meta.json", *(f"{part}.npy" for part in self.parts)))
        if self.views:
            yield from view_files(AugmentOptions.restore(self.settings.get("augment")), self.views)
        if self.library:
            yield f"{self.library}.zip"


def view_files(augment: AugmentOptions, folder: str) -> Iterator[str]:
    """The files of views that were augmented so."""
    more = ("shares.npy",) * augment.softens + ("plain.npy",) * augment.mixes
    return (f"{folder}/{name}" for name in ("meta.json", "pixels.npy", "logits.npy", *more))


def publish(job: Job, materials: Materials, study: optuna.Study) -> Kit:
    """Notes on the study what a worker needs, and puts its files into the artifact store if there is one."""
    kit = _describe(job, materials)
    before = read_kit(study)
    store = open_store(job.settings.artifacts) if job.settings.artifacts else None
    if store is not None:
        kit = dataclasses.replace(kit, artifacts=store.address, files=_upload(kit, job.cache, store))
    elif before is not None and before.weights == kit.weights:
        kit = dataclasses.replace(kit, artifacts=before.artifacts, files=before.files)
    with storage_errors("note on the study what its workers need"):
        study.set_user_attr(KIT, dataclasses.asdict(kit))
    return kit


def _describe(job: Job, materials: Materials) -> Kit:
    splits, views, library = materials.sample, materials.proxy_views, job.space.library
    assert splits.folder is not None
    weights = f"weights-{materials.base.digest}.safetensors"
    if not (job.cache / weights).exists():
        write_tensors(job.cache / weights, job.space.base.state_dict())
    return Kit(
        version=__version__,
        settings={**dataclasses.asdict(job.settings), **PRIVATE},
        num_classes=splits.num_classes,
        mean=splits.mean,
        std=splits.std,
        proxy_images=len(views),
        teacher=materials.base.digest,
        weights=weights,
        images=splits.folder.name,
        views=views.folder.name if isinstance(views, Views) and views.folder else None,
        library=None if library is None else library.folder.name,
        folder=str(job.cache.resolve()),
        originals=splits.originals is not None,
    )


def _upload(kit: Kit, cache: Path, store: Store) -> dict[str, str]:
    if kit.library:
        pack(cache / kit.library)
    return {path: store.put(cache / path) for path in kit.paths()}


def read_kit(study: optuna.Study) -> Kit | None:
    """What a study notes for its workers; None when nothing. Raises StudyError for a study that is not ours, or of
    another version."""
    noted = study.user_attrs.get(KIT)
    if noted is None:
        if study.user_attrs.get(CONFIG) is None and study.get_trials(deepcopy=False):
            raise StudyError(f"the study {study.study_name!r} in this storage was not made by nas_kd")
        return None
    check_version(study.study_name, noted)
    return Kit(**{**noted, "mean": tuple(noted["mean"]), "std": tuple(noted["std"])})


def check_version(name: str, noted: Mapping[str, Any]) -> None:
    """Raises StudyError where another version of nas_kd noted something for workers."""
    if noted.get("version") != __version__:
        raise StudyError(
            f"the study {name!r} was begun by nas_kd {noted.get('version')}, this is {__version__}: "
            "install that version here, or start over with --new-study"
        )


def settings_of(kit: Kit) -> Settings:
    """The settings of the study's command."""
    return restore_settings(kit.settings)


def locate(kit: Kit, out: str | None, artifacts: str | None) -> Path:
    """The folder with a kit's files, as `locate_files` finds it."""
    cache = cache_here(out, settings_of(kit).name)
    return locate_files(Path(kit.folder), list(kit.paths()), cache, artifacts or kit.artifacts, kit.files)


def cache_here(out: str | None, name: str) -> Path:
    """Where a worker keeps what it fetches for a study."""
    return Path(out or Path("results") / name) / "cache"


def locate_files(own: Path, paths: Sequence[str], cache: Path, address: str | None, files: Mapping[str, str]) -> Path:
    """The folder with these files of a study: its `own` where the first can be read, else `cache`, into which those of
    the artifact store at `address` are fetched by their SHA-256, `files`.

    Raises ArtifactError when they are nowhere to be had, or a file is missing or was altered.
    """
    if (own / paths[0]).exists():
        return own
    missing = [path for path in paths if not (cache / path).exists()]
    if missing and (address is None or not files):
        raise ArtifactError(
            f"the files of the study are not here (there is no {own / paths[0]}): run its command with --artifacts "
            "STORE, or put its --out into a folder that this machine shares"
        )
    fetch({path: files[path] for path in missing if path in files}, address, cache)
    return cache


def fetch(files: Mapping[str, str], address: str | None, cache: Path) -> None:
    """Fetches files that a cache lacks, by their SHA-256. Raises ArtifactError when they are not to be had."""
    for path, digest in files.items():
        if not (cache / path).exists():
            open_store(address or "").get(digest, cache / path)
            if path.endswith(".zip"):
                unpack(cache / path)


def equip(kit: Kit, cache: Path, device: torch.device, begun: Mapping[str, Any]) -> tuple[Space[nn.Module], Proxy]:
    """The space and the proxy of a study from its kit and its user attributes, `begun`. Raises ArtifactError for a file
    that is missing or damaged."""
    settings = settings_of(kit)
    base = make_base(dataclasses.replace(settings, pretrained=False), kit.num_classes, in_chans_of(settings))
    _load_weights(base, kit, cache)
    settings_here = dataclasses.replace(settings, out=str(cache.parent))
    space = make_space(settings_here, base.to(device).eval(), begun=begun)
    if kit.library:
        space.library = _open_library(space, cache / kit.library)
    images = images_of(kit, cache)
    proxy = Proxy(
        views=_proxy_views(kit, settings, cache, images, base),
        val=images["val"],
        recipe=proxy_recipe_of(settings),
        device=str(device),
        checkpoints=checkpoints(kit, cache),
    )
    return space, proxy


def checkpoints(kit: Kit, cache: Path) -> Path:
    """Where trials of this study keep their state: those of other teachers, images or recipes keep theirs elsewhere."""
    recipe = proxy_recipe_of(settings_of(kit))
    augment = settings_of(kit).augment.text
    facts = [kit.weights, kit.images, kit.views, kit.library, kit.proxy_images, repr(recipe), *filter(None, [augment])]
    return cache / f"trials-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]}"


def check_space(study: optuna.Study, kit: Kit, space: Space[nn.Module]) -> None:
    """Raises StudyError when this machine makes something else of the study's settings than the one that began it."""
    begun, assert_budget = study.user_attrs.get(CONFIG, {}), space.budget
    assert assert_budget is not None
    for key, value in choices_made(settings_of(kit), assert_budget).items():
        if begun.get(key) != json.loads(json.dumps(value)):
            raise StudyError(
                f"the study {study.study_name!r} was begun with {key} {begun.get(key)!r}, here it is {value!r}: use "
                "the same versions of nas_kd and timm on every machine"
            )


def _load_weights(base: nn.Module, kit: Kit, cache: Path) -> None:
    path = cache / kit.weights
    try:
        load_exactly(base, load_file(path), path)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise damaged(path, str(error).splitlines()[0]) from error
    if weights_digest(base)[:16] != kit.teacher:
        raise damaged(path, "it holds other weights")


def images_of(kit: Kit, cache: Path) -> dict[str, Images]:
    """The images that a worker needs, train and val, from a kit's files. Raises ArtifactError for damaged ones."""
    folder = cache / kit.images
    loaded = load(folder, kit.parts)
    if loaded is None:
        raise damaged(folder, "it is not there, or does not match its checksums")
    originals = open_originals(loaded[0], len(kit.mean))
    tensors = {name: torch.from_numpy(array) for name, array in loaded[0].items()}
    images = {"val": Images(tensors["val_pixels"], tensors["val_labels"], kit.mean, kit.std)}
    labels = tensors["train_labels"][: kit.proxy_images]
    pixels = tensors.get("train_pixels", torch.zeros(len(labels), len(kit.mean), 1, 1, dtype=torch.uint8))
    kept = None if originals is None else originals[: kit.proxy_images]
    images["train"] = Images(pixels[: kit.proxy_images], labels, kit.mean, kit.std, kept)
    return images


def _proxy_views(
    kit: Kit, settings: Settings, cache: Path, images: Mapping[str, Images], base: nn.Module
) -> Views | OnlineViews:
    if kit.views is None and settings.teacher is not None:
        raise ArtifactError(
            f"the views of this study were too large to keep, and its teacher {settings.teacher} is no file of it: "
            "give its command fewer --proxy-images"
        )
    if kit.views is None:
        return OnlineViews(fresh_images(settings, images["train"], kit.num_classes), Teacher(base))
    views = open_views(cache / kit.views, images["train"].labels, kit.mean, kit.std)
    if views is None:
        raise damaged(cache / kit.views, "it is not there, or does not match its checksums")
    return views


def _open_library(space: Space[nn.Module], folder: Path) -> Library:
    """The library as it was built: a worker trains no entry of its own."""
    importance = EntryFile(folder / "importance.safetensors").read()
    if importance is None:
        raise damaged(folder, "its importance is missing")
    entries = {}
    for block in space.blocks:
        for index in made_choices(block):
            kept = entry_file(folder, block, index).read()
            if kept is None:
                raise damaged(folder, f"the entry {index} of {block.name} is missing")
            entries[block.name, index] = kept[0]
    return Library(space.base, space.analysis, folder, importance[1]["order"].numpy(), entries)


def damaged(path: Path, why: str) -> ArtifactError:
    """What a worker says of a file that is not as it should be."""
    return ArtifactError(f"{path} is missing or was altered ({why}): run the study's command again, which mends it")
