"""Every fuzz target in everyday size: its corpus, what once went wrong among it, and inputs of Hypothesis, the same ones each time.

`make fuzz` runs the same targets for as long as one likes.
"""

import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.provider import EDGES, Provider, Recipe
from tests.fuzz.targets import CORPUS, TARGETS, corpus_files, load

# How many inputs each target gets: one to five seconds of a CPU.
EXAMPLES = {"daemon": 25, "fuse_requests": 200, "broker_packets": 200, "frontend": 500, "rings": 500, "command_lines": 200}
DEFAULT_EXAMPLES = 600


@pytest.fixture(scope="module", params=TARGETS)
def target(request, tmp_path_factory):
    """A target with what it needs, for all of its tests."""
    module = load(request.param)
    if getattr(module, "NEEDS_ROOT", False) and os.geteuid() != 0:
        pytest.skip("needs uid 0: what a guest's root may do")
    if hasattr(module, "open_rig"):
        module.open_rig(tmp_path_factory.mktemp(request.param))
    yield module
    if hasattr(module, "close_rig"):
        module.close_rig()


def name_of(target):
    return target.__name__.rsplit(".", 1)[-1]


def test_the_corpus_breaks_nothing(target):
    files = corpus_files(name_of(target))
    assert files
    for path in files:
        try:
            target.one_input(path.read_bytes())
        except BaseException as error:
            error.add_note(f"make fuzz TARGET={name_of(target)} INPUT={path.relative_to(Path.cwd())}")
            raise


def test_no_input_breaks_anything(target):
    seeds = list(target.seeds().values())

    @settings(
        max_examples=EXAMPLES.get(name_of(target), DEFAULT_EXAMPLES), derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.one_of(st.binary(max_size=400), st.builds(random_input, st.just(seeds), st.integers(0, 2**32 - 1))))
    def one_input(data):
        target.one_input(data)

    one_input()


def random_input(seeds, number):
    """Bytes with all values alike, which Hypothesis' own are not, or seeds one after the other, some of their bytes changed."""
    rng = random.Random(number)
    if rng.random() < 0.5:
        return rng.randbytes(rng.randrange(400))
    data = bytearray(b"".join(rng.choices(seeds, k=rng.randrange(1, 4))))
    for _ in range(rng.randrange(8) if data else 0):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_in_the_tree_are_those_that_the_target_makes(name):
    """Else: make fuzz-seeds."""
    for seed, data in load(name).seeds().items():
        assert (CORPUS / name / seed).read_bytes() == data, seed


@given(st.lists(st.one_of(st.integers(0, 2**64 - 1), st.sampled_from(EDGES), st.binary(max_size=50))))
def test_what_a_recipe_writes_a_provider_reads(values):
    recipe = Recipe()
    for value in values:
        recipe.blob(value) if isinstance(value, bytes) else recipe.number(value)
    provider = Provider(bytes(recipe))
    assert [provider.blob(50) if isinstance(value, bytes) else provider.number() for value in values] == values
    assert provider.left == 0


@given(st.binary(max_size=20))
def test_an_input_that_ends_early_reads_as_zeroes(data):
    provider = Provider(data)
    provider.rest()
    assert (provider.byte(), provider.number(), provider.blob(9), provider.flag(), provider.one_in(8)) == (0, 0, b"", False, False)
    assert provider.pick("abc") == "a"
