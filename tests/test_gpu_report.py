"""The report of the GPU examination: bars from results that are made up, and a page that is not out of date."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu_report, gpu_report_bars, gpu_report_docs, gpu_report_plots
from benchmarks.files import RESULTS

ENVIRONMENT = {
    "device": "NVIDIA H100 80GB HBM3",
    "date": "2026-01-01",
    "git_commit": None,
    "source_digest": "0",
    "torch": "2.11.0",
}


def timed(ms, lead=None):
    spread = {"median": ms, "low": ms, "high": ms, "count": 9}
    found = {"status": "timed", "ms": spread, "tokens_per_s": 16384 / ms * 1000, "tflops": 1.0, "error": 1e-3}
    found |= {"of_vendor_gemm": 0.5, "of_floor": 0.25, "ratio_to_stock": {**spread, "median": 2.0}}
    return found | ({"ours_is_faster": {**spread, "median": lead}} if lead else {})


def cell(model, batch, seqlen, padding, fast_ms, graphs_ms=None, lead=2.0):
    name = f"{model} bf16 {batch}x{seqlen} padding={padding:.0%}"
    systems = {"stock sdpa": timed(fast_ms * lead, lead), "fastencoder": timed(fast_ms)}
    if graphs_ms:
        systems["fastencoder, CUDA graphs"] = timed(graphs_ms)
    tokens = round(batch * seqlen * (1 - padding))
    found = {"passed": True, "model": model, "dtype": "bf16", "tokens": tokens, "systems": systems, "seconds": 1.0}
    return name, found


def part(*rows, finished=True):
    made = dict(rows)
    return {"finished": finished, "seconds": 1.0, "expected": list(made), "rows": made}


@pytest.fixture
def data():
    speed = part(
        cell("bert-base", 128, 128, 0.0, 5.0),
        cell("bert-base", 128, 128, 0.5, 2.5, lead=0.9),
        cell("bert-base", 32, 512, 0.0, 6.0, 5.5),
        cell("bert-base", 1, 128, 0.0, 1.0, 0.3),
        cell("bert-large", 128, 128, 0.0, 30.0),
    )
    launches = part(
        ("bert-base", {"passed": True, "launches_a_layer": 5.0, "syncs_a_forward": 1, "launches_a_forward": 24,
                       "layers": 4, "host_calls": 24, "above_the_bar": ""}),
        ("ViT-B/16", {"passed": True, "launches_a_layer": 8.0, "syncs_a_forward": 0, "launches_a_forward": 36,
                      "layers": 4, "host_calls": 36, "above_the_bar": "8 kernels a layer, 7 are allowed"}),
    )  # fmt: skip
    return {"environment": ENVIRONMENT, "quick": False, "parts": {"speed": speed, "launches": launches}}


def test_bars_are_judged_by_the_worst_cell_that_they_cover(data):
    found = {line[0]: line[3:] for line in gpu_report_bars.lines(data["parts"])}
    base, verdict = found["BERT-base, 8,192 or more real tokens"]
    assert base.startswith("2.98 M tokens/s (the slowest of 3 cells") and "fastest has 3.28" in base
    assert verdict == "must is met"
    assert found["BERT-large, 8,192 or more real tokens"][1] == "MISSED"
    assert found["BERT-base, 1 x 128 tokens, CUDA graphs"][0].startswith("0.300 ms")
    assert found["Half padding against none, same batch"] == ["2.00 x (the least of 1 cells, bert-base bf16 128x128 "
                                                              "padding=50%)", "met"]  # fmt: skip
    lead, verdict = found["Least lead over any peer on any cell"]
    assert lead.startswith("0.90 x") and "against stock sdpa" in lead and verdict == "MISSED"
    assert found["Launches a layer"] == ["8.0 (ViT-B/16)", "MISSED"]
    assert found["Host synchronisations a forward"][1] == "met"


def test_bars_without_results_are_not_measured():
    assert {tuple(line[3:]) for line in gpu_report_bars.lines({})} == {("not measured", "")}


def test_slowness_is_no_failure_and_a_wrong_answer_is_one(data):
    assert gpu_report.failures(data) == []
    data["parts"]["speed"]["rows"]["bad"] = {"passed": False, "why": "fastencoder: wrong"}
    data["parts"]["compile"] = part(finished=False)
    data["parts"]["parity"] = part(finished=False)
    data["parts"]["parity"]["expected"] = ["a", "b"]
    assert gpu_report.failures(data) == [
        "speed bad: fastencoder: wrong",
        "parity: 2 rows are left; run it again to go on",
    ]


def test_what_is_missing_is_said_with_its_reason(data):
    data["parts"]["speed"]["rows"]["x"] = {"passed": True, "systems": {"flash attention 2": {"status": "not available: no"}}}
    data["parts"]["kernels"] = part(("embed_norm bf16", {"passed": True, "not_available": "there is no embed_norm"}))
    data["parts"]["compile"] = {**part(finished=False), "expected": ["one cell"]}
    assert list(gpu_report.left_out(data)) == [
        "speed: flash attention 2: not available: no (1 row)",
        "kernels: there is no embed_norm (1 row)",
        "compile: there was no time for one cell",
    ]
    assert "there is no embed_norm" in gpu_report.markdown(data)


def test_a_compiled_mode_is_shown_on_the_cell_that_it_was_timed_on(data):
    name, found = cell("bert-base", 128, 128, 0.0, 4.0)
    found["systems"]["torch.compile dynamic"] = timed(7.0, 1.4)
    data["parts"]["compile"] = part((f"{name} torch.compile dynamic", found))
    cells = gpu_report_plots.timed_cells(data["parts"])
    assert cells[name]["torch.compile dynamic"]["ms"]["median"] == 7.0
    assert cells[name]["fastencoder"]["ms"]["median"] == 5.0  # that of the grid


def test_the_page_is_made_of_the_results_as_they_are():
    page = gpu_report_docs.PAGE.read_text(encoding="utf-8")
    fresh = gpu_report_docs.regenerate(page, gpu_report_docs.sections(RESULTS))
    assert page == fresh, "run python benchmarks/gpu_report_docs.py"
    assert set(gpu_report_docs.sections(RESULTS)) == {found["name"] for found in gpu_report_docs._SECTION.finditer(page)}


def test_the_page_changes_with_the_results(tmp_path, data):
    before = gpu_report_docs.sections(tmp_path)
    assert before["where"] == before["grid"] == "Not measured yet." and "not measured" in before["bars"]
    (tmp_path / "gpu.json").write_text(json.dumps(data))
    after = gpu_report_docs.sections(tmp_path)
    assert "NVIDIA H100" in after["where"] and "2.98 M tokens/s" in after["bars"] and "(50%, 25%)" in after["grid"]
    page = gpu_report_docs.PAGE.read_text(encoding="utf-8")
    assert gpu_report_docs.regenerate(page, after) != gpu_report_docs.regenerate(page, before)
    (tmp_path / "gpu.json").write_text(json.dumps({**data, "quick": True}))
    assert gpu_report_docs.sections(tmp_path) == before  # a dry run measures nothing
