"""What prompts share is computed once: the scores and answers stay those of whole prompts, and of the harness."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", reason="dude eval needs lm_eval, which is not installed here")

from eval_data import save_adapter, save_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from dude_peft import load_adapter
from dude_peft.answer.cache import AnswerCache
from dude_peft.data.prefixes import Alike, alike
from dude_peft.evaluation import harness_model
from dude_peft.evaluation.chat_prompts import ChatPrompts
from dude_peft.evaluation.harness_model import HarnessModel
from dude_peft.model.prefix import Prefix, shares_prefixes

LENGTH = 120
HEAD = "Tom has 3 apples. Ann has 4 pears. How many fruits? 7\n\n"
CONTEXTS = [
    *(HEAD + f"Bob has {n} plums and {n + 1} figs. How many?" for n in range(5)),
    HEAD,  # a prefix of the others
    HEAD + "Bob has 1 plums and 2 figs. How many? 3\n\nAnd now?",  # one of them goes on
    "nothing shared",
    "",
    " ".join(HEAD for _ in range(6)) + "cut on the left",
    " ".join(HEAD for _ in range(6)) + "cut elsewhere on the left",
]
CONTINUATIONS = [" 7", " 8", " 7 plums", " 7 plums and figs", " no", " " + "long " * 15]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefix")
    save_adapter(save_model(folder / "model"), folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def models(place):
    """A base model, and another one with an adapter."""
    base = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    tuned = load_adapter(AutoModelForCausalLM.from_pretrained(place / "model"), place / "adapter").eval()
    return SimpleNamespace(base=base, tuned=tuned, tokenizer=AutoTokenizer.from_pretrained(place / "model"))


def wrapped(model, tokenizer, path, *, share, batch_size=3):
    prompts = ChatPrompts(tokenizer, "text", "tiny", chat=False)
    cache = AnswerCache(path, {})
    found = HarnessModel(
        model, tokenizer, cache, name="tiny", batch_size=batch_size, versions={}, prompts=prompts, share=share
    )
    found._max_length = LENGTH
    return found


def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=0, metadata=("t", n, 1))
        for n, one in enumerate(arguments)
    ]


def pairs():
    found = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
    found += found[:4]  # identical requests
    random.Random(0).shuffle(found)
    return requests("loglikelihood", found)


def theirs(model, tokenizer):
    found = HFLM(pretrained=harness_model._Ready(model), tokenizer=tokenizer, backend="causal", batch_size=3)
    found._max_length = LENGTH
    return found


@pytest.mark.parametrize("which", ["base", "tuned"])
@pytest.mark.parametrize("branches", [512, 8])
def test_scores_are_those_of_whole_prompts(models, tmp_path, monkeypatch, which, branches):
    """With none shared, identical ones, one a prefix of another, cut ones, and an empty context."""
    monkeypatch.setattr(harness_model, "_MOST_BRANCHES", branches)
    model, asked = getattr(models, which), pairs()
    assert shares_prefixes(model, 0)
    tokens = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: tokens.append(args[0].numel()))
    shared = wrapped(model, models.tokenizer, tmp_path / "a.jsonl", share=True)
    ours = shared.loglikelihood(asked)
    read, tokens[:] = sum(tokens), []
    whole = wrapped(model, models.tokenizer, tmp_path / "b.jsonl", share=False)
    others = (whole.loglikelihood(asked), theirs(model, models.tokenizer).loglikelihood(asked, disable_tqdm=True))
    for other in others:
        assert torch.tensor([a for a, _ in ours]).allclose(torch.tensor([a for a, _ in other]), atol=1e-4, rtol=0)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in other]
    assert read < sum(tokens) / 3  # the other two ways together
    assert shared.cut_prompts == whole.cut_prompts != set()
    assert shared._kept._prefix is None


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_generations_are_those_of_whole_prompts(models, tmp_path, monkeypatch, which):
    model = getattr(models, which)
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    asked = requests("generate_until", [(context, settings) for context in CONTEXTS if context])
    copied = []
    original = Prefix.copied
    monkeypatch.setattr(Prefix, "copied", lambda self, rows: copied.append(rows) or original(self, rows))
    shared = wrapped(model, models.tokenizer, tmp_path / "a.jsonl", share=True)
    ours = shared.generate_until(asked)
    assert sum(copied) == 7  # those with HEAD; what is cut begins elsewhere
    whole = wrapped(model, models.tokenizer, tmp_path / "b.jsonl", share=False)
    assert ours == whole.generate_until(asked) == theirs(model, models.tokenizer).generate_until(asked, True)
    assert shared.cut_prompts == whole.cut_prompts != set()
    assert shared.unstopped == whole.unstopped


def test_a_batch_of_trees_that_does_not_fit_is_halved(models, tmp_path, monkeypatch):
    asked = pairs()
    whole = wrapped(models.base, models.tokenizer, tmp_path / "a.jsonl", share=True, batch_size=8).loglikelihood(asked)
    original = HarnessModel._tree_call

    def small(self, prefix, trees, wanted):
        if len(trees) > 2:
            raise torch.OutOfMemoryError
        return original(self, prefix, trees, wanted)

    monkeypatch.setattr(HarnessModel, "_tree_call", small)
    halved = wrapped(models.base, models.tokenizer, tmp_path / "b.jsonl", share=True, batch_size=8)
    for (score, greedy), (other, same) in zip(halved.loglikelihood(asked), whole, strict=True):
        assert score == pytest.approx(other, abs=1e-4)
        assert greedy == same
    assert halved.batch_size <= 2


def test_a_resumed_evaluation_has_the_same_bits(models, tmp_path, monkeypatch):
    asked = pairs()
    whole = wrapped(models.base, models.tokenizer, tmp_path / "a.jsonl", share=True).loglikelihood(asked)
    original, calls = HarnessModel._tree_call, []

    def stopping(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(HarnessModel, "_tree_call", stopping)
    parts = wrapped(models.base, models.tokenizer, tmp_path / "b.jsonl", share=True)
    with pytest.raises(KeyboardInterrupt):
        parts.loglikelihood(asked)
    parts._cache.close()
    resumed = wrapped(models.base, models.tokenizer, tmp_path / "b.jsonl", share=True)
    assert resumed._cache.found > 0
    assert resumed.loglikelihood(asked) == whole


def test_the_groups_save_most():
    head, other = list(range(20)), list(range(50, 90))
    rows = [[*head, 100], [*head, 101, 102], [*other, 1], head, [7], [*head, *other, 1], [*head, *other, 2], [8, 9]]
    found = alike(rows, shortest=4)
    # The two longest save 60 together, and 38 with those that begin with `head`, which ends one token earlier.
    assert {(one.prefix, *sorted(one.rows)) for one in found} == {(19, 0, 1, 3), (60, 5, 6), (0, 2, 4, 7)}
    assert {(one.prefix, *sorted(one.rows)) for one in alike(rows[:2] + rows[5:7], shortest=4)} == {
        (20, 0, 1), (60, 2, 3),
    }  # fmt: skip
    assert alike([[1, 2, 3]] * 3, shortest=4) == [Alike(0, [0, 1, 2])]
    chain = [list(range(n)) for n in range(1, 3000)]
    assert sorted(index for one in alike(chain) for index in one.rows) == list(range(2999))
