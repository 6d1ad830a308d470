"""What a run read and wrote, told to an OpenLineage server, if OPENLINEAGE_URL or another of its settings names one."""

import logging
import os
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING
from uuid import NAMESPACE_URL, uuid5

from svbatch.errors import ExitCode, JobError
from svbatch.job import Job
from svbatch.run import Outcome

if TYPE_CHECKING:
    from openlineage.client.event_v2 import RunEvent, RunState

PRODUCER = f"urn:svbatch:{version('svbatch')}"
SETTINGS = ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG")
OWN_TABLES = ("recordings", "failures", "runs")
log = logging.getLogger(__name__)


def with_lineage(job: Job, run_id: str, answer: Callable[[], Outcome]) -> Outcome:
    """What `answer` returns; its start and its end are told if the environment asks for it. A server that does not
    take an event is a warning and never the end of a run. Raises JobError if the client is not installed."""
    if not any(os.environ.get(name) for name in SETTINGS):
        return answer()
    try:
        from openlineage.client import OpenLineageClient
        from openlineage.client.event_v2 import RunState
    except ImportError as error:
        raise JobError("OPENLINEAGE_URL is set, and its client is missing: pip install 'svbatch[lineage]'") from error
    client = OpenLineageClient()

    def tell(state: RunState, message: str = "") -> None:
        try:
            client.emit(_event(job, run_id, state, message))
        except Exception as error:  # whatever the transport raises
            log.warning("OpenLineage: an event was not taken (%s); the run goes on", error)

    tell(RunState.START)
    try:
        outcome = answer()
    except BaseException as error:
        tell(RunState.FAIL if isinstance(error, Exception) else RunState.ABORT, str(error))
        raise
    ended = {ExitCode.ANSWERED: RunState.COMPLETE, ExitCode.FAILURES: RunState.COMPLETE}
    state = ended.get(outcome.exit_code, RunState.ABORT)
    if outcome.ended is not None and outcome.exit_code is ExitCode.FAILURES:
        state = RunState.FAIL
    tell(state, outcome.ended[1] if outcome.ended else "")
    return outcome


def _event(job: Job, run_id: str, state: "RunState", message: str) -> "RunEvent":
    from openlineage.client import event_v2
    from openlineage.client.facet_v2 import RunFacet, error_message_run

    facets: dict[str, RunFacet] = {}
    if message:
        facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(message, "python", producer=PRODUCER)
    return event_v2.RunEvent(
        eventType=state,
        eventTime=datetime.now(UTC).isoformat(),
        run=event_v2.Run(str(uuid5(NAMESPACE_URL, run_id)), facets),
        job=event_v2.Job("svbatch", str(job.path)),
        inputs=[event_v2.InputDataset("file", name) for name in _addresses(job)],
        outputs=[event_v2.OutputDataset("file", f"{job.output}/{table}") for table in _tables(job)],
        producer=PRODUCER,
    )


def _addresses(job: Job) -> Iterable[str]:
    """The entries of the corpus, those on a disk as absolute paths."""
    return [entry if "://" in entry else os.path.abspath(job.corpus_base / entry) for entry in job.corpus]


def _tables(job: Job) -> list[str]:
    return [*(task.name for task in job.tasks), *OWN_TABLES]
