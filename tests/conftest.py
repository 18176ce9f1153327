"""What all tests share."""

from __future__ import annotations

import torch

# The models are tiny: a second thread only waits, and on a busy machine it waits long.
torch.set_num_threads(1)
