"""Policies: the prior's numbers, which rule wins, files that round-trip, errors that say place and repair."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsepass.errors import PolicyError
from sparsepass.policies.file import schema
from sparsepass.policies.policy import (
    POLICY_ENV,
    POWERS,
    Policy,
    builtin_policy,
    prior_density,
    published_policy,
    resolve_policy,
)
from sparsepass.policies.rule import Ranges, Rule
from sparsepass.rewriting.ops import text_for
from sparsepass.types import DENSE, Budget, LengthBucket, TaskClass

K = 1024
HINTED = [member for member in TaskClass if member is not TaskClass.DENSE]


def pooled(density: float, **params: Any) -> Budget:
    return Budget("pooled_topk", {"density": density, **params})


# The prior


@pytest.mark.parametrize(
    ("task", "low", "density"),
    [
        ("single_qa", 16 * K, 0.10),
        ("single_qa", 64 * K, 0.05),
        ("single_qa", 4 * K, 0.20),
        ("single_qa", K, 0.40),
        ("single_qa", 256 * K, 0.03),
        ("multi_qa", 16 * K, 0.30),
        ("multi_qa", 256 * K, 0.10),
        ("multi_hop", 16 * K, 0.60),
        ("aggregation", 16 * K, 0.60),
        ("unknown", 16 * K, 0.60),
        ("unknown", 64 * K, 0.33),
        ("multi_hop", 4 * K, 1.0),
        ("single_qa", 0, 1.0),
    ],
)
def test_prior_in_numbers(task: str, low: int, density: float) -> None:
    assert prior_density(TaskClass(task), low) == pytest.approx(density)


def test_builtin_policy_uses_the_lower_edge_and_is_dense_at_density_one() -> None:
    policy = builtin_policy()
    assert policy.bucket(16 * K) == LengthBucket(8 * K, 16 * K)
    assert policy.budget(TaskClass.SINGLE_QA, policy.bucket(16 * K + 1)) == pooled(0.10)
    assert policy.budget(TaskClass.SINGLE_QA, policy.bucket(K)) == DENSE
    assert policy.budget(TaskClass.UNKNOWN, policy.bucket(4 * K + 1)) == DENSE
    for bucket in policy.buckets:
        assert policy.budget(TaskClass.DENSE, bucket) == DENSE


def test_prior_never_asks_for_less_of_a_harder_class_or_more_of_a_longer_request() -> None:
    for shorter, longer in itertools.pairwise(POWERS):
        densities = [prior_density(task, longer) for task in HINTED]
        assert densities == sorted(densities)
        assert all(prior_density(task, shorter) >= prior_density(task, longer) for task in HINTED)


def test_published_policy_has_a_method_per_task_class() -> None:
    """Vertical-slash for retrieval, blocks for the rest; densities, and what is dense, as in the prior."""
    policy, prior = published_policy(), builtin_policy()
    assert policy.buckets == prior.buckets
    for bucket, task in itertools.product(prior.buckets, TaskClass):
        found, known = policy.budget(task, bucket), prior.budget(task, bucket)
        if task in ("single_qa", "multi_qa") and not known.dense:
            assert found == Budget("vertical_slash", dict(known.params))
        else:
            assert found == known
    bucket = policy.bucket(32 * K)
    assert policy.site_budget(TaskClass.SINGLE_QA, bucket, 3, 32).method == "vertical_slash"
    assert policy.site_budget(TaskClass.AGGREGATION, bucket, 3, 32).method == "pooled_topk"
    assert Policy.from_json(policy.to_json()) == policy
    assert policy.fingerprint != prior.fingerprint


# Buckets


@settings(deadline=None)
@given(st.lists(st.integers(1, 3_000_000), max_size=6), st.integers(1, 5_000_000))
def test_buckets_partition_all_lengths(edges: list[int], length: int) -> None:
    policy = Policy(rules=tuple(Rule(None, DENSE, up_to=edge) for edge in edges))
    assert [bucket for bucket in policy.buckets if length in bucket] == [policy.bucket(length)]
    highs = {bucket.high for bucket in policy.buckets}
    assert highs == {*POWERS, *edges, None}


def test_an_edge_is_the_last_length_of_its_bucket() -> None:
    """As a policy has it, and as the op reads it from the text of several buckets."""
    for length in (4096, 4097):
        text = text_for("4096=pooled_topk:0.1;*=pooled_topk:0.2", length)
        assert text == ("pooled_topk:0.1" if length in LengthBucket(0, 4096) else "pooled_topk:0.2")
        assert (length in LengthBucket(4096, None)) is (length == 4097)
        assert text_for("dense", length) == "dense"


def test_length_under_one_has_no_bucket() -> None:
    with pytest.raises(PolicyError, match="1 token or more"):
        builtin_policy().bucket(0)


def test_bucket_cut_by_a_rule_is_refused() -> None:
    policy = Policy(rules=(Rule(None, pooled(0.1), above=3000),))
    with pytest.raises(PolicyError, match="cut by a rule at 3000"):
        policy.budget(TaskClass.UNKNOWN, LengthBucket(2048, 4096))


# Rules

RULES = Policy(
    rules=(
        Rule(None, pooled(0.5), above=8 * K),
        Rule(TaskClass.SINGLE_QA, pooled(0.1), above=8 * K, up_to=64 * K),
        Rule(TaskClass.SINGLE_QA, pooled(0.2), above=8 * K, layers=Ranges.parse("0-1,30-"), heads=Ranges.parse("3")),
        Rule(TaskClass.MULTI_HOP, DENSE, layers=Ranges.parse("2")),
    )
)


@pytest.mark.parametrize(
    ("task", "length", "layer", "head", "expected"),
    [
        ("unknown", 16 * K, 0, 0, pooled(0.5)),
        ("unknown", 8 * K, 0, 0, DENSE),  # the default
        ("single_qa", 16 * K, 5, 3, pooled(0.1)),
        ("single_qa", 16 * K, 31, 3, pooled(0.2)),  # later rules win
        ("single_qa", 16 * K, 31, 4, pooled(0.1)),
        ("single_qa", 16 * K, 5, None, pooled(0.1)),
        ("single_qa", 16 * K, 1, None, pooled(0.2)),  # unknown head: the most cautious
        ("single_qa", 16 * K, None, 0, pooled(0.1)),
        ("single_qa", 16 * K, None, None, pooled(0.2)),
        ("single_qa", 100 * K, 5, 3, pooled(0.5)),
        ("multi_hop", 16 * K, 2, 0, DENSE),
        ("multi_hop", 16 * K, 3, 0, pooled(0.5)),
        ("multi_hop", 16 * K, None, 0, DENSE),
        ("dense", 16 * K, 0, 0, DENSE),  # "*" is not for it
    ],
)
def test_which_rule_wins(task: str, length: int, layer: int | None, head: int | None, expected: Budget) -> None:
    assert RULES.budget(TaskClass(task), RULES.bucket(length), layer, head) == expected


def test_site_budget_joins_the_heads() -> None:
    bucket = RULES.bucket(16 * K)
    assert RULES.site_budget(TaskClass.SINGLE_QA, bucket, 5, 4) == pooled(0.1)
    joined = pooled(0.2, head_densities=(0.1, 0.1, 0.1, 0.2))
    assert RULES.site_budget(TaskClass.SINGLE_QA, bucket, 0, 4) == joined
    budgets = RULES.budgets_for_heads(TaskClass.SINGLE_QA, bucket, 0, 4)
    assert budgets == (pooled(0.1),) * 3 + (pooled(0.2),)


def test_head_densities_must_fit_the_model() -> None:
    policy = Policy(rules=(Rule(None, pooled(0.2, head_densities=(0.1, 0.2)), layers=Ranges.parse("3")),))
    bucket = policy.bucket(16 * K)
    assert policy.budget(TaskClass.UNKNOWN, bucket, 3, 0) == pooled(0.1)
    assert policy.site_budget(TaskClass.UNKNOWN, bucket, 3, 2) == pooled(0.2, head_densities=(0.1, 0.2))
    assert policy.site_budget(TaskClass.UNKNOWN, bucket, 0, 8) == DENSE  # another layer
    with pytest.raises(PolicyError, match="for 2 heads, used at a layer of 8"):
        policy.site_budget(TaskClass.UNKNOWN, bucket, 3, 8)


def test_unknown_layer_gets_the_dial_that_computes_most() -> None:
    """A greater alpha keeps less: the least of them is the cautious one, whatever its text sorts like."""
    rules = (
        Rule(TaskClass.SINGLE_QA, Budget("threshold", {"alpha": 0.18})),
        Rule(TaskClass.SINGLE_QA, Budget("threshold", {"alpha": 0.08}), layers=Ranges(((3, 5),))),
    )
    policy = Policy(name="two alphas", default="dense", rules=rules)
    bucket = policy.bucket(16 * K)
    assert policy.budget(TaskClass.SINGLE_QA, bucket, layer=None) == Budget("threshold")  # 0.08 is the default
    assert policy.budget(TaskClass.SINGLE_QA, bucket, layer=0) == Budget("threshold", {"alpha": 0.18})


def test_unknown_layer_with_differing_heads_or_methods_is_cautious() -> None:
    one = Rule(None, pooled(0.2, head_densities=(0.1, 0.2)), layers=Ranges.parse("1"))
    two = Rule(None, pooled(0.2, head_densities=(0.2, 0.1)), layers=Ranges.parse("2"))
    every = Rule(None, pooled(0.05))
    bucket = builtin_policy().bucket(16 * K)
    assert Policy(rules=(every, one, two)).budget(TaskClass.UNKNOWN, bucket) == pooled(0.2)
    block = Rule(None, pooled(0.2, block=64), layers=Ranges.parse("2"))
    assert Policy(rules=(every, block)).budget(TaskClass.UNKNOWN, bucket) == DENSE


RANGES = st.lists(st.tuples(st.integers(0, 40), st.none() | st.integers(0, 9)), min_size=1, max_size=5).map(
    lambda spans: Ranges(tuple((first, None if more is None else first + more) for first, more in spans))
)


@settings(deadline=None)
@given(RANGES, st.integers(0, 60))
def test_ranges_read_what_they_write(ranges: Ranges, number: int) -> None:
    assert Ranges.parse(str(ranges)) == ranges
    assert str(Ranges.parse(str(ranges))) == str(ranges)
    listed = [part.split("-") for part in str(ranges).split(",")]
    assert (number in ranges) == any(
        int(part[0]) <= number and (part[-1] == "" or number <= int(part[-1])) for part in listed
    )


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1,,2", "1--2", "1.5", "²"])
def test_bad_ranges(text: str) -> None:
    with pytest.raises(PolicyError, match=r"accepted|rise"):
        Ranges.parse(text)


def test_bad_rules_and_policies() -> None:
    with pytest.raises(PolicyError, match="always dense"):
        Rule(TaskClass.DENSE, DENSE)
    with pytest.raises(PolicyError, match="above < up_to"):
        Rule(None, DENSE, above=5, up_to=5)
    with pytest.raises(PolicyError, match="one of the two"):
        Rule(None, pooled(0.1, head_densities=(0.1,)), heads=Ranges.parse("0"))
    with pytest.raises(PolicyError, match="empty"):
        Ranges(())
    with pytest.raises(PolicyError, match="'dense' and 'prior'"):
        Policy(default="sparse")  # type: ignore[arg-type]


# Files

BUDGETS = st.one_of(
    st.just(DENSE),
    st.builds(pooled, st.floats(0, 1, exclude_min=True)),
    st.builds(pooled, st.floats(0, 1, exclude_min=True), block=st.sampled_from([64, 128])),
)
POLICIES = st.builds(
    Policy,
    name=st.text(min_size=1),
    description=st.text(),
    default=st.sampled_from(["dense", "prior"]),
    rules=st.lists(
        st.builds(
            Rule,
            task=st.none() | st.sampled_from(HINTED),
            budget=BUDGETS,
            above=st.integers(0, 500_000),
            up_to=st.none() | st.integers(500_001, 2_000_000),
            layers=st.none() | RANGES,
            heads=st.none() | RANGES,
        ),
        max_size=4,
    ).map(tuple),
)


@settings(deadline=None)
@given(POLICIES)
def test_json_round_trips_exactly(policy: Policy) -> None:
    read = Policy.from_json(json.loads(json.dumps(policy.to_json())))
    assert read == policy
    assert read.to_json() == policy.to_json()
    assert read.fingerprint == policy.fingerprint
    assert hash(read) == hash(policy)


@settings(deadline=None, max_examples=30)
@given(POLICIES, st.sampled_from(HINTED), st.integers(1, 2_000_000), st.none() | st.integers(0, 50))
def test_any_policy_gives_a_budget_everywhere(policy: Policy, task: TaskClass, length: int, layer: int | None) -> None:
    bucket = policy.bucket(length)
    per_head = {policy.budget(task, bucket, layer, head) for head in range(60)}
    cautious = policy.budget(task, bucket, layer)
    assert cautious in per_head or cautious == DENSE
    if len(per_head) == 1 and layer is not None:
        assert policy.site_budget(task, bucket, layer, 60) == cautious


def test_files_round_trip_and_seal(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    RULES.save(path)
    assert Policy.load(path) == RULES
    RULES.save(path, seal=True)
    assert Policy.load(path) == RULES
    path.write_text(path.read_text().replace("0.5", "0.4"))
    with pytest.raises(PolicyError, match=r"/fingerprint.*edited since it was sealed"):
        Policy.load(path)


def test_fingerprint_is_stable_and_follows_what_decides_budgets() -> None:
    code = "from sparsepass.policies.policy import builtin_policy; print(builtin_policy().fingerprint)"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert out.strip() == builtin_policy().fingerprint
    assert dataclasses.replace(RULES, name="other", description="x").fingerprint == RULES.fingerprint
    assert dataclasses.replace(RULES, default="prior").fingerprint != RULES.fingerprint
    assert dataclasses.replace(RULES, rules=RULES.rules[::-1]).fingerprint != RULES.fingerprint


def test_schema_is_itself_valid() -> None:
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(schema())


GOOD: dict[str, Any] = {"version": 1, "rules": [{"task": "*", "budget": {"method": "pooled_topk", "density": 0.1}}]}


def with_rule(**fields: Any) -> dict[str, Any]:
    return {"version": 1, "rules": [GOOD["rules"][0], {**GOOD["rules"][0], **fields}]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "at /: .*array.*accepted: object"),
        ({}, "'version', 'rules' is missing"),
        ({**GOOD, "version": 2}, "/version: .*version 2.*up to 1; upgrade"),
        ({**GOOD, "version": "1"}, "/version: '1' is of type string; accepted: integer"),
        ({**GOOD, "ruls": []}, "unknown field 'ruls'. Did you mean 'rules'"),
        ({**GOOD, "default": "dens"}, "/default: 'dens' is not accepted. Did you mean 'dense'"),
        (with_rule(task="single_qs"), "/rules/1/task: 'single_qs'.*Did you mean 'single_qa'"),
        (with_rule(task="dense"), "/rules/1/task: 'dense'.*always dense"),
        (with_rule(lenghts={}), "/rules/1: unknown field 'lenghts'. Did you mean 'lengths'"),
        (with_rule(lengths={"above": -1}), "/rules/1/lengths/above: .*minimum"),
        (with_rule(lengths={"above": 1.5}), "/rules/1/lengths/above: 1.5 is of type number; accepted: integer"),
        (with_rule(lengths={"above": 9, "up_to": 8}), "/rules/1: .*above < up_to"),
        (with_rule(layers="0-x"), "/rules/1/layers: '0-x'.*0-3,7,20-"),
        (with_rule(layers="3-1"), "/rules/1/layers: .*from 3 to 1"),
        (with_rule(heads=3), "/rules/1/heads: 3 is of type integer; accepted: string"),
        (with_rule(budget={}), "/rules/1/budget: 'method' is missing"),
        (with_rule(budget={"method": "quest"}), "/rules/1/budget: Unknown method 'quest'. Known: .*'dense'"),
        (with_rule(budget={"method": "pooled_topk"}), "/rules/1/budget: .*needs 'density'"),
        (with_rule(budget={"method": "pooled_topk", "density": 2}), "/rules/1/budget: .*density is 2; accepted"),
        (with_rule(budget={"method": "pooled_topk", "gamma": 2}), "/rules/1/budget: Unknown parameter 'gamma'"),
    ],
)
def test_file_errors_name_file_place_and_repair(tmp_path: Path, data: Any, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PolicyError, match=message) as caught:
        Policy.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON: .*line 1"),
        ('{"version": 1, "version": 1, "rules": []}', "'version' is given twice"),
        ('{"version": NaN, "rules": []}', "NaN is not a JSON number"),
        ("[" * 100_000, "mine.json"),
    ],
)
def test_files_that_are_no_json(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(PolicyError, match=message):
        Policy.load(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.sampled_from(["*", "dense", "1-"]),
    lambda sub: (
        st.lists(sub, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["version", "rules", "task", "budget", "method", "density", "layers", "lengths", "above", "x"]
            ),
            sub,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(JSON)
def test_any_json_is_read_or_refused_with_a_policy_error(data: Any) -> None:
    for candidate in (data, {"version": 1, "rules": [data]}, with_rule(budget=data), with_rule(lengths=data)):
        message = "policy: at /"
        try:
            Policy.from_json(candidate)
        except PolicyError as error:
            message = str(error)
        assert message.startswith("policy: at /")


def test_resolve_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(POLICY_ENV, raising=False)
    assert resolve_policy() == resolve_policy("prior") == builtin_policy()
    assert resolve_policy("published") == published_policy()
    assert resolve_policy(RULES) is RULES
    path = tmp_path / "policy.json"
    RULES.save(path)
    assert resolve_policy(path) == resolve_policy(str(path)) == RULES
    assert resolve_policy(path) is resolve_policy(str(path))  # read once
    monkeypatch.setenv(POLICY_ENV, str(path))
    assert resolve_policy() == RULES
    assert resolve_policy("prior") == builtin_policy()
    builtin_policy().save(path)
    assert resolve_policy() == builtin_policy()  # read again once changed
    monkeypatch.setenv(POLICY_ENV, str(tmp_path / "none.json"))
    with pytest.raises(PolicyError, match=r"none\.json.*cannot be read.*'prior'"):
        resolve_policy()
    with pytest.raises(PolicyError, match="accepted are a Policy"):
        resolve_policy(3)  # type: ignore[arg-type]


def test_reading_without_jsonschema_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    assert builtin_policy().buckets  # all else works
    with pytest.raises(PolicyError, match="pip install jsonschema"):
        Policy.from_json(GOOD)


def test_the_documented_file_is_read_and_means_what_the_text_says() -> None:
    text = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    example = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert example is not None
    policy = Policy.from_json(json.loads(example[1]))
    assert policy.budget(TaskClass.SINGLE_QA, policy.bucket(40_000), layer=3) == pooled(0.08)


def test_a_file_of_the_same_size_and_time_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    found = []
    for density in (0.1, 0.9):
        rule = {"task": "*", "budget": {"method": "pooled_topk", "density": density}}
        path.write_text(json.dumps({"version": 1, "rules": [rule]}), encoding="utf-8")
        os.utime(path, (1_700_000_000, 1_700_000_000))
        found.append(resolve_policy(path).rules[0].budget.params["density"])
    assert found == [0.1, 0.9]
