"""What a result says of itself on the Hugging Face hub: a model card with its figures in the metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData

from nas_kd.budget import COUNTED, ON_DEVICE, Cost, short
from nas_kd.errors import NasKdError, PlanError
from nas_kd.genotype import Genotype
from nas_kd.results.front import read_front_csv
from nas_kd.results.picture import student_picture
from nas_kd.results.rows import ModelRow

PICTURE = "blocks.svg"
_WEIGHTS = ("--pretrained", "--initial-checkpoint")  # by which a command says that it did not begin from scratch


@dataclass(frozen=True, slots=True)
class HubCard:
    """A model card, and the picture that it shows: of the blocks, where the genotype is known."""

    text: str
    picture: str | None


def hub_card(folder: Path, repo: str, license: str | None = None) -> HubCard:
    """The card of an exported folder in a repository of this name, under the license of the base's weights unless
    another is given. Raises PlanError when the folder is no export."""
    config, name = _config(folder), folder.resolve().name
    facts: Mapping[str, Any] = config.get("nas_kd") or {}
    row = _row(name, facts)
    data = _metadata(folder, config, license)
    picture = student_picture(row) if row is not None and row.genotype else None
    parts = (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n",
        f"A smaller `{config['model_args']['base']}`, found and distilled by nas_kd.\n",
        *([f"![How much of each block is left, and what it became]({PICTURE})\n"] if picture else []),
        _usage(repo, config),
        *_table(facts),
        *_front(folder, name),
    )
    return HubCard("\n".join(parts), picture)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["model_args"]["base"], config["pretrained_cfg"]["input_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{folder} is no exported model: name a folder that a study or nas_kd.export wrote") from error
    if not (folder / "model.safetensors").is_file():
        raise PlanError(f"{folder} has no model.safetensors: export the model again")
    return config


def _metadata(folder: Path, config: Mapping[str, Any], license: str | None) -> ModelCardData:
    facts: Mapping[str, Any] = config.get("nas_kd") or {}
    base = timm.models.get_pretrained_cfg(config["model_args"]["base"], allow_unregistered=True)
    scratch = "command" in facts and not any(option in facts["command"] for option in _WEIGHTS)
    weights = None if scratch or base is None else base.hf_hub_id
    accuracy = facts.get("test accuracy")
    dataset = str(facts.get("dataset", "unknown"))
    results = [] if accuracy is None else [_result(dataset, "accuracy", accuracy)]
    results += [_result(dataset, kind, facts[kind]) for kind in (*COUNTED, *ON_DEVICE) if results and kind in facts]
    return ModelCardData(
        model_name=folder.resolve().name,
        library_name="timm",
        pipeline_tag="image-classification",
        license=license or (None if scratch else config["pretrained_cfg"].get("license")),
        base_model=weights,
        tags=["image-classification", "timm", "nas_kd", *(["onnx"] if any(folder.glob("*.onnx")) else [])],
        eval_results=results or None,
    )


def _result(dataset: str, kind: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_split="test",
        metric_type=kind,
        metric_value=value,
    )


def _row(name: str, facts: Mapping[str, Any]) -> ModelRow | None:
    """The model as pictures and tables have it; None where an export brings no figures."""
    try:
        cost = Cost(**{kind: int(facts[kind]) for kind in COUNTED})
        genotype = Genotype.from_json(facts["genotype"]) if "genotype" in facts else None
    except (KeyError, TypeError, ValueError):
        return None
    return ModelRow(
        name=name, role="front", digest="", cost=cost, test_accuracy=facts.get("test accuracy"), genotype=genotype
    )


def _usage(repo: str, config: Mapping[str, Any]) -> str:
    channels, *_ = config["pretrained_cfg"]["input_size"]
    return f"""## Use it

```python
import timm, nas_kd.models  # pip install nas-kd

model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

Without nas_kd, with torch and timm alone:

```python
import sys
from huggingface_hub import snapshot_download

sys.path.insert(0, snapshot_download("{repo}"))
from model import create_model

model = create_model(pretrained=True).eval()
```

Files were opened upright (EXIF) and as {"grey" if channels == 1 else "RGB"} of eight bits.
"""


def _table(facts: Mapping[str, Any]) -> Iterator[str]:
    if facts:
        yield "## Figures\n\n| | |\n|---|---|"
    for key, value in facts.items():
        if key not in ("genotype", "digest", "role"):
            shown = (
                short(value)
                if key in (*COUNTED, *ON_DEVICE)
                else value
                if isinstance(value, str)
                else json.dumps(value)
            )
            yield f"| {key} | {shown} |"
    yield ""


def _front(folder: Path, name: str) -> Iterator[str]:
    """The models that were found with it, from the study's table beside the folder."""
    try:
        rows = read_front_csv(folder.resolve().parent / "front.csv")
    except NasKdError:
        return
    yield "## Found with it\n\n| model | role | accuracy | params | MACs | ms |\n|---|---|---|---|---|---|"
    for row in rows:
        shown = f"**{row.name}**" if row.name == name else row.name
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.1%}"
        time = "" if row.latency_ms is None else f"{row.latency_ms:.3g}"
        yield f"| {shown} | {row.role} | {accuracy} | {short(row.cost.params)} | {short(row.cost.macs)} | {time} |"
