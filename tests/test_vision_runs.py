"""Runs on rows with images: a tiny model learns colours, resumes bit by bit, and is taken up by every command."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from served import dude
from tiny_vision import BY_DAY, COLOURS, FAMILIES, picture, row, save_seeing, write_seen

from dude_peft import DudeConfig
from dude_peft.chat.generate import generate
from dude_peft.config.schema import ModelSection, RunConfig
from dude_peft.data.batches import pad_right
from dude_peft.data.encode import encode, prompt_ids
from dude_peft.data.rows import load_rows
from dude_peft.data.template import Template
from dude_peft.errors import ArtifactError, ConfigError, DataError, DudeError
from dude_peft.measure.score import complete, item_losses
from dude_peft.model.load import load_model, load_tokenizer
from dude_peft.model.processor import sight_of
from dude_peft.planning.run import plan
from dude_peft.training import run as run_module
from dude_peft.training.run import run
from dude_peft.tuner.layer import DudeLinear

TIMES = ("tokens_per_second", "seconds", "memory_bytes")


def write_colours(folder: Path, count: int, *, start: int = 0, name: str = "train.jsonl") -> Path:
    """`count` pictures of different sizes, each with its colour as the answer."""
    colours = list(COLOURS)
    rows = []
    for number in range(start, start + count):
        colour = colours[number % len(colours)]
        picture(folder / f"pics/{number}.png", colour, (20 + number % 7, 30 + number % 5))
        rows.append(row(colour, f"pics/{number}.png"))
    return write_seen(folder / name, rows)


def mixed_rows(folder: Path) -> Path:
    """Rows with no, one and two images."""
    for colour in COLOURS:
        picture(folder / f"pics/{colour}.png", colour, (33, 40))
    rows = [row("red", "pics/red.png"), row("none", question="No image?"), row("two", "pics/blue.png", "pics/red.png")]
    rows += [row(colour, f"pics/{colour}.png") for colour in ("green", "blue", "white")]
    return write_seen(folder / "rows.jsonl", rows)


def settings(base: Path, rows: Path, out: Path, **changes: Any) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "model": {"name_or_path": str(base)},
        "adapter": {"r": 2, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj", "fc1", "linear_1"]},
        "data": {"train": str(rows), "test": str(rows), "max_length": 128},
        "train": {
            "learning_rate": 0.01,
            "max_steps": 6,
            "logging_steps": 1,
            "save_steps": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        },
        "evaluation": {"rows": 4, "max_new_tokens": 4, "batch_size": 4},
        "output_dir": str(out),
    }
    for section, values in changes.items():
        wanted[section] = {**wanted[section], **values}
    return wanted


def start(wanted: dict[str, Any], **options: Any) -> Any:
    return run(RunConfig(**wanted), quiet=True, **options)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    save_seeing(folder / "model")
    mixed_rows(folder / "data")
    return folder


@pytest.fixture(scope="module")
def finished(places) -> Path:
    """The folder of a run that has ended."""
    short = {"max_steps": 2, "save_steps": 2}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_module, "loss_curve", lambda *_: b"")  # matplotlib takes half of such a short run
        start(settings(places / "model", places / "data/rows.jsonl", places / "run", train=short))
    return places / "run"


# --- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BY_DAY)
def test_rows_of_one_batch_do_not_change_each_other(family, tmp_path):
    """Losses and answers of rows with different numbers of images, together and alone, and by transformers alone."""
    model_folder = save_seeing(tmp_path / "model", family)
    rows = load_rows(mixed_rows(tmp_path / "data"))[:4]
    section = ModelSection(name_or_path=str(model_folder))
    tokenizer = load_tokenizer(section, str(model_folder))
    sight = sight_of(section, str(model_folder), tokenizer)
    model: Any = load_model(section, str(model_folder))
    template = Template(tokenizer)
    examples = encode(rows, template, tokenizer, 128, sight=sight).examples
    pad_id = int(tokenizer.pad_token_id)

    together = item_losses(model, examples, pad_id=pad_id, batch_size=4).losses
    alone = item_losses(model, examples, pad_id=pad_id, batch_size=1).losses
    assert together == pytest.approx(alone, rel=0, abs=1e-5)
    assert len({round(loss, 3) for loss in alone}) > 1

    for example, found, each in zip(examples, alone, rows, strict=True):
        text = "".join(template.pieces([each])[0].texts)
        images = [Image.open(picture.file) for picture in each.pictures]
        inputs = sight.processor(text=[text], images=[images] if images else None, return_tensors="pt")
        labels = torch.tensor([example["labels"]])
        reference = model(**inputs, labels=labels).loss.item()
        assert found == pytest.approx(reference, rel=0, abs=1e-5)

    prompts = [prompt_ids(each, template, tokenizer, sight) for each in rows]
    answers = complete(model, tokenizer, prompts, batch_size=4, max_new_tokens=4)
    assert answers == complete(model, tokenizer, prompts, batch_size=1, max_new_tokens=4)
    for answer, each in zip(answers, rows, strict=True):
        images = [Image.open(picture.file) for picture in each.pictures]
        inputs = sight.processor(
            text=[template.prompt_text(each)], images=[images] if images else None, return_tensors="pt"
        )
        found = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == tokenizer.decode(found, skip_special_tokens=True).strip()


def test_pixels_matter(places):
    """Two rows that differ in their pictures alone have different losses; the base knows it, too."""
    section = ModelSection(name_or_path=str(places / "model"))
    tokenizer = load_tokenizer(section, str(places / "model"))
    sight = sight_of(section, str(places / "model"), tokenizer)
    path = write_seen(places / "data/two.jsonl", [row("red", f"pics/{colour}.png") for colour in ("red", "blue")])
    examples = encode(load_rows(path), Template(tokenizer), tokenizer, 128, sight=sight).examples
    one, other = (pad_right([example], 0)["pixel_values"] for example in examples)
    assert not torch.equal(one, other)
    losses = item_losses(load_model(section, str(places / "model")), examples, pad_id=0, batch_size=2).losses
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_a_batch_has_the_pixels_of_trls_collator(places):
    """TRL's own collator renders, tokenises and scales by itself; its answers are not masked, so labels are ours."""
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    section = ModelSection(name_or_path=str(places / "model"))
    tokenizer = load_tokenizer(section, str(places / "model"))
    sight = sight_of(section, str(places / "model"), tokenizer)
    rows = [each for each in load_rows(places / "data/rows.jsonl") if each.pictures][:3]
    examples = encode(rows, Template(tokenizer), tokenizer, 128, sight=sight).examples
    ours = pad_right(examples, int(tokenizer.pad_token_id))
    theirs = sft.DataCollatorForVisionLanguageModeling(sight.processor)(
        [
            {
                "images": [Image.open(each.file) for each in row_.pictures],
                "messages": [{"role": m.role, "content": m.content} for m in row_.messages],
            }
            for row_ in rows
        ]
    )
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    newline = tokenizer("\n")["input_ids"][0]  # which the template writes behind the last answer, and nobody would say
    for one, other, mask in zip(ours["input_ids"], theirs["input_ids"], theirs["attention_mask"], strict=True):
        whole = other[mask.bool()].tolist()
        assert [*one.tolist()[: len(whole) - 1], newline] == whole


def test_a_step_over_all_rows_has_the_loss_of_all_rows(places, tmp_path, monkeypatch):
    """Three micro-batches of two: every token of every row counts once, whatever images stand beside it."""
    monkeypatch.setattr(run_module, "loss_curve", lambda *_: b"")
    wanted = settings(
        places / "model",
        places / "data/rows.jsonl",
        tmp_path / "run",
        adapter={"lora_dropout": 0.0},
        train={"max_steps": 1, "gradient_accumulation_steps": 3},
    )
    report = start(wanted)
    assert lines_of(tmp_path / "run")[0]["loss"] == pytest.approx(report.before.loss, rel=0, abs=1e-5)


# --- learning -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tiny_model_learns_to_name_colours(tmp_path):
    """Held-out pictures have other sizes; a model that does not look names one in four right."""
    model = save_seeing(tmp_path / "model", sharp=30)
    train = write_colours(tmp_path / "data", 64)
    test = write_colours(tmp_path / "data", 16, start=100, name="test.jsonl")
    eyes_and_words = r".*\.(q_proj|k_proj|v_proj|o(ut)?_proj|fc1|fc2|linear_1|linear_2|gate_proj|up_proj|down_proj)"
    wanted = settings(
        model,
        train,
        tmp_path / "run",
        adapter={"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": eyes_and_words},
        data={"test": str(test)},
        train={
            "max_steps": 80,
            "learning_rate": 0.02,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "save_steps": 80,
        },
        evaluation={"rows": 16, "max_new_tokens": 6, "batch_size": 16},
    )
    report = start(wanted)
    assert (report.before.right, report.after.right) == (0, 16)
    assert report.before.loss > 5
    assert report.after.loss < 0.05
    assert report.after.answers[0].question == "[pics/100.png] Which colour?"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["LLaVA", "Qwen2-VL"])
def test_a_killed_run_goes_on_bit_by_bit(family, tmp_path):
    """Killed in the middle by the system, then resumed: adapter, lines and answers of the run that nobody killed."""
    model = save_seeing(tmp_path / "model", family)
    rows = mixed_rows(tmp_path / "data")
    layers = {"adapter": {"target_modules": r".*\.(q_proj|down_proj|fc1|linear_1|qkv)", "lora_dropout": 0.2}}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start(settings(model, rows, whole, train={"max_steps": 12}, **layers))

    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(settings(model, rows, killed, train={"max_steps": 12}, **layers)))
    command = [sys.executable, "-m", "dude_peft", "train", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not list((killed / "checkpoints").glob("step-*[3-9]")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read()
    assert not (killed / "report.json").exists()
    resumed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr

    for name in ("adapter_model.safetensors", "preprocessor_config.json", "processor_config.json", "tokenizer.json"):
        assert digest(killed / "adapter" / name) == digest(whole / "adapter" / name)
    assert lines_of(killed) == lines_of(whole)
    one, other = (json.loads((folder / "report.json").read_text()) for folder in (killed, whole))
    for key in ("before", "after", "data", "steps", "tokens"):
        assert one[key] == other[key]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


# --- identity -----------------------------------------------------------------------------------------------------


def test_a_run_records_what_it_saw(finished):
    report = json.loads((finished / "report.json").read_text())
    assert (report["data"]["train"]["images"], report["data"]["train"]["image_tokens"]) == (6, 24)
    assert report["after"]["answers"][2]["question"] == "[pics/blue.png] [pics/red.png] Which colour?"
    saved = {path.name for path in (finished / "adapter").iterdir()}
    assert {"preprocessor_config.json", "processor_config.json", "chat_template.jinja"} <= saved


@pytest.mark.slow
def test_the_cards_python_runs(places, tmp_path):
    """A vision-language model has an automatic class of its own."""
    from dude_peft.exporting.run_card import card_of_run

    start(settings(places / "model", places / "data/rows.jsonl", tmp_path / "run"), card_of=card_of_run)
    card = (tmp_path / "run/adapter/README.md").read_text()
    (python,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "AutoModelForImageTextToText" in python
    done = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_another_picture_or_another_processor_is_another_run(places, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "loss_curve", lambda *_: b"")
    folder, model = tmp_path / "data", tmp_path / "model"
    shutil.copytree(places / "data", folder)
    shutil.copytree(places / "model", model)
    out = tmp_path / "run"
    wanted = settings(model, folder / "rows.jsonl", out, train={"max_steps": 1}, evaluation={"enabled": False})
    del wanted["data"]["test"]
    start(wanted)
    assert start(wanted).steps == 1  # finished: nothing is left to do

    kept = (folder / "pics/white.png").read_bytes()
    picture(folder / "pics/white.png", "blue", (33, 40))
    with pytest.raises(DataError, match=r"data.train: the rows differ from those that this run started with"):
        start(wanted)
    (folder / "pics/white.png").write_bytes(kept)
    assert start(wanted).steps == 1

    settings_file = model / "preprocessor_config.json"
    before = settings_file.read_text()
    settings_file.write_text(before.replace('"rescale_factor": 0.00392156862745098', '"rescale_factor": 0.004'))
    assert settings_file.read_text() != before
    with pytest.raises(DataError, match=r"tokenizer is not the one .*processor: preprocessor_config.json"):
        start(wanted)


def test_every_file_of_the_processor_is_under_the_adapters_seal(finished, tmp_path):
    from dude_peft.exporting.adapter import open_adapter

    for name in ("preprocessor_config.json", "processor_config.json"):
        copy = tmp_path / name
        shutil.copytree(finished / "adapter", copy)
        raw = (copy / name).read_bytes()
        (copy / name).write_bytes(raw.replace(b"e", b"f", 1))
        with pytest.raises(ArtifactError, match=name):
            open_adapter(copy)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"data": {"packing": True}}, "data.packing: rows laid end to end have no images"),
        ({"train": {"torch_compile": True}}, "train.torch_compile: the images of a batch have no fixed shape"),
        ({"train": {"trainer": "trl"}}, "train.trainer: TRL's trainer gets no images here"),
        ({"train": {"curriculum": {"stages": 2}}}, "train.curriculum: pass rates are of answers to text alone"),
        ({"train": {"objective": "mol"}, "data": {"general": "builtin:word-problems"}}, "mol learns from text alone"),
        (
            {"train": {"objective": "grpo", "grpo": {"num_generations": 2, "max_completion_length": 4}}},
            "grpo learns from text alone",
        ),
        ({"train": {"objective": "dpo"}}, "the row has images, which train.objective: sft learns from"),
    ],
    ids=["packing", "torch_compile", "trl", "curriculum", "mol", "grpo", "dpo"],
)
def test_what_has_no_place_for_images_is_refused_before_the_model_is_loaded(
    changes, wanted, places, tmp_path, monkeypatch
):
    monkeypatch.setattr("dude_peft.training.loading.load_model", lambda *_: pytest.fail("the model was loaded"))
    if "trainer" in changes.get("train", {}):
        pytest.importorskip("trl")
    made = settings(places / "model", places / "data/rows.jsonl", tmp_path / "run", **changes)
    with pytest.raises(DudeError, match=wanted):
        start(made)
    assert not (tmp_path / "run").exists()


# --- the other commands -------------------------------------------------------------------------------------------


def test_the_plan_counts_image_tokens(places, tmp_path):
    made = plan(RunConfig(**settings(places / "model", places / "data/rows.jsonl", tmp_path / "run")))
    section = ModelSection(name_or_path=str(places / "model"))
    tokenizer = load_tokenizer(section, str(places / "model"))
    sight = sight_of(section, str(places / "model"), tokenizer)
    rows = load_rows(places / "data/rows.jsonl")
    examples = encode(rows, Template(tokenizer), tokenizer, 128, sight=sight).examples
    assert made.rows.longest == max(len(each["input_ids"]) for each in examples)
    tokens = [sum(token in sight.marks for token in each["input_ids"]) for each in examples]
    assert (made.rows.image_tokens, made.rows.image_tokens_per_row) == (max(tokens), sum(tokens) / len(tokens))


def test_rows_without_images_move_nothing_that_reads_images(places, tmp_path):
    """Where the eyes alone are adapted, a batch of text is learned from with a gradient of 0."""
    row_of = [row("none", question=f"No image {number}?") for number in range(3)] + [row("red", "pics/red.png")]
    rows = write_seen(places / "data/mostly.jsonl", row_of)
    train = {"max_steps": 4, "save_steps": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    adapter = {"target_modules": ["fc1", "linear_1"]}
    made = settings(places / "model", rows, tmp_path / "run", train=train, adapter=adapter)
    start({**made, "evaluation": {"enabled": False}})
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    assert sorted(norms)[:3] == [0, 0, 0] < [max(norms)]


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_a_model_in_shares_reads_no_images(strategy, places, tmp_path):
    config = RunConfig(**settings(places / "model", places / "data/rows.jsonl", tmp_path / "run"))
    with pytest.raises(ConfigError, match=f"rows with images do not train with {strategy}; choose --launch ddp"):
        plan(config, strategy=strategy, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["LLaVA", "Qwen2-VL"])
def test_two_processes_train_as_one(family, tmp_path):
    """Rows with no, one and two images; adapters on the eyes alone, of which one process may see nothing in a batch."""
    model = save_seeing(tmp_path / "model", family)
    rows = mixed_rows(tmp_path / "data")
    train = {"max_steps": 6, "logging_steps": 1, "learning_rate": 0.003, "gradient_accumulation_steps": 2}
    targets = r".*(encoder|visual|multi_modal).*(q_proj|fc1|linear_1|qkv)"
    for name, batch, launch in (("one", 2, []), ("two", 1, ["--launch", "ddp", "--processes", "2"])):
        wanted = settings(
            model,
            rows,
            tmp_path / name,
            adapter={"target_modules": targets, "lora_dropout": 0.0},
            train={**train, "per_device_train_batch_size": batch},
        )
        (tmp_path / f"{name}.yaml").write_text(json.dumps(wanted), encoding="utf-8")
        done = dude("train", tmp_path / f"{name}.yaml", *launch)
        assert done.returncode == 0, done.stderr
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    one, two = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(two[name], tensor, rtol=0, atol=1e-5) for name, tensor in one.items())
    assert one.keys() == two.keys()


def test_answers_to_images_are_those_of_the_run(finished, places, tmp_path):
    """`dude generate` reads the rows as the run did, and keeps what it has of an interrupted command by the pixels."""
    report = json.loads((finished / "report.json").read_text())
    how: dict[str, Any] = {"file": places / "data/rows.jsonl", "max_new_tokens": 4, "batch_size": 4, "limit": 4}
    found = generate(finished / "adapter", **how)
    assert [each["completion"] for each in found] == [each["text"] for each in report["after"]["answers"]]
    assert found[0]["prompt"][0]["content"][0] == {"type": "image", "image": "pics/red.png"}
    assert found[1]["prompt"] == "No image?"
    for option, wanted in (("raw", "and images, but --raw takes one text"), ("as_rows", "this row has an image")):
        with pytest.raises(DataError, match=wanted):
            generate(finished / "adapter", **how, **{option: True})


@pytest.mark.slow
def test_the_command_shows_the_images_to_the_model(finished, places, tmp_path):
    """The same words about two pictures; the adapter is asked by the command, and chat takes words alone."""
    rows = [row("x", f"pics/{colour}.png") for colour in ("red", "white")]
    path = write_seen(places / "data/asked.jsonl", rows)
    command = [sys.executable, "-m", "dude_peft", "generate", str(finished / "adapter"), "--file", str(path)]
    done = subprocess.run([*command, "--max-new-tokens", "4"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    said = subprocess.run(
        [sys.executable, "-m", "dude_peft", "chat", str(finished / "adapter"), "--max-new-tokens", "4"],
        input="Hello?\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", ["LLaVA", "Gemma 3", "Idefics3"])
def test_a_merged_model_is_loaded_by_transformers_alone(family, tmp_path):
    """Its own processor, its own class, an image row: the logits of the live adapter, layers of the eyes included."""
    from dude_peft.exporting.run import merge

    model = save_seeing(tmp_path / "model", family)
    rows = mixed_rows(tmp_path / "data")
    layers = r".*\.(q_proj|down_proj|fc1|linear_1|proj)"
    start(settings(model, rows, tmp_path / "run", adapter={"target_modules": layers, "lora_dropout": 0.0}))
    adapter = tmp_path / "run/adapter"
    merge([str(adapter)], tmp_path / "merged")

    processor = hf.AutoProcessor.from_pretrained(tmp_path / "merged")
    plain: Any = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    image = Image.open(tmp_path / "data/pics/red.png")
    inputs = processor(text=[text], images=[[image]], return_tensors="pt", add_special_tokens=False)

    from dude_peft.tuner.load import load_adapter

    section = ModelSection(name_or_path=str(model))
    base: Any = load_model(section, str(model))
    adapted: Any = load_adapter(base, str(adapter)).eval()
    with torch.no_grad():
        merged, live = plain(**inputs).logits, adapted(**inputs).logits
        with adapted.disable_adapter():
            untouched = adapted(**inputs).logits
    assert torch.allclose(merged, live, rtol=0, atol=1e-5)
    assert (live - untouched).abs().max() > 1e-3


# --- which layers -------------------------------------------------------------------------------------------------

# As docs/training.md has them.
EYES = r".*(visual|vision_tower|vision_model)\..*(blocks|layers)\.\d+\..*(qkv|proj|fc[12])"
PROJECTOR = r".*(merger\w*|multi_modal_projector|connector)\..*(mlp\.[02]|linear_\w+|proj)"


def adapted_layers(model: Any, target: Any) -> set[str]:
    made = peft.get_peft_model(model, DudeConfig(r=1, target_modules=target))
    return {module.layer_name for module in made.modules() if isinstance(module, DudeLinear)}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_a_model_are_chosen_by_their_names(family):
    """all-linear is the language model alone; with the page's two expressions every linear layer is in one part."""
    whole = FAMILIES[family]()[0]
    linear = {name for name, part in whole.named_modules() if isinstance(part, torch.nn.Linear)} - {"lm_head"}
    with pytest.warns(UserWarning, match="all-linear' leaves out"):
        language = adapted_layers(whole, "all-linear")
    assert language
    assert all(re.search(r"(language|text)_model\.", name) for name in language)
    eyes = adapted_layers(FAMILIES[family]()[0], EYES)
    assert eyes
    # Gemma 3's projector is no linear layer; it trains whole, by modules_to_save.
    projector = set() if family == "Gemma 3" else adapted_layers(FAMILIES[family]()[0], PROJECTOR)
    unused = {name for name in linear if ".vision_tower.head." in name}
    assert language | eyes | projector == linear - unused
    assert len(language) + len(eyes) + len(projector) == len(linear - unused)


@pytest.mark.slow
def test_a_projector_that_is_no_linear_layer_trains_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "loss_curve", lambda *_: b"")
    model = save_seeing(tmp_path / "model", "Gemma 3")
    layers = {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]}
    short = {"max_steps": 2, "save_steps": 2}
    start(settings(model, mixed_rows(tmp_path / "data"), tmp_path / "run", adapter=layers, train=short))
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    moved = {name for name, value in after.items() if "multi_modal_projector" in name}
    assert moved
    for name in moved:
        own = next(value for key, value in before.items() if key.endswith(name.partition("multi_modal_projector")[2]))
        assert not torch.equal(after[name], own)


def test_the_page_has_the_expressions_that_are_tested():
    page = (Path(__file__).parent.parent / "docs/training.md").read_text(encoding="utf-8")
    assert f"'{EYES}'" in page
    assert f"'{PROJECTOR}'" in page
