"""Which program runs which file, and whether it computes what was trained.

What each program reads today was read in its source: PEFT 0.21, vLLM 0.33, SGLang 0.5.23, llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from dude_peft.methods import Method

PROGRAMS = ("transformers + PEFT", "vLLM", "SGLang", "llama.cpp")
# What vLLM takes as --max-lora-rank.
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Serving:
    """One kind of file, and what each of PROGRAMS does with it."""

    file: str
    answers: tuple[str, ...]


def serving_matrix(
    method: Method, ranks: set[int], *, loads: bool = True, stacks: bool = False, others: bool = False
) -> list[Serving]:
    """The matrix of one adapter.

    Args:
        method: its method.
        ranks: of its stock tensors, over all layers.
        loads: whether stock PEFT loads adapters on these layers of this model.
        stacks: whether it adapts stacks of experts, which need a stock adapter of their own form.
        others: whether it adapts embeddings or convolutions, which servers were not looked at for.
    """
    if stacks:
        return _of_stacks(method)
    if not method.ranked:
        adapter: tuple[str, ...] = ("refused",) * len(PROGRAMS)
    else:
        adapter = _adapter(method, max(ranks))
    lora: tuple[str, ...] = ("approximate", "approximate", "approximate", "approximate, once converted")
    if others:
        adapter = (adapter[0], *(told if told.startswith("refused") else "not tried" for told in adapter[1:]))
        lora = ("no",) * len(PROGRAMS)
    if not loads:
        adapter, lora = (("refused" if answers[0] != "no" else "no", *answers[1:]) for answers in (adapter, lora))
    return [
        Serving("the adapter, --to peft", adapter),
        Serving("--to merged", ("exact", "exact", "exact", "after conversion")),
        Serving("--to lora:K", lora),
        Serving("--to gguf:TYPE", ("no", "no", "no", "exact up to TYPE")),
    ]


def _of_stacks(method: Method) -> list[Serving]:
    refused = ("refused",) * len(PROGRAMS)
    peft = refused if method.normalised else ("exact", "not tried", "not tried", "not tried")
    return [
        Serving("the adapter", refused),
        Serving("--to peft", peft),
        Serving("--to merged", ("exact", "exact", "exact", "after conversion")),
        Serving("--to gguf:TYPE", ("no", "no", "no", "exact up to TYPE")),
    ]


def _adapter(method: Method, largest: int) -> tuple[str, ...]:
    served = next((rank for rank in SERVED_RANKS if rank >= largest), None)
    if method.normalised:
        return "exact", "refused (DoRA)", "refused (DoRA)", "refused (DoRA)"
    if served is None:
        return "exact", f"refused (rank {largest})", "exact", "exact, once converted"
    return "exact", f"exact, --max-lora-rank {served}", "exact", "exact, once converted"
