"""`dude chat`: a conversation with a model, line by line, and with its base model beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from dude_peft.answer.decoding import Decoding
from dude_peft.chat.typed import is_typed, piped_lines, typed_lines
from dude_peft.errors import ConfigError, DataError
from dude_peft.show import quoted, shown
from dude_peft.terminal.display import Display
from dude_peft.terminal.quiet import gathered_warnings, quiet_imports

if TYPE_CHECKING:
    from dude_peft.answer.speaker import Speaker
    from dude_peft.chat.conversation import Conversation


def chat(
    name: str,
    *,
    base: str | None = None,
    gguf_file: str | None = None,
    device_map: str | None = None,
    max_memory: Sequence[str] | None = None,
    system: str | None = None,
    template: str | None = None,
    special_tokens: str | None = None,
    compare: bool = False,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Talk to an adapter or a model until the input ends: answers on standard output, all else on standard error.

    Args:
        name: folder or hub id of an adapter or a model, or `package:NAME`.
        base: base model of the adapter; None takes its own.
        gguf_file: name of the GGUF file that is the (base) model.
        device_map: `auto` spreads the model over GPUs, CPU and disk; a device has all of it; None is the fastest one.
        max_memory: the most that `auto` puts on a device, each as DEVICE=SIZE; None is what is free.
        system: the system message; None for none.
        template: auto, chat or plain; None takes the training's.
        special_tokens: what one is that a text spells, text or, by allow, the token; None takes the training's.
        compare: let the base model answer as well.
        max_new_tokens: of one answer.
        temperature: 0 takes the likeliest token.
        top_p: share of probability that is drawn from.
        seed: of the drawing.

    Raises:
        ConfigError: an option, model or template that cannot be used.
        DataError: input that the model cannot read; at a terminal it is shown, and the chat goes on.
        ArtifactError: a damaged adapter, or another base model.
        NumericsError: NaN or Inf.
        ResourceError: it does not fit into memory.
        KeyboardInterrupt: Ctrl-C at the prompt, or anywhere without a terminal.
    """
    decoding = Decoding(max_new_tokens, temperature, top_p, seed)
    with quiet_imports():
        from dude_peft.answer.speaker import open_speaker
        from dude_peft.chat.conversation import Conversation

    notes = Display(stderr=True)
    with gathered_warnings(notes.warn):
        speaker = open_speaker(
            name, base=base, gguf_file=gguf_file, notes=notes, device_map=device_map, max_memory=max_memory
        )
        decoding.start()
        written = speaker.template(template, special_tokens)
        conversation = Conversation(written, speaker.tokenizer, speaker.positions, speaker.vocabulary, system)
        this = _Chat(speaker, conversation, decoding, notes)
        if compare:
            this.switch_compare("")
        this.run()


class _Chat:
    def __init__(self, speaker: Speaker, conversation: Conversation, decoding: Decoding, notes: Display) -> None:
        self.speaker = speaker
        self.conversation = conversation
        self.decoding = decoding
        self.notes = notes
        self.display = Display()
        self.typed = is_typed()
        self.compare = False
        self.told: set[str] = set()
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/reset": (self._reset, "start a new conversation; the system message stays"),
            "/system": (self._system, "/system TEXT: set the system message; without TEXT: remove it"),
            "/compare": (
                self.switch_compare,
                "switch the base model's answers on or off; the chat continues with the tuned model's",
            ),
            "/retry": (self._retry, "answer the last message again (the answer is the same if --temperature is 0)"),
            "/help": (self._help, "show this list; to send a message that begins with /, write //"),
            "/exit": (lambda _: None, "end the chat, as Ctrl-D does; Ctrl-C stops an answer"),
        }

    def run(self) -> None:
        self._greet()
        for line in self._lines():
            if line.strip() == "/exit":
                return
            try:
                self._take(line)
            except (ConfigError, DataError) as error:
                if not self.typed:
                    raise
                self.notes.warn(shown(error, None))

    def _greet(self) -> None:
        if self.conversation.template.kind == "plain":
            has_chat = bool(self.speaker.tokenizer.chat_template)
            why = "the configuration or --template asks for it" if has_chat else "the tokenizer has no chat template"
            self.notes.say(f"note: the plain template is used ({why})")
        if self.typed:
            what = "an adapter on its base model" if self.speaker.adapted else "a model"
            self.notes.say(f"{shown(self.speaker.name, 300)}, {what}; /help lists the commands; Ctrl-D ends the chat")

    def _lines(self) -> Iterator[str]:
        return (line for line in typed_lines() if line.strip()) if self.typed else (line for _, line in piped_lines())

    def _take(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            command, _, argument = line.strip().partition(" ")
            if command not in self.commands:
                raise ConfigError(
                    f"no command {quoted(command)}; /help lists them; to send a message that begins with /, write //"
                )
            self.commands[command][0](argument.strip())
            return
        self.conversation.ask(line.removeprefix("/") if line.startswith("//") else line)
        self._answer()

    def _answer(self) -> None:
        try:
            ids, dropped = self.conversation.prompt(self.decoding.max_new_tokens)
        except (ConfigError, DataError):
            self.conversation.take_back()
            raise
        if dropped:
            self.notes.say(f"note: the {dropped} oldest messages no longer fit into the model and are dropped")
        told = [change for change in self.conversation.changes() if change not in self.told]
        self.told.update(told)
        if told:
            self.notes.say(f"note: {'; '.join(told)}")
        try:
            text, note = self._say(ids)
        except BaseException:
            self.conversation.take_back()
            raise
        self.conversation.answer(text)
        if note:
            self.notes.say(f"note: {note}")

    def _say(self, ids: list[int]) -> tuple[str, str | None]:
        """Shows the answer as it comes; returns its text, and what there is to say of how it ended."""
        from dude_peft.answer.decode import Pieces, decode
        from dude_peft.chat.screen import answers, one_answer

        positions = self.conversation.positions
        limit = self.decoding.max_new_tokens
        limit = limit if positions is None else min(limit, positions - len(ids))
        pieces: Pieces | None = None
        note = None
        try:
            if self.compare:
                with answers(self.display.console, ["base", "tuned"]) as (base, tuned):
                    first = Pieces(self.speaker, base)
                    decode(self.speaker, [ids], self.decoding, max_new_tokens=limit, base=True, pieces=first)
                    pieces = Pieces(self.speaker, tuned)
                    found = decode(self.speaker, [ids], self.decoding, max_new_tokens=limit, pieces=pieces)
            else:
                with one_answer() as write:
                    pieces = Pieces(self.speaker, write)
                    found = decode(self.speaker, [ids], self.decoding, max_new_tokens=limit, pieces=pieces)
            if found[0].finish == "length":
                note = f"the answer was cut at {limit} tokens"
        except KeyboardInterrupt:
            if not self.typed:
                raise
            note = "stopped"
        text = pieces.text.strip() if pieces else ""
        return text, note if text else note or "the model ended its answer at once"

    def _reset(self, _: str) -> None:
        self.conversation.turns.clear()
        self.notes.say("new conversation")

    def _system(self, text: str) -> None:
        self.conversation.system = text or None
        self.notes.say("the system message is set" if text else "no system message")

    def switch_compare(self, _: str) -> None:
        """Let the base model answer too, or no longer."""
        if not self.speaker.adapted:
            raise ConfigError(f"nothing to compare: {shown(self.speaker.name, 300)} is a model, not an adapter")
        self.compare = not self.compare
        self.notes.say("both the base and the tuned model answer" if self.compare else "only the tuned model answers")

    def _retry(self, _: str) -> None:
        question = self.conversation.take_back()
        if question is None:
            raise ConfigError("there is no message to answer again; write one first")
        self.conversation.ask(question)
        self._answer()

    def _help(self, _: str) -> None:
        for name, (_run, meaning) in self.commands.items():
            self.notes.say(f"{name:<9} {meaning}")
