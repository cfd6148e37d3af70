"""CSV: delimiters, headers, and tables that go wrong on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.contracts.errors import DataError
from tasks.contracts.rows import read_rows
from tasks.contracts.spec import DataSpec, TaskKind
from tasks.data.ingest import ingest


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def run(content: str, out: Path, name: str = "x.csv", **spec: str) -> list[tuple[int, str, str]]:
    source = out.parent / name
    source.write_text(content, encoding="utf-8", newline="")
    ingest(DataSpec(source=str(source), **spec), TaskKind.CLASSIFY, out)
    return [(row.line, row.text, row.target) for row in read_rows(out / "rows.jsonl")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_delimiter_is_the_one_that_fits_the_header(delimiter: str, name: str, end: str, out: Path) -> None:
    rows = [["n", "text", "label"], ["1", '"a, b; c\td | e"', "x"], ["2", f'"two{end}lines ""quoted"""', "y"]]
    content = end.join([*(delimiter.join(row) for row in rows), "", ""])
    assert run(content, out, name) == [
        (2, "a, b; c\td | e", "x"),
        (3, f'two{end}lines "quoted"', "y"),
    ]


def test_a_header_may_hold_other_delimiters_and_line_breaks(out: Path) -> None:
    content = '\r\n\n"in\nput";"a, b";label\n\nt;1;x\nu;2;y\n'
    assert run(content, out, text_field="in\nput") == [(6, "t", "x"), (7, "u", "y")]
    assert run("text;of it,label\na,b\n", out, text_field="text;of it") == [(2, "a", "b")]


@pytest.mark.parametrize(
    ("content", "what", "line"),
    [
        (
            "text,label\na,x\nb;y\nc,z\n",
            "A CSV row has 1 column, the header has 2. Its delimiters seem to be semicolons, those of the header are "
            "commas.",
            3,
        ),
        (
            "text;label;n\na;x;1\nb,y,2\n",
            "A CSV row has 1 column, the header has 3. Its delimiters seem to be commas, those of the header are "
            "semicolons.",
            3,
        ),
        ("text,label\na,b,c,d\n", "A CSV row has 4 columns, the header has 2.", 2),
        ('text,label\n"a\nb",x,y\n', "A CSV row has 3 columns, the header has 2.", 2),
        ("\n\ntext;label;text\n", "The CSV header names a column twice: 'text'.", 3),
        ('text,label\na,x\n"b,y\nc,z\n', "The CSV cannot be read: unexpected end of data.", 3),
        ('text,label\n"a"b,x\n', "The CSV cannot be read: ',' expected after '\"'.", 2),
        ("text,label\rt,a\r", "The CSV cannot be read: new-line character seen in unquoted field", 1),
        ("text,label\nt,a\ru,b\n", "The CSV cannot be read: new-line character seen in unquoted field", 2),
        ('text,"label\nt,a\n', "The CSV cannot be read: ", 1),
        ('text,label,size 5"\n' + "t,a,b\n" * 200_000, "The CSV cannot be read: the quotes of the header", 1),
        ('text,label,size 5"\nt,a,b\nu,c,"d\n', "The CSV cannot be read: ", 1),
    ],
)
def test_a_table_that_goes_wrong_names_the_line(content: str, what: str, line: int, out: Path) -> None:
    with pytest.raises(DataError) as caught:
        run(content, out)
    assert caught.value.what.startswith(what)
    assert caught.value.where == f"{out.parent}/x.csv:{line}"


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_missing_column_is_told_with_those_that_the_likeliest_delimiter_gives(delimiter: str, out: Path) -> None:
    with pytest.raises(DataError) as caught:
        run(delimiter.join(["text", "team"]) + "\n" + delimiter.join("tx") + "\n", out)
    assert caught.value.what == (
        "No row has the column 'label' that `data.target_field` names. There are: 'text', 'team'."
    )


@pytest.mark.parametrize("content", ["", "\n\r\n", "text,label\n", "text;label", "\n"])
def test_a_table_without_rows(content: str, out: Path) -> None:
    with pytest.raises(DataError, match="The data source holds no rows"):
        run(content, out)


def test_the_limit_on_a_field_is_not_changed_for_others(tmp_path: Path) -> None:
    import csv

    usual = csv.field_size_limit()
    (tmp_path / "rows.csv").write_text("text,label\n" + "x" * (usual + 10) + ",a\n")
    (tmp_path / "raw").mkdir()
    data = DataSpec(source=str(tmp_path / "rows.csv"))
    assert ingest(data, TaskKind.CLASSIFY, tmp_path / "raw") == (1, 0)
    assert csv.field_size_limit() == usual
