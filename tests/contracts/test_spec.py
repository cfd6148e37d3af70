"""What a policy may ask, and what of it is refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tasks.contracts.spec import LookPolicy, MetricGuard, Policy, RetrainSpec

CLASSIFY = {"kind": "classify", "instruction": "Which team?", "labels": ["billing", "support"]}
EXTRACT = {
    "kind": "extract",
    "instruction": "Read the price.",
    "json_schema": {"type": "object", "properties": {"amount": {"type": "number"}}},
}
CHAT = {"kind": "chat", "instruction": "Answer."}


def spec(policy: dict[str, Any], task: dict[str, Any] = CLASSIFY, **parts: Any) -> RetrainSpec:
    return RetrainSpec.model_validate(
        {
            "name": "tickets",
            "task": task,
            "data": {"source": "rows.jsonl"},
            "golden": {"path": "golden"},
            "base_model": "base",
            "policy": policy,
        }
        | parts
    )


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"alpha": 0.5, "min_improvement": 0.99},
        {"alpha": 1e-6},
        {"looks": "bonferroni", "declared_looks": 1},
        {"looks": "off"},
        {"looks": "ladder", "ladder_step": 0.5},
        {"objective": "non_inferior", "margin": 0.05},
        {"objective": "non_inferior_and_cheaper", "margin": 0.05, "min_saving": 0.5, "saving_in": "output_tokens"},
        {"guards": [{"margin": 0.1}, {"slice": "*", "margin": 0.1}, {"slice": "phone", "floor": 0.5}]},
        {"guards": [{"margin": 0.1, "floor": 0.5}]},
        {"max_latency_ratio": 1.2, "approval_hours": 720},
    ],
)
def test_what_a_policy_may_ask(policy: dict[str, Any]) -> None:
    made = spec(policy).policy
    for name, value in policy.items():
        if name != "guards":
            assert getattr(made, name) == value
    assert len(made.guards) == len(policy.get("guards", []))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"alpha": 0.0}, "greater than 0"),
        ({"alpha": 0.51}, "less than or equal to 0.5"),
        ({"alpha": float("nan")}, "less than or equal to 0.5"),
        ({"min_improvement": -0.01}, "greater than or equal to 0"),
        ({"min_improvement": 1.0}, "less than 1"),
        ({"looks": "bonferroni"}, "declared_looks goes with looks: bonferroni, and bonferroni needs it"),
        ({"declared_looks": 5}, "declared_looks goes with looks: bonferroni, and bonferroni needs it"),
        ({"looks": "bonferroni", "declared_looks": 0}, "greater than or equal to 1"),
        ({"looks": "bonferroni", "declared_looks": 10_001}, "less than or equal to 10000"),
        ({"looks": "ladder", "ladder_step": 0.0}, "greater than 0"),
        ({"looks": "sometimes"}, "'alpha_spending', 'bonferroni', 'ladder' or 'off'"),
        (
            {"objective": "non_inferior", "min_improvement": 0.01},
            "min_improvement is for the objective superior; non_inferior has margin",
        ),
        (
            {"objective": "non_inferior_and_cheaper", "min_improvement": 0.01},
            "min_improvement is for the objective superior; non_inferior_and_cheaper has margin",
        ),
        ({"objective": "non_inferior_and_cheaper", "min_saving": 1.0}, "less than 1"),
        ({"objective": "non_inferior_and_cheaper", "saving_in": "cost"}, "policy limits cost, which no evaluation of"),
        ({"max_cost_ratio": 1.0}, "policy limits cost, which no evaluation of a run has"),
        ({"max_latency_ratio": 0.0}, "greater than 0"),
        ({"approval_hours": 0}, "greater than 0"),
        ({"approval_hours": 721}, "less than or equal to 720"),
        ({"metric": "accuracy"}, "policy asks for accuracy, and this task has exact_match, valid_output, macro_f1"),
        ({"metric": "field:amount"}, "policy asks for field:amount, and this task has"),
        ({"metric": "a\nb"}, "should match pattern"),
        ({"guards": [{}]}, "a guard needs a margin or a floor"),
        ({"guards": [{"margin": 0.0}]}, "greater than 0"),
        ({"guards": [{"margin": 1.0}]}, "less than 1"),
        ({"guards": [{"floor": 1.0}]}, "less than 1"),
        ({"guards": [{"slice": "", "margin": 0.1}]}, "at least 1 character"),
        ({"guards": [{"metric": "cost", "margin": 0.1}]}, "policy asks for cost, and this task has"),
        (
            {"guards": [{"slice": "a", "suite": "b", "margin": 0.1}]},
            "a guard is about a slice of the golden set or about a suite, not both",
        ),
        (
            {"guards": [{"margin": 0.1}, {"floor": 0.5}]},
            "two guards are about the same metric of the same slice or suite",
        ),
        (
            {"guards": [{"suite": "general", "margin": 0.1}, {"suite": "other", "margin": 0.1}]},
            "policy.guards asks about suites that are not in `suites`: general, other",
        ),
    ],
)
def test_what_a_policy_may_not_ask(policy: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        spec(policy)
    assert message in str(refused.value)


def test_suites_are_named_once_and_guarded_by_name() -> None:
    suites = [{"name": "general", "path": "general"}, {"name": "old-tickets", "path": "old"}]
    guards = [{"suite": "general", "margin": 0.1}, {"suite": "general", "metric": "valid_output", "floor": 0.9}]
    made = spec({"guards": guards}, suites=suites)
    assert [suite.name for suite in made.suites] == ["general", "old-tickets"]
    assert [guard.suite for guard in made.policy.guards] == ["general", "general"]
    with pytest.raises(ValidationError, match="two suites have the same name"):
        spec({}, suites=[suites[0], suites[0] | {"path": "elsewhere"}])
    with pytest.raises(ValidationError, match=r"are not in `suites`: old\s"):
        spec({"guards": [{"suite": "old", "margin": 0.1}]}, suites=suites)
    for name in ("", "General", "a b", "1st", "x" * 64):
        with pytest.raises(ValidationError, match="should match pattern"):
            spec({}, suites=[{"name": name, "path": "general"}])
    with pytest.raises(ValidationError, match="should match pattern"):
        spec({}, suites=[suites[0] | {"digest": "abc"}])


def test_a_guard_of_a_suite_may_ask_for_what_the_runs_own_task_has_not() -> None:
    """The suite has a task of its own, which is known when it is opened."""
    guard = {"metric": "field:amount", "suite": "prices", "margin": 0.1}
    assert spec({"guards": [guard]}, suites=[{"name": "prices", "path": "prices"}]).policy.guards[0].suite == "prices"


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        (CLASSIFY, ("exact_match", "valid_output", "macro_f1")),
        (EXTRACT, ("exact_match", "valid_output", "field:amount", "field_match")),
        (EXTRACT | {"json_schema": {"type": "array"}}, ("exact_match", "valid_output")),
        (CHAT, ("exact_match", "valid_output")),
    ],
)
def test_each_kind_of_task_has_its_metrics(task: dict[str, Any], metrics: tuple[str, ...]) -> None:
    assert spec({}, task).task.metrics == metrics
    for metric in metrics:
        assert spec({"metric": metric, "guards": [{"metric": metric, "floor": 0.5}]}, task).policy.metric == metric


def test_two_guards_may_share_a_metric_on_different_parts() -> None:
    parts: list[dict[str, Any]] = [{}, {"slice": "*"}, {"slice": "phone"}, {"suite": "general"}]
    policy = Policy(guards=tuple(MetricGuard(**part, margin=0.1) for part in parts))
    assert len(policy.guards) == 4


def test_a_ladder_withholds_scores_from_the_evaluation() -> None:
    withheld = {look: spec({"looks": look, **more}).evaluation().withhold_scores for look, more in {
        "alpha_spending": {}, "bonferroni": {"declared_looks": 3}, "ladder": {}, "off": {},
    }.items()}  # fmt: skip
    assert withheld == {look.value: look is LookPolicy.LADDER for look in LookPolicy}


def test_a_bare_off_of_yaml_is_off() -> None:
    """YAML reads `off` as false."""
    data = {"source": "rows.jsonl", "secrets": False, "personal_data": False}
    made = spec({"looks": False}, data=data, curate={"suspects": False, "poisoning": False})
    assert made.policy.looks is LookPolicy.OFF
    assert (made.data.secrets, made.data.personal_data) == ("off", "off")
    assert (made.curate.suspects, made.curate.poisoning) == ("off", "off")
    with pytest.raises(ValidationError, match=r"curate\.balance"):
        spec({}, curate={"balance": False})
