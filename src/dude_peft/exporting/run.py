"""`dude merge` and `dude export` from start to end: check, write, prove, and only then show."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_peft.artifact.durable import disk_errors, refuse_existing, whole_folder
from dude_peft.artifact.json_text import json_text
from dude_peft.errors import ConfigError, NumericsError
from dude_peft.installing import install
from dude_peft.kinds import checked
from dude_peft.model.load import require_known
from dude_peft.show import shown
from dude_peft.task_types import CAUSAL, SCORES
from dude_peft.terminal.display import Display
from dude_peft.terminal.html import table
from dude_peft.terminal.next_steps import tell_next
from dude_peft.terminal.quiet import quiet_imports

if TYPE_CHECKING:
    from dude_peft.exporting.adapter import SavedAdapter
    from dude_peft.exporting.base import Base
    from dude_peft.exporting.check import Difference, Live
    from dude_peft.exporting.scores import ScoreDifference
    from dude_peft.tuner.combine import Combination

_DTYPES = ("keep", "float32", "bfloat16", "float16")
_RECORD = "dude_export.json"
_LARGEST_WEIGHT = 1000.0


@dataclass(frozen=True)
class Export:
    """What was written, and what was proved of it."""

    path: Path
    record: dict[str, Any]
    """The content of its dude_export.json."""

    def _repr_html_(self) -> str:
        return table(str(self.path), [(name, json_text(value)) for name, value in self.record.items()])


@dataclass(frozen=True)
class Target:
    """What `--to` says."""

    kind: str
    """merged, peft, lora or gguf."""
    rank: int | None = None
    """lora: K; None looks for the smallest that reaches --max-kl."""
    quantisation: str = "F16"
    """gguf."""


def parse_target(text: str) -> Target:
    """merged, peft, lora:K, lora:auto, gguf or gguf:TYPE.

    Raises:
        ConfigError: it is none of these.
    """
    kind, colon, detail = text.partition(":")
    if kind == "lora" and re.fullmatch(r"0|[1-9][0-9]{0,5}|auto", detail):
        return Target(kind, None if detail == "auto" else int(detail))
    if kind == "gguf" and (detail or not colon):
        return Target(kind, quantisation=detail or "F16")
    if kind in ("merged", "peft") and not colon:
        return Target(kind)
    raise ConfigError(f"--to {shown(text)!r}: choose merged, peft, lora:K (such as lora:16), lora:auto or gguf:TYPE")


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
    require_known(str(adapter))
    target = parse_target(to)
    if target.kind == "lora" and target.rank is None and (max_kl is None or not verify):
        raise ConfigError(
            "--to lora:auto needs --max-kl, such as --max-kl 0.01: it finds the smallest rank that stays below it"
        )
    if target.kind in ("peft", "lora") and dtype != "keep":
        raise ConfigError(f"--dtype works with merged and gguf only; {target.kind} keeps the adapter's float32")
    settings = _Settings(Path(output), dtype, verify, max_kl, allow_base_mismatch, quiet)
    return _Export(settings, [str(adapter)], [1.0], base, gguf_file).run(target, None)


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
        weights: w_i, from -1000 to 1000; None is 1 for each.
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
    adapters = [adapters] if isinstance(adapters, (str, Path)) else adapters
    for adapter in adapters:
        require_known(str(adapter))
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if not adapters or len(weights) != len(adapters):
        raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights: give one --weight for each adapter")
    places = [os.path.abspath(adapter) for adapter in adapters]
    twice = next((adapter for adapter, place in zip(adapters, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ConfigError(f"adapter {shown(twice, 300)} is listed twice; list it once, with the sum of its weights")
    absurd = next((weight for weight in weights if not abs(weight) <= _LARGEST_WEIGHT), None)  # nan is absurd too
    if absurd is not None:
        raise ConfigError(
            f"--weight {shown(absurd, 20)}: the largest weight is {_LARGEST_WEIGHT:g}; 1 adds the change as it was "
            "trained"
        )
    settings = _Settings(Path(output), dtype, verify, None, allow_base_mismatch, quiet)
    with quiet_imports():
        from dude_peft.exporting.foreign import open_foreign
        from dude_peft.exporting.foreign_merge import merge_foreign
        from dude_peft.tuner.combine import Combination

        foreign = [adapter for adapter in map(open_foreign, adapters) if adapter is not None]
    if foreign:
        plain = len(adapters) == 1 and weights == [1.0] and combination == "linear" and dtype == "keep"
        if not plain or gguf_file is not None or allow_base_mismatch:
            raise ConfigError(f"{foreign[0].method} is merged by PEFT, alone and as it is; leave other options out")
        refuse_existing(settings.output)
        display = Display(quiet=quiet)
        made = merge_foreign(foreign[0], settings.output, base, verify=verify, display=display)
        display.say(f"written: {shown(output, None)}")
        tell_next(display, ["chat", str(output)])
        return Export(settings.output, made)
    how = Combination(combination, density, seed)
    export = _Export(settings, list(map(str, adapters)), weights, base, gguf_file)
    merged = export.run(Target("merged"), how)
    if export.weighted[0].adapter.config.task_type != SCORES:  # a reward model writes nothing
        tell_next(export.display, ["chat", str(output)])
    return merged


def _check_task(adapter: SavedAdapter, target: Target) -> None:
    """The command reads and proves language models and reward models; a head of another task is merged in memory."""
    task = adapter.config.task_type
    if task == SCORES and target.kind in ("gguf", "lora"):
        raise ConfigError(
            f"--to {target.kind}: adapter {shown(adapter.folder, 300)} is a reward model, and what reads {target.kind} "
            "files runs language models alone; use --to merged or --to peft"
        )
    if task == SCORES and adapter.labels("score") != 1:
        raise ConfigError(
            f"adapter {shown(adapter.folder, 300)} is for {shown(task)} without a head 'score' of one label, which "
            "reward models have; in Python, use load_adapter(model, adapter).merge_and_unload()"
        )
    if task not in (None, CAUSAL, SCORES):
        raise ConfigError(
            f"adapter {shown(adapter.folder, 300)} is for {shown(task)}, but merge and export write causal language "
            "models and reward models; in Python, use load_adapter(model, adapter).merge_and_unload()"
        )


@dataclass(frozen=True)
class _Settings:
    output: Path
    dtype: str
    verify: bool
    max_kl: float | None
    allow_base_mismatch: bool
    quiet: bool


class _Export:
    def __init__(
        self, settings: _Settings, adapters: list[str], weights: list[float], base: str | None, gguf_file: str | None
    ) -> None:
        if settings.dtype not in _DTYPES:
            raise ConfigError(f"dtype {shown(settings.dtype)}: choose {', '.join(_DTYPES)}")
        if settings.max_kl is not None and not 0 <= settings.max_kl < float("inf"):
            raise ConfigError(f"max_kl {settings.max_kl}: give a number of nats, at least 0")
        refuse_existing(settings.output)
        self.settings, self.adapters, self.weights = settings, adapters, weights
        self.base_name, self.gguf_file = base, gguf_file
        self.display = Display(quiet=settings.quiet)
        self.live: Live | None = None

    def run(self, target: Target, combination: Combination | None) -> Export:
        started = time.perf_counter()
        output = self.settings.output
        with quiet_imports():
            import torch

            from dude_peft.exporting.adapter import open_adapter
            from dude_peft.exporting.base import open_base, source_of
            from dude_peft.exporting.foreign import open_foreign
            from dude_peft.exporting.merge import Weighted
            from dude_peft.exporting.tokenizer import tokenizer_change
            from dude_peft.tuner.combine import Combination
        self.dtype = None if self.settings.dtype == "keep" else getattr(torch, self.settings.dtype)
        self.combination = combination or Combination()
        if foreign := next(filter(None, map(open_foreign, self.adapters)), None):
            raise ConfigError(
                f"{foreign.method} is an adapter of stock PEFT already, and dude export has no other form of it; use "
                "dude merge"
            )
        opened = [open_adapter(path) for path in self.adapters]
        for adapter in opened:
            _check_task(adapter, target)
            if adapter.config.task_type == SCORES and self.settings.max_kl is not None:
                raise ConfigError("--max-kl compares next tokens, and a reward model gives scores; leave it out")
        self.weighted = [Weighted(adapter, w) for adapter, w in zip(opened, self.weights, strict=True)]
        source = source_of(opened[0], self.base_name, self.gguf_file)
        if target.kind == "gguf":
            target = self._checked_gguf(target)
        with disk_errors(output), whole_folder(output) as folder:
            scratch = folder / ".work"
            scratch.mkdir()
            with open_base(source, scratch, opened) as base:
                if base.dtype is not None and self.dtype is None:
                    self.dtype = getattr(torch, base.dtype)  # what the dense weights are rounded to, once
                for adapter in opened:
                    if changed := tokenizer_change(adapter.folder, base.folder):
                        self.display.warn(f"{shown(adapter.folder, 300)} was trained with another tokenizer: {changed}")
                    if adapter.writing is not None:
                        told = ", ".join(f"{name}: {shown(value)}" for name, value in adapter.writing.items())
                        self.display.warn(
                            f"{shown(adapter.folder, 300)} was trained with {told}, which the export does not say; "
                            "prompt it in the same way, as with dude chat --template"
                        )
                made = self._make(target, base, folder, scratch)
                record = self._record(target, base, folder, made)
            shutil.rmtree(scratch)
        self.display.say(f"{time.perf_counter() - started:.0f} s in all")
        self.display.say(f"written: {shown(output, None)}")
        return Export(output, record)

    def _checked_gguf(self, target: Target) -> Target:
        from dude_peft.exporting.to_gguf import check_gguf

        name = check_gguf(target.quantisation)
        if self.settings.verify and importlib.util.find_spec("llama_cpp") is None:
            how = install("llama-cpp-python")
            raise ConfigError(f"reading a GGUF file back needs llama-cpp-python: {how}, or add --no-verify")
        return Target(target.kind, quantisation=name)

    def _make(self, target: Target, base: Base, folder: Path, scratch: Path) -> dict[str, Any]:
        from dude_peft.exporting.merge import layers_of

        self.layers = layers_of(base, self.weighted)
        self._check_stacks(target)
        if target.kind in ("peft", "lora"):
            self._check_stock(base, target)
        self._check_base(base)
        if target.kind == "merged":
            self._merge(base, folder)
            return self._prove("merged", folder, base, scratch)
        if target.kind == "peft":
            from dude_peft.exporting.plain import write_stock

            adapter = self.weighted[0].adapter
            write_stock(adapter, folder, base.source.name_or_path, base.model)
            if (
                base.quantization is not None
                and base.quantization["config"].get("load_in_8bit")
                and adapter.config.spec.normalised
            ):
                self.display.warn(
                    "stock PEFT runs this adapter over int8 weights on GPUs alone: on a CPU its second forward fails, "
                    "for it has lost the scales"
                )
            return self._prove("peft", folder, base, scratch)
        if target.kind == "lora":
            return self._lora(target, base, folder, scratch)
        return self._gguf(target, base, folder, scratch)

    def _check_stock(self, base: Base, target: Target) -> None:
        from dude_peft.tuner.stock_loading import stock_refusal

        adapter = self.weighted[0].adapter
        config = replace(adapter.config, method="lora") if target.kind == "lora" else adapter.config
        layers = [name for name in adapter.base if name not in adapter.stacks]
        if refusal := stock_refusal(base.model, config.stock(), layers):
            raise ConfigError(f"{refusal}; use --to merged")

    def _check_stacks(self, target: Target) -> None:
        """What cannot be done with experts."""
        self.is_loaded = any(weighted.adapter.loaded for weighted in self.weighted)
        others = [name for w in self.weighted for name in w.adapter.base if w.adapter.is_other(name)]
        if target.kind == "lora" and others:
            raise ConfigError(
                f"--to lora: '{shown(others[0], 200)}' is no linear layer, and no program serves a LoRA of it that we "
                "know; use --to merged"
            )
        if not self.is_loaded:
            return
        if self.settings.dtype != "keep" or not self.combination.by_rows:
            raise ConfigError(
                "experts and convolutions are merged as they are stored, and added up; leave --dtype and other "
                "combinations out"
            )

    def _check_base(self, base: Base) -> None:
        from dude_peft.exporting.adapter import check_names
        from dude_peft.exporting.merge import check_base, check_shapes

        for weighted in self.weighted:
            check_names(weighted.adapter, [name for name, _ in base.model.named_modules() if name])
        with self.display.waiting("checking the base weights"):
            problem = check_base(base, self.layers)
        if problem is None:
            return
        if not self.settings.allow_base_mismatch:
            raise problem
        check_shapes(self.layers)
        self.display.warn(f"{problem} (allowed; the export records it)")

    def _merge(self, base: Base, folder: Path) -> None:
        from dude_peft.artifact.companions import own_code
        from dude_peft.exporting.merge import plan_merge, write_merge

        if self.is_loaded:
            from dude_peft.exporting.in_memory import write_in_memory

            allowed = self.settings.allow_base_mismatch
            with self.display.waiting("merging in memory"):
                write_in_memory(base, self.weighted, folder, allow_base_mismatch=allowed)
            return
        plan = plan_merge(base, self.layers, self.weighted, self.dtype, self.combination)
        total = sum(len(pieces) for pieces in plan.files.values())
        self.display.say(f"{len(self.layers)} layers to merge, {total} tensors, {plan.size / 2**20:,.0f} MiB")
        if code := own_code(base.folder):
            self.display.warn(
                f"the base model's own Python code is not copied ({shown(', '.join(code), 300)}): transformers' own "
                "classes can load the merged model"
            )
        with self.display.stage("merging", total) as advance:
            write_merge(plan, base, self.weighted, folder, self.dtype, lambda: advance(1))

    def _lora(self, target: Target, base: Base, folder: Path, scratch: Path) -> dict[str, Any]:
        from dude_peft.exporting.lowrank import check_rank, write_lora
        from dude_peft.exporting.serving import SERVED_RANKS

        adapter = self.weighted[0].adapter
        smallest = min(min(layer.shape) for layer in self.layers.values())
        fitting = [rank for rank in SERVED_RANKS if rank <= smallest]
        ranks = fitting if target.rank is None else [target.rank]
        if not ranks:
            raise ConfigError(
                f"--to lora:auto: a layer of the model has rank {smallest}, but servers support no rank below 8"
            )
        for rank in ranks:
            check_rank(rank, self.layers, adapter)
            with self.display.stage(f"rank {rank}", len(self.layers)) as advance:
                fits = write_lora(adapter, base, self.layers, rank, folder, lambda: advance(1))
            worst, mean = min(fits, key=lambda fit: fit.captured), statistics.mean(fit.captured for fit in fits)
            self.display.say(
                f"rank {rank}: captured energy of the change {100 * mean:.2f} % on average, at worst "
                f"{100 * worst.captured:.2f} % ({shown(worst.layer)})"
            )
            try:
                made = self._prove("lora", folder, base, scratch)
            except NumericsError as error:
                if target.rank is not None or rank == ranks[-1]:
                    raise
                self.display.say(f"rank {rank}: {error}")
                continue
            return {**made, "rank": rank, "captured": {fit.layer: fit.captured for fit in fits}}
        raise AssertionError("unreachable")

    def _gguf(self, target: Target, base: Base, folder: Path, scratch: Path) -> dict[str, Any]:
        from dude_peft.exporting.to_gguf import convert

        merged, name = scratch / "merged", target.quantisation
        merged.mkdir()
        self._merge(base, merged)
        file = folder / f"model-{name}.gguf"
        with self.display.waiting(f"converting to {name}"):
            convert(merged, file, name)
        return {**self._prove("gguf", file, base, scratch, name), "quantisation": name}

    def _prove(self, kind: str, export: Path, base: Base, scratch: Path, quantisation: str = "") -> dict[str, Any]:
        """Compare with the live adapter; a NumericsError above tolerance, and the export is gone."""
        if not self.settings.verify:
            self.display.warn("not verified: --no-verify")
            return {"verified": False}
        from dude_peft.exporting.check import record, run_consumer, summary
        from dude_peft.model.load import locate

        live = self._live(base, scratch)
        if kind == "gguf" and live.sees:
            self.display.warn("compared on text alone: a GGUF file of this kind has no vision tower")
        source = base.source
        origin: dict[str, Any] = {"where": locate(source), "gguf_file": source.gguf_file, "revision": source.revision}
        # The adapter's; of an adapter on several, the checkpoint's own, or what `load_model` makes of a GGUF file.
        own = None if source.dtype == "auto" else source.dtype
        origin["dtype"] = base.dtype or own or (None if source.gguf_file is None else "float32")
        origin["quantization"] = base.quantization
        origin["pad_token_id"] = self.weighted[0].adapter.padding
        with self.display.waiting("running the export in a fresh process"):
            found = run_consumer("peft" if kind == "lora" else kind, export, live, origin, scratch)
        self.display.say(summary(found))
        self._judge(kind, found, quantisation, own)
        return {"verified": True, "difference": record(found)}

    def _live(self, base: Base, scratch: Path) -> Live:
        from dude_peft.exporting.check import run_live
        from dude_peft.model.processor import own_processor

        if self.live is None:
            own = self.weighted[0].adapter.folder if len(self.weighted) == 1 else base.folder
            tokenizers = [folder for folder in (own, base.folder) if (folder / "tokenizer_config.json").is_file()]
            tokenizer = str(tokenizers[0]) if tokenizers else None
            adapters = [{"path": str(w.adapter.folder.absolute()), "weight": w.weight} for w in self.weighted]
            if not self.combination.by_rows:
                adapters = []
            with self.display.waiting("running the live adapter"):
                self.live = run_live(
                    base.source.model_dump(),
                    adapters,
                    tokenizer,
                    self.settings.allow_base_mismatch,
                    scratch,
                    base.quantization,
                    base.task_type,
                    own_processor(own),
                )
            if self.live.blind:
                self.display.warn(f"compared on text alone: {shown(self.live.blind, 300)}")
        return self.live

    def _judge(self, kind: str, found: Difference | ScoreDifference, quantisation: str, live: str | None) -> None:
        from dude_peft.exporting.check import beyond_rounding
        from dude_peft.exporting.scores import ScoreDifference

        if not self.combination.by_rows:
            self.display.warn(
                f"{self.combination.kind} cannot be run live: the numbers compare the export with the base model"
            )
            return
        if isinstance(found, ScoreDifference):
            found.check(self._dtypes(live))
            return
        limit, what = self.settings.max_kl, "above --max-kl"
        if limit is None and kind == "lora":
            limit, what = found.kl_tuned_base, "no nearer to the adapter than the base model is"
        if limit is None:
            if fault := beyond_rounding(found, self._dtypes(live), quantisation):
                raise NumericsError(f"the export's {fault}; choose a wider --dtype or type")
            return
        kl = found.kl_tuned_export
        if self.settings.max_kl is not None and found.with_image is not None:
            kl = max(kl, found.with_image.kl_tuned_export)
        if kl > limit:
            hint = "choose a larger rank" if kind == "lora" else "choose a wider --dtype or type"
            raise NumericsError(
                f"the export's mean KL(tuned || export) is {kl:.1e} nats a token, {what} ({limit:.1e}); {hint}"
            )

    def _dtypes(self, live: str | None) -> set[Any]:
        """Those of the computation and of the stored weights."""
        import torch

        from dude_peft.artifact.header import DTYPES

        stored = {DTYPES[layer.stored.dtype] for layer in self.layers.values()}
        stored |= {getattr(torch, w.adapter.base[name]["dtype"]) for w in self.weighted for name in w.adapter.loaded}
        stored |= set() if self.dtype is None else {self.dtype}
        return stored | (set() if live is None else {getattr(torch, live)})

    def _record(self, target: Target, base: Base, folder: Path, made: dict[str, Any]) -> dict[str, Any]:
        """What was done, beside the files: people and the model card read it."""
        from dude_peft.artifact.durable import replace_file
        from dude_peft.artifact.json_text import json_text
        from dude_peft.exporting.card import CARD, model_card, report_of
        from dude_peft.version import __version__

        content = {
            "dude_version": __version__,
            "to": target.kind,
            "base": base.source.name_or_path,
            "adapters": [
                {
                    "method": w.adapter.config.method,
                    "r": w.adapter.config.r if w.adapter.config.spec.ranked else None,
                    "weight": w.weight,
                }
                for w in self.weighted
            ],
            "combination": self.combination.kind,
            "base_mismatch_allowed": self.settings.allow_base_mismatch,
            **made,
        }
        replace_file(folder / _RECORD, (json_text(content, indent=1) + "\n").encode())
        adapter = self.weighted[0].adapter
        report = report_of(adapter.folder.absolute(), self.display.warn)
        card = model_card(adapter, report, content, place=str(self.settings.output))
        replace_file(folder / CARD, card.encode())
        return content
