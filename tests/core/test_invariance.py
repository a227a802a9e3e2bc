"""The text is a function of target, prompt, parameters and noise: the draft does not appear in it."""

from __future__ import annotations

import random

import pytest
from table_model import RandomDrafter, TableModel, generate

from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.core.step import step
from quantspec.core.verify import Verifier
from quantspec.types import Budget, Needs, SamplingParams

EOS = 0


def random_case(seed: int) -> tuple[TableModel, SamplingParams, tuple[int, ...], frozenset[int]]:
    """A model with a likely end of sequence, parameters with every feature on about half of the time, a prompt."""
    pick = random.Random(seed)

    def maybe(*values: float) -> float:
        return pick.choice((values[0], pick.choice(values[1:])))

    vocab_size = pick.choice((5, 17, 50))
    max_new = pick.randrange(1, 25)
    params = SamplingParams(
        max_new_tokens=max_new,
        min_new_tokens=pick.choice((0, pick.randrange(0, max_new + 1))),
        temperature=pick.choice((0.0, 0.6, 1.0, 1.7)),
        top_k=int(maybe(0, 1, 3, 40, 99)),
        top_p=maybe(1.0, 0.5, 0.9, 0.99),
        min_p=maybe(0.0, 0.05, 0.2),
        repetition_penalty=maybe(1.0, 0.8, 1.3),
        presence_penalty=maybe(0.0, -0.5, 0.8),
        frequency_penalty=maybe(0.0, -0.2, 0.4),
        logit_bias=pick.choice(({}, {1: 2.0, 2: -100.0})),
        stop_token_ids=pick.choice(((), (3,))),
        seed=pick.randrange(2**63),
        logprobs=pick.choice((None, 0, 2)),
    )
    model = TableModel(vocab_size, seed, order=pick.choice((None, 2)), bias={EOS: pick.choice((-9.0, 0.0, 2.0))})
    prompt = tuple(pick.randrange(vocab_size) for _ in range(pick.randrange(1, 12)))
    return model, params, prompt, frozenset({EOS, *params.stop_token_ids})


@pytest.mark.parametrize("block", range(10))
def test_text_does_not_depend_on_the_draft(block: int) -> None:
    accepted = 0
    for seed in range(20 * block, 20 * block + 20):
        model, params, prompt, stop_ids = random_case(seed)
        pick = random.Random(seed)
        plain = generate(model, params, prompt, stop_ids=stop_ids)
        for knows in (0.0, 0.7):
            model.chains_only = pick.random() < 0.2
            drafter = RandomDrafter(model, seed, knows, Needs(taps=(1, "embed"), top_k=2) if knows else Needs())
            other = generate(
                model,
                params,
                prompt,
                drafter,
                stop_ids=stop_ids,
                budget=Budget(pick.choice((1, 10)), pick.choice((1, 8))),
                prefill_chunk=pick.choice((1, 3, 512)),
            )
            assert other.tokens == plain.tokens, (seed, knows)
            assert other.finish == plain.finish, (seed, knows)
            accepted += drafter.accepted
        text = plain.tokens[plain.prompt_length :]
        assert plain.finish == ("stop" if text[-1] in stop_ids else "length")
        assert not stop_ids & set(text[: params.min_new_tokens])
        assert not stop_ids & set(text[:-1])
    assert accepted > 0, "no draft token was ever accepted: the test would prove nothing"


def test_samples_differ_and_repeat() -> None:
    model = TableModel(50, 1)
    params = SamplingParams(max_new_tokens=12, temperature=1.0, n=4, seed=9)
    texts = [tuple(generate(model, params, (1, 2, 3), sample=i).tokens) for i in range(params.n)]
    assert len(set(texts)) == params.n
    drafter = RandomDrafter(model, 0, knows=0.6)
    assert texts == [tuple(generate(model, params, (1, 2, 3), drafter, sample=i).tokens) for i in range(params.n)]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_batches_with_ragged_acceptance(temperature: float) -> None:
    model = TableModel(32, 4, bias={EOS: 1.0})
    prompts = [(1, 2, 3), (4,), tuple(range(5, 25)), (7, 7, 7, 7)]
    cases = [
        SamplingParams(
            max_new_tokens=6 + 5 * i, temperature=temperature, top_p=0.9, seed=i, repetition_penalty=1 + i / 4
        )
        for i in range(len(prompts))
    ]
    stop_ids = frozenset({EOS})
    expected = [generate(model, p, prompt, stop_ids=stop_ids).tokens for p, prompt in zip(cases, prompts, strict=True)]
    verifier = Verifier(model, prefill_chunk=4)
    sessions = [
        verifier.open(prompt, WarpChain(p, prompt, stop_ids), Stream.of(prompt, 0, p.seed), stop_ids, p.max_new_tokens)
        for p, prompt in zip(cases, prompts, strict=True)
    ]
    drafter = RandomDrafter(model, 3, knows=0.6, needs=Needs(taps=("norm",)))
    while running := [session for session in sessions if session.finish is None]:
        verdicts = step(running, [None] * len(running), drafter, verifier, [Budget(8, 4)] * len(running))
        for session, verdict in zip(running, verdicts, strict=True):
            cached = session.tokens[: session.cached]
            rows = verdict.taps["norm"]
            for i, row in enumerate(reversed(rows)):  # one row per newly cached token, and the last is the newest
                assert row.equal(model.tap("norm", cached[: len(cached) - i]))
    assert [session.tokens for session in sessions] == expected
