"""Session and cache under random steps, truncations and extensions: always what a fresh session would hold."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from table_model import EMPTY, RandomDrafter, TableModel

from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.core.step import step
from quantspec.core.verify import Verifier
from quantspec.types import Budget, Needs, SamplingParams

VOCAB, NEW = 8, 30
TOKEN = st.integers(0, VOCAB - 1)
PARAMS = SamplingParams(
    max_new_tokens=NEW, min_new_tokens=4, temperature=0.9, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.2
)


class SessionMachine(RuleBasedStateMachine):
    """One session under an outer level that truncates, extends and confirms at will."""

    @initialize(
        prompt=st.lists(TOKEN, min_size=1, max_size=9),
        seed=st.integers(0, 99),
        chunk=st.sampled_from((1, 2, 512)),
        chains_only=st.booleans(),
    )
    def open(self, prompt: list[int], seed: int, chunk: int, chains_only: bool) -> None:
        self.model = TableModel(VOCAB, seed, chains_only=chains_only)
        self.verifier = Verifier(self.model, prefill_chunk=chunk)
        self.chain = WarpChain(PARAMS, prompt, frozenset({0}))
        self.prompt = list(prompt)
        self.stream = Stream.of(prompt, 0, seed)
        self.session = self.verifier.open(prompt, self.chain, self.stream, frozenset({0}), NEW)
        self.drafter = RandomDrafter(self.model, seed, 0.7, Needs(taps=("norm",)))

    @precondition(lambda self: self.session.finish is None and self.session.remaining > 0)
    @rule(nodes=st.integers(0, 12))
    def step(self, nodes: int) -> None:
        session = self.session
        before, cached = list(session.tokens), session.cached
        (verdict,) = step([session], [None], self.drafter, self.verifier, [Budget(nodes, 6)])
        assert session.tokens == [*before, *verdict.emitted]
        assert session.cached == len(session.tokens) - 1
        rows = verdict.taps["norm"]
        assert len(rows) == session.cached - cached
        for i, row in enumerate(rows, cached + 1):
            assert row.equal(self.model.tap("norm", session.tokens[:i]))
        # what plain decoding would have said at each of these places, from scratch
        for i in range(len(before), len(session.tokens)):
            path = session.tokens[:i]
            state = self.chain.at(path[len(self.prompt) :])
            assert self.chain.sample([state], self.model.row(path)[None], [i], self.stream) == [session.tokens[i]]

    @rule(share=st.floats(0, 1), then=st.lists(TOKEN, max_size=3))
    def truncate(self, share: float, then: list[int]) -> None:
        session = self.session
        length = session.final + round(share * (len(session.tokens) - session.final))
        cached, then = session.cached, then[: NEW + session.prompt_length - length]
        expected = [*session.tokens[:length], *then]
        session.truncate(length, then)
        assert session.tokens == expected
        assert session.cached == min(cached, length, len(expected) - 1), "valid rows are kept"

    @rule(tokens=st.lists(TOKEN, max_size=4))
    def extend(self, tokens: list[int]) -> None:
        before = list(self.session.tokens)
        tokens = tokens[: self.session.remaining]
        self.session.extend(tokens)
        assert self.session.tokens == [*before, *tokens]

    @rule(share=st.floats(0, 1))
    def finalize(self, share: float) -> None:
        session = self.session
        session.finalize(session.final + round(share * (len(session.tokens) - session.final)))

    @invariant()
    def last_token_is_never_cached(self) -> None:
        if hasattr(self, "session"):
            session = self.session
            assert 0 <= session.cached <= len(session.tokens) - 1
            assert session.prompt_length <= session.final <= len(session.tokens)
            assert 0 <= session.remaining <= NEW

    @invariant()
    def cache_is_that_of_a_fresh_prefill(self) -> None:
        if hasattr(self, "session"):
            session = self.session
            fresh = self.model.new_cache(len(session.tokens), 0)
            fresh.slots[:], fresh.length = session.tokens, session.cached
            assert session.cache.slots[: session.cached] == fresh.slots[: session.cached]
            assert set(session.cache.slots[session.cached :]) <= {EMPTY}, "rejected rows were left in place"

    @invariant()
    def warp_state_is_that_of_the_tokens(self) -> None:
        if hasattr(self, "session"):
            row = self.model.row((1,))
            fresh = self.chain.start()
            for token in self.session.tokens[len(self.prompt) :]:
                fresh = self.chain.advance(fresh, token)
            assert self.chain.apply(self.session.state, row).equal(self.chain.apply(fresh, row))


TestSession = SessionMachine.TestCase
TestSession.settings = settings(max_examples=40, stateful_step_count=25, deadline=None, derandomize=True, database=None)
