"""Triton's keyed draw: the noise of ``core.noise`` to the bit, the best of a race, ties, numbers that are none, and the
candidates for truncation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from quantspec.core.noise import Stream
from quantspec.core.truncation import check_finite
from quantspec.errors import ModelError
from quantspec.kernels import draws
from quantspec.kernels.draws import Drawn, Layout

sampling = pytest.importorskip("quantspec.kernels.triton.sampling", reason="triton is not installed")

pytestmark = [pytest.mark.usefixtures("triton_device"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

KEYS = (0, 1, 0x0123456789ABCDEF, 2**63, 2**64 - 1)
POSITIONS = (0, 1, 7, 131071, 2**31 - 1)


def draw(
    logits: torch.Tensor,
    key: int | None,
    positions: Sequence[int],
    temperature: float = 1.0,
    layout: Layout | None = None,
) -> Drawn:
    n, layout = len(logits), layout or Layout()
    dials = sampling.Dials(
        torch.from_numpy(np.full(n, key or 0, np.uint64).view(np.int64)).to(logits.device),
        torch.full((n,), temperature),
        torch.full((n,), key is not None, dtype=torch.int32),
    )
    table = sampling.draw(logits, dials, torch.tensor(positions, dtype=torch.int32), layout)
    return Drawn.read(table.cpu().numpy(), layout)


def test_noise_has_the_bits_of_the_hosts() -> None:
    """A row of -inf but for one zero is won by its token, with that token's noise as the value."""
    tokens = [0, 1, 2047, 2048, 3000]
    logits = torch.full((5, 3001), -torch.inf)
    logits[torch.arange(5), torch.tensor(tokens)] = 0.0
    for key in KEYS:
        for t in POSITIONS:
            drawn = draw(logits, key, [t] * 5)
            assert drawn.ids[:, 0].tolist() == tokens
            assert np.array_equal(drawn.value, -Stream(key).noise(t, 3001)[tokens])


@pytest.mark.parametrize("vocab", [1, 2, 1000, 2048, 2049, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_draw(vocab: int, dtype: torch.dtype, temperature: float, launches: Callable[..., Counter[str]]) -> None:
    counts = launches(sampling, "_best_of_blocks", "_best_of_row")
    stream, positions, logits = Stream(77), [0, 5, 6, 2**30], (3 * torch.randn(4, vocab)).to(dtype)
    key, divisor, layout = (stream.key, temperature, Layout(3)) if temperature else (None, 1.0, Layout(3))
    drawn = draw(logits, key, positions, divisor, layout)
    noise = torch.from_numpy(np.stack([stream.noise(t, vocab) for t in positions])).to(logits.device)
    races = sampling.eager_races(logits, divisor, noise if key is not None else None)
    k = min(3, vocab)
    best = races.sort(dim=-1, descending=True, stable=True)
    assert np.array_equal(drawn.ids[:, :k], best.indices[:, :k].cpu())
    assert np.array_equal(drawn.value, best.values[:, 0].cpu())
    # Sums of up to 5003 exponentials in another order, and their logarithm.
    expected = torch.log_softmax(races, -1).gather(1, best.indices[:, :k]).cpu()
    torch.testing.assert_close(torch.from_numpy(drawn.log_scores[:, :k]), expected, rtol=1e-5, atol=1e-5)
    assert counts == {"_best_of_blocks": 1, "_best_of_row": 1}
    alone = draw(logits[2:3].clone(), key, positions[2:3], divisor, layout)
    for name in ("value", "mass", "ids", "log_scores"):
        together = getattr(drawn, name)[2:3]
        assert np.array_equal(getattr(alone, name), together), "a row changed with its company"


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(4, 4100)
    logits[0, [4099, 4000, 30, 2050]] = 2.0
    logits[1, [2048, 2047]] = 2.0  # on both sides of a block's end
    logits[2, 17:] = 3e38
    logits[3] = -3e38
    drawn = draw(logits, None, [0] * 4, layout=Layout(4))
    assert drawn.ids.tolist() == [[30, 2050, 4000, 4099], [2047, 2048, 0, 1], [17, 18, 19, 20], [0, 1, 2, 3]]
    check_finite(drawn.value)


@pytest.mark.parametrize("place", [0, 2047, 2048, 4099])
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
@pytest.mark.parametrize("noisy", [False, True])
def test_faults_reach_the_caller(place: int, fault: float, noisy: bool) -> None:
    logits = torch.randn(2, 4100)
    logits[0, place] = fault
    logits[0, 5] = 1e38
    drawn = draw(logits, 9 if noisy else None, [0, 0])
    check_finite(drawn.value[1:])
    with pytest.raises(ModelError, match="no finite maximum"):
        check_finite(drawn.value)


def test_a_row_without_any_token_is_refused() -> None:
    drawn = draw(torch.full((1, 70), -torch.inf), None, [0])
    with pytest.raises(ModelError, match="no finite maximum"):
        check_finite(drawn.value)


def test_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of a row, all that beat the last one among them; of a small vocabulary all."""
    monkeypatch.setattr(draws, "MOST_CANDIDATES", 5)
    logits = torch.randint(0, 12, (6, 40)).float()
    drawn = draw(logits, None, [0] * 6, layout=Layout.of(40, 1, True))
    assert drawn.logits.shape == (6, 6)
    for row, ids, values in zip(logits.cpu().numpy(), drawn.candidates, drawn.logits, strict=True):
        assert np.array_equal(row[ids], values)
        assert np.array_equal(values, -np.sort(-row)[:6])
        assert set(np.flatnonzero(row > values[-1])) == set(ids[values > values[-1]])
    assert Layout.of(4, 1, True).candidates == 4
