from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas_kd.errors import GenotypeError
from nas_kd.genotype import CONV_KINDS, Choice, Genotype, group_count, is_conv_kind

KINDS = st.sampled_from([*CONV_KINDS, "group2", "group4", "group16"])
CHOICES = st.builds(
    Choice,
    width=st.floats(0.01, 1),
    kernel_size=st.sampled_from([None, 1, 3, 5, 7]),
    conv=st.none() | KINDS,
    keep=st.booleans(),
)
GENOTYPES = st.builds(Genotype.of, st.dictionaries(st.text(min_size=1, max_size=9), CHOICES, max_size=6))
# every form that was ever written stays readable
OLD_FORMS = {
    '{"version":1,"blocks":{}}': Genotype(()),
    '{"version":1,"blocks":{"layer1.0":{}}}': Genotype.of({"layer1.0": Choice()}),
    '{"version":1,"blocks":{"a":{"width":0.5,"kernel_size":5,"conv":"group4"},"b":{"keep":false}}}': Genotype.of(
        {"a": Choice(width=0.5, kernel_size=5, conv="group4"), "b": Choice(keep=False)}
    ),
}


@given(genotype=GENOTYPES)
def test_json_round_trip(genotype: Genotype) -> None:
    assert Genotype.from_json(genotype.to_json()) == genotype
    assert "\n" not in genotype.to_json()


@pytest.mark.parametrize("text", OLD_FORMS)
def test_old_forms_stay_readable(text: str) -> None:
    assert Genotype.from_json(text) == OLD_FORMS[text]
    assert Genotype.from_json(text).to_json() == text


@given(genotype=GENOTYPES, order=st.randoms(use_true_random=False))
def test_digest_ignores_the_order(genotype: Genotype, order: object) -> None:
    blocks = list(genotype.blocks)
    order.shuffle(blocks)  # type: ignore[attr-defined]
    assert Genotype(tuple(blocks)).digest == genotype.digest


@given(one=GENOTYPES, two=GENOTYPES)
def test_digest_tells_genotypes_apart(one: Genotype, two: Genotype) -> None:
    assert (dict(one) == dict(two)) == (one.digest == two.digest)


def test_digest_never_changes() -> None:
    genotype = Genotype.of({"layer1.0": Choice(width=0.5, conv="shift"), "layer1.1": Choice()})
    assert genotype.digest == "7a98bd772494"


@given(genotype=GENOTYPES)
def test_it_is_a_mapping(genotype: Genotype) -> None:
    assert dict(genotype) == dict(genotype.blocks)
    assert len(genotype) == len(list(genotype))
    assert hash(genotype) == hash(Genotype.of(dict(genotype)))
    assert "\0" * 10 not in genotype


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, r"width must lie in \(0, 1\], got 0"),
        ({"width": 1.01}, r"width must lie in \(0, 1\], got 1.01"),
        ({"width": float("nan")}, r"width must lie in \(0, 1\], got nan"),
        ({"kernel_size": 4}, "kernel_size must be odd and positive, got 4"),
        ({"kernel_size": -1}, "kernel_size must be odd and positive, got -1"),
        ({"conv": "magic"}, "unknown conv 'magic': use one of standard, depthwise, blueprint, shift, group{g}"),
        ({"conv": "group1"}, "unknown conv 'group1'"),
        ({"conv": "group04"}, "unknown conv 'group04'"),
    ],
)
def test_values_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(GenotypeError, match=message.replace("{g}", r"\{g\}")):
        Choice(**fields)


def test_a_block_has_one_choice() -> None:
    with pytest.raises(GenotypeError, match="names a block twice"):
        Genotype((("a", Choice()), ("a", Choice(width=0.5))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a genotype"),
        ("[]", "not a genotype"),
        ("null", "not a genotype"),
        ('{"blocks":{}}', "not a genotype: .*version"),
        ('{"version":1}', "not a genotype: .*blocks"),
        ('{"version":2,"blocks":{}}', "has version 2, this nas_kd reads up to 1: update it"),
        ('{"version":1,"blocks":{"a":{"depth":2}}}', "not a genotype: .*depth"),
        ('{"version":1,"blocks":{"a":3}}', "not a genotype"),
        ('{"version":1,"blocks":{"a":{"width":"wide"}}}', "not a genotype"),
        ('{"version":1,"blocks":{"a":{"width":3}}}', "width must lie in"),
    ],
)
def test_other_texts_are_no_genotype(text: str, message: str) -> None:
    with pytest.raises(GenotypeError, match=message):
        Genotype.from_json(text)


@given(text=st.text(max_size=40))
def test_any_text_gives_one_kind_of_error(text: str) -> None:
    try:
        Genotype.from_json(text)
    except GenotypeError:
        return
    assert json.loads(text)["version"] == 1


@pytest.mark.parametrize(("conv", "groups"), [("group2", 2), ("group16", 16), ("group", None), ("shift", None)])
def test_groups(conv: str, groups: int | None) -> None:
    assert group_count(conv) == groups
    assert is_conv_kind(conv) == (conv != "group")
