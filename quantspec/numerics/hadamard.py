"""Hadamard matrices of many sizes, and random rotations made of them that take little memory and few operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantspec.errors import UsageError


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix ``R = diag(signs) (left x right) / sqrt(n)`` of a Kronecker product of two Hadamard
    matrices. ``signs [n]``, ``left [a, a]`` and ``right [b, b]`` hold 1 and -1 in fp32; n = a b."""

    signs: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def random(cls, size: int, seed: int) -> Rotation:
        """A randomized Hadamard matrix (QuaRot, arXiv 2404.00456). Raises ``UsageError``: none of that size is known
        here."""
        core = next((order for order in _multiples_of_odd_part(size) if order == 1 or _paley_prime(order)), None)
        if core is None:
            raise UsageError(f"no Hadamard matrix of size {size} is known here", hint="quantize without --rotate")
        power = (size // core).bit_length() - 1
        # Factors of about the same size cost least.
        small = min(range(power + 1), key=lambda k: abs(2**k - core * 2 ** (power - k)))
        signs = torch.randint(2, (size,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        return cls(signs, sylvester(small), torch.kron(sylvester(power - small), paley(core)))

    @property
    def size(self) -> int:
        return len(self.signs)

    def apply(self, x: Tensor) -> Tensor:
        """``x R`` for rows ``x [.., n]``."""
        signs, left, right = (part.to(x) for part in (self.signs, self.left, self.right))
        parts = (x * signs).unflatten(-1, (len(left), len(right)))
        return (left.T @ parts @ right).flatten(-2) / self.size**0.5

    def undo(self, x: Tensor) -> Tensor:
        """``x R^T`` for rows ``x [.., n]``."""
        signs, left, right = (part.to(x) for part in (self.signs, self.left, self.right))
        return (left @ x.unflatten(-1, (len(left), len(right))) @ right.T).flatten(-2) * signs / self.size**0.5


def sylvester(power: int) -> Tensor:
    """The Hadamard matrix of size ``2^power``."""
    matrix, two = torch.ones(1, 1), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    for _ in range(power):
        matrix = torch.kron(two, matrix)
    return matrix


def paley(order: int) -> Tensor:
    """A Hadamard matrix of a size that is a prime plus 1, or twice that (Paley, 1933), or 1."""
    if order == 1:
        return torch.ones(1, 1)
    prime = _paley_prime(order)
    assert prime is not None, "asked for by Rotation.random"
    squares = {i * i % prime for i in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)])
    numbers = torch.arange(prime)
    core = torch.zeros(prime + 1, prime + 1)
    core[0, 1:] = 1.0
    core[1:, 1:] = character[(numbers[:, None] - numbers) % prime]
    if prime % 4 == 3:
        core[1:, 0] = -1.0
        return core + torch.eye(prime + 1)
    core[1:, 0] = 1.0
    one, zero = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(core, one) + torch.kron(torch.eye(prime + 1), zero)


def _multiples_of_odd_part(size: int) -> list[int]:
    """The divisors of ``size`` that hold all of its odd factors, from the least."""
    odd = size // (size & -size)
    return [odd << k for k in range(size.bit_length()) if size % (odd << k) == 0]


def _paley_prime(order: int) -> int | None:
    """The prime that Paley's construction of a Hadamard matrix of that size starts from."""
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        return order - 1
    if order % 2 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        return order // 2 - 1
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, math.isqrt(number) + 1))
