"""A process that writes its shard of an output: appends its recordings, then replaces them some times.

python shards.py OUTPUT SHARD TURNS BATCHES
"""

import sys

from batches import commit

from svbatch.tables.schemas import arrow_schema
from svbatch.tables.store import Store

output, shard, turns, batches = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store = Store(output)
with store.lock(shard=shard):
    store.prepare({"asr": arrow_schema("asr")})
    print("locked", flush=True)
    for turn in range(turns):
        for batch in range(batches):
            files = {f"/{shard}/{batch}/{number}": f"{shard} {batch} {number} {turn}" for number in range(3)}
            failed = [(uri, said, "asr", "cut") for uri, said in list(files.items())[:1]]
            commit(store, files, failed=failed)
    store.tidy()
