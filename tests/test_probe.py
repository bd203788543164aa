"""What a model is, measured: refused where it sees the future, trained on its logits' cross-entropy, never mixed up."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from packaging.version import Version
from peft import get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from torch.nn import functional

from dude_peft import DudeConfig
from dude_peft.answer.decode import decode_all
from dude_peft.answer.decoding import Decoding
from dude_peft.answer.speaker import open_speaker
from dude_peft.chat.generate import generate
from dude_peft.config.schema import ModelSection, RunConfig
from dude_peft.data.batches import grouped
from dude_peft.data.encode import encode
from dude_peft.data.packing import packs_apart
from dude_peft.data.rows import load_rows
from dude_peft.data.template import Template
from dude_peft.errors import ConfigError
from dude_peft.model.load import load_model
from dude_peft.model.prefix import shares_prefixes
from dude_peft.model.probe import company_of, nature_of, quiet_router_
from dude_peft.terminal.display import Display
from dude_peft.training import loading
from dude_peft.training.run import run

PAD = 257
IDS = {"vocab_size": 261, "pad_token_id": PAD, "eos_token_id": 256, "bos_token_id": None}
SMALL = {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SMALL, "intermediate_size": 48, "max_position_embeddings": 256}
GROUPED = {**WIDE, "num_key_value_heads": 2, "head_dim": 8}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BART = {
    **IDS, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "dropout": 0.0,
    "attention_dropout": 0.0, "max_position_embeddings": 256, "init_std": 0.1,
}  # fmt: skip


def rwkv(layers: int = 2, **changes: object) -> hf.RwkvForCausalLM:
    sizes = {**SMALL, "num_hidden_layers": layers, "attention_hidden_size": 32, "context_length": 256, **changes}
    return hf.RwkvForCausalLM(hf.RwkvConfig(**sizes))


def recurrent_gemma() -> hf.RecurrentGemmaForCausalLM:
    sizes = {**GROUPED, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64}
    return hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(**sizes, block_types=["recurrent", "recurrent", "attention"])
    )


MODELS = {
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**WIDE, **NO_DROPOUT)),
    "bert-decoder": lambda: hf.BertLMHeadModel(hf.BertConfig(**WIDE, **NO_DROPOUT, is_decoder=True)),
    "bart": lambda: hf.BartForCausalLM(hf.BartConfig(**BART)),
    "llama": tiny_llama,
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**IDS, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
    "rwkv": lambda: rwkv(rescale_every=0),  # as `load_model` sets it
    "recurrent-gemma": recurrent_gemma,
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**SMALL, state_size=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, sliding_window=8, final_logit_softcapping=0.5)),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**GROUPED, **EXPERTS)),
    "router": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**GROUPED, **EXPERTS, output_router_logits=True, router_aux_loss_coef=0.5)
    ),
}


def made(name: str) -> torch.nn.Module:
    """Random everywhere: biases and the padding's embedding begin at zero in transformers, which hides much."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]()
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if key.endswith("bias"):
                    weight.normal_(std=0.1)
            model.get_input_embeddings().weight[PAD].normal_(std=0.5)
    return model.eval()


def saved(name: str, folder: Path) -> str:
    made(name).save_pretrained(folder / name)
    tiny_tokenizer(chat=False).save_pretrained(folder / name)
    return str(folder / name)


TARGETS = {"mamba": ["in_proj", "out_proj"]}
ROWS = [{"prompt": f"question {n}", "completion": "y" * (1 + 9 * n % 23)} for n in range(8)]


def trained(name: str, folder: Path, **changes: dict):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {
        "model": {"name_or_path": saved(name, folder), "dtype": "float32"},
        "adapter": {"r": 4, "lora_alpha": 12, "target_modules": TARGETS.get(name, "all-linear")},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 64, "template": "plain", "train_on": "all"},
        "train": {
            "max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
            "logging_steps": 1, "max_grad_norm": 1e9, "lr_scheduler_type": "constant", "warmup_steps": 0,
        },
        "evaluation": {"enabled": False},
        "output_dir": str(folder / "out"),
    }  # fmt: skip
    merged = {
        key: value | changes.get(key, {}) if isinstance(value, dict) else changes.get(key, value)
        for key, value in settings.items()
    }
    return run(RunConfig(**merged), quiet=False)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def reference(name: str, folder: Path) -> tuple[float, float]:
    """(loss, gradient's norm) of the first step, written out: every token counts the same, one row at a time."""
    model = load_model(ModelSection(name_or_path=str(folder / name), dtype="float32"), str(folder / name))
    config = DudeConfig(r=4, lora_alpha=12, target_modules=TARGETS.get(name, "all-linear"))
    model = get_peft_model(model, config).train()
    tokenizer = tiny_tokenizer(chat=False)
    examples = encode(
        load_rows(str(folder / "rows.jsonl")), Template(tokenizer, "plain"), tokenizer, 64, train_on="all"
    ).examples
    total, count = torch.zeros(()), 0
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        total = total + functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
        count += ids.shape[1] - 1
    loss = total / count
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), float(torch.stack([g.norm() for g in gradients]).norm())


QUICK = ["bart", "rwkv", "llama"]
SLOW = ["bert-decoder", "gpt2", "recurrent-gemma", "mamba", "gemma2", "qwen3-moe"]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_first_step_is_the_mean_over_all_its_tokens(tmp_path, capsys, name):
    trained(name, tmp_path)
    loss, norm = reference(name, tmp_path)
    first, second = lines_of(tmp_path)[:2]
    assert first["loss"] == pytest.approx(loss, rel=1e-5)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert second["loss"] < loss
    said = capsys.readouterr().out
    assert ("computes that from the logits" in said) == (name == "bart")


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ["gemma2", "qwen3-moe"])])
def test_the_first_step_through_trl_is_the_same(tmp_path, name):
    pytest.importorskip("trl", reason="TRL is not installed here")
    trained(name, tmp_path, train={"trainer": "trl"})
    loss, norm = reference(name, tmp_path)
    assert lines_of(tmp_path)[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert lines_of(tmp_path)[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_trl_is_refused_where_it_leaves_out_a_part_of_the_head(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed here")
    with pytest.raises(ConfigError, match=r"TRL's loss of BertLMHeadModel is not .* set train.trainer: transformers"):
        trained("bert-decoder", tmp_path, train={"trainer": "trl"}, adapter={"target_modules": ["query", "value"]})


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_a_router_s_loss_is_a_mean_over_the_step(tmp_path, capsys, trainer):
    """As many micro-batches as there are: the sum that a router's own loss makes under Trainer grows with them."""
    pytest.importorskip("trl", reason="TRL is not installed here")
    losses = []
    for size in (8, 1):
        folder = tmp_path / str(size)
        folder.mkdir()
        changes = {"trainer": trainer, "per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        trained("router", folder, train=changes)
        losses.append(lines_of(folder)[0]["loss"])
    loss, _ = reference("router", tmp_path / "1")
    # At best (all experts alike) the router's loss is the number of experts a token goes to.
    assert losses == pytest.approx([loss + 0.5 * 2] * 2, rel=0.05)
    assert "adds 0.5 times its router loss, here the mean over a step's batches" in capsys.readouterr().out


def test_a_model_that_sees_the_future_is_refused_everywhere(tmp_path):
    words = "BertLMHeadModel is not causal: it sees the tokens that it has to predict"
    with pytest.raises(ConfigError, match=words):
        trained("bert", tmp_path)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=words):
        open_speaker(str(tmp_path / "bert"), base=None, gguf_file=None, notes=Display(quiet=True))
    assert not packs_apart(made("bert"))
    assert not packs_apart(made("bert").bfloat16())
    assert not nature_of(made("bert").bfloat16(), PAD).causal


NATURES = {
    "bert": (False, False, 0.0), "bert-decoder": (True, True, 0.0), "bart": (True, False, 0.0),
    "llama": (True, True, 0.0), "gpt2": (True, True, 0.0), "rwkv": (True, True, 0.0),
    "recurrent-gemma": (True, True, 0.0), "mamba": (True, True, 0.0), "gemma2": (True, True, 0.0),
    "qwen3-moe": (True, True, 0.0), "router": (True, False, 0.5),
}  # fmt: skip
SHARES = {"bert-decoder", "llama", "gpt2", "qwen3-moe", "router"}
COMPANY = {"bart": "alike", "recurrent-gemma": "alike", "rwkv": "none", "bert": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NATURES)
def test_what_a_model_is(name, dtype):
    model = made(name).to(dtype)
    nature = nature_of(model, PAD)
    if name == "mamba" and Version(hf.__version__) < Version("5.6"):
        pytest.skip("mamba's own loss was another one: the run computes it from the logits")
    assert (nature.causal, nature.own_loss and nature.causal, nature.router) == NATURES[name]
    assert nature.right_padding or not nature.causal
    if nature.causal:
        quiet_router_(model)
        assert company_of(model, PAD) == COMPANY.get(name, "any")
        assert shares_prefixes(model, PAD) == (name in SHARES)


def test_keys_that_turn_with_the_length_of_the_row_are_not_shared():
    """Up to the first 64 positions they are those of any Llama, as far as a short row tells."""
    steady = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    for scaling, shares in (({"rope_type": "dynamic"}, False), ({"rope_type": "llama3", **steady}, True)):
        model = tiny_llama(rope_parameters={"rope_theta": 10000.0, "factor": 2.0, **scaling})
        assert shares_prefixes(model, PAD) == shares


def test_a_probe_leaves_no_trace():
    model = made("router")
    model.model.layers[0].train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    numbers = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    nature_of(model, PAD)
    quiet_router_(model)
    company_of(model, PAD)
    assert shares_prefixes(model, PAD)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), numbers[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == numbers[1:]
    loss = model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    loss.backward()  # nothing that it kept is of inference


def test_weights_that_a_model_would_rewrite_stay(tmp_path):
    """RWKV halves weights of its seventh block on when it infers: the adapter would be one of other weights."""
    model = rwkv(layers=8)
    with pytest.raises(ConfigError, match="changes its own weights while it runs"):
        nature_of(model, PAD)
    rwkv(layers=8).save_pretrained(tmp_path)
    loaded = load_model(ModelSection(name_or_path=str(tmp_path), dtype="float32"), str(tmp_path))
    assert nature_of(loaded, PAD).causal


class Padded(torch.nn.Module):
    """A llama whose logits tell how much padding its row has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama(initializer_range=0.2)
        self.config, self.device, self.dtype = self.inner.config, self.inner.device, self.inner.dtype
        self.get_input_embeddings = self.inner.get_input_embeddings

    def forward(self, input_ids, attention_mask, **rest):
        scale = 1 + (1 - attention_mask).sum(1)[:, None, None] / 10
        out = self.inner(input_ids=input_ids, attention_mask=attention_mask, **rest)
        out.logits = out.logits * scale
        return out


def test_padding_behind_a_row_that_shows_is_told(tmp_path, monkeypatch):
    assert not nature_of(Padded().eval(), PAD).right_padding
    monkeypatch.setattr(loading, "nature_of", lambda *given: replace(nature_of(*given), right_padding=False))
    with pytest.raises(ConfigError, match=r"per_device_train_batch_size: padding after a row changes .* set it to 1"):
        trained("llama", tmp_path)
    trained("llama", tmp_path, train={"per_device_train_batch_size": 1, "max_steps": 1})


def test_rows_share_a_batch_as_they_may():
    lengths = [5, 3, 5, 3, 5, 9]
    assert grouped(lengths, 2) == [[1, 3], [0, 2], [4, 5]]
    assert grouped(lengths, 2, "alike") == [[1, 3], [0, 2], [4], [5]]
    assert grouped(lengths, 4, "none") == [[1], [3], [0], [2], [4], [5]]


@pytest.mark.parametrize(
    "name", ["rwkv", "bart", *(pytest.param(n, marks=pytest.mark.slow) for n in ["recurrent-gemma", "mamba", "gpt2"])]
)
def test_answers_do_not_depend_on_the_batch(tmp_path, capsys, name):
    path = saved(name, tmp_path)
    speaker = open_speaker(path, base=None, gguf_file=None, notes=Display(quiet=True))
    prompts = [[70 + n, *range(5 + n, 5 + 3 * n)] for n in (1, 4, 4, 2, 7)]
    alone = [decode_all(speaker, [prompt], Decoding(6), batch_size=1)[0] for prompt in prompts]
    assert decode_all(speaker, prompts, Decoding(6), batch_size=4) == alone
    generate(path, ["a", "bcd", "efghijk"], raw=True, max_new_tokens=3, quiet=False)
    told = "lets padding change" in (said := capsys.readouterr().err) or "one at a time" in said
    assert told == (COMPANY.get(name, "any") != "any")


def test_held_out_answers_of_a_run_do_not_depend_on_the_batch(tmp_path, capsys):
    data = {"train_on": "answers", "test": str(tmp_path / "rows.jsonl")}
    answers = []
    for size in (8, 1):
        evaluation = {"enabled": True, "rows": 8, "max_new_tokens": 4, "batch_size": size}
        report = trained(
            "rwkv", tmp_path, data=data, evaluation=evaluation, output_dir=str(tmp_path / f"out{size}"),
            train={"max_steps": 1},
        )  # fmt: skip
        answers.append([answer.text for answer in report.before.answers])
    assert answers[0] == answers[1]
    assert "they are run one at a time" in capsys.readouterr().out
