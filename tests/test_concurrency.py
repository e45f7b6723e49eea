"""Threads and processes: what they compute on one converted model is bit for bit what one thread computes alone.

Changes to a model (`to_fast`, `reverse`) are refused while a forward of it runs, with everything as it was.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fastencoder import AlreadyFastError, BusyError, NotFastError, fast, is_fast, reverse, to_fast
from fastencoder.layers.fast_layer import FastLayer
from fastencoder.layers.stack import _local as windows
from fastencoder.layers.traffic import Traffic
from fastencoder.layers.weights import Projections

from . import tiny
from .attention_cases import CASES
from .test_conversion import snapshot

THREADS = 16
WAIT = 60  # seconds until a test that hangs is one that fails


def together(work: Callable[[int], object], count: int = THREADS) -> list:
    """What `work(0)`, `work(1)`, ... return, each in a thread of its own, all begun at the same time."""
    start = threading.Barrier(count)

    def one(index: int) -> object:
        start.wait(WAIT)
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return [future.result(WAIT) for future in [pool.submit(one, index) for index in range(count)]]


def request(index: int) -> dict:
    """Batches of other shapes, masks and flags in each thread: fast ones, those of few tokens, and delegated ones."""
    inputs = tiny.ragged(batch=4 + index % 5, seqlen=12 + 3 * (index % 7), seed=index)
    if index % 4 == 1:
        del inputs["attention_mask"]
    if index % 4 == 2:
        inputs = {name: value[:1, :9] for name, value in inputs.items()}
    flags = [{}, {"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False}][index // 4 % 4]
    return {**inputs, **flags}


def tensors(output: object) -> list[torch.Tensor]:
    """Every tensor of an output, in its order."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if hasattr(output, "values") else output if isinstance(output, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def run(model: nn.Module, index: int) -> list[torch.Tensor]:
    with torch.inference_mode():  # every thread has its own
        return tensors(model(**request(index)))


def assert_same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected) > 0
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


SETTINGS = ({}, {"memory": "lean"}, {"compute_dtype": torch.bfloat16}, {"cuda_graphs": True})


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings), "default"))
def test_sixteen_threads_get_what_one_gets(settings: dict) -> None:
    """From the first call on, in which weights are prepared."""
    serial = to_fast(tiny.bert(attn_implementation="eager"), **settings)
    expected = [run(serial, index) for index in range(THREADS)]
    model = to_fast(tiny.bert(attn_implementation="eager"), **settings)
    for _ in range(3):
        for got, wanted in zip(together(lambda index: run(model, index)), expected, strict=True):
            assert_same(got, wanted)
    assert tiny.calls(model) == tuple(3 * count for count in tiny.calls(serial))


def test_weights_are_prepared_by_one_thread(monkeypatch) -> None:
    model, made = to_fast(tiny.bert()), []
    original = Projections.__init__

    def count(self: Projections, *given: object) -> None:
        made.append(threading.get_ident())
        time.sleep(0.02)  # another thread would come in here
        original(self, *given)

    monkeypatch.setattr(Projections, "__init__", count)
    together(lambda index: run(model, index))
    assert len(made) == len(model.encoder.layer)


def test_weights_are_prepared_while_nobody_else_computes() -> None:
    """One thread is in the middle of a forward, two in theirs want to be alone: they wait for it, and for one another."""
    traffic, inside, computing = Traffic(), [], threading.Event()
    go_on, asked = threading.Event(), threading.Barrier(3)

    def compute() -> None:
        frame = sys._getframe()
        traffic.enter(frame)
        computing.set()
        assert go_on.wait(WAIT)
        inside.append("computed")
        traffic.leave(frame)

    def prepare() -> None:
        frame = sys._getframe()
        traffic.enter(frame)
        asked.wait(WAIT)
        with traffic.alone(), traffic.alone():
            inside.append("begins")
            time.sleep(0.05)  # the other one would come in here
            inside.append("ends")
        traffic.leave(frame)

    threads = [threading.Thread(target=work) for work in (compute, prepare, prepare)]
    for thread in threads:
        thread.start()
        assert computing.wait(WAIT)
    asked.wait(WAIT)
    threads[1].join(0.3)
    assert not inside
    go_on.set()
    for thread in threads:
        thread.join(WAIT)
    assert inside == ["computed", *("begins", "ends") * 2]


def test_several_models_in_one_process() -> None:
    models = [to_fast(tiny.bert(seed)) for seed in range(3)] + [tiny.bert(3)]
    expected = [run(models[index % 4], index) for index in range(THREADS)]
    for got, wanted in zip(together(lambda index: run(models[index % 4], index)), expected, strict=True):
        assert_same(got, wanted)


def test_attention_alone_in_sixteen_threads() -> None:
    case = CASES[0]
    model = to_fast(case.build())
    mask = torch.ones(3, case.mask_size, dtype=torch.long)
    mask[0, case.mask_size - 4 :] = 0
    batch = case.batch(model, mask)
    with torch.inference_mode():
        expected = tensors(model(**batch))

    def work(index: int) -> list[torch.Tensor]:
        with torch.inference_mode():
            return tensors(model(**batch))

    for got in together(work):
        assert_same(got, expected)


class Held:
    """A forward of `model` in another thread, which waits in the middle, behind the module `where`."""

    def __init__(self, model: nn.Module, where: str = "encoder.layer.1.output", index: int = 0) -> None:
        self.model, self.where, self.index = model, where, index
        self.inside, self.go_on = threading.Event(), threading.Event()

    def _wait(self, module: nn.Module, args: tuple, output: object) -> None:
        if threading.current_thread() is self.thread:
            self.inside.set()
            assert self.go_on.wait(WAIT)

    def __enter__(self) -> Held:
        self.hook = self.model.get_submodule(self.where).register_forward_hook(self._wait)
        self.result: list[torch.Tensor] = []
        self.thread = threading.Thread(target=lambda: self.result.extend(run(self.model, self.index)))
        self.thread.start()
        assert self.inside.wait(WAIT)
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self.thread.join(WAIT)
        assert not self.thread.is_alive()
        self.hook.remove()


def test_reverse_while_a_forward_runs_is_refused() -> None:
    model = to_fast(tiny.bert())
    expected = run(model, 0)
    with Held(model) as held:
        before = snapshot(model)
        with pytest.raises(BusyError, match="a forward of the model runs"):
            reverse(model)
        assert snapshot(model) == before
        expected_with_hook = run(model, 0)
    assert_same(held.result, expected_with_hook)
    assert_same(run(model, 0), expected)
    stock = run(tiny.bert(), 0)
    assert_same(run(reverse(model), 0), stock)


def test_to_fast_while_a_forward_runs_is_refused() -> None:
    model = tiny.bert()
    expected = run(model, 0)
    with Held(model, "encoder.layer.1") as held:
        before = snapshot(model)
        with pytest.raises(BusyError, match="another thread calls BertModel now: nothing was changed"):
            to_fast(model)
        with pytest.raises(BusyError), fast(model.encoder):
            pass
        assert snapshot(model) == before
    assert_same(held.result, expected)
    to_fast(tiny.bert())  # a forward of another model is in nobody's way
    assert is_fast(to_fast(model))


def test_reverse_in_a_hook_of_the_same_forward_is_refused() -> None:
    model, stock, refused = to_fast(tiny.bert()), tiny.bert(), []

    def hook(*_: object) -> None:
        with pytest.raises(BusyError):
            reverse(model)
        refused.append(True)

    handle = model.encoder.layer[1].output.dense.register_forward_hook(hook)
    run(model, 0)
    handle.remove()
    assert refused and is_fast(model)
    assert_same(run(reverse(model), 0), run(stock, 0))


def test_a_layer_that_is_called_by_itself_counts_too() -> None:
    model = to_fast(tiny.bert())
    layer, hidden = model.encoder.layer[0], torch.randn(2, 5, 48)
    seen = []

    def hook(*_: object) -> None:
        with pytest.raises(BusyError):
            reverse(model)
        seen.append(True)

    layer.output.register_forward_hook(hook)
    with torch.inference_mode():
        layer(hidden)
    assert seen


def test_a_model_that_is_changed_all_the_time_never_answers_wrongly() -> None:
    """Fifteen threads ask, one converts and reverses: what they get is one of the two right answers in each token."""
    model, stock = tiny.bert(), tiny.bert()
    expected = [run(stock, index) for index in range(THREADS)]
    changes, done = [0, 0], threading.Event()

    def change() -> None:
        while not done.is_set():
            try:
                (reverse if is_fast(model) else to_fast)(model)
                changes[0] += 1
            except BusyError:
                changes[1] += 1

    def ask(index: int) -> None:
        mask = request(index).get("attention_mask")
        for _ in range(12):
            got = run(model, index)[0]
            assert tiny.relative_error(got, expected[index][0], mask) < 1e-5

    changer = threading.Thread(target=change)
    changer.start()
    try:
        together(ask, THREADS - 1)
    finally:
        done.set()
        changer.join(WAIT)
    if is_fast(model):
        reverse(model)
    assert changes[0] > 0 or changes[1] > 0
    assert_same(run(model, 0), expected[0])
    kinds = [kind for module in model.modules() for kind in (module._forward_hooks, module._forward_pre_hooks)]
    hooks = [hook for kind in kinds for hook in kind.values()]
    assert not [hook for hook in hooks if type(hook).__module__.startswith("fastencoder")]


def test_forwards_that_begin_while_a_model_is_reversed_wait_and_run_as_stock(monkeypatch) -> None:
    model, stock = to_fast(tiny.bert()), tiny.bert()
    run(model, 0)
    begun, result = threading.Event(), []
    state = model.encoder.layer[0]._fastencoder
    release = type(state).release

    def ask() -> None:
        begun.set()
        result.extend(run(model, 0))

    asking = threading.Thread(target=ask)

    def slow(self, layer) -> None:
        if not begun.is_set():
            asking.start()
            assert begun.wait(WAIT)
            asking.join(0.3)
            assert asking.is_alive()  # it waits in front of the first fast module
        release(self, layer)

    monkeypatch.setattr(type(state), "release", slow)
    reverse(model)
    asking.join(WAIT)
    # The embeddings may have run before, in the extension, which rounds otherwise.
    mask = request(0)["attention_mask"]
    assert tiny.relative_error(result[0], run(stock, 0)[0], mask) < 1e-5
    assert not any(windows.calls.values())


def test_two_threads_that_convert_the_same_model() -> None:
    model = tiny.bert()

    def convert(index: int) -> str:
        try:
            to_fast(model)
        except AlreadyFastError:
            return "already"
        return "converted"

    assert sorted(together(convert)) == ["already"] * (THREADS - 1) + ["converted"]
    assert sum(isinstance(module, FastLayer) for module in model.modules()) == 3
    assert_same(run(model, 0), run(to_fast(tiny.bert()), 0))

    def back(index: int) -> str:
        try:
            reverse(model)
        except NotFastError:
            return "not fast"
        return "reversed"

    assert sorted(together(back)) == ["not fast"] * (THREADS - 1) + ["reversed"]
    assert snapshot(model)["classes"] == snapshot(tiny.bert())["classes"]
    assert_same(run(model, 0), run(tiny.bert(), 0))


def test_copies_do_not_wait_for_one_another() -> None:
    model = to_fast(tiny.bert())
    twin = copy.deepcopy(model)
    with Held(model):
        reverse(twin)
    assert is_fast(model) and not is_fast(twin)


PROCESSES = """
import json, multiprocessing, os, sys, threading, warnings
import torch
from fastencoder import is_fast, reverse, to_fast
from tests import tiny

def build():
    return to_fast(tiny.bert(hidden_size=192, num_attention_heads=4, intermediate_size=512))

def answer(model):
    batch = tiny.ragged(batch=24, seqlen=60, seed=1)
    with torch.inference_mode():
        return model(**batch).last_hidden_state

class Texts(torch.utils.data.Dataset):
    model = None
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return answer(self.model)

def child(send):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = answer(Texts.model).numpy()
        again = answer(Texts.model).numpy()
    model = Texts.model
    said = [str(each.message) for each in caught if "fastencoder" in str(each.message)]
    send.send((got, again, torch.get_num_threads(), said))
    reverse(model)  # the parent's other threads are gone
    assert not is_fast(model)
    send.close()

def fork(hold):
    expected = answer(Texts.model)
    if hold:  # another thread of the parent is in the middle of a forward
        inside, go_on = threading.Event(), threading.Event()
        def wait(*_):
            if threading.current_thread() is thread:
                inside.set()
                go_on.wait(60)
        handle = Texts.model.encoder.layer[1].output.register_forward_hook(wait)
        thread = threading.Thread(target=answer, args=(Texts.model,))
        thread.start()
        inside.wait(60)
        expected = answer(Texts.model)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(False)
    process = context.Process(target=child, args=(send,))
    process.start()
    there = receive.poll(60)
    got, again, threads, said = receive.recv() if there else (None, None, None, None)
    process.join(60)
    if hold:
        go_on.set()
        thread.join()
    if not there or process.exitcode != 0:
        process.kill()
        return {"hangs": not there, "exit": process.exitcode}
    same = all(torch.equal(torch.from_numpy(each), expected) for each in (got, again))
    return {"same": same, "threads": threads, "said": said, "here": torch.get_num_threads()}

def loader(start):
    expected = answer(Texts.model)
    data = Texts()
    if start == "spawn":
        data.__class__ = Spawned
        data.kept = Texts.model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = dict(batch_size=None, num_workers=2, multiprocessing_context=start, timeout=100)
        rows = list(torch.utils.data.DataLoader(data, **options))
    return {"same": len(rows) == 4 and all(torch.equal(row, expected) for row in rows)}

class Spawned(Texts):
    def __getitem__(self, index):
        return answer(self.kept)

if __name__ == "__main__":
    torch.multiprocessing.set_sharing_strategy("file_system")
    torch.set_num_threads(2)
    Texts.model = build()
    kind, argument = json.loads(sys.argv[1])
    print(json.dumps({"fork": fork, "loader": loader}[kind](argument)))
"""


def in_a_process(tmp_path, kind: str, argument: object) -> dict:
    """A process of its own: it computes on two threads before it has children."""
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps([kind, argument])],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
    import os
    from pathlib import Path

    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}


@pytest.mark.parametrize("hold", [False, True], ids=["idle", "a forward runs"])
def test_a_forked_child_of_a_parent_that_has_computed(tmp_path, hold: bool) -> None:
    """OpenMP would wait for threads that are not there: one thread, said once. Bits do not depend on how many there are."""
    outcome = in_a_process(tmp_path, "fork", hold)
    assert outcome["same"] and outcome["here"] == 2
    assert outcome["threads"] == 1
    (said,) = outcome["said"]
    assert "forked" in said and "spawn" in said


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(tmp_path, start: str) -> None:
    assert in_a_process(tmp_path, "loader", start) == {"same": True}
