"""A build step for `deployments/prefect.yaml`: the parameters of a deployment are an example's configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from goldgate.config import load_spec


def load(config: str, train_deployment: str | None = "train/gpu") -> dict[str, Any]:
    """Read a configuration as parameters of a deployment: `{"spec": …}` as JSON, every path absolute.

    The store is the environment's GOLDGATE_STORE, else `.goldgate` in the working directory. It must be absolute, since
    a run's working directory is a temporary one.

    Args:
        config: the YAML file, relative to the working directory.
        train_deployment: the deployment that training is handed to; None trains inside the run.

    Raises:
        SpecError: as `load_spec`.
    """
    spec = load_spec(Path(config))
    store = os.environ.get("GOLDGATE_STORE") or spec.execution.store
    execution = spec.execution.model_copy(
        update={"store": store if "://" in store else str(Path(store).absolute()), "train_deployment": train_deployment}
    )
    return {"spec": spec.model_copy(update={"execution": execution}).model_dump(mode="json")}
