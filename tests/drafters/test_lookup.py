from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_model import TableModel

from quantspec.drafters.config import LookupOptions
from quantspec.drafters.lookup import LookupState, PromptLookup
from quantspec.errors import UsageError
from quantspec.types import EMPTY_DRAFT, Budget, Draft, SamplingParams, Verdict


def draft(drafter, state, tokens, remaining: int = 100, budget: Budget | None = None, stop=frozenset()) -> Draft:
    view = SimpleNamespace(tokens=tuple(tokens), remaining=remaining, stop_ids=stop)
    return drafter.propose([state], [view], [budget or Budget(8, 8)])[0]


def test_continues_the_most_recent_match_of_the_longest_suffix() -> None:
    drafter = PromptLookup(LookupOptions(prompt_lookup_max=3, prompt_lookup_min=1))
    text = [1, 2, 3, 10, 11, 9, 2, 3, 20, 21, 9, 3, 30, 1, 2, 3]
    found = draft(drafter, LookupState(), text, budget=Budget(2, 9))
    assert found.tokens == (10, 11)
    assert found.is_chain
    assert draft(drafter, LookupState(), [*text[:-3], 2, 3], budget=Budget(2, 9)).tokens == (20, 21)
    assert draft(drafter, LookupState(), [*text[:-3], 3], budget=Budget(2, 9)).tokens == (30, 3)


def test_below_the_least_suffix_nothing_is_proposed() -> None:
    drafter = PromptLookup(LookupOptions(prompt_lookup_max=3, prompt_lookup_min=2))
    assert draft(drafter, LookupState(), [1, 2, 3, 1]) is EMPTY_DRAFT
    assert draft(drafter, LookupState(), [1]) is EMPTY_DRAFT


def test_a_copy_runs_on_into_itself() -> None:
    drafter = PromptLookup(LookupOptions(prompt_lookup_max=2, prompt_lookup_min=2))
    assert draft(drafter, LookupState(), [1, 2, 3, 1, 2], budget=Budget(7, 9)).tokens == (3, 1, 2, 3, 1, 2, 3)


@pytest.mark.parametrize(
    ("budget", "remaining", "stop", "length"),
    [
        (Budget(3, 8), 100, (), 3),
        (Budget(8, 2), 100, (), 2),
        (Budget(8, 8), 4, (), 3),
        (Budget(8, 8), 1, (), 0),
        (Budget(8, 8), 100, (6,), 2),
        (Budget(0, 0), 100, (), 0),
        # With nothing observed a token is worth one half of its parent, so the third is worth an eighth.
        (Budget(8, 8, min_score=0.2), 100, (), 2),
    ],
)
def test_a_draft_ends_at_its_limits(budget: Budget, remaining: int, stop: tuple[int, ...], length: int) -> None:
    found = draft(PromptLookup(), LookupState(), [3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4], remaining, budget, frozenset(stop))
    assert found.tokens == (5, 6, 7, 8, 9, 1, 2, 3)[:length]


def test_scores_follow_what_was_accepted() -> None:
    drafter, state = PromptLookup(), LookupState()
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    first = draft(drafter, state, text)
    assert first.scores[:2] == (0.5, 0.25)
    drafter.observe(state, Verdict((0, 1), (3, 4), 9, (), (), first))  # two hits, then a miss
    assert draft(drafter, state, text).scores[0] == 3 / 5


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
def test_growing_and_shrinking_leaves_the_index_of_a_fresh_start(text: list[int], data: st.DataObject) -> None:
    drafter, state = PromptLookup(), LookupState()
    length = 0
    for _ in range(5):
        length = data.draw(st.integers(length, len(text)))
        drafter._extend(state, text[len(state.tokens) : length])
        length = data.draw(st.integers(0, length))
        drafter.truncate(state, length)
    fresh = LookupState()
    drafter._extend(fresh, text[:length])
    assert state == fresh


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_the_index_equals_a_search(text: list[int]) -> None:
    def search() -> int | None:
        for n in (4, 3, 2):
            for end in range(len(text) - 1, n - 1, -1):
                if text[end - n : end] == text[-n:]:
                    return end
        return None

    drafter, state = PromptLookup(), LookupState()
    drafter._extend(state, text)
    assert drafter._match(state) == search()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_text_is_that_of_plain_decoding(generate, temperature: float) -> None:
    model = TableModel(6, seed=3, scale=6.0, order=2)  # texts that repeat themselves
    params = SamplingParams(max_new_tokens=40, temperature=temperature)
    prompts = [[seed % 6, seed // 6] for seed in range(36)]
    plain, fast = (generate(model, prompts, params, drafter) for drafter in (None, PromptLookup()))
    assert fast.texts == plain.texts
    assert fast.acceptance > 1.3  # and proposals are really accepted, although the text is noisy at 0.8


@pytest.mark.parametrize("options", [{"prompt_lookup_min": 0}, {"prompt_lookup_max": 1, "prompt_lookup_min": 2}])
def test_impossible_sizes_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="prompt_lookup"):
        LookupOptions(**options)
