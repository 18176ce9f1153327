"""What all tests share."""

from __future__ import annotations

import signal

import torch

# What a shell starts in the background is deaf to Ctrl-C, and so would be all that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The models are tiny: a second thread only waits, and on a busy machine it waits long.
torch.set_num_threads(1)
