"""Tiny vision-language models of several families with random weights, their processors, and pictures of one colour."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import _GQA, _HEADS, _SIGLIP
from PIL import Image
from tiny import SPECIAL, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}
_OPEN = "{% for message in messages %}<|{{ message['role'] }}|>"
_CLOSE = "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
_LISTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
)
_BOTH = "{% if message['content'] is string %}{{ message['content'] }}{% else %}" + _LISTS + "{% endif %}"


def _template(image: str, *, lists_only: bool = False) -> str:
    """Writes `image` for an image; `lists_only`: nothing of a content that is text, as Idefics' template."""
    return (_OPEN + (_LISTS if lists_only else _BOTH) + _CLOSE).replace("IMAGE", image)


_IDS = {"pad_token_id": 257, "bos_token_id": None, "eos_token_id": 256}
_FIRST = 256 + len(SPECIAL)


def _tokenizer(template: str, marks: Sequence[str], **named: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.add_tokens(list(marks), special_tokens=True)
    tokenizer.chat_template = template
    for name, token in named.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
        tokenizer.init_kwargs[name] = token
    return tokenizer


def _text(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**base, **_IDS, "vocab_size": 320, "max_position_embeddings": 512, **changes}


def _qwen(kind: str) -> tuple[Any, Any, Any]:
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokens = dict(
        zip(
            ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
            range(_FIRST, _FIRST + 4),
            strict=True,
        )
    )
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    tokenizer = _tokenizer(_template("<|vision_start|><|image_pad|><|vision_end|>"), marks)
    if kind == "Qwen2-VL":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 14, "mlp_ratio": 2}
        config: Any = hf.Qwen2VLConfig(text_config=_text(_GQA, **rope), vision_config=vision, **tokens)
        model: Any = hf.Qwen2VLForConditionalGeneration(config)
        patch, name = 14, "Qwen2VLProcessor"
    else:
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 16,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        }
        config = hf.Qwen3VLConfig(text_config=_text(_HEADS, **rope), vision_config=vision, **tokens)
        model = hf.Qwen3VLForConditionalGeneration(config)
        patch, name = 16, "Qwen3VLProcessor"
    eye = hf.Qwen2VLImageProcessorPil(
        patch_size=patch, size={"shortest_edge": (2 * patch) ** 2, "longest_edge": 16 * (2 * patch) ** 2}
    )
    return model, tokenizer, (name, eye, {})


def _gemma3() -> tuple[Any, Any, Any]:
    marks = ["<image_soft_token>", "<start_of_image>", "<end_of_image>"]
    tokenizer = _tokenizer(
        _template("<start_of_image>"), marks, image_token=marks[0], boi_token=marks[1], eoi_token=marks[2]
    )
    config = hf.Gemma3Config(
        text_config=_text(_HEADS, sliding_window=16),
        vision_config=_SIGLIP,
        mm_tokens_per_image=4,
        image_token_index=_FIRST,
        boi_token_index=_FIRST + 1,
        eoi_token_index=_FIRST + 2,
    )
    eye = hf.Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    model: Any = hf.Gemma3ForConditionalGeneration(config)
    model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(std=0.2)  # zeros pass nothing on
    return model, tokenizer, ("Gemma3Processor", eye, {"image_seq_length": 4})


def _llava() -> tuple[Any, Any, Any]:
    tokenizer = _tokenizer(_template("<image>\n"), ["<image>"])
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**_text(_GQA)), vision_config=hf.CLIPVisionConfig(**_SIGLIP), image_token_id=_FIRST
    )
    eye = hf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    more = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return hf.LlavaForConditionalGeneration(config), tokenizer, ("LlavaProcessor", eye, more)


def _idefics3() -> tuple[Any, Any, Any]:
    marks = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    marks += [f"<row_{i}_col_{j}>" for i in range(1, 3) for j in range(1, 3)]
    tokenizer = _tokenizer(_template("<image>", lists_only=True), marks)
    vision = {**_SIGLIP, "image_size": 28, "patch_size": 14}
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(**_text(_GQA)),
        vision_config=vision,
        image_token_id=_FIRST,
        scale_factor=2,
    )
    eye = hf.Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    return hf.Idefics3ForConditionalGeneration(config), tokenizer, ("Idefics3Processor", eye, {"image_seq_len": 1})


FAMILIES: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "Qwen2-VL": lambda: _qwen("Qwen2-VL"),
    "Qwen3-VL": lambda: _qwen("Qwen3-VL"),
    "Gemma 3": _gemma3,
    "LLaVA": _llava,
    "Idefics3": _idefics3,
}


BY_DAY = [name if name == "LLaVA" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


def save_seeing(folder: Path, family: str = "LLaVA", *, seed: int = 0, sharp: float = 1.0) -> Path:
    """Model, tokenizer and processor of a family as a local checkpoint, as the hub has them.

    `sharp` multiplies the frozen output layer: with random small weights no adapter can make a token likely.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model, tokenizer, (name, eye, more) = FAMILIES[family]()
        model.get_output_embeddings().weight.mul_(sharp)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    eye.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": name, **more}), encoding="utf-8")
    return folder


def picture(path: Path, colour: str, size: tuple[int, int] = (32, 32)) -> Path:
    """A picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[colour]).save(path)
    return path


def row(colour: str, *images: str, question: str = "Which colour?") -> dict[str, Any]:
    """A row that shows pictures and answers with a colour."""
    content: Any = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": colour}]}


def write_seen(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path
