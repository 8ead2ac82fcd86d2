"""What is measured of a run beside its loss is measured in the rows that it was trained with."""

import numpy as np
import pytest

from study import measure

EOS = 1
DOCUMENTS = [[5, 6, 7], [8], [9, 2, 3, 4]]


def _stream():
    return [EOS] + [token for ids in DOCUMENTS for token in [*ids, EOS]]


def test_batches_have_each_target_once():
    tokens = _stream()
    made = list(measure.batches(tokens, batch=2, length=4))
    assert {name for batch in made for name in batch} == {"inputs", "targets", "weights"}
    rows = {name: np.concatenate([batch[name] for batch in made]) for name in made[0]}
    assert rows["weights"].sum() == len(tokens) - 1
    assert rows["targets"][rows["weights"] > 0].tolist() == tokens[1:]
    assert rows["inputs"][rows["weights"] > 0].tolist() == tokens[:-1]
    assert rows["inputs"].shape == (4, 4)


def test_documents_that_did_not_see_each_other_in_training_do_not_here():
    (batch,) = measure.batches(_stream(), batch=3, length=4, eos_id=EOS)
    assert batch["inputs"].tolist()[:2] == [[EOS, 5, 6, 7], [EOS, 8, EOS, 9]]
    assert batch["segment_ids"].tolist()[:2] == [[2, 2, 2, 2], [2, 2, 3, 3]]


@pytest.mark.parametrize("held_out", ["nowhere", ""])
def test_held_out_text_that_is_not_there_is_named(tmp_path, capsys, held_out):
    arguments = [f"--run={tmp_path}"] + [f"--held_out={tmp_path / held_out}"] * bool(held_out)
    assert measure.main([*arguments, "domains"]) == 2
    assert "no .jsonl files there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        measure.main([*arguments, "domain"])
