"""What a golden set can show is planned before it is frozen, by the gate's own tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from goldgate.config import load_spec
from goldgate.golden_plan import enough_items, first_level, margin_of, plan_record, planner_of, power
from tasks.contracts.spec import MetricGuard, Policy, RetrainSpec
from tasks.data.golden import Draft
from tasks.data.golden_slices import Part
from tasks.gate.effects import PairedShares
from tests.goldgate.shell import Call

EXAMPLES = Path(__file__).parents[2] / "examples"
COMPLAINTS = EXAMPLES / "complaints" / "complaints.yaml"
SLICES = "golden.slices=[rare_class, long, short, typed_noise, adversarial]"


def spec_of(**policy: Any) -> RetrainSpec:
    return load_spec(COMPLAINTS).model_copy(update={"policy": Policy(**policy)})


# -- how many items -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("margin", "discordance"), [(0.1, 0.1), (0.15, 0.2), (0.2, 0.4), (0.3, 0.2)])
def test_so_many_items_are_enough_and_hardly_more_than_enough(margin: float, discordance: float) -> None:
    items = enough_items(margin, discordance, 0.025)
    assert power(items, -margin, discordance, 0.025) >= 0.8
    assert power(round(items * 0.85), -margin, discordance, 0.025) < 0.8


def test_the_power_is_how_often_the_gate_shows_it() -> None:
    """1,000 made-up evaluations of 79 items: the share that is shown lies within four standard errors."""
    draw = np.random.default_rng(11)
    items, margin, level = 79, 0.15, 0.025
    shown = sum(
        PairedShares(int(wins), int(losses), items).p_above(-margin, level) < level
        for wins, losses, _ in draw.multinomial(items, [0.1, 0.1, 0.8], size=1_000)
    )
    expected = power(items, -margin, 0.2, level)
    assert expected == pytest.approx(0.8047, abs=0.001)
    assert abs(shown / 1_000 - expected) < 4 * (0.8 * 0.2 / 1_000) ** 0.5


def test_a_large_slice_is_planned_by_the_formula() -> None:
    assert enough_items(0.05, 0.2, 0.025) == 623


@pytest.mark.parametrize(
    ("guards", "margin"),
    [
        ((), 0.1),  # golden.slice_loss
        (({"slice": "long", "margin": 0.05},), 0.05),
        (({"slice": "short", "margin": 0.05},), 0.1),
        (({"slice": "*", "margin": 0.15}, {"slice": "long", "metric": "valid_output", "margin": 0.12}), 0.12),
        (({"slice": "long", "floor": 0.5}, {"margin": 0.02}), 0.1),
    ],
)
def test_the_guards_say_which_loss_has_to_be_ruled_out(guards: tuple[dict[str, Any], ...], margin: float) -> None:
    spec = spec_of(guards=tuple(MetricGuard(**guard) for guard in guards))
    assert margin_of(spec, "long") == margin
    assert planner_of(spec).items_needed("long") == enough_items(margin, 0.2, 0.025)


@pytest.mark.parametrize(
    ("policy", "level"),
    [
        ({}, 0.025),  # alpha spending: half of alpha
        ({"alpha": 0.1, "looks": "off"}, 0.1),
        ({"looks": "bonferroni", "declared_looks": 5}, 0.01),
        ({"looks": "ladder"}, 0.0125),
    ],
)
def test_the_plan_is_for_the_first_look(policy: dict[str, Any], level: float) -> None:
    assert first_level(spec_of(**policy)) == pytest.approx(level)


@pytest.mark.parametrize(
    ("policy", "part", "effect"),
    [
        ({}, Part(None, 900, 300, 300, 300, 300), 0.0721),
        ({}, Part(None, 900, 300, 300, 100, 100), 0.1238),  # families of three count as one each
        ({"min_improvement": 0.05}, Part(None, 900, 300, 300, 300, 300), 0.1212),
        ({"objective": "non_inferior", "margin": 0.05}, Part(None, 900, 300, 300, 300, 300), 0.0220),
        ({"min_improvement": 0.05}, Part("long", 900, 300, 300, 300, 300), 0.0721),
        ({}, Part("long", 0, 20, 0, 0, 0), None),
        ({}, Part("long", 0, 20, 5, 5, 5), None),  # five items show nothing at all
    ],
)
def test_what_a_part_shows(policy: dict[str, Any], part: Part, effect: float | None) -> None:
    found = planner_of(spec_of(**policy)).smallest_effect(part)
    assert found == (None if effect is None else pytest.approx(effect, abs=1e-4))


def test_the_record_says_all_that_the_table_does() -> None:
    spec = spec_of()
    part = Part(None, 900, 300, 300, 300, 300)
    record = plan_record(Draft([], [part], left=600, synthetic=2, notes=("a note",)), spec)
    assert record == {
        "level": 0.025,
        "discordance": 0.2,
        "parts": [part._asdict() | {"smallest_effect": planner_of(spec).smallest_effect(part)}],
        "left_for_training": 600,
        "synthetic_left_out": 2,
        "notes": ["a note"],
    }


# -- the commands -----------------------------------------------------------------------------------------------------


def lines_of(out: str) -> dict[str, list[str]]:
    """The table's lines by the part that they are about."""
    cells = [line.split() for line in out.splitlines() if line.strip()]
    return {"all items" if line[:2] == ["all", "items"] else line[0]: line for line in cells}


def test_a_plan_freezes_nothing(call: Call, tmp_path: Path) -> None:
    ended = call("golden", "plan", COMPLAINTS, "--set", f"golden.path={tmp_path}/golden", "--set", SLICES)
    assert ended.code == 0, ended.err
    assert not (tmp_path / "golden").exists()
    lines = lines_of(ended.out)
    assert lines["typical"] == ["typical", "2,142", "300", "300", "300", "7.2", "points"]
    assert lines["typed_noise"] == ["typed_noise", "300", "173", "173", "173", "9.5", "points"]
    assert lines["long"] == ["long", "82", "173", "82", "82", "13.6", "points"]
    assert lines["all items"][:5] == ["all", "items", "2,142", "1,165", "970"]
    said = " ".join(ended.out.split())
    assert "The slice long has 82 of 173 items: a loss of 10.0 points will often be neither shown nor" in said
    assert "30.9 % of the items stand for the data as they come (slice typical)" in said
    assert "The slice typed_noise has" not in said
    assert "at the first look's level, 2.5 %, if the two models differ on 20.0 % of the items" in said
    assert "At most 1,518 rows are left for training." in said


def test_a_plan_for_programs(call: Call, tmp_path: Path) -> None:
    ended = call("golden", "plan", COMPLAINTS, "--set", f"golden.path={tmp_path}/golden", "--json")
    (part,) = ended.json["parts"]
    assert (part["name"], part["items"], part["available"]) == (None, 300, 2142)
    assert part["smallest_effect"] == pytest.approx(0.0721, abs=1e-4)
    assert ended.json["left_for_training"] == 1842


def test_a_slice_that_would_be_refused_is_in_the_plan(call: Call, tmp_path: Path) -> None:
    prices = EXAMPLES / "prices" / "prices.yaml"
    options = ["--set", f"golden.path={tmp_path}/golden", "--set", "golden.slices=[typed_noise]", "--set"]
    few = [*options, "golden.items=9"]
    ended = call("golden", "plan", prices, *few)
    assert ended.code == 0
    assert lines_of(ended.out)["typed_noise"][-1] == "none"
    assert "below 10 it is refused: add data that fit it, or take it out" in " ".join(ended.out.split())
    ended = call("golden", "freeze", prices, *few)
    assert ended.code == 1
    assert "The slice typed_noise would have" in ended.err
    assert not (tmp_path / "golden").exists()


def test_freezing_shows_the_plan_and_keeps_it(call: Call, tmp_path: Path) -> None:
    options = ["--set", f"golden.path={tmp_path}/golden", "--set", "golden.slices=[typed_noise]"]
    ended = call("golden", "freeze", COMPLAINTS, *options, "--set", "golden.slice_items=20")
    assert ended.code == 0, ended.err
    assert lines_of(ended.out)["typed_noise"][:4] == ["typed_noise", "300", "20", "20"]
    manifest = json.loads((tmp_path / "golden" / "golden.json").read_text())
    assert f"sha256 {manifest['digest']}" in ended.out
    everything, typical, noise = manifest["parts"]
    assert (everything["items"], everything["groups"]) == (320, 300)
    assert (typical["name"], noise["name"]) == ("typical", "typed_noise")
    assert noise["smallest_effect"] == pytest.approx(0.3483, abs=1e-3)


def test_from_items_to_say_in_other_words_to_the_slice(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    options = ["--set", f"golden.path={tmp_path}/golden", "--set", "golden.items=40"]
    assert call("golden", "plan", COMPLAINTS, *options, "--to-paraphrase", path).code == 0
    items = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(items) == 40
    again = call("golden", "plan", COMPLAINTS, *options, "--to-paraphrase", path)
    assert (again.code, "The items cannot be written: File exists" in again.err) == (1, True)
    refused = call("golden", "plan", COMPLAINTS, *options, "--set", "golden.slices=[paraphrase]")
    assert refused.code == 1
    assert "goldgate golden plan CONFIG --to-paraphrase FILE" in refused.err
    said = tmp_path / "said.jsonl"
    said.write_text("".join(json.dumps(one | {"text": f"Put otherwise: {one['text']}"}) + "\n" for one in items[:12]))
    options += ["--set", "golden.slices=[paraphrase]", "--set", f"golden.paraphrases={said}"]
    ended = call("golden", "freeze", COMPLAINTS, *options)
    assert ended.code == 0, ended.err
    assert lines_of(ended.out)["paraphrase"][:4] == ["paraphrase", "12", "173", "12"]


def test_paraphrases_are_beside_the_configuration(tmp_path: Path) -> None:
    config = tmp_path / "task.yaml"
    config.write_text(COMPLAINTS.read_text())
    spec = load_spec(config, ["golden.slices=[paraphrase]", "golden.paraphrases=said.jsonl"])
    assert spec.golden.paraphrases == str(tmp_path / "said.jsonl")
    assert load_spec(config).golden.paraphrases is None
