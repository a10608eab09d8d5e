"""What passes through frames is the same in whatever pieces it is recorded; damages are the whole network's."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from nas_kd.analysis.structure import Analysis
from nas_kd.data.images import Images
from nas_kd.library import recorder as module
from nas_kd.library.damages import Damages
from nas_kd.library.recorder import Recorder
from nas_kd.search.space import Space
from nas_kd.students.frames import swapped
from nas_kd.students.inheritance import inherit_student
from nas_kd.training.evaluation import predict_logits
from nas_kd.training.losses import distillation_loss


@pytest.fixture(scope="module")
def images() -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.zeros(30, dtype=torch.int64), (0.5,) * 3, (0.25,) * 3)


# dense; depthwise, with its head at the root
@pytest.fixture(scope="module", params=["test_resnet", "test_efficientnet"])
def base(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(request.param, num_classes=5)
    return network.eval()


@pytest.fixture(scope="module")
def analysis(base: nn.Module) -> Analysis:
    return Space(base, img_size=32).analysis


@pytest.fixture(scope="module")
def recorder(base: nn.Module, analysis: Analysis, images: Images) -> Recorder:
    return Recorder(base, analysis, images, 10)


def test_pieces_make_no_difference(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(recorder.frames)
    whole = recorder.record(names, slice(0, 20))
    monkeypatch.setattr(module, "_PART_BYTES", 1)
    for group in (names[:1], names[2:4], names):
        for name, recorded in recorder.record(group, slice(0, 20)).items():
            assert len(recorded) == 20
            pairs = zip((*recorded.inputs, *recorded.outputs), (*whole[name].inputs, *whole[name].outputs), strict=True)
            assert all(torch.allclose(part, other, atol=1e-4) for part, other in pairs)


def test_the_base_stops_behind_the_last_frame(recorder: Recorder, base: nn.Module) -> None:
    ran: list[str] = []
    hooks = [
        part.register_forward_hook(lambda m, a, o, n=name: ran.append(n)) for name, part in base.named_modules() if name
    ]
    first = next(name for name, frame in recorder.frames.items() if not frame.is_whole)
    recorder.record([first], slice(0, 4))
    for hook in hooks:
        hook.remove()
    classifier = base.get_classifier()  # type: ignore[operator]
    assert not any(base.get_submodule(name) is classifier for name in ran)


def test_groups_hold_every_block_once_and_fit_the_memory(recorder: Recorder) -> None:
    counts = dict.fromkeys(recorder.frames, 20)
    most = 20 * max(recorder.bytes.values())
    groups = list(recorder.groups(counts, most))
    assert [name for group in groups for name in group] == list(recorder.frames)
    assert len(groups) > 1
    assert all(sum(recorder.bytes[name] * 20 for name in group) <= most for group in groups)


def test_damages_are_those_of_the_whole_network(
    recorder: Recorder, base: nn.Module, analysis: Analysis, images: Images
) -> None:
    damages = Damages(base, analysis, recorder)
    held = recorder.record(list(recorder.frames), recorder.held_out(10))
    teacher = predict_logits(base, images[20:])
    for block in analysis.blocks:
        student = inherit_student(base, analysis, swapped(analysis, block, block.choices[-1])).eval()
        expected = float(distillation_loss(predict_logits(student, images[20:]), teacher, temperature=4.0))
        inside = recorder.frames[block.name].inside(student)
        assert damages.kl(block.name, inside, held[block.name]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert damages.seconds(block.name) > 0
    assert len(predict_logits(base, images)) == 30  # nothing is left behind in the base
    assert torch.allclose(predict_logits(base, images[20:]), teacher)
