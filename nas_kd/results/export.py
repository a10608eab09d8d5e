"""A student as a folder that timm loads."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.models._hub import save_config_for_hf
from torch import nn

from nas_kd.errors import NasKdError, OutputError, PlanError
from nas_kd.files.tensors import save_weights
from nas_kd.networks.convolutions import Shift2d
from nas_kd.networks.definition import definition
from nas_kd.networks.hub import ENTRY_POINT, student_args
from nas_kd.networks.onnx import write_model
from nas_kd.networks.plain import plain
from nas_kd.networks.rebuilt import check_rebuilds

ONNX = "model.onnx"
DEFINITION = "model.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What an exported folder says of itself beside the weights. What is left out is the base's.

    Attributes:
        input_size: Images that accuracies were measured on: C, H, W.
        mean: By which they were normalised, per channel, on the scale 0-1.
        std: As `mean`.
        crop_pct: The share of a resized image that was kept, in timm's words.
        interpolation: By which it was resized, in timm's words.
        crop_mode: How it was cropped, in timm's words.
        label_names: The classes, in the order of the logits.
        facts: What the README and `config.json` tell beside that, by name.
        title: The README's.
        summary: A sentence below it.

    Example:
        >>> from nas_kd import Card
        >>> Card(input_size=(3, 160, 160), label_names=("cat", "dog"), facts={"test accuracy": 0.93}).label_names
        ('cat', 'dog')
    """

    input_size: tuple[int, ...] | None = None  # C, H, W
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    crop_mode: str | None = None
    label_names: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)  # JSON values
    title: str = ""
    summary: str = ""  # the first sentence of the README


def export(
    network: nn.Module,
    folder: str | os.PathLike[str],
    card: Card = Card(),
    *,
    onnx: bool = False,
    beside: Sequence[Path] = (),
) -> Path:
    """Writes a student, or a base, as `config.json`, `model.safetensors`, `model.py` and a model card.

    `import timm, nas_kd.models; timm.create_model("local-dir:FOLDER", pretrained=True)` loads it with the same outputs;
    `num_classes`, `in_chans`, `features_only` work as for any timm model. `model.py` builds the same network with torch
    and timm alone. The folder appears whole or not at all; an earlier export in it is replaced.

    Args:
        network: Of `space.student`, or of timm.
        folder: Where.
        card: What it says of itself.
        onnx: Whether there is a `model.onnx` too, for any number of images, compared with the network where ONNX
            Runtime is installed.
        beside: Files that are copied into it.

    Returns:
        The folder.

    Raises:
        ModelError: For a network that timm did not create, that was changed by hand since, or that cannot be written as
            ONNX.
        OutputError: When the folder cannot be written, or holds something else.

    Example:
        >>> import tempfile, timm
        >>> from pathlib import Path
        >>> from nas_kd import export, load
        >>> folder = export(timm.create_model("test_resnet", num_classes=10), Path(tempfile.mkdtemp(), "small"))
        >>> load(folder).num_classes, sorted(path.name for path in folder.iterdir())
        (10, ['README.md', 'config.json', 'model.py', 'model.safetensors'])
    """
    target, network = Path(folder).expanduser(), plain(network)
    args = student_args(network)
    check_rebuilds(network, args)
    _check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as draft:
            whole = Path(draft, "export")
            size = _write(network, whole, args, card)
            for file in beside:
                shutil.copyfile(file, whole / file.name)
            if onnx and not (whole / ONNX).exists():
                _write_onnx(network, size, whole, earlier=target)
            _put(whole, target, aside=Path(draft, "earlier"))
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}; choose another folder") from error
    return target


def _put(whole: Path, target: Path, aside: Path) -> None:
    """Moves an export to its place; an earlier one goes `aside` first, and back where that is interrupted."""
    try:
        if target.exists():
            os.replace(target, aside)
        os.replace(whole, target)
    finally:
        if aside.exists() and not target.exists():
            os.replace(aside, target)


def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise OutputError(f"cannot write {target}: a file is in the way; choose another folder")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").exists():
        raise OutputError(f"cannot write {target}: it holds other files; choose another folder")


def _write_onnx(network: nn.Module, size: tuple[int, ...], folder: Path, earlier: Path) -> None:
    """Beside the weights; that of an earlier export of the same weights is kept."""
    path = folder / ONNX
    if (earlier / ONNX).is_file() and _same(folder, earlier):
        shutil.copyfile(earlier / ONNX, path)
        return
    write_model(network, size, path)


def _same(folder: Path, earlier: Path) -> bool:
    """Whether two exports have the same weights and architecture."""

    def facts(place: Path) -> tuple[Any, bytes]:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key != "nas_kd"}
        return kept, hashlib.sha256((place / "model.safetensors").read_bytes()).digest()

    try:
        return facts(folder) == facts(earlier)
    except (OSError, ValueError):
        return False


def _write(network: nn.Module, folder: Path, args: dict[str, Any], card: Card) -> tuple[int, ...]:
    """Everything but the ONNX file; returns the input size."""
    config: Any = network.pretrained_cfg
    saved: Any = copy.copy(network)  # shallow: shares the weights, so that nothing is set on the caller's network
    saved.__dict__ = dict(network.__dict__)
    saved._model_args = {}
    saved.num_classes = args["base_args"].get("num_classes", network.num_classes)  # of a classifier put in by hand
    channels, *sides = config["input_size"]
    size = card.input_size or (args["base_args"].get("in_chans", channels), *sides)
    saved.pretrained_cfg = {**config, "architecture": ENTRY_POINT, "input_size": size}
    given = {name: getattr(card, name) for name in ("mean", "std", "crop_pct", "interpolation", "crop_mode")}
    images = {name: value for name, value in given.items() if value is not None} | {"input_size": tuple(size)}
    extra: dict[str, Any] = {"pretrained_cfg": {"architecture": ENTRY_POINT}, "nas_kd": dict(card.facts)}
    if card.label_names:
        extra["label_names"] = list(card.label_names)
    folder.mkdir(parents=True)
    save_weights(folder / "model.safetensors", network.state_dict())
    save_config_for_hf(saved, folder / "config.json", model_config=extra, model_args=args, data_config=images)
    (folder / DEFINITION).write_text(definition(network, card.title or args["base"], images), encoding="utf-8")
    (folder / "README.md").write_text(_model_card(args, card, size) + _of_shifts(network), encoding="utf-8")
    return tuple(size)


def _model_card(args: Mapping[str, Any], card: Card, size: tuple[int, ...]) -> str:
    facts = "\n".join(f"| {name} | {_shown(value)} |" for name, value in card.facts.items())
    return f"""# {card.title or args["base"]}

{card.summary or f"A smaller `{args['base']}`, found by nas_kd."}

```python
import timm, nas_kd.models
model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True)
```

Without nas_kd: `model.py` in this folder builds the same network with torch and timm alone.

Images: `timm.data.create_transform(**timm.data.resolve_model_data_config(model))` does what was done when the accuracy
was measured. Before it files are opened upright (EXIF), what is transparent white, more than eight bits
scaled to eight: `nas_kd.open_picture(FILE).convert("{"L" if size[0] == 1 else "RGB"}")`; of usual files that is what
Pillow's `Image.open` gives.

| | |
|---|---|
| base | `{args["base"]}` |
| input | {"×".join(map(str, size))} |
{facts}
"""


def _of_shifts(network: nn.Module) -> str:
    """What the costs in a card leave out."""
    shifts = [module for module in network.modules() if isinstance(module, Shift2d)]
    weights = sum(module.kernel_size**2 * len(module.taps) for module in shifts)
    return (
        f"""
Shifts count neither as parameters nor as MACs. They run as depthwise convolutions whose kernels are one at one place
and zero elsewhere: {weights:,} fixed weights, which an ONNX file holds as constants.
"""
        if shifts
        else ""
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def load(folder: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """What `timm.create_model("local-dir:FOLDER", pretrained=True)` gives, with errors that a person understands.

    Args:
        folder: An export.
        kwargs: Those of `timm.create_model`.

    Returns:
        The network, with its weights.

    Raises:
        PlanError: When the folder is no export, or is damaged.

    Example:
        >>> import tempfile, timm
        >>> from pathlib import Path
        >>> from nas_kd import export, load
        >>> folder = export(timm.create_model("test_resnet", num_classes=10), Path(tempfile.mkdtemp(), "small"))
        >>> load(folder, num_classes=3).num_classes
        3
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise PlanError(f"{path} is no exported model: it has no config.json")
    try:
        model: nn.Module = timm.create_model(f"local-dir:{path}", pretrained=True, **kwargs)
    except NasKdError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, OSError, SafetensorError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise PlanError(f"{path} is damaged: {text[0][:200]}; export the model again") from error
    return model
