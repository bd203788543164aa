"""The final answer of a text, `#### 18` as GSM8K writes it, in one spelling: 18, 18.0 and $18. are equal."""

import re

from dude_peft.data.formats import Row

MARK = "####"

_SIGN = "[-+\N{MINUS SIGN}]"
_NUMBER = re.compile(
    rf"(?<![\w.])(?<![0-9],)({_SIGN})?[$€£]?({_SIGN})?"  # not a part of a word, of 1.2.3 or of 1,2
    r"([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(\.[0-9]+)?(?![.,]?[0-9])"
)


def _numbers(text: str) -> list[tuple[str, str]]:
    """(normalised, as written) of each number in the text."""
    found = []
    for match in _NUMBER.finditer(text):
        first, second, whole, fraction = match.groups()
        if whole is None and fraction is None:
            continue
        digits = (whole or "0").replace(",", "").lstrip("0") or "0"
        decimals = (fraction or "").rstrip("0").rstrip(".")
        value = digits + decimals
        negative = (first or second or "+") != "+" and value != "0"
        found.append(("-" + value if negative else value, match.group()))
    return found


def _tidy(text: str) -> str:
    return " ".join(text.split())


def _normalised(text: str) -> str:
    """The number that the text is, but for $, %, a final period and spaces; else the text with single spaces."""
    tidy = _tidy(text)
    numbers = _numbers(tidy)
    if len(numbers) == 1 and not tidy.replace(numbers[0][1], "", 1).strip(" .%*"):
        return numbers[0][0]
    return tidy


def final_answer(text: str) -> str | None:
    """What follows the last `####` on its line: the number without commas, $, % or unit, if it is one; else the words.

    None where there is no `####` or nothing behind it. `3/4` or `10 or 12` hold several numbers and stay words.
    """
    _, mark, rest = text.rpartition(MARK)
    lines = rest.strip().splitlines() if mark else []
    if not lines:
        return None
    numbers = _numbers(lines[0])
    return numbers[0][0] if len(numbers) == 1 else _tidy(lines[0])


def expected_answer(row: Row) -> str:
    """The final answer of the row's own answer, or all of it, stripped, where it has no `####`."""
    final = final_answer(row.answer)
    return row.answer.strip() if final is None else final


def is_match(generated: str, row: Row) -> bool:
    """Whether a generated text has the row's final answer, in the row's format or not."""
    return same_answer(generated, row.answer)


def same_answer(generated: str, wanted: str) -> bool:
    """Whether a generated text has the final answer of `wanted`, in its format or not.

    Where `wanted` has `####`, the generated answer is what follows its own last `####`, or else its last number, so
    that a model that solves the problem but does not know the format is not counted as wrong (lm-eval calls this
    flexible-extract). Where it has none, the whole texts are compared.
    """
    final = final_answer(wanted)
    if final is None:
        return _normalised(generated) == _normalised(wanted)
    answer = final_answer(generated)
    if answer is None:
        answer = next((value for value, _ in reversed(_numbers(generated))), None)
    return answer == final
