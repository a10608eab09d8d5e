"""The arguments of `python -m nas_kd.study`."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nas_kd import __version__
from nas_kd.arguments.augment import AugmentOptions, add_augmentation, augment_options
from nas_kd.arguments.choices import ChoicesSettings
from nas_kd.arguments.data import DataSettings, add_data, add_reading
from nas_kd.arguments.latency import LatencySettings
from nas_kd.arguments.network import NetworkSettings, add_base
from nas_kd.arguments.output import OutputSettings, add_onnx, add_report
from nas_kd.arguments.parsing import Parser, command_line
from nas_kd.arguments.parts import defaults, part, read, written
from nas_kd.arguments.search import SearchSettings, add_search, pruner_of
from nas_kd.arguments.sharing import SharingSettings, add_storage, add_workers, storage_of_environment
from nas_kd.arguments.teacher import TeacherSettings, add_teacher, add_teacher_epochs, check_teacher
from nas_kd.arguments.training import (
    ProxySettings,
    RefinementSettings,
    TrainingSettings,
    add_baselines,
    add_proxies,
    add_recipe,
    add_refinement,
)
from nas_kd.budget import parse_budget, parse_levels
from nas_kd.data.dataset_names import choose_dataset
from nas_kd.errors import NasKdError, without_password
from nas_kd.spelling import plain_budget

# of an effort at most, or as the study began, where nothing was said
OPEN = ("proxy_epochs", "proxy_images", "front", "space", "search_stages", "base_bounds")
_ONCE = {"base_bounds": False}  # what a study did before there was an argument for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The arguments of `python -m nas_kd.study`, checked as far as that is possible without torch. Of `OPEN` those that
    are `left_open` are as the study began, or chosen in `preparation`."""

    network: NetworkSettings = part(NetworkSettings)
    data: DataSettings = part(DataSettings)
    teacher: TeacherSettings = part(TeacherSettings)
    search: SearchSettings = part(SearchSettings)
    choices: ChoicesSettings = part(ChoicesSettings)
    latency: LatencySettings = part(LatencySettings)
    training: TrainingSettings = part(TrainingSettings)
    proxy: ProxySettings = part(ProxySettings)
    refinement: RefinementSettings = part(RefinementSettings)
    output: OutputSettings = part(OutputSettings)
    sharing: SharingSettings = part(SharingSettings)
    left_open: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The study's name: as given, or model, dataset and budget."""
        budget = self.search.budget.replace("=", "")
        text = self.output.study_name or f"{self.network.model}-{self.data.dataset}-{budget}"
        return re.sub(r"[^\w.%+-]+", "-", text).strip("-.")

    @property
    def seed(self) -> int:
        """Decides everything that is random."""
        return self.data.seed


_USUAL = defaults(Settings)
_UNSAID = {**_USUAL, **dict.fromkeys((*OPEN, "pruner"))}  # arguments before they are read


def noted_settings(settings: Settings) -> dict[str, Any]:
    """Settings as JSON has them, by the names of their arguments."""
    return {**written(settings), "augment": dataclasses.asdict(settings.data.augment)}


def restore_settings(kept: Mapping[str, Any]) -> Settings:
    """Settings that were written as JSON, by this version or an earlier one."""
    tuples = {name: tuple(kept.get(name, ())) for name in ("pin", "left_open", "start_from")}
    return read(Settings, {**_ONCE, **kept, **tuples, "augment": AugmentOptions.restore(kept.get("augment"))})


def study_parser(prog: str = "python -m nas_kd.study") -> argparse.ArgumentParser:
    """The parser of the main command."""
    parser = Parser(
        prog=prog,
        description="Any timm CNN in, a family of smaller timm CNNs out, each within a hard budget.",
        epilog=f"example: {prog} --budget params=1M     (no data, network or GPU needed)",
    )
    parser.add_argument("--version", action="version", version=f"nas_kd {__version__}")
    add_base(parser)
    add_teacher(parser)
    add_data(parser)
    add_augmentation(parser)
    add_search(parser)
    add = parser.add_argument_group("training").add_argument
    add_proxies(add)
    add_refinement(add)
    add_teacher_epochs(add)
    add_recipe(add)
    add_reading(add)
    add = parser.add_argument_group("output").add_argument
    add_report(add)
    add_baselines(add)
    add_onnx(add)
    add("--int8", action="store_true", help="write the front's models and the teacher as int8 too, and measure them")
    add("--new-study", action="store_true", help="begin anew under this name; the study that had it is kept")
    add_storage(add)
    add_workers(parser)
    parser.take_defaults(_UNSAID)
    return parser


def parse_study(argv: Sequence[str]) -> Settings:
    """Reads the arguments of the main command. Raises NasKdError for bad ones."""
    arguments = vars(study_parser().parse_args(argv))
    # starting over is done once: the same command again resumes
    again = (without_password(argument) for argument in argv if argument != "--new-study")
    arguments["command"] = command_line("python -m nas_kd.study", list(again))
    arguments["storage"] = arguments["storage"] or storage_of_environment()
    return settings_from(arguments)


def settings_from(asked: Mapping[str, Any]) -> Settings:
    """The settings of a study of parsed arguments; what was not asked for is as by default. Raises NasKdError for bad
    ones."""
    arguments = {**_UNSAID, **asked}
    parse_budget(arguments["budget"])
    arguments["budget"] = plain_budget(arguments["budget"])  # which names the study too
    parse_levels(arguments["levels"])
    if arguments["study_name"] is not None and not re.search(r"\w", arguments["study_name"]):
        raise NasKdError(f"--study-name {arguments['study_name']!r} needs a letter or digit")
    check_teacher(arguments)
    arguments |= {name: tuple(arguments[name]) for name in ("pin", "start_from")}
    arguments["dataset"] = choose_dataset(arguments["dataset"], arguments["data_dir"])
    arguments["left_open"] = tuple(name for name in OPEN if arguments[name] is None)
    arguments |= {name: _USUAL[name] for name in arguments["left_open"]}
    arguments["pruner"] = pruner_of(arguments["pruner"], bool(arguments["maximize"]))
    arguments["augment"] = augment_options(arguments, arguments["distill"])
    return read(Settings, arguments)
