"""The host's time by pytest-benchmark, to compare with earlier runs: ``python -m pytest benchmarks/test_host.py``.

Its options save and compare: ``--benchmark-autosave``, ``--benchmark-compare``, ``--benchmark-json FILE``. The tests of the
project do not collect this file: nothing is timed there.
"""

from typing import Any

import pytest

from benchmarks import host

CALLS = [(shape, call) for shape in host.subjects() for call in host.CALLS]


@pytest.mark.parametrize(("shape", "call"), CALLS, ids=[f"{shape}: {call}" for shape, call in CALLS])
def test_host(benchmark: Any, shape: str, call: str) -> None:
    """One kind of call, its launches replaced by nothing."""
    with host.no_launches():
        benchmark(host.subjects()[shape]()[call])
