"""Model families of transformers, each as a tiny model with random weights, for every command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCAB = 320
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 257, "bos_token_id": 258, "eos_token_id": 256}
_TEXT = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GQA = {**_TEXT, "num_key_value_heads": 2}
_HEADS = {**_GQA, "head_dim": 8}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Family:
    """How its models are made, and what they read."""

    make: Callable[[], nn.Module]
    kind: str = "text"
    """text, seq2seq, masked or image."""

    def batch(self, rows: int = 2, length: int = 10) -> dict[str, Tensor]:
        """Inputs with labels; the same ones for each call."""
        generator = torch.Generator().manual_seed(1)
        if self.kind == "image":
            pixels = torch.randn(rows, 3, 28, 28, generator=generator)
            return {"pixel_values": pixels, "labels": torch.arange(rows)}
        ids = torch.randint(3, 250, (rows, length), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _causal(config: Any) -> nn.Module:
    automatic: Any = hf.AutoModelForCausalLM
    return automatic.from_config(config)


def _qwen3_next() -> nn.Module:
    config = hf.Qwen3NextConfig(
        **_HEADS,
        **_MOE,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )
    return _causal(config)


def _qwen2_vl() -> nn.Module:
    text = {**_GQA, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 14, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(text_config=text, vision_config=vision, **_IMAGE_TOKENS)
    return hf.Qwen2VLForConditionalGeneration(config)


_IMAGE_TOKENS = {
    "image_token_id": 300,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
}


def _qwen3_vl() -> nn.Module:
    text = {**_HEADS, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 14,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, **_IMAGE_TOKENS)
    return hf.Qwen3VLForConditionalGeneration(config)


def _gemma3_vl() -> nn.Module:
    config = hf.Gemma3Config(
        text_config={**_HEADS, "sliding_window": 16},
        vision_config=_SIGLIP,
        mm_tokens_per_image=4,
        image_token_index=300,
        boi_token_index=301,
        eoi_token_index=302,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _llava() -> nn.Module:
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**_GQA), vision_config=hf.CLIPVisionConfig(**_SIGLIP), image_token_id=300
    )
    return hf.LlavaForConditionalGeneration(config)


def _jamba() -> nn.Module:
    config = hf.JambaConfig(
        **_GQA,
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    )
    return _causal(config)


def _deepseek_v3() -> nn.Module:
    config = hf.DeepseekV3Config(
        **_TEXT,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )
    return _causal(config)


def _llama4() -> nn.Module:
    config = hf.Llama4TextConfig(
        **_HEADS,
        intermediate_size_mlp=48,
        num_local_experts=4,
        num_experts_per_tok=1,
        moe_layers=[1],
        attention_chunk_size=64,
    )
    return hf.Llama4ForCausalLM(config)


def _phi4_multimodal() -> nn.Module:
    config = hf.Phi4MultimodalConfig(
        **_GQA,
        vision_config={**_SIGLIP, "image_size": 56, "crop_size": 56},
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 1,
            "num_attention_heads": 4,
            "ext_pw_out_channel": 32,
            "nemo_conv_channels": 32,
            "depthwise_separable_out_channel": 32,
            "input_size": 16,
        },
    )
    return hf.Phi4MultimodalForCausalLM(config)


def _gpt(config: Any) -> nn.Module:
    return _causal(config)


FAMILIES: dict[str, Family] = {
    "Llama": Family(lambda: _causal(hf.LlamaConfig(**_GQA))),
    "Mistral": Family(lambda: _causal(hf.MistralConfig(**_GQA))),
    "Mixtral": Family(lambda: _causal(hf.MixtralConfig(**_GQA, num_local_experts=4))),
    "Qwen2": Family(lambda: _causal(hf.Qwen2Config(**_GQA))),
    "Qwen2-MoE": Family(lambda: _causal(hf.Qwen2MoeConfig(**_GQA, **_MOE, shared_expert_intermediate_size=24))),
    "Qwen3": Family(lambda: _causal(hf.Qwen3Config(**_HEADS))),
    "Qwen3-MoE": Family(lambda: _causal(hf.Qwen3MoeConfig(**_HEADS, **_MOE))),
    "Qwen3-Next": Family(_qwen3_next),
    "Qwen2-VL": Family(_qwen2_vl),
    "Qwen3-VL": Family(_qwen3_vl),
    "Gemma 2": Family(lambda: _causal(hf.Gemma2Config(**_HEADS, sliding_window=16))),
    "Gemma 3": Family(lambda: _causal(hf.Gemma3TextConfig(**_HEADS, sliding_window=16))),
    "Gemma 3 VL": Family(_gemma3_vl),
    "LLaVA": Family(_llava),
    "Phi-3": Family(lambda: _causal(hf.Phi3Config(**_GQA))),
    "Phi-4 multimodal": Family(_phi4_multimodal),
    "GPT-2": Family(lambda: _causal(hf.GPT2Config(**_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=256))),
    "GPT-J": Family(
        lambda: _causal(hf.GPTJConfig(**_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=256, rotary_dim=4))
    ),
    "GPT-NeoX": Family(lambda: _causal(hf.GPTNeoXConfig(**_TEXT))),
    "OPT": Family(
        lambda: _causal(hf.OPTConfig(**{**_TEXT, "ffn_dim": 48}, word_embed_proj_dim=32, dropout=0.0))
    ),
    "BLOOM": Family(lambda: _causal(hf.BloomConfig(**_TOKENS, hidden_size=32, n_layer=2, n_head=4))),
    "Falcon": Family(
        lambda: _causal(hf.FalconConfig(**_TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    ),
    "Mamba": Family(
        lambda: _causal(hf.MambaConfig(**_TOKENS, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=8))
    ),
    "Mamba 2": Family(
        lambda: _causal(
            hf.Mamba2Config(
                **_TOKENS, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=2,
                chunk_size=8,
            )
        )
    ),
    "Jamba": Family(_jamba),
    "DeepSeek-V3": Family(_deepseek_v3),
    "gpt-oss": Family(
        lambda: _causal(hf.GptOssConfig(**_HEADS, num_local_experts=4, num_experts_per_tok=2, sliding_window=16))
    ),
    "Llama 4": Family(_llama4),
    "OLMo 2": Family(lambda: _causal(hf.Olmo2Config(**_GQA))),
    "Granite": Family(lambda: _causal(hf.GraniteConfig(**_GQA))),
    "SmolLM3": Family(lambda: _causal(hf.SmolLM3Config(**_GQA))),
    "T5": Family(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=257,
                pad_token_id=257, eos_token_id=256, dropout_rate=0.0,
            )
        ),
        "seq2seq",
    ),
    "BERT": Family(
        lambda: hf.BertForMaskedLM(
            hf.BertConfig(**{k: v for k, v in _TEXT.items() if k not in ("bos_token_id", "eos_token_id")})
        ),
        "masked",
    ),
    "ViT": Family(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**_SIGLIP, num_labels=8)),
        "image",
    ),
}  # fmt: skip


def make(name: str) -> nn.Module:
    """A model of the family, without dropout, biases and zero-initialised weights moved away from zero."""
    torch.manual_seed(0)
    model = FAMILIES[name].make()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or not bool(parameter.any()):
                parameter.normal_(std=0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()
