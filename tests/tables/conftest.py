import pytest

from svbatch.tables.schemas import arrow_schema
from svbatch.tables.store import Store


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "out")
    with store.lock():
        store.prepare({"asr": arrow_schema("asr")})
        yield store
