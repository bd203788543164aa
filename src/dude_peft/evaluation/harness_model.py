"""Our live model as lm-evaluation-harness knows models: its own tokenisation, scores and stops, our batches and checks.

What is added to its HFLM: what documents say is text (`chat_prompts.py`), answers are kept batch by batch
(`answer_cache.py`), what prompts share is computed once (`model/prefix.py`), a batch that does not fit is halved, NaN
ends the evaluation, and prompts that were cut and generations that never stopped are counted. Several processes share
the batches, each of which is what one process would compute, and tell each other the answers: the harness, which knows
nothing of it, finds all answers in every process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from torch import Tensor, nn
from transformers import LogitsProcessorList
from typing_extensions import override

from dude_peft.answer.cache import AnswerCache, key_of
from dude_peft.answer.decode import Finite
from dude_peft.data.batches import Company, grouped, pad_left
from dude_peft.data.encode import check_ids
from dude_peft.data.prefixes import alike
from dude_peft.errors import ConfigError, DataError, NumericsError, ResourceError
from dude_peft.evaluation.chat_prompts import ChatPrompts
from dude_peft.machine.out_of_memory import is_out_of_memory
from dude_peft.machine.processes import count, gathered, rank
from dude_peft.model.prefix import KeptPrefix, Tree, tree_logits
from dude_peft.parents import fits
from dude_peft.show import shown

Items = set[tuple[str, int]]
"""(task, number of the document) of each."""
_Request = Any
"""lm_eval.api.instance.Instance"""
_Pair = tuple[tuple[str, str], list[int], list[int]]
"""Texts and tokens of a context and its continuation."""
_Compute = Callable[[Any], dict[str, Any]]
_MOST_BRANCHES = 512
"""Tokens of continuations in one row; its attention grows with their square."""
# Settings under which a prefix that is already computed changes nothing; beams and n-grams look at the whole row.
_PLAIN = {
    *("attention_mask", "logits_processor", "do_sample", "temperature", "top_p", "top_k", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens"),
    *("transformers_version", "_from_model_config"),
}
_OFF = (None, 0, 1)
"""What other settings of generation are where they do nothing; 0 is False too, and True is not 1."""


@dataclass(frozen=True)
class _Asked:
    """One continuation of a stem: it ends with the last of `tail`, whose own prediction is the last one wanted."""

    stem: tuple[int, ...]
    tail: tuple[int, ...]
    continuation: list[int]


class _Ready(nn.Module):
    """A model that is loaded: HFLM ties weights once more, which fails where a tied output layer is adapted."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, **kwargs: Any) -> Tensor:
        tokens: Tensor = self.model.generate(**kwargs)
        return tokens

    def tie_weights(self) -> None:
        """They are."""


@fits(uses=("_encode_pair", "_loglikelihood_tokens", "add_bos_token", "chat_template_args"))
class HarnessModel(HFLM):  # type: ignore[misc]
    """A model in memory, for `lm_eval.evaluate`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        cache: AnswerCache,
        *,
        name: str,
        batch_size: int,
        versions: dict[str, Any],
        prompts: ChatPrompts,
        company: Company = "any",
        share: bool = False,
        advance: Callable[..., None] = lambda answers, total: None,
    ) -> None:
        """Wrap it.

        Args:
            model: in evaluation mode, on its device.
            tokenizer: its own.
            cache: of this very model's answers.
            name: for messages.
            batch_size: sequences at a time, as long as they fit.
            versions: of each task, by its name.
            prompts: writes conversations, and knows what in a text is a control token.
            company: which prompts are continued in one batch.
            share: compute what prompts share once; only for a model that `shares_prefixes`.
            advance: called with the number of requests that were answered, and with `total`, of those known so far.
        """
        self._fits = batch_size
        super().__init__(
            pretrained=_Ready(model),
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            trust_remote_code=False,
        )
        self._cache, self._name, self._versions, self._advance = cache, name, versions, advance
        self._company, self._prompts, self._context = company, prompts, ""
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._share = share
        self._kept = KeptPrefix(model)
        self._generated_behind: tuple[int, ...] = ()
        self._stopped: list[bool] = []
        self._asked = 0
        self.computed = 0
        """Answers that were not in the cache, of all processes."""
        self.cut_prompts: Items = set()
        """Whose prompt is longer than the model reads; its beginning is cut off."""
        self.unstopped: Items = set()
        """Whose generation the limit ended."""
        self.empty: Items = set()
        """Whose generation has no text."""

    @override
    def loglikelihood(self, requests: list[_Request], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether it is the greedy one) of each continuation; called by the harness."""
        encoded = [self._pair(*request.args) for request in requests]
        for request, (_, context, continuation) in zip(requests, encoded, strict=True):
            if len(context) + len(continuation) > self.max_length + 1:
                self.cut_prompts.add((request.task_name, request.doc_id))
        keys = [self._key("loglikelihood", request) for request in requests]
        if self._share and all(0 < len(continuation) <= self.max_length for _, _, continuation in encoded):
            self._answer(self._forest(dict(zip(keys, encoded, strict=True))))
            self._kept.clear()
        else:
            self._answer([self._rows(keys, encoded)])
        found = [self._cache.parts(key, (int, float), bool) for key in keys]
        return [(float(score), greedy) for score, greedy in found]

    @override
    def generate_until(self, requests: list[_Request], disable_tqdm: bool = True) -> list[str]:
        """The text of each continuation, up to the task's stops; called by the harness."""
        keys = [self._key("generate_until", request) for request in requests]
        groups: dict[str, dict[str, _Request]] = {}
        for key, request in zip(keys, requests, strict=True):
            if self._settings(request)["do_sample"]:  # a temperature alone is enough for it
                raise ConfigError(
                    f"task {shown(request.task_name)} samples tokens at random, so its answers cannot be repeated; "
                    "choose a task with greedy decoding"
                )
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), {})[key] = request
        lengths = {key: len(self.tok_encode(request.args[0])) for key, request in zip(keys, requests, strict=True)}
        for group in groups.values():
            new = self._new_tokens(next(iter(group.values())))
            for key, request in group.items():
                if lengths[key] > self.max_length - new:
                    self.cut_prompts.add((request.task_name, request.doc_id))

            def compute(prefix: tuple[int, ...], batch: Sequence[dict[str, _Request]]) -> dict[str, Any]:
                asked = [one for row in batch for one in row.items()]
                answers: dict[str, Any] = {}
                for indices in grouped([lengths[key] for key, _ in asked], len(asked), self._company):
                    # Longest first, as the harness continues them.
                    some = dict(asked[index] for index in (sorted(indices)))
                    self._stopped, self._generated_behind = [], prefix
                    texts = super(HarnessModel, self).generate_until(list(some.values()), disable_tqdm=True)
                    answers |= dict(zip(some, zip(texts, self._stopped, strict=True), strict=True))
                return answers

            longest = sorted(group.items(), key=lambda one: (-lengths[one[0]], one[1].args[0]))
            rows = [{key: request} for key, request in longest]
            batches: list[tuple[list[dict[str, _Request]], _Compute]] = [(rows, partial(compute, ()))]
            if self._share:
                read = [self.tok_encode(one.args[0], left_truncate_len=self.max_length - new) for _, one in longest]
                batches = []
                for some in alike(read):
                    prefix = tuple(read[some.rows[0]][: some.prefix])
                    batches.append(([rows[index] for index in sorted(some.rows)], partial(compute, prefix)))
            self._answer(batches)
            self._kept.clear()
        for key, request in zip(keys, requests, strict=True):
            text, stopped = self._cache.parts(key, str, bool)
            if not stopped:
                self.unstopped.add((request.task_name, request.doc_id))
            if not text.strip():
                self.empty.add((request.task_name, request.doc_id))
        return [str(self._cache[key][0]) for key in keys]

    @override
    def loglikelihood_rolling(self, requests: list[_Request], disable_tqdm: bool = True) -> list[float]:
        """Log-probability in nats of each text; called by the harness."""
        keys = [self._key("loglikelihood_rolling", request) for request in requests]

        def compute(batch: Sequence[dict[str, _Request]]) -> dict[str, Any]:
            asked = {key: request for row in batch for key, request in row.items()}
            found = super(HarnessModel, self).loglikelihood_rolling(list(asked.values()), disable_tqdm=True)
            return dict(zip(asked, found, strict=True))

        self._answer([([{key: request} for key, request in zip(keys, requests, strict=True)], compute)])
        sums = [self._cache[key] for key in keys]
        if not all(isinstance(each, (int, float)) for each in sums):
            raise self._cache.damaged()
        return [float(each) for each in sums]

    @override
    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; called by the harness."""
        return self._prompts.write(chat_history, generate=add_generation_prompt, arguments=self.chat_template_args)

    @override
    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a text, without control tokens but those of the chat template; called by the harness."""
        meant = self._prompts.meant(string, self._context)
        framed = add_special_tokens
        if framed is None:
            first = self.tok_decode([self.prefix_token_id], skip_special_tokens=False)
            begun = any(start == 0 for start, _ in meant) and has_bos_prefix(string, first)
            framed = not begun and self.add_bos_token is not False
        ids = self._prompts.control.ids(string, meant, shown(self._name, 300), framed=framed)
        check_ids(shown(self._name, 300), ids, self.tokenizer, self._vocabulary)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    @override
    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(ids, attention mask) of several texts, padded on the left; called by the harness."""
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        if not all(rows):
            raise DataError(f"a question for {shown(self._name, 300)} has no tokens; choose another task")
        batch = pad_left(rows, int(self.tokenizer.pad_token_id))
        return batch["input_ids"], batch["attention_mask"]

    @property
    @override
    def batch_size(self) -> int:
        """What fits."""
        return self._fits

    def _rows(self, keys: Sequence[str], encoded: Sequence[_Pair]) -> tuple[list[dict[str, _Pair]], _Compute]:
        """Rows of whole prompts; as in HFLM, one serves all continuations that differ in their last token alone."""
        rows: dict[tuple[int, ...], dict[str, _Pair]] = {}
        for key, pair in zip(keys, encoded, strict=True):
            rows.setdefault(tuple(pair[1] + pair[2][:-1]), {})[key] = pair
        longest = sorted(rows.items(), key=lambda row: (-len(row[0]), row[0]))

        def compute(batch: Sequence[dict[str, _Pair]]) -> dict[str, Any]:
            pairs = {key: pair for row in batch for key, pair in row.items()}
            answers = self._loglikelihood_tokens(list(pairs.values()), disable_tqdm=True, override_bs=len(batch))
            return dict(zip(pairs, answers, strict=True))

        return [row for _, row in longest], compute

    def _forest(self, encoded: dict[str, _Pair]) -> list[tuple[list[dict[str, _Asked]], _Compute]]:
        """Rows that are trees, a context and its continuations each; those that begin alike stand together."""
        trees: dict[tuple[int, ...], dict[str, _Asked]] = {}
        for key, (_, context, continuation) in encoded.items():
            # The model predicts the last token and does not read it. What is cut begins elsewhere in every row.
            whole = (context + continuation)[-(self.max_length + 1) : -1]
            cut = len(whole) < len(context) + len(continuation) - 1
            stem = tuple(whole if cut else context)
            tail = () if cut else tuple(continuation[:-1])
            trees.setdefault(stem, {})[key] = _Asked(stem, tail, continuation)
        rows = [row for tree in trees.values() for row in _pruned(tree)]
        stems = [next(iter(row.values())).stem for row in rows]
        groups: list[tuple[list[dict[str, _Asked]], _Compute]] = []
        for some in alike(stems):
            longest = sorted(some.rows, key=lambda index: (-_width(rows[index]), stems[index]))
            prefix = stems[some.rows[0]][: some.prefix]
            groups.append(([rows[index] for index in longest], partial(self._scored, prefix)))
        return groups

    def _scored(self, prefix: tuple[int, ...], batch: Sequence[dict[str, _Asked]]) -> dict[str, Any]:
        """(log-probability, whether greedy) of every continuation of some trees."""
        trees: list[Tree] = []
        wanted: list[list[int]] = []
        paths: dict[str, list[tuple[int, int]]] = {}
        for row in batch:
            stem = next(iter(row.values())).stem[len(prefix) :]
            begins: dict[tuple[int, ...], int] = {(): 0}
            width = len(stem)
            for asked in row.values():
                if asked.tail not in begins:
                    begins[asked.tail] = width
                    width += len(asked.tail)
            for key, asked in row.items():
                begin = begins[asked.tail]
                path = [*range(len(stem)), *range(begin, begin + len(asked.tail))][-len(asked.continuation) :]
                paths[key] = [(len(trees), place) for place in path]
            trees.append(Tree(stem, [tail for tail in begins if tail]))
            wanted.append(sorted({place for key in row for _, place in paths[key]}))
        logits = self._tree_call(prefix, trees, wanted)
        scores = torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
        greedy = scores.argmax(dim=-1).tolist()
        line = {place: n for n, place in enumerate((row, one) for row, some in enumerate(wanted) for one in some)}
        answers: dict[str, Any] = {}
        for row in batch:
            for key, asked in row.items():
                lines = [line[place] for place in paths[key]]
                found = scores[lines].gather(1, torch.tensor([asked.continuation], device=scores.device).T)
                answers[key] = (float(found.sum()), [greedy[one] for one in lines] == asked.continuation)
        return answers

    def _tree_call(self, prefix: tuple[int, ...], trees: list[Tree], wanted: list[list[int]]) -> Tensor:
        kept = self._kept.of(prefix) if prefix else None
        return self._finite(tree_logits(self.model.model, kept, trees, wanted, int(self.tokenizer.pad_token_id)))

    def _answer(self, groups: Sequence[tuple[Sequence[dict[str, Any]], _Compute]]) -> None:
        """Fill the cache with all rows, a batch for every process at a time; a row is what one sequence answers.

        A batch is of one group, and computed as that says; which rows are its company does not depend on the cache.
        """
        self._asked += sum(len(row) for rows, _ in groups for row in rows)
        size = min(gathered(self._fits))
        batches = [
            (rows[start : start + size], compute) for rows, compute in groups for start in range(0, len(rows), size)
        ]
        for start in range(0, len(batches), count()):
            at_once = batches[start : start + count()]
            own, compute = at_once[rank()] if rank() < len(at_once) else ([], dict)
            missing = [row for row in own if any(key not in self._cache for key in row)]
            found: dict[str, Any] = {}
            for part in self._parts(missing):
                found |= self._computed(part, compute)
            for answers in gathered(found):
                if answers:
                    self._cache.add(answers)
                    self.computed += len(answers)
            self._advance(sum(len(row) for batch, _ in at_once for row in batch), total=self._asked)

    def _parts(self, batch: list[dict[str, Any]]) -> Iterable[list[dict[str, Any]]]:
        """The batch in pieces that fit, which may become smaller on the way."""
        while batch:
            part, batch = batch[: self._fits], batch[self._fits :]
            yield part

    def _computed(self, batch: Sequence[dict[str, Any]], compute: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        try:
            with torch.inference_mode():
                return compute(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise ResourceError(
                    f"{shown(self._name, 300)}: a single sequence does not fit into memory; use a smaller model or "
                    "dtype"
                ) from error
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        self._fits = max(1, len(batch) // 2)
        halves = (batch[: len(batch) // 2], batch[len(batch) // 2 :])
        return {key: answer for half in halves for key, answer in self._computed(half, compute).items()}

    def _key(self, kind: str, request: _Request) -> str:
        return key_of(request.task_name, self._versions.get(request.task_name), kind, request.args)

    def _pair(self, context: str, continuation: str) -> tuple[tuple[str, str], list[int], list[int]]:
        """As TemplateLM.loglikelihood encodes it."""
        if context:
            self._context = context  # which `tok_encode` gets with some of the continuation, or without its last spaces
            try:
                return (context, continuation), *self._encode_pair(context, continuation)
            finally:
                self._context = ""
        ids = self.tok_encode(continuation, add_special_tokens=False)
        prefix = self.prefix_token_id
        return ((context, continuation), [prefix], ids) if prefix != ids[0] else (("", continuation), ids[:1], ids[1:])

    def _new_tokens(self, request: _Request) -> int:
        new = int(self._settings(request)["max_gen_toks"])
        if new >= self.max_length:
            raise ConfigError(
                f"task {shown(request.task_name)} generates up to {new} tokens, but {shown(self._name, 300)} can read "
                f"only {self.max_length} in total; choose a task with shorter answers, or a model with a longer "
                "context"
            )
        return new

    def _settings(self, request: _Request) -> Any:
        """As HFLM reads them."""
        return normalize_gen_kwargs(dict(request.args[1]), self.max_gen_toks)

    def _is_plain(self, settings: dict[str, Any]) -> bool:
        """Whether tokens are chosen by the logits behind the row alone."""
        asked = {**self.model.model.generation_config.to_diff_dict(), **settings}
        others = (value for name, value in asked.items() if name not in _PLAIN)
        return not asked.get("do_sample") and all(value in _OFF and value is not True for value in others)

    def _ends(self) -> set[int]:
        """Tokens that end a generation: a checkpoint may have several."""
        inner = self.model.model
        of_checkpoint = inner.generation_config.eos_token_id
        listed = of_checkpoint if isinstance(of_checkpoint, list) else [of_checkpoint]
        return {int(token) for token in (*listed, self.eot_token_id) if token is not None}

    @override
    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._finite(super()._model_call(inps, *args, **kwargs))

    def _finite(self, logits: Tensor) -> Tensor:
        # The largest is NaN where any is; -inf alone is how some models rule out tokens.
        if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
            raise NumericsError(
                f"{shown(self._name, 300)}: the logits are NaN or Inf; check the model's files, or use bfloat16 or "
                "float32 if the dtype is float16"
            )
        return logits

    @override
    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        settings["logits_processor"] = LogitsProcessorList([Finite(self._name)])
        behind = self._generated_behind
        if behind and self._is_plain(settings):
            whole = {"input_ids": context, "attention_mask": settings["attention_mask"]}
            settings |= self._kept.generating(whole, behind)
            context = settings.pop("input_ids")
        out: Tensor = super()._model_generate(context, max_length, stop, **settings)
        full, ends = out.shape[1] >= max_length, self._ends()
        for row in out[:, context.shape[1] :].tolist():
            ended = not full or not ends.isdisjoint(row)
            self._stopped.append(ended or any(word in self.tok_decode(row) for word in stop))
        return out


def _pruned(tree: dict[str, _Asked]) -> list[dict[str, _Asked]]:
    """A tree in as many as keep the continuations of each short enough."""
    parts: list[dict[str, _Asked]] = [{}]
    for key, asked in sorted(tree.items(), key=lambda one: one[1].tail):
        if parts[-1] and _width({**parts[-1], key: asked}) - len(asked.stem) > _MOST_BRANCHES:
            parts.append({})
        parts[-1][key] = asked
    return parts


def _width(row: dict[str, _Asked]) -> int:
    """Tokens of a tree."""
    return len(next(iter(row.values())).stem) + sum(map(len, {asked.tail for asked in row.values()}))
