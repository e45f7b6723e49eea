"""Which batches a dry run looks at: none that can ask for something else is passed over."""

from __future__ import annotations

import random

import pytest

from fastencoder.runtime.dry_run import Shape, _explore, _steps


@pytest.mark.parametrize("limit", [1, 2, 3, 17, 600, 65536])
def test_steps_begin_at_one_and_end_at_the_limit(limit: int) -> None:
    steps = _steps(limit)
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == limit
    assert all(high <= 2 * low for low, high in zip(steps, steps[1:], strict=False))
    powers = [1 << n for n in range(20)]
    assert all(near in steps for power in powers for near in (power, power + 1) if near <= limit)


@pytest.mark.parametrize("seed", range(20))
def test_every_border_is_found(seed: int) -> None:
    """Buckets of any widths, of which most lie between two steps."""
    generator = random.Random(seed)
    borders = sorted(generator.sample(range(2, 4000), 12))

    def ask(n: int) -> frozenset[int]:
        return frozenset({sum(n >= border for border in borders)})

    assert _explore(ask, _steps(4000)) == frozenset(range(13))


def test_few_sizes_are_tried() -> None:
    asked = []

    def ask(n: int) -> frozenset[bool]:
        asked.append(n)
        return frozenset({n > 1000})

    assert _explore(ask, _steps(65536)) == {False, True}
    assert len(asked) == len(set(asked)) < 60


@pytest.mark.parametrize("shape", [Shape(1, 1, 1), Shape(7, 1, 7), Shape(10, 4, 4), Shape(10, 7, 4), Shape(9, 3, 3)])
def test_lengths_add_up(shape: Shape) -> None:
    lengths = shape.lengths
    assert (sum(lengths), len(lengths), max(lengths)) == shape and min(lengths) >= 1
