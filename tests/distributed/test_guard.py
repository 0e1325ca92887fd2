"""A step that is not finite on one process is left out on all."""

import pytest

pytestmark = pytest.mark.distributed


def test_a_loss_that_is_not_finite_on_one_process_changes_nothing_on_any(train, tensor_bytes, tmp_path):
    from tasks import train_leaving_out, train_with_nan_on

    started = train(2, tmp_path / "poisoned", task=train_with_nan_on, task_arguments=[1])
    started.run()
    key = (tmp_path / "log" / "rank_1.out").read_text().split()[0]
    assert f"sitdist: step 2 left out: the loss is not finite for samples {key}\n" in started.errors(0)
    assert "left out" not in started.errors(1)
    train(2, tmp_path / "left_out", task=train_leaving_out, task_arguments=[2]).run()
    assert tensor_bytes(tmp_path / "poisoned", 6) == tensor_bytes(tmp_path / "left_out", 6)
    train(2, tmp_path / "plain").run()
    assert tensor_bytes(tmp_path / "poisoned", 6) != tensor_bytes(tmp_path / "plain", 6)
