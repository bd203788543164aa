"""What happens around the steps of a run: lines of metrics, evaluation, the best adapter, an early end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import TrainerCallback
from typing_extensions import override

from dude_peft.artifact.json_text import json_text
from dude_peft.config.schema import HELD_OUT, EvaluationSection
from dude_peft.errors import NumericsError
from dude_peft.folder.checkpoint import BestAdapter, Checkpoint, Checkpoints
from dude_peft.folder.state import load_random_state, random_state, sharded_state, trained_state
from dude_peft.machine.stop import Stop
from dude_peft.measure.movement import movement
from dude_peft.parents import fits
from dude_peft.training.progress import Display
from dude_peft.training.task_scores import TaskScore, chosen_score

_OF_REWARDED = ("entropy", "reward", "reward_std", "frac_reward_zero_std")
"""What a line tells of answers with rewards. TRL's own trainer logs an entropy, too, which no resumed run repeats."""


@dataclass
class Best:
    """The best evaluation.metric_for_best_model so far, and since when it has not been better by much."""

    value: float = math.inf
    """The lower the better: the held-out loss, or a score with its sign turned."""
    step: int | None = None
    mark: float = math.inf
    """What a value has to be better than by early_stopping_threshold, for patience to begin anew."""
    worse: int = 0
    """Evaluations since then."""
    kept: BestAdapter | None = None
    """Where its adapter is, in the process that writes."""


@dataclass
@fits()
class Loop(TrainerCallback):
    """Follows a run and steers it; what of it the next step depends on goes into every checkpoint."""

    display: Display
    stop: Stop
    evaluation: EvaluationSection
    name_of: Callable[[int], str]
    """A row's index -> its place in the data, for messages."""
    save_adapter: Callable[[Any, Path, dict[str, Tensor] | None], None]
    checkpoints: Checkpoints | None
    """None in a process that writes nothing."""
    open_metrics: Callable[[int | None], AbstractContextManager[TextIO | None]]
    """Opens metrics.jsonl: anew, or cut to a number of bytes to go on; None where another process writes it."""
    resumed: Checkpoint | None = None
    """Where training goes on; the model has its adapter already."""
    open_rollouts: Callable[[int | None], AbstractContextManager[TextIO | None]] = lambda kept: nullcontext()
    """The same of rollouts.jsonl; nothing where the model answers nothing."""
    warn: Callable[[str], None] = lambda text: None
    """Hears what should be noticed."""
    watched: str = "loss"
    """What the picture of the run shows, by its name in metrics.jsonl."""
    held_out_scores: Callable[[], Mapping[str, float]] | None = None
    """`loss`, and of pairs what else is measured of them, by its name."""
    task_scores: Callable[[], Mapping[str, TaskScore]] | None = None
    movement_steps: int | None = None
    stage_of: Callable[[int], int] | None = None
    """An optimizer step -> its stage of train.curriculum."""
    behind_seconds: float = 0.0
    """What the evaluation behind the last step is expected to take."""

    best: Best = field(default_factory=Best, init=False)
    curve: list[tuple[int, float]] = field(default_factory=list, init=False)
    """(step, mean training loss since the point before)."""
    held_out: list[tuple[int, float]] = field(default_factory=list, init=False)
    """(step, held-out loss)."""
    batches: list[tuple[Tensor, Tensor | None]] = field(default_factory=list, init=False)
    """(loss, rows) of every micro-batch of the step in work; TRL does not tell the rows."""
    penalties: Mapping[str, Tensor] = field(default_factory=dict, init=False)
    """What was added to the loss of the step in work, by its name in metrics.jsonl."""
    earlier_seconds: float = field(default=0.0, init=False)
    """Of training, spent by earlier processes of this run."""
    ended: bool = field(default=False, init=False)
    """Whether training has ended early, for good."""

    def __post_init__(self) -> None:
        self._start = self._mark = time.perf_counter()
        self._tokens = self._first_tokens = 0
        self._grad_norm = 0.0
        self._metrics: TextIO | None = None
        self._answers: TextIO | None = None
        self._advance: Callable[..., None] = lambda count, note="": None
        if self.resumed is not None:
            self._take_up(self.resumed.state["loop"])

    @contextmanager
    def running(self, steps: int) -> Iterator[None]:
        """Within: metrics.jsonl is open, the display follows `steps` steps, and a signal waits for the end of one."""
        loop = None if self.resumed is None else self.resumed.state["loop"]
        with (
            self.open_metrics(None if loop is None else int(loop["metrics_bytes"])) as self._metrics,
            self.open_rollouts(None if loop is None else int(loop.get("rollouts_bytes", 0))) as self._answers,
            self.display.stage("training", steps, self.behind_seconds) as self._advance,
            self.stop.training(),
        ):
            yield

    @property
    def best_step(self) -> int | None:
        """Step of the best metric_for_best_model; None where there is none yet."""
        return self.best.step

    @property
    def elapsed(self) -> float:
        """Seconds of training, those of earlier processes included."""
        return self.earlier_seconds + time.perf_counter() - self._start

    def seen(self, loss: Tensor, rows: Tensor | None) -> None:
        """Notes one micro-batch."""
        self.batches.append((loss, rows))

    def stepping(self, grad_norm: float) -> None:
        """Notes the gradient's norm, right before the optimizer steps."""
        self._grad_norm = grad_norm

    def write(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.write(json_text(line) + "\n")

    def write_rollout(self, line: Mapping[str, Any]) -> None:
        """One line of rollouts.jsonl."""
        if self._answers is not None:
            self._answers.write(json_text(line) + "\n")

    def adapter_writer(self, model: Any) -> Callable[[Path], None]:
        """A function that fills a folder with the adapter of `model`; every process has to ask for it."""
        gathered_state = sharded_state(model)
        return lambda folder: self.save_adapter(model, folder, gathered_state)

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to keep of this object, as JSON."""
        return {
            "metrics_bytes": _bytes_of(self._metrics),
            **({} if self._answers is None else {"rollouts_bytes": _bytes_of(self._answers)}),
            "best": None if self.best.step is None else asdict(self.best),
            "ended": self.ended,
            "curve": self.curve,
            "held_out": self.held_out,
            "seconds": round(self.elapsed, 3),
        }

    def _take_up(self, state: dict[str, Any]) -> None:
        """What `state` gave."""
        if state["best"] is not None:
            kept = state["best"]["kept"]
            self.best = Best(**state["best"] | {"kept": None if kept is None else BestAdapter(**kept)})
        self.ended = bool(state["ended"])
        self.curve = [(int(step), float(loss)) for step, loss in state["curve"]]
        self.held_out = [(int(step), float(loss)) for step, loss in state["held_out"]]
        self.earlier_seconds = float(state["seconds"])

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start = self._mark = time.perf_counter()
        self._tokens = self._first_tokens = int(state.num_input_tokens_seen)
        self._advance(state.global_step)

    @override
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.batches.clear()
        if self.stage_of is not None and not self.display.live:
            step = int(state.global_step)
            if (stage := self.stage_of(step + 1)) != self.stage_of(max(step, 1)) or step == 0:
                self.display.say(f"step {step + 1}  stage {stage} begins")

    @override
    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        step, named = state.global_step, self.evaluation.metric_for_best_model
        if step >= state.max_steps:
            control.should_log = True  # Trainer would drop the steps behind the last multiple of logging_steps
        self._advance(1, note=self._note(state, lr_scheduler.get_last_lr()[0]))
        if self._due(self.movement_steps, state):
            self.write({"step": step, "movement": movement(model)})
        if self.held_out_scores is not None and self._due(self.evaluation.eval_steps, state):
            scores = self._measure_held_out(step, model)
            if named in HELD_OUT:
                self._judge(scores[named] if named == "loss" else -scores[named], step, control, model)
        if self.task_scores is not None and self._due(self.evaluation.tasks_steps, state):
            tasks = self._score_tasks(step, model)
            if named not in HELD_OUT:
                self._judge(chosen_score(tasks, named), step, control, model)
        if self.stop.wanted():
            control.should_save = control.should_training_stop = True

    @override
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        now, tokens = time.perf_counter(), int(state.num_input_tokens_seen)
        told = ("kl", *(_OF_REWARDED if "reward" in logs else ()))
        line: dict[str, Any] = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            **{name: float(value) for name, value in self.penalties.items()},
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": float(logs["grad_norm"]),
            "epoch": round(float(state.epoch or 0), 4),
            **({} if self.stage_of is None else {"stage": self.stage_of(int(state.global_step))}),
            "tokens": tokens,
            "tokens_per_second": round((tokens - self._tokens) / max(now - self._mark, 1e-9), 1),
            "memory_bytes": memory_bytes(),
            "seconds": round(self.elapsed, 3),
            **{name: float(value) for name, value in logs.items() if "/" in name or name in told},
        }
        self._mark, self._tokens = now, tokens
        self.write(line)
        if self.watched in line:
            self.curve.append((line["step"], line[self.watched]))
        if not self.display.live:
            done = state.global_step
            left = self.elapsed / done * (state.max_steps - done) + self.behind_seconds
            self.display.say(
                f"step {done}/{state.max_steps}  loss {line['loss']:.3f}{_judged(line)}  "
                f"lr {line['learning_rate']:.2e}  "
                f"grad {line['grad_norm']:.2f}  {line['tokens_per_second']:,.0f} tokens/s  "
                f"{line['memory_bytes'] / 2**30:.1f} GiB  ETA {left:.0f} s"
            )

    @staticmethod
    def _due(steps: int | None, state: Any) -> bool:
        """Whether something is done now that is done every so many steps, and behind the last one."""
        return steps is not None and (state.global_step >= state.max_steps or state.global_step % steps == 0)

    def _measure_held_out(self, step: int, model: Any) -> Mapping[str, float]:
        assert self.held_out_scores is not None
        scores = self.held_out_scores()
        loss = scores["loss"]
        model.train()
        if not math.isfinite(loss):
            raise NumericsError(f"the held-out loss is {loss} at step {step}; lower train.learning_rate")
        self.write({"step": step, **{f"eval_{name}": value for name, value in scores.items()}})
        self.held_out.append((step, scores[self.watched]))
        if not self.display.live:
            self.display.say(f"step {step}  held-out loss {loss:.4f}{_judged(scores)}")
        return scores

    def _score_tasks(self, step: int, model: Any) -> Mapping[str, TaskScore]:
        assert self.task_scores is not None
        kept = random_state()  # the harness sets seeds of its own
        scores = self.task_scores()
        load_random_state(*kept)
        model.train()
        self.write({"step": step, "tasks": {name: score.value for name, score in scores.items()}})
        self.display.say(f"step {step}  " + "  ".join(f"{name} {score.value:.4f}" for name, score in scores.items()))
        return scores

    def _judge(self, value: float, step: int, control: Any, model: Any) -> None:
        """Keeps the adapter if it is the best so far, and ends training if none has been much better for long."""
        best = self.best
        if value < best.value:
            best.value, best.step = value, step
            if self.evaluation.load_best_model_at_end:
                save_adapter, trained = self.adapter_writer(model), trained_state(model)
                if self.checkpoints is not None:
                    best.kept = self.checkpoints.save_best(step, save_adapter, trained)
        if value < best.mark - self.evaluation.early_stopping_threshold:
            best.mark, best.worse = value, 0
            return
        best.worse += 1
        patience = self.evaluation.early_stopping_patience
        if patience is not None and best.worse >= patience:
            self.ended = True
            self.display.say(f"stopping early: no better {metric_name(self.evaluation)} in {patience} evaluations")
            control.should_save = control.should_log = control.should_training_stop = True

    def _note(self, state: Any, rate: float) -> str:
        if not self.display.live:
            return ""
        memory = memory_bytes() / 2**30
        loss = sum(float(loss) for loss, _ in self.batches)
        speed = (state.num_input_tokens_seen - self._first_tokens) / max(time.perf_counter() - self._start, 1e-9)
        return f"loss {loss:.3f}  lr {rate:.2e}  grad {self._grad_norm:.2f}  {speed:,.0f} tokens/s  {memory:.1f} GiB"


def _judged(numbers: Mapping[str, float]) -> str:
    """What a line at the terminal says of judged answers; nothing of other rows."""
    shown = {
        "accuracy": ("rewards/accuracies", ".2f"),
        "margin": ("rewards/margins", ".3f"),
        "reward": ("reward", ".3f"),
        "std": ("reward_std", ".3f"),
        "kl": ("kl", ".3f"),
        "entropy": ("entropy", ".2f"),
        "length": ("completions/mean_length", ".0f"),
        "clipped": ("completions/clipped_ratio", ".2f"),
    }
    return "".join(f"  {title} {numbers[name]:{form}}" for title, (name, form) in shown.items() if name in numbers)


def metric_name(evaluation: EvaluationSection) -> str:
    """Of what tells the best adapter, for messages."""
    named = evaluation.metric_for_best_model
    return f"held-out {named}" if named in HELD_OUT else named


def _bytes_of(file: TextIO | None) -> int:
    """How much is written of it."""
    if file is None:
        return 0
    file.flush()
    return file.tell()


def memory_bytes() -> int:
    """Peak memory of the device so far; without one, of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows has none
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)
