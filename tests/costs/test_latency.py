from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from torch import nn

from nas_kd.costs.latency import Timing, measure_latency, measure_together, take_turns
from nas_kd.errors import DeviceError, ModelError

SIZE = (3, 32, 32)
QUICK = Timing(warmup=1, repeats=2, limit_s=0.05)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=10).train()


def ticking() -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += 0.004


def test_all_models_are_measured_in_order(resnet: nn.Module) -> None:
    models = {"resnet18": timm.create_model("resnet18", num_classes=10), "resnet10t": resnet}
    times = measure_together(models, SIZE, timing=QUICK)
    assert list(times) == ["resnet18", "resnet10t"]
    assert all(0 < value < math.inf for value in times.values())


def test_the_model_and_torch_stay_as_they_were(resnet: nn.Module) -> None:
    resnet.bn1.eval()  # a frozen batch norm in a model in training mode
    modes = [module.training for module in resnet.modules()]
    weights = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    threads, random_numbers = torch.get_num_threads(), torch.get_rng_state()
    assert measure_latency(resnet, SIZE, threads=2, timing=QUICK) > 0
    assert [module.training for module in resnet.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in resnet.state_dict().items())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert torch.is_grad_enabled()


def test_evaluation_mode_is_what_is_measured(resnet: nn.Module) -> None:
    seen = []
    hook = resnet.register_forward_hook(lambda module, args, out: seen.append((module.training, args[0].shape)))
    measure_latency(resnet, SIZE, timing=QUICK)
    hook.remove()
    assert set(seen) == {(False, (1, *SIZE))}


def test_the_median_is_in_milliseconds_of_the_clock() -> None:
    ticks = ticking()
    assert measure_latency(nn.Conv2d(3, 4, 1), SIZE, clock=lambda: next(ticks)) == pytest.approx(4.0)


def test_it_stops_when_stable() -> None:
    ticks = ticking()
    runs = []
    model = nn.Conv2d(3, 4, 1)
    model.register_forward_hook(lambda *_: runs.append(1))
    measure_latency(model, SIZE, timing=Timing(warmup=2, repeats=5, limit_s=math.inf), clock=lambda: next(ticks))
    assert len(runs) == 2 + 3 * (1 + 5)  # three turns, whose medians agree


def test_times_that_do_not_settle_are_an_error() -> None:
    now, pauses = [0.0], itertools.cycle([1.0, 1.0, 40.0, 40.0, 100.0, 100.0, 9.0, 9.0])  # by turns

    def work() -> None:
        now[0] += next(pauses)

    with pytest.raises(DeviceError, match=r"times do not settle on this machine \(±\d+ %\): other work"):
        take_turns({"one": work}, Timing(repeats=1, limit_s=2000.0), lambda: now[0])


def test_it_stops_at_the_limit() -> None:
    now, runs = [0.0], itertools.cycle([1.0, 1.0, 1.2, 1.2, 1.4, 1.4])

    def work() -> None:
        now[0] += next(runs)

    take_turns({"one": work}, Timing(repeats=1, tolerance=0.0, limit_s=60.0), lambda: now[0])
    assert 60 <= now[0] < 63


def test_beside_a_reference_a_slower_hour_is_taken_off() -> None:
    """The machine is twice as slow from its third turn on; the clock ticks with what runs."""
    now = [0.0]

    def run(milliseconds: float) -> Callable[[], None]:
        def work() -> None:
            now[0] += milliseconds / 1000 * (1 if now[0] < 0.06 else 2)

        return work

    runs = {"base": run(4.0), "student": run(1.0)}
    times = take_turns(runs, Timing(repeats=1, tolerance=0.0, limit_s=0.2), lambda: now[0], reference="base")
    assert times["student"] / times["base"] == pytest.approx(0.25, rel=1e-6)


def test_models_take_turns() -> None:
    order: list[str] = []
    models = {name: nn.Conv2d(3, 4, 1) for name in "ab"}
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: order.append(name))
    ticks = ticking()
    measure_together(models, SIZE, timing=Timing(warmup=1, repeats=1), clock=lambda: next(ticks))
    assert "".join(order) == "ab" + 3 * "aabb"


def test_half_precision_models_get_half_precision_images() -> None:
    assert measure_latency(nn.Conv2d(3, 4, 1).to(torch.bfloat16), SIZE, timing=QUICK) > 0


def test_no_models_no_times() -> None:
    assert measure_together({}, SIZE) == {}


def test_an_image_that_does_not_fit_names_the_model(resnet: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"small cannot run an image of 1×32×32 .*input size"):
        measure_together({"small": resnet}, (1, 32, 32), timing=QUICK)


@pytest.mark.parametrize("size", [(3, 32), (3, 0, 32)])
def test_a_malformed_size(resnet: nn.Module, size: tuple[int, int, int]) -> None:
    with pytest.raises(ModelError, match="three positive numbers"):
        measure_latency(resnet, size)


@pytest.mark.parametrize("change", [{"repeats": 0}, {"warmup": -1}, {"tolerance": -0.1}, {"limit_s": math.nan}])
def test_malformed_timing(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be ≥ 0"):
        Timing(**change)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there(resnet: nn.Module) -> None:
    with pytest.raises(DeviceError, match="no CUDA device was found; use --device cpu"):
        measure_latency(resnet, SIZE, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_waited_for(resnet: nn.Module) -> None:
    timing = Timing(limit_s=0.5)
    small = measure_latency(nn.Conv2d(3, 8, 3), (3, 64, 64), device="cuda", timing=timing)
    large = measure_latency(nn.Conv2d(512, 512, 7), (512, 512, 512), device="cuda", timing=timing)
    # 1.7e12 MACs: without waiting for the device, both would take the time of a launch
    assert large > 10 * small
    assert next(resnet.parameters()).device.type == "cpu"
