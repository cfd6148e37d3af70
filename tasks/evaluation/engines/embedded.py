"""Asking a model inside this process with transformers: batched, greedy, the shared beginning computed once.

The loop is our own because `generate` has no way to go on from one cached beginning with rows of different lengths,
and works out the logits of a choice only token by token, all rows to the longest. It gives the same tokens as
`generate` one row at a time (exactly in float32; in bfloat16 any batching changes a few answers, here and in vLLM).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.contracts.calls import read_answer
from tasks.contracts.errors import EvaluationError, ModelError
from tasks.contracts.progress import Progress, ProgressListener
from tasks.contracts.prompt import Decoding, Prompt
from tasks.contracts.rows import Row
from tasks.contracts.tool_template import check_tools_rendered
from tasks.evaluation.engines.choices import Choices, token_bytes
from tasks.evaluation.engines.dtype import Dtype, default_dtype
from tasks.evaluation.engines.engine import Answer

if TYPE_CHECKING:
    import torch
    from transformers import Cache

# Most tokens in one forward pass, padding included. On CPU its activations then stay in the cache of a core (measured
# at 135 M weights, 110 tokens an item: 0.32 s of CPU an item, against 0.53 s with 16 rows); on CUDA it bounds memory.
_CPU_TOKENS = 512
_CUDA_TOKENS = 16_384


def embedded_identity(dtype: Dtype | None = None) -> str:
    """What evaluations by this engine share."""
    return f"embedded/transformers {version('transformers')}/{dtype or default_dtype()}"


@dataclass
class _Item:
    """One row on its way: its place in the input, its tokens behind the shared beginning, and what was drawn."""

    place: int
    suffix: list[int]
    drawn: list[int] = field(default_factory=list)
    text: bytes = b""
    choice: str | None = None
    log_probability: float = 0.0
    done: bool = False


class EmbeddedEngine:
    """A model in this process."""

    def __init__(self, folder: Path, *, batch_size: int, dtype: Dtype | None = None) -> None:
        """Load model and tokenizer; on a CUDA device if there is one.

        Raises:
            ModelError: the folder holds no usable model, or its tokenizer has no chat template.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._dtype: Dtype = dtype or default_dtype()
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, self._dtype), local_files_only=True, use_safetensors=True
            ).eval()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(
                f"The model cannot be loaded: {error}",
                where=str(folder),
                fix="give a folder with config.json, safetensors weights and tokenizer.json, as save_pretrained writes",
            ) from error
        if not self._tokenizer.chat_template:
            raise ModelError(
                "The model's tokenizer has no chat template, so nothing says how to ask it.",
                where=str(folder),
                fix="use an instruction-tuned model, or put its chat_template.jinja into the folder",
            )
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device)
        self._folder = folder
        self._batch_size = batch_size
        self._batch_tokens = _CUDA_TOKENS if self._device.type == "cuda" else _CPU_TOKENS
        self._token_bytes: dict[bytes, list[int]] | None = None
        ends = self._model.generation_config.eos_token_id
        self._end_ids = {self._tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    @property
    def identity(self) -> str:
        """See `Engine.identity`."""
        return embedded_identity(self._dtype)

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def answer(
        self, prompt: Prompt, rows: Sequence[Row], decoding: Decoding, listener: ProgressListener
    ) -> list[Answer]:
        """See `Engine.answer`.

        Raises:
            ModelError: there are tools to call, and the chat template cannot render them.
        """
        import torch

        if not rows:
            return []
        if prompt.tools:
            check_tools_rendered(self._tokenizer, str(self._folder))
        tokens = [self.prompt_tokens(prompt, row) for row in rows]
        self._check_lengths(rows, tokens, decoding)
        choices = self._choices(decoding)
        shared = _common_prefix(tokens) if self._reuses_prefix() else 0
        listener(Progress(0, len(rows), "items"))
        answers: list[Answer | None] = [None] * len(rows)
        finished = 0
        with torch.inference_mode():
            started = time.perf_counter()
            prefix = self._run_prefix(tokens[0][:shared])
            prefix_ms = 1000 * (time.perf_counter() - started) / len(rows)
            items = [_Item(place, ids[shared:]) for place, ids in enumerate(tokens)]
            for batch in self._batches(items):
                started = time.perf_counter()
                self._decode(batch, prefix, shared, decoding, choices)
                batch_ms = 1000 * (time.perf_counter() - started) / len(batch)
                for item in batch:
                    answers[item.place] = Answer(
                        prediction=self._call(item) if prompt.tools else self._text(item, choices),
                        confidence=math.exp(item.log_probability),
                        latency_ms=prefix_ms + batch_ms,
                        prompt_tokens=len(tokens[item.place]),
                        output_tokens=len(item.drawn),
                    )
                finished += len(batch)
                listener(Progress(finished, len(rows), "items"))
        return [answer for answer in answers if answer is not None]

    def prompt_tokens(self, prompt: Prompt, row: Row) -> list[int]:
        """The tokens that the model is shown for one row: the chat template over the whole conversation."""
        from jinja2 import TemplateError

        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                prompt.conversation(row), add_generation_prompt=True, return_dict=False, **prompt.template_options
            )
        except TemplateError as error:
            raise EvaluationError(
                f"The chat template cannot render an item: {error}",
                where=f"item {row.id}, model {self._folder}",
                fix="freeze a golden set without such conversations, or use a model whose chat template takes them",
            ) from error
        return ids

    # -- decoding -----------------------------------------------------------------------------------------------

    def _run_prefix(self, ids: list[int]) -> Cache:
        """Keys and values of the beginning that all rows share, batch of one."""
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        if ids:
            self._model(
                input_ids=torch.tensor([ids], device=self._device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return cache

    def _decode(
        self, batch: list[_Item], prefix: Cache, shared: int, decoding: Decoding, choices: Choices | None
    ) -> None:
        """Draw tokens for a batch until each row is done. Rows are padded on the left, behind the shared beginning."""
        import torch

        longest = max(len(item.suffix) for item in batch)
        pads = [longest - len(item.suffix) for item in batch]
        cache = copy.deepcopy(prefix)
        if shared:
            cache.batch_repeat_interleave(len(batch))
        padding = self._end_of_padding()
        ids = torch.tensor([[padding] * pad + item.suffix for pad, item in zip(pads, batch, strict=True)])
        mask = torch.ones(len(batch), shared + longest, dtype=torch.long)
        for line, pad in enumerate(pads):
            mask[line, shared : shared + pad] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, shared:]
        for _ in range(decoding.max_new_tokens):
            logits = self._model(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                position_ids=positions.to(self._device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            drawn = [self._draw(item, line, choices) for item, line in zip(batch, logits.float().cpu(), strict=True)]
            if all(item.done for item in batch):
                return
            ids = torch.tensor([[token] for token in drawn])
            mask = torch.cat([mask, torch.ones(len(batch), 1, dtype=torch.long)], dim=-1)
            positions = positions[:, -1:] + 1

    def _draw(self, item: _Item, logits: torch.Tensor, choices: Choices | None) -> int:
        """Take the likeliest allowed token of one row; a row that is done gets padding."""
        import torch

        if item.done:
            return self._end_of_padding()
        if choices is None:
            token = int(logits.argmax())
            item.log_probability += float(logits[token] - logits.logsumexp(-1))
        else:
            allowed = torch.tensor(choices.allowed(item.text))
            kept = logits[allowed]
            best = int(kept.argmax())
            token = int(allowed[best])
            item.log_probability += float(kept[best] - kept.logsumexp(-1))
        item.drawn.append(token)
        if token in self._end_ids:
            item.done = True
        elif choices is not None:
            item.text = choices.after(item.text, token)
            item.choice = choices.settled(item.text)
            item.done = item.choice is not None
        return token

    def _text(self, item: _Item, choices: Choices | None) -> str:
        if choices is not None:
            return item.choice if item.choice is not None else item.text.decode(errors="replace")
        return self._decoded(item, special=False)

    def _call(self, item: _Item) -> str:
        """The calls that an answer makes, in canonical form; the text where it makes none.

        Some chat templates mark calls by special tokens, so calls are looked for with them, and words kept without.
        """
        reading = read_answer(self._decoded(item, special=True))
        return self._decoded(item, special=False) if not reading.calls and reading.problem is None else reading.answer

    def _decoded(self, item: _Item, *, special: bool) -> str:
        kept = [token for token in item.drawn if token not in self._end_ids]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return text

    # -- preparing ----------------------------------------------------------------------------------------------

    def _choices(self, decoding: Decoding) -> Choices | None:
        if not decoding.choices:
            return None
        if self._token_bytes is None:
            self._token_bytes = token_bytes(self._tokenizer)
        return Choices(decoding.choices, self._token_bytes, self._end_ids)

    def _end_of_padding(self) -> int:
        """Any token will do: padding is masked by position."""
        padding = self._tokenizer.pad_token_id
        return int(padding if padding is not None else next(iter(self._end_ids)))

    def _reuses_prefix(self) -> bool:
        """Whether padding behind a cached beginning is exact: only full attention sees positions, not places."""
        config = self._model.config.get_text_config()
        kinds = getattr(config, "layer_types", None)
        if kinds:
            return set(kinds) == {"full_attention"}
        return getattr(config, "sliding_window", None) is None

    def _batches(self, items: list[_Item]) -> Iterator[list[_Item]]:
        """Neighbours in length, bounded in rows and tokens; longest first, so that too little memory shows at once."""
        batch: list[_Item] = []
        for item in sorted(items, key=lambda item: -len(item.suffix)):
            full = len(batch) == self._batch_size
            if batch and (full or len(batch[0].suffix) * (len(batch) + 1) > self._batch_tokens):
                yield batch
                batch = []
            batch.append(item)
        yield batch

    def _check_lengths(self, rows: Sequence[Row], tokens: list[list[int]], decoding: Decoding) -> None:
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if limit is None:
            return
        for row, ids in zip(rows, tokens, strict=True):
            if len(ids) + decoding.max_new_tokens > limit:
                raise EvaluationError(
                    f"An item is too long for the model: {len(ids):,} prompt tokens and {decoding.max_new_tokens:,} "
                    f"for the answer, of {limit:,} in all.",
                    where=f"item {row.id}, model {self._folder}",
                    fix="lower `data.max_characters` and freeze the golden set anew, "
                    "use fewer `evaluate.baseline_shots`, or a model with a longer context",
                )


def _common_prefix(sequences: Sequence[list[int]]) -> int:
    """Length of the beginning that all share; one short of the shortest, so that each keeps a token to run."""
    first, last = min(sequences), max(sequences)  # in lexical order, what the extremes share, all share
    most = min(len(sequence) for sequence in sequences) - 1
    same = 0
    while same < most and first[same] == last[same]:
        same += 1
    return same
