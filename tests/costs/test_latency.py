from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import timm
import torch
from torch import nn

from nas_kd.costs.latency import Timing, measure_latency, measure_together
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


def test_it_stops_at_the_limit_when_never_stable() -> None:
    reads = iter(range(10**6))
    clock = (float(number * number) for number in reads)  # every run takes longer than the one before
    assert measure_latency(nn.Conv2d(3, 4, 1), SIZE, timing=Timing(limit_s=1e4), clock=lambda: next(clock)) > 0


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
