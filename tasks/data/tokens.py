"""How many tokens a row has for the base model, counted only where it could be too many."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tasks.contracts.prompt import Prompt
from tasks.contracts.rows import Row
from tasks.contracts.tool_template import check_tools_rendered


class TokenLimit(NamedTuple):
    """The longest row in tokens, prompt and answer together, for a model in a folder and its prompt."""

    model_folder: Path
    prompt: Prompt
    max_tokens: int


def check_renders_tools(limit: TokenLimit, where: str) -> None:
    """Refuse a base model whose chat template cannot render the tools that its prompt has.

    Raises:
        ModelError: as `tasks.contracts.tool_template.check_tools_rendered`; `where` names the model.
    """
    from transformers import AutoTokenizer

    if limit.prompt.tools:
        tokenizer = AutoTokenizer.from_pretrained(limit.model_folder, trust_remote_code=False)
        check_tools_rendered(tokenizer, where)


class TokenCounter:
    """Counts the tokens of rows that may be over the limit, as training will count them.

    A token of a byte-level vocabulary stands for one byte at least, so a row whose rendered text has no more bytes than
    the limit has tokens cannot be too long, and most rows need no tokenizer at all. Where the tokenizer rewrites text
    first (a normaliser), every row is counted.
    """

    def __init__(self, limit: TokenLimit) -> None:
        from transformers import AutoTokenizer

        self._limit = limit
        self._tokenizer: Any = AutoTokenizer.from_pretrained(limit.model_folder, trust_remote_code=False)
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        # How a template writes tools and calls cannot be told from the bytes of the row.
        self._bytes_bound = backend is not None and backend.normalizer is None and not limit.prompt.tools
        self._frames: dict[tuple[str, ...], int] = {}  # bytes that the template writes around contents, by roles

    def too_many(self, row: Row) -> int | None:
        """How many tokens the row has if they are more than the limit, else None."""
        if self._bytes_bound and self._most(row) <= self._limit.max_tokens:
            return None
        tokens = self.count(row)
        return tokens if tokens > self._limit.max_tokens else None

    def count(self, row: Row) -> int:
        """Tokens of prompt and answer, up to and including the one that ends the answer."""
        text = self._render(self._limit.prompt.answered(row))
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        end = self._tokenizer.eos_token_id
        last = next((at for at in range(len(ids) - 1, -1, -1) if ids[at] == end), len(ids) - 1)
        return last + 1

    def refusal(self, row: Row) -> str | None:
        """What the chat template says against a conversation, such as two calls at once; None where it renders it."""
        from jinja2 import TemplateError

        try:
            self._render(self._limit.prompt.answered(row))
        except TemplateError as error:
            return f"the chat template refuses it: {error}"
        return None

    def _most(self, row: Row) -> int:
        messages = self._limit.prompt.messages(row)
        roles = tuple(message.role for message in messages)
        frame = self._frames.get(roles)
        if frame is None:
            # A letter for each content, since some templates leave out empty ones.
            turns = [{"role": role, "content": "x"} for role in (*roles, "assistant")]
            frame = self._frames[roles] = len(self._render(turns).encode())
        return frame + sum(len(message.content.encode()) for message in messages) + len(row.target.encode())

    def _render(self, turns: list[dict[str, Any]]) -> str:
        text: str = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=False, **self._limit.prompt.template_options
        )
        return text
