"""What `fastencoder verify` and `fastencoder bench` do, for a program: `verify(model, batches)` and `bench(model, batches)`.

Neither changes the model that it is given: both sides of a comparison are copies of it.
"""

from __future__ import annotations

from .bench import Timing, bench
from .inputs import Batch, CannotMakeInputs, from_file, of_lengths, of_texts, ragged
from .verification import Verification
from .verify import verify

__all__ = [
    "Batch",
    "CannotMakeInputs",
    "Timing",
    "Verification",
    "bench",
    "from_file",
    "of_lengths",
    "of_texts",
    "ragged",
    "verify",
]
