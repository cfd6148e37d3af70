"""Report and Data Docs in a real MLflow and a real browser: in its sandboxed frame they say all that they have to."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tasks.contracts.spec import ExecutionSpec, Policy
from tasks.report.folder import write_folder
from tasks.report.links import keep_in_mlflow
from tasks.store import Store
from tests.data.test_validate import check
from tests.data.toy_data import rows
from tests.report.example import APPROVED
from tests.report.test_report_folder import BY_VERDICT, make_run

pytestmark = [pytest.mark.services, pytest.mark.browser, pytest.mark.timeout(600)]

CHROMIUM = shutil.which("chromium")
_SECONDS = 180.0  # MLflow's page is 10 MB of scripts, which a busy machine runs slowly


@pytest.fixture
def mlflow(tmp_path: Path) -> Iterator[str]:
    """The address of an MLflow server, as `goldgate up` starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", address.rpartition(":")[2],
        "--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db",
        "--no-serve-artifacts", "--default-artifact-root", (tmp_path / "mlartifacts").as_uri(),
    ]  # fmt: skip
    with (tmp_path / "mlflow.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + _SECONDS
        while not answers(f"{address}/health"):
            assert server.poll() is None, (tmp_path / "mlflow.log").read_text()
            assert time.monotonic() < deadline, "MLflow did not answer"
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(timeout=30)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def test_both_pages_are_whole_inside_of_mlflow(mlflow: str, tmp_path: Path) -> None:
    if CHROMIUM is None:
        reason = "chromium is not installed (apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    store = Store(str(tmp_path / "store"))
    run = make_run(store, Policy())
    spec = run.spec.model_copy(update={"execution": ExecutionSpec(store=store.root, tracking_uri=mlflow)})
    check(tmp_path, [*rows(50), {"id": "x", "text": "secret text", "label": "sales"}])
    valid = run.valid.model_copy(update={"data_docs": str(tmp_path / "valid/data_docs/index.html")})
    run = run._replace(links={"Training in MLflow": f"{mlflow}/#/training", "Data Docs": "file:///a%20b/index.html"})
    releases = {"Promoted": BY_VERDICT, "Approved by Anna Meier": APPROVED}
    links = {
        word: keep_in_mlflow(
            spec, run.verdict, release, valid, write_folder(store, run._replace(spec=spec, release=release))
        )
        for word, release in releases.items()
    }

    asked: list[str] = []
    with sync_playwright() as playwright:
        # In a container, Chromium's sandbox needs privileges that it does not get; the one site it opens is ours.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def shown(address: str) -> str:
            page = browser.new_page()  # a link is opened from elsewhere; MLflow's own page does not follow its address
            page.on("request", lambda request: asked.append(request.url))
            page.set_default_timeout(1000 * _SECONDS)
            page.goto(address, wait_until="commit")
            frame = page.frame_locator("iframe#html")
            frame.locator("h1").wait_for()
            assert frame.locator("a").count() == 0
            assert page.locator("iframe#html").get_attribute("sandbox") == "allow-scripts"  # so no link can open
            text = frame.locator("body").inner_text()
            page.close()
            return text

        for word, addresses in links.items():
            report, data_docs = shown(addresses["Report"]), shown(addresses["Data Docs"])
            for said in (word, f"{mlflow}/#/training", "/a b/index.html"):
                assert said in report
            for said in ("Passed, with rows quarantined", "label 'sales' is none of the task's labels"):
                assert said in data_docs
        browser.close()
    assert [url for url in asked if not url.startswith((mlflow, f"blob:{mlflow}", "data:"))] == []
