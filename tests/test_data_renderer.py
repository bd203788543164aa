"""Chat templates run in a process of their own: a hostile one costs seconds, not hours, and no memory of ours."""

import os
import signal
import threading
import time

import pytest
from tiny import CHAT_TEMPLATE, tiny_tokenizer

from dude_peft.data import Message, Row, Template, renderer
from dude_peft.errors import ConfigError, ResourceError

ROW = Row((Message("user", "q"), Message("assistant", "a")), "s.jsonl:1")

HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{{ 'a' * 10000000000 }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "text": "{{ 'a' * 100000000 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_error_in_bounded_time(name, monkeypatch):
    monkeypatch.setattr(renderer, "RENDER_SECONDS", 1.0)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = HOSTILE[name]
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"^s.jsonl:1: the chat template of .* failed \(.*\); correct it, or use"):
        Template(tokenizer).pieces([ROW])
    assert time.monotonic() - start < 30
    tokenizer.chat_template = CHAT_TEMPLATE  # and an honest one works afterwards
    assert Template(tokenizer).render(ROW) == ("<|user|>q<|end|>\n<|assistant|>", "a<|end|>")


def test_texts_are_those_of_transformers():
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "è \u2028 \"q'"}]
    (text,) = renderer.render(tokenizer.chat_template, tokenizer.special_tokens_map, [(messages, True, [])])
    assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_the_conversation_that_fails_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE
    )
    bad = Row((Message("user", "bad"), Message("assistant", "a")), "s.jsonl:2")
    with pytest.raises(ConfigError, match=r"^s.jsonl:2: .*TemplateError: no"):
        Template(tokenizer).pieces([ROW, bad, ROW])


def test_a_child_that_died_is_replaced():
    template = Template(tiny_tokenizer())
    template.pieces([ROW])
    renderer._RENDERER._child.process.kill()
    renderer._RENDERER._child.process.wait()
    assert template.pieces([ROW])[0].texts[1] == "a<|end|>"


def test_a_machine_that_computes_something_else_is_no_fault_of_a_template(monkeypatch):
    template = Template(tiny_tokenizer())
    template.pieces([ROW])
    monkeypatch.setattr(renderer, "RENDER_SECONDS", 0.3)
    child = renderer._RENDERER._child.process.pid
    os.kill(child, signal.SIGSTOP)
    threading.Timer(1.5, os.kill, (child, signal.SIGCONT)).start()
    assert template.pieces([ROW])[0].texts[1] == "a<|end|>"


def test_many_slow_answers_cost_no_more_than_one_that_never_comes(monkeypatch):
    monkeypatch.setattr(renderer, "RENDER_SECONDS", 1.0)
    tokenizer = tiny_tokenizer()
    slow = "{% for a in range(300) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"  # some 0.3 s each
    tokenizer.chat_template = slow + CHAT_TEMPLATE
    template = Template(tokenizer)
    start = time.monotonic()
    with pytest.raises(ConfigError, match="it takes too long"):
        template.pieces([ROW] * 50)
    with pytest.raises(ConfigError, match="it takes too long"):  # and is not asked again
        template.pieces([ROW])
    assert time.monotonic() - start < 20


def test_a_template_that_writes_a_little_much_each_time_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 'a' * 900000 }}"
    with pytest.raises(ConfigError, match="writes far more text than it gets"):
        Template(tokenizer).pieces([ROW] * 200)


def test_a_long_conversation_is_asked_for_in_parts(monkeypatch):
    turns = [Message(("user", "assistant")[turn % 2], f"word {turn}") for turn in range(40)]
    row = Row(tuple(turns), "rows.jsonl:1")
    whole = Template(tiny_tokenizer()).pieces([row])
    monkeypatch.setattr(renderer, "_MESSAGES_PER_REQUEST", 50)
    assert [len(part) for part in renderer._parts([(turns, False, [])] * 3)] == [1, 1, 1]
    assert Template(tiny_tokenizer()).pieces([row]) == whole


def test_the_place_of_a_failure_counts_through_the_parts(monkeypatch):
    monkeypatch.setattr(renderer, "_MESSAGES_PER_REQUEST", 2)
    template = "{% if messages|length > 1 %}{{ raise_exception('no') }}{% endif %}x"
    said = [{"role": "user", "content": "q"}]
    with pytest.raises(renderer.RenderError) as failure:
        renderer.render(template, {}, [(said, False, []), (said, False, []), (said * 2, False, [])])
    assert failure.value.index == 2


def test_a_child_that_was_started_ahead_is_the_one_that_answers(monkeypatch):
    template = Template(tiny_tokenizer())
    for ends in (False, True):  # one that has ended meanwhile is replaced
        renderer._RENDERER.stop()
        renderer.start_ahead()
        child = renderer._RENDERER._child
        renderer.start_ahead()
        assert renderer._RENDERER._child is child, "one is enough"
        if ends:
            child.process.kill()
            child.process.wait()
        assert template.pieces([ROW])[0].texts[1] == "a<|end|>"
        assert (renderer._RENDERER._child is child) is not ends

    def nothing(*_):
        raise OSError(11, "Resource temporarily unavailable")

    renderer._RENDERER.stop()
    monkeypatch.setattr(renderer, "LineChild", nothing)
    renderer.start_ahead()
    with pytest.raises(ResourceError, match="does not start; use template: plain"):
        template.pieces([ROW])
