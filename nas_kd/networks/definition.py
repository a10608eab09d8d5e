"""A network as one Python file that needs torch and timm alone: what it is made of, to be read, kept and changed.

The file lists the layers that differ from the base, and brings the code of those that neither torch nor timm has: it is
copied from this package, so that the two do the same.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from pprint import pformat
from typing import Any

from timm.models import model_entrypoint
from torch import nn

from nas_kd.genotype import group_count
from nas_kd.networks import cifar, convolutions, folding
from nas_kd.networks.hub import base_of
from nas_kd.networks.plan import Plan, plan_of, resize

_WIDTH = 116
_FIELDS = [(field.name, field.type) for field in fields(convolutions.ConvSpec)]
_DEFAULTS = {field.name: field.default for field in fields(convolutions.ConvSpec) if field.default is not MISSING}
_DOCSTRING = '''"""{title}: {base} as a search left it, in one file that needs torch and timm alone. Written by nas_kd.

    from model import create_model

    model = create_model(pretrained=True)  # the weights are in model.safetensors, beside this file

`create_model(num_classes=7)` has other classes and fresh weights, `reset_classifier(7)` keeps the weights. LAYERS has,
by module, all that differs from the base: another convolution, nothing, or other sizes of it and of its tensors
(dimension: length).
"""
'''
_IMPORTS = (  # module and names, as they are written; those that the file uses are
    ("copy", ()),
    ("math", ()),
    ("re", ()),
    ("collections", ("OrderedDict",)),
    ("collections.abc", ("Sequence",)),
    ("pathlib", ("Path",)),
    ("typing", ("Any", "NamedTuple", "cast")),
    ("timm", ()),
    ("torch", ()),
    ("torch.nn.functional as F", ()),
    ("safetensors.torch", ("load_file",)),
    ("timm.layers", ("Conv2dSame", "create_classifier")),
    ("timm.models", ("checkpoint_seq",)),
    ("timm.models._features", ("feature_take_indices",)),
    ("torch", ("Tensor", "nn")),
)
_NETWORK = '''BASE = {base!r}
BASE_ARGS: dict[str, Any] = {arguments}
IMAGES: dict[str, Any] = {images}
FEATURES = {features}  # channels of the levels of timm's feature_info, where they are not the base's
LAYERS: dict[str, dict[str, Any]] = {layers}


def create_model(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The network with fresh weights or, if `pretrained`, with those beside this file; `kwargs` are the base's."""
    arguments = {{**BASE_ARGS, **kwargs}}
    headless = arguments.get("num_classes") == 0  # LAYERS may resize the classifier, so that goes last
    if headless:
        arguments["num_classes"] = 1
    model: Any = {create}
    for path, edit in LAYERS.items():
        _apply_edit(model, path, edit)
    info = getattr(model, "feature_info", None)
    for level, channels in zip(getattr(info, "info", info) or (), FEATURES):
        level["num_chs"] = channels
{fold}    if headless:
        model.reset_classifier(0)
    if pretrained:
        model.load_state_dict(load_file(Path(__file__).with_name("model.safetensors")))
    return model


def _apply_edit(model: nn.Module, path: str, edit: dict[str, Any]) -> None:
    """Replaces, drops or resizes one module."""
    module = model.get_submodule(path)
    if "conv" in edit or "drop" in edit:
        module = {replacement}
        model.set_submodule(path, module)
    for name, size in edit.get("sizes", {{}}).items():
        if not isinstance(getattr(type(module), name, None), property):
            setattr(module, name, tuple(size) if isinstance(size, list) else size)
    for name, dims in edit.get("shapes", {{}}).items():
        old = getattr(module, name)
        new = resize(old.detach(), tuple(dims.items()))
        setattr(module, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
'''
_CREATE, _CREATE_OURS = "timm.create_model(BASE, **arguments)", "{}(**{{**{!r}, **arguments}})"
_REPLACE = 'build_conv(ConvSpec(**edit["conv"])) if "conv" in edit else nn.Identity()'
# no dataclass: those look their module up in sys.modules, where a file that importlib executes need not be
_SPEC = '''class ConvSpec(NamedTuple):
    """One convolution that takes the place of another."""

{fields}
'''
_GROUP = '_GROUP = re.compile(r"group([1-9]\\d*)")'


def definition(network: nn.Module, title: str, images: Mapping[str, Any]) -> str:
    """The source of `model.py` for a base or student of timm; it tells `images` (their size, mean and std).

    A base that is neither timm's nor ours is imported from the module that registers it. Raises ModelError for a
    network that timm did not create.
    """
    base, arguments = base_of(network)
    plan = plan_of(network)
    home = model_entrypoint(base).__module__
    form = cifar.FORMS[base] if home == cifar.__name__ else None
    replaces = form is not None or any(edit.conv is not None for edit in plan.edits.values())
    code = _NETWORK.format(
        base=base,
        arguments=_literal(arguments),
        images=_literal(dict(images)),
        features=plan.features,
        layers=_layers(plan),
        create=_CREATE_OURS.format(form[0].__name__, form[1]) if form else _CREATE,
        fold="    fold(model)  # into the inference form\n" if plan.fused else "",
        replacement=_REPLACE if replaces else "nn.Identity()",
    )
    parts = [code, *_sources([resize, *((folding.fold, folding.folded, folding.count_groups) if plan.fused else ())])]
    parts += [*(_conv_parts() if replaces else ()), *(_network_parts(form[0]) if form else ())]
    text = "\n\n".join(parts)
    registers = "" if form else _registering(home)
    docstring = _DOCSTRING.format(title=re.sub(r'[\\"]', "", title), base=base)
    return f"{docstring}\nfrom __future__ import annotations\n\n{''.join(_imports(text))}{registers}\n{text}"


def _registering(home: str) -> str:
    """What makes timm know a base that `home` registers."""
    if home.partition(".")[0] == "timm":
        return ""
    return (
        "# bring the code that registers the base here\n"
        if home == "__main__"
        else f"import {home}  # registers the base\n"
    )


def _literal(value: Any) -> str:
    return pformat(value, width=_WIDTH, sort_dicts=False)


def _layers(plan: Plan) -> str:
    """One line per module: they are read side by side."""
    lines = [f"    {path!r}: {_edit(edit)!r},\n" for path, edit in plan.to_json()["edits"].items()]
    return "{\n" + "".join(lines) + "}" if lines else "{}"


def _edit(edit: dict[str, Any]) -> dict[str, Any]:
    """An edit as it is best read: dimensions are numbers, and what is as usual is left out."""
    read = dict(edit)
    if "shapes" in edit:
        read["shapes"] = {name: {int(dim): n for dim, n in dims.items()} for name, dims in edit["shapes"].items()}
    if "conv" in edit:
        read["conv"] = {
            name: value for name, value in edit["conv"].items() if name not in _DEFAULTS or value != _DEFAULTS[name]
        }
    return read


def _imports(text: str) -> Iterator[str]:
    """The import statements that `text` needs, those of the standard library first."""
    for module, names in _IMPORTS:
        if module == "timm":
            yield "\n"
        used = [name for name in names or (module.split()[-1],) if re.search(rf"(?<![\w.]){name}\b", text)]
        if used:
            yield f"from {module} import {', '.join(used)}\n" if names else f"import {module}\n"


def _network_parts(kind: type[nn.Module]) -> list[str]:
    """The code of one of our own bases."""
    constants = "\n".join(f"{name} = {value!r}" for name, value in cifar.CONSTANTS.items())
    return [constants, *_sources([*cifar.PARTS, kind])]


def _conv_parts() -> list[str]:
    lines = [f"    {name}: {kind}{f' = {_DEFAULTS[name]!r}' if name in _DEFAULTS else ''}" for name, kind in _FIELDS]
    return [_SPEC.format(fields="\n".join(lines)), _GROUP, *_sources([group_count, *convolutions.PARTS])]


def _sources(things: Iterable[Callable[..., Any] | type]) -> list[str]:
    return [inspect.getsource(thing) for thing in things]
