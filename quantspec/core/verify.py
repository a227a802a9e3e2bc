"""The verifier: one forward of the target over ``tokens[cached:] ++ draft`` of every session, then the target's own
tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from quantspec.core.accept import accept, ratio_accept
from quantspec.core.on_device import MOST_LAG, draw
from quantspec.core.sampling import WarpChain, WarpState
from quantspec.core.session import Session
from quantspec.errors import UsageError
from quantspec.models.base import Draw, DrawingModel
from quantspec.types import Batch, Draft, Needs, PendingDraft, Proposal, Tap, TokenLogprob, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from quantspec.core.noise import Stream
    from quantspec.kernels.draws import Drawn
    from quantspec.models.base import CausalModel, Output

NO_NEEDS = Needs()


class Verifier:
    """Owns a model's sessions and says what of a draft stands.

    ``stage`` names this level in ``Verdict.stages``. ``rule`` is ``"exact"``, or ``"ratio"`` for speculative sampling
    of chains. Lags of more than ``prefill_chunk`` rows are fed in chunks.
    """

    def __init__(
        self,
        model: CausalModel,
        *,
        stage: str = "target",
        rule: Literal["exact", "ratio"] = "exact",
        prefill_chunk: int = 512,
    ) -> None:
        self.model = model
        self.stage = stage
        self.rule = rule
        self.prefill_chunk = prefill_chunk
        self._draws = rule == "exact" and isinstance(model, DrawingModel)

    def draw_on_host(self) -> None:
        """From now on, whether the model draws or not."""
        self._draws = False

    @property
    def exactness(self) -> str:
        """How a run's text relates to plain decoding by this verifier's model: ``exact``, ``exact_to_rounding`` or
        ``exact_distribution``."""
        if self.rule == "ratio":
            return "exact_distribution"
        return "exact" if self.model.row_invariant else "exact_to_rounding"

    def open(
        self,
        prompt: Sequence[int],
        chain: WarpChain,
        stream: Stream,
        stop_ids: frozenset[int] = frozenset(),
        max_new_tokens: int = 256,
        max_nodes: int = 64,
    ) -> Session:
        """A session for ``prompt`` with room for ``max_new_tokens`` and drafts of ``max_nodes``.

        Raises:
            UsageError: the prompt is empty, does not fit the model's context together with the output, or the
            parameters
                name a token that the model does not have.
        """
        limit = self.model.max_positions
        if not prompt:
            raise UsageError("the prompt is empty", hint="give at least one token")
        if len(prompt) + max_new_tokens > limit:
            room = limit - len(prompt)
            raise UsageError(
                f"{len(prompt)} prompt tokens and {max_new_tokens} new ones do not fit the model's context of {limit}",
                hint=f"ask for at most {room} new tokens" if room > 0 else "shorten the prompt",
            )
        chain.check(self.model.vocab_size)
        cache = self.model.new_cache(len(prompt) + max_new_tokens, max_nodes)
        return Session(
            tokens=list(prompt),
            cache=cache,
            chain=chain,
            stream=stream,
            stop_ids=stop_ids,
            max_new_tokens=max_new_tokens,
            vocab_size=self.model.vocab_size,
            max_nodes=max_nodes,
            ratio=self.rule == "ratio",
        )

    def verify(self, sessions: Sequence[Session], drafts: Sequence[Proposal], needs: Needs = NO_NEEDS) -> list[Verdict]:
        """One verdict per session, in one forward (besides the chunks of long lags). Nothing is committed yet."""
        early = [self._catch_up(session, needs.taps) for session in sessions]
        draws = [self._drawn(session) for session in sessions]
        fed = [self._fed(*each) for each in zip(sessions, drafts, draws, strict=True)]
        rows, lags = [], [session.lag for session in sessions]
        for session, proposal, lag in zip(sessions, fed, lags, strict=True):
            parents = (*range(-1, lag - 1), *(lag + parent for parent in proposal.parents))
            rows.append(((*session.tokens[-lag:], *proposal.tokens), parents))
        batch = Batch.of(rows, [session.cached for session in sessions], [len(draft.tokens) + 1 for draft in fed])
        output, known, drawn = self._score(batch, sessions, fed, draws, needs)
        verdicts, end = [], 0
        for s, (session, draft) in enumerate(zip(sessions, known, strict=True)):
            start, end = end, end + batch.num_logits[s]
            whole = len(output.logits) == len(draft) + 1
            logits = output.logits if whole else output.logits[start : start + len(draft) + 1]
            new_rows = partial(_new_rows, early[s], output.taps, batch.seq_starts[s], lags[s])
            verdicts.append(self._judge(session, draft, logits, drawn[s], needs.top_k, new_rows))
        return verdicts

    def _score(
        self,
        batch: Batch,
        sessions: Sequence[Session],
        fed: Sequence[Proposal],
        draws: Sequence[Draw | None],
        needs: Needs,
    ) -> tuple[Output, list[Draft], list[Drawn | None]]:
        """Logits of the batch, its drafts, and of each session what was drawn on the device, if anything was."""
        if any(draws):
            assert isinstance(self.model, DrawingModel)
            return draw(self.model, batch, sessions, fed, draws, needs)
        output = self.model.forward(batch, [session.cache for session in sessions], needs.taps)
        return output, [draft for draft in fed if isinstance(draft, Draft)], [None] * len(sessions)

    def _catch_up(self, session: Session, taps: Sequence[Tap]) -> list[Mapping[Tap, Tensor]]:
        """Feed a long lag down to ``prefill_chunk`` rows; returns the chunks' taps."""
        parts = []
        while session.lag > self.prefill_chunk:
            chunk = session.tokens[session.cached : session.cached + min(self.prefill_chunk, session.lag - 1)]
            batch = Batch.chain(chunk, session.cached, num_logits=0)
            parts.append(self.model.forward(batch, [session.cache], taps).taps)
            session.commit_lag(len(chunk))
        return parts

    def _drawn(self, session: Session) -> Draw | None:
        """How the model draws this session's tokens; None: the host draws them, of its logits."""
        return session.chain.drawn(session.stream) if self._draws else None

    def _fed(self, session: Session, draft: Proposal, drawn: Draw | None) -> Proposal:
        """The part of the draft that this cache and rule can take."""
        if isinstance(draft, PendingDraft):
            if drawn and session.lag <= MOST_LAG and not session.cache.chains_only:
                return draft
            draft = draft.resolve()
        if draft.is_chain:
            return draft
        if self.rule == "ratio":
            raise UsageError("the ratio rule verifies chains, and this drafter proposes trees")
        return draft.best_chain() if session.cache.chains_only else draft

    def _judge(
        self,
        session: Session,
        draft: Draft,
        logits: Tensor,
        drawn: Drawn | None,
        top_k: int,
        new_rows: Callable[[Sequence[int]], Iterator[tuple[Tap, Tensor]]],
    ) -> Verdict:
        chain, stream = session.chain, session.stream
        states, depths = _along_the_tree(session, draft)
        positions = [len(session.tokens) + depth for depth in depths]
        race = None
        if drawn:
            race = chain.drawn_race(drawn, logits, positions, stream)
        elif self.rule == "exact" or top_k:  # the ratio rule draws in its own way
            race = chain.race(states, logits, positions, stream)
        if self.rule == "ratio":
            y, path = _judge_by_ratio(session, draft, chain.apply_rows(states, logits), positions)
        else:
            assert race
            y = race.argmax()
            path = accept(draft, y)
        top = None
        if race and top_k:
            ids, scores = race.best(min(top_k, logits.shape[1]))
            top = (torch.from_numpy(ids), torch.from_numpy(scores))
        tokens = tuple([draft.tokens[node] for node in path])
        next_token = y[path[-1] + 1 if path else 0]
        return Verdict(
            path=path,
            tokens=tokens,
            next_token=next_token,
            y=tuple(y),
            stages=(*[draft.stages[node] for node in path], self.stage),
            draft=draft,
            top=top,
            taps=dict(new_rows(path)),
            logprobs=_logprobs(chain, logits, [0, *(node + 1 for node in path)], (*tokens, next_token)),
        )


def _along_the_tree(session: Session, draft: Draft) -> tuple[list[WarpState], list[int]]:
    """Warp state and depth of each row: row 0 is the last committed token, row i + 1 node i."""
    states, depths = [session.state], [0]
    if session.chain.stateless:
        states *= len(draft) + 1
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        depths.append(depths[parent + 1] + 1)
        if not session.chain.stateless:
            states.append(session.chain.advance(states[parent + 1], token))
    return states, depths


def _judge_by_ratio(
    session: Session, draft: Draft, warped: Tensor, positions: Sequence[int]
) -> tuple[list[int], tuple[int, ...]]:
    """y and path under the ratio rule. Its coins and residual draws have key domains of their own, for the drafter's
    own draws (a third domain) must not be correlated with them."""
    chain, stream = session.chain, session.stream
    y = chain.draw(warped, positions, stream)
    p = torch.softmax(warped.double(), dim=-1)
    if chain.greedy:
        p = torch.nn.functional.one_hot(torch.tensor(y), p.shape[1]).to(p)
    coins, residuals = stream.domain("coin"), stream.domain("residual")

    def draw(probabilities: Tensor, i: int) -> int:
        noise = torch.from_numpy(residuals.noise(positions[i], len(probabilities)).astype(np.float64))
        return int((probabilities.log().cpu() - noise).argmax())

    kept, next_token = ratio_accept(draft.tokens, p, draft.q_rows, lambda i: coins.coin(positions[i]), draw)
    return [*draft.tokens[:kept], next_token, *y[kept + 1 :]], tuple(range(kept))


def _new_rows(
    early: Sequence[Mapping[Tap, Tensor]], taps: Mapping[Tap, Tensor], start: int, lag: int, path: Sequence[int]
) -> Iterator[tuple[Tap, Tensor]]:
    """Per tap, one row per newly cached token: chunks of the lag, the rest of it, then the accepted path."""
    rows = [*range(start, start + lag), *(start + lag + node for node in path)]
    for tap, values in taps.items():
        numbers = torch.tensor(rows).to(values.device, non_blocking=True)
        last = values[numbers]  # a copy: views would keep all rows alive
        yield tap, torch.cat([*(part[tap] for part in early), last]) if early else last


def _logprobs(chain: WarpChain, logits: Tensor, rows: Sequence[int], tokens: Sequence[int]) -> tuple[TokenLogprob, ...]:
    """Of the raw distribution, for the emitted tokens; nothing unless the parameters ask."""
    count = chain.params.logprobs
    if count is None:
        return ()
    result = []
    for scores, token in zip(torch.log_softmax(logits[rows].float(), dim=-1).cpu(), tokens, strict=True):
        best = scores.topk(min(count, len(scores)))
        top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        result.append(TokenLogprob(token, float(scores[token]), tuple(top)))
    return tuple(result)
