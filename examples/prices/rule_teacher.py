"""A stand-in for a teacher: an OpenAI-compatible server that reads prices by rules, to try `distill.yaml` with no GPU.

It is no language model and knows nothing but what a price looks like. Run `python examples/prices/rule_teacher.py`,
and in another terminal `goldgate distill examples/prices/distill.yaml`.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_NUMBER = re.compile(r"\d(?:[\d.,' \u00a0’]*\d)?")
_SYMBOLS = "".join(sign for sign in map(chr, range(0x110000)) if unicodedata.category(sign) == "Sc")
_SIGN = re.compile(rf"[A-Z]{{0,3}}[{_SYMBOLS}]|[A-Z]{{2,3}}(?![A-Za-z])|[^\W\d_]{{1,5}}\.?(?!\w)")


def read_price(text: str) -> dict[str, Any]:
    """Amount and currency of the first price; a mark before one or two last digits parts decimals, others thousands."""
    found = _NUMBER.search(text)
    if found is None:
        return {"amount": None, "currency": None}
    plain = re.sub(r"[' \u00a0’]", "", found.group())
    whole, mark, decimals = re.match(r"(.*?)(?:([.,])(\d{1,2}))?$", plain).groups()  # type: ignore[union-attr]
    amount = float(re.sub("[.,]", "", whole) + (f".{decimals}" if mark else ""))
    near = (_SIGN.match(text[found.end() :].lstrip()), *reversed(list(_SIGN.finditer(text[: found.start()]))))
    return {"amount": amount, "currency": next((sign.group() for sign in near if sign is not None), None)}


class Teacher(BaseHTTPRequestHandler):
    """Answers `POST /v1/chat/completions` with the price in the input that it is shown."""

    def do_POST(self) -> None:
        """Answer one request; the input stands between tags in the last turn."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        shown = re.search(r"<input>\n(.*)\n</input>", body["messages"][-1]["content"], re.DOTALL)
        content = json.dumps(read_price(shown.group(1) if shown else ""), ensure_ascii=False)
        said = {
            "choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0},
        }
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())

    def log_message(self, *_: object) -> None:
        """Say nothing of single requests."""


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    print(f"listening on http://127.0.0.1:{port}/v1, until Ctrl-C")
    ThreadingHTTPServer(("127.0.0.1", port), Teacher).serve_forever()
