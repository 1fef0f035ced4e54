"""Errors that the user can correct, each shown as one line and a non-zero exit status."""

import difflib
import reprlib
from collections.abc import Iterable


def cut(text: str, limit: int = 100) -> str:
    """The text in one line, cut with an ellipsis if it is longer than `limit` characters."""
    text = " ".join(text[: 4 * limit].split()) if len(text) > limit or "\n" in text else text
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the nearest known name; empty if none is near."""
    close = difflib.get_close_matches(name, [*known], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def shorten(value: object, limit: int = 100) -> str:
    """`repr` of a value for a message, cut with an ellipsis at about `limit` characters.

    Large values, such as a long text or a number with thousands of digits, are never formatted in
    full.
    """
    return cut(_Brief(limit).repr(value), limit)


class _Brief(reprlib.Repr):
    """A `repr` whose cost is limited; equal to `repr` for small values."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 12
        self.maxstring = self.maxother = limit

    def repr_int(self, value: int, _level: int) -> str:
        """The digits, or how many there are if there are many."""
        digits = value.bit_length() * 0.30103
        return repr(value) if digits < 60 else f"a number of about {digits:.0f} digits"

    def repr_dict(self, value: dict[object, object], level: int) -> str:
        """The items in insertion order."""
        if level <= 0 and value:
            return "{...}"
        pairs = list(value.items())[: self.maxdict]
        parts = [f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in pairs]
        return f"{{{', '.join([*parts, *(['...'] if len(value) > len(pairs) else [])])}}}"


class SecateurError(Exception):
    """Something outside the code is wrong; the message says what, where and what is allowed."""


class SettingsError(SecateurError):
    """A setting that is missing or has a value that is not allowed."""


class ArgumentError(SettingsError):
    """An argument with a value that is not allowed, raised by code that Python callers use too.

    Such code does not know from which section of params.yaml the argument came, if from any.
    `settings.section` turns the error into a SettingsError that names the whole key.
    """

    def __init__(self, key: str, message: str, value: object = ...) -> None:
        """`key` is the name of the argument (dotted for a field); `value` is shown if given."""
        shown = "" if value is ... else f" = {shorten(value)}"
        super().__init__(f"{key}{shown}: {message}")
        self.key = key


class DataError(SecateurError):
    """A data set that is missing, damaged or not of the expected form."""


class CheckpointError(SecateurError):
    """A file that is not a checkpoint of Secateur, or not the checkpoint that this stage needs."""


class StateError(SecateurError):
    """Saved state of a training that is damaged, or belongs to another training."""


class TrainingError(SecateurError):
    """Training that cannot continue, for example because the loss is no longer finite."""


class PruningError(SecateurError):
    """A decision that would leave a layer empty, or a removal that is not exact."""
