"""What serving hands around: which versions run, where requests go, and what a rollout did and found.

A *rollout* brings a registered version into service; an *engine* is a process that serves one version; *traffic* says
which engine a name means. The gateway owns engines and traffic; a rollout asks it for both.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, Self

from pydantic import Field, model_validator

from tasks.contracts.confidence import LearntTrust
from tasks.contracts.observe import CanaryFinding, CanaryState, ShadowSpec
from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.review import SpoolSpec
from tasks.contracts.spec import CanarySpec, ExecutionSpec, Frozen, GoldenSpec, RetrainSpec, RolloutSettings, knob
from tasks.contracts.spec import EngineSpec as EngineSpec  # a part of a task's configuration, and one of these

_NAME = r"^[a-z][a-z0-9_-]{0,62}$"
GATEWAY = "GOLDGATE_GATEWAY"  # environment: address of the gateway, for those who ask it
ADMIN_KEY = "GOLDGATE_ADMIN_KEY"  # environment: the key of its `/admin`; on its own machine it is read from a file
PROMOTED_EVENT = "goldgate.model.promoted"  # what `retrain` emits, and what starts a rollout
ROLLED_OUT_EVENT = "goldgate.model.rolled-out"
ROLLED_BACK_EVENT = "goldgate.model.rolled-back"


class Trust(Frozen):
    """How far a version's closed answers are trusted, as dev has shown: what a gateway goes by for each answer.

    Attributes:
        temperature: of the answer's own probability; see `tasks.serving.confidence.calibrated`.
        offset: likewise. Both None where nothing could be learnt; then confidences are shown unscaled.
        at: from this confidence on, as the model gives it, an answer is trusted; None has every answer reviewed.
        target_accuracy: that answers from there on are shown to have.
        reviewed: share of the answers that is below, as expected from dev.
        why: where the numbers come from, or why there are none, in words.
    """

    temperature: float | None = None
    offset: float | None = None
    at: float | None
    target_accuracy: float
    reviewed: float
    why: str

    @classmethod
    def of(cls, learnt: LearntTrust) -> Trust:
        """The part of what was learnt that a gateway needs."""
        calibration, threshold = learnt.calibration, learnt.threshold
        return cls(
            temperature=calibration.temperature if calibration is not None else None,
            offset=calibration.offset if calibration is not None else None,
            at=threshold.at,
            target_accuracy=threshold.target_accuracy,
            reviewed=1 - threshold.coverage,
            why=" ".join(learnt.why),
        )


class VersionRef(Frozen):
    """A registered version, resolved once; from then on nobody asks an alias.

    Attributes:
        name: the registered model.
        version: its version, a number.
        digest: sha256 of the merged model's files, as the certificate says.
        uri: `models:/<name>/<version>`.
        prompt: how it was evaluated, and so how it is asked.
        decoding: likewise.
        certified: whether a certificate of Goldgate was verified; False only for a baseline that a person set.
        trust: how far its answers are trusted; None for open answers, and where it was promoted without a rollout set.
    """

    name: str
    version: str
    digest: str
    uri: str
    prompt: Prompt
    decoding: Decoding
    certified: bool = True
    trust: Trust | None = None

    @property
    def label(self) -> str:
        """How requests name it: `complaints@7`."""
        return f"{self.name}@{self.version}"

    @property
    def engine(self) -> str:
        """Name of the engine that serves it: the same version with other bytes is another engine."""
        return f"{self.name}-{self.version}-{self.digest[:8]}"


class EngineState(StrEnum):
    """Where an engine is in its life."""

    STARTING = "starting"
    READY = "ready"  # it has answered a known prompt
    FAILED = "failed"  # it ended, or never answered
    DRAINING = "draining"  # it gets no new requests
    STOPPED = "stopped"


class EngineStatus(Frozen):
    """An engine as the gateway sees it.

    Attributes:
        name: see `VersionRef.engine`.
        version: what it serves.
        state: where it is in its life.
        why: of a failed one, what happened and the end of its log.
        started: when its process was started.
        ready_seconds: from its start to its first answer.
        under_way: requests that it is answering.
        memory_bytes: of its processes.
    """

    name: str
    version: VersionRef
    state: EngineState
    why: str | None = None
    started: datetime | None = None
    ready_seconds: float | None = None
    under_way: int = 0
    memory_bytes: int = 0


class Canary(Frozen):
    """A version that answers a share of a name's requests, on trial.

    Attributes:
        version: it.
        spec: its share, and when it is taken back.
        salt: who is in it is drawn by this: the id of its change.
        since: when it began.
        state: what has happened so far, as it was last written; a gateway that starts again goes on from there.
        finding: why it was taken back; None while it is not. From then on it gets no requests.
    """

    version: VersionRef
    spec: CanarySpec
    salt: str
    since: datetime
    state: CanaryState
    finding: CanaryFinding | None = None


class CanaryStatus(Frozen):
    """How a name's canary stands at this moment.

    Attributes:
        canary: it, with what has happened up to now; None where none is on trial.
        finding: what that shows so far; None likewise.
        live_answers: answers of the live version that the gateway remembers the latency of; from 100 on it can say what
            is slow, so that a canary may begin.
    """

    canary: Canary | None = None
    finding: CanaryFinding | None = None
    live_answers: int = 0


class TrialResult(Frozen):
    """What a canary has come to.

    Attributes:
        spec: its share, and when it was to be taken back.
        state: what has happened.
        finding: the evidence; `abort` is why it was taken back.
        hours: how long it was on trial.
    """

    spec: CanarySpec
    state: CanaryState
    finding: CanaryFinding
    hours: float


class Vendor(Frozen):
    """Another's OpenAI-compatible service, to compare with. Its key is the environment's GOLDGATE_VENDOR_KEY."""

    url: str = knob(0, "Its address, up to /v1.", pattern=r"^https?://")
    model: str = knob(1, "The model's name there.", min_length=1)
    input_price: float | None = knob(2, "Price of a million tokens of prompt.", default=None, ge=0.0)
    output_price: float | None = knob(3, "Price of a million tokens of answer.", default=None, ge=0.0)


class Shadow(Frozen):
    """What answers a share of a name's requests as well, unseen by callers.

    Attributes:
        id: of this comparison.
        version: a version of the same name; None where it is a vendor.
        vendor: another's service; None where it is a version.
        spec: the share, and what difference matters.
        since: when it began.
    """

    id: str
    version: VersionRef | None = None
    vendor: Vendor | None = None
    spec: ShadowSpec
    since: datetime


class Traffic(Frozen):
    """Which engines a name means.

    Attributes:
        name: what requests call the model.
        live: the engine that answers.
        previous: the engine that answered before, kept warm for a rollback; None where there is none.
        canary: the version on trial beside it; None for none.
        shadow: what answers unseen; None for none.
        revision: grows by one with each change; a change names the revision that it was made from.
        by: who changed it last.
        why: why.
        at: when.
    """

    name: str
    live: VersionRef
    previous: VersionRef | None = None
    canary: Canary | None = None
    shadow: Shadow | None = None
    revision: int = Field(ge=1)
    by: str
    why: str
    at: datetime


class Phase(StrEnum):
    """How far a change of traffic has come: found half-done, it is undone up to `CHECKED` and finished from then on."""

    CHECKING = "checking"  # the new version is started and asked beside the old one
    CHECKED = "checked"  # it may go live
    SWITCHING = "switching"  # traffic and alias are moving
    SWITCHED = "switched"  # both have moved; what is not needed any more is ended
    DONE = "done"
    REFUSED = "refused"  # a check said no; nothing has moved
    UNDONE = "undone"  # it was given up; nothing has moved, or all was moved back


class Aliases(Frozen):
    """Which versions of a registered model the registry's aliases name; None where there is no such alias.

    Attributes:
        champion: the version in service.
        previous: the one that was in service before.
        promoted: the one that waits for its rollout.
    """

    champion: str | None = None
    previous: str | None = None
    promoted: str | None = None


class Proof(Frozen):
    """What a certificate, checked with a key that is trusted here, says of a version.

    Attributes:
        key_id: of the key that signed it.
        trusted: where the key to check with was read.
        golden_digest: sha256 of the golden set that the version was judged on.
        outcomes: file on this machine with the outcome of each golden item (one `ItemOutcome` a line).
        release: why the version was let in, in words.
    """

    key_id: str
    trusted: str
    golden_digest: str
    outcomes: str
    release: str


class ItemParity(Frozen):
    """One item that was answered otherwise than when it was evaluated."""

    id: str
    evaluated: str
    served: str


class CheckResult(Frozen):
    """What asking a new engine has shown.

    Attributes:
        asked: items that were asked through the gateway.
        compared: whether the answers were held against evaluated ones; a baseline without a certificate has none, and
            then `same` counts the answers that are well-formed.
        same: of these, answered as evaluated.
        agreement: same / asked.
        needed: smallest agreement that is enough.
        differences: those that were answered otherwise, the first of them.
        latency_p50_ms: median over the items, one at a time.
        latency_p95_ms: 95th percentile.
        max_latency_ms: limit of the 95th percentile; None for none.
        sure_compared: items of which evaluation and gateway both say how sure the answer is.
        sure_median: median of the difference between the two, without its sign; None without such items.
        sure_largest: largest such difference.
        sides_changed: items that one of the two puts above the threshold of review and the other below.
        problems: why it may not go live, a sentence each; empty where it may.
    """

    asked: int
    compared: bool = True
    same: int
    agreement: float
    needed: float
    differences: tuple[ItemParity, ...] = ()
    latency_p50_ms: float
    latency_p95_ms: float
    max_latency_ms: float | None = None
    sure_compared: int = 0
    sure_median: float | None = None
    sure_largest: float | None = None
    sides_changed: int = 0
    problems: tuple[str, ...] = ()


class Intent(Frozen):
    """The record of a change under way, written before each step, so that whoever comes next can finish or undo it.

    Attributes:
        id: of this change.
        name: what requests call the model.
        kind: "rollout" or "rollback".
        to: the version that is to go live.
        was: the version that was live when it began; None for a first one.
        was_previous: the version that was kept warm when it began.
        phase: how far it is.
        by: who wanted it.
        why: why.
        at: when it began.
        holder: who works on it (flow run, host and process). It renews its lease; another takes over when that ends.
        check: what asking the new version has shown, from `CHECKED` on.
        trial: what its canary has come to; None where there was none, or it has not ended.
        problems: why it was refused or undone.
        aliases: how the registry's aliases were when it began, to put them back; empty for a rollback.
        after: id of the change that had ended last before its maker looked at anything, empty for none; it may not
            begin once another has ended. None for a rollback, which is decided where traffic is.
    """

    id: str
    name: str
    kind: str = Field(pattern=r"^(rollout|rollback)$")
    to: VersionRef
    was: VersionRef | None = None
    was_previous: VersionRef | None = None
    phase: Phase
    by: str
    why: str
    at: datetime
    holder: str
    check: CheckResult | None = None
    trial: TrialResult | None = None
    problems: tuple[str, ...] = ()
    aliases: Aliases = Aliases()
    after: str | None = None

    @property
    def previous_after(self) -> str | None:
        """The version that the alias `previous` names once this is done: the one that traffic keeps warm.

        Where nothing was served before, it is the champion of then, which has files but no engine.
        """
        for version in (self.was, self.was_previous):
            if version is not None and version.version != self.to.version:
                return version.version
        champion = self.aliases.champion
        return champion if champion != self.to.version and champion is not None else self.aliases.previous


class RolloutSpec(Frozen):
    """How a registered version is brought into service."""

    name: str = knob(0, "Name of the task: the registered model, and what requests call it.", pattern=_NAME)
    version: str | None = knob(
        1, "The version; none is the one that waits under the alias `promoted`.", default=None, pattern=r"^[0-9]+$"
    )
    golden: GoldenSpec = knob(2, "The golden set that it was evaluated on; some of its items are asked again.")
    settings: RolloutSettings = knob(3, "How it is checked, and how its engine is run.", default=RolloutSettings())
    execution: ExecutionSpec = knob(4, "Where store and registry are.", default_factory=ExecutionSpec)

    @classmethod
    def of(cls, spec: RetrainSpec, version: str | None = None) -> RolloutSpec:
        """The rollout of what a run has promoted, or of a version by its number."""
        return cls(
            name=spec.name,
            version=version,
            golden=spec.golden,
            settings=spec.rollout or RolloutSettings(),
            execution=spec.execution,
        )


class RolloutResult(Frozen):
    """What came of a rollout.

    Attributes:
        name: what requests call the model.
        phase: DONE, REFUSED or UNDONE.
        version: the version that was to go live.
        was: the version that was live before.
        check: what asking it has shown; None where it never answered.
        problems: why it was refused; empty where it was not.
        switch_seconds: from the decision until all traffic was on the new version.
        trial: what its canary has come to; None where there was none.
    """

    name: str
    phase: Phase
    version: VersionRef
    was: VersionRef | None
    check: CheckResult | None
    problems: tuple[str, ...] = ()
    switch_seconds: float | None = None
    trial: TrialResult | None = None


class LimitSpec(Frozen):
    """What a gateway takes on; all of it is answered in OpenAI's error shape."""

    max_body_bytes: int = knob(
        0, "Longest request; a longer one gets 413.", default=1_000_000, ge=1_000, le=100_000_000
    )
    max_under_way: int = knob(
        1, "Requests that are answered at a time for one name; more wait.", default=64, ge=1, le=10_000
    )
    max_waiting: int = knob(
        2, "Requests that wait; a further one gets 429 with Retry-After.", default=128, ge=0, le=100_000
    )
    wait_seconds: float = knob(3, "Longest wait; then 429.", default=20.0, gt=0.0, le=600.0)
    receive_seconds: float = knob(
        4, "Longest time that a client may take to send its request; then 408.", default=10.0, gt=0.0
    )
    answer_seconds: float = knob(5, "Longest time to the end of an answer; then 504.", default=120.0, gt=0.0, le=3600.0)
    per_minute: int = knob(6, "Requests of one key in a minute; a further one gets 429.", default=6_000, ge=1)


class LogSpec(Frozen):
    """What of requests is kept."""

    to: str = knob(
        0, "none, parquet (files in the gateway's folder), or postgres (address in GOLDGATE_LOG_DB).",
        default="parquet", pattern=r"^(none|parquet|postgres)$",
    )  # fmt: skip
    share: float = knob(1, "Share of the requests that is kept.", default=1.0, ge=0.0, le=1.0)
    keep_days: float = knob(2, "After this many days it is deleted.", default=30.0, gt=0.0, le=3650.0)
    mask: bool = knob(3, "Replace personal data by their kind before anything is written.", default=True)


class GatewaySpec(Frozen):
    """How a gateway listens and what it owns: `goldgate serve`."""

    host: str = knob(0, "Address to listen on; others than loopback need keys.", default="127.0.0.1")
    port: int = knob(1, "Port; 0 takes a free one.", default=8080, ge=0, le=65_535)
    keys_file: str | None = knob(
        2, "File with the keys of clients, made by `goldgate keys`; none asks for no key (loopback only).", default=None
    )
    limits: LimitSpec = knob(3, "What it takes on.", default=LimitSpec())
    log: LogSpec = knob(4, "What of requests is kept.", default=LogSpec())
    fill_in: bool = knob(
        5,
        "Fill in what a request leaves open (instruction, choices, length, temperature) as the model was evaluated; "
        "else only the temperature.",
        default=True,
    )
    shutdown_seconds: float = knob(
        6, "How long requests under way may take after SIGTERM.", default=30.0, ge=0.0, le=3600.0
    )
    review: SpoolSpec | None = knob(
        7, "Which answers are put aside for people (see `goldgate review`); none puts none aside.", default=SpoolSpec()
    )
    execution: ExecutionSpec = knob(8, "Where store and registry are; its own folder is `serving` in the store.",
                                    default_factory=ExecutionSpec)  # fmt: skip

    @model_validator(mode="after")
    def _wide_only_with_keys(self) -> Self:
        if self.host not in ("127.0.0.1", "localhost", "::1") and self.keys_file is None:
            raise ValueError(
                f"listening on {self.host} lets others in, so it needs `keys_file` (make one with `goldgate keys add`)"
            )
        return self


def openai_error(message: str, *, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an error as OpenAI's clients expect it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
