"""The controller of one sequence: how much to draft at each step, from what the profile says and the text shows.

While drafting pays, a budget carries the prices of rows at the rate reached so far; scores are trusted as far as they
have come true. Two rules turn drafting off. One looks at the last steps: they were slower than plain decoding. The
other keeps account of the whole text, so that a drafter that never helps costs ``CREDIT`` plain steps and ``LOSS`` of
the rest at most, whatever the first rule sees. Off, a narrow draft is tried at growing intervals, as far as that
account allows; one that pays turns drafting on again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quantspec.engine.planner import Costs, Outlook, Speed
from quantspec.types import Budget, Verdict

LOSS = 0.02
"""What trying may cost in the long run, of plain decoding's time."""
CREDIT, LEAST_CREDIT, SHARE = 4.0, 1.5, 0.02
"""What trying may cost before it has gained anything, in plain steps: that share of the text's, within bounds."""
STRIKES = 3
"""Texts in a row that lost: after so many, the next begins without drafting."""
_RECENT, _DECAY = 0.95, 0.98  # of what turns drafting on and off, and of what sets its width
_WEIGHT = 12.0  # steps that the profile's word counts for
_FIRST_WAIT, _LONGEST_WAIT = 8, 256  # steps between two tries
_BUCKET = 64  # tokens of context that share one table of costs
_NEARLY_FREE = 1.1  # of a plain forward: what a try's may take
_OUTLIER = 4.0  # times what was expected: more than this is not the drafter's doing
_LENIENCE = 2.0
_RANK_WEIGHT, _LEAST_TRUST = 4.0, 0.05
_PLAIN = Budget(max_nodes=0, max_depth=0)


@dataclass(slots=True)
class Lessons:
    """What the sequences of one engine share: ``pace``, measured over predicted seconds of a verification; ``scale``,
    the same of drafts, over ``pace``, and of a drafter's ``reading`` of a text; and how many texts in a row lost by
    drafting."""

    pace: float = 1.0
    scale: float = 1.0
    reading: float = 1.0
    strikes: int = 0

    def time(self, verify: float, draft: float | None) -> None:
        """Learn from one step's ratios of measured to predicted seconds; ``draft`` None: nothing to be learned."""
        self.pace += (1 - _RECENT) * (min(verify, _OUTLIER * self.pace) - self.pace)
        if draft is not None:
            self.scale += (1 - _RECENT) * (min(draft / self.pace, _OUTLIER * self.scale) - self.scale)

    def read(self, ratio: float) -> None:
        """Learn from the measured over the predicted seconds in which a drafter read a text: there are few of those."""
        self.reading += 0.5 * (min(max(ratio, 1 / _OUTLIER), _OUTLIER) - self.reading)


class Tally:
    """Tokens per second of steps, of which those long ago count less, after ``weight`` steps of an expected speed."""

    def __init__(self, decay: float, weight: float, expected: Speed) -> None:
        self._decay, self._tokens, self._seconds = decay, weight * expected.tokens, weight * expected.seconds

    @property
    def rate(self) -> float:
        return self._tokens / self._seconds

    def add(self, tokens: float, seconds: float) -> None:
        self._tokens = self._decay * self._tokens + tokens
        self._seconds = self._decay * self._seconds + seconds


class Acceptance:
    """How far drafts hold: by depth, and over what scores promised, by rank in their draft. Steps long ago count less;
    without new ones the profile's word stands."""

    def __init__(self, outlook: Outlook) -> None:
        known, depth = outlook.acceptance[: outlook.depth], outlook.depth
        # Past what was measured, as at the last position that was.
        self._prior = (*known, *[known[-1] if known else 0.5] * (depth - len(known)))
        self._tried, self._hits = [0.0] * depth, [0.0] * depth
        self._promised, self._kept = [0.0] * outlook.nodes, [0.0] * outlook.nodes
        self._word = outlook.trust

    def trust(self) -> tuple[float, list[float]]:
        """Accepted nodes for each that scores promise: of all nodes, and of each draft's best, second best, ..."""
        mean = (sum(self._kept) + _WEIGHT * self._word) / (sum(self._promised) + _WEIGHT)
        pairs = zip(self._promised, self._kept, strict=True)
        ranks = [(kept + _RANK_WEIGHT * mean) / (promised + _RANK_WEIGHT) for promised, kept in pairs]
        return max(mean, _LEAST_TRUST), [max(rank, _LEAST_TRUST) for rank in ranks]

    def depth(self, prices: Sequence[float]) -> int:
        """The deepest level that is reached often enough to be worth a look, by what each costs in tokens. Whether one
        draft should go there, its own scores say better than this mean."""
        reach, depth = 1.0, 0
        for tried, hits, word, price in zip(self._tried, self._hits, self._prior, prices, strict=False):
            reach *= (hits + _WEIGHT * word) / (tried + _WEIGHT)
            if _LENIENCE * reach < price:
                break
            depth += 1
        return max(depth, 1)

    def fade(self) -> None:
        """A step has passed."""
        for counts in (self._tried, self._hits, self._promised, self._kept):
            counts[:] = [_DECAY * count for count in counts]

    def count(self, verdict: Verdict) -> None:
        """A draft was verified."""
        draft, path = verdict.draft, set(verdict.path)
        ranked = sorted(range(len(draft)), key=draft.scores.__getitem__, reverse=True)
        for rank, node in enumerate(ranked[: len(self._kept)]):
            self._promised[rank] += draft.scores[node]
            self._kept[rank] += node in path
        reached, deepest = len(path), max(draft.depths(), default=0)
        for depth in range(min(reached + 1, deepest, len(self._tried))):
            self._tried[depth] += 1
            self._hits[depth] += depth < reached


class Controller:
    """Of one sequence, whose text begins with ``prompt_tokens`` and gets ``new_tokens`` at most.

    ``on``: it drafts. ``loss``: plain steps that drafting has cost so far; below 0 it gained.
    """

    def __init__(self, outlook: Outlook, lessons: Lessons, prompt_tokens: int, new_tokens: int) -> None:
        self.outlook, self.lessons, self.loss = outlook, lessons, 0.0
        self._new_tokens, self._emitted = new_tokens, 0
        self._acceptance, self._asked = Acceptance(outlook), _PLAIN
        self._wait = self._interval = _FIRST_WAIT
        self._longest_wait = _LONGEST_WAIT
        self._recent = Tally(_RECENT, _WEIGHT, outlook.speed)
        self._speed = Tally(_DECAY, _WEIGHT, outlook.speed)
        self._costs_of: tuple[int, int, float, float] | None = None
        self._costs = self._look(prompt_tokens, 1)
        reading = self._costs.draft.prefill_per_token * prompt_tokens
        gain = new_tokens * (1 / self._costs.plain.rate - 1 / outlook.speed.rate)
        self.on = gain > reading and lessons.strikes < STRIKES
        self._unread = 0 if self.on else prompt_tokens  # once it is to be read, that is no loss
        self._behind = prompt_tokens  # tokens that the drafter has not read, lost or not
        self._lost_before, self._drafted = 0.0, False

    def budget(self, context: int, batch: int = 1) -> Budget:
        """What the next draft may cost, with that many committed tokens, beside ``batch - 1`` other sequences."""
        self._costs = self._look(context, batch)
        self._asked = self._width() if self.on else self._probe()
        return self._asked

    def take(self, verdict: Verdict, draft_seconds: float, verify_seconds: float) -> bool:
        """Learn from a step; True if it turned drafting off."""
        emitted, asked, plain = len(verdict.emitted), self._asked, self._costs.step(0, 0)
        self._asked = _PLAIN
        self._emitted += emitted
        self._acceptance.fade()
        if not asked.max_nodes:
            self._unread += 0 if self.on else emitted
            self._behind += emitted
            self.lessons.time(verify_seconds / self._costs.verify[0], None)
            return False
        self._acceptance.count(verdict)
        reading, seconds = self._reading, self._spent(verdict, draft_seconds, verify_seconds)
        self.loss += (seconds + reading) / plain - emitted
        for tally in (self._recent, self._speed):
            tally.add(emitted, seconds)
        pays = self._recent.rate > 1 / plain
        if not self.on:
            self._judge_probe(verdict, pays)
        elif not pays or self.loss > self._credit + LOSS / 2 * self._emitted:
            self._turn_off(plain)
            return True
        return False

    def close(self) -> None:
        """The text is over."""
        if self.loss < 0:
            self.lessons.strikes = 0
        elif self.loss > self._credit / 2:
            self.lessons.strikes += 1

    @property
    def _credit(self) -> float:
        share = max(LEAST_CREDIT, min(CREDIT, SHARE * self._new_tokens))
        return share / 2 ** min(self.lessons.strikes, STRIKES)

    def _look(self, context: int, batch: int) -> Costs:
        """Costs at that context and batch, those of drafts as they turn out here."""
        lessons, outlook = self.lessons, self.outlook
        key = (context // _BUCKET, batch, round(lessons.scale, 1), round(lessons.reading, 1))
        if key == self._costs_of:
            return self._costs
        self._costs_of = key
        reading = outlook.draft.prefill_per_token * lessons.reading
        draft = replace(outlook.draft.times(lessons.scale), prefill_per_token=reading)
        return Costs.of(outlook.target, draft, outlook.overhead, outlook.nodes, context, batch)

    def _width(self) -> Budget:
        """Prices at the rate reached so far, which is never below plain decoding's."""
        costs, outlook = self._costs, self.outlook
        if outlook.steady:
            return Budget(outlook.nodes, outlook.depth)
        rho = costs.batch * max(self._speed.rate, 1 / costs.step(0, 0))
        budget, (mean, ranks) = costs.budget(rho, outlook.nodes, outlook.depth), self._acceptance.trust()
        depth = self._acceptance.depth([budget.level_price + row for row in budget.floors()])
        prices = tuple([price / trust for price, trust in zip(budget.prices, ranks, strict=True)])
        return Budget(outlook.nodes, depth, prices=prices, level_price=budget.level_price / mean)

    def _probe(self) -> Budget:
        """A draft that costs little, if one is due and the account allows it."""
        self._wait -= 1
        if self._wait > 0:
            return _PLAIN
        costs, outlook = self._costs, self.outlook
        nodes, depth, plain = outlook.nodes, outlook.depth, costs.step(0, 0)
        if not outlook.steady:
            free = sum(seconds <= _NEARLY_FREE * costs.verify[0] for seconds in costs.verify) - 1
            nodes, depth = max(free, 1), min(2, depth)
        price = costs.step(nodes, depth) / plain - 1
        # Tries that often fail cost half of what may be lost: more seldom need not be.
        self._longest_wait = max(_FIRST_WAIT, min(round(2 * price / LOSS), _LONGEST_WAIT))
        price += self._reading / plain
        return Budget(nodes, depth) if max(self.loss, 0.0) + price <= self._credit + LOSS * self._emitted else _PLAIN

    @property
    def _reading(self) -> float:
        """Seconds in which the drafter catches up with the text."""
        return self._costs.batch * self._costs.draft.prefill_per_token * self._unread

    def _spent(self, verdict: Verdict, draft_seconds: float, verify_seconds: float) -> float:
        """Seconds of a step that drafted, at the profile's pace, without what the drafter had to catch up. The draft's
        are measured, since one in which nothing is worth a row costs too; those of a verification are only looked up,
        without their noise."""
        costs, lessons, nodes = self._costs, self.lessons, len(verdict.draft)
        verify = costs.verify[min(nodes, len(costs.verify) - 1)]
        expected = costs.batch * costs.draft.at(max(verdict.draft.depths(), default=0), nodes)
        catching_up = self._unread > _FIRST_WAIT or not self._drafted
        if catching_up:
            lessons.time(verify_seconds / verify, None)
            predicted = costs.batch * self.outlook.draft.prefill_per_token * self._behind
            if predicted and self._behind >= _BUCKET:
                lessons.read((draft_seconds / lessons.pace - expected) / predicted)
            draft = expected
        else:
            lessons.time(verify_seconds / verify, draft_seconds * lessons.scale / expected if expected else None)
            draft = min(draft_seconds / lessons.pace, _OUTLIER * max(expected, costs.verify[0]))
        self._unread, self._behind, self._drafted = 0, 0, True
        return verify + costs.overhead + draft

    def _judge_probe(self, verdict: Verdict, pays: bool) -> None:
        if pays and verdict.path:
            self.on, self._lost_before = True, self.loss
        elif verdict.draft.tokens and not verdict.path:
            self._wait_longer()

    def _turn_off(self, plain: float) -> None:
        if self.loss < self._lost_before:
            self._interval = _FIRST_WAIT // 2
        self.on = False
        self._wait_longer()
        # As good as plain decoding for three steps: one draft that pays turns it on again.
        self._recent = Tally(_RECENT, 3.0, Speed(1.0, 1.03 * plain))

    def _wait_longer(self) -> None:
        self._wait = self._interval = min(2 * self._interval, self._longest_wait)
