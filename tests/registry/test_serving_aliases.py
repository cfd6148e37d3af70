"""Who waits for its rollout, and how the aliases move with traffic: killed anywhere, called again, the same end."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from tasks.contracts.errors import ModelError, RegistryError
from tasks.contracts.references import RegisteredModelRef
from tasks.contracts.serving import Aliases, Intent, Phase, VersionRef
from tasks.contracts.spec import Override
from tasks.registry.baseline import set_baseline
from tasks.registry.champion import find_opponent
from tasks.registry.register import register, rollback
from tasks.registry.serving_aliases import (
    move_champion,
    read_aliases,
    refuse_version,
    resolve_version,
    restore_aliases,
)
from tasks.registry.versions import status
from tasks.tracking import connect
from tests.registry.workshop import PROMPT, Killed, Killer, Workshop

AT = datetime(2026, 11, 22, 14, 57, tzinfo=UTC)


def promote(workshop: Workshop, name: str, marker: str, beaten: str | None = None) -> RegisteredModelRef:
    """A version that waits."""
    trained = workshop.trained(marker)
    verdict = workshop.verdict(trained, workshop.trained(beaten) if beaten else None)
    return register(verdict, workshop.certificate(verdict, trained), trained, workshop.spec(name), waits=True)


def change(workshop: Workshop, name: str, to: str, was: str | None = None, **fields: Any) -> Intent:
    def ref(version: str) -> VersionRef:
        return resolve_version(name, version, workshop.execution)

    made = {
        "id": "c", "name": name, "kind": "rollout", "to": ref(to), "was": ref(was) if was else None,
        "phase": Phase.SWITCHING, "by": "Ada", "why": "promoted", "at": AT, "holder": "h",
        "aliases": read_aliases(name, workshop.execution),
    }  # fmt: skip
    return Intent(**(made | fields))


def test_a_promoted_version_waits_and_the_champion_stays(workshop: Workshop, name: str) -> None:
    workshop.register(workshop.verdict(workshop.trained("one")), workshop.trained("one"), workshop.spec(name))
    waiting = promote(workshop, name, "two", "one")
    assert (waiting.version, waiting.alias, waiting.previous_version) == ("2", "promoted", None)
    assert read_aliases(name, workshop.execution) == Aliases(champion="1", promoted="2")
    assert promote(workshop, name, "two", "one") == waiting  # the same run again
    assert promote(workshop, name, "three", "one").version == "3"
    assert read_aliases(name, workshop.execution) == Aliases(champion="1", promoted="3")
    seen = status(name, workshop.execution)
    assert seen.promoted is not None
    assert (seen.promoted.version, seen.versions) == ("3", 3)
    opponent = find_opponent(name, workshop.trained("three"), workshop.execution)
    assert opponent.system is not None
    assert opponent.system.label == "champion v1"


def test_what_is_champion_already_does_not_wait(workshop: Workshop, name: str) -> None:
    promote(workshop, name, "one")
    move_champion(change(workshop, name, "1"), workshop.execution)
    again = promote(workshop, name, "one")
    assert (again.alias, again.previous_version) == ("champion", None)
    assert read_aliases(name, workshop.execution) == Aliases(champion="1")


def test_a_version_is_resolved_by_alias_or_number(workshop: Workshop, name: str) -> None:
    with pytest.raises(RegistryError, match=f"No version of {name!r} waits for its rollout"):
        resolve_version(name, None, workshop.execution)
    promote(workshop, name, "one")
    found = resolve_version(name, None, workshop.execution)
    assert (found.version, found.digest) == ("1", workshop.trained("one").merged_digest)
    assert (found.uri, found.label, found.certified) == (f"models:/{name}/1", f"{name}@1", True)
    assert (found.prompt, found.decoding.max_new_tokens) == (PROMPT, 8)
    assert resolve_version(name, "1", workshop.execution) == found
    with pytest.raises(ModelError, match="no such model"):
        resolve_version(name, "9", workshop.execution)
    client = connect(workshop.execution)
    client.delete_model_version_tag(name, "1", "goldgate.merged_digest")
    with pytest.raises(RegistryError, match=r"has no tag goldgate\.merged_digest"):
        resolve_version(name, None, workshop.execution)


def test_a_promotion_over_a_champion_of_yesterday_does_not_go_live_by_itself(workshop: Workshop, name: str) -> None:
    promote(workshop, name, "one")
    move_champion(change(workshop, name, "1"), workshop.execution)
    promote(workshop, name, "two", "one")
    second = change(workshop, name, "2", "1")
    promote(workshop, name, "three", "one")
    move_champion(second, workshop.execution)  # version 2 goes live while 3 waits, which was judged against 1
    assert read_aliases(name, workshop.execution) == Aliases(champion="2", previous="1", promoted="3")
    with pytest.raises(RegistryError, match="Version 3 was judged against another champion; version 2 is champion now"):
        resolve_version(name, None, workshop.execution)
    assert resolve_version(name, "3", workshop.execution).version == "3"  # on a person's word


def test_a_baseline_is_resolved_by_its_number_alone(workshop: Workshop, name: str) -> None:
    from tasks.contracts.references import SystemUnderTest
    from tasks.store import digest_folder

    spec = workshop.spec(name).evaluation()
    system = SystemUnderTest(
        uri=str(workshop.model), digest=digest_folder(workshop.model), prompt=PROMPT, role="other", label="old"
    )
    set_baseline(spec, system, Override(by="Ada", reason="it has run for years"))
    assert resolve_version(name, "1", workshop.execution).certified is False
    connect(workshop.execution).set_registered_model_alias(name, "promoted", "1")
    with pytest.raises(RegistryError, match="has no certificate, so nothing shows that it may go live"):
        resolve_version(name, None, workshop.execution)


def test_a_refused_version_says_why_and_is_not_registered_again(workshop: Workshop, name: str) -> None:
    promote(workshop, name, "one")
    refused = change(workshop, name, "1", problems=("It is slow.", "It errs."))
    refuse_version(refused, workshop.execution)
    refuse_version(refused, workshop.execution)
    assert read_aliases(name, workshop.execution) == Aliases()
    with pytest.raises(RegistryError, match=r"is version 1, and its rollout was refused: It is slow\. It errs\."):
        promote(workshop, name, "one")
    connect(workshop.execution).set_registered_model_alias(name, "champion", "1")
    seen = status(name, workshop.execution).champion
    assert seen is not None
    assert seen.rollout_refused is not None
    assert (seen.rollout_refused.reasons, seen.rollout_refused.at) == (("It is slow.", "It errs."), AT)
    move_champion(change(workshop, name, "1"), workshop.execution)  # a person named it, and it went live
    assert "goldgate.rollout_refused" not in connect(workshop.execution).get_model_version(name, "1").tags


def test_a_newer_promotion_keeps_its_alias_when_an_older_version_is_refused(workshop: Workshop, name: str) -> None:
    promote(workshop, name, "one")
    older = change(workshop, name, "1", problems=("It errs.",))
    promote(workshop, name, "two")
    refuse_version(older, workshop.execution)
    assert read_aliases(name, workshop.execution) == Aliases(promoted="2")


def test_killed_anywhere_while_the_aliases_move_or_are_put_back(workshop: Workshop) -> None:
    for done in range(4):
        name = f"moved-{done}"
        promote(workshop, name, "one")
        move_champion(change(workshop, name, "1"), workshop.execution)
        promote(workshop, name, "two", "one")
        before = read_aliases(name, workshop.execution)
        moved = change(workshop, name, "2", "1")
        with pytest.MonkeyPatch.context() as patched:
            killer = Killer(patched, done)
            if done == 3:
                move_champion(moved, workshop.execution)
                assert killer.calls == [*2 * ["set_registered_model_alias"], "delete_registered_model_alias"]
            else:
                with pytest.raises(Killed):
                    move_champion(moved, workshop.execution)
        if done % 2:
            move_champion(moved, workshop.execution)
            assert read_aliases(name, workshop.execution) == Aliases(champion="2", previous="1"), done
        restore_aliases(moved, workshop.execution)
        assert read_aliases(name, workshop.execution) == before, done
        restore_aliases(moved, workshop.execution)
        assert read_aliases(name, workshop.execution) == before, done


def test_a_rollback_at_the_gateway_leaves_what_one_without_it_leaves(workshop: Workshop, name: str) -> None:
    one, two = workshop.trained("one"), workshop.trained("two")
    workshop.register(workshop.verdict(one), one, workshop.spec(name))
    workshop.register(workshop.verdict(two, one), two, workshop.spec(name))
    back = change(workshop, name, "1", "2", kind="rollback", why="wrong on refunds", aliases=Aliases())
    for done in range(4):
        with pytest.MonkeyPatch.context() as patched:
            Killer(patched, done)
            if done < 3:
                with pytest.raises(Killed):
                    move_champion(back, workshop.execution)
        move_champion(back, workshop.execution)
        after = status(name, workshop.execution)
        assert after.champion is not None
        assert after.previous is not None
        assert (after.champion.version, after.previous.version) == ("1", "2")
        assert after.previous.rolled_back is not None
        assert (after.previous.rolled_back.reason, after.previous.rolled_back.to_version) == ("wrong on refunds", "1")
        assert after.champion.rolled_back is None
        rollback(name, workshop.execution, "the next round")  # without the gateway: version 2 is champion again
