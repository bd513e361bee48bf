"""What becomes of the failures of Ray actors, of teachers and of rollouts: errors of this project."""

from __future__ import annotations

import logging
from typing import Any

from cogvit.errors import CogViTError, ConfigError, TeacherUnavailable

_LOG = logging.getLogger(__name__)


def raised(who: str, error: Any) -> CogViTError:
    """Return what a call of an actor that lives has raised as an error of ours, for its asker's peers too.

    who: whose actor, for messages. error: a RayTaskError.
    """
    if isinstance(error.cause, CogViTError):
        return error.cause
    _LOG.error("%s failed:\n%s", who, error)
    said = f"{type(error.cause).__name__}: {error.cause}".partition("\n")[0]
    return TeacherUnavailable(f"{who} failed: {said}; the log says where")


def check_started(who: str, error: Any) -> None:
    """Let an actor's death, an ActorDiedError, pass unless it never began.

    Errors: ConfigError says what its beginning raised.
    """
    if error.actor_init_failed:
        raise ConfigError(f"{who} did not start: {str(error).strip().splitlines()[-1]}") from error
