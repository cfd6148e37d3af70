"""Label Studio's exports: what annotators agree on, what they do not, and JSON lists that are broken."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import DataError
from tasks.contracts.rows import Message, Row, read_rows
from tasks.contracts.spec import DataFormat, DataSpec, TaskKind
from tasks.data.ingest import digest_source, ingest, source_format
from tasks.data.sources import label_studio
from tasks.data.sources import record as record_module
from tests.data.toy_data import read_lines


def result(*answers: str, control: str = "label", kind: str = "choices") -> dict[str, Any]:
    values = {"choices": [*answers]} if kind == "choices" else {"text": [*answers]}
    return {"id": "x1", "type": kind, "from_name": control, "to_name": "text", "value": values}


def annotation(*results: dict[str, Any], who: Any = None, **others: Any) -> dict[str, Any]:
    return {"id": 5, "completed_by": who, "result": [*results], "was_cancelled": False} | others


def voted(*labels: str, skipped: int = 0, **data: Any) -> dict[str, Any]:
    """A task on which annotators have voted; "" is an annotation without an answer."""
    votes = [annotation(*([result(label)] if label else []), who=who) for who, label in enumerate(labels, start=1)]
    votes += [annotation(who=90 + who, was_cancelled=True) for who in range(skipped)]
    return {
        "id": 7,
        "data": {"text": "Refund, please"} | data,
        "annotations": votes,
        "predictions": [{"result": [result("never")]}],
        "created_at": "2026-01-31T12:00:00Z",
    }


def as_export(path: Path, tasks: list[Any], **spec: Any) -> DataSpec:
    path.write_text(json.dumps(tasks, ensure_ascii=False, indent=1), encoding="utf-8")
    return DataSpec(source=str(path), **spec)


def run(data: DataSpec, folder: Path, kind: TaskKind = TaskKind.CLASSIFY) -> list[Row]:
    ingest(data, kind, folder, expected_digest=digest_source(data))
    return list(read_rows(folder / "rows.jsonl"))


def reasons(folder: Path) -> list[list[str]]:
    return [entry["reasons"] for entry in read_lines(folder / "unreadable.jsonl")]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("compressed", [False, True])
def test_an_export_is_known_by_its_content(compressed: bool, tmp_path: Path, out: Path) -> None:
    data = as_export(tmp_path / "x.json", [voted("billing"), voted("support", text="It «crashes» at 5 €")])
    if compressed:
        packed = tmp_path / "x.json.gz"
        packed.write_bytes(gzip.compress(Path(data.source).read_bytes()))
        data = DataSpec(source=str(packed))
    assert source_format(data) is DataFormat.LABEL_STUDIO
    assert run(data, out) == [
        Row("7", 1, (Message("user", "Refund, please"),), "billing"),
        Row("7", 2, (Message("user", "It «crashes» at 5 €"),), "support"),
    ]


AGREED = [
    (voted("billing"), 0.51, "billing"),
    (voted("billing", "billing", "support"), 0.51, "billing"),
    (voted("billing", "billing", "support", "x"), 0.5, "billing"),
    (voted("billing", "support", "support", "support"), 0.75, "support"),
    (voted("billing", skipped=2), 1.0, "billing"),
    (voted("billing", "billing", ""), 0.6, "billing"),
]
DISAGREED = [
    (
        voted("billing", "billing", "support", "x"),
        0.51,
        "annotators disagree: 2 × billing, 1 × support, 1 × x (agreement 0.50, at least 0.51 is needed)",
    ),
    (voted("billing", "support"), 0.3, "annotators disagree: 1 × billing, 1 × support (a tie)"),
    (
        voted("billing", ""),
        0.51,
        "annotators disagree: 1 × billing, 1 × no answer (agreement 0.50, at least 0.51 is needed)",
    ),
    (voted("", ""), 0.51, "annotators gave no answer"),
    (voted(), 0.51, "nobody has annotated it"),
    (voted(skipped=2), 0.51, "annotators skipped it: 2 of them"),
    (
        voted("billing") | {"annotations": [annotation(result("support", "billing"))]},
        0.51,
        "an annotator gave several answers, a row has one: billing, support",
    ),
]


@pytest.mark.parametrize(("task", "least", "label"), AGREED)
def test_the_answer_is_what_enough_annotators_say(
    task: dict[str, Any], least: float, label: str, tmp_path: Path, out: Path
) -> None:
    (row,) = run(as_export(tmp_path / "x.json", [task], min_agreement=least), out)
    assert row.target == label


@pytest.mark.parametrize(("task", "least", "reason"), DISAGREED)
def test_a_task_without_an_answer_is_unusable_and_says_why(
    task: dict[str, Any], least: float, reason: str, tmp_path: Path, out: Path
) -> None:
    data = as_export(tmp_path / "x.json", [voted("billing"), task], min_agreement=least)
    assert ingest(data, TaskKind.CLASSIFY, out) == (1, 1)
    (entry,) = read_lines(out / "unreadable.jsonl")
    assert entry == {"line": 2, "id": "7", "reasons": [reason], "record": task}


def test_the_newest_annotation_of_an_annotator_counts() -> None:
    old = annotation(result("billing"), who=1, updated_at="2026-01-01T00:00:00Z")
    new = annotation(result("support"), who={"id": 1, "email": "ann@example.org"}, updated_at="2026-01-02T00:00:00Z")
    for given in ([old, new], [new, old]):
        assert label_studio._counted(given) == ([new], 0)
    undated = [annotation(result(label), who=1) for label in ("billing", "support")]
    assert label_studio._counted(undated) == ([undated[1]], 0)
    nobody = [annotation(result("billing")), annotation(result("billing"))]
    assert label_studio._counted(nobody) == (nobody, 0)


def test_the_order_of_annotators_makes_no_difference(tmp_path: Path, out: Path) -> None:
    labels = ["a", "b", "b", "c", "c"]
    found = set()
    for seed in range(5):
        random.Random(seed).shuffle(labels)
        ingest(as_export(tmp_path / "x.json", [voted(*labels)]), TaskKind.CLASSIFY, out)
        found.add(reasons(out)[0][0])
    assert found == {"annotators disagree: 2 × b, 2 × c, 1 × a (a tie)"}


def test_texts_are_answers_of_chats_and_extractions(tmp_path: Path, out: Path) -> None:
    answers = [annotation(result('{"b": 1, "a": 2}', kind="textarea", control="json"), result("x", control="topic"))]
    data = as_export(tmp_path / "x.json", [voted() | {"annotations": answers}])
    assert run(data, out, TaskKind.EXTRACT)[0].target == '{"a": 2, "b": 1}'
    assert run(data, out, TaskKind.CHAT)[0].target == '{"b": 1, "a": 2}'
    assert run(data, out)[0].target == "x"
    # A control that is named is taken whatever its type.
    assert run(data.model_copy(update={"target_field": "json"}), out)[0].target == '{"b": 1, "a": 2}'


def test_other_fields_come_from_the_task(tmp_path: Path, out: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    data = as_export(
        tmp_path / "x.json",
        [voted("a", dialogue=turns, case=3, part="web", synthetic=True)],
        text_field="dialogue",
        group_field="case",
        slice_field="part",
        time_field="created_at",
    )
    (row,) = run(data, out)
    assert row.messages == (Message("system", "Be brief."), Message("user", "Hi"))
    assert (row.group, row.slice, row.time, row.synthetic) == ("3", "web", "2026-01-31T12:00:00.000000Z", True)


@pytest.mark.parametrize("order", [1, -1])
def test_which_of_several_controls_has_the_answer_must_be_said(order: int, tmp_path: Path, out: Path) -> None:
    def labelled(*controls: str) -> dict[str, Any]:
        return voted() | {"annotations": [annotation(*(result(f"of {name}", control=name) for name in controls))]}

    tasks = [labelled("tone"), labelled("tone", "topic")][::order]
    data = as_export(tmp_path / "x.json", tasks)
    with pytest.raises(DataError) as caught:
        ingest(data, TaskKind.CLASSIFY, out)
    assert caught.value.what == (
        "More than one control of the annotations has the type choices, and `data.target_field` (label) names none "
        "of them. There are: tone (choices), topic (choices)."
    )
    with pytest.raises(DataError, match="No control of the annotations has the type textarea"):
        ingest(data, TaskKind.CHAT, out)
    found = run(data.model_copy(update={"target_field": "topic"}), out)
    assert [row.target for row in found] == ["of topic"]
    assert reasons(out) == [["annotators gave no answer"]]


def flat(label: Any, number: int = 1, who: int = 1) -> dict[str, Any]:
    return {
        "text": f"text {number}",
        "id": number,
        "label": label,
        "annotator": who,
        "annotation_id": who,
        "lead_time": 1,
    }


def test_json_min_has_an_item_an_annotation(tmp_path: Path, out: Path) -> None:
    items = [
        flat("billing"),
        *(flat(label, 2, who) for who, label in enumerate(["billing", "support", "support"])),
        *(flat(label, 3, who) for who, label in enumerate(["billing", "support"])),
        flat("support", 9) | {"text": "one text"},
        flat("support", 9) | {"text": "another text"},  # rows of a list whose ids are not theirs alone
        flat({"choices": ["billing", "support"]}, 4),
        flat(["support"], 5),
        {name: value for name, value in flat("x", 6).items() if name != "label"},
    ]
    data = as_export(tmp_path / "x.json", items)
    assert source_format(data) is DataFormat.LABEL_STUDIO
    assert [(row.id, row.line, row.target) for row in run(data, out)] == [
        ("1", 1, "billing"),
        ("2", 2, "support"),
        ("9", 7, "support"),
        ("9", 8, "support"),
        ("5", 10, "support"),
    ]
    assert reasons(out) == [
        ["annotators disagree: 1 × billing, 1 × support (a tie)"],
        ["an annotator gave several answers, a row has one: billing, support"],
        ["label is missing"],
    ]
    assert read_lines(out / "unreadable.jsonl")[0]["record"] == items[4:6]


def test_a_column_that_no_task_has(tmp_path: Path, out: Path) -> None:
    for data, column in [
        (as_export(tmp_path / "x.json", [voted("a")], text_field="body"), "body"),
        (as_export(tmp_path / "y.json", [flat("a")], target_field="team"), "team"),
    ]:
        with pytest.raises(DataError, match=f"No row has the column '{column}'"):
            ingest(data, TaskKind.CLASSIFY, out)


def test_messages_have_no_place_for_annotations(tmp_path: Path, out: Path) -> None:
    data = as_export(tmp_path / "x.json", [voted("a")], messages_field="messages")
    with pytest.raises(DataError, match="not in the last turn") as caught:
        ingest(data, TaskKind.CHAT, out)
    assert "data.text_field" in caught.value.fix


# -- a `.json` file that is something else, or broken -------------------------------------------------------------


def test_a_json_file_may_hold_json_lines(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "part-0.json"
    source.write_bytes(b'\xef\xbb\xbf\n{"id": "a", "text": "t", "label": "x"}\n')
    data = DataSpec(source=str(source))
    assert source_format(data) is DataFormat.JSONL
    assert [row.id for row in run(data, out)] == ["a"]


def test_a_list_of_rows_is_no_export_unless_that_is_said(tmp_path: Path, out: Path) -> None:
    data = as_export(tmp_path / "x.json", [{"text": "t", "label": "a"}, {"text": "u", "label": "b"}])
    with pytest.raises(DataError, match="no Label Studio export") as caught:
        source_format(data)
    assert "jq -c '.[]' x.json > rows.jsonl" in caught.value.fix
    assert len(run(data.model_copy(update={"format": DataFormat.LABEL_STUDIO}), out)) == 2


WHOLE = json.dumps([voted("billing"), voted("support", text="5 €")], indent=1, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("content", "what", "line"),
    [
        (WHOLE[:-2], "The file is no whole JSON list: , is expected, and the file ends.", WHOLE.count(b"\n")),
        (WHOLE + b"\n[]", "The file is no whole JSON list: something follows the end of the list.", None),
        (b"[{}\n\n{}]", "The file is no whole JSON list: , is expected, and { found.", 3),
        (b"[{}\n, 5]", "The file is no whole JSON list: an object is expected.", 2),
        (b"[[1]]", "An item of the export is a list, not an object.", 1),
        (b'[{"a": 1},\n{"a": ?,\n' + b" " * 99 + b"}]", "The file is no whole JSON list: Expecting value.", 2),
        (b'[{}, {"a": %s}]' % (b"9" * 5000), "The file is no whole JSON list: Exceeds the limit", 1),
        ("x", "The file is no whole JSON list: [ is expected, and x found.", 1),
        (b'[{"a": "\n caf\xe9"}]', "The file is not UTF-8: byte 0xe9 at byte 14 of the file.", 2),
        (b'[{"a": "caf\xc3', "The file is not UTF-8: byte 0xc3 at byte 12 of the file.", 1),
        (b'[{"a": "caf', "The file is no whole JSON list: Unterminated string starting at.", 1),
        (b"[]", "The data source holds no rows.", None),
    ],
)
@pytest.mark.parametrize("block", [1, 7, 2**16])
def test_a_broken_list_is_refused_with_its_line(
    block: int, content: Any, what: str, line: int | None, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_studio, "_BLOCK", block)
    source = tmp_path / "x.json"
    source.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        ingest(DataSpec(source=str(source), format=DataFormat.LABEL_STUDIO), TaskKind.CLASSIFY, out)
    assert caught.value.what.startswith(what)
    if line is not None:
        assert caught.value.where == f"{source}:{line}"


@pytest.mark.parametrize("indent", [None, 0, 40])
def test_lists_are_read_alike_however_the_blocks_fall(
    indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(1)
    values = [
        {"n": draw.choice([1, -2.5e-7, True, None, 'é\\" \n]}{[', ["]", {"a": []}]]), "t": "x" * draw.randrange(90)}
        for _ in range(60)
    ]
    source = tmp_path / "x.json"
    source.write_text(json.dumps(values, indent=indent, ensure_ascii=bool(indent)), encoding="utf-8")
    for block in (1, 2, 3, 17, 64, 1000):
        monkeypatch.setattr(label_studio, "_BLOCK", block)
        with source.open("rb") as stream:
            assert [item.value for item in label_studio.read_list(stream, "x")] == values


def test_memory_does_not_grow_with_tasks(tmp_path: Path, out: Path) -> None:
    def peak(count: int) -> int:
        data = as_export(tmp_path / "x.json", [voted("a", "b", "b", text="text " * 50)] * count)
        tracemalloc.start()
        ingest(data, TaskKind.CLASSIFY, out)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100)  # imports and caches
    assert peak(3_000) < peak(600) + 200_000


def test_a_task_that_does_not_end_does_not_fill_the_memory(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "MAX_ROW_BYTES", 2**20)
    source = tmp_path / "x.json"
    source.write_text('[{}, {"text": "' + "x" * 2**25)
    tracemalloc.start()
    with pytest.raises(DataError, match="A task is longer than 1 MB"):
        ingest(DataSpec(source=str(source), format=DataFormat.LABEL_STUDIO), TaskKind.CLASSIFY, out)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found < 16 * 2**20
