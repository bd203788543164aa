"""Everything the command does, as functions with its options: they return typed results and print nothing unless asked.

`dude` calls these. Each imports what it needs when it is called, so that the command stays fast.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from dude_peft.doors import require_place
from dude_peft.errors import ConfigError
from dude_peft.kinds import checked

if TYPE_CHECKING:
    from dude_peft.chat.generate import Completions
    from dude_peft.comparison.outcome import Comparison
    from dude_peft.config.schema import RunConfig
    from dude_peft.evaluation.record import Evaluation
    from dude_peft.exporting.run import Export
    from dude_peft.exporting.verify import Verification
    from dude_peft.folder.record import RunReport
    from dude_peft.planning.method_table import MethodTable
    from dude_peft.planning.report import Plan
    from dude_peft.reporting.run import Page
    from dude_peft.training.data_check import DataReport

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
    from dude_peft.training.run import run

    return run(
        settings,
        overwrite=overwrite,
        weights_only=weights_only,
        strategy=strategy,
        scorer_of=TasksOfRun,
        card_of=card_of_run,
        quiet=quiet,
    )


@checked
def plan(
    config: RunSource, overrides: Sequence[str] = (), *, device_memory: str | None = None, quiet: bool = True
) -> Plan:
    """Check a run, and estimate the memory, disk and steps that it will need; no weights are read.

        plan = dude_peft.plan("run.yaml")
        print(plan.fits, plan.steps)

    Args:
        config: a YAML file, a dict of the same shape, or a RunConfig.
        overrides: "train.learning_rate=2e-4", as `--set`.
        device_memory: of the GPU that will train, as "80GiB"; None is this machine's.
        quiet: print nothing.

    Raises:
        ConfigError, DataError: what the run would refuse.
    """
    settings = _settings(config, overrides)

    from dude_peft.evaluation.in_training import TasksOfRun
    from dude_peft.planning.run import plan as made

    return made(settings, device_memory=device_memory, scorer_of=TasksOfRun, quiet=quiet)


@checked
def compare(
    config: str | Path | Mapping[str, Any],
    *,
    output_dir: str | Path | None = None,
    jobs: int = 1,
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
        jobs: runs at a time, each in a process of its own.
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

    return compared(grid, run, jobs=jobs, controls=controls, max_runs=max_runs, collect=collect, quiet=quiet)


@checked
def check_data(
    source: str | os.PathLike[str],
    model: str,
    *,
    gguf_file: str | None = None,
    test: str | float | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    template: str = "auto",
    max_length: int = 512,
    special_tokens: str = "text",
    train_on: str = "answers",
    upft: int | None = None,
    quiet: bool = True,
) -> DataReport:
    """Show what a run would learn from a data set: examples with the trained tokens marked, and what is left out.

        report = dude_peft.check_data("mine.jsonl", "my-model", test=0.1)
        print(report.examples, report.left_out)

    Args:
        source: a file, `builtin:word-problems`, or a hub id.
        model: whose tokenizer reads it, as in a run's configuration.
        gguf_file: the GGUF file in it, where it is one.
        test: held-out rows to compare, or a share of the rows, as 0.1.
        columns: what the data calls its columns, as data.columns.
        seed: which rows a share takes.
        template: auto, chat or plain.
        max_length: tokens that an example may have.
        special_tokens: text or allow, as data.special_tokens.
        train_on: answers, last_answer or all.
        upft: tokens of each answer that are trained, as data.upft.
        quiet: print nothing.

    Raises:
        DataError: rows that cannot be trained on.
        ConfigError: a wrong option, tokenizer or template.
        ResourceError: the cache cannot be written.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError("source: rows are read from a file; write them into a .jsonl file, one JSON object a line")

    from dude_peft.training.data_check import check

    return check(
        str(source),
        model,
        gguf_file=gguf_file,
        test=None if test is None else str(test),
        columns=columns,
        seed=seed,
        template=template,
        max_length=max_length,
        special_tokens=special_tokens,
        train_on=train_on,
        upft=upft,
        quiet=quiet,
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
        overwrite: replace finished results; their answers are used again.
        quiet: print nothing.

    Raises:
        ConfigError, DataError, ArtifactError, NumericsError, ResourceError, BusyError: see errors.py.
    """
    require_place(str(name))
    from dude_peft.evaluation.options import EvalOptions
    from dude_peft.evaluation.run import evaluate as scored

    options = EvalOptions(
        tuple(tasks), _path(data_dir), limit, seed, chat_template, num_fewshot, batch_size, _path(text), special_tokens
    )
    return scored(str(name), options, Path(output), base=base, gguf_file=gguf_file, overwrite=overwrite, quiet=quiet)


@checked
def generate(
    name: str | Path,
    prompts: Sequence[str] = (),
    *,
    file: str | Path | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    base: str | None = None,
    gguf_file: str | None = None,
    base_too: bool = False,
    raw: bool = False,
    as_rows: bool = False,
    samples: int = 1,
    template: str | None = None,
    special_tokens: str | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    quiet: bool = True,
) -> Completions:
    """Continue prompts in batches; returns a list of {prompt, completion, finish}, in order.

        for record in dude_peft.generate("runs/mine/adapter", ["What is 2 + 3?"], max_new_tokens=16):
            print(record["completion"])

    Args:
        name: folder or hub id of an adapter or a model, or `package:NAME` of a model.
        prompts: the prompts; without any, and without a file, they are lines of standard input.
        file: prompts: .txt, one a line, or rows as `train` reads them.
        limit: the first prompts of the file only.
        columns: what the file calls its columns, as data.columns.
        output: JSON lines are written there too; the same call again resumes.
        overwrite: replace an output that is there.
        base: base model of the adapter; None takes its own.
        gguf_file: the GGUF file that is the (base) model.
        base_too: add the base model's completion.
        raw: no template: continue the text as it is.
        as_rows: rows that `train` reads: prompt and completion alone.
        samples: completions of each prompt; needs a temperature.
        template: auto, chat or plain; None is as in the training run.
        special_tokens: what texts that spell them are: text, or allow; None is as in the training run.
        batch_size: prompts at a time.
        max_new_tokens: tokens of one completion at most.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: draw from the likeliest tokens of this probability.
        seed: of the drawing.
        quiet: print nothing.

    Raises:
        ConfigError, DataError, ArtifactError, NumericsError, ResourceError: see errors.py.
    """
    require_place(str(name))
    from dude_peft.chat.generate import generate as generated

    return generated(
        str(name),
        [prompts] if isinstance(prompts, str) else prompts,
        file=None if file is None else str(file),
        limit=limit,
        columns=columns,
        output=_path(output),
        overwrite=overwrite,
        base=base,
        gguf_file=gguf_file,
        base_too=base_too,
        raw=raw,
        as_rows=as_rows,
        samples=samples,
        template=template,
        special_tokens=special_tokens,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        quiet=quiet,
    )


@checked
def merge(
    adapters: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    combination: str = "linear",
    density: float | None = None,
    seed: int = 0,
    base: str | None = None,
    gguf_file: str | None = None,
    dtype: str = "keep",
    verify: bool = True,
    allow_base_mismatch: bool = False,
    quiet: bool = True,
) -> Export:
    """Write W0 + sum_i w_i (W'_i - W0) as a plain model, and check that it does what the live adapters do.

        made = dude_peft.merge("runs/mine/adapter", "merged")
        print(made.path)

    Args:
        adapters: folder or hub id of one, or several on one base model.
        output: folder that is made; nothing is there unless everything went well.
        weights: w_i; None is 1 for each.
        combination: linear, ties, dare_linear, dare_ties or magnitude_prune.
        density: share of entries that those but linear keep.
        seed: of what dare_* drops.
        base: base model; None takes the first adapter's own.
        gguf_file: the GGUF file that is the base model.
        dtype: keep, float32, bfloat16 or float16.
        verify: run prompts in a fresh process and compare with the live adapters.
        allow_base_mismatch: take a base with other weights; the model is then marked.
        quiet: print nothing.

    Raises:
        ConfigError, ArtifactError, NumericsError, ResourceError: see errors.py.
    """
    names = [adapters] if isinstance(adapters, (str, Path)) else adapters
    for name in names:
        require_place(str(name))
    from dude_peft.exporting.run import merge as merged

    return merged(
        names,
        output,
        weights=weights,
        combination=combination,
        density=density,
        seed=seed,
        base=base,
        gguf_file=gguf_file,
        dtype=dtype,
        verify=verify,
        allow_base_mismatch=allow_base_mismatch,
        quiet=quiet,
    )


@checked
def export(
    adapter: str | Path,
    to: str,
    output: str | Path,
    *,
    base: str | None = None,
    gguf_file: str | None = None,
    dtype: str = "keep",
    verify: bool = True,
    max_kl: float | None = None,
    allow_base_mismatch: bool = False,
    quiet: bool = True,
) -> Export:
    """Write an adapter for another program, and check that it does what the live adapter does.

        made = dude_peft.export("runs/mine/adapter", "lora:8", "lora-8")
        print(made.path, made.record)

    Args:
        adapter: folder or hub id.
        to: merged, peft, lora:K, lora:auto or gguf:TYPE.
        output: folder that is made; nothing is there unless everything went well.
        base: base model; None takes the adapter's own.
        gguf_file: the GGUF file that is the base model.
        dtype: of merged weights: keep, float32, bfloat16 or float16.
        verify: run prompts in a fresh process and compare.
        max_kl: mean KL(live || exported), nats a token, above which the export is refused.
        allow_base_mismatch: take a base with other weights; the export is then marked.
        quiet: print nothing.

    Raises:
        ConfigError, ArtifactError, NumericsError, ResourceError: see errors.py.
    """
    require_place(str(adapter))
    from dude_peft.exporting.run import export as exported

    return exported(
        str(adapter),
        to,
        output,
        base=base,
        gguf_file=gguf_file,
        dtype=dtype,
        verify=verify,
        max_kl=max_kl,
        allow_base_mismatch=allow_base_mismatch,
        quiet=quiet,
    )


@checked
def verify(
    adapter: str | Path, *, base: str | None = None, gguf_file: str | None = None, quiet: bool = True
) -> Verification:
    """Check every byte and number of an adapter, and show which programs can use it.

        found = dude_peft.verify("runs/mine/adapter", base="my-model")
        print(found.method, found.trained_numbers, found.base_compared)

    Args:
        adapter: folder or hub id.
        base: the model whose weights are compared with those of the training; None compares nothing.
        gguf_file: the GGUF file that is the base model.
        quiet: print nothing.

    Raises:
        ArtifactError: a file is damaged, edited, forged or not ours, or the base model is another one.
        NumericsError: NaN or Inf.
        ConfigError: the base model cannot be found.
    """
    require_place(str(adapter))
    from dude_peft.exporting.verify import verify as verified

    return verified(str(adapter), base=base, gguf_file=gguf_file, quiet=quiet)


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


@checked
def method_table(
    model: str | Path | None = None,
    *,
    r: int = 16,
    target_modules: str | Sequence[str] = "all-linear",
    quiet: bool = True,
) -> MethodTable:
    """Compare the methods: what each trains, keeps and computes, where it comes from, and when to take it.

        found = dude_peft.method_table("my-model", r=8)
        print({row.name: row.trained for row in found.rows})

    Args:
        model: a folder, a hub id or `package:NAME`, whose layers are counted; None gives formulas.
        r: rank.
        target_modules: the layers, as adapter.target_modules.
        quiet: print nothing.

    Raises:
        ConfigError: a model, rank or target that cannot be used.
    """
    from dude_peft.planning.method_table import method_table as made

    return made(None if model is None else str(model), r, target_modules, quiet=quiet)


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
