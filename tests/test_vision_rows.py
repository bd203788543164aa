"""Rows with images: what is read, refused and counted; their tokens are those of transformers' own processor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as hf
from PIL import Image
from tiny import save_tiny, tiny_tokenizer
from tiny_vision import BY_DAY, COLOURS, FAMILIES, picture, row, save_seeing, write_seen
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from dude_peft.config.schema import ModelSection, RunConfig
from dude_peft.data.chat_template import chat_template
from dude_peft.data.encode import Encoder, encode
from dude_peft.data.formats import Reading
from dude_peft.data.labels import IGNORE
from dude_peft.data.prepare import prepare
from dude_peft.data.rows import load_rows
from dude_peft.data.template import Template
from dude_peft.errors import ConfigError, DataError, DudeError
from dude_peft.model.load import load_tokenizer
from dude_peft.model.processor import sight_of
from dude_peft.training.data_check import check_data
from dude_peft.training.run_data import read

WHICH = "Which colour?"


class Eyes:
    """Tokenizer, template and sight of a saved model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.section = ModelSection(name_or_path=str(folder))
        self.tokenizer = load_tokenizer(self.section, str(folder))
        self.sight = sight_of(self.section, str(folder), self.tokenizer)
        self.template = Template(self.tokenizer)

    def encode(self, rows: list[Any], **options: Any) -> list[dict[str, Any]]:
        options = {"max_length": 512, **options}
        return encode(rows, self.template, self.tokenizer, sight=self.sight, **options).examples


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("seeing")
    return {name: save_seeing(folder / name, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def llava(saved) -> Eyes:
    return Eyes(saved["LLaVA"])


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder with pictures, in which a test writes its rows."""
    folder = tmp_path / "data"
    for number, colour in enumerate(COLOURS):
        picture(folder / f"pics/{colour}.png", colour, (30 + number, 40))
    return folder


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory) -> Path:
    """The same with files that are no images, or no good ones."""
    folder = tmp_path_factory.mktemp("bad") / "data"
    for number, colour in enumerate(COLOURS):
        picture(folder / f"pics/{colour}.png", colour, (30 + number, 40))
    _files(folder)
    return folder


def rows_of(data: Path, *rows: dict[str, Any]) -> list[Any]:
    return load_rows(write_seen(data / "rows.jsonl", rows))


# --- tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BY_DAY)
def test_tokens_are_those_of_the_processor(family, saved, data):
    """The reference is transformers: its template, its processor, the whole conversation at once."""
    eyes = Eyes(saved[family])
    turns = row("red", "pics/red.png", "pics/blue.png")["messages"]
    turns += row("white", "pics/white.png", question="And < this?")["messages"]
    made = eyes.encode(rows_of(data, {"messages": turns}, row("none", question="No image?")), train_on="all")

    processor = eyes.sight.processor
    images = [Image.open(data / f"pics/{colour}.png") for colour in ("red", "blue", "white")]
    text = eyes.tokenizer.apply_chat_template(_plain(turns), tokenize=False).removesuffix("\n")
    wanted = processor(text=[text], images=[images], add_special_tokens=False)["input_ids"][0]
    assert made[0]["input_ids"] == list(wanted)
    assert "shown" not in made[1]

    marks = {eyes.tokenizer.convert_tokens_to_ids(name) for name in eyes.tokenizer.get_added_vocab()}
    learned = {token for token in made[0]["labels"] if token != IGNORE}
    assert not learned & eyes.sight.marks
    spoken = {eyes.tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ("user", "assistant", "end")}
    wrapped = {eyes.tokenizer.convert_tokens_to_ids(f"<|vision_{side}|>") for side in ("start", "end")}
    assert learned & marks <= spoken | wrapped


def _plain(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Contents as lists, as processors take them."""
    lists = [turn["content"] for turn in turns]
    lists = [each if isinstance(each, list) else [{"type": "text", "text": each}] for each in lists]
    return [{"role": turn["role"], "content": each} for turn, each in zip(turns, lists, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_answers_are_trained(family, saved, data):
    eyes = Eyes(saved[family])
    (made,) = eyes.encode(rows_of(data, row("green", "pics/green.png")))
    learned = [token for token in made["labels"] if token != IGNORE]
    assert eyes.tokenizer.decode(learned) == "green<|end|>"


def test_text_that_spells_other_tokens_stays_text_beside_an_image(llava, data):
    (made,) = llava.encode(rows_of(data, row("red", "pics/red.png", question="What does <|end|> mean?")))
    end = llava.tokenizer.convert_tokens_to_ids("<|end|>")
    assert made["input_ids"].count(end) == 2
    assert "<|end|> mean?" in llava.tokenizer.decode(made["input_ids"])


def test_a_conversation_loses_whole_turns_and_never_a_part_of_an_image(llava, data):
    turns = row("red", "pics/red.png")["messages"] + row("blue", "pics/blue.png", "pics/white.png")["messages"]
    rows = rows_of(data, {"messages": turns})
    (whole,) = llava.encode(rows)
    length, per_image = len(whole["input_ids"]), 4
    for limit in range(len(llava.encode(rows_of(data, row("red", "pics/red.png")))[0]["input_ids"]), length):
        (cut,) = llava.encode(rows_of(data, {"messages": turns}), max_length=limit)
        assert [each.name for each in cut["shown"].pictures] == ["pics/red.png"]
        assert sum(token in llava.sight.marks for token in cut["input_ids"]) == per_image
    with pytest.raises(DataError, match="none of the 1 rows fits into max_length 12"):
        llava.encode(rows_of(data, row("red", "pics/red.png")), max_length=12)


def test_images_come_from_the_column_of_trl(llava, data):
    plain = [{"role": "user", "content": WHICH}, {"role": "assistant", "content": "red"}]
    kept = [{"role": "user", "content": [{"type": "text", "text": WHICH}, {"type": "image"}]}, plain[1]]
    before, behind, single, prompt = llava.encode(
        rows_of(
            data,
            {"messages": plain, "images": ["pics/red.png"]},
            {"messages": kept, "images": ["pics/red.png"]},
            {"messages": plain, "image": "pics/red.png"},
            {"prompt": WHICH, "completion": "red", "images": ["pics/red.png"]},
        )
    )
    assert before["input_ids"] == single["input_ids"] == prompt["input_ids"]
    assert before["input_ids"] != behind["input_ids"]
    assert [each["shown"].pictures[0].name for each in (before, behind, single, prompt)] == ["pics/red.png"] * 4


def test_a_text_model_reads_contents_that_are_lists_of_text(tmp_path):
    parts = [{"type": "text", "text": "say "}, {"type": "text", "text": "yes"}]
    rows = [{"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]}
            for content in (parts, "say yes")]  # fmt: skip
    tokenizer = tiny_tokenizer()
    one, other = encode(
        load_rows(write_seen(tmp_path / "rows.jsonl", rows)), Template(tokenizer), tokenizer, 64
    ).examples
    assert one == other


def test_an_own_template_may_want_lists(data, saved):
    """As those of Idefics and SmolVLM do; rows of text are then written as lists, too."""
    own = Eyes(saved["Idefics3"]).tokenizer.chat_template
    assert chat_template(own) == own
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = own
    (row_of_text,) = load_rows(write_seen(data / "rows.jsonl", [row("blue", question="Sky?")]))
    assert Template(tokenizer).render(row_of_text) == ("<|user|>Sky?<|end|>\n<|assistant|>", "blue<|end|>")
    text = {"messages": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "blue"}]}
    (plain,) = load_rows(write_seen(data / "rows.jsonl", [text]))
    assert Template(tokenizer).render(plain) == ("<|user|>Sky?<|end|>\n<|assistant|>", "blue<|end|>")


# --- what is refused ----------------------------------------------------------------------------------------------


def _of(image: Any, **more: Any) -> dict[str, Any]:
    """A row with this in the place of an image's path."""
    made = row("red", "x", **more)
    made["messages"][0]["content"][0]["image"] = image
    return made


def _files(data: Path) -> None:
    """Files that are none, or no good ones."""
    red = (data / "pics/red.png").read_bytes()
    (data / "pics/cut.png").write_bytes(red[: len(red) - 20])
    (data / "pics/flipped.png").write_bytes(red[:45] + bytes([red[45] ^ 255]) + red[46:])
    (data / "pics/empty.png").write_bytes(b"")
    (data / "pics/text.png").write_text("I am no image.")
    (data / "pics/page.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (data / "pics/script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("1", (12_000, 12_000)).save(data / "pics/large.png")
    levels = np.linspace(0, 65535, 32 * 32).reshape(32, 32)  # white or black, once they are cut to 8 bits
    Image.fromarray(levels.astype(np.uint16)).save(data / "pics/depth.png")
    Image.fromarray((levels / 65535).astype(np.float32)).save(data / "pics/fractions.tiff")
    picture(data.parent / "outside.png", "red")
    os.symlink(data.parent / "outside.png", data / "pics/link.png")
    os.symlink(data.parent, data / "up")
    os.mkfifo(data / "pics/fifo.png")


BAD = {
    "a missing one": (_of("pics/rad.png"), "no such image 'pics/rad.png' .*did you mean 'red.png'"),
    "a folder": (_of("pics"), "no regular file; give the path of an image"),
    "a FIFO": (_of("pics/fifo.png"), "no regular file"),
    "a way out": (_of("../outside.png"), r"has '\.\.'"),
    "a way out and back": (_of("pics/../pics/red.png"), r"has '\.\.'"),
    "an absolute path": (_of("/etc/hostname"), "outside of the folder"),
    "a link out": (_of("pics/link.png"), "outside of the folder"),
    "a linked folder": (_of("up/outside.png"), "outside of the folder"),
    "a URL": (_of("https://example.org/a.png"), "is a URL, and nothing is fetched"),
    "a file URL": (_of("file:///etc/hostname"), "is a URL"),
    "base64": (_of("data:image/png;base64,AAAA"), "is a URL"),
    "bytes": (_of({"bytes": "AAAA", "path": None}), "is bytes; save the image"),
    "a number": (_of(7), "is int; save the image"),
    "nothing": (_of(""), "is str; save the image"),
    "a NUL": (_of("pics/\0.png"), "NUL"),
    "a long name": (_of("a" * 5000), "cannot be read|no usable path|no such image"),
    "a cut one": (_of("pics/cut.png"), "'pics/cut.png' is damaged"),
    "a damaged one": (_of("pics/flipped.png"), "'pics/flipped.png'.* damaged"),
    "an empty one": (_of("pics/empty.png"), "is an empty file"),
    "text": (_of("pics/text.png"), "is no image, or damaged; save it as PNG"),
    "SVG": (_of("pics/page.svg"), "is no image"),
    "PostScript": (_of("pics/script.eps"), "is no image"),
    "16 bits": (_of("pics/depth.png"), "depth.png' has more than 8 bits a pixel .*save it with 8 bits"),
    "fractions": (_of("pics/fractions.tiff"), r"has more than 8 bits a pixel \(Pillow's mode F\)"),
    "a bomb": (_of("pics/large.png"), "has 12000 x 12000 pixels, more than"),
    "in an answer": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "image", "image": "pics/red.png"}]}]},  # noqa: E501
        "has an image, but answers are text",
    ),
    "a token in the question": (row("red", "pics/red.png", question="see <image>"), "spells the image token '<image>'"),
    "a token in the answer": (row("<image>", "pics/red.png"), "spells the image token '<image>'"),
    "a place without an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}]},  # noqa: E501
        "'images' has 0 images, and the messages keep 1 places",
    ),
    "too many for the places": (
        {**row("red", "pics/red.png"), "images": ["pics/red.png", "pics/blue.png"]},
        "'images' has 2 images, and the messages keep 0 places",
    ),
    "another tool's place in a text": (
        {"prompt": "<image>\nq", "completion": "a", "images": ["pics/red.png"]},
        "'<image>' in a text is no place for an image; write the content as a list",
    ),
    "a video": (
        {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, {"role": "assistant", "content": "a"}]},  # noqa: E501
        "type is 'video', but messages hold texts and images",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_told_with_their_line(name, llava, bad_data):
    bad, wanted = BAD[name]
    with pytest.raises(DudeError, match=wanted) as told:
        llava.encode(rows_of(bad_data, row("red", "pics/red.png"), bad))
    assert isinstance(told.value, DataError) or "cannot be read" in str(told.value)
    assert str(told.value).startswith(f"{bad_data / 'rows.jsonl'}:2:")
    assert "\n" not in str(told.value).split("; also bad")[0]


def test_an_image_may_lie_below_or_have_an_absolute_path(llava, data):
    inside = str(data / "pics/red.png")
    assert len(llava.encode(rows_of(data, _of(inside), _of("./pics/red.png")))) == 2


def test_all_kinds_of_pixels_become_rgb(llava, data):
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        suffix = "tiff" if mode == "CMYK" else "png"
        Image.new(mode, (32, 32)).save(data / f"pics/{mode}.{suffix}")
    frames = [Image.new("RGB", (32, 32), colour) for colour in COLOURS.values()]
    frames[0].save(data / "pics/many.gif", save_all=True, append_images=frames[1:])
    turned = Image.new("RGB", (20, 40))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(data / "pics/turned.jpg", exif=exif)
    names = sorted(path.name for path in (data / "pics").iterdir())
    encoder = Encoder(llava.template, llava.tokenizer, max_length=128, train_on="answers", sight=llava.sight)
    made = [each for _, each in encoder.examples(rows_of(data, *(row("x", f"pics/{name}") for name in names)))]
    assert len(made) == len(names)
    assert encoder.counts.left_out == {"all but the first image of an animated file": 1}

    from dude_peft.data.pictures import opened

    (turned_row,) = rows_of(data, row("x", "pics/turned.jpg"))
    assert opened(turned_row.pictures[0], "here").size == (40, 20)


def test_a_model_without_a_processor_reads_no_images(tmp_path, data):
    model = save_tiny(tmp_path / "model")
    path = write_seen(data / "rows.jsonl", [row("red", "pics/red.png")])
    with pytest.raises(DataError, match=r"rows.jsonl:1: the row has an image, but the model has no processor"):
        check_data(str(path), str(model))


def test_a_template_that_leaves_images_out_is_refused(llava, data):
    plain = Template(llava.tokenizer, "plain")
    with pytest.raises(DataError, match=r"rows.jsonl:1: the template writes 0 image tokens '<image>' for 1 images"):
        encode(rows_of(data, row("red", "pics/red.png")), plain, llava.tokenizer, 64, sight=llava.sight)


def test_a_row_of_text_cannot_smuggle_an_image_token_in(llava, data):
    """Where special tokens are allowed in texts, that of images still is none: the model would want pixels."""
    allowing = Template(llava.tokenizer, "auto", "allow")
    with pytest.raises(DataError, match="spells the image token '<image>'"):
        encode(rows_of(data, row("red", question="see <image>")), allowing, llava.tokenizer, 64, sight=llava.sight)


def test_preferences_have_no_images(data):
    chosen = row("red", "pics/red.png")["messages"]
    pair = {"prompt": chosen[:1], "chosen": "red", "rejected": "blue"}
    for kind, each in (
        ("pairs", pair),
        ("pairs", {"prompt": "q", "chosen": "red", "rejected": "blue", "images": ["pics/red.png"]}),
        ("labels", {"prompt": chosen[:1], "completion": "red", "label": True}),
    ):
        path = write_seen(data / "rows.jsonl", [each])
        with pytest.raises(DataError, match=r"rows.jsonl:1: the row has images, which train.objective: sft learns"):
            load_rows(path, reading=Reading(kind=kind))


def test_without_pillow_the_extra_is_named(data, monkeypatch):
    import sys

    from dude_peft.data import pictures

    monkeypatch.setitem(sys.modules, "PIL", None)
    pictures._looked_at.cache_clear()
    with pytest.raises(ConfigError, match=r"images need Pillow.*pip install 'dude-peft\[vision\]'"):
        rows_of(data, row("red", "pics/red.png"))


def test_an_old_transformers_is_told(saved, data, monkeypatch):
    monkeypatch.delattr(hf.ProcessorMixin, "get_text_with_replacements")
    with pytest.raises(ConfigError, match=r"rows with images need transformers 5.12 or newer"):
        Eyes(saved["LLaVA"]).encode(rows_of(data, row("red", "pics/red.png")))


def test_the_processor_of_another_model_is_told(saved, data, tmp_path):
    """Its image token is none that the model puts images in place of."""
    import shutil

    shutil.copytree(saved["LLaVA"], tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["image_token_index" if "image_token_index" in config else "image_token_id"] = 7
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"none of the model's image tokens .*use the processor that belongs"):
        Eyes(tmp_path / "model").encode(rows_of(data, row("red", "pics/red.png")))


# --- what is kept -------------------------------------------------------------------------------------------------


def test_another_image_is_another_row(llava, data, tmp_path):
    """Same path, same size, same tokens: only the bytes tell."""
    path = write_seen(data / "rows.jsonl", [row("red", "pics/red.png"), row("blue", "pics/blue.png"), row("x")])

    def made() -> Any:
        how = {"max_length": 64, "cache": tmp_path / "cache", "sight": llava.sight}
        return prepare(str(path), llava.template, llava.tokenizer, **how)

    first, again = made(), made()
    assert (first.sha256, first.tokens_sha256) == (again.sha256, again.tokens_sha256)
    assert first[0]["input_ids"] != first[1]["input_ids"]  # the answers differ
    assert first.images.tolist() == [1, 1, 0]
    assert first.counts.images == 2
    assert first.counts.image_tokens == 8

    state = (data / "pics/red.png").stat()
    picture(data / "pics/red.png", "green", (30, 40))
    os.utime(data / "pics/red.png", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    changed = made()
    assert changed.sha256 != first.sha256
    assert changed.tokens_sha256 != first.tokens_sha256
    assert not np.array_equal(changed.prompts(), first.prompts())


def test_equal_words_about_other_images_are_no_duplicates(llava, data, tmp_path):
    rows = [row("red", f"pics/{colour}.png") for colour in ("red", "green", "red")]
    path = write_seen(data / "rows.jsonl", rows)
    made = prepare(str(path), llava.template, llava.tokenizer, max_length=64, cache=tmp_path, sight=llava.sight)
    assert made[0]["input_ids"] == made[1]["input_ids"]
    assert made.duplicates == 1


def test_an_image_that_changes_during_a_run_is_noticed(llava, data, tmp_path):
    from dude_peft.data.batches import pad_right

    path = write_seen(data / "rows.jsonl", [row("red", "pics/red.png")])
    made = prepare(str(path), llava.template, llava.tokenizer, max_length=64, cache=tmp_path, sight=llava.sight)
    pad_right([made[0]], 0)
    picture(data / "pics/red.png", "green", (30, 40))
    with pytest.raises(DataError, match=r"rows.jsonl:1: image 'pics/red.png' was changed while it was in use"):
        pad_right([made[0]], 0)


def test_the_check_counts_images_and_their_tokens(saved, data, capsys):
    rows = [row("red", "pics/red.png"), row("two", "pics/red.png", "pics/blue.png"), row("none")]
    path = write_seen(data / "rows.jsonl", rows)
    found = check_data(str(path), str(saved["LLaVA"]), quiet=False)
    said = capsys.readouterr().out
    assert (found.images, found.image_tokens) == (3, 12)
    assert "images: 3 in 2 of 3 examples, 12 of the tokens, none of them trained" in said
    assert "<image>×8" in said.replace("\n", "") or "<image>×4" in said
    assert json.dumps(found.left_out) == "[]"


def test_an_image_of_training_among_the_held_out_rows_is_told(saved, data, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("DUDE_CACHE", str(tmp_path / "cache"))
    train = write_seen(data / "rows.jsonl", [row("red", "pics/red.png"), row("none")])
    other = row("yes", "pics/red.png", question="Is it red?")
    test = write_seen(data / "test.jsonl", [other, row("blue", "pics/blue.png"), row("nothing", question="Hm?")])
    check_data(str(train), str(saved["LLaVA"]), test=str(test), quiet=False)
    told = "1 of 3 held-out examples show an image of a training example"
    assert told in " ".join(capsys.readouterr().out.split())
    eyes = Eyes(saved["LLaVA"])
    wanted = {"model": {"name_or_path": str(saved["LLaVA"])}, "data": {"train": str(train), "test": str(test)}}
    found = read(RunConfig(**wanted, output_dir=str(tmp_path / "out")), eyes.tokenizer, eyes.sight)
    assert [line for line in found.warnings if line.startswith(told)]


def test_the_processor_is_the_one_of_the_family_with_pillow(saved):
    for family, folder in saved.items():
        eyes = Eyes(folder)
        settings = hf.AutoConfig.from_pretrained(folder)
        assert isinstance(eyes.sight.processor, PROCESSOR_MAPPING[type(settings)]), family
        assert type(eyes.sight.processor.image_processor).__name__.endswith("Pil"), family
