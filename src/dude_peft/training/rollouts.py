"""The answers that a model gives to the prompts of a step, what they are rewarded with, and the batches made of them.

What is drawn depends on the run's seed, the step and the weights alone, so that a resumed run draws the same. Of
several processes each answers its share of the prompts, and all know what all answers are rewarded with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dude_peft.answer.decoding import Decoding
from dude_peft.answer.merged import merged_if_equal
from dude_peft.config.schema import GrpoSection
from dude_peft.data.batches import Company, grouped, pad_right
from dude_peft.data.formats import Row
from dude_peft.data.labels import IGNORE
from dude_peft.folder.state import load_random_state, random_state
from dude_peft.machine import processes
from dude_peft.measure.token_logps import token_logps
from dude_peft.model.outputs import can_keep_few, kept_logits
from dude_peft.rewards.judge import Group, Judge
from dude_peft.training.drawn import Drawn, asked_and_answer, draw, text_of
from dude_peft.training.group_losses import advantages
from dude_peft.tuner.untouched import as_base

_PATIENCE = 10
"""Steps after which it is told that nothing is learned."""


@dataclass
class Rollouts:
    """Answers, rewards and micro-batches of one step after the other."""

    model: Any
    """With its adapter."""
    tokenizer: Any
    examples: Sequence[Mapping[str, list[int]]]
    """Of which the labels are those of the answer."""
    settings: GrpoSection
    judge: Judge
    seed: int
    name_of: Callable[[int], str]
    """A row's index -> its place in the data."""
    conversation_of: Callable[[int], Row]
    """A row's index -> what it asks (`TokenSet.conversation`); only asked for reward models."""
    note: Callable[[Mapping[str, float], Any], None]
    """Hears what the answers of a step are like (`RewardedLoss.note`)."""
    write: Callable[[Mapping[str, Any]], None]
    """One line of rollouts.jsonl."""
    warn: Callable[[str], None]
    company: Company = "any"
    """Which prompts share a batch."""
    bf16: bool = False
    """Whether the model works under autocast."""

    _batches: list[dict[str, Tensor]] = field(default_factory=list, init=False)
    """Of the answers at hand."""
    _alike: int = field(default=0, init=False)
    """Steps, one behind the other, in which no reward differed within a group."""
    _endless: int = field(default=0, init=False)
    """The same, in which no answer ended."""

    def of_step(self, asked: Sequence[Mapping[str, Tensor]], step: int) -> list[dict[str, Tensor]]:
        """The micro-batches of an optimizer step; every process has to call it.

        Args:
            asked: the numbers of their rows, `rows`, each as often in turn as it is answered.
            step: number of the optimizer step, from 0.

        Raises:
            DataError: a reward fails.
            NumericsError: NaN or Inf in the logits.
        """
        if step % self.settings.num_iterations == 0 or not self._batches:
            rows = [batch["rows"].tolist() for batch in asked]
            self._batches = self._made(rows, step)
        return [dict(batch) for batch in self._batches]

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps, as JSON."""
        return {"alike": self._alike, "endless": self._endless}

    def tensors(self, step: int) -> dict[str, Tensor]:
        """What it keeps behind `step` of the answers from which more is to be learned."""
        if step % self.settings.num_iterations == 0:
            return {}
        every = enumerate(self._batches)
        return {f"{number}.{name}": tensor for number, batch in every for name, tensor in batch.items()}

    def take_up(self, state: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        """Goes on from what `state` and `tensors` gave."""
        self._alike, self._endless = state["alike"], state["endless"]
        batches: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            number, _, name = key.partition(".")
            batches.setdefault(int(number), {})[name] = tensor.to(self.model.device)
        self._batches = [batches[number] for number in sorted(batches)]

    def _made(self, rows: list[list[int]], step: int) -> list[dict[str, Tensor]]:
        settings = self.settings
        flat = [row for part in rows for row in part]
        prompts = {row: self._prompt(row) for row in flat}
        self.model.eval()
        every = processes.done_by_all(lambda: self._answered(flat, prompts, step))
        drawn, scores = every[processes.rank()]
        by_reward = torch.tensor([each for _, part in every for each in part], dtype=torch.float64)
        weights = torch.tensor([reward.weight for reward in settings.rewards], dtype=torch.float64)
        rewards = by_reward @ weights
        gained = advantages(rewards, settings)
        self._tell(by_reward, rewards, [(len(each.ids), each.ended) for part, _ in every for each in part])
        first = processes.rank() * len(flat)
        own = slice(first, first + len(flat))
        rewards, gained = rewards[own], gained[own]
        self._keep(step, flat, prompts, drawn, scores, rewards, gained)
        batches, begin = [], 0
        for part in rows:
            chosen = slice(begin, begin + len(part))
            batches.append(self._batch(part, prompts, drawn[chosen], gained[chosen]))
            begin += len(part)
        return batches

    def _answered(
        self, rows: list[int], prompts: Mapping[int, list[int]], step: int
    ) -> tuple[list[Drawn], list[list[float]]]:
        """An answer to each of the rows, and what each reward gives it."""
        size = self.settings.num_generations
        drawn = self._draw([prompts[row] for row in rows], step)
        scores: list[list[float]] = []
        for begin in range(0, len(rows), size):
            scores += self.judge.score(self._group(rows[begin], prompts, drawn[begin : begin + size]))
        return drawn, scores

    def _prompt(self, row: int) -> list[int]:
        """What is asked: all before the answer."""
        return asked_and_answer(self.examples[row], self.tokenizer)[0]

    def _group(self, row: int, prompts: Mapping[int, list[int]], drawn: Sequence[Drawn]) -> Group:
        return Group(
            self.name_of(row),
            self._text(prompts[row]),
            [each.text for each in drawn],
            [each.ids for each in drawn],
            self._answer(row),
            self.conversation_of(row) if self.settings.reads_conversations else None,
        )

    def _answer(self, row: int) -> str:
        return asked_and_answer(self.examples[row], self.tokenizer)[1]

    def _text(self, ids: list[int]) -> str:
        return text_of(self.tokenizer, ids)

    def _draw(self, prompts: list[list[int]], step: int) -> list[Drawn]:
        settings = self.settings
        decoding = Decoding(settings.max_completion_length, settings.temperature, settings.top_p, self.seed)
        batches = grouped([len(prompt) for prompt in prompts], len(prompts), self.company)
        before = random_state()
        decoding.start(step * processes.count() + processes.rank())
        with merged_if_equal(self.model, not self.bf16, lambda model: _last_logits(model, prompts[0])):
            found = draw(self.model, self.tokenizer, prompts, batches, decoding, name="the tuned model", bf16=self.bf16)
        load_random_state(*before)
        return found

    def _batch(
        self, rows: list[int], prompts: Mapping[int, list[int]], drawn: Sequence[Drawn], gained: Tensor
    ) -> dict[str, Tensor]:
        examples = []
        for row, each in zip(rows, drawn, strict=True):
            learned = each.ended or not self.settings.mask_truncated_completions
            labels = each.ids if learned else [IGNORE] * len(each.ids)
            asked = prompts[row]
            examples.append({"input_ids": [*asked, *each.ids], "labels": [IGNORE] * len(asked) + labels})
        batch = pad_right(examples, int(self.tokenizer.pad_token_id))
        if can_keep_few(self.model):
            first = min(len(prompts[row]) for row in rows)  # predicted by the token before
            batch["labels"] = batch["labels"][:, max(first - 1, 0) :]
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        if self.settings.beta > 0:
            with as_base(self.model):
                batch["base"] = self._logps(batch)
        if self.settings.num_iterations > 1:
            batch["old"] = self._logps(batch)
        return batch | {"rows": torch.tensor(rows), "advantages": gained.float().to(self.model.device)}

    @torch.no_grad()
    def _logps(self, batch: Mapping[str, Tensor]) -> Tensor:
        rows = {name: tensor for name, tensor in batch.items() if name in ("input_ids", "attention_mask")}
        logits = self.model(**rows, **kept_logits(batch), use_cache=False).logits
        return token_logps(logits, batch["labels"], self.settings.temperature)[0]

    def _tell(self, by_reward: Tensor, rewards: Tensor, drawn: Sequence[tuple[int, bool]]) -> None:
        """Of all processes; `drawn` has the tokens of each answer, and whether it ended."""
        settings = self.settings
        spreads = rewards.view(-1, settings.num_generations).std(1)
        same = torch.isclose(spreads, torch.zeros_like(spreads))
        ended = sum(end for _, end in drawn)
        found = {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std()),
            "frac_reward_zero_std": float(same.double().mean()),
            "completions/mean_length": sum(length for length, _ in drawn) / len(drawn),
            "completions/clipped_ratio": 1 - ended / len(drawn),
        }
        for number, reward in enumerate(settings.rewards):
            found[f"rewards/{reward.title}/mean"] = float(by_reward[:, number].mean())
            found[f"rewards/{reward.title}/std"] = float(by_reward[:, number].std())
        self.note(found, self.model.device)
        self._alike = self._alike + 1 if bool(same.all()) else 0
        self._endless = 0 if ended else self._endless + 1
        if self._alike == _PATIENCE:
            self.warn(
                f"in {_PATIENCE} steps no reward differed within any group, so nothing was learned from rewards; "
                "choose rewards that tell answers apart, easier or harder prompts, or a higher temperature"
            )
        if self._endless == _PATIENCE:
            self.warn(
                f"in {_PATIENCE} steps no answer ended within train.grpo.max_completion_length "
                f"{settings.max_completion_length}; raise it, or train on answers first (objective: sft)"
            )

    def _keep(
        self,
        step: int,
        rows: list[int],
        prompts: Mapping[int, list[int]],
        drawn: Sequence[Drawn],
        scores: list[list[float]],
        rewards: Tensor,
        gained: Tensor,
    ) -> None:
        names = [reward.title for reward in self.settings.rewards]
        lines = []
        for row, each, own, reward, advantage in zip(
            rows, drawn, scores, rewards.tolist(), gained.tolist(), strict=True
        ):
            line = {
                "step": step + 1,
                "row": self.name_of(row),
                "prompt": self._text(prompts[row]),
                "answer": self._answer(row),
                "completion": each.text,
                "tokens": len(each.ids),
                "ended": each.ended,
                "rewards": dict(zip(names, own, strict=True)),
                "reward": reward,
                "advantage": advantage,
            }
            lines.append(line)
        for line in itertools.chain.from_iterable(processes.gathered(lines)):  # only the first process writes them
            self.write(line)


def _last_logits(model: Any, prompt: Sequence[int]) -> Tensor:
    """Behind a prompt; (1, vocabulary)."""
    found: Tensor = model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False).logits[:, -1].float()
    return found.masked_fill(found.isinf(), 0.0)  # -inf is how some models rule out tokens
