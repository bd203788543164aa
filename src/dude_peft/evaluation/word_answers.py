"""Whether the answer to a word problem is right: numbers by value, letters by letter. Called by the tasks we write.

|predicted - expected| <= 0.001, as LLM-Adapters counts (Hu et al., 2023): 0.5 is 0.50, and $1,200. is 1200.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TOLERANCE = 1e-3 + 1e-9  # and what a float's last bits are


def score(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """The harness's `process_results`.

    Args:
        doc: with its `answer`, a number or a letter.
        results: what the filter took from the generated text.
    """
    expected, found = str(doc["answer"]), str(results[0])
    wanted, number = _number(expected), _number(found)
    if wanted is None:
        right = found.strip().upper() == expected.strip().upper()
    else:
        right = number is not None and abs(number - wanted) <= TOLERANCE
    return {"exact_match": float(right)}


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", "").replace("$", "").strip().rstrip("."))
    except ValueError:
        return None
