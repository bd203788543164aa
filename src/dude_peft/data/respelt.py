"""A copy of a tokenizer in which some tokens have other spellings, and everything its old id.

Text that spells such a token by its old name is plain text to the copy. All else (normalizers, the space that a text
begins with, what a token swallows to its left and right) works in the copy as in the tokenizer itself, at the same
places: cutting the text and tokenising the parts would change it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def respelt(backend: Tokenizer, spellings: Mapping[str, str]) -> Tokenizer | None:
    """The copy; None where the tokenizer's rules do not allow one that keeps every id.

    Args:
        backend: of a fast tokenizer.
        spellings: new spelling of each token by its old one; a new one must occur in no text.
    """
    from tokenizers import Tokenizer

    try:
        state = json.loads(backend.to_str())
        state |= {"truncation": None, "padding": None}  # left behind by the last call
        for token in state["added_tokens"]:
            token["content"] = spellings.get(token["content"], token["content"])
        _respell_(state["model"], spellings)
        copy: Tokenizer = Tokenizer.from_str(json.dumps(state))
    except Exception:  # tokenizers raises plain Exceptions, at parts written in Python for example
        return None
    same = all(copy.token_to_id(new) == backend.token_to_id(old) for old, new in spellings.items())
    return copy if same and copy.get_vocab_size() == backend.get_vocab_size() else None


def _respell_(model: dict[str, Any], spellings: Mapping[str, str]) -> None:
    """The vocabulary may hold the tokens as well: Unigram and WordLevel would find them in any text."""
    if isinstance(model["vocab"], dict):
        model["vocab"] = {spellings.get(token, token): number for token, number in model["vocab"].items()}
    else:
        model["vocab"] = [[spellings.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = spellings.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [
            [left, right] for left, right in merges if not {left, right, left + right} & spellings.keys()
        ]
