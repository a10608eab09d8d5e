"""timm's own scripts on a result: `nas-kd run train.py --model FOLDER …`."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nas_kd.arguments.parsing import guarded, model_name
from nas_kd.errors import NasKdError

_USAGE = """usage: nas-kd run SCRIPT [ARGUMENTS …]

Runs a Python script in which timm knows the models that nas_kd exported: timm's train.py, validate.py and benchmark.py,
or one of yours. In --model and --teacher a folder may stand for timm's local-dir:FOLDER.

example: nas-kd run pytorch-image-models/validate.py my_images/val --model results/STUDY/MODEL --pretrained
"""
_MODEL_OPTIONS = ("--model", "--teacher", "--kd-model-name", "--naflex-loader-model")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a script and returns its exit code; 2 is a mistake of the user's."""
    return guarded(run_script, argv)


def run_script(argv: Sequence[str]) -> int:
    """The script of the first argument, with the others as its own, after our networks are registered with timm."""
    if not argv or argv[0] in ("-h", "--help"):
        (sys.stdout if argv else sys.stderr).write(_USAGE)
        return 0 if argv else 2
    script = Path(argv[0]).expanduser()
    if not script.is_file():
        raise NasKdError(
            f"there is no script {script}: clone github.com/huggingface/pytorch-image-models for timm's train.py"
        )

    import nas_kd.models  # noqa: F401  registers our networks with timm

    sys.argv = [str(script), *_with_models(argv[1:])]
    sys.path.insert(0, str(script.parent.resolve()))  # as `python SCRIPT` has it
    runpy.run_path(str(script), run_name="__main__")
    return 0


def _with_models(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments, folders of exported models by timm's name for them."""
    before = ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if before in _MODEL_OPTIONS:
            yield model_name(argument)
        elif equals and option in _MODEL_OPTIONS:
            yield f"{option}={model_name(value)}"
        else:
            yield argument
        before = argument


if __name__ == "__main__":
    sys.exit(main())
