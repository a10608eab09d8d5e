"""The block library of every covered model: built, assembled, finite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from families import COVERED, SIDES

from nas_kd.analysis.structure import Block
from nas_kd.data.images import Images
from nas_kd.genotype import Genotype
from nas_kd.library.building import LibrarySpec, build_library
from nas_kd.search.options import parse_options
from nas_kd.search.space import Space
from nas_kd.training.evaluation import recalibrate

QUICK = ("mobilenetv3_small_100", "starnet_s1", "regnety_004")
NAMES = [*((name, 4) for name in QUICK), *(pytest.param(name, 8, marks=pytest.mark.slow) for name in COVERED)]


@pytest.mark.parametrize(("name", "count"), NAMES)
def test_every_covered_model_has_a_library(name: str, count: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = SIDES[name]
    network = timm.create_model(name, num_classes=5).eval()
    space = Space(network, img_size=size, options=parse_options("width=1/0.5,conv"), name=name)
    some = space.blocks[:: max(1, len(space.blocks) // count)]
    analysis = replace(space.analysis, blocks=tuple(map(_few_choices, some)))
    pixels = torch.randint(0, 255, (24, 3, size, size)).byte()
    images = Images(pixels, torch.arange(24) % 5, (0.5,) * 3, (0.25,) * 3)
    spec = LibrarySpec(images=16, holdout=8, rounds=(2,), batch_size=8)
    library = build_library(network, analysis, images, spec, tmp_path)
    assert all(np.isfinite(damages).all() for damages in library.damages())
    student = library.student(Genotype.of({block.name: block.choices[-1] for block in analysis.blocks}))
    recalibrate(student, images)
    with torch.no_grad():
        assert torch.isfinite(student(torch.randn(2, 3, size, size))).all()


def _few_choices(block: Block) -> Block:
    """The base's choice, and one of each sort: narrower, of another kind, both."""
    sorts = {(choice.width < 1, choice.conv != block.default.conv): choice for choice in reversed(block.choices)}
    return replace(block, choices=(block.default, *(c for c in sorts.values() if c != block.default)))


def test_what_a_narrow_stream_leaves_of_a_replacement_does_what_it_did(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=5).eval()
    options = parse_options("conv=standard/depthwise/blueprint/shift/group4", search_stages=True)
    space = Space(network, img_size=32, options=options)
    block = next(own for own in space.blocks if own.name == "layer2.0")
    stream = next(own for own in space.blocks if own.name.endswith("layer1.stream"))
    analysis = replace(space.analysis, blocks=(block, stream))
    images = Images(torch.randint(0, 255, (24, 3, 32, 32)).byte(), torch.arange(24) % 5, (0.5,) * 3, (0.25,) * 3)
    library = build_library(
        network, analysis, images, LibrarySpec(images=16, holdout=8, rounds=(2,), batch_size=8), tmp_path
    )
    narrow = next(choice for choice in stream.choices if choice.width < 1)
    for choice in block.choices[1:]:
        alone = Genotype.of({block.name: choice, stream.name: stream.default})
        beside = Genotype.of({block.name: choice, stream.name: narrow})
        mask, site = analysis.keep_mask(beside, library.order), block.sites[0]
        wide, part = (library.student(own).get_submodule(site.module) for own in (alone, beside))
        read, written = mask[site.inputs], mask[site.outputs]
        assert 0 < read.sum() < len(read)
        image = torch.randn(2, len(read), 8, 8)
        image[:, ~read] = 0
        with torch.no_grad():
            assert torch.allclose(part(image[:, read]), wide(image)[:, written], atol=1e-5) == (choice.conv != "group4")
