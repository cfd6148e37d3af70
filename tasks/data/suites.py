"""Run Great Expectations suites over frames of facts, batch by batch, and add the results up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from copy import copy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from tasks.contracts.errors import DataError
from tasks.data.facts import SHORT_VALUE

MAX_VALUES = 1_000  # different values of one expectation that are counted; of more than that the rarest are let go


class Reason(NamedTuple):
    """Why a row is bad: a code to count by, and what is wrong with this row in words.

    Of a row that is only told about (`only_told`), nothing follows.
    """

    code: str
    text: str
    only_told: bool = False


class SuiteResult(NamedTuple):
    """What a suite found in a frame.

    Attributes:
        by_row: for each failing row (by the frame's column `row`) what is wrong with it, in the suite's order.
        of_set: what is wrong with the rows as a whole.
        outcomes: for each expectation what was found, as Great Expectations says it.
        suite: the suite.
    """

    by_row: dict[int, list[Reason]]
    of_set: list[str]
    outcomes: list[Any]
    suite: Any


def run_suite(suite: Any, frame: pd.DataFrame) -> SuiteResult:
    """Run a suite over a frame of facts, in an ephemeral context of its own.

    Raises:
        DataError: an expectation could not be evaluated at all.
    """
    import great_expectations as gx
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    # The default configuration would make a folder for a Data Docs site of its own, and log it.
    context = gx.get_context(
        mode="ephemeral",
        project_config=DataContextConfig(
            store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
            progress_bars=ProgressBarsConfig(globally=False),
            analytics_enabled=False,
        ),
    )
    batch = (
        context.data_sources.add_pandas("rows").add_dataframe_asset("rows").add_batch_definition_whole_dataframe("all")
    )
    # An expectation belongs to one context, and the suite is run once for each frame.
    own = [copy(expectation) for expectation in suite.expectations]
    added = context.suites.add(gx.ExpectationSuite(name=suite.name, expectations=own))
    validation = context.validation_definitions.add(gx.ValidationDefinition(name=suite.name, data=batch, suite=added))
    result = validation.run(
        batch_parameters={"dataframe": frame},
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["row"]},
    )
    by_row: dict[int, list[Reason]] = {}
    of_set: list[str] = []
    for outcome in result.results:
        if outcome.success:
            continue
        config = outcome.expectation_config
        if outcome.exception_info.get("raised_exception"):
            raise DataError(
                f"An expectation could not be evaluated: {outcome.exception_info.get('exception_message')}.",
                where=f"suite {suite.name}, {config.type}",
                fix="report it together with this message; the data were not judged",
            )
        template = config.meta["reason"]
        if "unexpected_index_list" not in outcome.result:
            missing = outcome.result.get("partial_missing_list")  # of a set of values that all have to be there
            value = outcome.result["observed_value"] if missing is None else ", ".join(map(repr, missing))
            of_set.append(template.format(value=value))
            continue
        column, code, told = config.kwargs["column"], config.meta["code"], config.meta.get("only_told", False)
        for entry in outcome.result["unexpected_index_list"]:
            reason = Reason(code, template.format(value=shown(entry[column])), told)
            by_row.setdefault(int(entry["row"]), []).append(reason)
    return SuiteResult(by_row, of_set, list(result.results), suite)


def shown(value: Any) -> Any:
    """A value as a reason shows it."""
    if isinstance(value, float) and value.is_integer():  # pandas makes counts floats in a column with nulls
        return int(value)
    if isinstance(value, str) and len(value) > SHORT_VALUE:
        return value[:SHORT_VALUE] + "…"
    return value


class SuiteTotals:
    """The results of one suite over many frames, added up; memory does not grow with their number."""

    def __init__(self, suite: Any) -> None:
        self._suite = suite
        self._configs = [expectation.configuration for expectation in suite.expectations]
        self._checked = [0] * len(self._configs)
        self._missing = [0] * len(self._configs)
        self._failed = [0] * len(self._configs)
        self._values: list[Counter[Any]] = [Counter() for _ in self._configs]
        self._cut = [False] * len(self._configs)

    def add(self, outcomes: Iterable[Any]) -> None:
        """Add what was found in one frame."""
        for number, outcome in enumerate(outcomes):
            found = outcome.result
            self._checked[number] += found["element_count"]
            self._missing[number] += found.get("missing_count") or 0
            self._failed[number] += found["unexpected_count"]
            values = self._values[number]
            # The list of values is cut off at 200, that of rows is not.
            column = outcome.expectation_config.kwargs.get("column")
            values.update(shown(entry[column]) for entry in found.get("unexpected_index_list") or ())
            if len(values) > MAX_VALUES:
                self._cut[number] = True
                self._values[number] = Counter(dict(values.most_common(MAX_VALUES // 2)))

    def record(self) -> dict[str, Any]:
        """The whole as plain JSON, in the shape of Great Expectations' own results."""
        import great_expectations as gx

        results = []
        for number, config in enumerate(self._configs):
            checked, missing, failed = self._checked[number], self._missing[number], self._failed[number]
            present = checked - missing
            results.append(
                {
                    "success": failed == 0,
                    "expectation_config": config.to_json_dict(),
                    "result": {
                        "element_count": checked,
                        "missing_count": missing,
                        "missing_percent": 100 * missing / checked if checked else 0.0,
                        "unexpected_count": failed,
                        "unexpected_percent": 100 * failed / present if present else 0.0,
                        "unexpected_percent_total": 100 * failed / checked if checked else 0.0,
                        "unexpected_percent_nonmissing": 100 * failed / present if present else 0.0,
                        "partial_unexpected_list": list(self._values[number])[:20],
                        "partial_unexpected_counts": [
                            {"value": value, "count": count} for value, count in self._values[number].most_common(20)
                        ],
                    },
                    "unexpected_values": {
                        "counts": [[value, count] for value, count in self._values[number].most_common()],
                        "are_all": not self._cut[number],
                    },
                    "exception_info": {
                        "raised_exception": False,
                        "exception_message": None,
                        "exception_traceback": None,
                    },
                    "meta": {},
                }
            )
        met = sum(result["success"] for result in results)
        return {
            "success": met == len(results),
            "suite_name": self._suite.name,
            "results": results,
            "suite_parameters": {},
            "statistics": {
                "evaluated_expectations": len(results),
                "successful_expectations": met,
                "unsuccessful_expectations": len(results) - met,
                "success_percent": 100 * met / len(results) if results else None,
            },
            "meta": {
                "great_expectations_version": gx.__version__,
                "validation_time": datetime.now(UTC).isoformat(),
                "run_id": {"run_name": None, "run_time": datetime.now(UTC).isoformat()},
            },
        }


def write_pages(record: Mapping[str, Any], suite: Any, folder: Path) -> None:
    """Great Expectations' own pages of a result and of its suite: `validations/rows.html`, `expectations/rows.html`."""
    from great_expectations.core import ExpectationSuiteValidationResult, ExpectationValidationResult
    from great_expectations.render.renderer import ExpectationSuitePageRenderer, ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    outcomes = [
        ExpectationValidationResult(
            success=outcome["success"],
            expectation_config=expectation.configuration,
            result=outcome["result"],
            exception_info=outcome["exception_info"],
            meta={},
        )
        for outcome, expectation in zip(record["results"], suite.expectations, strict=True)
    ]
    result = ExpectationSuiteValidationResult(
        success=record["success"],
        results=outcomes,
        suite_name=record["suite_name"],
        suite_parameters={},
        statistics=record["statistics"],
        meta={**record["meta"], "active_batch_definition": {}, "batch_spec": {}},
    )
    view = DefaultJinjaPageView()
    for part, content in (
        ("validations", ValidationResultsPageRenderer(run_info_at_end=True).render(result)),
        ("expectations", ExpectationSuitePageRenderer().render(suite)),
    ):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "rows.html").write_text(view.render(content), encoding="utf-8", errors="backslashreplace")
