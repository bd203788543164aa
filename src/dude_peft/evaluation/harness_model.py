"""Our live model as lm-evaluation-harness knows models: its own tokenisation, scores and stops, our batches and checks.

What is added to its HFLM: what documents say is text (`chat_prompts.py`), answers are kept batch by batch
(`answer_cache.py`), a batch that does not fit is halved, NaN ends the evaluation, and prompts that were cut and
generations that never stopped are counted. Several processes share
the batches, each of which is what one process would compute, and tell each other the answers: the harness, which knows
nothing of it, finds all answers in every process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
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
from dude_peft.errors import ConfigError, DataError, NumericsError, ResourceError
from dude_peft.evaluation.chat_prompts import ChatPrompts
from dude_peft.machine.out_of_memory import is_out_of_memory
from dude_peft.machine.processes import count, gathered, rank
from dude_peft.parents import fits
from dude_peft.show import shown

Items = set[tuple[str, int]]
"""(task, number of the document) of each."""
_Request = Any
"""lm_eval.api.instance.Instance"""


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
        # One row of a batch serves all continuations that share everything but their last token, as in HFLM.
        rows: dict[tuple[int, ...], dict[str, Any]] = {}
        for key, pair in zip(keys, encoded, strict=True):
            rows.setdefault(tuple(pair[1] + pair[2][:-1]), {})[key] = pair
        longest = sorted(rows.items(), key=lambda row: (-len(row[0]), row[0]))

        def compute(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
            pairs = {key: pair for row in batch for key, pair in row.items()}
            answers = self._loglikelihood_tokens(list(pairs.values()), disable_tqdm=True, override_bs=len(batch))
            return dict(zip(pairs, answers, strict=True))

        self._answer([row for _, row in longest], compute)
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
            longest = sorted(group.items(), key=lambda one: (-lengths[one[0]], one[1].args[0]))

            def compute(batch: Sequence[dict[str, _Request]]) -> dict[str, Any]:
                asked = [one for row in batch for one in row.items()]
                answers: dict[str, Any] = {}
                for indices in grouped([lengths[key] for key, _ in asked], len(asked), self._company):
                    # Longest first, as the harness continues them.
                    some = dict(asked[index] for index in (sorted(indices)))
                    self._stopped = []
                    texts = super(HarnessModel, self).generate_until(list(some.values()), disable_tqdm=True)
                    answers |= dict(zip(some, zip(texts, self._stopped, strict=True), strict=True))
                return answers

            self._answer([{key: request} for key, request in longest], compute)
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

        self._answer([{key: request} for key, request in zip(keys, requests, strict=True)], compute)
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

    def _answer(self, rows: Sequence[dict[str, Any]], compute: Callable[[Any], dict[str, Any]]) -> None:
        """Fill the cache with all rows, a batch for every process at a time; a row is what one sequence answers."""
        self._asked += sum(map(len, rows))
        size = min(gathered(self._fits))
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        for start in range(0, len(batches), count()):
            at_once = batches[start : start + count()]
            own = at_once[rank()] if rank() < len(at_once) else []
            missing = [row for row in own if any(key not in self._cache for key in row)]
            found: dict[str, Any] = {}
            for part in self._parts(missing):
                found |= self._computed(part, compute)
            for answers in gathered(found):
                if answers:
                    self._cache.add(answers)
                    self.computed += len(answers)
            self._advance(sum(len(row) for batch in at_once for row in batch), total=self._asked)

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

    def _ends(self) -> set[int]:
        """Tokens that end a generation: a checkpoint may have several."""
        inner = self.model.model
        of_checkpoint = inner.generation_config.eos_token_id
        listed = of_checkpoint if isinstance(of_checkpoint, list) else [of_checkpoint]
        return {int(token) for token in (*listed, self.eot_token_id) if token is not None}

    @override
    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits: Tensor = super()._model_call(inps, *args, **kwargs)
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
        out: Tensor = super()._model_generate(context, max_length, stop, **settings)
        full, ends = out.shape[1] >= max_length, self._ends()
        for row in out[:, context.shape[1] :].tolist():
            ended = not full or not ends.isdisjoint(row)
            self._stopped.append(ended or any(word in self.tok_decode(row) for word in stop))
        return out
