"""The one judge of all adapters: `python -m bench.training.judge SPEC.json` prints the dev loss of each.

An adapter is put on the base that both trainers train on, NF4 with double quantisation, written out once in float32,
and every dev row is scored on its own by plain transformers and peft: no padding, no batches, no code of a trainer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def load_base(folder: str) -> Any:
    """The NF4 base in float32."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=quantised
    )
    return model.dequantize().float()


def dev_loss(model: Any, rows: list[Any]) -> float:
    """Mean of -log p over the answer tokens of all rows, in nats."""
    nats, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        with torch.inference_mode():
            scores = model(input_ids=ids, logits_to_keep=row.answer_tokens + 1).logits[0, :-1].double().log_softmax(-1)
        answer = ids[0, -row.answer_tokens :]
        nats -= float(scores.gather(1, answer[:, None]).sum())
        tokens += row.answer_tokens
    return nats / tokens


def main(spec: dict[str, Any]) -> list[float]:
    """The dev loss of each adapter."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    from tasks.contracts.prompt import tuned_prompt
    from tasks.contracts.spec import TaskSpec
    from tasks.training.examples import tokenize_file

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    prompt = tuned_prompt(TaskSpec.model_validate(spec["task"]))
    rows = tokenize_file(Path(spec["dev"]), prompt, tokenizer, spec["max_tokens"])
    base, losses = load_base(spec["model"]), []
    for adapter in spec["adapters"]:
        model = PeftModel.from_pretrained(base, adapter).float().eval()
        losses.append(dev_loss(model, rows))
        base = model.unload()
    return losses


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
