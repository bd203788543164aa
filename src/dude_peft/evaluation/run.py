"""`dude eval`: the order of it all."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_peft.artifact.durable import disk_errors, locked, replace_file
from dude_peft.artifact.json_text import with_nulls
from dude_peft.artifact.sealed import file_sha256
from dude_peft.doors import read_json
from dude_peft.errors import ConfigError
from dude_peft.evaluation.options import EvalOptions
from dude_peft.evaluation.record import ANSWERS, RESULTS, SAMPLES, TASKS, Evaluation, Measure
from dude_peft.evaluation.scorer import SEEDS, Scorer, libraries
from dude_peft.evaluation.task_names import GSM8K, check_names, is_yaml
from dude_peft.installing import install
from dude_peft.machine import processes
from dude_peft.show import shown
from dude_peft.terminal.display import Display
from dude_peft.terminal.next_steps import beside, tell_next
from dude_peft.terminal.quiet import gathered_warnings, quiet_imports

if TYPE_CHECKING:
    from dude_peft.answer.speaker import Speaker
    from dude_peft.evaluation.tasks import Chosen


def evaluate(
    name: str,
    options: EvalOptions,
    output: Path,
    *,
    base: str | None = None,
    gguf_file: str | None = None,
    device_map: str | None = None,
    max_memory: Sequence[str] | None = None,
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
        device_map: `auto` spreads the model over GPUs, CPU and disk; a device has all of it; None is the fastest one.
        max_memory: the most that `auto` puts on a device, each as DEVICE=SIZE; None is what is free.
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
    processes.is_launched()  # a place among processes that no launcher gave is refused
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"dude eval needs lm-evaluation-harness: {install('lm-eval')}")
    _check_output(output, overwrite)
    check_names(options.tasks)
    first = processes.is_first()
    display = Display(quiet=quiet or not first)
    make_output(output)
    with gathered_warnings(display.warn), locked(output) if first else contextlib.nullcontext(), processes.joined():
        if first:
            _check_output(output, overwrite)  # another one may have finished in the meantime
        with quiet_imports():
            import lm_eval.evaluator  # noqa: F401 - its chatter belongs here

            from dude_peft.answer.speaker import open_speaker
        with processes.first_before_others():
            chosen = load_chosen(options, output / TASKS)
        speaker = open_speaker(
            name, base=base, gguf_file=gguf_file, notes=display, device_map=device_map, max_memory=max_memory
        )
        found = measure(speaker, options, output, display=display, chosen=chosen)
    tell_next(display, ["report", str(output), "-o", beside(output, ".html")])
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
    from dude_peft.answer.merged import merged_if_equal
    from dude_peft.data.encode import check_ids
    from dude_peft.evaluation.forgetting import read_text, score_text
    from dude_peft.evaluation.measures import measures_of
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
    scorer = Scorer(speaker, options, output, display, chosen, items)
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
        _second_opinion(chosen, model),
        {
            **_provenance(speaker, options, chosen, items, model),
            **scorer.provenance(),
            "samples": list(_sample_files(chosen)),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - begin, 3),
        },
    )
    if processes.is_first():
        _write(output, evaluation, model, base, _sample_files(chosen))
    show(display, evaluation)
    if places := with_nulls(asdict(evaluation))[1]:
        display.warn(
            f"{len(places)} numbers are NaN or Inf, and null in {RESULTS} (first: {shown(places[0], 100)}); the "
            "task's metric is undefined for these answers"
        )
    display.say(f"results: {shown(output / RESULTS, 300)}; each question: {shown(output / SAMPLES, 300)}")
    return evaluation


def score_as_it_is(speaker: Speaker, options: EvalOptions, output: Path, chosen: Sequence[Chosen]) -> list[Measure]:
    """Score a model in the middle of its training, without its base; only its answers are kept in `output`."""
    from dude_peft.evaluation.measures import measures_of

    sizes, items = _items(chosen, options)
    found = Scorer(speaker, options, output, Display(quiet=True), chosen, items).score("model")
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


def _second_opinion(chosen: Sequence[Chosen], model: dict[str, Any]) -> dict[str, list[Any]] | None:
    from dude_peft.evaluation.second_opinion import available, disagreements

    # A task of the user's own may have the name, and no answers of that kind.
    own = {task for one in chosen if is_yaml(one.name) for task in one.tasks}
    tasks = [task for task in GSM8K if task in model["samples"] and task not in own]
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
        "seeds": SEEDS,
        "versions": libraries(),
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


def _sample_files(chosen: Sequence[Chosen]) -> dict[str, Chosen]:
    """Name of the file of each one's questions."""
    files: dict[str, Chosen] = {}
    for one in chosen:
        stem = Path(one.name).stem if is_yaml(one.name) else one.name.replace("/", "-")
        while f"{stem}.jsonl" in files:  # two YAML files of one name
            stem += "-again"
        files[f"{stem}.jsonl"] = one
    return files


def _write(
    output: Path,
    evaluation: Evaluation,
    model: dict[str, Any],
    base: dict[str, Any] | None,
    files: Mapping[str, Chosen],
) -> None:
    from dude_peft.evaluation.measures import sample_lines

    samples = output / SAMPLES
    with disk_errors(output):
        samples.mkdir(exist_ok=True)
        # Of tasks that were asked before --overwrite; what else lies there is the user's.
        for old in _earlier_files(output / RESULTS) - set(files):
            (samples / old).unlink(missing_ok=True)
        for name, one in files.items():
            lines = (line.encode("utf-8", "backslashreplace") for line in sample_lines(one, model, base))
            replace_file(samples / name, lines)
        replace_file(output / RESULTS, evaluation.text_of().encode("utf-8", "backslashreplace"))


def _earlier_files(results: Path) -> set[str]:
    """Names of the files of questions that an earlier evaluation wrote, as far as its results tell."""
    if not results.is_file():
        return set()
    try:
        named = read_json(results)["provenance"]["samples"]
        return {name for name in named if name.endswith(".jsonl") and Path(name).name == name}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()  # of an earlier version, or edited: then nothing is known to be ours


def make_output(output: Path) -> None:
    """The folder of the results, and in it that of the answers.

    Raises:
        ConfigError: a folder in it is a link: what it leads to would be written, and its old samples removed.
        ResourceError: the disk does not allow it.
    """
    for name in (ANSWERS, SAMPLES, TASKS):
        if (output / name).is_symlink():
            raise ConfigError(f"output {shown(output / name, 300)} is a link; remove it, or choose another folder")
    with disk_errors(output):
        (output / ANSWERS).mkdir(parents=True, exist_ok=True)


def _check_output(output: Path, overwrite: bool) -> None:
    named = shown(output, 300)
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ConfigError(f"output {named} is not a folder; choose another name")
    if (output / RESULTS).exists() and not overwrite:
        raise ConfigError(
            f"output {named} already has a finished evaluation; choose another folder, or add --overwrite"
        )
    if output.is_dir() and any(os.scandir(output)) and not (output / ANSWERS).is_dir():
        raise ConfigError(f"output {named} has other files in it; choose another folder")
