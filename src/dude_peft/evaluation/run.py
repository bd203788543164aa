"""`dude eval`: the order of it all."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_peft.artifact.durable import disk_errors, locked, replace_file
from dude_peft.artifact.sealed import file_sha256
from dude_peft.data.control_tokens import SPECIAL_TOKENS
from dude_peft.errors import ConfigError, DataError, DudeError
from dude_peft.evaluation.record import ANSWERS, RESULTS, SAMPLES, TASKS, Counts, Evaluation, Measure
from dude_peft.machine import processes
from dude_peft.machine.out_of_memory import comes_of_memory
from dude_peft.show import quoted, shown
from dude_peft.terminal.display import Display
from dude_peft.terminal.quiet import gathered_warnings, quiet_imports

if TYPE_CHECKING:
    from dude_peft.answer.speaker import Speaker
    from dude_peft.data.batches import Company
    from dude_peft.evaluation.tasks import Chosen

# As the harness's own command sets them: python, numpy, torch, few-shot examples.
_SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
_MOST_ROWS = {"cpu": 8}
_MOST_ROWS_ELSEWHERE = 64
_MEMORY_SHARE = 0.25
_LONGEST_NAME = 255


@dataclass(frozen=True)
class EvalOptions:
    """What is asked of a model."""

    tasks: tuple[str, ...] = ()
    data_dir: Path | None = None
    """Local files; None takes data from where the harness does."""
    limit: int | None = None
    """Items of each name at most: a seeded sample, stratified by subject."""
    seed: int = 0
    """Of the sample and the bootstraps."""
    chat: bool = False
    """Prompts through the tokenizer's chat template, examples as turns."""
    num_fewshot: int | None = None
    batch_size: int | None = None
    """Sequences at a time; None finds it."""
    text: Path | None = None
    """General text: loss, perplexity, and how far an adapter moved from its base."""
    special_tokens: str | None = None
    """What a special token is that a text spells: `text`, or `allow`, the token; None as in the training run."""

    def __post_init__(self) -> None:
        """Raises ConfigError for what cannot work."""
        if not self.tasks and self.text is None:
            raise ConfigError("nothing to evaluate; give --tasks, as gsm8k,mmlu, or --text FILE")
        twice = next((name for name in self.tasks if self.tasks.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"--tasks: {quoted(twice)} is asked for twice; name it once")
        for option, value, least in (
            ("--limit", self.limit, 1),
            ("--batch-size", self.batch_size, 1),
            ("--num-fewshot", self.num_fewshot, 0),
            ("--seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{option} {value}: give a whole number from {least}")
        if self.special_tokens not in (None, *SPECIAL_TOKENS):
            raise ConfigError(f"--special-tokens {quoted(self.special_tokens)}: use {', '.join(SPECIAL_TOKENS)}")
        if self.data_dir is not None and not self.data_dir.is_dir():
            what = "is no folder" if self.data_dir.exists() else "no such folder"
            raise DataError(f"--data-dir {shown(self.data_dir, 300)}: {what}; docs/evaluation.md tells what it holds")
        target = None if self.text is None else self.text.expanduser()
        if target is not None and (target.is_dir() or not target.exists()):
            what = "is a folder" if target.is_dir() else "no such file"
            raise DataError(f"--text {shown(self.text, 300)}: {what}; give a text file")


def evaluate(
    name: str,
    options: EvalOptions,
    output: Path,
    *,
    base: str | None = None,
    gguf_file: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Evaluation:
    """Score an adapter beside its base, or a plain model, and write results.json and a line for each question.

    Interrupted in any way, the same call goes on: answers that are there are not computed again.

    Args:
        name: folder or hub id of an adapter or a model, or `package:NAME`.
        options: what to measure.
        output: folder of the results.
        base: base model of the adapter; None takes its own.
        gguf_file: name of the GGUF file that is the (base) model.
        overwrite: replace the results of a finished evaluation; its answers are used again.
        quiet: print nothing.

    Raises:
        ConfigError: an option, task, model or output that cannot be used.
        DataError: a file of the user's that is missing or malformed.
        ArtifactError: a damaged adapter, or another base model.
        NumericsError: NaN or Inf.
        ResourceError: disk, memory or permission.
        BusyError: another process evaluates into this folder.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("dude eval needs lm-evaluation-harness: pip install 'dude-peft[eval]'")
    _check_output(output, overwrite)
    first = processes.is_first()
    display = Display(quiet=quiet or not first)
    make_output(output)
    with gathered_warnings(display.warn), locked(output) if first else contextlib.nullcontext(), processes.joined():
        with quiet_imports():
            import lm_eval.evaluator  # noqa: F401 - its chatter belongs here

            from dude_peft.answer.speaker import open_speaker
        with processes.first_before_others():
            chosen = load_chosen(options, output / TASKS)
        speaker = open_speaker(name, base=base, gguf_file=gguf_file, notes=display)
        found = measure(speaker, options, output, display=display, chosen=chosen)
    return found


def measure(
    speaker: Speaker,
    options: EvalOptions,
    output: Path,
    *,
    display: Display,
    merge: bool = True,
    chosen: Sequence[Chosen] | None = None,
) -> Evaluation:
    """Score a model that is in memory, and its base; `evaluate` says what is written and raised.

    Args:
        speaker: the model; its adapter is live.
        options: what to measure.
        output: folder of the results, which is there.
        display: where progress and the table go.
        merge: run the adapter merged in memory, where that is proved to compute the same.
        chosen: the tasks, if they are loaded already.
    """
    from dude_peft.data.encode import check_ids
    from dude_peft.evaluation.forgetting import read_text, score_text
    from dude_peft.evaluation.measures import measures_of
    from dude_peft.evaluation.merged import merged_if_equal
    from dude_peft.evaluation.table import show

    if options.chat and not speaker.tokenizer.chat_template:
        raise ConfigError(f"--chat: the tokenizer of {shown(speaker.name, 300)} has no chat template; leave --chat out")
    started, begin = datetime.now(timezone.utc), time.perf_counter()
    general = None
    if options.text is not None:
        general = read_text(options.text, speaker.control(options.special_tokens), speaker.positions)
        for block in general.blocks:
            check_ids(shown(options.text, 300), block, speaker.tokenizer, speaker.vocabulary)
    chosen = load_chosen(options, output / TASKS) if chosen is None else chosen
    sizes, items = _items(chosen, options)
    scorer = _Scorer(speaker, options, output, display, chosen, items)
    base, merged = None, False
    with _generation_of_the_checkpoint(speaker):
        if items and speaker.adapted:
            with speaker.as_base():
                base = scorer.score("base")
        if items:
            with merged_if_equal(speaker.model, merge and speaker.adapted) as merged:
                model = scorer.score("merged" if merged else "model")
        else:
            model = {"samples": {}, "results": {}}
    text = None
    if general is not None:
        with display.waiting("general text"):
            text = score_text(speaker, general)
    whole, parts = measures_of(chosen, sizes, model, base, options.seed)
    evaluation = Evaluation(
        speaker.name,
        speaker.adapted,
        merged,
        whole,
        parts,
        text,
        scorer.counts,
        _second_opinion(model),
        {
            **_provenance(speaker, options, chosen, items, model),
            **scorer.provenance(),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - begin, 3),
        },
    )
    if processes.is_first():
        _write(output, evaluation, chosen, model, base)
    show(display, evaluation)
    display.say(f"results: {shown(output / RESULTS, 300)}; each question: {shown(output / SAMPLES, 300)}")
    return evaluation


def score_as_it_is(speaker: Speaker, options: EvalOptions, output: Path, chosen: Sequence[Chosen]) -> list[Measure]:
    """Score a model in the middle of its training, without its base; only its answers are kept in `output`."""
    from dude_peft.evaluation.measures import measures_of

    sizes, items = _items(chosen, options)
    found = _Scorer(speaker, options, output, Display(quiet=True), chosen, items).score("model")
    return measures_of(chosen, sizes, found, None, options.seed)[0]


def load_chosen(options: EvalOptions, folder: Path) -> list[Chosen]:
    """The tasks that are asked for, those on local files written into `folder`; `load_tasks` says what it raises."""
    if not options.tasks:
        return []
    from dude_peft.evaluation.tasks import load_tasks

    with contextlib.redirect_stderr(io.StringIO()):  # datasets' bars
        return load_tasks(options.tasks, options.data_dir, folder, num_fewshot=options.num_fewshot)


def _items(chosen: Sequence[Chosen], options: EvalOptions) -> tuple[dict[str, int], dict[str, list[int]]]:
    """(items that each task has, those of them that are asked)."""
    from dude_peft.evaluation.subset import stratified

    sizes = {task: len(loaded.eval_docs) for one in chosen for task, loaded in one.tasks.items()}
    items: dict[str, list[int]] = {}
    for one in chosen:
        items |= stratified({task: sizes[task] for task in one.tasks}, options.limit, options.seed)
    return sizes, items


class _Scorer:
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
            "versions": _libraries(),
            "generation": _generation(model),
            "special_tokens": self._special_tokens,
        }
        asked = {**settings, "asked_batch_size": self._options.batch_size}
        path = self._output / ANSWERS / f"{state}-{key_of(asked)}.jsonl"
        cache = AnswerCache(path, {**asked, "batch_size": self._options.batch_size or _rows_that_fit(self._speaker)})
        whose = "base" if state == "base" else "model"
        try:
            _seed_everything(self._tasks.values())
            versions = {name: task.VERSION for name, task in self._tasks.items()}
            total = sum(map(len, self._items.values()))
            with self._display.stage(f"{whose}, {total:,} items", 0) as advance:
                harness_model = HarnessModel(
                    model,
                    tokenizer,
                    cache,
                    name=self._speaker.name,
                    batch_size=int(cache.settings["batch_size"]),
                    versions=versions,
                    prompts=prompts,
                    company=self._company,
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
            reason = f"{type(error).__name__}: {shown(' '.join(str(error).split()), 200)}"
            tasks = ", ".join(dict.fromkeys(self._names[task] for task in self._tasks))
            raise ConfigError(
                f"the harness cannot ask {shown(tasks, 200)} of {shown(self._speaker.name, 300)} ({reason}); name "
                "tasks one at a time to see which, and check its settings; --debug shows where, should it be our bug"
            ) from error

    def provenance(self) -> dict[str, Any]:
        """What the answers depend on, and how many were there already."""
        return {
            "model_fingerprint": self._fingerprint,
            "config_fingerprint": self._config,
            "tokenizer_fingerprint": self._tokenizer,
            "answers": self._answers,
        }


def _seed_everything(tasks: Any) -> None:
    import numpy as np
    import torch

    random.seed(_SEEDS["random"])
    np.random.seed(_SEEDS["numpy"])
    torch.manual_seed(_SEEDS["torch"])
    for task in tasks:
        task.set_fewshot_seed(_SEEDS["fewshot"])


def _rows_that_fit(speaker: Speaker) -> int:
    """Where to begin: on a GPU what does not fit is halved, on a CPU it would be killed, so memory is asked first."""
    import psutil

    device = speaker.model.device.type
    if device != "cpu":
        return _MOST_ROWS_ELSEWHERE
    vocabulary = speaker.model.get_input_embeddings().weight.shape[0]
    row_bytes = min(speaker.positions or 2048, 2048) * vocabulary * 4 * 2  # logits and their logarithms
    return max(1, min(_MOST_ROWS[device], int(psutil.virtual_memory().available * _MEMORY_SHARE / row_bytes)))


@contextlib.contextmanager
def _generation_of_the_checkpoint(speaker: Speaker) -> Iterator[None]:
    """Within: generation follows the checkpoint's own config, as under the harness's command."""
    model = speaker.model.get_base_model() if speaker.adapted else speaker.model
    ours = model.generation_config
    if speaker.checkpoint_generation is not None:
        model.generation_config = speaker.checkpoint_generation
    try:
        yield
    finally:
        model.generation_config = ours


def _generation(model: Any) -> dict[str, Any]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return dict(inner.generation_config.to_diff_dict())


def _second_opinion(model: dict[str, Any]) -> dict[str, list[Any]] | None:
    from dude_peft.evaluation.local_tasks import GSM8K
    from dude_peft.evaluation.second_opinion import available, disagreements

    tasks = [task for task in GSM8K if task in model["samples"]]
    return {task: disagreements(model["samples"][task]) for task in tasks} if tasks and available() else None


def _provenance(
    speaker: Speaker, options: EvalOptions, chosen: Sequence[Chosen], items: dict[str, list[int]], model: dict[str, Any]
) -> dict[str, Any]:
    from dude_peft.machine.environment import hardware

    adapter = speaker.model.active_peft_config if speaker.adapted else None
    # The prompt has the examples; documents alone would be the same with others.
    kept = ("doc_id", "doc_hash", "prompt_hash", "target_hash")
    hashes = [" ".join([task, *(str(s[k]) for k in kept)]) for task, all_ in model["samples"].items() for s in all_]
    return {
        "base_model": None if adapter is None else adapter.base_model_name_or_path,
        "adapter_sha256": _adapter_sha256(speaker),
        "tasks": {
            task: {
                "version": loaded.VERSION,
                "num_fewshot": loaded.get_config("num_fewshot"),
                "items": len(items.get(task, [])),
                "of": len(loaded.eval_docs),
            }
            for one in chosen
            for task, loaded in one.tasks.items()
        },
        "data_sha256": hashlib.sha256("\n".join(sorted(set(hashes))).encode()).hexdigest(),
        "options": {**asdict(options), "data_dir": _path(options.data_dir), "text": _path(options.text)},
        "seeds": _SEEDS,
        "versions": _libraries(),
        "processes": processes.count(),
        "hardware": hardware(speaker.model.device),
    }


def _adapter_sha256(speaker: Speaker) -> str | None:
    """Of the file; None for a plain model, or an adapter that is in no folder."""
    from dude_peft.artifact.manifest import WEIGHTS_FILE

    path = Path(speaker.name) / WEIGHTS_FILE
    if not speaker.adapted or not path.is_file():
        return None
    return file_sha256(path)


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _libraries() -> dict[str, str]:
    from dude_peft.machine.environment import versions

    return {**versions(), **{name: metadata.version(name) for name in ("lm_eval", "datasets", "tokenizers")}}


def _write(
    output: Path,
    evaluation: Evaluation,
    chosen: Sequence[Chosen],
    model: dict[str, Any],
    base: dict[str, Any] | None,
) -> None:
    from dude_peft.evaluation.measures import sample_lines

    with disk_errors(output):
        (output / SAMPLES).mkdir(exist_ok=True)
        files: set[Path] = set()
        for one in chosen:
            stem = Path(one.name).stem if one.name.endswith((".yaml", ".yml")) else one.name.replace("/", "-")
            file = output / SAMPLES / f"{stem}.jsonl"
            while file in files:  # two YAML files of one name
                stem += "-again"
                file = output / SAMPLES / f"{stem}.jsonl"
            files.add(file)
            replace_file(file, (line.encode("utf-8", "backslashreplace") for line in sample_lines(one, model, base)))
        for old in set((output / SAMPLES).glob("*.jsonl")) - files:  # of tasks that were asked before --overwrite
            old.unlink()
        replace_file(output / RESULTS, evaluation.text_of().encode("utf-8", "backslashreplace"))


def make_output(output: Path) -> None:
    """The folder of the results, and in it that of the answers. ResourceError where the disk does not allow it."""
    with disk_errors(output):
        (output / ANSWERS).mkdir(parents=True, exist_ok=True)


def _check_output(output: Path, overwrite: bool) -> None:
    named = shown(output, 300)
    if len(output.name.encode("utf-8", "surrogateescape")) > _LONGEST_NAME:
        raise ConfigError(f"output {named}: the name is longer than {_LONGEST_NAME} bytes; choose a shorter one")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ConfigError(f"output {named} is no folder; choose another name")
    if (output / RESULTS).exists() and not overwrite:
        raise ConfigError(f"output {named} holds a finished evaluation; choose another folder, or add --overwrite")
    if output.is_dir() and any(os.scandir(output)) and not (output / ANSWERS).is_dir():
        raise ConfigError(f"output {named} holds something else; choose another folder")
