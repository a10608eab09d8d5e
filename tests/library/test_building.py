"""The block library on a small real network: what it learns, that it resumes, and what becomes of damaged files."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from nas_kd.analysis.structure import Analysis
from nas_kd.data.augment import default_augmentation
from nas_kd.data.images import AugmentedImages, Images, normalise
from nas_kd.data.splits import Splits
from nas_kd.errors import DataError, TrainingError
from nas_kd.genotype import Choice, Genotype
from nas_kd.library import library as module
from nas_kd.library.building import LibrarySpec, build_library, plan_library
from nas_kd.library.effort import Step
from nas_kd.library.entries import Entry, EntryFile
from nas_kd.library.frame_training import (
    FrameRecipe,
    distil_frame,
    frame_error,
    recalibrate_frame,
    run_in_parts,
    variances,
)
from nas_kd.library.library import Library
from nas_kd.search.options import parse_options
from nas_kd.search.space import Space
from nas_kd.students.building import build_student
from nas_kd.students.frames import find_frames, join_batches, recording, swapped
from nas_kd.students.inheritance import inherit_student
from nas_kd.training.evaluation import predict_logits, recalibrate
from nas_kd.training.loop import train
from nas_kd.training.recipe import Recipe

Build = Callable[..., Library]
SPEC = LibrarySpec(images=64, holdout=32, rounds=(4, 4), batch_size=16)


@pytest.fixture(scope="module")
def images(digits: Splits) -> Images:
    return AugmentedImages(digits.train, default_augmentation("digits"), 0).sample(96)


@pytest.fixture(scope="module")
def teacher(digits: Splits) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    data = AugmentedImages(digits.train, default_augmentation("digits"), 0)
    train(network, data, Recipe(epochs=12, batch_size=16, lr=0.05, distill_weight=0.0))
    return network.eval()


@pytest.fixture(scope="module")
def analysis(teacher: nn.Module) -> Analysis:
    options = parse_options("width=1/0.5/0.25,conv=standard/depthwise")
    return Space(teacher, img_size=32, options=options).analysis


@pytest.fixture(scope="module")
def part(analysis: Analysis) -> Analysis:
    """Two blocks of it alone."""
    return replace(analysis, blocks=analysis.blocks[1:3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("library")


@pytest.fixture(scope="module")
def build(teacher: nn.Module, analysis: Analysis, images: Images) -> Build:
    return lambda folder, report=print: build_library(teacher, analysis, images, SPEC, folder, report)


@pytest.fixture(scope="module")
def library(build: Build, folder: Path) -> Library:
    return build(folder)


def test_every_choice_has_an_entry_and_a_damage(library: Library, analysis: Analysis) -> None:
    for measure in ("kl", "nmse"):
        for block, damages in zip(analysis.blocks, library.damages(measure), strict=True):
            assert len(damages) == len(block.choices)
            assert damages[0] == 0
            assert (damages[1:] > 0).all()
            assert np.isfinite(damages).all()
    assert library.seconds > 0


def test_narrower_hurts_more(library: Library, analysis: Analysis) -> None:
    for block, damages in zip(analysis.blocks, library.damages("nmse"), strict=True):
        plain = [i for i, choice in enumerate(block.choices) if choice.conv == block.default.conv]
        assert list(damages[plain]) == sorted(damages[plain]), block.name  # choices go from wide to narrow


def test_training_goes_to_the_unbeaten_and_is_kept_where_it_helps(library: Library, analysis: Analysis) -> None:
    trained = [entry for entry in library.entries.values() if entry.steps]
    assert 0 < len(trained) < len(library.entries)
    assert all(entry.nmse <= entry.errors[0][1] for entry in trained)
    for block in analysis.blocks:  # others may be beaten after their last round: which, is a matter of rounding
        closest = min((e for e in library.entries.values() if e.block == block.name), key=lambda entry: entry.nmse)
        assert closest.kl is not None


def test_training_brings_a_frame_closer(teacher: nn.Module, analysis: Analysis, images: Images) -> None:
    """Measured on the images that it learns from, from weights that were far off: how much a few steps help on others
    is a matter of rounding, this is not."""
    pixels = normalise(images.pixels, images.mean, images.std, torch.device("cpu"))
    frame = find_frames(teacher, analysis, pixels[:2])["layer2.0"]
    with torch.no_grad(), recording(teacher, {"layer2.0": frame}) as recordings:
        teacher(pixels)
    recorded = join_batches(recordings["layer2.0"])
    module = frame.inside(build_student(teacher, analysis, analysis.identity))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))

    def error() -> float:
        recalibrate_frame(module, recorded)
        return float(frame_error(run_in_parts(module, recorded), recorded.outputs, variances(recorded)))

    before = error()
    distil_frame(module, list(module.parameters()), recorded, FrameRecipe(steps=20, batch_size=32, lr=5e-3, seed=0))
    assert error() < before / 2


def test_the_identity_is_the_teacher(library: Library, teacher: nn.Module, analysis: Analysis) -> None:
    student = library.student(analysis.identity)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name


def test_a_student_is_assembled_from_its_entries(library: Library, analysis: Analysis) -> None:
    genotype = Genotype.of({block.name: block.choices[len(block.choices) // 2] for block in analysis.blocks})
    state = library.student(genotype).state_dict()
    copied = 0
    for block in analysis.blocks:
        index = block.choices.index(genotype[block.name])
        kept = module.entry_file(library.folder, block, index).read()
        assert kept is not None
        for name, tensor in kept[1].items():
            if name in state and state[name].shape == tensor.shape and name.startswith(f"{block.name}."):
                copied += 1
                assert torch.equal(state[name], tensor), name  # read back as it was kept
    assert copied > 2 * len(analysis.blocks)


def test_library_students_begin_better_than_inherited_ones(
    library: Library, teacher: nn.Module, analysis: Analysis, images: Images, digits: Splits
) -> None:
    half = [next(i for i, c in enumerate(b.choices) if c.width <= 0.5) for b in analysis.blocks]
    genotype = Genotype.of({b.name: b.choices[i] for b, i in zip(analysis.blocks, half, strict=True)})
    wanted, apart = predict_logits(teacher, digits.test), []
    for student in (inherit_student(teacher, analysis, genotype), library.student(genotype)):
        recalibrate(student, images)
        apart.append((predict_logits(student, digits.test) - wanted).square().mean() / wanted.var())
    assert apart[1] < 0.8 * apart[0]


def test_a_second_build_makes_nothing_again(library: Library, build: Build, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    steps: list[str] = []
    again = build(folder, steps.append)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert again.entries == library.entries
    assert sum(step.share for step in steps if isinstance(step, Step)) == pytest.approx(1)
    assert len(steps) > 3 * len(again.analysis.blocks)


def test_a_build_that_is_killed_twice_goes_on_and_ends_the_same(
    library: Library, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills, written = [3, 30], 0
    write = EntryFile.write

    def killed(self: EntryFile, *arguments: object) -> None:
        nonlocal written
        if kills and written == kills[0]:
            del kills[0]
            raise KeyboardInterrupt
        written += 1
        write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(EntryFile, "write", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path)
    assert not kills
    assert list(tmp_path.rglob("*.safetensors"))
    resumed = build(tmp_path)
    for key, entry in resumed.entries.items():
        assert entry.errors == library.entries[key].errors
        assert entry.kl == library.entries[key].kl
    for measure in ("kl", "nmse"):
        assert all(map(np.array_equal, resumed.damages(measure), library.damages(measure)))


@pytest.mark.parametrize("harm", ["cut", "flipped"])
def test_a_damaged_file_is_made_again_with_a_warning(
    library: Library, build: Build, analysis: Analysis, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    block = analysis.blocks[0]
    path = module.entry_file(library.folder, block, 1).path
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if harm == "cut" else whole[:-3] + bytes([whole[-3] ^ 0xFF]) + whole[-2:])
    with caplog.at_level(logging.WARNING, logger="nas_kd"):
        again = build(library.folder.parent)
    assert any(str(path) in record.getMessage() for record in caplog.records)
    assert again.entries[block.name, 1].errors == library.entries[block.name, 1].errors


def test_a_file_that_is_gone_is_told_and_made_again(
    library: Library, build: Build, analysis: Analysis, caplog: pytest.LogCaptureFixture
) -> None:
    block = analysis.blocks[0]
    path = module.entry_file(library.folder, block, 1).path
    path.unlink()
    genotype = Genotype.of({own.name: own.choices[own is block] for own in analysis.blocks})
    with caplog.at_level(logging.WARNING, logger="nas_kd"):
        library.student(genotype)
    assert caplog.messages == [f"{path} is gone from the library: this block begins in closed form"]
    build(library.folder.parent)
    assert path.exists()


def test_a_library_keeps_the_rounds_with_which_it_was_begun(
    library: Library, teacher: nn.Module, analysis: Analysis, images: Images, folder: Path
) -> None:
    longer = build_library(teacher, analysis, images, replace(SPEC, rounds=(4, 4, 8)), folder)
    assert longer.folder == library.folder
    steps = {key: entry.steps for key, entry in library.entries.items()}  # a study may get more trials
    assert {key: entry.steps for key, entry in longer.entries.items()} == steps


def test_another_teacher_or_other_images_have_a_library_of_their_own(
    teacher: nn.Module, part: Analysis, images: Images, tmp_path: Path
) -> None:
    few = LibrarySpec(images=8, holdout=4, rounds=(), batch_size=4)
    first = build_library(teacher, part, images, few, tmp_path)
    other = build_library(teacher, part, images[8:], few, tmp_path)
    assert first.folder != other.folder


def test_a_broken_base_and_other_images_are_told_at_once(
    teacher: nn.Module, analysis: Analysis, images: Images, tmp_path: Path
) -> None:
    broken = copy.deepcopy(teacher)
    with torch.no_grad():
        next(broken.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(TrainingError, match="the logits of the base are not finite"):
        build_library(broken, analysis, images, LibrarySpec(), tmp_path)
    coloured = Images(images.pixels.repeat(1, 3, 1, 1), images.labels, images.mean * 3, images.std * 3)
    with pytest.raises(DataError, match=r"images of 3×\d+×\d+ do not fit the base: .*channels"):
        build_library(teacher, analysis, coloured, LibrarySpec(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_plan_spends_no_more_than_it_may(analysis: Analysis) -> None:
    rich = plan_library(LibrarySpec(), analysis, 1e9)
    assert rich.rounds == LibrarySpec().rounds
    sums = [sum(plan_library(LibrarySpec(), analysis, images).rounds) for images in (0, 1e5, 2e5, 4e5, 1e9)]
    assert sums == sorted(sums)
    assert sums[0] == 0


def test_a_larger_kernel_is_made_like_the_base_s(teacher: nn.Module, images: Images, tmp_path: Path) -> None:
    options = parse_options(
        "width=1/0.5,kernel,conv=standard/group4/shift",
        ["conv1:width=1", "layer1*:width=1", "layer1*:conv=standard", "layer2*:width=1", "layer2*:conv=standard"],
    )
    space = Space(teacher, img_size=32, options=options)
    few = LibrarySpec(images=32, holdout=16, rounds=(2,), batch_size=16)
    library = build_library(teacher, space.analysis, images, few, tmp_path)
    block = space.analysis.block("layer3.0")
    for damages, choices in zip(library.damages(), [b.choices for b in space.analysis.blocks], strict=True):
        assert (damages[1:] > 0).all()  # never a larger kernel for nothing
        assert len(damages) == len(choices)
    small, large = (Choice(width=0.5, kernel_size=size, conv="group4") for size in (3, 5))
    assert module.made_like(block, block.choices.index(large)) == block.choices.index(small)
    students = [library.student(swapped(space.analysis, block, choice)) for choice in (small, large)]
    pixels = torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        first, second = (student.eval()(pixels) for student in students)
    assert torch.allclose(first, second, atol=1e-4)
    shift = Choice(width=0.5, kernel_size=5, conv="shift")
    assert module.made_like(block, block.choices.index(shift)) == block.choices.index(shift)  # other taps, other shares


def test_weights_that_would_fill_the_disk_are_not_kept(
    teacher: nn.Module, part: Analysis, images: Images, tmp_path: Path
) -> None:
    few = LibrarySpec(images=32, holdout=16, rounds=(2,), batch_size=16, max_block_bytes=1000)
    library = build_library(teacher, part, images, few, tmp_path)
    assert sum(path.stat().st_size for path in library.folder.glob("layer*")) < 400_000
    assert all(entry.kl is not None and not entry.steps for entry in library.entries.values())
    genotype = Genotype.of({block.name: block.choices[-1] for block in part.blocks})
    inherited = inherit_student(teacher, part, genotype, importance=library.order).state_dict()
    for name, tensor in library.student(genotype).state_dict().items():
        assert torch.equal(tensor, inherited[name])


def test_an_entry_survives_its_file(tmp_path: Path) -> None:
    entry = Entry(block="layer1.0", errors=((0, 0.5), (8, 0.25)), kl=None, seconds=1.5)
    file = EntryFile(tmp_path / "entry.safetensors")
    assert file.read() is None
    tensors = {
        "weight": torch.arange(3.0)[:, None] / 3,
        "bias": torch.arange(3.0) / 3,
        "large": torch.full((1, 2), 1e6),
    }
    file.write(entry, tensors)
    kept = file.read()
    assert kept is not None
    assert kept[0] == entry
    assert torch.allclose(kept[1]["weight"], tensors["weight"], rtol=1e-3)
    assert all(torch.equal(kept[1][name], tensors[name]) for name in ("bias", "large"))
    assert all(tensor.dtype == torch.float32 for tensor in kept[1].values())
    assert (entry.nmse, entry.nmse_after(7), entry.steps) == (0.25, 0.5, 8)
