"""What users write is text, also where it spells a control token: in any tokenizer, through any template."""

import itertools
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dude_peft.data import Message, Row, Template, encode, prompt_ids
from dude_peft.data.control_tokens import ControlTokens
from dude_peft.data.encode import Encoder
from dude_peft.errors import ConfigError, DataError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
LETTERS = [chr(code) for code in range(33, 127)]
MERGED = ["he", "in", "er", "im", "<|", "|>", "</", "start", "s>"]


def byte_level():
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab={**vocab, "<|": 256, "|>": 257}, merges=[("<", "|"), ("|", ">")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def llama():
    """SentencePiece's BPE as it is converted: control tokens in the vocabulary, merges that even lead to one."""
    pieces = [*SPECIALS, *(f"<0x{n:02X}>" for n in range(256)), "▁", *LETTERS, "▁t", "he", "in", "</", "s>"]
    merges = [("▁", "t"), ("h", "e"), ("i", "n"), ("<", "/"), ("s", ">"), ("</", "s>")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return inner


def unigram():
    """Control tokens are pieces of it, with the best score of all."""
    words = [(piece, -2.0) for piece in MERGED]
    pieces = [*((name, 0.0) for name in SPECIALS), ("▁", -3.0), *((letter, -5.0) for letter in LETTERS), *words]
    inner = Tokenizer(models.Unigram(pieces, unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    return inner


def word_piece():
    continued = ["##" + c for c in LETTERS]
    vocab = {piece: i for i, piece in enumerate([*SPECIALS, *LETTERS, *continued, "in", "##er"])}
    inner = Tokenizer(models.WordPiece(vocab=vocab, unk_token="<unk>"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    return inner


KINDS = {"byte_level": byte_level, "llama": llama, "unigram": unigram, "word_piece": word_piece}


def tokenizer_of(kind, chat_template=CHATML, **flags):
    inner = KINDS[kind]()
    inner.add_special_tokens([AddedToken(name, **{"normalized": False, "special": True, **flags}) for name in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", bos_token="<s>", unk_token="<unk>", name_or_path="t"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def asks(*contents, source="s.jsonl:1"):
    roles = itertools.cycle(["user", "assistant"])
    return Row(tuple(Message(role, content) for role, content in zip(roles, contents, strict=False)), source)


def controls(tokenizer, ids):
    special = {tokenizer.convert_tokens_to_ids(name) for name in SPECIALS[1:]}
    return [tokenizer.convert_ids_to_tokens(token) for token in ids if token in special]


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_spelt_token_adds_no_token_to_a_prompt_or_an_answer(kind, template):
    tokenizer = tokenizer_of(kind)
    written = Template(tokenizer, template)
    plain = asks("hi there", "fine")
    ends = controls(tokenizer, prompt_ids(plain, written, tokenizer))
    for name in SPECIALS[1:]:
        row = asks(f"hi {name}there{name}", f"{name}fine {name}")
        ids = prompt_ids(row, written, tokenizer)
        assert controls(tokenizer, ids) == ends
        (example,) = encode([row], written, tokenizer, 500).examples
        assert example["input_ids"][: len(ids)] == ids
        trained = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label >= 0]
        assert controls(tokenizer, trained) == ["<|im_end|>"]
        assert trained[-1] == tokenizer.eos_token_id
        if kind == "byte_level":  # the others' decoders put spaces between pieces
            assert tokenizer.decode(ids) == written.prompt_text(row)
            assert tokenizer.decode(trained) == f"{name}fine {name}<|im_end|>"


@pytest.mark.parametrize(
    "flags",
    [{}, {"normalized": True}, {"rstrip": True}, {"lstrip": True}, {"single_word": True}],
    ids=lambda flags: "".join(flags) or "usual",
)
@pytest.mark.parametrize("kind", KINDS)
def test_apart_is_as_together_where_nothing_is_spelt(kind, flags):
    """The tokenizer in other words gives the tokenizer's own ids, around control tokens, spaces and unknown letters."""
    tokenizer = tokenizer_of(kind, **flags)
    control = ControlTokens(tokenizer, chat_template=CHATML)
    draw = random.Random(0)
    parts = [*SPECIALS[1:], " ", "  ", "\n", "the inner", "Über", "é", "a|b", "<", "ﬁ", "x_y"]
    seen = 0
    for _ in range(200):
        text = "".join(draw.choices(parts, k=draw.randint(1, 9)))
        together = tokenizer(text, add_special_tokens=False)["input_ids"]
        apart = control.apart(text, control.spans(text))
        seen += apart is not None
        assert apart in (together, None), text
    assert seen == 200 or "normalized" in flags or "single_word" in flags  # which find not every token in a text


def test_letters_that_a_normalizer_makes_a_token_of_stay_letters():
    inner = byte_level()
    inner.normalizer = normalizers.NFKC()
    inner.add_special_tokens([AddedToken(name, normalized=True, special=True) for name in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    wide = "\uff1cs\uff1e"  # <s> in full-width letters
    assert controls(tokenizer, tokenizer(wide)["input_ids"]) == ["<s>"]
    ids = prompt_ids(asks(f"hi {wide}", "a"), Template(tokenizer, "plain"), tokenizer)
    assert controls(tokenizer, ids) == []
    assert tokenizer.decode(ids) == "### Question:\nhi <s>\n\n### Answer:\n"


def test_tokens_that_are_not_special_but_the_templates_own_are_text_in_questions_and_tokens_in_answers():
    tokenizer = tokenizer_of("byte_level", CHATML.replace("assistant\\n", "assistant\\n<think>"))
    tokenizer.add_tokens(["<think>", "</think>", "<gene>"])
    think, gene = tokenizer.convert_tokens_to_ids(["<think>", "<gene>"])
    written = Template(tokenizer, "plain")
    row = asks("what is <think> <gene>", "<think>a")
    assert prompt_ids(row, written, tokenizer).count(think) == 1  # no template writes it here: a word like <gene>
    tokenizer.chat_template = CHATML.replace("{% if add", "{% if false %}<think>{% endif %}{% if add")
    written = Template(tokenizer, "chat")
    ids = prompt_ids(row, written, tokenizer)
    assert (ids.count(think), ids.count(gene)) == (0, 1)
    (example,) = encode([row], written, tokenizer, 500).examples
    assert example["input_ids"][len(ids)] == think
    assert tokenizer.decode(example["input_ids"]) == "".join(written.render(row))


def test_text_is_text_in_plain_text_too_and_counted():
    tokenizer = tokenizer_of("byte_level")
    row = Row((Message("text", "one</s>two<|im_end|>"),), "s.txt:1")
    for allow, ends in (("text", ["<|im_end|>"]), ("allow", ["</s>", "<|im_end|>"])):
        (example,) = encode([row], Template(tokenizer, "plain", allow), tokenizer, 500).examples
        assert controls(tokenizer, example["input_ids"]) == ends
    encoder = Encoder(Template(tokenizer), tokenizer, max_length=500, train_on="answers")
    list(encoder.examples([asks("<s>", "a"), asks("> s", "a <"), row]))
    assert encoder.counts.spelling == 2
    assert encoder.counts.spellings("text") == [
        "2 of 3 rows spell special tokens, which are plain text there; special_tokens: allow reads them as tokens"
    ]


@pytest.mark.parametrize(("said", "allowed"), [("<s>", True), ("<|im_end|>", False), ("<s> <|im_end|>", False)])
def test_allow_is_proposed_where_it_works(said, allowed):
    tokenizer = tokenizer_of("byte_level", CHATML)
    encoder = Encoder(Template(tokenizer), tokenizer, max_length=500, train_on="answers")
    list(encoder.examples([asks("q", f"a {said} b")]))
    (line,) = encoder.counts.spellings("text")
    assert ("special_tokens: allow" in line) is allowed
    if not allowed:
        with pytest.raises(DataError, match="since the template adds it, or set special_tokens to text"):
            Template(tokenizer, special_tokens="allow").pieces([asks("q", f"a {said} b")])


def test_what_is_allowed_is_the_token():
    tokenizer = tokenizer_of("byte_level")
    ids = prompt_ids(asks("<s>q", "a"), Template(tokenizer, "plain", "allow"), tokenizer)
    assert controls(tokenizer, ids) == ["<s>"]
    with pytest.raises(ConfigError, match="special_tokens is 'yes'; use text, allow"):
        Template(tokenizer, "plain", "yes")


@pytest.mark.parametrize("change", ["upper", "replace('start', 'begin')", "replace('<', '&lt;')"])
def test_a_template_that_changes_such_a_text_is_refused(change):
    tokenizer = tokenizer_of("byte_level", CHATML.replace("m['content']", f"(m['content'] | {change})"))
    with pytest.raises(
        DataError, match=r"^s.jsonl:1: a message spells .* '<\|im_start\|>', and the chat template of 't'"
    ):
        prompt_ids(asks("hi <|im_start|>", "HI"), Template(tokenizer), tokenizer)
    ids = prompt_ids(asks("hi <", "HI"), Template(tokenizer), tokenizer)  # which only might be a part of one
    assert controls(tokenizer, ids) == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


def test_a_template_that_trims_cuts_and_repeats_keeps_text_text():
    body = "(m['content'] | trim)[:9] + m['content'][-3:] + '<s>'"
    tokenizer = tokenizer_of("byte_level", CHATML.replace("m['content']", body))
    row = asks(" <|im_end|><s>", "a")
    written = Template(tokenizer)
    ids = prompt_ids(row, written, tokenizer)
    assert controls(tokenizer, ids) == ["<|im_start|>", "<s>", "<|im_end|>", "<|im_start|>"]
    assert tokenizer.decode(ids) == "<|im_start|>user\n<|im_end|<s><s><|im_end|>\n<|im_start|>assistant\n"


def test_a_token_is_not_made_at_the_seam_of_text_and_template():
    tokenizer = tokenizer_of("byte_level", CHATML.replace("m['content']", "'<' + m['content'] + '|>'"))
    for text in ("s>", "/s>x", "<|im_start", "|im_end|>"):
        ids = prompt_ids(asks(text, "a"), Template(tokenizer), tokenizer)
        assert controls(tokenizer, ids) == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


def test_a_tokenizer_that_knows_a_word_only_as_its_token_says_so():
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "hi": 2, "<|im_end|>": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", bos_token="<s>", unk_token="<unk>"
    )
    with pytest.raises(DataError, match=r"^s.jsonl:1: the text contains the special token '<s>', which this tokenizer"):
        prompt_ids(asks("hi <s>", "hi"), Template(tokenizer, "plain"), tokenizer)
    for said, proposed in (("<s>", True), ("<|im_end|> <s>", False)):
        with pytest.raises(DataError) as info:
            encode([asks("hi", f"hi {said} hi")], Template(tokenizer, "plain"), tokenizer, 50)
        assert ("set special_tokens to allow" in str(info.value)) is proposed


def test_a_template_that_writes_nothing_is_one_line():
    tokenizer = tokenizer_of("byte_level", "{% if false %}x{% endif %}")
    with pytest.raises(ConfigError, match=r"^s.jsonl:1: the template writes nothing before the answer"):
        prompt_ids(asks("hi", "a"), Template(tokenizer), tokenizer)


def test_a_template_that_makes_a_token_of_what_spells_none_is_refused():
    tokenizer = tokenizer_of("byte_level", CHATML.replace("m['content']", "(m['content'] | replace('#', ''))"))
    written = Template(tokenizer)
    assert tokenizer.decode(prompt_ids(asks("a # < b", "c"), written, tokenizer)).count("a  < b") == 1
    with pytest.raises(
        DataError, match=r"^s.jsonl:1: the chat template of 't' turns text of a message into a special token"
    ):
        prompt_ids(asks("a <|im_#start|>system", "c"), written, tokenizer)
