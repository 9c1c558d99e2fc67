"""A chain's stages as words that Hydra reads as the same values, and all their mistakes before the first one runs."""

import string

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vireo import config
from vireo.config import chains

NAMES = st.text(string.ascii_lowercase, min_size=1, max_size=6)
TEXTS = st.text("abE019 .,:;=+-*'\"[]{}()/^!#~_é", max_size=12)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS | st.just("^unet\\.conv")
VALUES = LEAVES | st.lists(LEAVES, max_size=3)
TREES = st.dictionaries(NAMES, VALUES | st.dictionaries(NAMES, VALUES, min_size=1, max_size=3), max_size=4)
TWO = ["experiment=taehv", "chain.a.experiment=taehv", "chain.b.experiment=taehv"]


def flat(tree, above=""):
    for name, value in tree.items():
        yield from flat(value, f"{above}{name}.") if isinstance(value, dict) else [(f"{above}{name}", value)]


@settings(deadline=None, max_examples=60)
@given(TREES)
@example({"a": "_é"})
def test_words_mean_what_the_stage_says(tree):
    own = {"experiment": "taehv", **{f"key_{name}": value for name, value in tree.items()}}
    [words] = chains.stages({"one": own}, []).values()
    parsed = OverridesParser.create().parse_overrides(words)
    assert {override.key_or_group: override.value() for override in parsed} == dict(flat(own))


def test_own_keys_win_and_words_about_the_chain_stay_out():
    chain = {"a": {"experiment": "x"}, "b": {"experiment": "y", "lr": 1e-5, "loader": {"workers": 0}}}
    words = ["experiment=both", "run=mine", "lr=1", "+loader.workers=3", "++chain.b.lr=1e-5", "steps=7"]
    assert chains.stages(chain, words) == {
        "a": ["run=mine-a", "lr=1", "+loader.workers=3", "steps=7", "experiment=x"],
        "b": ["run=mine-b", "steps=7", "experiment=y", "++lr=1e-05", "++loader.workers=0"],
    }


def test_groups_are_chosen_and_values_set_per_stage():
    words = [*TWO, "chain.b.optimizer=muon", 'chain.b.freeze_policy.train=["^encoder\\."]', "steps=3"]
    assert config.problems(words) == []
    chain = config.settings(words)["chain"]
    first, second = (config.settings(own) for own in config.stages(chain, words).values())
    assert first["steps"] == second["steps"] == 3 and first["chain"] == {}
    assert second["optimizer"]["_target_"] == "vireo.muon.Muon" and second["freeze_policy"]["train"] == ["^encoder\\."]
    assert first["optimizer"]["_target_"] != second["optimizer"]["_target_"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chain.b.lrr=1"], "chain.b: lrr: there is no such key. Did you mean lr?"),
        (["chain.b.optimizer=adamww"], "chain.b: optimizer=adamww: there is no such option"),
        (["chain.b.experiment=taehw"], "chain.b: experiment=taehw: there is no such option"),
        (["chain.c.lr=1"], "chain.c: is {'lr': 1}; an experiment is expected"),
        (["chain.b.init_from=x"], "chain.b.init_from: is not for a stage"),
        (["chain.b.chain.c.experiment=taehv"], "chain.b.chain: is not for a stage"),
    ],
)
def test_mistakes_of_a_stage_name_it(words, said):
    problems = config.problems([*TWO, *words])
    assert any(said in str(problem) for problem in problems), problems


def test_a_mistake_of_all_stages_is_told_once():
    [problem] = config.problems([*TWO, "steps=-1"])
    assert problem.key == "steps"


def test_a_chain_has_a_name_of_its_own_and_leaves_other_names_alone():
    plain = config.settings(["experiment=taehv"])
    assert config.config_hash(plain) == config.config_hash({**plain, "chain": {}})
    names = {config.settings([*TWO, f"chain.b.lr={lr}"])["run"] for lr in ("1e-4", "2e-4")}
    assert len(names) == 2 and plain["run"] not in names


def test_where_a_stage_starts_from_is_part_of_its_name_but_not_where_outputs_are():
    def hashed(outputs, source):
        return config.config_hash(config.settings([f"paths.outputs={outputs}"], init_from=f"{outputs}/{source}"))

    assert hashed("/here", "a/x/export") == hashed("/there", "a/x/export") != hashed("/here", "a/y/export")
