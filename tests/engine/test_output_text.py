"""Where a text ends and what of it is shown, for random tokens (half characters included) and stop strings anywhere."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantspec.engine.stream import OutputText
from quantspec.models.tokenizer import Tokenizer
from quantspec.types import SamplingParams, Verdict

EOS = 1
TEXTS = ("She sold 48 clips.", "naïve 東京 😀😀 ok", "aaab aab ab", "return sum(values)")


def make(tokenizer: Tokenizer, stop: tuple[str, ...] = (), limit: int = 10_000, min_new_tokens: int = 0) -> OutputText:
    params = SamplingParams(stop=stop, max_new_tokens=limit, min_new_tokens=min_new_tokens)
    return OutputText(tokenizer, params, frozenset((EOS,)), limit)


def run(text: OutputText, tokens: list[int]) -> tuple[str, str | None, int]:
    """Shown text, reason, tokens used; checks after each token that what was shown is never taken back."""
    shown = ""
    for token in tokens:
        reason = text.push(token)
        shown += text.release()
        assert text.text.startswith(shown)
        if reason:
            return shown, reason, text.tokens
    return shown, None, text.tokens


EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@EXAMPLES
@given(
    ids=st.lists(st.integers(2, 319), max_size=40),
    stop=st.lists(st.text("ab 4é東😀", min_size=1, max_size=4), max_size=3),
)
def test_shown_text_is_the_text_up_to_the_first_stop_string(
    tokenizer: Tokenizer, ids: list[int], stop: list[str]
) -> None:
    text = make(tokenizer, tuple(stop))
    shown, reason, used = run(text, [*ids, EOS])
    assert reason == "stop"
    assert shown == text.text
    whole = tokenizer.decode(ids)
    starts = [at for each in stop if (at := whole.find(each)) >= 0]
    if used == len(ids) + 1:
        # A stop string may only have become visible with the last, incomplete character.
        assert shown == whole[: min(starts, default=len(whole))]
    else:
        assert shown == whole[: min(starts)]
    assert not any(each in shown for each in stop)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cut", range(8))
def test_stop_string_across_tokens(tokenizer: Tokenizer, text: str, cut: int) -> None:
    stop = text[cut : cut + 4]
    shown, reason, used = run(make(tokenizer, (stop,)), tokenizer.encode(text))
    assert (shown, reason) == (text[: text.find(stop)], "stop")
    # It ends with the very token that completes the stop string, or half a character later.
    ids = tokenizer.encode(text)
    before = tokenizer.decode(ids[: used - 1])
    assert stop in tokenizer.decode(ids[:used])
    assert stop not in before or before.endswith("�")


def test_text_is_held_back_only_while_it_may_become_a_stop_string(tokenizer: Tokenizer) -> None:
    text = make(tokenizer, ("ab!",))
    seen = []
    for token in [i for letter in "xab xab!" for i in tokenizer.encode(letter)]:
        text.push(token)
        seen.append(text.release())
    assert seen == ["x", "", "", "ab ", "x", "", "", ""]
    assert text.finish == "stop"


def test_earliest_of_several_stop_strings_wins(tokenizer: Tokenizer) -> None:
    assert run(make(tokenizer, ("sold", "She")), tokenizer.encode("She sold"))[0] == ""
    assert run(make(tokenizer, ("e so", "She sold 4")), tokenizer.encode("She sold 48"))[0] == "Sh"


def test_min_new_tokens_makes_an_early_stop_string_text(tokenizer: Tokenizer) -> None:
    ids = [i for letter in "ab ab" for i in tokenizer.encode(letter)]
    assert run(make(tokenizer, ("ab",), min_new_tokens=3), ids) == ("ab ", "stop", 5)


def test_half_a_character_at_the_end_is_shown_as_a_replacement(tokenizer: Tokenizer) -> None:
    ids = [i for i in tokenizer.encode("€") if i != EOS]
    assert len(ids) > 1, "the example must be split over tokens"
    shown, reason, _ = run(make(tokenizer, limit=len(ids) - 1), ids)
    assert (shown, reason) == (tokenizer.decode(ids[:-1]), "length")
    assert "�" in shown


def test_limit_and_end_token_cut_a_verdict_before_its_commit(tokenizer: Tokenizer) -> None:
    verdict = Verdict(path=(0, 2), tokens=(40, EOS), next_token=42, y=(40, 7, EOS, 42), stages=("a", "b", "target"))
    cut = make(tokenizer).trim(verdict)
    assert (cut.emitted, cut.path, cut.stages, cut.finish) == ((40, EOS), (0,), ("a", "b"), "stop")
    cut = make(tokenizer, limit=1).trim(verdict)
    assert (cut.emitted, cut.path, cut.stages, cut.finish) == ((40,), (), ("a",), "length")
    # Both at once: the end token is the reason that a user cares about.
    assert make(tokenizer, limit=2).trim(verdict).finish == "stop"


def test_without_a_tokenizer_there_is_no_text() -> None:
    text = OutputText(None, SamplingParams(), frozenset(), 3)
    assert [text.push(5), text.push(6), text.push(7)] == [None, None, "length"]
    assert text.release() == ""
