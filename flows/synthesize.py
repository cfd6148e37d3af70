"""More rows from a teacher, where real ones are few; nothing but what passes every filter."""

from __future__ import annotations

from prefect import flow

from tasks.contracts.synthesis import SynthesisRef, SynthesizeSpec
from tasks.data.steps import ingest_dataset, open_golden_set
from tasks.data.synthesis.steps import check_real_rows, publish_synthesis, write_synthetic_rows


@flow(name="synthesize", flow_run_name="synthesize {spec.name}", persist_result=False)
def synthesize(spec: SynthesizeSpec) -> SynthesisRef:
    """Have a teacher write rows for classes and slices that lack them, or from documents; keep what survives.

    The teacher is shown real rows that passed validation (so what `data.secrets` and `data.personal_data` mask is
    masked), and never one of the golden set. The result is put beside the real rows by hand, in a folder of parts.
    """
    golden = open_golden_set(spec.evaluation())
    raw = ingest_dataset(spec.reading())
    valid = check_real_rows(raw, spec)
    result = write_synthetic_rows(valid, golden, spec)
    publish_synthesis(spec, result)
    return result
