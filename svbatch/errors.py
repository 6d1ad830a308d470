"""The errors a user can meet, drawn as a tree:

    SvbatchError              exit 2: the command cannot go on; the message says what to change
    ├── JobError              the job file
    ├── CorpusError           where recordings are looked for
    ├── TaskError             a task file or its parameters
    ├── BundleError           a model on disk, or a weight that cannot be fetched
    ├── OutputError           the tables' folder
    ├── TrainingError         a recipe, a manifest or a training step
    ├── DeviceError           the provider asked for does not work here
    ├── DamageError           exit 4: `verify` found damage, a line for each problem
    ├── BusyError             exit 75: another run holds the output; try again later
    └── RecordingError        never ends a run: it becomes a row in `failures`

Anything else that escapes is a bug: it keeps its traceback and exits 1.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's end means; any other code is a failure."""

    ANSWERED = 0  # all that was asked for is answered
    BUG = 1
    USAGE = 2  # job, option or output: the message says what to change
    FAILURES = 3  # finished with failures, or given up because of too many
    DAMAGE = 4  # `verify` found something that is not as it was promised
    MORE = 75  # more to do, or the output is busy: try again
    INTERRUPTED = 130  # SIGINT; what was committed is kept
    TERMINATED = 143  # SIGTERM; what was committed is kept


class SvbatchError(Exception):
    """A user's problem with its remedy; `str()` of it is the one line that is printed."""

    exit_code = ExitCode.USAGE
    run_id: str | None = None  # of the run that it ended, if one had begun


class JobError(SvbatchError):
    pass


class CorpusError(SvbatchError):
    pass


class TaskError(SvbatchError):
    pass


class BundleError(SvbatchError):
    pass


class OutputError(SvbatchError):
    pass


class TrainingError(SvbatchError):
    pass


class DeviceError(SvbatchError):
    pass


class DamageError(SvbatchError):
    exit_code = ExitCode.DAMAGE


class BusyError(SvbatchError):
    exit_code = ExitCode.MORE


class RecordingError(SvbatchError):
    """One recording that could not be answered: `stage` and `code` are short words, fit for grouping."""

    def __init__(self, stage: str, code: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage
        self.code = code
