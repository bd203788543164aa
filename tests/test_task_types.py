"""Every task type of PEFT: the head is trained, saved and loaded, and nothing of a model is silently another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers as hf
from models import VOCAB, make, tokens
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper

from dude_peft import DudeConfig, load_adapter
from dude_peft.artifact.manifest import read_manifest
from dude_peft.errors import ArtifactError, ConfigError, NumericsError
from dude_peft.exporting.run import merge
from dude_peft.exporting.verify import verify
from dude_peft.tuner.layer import DudeLinear

WEIGHTS = "adapter_model.safetensors"
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # a model that says something, as a pretrained one does
}
_T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_BART = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in
         (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
CONFIGS = {
    "Bert": lambda: hf.BertConfig(**_BERT),
    "Roberta": lambda: hf.RobertaConfig(**_BERT),
    "DistilBert": lambda: hf.DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    "ModernBert": lambda: hf.ModernBertConfig(
        **_BERT, local_attention=16, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2
    ),
    "DebertaV2": lambda: hf.DebertaV2Config(**_BERT, pooler_hidden_size=32),
    "Llama": lambda: hf.LlamaConfig(**_BERT, num_key_value_heads=2),
    "GPT2": lambda: hf.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "T5": lambda: hf.T5Config(**_T5, decoder_start_token_id=0),
    "Bart": lambda: hf.BartConfig(
        vocab_size=VOCAB, d_model=32, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, **_BART
    ),
    "XLNet": lambda: hf.XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48),
}
ENDINGS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
# Beside PEFT's `classifier`, `score` and `qa_outputs`: what the head of a model is made of.
HEADS = {
    ("DistilBert", "SEQ_CLS"): {"pre_classifier", "classifier"},
    ("DebertaV2", "SEQ_CLS"): {"pooler", "classifier"},
    ("T5", "SEQ_CLS"): {"classification_head"},
    ("Bart", "SEQ_CLS"): {"classification_head"},
    ("XLNet", "SEQ_CLS"): {"sequence_summary", "logits_proj"},
    ("Bert", "SEQ_CLS"): {"bert.pooler.dense", "classifier"},
    **{("ModernBert", task): {"head", "classifier"} for task in ENDINGS},
    **{("Llama", task): {"score"} for task in ("SEQ_CLS", "TOKEN_CLS")},
    ("GPT2", "SEQ_CLS"): {"score"},
}
QUICK = [("Bert", "SEQ_CLS"), ("DistilBert", "SEQ_CLS"), ("Llama", "TOKEN_CLS"), ("T5", "SEQ_CLS")]
QUICK += [("Roberta", "QUESTION_ANS")]


def model_class(family, task):
    if (family, task) == ("XLNet", "QUESTION_ANS"):
        return None  # a beam search of its own
    return getattr(hf, family + ENDINGS[task], None)


def cases():
    for family in CONFIGS:
        for task in ENDINGS:
            if model_class(family, task) is not None:
                quick = (family, task) in QUICK
                yield pytest.param(family, task, marks=() if quick else pytest.mark.slow, id=f"{family}-{task}")


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.eval()


def pretrained(folder, family):
    """A checkpoint of the pretrained model alone, as people have it: no head, and no pooler."""
    torch.manual_seed(0)
    model = getattr(hf, f"{family}Model")(CONFIGS[family]())
    if family == "Bert":
        model = hf.BertForMaskedLM(CONFIGS[family]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def fresh(folder, family, task, seed):
    """The checkpoint under a head that is drawn with a seed, as another process draws another one."""
    torch.manual_seed(seed)
    labels = {} if task == "QUESTION_ANS" else {"num_labels": 3}
    return without_dropout(model_class(family, task).from_pretrained(folder, **labels))


def outputs(model, ids=None):
    ids = (tokens() if ids is None else ids).clone()
    if model.config.is_encoder_decoder:
        ids[:, -1] = model.config.eos_token_id  # whose hidden state T5 and BART classify
    with torch.no_grad():
        out = model(input_ids=ids)
    return torch.cat([out.start_logits, out.end_logits]) if "start_logits" in out else out.logits


def shake(model, scale=0.2):
    """Move everything that is trained, the head too."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def wholly_trained(model):
    wrapped = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, ModulesToSaveWrapper)}
    assert all(p.requires_grad for wrapper in wrapped.values() for p in wrapper.modules_to_save.parameters())
    return set(wrapped)


def near(found, expected, tolerance=1e-6):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def saved_tensors(folder):
    return safetensors.torch.load_file(Path(folder) / WEIGHTS)


@pytest.mark.parametrize(("family", "task"), cases())
def test_the_head_is_trained_saved_loaded_and_merged(family, task, tmp_path):
    base = pretrained(tmp_path / "base", family)
    model = get_peft_model(
        fresh(base, family, task, seed=1), DudeConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type=task)
    )
    head = {"qa_outputs"} if task == "QUESTION_ANS" else {"classifier"}
    assert wholly_trained(model) == HEADS.get((family, task), head)
    inside = [name for name, module in model.named_modules() if isinstance(module, DudeLinear)]
    assert not [name for name in inside if "modules_to_save" in name or "original_module" in name]
    shake(model)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "adapter")
    hashed = set(read_manifest(tmp_path / "adapter").tensors)
    assert hashed == set(saved_tensors(tmp_path / "adapter"))
    loaded = load_adapter(fresh(base, family, task, seed=2), tmp_path / "adapter")
    assert torch.equal(outputs(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "adapter" / WEIGHTS).read_bytes()
    stock = PeftModel.from_pretrained(fresh(base, family, task, seed=3), tmp_path / "adapter")
    near(outputs(stock.eval()), expected, 1e-5)
    near(outputs(model.merge_and_unload().eval()), expected, 1e-5)


_STOCK = """
import sys
sys.path.insert(0, {tests!r})
class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "dude_peft":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import peft, torch, transformers
torch.set_num_threads(1)
model = getattr(peft, {loader!r}).from_pretrained({adapter!r}, **{options!r}).eval()
expected = torch.load({expected!r})
with torch.no_grad():
    found = model(**torch.load({inputs!r})).logits
assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), (found - expected).abs().max()
print("equal")
"""


def run_stock(tmp_path, loader, inputs, expected, **options):
    """AutoPeftModelFor... in a process that knows nothing of our package."""
    torch.save(expected, tmp_path / "expected.pt")
    torch.save(inputs, tmp_path / "inputs.pt")
    program = _STOCK.format(
        tests=str(Path(__file__).parent), loader=loader, adapter=str(tmp_path / "adapter"), options=options,
        expected=str(tmp_path / "expected.pt"), inputs=str(tmp_path / "inputs.pt"),
    )  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "equal", done.stderr


def rows(count=24, length=10):
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        label = int(torch.randint(0, 2, (), generator=generator))
        ids = torch.randint(5, VOCAB, (length,), generator=generator)
        ids[0], ids[1::2] = 3, 3 + label
        yield {"input_ids": ids.tolist(), "attention_mask": [1] * length, "labels": label}


def arguments(cls, folder, **settings):
    usual = {"per_device_train_batch_size": 4, "learning_rate": 2e-2, "report_to": [], "disable_tqdm": True}
    return cls(folder, **{**usual, "use_cpu": True, "save_steps": 6, "logging_steps": 100, **settings})


@pytest.mark.slow
def test_trainer_learns_a_classification_and_every_loader_has_it(tmp_path):
    """Trainer, its checkpoint, its resuming, and AutoPeftModelForSequenceClassification without our package."""
    base = pretrained(tmp_path / "base", "Bert")
    torch.manual_seed(1)
    model = hf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = get_peft_model(model, DudeConfig(r=4, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS"))
    data = list(rows())
    trainer = hf.Trainer(model, arguments(hf.TrainingArguments, tmp_path / "run", max_steps=18), train_dataset=data)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    still = [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    assert not still
    batch = {key: torch.tensor([row[key] for row in data]) for key in data[0]}
    expected = outputs(model.eval(), batch["input_ids"])
    assert (expected.argmax(-1) == batch["labels"]).float().mean() >= 0.9
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(2)
    other = hf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    assert torch.equal(outputs(load_adapter(other, tmp_path / "run" / "checkpoint-18"), batch["input_ids"]), expected)
    run_stock(
        tmp_path, "AutoPeftModelForSequenceClassification", {"input_ids": batch["input_ids"]}, expected, num_labels=2
    )


@pytest.mark.slow
def test_trainer_resumes_with_the_head(tmp_path):
    base = pretrained(tmp_path / "base", "Roberta")

    def run(folder, steps, resume=None):
        torch.manual_seed(1 if resume is None else 9)
        model = without_dropout(hf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2))
        model = get_peft_model(model, DudeConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
        settings = arguments(hf.TrainingArguments, folder, max_steps=steps, lr_scheduler_type="constant")
        hf.Trainer(model, settings, train_dataset=list(rows())).train(resume_from_checkpoint=resume)
        return outputs(model.eval())

    through = run(tmp_path / "one", 12)
    run(tmp_path / "two", 6)
    assert torch.equal(run(tmp_path / "two", 12, str(tmp_path / "two" / "checkpoint-6")), through)


def seq2seq(family, folder=None):
    torch.manual_seed(0)
    model_class = getattr(hf, f"{family}ForConditionalGeneration")
    return without_dropout(model_class(CONFIGS[family]()) if folder is None else model_class.from_pretrained(folder))


@pytest.mark.parametrize(
    ("family", "elsewhere"),
    [("T5", False), *(pytest.param(family, True, marks=pytest.mark.slow) for family in ("T5", "Bart"))],
)
def test_seq2seq_trainer(family, elsewhere, tmp_path):
    seq2seq(family).save_pretrained(tmp_path / "base")
    config = DudeConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(seq2seq(family, tmp_path / "base"), config)
    data = [{"input_ids": row["input_ids"], "labels": [*row["input_ids"][:5], 1]} for row in rows(12)]
    settings = arguments(
        hf.Seq2SeqTrainingArguments, tmp_path / "run", max_steps=6, predict_with_generate=True, eval_strategy="steps",
        eval_steps=3, generation_max_length=8,
    )  # fmt: skip
    trainer = hf.Seq2SeqTrainer(model, settings, train_dataset=data, eval_dataset=data[:4])
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start
    model.eval().save_pretrained(tmp_path / "adapter")
    inputs = {"input_ids": tokens(), "labels": tokens(seed=4)}
    with torch.no_grad():
        expected = model(**inputs).logits
        loaded = load_adapter(seq2seq(family, tmp_path / "base"), tmp_path / "adapter")
        assert torch.equal(loaded(**inputs).logits, expected)
        assert torch.equal(
            loaded.generate(input_ids=tokens(), max_new_tokens=6), model.generate(input_ids=tokens(), max_new_tokens=6)
        )
        if elsewhere:
            run_stock(tmp_path, "AutoPeftModelForSeq2SeqLM", inputs, expected)
        near(model.merge_and_unload()(**inputs).logits, expected, 1e-5)


_TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def vit():
    return hf.ViTForImageClassification(hf.ViTConfig(**_TOWER, image_size=16, patch_size=8, num_labels=3))


def clip():
    text = {**_TOWER, "vocab_size": VOCAB, "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1}
    return hf.CLIPModel(
        hf.CLIPConfig(text_config=text, vision_config={**_TOWER, "image_size": 16, "patch_size": 8}, projection_dim=24)
    )


def whisper():
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=VOCAB, d_model=32, num_mel_bins=8, max_source_positions=20, max_target_positions=32,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **_BART,
        )
    )  # fmt: skip


def wav2vec2():
    return hf.Wav2Vec2ForSequenceClassification(
        hf.Wav2Vec2Config(
            **_TOWER, vocab_size=VOCAB, conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(8, 8), num_labels=3,
            num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, classifier_proj_size=16,
            num_feat_extract_layers=2,
        )
    )  # fmt: skip


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6))


TOWERS = {
    "vit": (vit, lambda: {"pixel_values": noise(2, 3, 16, 16)}, ["classifier"]),
    "clip": (clip, lambda: {"pixel_values": noise(2, 3, 16, 16), "input_ids": tokens()}, None),
    "whisper": (whisper, lambda: {"input_features": noise(2, 8, 40), "decoder_input_ids": tokens()}, None),
    "wav2vec2": (wav2vec2, lambda: {"input_values": noise(2, 800)}, ["projector", "classifier"]),
}


@pytest.mark.parametrize("name", ["vit", *(pytest.param(n, marks=pytest.mark.slow) for n in TOWERS if n != "vit")])
def test_vision_and_audio(name, tmp_path):
    make_model, inputs, head = TOWERS[name]

    def base():
        torch.manual_seed(0)
        return without_dropout(make_model())

    def values(model):
        with torch.no_grad():
            out = model(**inputs())
        return out.logits if "logits" in out else out.logits_per_image

    model = get_peft_model(base(), DudeConfig(r=4, lora_alpha=6, target_modules="all-linear", modules_to_save=head))
    start = values(base())
    assert torch.equal(values(model.eval()), start)
    shake(model)
    expected = values(model)
    assert not torch.allclose(expected, start, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert torch.equal(values(load_adapter(base(), tmp_path)), expected)
    near(values(PeftModel.from_pretrained(base(), tmp_path).eval()), expected, 1e-5)
    near(values(model.merge_and_unload().eval()), expected, 1e-5)


def test_feature_extraction_and_a_pooler_that_no_output_needs(tmp_path):
    base = pretrained(tmp_path / "base", "Bert")  # a masked language model's checkpoint has no pooler

    def encoder(seed):
        torch.manual_seed(seed)
        return without_dropout(hf.AutoModel.from_pretrained(base))

    def embedding(model):
        with torch.no_grad():
            return model(input_ids=tokens()).last_hidden_state.mean(1)

    config = DudeConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    with pytest.warns(UserWarning, match=r"newly initialised, but neither trained in full nor saved: 'pooler\.dense'"):
        model = get_peft_model(encoder(1), config)
    assert not isinstance(model.get_submodule("base_model.model.pooler.dense"), DudeLinear)
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"'pooler\.dense\.\w+' is neither in the adapter .* new random values"):
        loaded = load_adapter(encoder(2), tmp_path / "adapter")
    assert torch.equal(embedding(loaded), embedding(model))


def test_a_head_that_nobody_asked_for_is_no_secret(tmp_path):
    """Without a task type the head stays as it was drawn: said when training begins, and when it is loaded."""
    base = pretrained(tmp_path / "base", "Roberta")
    with pytest.warns(UserWarning, match=r"newly initialised.*'classifier\.dense', 'classifier\.out_proj'.*task_type"):
        model = get_peft_model(fresh(base, "Roberta", "SEQ_CLS", 1), DudeConfig(r=4, target_modules=["query"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"'classifier\.dense\.\w+' is neither in the adapter"):
        load_adapter(fresh(base, "Roberta", "SEQ_CLS", 2), tmp_path / "adapter")
    # A model that no checkpoint was loaded into has no marks: another head is another base model.
    torch.manual_seed(0)
    made = hf.RobertaForSequenceClassification(CONFIGS["Roberta"]())
    get_peft_model(made, DudeConfig(r=4, target_modules=["query"])).save_pretrained(tmp_path / "made")
    torch.manual_seed(0)
    other = hf.RobertaForSequenceClassification(CONFIGS["Roberta"]())
    other.classifier.out_proj.weight.data[0, 0] += 1
    with pytest.raises(ArtifactError, match=r"relies on 'classifier\.out_proj\.weight', which differs here"):
        load_adapter(other, tmp_path / "made")
    with pytest.warns(UserWarning, match="will differ from those in training"):
        load_adapter(other, tmp_path / "made", allow_base_mismatch=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_type": "SEQ_CLS", "modules_to_save": ["clasifier"]}, "'clasifier' is not a module .*'classifier'"),
        ({"task_type": "TOKEN_CLS", "modules_to_save": ["skore"]}, "'skore' is not a module"),
        ({"target_modules": ["query", "dense"], "modules_to_save": ["ense"]}, r"'bert\..*dense' is in target_modules"),
        ({"task_type": "SEQ_CLS", "target_modules": ["classifier"]}, "matches no layer"),
        ({"task_type": "TOKEN_CLS", "target_modules": ["classifier"]}, "matches no layer"),
        ({"trainable_token_indices": [1]}, r"no key 'trainable_token_indices'; .*modules_to_save=\['embed_tokens'\]"),
    ],
)
def test_what_is_refused(settings, message):
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(CONFIGS["Bert"]())
    with pytest.raises(ConfigError, match=message) as caught:
        get_peft_model(model, DudeConfig(**{"r": 4, "target_modules": ["query"], **settings}))
    assert "\n" not in str(caught.value)
    assert not any(isinstance(module, (DudeLinear, ModulesToSaveWrapper)) for module in model.modules())


def test_a_task_without_a_head_is_refused():
    with pytest.raises(ConfigError, match=r"LlamaModel has no 'classifier' or 'score'.*modules_to_save"):
        get_peft_model(hf.LlamaModel(CONFIGS["Llama"]()), DudeConfig(r=4, task_type="SEQ_CLS"))


def test_a_head_of_other_labels_or_of_no_numbers_is_refused(tmp_path, monkeypatch):
    base = pretrained(tmp_path / "base", "Roberta")
    model = get_peft_model(fresh(base, "Roberta", "SEQ_CLS", 1), DudeConfig(r=4, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    two = hf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    with pytest.raises(ArtifactError, match=r"is \[3, 32\], the model's \[2, 32\].*num_labels"):
        load_adapter(two, tmp_path / "adapter")
    with pytest.raises(ArtifactError, match=r"unexpected \(first: .*classifier\.dense"):
        load_adapter(hf.RobertaForMaskedLM.from_pretrained(base), tmp_path / "adapter")
    model.classifier.modules_to_save["default"].dense.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"classifier.*NaN or Inf and is not saved"):
        model.save_pretrained(tmp_path / "broken")
    monkeypatch.setattr("dude_peft.tuner.model._refuse_not_finite", lambda *_: None)  # as before it was looked at
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(NumericsError, match=r"classifier.*NaN or Inf"):
        load_adapter(fresh(base, "Roberta", "SEQ_CLS", 1), tmp_path / "broken")


def test_two_adapters_each_with_its_head(tmp_path):
    base = pretrained(tmp_path / "base", "Bert")
    expected = {}
    for seed, name in enumerate(("one", "two")):
        config = DudeConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
        model = shake(get_peft_model(fresh(base, "Bert", "SEQ_CLS", seed), config), 0.1 * (seed + 1))
        model.save_pretrained(tmp_path / name)
        expected[name] = outputs(model)
    both = load_adapter(fresh(base, "Bert", "SEQ_CLS", 7), tmp_path / "one", adapter_name="one")
    load_adapter(both, tmp_path / "two", adapter_name="two")
    for name in ("two", "one"):
        both.set_adapter(name)
        assert torch.equal(outputs(both.eval()), expected[name])


def resized(folder, seed, size=VOCAB + 8):
    """The checkpoint with added tokens, whose rows are drawn anew in every process."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.resize_token_embeddings(size)
    return model


ADDED = torch.tensor([[5, VOCAB + 3, 7, VOCAB + 7]])


@pytest.fixture(params=["llama", "gemma3-tied"])
def vocabulary(request, tmp_path):
    make(request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("whole", "embeddings"),
    [
        (None, "auto"),
        (["embed_tokens", "lm_head"], "auto"),
        pytest.param(["embed_tokens"], "auto", marks=pytest.mark.slow),
        pytest.param(None, True, marks=pytest.mark.slow),
        pytest.param(["embed_tokens", "lm_head"], True, marks=pytest.mark.slow),
        pytest.param(["embed_tokens"], True, marks=pytest.mark.slow),
    ],
)
def test_added_tokens_are_trained_saved_and_loaded(whole, embeddings, vocabulary, tmp_path):
    config = DudeConfig(r=4, lora_alpha=6, target_modules="all-linear", modules_to_save=whole, task_type="CAUSAL_LM")
    model = shake(get_peft_model(resized(vocabulary, 1), config))
    expected = outputs(model, ADDED)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=embeddings)
    tensors = saved_tensors(tmp_path / "adapter")
    beside = {name.removeprefix("base_model.model.") for name in tensors if "layers." not in name}
    assert beside == {"lm_head.weight", "model.embed_tokens.weight"}  # once, whatever else PEFT put beside them
    assert set(read_manifest(tmp_path / "adapter").tensors) == set(tensors)
    loaded = load_adapter(resized(vocabulary, 2), tmp_path / "adapter")
    assert torch.equal(outputs(loaded, ADDED), expected)
    near(outputs(PeftModel.from_pretrained(resized(vocabulary, 3), tmp_path / "adapter").eval(), ADDED), expected, 1e-5)
    near(outputs(load_adapter(resized(vocabulary, 4), tmp_path / "adapter").merge_and_unload(), ADDED), expected, 1e-5)
    with pytest.raises(ArtifactError, match=rf"call model\.resize_token_embeddings\({VOCAB + 8}\)"):
        load_adapter(hf.AutoModelForCausalLM.from_pretrained(vocabulary), tmp_path / "adapter")


def test_added_tokens_that_were_not_saved_are_noticed(vocabulary, tmp_path):
    model = shake(get_peft_model(resized(vocabulary, 1), DudeConfig(r=4, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ArtifactError, match=r"relies on '[\w.]+', which differs here and was not saved"):
        load_adapter(resized(vocabulary, 2), tmp_path / "adapter")
    same = load_adapter(resized(vocabulary, 1), tmp_path / "adapter")
    assert torch.equal(outputs(same, ADDED), outputs(model, ADDED))


def test_embeddings_of_one_adapter_do_not_become_those_of_another(vocabulary, tmp_path):
    for seed in (1, 2):
        model = get_peft_model(resized(vocabulary, seed), DudeConfig(r=4, target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / str(seed))
    first = load_adapter(resized(vocabulary, 3), tmp_path / "1", adapter_name="one")
    before = outputs(first, ADDED)
    with pytest.raises(ArtifactError, match="which its other adapters use"):
        load_adapter(first, tmp_path / "2", adapter_name="two")
    assert torch.equal(outputs(first, ADDED), before)


def test_an_adapted_output_layer_is_in_the_base_models_files(vocabulary):
    model = resized(vocabulary, 1)
    with pytest.raises(ConfigError, match=f"'lm_head' was resized from {VOCAB} to {VOCAB + 8} tokens"):
        get_peft_model(model, DudeConfig(r=4, target_modules=["q_proj", "lm_head"]))


@pytest.mark.parametrize("whole", [None, ["embed_tokens", "lm_head"]])
def test_the_command_on_added_tokens(whole, vocabulary, tmp_path, capsys):
    config = DudeConfig(r=4, lora_alpha=6, target_modules="all-linear", modules_to_save=whole)
    model = shake(get_peft_model(resized(vocabulary, 1), config))
    model.save_pretrained(tmp_path / "adapter")
    expected = outputs(model, ADDED)
    verify(tmp_path / "adapter", quiet=False)
    assert "saved in full: lm_head.weight, model.embed_tokens.weight" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ArtifactError, match="resize the base model, save it"):
        merge([tmp_path / "adapter"], tmp_path / "refused", verify=False, quiet=True)
    resized(vocabulary, 5).save_pretrained(tmp_path / "larger")
    merge([tmp_path / "adapter"], tmp_path / "merged", base=str(tmp_path / "larger"), verify=False, quiet=True)
    near(outputs(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), ADDED), expected, 1e-5)


def test_merge_sees_another_embedding_on_disk(vocabulary, tmp_path):
    model = shake(get_peft_model(resized(vocabulary, 1), DudeConfig(r=4, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    resized(vocabulary, 5).save_pretrained(tmp_path / "larger")
    for base in (None, str(tmp_path / "larger")):
        with pytest.raises(ArtifactError, match=r"weights that differ from those of .*embed_tokens|lm_head"):
            merge([tmp_path / "adapter"], tmp_path / "merged", base=base, verify=False, quiet=True)


def test_merge_refuses_a_head_in_a_true_line(tmp_path):
    base = pretrained(tmp_path / "base", "Llama")
    model = get_peft_model(fresh(base, "Llama", "SEQ_CLS", 1), DudeConfig(r=4, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"is for SEQ_CLS.*merge_and_unload"):
        merge([tmp_path / "adapter"], tmp_path / "merged", verify=False, quiet=True)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


class _Convolved(torch.nn.Module):
    """A small net with running statistics."""

    def __init__(self):
        super().__init__()
        self.norm, self.proj = torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 5)

    def forward(self, x):
        """Normalised, then projected."""
        return self.proj(self.norm(x))


def test_running_statistics_that_moved_in_training_are_noticed(tmp_path):
    def base():
        torch.manual_seed(0)
        return _Convolved()

    model = get_peft_model(base(), DudeConfig(r=2, target_modules=["proj"]))
    model.eval().save_pretrained(tmp_path / "still")
    load_adapter(base(), tmp_path / "still")
    model.train()(noise(8, 6))
    model.save_pretrained(tmp_path / "moved")
    with pytest.raises(ArtifactError, match=r"relies on 'norm\.running_mean'.*modules_to_save"):
        load_adapter(base(), tmp_path / "moved")
