"""The run folder from a store, and the verdict in short."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import StoreError
from tasks.contracts.references import (
    EvaluationRef,
    RawDatasetRef,
    Release,
    ReleaseKind,
    SplitsRef,
    Status,
    TrainedModelRef,
    ValidDatasetRef,
    Verdict,
    VerdictRef,
)
from tasks.contracts.spec import ExecutionSpec, LookPolicy, Policy, RetrainSpec, TaskKind
from tasks.report.folder import Run, write_folder
from tasks.report.links import as_address, find_links, keep_in_mlflow, read_links
from tasks.report.steps import named_state, write_run_folder
from tasks.report.summary import MAX_SLICES, requirement_table, verdict_markdown, verdict_table
from tasks.store import Store
from tasks.tracking import connect
from tests.report.example import (
    APPROVED,
    FORCED,
    GUARDED,
    WHEN,
    Sides,
    conditions,
    example_curves,
    example_look,
    example_reports,
    example_self_test,
    example_spec,
    example_trained,
    give_verdict,
    outcomes,
    summary,
    systems,
)

REPORTS = example_reports()
BY_VERDICT = Release(kind=ReleaseKind.BY_VERDICT)


def keep(store: Store, step: str, files: Mapping[str, str], facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Files as an artefact of the store; the fields of its reference."""

    def make(folder: Path) -> Mapping[str, Any]:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return facts or {}

    return store.produce(step, 1, {}, {"files": " ".join(sorted(files))}, make).reference()


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def run(store: Store) -> Run:
    """A whole run in a store, up to its verdict."""
    return make_run(store, Policy())


def make_run(store: Store, policy: Policy, *, withheld: bool = False) -> Run:
    """A whole run under a policy."""
    spec = example_spec(policy=policy)
    evaluations, sides = [], []
    for number, (system, share) in enumerate(zip(systems(), (0.41, 0.78), strict=True)):
        items = outcomes(200, share, number, TaskKind.CLASSIFY, slices=bool(policy.guards))
        sides.append(items)
        made = keep(
            store,
            f"evaluate{number}",
            {
                "items.jsonl": "".join(item.model_dump_json() + "\n" for item in items),
                "summary.json": summary(system, spec, items, 40).model_dump_json(),
            },
        )
        evaluations.append(EvaluationRef(**made, system=system, conditions=conditions(spec), items=200, metrics={}))
    quarantine = [
        {"line": 7, "id": None, "reasons": ["the label 'cra\u2028sh' is not one of the task's"], "record": {}},
        {"line": 9, "id": "c9", "reasons": ["the text is empty"], "record": {}},
    ]
    valid = keep(
        store, "validate", {"quarantine.jsonl": lines(quarantine)}, {"reasons": {"unknown_label": 1, "no_text": 1}}
    )
    points = [
        {name: value for name, value in point._asdict().items() if value is not None} for point in example_curves()
    ]
    trained = example_trained().model_dump() | keep(
        store, "train", {"curves.jsonl": lines(points), "summary.json": "{}"}
    )
    splits = SplitsRef(
        **keep(store, "curate", {"train.jsonl": ""}), train_rows=800, dev_rows=90, removed={"near_duplicate": 108}
    )
    suite = outcomes(50, 0.7, 9, TaskKind.CLASSIFY)
    verdict = give_verdict(
        Sides(*sides),
        policy,
        example_look(policy),
        suites={one.name: Sides(suite, suite) for one in spec.suites},
        self_test=example_self_test(),
        withheld=withheld,
    )
    kept = keep(store, "verdict", {"verdict.json": verdict.model_dump_json()})
    return Run(
        spec=spec,
        raw=RawDatasetRef(**keep(store, "ingest", {"rows.jsonl": ""}), rows=1000),
        valid=ValidDatasetRef(**valid, rows=998, quarantined=2, data_docs="/docs/index.html"),
        splits=splits,
        trained=TrainedModelRef(**trained),
        baseline=evaluations[0],
        candidate=evaluations[1],
        verdict=VerdictRef(**kept, verdict=verdict),
        release=BY_VERDICT,
        registered=None,
        links={"Data Docs": "file:///docs/index.html"},
    )


def test_the_folder_holds_the_verdict_and_the_report(store: Store, run: Run) -> None:
    folder = Path(write_folder(store, run))

    assert folder.parent == Path(store.root, "runs")
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "verdict.json"]
    name, stamp, _ = folder.name.rsplit("-", 2)
    assert name == "complaints"
    assert datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC) <= datetime.now(UTC)

    kept, record = run.verdict.verdict, json.loads((folder / "verdict.json").read_text())
    assert record["verdict"] == "promote"
    assert record["reasons"] == list(kept.reasons)
    assert record["looks"] == 1
    assert list(record["metrics"]) == ["exact_match", "macro_f1", "valid_output"]
    primary, shown = kept.metrics[0], record["metrics"]["exact_match"]
    assert (shown["baseline"], shown["candidate"], shown["difference"], shown["n"]) == (
        primary.baseline, primary.candidate, primary.difference, 200,
    )  # fmt: skip
    assert shown["interval"] == [primary.low, primary.high]
    assert record["digests"] == {**kept.digests, "raw_data": run.raw.digest, "artefact": run.candidate.system.digest}
    assert {"data", "golden_set", "candidate", "baseline"} <= record["digests"].keys()
    assert record["registered"] is None
    assert read_links(str(folder)) == run.links

    html = (folder / "report.html").read_text(encoding="utf-8")
    assert kept.reasons[0].replace("<", "&lt;") in html
    assert "cra\u2028sh" in html
    assert "Rows read" in html
    evidence = html.split("--policy ")[1].split("/verdict.json")[0]
    assert Verdict.model_validate_json(Path(evidence, "verdict.json").read_text()) == kept


def test_the_record_holds_what_was_asked_and_what_followed(store: Store) -> None:
    run = make_run(store, GUARDED)._replace(release=APPROVED, champion_release=FORCED)
    record = json.loads(Path(write_folder(store, run), "verdict.json").read_text())
    kept = run.verdict.verdict

    assert [(one["metric"], one["slice"], one["suite"], one["status"]) for one in record["requirements"]] == [
        ("exact_match", None, None, "shown"),
        ("exact_match", "phone", None, kept.requirements[1].status.value),
        ("valid_output", None, None, "shown"),
        ("exact_match", None, "general", "shown"),
        ("latency_ms", None, None, "shown"),
    ]
    assert record["slices"].keys() == {"web", "phone", "letter", "branch"}
    assert record["suites"]["general"]["exact_match"]["n"] == 50
    assert record["metrics"]["exact_match"]["n"] == 200  # a slice never takes the place of the whole
    assert record["look"] == kept.look.model_dump(mode="json")
    assert record["self_test"]["promotions"] == 61
    assert (record["groups"], record["smallest_effect"], record["withheld"]) == (200, kept.smallest_effect, False)
    assert record["release"] == {
        "kind": "approved", "by": "Anna Meier", "reason": APPROVED.reason, "at": "2026-11-22T14:57:00Z",
    }  # fmt: skip
    assert record["champion_release"] == {
        "kind": "forced", "by": "Jonas Brandt", "reason": FORCED.reason, "at": WHEN.isoformat(),
    }  # fmt: skip


def test_the_record_holds_the_whole_specification_without_passwords(store: Store, run: Run) -> None:
    secret = ExecutionSpec(
        store=store.root,
        tracking_uri="postgresql://anna:s3cret@db:5432/mlflow",
        ledger="postgresql://gate:s3cret@db/ledger",
    )
    spec = run.spec.model_copy(update={"execution": secret})
    folder = write_folder(store, run._replace(spec=spec))
    text = Path(folder, "verdict.json").read_text()
    assert "s3cret" not in text
    read = RetrainSpec.model_validate(json.loads(text)["spec"])
    assert read.execution.tracking_uri == "postgresql://db:5432/mlflow"
    assert read.execution.ledger == "postgresql://db/ledger"
    assert read.model_copy(update={"execution": secret}) == spec
    assert "s3cret" not in Path(folder, "report.html").read_text()


def test_an_address_that_nobody_can_read_is_left_out(store: Store, run: Run) -> None:
    data = run.spec.data.model_copy(update={"source": "http://[a:s3cret@b/rows.jsonl"})
    folder = write_folder(store, run._replace(spec=run.spec.model_copy(update={"data": data})))
    assert json.loads(Path(folder, "verdict.json").read_text())["spec"]["data"]["source"] == "(left out)"


def test_a_record_that_withholds_its_numbers_has_none(store: Store) -> None:
    run = make_run(store, Policy(looks=LookPolicy.LADDER), withheld=True)
    record = json.loads(Path(write_folder(store, run), "verdict.json").read_text())
    assert record["withheld"] is True
    assert (record["verdict"], record["reasons"]) == ("promote", ["The candidate meets everything that was asked for."])
    assert [record[name] for name in ("metrics", "slices", "suites", "requirements")] == [{}, {}, {}, []]
    hidden = ("p_value", "wins", "losses", "ties", "smallest_effect", "items_to_settle", "self_test")
    assert [record[name] for name in hidden] == [None] * len(hidden)
    assert (record["n"], record["looks"], record["evidence"]) == (200, 1, run.verdict.uri)


def test_no_ledger_is_no_number_of_looks(store: Store, run: Run) -> None:
    verdict = run.verdict.verdict.model_copy(update={"look": example_look(Policy(), None)})
    kept = run.verdict.model_copy(update={"verdict": verdict})
    record = json.loads(Path(write_folder(store, run._replace(verdict=kept)), "verdict.json").read_text())
    assert record["looks"] is None


def test_the_task_writes_the_folder_with_its_links(store: Store, run: Run) -> None:
    execution = ExecutionSpec(store=store.root, tracking_uri=f"sqlite:///{store.root}/mlflow.db")
    spec = run.spec.model_copy(update={"execution": execution})
    folder = write_run_folder.fn(
        spec, run.raw, run.valid, run.splits, run.trained, run.baseline, run.candidate, run.verdict, run.release, None
    )
    assert read_links(folder) == {"Data Docs": "file:///docs/index.html"}  # SQLite has no pages to link to


def test_report_verdict_and_data_docs_are_kept_in_mlflow(store: Store, run: Run, tmp_path: Path) -> None:
    docs = tmp_path / "data_docs"
    docs.mkdir()
    (docs / "index.html").write_text("<html>docs</html>")
    execution = ExecutionSpec(store=store.root, tracking_uri=f"sqlite:///{store.root}/mlflow.db")
    spec = run.spec.model_copy(update={"execution": execution})
    valid = run.valid.model_copy(update={"data_docs": str(docs / "index.html")})
    folder = write_run_folder.fn(
        spec, run.raw, valid, run.splits, run.trained, run.baseline, run.candidate, run.verdict, run.release, None
    )

    assert keep_in_mlflow(spec, run.verdict, APPROVED, valid, folder) == {}  # no server, so no address

    client = connect(execution)
    experiment = client.get_experiment_by_name(spec.name)
    assert experiment is not None
    (kept,) = client.search_runs([experiment.experiment_id])
    assert kept.info.run_name == f"verdict {run.verdict.verdict.outcome.value}"
    root = Path(client.download_artifacts(kept.info.run_id, "")) / "runs" / Path(folder).name
    assert (root / "report.html").read_text() == Path(folder, "report.html").read_text()
    assert (root / "data_docs/index.html").read_text() == "<html>docs</html>"
    assert {path.name for path in root.iterdir()} == {"report.html", "verdict.json", "data_docs"}
    assert kept.data.tags["goldgate.release"] == "approved"
    assert kept.data.metrics == {
        f"{name}.difference": pytest.approx(value["difference"])
        for name, value in json.loads(Path(folder, "verdict.json").read_text())["metrics"].items()
    }


def test_the_data_report_is_linked_and_kept(
    store: Store, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.tracking.runs._link", lambda uri, experiment, run: f"http://127.0.0.1:5000/#/{run}")
    page = tmp_path / "data_report.html"
    page.write_text("<html>data</html>")
    docs = tmp_path / "data_docs"
    docs.mkdir()
    execution = ExecutionSpec(store=store.root, tracking_uri=f"sqlite:///{store.root}/mlflow.db")
    spec = run.spec.model_copy(update={"execution": execution})
    valid = run.valid.model_copy(update={"data_docs": str(docs / "index.html")})
    monkeypatch.setattr("tasks.report.links.run_link", lambda *_: None)
    assert find_links(spec, valid, run.trained, run.candidate, run.verdict, str(page))["Data report"] == page.as_uri()
    assert "Data report" not in find_links(spec, valid, run.trained, run.candidate, run.verdict)

    folder = write_folder(store, run._replace(spec=spec))
    links = keep_in_mlflow(spec, run.verdict, APPROVED, valid, folder, str(page))
    own = f"runs/{Path(folder).name}"
    assert links["Data report"].endswith(f"/artifacts/{own}/data_report.html")
    client = connect(execution)
    run_id = links["Data report"].split("#/")[1].split("/")[0]
    assert (Path(client.download_artifacts(run_id, own)) / "data_report.html").read_text() == "<html>data</html>"


def test_each_run_of_the_same_verdict_keeps_its_own_report(
    store: Store, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.tracking.runs._link", lambda uri, experiment, run: f"http://127.0.0.1:5000/#/{run}")
    docs = tmp_path / "data_docs"
    docs.mkdir()
    (docs / "index.html").write_text("<html>docs</html>")
    execution = ExecutionSpec(store=store.root, tracking_uri=f"sqlite:///{store.root}/mlflow.db")
    spec = run.spec.model_copy(update={"execution": execution})
    valid = run.valid.model_copy(update={"data_docs": str(docs / "index.html")})
    folders = [write_folder(store, run._replace(release=release)) for release in (BY_VERDICT, APPROVED)]
    links = [
        keep_in_mlflow(spec, run.verdict, release, valid, folder)
        for release, folder in zip((BY_VERDICT, APPROVED), folders, strict=True)
    ]

    client = connect(execution)
    experiment = client.get_experiment_by_name(spec.name)
    assert experiment is not None
    (kept,) = client.search_runs([experiment.experiment_id])  # one verdict, one run of MLflow
    root = Path(client.download_artifacts(kept.info.run_id, ""))
    page = f"http://127.0.0.1:5000/#/{kept.info.run_id}/artifacts/"
    for folder, found in zip(folders, links, strict=True):
        assert found.keys() == {"Report", "Data Docs"}
        report, data_docs = (root / found[name].removeprefix(page) for name in ("Report", "Data Docs"))
        assert report.read_text() == Path(folder, "report.html").read_text()
        assert data_docs.read_text() == "<html>docs</html>"


def test_mlflow_gets_slices_under_their_names_and_nothing_that_is_withheld(store: Store, tmp_path: Path) -> None:
    execution = ExecutionSpec(store=store.root, tracking_uri=f"sqlite:///{store.root}/mlflow.db")
    docs = tmp_path / "data_docs"
    docs.mkdir()
    (docs / "index.html").write_text("<html>docs</html>")
    found = []
    for name, policy, withheld in (("open", GUARDED, False), ("closed", Policy(looks=LookPolicy.LADDER), True)):
        run = make_run(store, policy, withheld=withheld)
        spec = run.spec.model_copy(update={"name": name, "execution": execution})
        valid = run.valid.model_copy(update={"data_docs": str(docs / "index.html")})
        slices = tuple(
            row.model_copy(update={"slice": "a/b: ü"}) if row.slice == "web" else row
            for row in run.verdict.verdict.metrics
        )
        verdict = run.verdict.model_copy(
            update={"verdict": run.verdict.verdict.model_copy(update={"metrics": slices}), "fingerprint": name * 16}
        )
        folder = write_folder(store, run)
        keep_in_mlflow(spec, verdict, BY_VERDICT, valid, folder)
        client = connect(execution)
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None
        found.append(client.search_runs([experiment.experiment_id])[0].data.metrics)
    assert {"exact_match.difference", "exact_match.suite general.difference"} <= found[0].keys()
    assert "exact_match.slice a.b. ü.difference" in found[0]
    assert found[1] == {}


def test_a_verdict_that_withholds_numbers_leads_to_no_scores(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.report.links.run_link", lambda *_: "http://127.0.0.1:5000/x")
    for withheld in (False, True):
        run = make_run(store, Policy(), withheld=withheld)
        links = find_links(run.spec, run.valid, run.trained, run.candidate, run.verdict)
        assert ("Evaluation in MLflow" in links) is not withheld
        assert {"Training in MLflow", "Data Docs"} <= links.keys()


@pytest.mark.parametrize(
    ("release", "name", "message"),
    [
        (BY_VERDICT, "Promoted", "The candidate is right on"),
        (APPROVED, "Promoted", "Approved by Anna Meier, 22 November 2026, 14:57 UTC: Read the 14 lost items"),
        (Release(kind=ReleaseKind.AWAITING), "Awaiting approval", "A person has to approve this promotion"),
        (APPROVED.model_copy(update={"kind": ReleaseKind.DECLINED}), "Declined", "Declined by Anna Meier"),
        (FORCED, "Forced promotion", "Forced by Jonas Brandt"),
    ],
)
def test_the_final_state_is_named_for_what_followed(run: Run, release: Release, name: str, message: str) -> None:
    state = named_state(run.spec, run.verdict, release, None, "/runs/x")
    assert (state.name, state.is_completed()) == (name, True)
    assert state.message is not None
    assert state.message.startswith(message)
    assert state.message.endswith(run.verdict.verdict.reasons[0])
    result = state.result()
    assert (result.folder, result.release) == ("/runs/x", release)


def test_importing_the_tasks_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "mlflow", "great_expectations", "scipy", "pandas")
    code = f"import sys, tasks.gate.steps, tasks.report.steps; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_two_runs_have_two_folders(store: Store, run: Run) -> None:
    assert write_folder(store, run) != write_folder(store, run)


def test_a_run_folder_is_written_whole_or_not_at_all(store: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text = Path.write_text

    def full_disk(path: Path, text: str, **options: Any) -> int:
        if path.name == "verdict.json":
            raise OSError(28, "No space left on device")
        return write_text(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(StoreError, match="No space left on device"):
        write_folder(store, run)
    assert list(Path(store.root, "runs").iterdir()) == []


def test_a_changed_artefact_stops_the_report(store: Store, run: Run) -> None:
    quarantine = store.files(store.open(run.valid.uri)) / "quarantine.jsonl"
    quarantine.write_text("")
    with pytest.raises(StoreError, match="was changed"):
        write_folder(store, run)


def test_a_remote_store_gets_the_same_files() -> None:
    import fsspec

    from tasks.report.folder import _put

    folder = "memory://bucket/store/runs/complaints-1"
    where = _put(folder, {"report.html": "<p>", "verdict.json": '{"links": {}}'})
    assert where == folder
    with fsspec.open(f"{where}/report.html", "rt") as file:
        assert file.read() == "<p>"
    assert read_links(where) == {}


def test_the_table_is_the_verdict_in_words() -> None:
    table = verdict_table(REPORTS["approved"].verdict)
    first, *rest = table.rows
    assert (first.metric, first.where, first.baseline, first.candidate, first.difference) == (
        "Exact match", "", "52.5 %", "82.8 %", "+30.3",
    )  # fmt: skip
    assert (first.interval, first.items, first.decides) == ("+24.0 to +36.5", "400", True)
    assert (table.confidence, table.left_out) == ("95 %", 0)
    assert not any(row.decides for row in rest)


def test_slices_and_suites_follow_the_whole_and_do_not_decide() -> None:
    rows = verdict_table(REPORTS["promote"].verdict).rows
    assert [row.where for row in rows] == [
        "", "", "", "slice branch", "slice letter", "slice phone", "slice web", "suite general",
    ]  # fmt: skip
    assert [row.decides for row in rows] == [True] + [False] * 7


def test_a_row_of_another_confidence_says_so() -> None:
    verdict = REPORTS["approved"].verdict
    first, second, third = verdict.metrics
    other = verdict.model_copy(update={"metrics": (first, second.model_copy(update={"confidence": 0.99}), third)})
    intervals = [row.interval for row in verdict_table(other).rows]
    assert [interval.endswith("(99 %)") for interval in intervals] == [False, True, False]


def test_of_many_slices_those_with_the_lowest_differences_are_kept() -> None:
    verdict = REPORTS["approved"].verdict
    many = [
        verdict.metrics[0].model_copy(update={"slice": f"s{number}", "difference": number / 100})
        for number in range(MAX_SLICES + 5)
    ]
    table = verdict_table(verdict.model_copy(update={"metrics": (*verdict.metrics, *reversed(many))}))
    assert table.left_out == 5
    assert {row.where for row in table.rows if row.where} == {f"slice s{number}" for number in range(MAX_SLICES)}


def test_requirements_are_rows_of_words() -> None:
    rows = requirement_table(REPORTS["reject"].verdict)
    phone = next(row for row in rows if row.status is Status.FAILED)
    assert (phone.about, phone.asked, phone.decides) == (
        "Exact match, slice phone",
        "loses less than 8.0 points",
        False,
    )
    assert phone.interval.startswith(("−48", "−49"))
    assert rows[0].decides
    assert requirement_table(REPORTS["withheld"].verdict) == []


def test_markdown_shows_verdict_reasons_table_and_links() -> None:
    data = REPORTS["worse"]
    text = verdict_markdown(
        data.verdict, data.release, None, {"Report": "file:///a%20b/report.html", "MLflow": "http://127.0.0.1:5000/#/x"}
    )
    assert text.startswith("# Rejected\n")
    assert all(reason in text for reason in data.verdict.reasons)
    assert "| **Exact match** (decides) | 78.8 % | 70.8 % | −8.0 | " in text
    assert "| Requirement |" not in text  # the deciding one stands in the table of metrics
    assert "**What would change the verdict.** Failed: Exact match, better than the baseline: the whole " in text
    assert "**Looks.** Look 1 at this golden set. Error budget: this look may spend 2.5 %" in text
    assert "Nothing was changed" in text
    assert "- Report: `/a b/report.html`\n- [MLflow](http://127.0.0.1:5000/#/x)\n" in text


def test_markdown_shows_requirements_slices_and_the_self_test() -> None:
    data = REPORTS["promote"]
    text = verdict_markdown(data.verdict, data.release, data.registered)
    assert "| **Exact match** (decides) | better than the baseline | +30.3 | " in text
    assert "| Latency | below 1.20 × the baseline | 0.19 × | 0.16 to 0.22 × | 400 items | shown |" in text
    assert "| Exact match, slice web | " in text
    assert "**Self-test.** The gate judged 2,000 made-up candidates" in text


def test_markdown_shows_a_persons_word_as_text_and_not_as_markup() -> None:
    wild = FORCED.model_copy(update={"by": "A [x](http://y)", "reason": "one\n# two <b>three</b> | `four`"})
    data = REPORTS["forced"]
    text = verdict_markdown(data.verdict, wild, data.registered, champion_release=wild)
    assert text.startswith("# Forced promotion\n")
    assert "The gate's verdict: **INCONCLUSIVE**." in text
    assert (
        r"> **Forced by A \[x\](http://y), 22 November 2026, 14:57 UTC**: one \# two \<b\>three\</b\> \| \`four\`"
        in text
    )
    assert r"> **The baseline is champion by override: forced against its verdict by A \[x\]" in text


def test_markdown_says_how_to_answer() -> None:
    data = REPORTS["awaiting"]
    text = verdict_markdown(data.verdict, data.release, folder="/runs/x")
    assert text.startswith("# Awaiting approval\n")
    assert "`goldgate approve /runs/x --by NAME --comment '…'` promotes the candidate; with `--decline`" in text


@pytest.mark.parametrize("name", ["withheld", "withheld_reject"])
def test_markdown_withholds_what_the_ladder_withholds(name: str) -> None:
    data = REPORTS[name]
    text = verdict_markdown(data.verdict, data.release, data.registered)
    assert ("**Rung: 83.0 %**" in text) is (name == "withheld")
    assert re.findall(r"\d\.\d", text.replace("83.0 %", "").replace("a step of 1.0 points", "")) == []
    assert "|" not in text


def test_paths_become_addresses_and_addresses_stay() -> None:
    assert as_address("/a b/index.html") == "file:///a%20b/index.html"
    assert as_address("s3://bucket/x") == "s3://bucket/x"
