"""Large corpora: what planning takes when nearly nothing is new, and what a scan takes."""

import json
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

GENERATE = """
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
import numpy as np
import pyarrow as pa
from deltalake import WriterProperties, write_deltalake
from svbatch.tables.schemas import arrow_schema

output, num_recordings, num_tasks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
schema = arrow_schema("recordings")
answered = [f"a_task_with_a_name_{task}@{task:016x}" for task in range(num_tasks)]
when = datetime(2026, 1, 1, tzinfo=UTC)
size = 50_000
for start in range(0, num_recordings, size):
    numbers = range(start, start + size)
    columns = {
        "uri": [f"/srv/recordings/2026/{n // 1000:05}/call-{n:08}.wav" for n in numbers],
        "recording_id": [f"{n:064x}" for n in numbers],
        "size_bytes": [1000 + n for n in numbers],
        "modified_at": [when + timedelta(seconds=n) for n in numbers],
        "etag": [None] * size, "span_start": [None] * size, "span_end": [None] * size, "reference": [None] * size,
        "metadata": [[]] * size, "duration": [30.0] * size, "sample_rate": [16000] * size, "channels": [1] * size,
        "num_segments": [5] * size, "status": ["annotated"] * size, "answered": [answered] * size,
        "run_id": ["run"] * size, "annotated_at": [when] * size,
    }
    table = pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
    write_deltalake(output / "recordings", table, mode="append", writer_properties=WriterProperties(compression="ZSTD"))
"""
PLAN = """
import json, re, sys, time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from svbatch.corpus.recording import Recording
from svbatch.plan import Selection, iter_batches
from svbatch.recorded import COLUMNS, read_recorded
from svbatch.tables.store import Store
from svbatch.tasks.task import load_task

output, num_recordings, num_tasks, num_new = Path(sys.argv[1]), *map(int, sys.argv[2:])
asr = load_task("asr", Path())
tasks = [asr.model_copy(update={"name": f"a_task_with_a_name_{task}"}) for task in range(num_tasks)]
versions = {task.name: f"{number:016x}" for number, task in enumerate(tasks)}
when = datetime(2026, 1, 1, tzinfo=UTC)

def listed():
    for n in range(num_recordings + num_new):
        uri = f"/srv/recordings/2026/{n // 1000:05}/call-{n:08}.wav"
        yield Recording(uri, Path(uri), 1000 + n, when + timedelta(seconds=n))

started = time.monotonic()
for _ in listed():
    pass
listing = time.monotonic() - started
store, counts = Store(output, make=False), Counter()
started = time.monotonic()
recorded = read_recorded(store.iter_rows("recordings", COLUMNS))
read = time.monotonic() - started
asked = sum(len(batch.recordings) * len(batch.tasks)
            for batch in iter_batches(listed(), tasks, versions, recorded, counts, Selection()))
known = len(recorded.ids_answered([f"{name}@{version}" for name, version in versions.items()], ()))
print(json.dumps({
    "seconds": time.monotonic() - started - listing, "reading": read, "listing": listing, "asked": asked,
    "unchanged": counts["unchanged"], "known": known,
    "rss_bytes": int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024,
    "torch": "torch" in sys.modules,
}))
"""
SCAN = """
import json, re, resource, sys
from pathlib import Path
from svbatch.cli import entry

try:
    entry()
except SystemExit as left:
    print(json.dumps({
        "code": left.code,
        "rss_bytes": int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024,
        "worker_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }))
"""


def script(code: str, *arguments: object) -> str:
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("num_recordings", "max_seconds"),
    [(50_000, 15), pytest.param(1_000_000, 120, marks=pytest.mark.slow)],
)
def test_planning_reads_only_recordings_in_little_memory(tmp_path, num_recordings, max_seconds):
    """13 tasks, all answered, 100 recordings new. There is no task table, so none can be read."""
    script(GENERATE, tmp_path, num_recordings, 13)
    plan = json.loads(script(PLAN, tmp_path, num_recordings, 13, 100))
    print(plan)
    assert (plan["asked"], plan["unchanged"], plan["known"]) == (1300, num_recordings, num_recordings)
    assert plan["seconds"] < max_seconds
    assert plan["rss_bytes"] < 2 * 2**30
    assert not plan["torch"]


@pytest.mark.parametrize("num_recordings", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_second_run_over_an_unchanged_corpus_is_quick_silent_and_loads_no_model(
    tmp_path, tiny_bundle, bursts, num_recordings
):
    """Files of the same bytes, so that the first run is quick too."""
    (tmp_path / "recordings").mkdir()
    for number in range(num_recordings):
        soundfile.write(tmp_path / "recordings" / f"{number:05}.wav", bursts(0.2), 16_000)
    text = f"corpus: recordings/\ntasks: [asr]\noutput: out\nbundle: {tiny_bundle.folder}\nprecision: float32\n"
    (tmp_path / "job.yaml").write_text(text)
    line = ["run", str(tmp_path / "job.yaml"), "--quiet", "--cache", str(tiny_bundle.cache)]
    first = subprocess.run([sys.executable, "-m", "svbatch", *line], check=False, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    started = time.monotonic()
    second = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "svbatch", *line], check=False, capture_output=True, text=True
    )
    seconds = time.monotonic() - started
    print(f"{num_recordings} unchanged recordings: {seconds:.2f} s")
    imported = {entry.split("|")[-1].strip() for entry in second.stderr.splitlines()}
    assert (second.returncode, second.stdout) == (0, "")
    assert all(entry.startswith("import time:") for entry in second.stderr.splitlines())
    assert "deltalake" in imported
    assert not imported & {"torch", "onnxruntime", "transformers"}
    assert seconds < 5


@pytest.mark.slow
def test_a_scan_of_ten_times_as_many_recordings_takes_hardly_more_memory(tmp_path):
    """Files of 0.1 s, each of its own bytes. What grows is the names and a digest of each."""
    (tmp_path / "recordings").mkdir()
    peaks = []
    for start, end in ((0, 10_000), (10_000, 100_000)):
        for number in range(start, end):
            sound = np.full(1600, number % 1000, np.int16)
            sound[0] = number // 1000
            soundfile.write(tmp_path / "recordings" / f"call-{number:06}.wav", sound, 16_000)
        started = time.monotonic()
        said = json.loads(
            script(SCAN, "scan", tmp_path / "recordings", "--output", tmp_path / "out.parquet", "--quiet")
        )
        assert said["code"] == 0
        assert pq.read_metadata(tmp_path / "out.parquet").num_rows == end
        peaks.append(said["rss_bytes"] + said["worker_bytes"])
        print(f"{end} recordings scanned in {time.monotonic() - started:.0f} s, at most: {said}")
    assert peaks[1] < 1.3 * peaks[0]
