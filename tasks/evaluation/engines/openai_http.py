"""Asking a model behind any server that speaks the OpenAI protocol (`POST /v1/chat/completions`)."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit

import httpx

from tasks.contracts.errors import ServiceError, SpecError
from tasks.contracts.openai_chat import question, said
from tasks.contracts.progress import Progress, ProgressListener
from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.rows import Row
from tasks.evaluation.engines.engine import Answer
from tasks.logprobs import closed_answer_probability, read_logprobs

API_KEY = "OPENAI_API_KEY"
_ATTEMPTS = 5
_LONGEST_WAIT = 30.0  # seconds: a server that asks for more is not going to finish an evaluation
_EXCERPT = 200  # characters of a server's answer that an error shows


def openai_identity(url: str) -> str:
    """What evaluations by one server share: its address (which library answers there, the protocol does not say)."""
    return f"openai/{_api_root(url)}"


class OpenAIEngine:
    """One model of one server. The key comes from the environment's OPENAI_API_KEY and goes nowhere else."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        batch_size: int,
        identity: str | None = None,
        reads_calls: bool = False,
        says_confidence: bool = False,
        timeout: float = 120.0,
        backoff: float = 0.5,
    ) -> None:
        """Prepare to ask `model`; nothing is sent before `answer`.

        Args:
            url: base URL of the server, with or without its `/v1`.
            model: the model's name there.
            batch_size: how many requests are under way at a time.
            identity: what evaluations share, if the caller knows more than the address.
            reads_calls: the server, a vLLM, is to hand on calls of tools as the model writes them, and they are read
                here; without it the server reads them, if it can.
            says_confidence: its log-probabilities are those among the tokens that were allowed, so that closed answers
                have a confidence. Servers differ in that, and do not say.
            timeout: seconds for one request.
            backoff: seconds before the second attempt; doubled for each further one.

        Raises:
            SpecError: the address holds a password.
        """
        self._root = _api_root(url)
        self._model = model
        self._batch_size = batch_size
        self._identity = identity or openai_identity(url)
        self._reads_calls = reads_calls
        self._says_confidence = says_confidence
        self._backoff = backoff
        self._key = os.environ.get(API_KEY)
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=10.0),
            limits=httpx.Limits(max_connections=batch_size),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            # A proxy of the environment must not come between this machine and itself.
            trust_env=urlsplit(self._root).hostname not in ("127.0.0.1", "localhost", "::1"),
        )

    @property
    def identity(self) -> str:
        """See `Engine.identity`."""
        return self._identity

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def answer(
        self, prompt: Prompt, rows: Sequence[Row], decoding: Decoding, listener: ProgressListener
    ) -> list[Answer]:
        """See `Engine.answer`. A constraint that the server ignores shows as an answer that is no choice."""
        self._check_model()
        listener(Progress(0, len(rows), "items"))
        answers: dict[int, Answer] = {}
        with ThreadPoolExecutor(self._batch_size) as pool:
            asked = {pool.submit(self._ask, prompt, row, decoding): place for place, row in enumerate(rows)}
            try:
                for future in as_completed(asked):
                    answers[asked[future]] = future.result()
                    listener(Progress(len(answers), len(rows), "items"))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [answers[place] for place in range(len(rows))]

    # -- requests -----------------------------------------------------------------------------------------------

    def _ask(self, prompt: Prompt, row: Row, decoding: Decoding) -> Answer:
        body = question(self._model, prompt, row, decoding)
        if not self._reads_calls:  # what only a vLLM knows
            body = {name: value for name, value in body.items() if name not in ("tool_choice", "skip_special_tokens")}
        sure = self._says_confidence and bool(decoding.choices)
        if sure:
            body["logprobs"] = True
        started = time.perf_counter()
        record = self._request("POST", "chat/completions", body, about=f"item {row.id}")
        try:
            choice = record["choices"][0]
            message = choice["message"]
            usage = record.get("usage") or {}
            return Answer(
                prediction=said(message, tools=bool(prompt.tools)),
                confidence=_confidence(choice, decoding.choices, f"item {row.id}") if sure else None,
                latency_ms=1000 * (time.perf_counter() - started),
                prompt_tokens=int(usage.get("prompt_tokens", 0)),
                output_tokens=int(usage.get("completion_tokens", 0)),
            )
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise self._strange(f"holds no answer ({error!r} is missing)", str(record), f"item {row.id}") from error

    def _check_model(self) -> None:
        """Name the models that the server has when it lacks this one, before items are asked."""
        record = self._request("GET", "models", None, about="list of models", may_lack=True)
        if record is None:  # not every server has such a list
            return
        try:
            names = [entry["id"] for entry in record["data"]]
        except (KeyError, TypeError) as error:
            raise self._strange("is no list of models", str(record), "list of models") from error
        if self._model not in names:
            raise ServiceError(
                f"The server does not know the model {self._model!r}; it has: {', '.join(names[:10]) or 'none'}.",
                where=self._root,
                fix="name one of them as openai:<model>, or start the server with this model",
            )

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, *, about: str, may_lack: bool = False
    ) -> Any:
        """The server's JSON; tried again on 429, 5xx, time-outs and refused connections.

        None if there is no such path and `may_lack`.
        """
        where = f"{self._root}/{path} ({about})"
        reason, wait = "", 0.0
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(min(_LONGEST_WAIT, max(wait, self._backoff * 2 ** (attempt - 1))))
            wait = 0.0
            try:
                answer = self._client.request(method, f"{self._root}/{path}", json=body)
            except httpx.TimeoutException:
                reason = f"no answer within {self._client.timeout.read:g} s"
                continue
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
                continue
            except (httpx.InvalidURL, ValueError) as error:
                raise SpecError(
                    f"This is no address of a server: {error}", where=self._root, fix="correct `evaluate.engine`"
                ) from error
            if answer.status_code == httpx.codes.TOO_MANY_REQUESTS or answer.is_server_error:
                reason = f"HTTP {answer.status_code}: {self._excerpt(answer.text)}"
                wait = _seconds(answer.headers.get("Retry-After"))
                continue
            return self._json(answer, where, may_lack=may_lack)
        raise ServiceError(
            f"The server did not answer after {_ATTEMPTS} attempts: {reason}",
            where=where,
            fix="check that it runs and is not overloaded (lower `evaluate.batch_size`), then run again",
        )

    def _json(self, answer: httpx.Response, where: str, *, may_lack: bool) -> Any:
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise ServiceError(
                f"The server refuses access (HTTP {answer.status_code}).",
                where=where,
                fix=f"set the environment's {API_KEY} to a key that this server takes"
                + ("" if self._key else " (it is not set)"),
            )
        if answer.status_code == httpx.codes.NOT_FOUND and may_lack:
            return None
        if "html" in answer.headers.get("Content-Type", "") or answer.text.lstrip()[:1] == "<":
            raise ServiceError(
                f"What answers there sends a web page, not JSON (HTTP {answer.status_code}).",
                where=where,
                fix="give the base URL of an OpenAI-compatible API (often it ends in /v1)",
            )
        if not answer.is_success:
            raise ServiceError(
                f"The server refuses the request (HTTP {answer.status_code}): {self._excerpt(answer.text)}",
                where=where,
                fix="check the model's name, its context length, and that the server knows `structured_outputs` "
                "(vLLM from 0.12 on does); where the task has tools, that it was started with a parser of their calls",
            )
        try:
            return answer.json()
        except ValueError as error:
            raise self._strange("is no JSON", answer.text, where) from error

    def _strange(self, what: str, text: str, about: str) -> ServiceError:
        return ServiceError(
            f"The server's answer {what}: {self._excerpt(text)}",
            where=about if about.startswith("http") else f"{self._root} ({about})",
            fix="check that an OpenAI-compatible server runs at this address",
        )

    def _excerpt(self, text: str) -> str:
        shown = text.replace(self._key, "***") if self._key else text
        shown = " ".join(shown.split())
        return shown if len(shown) <= _EXCERPT else f"{shown[:_EXCERPT]}…"


def _confidence(choice: Mapping[str, Any], choices: Sequence[str], where: str) -> float | None:
    """The probability of an answer among the choices; None for an answer that is none of them.

    Raises:
        EvaluationError: the log-probabilities do not spell the answer.
    """
    answer = choice["message"]["content"]
    if answer not in choices:
        return None
    return closed_answer_probability(read_logprobs(choice["logprobs"]["content"], where), answer, choices, where)


def _api_root(url: str) -> str:
    """The address below which `/chat/completions` is: `/v1` is added if no version is named."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise SpecError(
            "The server's address holds a user or password; addresses are kept in the clear.",
            where="evaluate.engine",
            fix=f"take it out and set the environment's {API_KEY}",
        )
    root = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
    return root if re.search(r"/v\d+[a-z]*$", root) else f"{root}/v1"


def _seconds(retry_after: str | None) -> float:
    """Seconds that a Retry-After header asks for; 0 for none or a date."""
    return float(retry_after) if retry_after and retry_after.isdigit() else 0.0
