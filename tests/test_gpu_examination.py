"""The parts of the GPU examination on the CPU: that each of their checks can fail."""

from __future__ import annotations

import importlib
import time
from functools import wraps
from itertools import product

import pytest
import torch

from benchmarks import (
    gpu_dispatch,
    gpu_dispatch_attention,
    gpu_grid,
    gpu_judge,
    gpu_kernels,
    gpu_limits,
    gpu_parity,
    gpu_parity_modes,
    gpu_speed,
    gpu_systems,
    gpu_tests,
    models,
)
from benchmarks.common import error_bar, fallbacks, relative_error
from fastencoder import kernels, to_fast
from fastencoder.kernels import _triton

CPU = torch.device("cpu")


# --- kernels ---


def test_judge_compares_with_torchs_own_error():
    exact = torch.randn(64, 64, dtype=torch.float64)
    for dtype, factor in ((torch.float16, 1.0), (torch.bfloat16, 1.0)):
        rounded = exact.to(dtype)
        assert gpu_judge.judge(rounded, exact, rounded)["passed"]
        worse = (exact + 3 * (rounded.double() - exact)).to(dtype)
        assert not gpu_judge.judge(worse, exact, rounded)["passed"], factor
    single = exact.float()
    tf32 = exact.to(torch.bfloat16).float() * 0.1 + single * 0.9
    assert gpu_judge.judge(single, exact, single)["passed"]
    assert not gpu_judge.judge(tf32, exact, single)["passed"]


def test_judge_refuses_what_is_no_number_and_other_shapes_and_dtypes():
    exact = torch.ones(3, 4, dtype=torch.float64)
    good = exact.float()
    hole = good.clone()
    hole[1, 1] = float("nan")
    assert "not finite" in gpu_judge.judge(hole, exact, good)["why"]
    assert not gpu_judge.judge(good[:2], exact, good)["passed"]
    assert not gpu_judge.judge(good.half(), exact, good)["passed"]
    assert gpu_judge.judge(torch.zeros(3, 4), torch.zeros(3, 4).double(), torch.zeros(3, 4))["passed"]
    assert not gpu_judge.judge(good * 1e-6, torch.zeros(3, 4).double(), torch.zeros(3, 4))["passed"]


def not_empty(beginning):
    """The rows in which there is something to compute."""
    rows = [row for row in gpu_kernels.rows(CPU, True, 0.0) if row.name.startswith(f"{beginning} ")]
    return [row for row in rows if " 0x" not in row.name and "lengths=0,0" not in row.name]


@pytest.mark.parametrize(
    ("operation", "mistake"),
    [
        ("linear", lambda out: out * 1.01),
        ("varlen_attention", lambda out: out * 1.01),
        ("add_norm", lambda out: (out[0], out[1] * 1.01)),
        ("pack", lambda out: out.roll(1, 0)),
        ("unpack", lambda out: out + 1e-3),
        ("linear_partial", lambda out: out[:1].repeat(2, 1, 1)),
        ("embed_norm", lambda out: out * 1.01),
        ("read_mask", lambda out: (~out[0], out[1])),
        ("token_positions", lambda out: out + 1),
    ],
)
def test_a_mistake_in_an_operation_fails_its_rows(monkeypatch, operation, mistake):
    right = gpu_judge.find(operation)
    row = not_empty(operation)[0]
    assert row.run()["passed"], row.name

    @wraps(right)
    def wrong(*arguments, **options):
        return mistake(right(*arguments, **options))

    monkeypatch.setattr(kernels, operation, wrong, raising=False)
    found = row.run()
    assert not found["passed"] and not found["api"]["passed"]


@pytest.mark.parametrize(
    ("operation", "option", "word"),
    [
        ("varlen_attention", "causal", "causal"),
        ("varlen_attention", "window", "window"),
        ("varlen_attention", "softcap", "softcap"),
        ("varlen_attention", "rope", "rope"),
        ("varlen_attention", "relative_bias", "relative"),
        ("varlen_attention", "bias", " bias"),
        ("linear", "gated", "gated"),
        ("add_norm", "x_bias", "x_bias"),
        ("add_norm", "rms", " rms"),
        ("embed_norm", "position_ids", "positions"),
        ("embed_norm", "type_ids", "types"),
    ],
)
def test_an_operation_that_ignores_an_argument_fails_every_row_with_it(monkeypatch, operation, option, word):
    right = gpu_judge.find(operation)
    tables = {"position_ids": "position_table", "type_ids": "type_table"}

    @wraps(right)
    def without(*arguments, **options):
        dropped = (option, tables.get(option))
        if option == "gated" and options.get("gated"):
            x, weight, bias, activation, residual = arguments
            half = weight.shape[0] // 2
            arguments = (x, weight[:half], None if bias is None else bias[:half], activation, residual)
        return right(*arguments, **{name: value for name, value in options.items() if name not in dropped})

    rows = [row for row in not_empty(f"{operation} fp32") if word in row.name]
    assert rows
    monkeypatch.setattr(kernels, operation, without, raising=False)
    for row in rows:
        assert not row.run()["passed"], row.name


def test_an_operation_that_is_missing_is_said_to_be(monkeypatch):
    monkeypatch.setattr(gpu_judge, "find", lambda operation: None)
    row = next(row for row in gpu_kernels.rows(CPU, True, 0.0) if row.name.startswith("embed_norm"))
    assert row.run() == {"passed": True, "not_available": "there is no embed_norm"}


def test_outputs_are_nan_until_they_are_written():
    with gpu_judge.poisoned((torch.ones(3),)):
        assert torch.empty(2, 2).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
        assert not torch.empty(2, dtype=torch.int32).is_floating_point()
    assert torch.empty is not None and torch.empty.__name__ == "empty"


def test_a_file_of_tests_is_one_row_with_its_counts_and_the_first_failure(tmp_path):
    path = tmp_path / "test_three.py"
    path.write_text("def test_a(): pass\ndef test_b(): assert 1 == 2, 'one is not two'\ndef test_c(): raise KeyError\n")
    found = gpu_tests.run_file(path, deadline=time.time() + 60)
    assert not found["passed"] and found["counts"] == {"tests": 3, "failures": 2, "errors": 0, "skipped": 0}
    assert found["why"].startswith("2 of 3 failed, first test_") and "Error" in found["why"]
    path.write_text("def test_a(): pass\n")
    assert gpu_tests.run_file(path, deadline=time.time() + 60)["passed"]


def test_the_kernel_tests_are_rows_on_a_device():
    names = [row.name for row in gpu_tests.rows(torch.device("cuda"), 0.0)]
    assert "pytest test_kernel_linear.py" in names and not any("ahead_of_time" in name for name in names)


def test_an_answer_that_changes_from_call_to_call_fails(monkeypatch):
    right, calls = kernels.linear, []

    def moving(*arguments, **options):
        calls.append(1)
        return right(*arguments, **options) * (1 + 1e-7 * len(calls))

    row = next(row for row in gpu_kernels.rows(CPU, True, 0.0) if row.name.startswith("linear fp32"))
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


def test_graphs_and_compiled_encoders_are_compared_like_anything_else(monkeypatch):
    bench = gpu_parity.Workbench(CPU, quick=True)
    assert gpu_parity_modes.graphs(bench, models.BERT_BASE, "bf16")["passed"]

    @wraps(to_fast)
    def wrong(model, **options):
        model.encoder.layer[0].output.dense.bias.data.zero_()
        return to_fast(model, **options)

    monkeypatch.setattr(gpu_parity_modes, "to_fast", wrong)
    found = gpu_parity_modes.graphs(bench, models.BERT_BASE, "bf16")
    assert not found["passed"] and "error" in found["why"]


def test_weights_that_a_model_does_not_notice_are_found(monkeypatch):
    bench = gpu_parity.Workbench(CPU, quick=True)
    monkeypatch.setattr(models.torch.nn.Module, "load_state_dict", _only_into_stock(torch.nn.Module.load_state_dict))
    assert "after a change of weights" in gpu_parity_modes.graphs(bench, models.BERT_BASE, "bf16")["why"]


def _only_into_stock(original):
    def load(self, *arguments, **options):
        fast = any(hasattr(module, "_fastencoder") for module in self.modules())
        return None if fast else original(self, *arguments, **options)

    return load


# --- speed ---


def bench():
    return gpu_speed.Bench(CPU, True, time.time() + 60)


def test_wrong_answers_are_not_timed(monkeypatch):
    def converted(model, **options):
        model.encoder.layer[0].output.dense.bias.data.mul_(-1)
        return to_fast(model, **options)

    monkeypatch.setattr(gpu_systems, "to_fast", converted)
    systems = (gpu_systems.STOCK, gpu_systems.FAST)
    found = gpu_speed.measure(bench(), gpu_grid.Cell(models.MINILM, "bf16", 1, 12, systems=systems))
    assert not found["passed"] and found["systems"][gpu_systems.FAST]["status"].startswith("wrong")
    assert "ms" not in found["systems"][gpu_systems.FAST] and "ms" in found["systems"][gpu_systems.STOCK]


def test_a_peer_that_fails_or_is_missing_fails_nothing(monkeypatch):
    def broken(self, bert):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(gpu_systems.Nested, "__init__", broken)
    systems = (gpu_systems.STOCK, gpu_systems.FLASH, gpu_systems.NESTED, gpu_systems.FAST)
    found = gpu_speed.measure(bench(), gpu_grid.Cell(models.MINILM, "bf16", 1, 12, systems=systems))
    assert found["passed"]
    assert found["systems"][gpu_systems.NESTED]["status"] == "not available: RuntimeError: no such thing"
    assert found["systems"][gpu_systems.FLASH]["status"].startswith("not available: ")


def test_the_nested_encoder_skips_padding_and_has_the_same_weights():
    systems = gpu_systems.Systems(models.BERT_BASE, "fp32", CPU, quick=True)
    inputs = models.text_batch([16, 9, 3], 1, CPU)
    fused = []
    with torch.inference_mode(), torch.profiler.profile() as profiler:
        out = systems.get(gpu_systems.NESTED)(inputs)
    fused = [event.key for event in profiler.key_averages() if "_transformer_encoder_layer_fwd" in event.key]
    assert fused == ["aten::_transformer_encoder_layer_fwd"]
    mask = inputs["attention_mask"].bool()
    with torch.inference_mode():
        stock = systems.get(gpu_systems.STOCK)(inputs)
    assert not out[~mask].any() and relative_error(out[mask], stock[mask]) < 1e-5


def test_the_times_of_a_cell_stand_beside_its_limits(monkeypatch):
    monkeypatch.setattr(gpu_speed.torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    one = bench()
    one.device_name = "NVIDIA H100 80GB HBM3"
    systems = (gpu_systems.STOCK, gpu_systems.FAST)
    found = gpu_speed.measure(one, gpu_grid.Cell(models.MINILM, "bf16", 4, 12, 0.5, systems=systems))
    fast, stock = (found["systems"][name] for name in (gpu_systems.FAST, gpu_systems.STOCK))
    assert fast["of_floor"] == pytest.approx(found["floor_ms"] / fast["ms"]["median"])
    assert fast["of_vendor_gemm"] == pytest.approx(fast["tflops"] / found["vendor_gemm_tflops"])
    assert "ours_is_faster" in stock and "ours_is_faster" not in fast


def test_operations_and_floors_are_the_published_ones():
    bert = models.BERT_BASE.build({"vocab_size": 9, "num_hidden_layers": 1}).config  # the layers are alike
    assert 12 * gpu_limits.operations(bert, [128]) == pytest.approx(128 * (169.87e6 + 36_864 * 128), rel=1e-4)
    assert gpu_limits.operations(bert, [100, 28]) < gpu_limits.operations(bert, [128])
    bert.num_hidden_layers = 12
    h100 = "NVIDIA H100 80GB HBM3"
    assert 1e6 * gpu_limits.floor_seconds(bert, [64], h100) == pytest.approx(50.7, rel=2e-3)
    assert 1e6 * gpu_limits.floor_seconds(bert, [64] * 128, h100) == pytest.approx(1427, rel=2e-3)
    assert gpu_limits.floor_seconds(bert, [64], "NVIDIA H200") < gpu_limits.floor_seconds(bert, [64], h100)
    assert gpu_limits.floor_seconds(bert, [64], "some other device") is None


def test_every_cell_of_the_grid_is_there_once_and_has_its_share_of_padding():
    cells = gpu_grid.grid(quick=False)
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        share = 1 - sum(cell.lengths) / (cell.batch * cell.seqlen)
        assert max(cell.lengths) <= cell.seqlen and abs(share - cell.padding) < 0.02
        assert cell.batch == 1 or max(cell.lengths) == cell.seqlen
    wanted = set(product((1, 8, 32, 128), (32, 128, 512), (0.0, 0.5)))
    for model in (models.BERT_BASE, models.BERT_LARGE):
        there = {(c.batch, c.seqlen, c.padding) for c in cells if c.model is model and c.dtype == "bf16"}
        assert wanted <= there
    names = [f"{cell.name} {cell.systems[-1]}" for cell in gpu_grid.compiled_grid(quick=False)]
    assert len(set(names)) == len(names)


# --- what the heuristics choose between ---


def test_a_candidate_with_a_wrong_answer_fails_its_contest():
    def contest(**makes):
        return gpu_dispatch.Contest("x", lambda: makes, 1.0, 1.0, lambda: "a")

    def made(value):
        return lambda seed: lambda: torch.full((4,), value)

    def broken(seed):
        raise RuntimeError("does not compile")

    found = gpu_dispatch.judge(contest(vendor=made(1.0), chosen=made(1.001), other=broken), CPU)
    assert found["passed"] and set(found["us"]) == {"vendor", "chosen"} and "does not compile" in found["not_measured"]["other"]
    assert found["best"] in ("vendor", "chosen") and found["lost"] >= 0
    found = gpu_dispatch.judge(contest(vendor=made(1.0), chosen=made(1.1)), CPU)
    assert not found["passed"] and "chosen" in found["why"]


def test_candidates_launch_what_their_names_say():
    """Written down instead of run, because there may be no GPU here."""
    with _triton.recording(_triton.DeviceLimits((9, 0), 132)) as launches:
        for name, make in gpu_dispatch.tile_candidates((512, 768, 3072), "identity", True, CPU).items():
            make(0)()
            tile = [launches[-1].constants[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
            assert name.startswith("x".join(map(str, tile))) and f"{launches[-1].num_warps} warps" in name
        tiles = len(launches)
        assert tiles >= 6

        def inputs(seed):
            q, k, v = torch.zeros(200, 3, 12, 64, dtype=torch.bfloat16).unbind(1)
            return q, k, v, torch.tensor([0, 100, 200], dtype=torch.int32), 100, 0.125

        for name, make in gpu_dispatch_attention.block_candidates([100, 100], inputs, CPU).items():
            make(0)()
            block = [launches[-1].constants[key] for key in ("BLOCK_Q", "BLOCK_K")]
            assert name.startswith("x".join(map(str, block)) + " ")
            assert name.endswith("looped") == ("looped" in launches[-1].kernel.__name__)
        assert len(launches) - tiles >= 6


def test_the_choice_of_the_heuristics_is_named_like_a_candidate(monkeypatch):
    limits = _triton.DeviceLimits((9, 0), 132)
    monkeypatch.setattr(gpu_dispatch, "limits_of", lambda device: limits)
    monkeypatch.setattr(gpu_dispatch_attention, "limits_of", lambda device: limits)
    cuda = torch.device("cuda")
    names = {gpu_dispatch._tile_name(tile) for tile in gpu_dispatch._tiles(8192, False, cuda)}
    assert gpu_dispatch._linear_choice((8192, 3072, 768), "gelu", False, cuda) in names
    assert gpu_dispatch._linear_choice((8192, 2304, 768), "identity", False, cuda) == gpu_dispatch.VENDOR
    assert gpu_dispatch_attention._block_choice(128, cuda).endswith("single")
