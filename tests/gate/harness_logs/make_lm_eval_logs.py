"""Writes the logs of lm-evaluation-harness in this folder; see README.md."""

import json
import shutil
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.dummy import DummyLM

HERE = Path(__file__).parent
CHOICES = ["dog", "cat", "horse"]
ROWS = [("What says meow?", 1, "cat"), ("What barks?", 0, "a dog"), ("What gallops?", 2, "cow")]


class Pets(DummyLM):
    """The harness's dummy model, with answers to these three questions."""

    def _answer(self, request) -> str:
        return next(answer for question, _, answer in ROWS if question in request.arguments[0])

    def generate_until(self, requests, disable_tqdm=False):
        return [self._answer(request) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        return [
            (-1.0 if request.arguments[1].strip() in self._answer(request) else -2.5, False) for request in requests
        ]


def tasks(data: Path) -> list[dict]:
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "Q: {{question}}\nA:",
    }
    regex = {"function": "regex", "regex_pattern": r"(\w+)$"}
    generate = {
        **common,
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [
            {"metric": name, "aggregation": by, "higher_is_better": True}
            for name, by in (("exact_match", "mean"), ("bleu", "bleu"))
        ],
    }
    return [
        {
            **common,
            "task": "choice",
            "output_type": "multiple_choice",
            "doc_to_target": "answer",
            "doc_to_choice": "choices",
            "metric_list": [
                {"metric": name, "aggregation": by, "higher_is_better": name != "brier_score"}
                for name, by in (("acc", "mean"), ("acc_norm", "mean"), ("brier_score", "brier_score"))
            ],
        },
        {**generate, "task": "generate"},
        {
            **generate,
            "task": "filters",
            "filter_list": [
                {
                    "name": "strict-match",
                    "filter": [{**regex, "regex_pattern": r"^(\w+)$"}, {"function": "take_first"}],
                },
                {"name": "flexible-extract", "filter": [regex, {"function": "take_first"}]},
            ],
        },
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "pets.json")
        rows = [{"question": question, "choices": CHOICES, "answer": answer} for question, answer, _ in ROWS]
        data.write_text("\n".join(json.dumps(row) for row in rows))
        tracker = EvaluationTracker(output_path=f"{folder}/out")
        results = lm_eval.simple_evaluate(
            model=Pets(), tasks=tasks(data), log_samples=True, evaluation_tracker=tracker, bootstrap_iters=0
        )
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for name in samples:
            tracker.save_results_samples(task_name=name, samples=samples[name])
            shutil.copy(next(Path(folder, "out").rglob(f"samples_{name}_*")), HERE / f"samples_{name}.jsonl")
        totals = json.loads(next(Path(folder, "out").rglob("results_*")).read_text())
        kept = {name: totals[name] for name in ("results", "group_subtasks", "configs", "versions", "n-samples")}
        kept["configs"] = {}
        (HERE / "results.json").write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
