"""Make the work pools and automations and deploy every flow, on the server that PREFECT_API_URL names."""

import os
import sys
import tempfile
from pathlib import Path

from goldgate.services import DEPLOYMENTS, deploy
from tasks.contracts.errors import GoldgateError


def main() -> int:
    """Deploy, and show what Prefect says; the exit status is 1 if it refuses anything."""
    server = os.environ["PREFECT_API_URL"].removesuffix("/api")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "deploy.log"
        try:
            deploy(server, os.environ, DEPLOYMENTS / "prefect.yaml", log)
        except GoldgateError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        sys.stdout.write(log.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
