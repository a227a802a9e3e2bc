"""The controller in worlds whose costs and acceptance are known: what it loses, gains, and when it gives up."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from quantspec.engine.controller import CREDIT, LOSS, STRIKES, Controller, Lessons
from quantspec.engine.costs import CostCurve, DraftCost
from quantspec.engine.planner import Costs, Outlook, Speed
from quantspec.types import EMPTY_DRAFT, Budget, Draft, Verdict

CPU = CostCurve((0, 4096), (1, 2, 3, 4, 8, 16), ((1.0, 1.0, 1.1, 1.3, 2.6, 4.9), (1.5, 1.5, 1.7, 2.0, 4.0, 7.5)))
HEAD = DraftCost(prefill_per_token=0.004, per_level=0.08, per_node=0.002)
Rate = Callable[[int], float]


def outlook(draft: DraftCost = HEAD, rate: float = 0.75, nodes: int = 8, target: CostCurve = CPU) -> Outlook:
    """A drafter of chains of which the profile says that ``rate`` of the tokens are accepted."""
    speeds = [
        Speed(sum(rate**i for i in range(n + 1)), Costs.of(target, draft, 0.02, n, 0).step(n, n))
        for n in range(1, nodes + 1)
    ]
    best = max(speeds, key=lambda speed: speed.rate)
    return Outlook(target, 0.02, draft, best, (rate,) * nodes, 1.0, nodes, nodes)


class World:
    """Chains whose scores claim ``claimed`` a token and of which ``true(position)`` come true."""

    def __init__(self, outlook: Outlook, true: Rate, claimed: Rate | None = None, seed: int = 0) -> None:
        self.outlook, self.true, self.claimed, self.rng = outlook, true, claimed or true, random.Random(seed)
        self.position = self.drafts = 0
        self.seconds = self.plain = 0.0
        self.unread = 0

    def run(self, controller: Controller, tokens: int, context: int = 0, slow: float = 1.0) -> float:
        """Generate; the speed over that of plain decoding."""
        while self.position < tokens:
            costs = Costs.of(self.outlook.target, self.outlook.draft, 0.02, self.outlook.nodes, context + self.position)
            verdict, draft, verify = self.step(costs, controller.budget(context + self.position))
            controller.take(verdict, slow * draft, slow * verify)
            self.seconds += draft + verify + 0.02
            self.plain += len(verdict.emitted) * (costs.verify[0] + 0.02)
            self.position += len(verdict.emitted)
        return self.plain / self.seconds

    def step(self, costs: Costs, budget: Budget) -> tuple[Verdict, float, float]:
        if not budget.max_nodes:
            self.unread += 1
            return Verdict((), (), 0, (0,), ("target",)), 0.0, costs.verify[0]
        self.drafts += 1
        scores, floors = list[float](), budget.floors()
        score, claimed = 1.0, self.claimed(self.position)
        while (
            len(scores) < min(budget.max_nodes, budget.max_depth) and score > budget.level_price + floors[len(scores)]
        ):
            score *= claimed
            scores.append(score)
        draft_seconds = costs.draft.at(len(scores), len(scores)) + costs.draft.prefill_per_token * self.unread
        self.unread = 0
        kept = budget.worth(scores)
        draft = Draft.chain([1] * kept, scores[:kept], ["eagle"] * kept) if kept else EMPTY_DRAFT
        run = next((i for i in range(kept) if self.rng.random() >= self.true(self.position)), kept)
        path = tuple(range(run))
        verdict = Verdict(path, (1,) * run, 0, (0,) * (kept + 1), ("eagle",) * run + ("target",), draft)
        return verdict, draft_seconds, costs.verify[kept]


def always(rate: float) -> Rate:
    return lambda position: rate


@pytest.mark.parametrize("claimed", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("context", [0, 4096])
@pytest.mark.parametrize("tokens", [128, 256, 1024])
def test_a_hopeless_drafter_costs_less_than_three_percent(claimed: float, context: int, tokens: int) -> None:
    for seed in range(5):
        world = World(outlook(), always(0.0), always(claimed), seed)
        controller = Controller(outlook(), Lessons(), 20, tokens)
        assert world.run(controller, tokens, context) >= 0.97
        assert not controller.on


@pytest.mark.parametrize("rate", [0.5, 0.75, 0.9])
def test_a_good_drafter_is_as_fast_as_its_best_fixed_width(rate: float) -> None:
    expected = outlook(rate=rate).speed.rate / Costs.of(CPU, HEAD, 0.02, 1, 0).plain.rate
    found = [
        World(outlook(), always(rate), seed=seed).run(Controller(outlook(), Lessons(), 20, 2000), 2000, slow=3.0)
        for seed in range(3)
    ]
    # 2000 tokens: a standard error of 2% each; the machine is three times slower than the profile says.
    assert sum(found) / 3 >= 0.95 * expected


def test_scores_that_promise_too_much_are_trusted_less() -> None:
    honest, boasting = (
        World(outlook(), always(0.6), always(claimed)).run(Controller(outlook(), Lessons(), 20, 2000), 2000)
        for claimed in (0.6, 0.99)
    )
    assert boasting > 0.9 * honest > 0.9


def test_drafting_is_turned_off_and_on_again_when_acceptance_returns() -> None:
    def rate(position: int) -> float:
        return 0.0 if 600 <= position < 1200 else 0.85

    world, controller, states = World(outlook(), rate, always(0.85)), Controller(outlook(), Lessons(), 20, 4000), {}
    for end in range(100, 4001, 100):
        world.run(controller, end)
        states[end] = controller.on
    assert states[600]
    assert not any(states[end] for end in range(700, 1201, 100))
    assert all(states[end] for end in range(1900, 4001, 100))


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_beyond_the_account_whatever_comes(seed: int) -> None:
    """Acceptance that jumps about, as if against the controller."""
    rng = random.Random(seed)
    rates = [rng.choice([0.0, 0.0, 0.3, 0.9]) for _ in range(60)]
    world = World(outlook(), lambda position: rates[position // 50], always(0.9), seed)
    controller = Controller(outlook(), Lessons(), 20, 3000)
    for end in range(50, 3001, 50):
        world.run(controller, end)
        worst = Costs.of(CPU, HEAD, 0.02, 8, 0).step(8, 8)  # the step that overdraws it
        assert controller.loss <= CREDIT + LOSS * world.position + worst


def test_a_drafter_that_pays_for_nothing_but_its_prompt_is_not_begun() -> None:
    slow_reader = DraftCost(prefill_per_token=0.05, per_level=0.08)
    assert Controller(outlook(slow_reader), Lessons(), 20, 256).on
    assert not Controller(outlook(slow_reader), Lessons(), 4000, 64).on
    assert not Controller(outlook(rate=0.05), Lessons(), 20, 256).on, "the profile itself says that it does not pay"


def test_what_reading_takes_is_learned_from_texts_that_were_read() -> None:
    """A quarter of what the profile says: prompts that were too long are read then, and slow drafts change nothing."""
    known, lessons = outlook(DraftCost(prefill_per_token=0.5, per_level=0.08)), Lessons()
    gain = 256 * (1 / Costs.of(CPU, known.draft, 0.02, 8, 0).plain.rate - 1 / known.speed.rate)
    prompt = round(1.3 * gain / 0.5)
    assert prompt > 100
    assert not Controller(known, lessons, prompt, 256).on
    for seed in range(4):
        world, controller = World(known, always(0.75), seed=seed), Controller(known, lessons, 400, 2000)
        world.unread = 100  # it takes as long as a quarter of the prompt should
        world.run(controller, 200)
        controller.close()
    assert lessons.reading == pytest.approx(0.25, abs=0.07)  # halfway there each time
    assert Controller(known, lessons, prompt, 256).on
    for _ in range(60):
        lessons.time(1.0, 3.0)
    assert Controller(known, lessons, prompt, 256).on


def test_texts_that_lose_one_after_the_other_cost_ever_less() -> None:
    lessons, drafts = Lessons(), []
    for seed in range(STRIKES + 2):
        world, controller = World(outlook(), always(0.0), always(0.9), seed), Controller(outlook(), lessons, 20, 256)
        world.run(controller, 256)
        controller.close()
        drafts.append(world.drafts)
    assert lessons.strikes >= STRIKES
    assert drafts[-1] < drafts[0]
    world, controller = World(outlook(), always(0.9)), Controller(outlook(), lessons, 20, 2000)
    assert world.run(controller, 2000) > 1.3, "it is still tried now and then"
    controller.close()
    assert lessons.strikes == 0


def test_costs_that_turn_out_higher_narrow_the_drafts() -> None:
    lessons = Lessons()
    controller = Controller(outlook(), lessons, 20, 1000)
    before = controller.budget(30)
    for _ in range(60):
        lessons.time(2.0, 8.0)
    after = controller.budget(31)
    assert lessons.pace == pytest.approx(2.0, abs=0.1)
    assert lessons.scale == pytest.approx(4.0, abs=0.2)
    assert after.level_price > 3 * before.level_price


def test_a_batch_pays_for_its_own_rows() -> None:
    controller = Controller(outlook(), Lessons(), 20, 1000)
    alone, many = controller.budget(30, 1), controller.budget(30, 8)
    assert alone.prices[0] == pytest.approx(0.0, abs=0.02)
    assert many.prices[0] > 0.3


def test_budgets_of_a_device_keep_their_size() -> None:
    steady = Outlook(CPU, 0.02, HEAD, Speed(3.0, 1.5), (0.8,) * 4, 1.0, 16, 4, steady=True)
    controller = Controller(steady, Lessons(), 20, 1000)
    assert controller.budget(30) == Budget(16, 4)
    world = World(steady, always(0.0))
    world.outlook = steady
    sizes = set()
    for _ in range(300):
        budget = controller.budget(world.position)
        sizes.add(budget.max_nodes)
        verdict, draft, verify = world.step(Costs.of(CPU, HEAD, 0.02, 16, 0), budget)
        controller.take(verdict, draft, verify)
        world.position += 1
    assert sizes == {0, 16}
