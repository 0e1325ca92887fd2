"""Jobs that processes share: claimed by one, left whole, merged exactly once."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from sitdist.errors import ConfigError, DataError
from sitdist.evaluate.work import Job, claim, do_jobs, merge, prepare, result_path, write_result


class Numbers:
    """Six jobs of two records each; `done` tells in which order they were done here."""

    def __init__(self, out):
        self.out, self.done, self.plan = out, [], {"seed": 1}

    def jobs(self):
        return [Job(f"job_{i}", (f"v{i}a", f"v{i}b"), 2 + i) for i in range(6)]

    def measure(self, job):
        self.done.append(job.name)
        return [{"key": key, "value": float(job.views)} for key in reversed(job.keys)], {"picture": np.ones(3)}


class Alone:
    is_main_process = False


class Main:
    is_main_process = True


def finish(*producers):
    pending = [prepare(producer) for producer in producers]
    do_jobs(list(producers), pending, Alone())
    return pending


def test_every_job_is_done_once_and_merged_in_order_of_the_keys(tmp_path):
    numbers = Numbers(tmp_path)
    assert finish(numbers) == [[job.name for job in numbers.jobs()]]
    records, arrays = merge(numbers)
    assert [record["key"] for record in records] == [f"v{i}{letter}" for i in range(6) for letter in "ab"]
    assert sorted(arrays) == [f"job_{i}" for i in range(6)]
    assert finish(numbers) == [[]]
    assert len(numbers.done) == 6


def test_the_dearest_jobs_come_first_once_a_cost_is_known(tmp_path):
    numbers = Numbers(tmp_path)
    finish(numbers)
    assert numbers.done == ["job_0", "job_5", "job_4", "job_3", "job_2", "job_1"]


def test_the_dearest_jobs_are_told_by_their_effort_too(tmp_path):
    numbers = Numbers(tmp_path)
    efforts = (1.0, 8.0, 1.0, 1.0, 1.0, 1.0)  # job_1 looks at 3 views, job_5 at 7
    jobs = [replace(job, effort=effort) for job, effort in zip(numbers.jobs(), efforts, strict=True)]
    numbers.jobs = lambda: jobs
    finish(numbers)
    assert numbers.done == ["job_0", "job_1", "job_5", "job_4", "job_3", "job_2"]


def test_the_main_process_shows_views_a_second_and_the_time_left(tmp_path, capsys):
    numbers = Numbers(tmp_path)
    do_jobs([numbers], [prepare(numbers)], Main())
    assert re.search(r"27/27 \[00:0\d<00:00, .*view/s\]", capsys.readouterr().err)


def test_a_job_that_another_process_has_taken_is_left_to_it(tmp_path):
    numbers = Numbers(tmp_path)
    pending = prepare(numbers)
    assert claim(tmp_path, numbers.jobs()[3])
    assert not claim(tmp_path, numbers.jobs()[3])
    do_jobs([numbers], [pending], Alone())
    assert "job_3" not in numbers.done
    with pytest.raises(DataError, match=r"2 views missing from .* \(v3a, v3b\); start the evaluation again"):
        merge(numbers)
    assert finish(numbers) == [["job_3"]]  # a claim whose process is gone holds nobody up
    assert len(merge(numbers)[0]) == 12


def test_what_was_not_asked_for_or_is_there_twice_is_named(tmp_path):
    numbers = Numbers(tmp_path)
    finish(numbers)
    extra = tmp_path / "units" / "job_9.jsonl"
    for key in ("v1a", "stranger"):
        extra.write_text(json.dumps({"key": key}) + "\n")
        with pytest.raises(DataError, match=rf"1 views there more often .*\({key}\); delete the folder"):
            merge(numbers)


def test_a_write_that_was_cut_off_does_not_count(tmp_path):
    numbers = Numbers(tmp_path)
    prepare(numbers)
    (tmp_path / "units" / ".job_0.jsonl.123.tmp").write_text('{"key": "v0')
    finish(numbers)
    assert len(merge(numbers)[0]) == 12


@pytest.mark.parametrize("value", [float("nan"), [1.0, float("inf")]])
def test_a_value_that_is_not_finite_stops_with_the_view_and_its_name(tmp_path, value):
    job = Job("job", ("v",), 1)
    with pytest.raises(DataError, match="view v: psnr is not finite"):
        write_result(tmp_path, job, [{"key": "v", "psnr": value}], {})
    assert not result_path(tmp_path, job).is_file()


def test_work_of_another_plan_is_refused_with_both_values(tmp_path):
    prepare(Numbers(tmp_path))
    other = Numbers(tmp_path)
    other.plan = {"seed": 2}
    with pytest.raises(ConfigError, match="evaluation with seed 1, not 2; give another --out"):
        prepare(other)
