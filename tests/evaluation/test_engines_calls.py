"""Tools through the engines: what models are shown, and which calls are read out of what they say."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import EvaluationError, ModelError
from tasks.contracts.progress import ignore_progress
from tasks.contracts.prompt import Decoding, Prompt, base_prompt, decoding_for
from tasks.contracts.references import Conditions
from tasks.contracts.rows import Call, Message, Row
from tasks.evaluation.engines.embedded import EmbeddedEngine, _Item
from tasks.evaluation.engines.openai_http import OpenAIEngine
from tasks.evaluation.engines.vllm import VllmEngine
from tasks.evaluation.evaluate import conditions, outcome_of
from tasks.evaluation.shots import choose_shots
from tasks.gate.comparable import NotComparableError, check_conditions
from tests.tiny import make_tiny_model
from tests.tool_toys import (
    BOTH,
    CALL,
    ONE_CALL,
    REFUND,
    RESTART,
    TOOLS,
    WORDS,
    openai_call,
    vocabulary,
    with_template,
)

ROW = Row("r0", 1, (Message("user", "Money back for order 7."),), REFUND)
EARLIER = (
    Message("user", "Dark."),
    Message("assistant", "", (Call("restart", '{"device": "screen"}'), Call("refund", '{"order": 7}'))),
    Message("tool", "restarted", name="restart"),
    Message("tool", "paid", name="refund"),
    Message("assistant", "Both done."),
    Message("user", "And my money?"),
)
DECODING = decoding_for(CALL, 24)


def prompt(*answers: str) -> Prompt:
    """The base prompt with worked examples that have these answers."""
    rows = [Row(f"s{n}", n, (Message("user", f"example {n}"),), answer) for n, answer in enumerate(answers)]
    return base_prompt(CALL, choose_shots(rows, CALL, len(rows)))


# -- in this process ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbeddedEngine:
    folder = with_template(tiny_model, tmp_path_factory.mktemp("tools") / "model")
    engine = EmbeddedEngine(folder, batch_size=3, dtype="float32")
    engine._tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    return engine


def ask(engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch, said: str) -> str:
    """The prediction where the model writes `said`."""

    def write(batch: list[_Item], *_: Any) -> None:
        for item in batch:
            item.drawn = [*engine._tokenizer(said, add_special_tokens=False)["input_ids"], *engine._end_ids]

    monkeypatch.setattr(engine, "_decode", write)
    (answer,) = engine.answer(prompt(), [ROW], DECODING, ignore_progress)
    return answer.prediction


@pytest.mark.parametrize(
    ("said", "prediction"),
    [
        ('<tool_call>\n{"name": "refund", "arguments": {"order": 7.0}}\n</tool_call>', REFUND),
        ('[TOOL_CALLS][{"name": "refund", "arguments": {"order": 7}}]', REFUND),
        ('[TOOL_CALLS]restart[ARGS]{"device": "screen"}', RESTART),
        ("<|pad|>ask someone else", WORDS),
        ("<tool_call>{", "<tool_call>{"),
        ("[TOOL_CALLS]refund", "[TOOL_CALLS]refund"),
    ],
)
def test_calls_are_read_out_of_what_is_drawn(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch, said: str, prediction: str
) -> None:
    assert ask(engine, monkeypatch, said) == prediction


def test_the_template_is_given_tools_calls_and_results(engine: EmbeddedEngine) -> None:
    shown = engine._tokenizer.decode(engine.prompt_tokens(prompt(REFUND, WORDS), Row("r1", 1, EARLIER, REFUND)))
    for tool in TOOLS:
        assert shown.count(json.dumps({"type": "function", "function": CALL.tools[TOOLS.index(tool)]})) == 1
    assert shown.count('<tool_call>\n{"name": "refund", "arguments": {"order": 7}}\n</tool_call><|im_end|>') == 2
    assert shown.count("<tool_response>paid</tool_response>") == 1
    assert shown.endswith("<|im_start|>user\nAnd my money?<|im_end|>\n<|im_start|>assistant\n")


def test_a_model_whose_template_has_no_tools_is_not_asked(tiny_model: Path) -> None:
    engine = EmbeddedEngine(tiny_model, batch_size=3, dtype="float32")
    with pytest.raises(ModelError, match="leaves out the definition of a tool") as refusal:
        engine.answer(prompt(), [ROW], DECODING, ignore_progress)
    assert refusal.value.where == str(tiny_model)
    assert engine.answer(Prompt(system="Help."), [ROW], Decoding(max_new_tokens=1), ignore_progress)


def test_an_item_that_the_template_refuses_is_named(tiny_model: Path, tmp_path: Path) -> None:
    engine = EmbeddedEngine(with_template(tiny_model, tmp_path / "m", ONE_CALL), batch_size=3, dtype="float32")
    rows = [ROW, Row("two", 2, EARLIER, REFUND)]
    with pytest.raises(EvaluationError, match="cannot render an item: one call at a time") as refusal:
        engine.answer(prompt(), rows, DECODING, ignore_progress)
    assert refusal.value.where is not None
    assert refusal.value.where.startswith("item two, model ")


# -- behind a server ----------------------------------------------------------------------------------------------


class Server:
    """Answers every request with one message; keeps what it was asked."""

    def __init__(self) -> None:
        self.message: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []
        self.url = ""

    def ask(self, row: Row = ROW, shown: Prompt | None = None, **settings: Any) -> str:
        engine = OpenAIEngine(self.url, "m", batch_size=1, **settings)
        (answer,) = engine.answer(shown or prompt(), [row], DECODING, ignore_progress)
        engine.close()
        return answer.prediction


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send({"data": [{"id": "m"}]})

        def do_POST(self) -> None:
            state.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send({"choices": [{"message": state.message}]})

        def send(self, record: dict[str, Any]) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(record).encode())

        def log_message(self, *_: Any) -> None:
            return

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield state
    http.shutdown()
    http.server_close()


@pytest.mark.parametrize(
    ("message", "prediction"),
    [
        ({"content": None, "tool_calls": [openai_call("refund", '{"order":7}')]}, REFUND),
        (
            {
                "tool_calls": [
                    openai_call("restart", '{"device": "screen"}'),
                    openai_call("refund", '{"order": 7}', "b"),
                ]
            },
            BOTH,
        ),
        ({"content": '<tool_call>{"name": "refund", "arguments": {"order": 7}}</tool_call>'}, REFUND),
        ({"content": f"{WORDS}\n", "tool_calls": []}, WORDS),
        ({"content": None}, ""),
    ],
)
def test_calls_are_taken_from_the_message_or_its_text(server: Server, message: dict[str, Any], prediction: str) -> None:
    server.message = message
    assert server.ask() == prediction


def test_a_call_with_broken_arguments_is_no_valid_answer(server: Server) -> None:
    server.message = {"content": None, "tool_calls": [openai_call("refund", '{"order": 7')]}
    engine = OpenAIEngine(server.url, "m", batch_size=1)
    (answer,) = engine.answer(prompt(), [ROW], DECODING, ignore_progress)
    engine.close()
    assert '"refund"' in answer.prediction
    assert outcome_of(ROW, answer, CALL).scores == {
        "exact_match": 0.0, "valid_output": 0.0, "call:name": 0.0, "call:arguments": 0.0,
    }  # fmt: skip


def test_tools_and_earlier_calls_are_sent_as_the_protocol_has_them(server: Server) -> None:
    server.message = {"content": WORDS}
    server.ask(Row("r1", 1, EARLIER, REFUND), prompt(REFUND))
    (body,) = server.asked
    assert body["tools"] == [{"type": "function", "function": tool} for tool in TOOLS]
    assert "tool_choice" not in body
    calls = [call for turn in body["messages"] for call in turn.get("tool_calls", ())]
    assert [call["function"]["arguments"] for call in calls] == ['{"order": 7}', '{"device": "screen"}', '{"order": 7}']
    results = [(turn["tool_call_id"], turn["content"]) for turn in body["messages"] if turn["role"] == "tool"]
    assert results == [("call00001", "OK"), ("call00002", "restarted"), ("call00003", "paid")]


def test_a_server_of_our_own_hands_on_what_the_model_writes(server: Server) -> None:
    server.message = {"content": '[TOOL_CALLS][{"name": "refund", "arguments": {"order": 7}}]'}
    assert server.ask(reads_calls=True) == REFUND
    assert (server.asked[0]["tool_choice"], server.asked[0]["skip_special_tokens"]) == ("none", False)


def make_calling_model(folder: Path) -> Path:
    """A model that answers every prompt with one call behind a special token: the last token alone tells the next."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with_template(make_tiny_model(folder / "plain", vocabulary()), folder / "calling")
    tokenizer = AutoTokenizer.from_pretrained(folder / "calling")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    tokenizer.add_tokens([REFUND])
    tokenizer.save_pretrained(folder / "calling")
    (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    chain = [newline, *tokenizer.convert_tokens_to_ids(["[TOOL_CALLS]", REFUND]), tokenizer.eos_token_id]
    config = AutoConfig.from_pretrained(
        folder / "calling",
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
        max_position_embeddings=1024,
        # vLLM on CPU has no attention for heads of 16.
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for place, (token, following) in enumerate(pairwise(chain)):
            model.model.embed_tokens.weight[token, place] = 1.0
            model.lm_head.weight[following, place] = 1.0
    model.save_pretrained(folder / "calling")
    return folder / "calling"


@pytest.mark.parametrize("kind", ["embedded", pytest.param("vllm", marks=pytest.mark.vllm)])
@pytest.mark.timeout(900)
def test_a_call_that_a_model_really_writes_is_read(tmp_path: Path, kind: str) -> None:
    folder = make_calling_model(tmp_path)
    rows = [ROW, Row("r1", 1, EARLIER, REFUND)]
    inside = EmbeddedEngine(folder, batch_size=2, dtype="float32")
    engine = inside if kind == "embedded" else VllmEngine(folder, batch_size=2, dtype="float32")
    try:
        answers = engine.answer(prompt(REFUND), rows, DECODING, ignore_progress)
    finally:
        engine.close()
    assert [answer.prediction for answer in answers] == [REFUND] * 2
    assert [answer.prompt_tokens for answer in answers] == [
        len(inside.prompt_tokens(prompt(REFUND), row)) for row in rows
    ]


# -- examples and comparability -----------------------------------------------------------------------------------


def test_worked_examples_cover_the_tools_and_words() -> None:
    answers = [REFUND] * 6 + [RESTART] * 2 + [WORDS] * 3
    shots = prompt(*answers).shots[:3]
    assert {shot.assistant for shot in shots} == {REFUND, RESTART, WORDS}


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda tools: tools, False),
        (lambda tools: tools[:1], True),
        (lambda tools: (tools[0] | {"description": "Give money back."}, tools[1]), True),
    ],
)
def test_evaluations_with_other_tools_are_not_compared(change: Callable[[Any], Any], differs: bool) -> None:
    def about(tools: Any) -> Conditions:
        task = CALL.model_copy(update={"tools": tools})
        return conditions(task, "d" * 64, decoding_for(task, 24), "embedded")

    if not differs:
        check_conditions(about(CALL.tools), about(change(CALL.tools)))
        return
    with pytest.raises(NotComparableError, match=r"different conditions \(decoding\)"):
        check_conditions(about(CALL.tools), about(change(CALL.tools)))
