"""What the command does with several rooms at once: a run and its plan with tasks and cards, an evaluation.

The other public functions are in the rooms themselves (`dude_peft.__init__` lists them). All take the command's
options, return typed results, and print nothing unless asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from dude_peft.errors import ConfigError
from dude_peft.kinds import checked

if TYPE_CHECKING:
    from dude_peft.comparison.outcome import Comparison
    from dude_peft.config.schema import RunConfig
    from dude_peft.evaluation.record import Evaluation
    from dude_peft.folder.record import RunReport
    from dude_peft.planning.report import Plan
    from dude_peft.reporting.run import Page

    RunSource: TypeAlias = str | Path | Mapping[str, Any] | RunConfig
    """A YAML file, its content as a dict, or the configuration itself."""


@checked
def train(
    config: RunSource,
    overrides: Sequence[str] = (),
    *,
    output_dir: str | Path | None = None,
    trainer: str | None = None,
    overwrite: bool = False,
    weights_only: bool = False,
    strategy: str = "ddp",
    page: bool = True,
    quiet: bool = True,
) -> RunReport:
    """Fine-tune a model from a configuration; if it is interrupted, the same call again resumes, bit by bit.

        report = dude_peft.train("run.yaml", ["train.max_steps=2"], output_dir="runs/two-steps")
        print(report.after.loss, report.adapter)

    Args:
        config: a YAML file, a dict of the same shape, or a RunConfig.
        overrides: "train.learning_rate=2e-4", as `--set`.
        output_dir: replaces the configuration's.
        trainer: replaces `train.trainer`: transformers or trl.
        overwrite: start anew in a folder that is not empty.
        weights_only: go on from a checkpoint's adapter alone, where its other files are lost.
        strategy: of several processes: ddp, fsdp2 or zero3.
        page: write page.html at the end, as `report` would.
        quiet: print nothing.

    Raises:
        ConfigError: a setting, model or folder that cannot be used.
        DataError: rows that cannot be trained on.
        ArtifactError: a damaged checkpoint, or another base model.
        NumericsError: NaN or Inf.
        ResourceError: disk, memory or permission.
        BusyError: another process runs in the folder.
        StoppedError: Ctrl-C or SIGTERM; a checkpoint is there.
    """
    settings = _settings(config, overrides, {"output_dir": output_dir, "train.trainer": trainer})

    from dude_peft.evaluation.in_training import TasksOfRun
    from dude_peft.exporting.run_card import card_of_run
    from dude_peft.reporting.run import page_of
    from dude_peft.training.run import run

    return run(
        settings,
        overwrite=overwrite,
        weights_only=weights_only,
        strategy=strategy,
        scorer_of=TasksOfRun,
        card_of=card_of_run,
        write_page=page_of if page else None,
        quiet=quiet,
    )


@checked
def plan(
    config: RunSource,
    overrides: Sequence[str] = (),
    *,
    device_memory: str | None = None,
    strategy: str = "ddp",
    processes: int = 1,
    quiet: bool = True,
) -> Plan:
    """Check a run, and estimate the memory, disk and steps that it will need; no weights are read.

        plan = dude_peft.plan("run.yaml")
        print(plan.fits, plan.steps)

    Args:
        config: a YAML file, a dict of the same shape, or a RunConfig.
        overrides: "train.learning_rate=2e-4", as `--set`.
        device_memory: of the GPU that will train, as "80GiB"; None is this machine's.
        strategy: of several processes: ddp, fsdp2 or zero3.
        processes: how many train together, one for each GPU.
        quiet: print nothing.

    Raises:
        ConfigError, DataError: what the run would refuse.
    """
    settings = _settings(config, overrides)

    from dude_peft.evaluation.in_training import TasksOfRun
    from dude_peft.planning.run import plan as made

    return made(
        settings,
        device_memory=device_memory,
        strategy=strategy,
        processes=processes,
        scorer_of=TasksOfRun,
        quiet=quiet,
    )


@checked
def compare(
    config: str | Path | Mapping[str, Any],
    *,
    output_dir: str | Path | None = None,
    jobs: int | None = None,
    engine: str = "local",
    address: str | None = None,
    controls: bool = False,
    max_runs: int | None = None,
    collect: bool = False,
    quiet: bool = True,
) -> Comparison:
    """Compare methods by a fair protocol: tuned on validation rows, tested once with fresh seeds.

        found = dude_peft.compare("grid.yaml")
        print(found.protocol["chosen"])

    Args:
        config: the grid: a YAML file, or a dict of the same shape.
        output_dir: replaces the grid's; the same call again goes on there.
        jobs: runs at a time, each in a process of its own; None is one, and with Ray as many as the cluster holds.
        engine: `local`, this machine, or `ray`, a Ray cluster whose nodes share the folder.
        address: of the Ray cluster: `auto`, `HOST:PORT`, `ray://HOST:PORT`, or `local` to start one here.
        controls: the methods that tell DuDe's claims apart compete too.
        max_runs: replaces the grid's.
        collect: run nothing; take what has ended.
        quiet: print nothing.

    Raises:
        ConfigError, DataError, ArtifactError, ResourceError: what is wrong with the grid, its rows or its folder.
        BusyError: another process compares in the folder.
        StoppedError: Ctrl-C or SIGTERM; the same call again goes on.
    """
    from dude_peft.config.reading import load_grid

    if not isinstance(config, (str, Path, Mapping)):
        raise ConfigError("config: give a YAML file, or a dict with its content")
    grid, run = load_grid(config, {"output_dir": None if output_dir is None else str(output_dir)})

    from dude_peft.comparison.run import compare as compared
    from dude_peft.reporting.run import page_of

    return compared(
        grid,
        run,
        jobs=jobs,
        engine=engine,
        address=address,
        controls=controls,
        max_runs=max_runs,
        collect=collect,
        quiet=quiet,
        write_page=page_of,
    )


@checked
def evaluate(
    name: str | Path,
    output: str | Path,
    *,
    tasks: Sequence[str] = (),
    data_dir: str | Path | None = None,
    text: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    chat_template: bool = False,
    special_tokens: str | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
    base: str | None = None,
    gguf_file: str | None = None,
    device_map: str | None = None,
    max_memory: Sequence[str] | None = None,
    overwrite: bool = False,
    quiet: bool = True,
) -> Evaluation:
    """Score an adapter and its base, or a model, with lm-evaluation-harness; the same call again resumes.

        found = dude_peft.evaluate("runs/mine/adapter", "scores", text="general.txt")
        print(found.text.loss, found.text.base_loss)

    Args:
        name: folder or hub id of an adapter or a model, or `package:NAME` of a model.
        output: folder of the results.
        tasks: gsm8k, mmlu, ..., any task of lm-eval, or its YAML.
        data_dir: local benchmark files; None is the hub.
        text: a file of general text: perplexity, and what was forgotten.
        limit: questions of each task: a seeded sample, stratified by subject.
        seed: of the sample and the intervals.
        chat_template: prompts through the chat template.
        special_tokens: what texts that spell them are: text, or allow; None is as in the training run.
        num_fewshot: examples in each prompt; None is each task's own.
        batch_size: sequences at a time; None finds it.
        base: base model of the adapter; None takes its own.
        gguf_file: the GGUF file that is the (base) model.
        device_map: `auto` spreads the model over GPUs, CPU and disk; a device has all of it; None is the fastest one.
        max_memory: the most that `auto` puts on a device, each as DEVICE=SIZE; None is what is free.
        overwrite: replace finished results; their answers are used again.
        quiet: print nothing.

    Raises:
        ConfigError, DataError, ArtifactError, NumericsError, ResourceError, BusyError: see errors.py.
    """
    from dude_peft.evaluation.options import EvalOptions
    from dude_peft.evaluation.run import evaluate as scored
    from dude_peft.model.load import require_known

    require_known(str(name))

    options = EvalOptions(
        tuple(tasks), _path(data_dir), limit, seed, chat_template, num_fewshot, batch_size, _path(text), special_tokens
    )
    return scored(
        str(name),
        options,
        Path(output),
        base=base,
        gguf_file=gguf_file,
        device_map=device_map,
        max_memory=max_memory,
        overwrite=overwrite,
        quiet=quiet,
    )


@checked
def report(
    folder: str | Path, output: str | Path, *, to: str = "html", overwrite: bool = False, quiet: bool = True
) -> Page:
    """Write a page about a run, an evaluation or a comparison: one file that needs no network and runs no script.

        page = dude_peft.report("runs/mine", "page.html")
        print(page.answer[0])

    Args:
        folder: of the run, the evaluation or the comparison.
        output: the file to write.
        to: html, md for the same as Markdown, or csv for every number.
        overwrite: replace an existing file.
        quiet: print nothing.

    Raises:
        ConfigError: no such form, or an output that cannot be used.
        ArtifactError: the folder is none of the three, not finished, or damaged.
        ResourceError: disk or permission.
    """
    from dude_peft.reporting.run import report as made

    return made(Path(folder), Path(output), to=to, overwrite=overwrite, quiet=quiet)


def _settings(
    config: RunSource, overrides: Sequence[str], options: Mapping[str, str | Path | None] | None = None
) -> RunConfig:
    from dude_peft.config.reading import load_config
    from dude_peft.config.schema import RunConfig

    if not isinstance(config, (str, Path, Mapping, RunConfig)):
        raise ConfigError("config: give a YAML file, a dict with its content, or a RunConfig")
    source = config.model_dump(mode="json", exclude_unset=True) if isinstance(config, RunConfig) else config
    given = {key: None if value is None else str(value) for key, value in (options or {}).items()}
    return load_config(source, list(overrides), given)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
