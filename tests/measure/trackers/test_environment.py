"""The environment card of a record."""

import json

from lib.measure.trackers import environment


def test_the_card_is_plain_json_and_complete(tiny, monkeypatch):
    monkeypatch.setenv("WORKBENCH_JOBS", "2")
    card = environment.card(tiny("qwen3-coder-30b"), weights_hash="w", data_hash="d")
    assert json.loads(json.dumps(card)) == card
    for name in ("cpu", "cores_given", "memory_bytes", "operating_system", "python", "threads", "commit"):
        assert card[name], name
    assert 0 < card["memory_given_bytes"] <= card["memory_bytes"]
    assert (card["weights_hash"], card["data_hash"], card["jobs_beside"]) == ("w", "d", 1)
    assert card["parameters"] == sum(p.numel() for p in tiny("qwen3-coder-30b").parameters())
    assert set(card["energy"]) == {"counter", "missing"} and bool(
        card["energy"]["counter"] or card["energy"]["missing"]
    )
    assert card["dtype"] == "float32" and card["packages"]["torch"] and card["experts_backend"]
