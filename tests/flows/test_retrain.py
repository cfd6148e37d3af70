"""The whole flow, every part real but the size of the model: promoted, rejected, inconclusive, forced, and refused.

Trainings take seconds, so the tests share them: one store, and for each chapter a model's name and a ledger of its own.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType
from prefect.client.orchestration import get_client

from flows.evaluate import evaluate
from flows.retrain import retrain
from goldgate.verify import Finding, verify
from tasks.contracts.errors import (
    DataError,
    GoldenSetError,
    GoldgateError,
    LeakageError,
    LedgerError,
    SpecError,
    StoreError,
)
from tasks.contracts.references import (
    CONTAMINATION_FILE,
    Approval,
    ContaminationReport,
    Outcome,
    ReleaseKind,
    Requirement,
    RunResult,
    Status,
    Verdict,
)
from tasks.contracts.spec import (
    DataSpec,
    EvaluateSpec,
    GoldenSpec,
    Override,
    Policy,
    PromptKind,
    RetrainSpec,
    SuiteSpec,
    TaskKind,
    TaskSpec,
)
from tasks.data.golden import freeze
from tasks.gate.ledger import Ledger, LookRecord, ledger_url
from tasks.store import Store, digest_file
from tests.prefect_server import prefect_server
from tests.toys import LABELS, toy_rows, toy_spec, write_jsonl

pytestmark = pytest.mark.timeout(600)  # whoever comes first starts the server and trains

ADA = Override(by="Ada Lovelace", reason="the old one is wrong on refunds")


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_server():
        yield


def rows(seed: int = 1) -> list[dict[str, str]]:
    """Toy rows from two channels, which the golden set keeps as slices."""
    toys = toy_rows(400, seed=seed)
    return [row | {"channel": ("phone", "mail")[number // 2 % 2]} for number, row in enumerate(toys)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> RetrainSpec:
    """A spec over toy rows, a frozen golden set and a tiny model, in one store."""
    folder = tmp_path_factory.mktemp("world")
    return toy_spec(
        folder,
        rows(),
        slice_field="channel",
        evaluate=EvaluateSpec(max_new_tokens=8, batch_size=40, baseline_shots=2, baseline_dev_items=20),
    )


def on_shuffled_labels(spec: RetrainSpec) -> RetrainSpec:
    """The same with labels that say nothing."""
    source = Path(spec.data.source).with_name("shuffled.jsonl")
    if not source.exists():
        labels = [row["label"] for row in rows()]
        random.Random(3).shuffle(labels)
        write_jsonl(source, [row | {"label": label} for row, label in zip(rows(), labels, strict=True)])
    return spec.model_copy(update={"data": spec.data.model_copy(update={"source": str(source)})})


def with_seed(spec: RetrainSpec, seed: int) -> RetrainSpec:
    return spec.model_copy(update={"train": spec.train.model_copy(update={"seed": seed})})


def chapter(spec: RetrainSpec, name: str, **policy: Any) -> RetrainSpec:
    """The same trainings under another model's name, another policy and another ledger, so that looks start at 1."""
    ledger = Path(spec.execution.store).with_name(f"{name}.db")
    return spec.model_copy(
        update={
            "name": name,
            "policy": Policy(**policy),
            "execution": spec.execution.model_copy(update={"ledger": str(ledger)}),
        }
    )


class Ran(NamedTuple):
    """How a run ended."""

    state: str
    result: RunResult

    @property
    def verdict(self) -> Verdict:
        return self.result.verdict

    @property
    def record(self) -> dict[str, Any]:
        """The run folder's `verdict.json`."""
        record = json.loads((Path(self.result.folder) / "verdict.json").read_text())
        assert isinstance(record, dict)
        return record

    @property
    def report(self) -> str:
        return (Path(self.result.folder) / "report.html").read_text()


def run(spec: RetrainSpec, **people: Any) -> Ran:
    state = retrain(spec, return_state=True, **people)
    result = state.result()
    assert isinstance(result, RunResult)
    return Ran(str(state.name), result)


def mlflow(spec: RetrainSpec) -> MlflowClient:
    return MlflowClient(spec.execution.tracking_uri, spec.execution.tracking_uri)


def aliases(spec: RetrainSpec) -> dict[str, str]:
    """Aliases of the registered model; empty when it is not there."""
    found = mlflow(spec).search_registered_models(f"name = '{spec.name}'")
    return {alias: str(version) for alias, version in found[0].aliases.items()} if found else {}


def looks(spec: RetrainSpec) -> tuple[LookRecord, ...]:
    with Ledger.open(ledger_url(spec.execution)) as ledger:
        (page,) = ledger.pages()
        return ledger.looks(page.page)


def decisions(spec: RetrainSpec) -> list[tuple[str, str, str, str | None]]:
    with Ledger.open(ledger_url(spec.execution)) as ledger:
        return [
            (one.kind.value, one.by, one.model, one.outcome.value if one.outcome else None)
            for one in ledger.decisions(spec.name)
        ]


def made(spec: RetrainSpec, step: str) -> int:
    """How many finished artefacts of a step the store has."""
    return len(list(Store(spec.execution.store).list(step)))


def requirement(verdict: Verdict, **about: Any) -> Requirement:
    found = [one for one in verdict.requirements if all(getattr(one, name) == about[name] for name in about)]
    assert len(found) == 1, [one.model_dump() for one in verdict.requirements]
    return found[0]


# -- verdicts, and the looks that they take -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def promoted(world: RetrainSpec) -> Ran:
    return run(world)


@pytest.fixture(scope="module")
def rejected(world: RetrainSpec, promoted: Ran) -> Ran:
    return run(on_shuffled_labels(world))


@pytest.fixture(scope="module")
def inconclusive(world: RetrainSpec, rejected: Ran) -> Ran:
    return run(with_seed(world, 18))


def test_a_better_candidate_is_promoted_and_a_second_run_reuses_it(world: RetrainSpec, promoted: Ran) -> None:
    assert promoted.state == "Promoted"
    result = promoted.result
    assert result.verdict.outcome is Outcome.PROMOTE
    assert result.release.kind is ReleaseKind.BY_VERDICT
    assert result.registered is not None
    assert (result.registered.version, result.registered.alias) == ("1", "champion")
    assert result.verdict.digests["candidate"] == result.registered.digest
    assert {row.slice for row in result.verdict.metrics} == {None, "phone", "mail"}
    assert aliases(world) == {"champion": "1"}
    assert promoted.record["verdict"] == "promote"
    assert "Promote" in promoted.report

    again = run(world)
    assert again.state == "Promoted"
    assert again.verdict == result.verdict
    assert again.result.registered == result.registered
    assert aliases(world) == {"champion": "1"}
    assert len(looks(world)) == 1, "the same question is no new look"


def test_a_promotion_is_certified_before_it_is_registered(world: RetrainSpec, promoted: Ran) -> None:
    found = verify("models:/tickets/1", world.execution)
    assert found.holds, found
    details = {check.what: check.detail for check in found.checks}
    assert details["release"] == "promoted by its verdict"
    assert details["verdict"].startswith("PROMOTE, computed again from 80 items")
    assert {check.what: check.finding for check in found.checks}["contamination"] is Finding.OK


def test_a_candidate_trained_on_shuffled_labels_is_rejected(world: RetrainSpec, rejected: Ran) -> None:
    assert rejected.state == "Rejected"
    assert rejected.verdict.baseline.role == "champion"
    assert rejected.result.registered is None
    assert rejected.result.release.kind is ReleaseKind.NOT_PROMOTED
    assert rejected.record["registered"] is None


def test_the_same_recipe_with_another_seed_is_inconclusive(world: RetrainSpec, inconclusive: Ran) -> None:
    assert inconclusive.state == "Inconclusive"
    assert inconclusive.result.registered is None


def test_looks_are_numbered_and_each_may_spend_less(
    world: RetrainSpec, promoted: Ran, rejected: Ran, inconclusive: Ran
) -> None:
    verdicts = [ran.verdict for ran in (promoted, rejected, inconclusive)]
    taken = [verdict.look for verdict in verdicts]
    assert [look.number for look in taken] == [1, 2, 3]
    assert [look.level for look in taken] == pytest.approx([0.05 / 2, 0.05 / 6, 0.05 / 12])
    assert [look.spent for look in taken] == pytest.approx([0.05 / 2, 0.05 * 2 / 3, 0.05 * 3 / 4])
    assert [look.promotions for look in taken] == [0, 1, 1]
    assert [requirement(verdict, decides=True).level for verdict in verdicts] == [look.level for look in taken]
    kept = looks(world)[:3]
    assert [look.outcome for look in kept] == [Outcome.PROMOTE, Outcome.REJECT, Outcome.INCONCLUSIVE]
    assert [look.candidate for look in kept] == [verdict.candidate.digest for verdict in verdicts]


# -- a person's word against the verdict ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forced(world: RetrainSpec, inconclusive: Ran) -> Ran:
    return run(on_shuffled_labels(world), override=ADA)


def test_a_promotion_cannot_be_overridden(world: RetrainSpec, promoted: Ran) -> None:
    with pytest.raises(SpecError, match="nothing to override: the verdict is PROMOTE"):
        retrain(world, override=ADA)


def test_an_override_meant_for_another_candidate_is_refused(world: RetrainSpec, inconclusive: Ran) -> None:
    spec, before = with_seed(world, 18), (aliases(world), decisions(world))
    meant = ADA.model_copy(update={"candidate": "f" * 64})
    with pytest.raises(SpecError, match=r"candidate is .* and the person decided about ffffffffffff") as caught:
        retrain(spec, override=meant)
    assert caught.value.where == "override.candidate"
    assert (aliases(world), decisions(world)) == before


def test_a_rejected_candidate_is_promoted_on_a_persons_word(world: RetrainSpec, rejected: Ran, forced: Ran) -> None:
    assert forced.state == "Forced promotion"
    assert forced.verdict == rejected.verdict, "the verdict stays what it was"
    assert forced.result.registered is not None
    assert forced.result.registered.previous_version == "1"
    assert aliases(world) == {"champion": "2", "previous": "1"}
    assert len(looks(world)) == 3

    tags = mlflow(world).get_model_version("tickets", "2").tags
    release = json.loads(tags["goldgate.release"])
    assert (release["kind"], release["by"], release["reason"]) == ("forced", ADA.by, ADA.reason)
    assert tags["goldgate.verdict"] == "reject"
    assert (
        mlflow(world)
        .get_model_version("tickets", "2")
        .description.startswith("**FORCED PROMOTION. The verdict was REJECT.**")
    )
    candidate = forced.verdict.candidate.digest
    assert decisions(world) == [("forced_promotion", ADA.by, candidate, "reject")]

    assert forced.record["release"]["kind"] == "forced"
    assert forced.record["verdict"] == "reject"
    for said in ("Forced promotion", f"Forced by {ADA.by}", ADA.reason):
        assert said in forced.report

    found = verify("models:/tickets@champion", world.execution)
    assert found.holds, found
    details = {check.what: check.detail for check in found.checks}
    assert details["verdict"].startswith("REJECT, computed again")
    assert details["release"].startswith(f"forced against its verdict by {ADA.by} on ")

    again = run(on_shuffled_labels(world), override=ADA)
    assert again.result.registered == forced.result.registered
    assert len(decisions(world)) == 1, "said twice, it is one decision"


def test_a_champion_by_override_is_named_wherever_it_is_the_baseline(world: RetrainSpec, forced: Ran) -> None:
    ran = run(with_seed(world, 18))
    assert ran.state == "Promoted"
    assert ran.verdict.look.number == 4
    assert ran.verdict.baseline.label == "champion v2"
    assert ran.record["champion_release"]["kind"] == "forced"
    assert f"champion by override: forced against its verdict by {ADA.by}" in ran.report
    assert aliases(world) == {"champion": "3", "previous": "2"}


# -- a person is asked ----------------------------------------------------------------------------------------------


def answer(ran: Ran, approve: bool, **changes: str) -> Approval:
    said = {"by": "Grace Hopper", "comment": "read the lost items", "candidate": ran.verdict.candidate.digest}
    return Approval(approve=approve, **(said | changes))


def test_a_promotion_waits_for_a_person_who_approves(world: RetrainSpec) -> None:
    # The budget is for one look, so all that follows goes on while it is spent.
    spec = chapter(world, "approved", approval_hours=1, looks="bonferroni", declared_looks=1)
    waiting = run(spec)
    assert waiting.state == "Awaiting approval"
    assert waiting.verdict.outcome is Outcome.PROMOTE
    assert waiting.result.release.kind is ReleaseKind.AWAITING
    assert waiting.result.registered is None
    assert aliases(spec) == {}
    assert decisions(spec) == []
    assert "goldgate approve" in waiting.report

    with pytest.raises(SpecError, match="decided about eeeeeeeeeeee") as caught:
        retrain(spec, approval=answer(waiting, True, candidate="e" * 64))
    assert caught.value.where == "approval.candidate"
    assert (aliases(spec), decisions(spec)) == ({}, [])

    done = run(spec, approval=answer(waiting, True))
    assert done.state == "Promoted"
    assert done.verdict == waiting.verdict
    assert (done.result.release.kind, done.result.release.by) == (ReleaseKind.APPROVED, "Grace Hopper")
    assert aliases(spec) == {"champion": "1"}
    assert decisions(spec) == [("approved", "Grace Hopper", done.verdict.candidate.digest, "promote")]
    assert "Approved by Grace Hopper" in done.report
    found = verify("models:/approved@champion", spec.execution)
    assert found.holds, found
    details = {check.what: check.detail for check in found.checks}
    assert details["release"].startswith("promoted by its verdict, and approved by Grace Hopper on ")
    assert details["release"].endswith(": read the lost items")

    again = run(spec)
    assert again.state == "Promoted"
    assert again.result.release == done.result.release, "the answer stands"
    assert again.result.registered == done.result.registered
    assert len(looks(spec)) == len(decisions(spec)) == 1


def test_a_promotion_that_is_declined_stays_declined(world: RetrainSpec) -> None:
    spec = chapter(world, "declined", approval_hours=1)
    waiting = run(spec)
    declined = run(spec, approval=answer(waiting, False, comment="not before May"))
    assert declined.state == "Declined"
    assert declined.result.release.kind is ReleaseKind.DECLINED
    assert declined.result.registered is None
    assert "Declined by Grace Hopper" in declined.report
    assert run(spec).state == "Declined"
    assert aliases(spec) == {}
    assert [kind for kind, *_ in decisions(spec)] == ["declined"]
    assert len(looks(spec)) == 1


def test_an_answer_where_nobody_is_asked_changes_nothing(world: RetrainSpec, rejected: Ran, inconclusive: Ran) -> None:
    ran = run(on_shuffled_labels(chapter(world, "unasked")), approval=answer(rejected, True))
    assert ran.state != "Promoted"
    assert ran.result.registered is None
    assert decisions(chapter(world, "unasked")) == []


# -- guards ---------------------------------------------------------------------------------------------------------


def test_guards_that_hold_let_a_promotion_through(world: RetrainSpec, promoted: Ran) -> None:
    guards = [{"metric": "exact_match", "floor": 0.9}, {"metric": "exact_match", "slice": "*", "margin": 0.1}]
    ran = run(chapter(world, "guards", guards=guards))
    assert ran.state == "Promoted"
    assert {(one.ask.value, one.slice, one.status) for one in ran.verdict.requirements} == {
        ("superior", None, Status.SHOWN),
        ("floor", None, Status.SHOWN),
        ("non_inferior", "phone", Status.SHOWN),
        ("non_inferior", "mail", Status.SHOWN),
    }
    assert len(ran.record["requirements"]) == 4
    assert verify("models:/guards@champion", chapter(world, "guards").execution).holds


def test_a_floor_that_is_only_seen_and_not_shown_stops_a_promotion(world: RetrainSpec, promoted: Ran) -> None:
    spec = chapter(world, "floor", guards=[{"metric": "exact_match", "floor": 0.99}])
    ran = run(spec)
    assert ran.state == "Inconclusive"
    assert requirement(ran.verdict, decides=True).status is Status.SHOWN
    floor = requirement(ran.verdict, decides=False)
    assert (floor.status, floor.estimate) == (Status.OPEN, 1.0)
    assert any("99.0 %" in reason for reason in ran.verdict.reasons)
    assert ran.verdict.items_to_settle is not None
    assert aliases(spec) == {}


def test_a_slice_is_judged_on_its_own_items(world: RetrainSpec, promoted: Ran) -> None:
    # 0.025 one-sided: all of 80 right shows more than 95 %, all of 40 right does not.
    guards = [{"metric": "exact_match", "floor": 0.94}, {"metric": "exact_match", "slice": "phone", "floor": 0.94}]
    ran = run(chapter(world, "slice", guards=guards))
    assert ran.state == "Inconclusive"
    whole, phone = (requirement(ran.verdict, decides=False, slice=slice_) for slice_ in (None, "phone"))
    assert (whole.status, whole.n) == (Status.SHOWN, 80)
    assert phone.status is Status.OPEN
    assert phone.n == sum('"phone"' in line for line in (Path(world.golden.path) / "items.jsonl").open())
    assert any("slice phone" in reason for reason in ran.verdict.reasons)


def test_a_slice_that_no_item_is_in_is_refused_before_anything_else(world: RetrainSpec, tmp_path: Path) -> None:
    spec = chapter(world, "unknown", guards=[{"metric": "exact_match", "slice": "fax", "margin": 0.1}])
    spec = spec.model_copy(update={"execution": spec.execution.model_copy(update={"store": str(tmp_path / "store")})})
    with pytest.raises(SpecError, match="guards the slice 'fax', and no golden item is in it") as caught:
        retrain(spec)
    assert caught.value.where == "policy.guards.0.slice"
    assert caught.value.fix == "name one of mail, phone"
    assert not list((tmp_path / "store").rglob("manifest.json"))


@pytest.fixture(scope="module")
def suite(world: RetrainSpec) -> SuiteSpec:
    """A frozen set of another task, whose answers are the other way round."""
    folder = Path(world.data.source).parent
    turned = [row | {"label": LABELS[1 - LABELS.index(row["label"])]} for row in rows(seed=5)]
    other = world.model_copy(
        update={
            "name": "turned",
            "task": TaskSpec(kind=TaskKind.CLASSIFY, instruction="Which team is it not?", labels=LABELS),
            "data": DataSpec(source=str(write_jsonl(folder / "turned.jsonl", turned))),
            "golden": GoldenSpec(path=str(folder / "turned"), items=60),
        }
    )
    freeze(other)
    return SuiteSpec(name="turned", path=other.golden.path)


def test_what_must_not_be_forgotten_rejects_a_candidate_that_forgot_it(
    world: RetrainSpec, suite: SuiteSpec, promoted: Ran
) -> None:
    guards = [{"suite": "turned", "metric": "exact_match", "margin": 0.05}]
    spec = chapter(world, "forgetting", guards=guards).model_copy(update={"suites": (suite,)})
    ran = run(spec)
    assert ran.state == "Rejected"
    assert requirement(ran.verdict, decides=True).status is Status.SHOWN
    forgot = requirement(ran.verdict, suite="turned")
    assert (forgot.status, forgot.n) == (Status.FAILED, 60)
    assert forgot.estimate < -0.2
    assert any("suite turned" in reason for reason in ran.verdict.reasons)
    assert ran.record["suites"]["turned"]["exact_match"]["n"] == 60
    assert {"turned_baseline_outcomes", "turned_candidate_outcomes"} <= ran.verdict.digests.keys()
    assert aliases(spec) == {}


def test_a_suite_that_is_kept_up_lets_a_promotion_through(world: RetrainSpec, suite: SuiteSpec, promoted: Ran) -> None:
    guards = [{"suite": "turned", "metric": "valid_output", "margin": 0.1}]
    spec = chapter(world, "kept-up", guards=guards).model_copy(update={"suites": (suite,)})
    ran = run(spec)
    assert ran.state == "Promoted"
    assert requirement(ran.verdict, suite="turned").status is Status.SHOWN
    found = verify("models:/kept-up@champion", spec.execution)
    assert found.holds, found


def test_a_suite_that_was_changed_stops_the_run(world: RetrainSpec, suite: SuiteSpec, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(suite.path, tmp_path / "turned"))
    items = changed / "items.jsonl"
    items.write_bytes(items.read_bytes().replace(b"billing", b"support", 1))
    spec = chapter(world, "changed-suite").model_copy(
        update={"suites": (suite.model_copy(update={"path": str(changed)}),)}
    )
    with pytest.raises(GoldenSetError, match="changed"):
        retrain(spec)


# -- the ladder -----------------------------------------------------------------------------------------------------


def numbers_of(verdict: Verdict) -> set[str]:
    """Every number that a verdict has of the golden set, as people and programs write it."""
    found: set[float] = {verdict.p_value}
    for row in verdict.metrics:
        found |= {row.baseline, row.candidate, row.difference, row.low, row.high, row.baseline_low, row.candidate_low}
    for one in verdict.requirements:
        found |= {one.estimate, one.low, one.high, one.p_value}
    telling = {value for value in found if abs(value) not in (0.0, 1.0)}  # these two stand everywhere
    texts = {f"{abs(value):.3f}" for value in telling} | {f"{100 * abs(value):.1f} %" for value in telling}
    return texts | {repr(value) for value in telling}


def leaked(secret: set[str], text: str) -> set[str]:
    """Which numbers stand in a text, as whole ones: 0.5 is no part of 10.5."""
    return {number for number in secret if re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", text)}


def everything_in_mlflow(spec: RetrainSpec, folder: Path) -> str:
    """All that MLflow shows of the experiment and of the registered model, but the evidence of the certificate."""
    client, said = mlflow(spec), []
    experiment = client.get_experiment_by_name(spec.name)
    for one in client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL):
        assert one.data.metrics == {}, one.data.tags
        said += [json.dumps(one.data.params), json.dumps(one.data.tags)]
        names = [file.path for file in client.list_artifacts(one.info.run_id)]
        assert not any("table" in name for name in names), names
        for name in names:
            if name in ("report.html", "verdict.json"):
                said.append(Path(client.download_artifacts(one.info.run_id, name, str(folder))).read_text())
    for version in client.search_model_versions(f"name='{spec.name}'"):
        said += [json.dumps(version.tags), version.description]
    return "\n".join(said)


def test_a_ladder_lets_out_no_number_of_the_golden_set(
    world: RetrainSpec, promoted: Ran, rejected: Ran, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    spec = chapter(world, "ladder", looks="ladder", ladder_step=0.1)
    # Another length of answers, so that nothing is reused of evaluations that were shown.
    spec = spec.model_copy(update={"evaluate": spec.evaluate.model_copy(update={"max_new_tokens": 9})})
    up, down = run(spec), run(on_shuffled_labels(spec))

    assert (up.state, down.state) == ("Promoted", "Inconclusive")
    assert down.verdict.outcome is Outcome.INCONCLUSIVE, "worse would be a second bit"
    assert up.verdict.withheld
    assert down.verdict.withheld
    assert [look.level for look in (up.verdict.look, down.verdict.look)] == pytest.approx(
        [0.05 / 4, 0.05 / (6 * 4 * 10)]
    )
    secret = numbers_of(up.verdict) | numbers_of(down.verdict)
    secret -= leaked(secret, spec.model_dump_json())  # a number of the configuration tells nothing
    assert len(secret) > 20
    page = "\n".join(record.getMessage() for record in caplog.records)
    assert "scores withheld" in page
    with get_client(sync_client=True) as client:
        artifacts = "\n".join(
            str(one.data) + str(one.description)
            for one in client.read_artifacts()
            if "ladder" in str(one.key) or "ladder" in str(one.data)
        )
    assert "Numbers are withheld" in artifacts
    shown = {
        "logs": page,
        "pages": artifacts,
        "report": up.report + down.report,
        "record": json.dumps(up.record) + json.dumps(down.record),
        "MLflow": everything_in_mlflow(spec, tmp_path),
    }
    assert {where: leaked(secret, text) for where, text in shown.items()} == {where: set() for where in shown}
    for text in (promoted.report, json.dumps(promoted.record)):
        assert len(leaked(numbers_of(promoted.verdict), text)) > 3, "this way of looking would find them"
    assert up.record["metrics"] == down.record["metrics"] == {}
    assert up.record["self_test"] is None


def test_a_model_that_is_scored_for_a_ladder_shows_no_scores(
    world: RetrainSpec, promoted: Ran, caplog: pytest.LogCaptureFixture
) -> None:
    asked = chapter(world, "ladder-scores", looks="ladder").evaluation()
    assert asked.withhold_scores
    evaluate(asked, promoted.result.verdict.candidate.uri, PromptKind.TUNED)
    assert "exact_match" not in "\n".join(record.getMessage() for record in caplog.records)
    with get_client(sync_client=True) as client:
        assert not [one for one in client.read_artifacts() if "ladder-scores" in str(one.key)]


# -- refusals -------------------------------------------------------------------------------------------------------


def test_a_spent_budget_refuses_another_candidate_before_it_is_trained(world: RetrainSpec, promoted: Ran) -> None:
    spec = chapter(world, "spent", looks="bonferroni", declared_looks=1)
    first = run(spec)
    assert first.state == "Promoted"
    assert run(spec).verdict == first.verdict, "what was said may be said again"

    before = made(spec, "train")
    with pytest.raises(LedgerError, match="error budget of this golden set is spent: 1 look taken of 1 declared"):
        retrain(with_seed(spec, 99))
    assert made(spec, "train") == before
    assert len(looks(spec)) == 1

    more = spec.model_copy(update={"policy": Policy(looks="bonferroni", declared_looks=2)})
    with pytest.raises(LedgerError, match="Changing the budget midway"):
        retrain(with_seed(more, 99))
    assert made(spec, "train") == before


@pytest.mark.parametrize("ledger", ["{folder}/file/ledger.db", "postgresql://goldgate@127.0.0.1:9/none"])
def test_a_ledger_that_cannot_be_reached_stops_the_run_before_anything_else(
    world: RetrainSpec, tmp_path: Path, ledger: str
) -> None:
    (tmp_path / "file").write_text("")
    execution = world.execution.model_copy(
        update={"store": str(tmp_path / "store"), "ledger": ledger.format(folder=tmp_path)}
    )
    with pytest.raises(LedgerError):
        retrain(world.model_copy(update={"execution": execution}))
    assert not list((tmp_path / "store").rglob("manifest.json"))


def drop_report(manifest: dict[str, Any], folder: Path) -> None:
    del manifest["files"][CONTAMINATION_FILE]
    (folder / CONTAMINATION_FILE).unlink()


def find_something(manifest: dict[str, Any], folder: Path) -> None:
    path = folder / CONTAMINATION_FILE
    report = ContaminationReport.model_validate_json(path.read_text())
    path.write_text(report.model_copy(update={"found": {"ngram": 2}}).model_dump_json())
    manifest["files"][CONTAMINATION_FILE] = {"sha256": digest_file(path), "size": path.stat().st_size}


def change_report(manifest: dict[str, Any], folder: Path) -> None:
    (folder / CONTAMINATION_FILE).write_text("{}")


@pytest.mark.parametrize(
    ("tamper", "error", "said"),
    [
        (drop_report, LeakageError, "Nothing says whether golden items are in the training data"),
        (find_something, LeakageError, "Golden items are in the training data: 2 ngram"),
        (change_report, StoreError, "was changed"),
    ],
)
def test_without_a_clean_contamination_report_there_is_no_verdict(
    world: RetrainSpec, promoted: Ran, tmp_path: Path, tamper: Any, error: type[GoldgateError], said: str
) -> None:
    store = Path(shutil.copytree(world.execution.store, tmp_path / "store"))
    shutil.rmtree(store / "verdict")
    spec = chapter(world, "leaky")
    spec = spec.model_copy(
        update={"execution": spec.execution.model_copy(update={"store": str(store), "ledger": str(tmp_path / "l.db")})}
    )
    trained = next(
        one for one in Store(str(store)).list("train")
        if one.manifest.facts["merged_digest"] == promoted.verdict.candidate.digest
    )  # fmt: skip
    splits = next(
        one for one in Store(str(store)).list("curate") if one.manifest.digest == trained.manifest.inputs["splits"]
    )
    path = Path(splits.uri) / "manifest.json"
    manifest = json.loads(path.read_text())
    tamper(manifest, Path(splits.uri) / manifest["folder"])
    path.write_text(json.dumps(manifest))

    with pytest.raises(error, match=said):
        retrain(spec)
    assert made(spec, "verdict") == 0
    with Ledger.open(ledger_url(spec.execution)) as ledger:
        assert ledger.pages() == (), "no look was spent"
    assert aliases(spec) == {}


def test_a_changed_golden_set_stops_the_run_before_anything_else(world: RetrainSpec, tmp_path: Path) -> None:
    shutil.copytree(world.golden.path, tmp_path / "golden")
    items = tmp_path / "golden" / "items.jsonl"
    items.write_bytes(items.read_bytes().replace(b"billing", b"support", 1))
    store = tmp_path / "store"
    spec = world.model_copy(
        update={
            "golden": world.golden.model_copy(update={"path": str(tmp_path / "golden")}),
            "execution": world.execution.model_copy(update={"store": str(store)}),
        }
    )
    with pytest.raises(GoldenSetError, match="changed"):
        retrain(spec)
    assert not any(store.rglob("manifest.json"))


def test_rows_over_the_limit_stop_the_run_and_are_named(world: RetrainSpec, tmp_path: Path) -> None:
    bad = rows()
    for row in bad[:40]:
        row["label"] = "sales"
    spec = world.model_copy(
        update={"data": world.data.model_copy(update={"source": str(write_jsonl(tmp_path / "rows.jsonl", bad))})}
    )
    with pytest.raises(DataError, match="40"):
        retrain(spec)
