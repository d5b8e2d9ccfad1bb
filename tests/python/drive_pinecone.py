"""Drives a Pinecone endpoint with the vendor's own client, and compares what it reads with what another
client wrote. Prints its own reading of the other's records, and writes records for the other to read."""

import json
import math
import sys

import pinecone
from pinecone import Pinecone, ServerlessSpec

url, expected = sys.argv[1], json.loads(sys.argv[2])
pc = Pinecone(api_key="test", host=url)
print("client", pinecone.__version__)

# The control plane.
assert not pc.has_index("by-python")
pc.create_index(
    name="by-python", dimension=3, metric="cosine", spec=ServerlessSpec(cloud="aws", region="us-east-1"), timeout=-1
)
assert {"by-python", "by-refarch"} <= {index.name for index in pc.list_indexes()}
described = pc.describe_index("by-refarch")
print("describe_index", described.name, described.host, described.status.ready)
pc.delete_index("by-python", timeout=-1)
assert not pc.has_index("by-python")

# What the other client wrote, in the default namespace.
index = pc.Index(host=url)
ids = sorted(record.id if hasattr(record, "id") else record for page in index.list() for record in
             (page.vectors if hasattr(page, "vectors") else page))
print("list", ids)
assert ids == sorted(expected), (ids, sorted(expected))
fetched = index.fetch(ids=ids).vectors
for id, record in expected.items():
    values, metadata = list(fetched[id].values), dict(fetched[id].metadata)
    assert all(math.isclose(a, b, abs_tol=1e-7) for a, b in zip(values, record["values"], strict=True)), (id, values)
    assert metadata == record["metadata"], (id, metadata, record["metadata"])
    print("fetch", id, values, metadata)
best = index.query(vector=expected["a"]["values"], top_k=2, include_metadata=True, include_values=True)
print("query", [(match.id, round(match.score, 4)) for match in best.matches])
assert best.matches[0].id == "a" and best.matches[0].metadata["name"] == expected["a"]["metadata"]["name"]
cheap = index.query(vector=[1, 1, 1], top_k=9, filter={"price": {"$lt": 5}})
assert {match.id for match in cheap.matches} == {id for id, r in expected.items() if r["metadata"].get("price", 9) < 5}
stats = index.describe_index_stats()
print("describe_index_stats", stats.dimension, stats.total_vector_count)
assert stats.dimension == 3

# What the other client is to read.
index.upsert(vectors=[(f"p{n}", [1.0, n / 10, 0.5], {"n": n, "name": f"from python {n}"}) for n in range(250)],
             namespace="python")
index.update(id="p1", set_metadata={"name": "updated"}, namespace="python")
index.delete(ids=["p2"], namespace="python")
index.delete(filter={"n": {"$gte": 240}}, namespace="python")
print("upserted 250 records, updated 1, deleted 11")

# Limits, as the service tells them.
for wrong, arguments in {
    "dimension": {"vectors": [("x", [1.0, 2.0], {})]},
    "id": {"vectors": [("x" * 513, [1.0, 2.0, 3.0], {})]},
    "nested metadata": {"vectors": [("x", [1.0, 2.0, 3.0], {"a": {"b": 1}})]},
    "metadata size": {"vectors": [("x", [1.0, 2.0, 3.0], {"a": "x" * 41_000})]},
    "records": {"vectors": [(str(n), [1.0, 2.0, 3.0]) for n in range(1_001)]},
}.items():
    try:
        index.upsert(**arguments)
    except Exception as error:
        print(f"refused as expected ({wrong}): {type(error).__name__}")
    else:
        raise AssertionError(f"{wrong} was not refused")
print("all as expected")
