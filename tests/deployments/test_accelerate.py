"""The configurations for several devices are what `accelerate launch` reads, and say what their comments say."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "deployments" / "accelerate"
NAMES = ("ddp.yaml", "fsdp.yaml")


def launch_arguments(name: str, *extra: str) -> Any:
    """The configuration as `accelerate launch` understands it."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    words = ["--config_file", str(FOLDER / name), *extra, "-m", "tasks.training.worker", "spec.json"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return arguments, defaults


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_every_key(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(FOLDER / name))  # refuses unknown keys
    assert (config.num_machines, config.machine_rank, config.main_process_port) == (1, 0, 0)
    assert config.mixed_precision == "no"  # the recipe's business
    assert config.use_cpu is False


def test_all_files_are_tested() -> None:
    assert {file.name for file in FOLDER.iterdir()} == set(NAMES)


def test_ddp_starts_a_process_for_each_device() -> None:
    arguments, _ = launch_arguments("ddp.yaml", "--num_processes", "4")
    assert (arguments.multi_gpu, arguments.use_fsdp, arguments.num_processes) == (True, False, 4)
    assert (arguments.mixed_precision, arguments.dynamo_backend) == ("no", "no")


def test_fsdp_keys_are_all_known_to_accelerate() -> None:
    from accelerate.commands.launch import launch_command_parser

    _, defaults = launch_arguments("fsdp.yaml")
    known = set(vars(launch_command_parser().parse_args(["-m", "x"])))
    assert set(defaults.fsdp_config) <= known  # it would ignore others without a word


def test_fsdp_wraps_every_layer_of_the_model(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from accelerate.utils.launch import prepare_multi_gpu_env
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    arguments, _ = launch_arguments("fsdp.yaml", "--num_processes", "2")
    assert (arguments.multi_gpu, arguments.use_fsdp) == (False, True)
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    assert not plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(target_modules="all-linear"))
    plugin.set_auto_wrap_policy(model)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert policy is not None
    wrapped = [name for name, module in model.named_modules() if policy(module)]
    assert wrapped == ["base_model.model.model.layers.0", "base_model.model.model.layers.1"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_names_this_machine(name: str) -> None:
    assert not re.search(r"(?:[\s\"':]|file:/)/(?:home|root|work|tmp|Users)\b", (FOLDER / name).read_text())
