"""Triton's keyed draw: the noise of ``core.noise`` to the bit, its argmax, ties, and numbers that are none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from quantspec.core.noise import Stream
from quantspec.core.truncation import check_finite
from quantspec.errors import ModelError

sampling = pytest.importorskip("quantspec.kernels.triton.sampling", reason="triton is not installed")

pytestmark = [pytest.mark.usefixtures("triton_device"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

KEYS = (0, 1, 0x0123456789ABCDEF, 2**63, 2**64 - 1)
POSITIONS = (0, 1, 7, 131071, 2**31, 2**40 + 3, 2**63 - 1)


def test_key_keeps_its_bits(triton_device: torch.device) -> None:
    for key in KEYS:
        assert int(sampling.key_tensor(key, triton_device)) & (2**64 - 1) == key


def test_noise_has_the_bits_of_the_hosts(triton_device: torch.device) -> None:
    """A row of -inf but for one zero is won by its token, with that token's noise as the value."""
    tokens = torch.tensor([0, 1, 2047, 2048, 3000])
    logits = torch.full((5, 3001), -torch.inf)
    logits[torch.arange(5), tokens] = 0.0
    for key in KEYS:
        for t in POSITIONS:
            stream = sampling.key_tensor(key, triton_device)
            token, value = sampling.best_tokens(logits, stream, torch.full((5,), t, dtype=torch.int64))
            assert torch.equal(token, tokens)
            noise = torch.from_numpy(Stream(key).noise(t, 3001).copy()).to(triton_device)
            assert torch.equal(value, -noise[tokens])


@pytest.mark.parametrize("vocab", [1, 2, 1000, 2048, 2049, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draw(
    vocab: int, dtype: torch.dtype, triton_device: torch.device, launches: Callable[..., Counter[str]]
) -> None:
    counts = launches(sampling, "_best_of_blocks", "_best_of_row")
    stream, positions, logits = Stream(77), [0, 5, 6, 2**40], (3 * torch.randn(4, vocab)).to(dtype)
    noise = torch.from_numpy(np.stack([stream.noise(t, vocab) for t in positions])).to(triton_device)
    key = sampling.key_tensor(stream.key, triton_device)
    token, value = sampling.best_tokens(logits, key, torch.tensor(positions))
    expected_token, expected_value = sampling.eager_best_tokens(logits, noise)
    assert torch.equal(token, expected_token)
    assert torch.equal(value, expected_value)
    assert counts == {"_best_of_blocks": 1, "_best_of_row": 1}
    alone = sampling.best_tokens(logits[2:3].clone(), key, torch.tensor(positions[2:3]))
    assert torch.equal(torch.stack(alone), torch.stack((token[2:3], value[2:3]))), "a row changed with its company"


def test_ties_go_to_the_lowest_id() -> None:
    logits, positions = torch.zeros(4, 4100), torch.zeros(4, dtype=torch.int64)
    logits[0, [4099, 4000, 30, 2050]] = 2.0
    logits[1, [2048, 2047]] = 2.0  # on both sides of a block's end
    logits[2, 17:] = 3e38
    logits[3] = -3e38
    token, value = sampling.best_tokens(logits, None, positions)
    assert token.tolist() == [30, 2047, 17, 0]
    assert torch.equal(token, sampling.eager_best_tokens(logits, None)[0])
    check_finite(value.cpu().numpy())


@pytest.mark.parametrize("place", [0, 2047, 2048, 4099])
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
@pytest.mark.parametrize("noisy", [False, True])
def test_faults_reach_the_caller(place: int, fault: float, noisy: bool, triton_device: torch.device) -> None:
    logits, positions = torch.randn(2, 4100), torch.zeros(2, dtype=torch.int64)
    logits[0, place] = fault
    logits[0, 5] = 1e38
    _, value = sampling.best_tokens(logits, sampling.key_tensor(9, triton_device) if noisy else None, positions)
    check_finite(value[1:].cpu().numpy())
    with pytest.raises(ModelError, match="no finite maximum"):
        check_finite(value.cpu().numpy())


def test_a_row_without_any_token_is_refused() -> None:
    _, value = sampling.best_tokens(torch.full((1, 70), -torch.inf), None, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ModelError, match="no finite maximum"):
        check_finite(value.cpu().numpy())
