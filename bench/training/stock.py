"""The stock trainer: `python -m bench.training.stock SPEC.json` trains by trl's SFTTrainer and leaves an adapter.

QLoRA as its documentation shows it: NF4 with double quantisation, bfloat16, peft's LoRA on all linear layers. What the
recipe says is as in Goldgate's plan (rows, batch size, learning rate and schedule, rank, clip); rows come tokenised, so
that both trainers see the same tokens, and take the loss on the same ones. All else is a default, but for `options`:

- `config`: arguments of `SFTConfig`.
- `model`: arguments of `from_pretrained`; `dtype` by its name.
- `compute_dtype`: of the 4-bit layers, by its name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.training.examples import Example


def columns(rows: Sequence[Example]) -> dict[str, list[list[int]]]:
    """Tokenised rows as SFTTrainer takes them: `completion_mask` is 1 on the tokens that the loss is taken on."""
    return {
        "input_ids": [row.input_ids for row in rows],
        "completion_mask": [[0] * (len(row.input_ids) - row.answer_tokens) + [1] * row.answer_tokens for row in rows],
    }


def main(spec: dict[str, Any]) -> None:
    """Train, and save the adapter into `out/adapter`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from tasks.contracts.prompt import tuned_prompt
    from tasks.contracts.spec import TaskSpec, TrainSpec
    from tasks.training.examples import tokenize_file
    from tasks.training.recipe import make_plan

    options = spec["options"]
    recipe = TrainSpec.model_validate(spec["recipe"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    prompt = tuned_prompt(TaskSpec.model_validate(spec["task"]))
    rows = tokenize_file(Path(spec["train"]), prompt, tokenizer, recipe.max_tokens)
    plan = make_plan(recipe, len(rows), dev_rows=1)
    on_cuda = torch.cuda.is_available()
    model_options = {"dtype": "bfloat16"} | options.get("model", {})
    model = AutoModelForCausalLM.from_pretrained(
        spec["model"],
        **model_options,
        device_map={"": 0 if on_cuda else "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, options.get("compute_dtype", "bfloat16")),
        ),
    )
    arguments: dict[str, Any] = {
        "output_dir": spec["out"],
        "num_train_epochs": plan.epochs,
        "per_device_train_batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": plan.warmup_steps,
        "weight_decay": plan.weight_decay,
        "max_grad_norm": plan.gradient_norm,
        "max_length": None,  # no row is cut off
        "completion_only_loss": True,  # with tokenised rows the default would be the loss on all tokens
        "seed": plan.seed,
        "use_cpu": not on_cuda,
        "logging_steps": 1,  # for the curves; Goldgate logs as often on as few steps
        "save_strategy": "no",  # a checkpoint would not count either
        "report_to": [],
    }
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments | options.get("config", {})),
        train_dataset=Dataset.from_dict(columns(rows)),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=plan.lora_rank, lora_alpha=plan.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.model.save_pretrained(Path(spec["out"]) / "adapter")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
