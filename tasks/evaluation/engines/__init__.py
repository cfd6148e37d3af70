"""The ways to ask a model: inside this process, over HTTP, or through a vLLM that is started for it."""

from tasks.evaluation.engines.choose import check_engine, engine_identity, open_engine
from tasks.evaluation.engines.engine import Answer, Engine

__all__ = ["Answer", "Engine", "check_engine", "engine_identity", "open_engine"]
