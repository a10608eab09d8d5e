"""A result on the Hugging Face hub: `nas-kd push FOLDER REPO`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nas_kd.arguments.parsing import LOCAL, Parser, guarded, path


@dataclass(frozen=True, slots=True, kw_only=True)
class PushSettings:
    """What the command is asked for."""

    folder: Path
    repo: str
    private: bool
    license: str | None
    message: str
    card_only: bool
    debug: bool


def parse_push(argv: Sequence[str]) -> PushSettings:
    """Reads the arguments of the push command. Raises NasKdError for bad ones."""
    parser = Parser(
        prog="nas-kd push",
        description="Puts a model that nas_kd exported on the Hugging Face hub, with a model card.",
    )
    add = parser.add_argument
    add("folder", type=path, metavar="FOLDER", help="the folder of an exported model")
    add("repo", metavar="REPO", help="OWNER/NAME on the hub, made where it is not there")
    add("--private", action="store_true", help="for you alone")
    add("--license", metavar="ID", help="as the hub names it: apache-2.0, mit, … (that of the base's weights)")
    add("--message", default="A model found by nas_kd", metavar="TEXT", help="of the commit")
    add("--card-only", action="store_true", help="print the model card and send nothing")
    add("--debug", action="store_true", help="tracebacks")
    arguments = vars(parser.parse_args(argv))
    return PushSettings(**{**arguments, "folder": Path(arguments["folder"].removeprefix(LOCAL))})


def main(argv: Sequence[str] | None = None) -> int:
    """Pushes a result and returns the exit code: 0 done, 2 a mistake of the user's, 130 interrupted."""
    return guarded(lambda arguments: run_push(parse_push(arguments)), argv)


def run_push(settings: PushSettings) -> int:
    """Writes the card, sends the folder, and prints where it is."""
    from nas_kd.results.hub_card import hub_card
    from nas_kd.results.publish import check_repository, publish

    check_repository(settings.repo)
    card = hub_card(settings.folder, settings.repo, settings.license)
    if settings.card_only:
        sys.stdout.write(card.text)
        return 0
    url = publish(settings.folder, settings.repo, card, private=settings.private, message=settings.message)
    sys.stdout.write(
        f"{url}\nload it: import timm, nas_kd.models; timm.create_model('hf-hub:{settings.repo}', pretrained=True)\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
