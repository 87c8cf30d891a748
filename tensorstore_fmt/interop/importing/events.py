"""Event messages: what stands in the records of smdebug's and TensorBoard's event files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.interop.importing.wire import DOUBLE, FLOAT, fields, signed, text

__all__ = ["Event", "SummaryValue", "decode_event"]

_OTHER: Final = {4: "graph", 6: "log message", 7: "session log", 8: "run metadata", 9: "meta graph"}


@dataclass(slots=True)
class SummaryValue:
    """One named value of an event; what it is, is in the field that is not None.

    Attributes
    ----------
    plugins
        Contents by name of the plugin they are for; smdebug puts mode and mode step there.
    """

    tag: str = ""
    simple: float | None = None
    tensor: memoryview | None = None
    histogram: memoryview | None = None
    image: memoryview | None = None
    audio: memoryview | None = None
    plugins: dict[str, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class Event:
    """One record.

    Attributes
    ----------
    other
        What it holds beside values, as a word; empty for nothing.
    """

    wall_time: float = 0.0
    step: int = 0
    values: list[SummaryValue] = field(default_factory=list)
    other: str = ""


def decode_event(payload: memoryview) -> Event:
    """Decode the payload of a record; large parts share its memory.

    Raises
    ------
    FormatError
        It is no such message.
    """
    event = Event()
    for number, value in fields(payload):
        if number == 2 and isinstance(value, int):
            event.step = signed(value)
        elif isinstance(value, int):
            continue
        elif number == 1 and len(value) == 8:
            (event.wall_time,) = DOUBLE.unpack(value)
        elif number == 5:
            event.values += [_value(v) for n, v in fields(value) if n == 1 and not _is_int(v)]
        elif number in _OTHER:
            event.other = _OTHER[number]
    return event


def _is_int(value: object) -> bool:
    return isinstance(value, int)


def _value(message: object) -> SummaryValue:
    assert isinstance(message, memoryview)
    found = SummaryValue()
    for number, value in fields(message):
        if isinstance(value, int):
            continue
        if number == 1:
            found.tag = text(value)
        elif number == 2 and len(value) == 4:
            (found.simple,) = FLOAT.unpack(value)
        elif number == 4:
            found.image = value
        elif number == 5:
            found.histogram = value
        elif number == 6:
            found.audio = value
        elif number == 8:
            found.tensor = value
        elif number == 9:
            _metadata(value, found.plugins)
    if not found.tag:
        raise FormatError("a value without a name")
    return found


def _metadata(message: memoryview, plugins: dict[str, bytes]) -> None:
    for number, value in fields(message):
        if number == 1 and not isinstance(value, int):
            parts = dict(fields(value))
            content = parts.get(2, b"")
            name = parts.get(1, memoryview(b""))
            plugins[text(name)] = b"" if isinstance(content, int) else bytes(content)
