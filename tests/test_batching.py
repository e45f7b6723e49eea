"""The servers' batching and limits, without a server: who shares a batch, who is refused, and that nobody's answer is lost."""

from __future__ import annotations

import asyncio
import threading

import pytest

from examples import batching
from examples.batching import Batcher, QueueFull, Rate
from examples.limits import Limits, Refused, check_texts, check_tokens, parse


class Model:
    """Answers each text with its first token; can be held, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.threads: set[int] = set()

    def __call__(self, rows: list[list[int]]) -> list[list[float]]:
        self.batches.append(rows)
        self.threads.add(threading.get_ident())
        assert self.go_on.wait(20)
        if any(row[0] < 0 for row in rows):
            raise ValueError("a negative token")
        return [[float(row[0])] for row in rows]


def run(main) -> None:
    """To its end, or to a failure: a lost answer would be waited for without end."""
    asyncio.run(asyncio.wait_for(main, 30))


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def test_texts_of_many_requests_share_batches_and_get_their_own_answers() -> None:
    async def main() -> None:
        model = Model()
        batcher = Batcher(model, max_texts=8, max_wait=0.05)
        answers = await asyncio.gather(*(batcher.ask([[i], [100 + i]]) for i in range(10)))
        assert answers == [[[float(i)], [100.0 + i]] for i in range(10)]
        assert [len(batch) for batch in model.batches] == [8, 8, 4]
        assert len(model.threads) == 1 and threading.get_ident() not in model.threads
        await batcher.close()

    run(main())


def test_a_batch_is_bounded_by_tokens_and_a_long_text_runs_alone() -> None:
    async def main() -> None:
        model = Model()
        batcher = Batcher(model, max_tokens=10, max_wait=0.01)
        await asyncio.gather(*(batcher.ask([[1] * size]) for size in (4, 5, 20, 6, 4)))
        assert [[len(row) for row in batch] for batch in model.batches] == [[4, 5], [20], [6, 4]]
        await batcher.close()

    run(main())


def test_a_single_text_does_not_wait_for_company_for_ever() -> None:
    async def main() -> None:
        batcher = Batcher(Model(), max_wait=0.01)
        async with asyncio.timeout(20):
            assert await batcher.ask([[7]]) == [[7.0]]
            await batcher.close()

    run(main())


def test_a_full_queue_refuses_and_keeps_what_it_has() -> None:
    async def main() -> None:
        model = Model()
        model.go_on.clear()
        batcher = Batcher(model, max_texts=1, max_wait=0, max_queued=3)
        first = asyncio.create_task(batcher.ask([[0]]))
        await until(lambda: model.batches)  # the model has it; the queue is empty again
        rest = [asyncio.create_task(batcher.ask([[i]])) for i in (1, 2, 3)]
        await until(lambda: len(batcher.queue) == 3)
        with pytest.raises(QueueFull):
            await batcher.ask([[4]])
        model.go_on.set()
        assert await asyncio.gather(first, *rest) == [[[float(i)]] for i in range(4)]
        assert await batcher.ask([[5]]) == [[5.0]]  # there is room again
        with pytest.raises(QueueFull):
            await batcher.ask([[i] for i in range(4)])  # never fits
        await batcher.close()

    run(main())


def test_an_error_is_of_its_batch_alone() -> None:
    async def main() -> None:
        model = Model()
        batcher = Batcher(model, max_texts=2, max_wait=0.01)
        answers = await asyncio.gather(*(batcher.ask([[i]]) for i in (1, 2, -3, 4, 5, 6)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [list, list, ValueError, ValueError, list, list]
        assert await batcher.ask([[7]]) == [[7.0]]
        await batcher.close()

    run(main())


def test_who_leaves_takes_nobodys_answer_along() -> None:
    async def main() -> None:
        model = Model()
        model.go_on.clear()
        batcher = Batcher(model, max_texts=2, max_wait=0.01)
        asked = [asyncio.create_task(batcher.ask([[i]])) for i in range(5)]
        await until(lambda: model.batches)
        asked[1].cancel()  # runs already
        asked[2].cancel()  # waits
        await asyncio.sleep(0)
        model.go_on.set()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [answers[i] for i in (0, 3, 4)] == [[[0.0]], [[3.0]], [[4.0]]]
        assert [2] not in [row for batch in model.batches for row in batch]  # nothing is computed for nobody
        await batcher.close()

    run(main())


def test_closing_answers_everybody_and_takes_nobody() -> None:
    async def main() -> None:
        model = Model()
        model.go_on.clear()
        batcher = Batcher(model, max_texts=2, max_wait=100)
        asked = [asyncio.create_task(batcher.ask([[i]])) for i in range(5)]
        await until(lambda: model.batches)
        closing = asyncio.create_task(batcher.close())
        await until(lambda: batcher.closing)
        with pytest.raises(QueueFull):
            await batcher.ask([[9]])
        model.go_on.set()
        async with asyncio.timeout(20):
            await closing
        assert [task.result() for task in asked] == [[[float(i)]] for i in range(5)]

    run(main())


def test_rate_is_of_each_client_and_comes_back(monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(batching.time, "monotonic", lambda: now[0])
    rate = Rate(2)
    assert rate.wait("a", 20) == 0  # ten seconds' worth at once
    assert rate.wait("a", 4) == 2  # seconds until there are four
    assert rate.wait("b", 4) == 0
    now[0] += 2
    assert rate.wait("a", 4) == 0 and rate.wait("a", 1) > 0
    now[0] += 100
    assert rate.wait("a", 1000) == 0  # more than there can ever be: once all are there
    assert Rate(0).wait("a", 10**6) == 0


def test_rate_does_not_remember_clients_for_ever(monkeypatch) -> None:
    monkeypatch.setattr(Rate, "CLIENTS", 3)
    rate = Rate(1)
    for client in range(10):
        rate.wait(str(client), 1)
    assert list(rate._left) == ["7", "8", "9"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b'{"texts": ["\xff"]}', 400, "not UTF-8: byte 12"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b"[]", 422, "has to be"),
        (b'{"text": "a"}', 422, "has to be"),
        (b'{"texts": "a"}', 422, "has to be"),
        (b'{"texts": ["a", 1]}', 422, "has to be"),
        (b'{"texts": []}', 422, "there is no text"),
        (b'{"texts": ["a", " \\n"]}', 422, "text 1 is empty"),
        (b'{"texts": ["a", "b", "c", "d"]}', 413, "4 texts are more than the 3"),
        (b'{"texts": ["aaaaaaaaaaa"]}', 413, "text 0 has 11 characters, and may have 10"),
        (b'{"texts": ["a\\ud800"]}', 400, "surrogate"),
    ],
)
def test_wrong_requests_are_refused_with_a_reason(body: bytes, status: int, message: str) -> None:
    with pytest.raises(Refused) as refused:
        check_texts(parse(body), Limits(texts=3, characters=10))
    assert refused.value.status == status and message in refused.value.message


def test_right_requests_are_not_refused() -> None:
    limits = Limits(texts=3, characters=10, tokens=4)
    texts = ["a", "0123456789", "\N{SNOWMAN}"]
    assert check_texts({"texts": texts, "more": 1}, limits) == texts
    check_tokens([[1, 2, 3, 4]], limits)
    with pytest.raises(Refused, match="text 1 has 5 tokens, and may have 4"):
        check_tokens([[1], [1, 2, 3, 4, 5]], limits)
