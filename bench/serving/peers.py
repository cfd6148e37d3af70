"""lm-evaluation-harness on one job, in its own environment: `python peers.py JOB.json RESULT.json`.

Nothing here imports Goldgate. The harness asks the server as its `local-chat-completions` does, with its own code from
the rows to the score; what is timed is all of that, and of it the requests alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(job_file: str, result_file: str) -> None:
    """Evaluate, and write the answer to each item with the seconds that it took."""
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.openai_completions import LocalChatCompletion

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    os.environ["OPENAI_API_KEY"] = job["key"]
    asking = 0.0

    class Timed(LocalChatCompletion):
        def generate_until(self, *args: Any, **kwargs: Any) -> list[str]:
            nonlocal asking
            began = time.perf_counter()
            try:
                return super().generate_until(*args, **kwargs)
            finally:
                asking += time.perf_counter() - began

    model = Timed(
        base_url=f"{job['url']}/chat/completions", model=job["model"], num_concurrent=job["clients"], max_retries=3
    )
    began = time.perf_counter()
    task = ConfigurableTask(
        config={
            "task": "golden",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": job["items"]}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{target}}",
            "generation_kwargs": {
                "do_sample": False,
                "temperature": 0,
                "max_gen_toks": job["max_tokens"],
                "until": [],
                "structured_outputs": {"choice": job["choices"]},
            },
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
    )
    found = simple_evaluate(
        model=model,
        tasks=[task],
        apply_chat_template=True,
        system_instruction=job["system"],
        log_samples=True,
        bootstrap_iters=0,
    )
    whole = time.perf_counter() - began
    (samples,) = found["samples"].values()
    result = {
        "version": version("lm-eval"),
        "asking_seconds": asking,
        "whole_seconds": whole,
        "score": sum(sample["exact_match"] for sample in samples) / len(samples),
        "answers": {sample["doc"]["id"]: sample["resps"][0][0] for sample in samples},
    }
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
