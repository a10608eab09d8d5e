"""What nas_kd finds in the covered timm models: blocks, choices, costs, seconds.

    python studies/coverage.py > docs/models.md

timm's counts (`timm_counts.csv`) are those of the
benchmark tables in `results/` of huggingface/pytorch-image-models at aa4b585.
"""

from __future__ import annotations

import csv
import datetime
import math
import platform
import time
from pathlib import Path

import timm
import torch
from torch import nn

import nas_kd.models  # noqa: F401  registers the models for small images
from nas_kd.budget import KINDS, short
from nas_kd.costs.cost_table import cost_table
from nas_kd.costs.verification import analyse, measure
from nas_kd.errors import ModelError

MODELS = """
resnet18 resnet50 resnet26d seresnet50 resnext50_32x4d wide_resnet50_2 res2net50_26w_4s resnest26d skresnet18
densenet121 vgg11_bn vgg16_bn mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_100 mobilenetv4_conv_small
efficientnet_b0 efficientnet_lite0 tf_efficientnetv2_s mnasnet_100 fbnetc_100 mixnet_s tinynet_e lcnet_050
ghostnet_100 repghostnet_050 repvgg_a0 mobileone_s0 regnetx_002 regnety_004 cspresnet50 darknet53 cspdarknet53
dla34 hrnet_w18_small ese_vovnet19b_dw selecsls42 inception_v3 inception_v4 xception41 rexnet_100 hardcorenas_a
nfnet_l0 dm_nfnet_f0 convnext_atto convnextv2_atto fastvit_t8 starnet_s1 edgenext_xx_small
cifar_resnet20 cifar_resnet32 cifar_resnet44 cifar_resnet56 cifar_resnet110 cifar_resnet56_cheap cifar_vgg16_bn
""".split()
NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
SECONDS_LIMIT = 3.0  # that an analysis may take
TOLERANCE = 0.0051  # of numbers with two decimals
HEAD = "model|input|blocks|choices|genotypes|params|min|MACs|min|activations|min|seconds|timm: params|MACs"
NOTES = """`choices` is their number over all blocks; `min` the smallest reachable of the cost before it, each for
itself. `activations` is `peak_memory` in bytes. Widths, kernels and kinds are open, as by default; a block of one
choice is not counted. `python -m nas_kd.space MODEL` shows the blocks of a model and what is left alone.

Not every part of a model changes. The residual stream keeps its channels unless `--search-stages` is given. Of hybrid
networks the attention stays as it is (edgenext: the convolutional blocks change). Networks made of nothing but shifts
(`cifar_resnet56_cheap` with `conv="shift"`) are refused, since a shift's order of channels is fixed: the same network
is a genotype of `conv="depthwise"`, every convolution a shift. Transformers and MLPs are refused too.
Re-parameterised networks (RepVGG, MobileOne, FastViT) are searched in their training form;
`nas_kd.networks.fuse.fused(student)` gives the inference form, in which blocks with a replaced convolution stay."""


def row(name: str, published: dict[str, dict[str, str]]) -> tuple[str, float]:
    """A line of the table, and the seconds that the analysis took."""
    with torch.device("meta"):
        network = timm.create_model(name).eval()
    size = network.pretrained_cfg["input_size"]
    started = time.process_time()
    try:
        analysis = analyse(network, size, name=name)
    except ModelError as error:
        return f"| {name} | {size[-1]} | refused because {error} |", time.process_time() - started
    seconds = time.process_time() - started
    table = cost_table(analysis, network)
    counts = [len(block.choices) for block in table.blocks]
    costs = []
    for kind in (*KINDS, "peak_memory"):
        costs += [short(table.base()[kind]), short(table.cost(table.cheapest(kind))[kind])]
    theirs = published.get(name)
    facts = [name, size[-1], len(counts), sum(counts), f"{math.prod(counts):.2g}", *costs, f"{seconds:.2f}"]
    facts += [f"{theirs['params_m']}M", f"{theirs['gmacs']}G"] if theirs else ["", ""]
    return f"| {' | '.join(map(str, facts))} |", seconds


def timing(seconds: dict[str, float]) -> str:
    """What an analysis takes, and which take longer than they may."""
    slowest = max(seconds, key=seconds.__getitem__)
    text = (
        "`seconds` is processor time of the analysis, of which a part goes into building and running students that "
        f"check it, on one thread: {slowest} takes longest, {seconds[slowest]:.1f} s"
    )
    late = [name for name, taken in seconds.items() if taken >= SECONDS_LIMIT]
    return f"{text}; {', '.join(late) or 'none'} of them {SECONDS_LIMIT:.0f} s or more."


def norm_elements(name: str) -> int:
    """How many elements the normalisation layers of a model write for one image."""
    with torch.device("meta"):
        network = timm.create_model(name).eval()
    written = []
    for module in network.modules():
        if isinstance(module, NORMS):
            module.register_forward_hook(lambda module, inputs, output: written.append(output.numel()))
    with torch.no_grad():
        network(torch.empty(1, *network.pretrained_cfg["input_size"], device="meta"))
    return sum(written)


def comparison(published: dict[str, dict[str, str]]) -> str:
    """Whether timm's counts are ours, and what makes the difference."""
    other_params, other_macs = [], []
    for name, theirs in published.items():
        with torch.device("meta"):
            network = timm.create_model(name).eval()
        cost = measure(network, network.pretrained_cfg["input_size"])
        if abs(cost.params / 1e6 - float(theirs["params_m"])) > TOLERANCE:
            other_params.append(name)
        if abs((cost.macs + 2 * norm_elements(name)) / 1e9 - float(theirs["gmacs"])) > TOLERANCE:
            other_macs.append(name)
    return (
        f"timm's own benchmark tables give params and MACs of {len(published)} of these models, to two decimals of a "
        f"million and of 10⁹. Params differ for {', '.join(other_params) or 'none'}. MACs are a little more there: "
        "fvcore, which timm counts with, adds two for each element that a normalisation writes. With these ours are "
        f"theirs for all but {', '.join(other_macs)}. The NFNets normalise their weights, which fvcore counts as well. "
        "We count convolutions and matrix products alone, as `torch.utils.flop_counter` does."
    )


def main() -> None:
    torch.set_num_threads(1)
    with Path(__file__).with_name("timm_counts.csv").open() as file:
        published = {line["model"]: line for line in csv.DictReader(file)}
    analyse(timm.create_model("resnet18"), (3, 32, 32))  # what is loaded at first use is loaded
    print("# Covered models\n")
    print(
        f"`python studies/coverage.py > docs/models.md`, {datetime.date.today()}, {platform.machine()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}.\n"
    )
    rows = {name: row(name, published) for name in MODELS}
    print(f"{NOTES}\n\n{timing({name: seconds for name, (_, seconds) in rows.items()})}\n\n{comparison(published)}\n")
    print(f"| {' | '.join(HEAD.split('|'))} |\n|{'---|' * len(HEAD.split('|'))}")
    print("\n".join(line for line, _ in rows.values()))


if __name__ == "__main__":
    main()
