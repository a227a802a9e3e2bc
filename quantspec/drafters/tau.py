"""The temperature ``tau`` of a head's scores, by temperature of the text: see ``View.scores``.

Heads learn the verifier's distribution, whose best token is likelier to be the greedy choice than to be drawn. As they
stand, scores of greedy text spread trees over too many siblings: 12% of acceptance length for 15 nodes of the default
family.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantspec.errors import ModelError
from quantspec.models.config import read_config


def read_taus(raw: Any, source: str) -> dict[float, float]:
    """From the value of ``tau`` in a config's section ``quantspec``. Raises ``ModelError``."""
    try:
        taus = {float(temperature): float(tau) for temperature, tau in raw.items()}
    except (AttributeError, TypeError, ValueError):
        taus = {0.0: 0.0}
    if not all(temperature >= 0 and 0 < tau < float("inf") for temperature, tau in taus.items()):
        raise ModelError(
            f"{source}: quantspec.tau must map temperatures to numbers above 0, not {raw!r:.200}",
            hint='write it like {"0.8": 0.6, "1": 0.5}, or leave it out: it is 1 then',
        )
    return taus


def taus_of_model(folder: Path) -> dict[float, float]:
    """Those that a small model's config.json may have beside its own keys. Raises ``ModelError``."""
    own = read_config(folder).get("quantspec", {}) if folder.is_dir() else {}
    return read_taus(own.get("tau", {}) if isinstance(own, dict) else {}, str(folder / "config.json"))


def tau_at(taus: Mapping[float, float], temperature: float) -> float:
    """Linear between the fitted temperatures, constant beyond them, 1 where none was fitted. Temperature 0, where
    nothing is drawn, stands by itself."""
    if temperature == 0:
        return taus.get(0.0, 1.0)
    points = sorted((fitted, tau) for fitted, tau in taus.items() if fitted)
    below = [point for point in points if point[0] <= temperature]
    above = [point for point in points if point[0] >= temperature]
    if not points:
        return 1.0
    if not below or not above:
        return (below or above)[-1 if below else 0][1]
    (t0, tau0), (t1, tau1) = below[-1], above[0]
    return tau0 if t1 == t0 else tau0 + (tau1 - tau0) * (temperature - t0) / (t1 - t0)
