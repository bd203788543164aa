"""Final answers: one spelling for one number, and no number where the text does not say which."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dude_peft.data import Message, Row, expected_answer, final_answer, is_match, load_rows


def row(answer: str) -> Row:
    return Row((Message("user", "q"), Message("assistant", answer)), "s:1")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6 * 4 = 24\n#### 24", "24"),
        ("####24", "24"),
        ("#### 7\nno: #### 8", "8"),
        ("##### 5", "5"),
        ("#### 18.0", "18"),
        ("#### 18.50", "18.5"),
        ("#### .5", "0.5"),
        ("#### 0.50%", "0.5"),
        ("#### 007", "7"),
        ("#### 1,234,567", "1234567"),
        ("#### $1,080.00.", "1080"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### \N{MINUS SIGN}5", "-5"),
        ("#### -0", "0"),
        ("#### +3", "3"),
        ("#### 24 apples.", "24"),
        ("#### 5cm", "5"),
        ("#### The answer is **12**.", "12"),
        ("#### 24<|im_end|>", "24"),
        ("#### 24\nSo 3 people paid 8 each.", "24"),
        ("####\n\n 24", "24"),
        ("#### 3/4", "3/4"),
        ("#### 10  or 12", "10 or 12"),
        ("#### 1,2,3", "1,2,3"),
        ("#### 12,34", "12,34"),
        ("#### 1.2.3", "1.2.3"),
        ("#### yes", "yes"),
        ("24", None),
        ("", None),
        ("24 ####", None),
        ("#### \n ", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("2 + 2 = 4\n#### 4.0", "4"),
        (" Paris \n", "Paris"),
        ("He has 5 apples", "He has 5 apples"),
        ("x ####", "x ####"),
    ],
)
def test_expected_answer(answer, expected):
    assert expected_answer(row(answer)) == expected


@pytest.mark.parametrize(
    ("generated", "answer", "match"),
    [
        ("1 + 1 = 2\n#### 2", "#### 2.0", True),
        ("#### $2,000", "#### 2000", True),
        ("2", "#### 2", True),  # the right number counts without the format
        ("First 3, so the answer is 2.", "#### 2", True),
        ("2, then 3", "#### 2", False),
        ("2\n#### 3", "#### 2", False),  # but what is behind the mark decides
        ("#### 3\n#### 2", "#### 2", True),
        ("#### 22", "#### 2", False),
        ("#### -2", "#### 2", False),
        ("", "#### 2", False),
        ("####", "#### 2", False),
        (" Paris\n", "Paris", True),
        ("paris", "Paris", False),
        ("$4.00", "4", True),
        ("4.", "4", True),
        ("5 apples", "5 pears", False),
        ("", "x", False),
    ],
)
def test_is_match(generated, answer, match):
    assert is_match(generated, row(answer)) is match


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "{}.0", "{} units", "{:,}.00.", "${}", "{}%"]))
def test_every_spelling_of_a_number_is_that_number(value, spelling):
    assert final_answer("#### " + spelling.format(value)) == str(value)


@given(st.text(alphabet="#0123456789.,-+$ %\nx", max_size=60))
def test_any_text_has_an_answer_or_none_and_matches_itself(text):
    final = final_answer(text)
    assert final is None or (final == final.strip() and final)
    assert is_match(text, row(text))
    assert final is None or final_answer("#### " + final) == final


@pytest.mark.assets
def test_real_gsm8k_answers_are_all_whole_numbers():
    folder = os.environ.get("DUDE_ASSETS")
    path = Path(folder or "", "gsm8k", "train.jsonl")
    if not folder or not path.exists():
        pytest.skip("DUDE_ASSETS does not name a folder with gsm8k/train.jsonl")
    for item in load_rows(path):
        written = item.answer.rsplit("#### ", 1)[1].replace(",", "")
        assert expected_answer(item) == str(int(written)), item.source
