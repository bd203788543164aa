"""`dude plan`'s predicted peaks beside GPU figures that others published: model, setting, their number, ours.

    python benchmarks/published.py --json benchmarks/results/DATE-plan-published.json

No GPU, no weights and no network: every model is its configuration, written down here, and the plan is computed as
`dude plan` computes it. What a figure measures differs, and so does what ours is:

    allocated  the most that torch had allocated            ours without what libraries and the device take
    reserved   the most that torch's allocator had reserved  the same
    card       the memory of the smallest card that does it  ours with what libraries and the device take
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from measure import arguments, console, finish, set_threads, show

from dude_peft.config.schema import (
    AdapterSection,
    DataSection,
    EvaluationSection,
    ModelSection,
    RunConfig,
    TrainSection,
)
from dude_peft.model.load import load_settings
from dude_peft.planning.bill import Cost, cost
from dude_peft.terminal.quiet import quiet_imports

GIB, MIB = 1 << 30, 1 << 20


def _llama(hidden: int, wide: int, layers: int, heads: int, shared: int, words: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "vocab_size": words,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        **others,
    }


_MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "SmolLM2-360M": _llama(960, 2560, 32, 15, 5, 49152, tie_word_embeddings=True),
    "SmolLM2-1.7B": _llama(2048, 8192, 24, 32, 32, 49152, tie_word_embeddings=True),
    "TinyLlama-1.1B": _llama(2048, 5632, 22, 32, 4, 32000),
    "Qwen2.5-1.5B": _llama(1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True, model_type="qwen2"),
    "Llama-3.2-3B": _llama(3072, 8192, 28, 24, 8, 128256, head_dim=128, tie_word_embeddings=True),
    "Llama-2-7B": _llama(4096, 11008, 32, 32, 32, 32000),
    "Mistral-7B": _llama(4096, 14336, 32, 32, 8, 32000, model_type="mistral", sliding_window=None),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8, 128256),
    "Llama-3.3-70B": _llama(8192, 28672, 80, 64, 8, 128256),
}


@dataclass(frozen=True)
class Figure:
    """One published number, and the run that it is of."""

    source: str
    link: str
    model: str
    setting: str
    theirs: float
    """Bytes."""
    measures: str
    """allocated, reserved or card."""
    rows: int
    length: int
    model_keys: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    """What makes the two differ, where something is known."""
    beside: float = 0.0
    """Bytes that their code has at the peak, by `why`, and ours has not."""


def _peft() -> list[Figure]:
    """PEFT's own benchmark, in which rows have at most 768 tokens. Adapters are PEFT's layers, float32 on bfloat16."""
    commits = {
        "LoRA, r = 32, q v": ("eccc7885d35ec1b425e6aac7638d020aa3153470", "rank32", 22273851392),
        "LoRA, r = 64, q v": ("18e07f189c06cbc6472e4e3ec180358319de8175", "rank64", 22540189696),
        "LoRA, r = 10, MLP": ("1948110ce61086030772abf36aa9396c5c3e6739", "rank10-target-mlp", 24712839168),
        "DoRA, r = 32, q v": ("9bb1ae7b230a9bc3b12e3124aa0c8f30616eb15e", "rank32-dora", 24553455616),
    }
    found = []
    for title, (commit, name, theirs) in commits.items():
        rank = int(title.split("r = ")[1].split(",")[0])
        layers = ["gate_proj", "up_proj", "down_proj"] if "MLP" in title else ["q_proj", "v_proj"]
        found.append(
            Figure(
                "PEFT, MetaMathQA",
                f"https://github.com/huggingface/peft/blob/{commit}/method_comparison/MetaMathQA/results/"
                f"lora--llama-3.2-3B-{name}.json",
                "Llama-3.2-3B",
                f"{title}, 4 rows of 768",
                theirs,
                "reserved",
                4,
                768,
                {"dtype": "bfloat16"},
                _by_peft(rank, layers, use_dora="DoRA" in title),
            )
        )
    return found


_FITCHECK = "https://github.com/Anassbzdd/fitcheck/blob/{}/data/measurements/t4-{}.json"
_T4 = {
    "qlora": _FITCHECK.format("02ebe015adf8cef1f2c33dee6dae41ab813e9773", "qlora-2026-09-01"),
    "sweep": _FITCHECK.format("1e72b19a3b48fca95c3212141c82ffaaa9ba5752", "sweep-2026-09-15"),
}
_T4_MIB: list[tuple[str, str, str, str, int, int, float]] = [
    ("qlora", "TinyLlama-1.1B", "nf4", "eager", 2, 512, 1849),
    ("qlora", "TinyLlama-1.1B", "nf4", "eager", 2, 1024, 2876),
    ("qlora", "TinyLlama-1.1B", "nf4", "eager", 2, 2048, 6655),
    ("qlora", "TinyLlama-1.1B", "nf4", "sdpa", 2, 512, 1847),
    ("qlora", "TinyLlama-1.1B", "nf4", "sdpa", 2, 1024, 2528),
    ("qlora", "TinyLlama-1.1B", "nf4", "sdpa", 2, 2048, 3897),
    ("sweep", "SmolLM2-135M", "none", "eager", 2, 512, 1027.29443359375),
    ("sweep", "SmolLM2-135M", "none", "sdpa", 2, 512, 1026.91943359375),
    ("sweep", "SmolLM2-135M", "nf4", "sdpa", 2, 512, 1063.81396484375),
    ("sweep", "SmolLM2-360M", "none", "eager", 1, 4096, 4908.51171875),
    ("sweep", "SmolLM2-360M", "none", "sdpa", 1, 4096, 3754.77734375),
    ("sweep", "SmolLM2-360M", "nf4", "eager", 1, 4096, 5687.154296875),
    ("sweep", "SmolLM2-360M", "nf4", "sdpa", 1, 4096, 4017.841796875),
    ("sweep", "SmolLM2-1.7B", "nf4", "eager", 4, 1024, 5297.271484375),
    ("qlora", "SmolLM2-1.7B", "nf4", "sdpa", 4, 1024, 5281),
    ("sweep", "Qwen2.5-1.5B", "none", "eager", 2, 1024, 7405.8095703125),
    ("sweep", "Qwen2.5-1.5B", "none", "sdpa", 2, 1024, 7401.8095703125),
    ("sweep", "Qwen2.5-1.5B", "nf4", "eager", 2, 1024, 6838.541015625),
    ("sweep", "Qwen2.5-1.5B", "nf4", "sdpa", 2, 1024, 6827.666015625),
]


def _fitcheck() -> list[Figure]:
    """Single steps on a Tesla T4 in float16, measured for another planner. Quantised bases keep the rest in float32."""
    found = []
    for file, model, quantised, attention, rows, length, mib in _T4_MIB:
        packed = quantised == "nf4"
        keys: dict[str, Any] = {"dtype": "float32" if packed else "float16", "attn_implementation": attention}
        if packed:
            keys["quantization"] = {"method": "nf4", "compute_dtype": "float16"}
        layers = ["q_proj", "k_proj", "v_proj", "o_proj"]
        ours = {"method": "lora", "r": 32, "lora_alpha": 64, "target_modules": layers}
        found.append(
            Figure(
                "fitcheck, Tesla T4",
                _T4[file],
                model,
                f"{'QLoRA' if packed else 'LoRA'}, r = 32, q k v o, {_rows(rows, length)}, {attention}, checkpointed",
                mib * MIB,
                "allocated",
                rows,
                length,
                keys,
                ours if packed else _by_peft(32, layers, lora_alpha=64),
                {"gradient_checkpointing": True},
                why="their loop keeps the model's outputs through the backward, Trainer does not",
                beside=_logits(model, rows, length, 4 if packed else 2),
            )
        )
    return found


def _unsloth() -> list[Figure]:
    """The longest row that Hugging Face's own classes train on a card, with flash attention.

    Where the tables are silent: checkpointing, the 8-bit AdamW and the double quantisation of their examples, and
    `prepare_model_for_kbit_training`, which has everything that is not quantised in float32.
    """
    cards = {12: 932, 16: 2551, 24: 5789, 40: 12264, 48: 15502, 80: 28454}
    runs = [("Llama-3.1-8B", card, length) for card, length in cards.items()] + [("Llama-3.3-70B", 80, 6916)]
    return [
        Figure(
            "Unsloth, Hugging Face + FA2",
            "https://github.com/unslothai/unsloth/blob/000252c947fe9421071216c19fd53e5d0495a1c0/README.md",
            model,
            f"QLoRA, r = 32, all linear, 1 row of {length:,}, flash attention, a card of {card} GB",
            card * GIB,
            "card",
            1,
            length,
            {
                "dtype": "float32",
                "attn_implementation": "flash_attention_2",
                "quantization": {"method": "nf4", "compute_dtype": "bfloat16", "double_quantization": True},
            },
            {"method": "lora", "r": 32, "lora_alpha": 32},
            {"gradient_checkpointing": True, "bf16": True, "optim": "adamw_8bit"},
            why="transformers of 2024 copied the float32 logits to shift them, today's shifts the labels",
            beside=_logits(model, 1, length, 4),
        )
        for model, card, length in runs
    ]


_OLD_BITSANDBYTES = (
    "bitsandbytes 0.42, which LitGPT asks for, kept the input of every 4-bit layer for the backward, today's does not; "
    "the rest is not explained"
)


def _litgpt() -> list[Figure]:
    """LitGPT's table for its own configurations: its own models and layers, bfloat16, no checkpointing."""
    runs = [
        ("Llama-2-7B", "LoRA", 2, 19.77),
        ("Llama-2-7B", "QLoRA", 2, 13.68),
        ("Llama-3.1-8B", "LoRA", 1, 19.73),
        ("Llama-3.1-8B", "QLoRA", 2, 17.41),
        ("Mistral-7B", "LoRA", 2, 20.66),
        ("Mistral-7B", "QLoRA", 2, 14.29),
    ]
    return [
        Figure(
            "LitGPT",
            "https://github.com/Lightning-AI/litgpt/blob/03ffc5515b251fb7e3a461efd0e3c163e45b6b3b/config_hub/finetune/"
            "README.md",
            model,
            f"{method}, r = 32, q v, {_rows(rows, 512)}",
            gigabytes * 1e9,
            "allocated",
            rows,
            512,
            {"dtype": "bfloat16", **({"quantization": {"method": "nf4"}} if method == "QLoRA" else {})},
            {
                "method": "lora",
                "r": 32,
                "lora_alpha": 16,
                "lora_dropout": 0.05,
                "target_modules": ["q_proj", "v_proj"],
            },
            why=_OLD_BITSANDBYTES if method == "QLoRA" else "",
            beside=_inputs(model, rows * 512) if method == "QLoRA" else 0.0,
        )
        for model, method, rows, gigabytes in runs
    ]


_LOSS_IN_CHUNKS = {"use_liger_kernel": True, "liger_kernel_config": {"rms_norm": False}}


def _torchtune() -> list[Figure]:
    """The table of torchtune: its own models and layers, compiled, the loss in chunks."""
    link = "https://github.com/pytorch/torchtune/blob/0031bfb080bd35ec533c412df883cf2bf7bf7fe4/README.md"
    four = ["q_proj", "k_proj", "v_proj", "o_proj"]
    runs: list[tuple[str, float, str, dict[str, Any]]] = [
        ("LoRA, r = 8, q k v o, a card of 24 GB", 16.2, "none", {"target_modules": four}),
        ("QLoRA, r = 8, all linear, a card of 24 GB", 7.4, "nf4", {}),
    ]
    return [
        Figure(
            "torchtune 0.3",
            link,
            "Llama-3.1-8B",
            f"{setting}, 2 rows of 2,048, checkpointed, compiled, loss in chunks",
            gib * GIB,
            "allocated",
            2,
            2048,
            {
                "dtype": "bfloat16",
                "attn_implementation": "flash_attention_2",
                **({"quantization": {"method": "nf4", "double_quantization": True}} if quantised == "nf4" else {}),
            },
            {"method": "lora", "r": 8, "lora_alpha": 16, **targets},
            {"gradient_checkpointing": True, "optim": "adamw_torch_fused", **_LOSS_IN_CHUNKS},
            why="theirs takes the loss an eighth at a time, ours as Liger's fused loss does",
        )
        for setting, gib, quantised, targets in runs
    ]


def _longlora() -> list[Figure]:
    """Plain LoRA of LongLoRA, on eight GPUs under DeepSpeed. A collection that quotes the table has the number."""
    return [
        Figure(
            "LongLoRA, table 12",
            "https://arxiv.org/abs/2309.12307",
            "Llama-2-7B",
            "LoRA, r = 8, q k v o, 1 row of 8,192, flash attention, checkpointed",
            25.7 * 1e9,
            "allocated",
            1,
            8192,
            {"dtype": "bfloat16", "attn_implementation": "flash_attention_2"},
            {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
            {"gradient_checkpointing": True, "bf16": True},
            why="DeepSpeed keeps two buffers of the 1e9 numbers that their configuration sets, and transformers of "
            "2023 copied the float32 logits",
            beside=2 * 1e9 * 2 + _logits("Llama-2-7B", 1, 8192, 4),
        )
    ]


def _logits(model: str, rows: int, length: int, itemsize: int) -> float:
    return float(rows * length * _MODELS[model]["vocab_size"] * itemsize)


def _inputs(model: str, tokens: int) -> float:
    """Of a block's linear layers, in bfloat16: three of the hidden size, and that of the down projection."""
    shape = _MODELS[model]
    return float(tokens * shape["num_hidden_layers"] * 2 * (3 * shape["hidden_size"] + shape["intermediate_size"]))


def _rows(rows: int, length: int) -> str:
    return f"{rows} row{'s' * (rows > 1)} of {length:,}"


def _by_peft(rank: int, layers: list[str], **others: Any) -> dict[str, Any]:
    """Stock PEFT's LoRA."""
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": layers, **others}
    return {"method": "peft:LORA", "peft": settings}


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--only", default="", help="sources whose name has this")
    settings = parser.parse_args()
    set_threads(settings)
    figures = [*_peft(), *_fitcheck(), *_unsloth(), *_litgpt(), *_torchtune(), *_longlora()]
    results: dict[str, dict[str, Any]] = {}
    for figure in figures:
        if settings.only.lower() in figure.source.lower():
            title = f"{figure.source}: {figure.model}, {figure.setting}"
            results[title] = compared(figure)
            found = results[title]
            console.print(
                f"{title}: {found['theirs_gib']:.2f} theirs, {found['ours_gib']:.2f} ours, {found['ratio']:.2f}"
            )
    show("peak memory of a step, GiB", results, ["theirs_gib", "ours_gib", "ratio", "ratio_with_it", "peak_in"])
    finish("published", settings, results)


def compared(figure: Figure) -> dict[str, Any]:
    """The plan of a figure's run beside it."""
    found = planned(figure)
    bill = found.bill
    ours = bill.total - (0 if figure.measures == "card" else bill.runtime)
    return {
        "source": figure.source,
        "link": figure.link,
        "model": figure.model,
        "setting": figure.setting,
        "measures": figure.measures,
        "theirs_gib": figure.theirs / GIB,
        "ours_gib": ours / GIB,
        "ratio": ours / figure.theirs,
        "why": figure.why,
        "beside_gib": figure.beside / GIB,
        "ratio_with_it": (ours + figure.beside) / figure.theirs,
        "peak_in": found.peak_in,
        "uncounted": found.uncounted,
        "bill_mib": {name: value / MIB for name, value in vars(bill).items()},
    }


def planned(figure: Figure) -> Cost:
    """What `dude plan` predicts for the run."""
    with tempfile.TemporaryDirectory() as folder, quiet_imports():
        shape = dict(_MODELS[figure.model])
        made: Any = transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)
        made.save_pretrained(folder)
        config = RunConfig(
            model=ModelSection(name_or_path=folder, **figure.model_keys),
            adapter=AdapterSection(**figure.adapter),
            data=DataSection(train="none.jsonl"),
            train=TrainSection(per_device_train_batch_size=figure.rows, **figure.train),
            evaluation=EvaluationSection(enabled=False),
            output_dir=str(Path(folder) / "out"),
        )
        return cost(config, load_settings(config.model, folder), folder, figure.length, gpu=True)


if __name__ == "__main__":
    main()
