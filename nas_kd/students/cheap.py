"""The cheap form of a base: every convolution that can be is replaced by one kind (arXiv 1909.13063)."""

from __future__ import annotations

from nas_kd.analysis.structure import Analysis, Block
from nas_kd.errors import ModelError
from nas_kd.genotype import Choice, Genotype


def cheap_genotype(analysis: Analysis, conv: str) -> Genotype:
    """The genotype in which every block that can has the convolution `conv`, and widths and kernels stay the base's.

    Raises ModelError, with the kinds that there are, when no block can become that.
    """
    chosen = {block.name: _with_conv(block, conv) or block.default for block in analysis.blocks}
    genotype = Genotype.of(chosen)
    if genotype == analysis.identity:
        kinds = sorted({kind for block in analysis.blocks for kind in block.convs if kind != block.default.conv})
        raise ModelError(
            f"no convolution of {analysis.name} can become {conv!r}: it offers {', '.join(kinds) or 'no other kind'}"
        )
    return genotype


def _with_conv(block: Block, conv: str) -> Choice | None:
    own = block.default
    same = (choice for choice in block.choices if (choice.width, choice.kernel_size) == (own.width, own.kernel_size))
    return next((choice for choice in same if choice.conv == conv and choice.keep == own.keep), None)
