"""Atomic loads, stores and additions on int64 words that threads or processes share, for compiled functions.

All are sequentially consistent: a thread that sees a word also sees what was written before that word.
"""

from __future__ import annotations

from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

let_others_run = types.ExternalFunction("sched_yield", types.int32())
"""Yield the core to another thread that waits for it."""


def _at(context, builder, signature, arguments):
    array = make_array(signature.args[0])(context, builder, arguments[0])
    return builder.gep(array.data, [arguments[1]])


@intrinsic
def load(context, words, index):
    """Read words[index] of an int64 array."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_at(context, builder, signature, arguments), "seq_cst", 8)

    return types.int64(words, types.intp), generate


@intrinsic
def store(context, words, index, value):
    """Write words[index] of an int64 array."""

    def generate(context, builder, signature, arguments):
        builder.store_atomic(arguments[2], _at(context, builder, signature, arguments), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(words, types.intp, types.int64), generate


@intrinsic
def add(context, words, index, value):
    """Add to words[index] of an int64 array, and return its value before."""

    def generate(context, builder, signature, arguments):
        place = _at(context, builder, signature, arguments)
        return builder.atomic_rmw("add", place, arguments[2], "seq_cst")

    return types.int64(words, types.intp, types.int64), generate


__all__ = ["add", "let_others_run", "load", "store"]
