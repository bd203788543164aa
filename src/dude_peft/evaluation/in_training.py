"""`evaluation.tasks` of a run: the same scores as `dude eval`, on the model that is being trained."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_peft.artifact.json_text import with_nulls
from dude_peft.config.schema import EvaluationSection
from dude_peft.data.control_tokens import ControlTokens
from dude_peft.errors import ConfigError, DataError
from dude_peft.evaluation.forgetting import read_text
from dude_peft.evaluation.options import EvalOptions
from dude_peft.evaluation.record import TASKS
from dude_peft.evaluation.run import load_chosen, make_output, measure, score_as_it_is
from dude_peft.evaluation.task_names import check_names
from dude_peft.evaluation.tasks import write_local
from dude_peft.installing import install
from dude_peft.machine import processes
from dude_peft.training.progress import Display
from dude_peft.training.task_scores import TaskScore

if TYPE_CHECKING:
    from dude_peft.answer.speaker import Speaker
    from dude_peft.evaluation.tasks import Chosen

# Messages name options of the command; here they are keys.
_KEYS = {
    "--tasks": "evaluation.tasks", "--data-dir": "evaluation.tasks_data_dir", "--chat": "evaluation.tasks_chat",
    "--num-fewshot": "evaluation.tasks_num_fewshot", "--text": "evaluation.tasks_text",
}  # fmt: skip


class TasksOfRun:
    """The `TaskScorer` of a run."""

    def __init__(self, settings: EvaluationSection, special_tokens: str = "text") -> None:
        """Nothing is read yet.

        Raises:
            ConfigError: lm-evaluation-harness is not installed.
            DataError: the folder of the data, or the text, is not there.
        """
        if settings.tasks and importlib.util.find_spec("lm_eval") is None:
            raise ConfigError(f"evaluation.tasks needs lm-evaluation-harness: {install('lm-eval')}")
        try:
            self._options = EvalOptions(
                tasks=tuple(settings.tasks),
                data_dir=None if settings.tasks_data_dir is None else Path(settings.tasks_data_dir),
                limit=settings.tasks_limit,
                chat=settings.tasks_chat,
                num_fewshot=settings.tasks_num_fewshot,
                text=None if settings.tasks_text is None else Path(settings.tasks_text),
                special_tokens=special_tokens,
            )
            check_names(self._options.tasks)
        except (ConfigError, DataError) as error:
            raise _in_keys(error) from error
        self._chosen: list[Chosen] = []

    def check(self, tokenizer: Any) -> None:
        if self._options.chat and not tokenizer.chat_template:
            raise ConfigError("evaluation.tasks_chat: the model's tokenizer has no chat template; set it to false")
        if self._options.text is not None:
            control = ControlTokens(tokenizer, self._options.special_tokens or "text")
            read_text(self._options.text, control, None)  # what fills a long block fills a short one
        try:
            with tempfile.TemporaryDirectory(prefix="dude-tasks-") as folder:
                self._chosen = load_chosen(self._options, Path(folder))
        except (ConfigError, DataError) as error:
            raise _in_keys(error) from error

    def score(self, model: Any, tokenizer: Any, folder: Path) -> Mapping[str, TaskScore]:
        if not self._chosen:
            return {}
        make_output(folder)
        measures = score_as_it_is(_speaker(model, tokenizer, "the model"), self._options, folder, self._chosen)
        return {f"{m.task}/{m.metric},{m.filter}": TaskScore(m.model.value, m.higher_is_better) for m in measures}

    def finish(self, model: Any, tokenizer: Any, folder: Path, *, name: str, display: Display) -> dict[str, Any]:
        make_output(folder)
        if processes.is_first():  # for the reader; what is scored was read before training
            write_local(self._options.tasks, self._options.data_dir, folder / TASKS)
        speaker = _speaker(model, tokenizer, name)
        found = measure(speaker, self._options, folder, display=display, chosen=self._chosen)
        text = None if found.text is None else asdict(found.text)
        kept: dict[str, Any] = with_nulls({"measures": [asdict(one) for one in found.measures], "text": text})[0]
        return kept


def _in_keys(error: Exception) -> Exception:
    text = str(error)
    for option, key in _KEYS.items():
        text = text.replace(option, key)
    return type(error)(text)


def _speaker(model: Any, tokenizer: Any, name: str) -> Speaker:
    from dude_peft.answer.speaker import Speaker

    model.eval()
    # The harness sets the side of the padding, and may add a token for it.
    return Speaker(name, model, copy.deepcopy(tokenizer), frozenset(), adapted=True, trained_template="auto")
