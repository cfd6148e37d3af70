"""From the spec's `engine` and a model to a running engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tasks.contracts.errors import EvaluationError
from tasks.contracts.spec import EvaluateSpec, ExecutionSpec
from tasks.evaluation.engines.embedded import EmbeddedEngine, embedded_identity
from tasks.evaluation.engines.engine import Engine
from tasks.evaluation.engines.openai_http import OpenAIEngine, openai_identity
from tasks.evaluation.engines.vllm import VllmEngine, vllm_environment, vllm_identity
from tasks.tracking import model_folder

_REMOTE = "openai:"


def engine_identity(evaluate: EvaluateSpec) -> str:
    """What evaluations by this engine share, without starting it.

    Raises:
        EvaluationError: vLLM's environment is missing.
    """
    match evaluate.engine:
        case "embedded":
            return embedded_identity()
        case "vllm":
            return vllm_identity(vllm_environment())
        case url:
            return openai_identity(url)


def check_engine(evaluate: EvaluateSpec, uri: str) -> None:
    """Refuse, before any compute is spent, a model that this engine cannot be asked, or an engine that is not there.

    Raises:
        EvaluationError: engine and model do not go together, or vLLM's environment is missing.
        SpecError: the engine's address cannot be used.
    """
    engine_identity(evaluate)
    at_url = evaluate.engine not in ("embedded", "vllm")
    if at_url and not uri.startswith(_REMOTE):
        raise EvaluationError(
            "A server is asked for the models that it holds; this model is in files.",
            where=f"model {uri}, engine {evaluate.engine}",
            fix="set `evaluate.engine` to embedded or vllm, or name a model of the server as openai:<model>",
        )
    if not at_url and uri.startswith(_REMOTE):
        raise EvaluationError(
            "This model is behind a server, and no server is named.",
            where=f"model {uri}, engine {evaluate.engine}",
            fix="set `evaluate.engine` to the server's base URL",
        )


@contextmanager
def open_engine(evaluate: EvaluateSpec, uri: str, execution: ExecutionSpec) -> Iterator[Engine]:
    """An engine for one model; it is closed at the end of the block.

    Args:
        evaluate: which engine, and how many items at a time.
        uri: the model, as `SystemUnderTest.uri` has it.
        execution: where store and registry are.

    Raises:
        EvaluationError: as `check_engine`.
        ModelError: the model is not there or cannot be loaded.
    """
    check_engine(evaluate, uri)
    engine: Engine
    match evaluate.engine:
        case "embedded":
            engine = EmbeddedEngine(model_folder(uri, execution), batch_size=evaluate.batch_size)
        case "vllm":
            engine = VllmEngine(model_folder(uri, execution), batch_size=evaluate.batch_size)
        case url:
            engine = OpenAIEngine(url, uri.removeprefix(_REMOTE), batch_size=evaluate.batch_size)
    try:
        yield engine
    finally:
        engine.close()
