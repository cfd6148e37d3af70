"""What asking costs, and a budget that is not exceeded: a request's most is set aside before it is sent."""

from __future__ import annotations

from typing import NamedTuple

from tasks.contracts.spec import Frozen
from tasks.contracts.synthesis import PriceSpec, SynthesisBudget

_MILLION = 1_000_000


class Cost(NamedTuple):
    """Requests, and tokens of prompts and answers."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of prompts and answers together."""
        return self.prompt_tokens + self.completion_tokens

    def plus(self, other: Cost) -> Cost:
        """The sum."""
        return Cost(*(one + more for one, more in zip(self, other, strict=True)))

    def minus(self, other: Cost) -> Cost:
        """The difference."""
        return Cost(*(one - less for one, less in zip(self, other, strict=True)))

    def times(self, count: int) -> Cost:
        """The same several times."""
        return Cost(*(one * count for one in self))

    def money(self, price: PriceSpec | None) -> float:
        """In the currency of the price; 0 without one."""
        if price is None:
            return 0.0
        return (
            self.prompt_tokens * price.per_million_prompt + self.completion_tokens * price.per_million_completion
        ) / _MILLION


class Spent(Frozen):
    """What was spent, as a report keeps it. `lost` is the part that brought nothing, at the most it can have been."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    money: float | None
    currency: str | None
    lost_requests: int
    lost_tokens: int
    not_counted_by_server: int


class Purse:
    """What is spent and what is set aside, under a budget."""

    def __init__(self, budget: SynthesisBudget, price: PriceSpec | None) -> None:
        self._budget = budget
        self._price = price
        self._aside = Cost()
        self.spent = Cost()
        self.lost = Cost()
        self.unmeasured = 0

    def set_aside(self, most: Cost) -> bool:
        """Set the most that a request can cost aside, if the budget has room for it."""
        if self.limit(most) is not None:
            return False
        self._aside = self._aside.plus(most)
        return True

    def limit(self, most: Cost) -> str | None:
        """Which limit a request could exceed, in words; None if there is room for it."""
        after = self.spent.plus(self._aside).plus(most)
        budget, price = self._budget, self._price
        if budget.requests is not None and after.requests > budget.requests:
            return f"budget.requests is {budget.requests:,}"
        if budget.tokens is not None and after.tokens > budget.tokens:
            return f"budget.tokens is {budget.tokens:,}"
        if budget.money is not None and price is not None and after.money(price) > budget.money:
            return f"budget.money is {budget.money:g} {price.currency}"
        return None

    def room(self, most: Cost, enough: int) -> int:
        """How many such requests the budget has room for, at most `enough`."""
        low, high = 0, enough
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.limit(most.times(middle)) is None else (low, middle - 1)
        return low

    def pay(self, most: Cost, real: Cost, *, measured: bool = True) -> None:
        """A request for which `most` was set aside came to cost `real`."""
        self._aside = self._aside.minus(most)
        self.spent = self.spent.plus(real)
        self.unmeasured += not measured

    def lose(self, most: Cost) -> None:
        """A request for which `most` was set aside brought nothing and may have been paid."""
        self.pay(most, most)
        self.lost = self.lost.plus(most)

    def remember(self, lost: Cost) -> None:
        """Count what was lost before."""
        self.spent = self.spent.plus(lost)
        self.lost = self.lost.plus(lost)

    def give_back(self, most: Cost) -> None:
        """A request for which `most` was set aside was surely not paid."""
        self._aside = self._aside.minus(most)

    def account(self) -> Spent:
        """All that was spent."""
        price = self._price
        return Spent(
            **self.spent._asdict(),
            money=None if price is None else round(self.spent.money(price), 6),
            currency=None if price is None else price.currency,
            lost_requests=self.lost.requests,
            lost_tokens=self.lost.tokens,
            not_counted_by_server=self.unmeasured,
        )
