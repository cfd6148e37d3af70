"""Back ends are refused before anything starts, each refusal with its reason; what is handed to one is the plan."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tasks.contracts.errors import TrainingError
from tasks.contracts.spec import AdapterSpec, BatchLayout, Kernels, TrainBackend, TrainMethod, TrainSpec
from tasks.training.backends import answer_positions, check_backend, check_plan, load_with_unsloth
from tasks.training.recipe import SpeedPlan, TrainPlan, make_plan

PACKED = SpeedPlan(base="packed", compute_dtype="bfloat16", checkpointing=True)


def make(speed: SpeedPlan = PACKED, **recipe: Any) -> TrainPlan:
    return make_plan(TrainSpec(**recipe), train_rows=100, dev_rows=20, speed=speed)


@pytest.fixture
def without_unsloth(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "unsloth" else find(name, *rest)
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.usefixtures("without_unsloth")
def test_transformers_can_always_be_had(device: str) -> None:
    check_backend(TrainBackend.TRANSFORMERS, device)


@pytest.mark.parametrize(
    ("device", "what", "fix"),
    [
        ("cpu", "this machine has none", "execution.train_deployment"),
        ("cuda", "is not installed", "install unsloth in an environment of its own"),
    ],
)
@pytest.mark.usefixtures("without_unsloth")
def test_unsloth_says_what_it_lacks(device: str, what: str, fix: str) -> None:
    with pytest.raises(TrainingError, match=what) as refusal:
        check_backend(TrainBackend.UNSLOTH, device)
    assert refusal.value.where == "train.backend = unsloth"
    assert refusal.value.fix.startswith("set it to transformers")
    assert fix in refusal.value.fix


def test_unsloth_passes_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    check_backend(TrainBackend.UNSLOTH, "cuda")


@pytest.mark.parametrize(
    ("plan", "where"),
    [
        (make(method=TrainMethod.FULL), "train.method = full"),
        (make(adapter=AdapterSpec(dora=True)), "train.adapter.dora = true"),
        (make(PACKED.model_copy(update={"base": "dequantised"})), "train.speed.base = dequantised"),
        (make(PACKED.model_copy(update={"batches": BatchLayout.FLAT})), "train.speed.batches = flat"),
        (make(PACKED.model_copy(update={"kernels": Kernels.LIGER})), "train.speed.kernels = liger"),
        (make(PACKED.model_copy(update={"compile": True})), "train.speed.compile = true"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_unsloth_cannot_do_is_refused_by_its_knob(plan: TrainPlan, where: str) -> None:
    with pytest.raises(TrainingError, match="unsloth cannot do this") as refusal:
        check_plan(plan)
    assert refusal.value.where == where


def test_plans_that_unsloth_can_do_pass() -> None:
    check_plan(make())
    check_plan(make(PACKED.model_copy(update={"base": "plain"}), method=TrainMethod.LORA))


class StandIn:
    """What of Unsloth is called, over transformers and peft; it keeps what it was asked for."""

    asked: dict[str, dict[str, Any]]

    def __init__(self) -> None:
        self.asked = {}

    def from_pretrained(self, **options: Any) -> tuple[Any, None]:
        from transformers import AutoModelForCausalLM

        self.asked["model"] = options
        return AutoModelForCausalLM.from_pretrained(options["model_name"], dtype=options["dtype"]), None

    def get_peft_model(self, model: Any, **options: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        self.asked["adapter"] = options
        known = {name: options[name] for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")}
        return get_peft_model(model, LoraConfig(**known, task_type="CAUSAL_LM"))


def test_unsloth_is_asked_for_the_plan_and_answers_at_positions(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    stand_in = StandIn()
    module = ModuleType("unsloth")
    module.FastLanguageModel = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth", module)
    plan = make(
        PACKED.model_copy(update={"base": "plain", "compute_dtype": "float32"}),
        method=TrainMethod.LORA, lora_rank=4, adapter=AdapterSpec(targets=("q_proj", "v_proj"), rslora=True),
    )  # fmt: skip

    model = load_with_unsloth(tiny_model, plan)

    asked, adapter = stand_in.asked["model"], stand_in.asked["adapter"]
    assert (asked["model_name"], asked["load_in_4bit"], asked["dtype"]) == (str(tiny_model), False, torch.float32)
    assert (asked["max_seq_length"], asked["trust_remote_code"]) == (plan.max_tokens, False)
    assert (adapter["r"], adapter["lora_alpha"], adapter["use_rslora"]) == (4, 8, True)
    assert (adapter["target_modules"], adapter["random_state"]) == (["q_proj", "v_proj"], plan.seed)
    assert adapter["use_gradient_checkpointing"] == "unsloth"
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}

    ids, places = torch.arange(5, 25).view(2, 10), torch.tensor([3, 7, 9])
    model.eval()
    with torch.inference_mode():
        got = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=places).logits
        base = model.get_base_model()
        wanted = base.lm_head(base.model(input_ids=ids).last_hidden_state)[:, places]
    assert got.shape == (2, 3, 512)
    assert torch.equal(got, wanted)


def test_positions_are_answered_as_transformers_answers_them(tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    ids, places = torch.arange(5, 25).view(2, 10), torch.tensor([0, 4])
    with torch.inference_mode():
        wanted = model(input_ids=ids, logits_to_keep=places).logits
        answer_positions(model)
        assert torch.equal(model(input_ids=ids, logits_to_keep=places).logits, wanted)
