"""Foreign text in our messages: always one printable line, never longer than a reader wants.

File names, keys and template errors come from outside; a newline or an escape sequence in them must not reach a
terminal.
"""

_HARMLESS = "\n\t\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}\N{ZERO WIDTH JOINER}"


def shown(text: object, limit: int | None = 80) -> str:
    """`text` on one line, control characters and lone surrogates escaped, cut to `limit` characters."""
    full = text if isinstance(text, str) else str(text)
    head = full if limit is None or len(full) <= limit else full[:limit] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in head)


def quoted(text: object, limit: int = 40) -> str:
    """`shown` in single quotes: how a key, a role or an option is named in a message."""
    return f"'{shown(text, limit)}'"


def reason_of(error: BaseException, limit: int) -> str:
    """What went wrong in another library, for a message of ours: the kind of error, and its text on one line."""
    return f"{type(error).__name__}: {shown(' '.join(str(error).split()), limit)}"


def shown_lines(text: str) -> str:
    """`text` with what `shown` escapes escaped, but newlines, tabs and the spaces of other scripts kept."""
    return "".join(c if c in _HARMLESS else shown(c) for c in text)


def a_(noun: str) -> str:
    """The noun with its article, as in 'an Embedding'."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
