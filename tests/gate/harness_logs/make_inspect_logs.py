"""Writes the logs of inspect_ai in this folder; see README.md."""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai import eval as evaluate
from inspect_ai.dataset import Sample
from inspect_ai.log import read_eval_log, write_eval_log
from inspect_ai.log._recorders.chunked import convert_eval_logs_to_chunked
from inspect_ai.model import ChatMessageUser, ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import Score, Target, accuracy, match, mean, scorer, stderr
from inspect_ai.solver import Generate, TaskState, solver

HERE = Path(__file__).parent


@scorer(metrics={"short": [mean()], "polite": [mean(), stderr()]})
def manners():
    async def score(state: TaskState, target: Target) -> Score:
        answer = state.output.completion
        return Score(value={"short": len(answer) < 6, "polite": 0.25 if "please" in answer else 0.75})

    return score


@scorer(metrics=[accuracy()])
def grade():
    async def score(state: TaskState, target: Target) -> Score:
        answer = state.output.completion
        if "?" in answer:
            return Score.unscored(reason="grader_failed")
        value = "P" if "maybe" in answer else "N" if not answer else "C" if target.text in answer else "I"
        return Score(value=value, answer=answer[:3])

    return score


@solver
def stumble(fails: str, hangs: str):
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        if fails and fails in state.input_text:
            raise RuntimeError("the pet ran away")
        if hangs and hangs in state.input_text:
            time.sleep(3600)
        return await generate(state)

    return solve


@task
def pets(fails: str = "", hangs: str = "") -> Task:
    return Task(
        dataset=[
            Sample(id="cat", input="What says meow?", target="cat"),
            Sample(id=2, input=[ChatMessageUser(content="What barks?")], target=["dog", "hound"]),
            Sample(input="What gallops?", target="horse", choices=["a horse", "a house"]),
        ],
        solver=stumble(fails, hangs),
        scorer=[match(), manners(), grade()],
    )


def output(answer: str) -> ModelOutput:
    made = ModelOutput.from_content("mockllm/model", answer)
    tokens = len(answer.split())
    made.usage = ModelUsage(input_tokens=12, output_tokens=tokens, total_tokens=12 + tokens)
    return made


def run(folder: str, answers: str, epochs: int = 1, goes_on: bool = False, **arguments: str) -> Path:
    model = get_model("mockllm/model", custom_outputs=[output(answer) for answer in answers.split("|")])
    logs = evaluate(
        pets(**arguments), model=model, epochs=epochs, log_dir=folder, display="none", max_samples=1, log_buffer=1,
        fail_on_error=not goes_on,
    )  # fmt: skip
    return Path(logs[0].location)


def keep(log: Path, name: str) -> None:
    """Read and write by inspect_ai, without the events, the tracebacks and the names of this machine."""
    content = read_eval_log(str(log))
    content.eval.model_args = {}
    content.eval.packages = {"inspect_ai": content.eval.packages["inspect_ai"]}
    content.eval.revision = None
    for error in [content.error, *(sample.error for sample in content.samples or [])]:
        if error is not None:
            error.traceback = error.traceback_ansi = ""
    for sample in content.samples or []:
        sample.events, sample.events_data, sample.messages = [], None, []
    write_eval_log(content, str(HERE / name))


def main() -> None:
    if sys.argv[1:]:
        run(sys.argv[1], "cat|dog|horse", hangs="gallops")
    with tempfile.TemporaryDirectory() as folder:
        keep(run(folder, "cat|maybe a dog please|horse"), "plain.json")
        two_epochs = run(folder, "cat|maybe a dog please||cat|a wolf|horse", epochs=2)
        keep(two_epochs, "two_epochs.eval")
        keep(run(folder, "cat|dog?|horse"), "unscored.eval")
        keep(run(folder, "cat|horse", goes_on=True, fails="barks"), "errored.eval")
        keep(run(folder, "cat|horse", fails="barks"), "failed.json")
        convert_eval_logs_to_chunked(str(HERE / "two_epochs.eval"), f"{folder}/chunked")
        shutil.copy(f"{folder}/chunked/two_epochs.eval", HERE / "chunked.eval")
        killed = subprocess.Popen([sys.executable, __file__, f"{folder}/killed"])
        time.sleep(20)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        shutil.copy(next(Path(folder, "killed").glob("*.eval")), HERE / "killed.eval")


if __name__ == "__main__":
    main()
