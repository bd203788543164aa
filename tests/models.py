"""Tiny random models of the architectures that the behaviour suite runs on."""

from __future__ import annotations

import torch
import transformers as hf

VOCAB = 96
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_COMMON, num_key_value_heads=4))


def _mistral():  # grouped queries: k and v are smaller than q
    return hf.MistralForCausalLM(hf.MistralConfig(**_COMMON, num_key_value_heads=2))


def _qwen3():
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_COMMON, num_key_value_heads=2, head_dim=12))


def _gemma3():  # tied embeddings
    config = hf.Gemma3TextConfig(
        **_COMMON, num_key_value_heads=2, head_dim=12, tie_word_embeddings=True, sliding_window=16
    )
    return hf.Gemma3ForCausalLM(config)


def _gpt2():  # Conv1D: weights kept as (in, out), with biases
    config = hf.GPT2Config(
        vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return hf.GPT2LMHeadModel(config)


def _opt():  # biases everywhere
    config = hf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        ffn_dim=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=48,
        dropout=0.0,  # read by functional calls, so it cannot be switched off afterwards
        attention_dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return hf.OPTForCausalLM(config)


def _bert():
    config = hf.BertConfig(**{k: v for k, v in _COMMON.items() if k not in ("bos_token_id", "eos_token_id")})
    return hf.BertForMaskedLM(config)


def _qwen3_moe():  # experts in one stacked tensor, attention in dense layers
    config = hf.Qwen3MoeConfig(
        **_COMMON, num_key_value_heads=2, head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    return hf.Qwen3MoeForCausalLM(config)


def _gpt_oss():  # experts stored as (experts, in, out), with biases
    config = hf.GptOssConfig(
        **_COMMON, num_key_value_heads=2, head_dim=12, num_local_experts=4, num_experts_per_tok=2, sliding_window=16
    )
    return hf.GptOssForCausalLM(config)


def _mixtral():
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(**_COMMON, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    )


def _llama4():  # experts stored as (experts, in, out), which its class does not say
    config = hf.Llama4TextConfig(
        **_COMMON, num_key_value_heads=2, head_dim=12, intermediate_size_mlp=80, num_local_experts=4
    )
    return hf.Llama4ForCausalLM(config)


STACKED = {"qwen3-moe": _qwen3_moe, "gpt-oss": _gpt_oss, "mixtral": _mixtral, "llama4": _llama4}
ARCHITECTURES = {
    "llama": _llama,
    "mistral-gqa": _mistral,
    "qwen3": _qwen3,
    "gemma3-tied": _gemma3,
    "gpt2-conv1d": _gpt2,
    "opt-bias": _opt,
    "bert": _bert,
}


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """A model with random weights and biases (biases start at zero in transformers, which would hide mistakes)."""
    torch.manual_seed(seed)
    model = {**ARCHITECTURES, **STACKED}[name]()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.3)
    for module in model.modules():  # the adapter's own dropout is what the tests are about
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.to(dtype).eval()


def make_stacked(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """`make` with experts that matter: transformers' are small, and Llama 4's zero."""
    model = make(name, torch.float32, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:
                parameter.normal_(std=0.1)
    return model.to(dtype)


def tokens(rows: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    """(rows, length) token ids."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: torch.nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits without a gradient, in the mode the model is in."""
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids).logits


def perturb(model: torch.nn.Module, scale: float = 0.1, seed: int = 2) -> None:
    """Move every trained adapter tensor away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_((scale * noise).to(parameter))


def optimizer_of(model: torch.nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    """AdamW on what is trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """The loss of one training step on `tokens`."""
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
