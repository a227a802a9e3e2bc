"""One torch thread: these rows are tiny, and waking a second thread costs more than the work."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
