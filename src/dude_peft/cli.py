"""The command `dude`: arguments in, one call, and errors as one line with an exit code. No logic lives here.

Nothing heavy is imported before a command runs, so that `dude --help` and a misspelt key answer at once.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import dude_peft
from dude_peft.errors import ConfigError, DudeError, ResourceError, StoppedError
from dude_peft.machine.out_of_memory import comes_of_memory
from dude_peft.machine.processes import LAUNCHED, LOST, comes_of_another, is_launched
from dude_peft.show import shown, shown_lines
from dude_peft.terminal.numbers import integer, number, numbers
from dude_peft.terminal.quiet import require_room
from dude_peft.version import __version__


def _whole(*names: str, help: str) -> Any:
    """An option that takes a whole number."""
    return typer.Option(*names, parser=integer, help=help)


def _decimal(*names: str, help: str) -> Any:
    """An option that takes a number."""
    return typer.Option(*names, parser=number, help=help)


class _Commands(TyperGroup):
    """Typer ends silently on Ctrl-C; every way out of `dude` has its line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise StoppedError(signal.SIGINT, "stopped by Ctrl-C") from None


app = typer.Typer(
    name="dude",
    cls=_Commands,
    help="DuDe: fine-tune language models through a trained magnitude and a principal low-rank direction.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dude {__version__}")
        raise typer.Exit


@app.callback()
def _dude(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: dude train run.yaml --set train.max_steps=80")
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="File of the run, or builtin:quickstart.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a key, as in train.max_steps=80. Repeat it."),
    ] = None,
    output_dir: Annotated[str | None, typer.Option("--output-dir", metavar="DIR", help="Replace output_dir.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew in an output folder that is not empty.")
    ] = False,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Resume from a checkpoint's weights alone, where the rest is lost.")
    ] = False,
    trainer: Annotated[
        str | None, typer.Option("--trainer", help="Replace train.trainer: transformers or trl.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option("--launch", metavar="ddp|fsdp2|zero3", help="Train in several processes.")
    ] = None,
    processes: Annotated[
        int | None, _whole("--processes", help="Number of processes for --launch; default: one for each GPU.")
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Write page.html about the run at its end.")] = True,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fine-tune a language model, and measure it before and after. The same command again resumes."""
    from dude_peft.machine.launch import launch_if_first, number_of

    if strategy is None:
        number_of(strategy, processes)
    else:
        from dude_peft.config.reading import load_config

        # A mistake is told before processes start.
        load_config(config, overrides, {"output_dir": output_dir, "train.trainer": trainer})
        launch_if_first(strategy, processes)
    dude_peft.train(
        config,
        overrides or (),
        output_dir=output_dir,
        trainer=trainer,
        overwrite=overwrite,
        weights_only=weights_only,
        strategy=strategy or "ddp",
        page=page,
        quiet=False,
    )


@app.command(epilog="Example: dude plan run.yaml")
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="File of the run, or builtin:quickstart.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a key, as in train.max_steps=80. Repeat it."),
    ] = None,
    device_memory: Annotated[
        str | None,
        typer.Option(
            "--device-memory",
            metavar="SIZE",
            help="Memory of the GPU that will train, as 80GiB; default: this machine's.",
        ),
    ] = None,
    strategy: Annotated[
        str | None, typer.Option("--launch", metavar="ddp|fsdp2|zero3", help="Plan a run in several processes.")
    ] = None,
    processes: Annotated[
        int | None, _whole("--processes", help="Number of processes for --launch; default: one for each GPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Check a run, and show the memory, disk and steps that it needs, without loading weights.

    With --launch the memory is of each process.
    """
    from dude_peft.artifact.json_text import json_text
    from dude_peft.machine.launch import number_of
    from dude_peft.terminal.display import Display
    from dude_peft.terminal.next_steps import tell_next

    count = number_of(strategy, processes)
    made = dude_peft.plan(
        config,
        overrides or (),
        device_memory=device_memory,
        strategy=strategy or "ddp",
        processes=count,
        quiet=as_json,
    )
    if as_json:
        typer.echo(json_text(made.as_dict(), indent=2))
    made.check()
    sets = [word for override in overrides or [] for word in ("--set", override)]
    launch = [] if strategy is None else ["--launch", strategy, "--processes", str(count)]
    tell_next(Display(quiet=as_json), ["train", str(config), *sets, *launch])


@app.command(epilog="Example: dude compare grid.yaml --jobs 2")
def compare(
    config: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="File of the comparison.")],
    output_dir: Annotated[str | None, typer.Option("--output-dir", metavar="DIR", help="Replace output_dir.")] = None,
    jobs: Annotated[
        int | None, _whole(help="Runs at a time. The default is 1; with Ray, as many as the cluster holds.")
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="Where the runs compute: local, or ray, a cluster that shares the folder.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option("--address", metavar="A", help="Of the Ray cluster: auto, HOST:PORT, ray://HOST:PORT.")
    ] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Let the methods compete that tell DuDe's claims apart.")
    ] = False,
    max_runs: Annotated[int | None, _whole(help="Replace max_runs, the most runs that the grid may take.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the runs, their time (three steps are timed) and disk.")
    ] = False,
    print_commands: Annotated[
        bool, typer.Option("--print-commands", help="Print a command for each run that can start now; run nothing.")
    ] = False,
    one: Annotated[
        str | None,
        typer.Option("--run", metavar="NAME", help="Do one run of the comparison, as --print-commands has it."),
    ] = None,
    collect: Annotated[bool, typer.Option("--collect", help="Run nothing; take what has ended.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compare methods: tuned on validation rows, tested once. The same command again goes on."""
    from dude_peft import api
    from dude_peft.comparison.engine import check_engine
    from dude_peft.config.reading import load_grid

    if sum((dry_run, print_commands, one is not None, collect)) > 1:
        raise ConfigError("--dry-run, --print-commands, --run and --collect: give one of them")
    check_engine(engine, address, jobs)
    if engine != "local" and (dry_run or print_commands or one is not None or collect):
        raise ConfigError(
            f"--engine {engine}: --dry-run, --print-commands, --run and --collect use no engine; leave it out"
        )
    try:
        if not (dry_run or print_commands or one):
            found = api.compare(
                config,
                output_dir=output_dir,
                jobs=jobs,
                engine=engine,
                address=address,
                controls=controls,
                max_runs=max_runs,
                collect=collect,
                quiet=False,
            )
            found.check()
            return
        grid, run = load_grid(config, {"output_dir": output_dir})

        from dude_peft.comparison import by_hand

        options: dict[str, Any] = {"jobs": jobs or 1, "controls": controls, "max_runs": max_runs}
        if dry_run:
            by_hand.dry_run(grid, run, **options)
        elif one:
            by_hand.run_one(grid, run, one, controls=controls, max_runs=max_runs)
        else:
            for line in by_hand.commands(grid, run, str(config), output_dir=output_dir, **options):
                typer.echo(line)
    except KeyboardInterrupt:
        raise StoppedError(signal.SIGINT, "stopped by Ctrl-C; run the same command again, it goes on") from None


@app.command(epilog="Example: dude methods --model MODEL --r 8")
def methods(
    method: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="One method, with all that is known of it; default: all."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="M", help="Count this model's numbers: a folder, a hub id or package:NAME."),
    ] = None,
    r: Annotated[int, _whole("--r", "-r", help="Rank of the change.")] = 16,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, names separated by commas, or a regular expression.")
    ] = "all-linear",
    gguf_file: Annotated[
        str | None, typer.Option("--gguf-file", help="Name of the GGUF file, if the model is one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compare the methods: what each trains, keeps and computes, and when to take it. No weights are read."""
    from dude_peft.artifact.json_text import json_text
    from dude_peft.init.options import module_names

    made = dude_peft.method_table(
        model,
        method=method,
        r=r,
        target_modules=module_names(target_modules) or "all-linear",
        gguf_file=gguf_file,
        quiet=as_json,
    )
    if as_json:
        typer.echo(json_text(made.as_dict(), indent=2))


@app.command(epilog="Example: dude doctor")
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Show what is installed, what this machine has, and what works here."""
    from dude_peft.doctor.run import doctor as run_doctor

    run_doctor(as_json=as_json)


config_app = typer.Typer(help="The configuration of a run.", no_args_is_help=True)
app.add_typer(config_app, name="config")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a run's configuration, for editors."""
    import json

    from dude_peft.config.explain import schema

    typer.echo(json.dumps(schema(), indent=2))


@config_app.command("explain", epilog="Example: dude config explain train.learning_rate")
def config_explain(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="A key, as train.learning_rate, or a section.")
    ] = None,
) -> None:
    """Show what a key means, what it takes, and its default. Without a key, show them all."""
    from dude_peft.config.explain import choices, explain

    for name, values, default, meaning in explain(key):
        typer.echo(f"{name}: {meaning}\n    takes {values}; default {default}")
    for line in choices(key):
        typer.echo(f"    {line}")


_Objective = Annotated[
    str, typer.Option(help="As train.objective: sft, grpo; for pairs dpo, orpo, cpo, reward; for labels kto.")
]
_Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="OURS=THEIRS", help="Name of a column in your data, as in data.columns. Repeat it."
    ),
]


def _columns(pairs: list[str] | None) -> dict[str, str]:
    found = dict(pair.partition("=")[::2] for pair in pairs or [])
    if len(found) < len(pairs or []):
        raise ConfigError("--column: the same name is given twice; keep one")
    return found


@config_app.command("new", epilog="Example: dude config new mine.jsonl --model MODEL -o run.yaml")
def config_new(
    source: Annotated[str, typer.Argument(metavar="FILE_OR_ID", help="The training rows: a file or a hub id.")],
    model: Annotated[
        str, typer.Option("--model", metavar="M", help="The model to train: a folder, a hub id or package:NAME.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="RUN.yaml", help="File to write; default: standard output.")
    ] = None,
    gguf_file: Annotated[
        str | None, typer.Option("--gguf-file", help="Name of the GGUF file, if the model is one.")
    ] = None,
    columns: _Columns = None,
    objective: _Objective = "sft",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write the configuration of a run on your rows, after reading them."""
    from dude_peft.training.new_config import new_config

    named = _columns(columns)
    text = new_config(source, model, gguf_file=gguf_file, columns=named, objective=objective, output=output)
    if output is None:
        typer.echo(text, nl=False)


data_app = typer.Typer(help="The rows of a run.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("check", epilog="Example: dude data check mine.jsonl --model MODEL")
def data_check(
    source: Annotated[str, typer.Argument(metavar="FILE_OR_ID", help="A file, builtin:word-problems, or a hub id.")],
    model: Annotated[str, typer.Option("--model", metavar="M", help="The model whose tokenizer reads the rows.")],
    gguf_file: Annotated[
        str | None, typer.Option("--gguf-file", help="Name of the GGUF file, if the model is one.")
    ] = None,
    test: Annotated[
        str | None, typer.Option("--test", metavar="FILE_OR_ID", help="Held-out rows, or a share: 0.1.")
    ] = None,
    columns: _Columns = None,
    seed: Annotated[int, _whole(help="Seed of a share, as data.seed.")] = 0,
    template: Annotated[str, typer.Option(help="auto, chat or plain, as data.template.")] = "auto",
    chat_template: Annotated[
        str | None,
        typer.Option("--chat-template", metavar="FILE.jinja", help="Your own chat template, as data.chat_template."),
    ] = None,
    max_length: Annotated[int, _whole(help="Longest row, in tokens.")] = 512,
    special_tokens: Annotated[str, typer.Option(help="text or allow, as data.special_tokens.")] = "text",
    train_on: Annotated[str, typer.Option(help="answers, last_answer or all, as data.train_on.")] = "answers",
    upft: Annotated[int | None, _whole(help="Train this many first tokens of each answer, as data.upft.")] = None,
    objective: _Objective = "sft",
    stages: Annotated[
        Any,
        typer.Option(
            parser=numbers, metavar="N", help="Show stages by length, as train.curriculum.stages: 3, or 64,128,512."
        ),
    ] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Keep no copy of a hub data set on this disk, as data.streaming.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Show which tokens of a data set are trained, and what is left out. No weights are read."""
    how: dict[str, Any] = {"template": template, "special_tokens": special_tokens, "train_on": train_on}
    how |= {"columns": _columns(columns), "seed": seed, "max_length": max_length, "upft": upft}
    how["chat_template"] = chat_template
    how["objective"] = objective
    how["stages"] = stages
    how["streaming"] = streaming
    try:
        dude_peft.check_data(source, model, gguf_file=gguf_file, test=test, quiet=False, **how)
    except KeyboardInterrupt:
        raise StoppedError(signal.SIGINT, "stopped by Ctrl-C; nothing was kept, start the command again") from None


@app.command(epilog="Example: dude init MODEL -o start --r 16")
def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder with safetensors weights, or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="ADAPTER", help="Folder for the adapter.")],
    method: Annotated[str, typer.Option(help="dude, dora, pissa, lora, ...; dude methods lists them.")] = "dude",
    r: Annotated[int, _whole("--r", "-r", help="Rank of the change.")] = 16,
    lora_alpha: Annotated[float, _decimal(help="The change is scaled by lora_alpha / r.")] = 16,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, names separated by commas, or a regular expression.")
    ] = "all-linear",
    exclude_modules: Annotated[str | None, typer.Option(help="Modules to leave out, written the same way.")] = None,
    rank_pattern: Annotated[str | None, typer.Option(help="Ranks of single layers: '{\"q_proj\": 8}'.")] = None,
    alpha_pattern: Annotated[str | None, typer.Option(help="Alphas of single layers, written the same way.")] = None,
    svd_tol: Annotated[float, _decimal(help="Relative gain at which the SVD stops; 0: a full SVD.")] = 1e-3,
    svd_seed: Annotated[int, _whole(help="Seed of the SVD, and of random directions.")] = 0,
    seed: Annotated[int, _whole(help="Seed of LoRA's random start (lora, dora, rslora, ...).")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Data type of the model in use: auto, float32, bfloat16, float16.")
    ] = "auto",
    workers: Annotated[int | None, _whole(help="Number of processes; default: the cores, at most 4.")] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="nf4 or int8: quantise each weight without its factors, and write it to --residual."),
    ] = None,
    residual: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="Folder for the quantised model of --quantize.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing adapter.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write the start of an adapter, also for a model larger than the memory. The same command again resumes."""
    from dude_peft.init.fold import fold
    from dude_peft.init.options import int_if_whole, module_names, pattern
    from dude_peft.init.run import initialise

    settings = {
        "method": method,
        "r": r,
        "lora_alpha": int_if_whole(lora_alpha),
        "target_modules": module_names(target_modules),
        "exclude_modules": module_names(exclude_modules),
        "rank_pattern": pattern("--rank-pattern", rank_pattern),
        "alpha_pattern": pattern("--alpha-pattern", alpha_pattern),
        "svd_tol": svd_tol,
        "svd_seed": svd_seed,
    }
    try:
        if quantize is not None or residual is not None:
            fold(model, output, residual, settings, quantize, dtype=dtype, workers=workers, overwrite=overwrite)
            return
        initialise(model, output, settings, dtype=dtype, seed=seed, workers=workers, overwrite=overwrite, debug=debug)
    except KeyboardInterrupt:
        message = "stopped by Ctrl-C; run the same command again to resume"
        raise StoppedError(signal.SIGINT, message) from None


_Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or hub id of the adapter.")]
_Output = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="A new folder.")]
_Base = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="Base model; default: the adapter's own.")]
_GgufFile = Annotated[str | None, typer.Option("--gguf-file", help="Name of the GGUF file, if the model is one.")]
_Dtype = Annotated[str, typer.Option(help="Data type of the merged weights: keep, float32, bfloat16 or float16.")]
_Verify = Annotated[
    bool,
    typer.Option("--verify/--no-verify", help="Run prompts in a fresh process, and compare with the live adapter."),
]
_Mismatch = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="Accept a base model with other weights. The output says so.")
]
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command(epilog="Example: dude export runs/mine/adapter --to lora:16 -o lora-16")
def export(
    adapter: _Adapter,
    to: Annotated[str, typer.Option("--to", help="merged, peft, lora:K, lora:auto or gguf:TYPE.")],
    output: _Output,
    base: _Base = None,
    gguf_file: _GgufFile = None,
    dtype: _Dtype = "keep",
    verify: _Verify = True,
    max_kl: Annotated[
        float | None,
        _decimal("--max-kl", help="Largest mean KL(tuned || export), in nats a token."),
    ] = None,
    allow_base_mismatch: _Mismatch = False,
    debug: _Debug = False,
) -> None:
    """Write an adapter for another program, and compare it with the live adapter."""
    dude_peft.export(
        adapter,
        to,
        output,
        base=base,
        gguf_file=gguf_file,
        dtype=dtype,
        verify=verify,
        max_kl=max_kl,
        allow_base_mismatch=allow_base_mismatch,
        quiet=False,
    )


@app.command(epilog="Example: dude merge runs/mine/adapter -o merged")
def merge(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Folders or hub ids. All have the same base model.")
    ],
    output: _Output,
    weight: Annotated[
        list[float] | None,
        _decimal("--weight", help="Weight of each adapter's change, in their order; default: 1."),
    ] = None,
    combination: Annotated[
        str, typer.Option(help="linear, ties, dare_linear, dare_ties or magnitude_prune.")
    ] = "linear",
    density: Annotated[float | None, _decimal(help="Share of entries to keep; for all but linear.")] = None,
    seed: Annotated[int, _whole(help="Seed of dare_*.")] = 0,
    base: _Base = None,
    gguf_file: _GgufFile = None,
    dtype: _Dtype = "keep",
    verify: _Verify = True,
    allow_base_mismatch: _Mismatch = False,
    debug: _Debug = False,
) -> None:
    """Merge adapters into their base model, shard by shard, with little memory."""
    dude_peft.merge(
        adapters,
        output,
        weights=weight or None,
        combination=combination,
        density=density,
        seed=seed,
        base=base,
        gguf_file=gguf_file,
        dtype=dtype,
        verify=verify,
        allow_base_mismatch=allow_base_mismatch,
        quiet=False,
    )


@app.command(epilog="Example: dude verify runs/mine/adapter")
def verify(
    adapter: _Adapter,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Compare this base model with that of the training."),
    ] = None,
    gguf_file: _GgufFile = None,
    debug: _Debug = False,
) -> None:
    """Check an adapter's files, and show what it is and which program can run it."""
    dude_peft.verify(adapter, base=base, gguf_file=gguf_file, quiet=False)


@app.command(epilog="Example: dude upload runs/mine/adapter OWNER/NAME --dry-run upload")
def upload(
    adapter: _Adapter,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    folder: Annotated[
        Path | None, typer.Option("--dry-run", metavar="FOLDER", help="Write there what would be sent; send nothing.")
    ] = None,
    debug: _Debug = False,
) -> None:
    """Send an adapter to the hub, verified, with its model card."""
    from dude_peft.model.load import require_known

    require_known(adapter)
    from dude_peft.exporting.upload import upload as run_upload

    run_upload(adapter, repository, private=private, folder=folder)


_Speaker = Annotated[str, typer.Argument(metavar="ADAPTER_OR_MODEL", help="A folder, a hub id, or package:NAME.")]
_Template = Annotated[str | None, typer.Option(help="auto, chat or plain; default: as in the training run.")]
_SpecialTokens = Annotated[
    str | None, typer.Option(help="text or allow, as data.special_tokens; default: as in the training run.")
]
_Temperature = Annotated[float, _decimal(help="0: the likeliest token. Above 0: a random draw.")]
_TopP = Annotated[float, _decimal("--top-p", help="Draw from the likeliest tokens with this total probability.")]
_Seed = Annotated[int, _whole(help="Seed of the draw.")]


_DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        metavar="MAP",
        help="auto: spread the model over GPUs, CPU and disk; or a device, cpu or cuda:0. Default: the fastest one.",
    ),
]
_MaxMemory = Annotated[
    list[str] | None,
    typer.Option("--max-memory", metavar="DEVICE=SIZE", help="Of --device-map auto, as 0=20GiB. Repeat it."),
]


@app.command(epilog="Example: dude chat runs/mine/adapter --compare")
def chat(
    name: _Speaker,
    base: _Base = None,
    gguf_file: _GgufFile = None,
    device_map: _DeviceMap = None,
    max_memory: _MaxMemory = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Let the base model answer too.")] = False,
    template: _Template = None,
    special_tokens: _SpecialTokens = None,
    max_new_tokens: Annotated[int, _whole(help="Longest answer, in tokens.")] = 512,
    temperature: _Temperature = 0.0,
    top_p: _TopP = 1.0,
    seed: _Seed = 0,
    debug: _Debug = False,
) -> None:
    """Talk to an adapter or a model, at a terminal or through a pipe."""
    from dude_peft.model.load import require_known

    require_known(name)
    from dude_peft.chat.talk import chat as run_chat

    try:
        run_chat(
            name,
            base=base,
            gguf_file=gguf_file,
            device_map=device_map,
            max_memory=max_memory,
            system=system,
            compare=compare,
            template=template,
            special_tokens=special_tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
    except KeyboardInterrupt:
        raise StoppedError(signal.SIGINT, "the chat was ended by Ctrl-C") from None


@app.command(epilog='Example: dude generate runs/mine/adapter "Why is the sky blue?"')
def generate(
    name: _Speaker,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="Prompts; without any, lines of standard input.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file", metavar="DATA", help="File of prompts: .txt, one on each line, or rows as for dude train."
        ),
    ] = None,
    limit: Annotated[int | None, _whole(help="Only this many prompts of --file, from the first.")] = None,
    columns: _Columns = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.jsonl", help="File to write; default: standard output."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    base: _Base = None,
    gguf_file: _GgufFile = None,
    device_map: _DeviceMap = None,
    max_memory: _MaxMemory = None,
    base_too: Annotated[bool, typer.Option("--base-too", help="Add the base model's completion.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="No template: continue the text as it is.")] = False,
    as_rows: Annotated[
        bool, typer.Option("--as-rows", help="Write rows for dude train: prompt and completion only.")
    ] = False,
    keep: Annotated[
        str | None,
        typer.Option(help="Of these rows only the correct ones: those with the final answer of the file's row."),
    ] = None,
    samples: Annotated[int, _whole(help="Completions of each prompt; above 1, set --temperature.")] = 1,
    template: _Template = None,
    special_tokens: _SpecialTokens = None,
    batch_size: Annotated[int, _whole(help="Prompts in one batch.")] = 8,
    max_new_tokens: Annotated[int, _whole(help="Longest completion, in tokens.")] = 256,
    temperature: _Temperature = 0.0,
    top_p: _TopP = 1.0,
    seed: _Seed = 0,
    debug: _Debug = False,
) -> None:
    """Continue prompts in batches. Each gives one line of JSON: {prompt, completion, finish}."""
    try:
        found = dude_peft.generate(
            name,
            prompts or [],
            file=file,
            limit=limit,
            columns=_columns(columns),
            output=output,
            overwrite=overwrite,
            base=base,
            gguf_file=gguf_file,
            device_map=device_map,
            max_memory=max_memory,
            template=template,
            special_tokens=special_tokens,
            raw=raw,
            base_too=base_too,
            as_rows=as_rows,
            keep=keep,
            samples=samples,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            quiet=False,
        )
        if output is None:
            sys.stdout.buffer.write(found.lines())  # UTF-8 whatever the terminal's encoding is
            sys.stdout.flush()
    except KeyboardInterrupt:
        message = "stopped by Ctrl-C; " + (
            "nothing was written" if output is None else "run the same command again, it goes on"
        )
        raise StoppedError(signal.SIGINT, message) from None


@app.command("eval", epilog="Example: dude eval runs/mine/adapter --tasks gsm8k -o scores")
def evaluate(
    name: _Speaker,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Folder of the results; the same command again resumes there."
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option("--tasks", metavar="NAME,...", help="gsm8k, mmlu, any other task of lm-eval, or a task's YAML."),
    ] = "",
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", metavar="DIR", help="Folder of local benchmark files; default: the hub."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="General text, to measure what was forgotten.")
    ] = None,
    processes: Annotated[
        int | None,
        _whole("--processes", help="Divide the questions among processes, one for each GPU; default: 1."),
    ] = None,
    limit: Annotated[int | None, _whole(help="At most this many questions of each task, a seeded sample.")] = None,
    seed: Annotated[int, _whole(help="Seed of the sample and the intervals.")] = 0,
    chat_template: Annotated[bool, typer.Option("--chat", help="Send prompts through the chat template.")] = False,
    special_tokens: _SpecialTokens = None,
    num_fewshot: Annotated[int | None, _whole(help="Examples in each prompt; default: the task's own number.")] = None,
    batch_size: Annotated[int | None, _whole(help="Sequences in one batch; default: found automatically.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Compute finished results again, from their stored answers.")
    ] = False,
    base: _Base = None,
    gguf_file: _GgufFile = None,
    device_map: _DeviceMap = None,
    max_memory: _MaxMemory = None,
    debug: _Debug = False,
) -> None:
    """Score an adapter and its base by lm-evaluation-harness. The same command again resumes."""
    from dude_peft.evaluation.options import EvalOptions
    from dude_peft.machine.launch import launch_if_first

    names = tuple(part.strip() for part in tasks.split(",") if part.strip())
    if processes is not None:
        # A mistake is told before processes start.
        from dude_peft.model.load import require_known

        require_known(name)
        EvalOptions(names, data_dir, limit, seed, chat_template, num_fewshot, batch_size, text, special_tokens)
        launch_if_first("ddp", processes)
    try:
        dude_peft.evaluate(
            name,
            output,
            tasks=names,
            data_dir=data_dir,
            text=text,
            limit=limit,
            seed=seed,
            chat_template=chat_template,
            special_tokens=special_tokens,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            base=base,
            gguf_file=gguf_file,
            device_map=device_map,
            max_memory=max_memory,
            overwrite=overwrite,
            quiet=False,
        )
    except KeyboardInterrupt:
        message = "stopped by Ctrl-C; run the same command again to resume"
        raise StoppedError(signal.SIGINT, message) from None


@app.command(epilog="Example: dude report runs/mine -o page.html")
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a run, an evaluation or a comparison.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")],
    to: Annotated[
        str, typer.Option("--to", help="html (one file, without network), md, or csv (every number).")
    ] = "html",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    debug: _Debug = False,
) -> None:
    """Write a page about a run, an evaluation or a comparison. It begins with the result in words."""
    from dude_peft import api

    api.report(folder, output, to=to, overwrite=overwrite, quiet=False)


def main() -> None:
    """Runs the command and exits with its code."""
    debug = "--debug" in sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows only ASCII must not end a run
    light = sys.argv[1:2] in ([], ["config"]) or {"--help", "--version"} & set(sys.argv)
    try:
        if not light:
            require_room()
            is_launched()  # a place among processes that no launcher gave is refused
        code = app(standalone_mode=False)
        if code == 128 + signal.SIGINT:  # typer's own way out, before a command has begun
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        _fail(StoppedError.label, "stopped by Ctrl-C", 128 + signal.SIGINT, debug=False)
    except Exception as error:
        _end(error, debug=debug)
    sys.exit(code if isinstance(code, int) else 0)


def _end(error: Exception, *, debug: bool) -> None:
    """The line and the exit code of an error."""
    if not isinstance(error, ResourceError) and comes_of_memory(error):
        message = "out of memory; use a smaller model or batch (train.per_device_train_batch_size), or another machine"
        _fail(ResourceError.label, message, ResourceError.exit_code, debug=debug)
    if isinstance(error, DudeError):
        _fail(error.label, str(error), error.exit_code, debug=debug)
    if comes_of_another(error):
        if LAUNCHED in os.environ and not debug:
            sys.exit(LOST)
        _fail(DudeError.label, "another process of this run ended; its message tells why", LOST, debug=debug)
    if hasattr(error, "format_message"):  # typer's own: an option or argument that it cannot use
        _usage(error, debug=debug)
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk is full ({shown(error)}); free some space"
            _fail(ResourceError.label, message, ResourceError.exit_code, debug=debug)
        if error.errno == errno.ENAMETOOLONG:
            message = f"a name is longer than the file system allows: {shown(error.filename, 40)}; use a shorter one"
            _fail(ConfigError.label, message, ConfigError.exit_code, debug=debug)
    if isinstance(error, ImportError):
        from dude_peft.parents import refusal_of

        if (refusal := refusal_of(error)) is not None:
            _fail(refusal.label, str(refusal), refusal.exit_code, debug=debug)
    hint = "" if debug else " (run again with --debug for the traceback)"
    _fail(DudeError.label, f"{type(error).__name__}: {error}{hint}", DudeError.exit_code, debug=debug)


def _usage(error: Any, *, debug: bool) -> None:
    context = getattr(error, "ctx", None)
    command = "dude" if context is None else context.command_path
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())
        sys.exit(ConfigError.exit_code)
    if getattr(error, "possibilities", None) == ["--help"]:
        error.possibilities = []  # click takes it for what --lr meant
    example = getattr(getattr(context, "command", None), "epilog", None)
    hint = _key_of(error, command) or (f"{example[:1].lower()}{example[1:]}; " if example else "")
    message = f"{error.format_message().rstrip('.')}; {hint}{command} --help lists the options"
    _fail(ConfigError.label, message, ConfigError.exit_code, debug=debug)


def _key_of(error: Any, command: str) -> str:
    """The key of the configuration that somebody wrote as an option, as other tools take it."""
    unknown = getattr(error, "option_name", None) if not getattr(error, "possibilities", None) else None
    if unknown is None or not command.endswith((" train", " plan")):
        return ""
    from dude_peft.config.reading import closest_key

    key = closest_key((unknown.lstrip("-").replace("-", "_"),))
    return f"for a key of the run: --set {key}=VALUE; " if key else ""


def _fail(label: str, message: str, code: int, *, debug: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient Ctrl-C must not take the line and the exit code
    if debug:
        print(shown_lines(traceback.format_exc()), end="", file=sys.stderr)
    # One line whatever the message holds: foreign text must neither break it nor reach the terminal as commands.
    print(f"dude: error[{label}]: {shown(' '.join(message.split()), None)}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(code)


if __name__ == "__main__":
    main()
