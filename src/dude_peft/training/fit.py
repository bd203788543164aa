"""The optimisation: transformers' Trainer, set up from a run's configuration and watched step by step."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import peft  # noqa: F401  # Trainer would import it later, in the middle of the output
import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.integrations import integration_utils
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils.import_utils import is_torch_tf32_available

from dude_peft.config.schema import KtoSection, OrpoSection, RewardModelSection, RunConfig, TrainSection
from dude_peft.data.batches import Company
from dude_peft.errors import ConfigError, NumericsError, ResourceError
from dude_peft.installing import install
from dude_peft.machine.out_of_memory import is_out_of_memory
from dude_peft.machine.processes import count
from dude_peft.machine.sharding import check_sharding
from dude_peft.model.outputs import can_keep_few
from dude_peft.model.probe import Nature
from dude_peft.parents import require
from dude_peft.rewards.judge import Judge
from dude_peft.training.compiled import check_compiler, compiling
from dude_peft.training.extra_arguments import handed_on
from dude_peft.training.general import GeneralMeter, general_scores
from dude_peft.training.group_order import GroupOrder
from dude_peft.training.half import check_half
from dude_peft.training.image_rows import are_mixed, reached
from dude_peft.training.judged_loss import JudgedLoss
from dude_peft.training.labelled import LabelledLoss
from dude_peft.training.loop import Loop
from dude_peft.training.mixed_order import MixedOrder
from dude_peft.training.model_checks import most_tokens, probe
from dude_peft.training.objective import CausalLoss, MixtureOfLosses
from dude_peft.training.order import EpochOrder
from dude_peft.training.orthogonality import Orthogonality
from dude_peft.training.preference import PreferenceLoss
from dude_peft.training.rewarded import RewardedLoss
from dude_peft.training.rollouts import Rollouts
from dude_peft.training.scored import ScoredLoss
from dude_peft.training.trainer import RunTrainer
from dude_peft.training.training_rows import LabelledRows, Packs, PairRows, PromptRows, Rows, ScoredRows
from dude_peft.training.training_set import TrainingSet

require(TrainingArguments, "_n_gpu")


@dataclass(frozen=True)
class Fit:
    """What came out of a training loop, beside the trained model."""

    steps: int
    tokens: int
    """Non-padding tokens seen."""
    seconds: float
    curve: tuple[tuple[int, float], ...]
    """(step, mean loss since the point before)."""
    held_out: tuple[tuple[int, float], ...]
    """(step, held-out loss), where it was measured on the way."""
    best_step: int | None
    """Step of the best evaluation.metric_for_best_model, where it was measured on the way."""
    best_seal: str | None
    """Hash of its manifest, where this process knows it."""

    @property
    def tokens_per_second(self) -> float:
        """Throughput of the whole loop."""
        return self.tokens / max(self.seconds, 1e-9)


def training_arguments(config: RunConfig, strategy: str = "ddp") -> TrainingArguments:
    """Trainer's own settings for a resolved configuration; several processes find each other here.

    Args:
        config: of the run.
        strategy: of several processes: ddp, fsdp2 or zero3.

    Raises:
        ConfigError: transformers refuses a setting here, such as an optimizer that is not installed, or is too old.
    """
    section = config.train
    kind, own = _kind(config)
    extra = handed_on(section)
    check_trackers(section)
    check_compiler(section, gpu=torch.accelerator.is_available())
    if section.tf32 and not is_torch_tf32_available():
        raise ConfigError("train.tf32 needs an NVIDIA GPU from Ampere on; leave it out")
    check_half(config, strategy, count())
    if strategy == "fsdp2" and count() > 1:
        check_sharding()
    on_cpu = config.model.is_on_cpu or not torch.accelerator.is_available()
    if count() > 1 and on_cpu and strategy == "ddp":
        # accelerate numbers CPUs by processes, and torch copies whatever it moves from `cpu` to `cpu:0`.
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    try:
        arguments = kind(
            output_dir=config.output_dir,
            learning_rate=section.learning_rate or 0.0,
            max_steps=section.max_steps or -1,
            num_train_epochs=section.num_train_epochs or 1.0,
            per_device_train_batch_size=section.per_device_train_batch_size,
            gradient_accumulation_steps=section.gradient_accumulation_steps,
            warmup_steps=section.warmup_steps,
            lr_scheduler_type=section.lr_scheduler_type,
            weight_decay=section.weight_decay,
            max_grad_norm=section.max_grad_norm,
            optim=section.optim,
            neftune_noise_alpha=section.neftune_noise_alpha,
            seed=section.seed,
            data_seed=section.seed,
            bf16=section.bf16,
            fp16=section.fp16,
            # Left open, Trainer would switch TF32 on wherever it compiles.
            tf32=section.tf32 if section.tf32 or section.torch_compile else None,
            torch_compile=section.torch_compile,
            gradient_checkpointing=section.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if section.gradient_checkpointing else None,
            use_cpu=on_cpu,
            dataloader_pin_memory=torch.cuda.is_available() and not on_cpu,
            logging_steps=section.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            include_num_input_tokens_seen="all" if config.data.packing else "non_padding",
            remove_unused_columns=False,
            save_steps=section.save_steps,
            report_to=list(section.report_to),
            disable_tqdm=True,
            **{"save_strategy": "steps", **_several(strategy), **own, **extra},
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(f"section 'train': {' '.join(str(error).split())}") from error
    if getattr(arguments, "hf_deepspeed_config", None) is not None:
        # Else the model would be cut while it loads, before the adapter knows its weights.
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    # One process drives one device: Trainer would wrap the model in nn.DataParallel wherever it sees several.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def check_trackers(section: TrainSection) -> None:
    """Raises ConfigError where one of train.report_to is not installed."""
    trackers: Any = integration_utils
    for tracker in section.report_to:
        if tracker not in trackers.get_available_reporting_integrations():
            raise ConfigError(f"train.report_to: {tracker} is not installed: {install(tracker)}")


def _kind(config: RunConfig) -> tuple[type[TrainingArguments], dict[str, Any]]:
    """The class of the settings, and what it has beyond transformers' own."""
    if config.train.trainer == "transformers":
        return TrainingArguments, {}
    if importlib.util.find_spec("trl") is None:
        raise ConfigError(f"train.trainer: trl is not installed: {install('trl')}")
    from trl.trainer.sft_config import SFTConfig

    own: dict[str, Any] = {"packing": config.data.packing, "max_length": config.data.max_length}
    if "trust_remote_code" in {field.name for field in fields(SFTConfig)}:
        own["trust_remote_code"] = False  # model and tokenizer are handed over; TRL loads nothing
    return SFTConfig, own


def _several(strategy: str) -> dict[str, Any]:
    if count() == 1:
        return {}
    # The frozen starts are buffers and the same everywhere: nothing to send in every forward.
    common: dict[str, Any] = {"ddp_broadcast_buffers": False, "ddp_find_unused_parameters": False}
    if not torch.accelerator.is_available():
        common["ddp_backend"] = "gloo"
    if strategy == "fsdp2":
        # Trainer would not write checkpoints of a sharded model; they are ours anyway.
        return common | {"save_only_model": True}
    if strategy == "zero3":
        # DeepSpeed steps inside backward and keeps the optimizer to itself: nothing to go on from bit by bit.
        return common | {"deepspeed": _ZERO3, "save_strategy": "no"}
    return common


_ZERO3: dict[str, Any] = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "bf16": {"enabled": "auto"},
}


@dataclass(frozen=True)
class Training:
    """A training loop that is ready to run."""

    model: Any
    """With its adapter, which is trained in place."""
    tokenizer: Any
    """For padding."""
    nature: Nature
    """Of the model, by `nature_of`."""
    examples: TrainingSet
    """To learn from."""
    arguments: TrainingArguments
    """By `training_arguments`."""
    config: RunConfig
    loop: Loop
    """What happens around the steps."""
    judge: Judge | None = None
    """Of the model's own answers, where the objective needs one."""
    company: Company = "any"
    """Which prompts may share a batch."""
    order: EpochOrder | None = None
    """Of the rows, where it is no random one."""
    reference: Tensor | None = None
    """The base's log-probabilities of the pairs, (pairs, 2), where they were measured before."""

    def run(self) -> Fit:
        """Trains from the start of the adapter, or from the checkpoint of `loop`.

        Raises:
            NumericsError: the loss or a gradient became NaN or Inf; nothing was stepped with it.
            ResourceError: a batch does not fit into memory, or a checkpoint onto the disk.
            StoppedError: a signal came; a checkpoint of the last step is there.
        """
        model, arguments, loop, resumed = self.model, self.arguments, self.loop, self.loop.resumed
        if getattr(arguments, "hf_deepspeed_config", None) is not None:
            set_hf_deepspeed_config(arguments.hf_deepspeed_config)  # type: ignore[no-untyped-call]
        if resumed is not None and self.examples.general_test is not None:
            self.examples.general_test.take_up(resumed.state["general"])
        trainer = self._trainer()
        total = trainer_steps(arguments, len(trainer.order))
        if resumed is not None and (loop.ended or resumed.step >= total):
            # Interrupted behind the last step; Trainer would take one more. What is measured now has its autocast, too.
            if arguments.bf16 or arguments.fp16:
                trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)
            return self._result(
                resumed.step, int(resumed.trainer_state()["num_input_tokens_seen"]), loop.earlier_seconds
            )
        uses_cache = getattr(model.config, "use_cache", None)
        model.config.use_cache = False  # keys and values of a training forward are never read again
        try:
            compiles = compiling() if arguments.torch_compile else nullcontext()
            if arguments.torch_compile:
                loop.display.say("compiling: the first step of every batch length takes longer, on a CPU minutes")
            reaches = reached(model) if are_mixed(self.examples) else nullcontext()
            with loop.running(total), compiles, reaches:
                trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed.path))
        except (RuntimeError, MemoryError) as error:
            if "without overflow" in str(error):  # torch's word for a Python number that its own type cannot hold
                raise NumericsError(
                    f"a step's factor is too large for the weights' dtype at step {trainer.state.global_step + 1}; "
                    "lower train.learning_rate, or the ratio that multiplies it"
                ) from error
            if not is_out_of_memory(error):
                raise
            raise ResourceError(
                f"training does not fit into memory at step {trainer.state.global_step + 1}; lower "
                "train.per_device_train_batch_size or data.max_length, or set train.gradient_checkpointing: true"
            ) from error
        finally:
            model.config.use_cache = uses_cache
        step = int(trainer.state.global_step)
        loop.stop.after(f"after step {step} of {total}, which is saved; run the same command again to resume")
        loop.stop.raise_if_wanted()
        if trainer.checked != step:
            trainer.check_sound()
        return self._result(step, int(trainer.state.num_input_tokens_seen), loop.elapsed)

    def _result(self, step: int, tokens: int, seconds: float) -> Fit:
        loop, test = self.loop, self.examples.general_test
        if test is not None:
            kept = loop.best_step if self.config.evaluation.load_best_model_at_end else None
            loop.display.general(test.measured[0], test.after(kept))
        seal = None if loop.best.kept is None else loop.best.kept.seal
        return Fit(step, tokens, seconds, tuple(loop.curve), tuple(loop.held_out), loop.best_step, seal)

    def _trainer(self) -> RunTrainer:
        model, examples, config, arguments = self.model, self.examples, self.config, self.arguments
        pad_id, section = int(self.tokenizer.pad_token_id), config.train
        ours: dict[str, Any] = {
            "loop": self.loop,
            "section": section,
            "meter": self._meter(pad_id),
            "check_output": functools.partial(_check_output, model, examples, pad_id),
            "orthogonality": Orthogonality(model, section.orthogonality, config.adapter.groups)
            if section.orthogonality
            else None,
        }
        step_rows = section.per_device_train_batch_size * section.gradient_accumulation_steps * arguments.world_size
        if arguments.world_size > 1 and are_mixed(examples):
            # One process may have a batch without images, whose loss does not reach the vision tower.
            arguments.ddp_find_unused_parameters = True
        if section.trainer == "trl":
            from dude_peft.training.trl_trainer import lengths, trl_trainer

            ours["order_of"] = lambda dataset: _order_of(lengths(dataset), len(dataset), section, step_rows)
            return trl_trainer(model, arguments, examples, self.tokenizer, self.nature.router, ours)  # type: ignore[arg-type]
        settings = section.rewarded
        if settings is not None:
            rows: Rows = PromptRows(examples)
        elif config.data.packing:
            rows = Packs(examples, config.data.max_length, section.seed)
        elif isinstance(section.preference, KtoSection):
            estimates = section.preference.loss_type == "kto"
            rows = LabelledRows(examples, most_tokens(model, config.data.max_length) if estimates else None)
        elif isinstance(section.preference, RewardModelSection):
            rows = ScoredRows(examples)
        elif section.preference is not None:
            imitates_all = isinstance(section.preference, OrpoSection)  # questions, too
            rows = PairRows(examples, self.reference, answers_alone=not imitates_all and can_keep_few(model))
        else:
            rows = Rows(examples, few_lengths=section.torch_compile)
        loss = _loss_of(section, self.nature)
        if isinstance(loss, RewardedLoss):
            ours["rollouts"] = self._rollouts(loss)
        trainer = RunTrainer(
            **ours,
            order_of=lambda rows: self.order or _order_of(rows.lengths, rows.domain, section, step_rows),
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=functools.partial(rows.batch, pad_id=pad_id),
            compute_loss_func=loss,
        )
        if loss is not None:  # else Trainer would hand the model what only its own loss is divided by
            trainer.model_accepts_loss_kwargs = False
        return trainer

    def _rollouts(self, loss: RewardedLoss) -> Rollouts:
        section = self.config.train
        assert section.rewarded is not None
        assert self.judge is not None
        return Rollouts(
            self.model,
            self.tokenizer,
            self.examples,
            section.rewarded,
            self.judge,
            seed=section.seed,
            name_of=self.loop.name_of,
            conversation_of=self.examples.conversation,
            note=loss.note,
            write=self.loop.write_rollout,
            warn=self.loop.warn,
            company=self.company,
            bf16=section.bf16,
        )

    def _meter(self, pad_id: int) -> GeneralMeter | None:
        test, settings, loop = self.examples.general_test, self.config.evaluation, self.loop
        if test is None:
            return None
        how: Any = {"pad_id": pad_id, "batch_size": settings.batch_size, "company": self.nature.company}
        return GeneralMeter(
            test=test,
            scores=lambda: general_scores(self.model, test.examples, **how),
            eval_steps=settings.eval_steps,
            write=loop.write,
            say=lambda text: None if loop.display.live else loop.display.say(text),
        )


def trainer_steps(arguments: TrainingArguments, rows: int) -> int:
    """Optimizer steps that Trainer will take."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    epochs = float(arguments.num_train_epochs)
    batches: int = math.ceil(rows / (arguments.per_device_train_batch_size * arguments.world_size))
    updates: int = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    return math.ceil(epochs * updates)


def _loss_of(section: TrainSection, nature: Nature) -> MixtureOfLosses | JudgedLoss | CausalLoss | None:
    """None where the model's own is right."""
    if section.objective == "mol":
        return MixtureOfLosses(torch.bfloat16 if section.bf16 else None)
    if isinstance(section.preference, KtoSection):
        return LabelledLoss(section.preference)
    if isinstance(section.preference, RewardModelSection):
        return ScoredLoss(section.preference)
    if section.preference is not None:
        return PreferenceLoss(section.preference)
    if section.rewarded is not None:
        return RewardedLoss(section.rewarded)
    return None if nature.own_loss else CausalLoss(nature.router)


def _order_of(lengths: list[int], domain: int, section: TrainSection, step_rows: int) -> EpochOrder:
    settings = section.rewarded
    if settings is not None:
        answers, iterations = settings.num_generations, settings.num_iterations
        batch = section.per_device_train_batch_size
        processes = step_rows // (batch * section.gradient_accumulation_steps)
        how = {"answers": answers, "step": step_rows, "iterations": iterations, "batch": batch, "processes": processes}
        return GroupOrder(lengths, section.seed, **how)
    grouped = step_rows if section.train_sampling_strategy == "group_by_length" else 0
    if section.objective == "mol":
        return MixedOrder(lengths, domain, section.seed, grouped=grouped)
    return EpochOrder(lengths, section.seed, grouped=grouped)


def _check_output(model: Any, examples: TrainingSet, pad_id: int, step: int) -> None:
    """One forward of the head of two rows: huge weights are finite, and what they compute is not."""
    fault = f"the adapted model's output is NaN or Inf after step {step}; this step was not saved, "
    probe(model, examples, pad_id, f"{fault}lower train.learning_rate")
    model.train()
