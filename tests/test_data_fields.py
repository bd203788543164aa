"""Every field of every format: used, refused, or named as left out; and token by token what is trained of it."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import typer
from served import dude
from test_data_masks import marked
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from dude_peft.data import Message, Template, encode, parse_row
from dude_peft.data.columns import Columns
from dude_peft.data.encode import Encoder
from dude_peft.data.formats import Reading
from dude_peft.data.rows import data_sha256
from dude_peft.data.suggest import mapping_for
from dude_peft.errors import ConfigError, DataError
from dude_peft.terminal.numbers import integer
from dude_peft.training.data_check import check_data

check = functools.partial(check_data, quiet=False)

PLAIN_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (  # tools, tool calls and tool results as Qwen's templates write them; thoughts of every answer
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}"
    "{{ '<tools>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '</tools><|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function.name + ' ' }}"
    "{{ call.function.arguments | tojson }}{{ '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (  # Llama 3.1's: one call a message, in place of its content; results under the role ipython
    "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}"
    "{% endif %}{% set f = m.tool_calls[0].function %}{{ '<|h|>assistant<|/h|>\n\n' }}"
    "{{ '{\"name\": \"' + f.name + '\", \"parameters\": ' }}{{ f.arguments | tojson }}{{ '}<|eot_id|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|h|>ipython<|/h|>\n\n' + m.content + '<|eot_id|>' }}"
    "{% else %}{{ '<|h|>' + m.role + '<|/h|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}"
)
OPENS_THOUGHTS = (  # Qwen3-Thinking's: the prompt opens the thoughts of the answer
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content %}{% set r = '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set c = c.split('</think>')[-1].strip() %}"
    "{% endif %}{{ '<|im_start|>assistant\n<think>\n' + r + '\n</think>\n\n' + c + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
DROPS_THOUGHTS = (  # R1's: takes the thoughts from every answer, and opens them in the prompt
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|h|>' + m.content.split('</think>')[-1].strip() + '<|eot_id|>' }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|h|><think>\n' }}{% endif %}"
)
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|h|>", "<|/h|>", "<|eot_id|>"]


def tokenizer(template: str | None, eos: str = "<|im_end|>", specials: list[str] = SPECIALS) -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos, name_or_path="tiny")
    made.chat_template = template
    return made


def trained(
    row: dict, template: str | None, *, eos: str = "<|im_end|>", specials: list[str] = SPECIALS, **options
) -> str:
    """All of a row's example, trained stretches between « and »."""
    tok = tokenizer(template, eos, specials)
    (example,) = encode([parse_row(row, "r:1")], Template(tok), tok, 2000, **options).examples
    return marked(tok, example)


def told(row: dict, template: str | None = PLAIN_CHATML) -> list[str]:
    """What the encoder says is left out of a row."""
    tok = tokenizer(template)
    encoder = Encoder(Template(tok), tok, max_length=2000, train_on="answers")
    list(encoder.examples([parse_row(row, "r:1")]))
    return list(encoder.counts.left_out)


def fault(row: dict, template: str | None = QWEN, **options) -> str:
    with pytest.raises((ConfigError, DataError)) as info:
        trained(row, template, **options)
    assert str(info.value).isprintable()
    return str(info.value)


def turns(*messages: tuple, **columns) -> dict:
    """{"messages": [...]} of (role, content) or (role, content, more)."""
    made = [{"role": m[0], "content": m[1], **(m[2] if len(m) > 2 else {})} for m in messages]
    return {"messages": made, **columns}


CALL = {"id": "a1", "type": "function", "function": {"name": "add", "arguments": '{"y": 1, "x": "é"}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLED = turns(
    ("user", "q"),
    ("assistant", None, {"tool_calls": [CALL]}),
    ("tool", "3", {"tool_call_id": "a1"}),
    ("assistant", "b"),
)


# --- formats ----------------------------------------------------------------------------------------------------------


def test_alpaca_has_system_and_history():
    row = {"instruction": "q", "output": "a", "system": "Be.", "history": [["e", "f"], ["g", "h"]]}
    s, u, a = "<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n"
    assert trained(row, PLAIN_CHATML) == (
        f"{s}Be.<|im_end|>\n{u}e<|im_end|>\n{a}«f<|im_end|>»\n{u}g<|im_end|>\n{a}«h<|im_end|>»\n{u}q<|im_end|>\n"
        f"{a}«a<|im_end|>»"
    )
    assert "history[0] is not a pair of texts" in fault({**row, "history": ["e"]})
    assert "'history' is str; write [[question, answer], ...]" in fault({**row, "history": "e"})
    assert "'history[0][1]' is null" in fault({**row, "history": [["e", None]]})


def test_sharegpt_has_system_tools_calls_and_observations():
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "b"},
        ],
        "system": "Be.",
        "tools": json.dumps([{"name": "add", "parameters": {}}]),
    }
    assert trained(row, QWEN) == (
        '<|im_start|>system\nBe.\n<tools>{"type": "function", "function": {"name": "add", "parameters": {}}}</tools>'
        "<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
        '«<tool_call>add {"x": 1}</tool_call><|im_end|>»\n'
        "<|im_start|>user\n<tool_response>3</tool_response><|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»"
    )
    assert "'system' and the first message are two system messages" in fault(
        {"conversations": [{"from": "system", "value": "x"}, *row["conversations"]], "system": "y"}
    )
    assert "conversations[1].value' is text but not JSON" in fault(
        {"conversations": [row["conversations"][0], {"from": "function_call", "value": "add("}]}
    )


def test_calls_of_openai_are_written_by_the_template_arguments_as_an_object():
    expected = (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
        '«<tool_call>add {"y": 1, "x": "é"}</tool_call><|im_end|>»\n'
        "<|im_start|>user\n<tool_response>3</tool_response><|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»"
    )
    assert trained(CALLED, QWEN) == expected
    assert trained(CALLED, LLAMA, eos="<|eot_id|>") == (
        "<|h|>user<|/h|>\n\nq<|eot_id|><|h|>assistant<|/h|>\n\n"
        '«{"name": "add", "parameters": {"y": 1, "x": "é"}}<|eot_id|>»<|h|>ipython<|/h|>\n\n3<|eot_id|>'
        "<|h|>assistant<|/h|>\n\n«b<|eot_id|>»"
    )
    older = {"name": "add", "arguments": '{"y": 1, "x": "é"}'}
    function = turns(
        ("user", "q"), ("assistant", None, {"function_call": older}), ("function", "3"), ("assistant", "b")
    )
    assert trained(function, QWEN) == expected
    last = turns(("user", "q"), ("assistant", "", {"tool_calls": [older]}))
    assert trained(last, QWEN).endswith('assistant\n«<tool_call>add {"y": 1, "x": "é"}</tool_call><|im_end|>»')


def test_prompt_and_completion_may_be_lists_of_messages():
    row = {
        "prompt": [*turns(("user", "q"), ("assistant", "a"), ("user", "r"))["messages"]],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    text = trained(row, PLAIN_CHATML)
    assert text.count("«") == 1
    assert text.endswith("assistant\n«b<|im_end|>»")


def test_thoughts_go_through_the_template_under_any_of_their_names():
    for name in ("reasoning_content", "thinking", "reasoning"):
        row = turns(("user", "q"), ("assistant", "a", {name: "why"}))
        assert trained(row, QWEN).endswith("assistant\n«<think>\nwhy\n</think>\n\na<|im_end|>»")
    assert trained({"question": "q", "answer": "a", "thinking": "why"}, QWEN).endswith("why\n</think>\n\na<|im_end|>»")
    assert "thoughts under two names" in fault(
        turns(("user", "q"), ("assistant", "a", {"thinking": "x", "reasoning": "y"}))
    )


# --- what is learned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": False}, {"train_on": 0.0}, {"training": 0}])
def test_excluded_answers_are_context(flag):
    row = turns(("user", "q"), ("assistant", "BAD", flag), ("user", "r"), ("assistant", "b", {"weight": 1}))
    head = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nBAD<|im_end|>\n<|im_start|>user\nr<|im_end|>\n"
    assert trained(row, PLAIN_CHATML) == f"{head}<|im_start|>assistant\n«b<|im_end|>»"
    everything = trained(row, PLAIN_CHATML, train_on="all").replace("<|im_start|>«", "«<|im_start|>")
    before, excluded, behind = everything.partition("BAD<|im_end|>")
    assert (before.count("«"), before.count("»"), excluded) == (1, 1, "BAD<|im_end|>")
    assert behind.startswith("«\n<|im_start|>user")


def test_what_follows_the_last_learned_answer_is_left_out_and_told():
    row = turns(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "BAD", {"weight": 0}))
    assert trained(row, PLAIN_CHATML).endswith("assistant\n«a<|im_end|>»")
    assert told(row) == ["messages[] after the last answer that is learned"]
    none = turns(("user", "q"), ("assistant", "a", {"weight": 0}))
    assert fault(none).startswith("none of the 1 rows has an answer to learn: weight, train or loss excludes every ")


@pytest.mark.parametrize("train_on", ["answers", "last_answer", "all"])
@pytest.mark.parametrize("template", [PLAIN_CHATML, None])
def test_a_row_that_teaches_nothing_is_left_out_and_counted(train_on, template):
    tok = tokenizer(template)
    encoder = Encoder(Template(tok), tok, max_length=2000, train_on=train_on)
    none = [turns(("user", "q"), ("assistant", "BAD", {flag: value})) for flag, value in (("weight", 0), ("train", 0))]
    rows = [*none, turns(("user", "q"), ("assistant", "a"))]
    made = [examples for _, examples in encoder.examples(parse_row(row, "r:1") for row in rows)]
    assert [len(each) for each in made] == [0, 0, 1]
    assert encoder.counts.losses(2000) == [
        "2 of 3 rows have nothing to learn and are left out: their weight, train or loss excludes every answer"
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"weight": 0.5}, "messages[1].weight is '0.5'; write 1 or true to learn the message, 0 or false to skip it"),
        ({"loss": "false"}, "messages[1].loss is 'false'; write"),
        ({"train_detail": [{"begin_offset": 0}]}, "excludes parts of a message, but only whole messages can be"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}, "arguments' is text but not JSON"),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "names no function"),
        ({"tool_calls": ["f"]}, "is str; write an object with name"),
        ({"name": 3}, "'messages[1].name' is int, not a string"),
    ],
)
def test_what_cannot_be_read_is_refused(more, message):
    assert message in fault(turns(("user", "q"), ("assistant", "a", more)))


def test_a_question_that_is_excluded_stays_out_of_all_tokens():
    row = turns(("user", "q", {"train": False}), ("assistant", "a", {"train": True}))
    assert trained(row, PLAIN_CHATML).endswith("«a<|im_end|>»")
    assert "train_on: all cannot leave out a single message" in fault(row, train_on="all")
    left_out = told(turns(("user", "q", {"train": True}), ("assistant", "a")))
    assert left_out == ["messages[].train of a message that is not an answer"]


def test_two_answers_in_a_row_are_both_trained():
    row = turns(("user", "q"), ("assistant", "a"), ("assistant", "b"))
    assert trained(row, PLAIN_CHATML) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«a<|im_end|>»\n<|im_start|>assistant\n«b<|im_end|>»"
    )
    assert trained(row, None) == "### Question:\nq\n\n### Answer:\n«a<|im_end|>»\n\n### Answer:\n«b<|im_end|>»"


@pytest.mark.parametrize("specials", [SPECIALS, [*SPECIALS, "<think>", "</think>"]])
def test_thoughts_that_the_prompt_opens_itself(specials):
    row = turns(("user", "q"), ("assistant", "<think>\nwhy\n</think>\n\n4"))
    assert trained(row, OPENS_THOUGHTS, specials=specials) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n«why\n</think>\n\n4<|im_end|>»"
    )
    text = trained(row, DROPS_THOUGHTS, eos="<|eot_id|>", specials=specials)
    assert text == "q<|h|><think>\n«why\n</think>\n\n4<|eot_id|>»"
    twice = turns(
        ("user", "q"), ("assistant", "<think>\nx\n</think>\n\n3"), *[(m["role"], m["content"]) for m in row["messages"]]
    )
    assert (
        trained(twice, DROPS_THOUGHTS, eos="<|eot_id|>", specials=specials)
        == "q<|h|>3<|eot_id|>q<|h|><think>\n" + text.partition("\n")[2]
    )


# --- what is told -----------------------------------------------------------------------------------------------------


def test_columns_and_keys_that_nobody_reads_are_told():
    row = {"question": "q", "answer": "a", "id": 7, "text": "q a", "note": "", "rejected": "x"}
    assert told(row) == ["id", "text", "rejected (preference data)"]
    assert told(turns(("user", "q", {"stamp": 1}), ("assistant", "a"))) == ["messages[].stamp"]
    assert told({"question": "q", "answer": "a"}) == []
    everything = {**CALLED, "tools": [TOOL], "system": "Be."}
    assert told(everything, QWEN) == ["messages[].tool_call_id of role tool, which the template does not write"]
    assert "system" not in str(told({**CALLED, "system": "Be."}, QWEN))


def test_what_the_template_does_not_write_is_told_or_refused():
    said = "{}, which the template does not write"
    row = turns(("user", "q", {"name": "x"}), ("assistant", "a", {"reasoning_content": "why"}), tools=[TOOL])
    assert told(row) == [
        said.format(what)
        for what in ("tools", "messages[].name of role user", "messages[].reasoning_content of role assistant")
    ]
    assert told(row, None) == told(row)
    users = PLAIN_CHATML.replace(
        "{{ '<|im_start|>'", "{% if m.role != 'system' and m.role != 'tool' %}{{ '<|im_start|>'"
    ).replace("{% endfor", "{% endif %}{% endfor")
    assert told(turns(("system", "Be."), ("user", "q"), ("assistant", "a")), users) == [said.format("system")]
    results = turns(("user", "q"), ("assistant", "f()"), ("tool", "3"), ("assistant", "a"))
    assert told(results, users) == [said.format("messages[] of role tool")]
    assert told(results) == []
    assert "the template does not write an answer's tool calls" in fault(CALLED, PLAIN_CHATML)
    two = turns(("user", "q"), ("assistant", "", {"tool_calls": [CALL, CALL]}))
    first = QWEN.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    assert "does not write an answer's tool calls" in fault(two, first)
    assert "chat template of 'tiny' failed" in fault(two, LLAMA, eos="<|eot_id|>")


@pytest.mark.parametrize("said", ["m['content'][:2]", "m['content'] | replace('what', 'who')", "''"])
def test_words_of_users_and_the_system_that_a_template_changes_are_told(said):
    row = turns(
        ("system", " Say what. "), ("user", "what?"), ("assistant", "who"), ("user", "what"), ("assistant", "b")
    )
    users = PLAIN_CHATML.replace("m['content']", f"(m['content'] if m.role != 'user' else {said})")
    lines = [f"{w} word for word, which the template does not write" for w in ("system", "messages[] of role user")]
    assert told(row, users) == lines[1:]
    both = PLAIN_CHATML.replace("m['content']", f"(m['content'] if m.role == 'assistant' else {said})")
    assert set(told(row, both)) in ({*lines}, {lines[1], "system, which the template does not write"})
    assert told(row, PLAIN_CHATML.replace("m['content']", "m['content'] | trim")) == []
    assert told(row, PLAIN_CHATML.replace("in messages", "in messages[:1] + messages[2:]")) == lines[1:]


@pytest.mark.parametrize("change", ["replace(' ', '')", "wordwrap(3)", "upper", "replace('b', 'b b c')"])
def test_an_answer_that_a_template_changes_is_refused(change):
    changed = PLAIN_CHATML.replace("m['content']", f"(m['content'] if m.role == 'user' else m['content'] | {change})")
    assert "leaves the answer out, or changes it" in fault(turns(("user", "q"), ("assistant", "a b c")), changed)
    earlier = turns(("user", "q"), ("assistant", "a b c"), ("user", "r"), ("assistant", "D"))
    assert "leaves the answer out, or changes it" in fault(earlier, changed)


def test_an_answer_that_a_template_writes_twice_is_refused():
    twice = PLAIN_CHATML.replace("m['content']", "m['content'] + m['content']")
    assert "writes the answer more than once" in fault(turns(("user", "q"), ("assistant", "a")), twice)
    assert trained(turns(("user", "q"), ("assistant", "n n")), PLAIN_CHATML).endswith("«n n<|im_end|>»")


def test_thoughts_may_be_set_on_lines_of_their_own():
    row = turns(("user", "q"), ("assistant", "<think>why not</think>4 2"))
    assert trained(row, OPENS_THOUGHTS).endswith("<think>\n«why not\n</think>\n\n4 2<|im_end|>»")


def test_a_template_that_fails_without_a_field_reads_it():
    needs = QWEN.replace(
        "{% elif m.role == 'tool' %}",
        "{% elif m.role == 'tool' %}{% if not m.tool_call_id %}{{ raise_exception('id') }}{% endif %}",
    )
    assert told(CALLED, needs) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            turns(("user", "q"), ("assistant", "", {"tool_calls": {"name": "f", "arguments": '{"x": 1, "x": 2}'}})),
            "arguments': the key 'x' appears twice in one object; keep one",
        ),
        (turns(("user", "q"), ("assistant", "a"), tools='[{"name": "f", "name": "g"}]'), "'name' appears twice"),
        (turns(("user", "q"), ("assistant", "a"), tools=[TOOL, {"role": "user"}]), "tools[1] names no function"),
        (turns(("user", "q"), ("assistant", "a"), tools=[{"type": "function"}]), "tools[0] names no function"),
        (turns(("user", "q"), ("assistant", "a"), tools=[{"function": {"name": ""}}]), "tools[0] names no function"),
    ],
)
def test_tools_that_are_none_or_have_a_key_twice_are_refused(row, message):
    assert message in fault(row)


def test_a_column_without_a_name_is_told():
    assert told({"question": "q", "answer": "a", "": "x"}) == ["''"]


def test_a_hint_that_maps_nothing_is_left_out():
    with pytest.raises(DataError, match="'completion' is mapped to another of our names; map completion"):
        Reading(Columns({"prompt": "completion"})).row({"prompt": "q", "completion": "a"}, "r:1")
    assert mapping_for(["prompt", "completion"]) is None


def test_preference_data_say_so():
    pairs = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert "chosen, rejected: preference data" in fault(pairs)
    assert fault(pairs).endswith(
        "set data.columns: {completion: chosen} (without a configuration: --column completion=chosen)"
    )
    lists = {"chosen": turns(("user", "q"), ("assistant", "a"))["messages"], "rejected": []}
    assert "set data.columns: {messages: chosen}" in fault(lists)
    row = Reading(Columns({"messages": "chosen"})).row(lists, "r:1")
    assert (row.answer, row.left_out) == ("a", ())


def test_hashes_tell_all_that_is_learned_apart():
    rows = [
        turns(("user", "q"), ("assistant", "a")),
        turns(("user", "q"), ("assistant", "a"), tools=[TOOL]),
        turns(("user", "q", {"name": "x"}), ("assistant", "a")),
        turns(("user", "q"), ("assistant", "b", {"weight": 0}), ("assistant", "a")),
        turns(("user", "q"), ("assistant", "b"), ("assistant", "a")),
    ]
    assert len({data_sha256([parse_row(row, "r:1")]) for row in rows}) == len(rows)


# --- names ------------------------------------------------------------------------------------------------------------


def read(row: dict, mapping: dict, **options):
    return Reading(Columns(mapping), **options).row(row, "r:1")


def test_columns_keys_and_roles_have_the_names_that_the_data_gives_them():
    pair = read(
        {"customer_query": "q", "agent_reply": "a", "prompt": "x"},
        {"prompt": "customer_query", "completion": "agent_reply"},
    )
    assert pair.messages == (Message("user", "q"), Message("assistant", "a"))
    assert (pair.shape, pair.used, pair.left_out) == (
        "customer_query + agent_reply",
        ("customer_query", "agent_reply"),
        ("prompt",),
    )
    dialog = {"dialog": [{"who": "client", "said": "q"}, {"who": "agent", "said": "a"}]}
    names = {"messages": "dialog", "role": "who", "content": "said", "user": "client", "assistant": "agent"}
    assert read(dialog, names).messages == pair.messages
    swapped = read(turns(("assistant", "q"), ("user", "a")), {"user": "assistant", "assistant": "user"})
    assert swapped.messages == pair.messages


@pytest.mark.parametrize(
    ("row", "mapping", "message"),
    [
        (
            {"customer_query": "q", "agent_reply": "a"},
            {},
            "closest: data.columns: {prompt: customer_query, completion: agent_reply}",
        ),
        (
            {"userQuestion": "q", "botResponse": "a"},
            {},
            "closest: data.columns: {prompt: userQuestion, completion: botResponse}",
        ),
        (
            {"promt": "q", "completion": "a"},
            {},
            "'completion' without 'prompt'; closest: data.columns: {prompt: promt}",
        ),
        ({"question": "q", "response": "a"}, {}, "closest: data.columns: {prompt: question, completion: response}"),
        (
            {"dialog": [{"speaker": "user", "text": "q"}]},
            {},
            "closest: data.columns: {messages: dialog, role: speaker, content: text} (without a configuration: "
            "--column messages=dialog --column role=speaker --column content=text)",
        ),
        ({"My question": "q", "My answer": "a"}, {}, "--column 'prompt=My question' --column 'completion=My answer'"),
        ({"messages": [{"speaker": "user", "text": "q"}]}, {}, "closest: data.columns: {role: speaker, content: text}"),
        (
            {"customer_query": "q", "completion": "a"},
            {"prompt": "customer_qury"},
            "'completion' without 'customer_qury'; closest: data.columns: {prompt: customer_query}",
        ),
        (
            {"completion": "a", "body": "q"},
            {"prompt": "nope"},
            "'completion' without 'nope'; data.columns names it for prompt; the row has 'completion', 'body'",
        ),
        (
            {"customer_query": "q", "agent_reply": "a"},
            {"prompt": "customer_qury", "completion": "agent_replay"},
            "no column is called 'customer_qury', which data.columns names for prompt; closest: data.columns: "
            "{prompt: customer_query}",
        ),
    ],
)
def test_the_closest_names_are_suggested(row, mapping, message):
    with pytest.raises(DataError) as info:
        read(row, mapping)
    assert message in str(info.value)


def test_wrong_maps():
    for mapping, message in (
        ({"promt": "x"}, "'promt' is not one of our names; closest: prompt"),
        ({"prompt": "x", "completion": "x"}, "'x' stands for two of our names"),
        ({"prompt": ""}, "'prompt' is ''; map our name to the data set's own name, as in {prompt:"),
        ({"query": ""}, "'query' is ''; map our name"),
        ({"query": "prompt"}, "'query' is not one of our names; our name comes first: {prompt: query}"),
    ):
        with pytest.raises(ConfigError, match=message):
            Columns(mapping)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q"},
        {"prompt": "q"},
        {"prompt": "q", "completion": None},
        {"instruction": "q", "output": ""},
        {"prompt": [{"role": "user", "content": "q"}]},
        turns(("user", "q")),
        turns(("user", "q"), ("assistant", "a")),
        {"conversations": [{"from": "human", "value": "q"}]},
    ],
)
def test_rows_without_an_answer_are_questions(row):
    assert read(row, {}, questions=True).prompt == (Message("user", "q"),)


# --- dude data check --------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, monkeypatch) -> str:
    """A folder with a tokenizer and a configuration, and no weights."""
    monkeypatch.setenv("DUDE_CACHE", str(tmp_path / "cache"))
    tokenizer(PLAIN_CHATML).save_pretrained(tmp_path / "model")
    LlamaConfig(vocab_size=261).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_data_check_lists_each_column_as_used_or_left_out(tmp_path, model, capsys):
    rows = [{"ask": f"q{i}", "reply": "a", "id": i, "system": "Be.", "tools": [TOOL]} for i in range(20)]
    names = {"prompt": "ask", "completion": "reply", "history": "before"}
    check(write(tmp_path / "t.jsonl", rows), model, columns=names, test="0.25")
    out = " ".join(capsys.readouterr().out.split())
    for line in (
        "format: ask + reply",
        "used: ask (20), reply (20), system (20), tools (20)",
        "left out: id (20 of 20 rows), tools, which the template does not write (20 of 20 rows)",
        "no row has before (history), but data.columns names them",
        "examples: 15;",
        "0 of 5 held-out examples repeat the question of a training example",
    ):
        assert line in out


@pytest.mark.parametrize("test", ["0.1_0", " 0.1", "\u0660.\u0661", "infinity"])
def test_shares_and_seeds_are_written_plainly(test):
    with pytest.raises(ConfigError, match=r"^--test .* is not a decimal number; write plain digits"):
        check("t.jsonl", "m", test=test)
    with pytest.raises(ConfigError, match=r"^--seed -1: give a whole number from 0 to"):
        check("t.jsonl", "m", seed=-1)


def test_a_number_that_is_too_large_is_called_so():
    with pytest.raises(typer.BadParameter, match="is too large; write a whole number of at most 18 digits"):
        integer("9" * 24)
    with pytest.raises(typer.BadParameter, match="is not a whole number"):
        integer("0" * 24)
    assert integer("-" + "9" * 18) == -(10**18 - 1)


def test_the_command_takes_names(tmp_path, model):
    rows = write(tmp_path / "t.jsonl", [{"ask": "q", "reply": "a"}] * 2)
    columns = ["--column", "prompt=ask", "--column", "completion=repli"]
    wrong = dude("data", "check", rows, "--model", model, *columns)
    assert wrong.returncode == 3
    assert "'ask' without 'repli'; closest: data.columns: {completion: reply}" in wrong.stderr
