"""Which parameter sets of a long test the fast part runs."""

from collections import defaultdict

import pytest


def spread(n, count):
    """``n`` of ``count`` places, or all of them, the first and the last among them where n allows, evenly apart."""
    if n == 1 or n >= count:
        return set(range(min(n, count)))
    return {round(i * (count - 1) / (n - 1)) for i in range(n)}


def keep_few(items):
    """Of a test marked ``few(n)``, n parameter sets that are not slow stay so; the others become slow."""
    of_test = defaultdict(list)
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("slow"):
            of_test[item.nodeid.partition("[")[0]].append(item)
    for found in of_test.values():
        kept = spread(found[0].get_closest_marker("few").args[0], len(found))
        for i, item in enumerate(found):
            if i not in kept:
                item.add_marker(pytest.mark.slow)
