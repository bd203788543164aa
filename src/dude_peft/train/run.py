"""One run from configuration to result: check what can be checked, load, measure, train, measure again, save.

The order is the point: everything that needs no weights is checked first, so that a mistake costs seconds, and the
adapter is saved last of all that can go wrong. What needs torch is imported only after the first checks.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_peft.show import shown
from dude_peft.terminal.quiet import gathered_warnings, quiet_imports
from dude_peft.train.config import RunConfig
from dude_peft.train.config_file import dump_config
from dude_peft.train.identity import Identity
from dude_peft.train.picture import check_picture, loss_curve
from dude_peft.train.record import ADAPTER, CONFIG, PICTURE, Answer, RunFolder, RunReport, Score, save_adapter
from dude_peft.version import __version__

if TYPE_CHECKING:
    from dude_peft.data.encode import EncodedSet
    from dude_peft.data.rows import Row
    from dude_peft.train.checkpoint import Checkpoint
    from dude_peft.train.fit import Fit

_GGUF_NOTE = "the base weights are a GGUF file's, dequantised"


def run(config: RunConfig, *, overwrite: bool = False, weights_only: bool = False, quiet: bool = False) -> RunReport:
    """Fine-tunes as `config` says and fills `config.output_dir`, the adapter among it only if all went well.

    A run that was interrupted goes on from its newest checkpoint, bit by bit; one that is finished is only told of.

    Args:
        config: the run, for example from `load_config`.
        overwrite: start anew in an output folder that is not empty; foreign files in it stay.
        weights_only: start anew from the newest checkpoint's adapter, where the rest of the checkpoint is lost.
        quiet: print nothing.

    Raises:
        ConfigError: a setting, model or output folder that cannot be used, or the folder of another run.
        DataError: rows that cannot be trained on, or other rows than those that the run began with.
        ArtifactError: no checkpoint is whole, or the base model is another one.
        NumericsError: NaN or Inf, or a start that is not the base model.
        ResourceError: disk or memory.
        BusyError: another process runs in the folder.
        StoppedError: Ctrl-C or SIGTERM; a checkpoint is there.
    """
    check_picture()
    resolved = config.resolved()
    folder = RunFolder(config.output_dir, overwrite=overwrite)
    try:
        this = _Run(resolved, folder, weights_only=weights_only, quiet=quiet)
        with gathered_warnings(this.warn), this.stop.listening():
            return this.go()
    finally:
        folder.release()


@dataclass(frozen=True)
class _HeldOut:
    """The held-out rows, ready for scoring."""

    examples: list[dict[str, list[int]]]
    asked: list[Row]
    prompts: list[list[int]]


class _Run:
    def __init__(self, config: RunConfig, folder: RunFolder, *, weights_only: bool, quiet: bool) -> None:
        from dude_peft.train.progress import Display
        from dude_peft.train.stop import Stop

        self.config = config
        self.folder = folder
        self.display = Display(quiet=quiet)
        self.stop = Stop(self.display.warn)
        self.weights_only = weights_only
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self.data: dict[str, Any] = {}
        self.tokenizer: Any = None
        self.model: Any = None
        self.resumed: Checkpoint | None = None

    def go(self) -> RunReport:
        start = time.perf_counter()
        config, display = self.config, self.display
        display.say(f"DuDe {__version__}: {config.adapter.method} on {config.model.name_or_path}")
        with self._phase("checks"):
            from dude_peft.train.model import load_tokenizer, locate

            where = locate(config.model)
            if self.folder.earlier is not None:
                self.folder.earlier.check_config(config.model_dump(mode="json"))
            train, test = self._read_rows()
            if (finished := self._finished()) is not None:
                return finished
            self._find_checkpoint()
        with self._phase("imports"), quiet_imports():
            from dude_peft.train.fit import training_arguments
        with self._phase("tokenizer"):
            arguments = training_arguments(config.train, str(self.folder.path))
            self.tokenizer = load_tokenizer(config.model, where)
            examples, held_out = self._encode(train, test)
        self._load(where, examples, held_out, arguments.device)
        self._begin(arguments)

        before = None if self.resumed is None else self.folder.read_before()
        if before is None:
            with self.model.disable_adapter():
                before = self._score("before", held_out)
            if before is not None:
                self.folder.write_before(before)
        fitted = self._train(examples, [row.source for row in train], held_out, arguments)
        after = self._score("after", held_out)
        with self._phase("saving"):
            self._save(fitted, before, after)
        self.seconds["total"] = round(time.perf_counter() - start, 2)
        report = self._report(fitted, before, after)
        self.folder.write_report(report)

        if before and after:
            count = config.evaluation.samples
            display.samples(before.answers[:count], after.answers[:count])
            display.before_after(before, after)
        display.say(
            f"{fitted.steps} steps, {fitted.tokens:,} tokens, {fitted.tokens_per_second:,.0f} tokens/s in training; "
            f"{self.seconds['total']:.0f} s in all"
        )
        display.say(f"adapter: {self.folder.path / ADAPTER}")
        return report

    def _finished(self) -> RunReport | None:
        report = self.folder.finished()
        if report is not None:
            self.display.say(
                f"this run has ended: {report.steps} steps, adapter {self.folder.path / ADAPTER}; nothing is left to "
                "do (--overwrite starts anew)"
            )
        return report

    def _find_checkpoint(self) -> None:
        """Where training goes on, told apart before anything is loaded."""
        if self.folder.earlier is None:
            return
        if self.weights_only:
            return
        self.resumed = self.folder.checkpoints.newest(self.warn)
        if self.resumed is None:
            self.display.say("this run was interrupted before its first checkpoint; it starts again")
        else:
            self.display.say(f"going on from the checkpoint of step {self.resumed.step}")

    def _begin(self, arguments: Any) -> None:
        """From here on the folder is this run's."""
        self.folder.checkpoints.keep = self.config.train.save_total_limit
        hashes: dict[str, str] = {name: self.data[name]["sha256"] for name in ("train", "test") if name in self.data}
        environment = _environment(self.model.device, arguments.world_size)
        earlier = self.folder.earlier
        if self.resumed is not None and earlier is not None:
            if changes := earlier.differences(environment):
                self.warn(
                    f"this is not where the run began ({', '.join(changes)}): its numbers may differ in the last bits"
                )
            return
        identity = Identity(self.config.model_dump(mode="json"), hashes, environment)
        self.folder.begin(identity, self._adapter_to_load())

    def _read_rows(self) -> tuple[list[Row], list[Row]]:
        from dude_peft.data.rows import data_sha256, duplicates, load_rows, overlap

        data = self.config.data
        train = load_rows(data.train, split=data.train_split, limit=data.train_rows, seed=data.seed)
        test: list[Row] = []
        if self.config.evaluation.enabled and data.test is not None:
            test = load_rows(data.test, split=data.test_split, limit=data.test_rows, seed=data.seed)
        for name, rows in (("train", train), ("test", test)):
            if rows:
                self.data[name] = {"rows": len(rows), "sha256": data_sha256(rows), "duplicates": duplicates(rows)}
        if self.folder.earlier is not None:
            self.folder.earlier.check_data({name: found["sha256"] for name, found in self.data.items()})
        if count := duplicates(train):
            self.warn(f"{count} of {len(train)} training rows are repetitions")
        if count := overlap(train, test):
            self.warn(f"{count} of {len(test)} held-out rows ask what a training row asks: their score is memory")
        return train, test

    def _encode(self, train: list[Row], test: list[Row]) -> tuple[list[dict[str, list[int]]], _HeldOut | None]:
        from dude_peft.data.encode import encode, prompt_ids
        from dude_peft.data.template import Template

        data, evaluation = self.config.data, self.config.evaluation
        template = Template(self.tokenizer, data.template)
        self.data["template"] = template.kind
        encoded = encode(train, template, self.tokenizer, data.max_length)
        self._count("train", "training", encoded)
        if not test:
            return encoded.examples, None
        held_out = encode(test, template, self.tokenizer, data.max_length)
        self._count("test", "held-out", held_out)
        asked = test[: evaluation.rows]
        prompts = [prompt_ids(row, template, self.tokenizer) for row in asked]
        return encoded.examples, _HeldOut(held_out.examples, asked, prompts)

    def _count(self, name: str, kind: str, encoded: EncodedSet) -> None:
        counts = ("dropped", "truncated", "tokens", "trained_tokens", "longest")
        self.data[name] |= {count: getattr(encoded, count) for count in counts}
        if encoded.dropped:
            self.warn(
                f"{encoded.dropped} {kind} rows are longer than data.max_length {self.config.data.max_length} and "
                f"left out; the longest has {encoded.longest} tokens"
            )

    def _load(self, where: str, examples: list[dict[str, list[int]]], held_out: _HeldOut | None, device: Any) -> None:
        """Loads the model and puts the adapter on it, sure that the adapter changes nothing yet."""
        import peft
        import transformers

        from dude_peft import load_adapter
        from dude_peft.train.model import load_model
        from dude_peft.train.start import check_answers_fit, check_fits, check_start, probe

        config, display = self.config, self.display
        pad_id = int(self.tokenizer.pad_token_id)
        with self._phase("model"), display.waiting("loading the model"):
            model = load_model(config.model, where)
            check_fits(model, [*examples, *(held_out.examples if held_out else [])], self.tokenizer)
            if held_out is not None:
                check_answers_fit(model, held_out.prompts, config.evaluation.max_new_tokens)
            model.to(device)
            base = probe(model, examples, pad_id)
        if config.model.gguf_file:
            display.say(f"note: {_GGUF_NOTE}")
        with self._phase("adapter"), display.waiting("making the adapter"):
            transformers.set_seed(config.train.seed)
            adapter = self._adapter_to_load()
            if adapter is None:
                self.model = peft.get_peft_model(model, _adapter_config(config))
                check_start(base, probe(self.model, examples, pad_id))
            else:
                self.model = load_adapter(model, adapter, is_trainable=True)
                transformers.set_seed(config.train.seed)
        trainable, total = self.model.get_nb_trainable_parameters()
        start = (
            "the start equals the base model bit by bit" if adapter is None else f"started from {shown(adapter, 300)}"
        )
        display.say(
            f"{trainable:,} of {total:,} parameters train ({100 * trainable / total:.2f} %), on {len(examples):,} rows "
            f"of {self.data['train']['tokens']:,} tokens; {start}"
        )

    def _adapter_to_load(self) -> Path | None:
        """The adapter that training starts from; None for a fresh one."""
        if self.resumed is not None:
            return self.resumed.path / ADAPTER
        if self.weights_only and self.folder.earlier is not None:
            adapter = self.folder.checkpoints.newest_adapter()
            self.warn(
                f"only the adapter of {adapter.parent.name} is taken up: optimizer, schedule and order start anew"
            )
            return adapter
        return None

    def _train(
        self, examples: list[dict[str, list[int]]], sources: list[str], held_out: _HeldOut | None, arguments: Any
    ) -> Fit:
        from dude_peft.train.fit import Surroundings, fit

        settings = self.config.evaluation
        around = Surroundings(
            display=self.display,
            stop=self.stop,
            metrics=self.folder.metrics,
            checkpoints=self.folder.checkpoints,
            resumed=self.resumed,
            save_adapter=save_adapter,
            name_of=lambda row: sources[row],
            held_out_loss=None if held_out is None else lambda: self._held_out_loss(held_out),
            pad_id=int(self.tokenizer.pad_token_id),
        )
        with self._phase("training"):
            fitted = fit(self.model, examples, arguments, self.config, around)
        self.seconds["training"] = round(fitted.seconds, 2)
        if fitted.best_step is not None and settings.load_best_model_at_end and fitted.best_step != fitted.steps:
            self.display.say(f"the held-out loss was lowest at step {fitted.best_step}: that adapter is kept")
            best = self.folder.checkpoints.best(fitted.best_step)
            self.model.load_adapter(str(best), "default", is_trainable=True)
        return fitted

    def _held_out_loss(self, held_out: _HeldOut) -> float:
        from dude_peft.train.score import held_out_loss

        batch_size, pad_id = self.config.evaluation.batch_size, int(self.tokenizer.pad_token_id)
        return held_out_loss(self.model, held_out.examples, pad_id=pad_id, batch_size=batch_size)

    def _score(self, when: str, held_out: _HeldOut | None) -> Score | None:
        if held_out is None:
            return None
        from dude_peft.data.answers import expected_answer, is_match
        from dude_peft.train.score import complete, held_out_loss, wilson_interval

        settings = self.config.evaluation
        work = len(held_out.examples) + len(held_out.prompts)
        with self._phase(f"evaluation_{when}"), self.display.stage(f"held-out rows, {when}", work) as advance:
            loss = held_out_loss(
                self.model,
                held_out.examples,
                pad_id=int(self.tokenizer.pad_token_id),
                batch_size=settings.batch_size,
                advance=advance,
            )
            texts = complete(
                self.model,
                self.tokenizer,
                held_out.prompts,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                advance=advance,
            )
        answers = tuple(
            Answer(row.prompt[-1].content, expected_answer(row), text, is_match(text, row))
            for row, text in zip(held_out.asked, texts, strict=True)
        )
        right = sum(answer.right for answer in answers)
        return Score(loss, right, len(answers), wilson_interval(right, len(answers)), answers)

    def _save(self, fitted: Fit, before: Score | None, after: Score | None) -> None:
        config = self.config
        self.folder.save_adapter(self.model, self.tokenizer)
        self.folder.write(CONFIG, dump_config(config))
        steps, losses = zip(*fitted.curve, strict=True)
        held_out = [(0, before.loss)] if before else []
        held_out += fitted.held_out or ([(fitted.steps, after.loss)] if after else [])
        title = f"{config.adapter.method}, r = {config.adapter.r}, on {config.model.name_or_path}"
        self.folder.write(PICTURE, loss_curve(steps, losses, held_out, title))

    def _report(self, fitted: Fit, before: Score | None, after: Score | None) -> RunReport:
        config = self.config
        trainable, total = self.model.get_nb_trainable_parameters()
        return RunReport(
            method=config.adapter.method,
            seed=config.train.seed,
            config=config.model_dump(mode="json"),
            versions=_versions(),
            hardware=_hardware(self.model.device),
            model={
                "name_or_path": config.model.name_or_path,
                "class": type(self.model.get_base_model()).__name__,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "note": _GGUF_NOTE if config.model.gguf_file else "",
            },
            data=self.data,
            trainable_parameters=trainable,
            total_parameters=total,
            steps=fitted.steps,
            tokens=fitted.tokens,
            tokens_per_second=round(fitted.tokens_per_second, 1),
            before=before,
            after=after,
            seconds=self.seconds,
            warnings=self.warnings,
            best_step=fitted.best_step,
        )

    def warn(self, text: str) -> None:
        """Shows a warning and keeps it for the report."""
        self.warnings.append(text)
        self.display.warn(text)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)


def _adapter_config(config: RunConfig) -> Any:
    """The adapter section as PEFT takes it; its keys are `DudeConfig`'s own."""
    from dude_peft import DudeConfig

    return DudeConfig(**config.adapter.model_dump(), task_type="CAUSAL_LM")


def _environment(device: Any, processes: int) -> dict[str, Any]:
    """What the last bits of a run depend on."""
    return {"versions": _versions(), "hardware": _hardware(device), "processes": processes}


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "accelerate", "safetensors")
    found = {name: metadata.version(name) for name in names}
    return {"dude_peft": __version__, **found, "python": platform.python_version()}


def _hardware(device: Any) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
    }
