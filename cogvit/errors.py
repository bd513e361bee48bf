"""The errors that a user can cause or must act on. Commands print them as one line and leave with `exit_status`."""

from __future__ import annotations


class CogViTError(Exception):
    """Base of the project's errors: the message is one line with the value, the limit and the way out."""

    exit_status = 2


class ConfigError(CogViTError):
    """A configuration, flag or layout that cannot run."""


class DataError(CogViTError):
    """Shards, an index or samples that cannot be used."""


class CheckpointError(CogViTError):
    """A checkpoint or weight file that is missing, damaged or of another model."""


class TeacherUnavailable(CogViTError):
    """The teachers did not answer in time; the run saved a checkpoint and wants a requeue."""

    exit_status = 75


class AskedToLeave(CogViTError):
    """Somebody asked the run to stop while it waited for what its next step needs; it saved what was done."""

    exit_status = 75


class NonFiniteStep(CogViTError):
    """A loss or gradient was NaN or infinite; nothing was updated."""

    exit_status = 1


class PolicyFault(CogViTError):
    """A policy that does not look at its images, or whose answers are not its own; the run stopped without a save."""

    exit_status = 1
