"""Which methods a test runs over.

A layer has five kinds of state (with or without a frozen start; a magnitude that is trained, fixed or not there): the
default run takes one method of each kind everywhere, and every row of the table in the tests of what makes it a row of
its own. With `-m slow` every row runs everywhere.
"""

from __future__ import annotations

import pytest

from dude_peft.methods import METHODS

KINDS = ("dude", "dora", "pissa", "lora", "frozen-m")


# Those whose files are stock adapters.
RANKED = [name for name, row in METHODS.items() if row.ranked]


def _rows(names):
    return [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in names]


every_ranked_method = pytest.mark.parametrize("method", RANKED)
every_method = pytest.mark.parametrize("method", METHODS)
each_kind = pytest.mark.parametrize("method", _rows(METHODS))
each_ranked_kind = pytest.mark.parametrize("method", _rows(RANKED))
# Beside a test of each kind that is cheap for one architecture.
the_others = pytest.mark.parametrize("method", [name for name in METHODS if name not in KINDS])
# Those that leave norm_gradient to the run.
each_kind_with_an_open_norm = pytest.mark.parametrize(
    "method", _rows(name for name, row in METHODS.items() if row.norm_gradient is None)
)
