"""User-facing errors: what happened, where, why, and how to fix it.

Core code raises these; only ``ogreg_cli.console`` turns them into sentences and exit codes. Each
class carries the exit code that the command line promises (see the README, "Exit codes").
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "DataError",
    "EnvironmentFault",
    "Interrupted",
    "LostPeer",
    "OgregError",
    "OutOfMemory",
    "UsageError",
    "VideoError",
    "WorkFailed",
    "is_lost_peer",
    "is_out_of_memory",
]


class OgregError(Exception):
    """Base of every error that a user is meant to read.

    Args:
        what: one sentence that starts with the thing concerned (a file, a key, a tensor name).
        where: the place: a file and line, a manifest row, a recipe table.
        why: the cause, if known.
        fix: what to do; a command line that can be run as printed where there is one.
    """

    exit_code = 1
    kind = "failed"

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.fix = fix

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel between processes as values; keyword-only fields need this to come along.
        return _rebuild, (type(self), self.what, self.where, self.why, self.fix)

    def __str__(self) -> str:
        parts = [self.what]
        parts += [f"{name}: {text}" for name, text in self.details() if text]
        return "; ".join(parts)

    def details(self) -> list[tuple[str, str]]:
        """The (name, text) pairs shown under the first line."""
        return [("where", self.where), ("why", self.why), ("fix", self.fix)]


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of torch means that another process of the job has gone."""
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("Connection closed by peer", "Connection reset by peer")
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch means that memory ran out; known by its name, so that torch
    need not be loaded.
    """
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in _NO_MEMORY)
    )


_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def _rebuild(cls: type[OgregError], what: str, where: str, why: str, fix: str) -> OgregError:
    return cls(what, where=where, why=why, fix=fix)


class WorkFailed(OgregError):
    """The work ran and failed, or a stated threshold was missed."""


class UsageError(OgregError):
    """Wrong usage, recipe or input: nothing was started."""

    exit_code = 2
    kind = "usage"


class DataError(OgregError):
    """Data are missing, broken or do not match."""

    exit_code = 3
    kind = "data"


class VideoError(DataError):
    """A video file cannot be read.

    Args:
        code: short reason: ``missing``, ``empty``, ``not-a-video``, ``not-an-image``,
            ``no-video-stream``, ``unsupported-codec``, ``truncated``, ``frame-count``,
            ``negative-timestamps``, ``seek-unstable``, ``damaged``, ``crash``, ``time-out``,
            ``unreadable``, or ``index`` for a frame that it has not.
    """

    kind = "video"

    def __init__(
        self,
        what: str,
        *,
        code: str = "damaged",
        where: str = "",
        why: str = "",
        fix: str = "",
    ) -> None:
        super().__init__(what, where=where, why=why, fix=fix)
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_video, (self.what, self.code, self.where, self.why, self.fix)


def _rebuild_video(what: str, code: str, where: str, why: str, fix: str) -> VideoError:
    return VideoError(what, code=code, where=where, why=why, fix=fix)


class CheckpointError(DataError):
    """A checkpoint is missing, broken or belongs to another model."""

    kind = "checkpoint"


class EnvironmentFault(OgregError):
    """The machine lacks something: a GPU, disk space, a package."""

    exit_code = 4
    kind = "environment"


class LostPeer(EnvironmentFault):
    """Another process of the job has ended; it, or the launcher, says why."""


class OutOfMemory(OgregError):
    """The device ran out of memory."""

    exit_code = 5
    kind = "memory"


class Interrupted(OgregError):
    """A signal stopped the work after its state was saved.

    Args:
        signal_number: the signal that asked for the stop (2 gives exit code 130, others 143).
    """

    kind = "interrupted"

    def __init__(self, what: str, *, signal_number: int, fix: str = "") -> None:
        super().__init__(what, fix=fix)
        self.signal_number = signal_number
        self.exit_code = 130 if signal_number == 2 else 143
