"""Models with the prompt that they are asked through."""

from __future__ import annotations

from tasks.contracts.prompt import Prompt, base_prompt, tuned_prompt
from tasks.contracts.references import BaseModelRef, SuiteRef, SystemUnderTest, TrainedModelRef
from tasks.contracts.spec import EvaluateSpec, ExecutionSpec, PromptKind, TaskSpec
from tasks.store import digest_bytes, digest_folder


def base_system(base: BaseModelRef, prompt: Prompt) -> SystemUnderTest:
    """The base model, asked through a prompt; the label says how many worked examples it is shown."""
    shots = len(prompt.shots)
    return SystemUnderTest(
        uri=f"{base.uri}#model",
        digest=base.digest,
        prompt=prompt,
        role="base_model",
        label=f"base model, {shots}-shot" if shots else "base model, zero-shot",
    )


def trained_system(trained: TrainedModelRef, task: TaskSpec) -> SystemUnderTest:
    """What training made: the merged model, asked with the bare instruction."""
    return SystemUnderTest(
        uri=f"{trained.uri}#merged",
        digest=trained.merged_digest,
        prompt=tuned_prompt(task),
        role="candidate",
        label=f"candidate {trained.merged_digest[:8]}",
    )


def for_suite(system: SystemUnderTest, suite: SuiteRef) -> SystemUnderTest:
    """A model as it is asked about another task: both sides of a comparison through that task's base prompt."""
    return system.model_copy(update={"prompt": base_prompt(suite.task)})


def any_system(
    uri: str, task: TaskSpec, evaluate: EvaluateSpec, execution: ExecutionSpec, prompt: PromptKind
) -> SystemUnderTest:
    """Any model, asked as a tuned model (the bare instruction) or as a base model (the answers spelled out).

    A model behind a server has no bytes here; its digest is that of its name and address.

    Raises:
        ModelError: no model is there.
    """
    from tasks.tracking import model_folder

    if uri.startswith("openai:"):
        digest = digest_bytes(f"{evaluate.engine} {uri}".encode())
    else:
        digest = digest_folder(model_folder(uri, execution))
    chosen = tuned_prompt(task) if prompt is PromptKind.TUNED else base_prompt(task)
    return SystemUnderTest(uri=uri, digest=digest, prompt=chosen, role="other", label=uri)
