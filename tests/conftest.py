"""What all tests share."""

from __future__ import annotations

import signal

import torch

# A shell starts what goes to the background deaf to Ctrl-C, and so would be what the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The models are tiny: a second thread only waits, and on a busy machine it waits long.
torch.set_num_threads(1)
