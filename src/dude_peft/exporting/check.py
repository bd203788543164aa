"""Whether an export does what the adapter does: both run the same prompts in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dude_peft.errors import ArtifactError, ConfigError, DataError, NumericsError, ResourceError
from dude_peft.exporting.scores import ScoreDifference, compare_scores
from dude_peft.measure.divergence import divergence
from dude_peft.show import shown
from dude_peft.task_types import CAUSAL, SCORES, TaskType

PROMPTS = (
    "The history of the city begins in the twelfth century, when merchants from the north built a bridge across the",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    if len(ordered) % 2:",
    "Question: A train leaves at 9:40 and arrives at 12:05. How many minutes does the trip take?\nAnswer: The trip",
    "Dear Ms. Ortega,\n\nthank you for your letter of 3 March. Regarding the invoice you mention, I would like to",
    "Wasser kocht auf Meereshöhe bei 100 Grad Celsius; auf hohen Bergen ist der Luftdruck geringer, und deshalb",
    'The following is a JSON object with the name, the year and the capital of a country: {"name": "Japan", "year":',
)
"""What every export is asked: prose, code, arithmetic, a letter, another language, a format."""

# Mean KL divergence, nats a token, above which more than rounding is at work: the largest that is believed, and what is
# never refused. benchmarks/export.py finds 1e-13 in float32 and 2e-5 in bfloat16 on small models, export_run.py more on
# a real one.
_BY_DTYPE = {torch.float32: (1e-6, 1e-8), torch.float16: (1e-3, 1e-5), torch.bfloat16: (5e-3, 1e-4)}
_BY_QUANTISATION = {"F32": (1e-6, 1e-8), "F16": (1e-3, 1e-4), "BF16": (5e-3, 1e-3), "Q8_0": (5e-2, 5e-2)}
_COARSE = (0.5, 0.5)
_OURS = {kind.exit_code: kind for kind in (ConfigError, DataError, ArtifactError, NumericsError, ResourceError)}
_LOST = 0.2  # of KL(tuned || base): what training did


def beyond_rounding(found: Difference, dtypes: set[torch.dtype], quantisation: str = "") -> str:
    """Why an export is another model than the adapter, as the end of a sentence; empty where rounding explains all.

    The prompt with an image is judged by itself too: beside six of text, few tokens have to do with a vision tower.

    Args:
        found: its difference.
        dtypes: those of the computation and of the stored weights.
        quantisation: of a GGUF file.
    """
    for part, where in ((found, ""), (found.with_image, " over the prompt with an image")):
        if part is None:
            continue
        limit = tolerance(dtypes, part.kl_tuned_base, quantisation)
        if part.kl_tuned_export > limit:
            return (
                f"mean KL(tuned || export) is {part.kl_tuned_export:.1e} nats a token{where}, more than rounding can "
                f"explain ({limit:.1e})"
            )
    return ""


def tolerance(dtypes: set[torch.dtype], kl_tuned_base: float, quantisation: str = "") -> float:
    """Mean KL that rounding alone may cause, and no more than a fifth of what training changed.

    Args:
        dtypes: those of the computation and of the stored weights.
        kl_tuned_base: mean KL(tuned || base).
        quantisation: of a GGUF file.
    """
    levels = [_BY_DTYPE[dtype] for dtype in dtypes if dtype in _BY_DTYPE] or [_BY_DTYPE[torch.float32]]
    if quantisation:
        levels.append(_BY_QUANTISATION.get(quantisation, _COARSE))
    largest, least = (max(level[side] for level in levels) for side in (0, 1))
    return min(largest, max(least, _LOST * kl_tuned_base))


@dataclass(frozen=True)
class Difference:
    """How far an export's outputs are from the live adapter's, over all tokens of all prompts."""

    logits: float
    """Largest |difference of logits| / largest |logit|."""
    kl_tuned_export: float
    """Mean KL(tuned || export), nats a token; `tuned` is the live adapter."""
    kl_tuned_export_worst: float
    """The largest of one token."""
    agreement: float
    """Share of tokens whose most likely next token is the same."""
    kl_tuned_base: float
    """Mean KL(tuned || base model): what training changed."""
    tokens: int
    with_image: Difference | None = None
    """The same over the prompt with an image alone; None where there is none."""


@dataclass(frozen=True)
class Live:
    """Outputs of the live adapter, on disk."""

    file: Path
    count: int
    """Prompts; those beyond `PROMPTS` have images."""
    tokenizer: str | None
    task_type: TaskType = CAUSAL
    blind: str = ""
    """Why a model that reads images was shown none."""

    @property
    def sees(self) -> bool:
        """Whether there is a prompt with an image."""
        return self.count > len(PROMPTS)


def run_live(
    source: dict[str, Any],
    adapters: Sequence[dict[str, Any]],
    tokenizer: str | None,
    allow_base_mismatch: bool,
    scratch: Path,
    quantization: dict[str, Any] | None = None,
    task_type: TaskType = CAUSAL,
    processor: str | None = None,
) -> Live:
    """Run the prompts through the base model with the adapters, in a process of its own.

    Args:
        source: fields of ModelSection.
        adapters: path and weight of each.
        tokenizer: folder of the base's tokenizer; None where it has none.
        allow_base_mismatch: take a base with other weights.
        scratch: folder for the outputs.
        quantization: how the base is quantised, if it is.
        task_type: which head the model has.
        processor: folder of the processor of images; None takes the base's.
    """
    file = scratch / "live.safetensors"
    request = {
        "source": source,
        "adapters": list(adapters),
        "tokenizer": tokenizer,
        "allow_base_mismatch": allow_base_mismatch,
        "quantization": quantization,
        "task_type": task_type,
        "processor": processor,
        "prompts": PROMPTS,
        "output": str(file),
    }
    _run([sys.executable, "-m", "dude_peft.exporting.live"], request, "the live adapter")
    with safetensors.safe_open(file, "pt") as found:
        count = sum(name.startswith("live.") for name in found.keys())  # noqa: SIM118  # no mapping
        return Live(file, count, tokenizer, task_type, found.metadata()["blind"])


def run_consumer(
    kind: str, export: Path, live: Live, base: dict[str, Any], scratch: Path
) -> Difference | ScoreDifference:
    """Load an export in a fresh process as its consumer does, without our package, and compare.

    Args:
        kind: merged (stock transformers), peft (stock PEFT), gguf (llama.cpp).
        export: the folder, or the GGUF file.
        live: outputs of the live adapter.
        base: for peft: where, gguf_file, revision, dtype, quantization of the base model.
        scratch: folder for the outputs.

    Raises:
        NumericsError: the export gives NaN or Inf, or reads the prompts otherwise.
        ResourceError: the process died.
    """
    file = scratch / "export.safetensors"
    count = len(PROMPTS) if kind == "gguf" else live.count  # llama.cpp reads text alone here
    request = {
        "kind": kind,
        "export": str(export),
        "base": base,
        "scores": live.task_type == SCORES,
        "ids": str(live.file),
        "count": count,
        "prompts": PROMPTS,
        "has_tokenizer": live.tokenizer is not None,
        "output": str(file),
    }
    _run([sys.executable, str(Path(__file__).with_name("consumer.py"))], request, f"the export ({kind})")
    ours, theirs = safetensors.torch.load_file(live.file), safetensors.torch.load_file(file)
    if live.task_type == SCORES:
        return compare_scores(ours, theirs, count)
    found = compare(ours, theirs, range(count))
    return replace(found, with_image=compare(ours, theirs, images)) if (images := range(len(PROMPTS), count)) else found


def compare(live: dict[str, Tensor], export: dict[str, Tensor], prompts: Sequence[int]) -> Difference:
    """The difference between `live.N` and `out.N` of these prompts, with `base.N` beside it."""
    largest = difference = worst = 0.0
    kl = kl_base = 0.0
    tokens = agreeing = 0
    for number in prompts:
        ours, theirs, base = live[f"live.{number}"], export[f"out.{number}"], live[f"base.{number}"]
        if ours.shape != theirs.shape:
            raise NumericsError(
                f"the export reads prompt {number} as {len(theirs)} tokens of {theirs.shape[1]}, the base model as "
                f"{len(ours)} of {ours.shape[1]}: its tokenizer or vocabulary differs"
            )
        if not _is_usable(ours):
            raise NumericsError(
                f"the live adapter itself gives NaN or Inf on prompt {number}; training diverged, use an earlier "
                "checkpoint"
            )
        if not _is_usable(theirs):
            raise NumericsError(f"the export gives NaN or Inf on prompt {number}; choose another --dtype")
        _check_ruled_out(ours, theirs, number)
        each = _kl(ours, theirs)
        kl, worst = kl + float(each.sum()), max(worst, float(each.max()))
        kl_base += float(_kl(ours, base).sum())
        allowed = ~ours.isneginf()
        largest = max(largest, float(ours[allowed].abs().max()))
        difference = max(difference, float((ours - theirs)[allowed].abs().max()))
        agreeing += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        tokens += len(ours)
    return Difference(difference / largest, kl / tokens, worst, agreeing / tokens, kl_base / tokens, tokens)


def summary(difference: Difference | ScoreDifference) -> str:
    """One line for people."""
    if isinstance(difference, ScoreDifference):
        return difference.summary()
    return (
        f"{difference.tokens} tokens: largest logit difference {difference.logits:.1e} of the largest logit, "
        f"KL(tuned || export) {difference.kl_tuned_export:.1e} nats a token (worst "
        f"{difference.kl_tuned_export_worst:.1e}), KL(tuned || base) {difference.kl_tuned_base:.1e}, "
        f"same next token {100 * difference.agreement:.1f} %{_summary_of_image(difference.with_image)}"
    )


def _summary_of_image(found: Difference | None) -> str:
    if found is None:
        return ""
    return (
        f"; of the {found.tokens} tokens with an image, KL(tuned || export) {found.kl_tuned_export:.1e}, "
        f"KL(tuned || base) {found.kl_tuned_base:.1e}"
    )


def record(difference: Difference | ScoreDifference) -> dict[str, float]:
    """The same as plain numbers."""
    return asdict(difference)


def _is_usable(logits: Tensor) -> bool:
    """Whether every row is a distribution: -inf rules a token out, as models do with unused vocabulary."""
    return bool(torch.isfinite(logits.amax(-1)).all())  # the largest is NaN where any is


def _check_ruled_out(ours: Tensor, theirs: Tensor, number: int) -> None:
    """Refuse an export that rules out (logit -inf) a token which the live adapter allows, or the other way round."""
    places = (ours.isneginf() != theirs.isneginf()).nonzero()
    if len(places):
        position, token = places[0].tolist()
        who = ("the live adapter", "the export")[bool(theirs[position, token].isneginf())]
        raise NumericsError(
            f"prompt {number}, position {position}: {who} is the only one that gives token {token} a logit of -inf, "
            f"one of {len(places)} such places; the export does not match the adapter"
        )


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of every row of logits, in float64: differences of 1e-9 count."""
    return divergence(p.double(), q.double()).clamp_min(0)


def _run(command: list[str], request: dict[str, Any], what: str) -> None:
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, errors="replace", env=environment
    )
    if done.returncode == 0:
        return
    if done.returncode < 0:
        raise ResourceError(
            f"{what} could not be run: its process was killed by signal {-done.returncode}, most often because memory "
            "ran out; use --no-verify here, and verify on a larger machine"
        )
    last = next((line for line in reversed(done.stderr.strip().splitlines()) if line.strip()), "no message")
    if (kind := _OURS.get(done.returncode)) is not None:
        raise kind(shown(last, None))
    raise ResourceError(f"{what} could not be loaded and run ({shown(last, 300)})")
