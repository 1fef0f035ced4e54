"""Errors that the user can correct, each shown as one line and a non-zero exit status."""


class SecateurError(Exception):
    """Something outside the code is wrong; the message says what, where and what is allowed."""


class SettingsError(SecateurError):
    """A setting that is missing or has a value that is not allowed."""


class ArgumentError(SettingsError):
    """An argument with a value that is not allowed, raised by code that serves a Python call too.

    Such code does not know the section of params.yaml that the argument came from, if it came from
    one. `settings.section` turns the error into a SettingsError that names the whole key.
    """

    def __init__(self, key: str, message: str, value: object = ...) -> None:
        """`key`: the argument's name (dotted for a field of it); `value`: left out if not given."""
        shown = "" if value is ... else f" = {value!r}"
        super().__init__(f"{key}{shown}: {message}")
        self.key = key


class DataError(SecateurError):
    """A data set that is missing, damaged or not of the expected form."""


class CheckpointError(SecateurError):
    """A file that is not a checkpoint of Secateur, or not the one that this stage needs."""


class TrainingError(SecateurError):
    """Training that cannot go on, for example because the loss is no longer a finite number."""


class PruningError(SecateurError):
    """A decision that would leave a layer empty, or a removal that is not exact."""
