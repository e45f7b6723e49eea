"""What the benchmarks share: rows that survive, timing."""

from __future__ import annotations

import time

import pytest

from benchmarks import clocks
from benchmarks.gpu_report import failures
from benchmarks.store import Row, Store, run_rows, share_out

SAME = {"device": "x", "source_digest": "0"}


def never() -> bool:
    return False


# --- rows that survive ---


def begin(folder, **changed):
    return Store.begin(folder / "gpu.jsonl", SAME | changed, quick=True)


def test_rows_that_passed_are_kept_and_failed_ones_come_last(tmp_path):
    ran = []

    def row(name, passed=True):
        def run():
            ran.append(name)
            if not passed:
                raise RuntimeError("broken")
            return {"passed": True}

        return Row(name, run)

    store = begin(tmp_path)
    store.append({"part": "part", "expected": ["a", "b", "c"]})
    assert run_rows(store, "part", [row("a"), row("b", passed=False), row("c")], never)
    assert ran == ["a", "b", "c"]
    saved = Store(store.path).part("part")
    assert saved["finished"] and saved["rows"]["b"]["why"] == "RuntimeError: broken"
    ran.clear()
    again = begin(tmp_path)
    again.append({"part": "part", "expected": ["b", "d", "a", "c"]})
    assert not again.part("part")["finished"]
    run_rows(again, "part", [row("b"), row("d"), row("a"), row("c")], never)
    assert ran == ["d", "b"] and Store(store.path).part("part")["finished"]
    ran.clear()
    run_rows(begin(tmp_path, source_digest="other code"), "part", [row("a")], never)
    assert ran == ["a"]


def test_a_row_that_is_gone_is_forgotten_and_so_is_a_part_that_is_to_be_new(tmp_path):
    store = begin(tmp_path)
    run_rows(store, "part", [Row("a", lambda: {"passed": True}), Row("b", lambda: {"passed": True})], never)
    store.append({"part": "part", "expected": ["b"]})
    assert list(store.part("part")["rows"]) == ["b"]
    store.append({"part": "part", "forget": True})
    assert Store(store.path).data["parts"] == {}


def test_a_row_that_ended_the_process_has_failed_and_is_not_tried_for_ever(tmp_path):
    tries = []

    def stop():
        tries.append(1)
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_rows(begin(tmp_path), "part", [Row("a", stop)], never)
        assert "a: it did not end" in failures(begin(tmp_path).data)[0]
    assert run_rows(begin(tmp_path), "part", [Row("a", stop)], never)
    found = begin(tmp_path).part("part")["rows"]["a"]
    assert len(tries) == 2 and found["why"] == "the process died in this row"


def test_a_line_that_was_cut_short_costs_no_other(tmp_path):
    store = begin(tmp_path)
    run_rows(store, "part", [Row("a", lambda: {"passed": True})], never)
    with open(store.path, "a", encoding="utf-8") as file:
        file.write('{"part": "part", "row": "b", "resu')
    again = begin(tmp_path)
    assert list(again.part("part")["rows"]) == ["a"]
    run_rows(again, "part", [Row("c", lambda: {"passed": True})], never)
    assert list(Store(store.path).part("part")["rows"]) == ["a", "c"]


def test_two_processes_write_one_journal(tmp_path):
    one, other = begin(tmp_path), begin(tmp_path)
    run_rows(one, "part", [Row("a", lambda: {"passed": True})], never)
    run_rows(other, "part", [Row("b", lambda: {"passed": True})], never)
    one.refresh()
    assert list(one.part("part")["rows"]) == ["a", "b"]


def test_rows_left_at_the_end_of_the_time_are_not_finished(tmp_path):
    store = begin(tmp_path)
    store.append({"part": "part", "expected": ["a"]})
    assert run_rows(store, "part", [Row("a", lambda: {"passed": True})], over=lambda: True)
    assert failures(store.data) == ["part: 1 rows are left; run it again to go on"]


def test_a_device_that_is_lost_ends_the_process_and_not_the_part(tmp_path):
    def broken():
        raise RuntimeError("illegal memory access")

    rows = [Row("a", broken), Row("b", lambda: {"passed": True})]
    assert not run_rows(begin(tmp_path), "part", rows, never, alive=lambda: False)
    assert list(begin(tmp_path).part("part")["rows"]) == ["a"]


def test_groups_stay_together_and_every_row_has_one_process():
    rows = [Row(f"{group}{i}", dict, group) for group in "xyz" for i in range(3)] + [Row("alone", dict), Row("other", dict)]
    shares = [share_out(rows, index, 2) for index in range(2)]
    assert sorted(row.name for share in shares for row in share) == sorted(row.name for row in rows)
    assert {row.group for row in shares[0] if row.group} == {"x", "z"} and {r.group for r in shares[1] if r.group} == {"y"}


# --- timing ---


def test_rounds_are_interleaved_and_begin_with_another_call_each_time():
    order = []
    calls = {name: lambda turn, name=name: order.append((turn, name)) for name in "ab"}
    times = clocks.interleaved(calls, 3, clocks.HostClock())
    assert order == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]
    assert [len(sample) for sample in times.values()] == [3, 3]


def test_ratios_are_taken_round_by_round():
    spread = clocks.ratios([1.0, 2.0, 4.0], reference=[2.0, 6.0, 4.0])
    assert (spread.median, spread.low, spread.high, spread.count) == (2.0, 1.5, 2.5, 3)


def test_a_step_that_takes_too_long_is_stopped():
    with pytest.raises(clocks.OutOfTime), clocks.time_limit(0.05):
        while True:
            time.sleep(0.01)
