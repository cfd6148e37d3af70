"""A build step for `deployments/prefect.yaml`: the parameters of a deployment are an example's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from goldgate.config import load_spec


def load(config: str, train_deployment: str | None = "train/gpu") -> dict[str, Any]:
    """Read a configuration as parameters of deployments, in JSON, every path absolute.

    `spec` is what `retrain` takes; `evaluation` is the part of it that `evaluate` takes.

    Args:
        config: the YAML file, relative to the working directory.
        train_deployment: the deployment that training is handed to; None trains inside the run.

    Raises:
        SpecError: as `load_spec`.
    """
    spec = load_spec(Path(config))
    execution = spec.execution.model_copy(update={"train_deployment": train_deployment})
    return {
        "spec": spec.model_copy(update={"execution": execution}).model_dump(mode="json"),
        "evaluation": spec.evaluation().model_dump(mode="json"),
    }
