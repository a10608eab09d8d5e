"""What a worker needs to join a study: noted on the study, with files in its cache or in an artifact store."""

from __future__ import annotations

import dataclasses
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
from nas_kd.arguments.parts import changed
from nas_kd.arguments.sharing import SharingSettings
from nas_kd.arguments.study import Settings, noted_settings, restore_settings
from nas_kd.data.images import Images
from nas_kd.data.originals import open_originals
from nas_kd.errors import ArtifactError, CheckpointError, StudyError
from nas_kd.files.arrays import load_arrays
from nas_kd.files.digests import digest_of
from nas_kd.files.tensors import write_tensors
from nas_kd.library.entries import EntryFile
from nas_kd.library.library import Library, entry_file, made_choices
from nas_kd.preparation.augmenting import fresh_images
from nas_kd.preparation.image_form import in_chans_of
from nas_kd.preparation.job import Job, choices_made, make_base, proxy_recipe_of
from nas_kd.preparation.materials import Materials
from nas_kd.preparation.opening import make_space
from nas_kd.search.artifacts import Store, open_store, pack, unpack
from nas_kd.search.space import Space
from nas_kd.search.storage import CONFIG, storage_errors
from nas_kd.search.trials import Proxy
from nas_kd.training.checkpoint import load_exactly
from nas_kd.training.teacher import Teacher
from nas_kd.training.views import OnlineViews, Views, open_views, weights_digest

BUNDLE = "nas_kd kit"  # the study's user attribute
PRIVATE = {"storage": None, "quiet": False, "debug": False, "device": None}  # nothing of other workers' concern


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
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


def publish_bundle(job: Job, materials: Materials, study: optuna.Study) -> Bundle:
    """Notes on the study what a worker needs, and puts its files into the artifact store if there is one."""
    bundle = _describe(job, materials)
    before = read_bundle(study)
    store = shared_store(job.settings.sharing)
    if store is not None:
        bundle = dataclasses.replace(bundle, artifacts=store.address, files=_upload(bundle, job.cache, store))
    elif before is not None and before.weights == bundle.weights:
        bundle = dataclasses.replace(bundle, artifacts=before.artifacts, files=before.files)
    with storage_errors("note on the study what its workers need"):
        study.set_user_attr(BUNDLE, dataclasses.asdict(bundle))
    return bundle


def shared_store(sharing: SharingSettings) -> Store | None:
    """The artifact store that a study's processes share, where one was asked for."""
    return open_store(sharing.artifacts) if sharing.artifacts else None


def _describe(job: Job, materials: Materials) -> Bundle:
    splits, views, library = materials.sample, materials.proxy_views, job.space.library
    assert splits.folder is not None
    weights = f"weights-{materials.base.digest}.safetensors"
    if not (job.cache / weights).exists():
        write_tensors(job.cache / weights, job.space.base.state_dict())
    return Bundle(
        version=__version__,
        settings={**noted_settings(job.settings), **PRIVATE},
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


def _upload(bundle: Bundle, cache: Path, store: Store) -> dict[str, str]:
    if bundle.library:
        pack(cache / bundle.library)
    return {path: store.put(cache / path) for path in bundle.paths()}


def read_bundle(study: optuna.Study) -> Bundle | None:
    """What a study notes for its workers; None when nothing. Raises StudyError for a study that is not ours, or of
    another version."""
    noted = study.user_attrs.get(BUNDLE)
    if noted is None:
        if study.user_attrs.get(CONFIG) is None and study.get_trials(deepcopy=False):
            raise StudyError(f"the study {study.study_name!r} in this storage was not made by nas_kd")
        return None
    check_version(study.study_name, noted)
    return Bundle(**{**noted, "mean": tuple(noted["mean"]), "std": tuple(noted["std"])})


def check_version(name: str, noted: Mapping[str, Any]) -> None:
    """Raises StudyError where another version of nas_kd noted something for workers."""
    if noted.get("version") != __version__:
        raise StudyError(
            f"the study {name!r} was begun by nas_kd {noted.get('version')}, this is {__version__}: "
            "install that version here, or start over with --new-study"
        )


def settings_of(bundle: Bundle) -> Settings:
    """The settings of the study's command."""
    return restore_settings(bundle.settings)


def locate(bundle: Bundle, out: str | None, artifacts: str | None) -> Path:
    """The folder with a bundle's files, as `locate_files` finds it."""
    cache = cache_here(out, settings_of(bundle).name)
    return locate_files(Path(bundle.folder), list(bundle.paths()), cache, artifacts or bundle.artifacts, bundle.files)


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


def begin_with(noted: Mapping[str, Any], classes: int, cache: Path) -> tuple[Settings, nn.Module]:
    """A study's settings as they hold where its files are in `cache`, and its base, whose weights are still to come."""
    settings = changed(restore_settings(noted), pretrained=False, out=str(cache.parent))
    channels = in_chans_of(settings.network, settings.data)
    return settings, make_base(settings.network, classes, channels, settings.seed)


def equip(
    bundle: Bundle, cache: Path, device: torch.device, begun: Mapping[str, Any]
) -> tuple[Space[nn.Module], Proxy]:
    """The space and the proxy of a study from its bundle and its user attributes, `begun`. Raises ArtifactError for a
    file that is missing or damaged."""
    settings, base = begin_with(bundle.settings, bundle.num_classes, cache)
    _load_weights(base, bundle, cache)
    space = make_space(settings, base.to(device).eval(), begun=begun)
    if bundle.library:
        space = space.with_library(_open_library(space, cache / bundle.library))
    images = images_of(bundle, cache)
    proxy = Proxy(
        views=_proxy_views(bundle, settings, cache, images, base),
        val=images["val"],
        recipe=proxy_recipe_of(settings),
        device=str(device),
        checkpoints=checkpoints(bundle, cache),
    )
    return space, proxy


def checkpoints(bundle: Bundle, cache: Path) -> Path:
    """Where trials of this study keep their state: those of other teachers, images or recipes keep theirs elsewhere."""
    recipe = proxy_recipe_of(settings_of(bundle))
    augment = settings_of(bundle).data.augment.text
    facts = [
        bundle.weights,
        bundle.images,
        bundle.views,
        bundle.library,
        bundle.proxy_images,
        repr(recipe),
        *filter(None, [augment]),
    ]
    return cache / f"trials-{digest_of(json.dumps(facts), 8)}"


def check_space(study: optuna.Study, bundle: Bundle, space: Space[nn.Module]) -> None:
    """Raises StudyError when this machine makes something else of the study's settings than the one that began it."""
    begun, assert_budget = study.user_attrs.get(CONFIG, {}), space.budget
    assert assert_budget is not None
    for key, value in choices_made(settings_of(bundle), assert_budget).items():
        if begun.get(key) != json.loads(json.dumps(value)):
            raise StudyError(
                f"the study {study.study_name!r} was begun with {key} {begun.get(key)!r}, here it is {value!r}: use "
                "the same versions of nas_kd and timm on every machine"
            )


def _load_weights(base: nn.Module, bundle: Bundle, cache: Path) -> None:
    path = cache / bundle.weights
    try:
        load_exactly(base, load_file(path), path)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise damaged(path, str(error).splitlines()[0]) from error
    if weights_digest(base)[:16] != bundle.teacher:
        raise damaged(path, "it holds other weights")


def images_of(bundle: Bundle, cache: Path) -> dict[str, Images]:
    """The images that a worker needs, train and val, from a bundle's files. Raises ArtifactError for damaged ones."""
    folder = cache / bundle.images
    loaded = load_arrays(folder, bundle.parts)
    if loaded is None:
        raise damaged(folder, "it is not there, or does not match its checksums")
    originals = open_originals(loaded[0], len(bundle.mean))
    tensors = {name: torch.from_numpy(array) for name, array in loaded[0].items()}
    images = {"val": Images(tensors["val_pixels"], tensors["val_labels"], bundle.mean, bundle.std)}
    labels = tensors["train_labels"][: bundle.proxy_images]
    pixels = tensors.get("train_pixels", torch.zeros(len(labels), len(bundle.mean), 1, 1, dtype=torch.uint8))
    kept = None if originals is None else originals[: bundle.proxy_images]
    images["train"] = Images(pixels[: bundle.proxy_images], labels, bundle.mean, bundle.std, kept)
    return images


def _proxy_views(
    bundle: Bundle, settings: Settings, cache: Path, images: Mapping[str, Images], base: nn.Module
) -> Views | OnlineViews:
    if bundle.views is None and settings.teacher.model is not None:
        raise ArtifactError(
            f"the views of this study were too large to keep, and its teacher {settings.teacher.model} is no file of "
            "it: give its command fewer --proxy-images"
        )
    if bundle.views is None:
        return OnlineViews(fresh_images(settings.data, images["train"], bundle.num_classes), Teacher(base))
    views = open_views(cache / bundle.views, images["train"].labels, bundle.mean, bundle.std)
    if views is None:
        raise damaged(cache / bundle.views, "it is not there, or does not match its checksums")
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
