"""What a checkpoint says of the loop."""

from __future__ import annotations

import json

from finetune_api.report import StepRecord
from finetune_trainer.checkpoint import TrainingState


def test_a_state_that_a_later_version_wrote_is_read_as_far_as_it_is_known() -> None:
    record = StepRecord(step=1, loss=2.0, learning_rate=1e-3, tokens=10, supervised_tokens=5, seconds=0.5)
    state = TrainingState(step=1, tokens_seen=10, steps=[record], made_from={"a.jsonl": "1"})
    later = json.loads(json.dumps({**state.to_json(), "future": {"a": 1}}))
    later["steps"][0]["future"] = 1
    assert TrainingState.from_json(later) == state
