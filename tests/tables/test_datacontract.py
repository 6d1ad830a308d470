"""The quickstart's output under its contracts, by a tool that is not ours. Slow: `pytest -m slow`.

It has an environment of its own: pip install 'datacontract-cli[duckdb]', and SVBATCH_DATACONTRACT names its program.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
DATACONTRACT = os.environ.get("SVBATCH_DATACONTRACT") or shutil.which("datacontract")
TABLES = ["asr", "keyword_search", "speech_activity", "recordings", "failures", "runs"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DATACONTRACT is None, reason="SVBATCH_DATACONTRACT names no datacontract program"),
]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A folder whose `out` is the quickstart's output, as the contracts say."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "svbatch", "run", str(ROOT / "jobs" / "quickstart.yaml"), "--output"]
    subprocess.run([*command, str(folder / "out")], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("table", TABLES)
def test_the_quickstarts_table_keeps_its_contract(quickstart, table):
    command = [DATACONTRACT, "test", str(ROOT / "schemas" / f"{table}.odcs.yaml")]
    tested = subprocess.run(command, cwd=quickstart, capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stdout


def test_a_table_that_breaks_its_contract_is_found(quickstart, tmp_path):
    """A test that could not fail would show nothing. Not by a key twice: datacontract compares no row whose channel is
    null."""
    shutil.copytree(quickstart / "out", tmp_path / "out")
    rows = pq.read_table(quickstart / "out" / "asr")
    other = pa.array(["tired"] * len(rows), pa.string())
    rows = rows.set_column(rows.schema.get_field_index("finish_reason"), "finish_reason", other)
    pq.write_table(rows, tmp_path / "out" / "asr" / "other.parquet")
    command = [DATACONTRACT, "test", str(ROOT / "schemas" / "asr.odcs.yaml")]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 1
