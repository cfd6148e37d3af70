"""Speaking to the gateway: its `/admin`, and questions to one engine through its public side."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import quote, urlsplit

import httpx
from pydantic import TypeAdapter, ValidationError

from tasks.contracts.errors import GoldgateError, ServiceError
from tasks.contracts.openai_chat import question, said
from tasks.contracts.review import ReviewItem
from tasks.contracts.rows import Row
from tasks.contracts.serving import (
    ADMIN_KEY,
    GATEWAY,
    CanaryStatus,
    EngineSpec,
    EngineStatus,
    Intent,
    Shadow,
    Traffic,
    VersionRef,
)
from tasks.contracts.spec import CanarySpec, ExecutionSpec
from tasks.store import Store

LEASE_SECONDS = 30.0  # how long others wait for one that was killed; three renewals may fail within it
_RENEWALS = 3
_PATIENCE = 15.0  # seconds in which a gateway that is restarted is there again
_ANSWER_SECONDS = 30.0  # for an answer of `/admin`; its slow work goes on behind it
_QUESTION_SECONDS = 120.0
_ASK_AGAIN_SECONDS = 0.5
_EXCERPT = 300
_OPEN, _LEFT = "intent", "lease_left"


class ConflictError(GoldgateError):
    """The gateway refused a change, since the world is another than whoever asked for it believed.

    Attributes:
        open: the change that is under way, if that is the reason.
        lease_left: seconds for which its holder may still be at work.
    """

    open: Intent | None = None
    lease_left: float | None = None


class LeaseLostError(GoldgateError):
    """Somebody else may be at work on this change by now, so no further step of it is taken."""


class Served(NamedTuple):
    """An engine's answer to one item.

    Attributes:
        text: the answer, read as evaluation reads it.
        label: the version that says it answered.
        latency_ms: time of the request.
        confidence: how sure it is, calibrated where that could be learnt; None for an answer that has none.
        review: whether a person is to look at it; None where the gateway does not say.
    """

    text: str
    label: str
    latency_ms: float
    confidence: float | None = None
    review: bool | None = None


class RolledBack(NamedTuple):
    """What a rollback has changed at the gateway; the registry is left to do."""

    intent: Intent
    traffic: Traffic


class GatewayClient:
    """A gateway, asked by one process. Calls that may be repeated are, for some seconds; its key reaches no message."""

    def __init__(self, url: str, key: str, *, patience: float = _PATIENCE, lease_seconds: float | None = None) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            url: address of the gateway, without a path.
            key: its admin key.
            patience: seconds for which a gateway that does not answer is asked again.
            lease_seconds: how long a change is this process's own without a sign of life; None is LEASE_SECONDS.
        """
        self.lease_seconds = LEASE_SECONDS if lease_seconds is None else lease_seconds
        self.url = url.rstrip("/")
        self._key = key
        self._patience = patience
        self._http = httpx.Client(
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=5.0),
            headers={"Authorization": f"Bearer {key}"},
            # A proxy of the environment must not come between this machine and itself.
            trust_env=urlsplit(self.url).hostname not in ("127.0.0.1", "localhost", "::1"),
        )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        self._http.close()

    # -- engines and traffic ------------------------------------------------------------------------------------

    def engines(self, name: str) -> tuple[EngineStatus, ...]:
        """The engines of a name, whatever their state."""
        found = TypeAdapter(tuple[EngineStatus, ...]).validate_json(self._get("/admin/engines").content)
        return tuple(engine for engine in found if engine.version.name == name)

    def engine(self, engine: str) -> EngineStatus | None:
        """One engine; None where the gateway knows none of this name."""
        answer = self._get(f"/admin/engines/{quote(engine, safe='')}", may_lack=True)
        return None if answer is None else EngineStatus.model_validate_json(answer.content)

    def start_engine(self, version: VersionRef, spec: EngineSpec) -> EngineStatus:
        """Have an engine run; one that runs is left alone."""
        body = {"version": version.model_dump(mode="json"), "spec": spec.model_dump(mode="json")}
        answer = self._send("PUT", f"/admin/engines/{quote(version.engine, safe='')}", body)
        return EngineStatus.model_validate_json(answer.content)

    def end_engine(self, engine: str, drain_seconds: float) -> None:
        """Give an engine no new requests, and end it once it has answered those it has; one that is gone is well.

        Raises:
            ConflictError: traffic goes to it.
        """
        path = f"/admin/engines/{quote(engine, safe='')}?drain_seconds={drain_seconds:g}"
        self._send("DELETE", path, None, may_lack=True)

    def traffic(self, name: str) -> Traffic | None:
        """Where requests of a name go; None where it has never been rolled out."""
        answer = self._get(f"/admin/traffic/{quote(name, safe='')}", may_lack=True)
        return None if answer is None else Traffic.model_validate_json(answer.content)

    def move_traffic(
        self,
        name: str,
        live: VersionRef,
        previous: VersionRef | None,
        *,
        from_revision: int,
        by: str,
        why: str,
        change: Intent | None = None,
    ) -> Traffic:
        """Send the requests of a name to another engine; where they go there already, nothing changes.

        Raises:
            ConflictError: somebody else has moved it since `from_revision`, the engine is not ready, or another change
                than `change` is under way.
        """
        body = {
            "live": live.model_dump(mode="json"),
            "previous": previous and previous.model_dump(mode="json"),
            "from_revision": from_revision,
            "by": by,
            "why": why,
            "change": change and {"id": change.id, "holder": change.holder},
        }
        answer = self._send("PUT", f"/admin/traffic/{quote(name, safe='')}", body)
        return Traffic.model_validate_json(answer.content)

    # -- a canary and a shadow ----------------------------------------------------------------------------------

    def canary(self, name: str) -> CanaryStatus:
        """How the canary of a name stands.

        Raises:
            ServiceError: nothing answers under this name.
        """
        return CanaryStatus.model_validate_json(self._get(f"/admin/canary/{quote(name, safe='')}").content)

    def begin_canary(self, change: Intent, spec: CanarySpec, *, from_revision: int) -> Traffic:
        """Let the version of a checked rollout answer a share of the requests; begun twice, it is begun once.

        Raises:
            ConflictError: the rollout is not this process's any more, its engine is not ready, or traffic has another
                revision.
        """
        body = {
            "change": {"id": change.id, "holder": change.holder},
            "spec": spec.model_dump(mode="json"),
            "from_revision": from_revision,
        }
        answer = self._send("PUT", f"/admin/canary/{quote(change.name, safe='')}", body)
        return Traffic.model_validate_json(answer.content)

    def end_canary(self, change: Intent) -> Traffic:
        """Let the version on trial answer no more; where none is, nothing changes.

        Raises:
            ConflictError: the change is not this process's any more.
        """
        body = {"change": {"id": change.id, "holder": change.holder}}
        answer = self._send("DELETE", f"/admin/canary/{quote(change.name, safe='')}", body)
        return Traffic.model_validate_json(answer.content)

    def begin_shadow(self, name: str, shadow: Shadow, *, from_revision: int, by: str) -> Traffic:
        """Have a version or a vendor answer a share of the requests unseen.

        Raises:
            ConflictError: there is another shadow, it is what answers already, or traffic has another revision.
        """
        body = {"shadow": shadow.model_dump(mode="json"), "from_revision": from_revision, "by": by}
        answer = self._send("PUT", f"/admin/shadow/{quote(name, safe='')}", body)
        return Traffic.model_validate_json(answer.content)

    def end_shadow(self, name: str, *, by: str) -> Traffic:
        """Have nothing answer unseen any more."""
        answer = self._send("DELETE", f"/admin/shadow/{quote(name, safe='')}?by={quote(by, safe='')}", None)
        return Traffic.model_validate_json(answer.content)

    # -- answers that wait for people ---------------------------------------------------------------------------

    def reviews(self, name: str, limit: int) -> list[ReviewItem]:
        """The oldest answers that the gateway has put aside for people."""
        answer = self._get(f"/admin/reviews/{quote(name, safe='')}?limit={limit}")
        return TypeAdapter(list[ReviewItem]).validate_json(answer.content)

    def forget_reviews(self, name: str, ids: Sequence[str]) -> None:
        """Have the gateway forget answers that have reached a queue; those that it has forgotten are well."""
        self._send("POST", f"/admin/reviews/{quote(name, safe='')}/taken", {"ids": list(ids)})

    # -- changes ------------------------------------------------------------------------------------------------

    def open_intent(self, name: str) -> Intent | None:
        """The change that is under way; None for none."""
        answer = self._get(self._intents(name), may_lack=True)
        return None if answer is None else Intent.model_validate_json(answer.content)

    def history(self, name: str) -> tuple[Intent, ...]:
        """The changes that have ended, the newest first."""
        return TypeAdapter(tuple[Intent, ...]).validate_json(self._get(f"{self._intents(name)}/history").content)

    def begin(self, intent: Intent) -> Intent:
        """Announce a change.

        Raises:
            ConflictError: another one is under way; it is in the error.
        """
        body = {"intent": intent.model_dump(mode="json"), "lease_seconds": self.lease_seconds}
        try:
            return Intent.model_validate_json(self._send("POST", self._intents(intent.name), body).content)
        except ConflictError as conflict:
            if conflict.open is not None and (conflict.open.id, conflict.open.holder) == (intent.id, intent.holder):
                return conflict.open  # the answer to the first attempt was lost on its way
            raise

    def write(self, intent: Intent) -> Intent:
        """Record how far a change is; a last phase ends it.

        Raises:
            ConflictError: it is not under way any more, or somebody else has taken it over.
        """
        body = {"intent": intent.model_dump(mode="json"), "lease_seconds": self.lease_seconds}
        return Intent.model_validate_json(self._send("PUT", self._intents(intent.name), body).content)

    def take(self, name: str, holder: str) -> Intent | None:
        """Take over a change whose holder is gone; None where it has ended meanwhile.

        Raises:
            ConflictError: its holder may still be at work, for `lease_left` seconds.
        """
        body = {"holder": holder, "lease_seconds": self.lease_seconds}
        answer = self._send("POST", f"{self._intents(name)}/take", body, may_lack=True)
        return None if answer is None else Intent.model_validate_json(answer.content)

    def roll_back(self, name: str, *, by: str, why: str, holder: str) -> RolledBack:
        """Send the requests of a name back to the engine that answered before, at once.

        Raises:
            ConflictError: there is none, it is not ready, or a rollout is just moving traffic.
        """
        body = {"by": by, "why": why, "holder": holder, "lease_seconds": self.lease_seconds}
        try:
            record = self._send("POST", f"/admin/rollback/{quote(name, safe='')}", body).json()
            return RolledBack(Intent.model_validate(record["intent"]), Traffic.model_validate(record["traffic"]))
        except ConflictError as conflict:
            begun, traffic = conflict.open, self.traffic(name)
            # A second attempt, whose first one's answer was lost, must not swap back.
            if begun is None or traffic is None or begun.kind != "rollback" or begun.holder != holder:
                raise
            return RolledBack(begun, traffic)

    @contextmanager
    def holding(self, intent: Intent) -> Iterator[Lease]:
        """Keep the lease of a change that this process works on, until the block ends."""
        lease = Lease(intent, self.lease_seconds)
        ended = threading.Event()

        def renew() -> None:
            with GatewayClient(self.url, self._key, patience=0.0) as client:  # a client of its own: another thread
                while not ended.wait(self.lease_seconds / _RENEWALS):
                    client.renew(lease)

        thread = threading.Thread(target=renew, name=f"lease of {intent.id}", daemon=True)
        thread.start()
        try:
            yield lease
        finally:
            ended.set()
            thread.join(timeout=_ANSWER_SECONDS)

    def renew(self, lease: Lease) -> None:
        """Ask for a lease anew; what comes of it is noted in the lease."""
        body = {"id": lease.id, "holder": lease.holder, "lease_seconds": lease.seconds}
        asked = time.monotonic()
        try:
            self._send("POST", f"{self._intents(lease.name)}/lease", body)
        except ConflictError as conflict:
            lease.lose(conflict.what)
        except GoldgateError as error:  # the gateway is away; the lease may outlast that
            lease.note(error.what)
        else:
            lease.renewed(asked)

    # -- questions ----------------------------------------------------------------------------------------------

    def ask(self, version: VersionRef, row: Row) -> Served:
        """Put an item to the engine of a version, through the gateway, in the way that it was evaluated.

        Raises:
            ServiceError: there is no answer, or none that can be read; says what came instead. An engine is not asked
                again: one that fails one question in ten is not to go live.
        """
        body = question(version.label, version.prompt, row, version.decoding)
        where = f"{self.url}/v1/chat/completions (item {row.id})"
        until = time.monotonic() + self._patience
        while True:
            started = time.perf_counter()
            try:
                answer = self._http.post(f"{self.url}/v1/chat/completions", json=body, timeout=_QUESTION_SECONDS)
                break
            except httpx.HTTPError as error:
                # The gateway itself is away, perhaps to be started again; what an engine does, it answers for.
                if isinstance(error, httpx.ReadTimeout) or time.monotonic() > until:
                    raise ServiceError(
                        f"No answer: {str(error) or type(error).__name__}", where=where, fix="see the gateway's log"
                    ) from error
                time.sleep(_ASK_AGAIN_SECONDS)
        latency_ms = 1000 * (time.perf_counter() - started)
        if not answer.is_success:
            raise ServiceError(
                f"HTTP {answer.status_code}: {self._message(answer)}", where=where, fix="see the engine's log"
            )
        try:
            record = answer.json()
            message = record["choices"][0]["message"]
            text = said(message, tools=bool(version.prompt.tools))
            label = str(answer.headers.get("x-goldgate-version") or record.get("model"))
            sure, review = (answer.headers.get(f"x-goldgate-{one}") for one in ("confidence", "review"))
            confidence = None if sure is None else float(sure)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ServiceError(
                f"This is no answer: {_short(answer.text)}", where=where, fix="see the engine's log"
            ) from error
        return Served(text, label, latency_ms, confidence, None if review is None else review == "yes")

    # -- requests -----------------------------------------------------------------------------------------------

    @staticmethod
    def _intents(name: str) -> str:
        return f"/admin/intents/{quote(name, safe='')}"

    def _get(self, path: str, *, may_lack: bool = False) -> Any:
        return self._send("GET", path, None, may_lack=may_lack)

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None, *, may_lack: bool = False) -> Any:
        """The gateway's answer; asked again while it cannot be reached. None for 404 if `may_lack`."""
        where = f"{method} {self.url}{path}"
        until = time.monotonic() + self._patience
        wait = 0.1
        while True:
            try:
                answer = self._http.request(method, f"{self.url}{path}", json=body)
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
            except (httpx.InvalidURL, ValueError) as error:
                raise ServiceError(
                    f"This is no address of a gateway: {error}", where=self.url, fix=f"correct {GATEWAY}"
                ) from error
            else:
                if not answer.is_server_error:
                    return self._checked(answer, where, may_lack=may_lack)
                reason = f"HTTP {answer.status_code}: {self._message(answer)}"
            if time.monotonic() + wait > until:
                raise ServiceError(
                    f"The gateway does not answer: {reason}",
                    where=where,
                    fix=f"start it (`goldgate serve`), or correct {GATEWAY}; a change under way is gone on with by the "
                    "next rollout, or by `goldgate rollout --recover NAME`",
                )
            time.sleep(wait)
            wait = min(2 * wait, 2.0)

    def _checked(self, answer: httpx.Response, where: str, *, may_lack: bool) -> httpx.Response | None:
        if answer.is_success:
            return answer
        what = self._message(answer)
        match answer.status_code:
            case httpx.codes.NOT_FOUND if may_lack:
                return None
            case httpx.codes.UNAUTHORIZED | httpx.codes.FORBIDDEN:
                raise ServiceError(
                    f"The gateway refuses access: {what}",
                    where=where,
                    fix=f"set the environment's {ADMIN_KEY} to the key in its file `serving/admin.key`",
                )
            case httpx.codes.CONFLICT:
                raise _conflict(answer, what, where)
        raise ServiceError(
            f"The gateway refuses the request (HTTP {answer.status_code}): {what}",
            where=where,
            fix="see that gateway and command line are of the same version of Goldgate, and the gateway's log",
        )

    def _message(self, answer: httpx.Response) -> str:
        try:
            text = str(answer.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            text = answer.text
        return _short(text.replace(self._key, "***"))


class Lease:
    """The right to work on a change, for a time that its holder extends."""

    def __init__(self, intent: Intent, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """A lease that was just given."""
        self.id, self.name, self.holder, self.seconds = intent.id, intent.name, intent.holder, seconds
        self._clock = clock
        self._until = clock() + seconds
        self._lost: str | None = None
        self._trouble = ""

    @property
    def lost(self) -> bool:
        """Whether somebody else may be at work by now."""
        return self._lost is not None or self._clock() >= self._until

    def renewed(self, asked: float) -> None:
        """It was given anew: it counts from when it was asked for, since the gateway's answer took its time."""
        self._until = asked + self.seconds

    def lose(self, why: str) -> None:
        """The gateway says that it is another's, or that the change has ended."""
        self._lost = why

    def note(self, trouble: str) -> None:
        """It could not be renewed this time."""
        self._trouble = trouble

    def check(self) -> None:
        """Refuse a further step once somebody else may be at work.

        Raises:
            LeaseLostError: it was lost, or could not be renewed in time.
        """
        if not self.lost:
            return
        raise LeaseLostError(
            f"The lease on this change is lost: {self._lost or self._trouble or 'it was not renewed in time'}",
            where=f"change {self.id} of {self.name}",
            fix="nothing: whoever took it over brings it to its end; see `goldgate rollout --show NAME`",
        )


def gateway_of(execution: ExecutionSpec) -> GatewayClient:
    """The gateway that this run is to speak to: GOLDGATE_GATEWAY, else the one that wrote its address into the store.

    Raises:
        ServiceError: none is named, or its key is not known.
    """
    found = find_gateway(execution)
    if found is None:
        raise ServiceError(
            "No gateway is known, so nothing can be rolled out.",
            where=_home(execution, "gateway.json"),
            fix=f"start one (`goldgate serve`), or set the environment's {GATEWAY} to its address",
        )
    return found


def find_gateway(execution: ExecutionSpec) -> GatewayClient | None:
    """As `gateway_of`; None where no gateway is named, neither in the environment nor in the store.

    Raises:
        ServiceError: one is named, and its address cannot be read or its key is not known.
    """
    store = Store(execution.store)
    url = os.environ.get(GATEWAY)
    if not url:
        path = Path(store.root, "serving", "gateway.json")
        if not store.local or not path.is_file():
            return None
        try:
            url = str(json.loads(path.read_text(encoding="utf-8"))["url"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ServiceError(
                f"The gateway's address cannot be read: {error!r}",
                where=str(path),
                fix=f"start the gateway again, it then writes this file anew; or set {GATEWAY}",
            ) from error
    if "@" in urlsplit(url).netloc:
        raise ServiceError(
            "The gateway's address holds a user or password; addresses are shown in the clear.",
            where=GATEWAY,
            fix=f"take it out and set {ADMIN_KEY}",
        )
    return GatewayClient(url, _admin_key(store))


def _admin_key(store: Store) -> str:
    key = os.environ.get(ADMIN_KEY)
    if key:
        return key.strip()
    path = Path(store.root, "serving", "admin.key")
    try:
        if store.local:
            return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise ServiceError(
            f"The gateway's admin key cannot be read: {error}",
            where=str(path),
            fix=f"run this as the user that runs the gateway, or set the environment's {ADMIN_KEY}",
        ) from error
    raise ServiceError(
        "The gateway's admin key is not known; the store is remote, and a key is not put where others read.",
        where=store.root,
        fix=f"set the environment's {ADMIN_KEY} (in Prefect: from a Secret block on the worker)",
    )


def _home(execution: ExecutionSpec, name: str) -> str:
    return f"{Store(execution.store).root}/serving/{name}"


def _conflict(answer: httpx.Response, what: str, where: str) -> ConflictError:
    error = ConflictError(what, where=where, fix="see `goldgate rollout --show NAME`, and try again")
    try:
        record = answer.json()
        if record.get(_OPEN) is not None:
            error.open = Intent.model_validate(record[_OPEN])
        error.lease_left = None if record.get(_LEFT) is None else float(record[_LEFT])
    except (ValueError, AttributeError, TypeError, ValidationError):  # it says no more than its message
        pass
    return error


def _short(text: str) -> str:
    shown = " ".join(text.split())
    return shown if len(shown) <= _EXCERPT else f"{shown[:_EXCERPT]}…"
