"""transformers' Trainer with our own checkpoints, data order and parameter groups, and a stop before every bad step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, get_scheduler
from typing_extensions import override

from dude_peft.config.schema import TrainSection
from dude_peft.errors import NumericsError
from dude_peft.folder.checkpoint import OPTIMIZER, RANDOM, Checkpoint
from dude_peft.folder.state import (
    load_optimizer_state,
    load_random_state,
    optimizer_state,
    random_state,
    whole,
)
from dude_peft.machine.processes import gathered, summed
from dude_peft.machine.sharding import cut_again
from dude_peft.parents import fits, newer
from dude_peft.training.compiled import one_graph_a_shape
from dude_peft.training.general import GeneralMeter
from dude_peft.training.groups import parameter_groups
from dude_peft.training.half import Skips
from dude_peft.training.judged_loss import JudgedLoss
from dude_peft.training.loop import Loop
from dude_peft.training.objective import CausalLoss, MixtureOfLosses
from dude_peft.training.order import EpochOrder
from dude_peft.training.orthogonality import Orthogonality
from dude_peft.training.rollouts import Rollouts
from dude_peft.training.soundness import check_numbers

_REMEDY = "no step was taken with it; lower train.learning_rate, or use model.dtype: float32"
_MOST_ROWS = 40
_ANSWERS = "answers"
"""Begins the names of answers among a checkpoint's random tensors: `answers.` of the first process, `answers1.`, ..."""


@fits(uses=("_tr_loss", "_globalstep_last_logged"))
class RunTrainer(Trainer):
    """The Trainer of `dude train`."""

    def __init__(
        self,
        loop: Loop,
        section: TrainSection,
        meter: GeneralMeter | None,
        check_output: Callable[[int], None],
        order_of: Callable[[Any], EpochOrder],
        orthogonality: Orthogonality | None = None,
        rollouts: Rollouts | None = None,
        **settings: Any,
    ) -> None:
        """Sets up the Trainer.

        Args:
            loop: which follows it, and knows the checkpoint that it goes on from.
            section: of the run.
            meter: of general ability.
            check_output: raises NumericsError where what the model computes behind a step is not finite.
            order_of: a dataset -> the order of its places.
            orthogonality: a penalty whose gradient every optimizer step takes along.
            rollouts: makes a step's batches of its prompts.
            settings: Trainer's own.
        """
        self.loop, self.section, self.meter = loop, section, meter
        self.checked: int | None = None
        """Step whose numbers were looked at last."""
        self._check_output = check_output
        self._orthogonality = orthogonality
        self._rollouts = rollouts
        self._resumed: Checkpoint | None = loop.resumed
        self._skips = Skips()
        self._rows: Tensor | None = None  # those of the micro-batch in work
        # The meter first: what it measures before training is no time of training.
        super().__init__(callbacks=[loop] if meter is None else [meter, loop], **settings)
        # Trainer divides by the accumulation itself; early releases of transformers 5 let accelerate divide again.
        self.accelerator.gradient_accumulation_steps = 1
        if self.args.torch_compile:
            one_graph_a_shape(self)
        self.order = order_of(self.train_dataset)
        self.remove_callback(PrinterCallback)

    @override
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.order

    @override
    def _run_epoch(self, model: Any, epoch: int, *args: Any, **kwargs: Any) -> None:
        self.order.begin(int(epoch))
        self._restore_losses()
        super()._run_epoch(model, epoch, *args, **kwargs)  # type: ignore[no-untyped-call]

    @override
    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            cut_again(trained)  # the model has been measured
            groups = parameter_groups(trained, self.section, set(self.get_decay_parameter_names(trained)))
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    @override
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of transformers, its own first step left out, whose rate is 0 where there is a warm-up.

        Of a warm-up of w steps, step k has k / (w + 1) of the rate; later steps have what transformers gives them.
        """
        if self.lr_scheduler is None:
            warm = self.args.get_warmup_steps(num_training_steps)
            skipped = int(warm > 0 and self.args.lr_scheduler_type != "constant")
            self.lr_scheduler = get_scheduler(
                self.args.lr_scheduler_type,
                optimizer=optimizer or self.optimizer,  # type: ignore[arg-type]  # there is one by now
                num_warmup_steps=warm + skipped,
                num_training_steps=num_training_steps + skipped,
                scheduler_specific_kwargs=self.args.lr_scheduler_kwargs or None,  # type: ignore[arg-type]
            )
            if skipped:
                with warnings.catch_warnings():  # torch: the optimizer has not stepped yet
                    warnings.simplefilter("ignore")
                    self.lr_scheduler.step()
        return self.lr_scheduler

    @override
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Of preferences, the loss of a step is divided by the number of its pairs or answers, not of its tokens.

        Of prompts, this is where they are answered.
        """
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._rollouts is not None and samples:
            samples = self._rollouts.of_step(samples, int(self.state.global_step))
        if isinstance(self.compute_loss_func, JudgedLoss):
            counts = summed(torch.tensor(self.compute_loss_func.count(samples), device=device))
            items, self.compute_loss_func.tokens = counts[0], counts[1]
        return samples, items

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if isinstance(self.compute_loss_func, JudgedLoss) and "loss" in logs:
            logs |= self.compute_loss_func.means()
        super().log(logs, start_time)

    @override
    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._rows = inputs.pop("rows")
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.loop.seen(loss, self._rows)
        if self._orthogonality is not None and self.accelerator.sync_gradients:  # the step's last micro-batch
            self.loop.penalties = self._orthogonality.pull()
        return loss

    @override
    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called right before every optimizer step, which is the place to refuse it.

        One look at one number: the norm and the losses, of all processes, reach the host together, so that all stop.
        """
        norm: Any = whole(super()._get_grad_norm(model, grad_norm))  # type: ignore[no-untyped-call]
        losses = [loss for loss, _ in self.loop.batches]
        total = torch.stack(losses).sum() + torch.as_tensor(norm, dtype=torch.float32, device=losses[0].device)
        if math.isfinite(float(summed(total))):
            self._skips.count = 0
        elif self.accelerator.scaler is None or not math.isfinite(float(summed(torch.stack(losses).sum()))):
            self._refuse(float(norm))
        else:
            step = int(self.state.global_step) + 1
            self.loop.display.say(self._skips.skipped(self.accelerator.scaler, step))
            norm = torch.zeros_like(total)  # of the step that is taken: none
        self.loop.stepping(float(norm))
        return norm

    @override
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed steps inside its backward pass, so there a bad loss has to be refused here."""
        if isinstance(self.compute_loss_func, MixtureOfLosses):
            self.compute_loss_func.look(model, inputs, inputs.pop("general", None))
        if isinstance(self.compute_loss_func, JudgedLoss):
            self.compute_loss_func.look(model, inputs)
        if isinstance(self.compute_loss_func, CausalLoss):
            if self.compute_loss_func.router:
                inputs["output_router_logits"] = True
            self.compute_loss_func.parts = self.current_gradient_accumulation_steps * self.args.world_size
        loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
        if self.is_deepspeed_enabled and not math.isfinite(float(summed(loss.detach().clone()))):
            self.loop.seen(loss.detach(), self._rows)
            self._refuse(0.0)
        return loss

    def _refuse(self, norm: float) -> None:
        step = self.state.global_step + 1
        own = [
            (float(loss), [] if rows is None else [self.loop.name_of(row) for row in rows.tolist()])
            for loss, rows in self.loop.batches
        ]
        batches = [batch for part in gathered(own) for batch in part]
        bad = [(loss, names) for loss, names in batches if not math.isfinite(loss)]
        what = f"the training loss is {bad[0][0]}" if bad else f"the gradient's norm is {norm}"
        names = [name for _, found in bad or batches for name in found]
        where = f", on {_together(names)}" if names else ""
        raise NumericsError(f"{what} at step {step}{where}; {_REMEDY}")

    @override
    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Everything that the next step depends on; every process takes part, the first one writes."""
        optimizer, rest = optimizer_state(self.optimizer)
        scheduler: Any = self.lr_scheduler
        self.check_sound(optimizer, [rest, scheduler.state_dict()])
        scaler: Any = self.accelerator.scaler
        parts, sums = gathered(random_state()), gathered(float(self._tr_loss))
        of_pairs = self.compute_loss_func
        pairs = {"pairs": gathered(of_pairs.sums())} if isinstance(of_pairs, JudgedLoss) else {}
        answers = {} if self._rollouts is None else {"rollouts": self._rollouts.state()}
        drawn = self._drawn()
        save_adapter = self.loop.adapter_writer(self.model)
        self.store_flos()
        if not self.args.should_save:
            return
        random = {f"{index}.{name}": value for index, (found, _) in enumerate(parts) for name, value in found.items()}
        random |= drawn
        record = asdict(self.state) | {"log_history": [], "stateful_callbacks": {}}
        state = {
            "optimizer": rest,
            "scheduler": scheduler.state_dict(),
            "random": [numbers for _, numbers in parts],
            "loss": {"sums": sums, "logged": self._globalstep_last_logged},
            "loop": self.loop.state(),
            "general": self.meter and self.meter.state(),
            **pairs,
            **answers,
            **({} if scaler is None else {"scaler": self._skips.state(scaler)}),
        }
        assert self.loop.checkpoints is not None
        self.loop.checkpoints.save(
            self.state.global_step, save_adapter, optimizer, random, state, record, self.loop.best.kept
        )

    def _drawn(self) -> dict[str, Tensor]:
        """What all processes keep of their answers, which were drawn as well."""
        if self._rollouts is None:
            return {}
        found = self._rollouts.tensors(int(self.state.global_step))
        own = {name: tensor.cpu().contiguous() for name, tensor in found.items()}
        every = enumerate(gathered(own))
        return {f"{_of_process(index)}{name}": tensor for index, part in every for name, tensor in part.items()}

    def check_sound(self, optimizer: dict[str, Tensor] | None = None, rest: Any = None) -> None:
        """Looks at numbers that the next step would have met, and the last one's, which no step follows.

        Raises:
            NumericsError: NaN or Inf, in all processes.
        """
        step = int(self.state.global_step)
        check_numbers(self.model, step, optimizer, rest)
        self._check_output(step)
        self.checked = step

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the adapter was loaded, and checked against the base, before the Trainer was made."""

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._resumed is not None:
            state = self._resumed.state
            scheduler: Any = self.lr_scheduler
            load_optimizer_state(self.optimizer, self._resumed.tensors(OPTIMIZER), state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])

    @override
    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._resumed is None:
            return
        numbers = self._resumed.state["random"]
        index = self.args.process_index
        if index >= len(numbers):
            return  # more processes than before: the run has been told that it will not be the same
        tensors = self._resumed.tensors(RANDOM)
        own = {name.partition(".")[2]: t for name, t in tensors.items() if name.partition(".")[0] == str(index)}
        load_random_state(own, numbers[index])

    @override
    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._resumed is not None and self.accelerator.scaler is not None:
            self._skips.take_up(self.accelerator.scaler, self._resumed.state["scaler"])

    @contextmanager
    @newer
    @override
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Only the last micro-batch's gradients are sent; transformers' own version asks its loader's settings."""
        model: Any = self.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def _restore_losses(self) -> None:
        """The losses summed since the last line of metrics.jsonl; Trainer sets them to zero before its first epoch."""
        if self._resumed is not None and self.state.global_step == self._resumed.step:
            saved = self._resumed.state["loss"]
            sums, index = saved["sums"], self.args.process_index
            # Another number of processes than before: the mean over them is what is logged.
            own = sums[index] if len(sums) == self.args.world_size else sum(sums) / len(sums)
            self._tr_loss = torch.tensor(own, dtype=torch.float32, device=self.args.device)
            self._globalstep_last_logged = int(saved["logged"])
            if self._rollouts is not None:
                # Of another number of processes nobody has answers: their prompts are asked anew.
                prefix = _of_process(index) if len(sums) == self.args.world_size else ""
                drawn = self._resumed.tensors(RANDOM).items()
                answers = {n.removeprefix(prefix): tensor for n, tensor in drawn if prefix and n.startswith(prefix)}
                self._rollouts.take_up(self._resumed.state["rollouts"], answers)
            if isinstance(self.compute_loss_func, JudgedLoss):
                pairs = self._resumed.state["pairs"]
                same = len(pairs) == self.args.world_size
                whole = [sum(part) for part in zip(*pairs, strict=True)] if index == 0 else [0.0] * len(pairs[0])
                self.compute_loss_func.take_up(pairs[index] if same else whole, self.args.device)


def _of_process(index: int) -> str:
    """Begins the names of its answers."""
    return f"{_ANSWERS}{index or ''}."


def _together(names: list[str]) -> str:
    """Rows a.jsonl:3, 9; b.jsonl:1 for a.jsonl:3, a.jsonl:9 and b.jsonl:1."""
    files: dict[str, list[str]] = {}
    for name in names[:_MOST_ROWS]:
        file, _, line = name.rpartition(":")
        files.setdefault(file, []).append(line)
    more = f" and {len(names) - _MOST_ROWS} more" if len(names) > _MOST_ROWS else ""
    return "rows " + "; ".join(f"{file}:{', '.join(lines)}" for file, lines in files.items()) + more
