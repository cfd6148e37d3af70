"""MLflow as all rooms use it: where it is, runs that can be continued, and models found by URI.

Importing this imports no mlflow.
"""

from tasks.tracking.address import connect, ensure_reachable, quiet, sqlite_path, tracking_uri, without_password
from tasks.tracking.models import MERGED_DIGEST, RegisteredFiles, model_folder, registered_files
from tasks.tracking.runs import TrackedRun, open_run, run_link

__all__ = [
    "MERGED_DIGEST",
    "RegisteredFiles",
    "TrackedRun",
    "connect",
    "ensure_reachable",
    "model_folder",
    "open_run",
    "quiet",
    "registered_files",
    "run_link",
    "sqlite_path",
    "tracking_uri",
    "without_password",
]
