"""The same over a real MLflow server that keeps the files itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tasks.contracts.errors import ModelError, RegistryError
from tasks.contracts.spec import ExecutionSpec
from tasks.registry.champion import find_champion
from tasks.registry.register import rollback
from tasks.registry.versions import aliases_of, status
from tasks.store import Store, digest_folder
from tasks.tracking import connect, model_folder, open_run, registered_files, run_link
from tests.registry.workshop import PROMPT, Workshop

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, lively_model: Path) -> Iterator[Workshop]:
    """A server over a database that runs without a server have used before: experiment `before` has local files."""
    home = tmp_path_factory.mktemp("server")
    local = ExecutionSpec(store=str(home / "store"))
    with open_run(local, "before", "run", key="k", tags={}, params={}):
        pass
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
                "--backend-store-uri", f"sqlite:///{local.store}/mlflow.db",
                "--serve-artifacts", "--artifacts-destination", str(home / "artifacts"),
            ],
            stdout=log, stderr=log, cwd=home, start_new_session=True,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip
    try:
        for _ in range(240):
            try:
                if httpx.get(f"{url}/health", timeout=5).text == "OK":
                    break
            except httpx.HTTPError:
                assert server.poll() is None, (home / "server.log").read_text()[-3000:]
            time.sleep(0.5)
        else:
            pytest.fail((home / "server.log").read_text()[-3000:])
        yield Workshop(ExecutionSpec(store=local.store, tracking_uri=url), lively_model)
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=60)


def test_run_has_a_page(served: Workshop) -> None:
    with open_run(served.execution, "pages", "run", key="k", tags={}, params={"lr": 1}) as run:
        run.log_table("items", [{"id": "a"}])
        run.log_metrics({"loss": 1.0})
        run.log_dataset("train", "a" * 64, "/data", 3)
    assert run.url is not None
    assert run.url == run_link(served.execution, "pages", "k")
    assert run.url.endswith(f"/runs/{run.id}")
    assert run_link(served.execution, "pages", "other") is None
    assert connect(served.execution).get_run(run.id).info.artifact_uri.startswith("mlflow-artifacts:")
    assert [file.path for file in connect(served.execution).list_artifacts(run.id)] == ["items.json"]


@pytest.mark.parametrize("name", ["complaints", "before"])
def test_register_load_and_roll_back(served: Workshop, name: str) -> None:
    one, two = served.trained(f"one {name}"), served.trained(f"two {name}")
    first, second = served.verdict(one), served.verdict(two, one)
    served.register(first, one, served.spec(name))
    champion = find_champion(name, served.execution)
    assert champion is not None
    assert (champion.uri, champion.digest, champion.prompt) == (f"models:/{name}/1", one.merged_digest, PROMPT)
    result = served.register(second, two, served.spec(name))
    assert (result.version, result.previous_version) == ("2", "1")
    assert served.register(second, two, served.spec(name)) == result
    assert status(name, served.execution).versions == 2

    folder = model_folder(f"models:/{name}@champion", served.execution)
    assert digest_folder(folder) == two.merged_digest
    kept = Store(served.execution.store)
    source = kept.files(kept.open(served.certificate(second, two).uri))
    files = registered_files(f"models:/{name}@champion", served.execution)
    assert files.artifacts["certificate"].read_bytes() == (source / "certificate.json").read_bytes()
    assert digest_folder(files.artifacts["evidence"]) == digest_folder(source / "evidence")
    written = (folder / "config.json").stat().st_mtime_ns
    assert model_folder(f"models:/{name}/2", served.execution) == folder  # not downloaded again
    assert (folder / "config.json").stat().st_mtime_ns == written

    assert rollback(name, served.execution, "bad").version == "1"
    assert aliases_of(connect(served.execution), name) == {"champion": "1", "previous": "2"}

    (folder / "config.json").write_text("{}")
    with pytest.raises(RegistryError, match=f"files of models:/{name}/2 are not those"):
        model_folder(f"models:/{name}/2", served.execution)


def test_nobody_is_registered(served: Workshop) -> None:
    assert find_champion("nobody", served.execution) is None
    with pytest.raises(ModelError, match="registry has no such model"):
        model_folder("models:/nobody@champion", served.execution)
    with pytest.raises(RegistryError, match="no previous version"):
        rollback("nobody", served.execution, "bad")


def test_loads_by_alias_over_http(served: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    one = served.trained("loads")
    served.register(served.verdict(one), one, served.spec("loads"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(served.execution.tracking_uri))
    root = mlflow.artifacts.download_artifacts("models:/loads@champion")
    assert digest_folder(Path(root) / "artifacts" / "merged") == one.merged_digest
    assert registered_files("models:/loads@champion", served.execution).version == "1"
