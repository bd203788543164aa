"""dude chat and dude generate: the prompts of training, the same answers in any batch, and input of every kind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from models import perturb
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from served import dude
from test_cli import assert_refused
from tiny import CHAT_TEMPLATE, save_tiny, tiny_llama, tiny_tokenizer, write_rows

from dude_peft import DudeConfig
from dude_peft.answer.decode import Pieces, decode, decode_all
from dude_peft.answer.decoding import Decoding
from dude_peft.answer.speaker import open_speaker
from dude_peft.artifact.manifest import cover_tokenizer
from dude_peft.artifact.sealed import sealed
from dude_peft.chat.conversation import Conversation
from dude_peft.chat.generate import generate
from dude_peft.chat.talk import chat
from dude_peft.data import Message, Row, Template, prompt_ids
from dude_peft.errors import ArtifactError, ConfigError, DataError, NumericsError, ResourceError
from dude_peft.measure.score import complete
from dude_peft.show import shown_lines
from dude_peft.terminal.display import Display

QUIET = Display(quiet=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny model, and an adapter on it that answers otherwise."""
    folder = tmp_path_factory.mktemp("chat")
    save_tiny(folder / "model")
    model = tiny_llama()
    model.name_or_path = model.config.name_or_path = str(folder / "model")
    adapted = get_peft_model(model, DudeConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    perturb(adapted, 0.2)
    adapted.save_pretrained(folder / "run" / "adapter")
    tiny_tokenizer().save_pretrained(folder / "run" / "adapter")
    return folder


@pytest.fixture
def adapter(place) -> str:
    return str(place / "run" / "adapter")


def opened(name: str | Path, **options):
    return open_speaker(str(name), **{"base": None, "gguf_file": None, "notes": QUIET, **options})


def piped(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def typed(monkeypatch, *lines: str | type[BaseException]) -> None:
    """Lines as from a person; an exception's class is that key pressed."""
    given = iter([*lines, EOFError])

    def answer(_: str = "") -> str:
        line = next(given)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("dude_peft.chat.talk.is_typed", lambda: True)


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, bool]]:
    """(prompt's text, whether the base model was asked) of everything that is decoded."""
    seen = []

    def record(speaker, prompts, decoding, *, base=False, **options):
        seen.extend((speaker.tokenizer.decode(prompt), base) for prompt in prompts)
        return decode(speaker, prompts, decoding, base=base, **options)

    monkeypatch.setattr("dude_peft.answer.decode.decode", record)
    return seen


def records(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# --- decoding -----------------------------------------------------------------------------------------------------


def test_greedy_is_the_argmax_of_the_whole_sequence_every_time(adapter):
    speaker = opened(adapter)
    ids = [65, 66, 67]
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(speaker.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    (found,) = decode(speaker, [[65, 66, 67]], Decoding(8))
    assert found.text == speaker.tokenizer.decode(ids[3:], skip_special_tokens=True)


def test_memory_that_runs_out_says_what_to_lower_and_other_errors_stay_what_they_are(adapter, monkeypatch):
    """A real allocation that the CPU refuses."""
    speaker = opened(adapter)
    monkeypatch.setattr(speaker.model, "generate", lambda **_: torch.empty(10**15))
    with pytest.raises(ResourceError, match="1 prompts of up to 3 tokens do not fit into memory; lower --batch-size"):
        decode(speaker, [[65, 66, 67]], Decoding(8))
    monkeypatch.setattr(speaker.model, "generate", lambda **_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        decode(speaker, [[65, 66, 67]], Decoding(8))


def test_batches_do_not_matter_and_it_is_what_evaluation_generates(adapter):
    speaker = opened(adapter)
    prompts = [[65, 66], [67] * 9, [68], [69, 70, 71], [72] * 30]
    alone = decode_all(speaker, prompts, Decoding(12), batch_size=1)
    assert decode_all(speaker, prompts, Decoding(12), batch_size=4) == alone
    assert len({completion.text for completion in alone}) > 1
    texts = complete(speaker.model, speaker.tokenizer, prompts, max_new_tokens=12, batch_size=2)
    assert [completion.text.strip() for completion in alone] == texts


def test_the_base_answers_as_the_base_model_alone(place, adapter):
    speaker, plain = opened(adapter), opened(place / "model")
    prompts = [[65, 66], [67] * 9]
    base = decode_all(speaker, prompts, Decoding(12), batch_size=2, base=True)
    assert base == decode_all(plain, prompts, Decoding(12), batch_size=2)
    assert base != decode_all(speaker, prompts, Decoding(12), batch_size=2)


def test_sampling_is_repeated_by_its_seed(place):
    speaker = opened(place / "model")

    def drawn(seed: int, **options) -> str:
        decoding = Decoding(20, temperature=1.5, seed=seed, **options)
        decoding.start()
        return decode(speaker, [[65]], decoding)[0].text

    assert drawn(1) == drawn(1) != drawn(2)
    # The smallest nucleus is the likeliest token.
    assert drawn(3, top_p=1e-6) == decode(speaker, [[65]], Decoding(20))[0].text


def test_the_checkpoints_generation_config_has_no_say_but_for_the_ends(place, tmp_path):
    model = tiny_llama()
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, top_k=3, eos_token_id=[256, 70])
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    speaker = opened(tmp_path)
    assert speaker.ends == {256, 70}
    prompt = [speaker.tokenizer("A")["input_ids"]]  # answered at length, with repetitions
    assert decode(speaker, prompt, Decoding(20)) == decode(opened(place / "model"), prompt, Decoding(20))


def always(speaker, token: int) -> None:
    """Let every next token be this one."""
    head = speaker.model.get_output_embeddings()
    head.register_forward_hook(lambda *args: torch.nn.functional.one_hot(torch.tensor(token), 261) + 0.0 * args[2])


def test_finish_tells_who_ended_it_and_the_end_token_is_not_text(place):
    speaker = opened(place / "model")
    always(speaker, 256)
    said: list[str] = []
    (found,) = decode(speaker, [[65]], Decoding(5), pieces=Pieces(speaker, said.append))
    assert (found.text, found.finish, said) == ("", "end", [])
    speaker = opened(place / "model")
    always(speaker, 68)
    (found,) = decode(speaker, [[65]], Decoding(5), pieces=Pieces(speaker, said.append))
    assert (found.text, found.finish) == (speaker.tokenizer.decode([68] * 5), "length")
    assert "".join(said) == found.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_it(place, value, temperature):
    speaker = opened(place / "model")
    with torch.no_grad():
        speaker.model.lm_head.weight[7] = value
    with pytest.raises(NumericsError, match="NaN or Inf"):
        decode(speaker, [[65], [66, 67]], Decoding(3, temperature=temperature, top_p=1.0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0, "temperature": 1.0},
        {"top_p": 0.5},
        {"seed": -1},
    ],
)
def test_options_that_cannot_work(wrong):
    with pytest.raises(ConfigError, match="--"):
        Decoding(**wrong)


# --- opening ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_opened(place, adapter, tmp_path):
    with pytest.raises(ConfigError, match=r"run's folder; give the adapter"):
        opened(place / "run")
    with pytest.raises(ConfigError, match="--base needs an adapter"):
        opened(place / "model", base="x")
    with pytest.raises(ConfigError, match="name is empty"):
        opened(" ")
    with pytest.raises(ConfigError, match="no such folder"):
        opened("nobody/nothing")
    save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(ArtifactError, match="different base weights"):
        opened(adapter, base=str(tmp_path / "other"))


def test_a_base_with_the_same_values_elsewhere_is_taken(adapter, tmp_path):
    save_tiny(tmp_path / "moved")
    assert opened(adapter, base=str(tmp_path / "moved")).adapted


@pytest.mark.parametrize("kind", ["plain", "chat", "auto"])
def test_the_template_of_the_run_is_taken(adapter, kind):
    config = Path(adapter).parent / "config.yaml"
    config.write_text(yaml.safe_dump({"data": {"template": kind}}))
    try:
        speaker = opened(adapter)
    finally:
        config.unlink()
    assert speaker.template(None).kind == ("plain" if kind == "plain" else "chat")
    assert speaker.template("chat").kind == "chat"


@pytest.mark.parametrize("text", ["", "data", "data: 3", "data: {template: [1]}", "a: [", "data: {template: odd}"])
def test_a_foreign_config_beside_the_adapter_does_not_matter(adapter, text):
    config = Path(adapter).parent / "config.yaml"
    config.write_text(text)
    try:
        assert opened(adapter).trained_template == "auto"
    finally:
        config.unlink()


def test_an_adapter_of_the_hub_opens_from_the_cache_with_its_own_tokenizer(place, adapter, tmp_path, monkeypatch):
    """Offline, as from the hub: adapter and tokenizer in the cache, the base model a folder."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--me--mine" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--mine" / "refs").mkdir()
    (tmp_path / "models--me--mine" / "refs" / "main").write_text("0" * 40)
    for file in Path(adapter).iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    tokenizer = json.loads((snapshot / "tokenizer_config.json").read_text())
    (snapshot / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 77}))
    speaker = opened("me/mine", base=str(place / "model"))
    assert speaker.adapted
    assert speaker.tokenizer.model_max_length == 77
    with pytest.raises(ConfigError, match="no such folder"):
        opened("me/other")


# --- conversations ------------------------------------------------------------------------------------------------


def conversation(positions: int | None = None, **options) -> Conversation:
    tokenizer = tiny_tokenizer()
    return Conversation(Template(tokenizer), tokenizer, positions, **options)


def test_a_conversation_is_written_as_training_writes_it():
    talk = conversation(system="be kind")
    for question, answer in (("one", "1"), ("two", "2")):
        talk.ask(question)
        talk.answer(answer)
    talk.ask("three")
    turns = [("system", "be kind"), ("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2")]
    row = Row(tuple(Message(*turn) for turn in [*turns, ("user", "three"), ("assistant", "x")]), "row")
    assert talk.prompt(10) == (prompt_ids(row, talk.template, talk.tokenizer), 0)


def test_old_turns_go_when_the_model_can_read_no_more():
    talk = conversation(positions=64, system="s")
    for _ in range(5):
        talk.ask("q" * 8)
        talk.answer("a" * 8)
    talk.ask("last")
    ids, dropped = talk.prompt(100)
    assert dropped % 2 == 0
    assert 0 < dropped < 10
    assert len(ids) <= 64 - 16
    text = talk.tokenizer.decode(ids)
    assert text.startswith("<|system|>s<|end|>\n<|user|>q")  # the system message stays
    assert text.endswith("<|user|>last<|end|>\n<|assistant|>")
    assert talk.prompt(100) == (ids, 0)


def test_a_message_that_is_too_long_costs_nothing():
    talk = conversation(positions=64)
    talk.ask("q")
    talk.answer("a")
    before = list(talk.turns)
    talk.ask("x" * 64)
    with pytest.raises(DataError, match="can read only 64; shorten"):
        talk.prompt(10)
    assert talk.take_back() == "x" * 64
    assert talk.turns == before


def test_a_question_without_an_answer_is_replaced_or_answered_again():
    talk = conversation()
    talk.ask("one")
    talk.answer("1")
    talk.ask("two")
    talk.answer("")
    assert talk.take_back() == "two"
    talk.ask("two")
    talk.ask("three")
    assert [turn.content for turn in talk.turns] == ["one", "1", "three"]


@pytest.mark.parametrize("text", ["", " ", "a\0b", "\ud800"])
def test_what_is_no_text_is_not_asked(text):
    talk = conversation()
    with pytest.raises(DataError):
        talk.ask(text)
    assert talk.turns == []


# --- dude chat ----------------------------------------------------------------------------------------------------


def test_a_pipe_gets_the_answers_alone(adapter, monkeypatch, capsys, asked):
    piped(monkeypatch, "hello", "", "again")
    chat(adapter, max_new_tokens=6)
    speaker = opened(adapter)
    out = capsys.readouterr()
    (first,) = decode(speaker, [speaker.tokenizer(asked[0][0])["input_ids"]], Decoding(6))
    assert asked[0][0] == "<|user|>hello<|end|>\n<|assistant|>"
    assert asked[1][0].startswith(f"<|user|>hello<|end|>\n<|assistant|>{first.text.strip()}<|end|>\n<|user|>again")
    assert out.out.startswith(shown_lines(first.text) + "\n")
    assert "the answer was cut at 6 tokens" in out.err


def test_commands(adapter, monkeypatch, capsys, asked):
    piped(
        monkeypatch, "/system be kind", "one", "/retry", "/reset", "//two", "/system", "/compare", "three", "/exit", "4"
    )
    chat(adapter, max_new_tokens=4)
    texts = [text for text, _ in asked]
    assert texts[0] == "<|system|>be kind<|end|>\n<|user|>one<|end|>\n<|assistant|>"
    assert texts[1] == texts[0]
    assert texts[2] == "<|system|>be kind<|end|>\n<|user|>/two<|end|>\n<|assistant|>"
    assert texts[3].startswith("<|user|>/two")
    assert texts[4] == texts[3]
    assert [base for _, base in asked] == [False, False, False, True, False]
    out = capsys.readouterr().out
    assert out.index("base:\n") < out.index("tuned:\n")
    assert len(asked) == 5


def test_a_pipe_ends_at_the_first_mistake(place, monkeypatch):
    for line, error in (
        ("/nope", ConfigError),
        ("/retry", ConfigError),
        ("x" * 600, DataError),
    ):
        piped(monkeypatch, line)
        with pytest.raises(error):
            chat(str(place / "model"), max_new_tokens=2)
    piped(monkeypatch)
    with pytest.raises(ConfigError, match="nothing to compare"):
        chat(str(place / "model"), compare=True)


def test_a_person_may_make_mistakes(place, monkeypatch, capsys, asked):
    typed(monkeypatch, "/nope", "/retry", "/compare", "a<|end|>", "x" * 600, "hi")
    chat(str(place / "model"), max_new_tokens=2)
    err = capsys.readouterr().err
    for part in ("no command '/nope'", "no message to answer again", "nothing to compare", "the model can read only"):
        assert part in err
    assert "<|user|>a<|end|><|end|>\n<|assistant|>" in [text for text, _ in asked]  # which is text, and no mistake


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(place, monkeypatch, capsys, asked):
    typed(monkeypatch, "one", "two")
    calls = []

    def write(self, text, stream_end=False):
        calls.append(text)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Pieces, "on_finalized_text", write)
    letter = tiny_tokenizer().decode([68])
    model = opened(place / "model")
    always(model, 68)
    monkeypatch.setattr("dude_peft.answer.speaker.open_speaker", lambda *_, **__: model)
    chat("model", max_new_tokens=12)
    assert "note: stopped" in capsys.readouterr().err
    assert asked[1][0].startswith(f"{asked[0][0]}{letter * 4}<|end|>\n<|user|>two")


def test_ctrl_c_at_the_prompt_and_in_a_pipe_ends_it(place, monkeypatch):
    typed(monkeypatch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        chat(str(place / "model"))
    monkeypatch.setattr("dude_peft.chat.talk.is_typed", lambda: False)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pieces, "on_finalized_text", interrupt)
    piped(monkeypatch, "one")
    with pytest.raises(KeyboardInterrupt):
        chat(str(place / "model"))


def test_the_plain_template_is_said(tmp_path, monkeypatch, capsys):
    save_tiny(tmp_path, chat=False)
    piped(monkeypatch, "hi")
    chat(str(tmp_path), max_new_tokens=2)
    assert "the plain template is used (the tokenizer has no chat template)" in capsys.readouterr().err


def test_what_a_model_says_is_not_obeyed(place, monkeypatch, capsys):
    assert shown_lines("a\n\tb\x1b[2J\r\x9b\u202e\u00a0c") == "a\n\tb\\x1b[2J\\r\\x9b\\u202e\u00a0c"
    monkeypatch.setattr(Pieces, "put", lambda self, value: self._write("\x1b]0;owned\x07\n"))
    piped(monkeypatch, "hi")
    chat(str(place / "model"), max_new_tokens=2)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b]0;owned\\x07\n" in out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_at_a_terminal(adapter):
    import pty

    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm", COLUMNS="100", OMP_NUM_THREADS="1")
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite in the background ignores it
        command = [sys.executable, "-m", "dude_peft.cli", "chat", adapter, "--compare", "--max-new-tokens", "8"]
        os.execv(sys.executable, command)
    seen = b""
    deadline = time.monotonic() + 120

    def read(press: bytes = b"") -> bool:
        """Whether the other side is still there; where it is silent, the key is pressed."""
        nonlocal seen
        assert time.monotonic() < deadline, seen.decode(errors="replace")
        if not select.select([terminal], [], [], 2)[0]:
            os.write(terminal, press if b"error[" not in seen else b"")
            return True
        part = b""
        with contextlib.suppress(OSError):  # Linux's way to say that it is closed
            part = os.read(terminal, 65536)
        seen += part
        return bool(part)

    def until_prompt() -> None:
        start = len(seen)
        while b"> " not in seen[start:]:
            assert read(), seen.decode(errors="replace")

    until_prompt()
    os.write(terminal, b"hi\n")
    until_prompt()
    while read(press=b"\x03"):
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    os.close(terminal)
    text = seen.decode(errors="replace")
    assert "Ctrl-D ends the chat" in text
    header = next(line for line in text.splitlines() if "base" in line and "tuned" in line and "\x1b[1m" in line)
    assert header.index("base") < header.index("tuned")  # side by side
    assert "error[interrupted]" in text


# --- dude generate ------------------------------------------------------------------------------------------------


def test_a_line_a_prompt_in_order_in_any_batch(place, adapter, tmp_path):
    file = str(write_rows(tmp_path / "rows.jsonl", 5))
    generate(adapter, file=file, output=tmp_path / "one.jsonl", batch_size=1, max_new_tokens=10, base_too=True)
    generate(adapter, file=file, output=tmp_path / "four.jsonl", batch_size=4, max_new_tokens=10, base_too=True)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "four.jsonl").read_bytes()
    found = records((tmp_path / "one.jsonl").read_text())
    assert [record["prompt"] for record in found] == [f"say {number}" for number in range(5)]
    assert set(found[0]) == {"prompt", "completion", "finish", "base_completion", "base_finish"}
    assert all(record["completion"] != record["base_completion"] for record in found)
    plain = generate(str(place / "model"), [record["prompt"] for record in found], max_new_tokens=10)
    assert [record["completion"] for record in plain] == [record["base_completion"] for record in found]


def test_raw_takes_the_text_as_it_is(place):
    (record,) = generate(str(place / "model"), ["ab"], raw=True, max_new_tokens=6)
    speaker = opened(place / "model")
    (found,) = decode(speaker, [speaker.tokenizer("ab")["input_ids"]], Decoding(6))
    assert record == {"prompt": "ab", "completion": found.text, "finish": found.finish}


def test_prompts_come_from_standard_input_and_text_files(place, tmp_path, monkeypatch):
    piped(monkeypatch, "one", "", "two")
    found = generate(str(place / "model"), max_new_tokens=2)
    assert [record["prompt"] for record in found] == ["one", "two"]
    (tmp_path / "prompts.txt").write_text("\ufeffone\n\nzwö\n", encoding="utf-8")
    found = generate(str(place / "model"), file=str(tmp_path / "prompts.txt"), max_new_tokens=2)
    assert [record["prompt"] for record in found] == ["one", "zwö"]


def test_rows_without_an_answer_are_asked(place, tmp_path, capsysbinary):
    rows = [{"question": "q"}, {"messages": [{"role": "user", "content": "q"}], "tools": [{"name": "f"}], "id": 1}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = generate(str(place / "model"), file=str(tmp_path / "q.jsonl"), max_new_tokens=1, quiet=False)
    told = capsysbinary.readouterr()
    assert (one["prompt"], two["prompt"], one["completion"]) == ("q", "q", two["completion"])
    assert two["tools"] == [{"type": "function", "function": {"name": "f"}}]
    wanted = "left out: id (1 of 2 rows), tools, which the template does not write (1 of 2 rows)"
    assert wanted in " ".join(told.err.decode().split())


def test_a_conversation_is_a_prompt_too(place, tmp_path, asked):
    turns = [("system", "s"), ("user", "u"), ("assistant", "gold")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (record,) = generate(str(place / "model"), file=str(tmp_path / "rows.jsonl"), max_new_tokens=2)
    assert record["prompt"] == row["messages"][:-1]
    assert asked[0][0] == "<|system|>s<|end|>\n<|user|>u<|end|>\n<|assistant|>"
    with pytest.raises(DataError, match=r"rows.jsonl:1: 2 messages, but --raw"):
        generate(str(place / "model"), file=str(tmp_path / "rows.jsonl"), raw=True)


def test_the_output_is_one_line_of_json_whatever_is_in_it(place, monkeypatch):
    monkeypatch.setattr("dude_peft.chat.generate.encode_prompts", lambda *_, **__: [[65]])
    out = generate(str(place / "model"), ["a\x1b\x9b\u2028\nö"], max_new_tokens=1).lines()
    assert out.count(b"\n") == 1
    assert not any(mark.encode() in out for mark in ("\x1b", "\x9b", "\u2028"))
    assert records(out.decode())[0]["prompt"] == "a\x1b\x9b\u2028\nö"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"prompts": ["a", ""]}, DataError, "prompt 2: 'prompt' is empty"),
        ({"prompts": ["x" * 600]}, DataError, "prompt 1: the prompt has 6.. tokens, but the model can read only 512"),
        ({"prompts": ["x"], "max_new_tokens": 512}, ConfigError, "lower --max-new-tokens to 507"),
        ({"prompts": ["x"], "file": "y.txt"}, ConfigError, "give one of them"),
        ({"prompts": ["x"], "limit": 3}, ConfigError, "together with --file"),
        ({"prompts": ["x"], "raw": True, "template": "plain"}, ConfigError, "give one of them"),
        ({"prompts": ["x"], "template": "odd"}, ConfigError, "use auto, chat, plain"),
        ({"prompts": ["x"], "base_too": True}, ConfigError, "not an adapter"),
        ({"prompts": ["x"], "batch_size": 0}, ConfigError, "--batch-size"),
        ({"prompts": ["x"], "special_tokens": "odd"}, ConfigError, "use text, allow"),
        ({"file": "missing.txt"}, DataError, "missing.txt: cannot be read"),
        ({"file": "missing.jsonl"}, DataError, "missing.jsonl: no such file"),
        ({}, ConfigError, "no prompts"),
    ],
)
def test_what_cannot_be_generated(place, tmp_path, monkeypatch, options, error, words):
    monkeypatch.chdir(tmp_path)
    piped(monkeypatch)
    with pytest.raises(error, match=words) as raised:
        generate(str(place / "model"), output=tmp_path / "out.jsonl", **options)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_model_is_noticed(tmp_path):
    save_tiny(tmp_path, vocab_size=90, eos_token_id=2, pad_token_id=1)
    with pytest.raises(DataError, match="vocabulary has 90 entries"):
        generate(str(tmp_path), ["hello"])


def test_an_output_is_whole_or_as_it_was(place, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        generate(str(place / "model"), ["a"], output=out)
    with pytest.raises(ConfigError, match="folder"):
        generate(str(place / "model"), ["a"], output=tmp_path)
    with pytest.raises(ConfigError, match="folder"):
        generate(str(place / "model"), ["a"], output=tmp_path / "none" / "out.jsonl")

    def meanwhile(*_: object, **__: object) -> bytes:
        (tmp_path / "race.jsonl").write_text("another's")
        return b"ours"

    with monkeypatch.context() as patch:
        patch.setattr("dude_peft.chat.generate.Completions.lines", meanwhile)
        with pytest.raises(ConfigError, match="made by another command"):
            generate(str(place / "model"), ["a"], output=tmp_path / "race.jsonl", max_new_tokens=1)
    assert (tmp_path / "race.jsonl").read_text() == "another's"
    for left in tmp_path.glob("race.jsonl*"):
        left.unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="No space left"):
            generate(str(place / "model"), ["a"], output=out, overwrite=True, max_new_tokens=1)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    generate(str(place / "model"), ["a"], output=out, overwrite=True, max_new_tokens=1)
    assert records(out.read_text())[0]["prompt"] == "a"


# --- the commands -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_exit_codes(place, adapter, tmp_path):
    save_tiny(tmp_path / "other", seed=1)
    assert_refused_last(dude("generate", adapter, "hi", "--base", tmp_path / "other"), 4, "artifact")
    assert_refused(dude("chat", place / "model", "--top-p", "0.5"), 2, "config")
    save_tiny(tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["lm_head.weight"][3] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    assert_refused_last(dude("generate", tmp_path / "broken", "hi", "-o", tmp_path / "out"), 5, "numerics")
    assert not (tmp_path / "out").exists()


def assert_refused_last(done, code: int, label: str) -> None:
    """As `assert_refused`, with progress before it."""
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"dude: error[{label}]: ")
    assert "Traceback" not in done.stderr


@pytest.mark.assets
def test_a_real_model_tells_a_story(assets):
    model = assets / "models" / "stories260k"
    if not model.is_dir():
        pytest.skip(f"{model} is not here")
    first, second = generate(
        str(model), ["Once upon a time", "Lily and Tom"], raw=True, max_new_tokens=24, batch_size=2
    )
    assert "there was a little" in first["completion"]
    assert second["completion"].isascii()


# --- texts are text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"raw": True}, {"template": "plain"}])
def test_prompts_that_spell_special_tokens_get_none(place, monkeypatch, options):
    seen = []
    monkeypatch.setattr(
        "dude_peft.answer.decode.decode_all", lambda speaker, ids, *rest, **more: seen.extend(ids) or []
    )
    token = tiny_tokenizer().convert_tokens_to_ids("<|system|>")
    for special_tokens in ("text", "allow"):
        with pytest.raises(ValueError, match="zip"):  # nothing was decoded
            generate(str(place / "model"), ["a<|system|>b"], special_tokens=special_tokens, **options)
    assert [ids.count(token) for ids in seen] == [0, 1]
    assert tiny_tokenizer().decode(seen[0]) == tiny_tokenizer().decode(seen[1])


def test_words_that_a_template_changes_are_told(tmp_path, monkeypatch, capsysbinary):
    save_tiny(tmp_path)
    template = CHAT_TEMPLATE.replace("message['content']", "message['content'][:4]")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    generate(str(tmp_path), ["short", "two", "a <|user|>"], max_new_tokens=1, quiet=False)
    told = " ".join(capsysbinary.readouterr().err.decode().split())
    assert "left out: messages[] of role user word for word, which the template does not write (2 of 3 rows)" in told
    assert "1 of 3 rows spells special tokens, which are plain text there; special_tokens: allow" in told
    generate(str(tmp_path), ["two"], max_new_tokens=1, quiet=False)
    assert "word for word" not in capsysbinary.readouterr().err.decode()
    piped(monkeypatch, "two", "longer", "longer still")
    chat(str(tmp_path), max_new_tokens=1)
    told = " ".join(capsysbinary.readouterr().err.decode().split())
    assert told.count("note: the template does not write messages[] of role user word for word") == 1


def test_an_adapter_is_asked_as_its_run_was_trained(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("data: {template: plain, special_tokens: allow}\n", encoding="utf-8")
    speaker = opened(tmp_path / "run" / "adapter")
    assert (speaker.trained_template, speaker.special_tokens) == ("plain", "allow")
    assert speaker.template(None).control.allowed
    assert not speaker.template(None, "text").control.allowed


def test_an_adapter_that_was_moved_is_asked_in_the_same_way(place, tmp_path):
    moved = Path(shutil.copytree(place / "run" / "adapter", tmp_path / "elsewhere"))
    cover_tokenizer(moved, {"template": "plain", "special_tokens": "allow"})
    speaker = opened(moved)
    assert (speaker.trained_template, speaker.special_tokens) == ("plain", "allow")


def test_the_adapter_of_a_checkpoint_is_asked_as_its_run_is_trained(place, tmp_path):
    own = tmp_path / "run" / "checkpoints" / "step-00000002" / "adapter"
    shutil.copytree(place / "run" / "adapter", own, ignore=shutil.ignore_patterns("*token*", "chat_template*"))
    data = {"template": "chat", "chat_template": "[{{ messages[0].content }}]", "special_tokens": "allow"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"data": data}), encoding="utf-8")
    speaker = opened(own)
    assert (speaker.trained_template, speaker.special_tokens) == ("chat", "allow")
    assert speaker.tokenizer.chat_template == data["chat_template"]


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_template_that_writes_nothing_and_tokens_beyond_the_model_are_one_line(tmp_path, monkeypatch, command):
    save_tiny(tmp_path / "small", vocab_size=90, eos_token_id=2, pad_token_id=1)
    save_tiny(tmp_path / "silent")
    (tmp_path / "silent" / "chat_template.jinja").write_text("{% if false %}x{% endif %}", encoding="utf-8")
    for name, error, words in (
        ("small", DataError, "but the model's vocabulary has 90 entries"),
        ("silent", ConfigError, "the template writes nothing before the answer"),
    ):
        piped(monkeypatch, "hello")
        with pytest.raises(error, match=words) as raised:
            {"generate": generate, "chat": chat}[command](str(tmp_path / name), max_new_tokens=2)
        assert "\n" not in str(raised.value)


# --- dude generate goes on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"base_too": True}, {"temperature": 0.9, "samples": 2, "seed": 3}])
def test_an_interrupted_command_goes_on_and_writes_the_same_file(adapter, tmp_path, monkeypatch, options):
    prompts = [f"say {word}" for word in ("one", "two", "three", "four", "five")]
    options = {"batch_size": 2, "max_new_tokens": 5, **options}
    generate(adapter, prompts, output=tmp_path / "whole.jsonl", **options)
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    calls = []

    def failing(*arguments, **more):
        calls.append(1)
        if len(calls) in (3, 5):
            raise KeyboardInterrupt
        return decode(*arguments, **more)

    monkeypatch.setattr("dude_peft.answer.decode.decode", failing)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            generate(adapter, prompts, output=out, **options)
        assert part.exists()
        assert not out.exists()
    with pytest.raises(ConfigError, match=r"out.jsonl.part holds .* completions of another command or model; repeat"):
        generate(adapter, prompts[1:], output=out, **options)
    with part.open("ab") as file:
        file.write(b'{"model:1": ["torn')  # by a kill
    generate(adapter, prompts, output=out, **options)
    total = -(-len(prompts) * options.get("samples", 1) // 2) * (2 if "base_too" in options else 1)
    assert len(calls) == total + 2
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()


@pytest.mark.parametrize("answer", [None, 5, [], {}, "x", ["a"], [5, "end"], ["a", "stop"], ["a", "end", 1]])
def test_a_kept_completion_of_another_form_is_damage(adapter, tmp_path, monkeypatch, answer):
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with monkeypatch.context() as patch:
        patch.setattr("dude_peft.chat.generate.replace_file", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            generate(adapter, ["say one"], output=out, max_new_tokens=2)
    first, kept = map(json.loads, part.read_text().splitlines())
    changed = sealed({"of": kept["of"], "content": {"model:0": answer}})
    part.write_text(f"{json.dumps(first)}\n{json.dumps(changed)}\n")
    with pytest.raises(ArtifactError, match=r"out\.jsonl\.part is damaged; remove it"):
        generate(adapter, ["say one"], output=out, max_new_tokens=2)
    assert not out.exists()


def test_a_link_that_leads_nowhere_stays(adapter, tmp_path):
    part = tmp_path / "out.jsonl.part"
    part.symlink_to("nowhere")
    with pytest.raises(ResourceError):
        generate(adapter, ["say one"], output=tmp_path / "out.jsonl", max_new_tokens=2)
    assert part.is_symlink()


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_command_goes_on(adapter, tmp_path, sign):
    rows = write_rows(tmp_path / "rows.jsonl", 40)
    common = [adapter, "--file", str(rows), "--batch-size", "1", "--max-new-tokens", "200"]
    assert dude("generate", *common, "-o", str(tmp_path / "whole.jsonl")).returncode == 0
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    command = [sys.executable, "-m", "dude_peft", "generate", *common, "-o", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not part.exists() or part.read_bytes().count(b"\n") < 5:
        time.sleep(0.02)
    process.send_signal(sign)
    process.wait()
    assert not out.exists()
    assert dude("generate", *common, "-o", str(out)).returncode == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
