"""What a model is, measured on short rows before it trains or answers: architectures keep fewer promises than names do.

A difference counts where it exceeds what another batch layout does to the same row (`_FACTOR` times: means over a
vocabulary are steady), and is more than a trifle of what a visible token does: a near tie of a router may turn a
rounding into something larger. Padding changes the shapes of the computation, so there one rounding more is allowed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.loss.loss_utils import ForCausalLMLoss

from dude_peft.data.batches import Company, pad_left, pad_right
from dude_peft.data.labels import IGNORE
from dude_peft.data.trial import distance, text_ids, traceless, trial_length, trial_rows
from dude_peft.errors import ConfigError, DudeError
from dude_peft.machine.out_of_memory import is_out_of_memory
from dude_peft.model.outputs import is_scorer, of_each_token
from dude_peft.show import reason_of

_FACTOR = 4
_TRIFLE_AHEAD, _TRIFLE_PADDING, _TRIFLE_SHARED = 0.05, 0.01, 0.05
_SAME = 2**-16
"""Of two float32 sums of the same terms."""
_ROUTER_KEYS = ("router_aux_loss_coef", "aux_loss_coef")


@dataclass(frozen=True)
class Nature:
    """What was measured of a model."""

    name: str
    """Its class."""
    causal: bool
    """No later token changes an earlier logit."""
    right_padding: bool
    """Whether padding behind a row leaves it as it is."""
    own_loss: bool
    """Its loss is the shifted cross-entropy of its logits, a sum divided by what Trainer hands it, and nothing more."""
    router: float
    """Weight of its router's loss, where it adds one."""

    @property
    def company(self) -> Company:
        """Which rows share a batch that is padded on the right."""
        return "any" if self.right_padding else "alike"

    def notes(self, objective: str) -> list[str]:
        """What there is to say of its loss, a line each."""
        if self.router and objective != "sft":
            return [f"{self.name} adds a router loss to its own loss; train.objective: {objective} leaves it out"]
        if self.router:
            return [f"{self.name} adds {self.router:g} times its router loss, here the mean over a step's batches"]
        if not self.own_loss and objective == "sft":
            return [
                f"{self.name}'s own loss is not the next-token cross-entropy; the run computes that from the logits, "
                "and trains it"
            ]
        return []


def nature_of(model: Any, pad_id: int) -> Nature:
    """Tries a model on token ids, three short forwards; it and all random numbers stay as they are.

    Raises:
        ConfigError: it does not run on token ids alone, or rewrites its own weights.
    """
    # Offloaded ones are other tensors after every forward; what is written to them is lost with them.
    versions = [weight._version for weight in model.parameters() if not weight.is_meta]
    with traceless(model), _refused(model, "does not run with token ids as its only input"):
        causal, right_padding = _direction(model, _known(model, pad_id))
        own, router = (False, 0.0) if is_scorer(model) else _loss(model)
    if versions != [weight._version for weight in model.parameters() if not weight.is_meta]:
        raise ConfigError(
            f"model {_name(model)} changes its own weights while it runs, so an adapter cannot rely on them; use "
            "another model"
        )
    return Nature(_name(model), causal, right_padding, own, router)


def quiet_router_(model: Any) -> None:
    """From here on its router's loss is computed where a forward asks for it: within `generate` it would fail."""
    settings = model.config.get_text_config()
    if getattr(settings, "output_router_logits", False):
        settings.output_router_logits = False


def check_causal(nature: Nature) -> None:
    """Raises ConfigError for a model that sees the tokens which it has to predict."""
    if not nature.causal:
        raise ConfigError(
            f"model {nature.name} is not causal: it sees the tokens that it has to predict; use a causal model (a "
            "BERT decoder has is_decoder: true in its config.json)"
        )


def company_of(model: Any, pad_id: int) -> Company:
    """Which prompts can be continued in one batch, each as if it were alone; six short forwards through `generate`.

    Raises:
        ConfigError: it cannot generate.
    """
    pad_id = _known(model, pad_id)
    ids, length = text_ids(model), trial_length(model)
    long, other = trial_rows(ids, 2, length)
    half = length - length // 2
    short, follower = long[half:], long[0]
    with traceless(model), _refused(model, "cannot generate text"):
        alone = _continued(model, [long], follower, pad_id)[0]
        unpadded = _continued(model, [short, other[half:]], follower, pad_id)[0]
        shared, padded, seen = _continued(model, [long, short, [pad_id] * half + short], follower, pad_id)
    noise, effect = _largest(shared, alone), _largest(seen, unpadded)
    if noise > _TRIFLE_SHARED * effect and noise > 2 * _FACTOR * _rounding(alone, model.dtype):
        return "none"
    return "alike" if _leaks(padded, unpadded, noise, effect, model.dtype) else "any"


def company_note(name: str, company: Company) -> str:
    """What there is to say of it, in a line; empty where any prompts share a batch."""
    if company == "none":
        return f"{name} mixes up prompts in one batch; they are run one at a time"
    if company == "alike":
        return f"{name} lets padding change its answers; only prompts of the same length share a batch"
    return ""


def trains_cross_entropy(model: Any, compute: Callable[[dict[str, Tensor], Tensor], Tensor], router: float) -> bool:
    """Whether `compute` (batch, tokens of the step) is the shifted cross-entropy of the logits, a sum over tokens.

    Args:
        model: as it will be trained.
        compute: a trainer's loss.
        router: weight of the router's loss that is added to it.
    """
    with traceless(model):
        batch, items = _labelled(model)
        found = float(compute(dict(batch), items))
        out = model(**{**batch, "labels": None}, **({"output_router_logits": True} if router else {}))
        wanted = float(_cross_entropy(out.logits, batch["labels"], items))
        wanted += router * float(out.aux_loss) if router else 0.0
    # A trainer that never makes the logits does not round them either.
    return abs(found - wanted) <= max(_SAME, 2 * _eps(model.dtype)) * abs(wanted)


def _direction(model: Any, pad_id: int) -> tuple[bool, bool]:
    """(whether nothing later changes an earlier logit, whether padding behind a row does not either)."""
    ids, length = text_ids(model), trial_length(model)
    half = length // 2
    rows = trial_rows(ids, 2, length)
    other_ends = [row[:half] + _others(row[half:], ids) for row in rows]
    other_begins = [_others(row[:1], ids) + row[1:] for row in rows]
    together = _logits(model, [*rows, *other_ends, *other_begins], pad_id)
    whole, cut = _logits(model, [rows[0], rows[0][:half]], pad_id)

    noise = _largest(whole, together[0])
    effect = _largest(together[:2, 1:], together[4:, 1:])
    # What is seen in one row alone is a router's tie.
    ahead = float(distance(together[:2, :half], together[2:4, :half]).amax(dim=1).min())
    causal = not (ahead > _FACTOR * noise and ahead > _TRIFLE_AHEAD * effect)
    return causal, not _leaks(cut[:half], together[0, :half], noise, effect, model.dtype)


def _leaks(padded: Tensor, alone: Tensor, noise: float, effect: float, dtype: torch.dtype) -> bool:
    found = _largest(padded, alone)
    return found > _FACTOR * noise + _rounding(alone, dtype) and found > _TRIFLE_PADDING * effect


def _largest(some: Tensor, others: Tensor) -> float:
    return float(distance(some, others).max())


def _rounding(logits: Tensor, dtype: torch.dtype) -> float:
    return _eps(dtype) * float(logits[logits.isfinite()].abs().mean())


def _eps(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


def _others(tokens: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Another token for each, as long as there are two."""
    return [ids[(ids.index(token) + max(1, len(ids) // 2)) % len(ids)] for token in tokens]


def _logits(model: Any, rows: Sequence[list[int]], pad_id: int) -> Tensor:
    """(rows, tokens, vocabulary), float32, as training and evaluation ask for them; states of a model that scores."""
    batch = pad_right([{"input_ids": row, "labels": row} for row in rows], pad_id)
    del batch["labels"]
    return of_each_token(model, _on(model, batch)).float()


def _continued(model: Any, prompts: Sequence[list[int]], follower: int, pad_id: int) -> Tensor:
    """(rows, 2, vocabulary), float32: behind the prompts, and behind `follower` after them."""
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
    settings |= {"max_new_tokens": 2, "pad_token_id": pad_id, "output_logits": True, "return_dict_in_generate": True}
    found: Any = model.generate(
        **_on(model, pad_left(prompts, pad_id)),
        generation_config=GenerationConfig(**settings),  # type: ignore[no-untyped-call]
        logits_processor=LogitsProcessorList([_Forced(follower)]),
    )
    return torch.stack(found.logits, dim=1).float()


class _Forced(LogitsProcessor):
    """Only `token` can follow."""

    def __init__(self, token: int) -> None:
        self._token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(self._token, device=scores.device), 0.0)


def _loss(model: Any) -> tuple[bool, float]:
    """`Nature.own_loss` and `Nature.router`: its own loss beside that of its logits, from one forward."""
    batch, count = _labelled(model)
    handed = _takes_items(model)
    items = count if handed else None
    out = model(**batch, use_cache=False, **({"num_items_in_batch": items} if handed else {}))
    wanted = float(_cross_entropy(out.logits, batch["labels"], items))
    router, extra = _router_weight(model.config.get_text_config()), getattr(out, "aux_loss", None)
    if router and extra is not None and _same(float(out.loss), wanted + router * float(extra)):
        return False, router
    return handed and _same(float(out.loss), wanted), 0.0


def _labelled(model: Any) -> tuple[dict[str, Tensor], Tensor]:
    """A batch in which some tokens are judged, and twice their number, as if the step had another such batch."""
    length = trial_length(model)
    ids = torch.tensor(trial_rows(text_ids(model), 2, length), device=model.device)
    labels = ids.clone()
    labels[:, 0] = labels[0, : length // 2] = IGNORE
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return batch, 2 * (labels != IGNORE).sum()


def _cross_entropy(logits: Tensor, labels: Tensor, items: Tensor | None) -> Tensor:
    return ForCausalLMLoss(logits, labels, logits.shape[-1], items)


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= _SAME * abs(other)


def _router_weight(config: Any) -> float:
    return next((float(getattr(config, key)) for key in _ROUTER_KEYS if getattr(config, key, None)), 0.0)


def _takes_items(model: Any) -> bool:
    """Whether Trainer hands it num_items_in_batch; decided as Trainer does."""
    if hasattr(model, "accepts_loss_kwargs"):
        return bool(model.accepts_loss_kwargs)
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _known(model: Any, pad_id: int) -> int:
    """`pad_id`, or 0 where the tokenizer is another model's, which is told of by who reads rows."""
    return pad_id if pad_id < model.get_input_embeddings().weight.shape[0] else 0


def _on(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def _name(model: Any) -> str:
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


@contextmanager
def _refused(model: Any, what: str) -> Iterator[None]:
    """Within: what a model raises that wants images, codebooks or an encoder becomes one line."""
    try:
        yield
    except DudeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = reason_of(error, 200)
        raise ConfigError(f"model {_name(model)} {what} ({reason}); use another model or model.dtype") from error
