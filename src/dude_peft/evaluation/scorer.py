"""Runs lm-evaluation-harness on a model as it is at that moment: adapted, merged or base."""

from __future__ import annotations

import contextlib
import io
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_peft.errors import ConfigError, DudeError
from dude_peft.evaluation.options import EvalOptions
from dude_peft.evaluation.record import ANSWERS, Counts
from dude_peft.machine.out_of_memory import comes_of_memory
from dude_peft.machine.processes import gathered
from dude_peft.show import reason_of, shown
from dude_peft.terminal.display import Display

if TYPE_CHECKING:
    from dude_peft.answer.speaker import Speaker
    from dude_peft.data.batches import Company
    from dude_peft.evaluation.tasks import Chosen

# As the harness's own command sets them: python, numpy, torch, few-shot examples.
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
_MOST_ROWS = {"cpu": 8}
_MOST_ROWS_ELSEWHERE = 64
_MEMORY_SHARE = 0.25


class Scorer:
    """Runs the harness on the model as it is at that moment: adapted, merged or base."""

    def __init__(
        self,
        speaker: Speaker,
        options: EvalOptions,
        output: Path,
        display: Display,
        chosen: Sequence[Chosen],
        items: dict[str, list[int]],
    ) -> None:
        from dude_peft.answer.fingerprint import config_fingerprint, model_fingerprint, tokenizer_fingerprint

        self._speaker, self._options, self._output, self._display = speaker, options, output, display
        self._tasks = {name: task for one in chosen for name, task in one.tasks.items() if name in items}
        self._names = {task: one.name for one in chosen for task in one.tasks}
        self._items = items
        self._fingerprint = model_fingerprint(speaker.model)
        self._tokenizer = tokenizer_fingerprint(speaker.tokenizer)
        self.counts: dict[str, Counts] = {}
        self._config = config_fingerprint(speaker.model)
        self._company: Company = "any"
        if any(task.OUTPUT_TYPE == "generate_until" for task in self._tasks.values()):
            self._company = speaker.company
            if speaker.company_note:
                display.say(f"note: {speaker.company_note}")
        self._special_tokens = options.special_tokens or speaker.special_tokens
        self._answers: dict[str, dict[str, int]] = {}

    def score(self, state: str) -> dict[str, Any]:
        """Samples and results of every task; `state` is `base`, `model` or `merged`."""
        from lm_eval.evaluator import evaluate as harness

        from dude_peft.answer.cache import AnswerCache, key_of
        from dude_peft.evaluation.chat_prompts import ChatPrompts
        from dude_peft.evaluation.harness_model import HarnessModel
        from dude_peft.evaluation.task_code import guarded

        model, tokenizer = self._speaker.model, self._speaker.tokenizer
        prompts = ChatPrompts(tokenizer, self._special_tokens, self._speaker.name, chat=self._options.chat)
        settings = {
            "model": self._fingerprint,
            "config": self._config,
            "tokenizer": self._tokenizer,
            "state": state,
            "dtype": str(model.dtype),
            "device": model.device.type,
            "versions": libraries(),
            "generation": _generation(model),
            "special_tokens": self._special_tokens,
        }
        asked = {**settings, "asked_batch_size": self._options.batch_size}
        path = self._output / ANSWERS / f"{state}-{key_of(asked)}.jsonl"
        cache = AnswerCache(path, {**asked, "batch_size": self._options.batch_size or _rows_that_fit(self._speaker)})
        batch_size = cache.settings["batch_size"]
        whose = "base" if state == "base" else "model"
        try:
            if not isinstance(batch_size, int) or batch_size < 1:
                raise cache.damaged()
            _seed_everything(self._tasks.values())
            versions = {name: task.VERSION for name, task in self._tasks.items()}
            total = sum(map(len, self._items.values()))
            with self._display.stage(f"{whose}, {total:,} items", 0) as advance:
                harness_model = HarnessModel(
                    model,
                    tokenizer,
                    cache,
                    name=self._speaker.name,
                    batch_size=batch_size,
                    versions=versions,
                    prompts=prompts,
                    company=self._company,
                    share=all(gathered(self._speaker.shares_prefixes)),
                    advance=advance,
                )
                with contextlib.redirect_stderr(io.StringIO()), self._harness_errors(), guarded():  # and its bars
                    found: Any = harness(
                        harness_model,
                        {"tasks": self._tasks, "groups": {}},
                        samples=self._items,
                        bootstrap_iters=0,
                        apply_chat_template=self._options.chat,
                        fewshot_as_multiturn=self._options.chat,
                    )
        finally:
            cache.close()
        self._answers[whose] = {
            "computed": harness_model.computed,
            "found": cache.found,
            "batch_size": harness_model.batch_size,
        }
        items = (harness_model.cut_prompts, harness_model.unstopped, harness_model.empty)
        self.counts[whose] = Counts(*(dict(Counter(self._names[task] for task, _ in some)) for some in items))
        return dict(found)

    @contextlib.contextmanager
    def _harness_errors(self) -> Iterator[None]:
        """Within: what the harness, or generation, makes of a task that cannot be asked names the tasks."""
        from jinja2 import TemplateError

        try:
            yield
        except DudeError:
            raise
        except Exception as error:  # a user's own task may raise anything, as re.error of its pattern
            own = any(name.endswith((".yaml", ".yml")) for name in self._options.tasks)
            of_a_task = isinstance(error, (ValueError, AssertionError, LookupError, TypeError, re.error, TemplateError))
            if comes_of_memory(error) or not (own or of_a_task):
                raise
            reason = reason_of(error, 200)
            tasks = ", ".join(dict.fromkeys(self._names[task] for task in self._tasks))
            raise ConfigError(
                f"lm-eval cannot run {shown(tasks, 200)} on {shown(self._speaker.name, 300)} ({reason}); run the tasks "
                "one at a time, and check the failing task's settings; --debug shows where the error is"
            ) from error

    def provenance(self) -> dict[str, Any]:
        """What the answers depend on, and how many were there already."""
        return {
            "model_fingerprint": self._fingerprint,
            "config_fingerprint": self._config,
            "tokenizer_fingerprint": self._tokenizer,
            "answers": self._answers,
        }


def _generation(model: Any) -> dict[str, Any]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return dict(inner.generation_config.to_diff_dict())


def libraries() -> dict[str, str]:
    from dude_peft.machine.environment import versions

    return {**versions(), **{name: metadata.version(name) for name in ("lm_eval", "datasets", "tokenizers")}}


def _seed_everything(tasks: Any) -> None:
    import numpy as np
    import torch

    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    for task in tasks:
        task.set_fewshot_seed(SEEDS["fewshot"])


def _rows_that_fit(speaker: Speaker) -> int:
    """Where to begin: on a GPU what does not fit is halved, on a CPU it would be killed, so memory is asked first."""
    import psutil

    device = speaker.model.device.type
    if device != "cpu":
        return _MOST_ROWS_ELSEWHERE
    vocabulary = speaker.model.get_input_embeddings().weight.shape[0]
    row_bytes = min(speaker.positions or 2048, 2048) * vocabulary * 4 * 2  # logits and their logarithms
    return max(1, min(_MOST_ROWS[device], int(psutil.virtual_memory().available * _MEMORY_SHARE / row_bytes)))
