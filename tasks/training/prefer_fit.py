"""One preference tuning: from an adapter and pairs to a better adapter and a merged model.

Direct preference optimisation (Rafailov et al., arXiv:2305.18290) by trl's `DPOTrainer`. The policy starts from the
adapter of the first training; the reference is a frozen copy of that adapter on the same base, so beside the policy it
takes only an adapter's memory, and it is asked once, before the first step. For a prompt x with chosen answer y+ and
rejected y- the loss is

    -log sigmoid(beta * (log p(y+|x)/q(y+|x) - log p(y-|x)/q(y-|x))) - w * mean log p(y+|x)

with policy p, reference q, and in the second term (RPO, arXiv:2404.19733) the mean over the chosen answers' tokens.
The first term sees only the difference: alone, it may well make both answers unlikely and a third one likely.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState
from trl import DPOConfig, DPOTrainer

from tasks.contracts.errors import TrainingError
from tasks.contracts.progress import Progress
from tasks.contracts.prompt import Prompt, tuned_prompt
from tasks.contracts.rows import read_rows
from tasks.contracts.spec import BatchLayout, Kernels
from tasks.tracking import TrackedRun, open_run
from tasks.training.base_model import trusts_code
from tasks.training.checkpoints import CURVES
from tasks.training.energy import EnergyMeter, find_meters
from tasks.training.examples import Example, tokenize_row
from tasks.training.forecast import device_words
from tasks.training.frozen_base import compute_dtype, device_name, load_for_training, written_out_weights
from tasks.training.job import SUMMARY, append_record, write_progress, write_whole
from tasks.training.manifest import MANIFEST, facts_to_log, write_manifest
from tasks.training.merge import merge_adapter
from tasks.training.prefer import Pair, PreferJob, PreferOutcome, read_pairs
from tasks.training.recipe import TrainPlan, make_plan
from tasks.training.speed.batches import pad
from tasks.training.speed.choose import choose_speed, describe_model
from tasks.training.watch import peak_memory_bytes

_LOG_POINTS = 100  # about so many points make a readable curve
_POLICY, _REFERENCE = "default", "ref"  # names that peft and trl give the two adapters


class PairExample(NamedTuple):
    """A pair as tokens: the same prompt with each answer."""

    chosen: Example
    rejected: Example


class DpoTrainer(DPOTrainer):
    """DPOTrainer that takes tokens as they are.

    trl's own tokenising keeps what a chat template writes between turns as part of both answers, which the first
    training leaves out and no engine draws, and it cannot leave an answer that was cut without its end.
    """

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


def tune(job: PreferJob) -> PreferOutcome:
    """Tune and merge.

    Raises:
        TrainingError: a row is too long, the loss is not finite, or nothing was learned at all.
        ServiceError: MLflow cannot be reached.
    """
    request, device = job.request, device_name()
    trust_code = trusts_code(job.request.recipe, job.model_folder)
    tokenizer = AutoTokenizer.from_pretrained(job.model_folder, trust_remote_code=trust_code)
    prompt = tuned_prompt(request.task)
    longest = request.recipe.max_tokens
    pairs = [tokenize_pair(pair, prompt, tokenizer, longest) for pair in read_pairs(job.pairs_file)]
    held_out = [tokenize_row(row, prompt, tokenizer, longest) for row in read_rows(job.held_out_file)]
    plan = plan_of(job, len(pairs), len(held_out), device)
    with _tracked(job, plan, device, len(pairs)) as run:
        model = load_policy(job, plan, device)
        start = _state(model, pairs, held_out, plan.batch_size)
        listener = _Listener(job, plan, run)
        (job.out / CURVES).touch()
        listener.keep({"step": 0, **start._asdict()})
        trainer = make_trainer(job, plan, device, model, tokenizer, pairs, listener)
        started = time.monotonic()
        with EnergyMeter(find_meters(device)) as meter:
            trainer.train()
        seconds = time.monotonic() - started
        check_moved(trainer.model)
        end = _state(trainer.model, pairs, held_out, plan.batch_size)
        listener.keep({"step": plan.total_steps, **end._asdict()})
        trainable = sum(p.numel() for name, p in trainer.model.named_parameters() if f".{_POLICY}." in name)
        write_progress(job.scratch, Progress(plan.total_steps, plan.total_steps, "steps", "merging"))
        _save_adapter(job, trainer.model)
        written_out = written_out_weights(model, plan, device)
        del trainer, model, listener  # two copies of the base model need not be in memory
        gc.collect()
        skews = merge_adapter(
            job.model_folder, job.out / "adapter", job.out / "merged", plan, device,
            [pair.chosen for pair in pairs],  # of the mined part: the held-out part chooses nothing
            trust_code=trust_code, written_out=written_out,
        )  # fmt: skip
        rows = math.ceil(plan.total_rows * sum(len(e.input_ids) for pair in pairs for e in pair) / len(pairs))
        result = PreferOutcome(
            pairs=len(pairs),
            steps=plan.total_steps,
            dev_loss_before=start.dev_loss,
            dev_loss=end.dev_loss,
            preferred_before=start.preferred,
            preferred=end.preferred,
            margin_before=start.margin,
            margin=end.margin,
            seconds=round(seconds, 1),
            tokens=rows,
            tokens_per_second=round(rows / seconds, 1),
            peak_memory_bytes=peak_memory_bytes(),
            trainable_parameters=trainable,
            device=device,
            compute_dtype=plan.speed.compute_dtype,
            merged_onto=skews[0].onto,
            mlflow_run_id=run.id,
            mlflow_url=run.url,
        )
        summary = {
            "result": result.model_dump(),
            "plan": plan.model_dump(mode="json"),
            "preference": request.preference.model_dump(mode="json"),
            "merges": [skew._asdict() for skew in skews],
        }
        write_whole(job.out / SUMMARY, json.dumps(summary, indent=2) + "\n")
        manifest = write_manifest(job.out, job, plan, result, device_words(device), meter.energy(), skews=skews)
        run.log_metrics(facts_to_log(manifest), step=plan.total_steps)
        for name in CURVES, SUMMARY, MANIFEST:
            run.log_artifact(job.out / name)
    return result


def tokenize_pair(pair: Pair, prompt: Prompt, tokenizer: Any, max_tokens: int) -> PairExample:
    """Render a pair as the first training renders a row; a rejected answer that was cut has no end token.

    Raises:
        TrainingError: as `tokenize_row`.
    """
    chosen = tokenize_row(pair.row, prompt, tokenizer, max_tokens)
    rejected = tokenize_row(replace(pair.row, target=pair.rejected), prompt, tokenizer, max_tokens + pair.cut)
    if pair.cut:
        rejected = rejected._replace(input_ids=rejected.input_ids[:-1], answer_tokens=rejected.answer_tokens - 1)
    return PairExample(chosen, rejected)


def plan_of(job: PreferJob, pairs: int, held_out: int, device: str) -> TrainPlan:
    """The plan of the stage: the first training's adapter and base, the stage's own steps, and the plain way.

    trl's loss goes through the model's own layers, so batches are padded and kernels plain; pairs are few.

    Raises:
        TrainingError: there are no pairs or no held-out rows.
    """
    recipe, preference = job.request.recipe, job.request.preference
    own = {
        "epochs": preference.epochs,
        "learning_rate": preference.learning_rate,
        "batch_size": preference.batch_size,
        "gradient_accumulation": 1,
        "seed": preference.seed,
    }
    dtype = str(compute_dtype(device, recipe.speed.compute)).removeprefix("torch.")
    plain = recipe.speed.model_copy(update={"batches": BatchLayout.PADDED, "kernels": Kernels.PLAIN, "compile": False})
    recipe = recipe.model_copy(update=own | {"speed": plain})
    return make_plan(
        recipe, pairs, held_out, speed=choose_speed(recipe, device, dtype, describe_model(job.model_folder))
    )


def load_policy(job: PreferJob, plan: TrainPlan, device: str) -> PeftModel:
    """The base as the first training held it, with its adapter to go on with, in float32."""
    base = load_for_training(
        job.model_folder, plan, device, trust_code=trusts_code(job.request.recipe, job.model_folder)
    )
    model = PeftModel.from_pretrained(base, job.adapter_folder, is_trainable=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def make_trainer(
    job: PreferJob,
    plan: TrainPlan,
    device: str,
    model: PeftModel,
    tokenizer: Any,
    pairs: Sequence[PairExample],
    listener: TrainerCallback,
) -> DPOTrainer:
    """The trainer of a plan; the reference's log-probabilities are worked out here."""
    on_cuda, preference = device == "cuda", job.request.preference
    config = DPOConfig(
        output_dir=str(job.scratch),
        beta=preference.beta,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, preference.answer_weight],
        precompute_ref_log_probs=True,
        max_length=None,  # too long a row was refused; nothing is cut off
        max_steps=plan.total_steps,
        per_device_train_batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=plan.warmup_steps,
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.gradient_norm,
        optim="adamw_torch_fused",
        bf16=on_cuda,
        use_cpu=not on_cuda,
        gradient_checkpointing=plan.speed.checkpointing,
        save_strategy="no",
        logging_steps=max(1, min(10, plan.total_steps // _LOG_POINTS)),
        logging_nan_inf_filter=False,  # the filter would show the last good loss in place of a NaN
        dataloader_pin_memory=on_cuda,
        seed=plan.seed,
        data_seed=plan.seed,
        report_to=[],
        disable_tqdm=True,
    )
    rows = Dataset.from_list([columns_of(pair) for pair in pairs])
    trainer = DpoTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[listener])
    # On a base that was loaded in 4 bits, trl rounds the policy to bfloat16 after it has copied the reference: they
    # would part before the first step, and bfloat16 is too coarse for the small updates at the end of the schedule.
    for name, parameter in model.named_parameters():
        if f".{_POLICY}." in name:
            parameter.data = model.get_parameter(reference_of(name)).detach().float().clone()
    return trainer


def reference_of(name: str) -> str:
    """The name of the reference's copy of a parameter of the policy."""
    return name.replace(f".{_POLICY}.", f".{_REFERENCE}.")


def columns_of(pair: PairExample) -> dict[str, list[int]]:
    """A pair as DPOTrainer reads it."""
    prompt = len(pair.chosen.input_ids) - pair.chosen.answer_tokens
    return {
        "prompt_ids": pair.chosen.input_ids[:prompt],
        "chosen_ids": pair.chosen.input_ids[prompt:],
        "rejected_ids": pair.rejected.input_ids[prompt:],
    }


def answer_log_probs(model: Any, examples: Sequence[Example], batch_size: int) -> list[float]:
    """Log-probability of each answer given its prompt, summed over the answer's tokens, in nats."""
    found: list[float] = []
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    for start in range(0, len(examples), batch_size):
        rows = [example._asdict() for example in examples[start : start + batch_size]]
        batch = {name: tensor.to(device) for name, tensor in pad(rows).items()}
        labels = batch["labels"][:, 1:]
        answers = (labels != -100).any(dim=0).nonzero().flatten()
        with torch.no_grad():
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
                logits_to_keep=answers,
            ).logits
        wanted = labels[:, answers]
        nats = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="none"
        )
        found += [-value for value in nats.view(len(rows), -1).sum(dim=1).tolist()]
    model.train(was_training)
    return found


def check_moved(model: Any) -> None:
    """Refuse a tuning that left the adapter as it was.

    Raises:
        TrainingError: policy and reference are the same.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if all(
        torch.equal(weight.float(), weights[reference_of(name)].float())
        for name, weight in weights.items()
        if f".{_POLICY}." in name
    ):
        raise TrainingError(
            "Preference tuning changed nothing: the adapter is as it was at the start.",
            where="preference",
            fix="raise `preference.epochs` or `preference.learning_rate`",
        )


class _State(NamedTuple):
    dev_loss: float
    preferred: float
    margin: float


def _state(model: Any, pairs: Sequence[PairExample], held_out: Sequence[Example], batch_size: int) -> _State:
    dev = sum(answer_log_probs(model, held_out, batch_size))
    chosen = answer_log_probs(model, [pair.chosen for pair in pairs], batch_size)
    rejected = answer_log_probs(model, [pair.rejected for pair in pairs], batch_size)
    margins = [yes - no for yes, no in zip(chosen, rejected, strict=True)]
    return _State(
        dev_loss=round(-dev / sum(example.answer_tokens for example in held_out), 6),
        preferred=round(sum(margin > 0 for margin in margins) / len(pairs), 6),
        margin=round(sum(margins) / len(pairs), 6),
    )


class _Listener(TrainerCallback):
    """Writes progress, curves and metrics as they come; refuses a loss that is no number."""

    def __init__(self, job: PreferJob, plan: TrainPlan, run: TrackedRun) -> None:
        self.job, self.plan, self.run = job, plan, run

    def keep(self, record: dict[str, float]) -> None:
        """One line of the curves, and the same in MLflow."""
        append_record(self.job.out / CURVES, record)
        values = {name: value for name, value in record.items() if name != "step"}
        self.run.log_metrics(values | {"peak_memory_bytes": peak_memory_bytes()}, step=int(record["step"]))

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Keep what was measured.

        Raises:
            TrainingError: a loss or gradient is not finite.
        """
        if not logs or "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(float(logs.get(name, 0.0))):
                raise TrainingError(
                    f"Preference tuning diverged: the {name.replace('_', ' ')} at step {state.global_step} is "
                    f"{logs[name]}.",
                    where=f"preference.learning_rate = {self.plan.learning_rate}",
                    fix="lower `preference.learning_rate` (half is a good try)",
                )
        self.keep(
            {
                "step": state.global_step,
                "preference_loss": round(float(logs["loss"]), 6),
                "reward_margin": round(float(logs["rewards/margins"]), 6),
                "reward_accuracy": round(float(logs["rewards/accuracies"]), 6),
                "learning_rate": float(logs["learning_rate"]),
            }
        )
        note = f"loss {float(logs['loss']):.3f}"
        write_progress(self.job.scratch, Progress(state.global_step, self.plan.total_steps, "steps", note))


def _tracked(job: PreferJob, plan: TrainPlan, device: str, pairs: int) -> Any:
    request = job.request
    preference = {f"preference.{name}": value for name, value in request.preference.model_dump().items()}
    return open_run(
        request.execution,
        request.name,
        "prefer",
        key=job.fingerprint,
        tags={
            "goldgate.step": "prefer",
            "goldgate.base_model": request.base.source,
            "goldgate.base_digest": request.base.digest,
            "goldgate.trained_from": request.trained.merged_digest,
            "goldgate.device": device,
        },
        params=plan.model_dump(mode="json", exclude={"speed"})
        | plan.speed.model_dump(mode="json")
        | preference
        | {"pairs": pairs},
    )


def _save_adapter(job: PreferJob, model: Any) -> None:
    """The policy's adapter into the job's `out`; nothing in it depends on where the store is."""
    config = model.peft_config[_POLICY]
    config.base_model_name_or_path = job.request.base.source
    config.target_modules = sorted(config.target_modules)  # a set would be written in another order each time
    model.save_pretrained(job.out / "adapter", selected_adapters=[_POLICY])
    (job.out / "adapter" / "README.md").unlink(missing_ok=True)  # a model card with nothing filled in
