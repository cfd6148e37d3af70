"""A promotion that waits for its rollout changes nothing yet, and the report says so."""

from __future__ import annotations

from tasks.report.summary import next_steps, verdict_markdown
from tests.report.example import example_reports


def test_a_version_that_waits_is_not_said_to_be_champion() -> None:
    data = example_reports()["promote"]
    assert data.registered is not None
    waits = data.registered.model_copy(update={"alias": "promoted", "previous_version": None})
    said = next_steps(data.verdict, data.release, waits, "/runs/x")
    assert said == (
        "Registered as complaints version 4, which waits under the alias `promoted` for its rollout; until then the "
        f"baseline ({data.verdict.baseline.label}) stays in service."
    )
    assert said in verdict_markdown(data.verdict, data.release, waits)
