"""Mistakes that the user can mend, each shown as one line and a non-zero exit."""


class SecateurError(Exception):
    """Something outside the code is wrong; the message says what, where and what is allowed."""


class SettingsError(SecateurError):
    """A value in params.yaml, or its absence."""


class DataError(SecateurError):
    """A data set that is missing, damaged or not of the expected form."""


class CheckpointError(SecateurError):
    """A file that is no checkpoint of ours, or not the one this stage needs."""


class TrainingError(SecateurError):
    """Training that cannot go on, as where the loss is no longer a finite number."""


class PruningError(SecateurError):
    """A choice that would leave a layer empty, or a removal that is not exact."""
