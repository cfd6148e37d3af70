"""MLflow as all rooms use it: where it is, runs that can be continued, and models found by URI.

Importing this imports no mlflow.
"""

from tasks.tracking.address import connect, ensure_reachable, tracking_uri
from tasks.tracking.models import RegisteredFiles, model_folder, registered_files
from tasks.tracking.runs import TrackedRun, open_run, run_link

__all__ = [
    "RegisteredFiles",
    "TrackedRun",
    "connect",
    "ensure_reachable",
    "model_folder",
    "open_run",
    "registered_files",
    "run_link",
    "tracking_uri",
]
