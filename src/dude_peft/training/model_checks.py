"""The checks on a freshly loaded model: rows fit it, and a fresh adapter changes nothing, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dude_peft.artifact.fingerprint import xxh3_of
from dude_peft.config.schema import RunConfig
from dude_peft.data.batches import head, pad_right
from dude_peft.data.packing import packs_apart
from dude_peft.data.trial import text_ids, trial_length, trial_rows
from dude_peft.errors import ConfigError, DataError, NumericsError
from dude_peft.machine.processes import gathered, local_rank, rank
from dude_peft.model.outputs import with_scores
from dude_peft.model.probe import Nature, check_causal
from dude_peft.show import reason_of, shown
from dude_peft.task_types import CAUSAL
from dude_peft.tuner.attention import DudeAttention
from dude_peft.tuner.beside import prints_beside
from dude_peft.tuner.heads import behind_backbone, newly_initialised
from dude_peft.tuner.layer import DudeLinear
from dude_peft.tuner.tied import DudeTiedHead
from dude_peft.tuner.untouched import as_base

_ROWS, _TOKENS = 2, 64
_FAR = 0.1
"""Of the largest logit; between two devices, in bfloat16, roundings make up to a hundredth."""
_NEAR = 0.01
"""Of the largest logit; between two processes of one machine."""
_SEEN = 4096
"""Logits that are compared."""


def record_of_head(model: Any, seed: int) -> dict[str, Any]:
    """The hash of the tensors of the head that a model which scores was loaded with, and the seed if it was drawn.

    A checkpoint that is a reward model already brings its own.
    """
    names = behind_backbone(model)
    drawn = {name.partition(".")[0] for name in newly_initialised(model)} & set(names)
    hashed = xxh3_of(parameter for name in names for parameter in model.get_submodule(name).parameters())
    return {**({"drawn_with_seed": seed} if drawn else {}), "xxh3": hashed}


def check_fits(model: Any, largest: int, longest: int, tokenizer: Any) -> None:
    """Compares the rows with what the model can read.

    Args:
        model: the base model.
        largest: token id of all rows.
        longest: tokens of the longest row.
        tokenizer: for the message.

    Raises:
        DataError: a token that the model's vocabulary does not have.
        ConfigError: a row longer than the model's positions.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if largest >= vocabulary:
        raise DataError(
            f"token {tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, but the model's vocabulary has "
            f"{vocabulary} entries; use the tokenizer that belongs to the model"
        )
    positions = _positions(model)
    if positions is not None and longest > positions:
        raise ConfigError(
            f"data.max_length: the longest row has {longest} tokens, but the model can read only {positions}; set "
            f"data.max_length: {positions}"
        )


def most_tokens(model: Any, max_length: int) -> int:
    """Tokens that a made-up row may have: data.max_length, or the model's positions where these are fewer."""
    return min(max_length, _positions(model) or max_length)


def _positions(model: Any) -> int | None:
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def check_answers_fit(model: Any, longest: int, new_tokens: int, key: str, rows: str = "rows") -> None:
    """Raises ConfigError, which begins with `key`, where a prompt and its longest answer exceed the model's positions.

    Args:
        model: with or without weights.
        longest: tokens of the longest prompt.
        new_tokens: of the longest answer.
        key: that sets this.
        rows: what holds the prompts.
    """
    positions = _positions(model)
    if positions is not None and longest + new_tokens > positions:
        raise ConfigError(
            f"{key}: {new_tokens} tokens after a prompt of {longest} exceed the model's {positions}; lower it, or "
            f"shorten the {rows}"
        )


def check_nature(nature: Nature, config: RunConfig) -> None:
    """Raises ConfigError for a model that sees what it has to predict, or lets in the padding that its batches have."""
    if config.train.task_type == CAUSAL:
        check_causal(nature)
    if config.train.section is not None and not nature.right_padding:
        raise ConfigError(
            f"train.objective: {config.train.objective}: padding after a row changes the result of {nature.name}, and "
            "answers are padded to one length; choose another model, or objective: sft"
        )
    if not (nature.right_padding or config.data.packing or config.train.per_device_train_batch_size == 1):
        raise ConfigError(
            f"train.per_device_train_batch_size: padding after a row changes the result of {nature.name}; set it to "
            "1, and set train.gradient_accumulation_steps to its old value"
        )


def check_attention(model: Any, wanted: str | None) -> None:
    """Tries the attention that the run asks for, forward and backward.

    Raises:
        ConfigError: transformers took another one, or it does not run here.
    """
    if wanted is None:
        return
    found = model.config.get_text_config()._attn_implementation
    fault = f"transformers uses {found} for {type(model).__name__}"
    if found == wanted:
        ids = torch.tensor(trial_rows(text_ids(model), 2, trial_length(model)), device=model.device)
        starts: list[Tensor] = []

        def begin(module: Any, inputs: Any, output: Tensor) -> Tensor:  # a split model's embedding runs in a forward
            starts.append(output.detach().requires_grad_())
            return starts[0]

        handle = model.get_input_embeddings().register_forward_hook(begin)
        try:
            with torch.enable_grad():
                model(input_ids=ids, use_cache=False).logits.float().sum().backward()
            gradient = starts[0].grad
            if gradient is not None and bool(torch.isfinite(gradient).all()):
                return
            fault = "its gradient is not finite"
        except Exception as error:  # whatever its kernels raise
            fault = reason_of(error, 160)
        finally:
            handle.remove()
            model.zero_grad()
    raise ConfigError(
        f"model.attn_implementation: {wanted} does not work on this model and device ({fault}); leave it out, or "
        "choose sdpa or eager"
    )


def check_packs(model: Any) -> None:
    """Raises ConfigError for a model that mixes rows laid end to end."""
    if not packs_apart(model):
        raise ConfigError(
            f"data.packing: {type(model).__name__} does not keep packed rows apart; set data.packing: false and "
            "train.train_sampling_strategy: group_by_length"
        )


def check_whole(model: Any, strategy: str) -> None:
    """Raises ConfigError for adapted layers that compute with a weight outside of them, which is to be split."""
    for name, module in model.named_modules():
        if isinstance(module, (DudeAttention, DudeTiedHead)):
            what = "an attention" if isinstance(module, DudeAttention) else "a tied output layer"
            raise ConfigError(
                f"adapter.target_modules: '{shown(name.removeprefix('base_model.model.'))}' is {what} and needs whole "
                f"weights, and {strategy} splits them; use --launch ddp"
            )


def keep_fingerprints(model: Any) -> None:
    """Has all of the base model hashed now, before it is cut into shards."""
    for config in model.peft_config.values():
        config._beside = prints_beside(model.get_base_model(), config._beside)
    for module in model.modules():
        if isinstance(module, DudeLinear):
            module.base_fingerprint()


@torch.no_grad()  # not inference_mode: the first forward of a sharded model makes the buffers that training writes
def probe(
    model: Any,
    examples: Sequence[Mapping[str, Sequence[int]]],
    pad_id: int,
    fault: str = "the base model's own output is NaN or Inf; use model.dtype: float32 or bfloat16",
) -> Tensor:
    """Logits (tokens, vocabulary) of `model` on the head of the first rows; what a model that scores has for them.

    Args:
        model: adapted or not; it is in evaluation mode afterwards.
        examples: tokenised.
        pad_id: fills the shorter row.
        fault: what is said where they are not finite.

    Raises:
        NumericsError: they are not finite.
    """
    cut = [head(examples[row], _TOKENS) for row in range(min(_ROWS, len(examples)))]
    batch = {name: tensor.to(model.device) for name, tensor in pad_right(cut, pad_id).items() if name != "labels"}
    model.eval()
    logits: Tensor = with_scores(model, batch)
    # Only real tokens: what a model makes of padding may be anything.
    logits = logits[batch["attention_mask"].bool()]
    # -inf alone is how some models rule out tokens; the largest is NaN where any is.
    if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
        raise NumericsError(fault)
    return logits


def check_shares(whole: Tensor | None, split: Tensor) -> None:
    """Compares what a model computes before and after it was split; every process has to call it.

    Args:
        whole: `probe` of the model before; None in a process that did not have it.
        split: the same rows, behind it.

    Raises:
        NumericsError: the processes differ in any bit, or what they compute is another function.
    """
    seen = split.float().cpu()
    far = False
    if whole is not None:  # products depend on where a matrix lies in memory, and the whole one may lie elsewhere
        finite = torch.isfinite(whole)
        far = distance(whole.cpu(), seen) > _FAR * float(whole[finite].float().abs().max())
    found = gathered((xxh3_of([seen]), far))
    if len({values for values, _ in found}) > 1 or found[0][1]:
        raise NumericsError(
            "the split model computes something else than the whole one; use --launch ddp, and report this with the "
            "model's name"
        )


def check_mapped(logits: Tensor) -> None:
    """Compares what the processes of a machine compute from one base model in memory; every process has to call it.

    Args:
        logits: `probe` of the base model, in this process.

    Raises:
        NumericsError: one of them computes another function.
    """
    seen = logits.detach().float().flatten()[:_SEEN].cpu()
    first = gathered(seen)[rank() - local_rank()]
    far = distance(first, seen) > _NEAR * float(first[torch.isfinite(first)].abs().max())
    if any(gathered(far)):
        raise NumericsError(
            "the base model computes something else in the processes that map its memory; leave --launch out, and "
            "report this with the model's name"
        )


def check_beginning(config: RunConfig, *, from_base: bool) -> None:
    """Raises ConfigError for a run that compares with its base model, and whose start is another model."""
    if from_base:
        return
    objective = config.train.objective
    if objective == "mol" or config.data.general_test is not None:
        key = "train.objective: mol" if objective == "mol" else "data.general_test"
        raise ConfigError(
            f"{key} compares with the base model, but adapter.start is in the folded form, or trained, so its base "
            "model alone is another one; leave one of them out"
        )
    if config.train.has_base:
        raise ConfigError(
            f"train.objective: {objective}: adapter.start is in the folded form, or trained, so the reference, its "
            "base model alone, would be another model than the start; merge the adapter with dude merge, and name the "
            "merged folder in model.name_or_path"
        )


def check_reference(model: Any, base: Tensor, look: Callable[[Any], Tensor], objective: str) -> None:
    """Makes sure that the disabled adapter is the base model bit by bit, which a reference has to be.

    Args:
        model: adapted.
        base: what `look` gave for the base model.
        look: `probe` of a model.
        objective: that compares, for the message.

    Raises:
        ConfigError: it is not.
    """
    with as_base(model):
        if not torch.equal(look(model), base):
            raise ConfigError(
                f"train.objective: {objective}: the disabled adapter does not give the base model back, so there is no "
                "reference; choose another adapter.method"
            )


def check_start(base: Tensor, adapted: Tensor) -> None:
    """Compares the two `probe` results.

    Raises:
        NumericsError: they differ in any bit.
    """
    if not torch.equal(base, adapted):
        raise NumericsError(
            f"the start is not the base model: a new adapter changes the logits by up to {distance(base, adapted):.2g};"
            " report this with the model's name"
        )


def distance(base: Tensor, adapted: Tensor) -> float:
    """The largest difference of two `probe` results; 0 where they are equal."""
    moved = (base.float() - adapted.float()).abs()
    return float(torch.where(base == adapted, 0.0, moved).max())  # -inf is as far from itself as anything
