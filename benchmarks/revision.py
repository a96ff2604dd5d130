"""One of the two revisions that benchmarks.compare compares: a process that measures what it is told to, when it is told to.

``python benchmarks/revision.py TREE DEVICE``: ``fused_attn`` comes from TREE; what measures comes from the checkout that holds
this file, for both revisions alike. Reads a line of JSON for each request, and answers with one.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HARNESS = Path(__file__).resolve().parent.parent
DEVICES = ("cuda", "cpu")  # of fused_attn.tools.options, which comes from the tree
KEPT = contextlib.ExitStack()  # what holds until the process ends


def graft(name: str, folder: Path) -> None:
    """Has ``import name`` find a package in ``folder``, whatever is on the path."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    if "." in name:
        parent, _, child = name.rpartition(".")
        setattr(importlib.import_module(parent), child, module)


def _alone(make: Callable[[], Any]) -> Any:
    """A subject without its peers."""
    subject = make()
    subject.peers = {}
    return subject


def cpu_ms(call: Callable[[], Any], repeat: int = 1) -> float:
    """Milliseconds that this process computes for a call: who else uses the machine hardly shows in them."""
    start = time.process_time()
    for _ in range(repeat):
        call()
    return (time.process_time() - start) * 1e3 / repeat


def calls(device: str) -> dict[str, Callable[[], dict[str, Callable[[], Any]]]]:
    """What is compared: a name -> what prepares and checks it, and gives a call for each of its passes."""
    from fused_attn.tools.bench.contest import OURS, Contest, subject_of

    def checked(make: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
        contest = Contest(make(), device)
        if OURS not in contest.entries:
            raise RuntimeError(contest.facts[OURS]["error"])
        return {which: contest.calls(which)[OURS] for which in contest.subject.passes}

    if device != "cpu":
        from benchmarks import cases

        return {case.name: partial(checked, partial(subject_of, case, device, [])) for case in cases.timing_cases()}
    from benchmarks import cpu, host  # which has kernels interpreted

    KEPT.enter_context(host.no_launches())  # no other call here runs kernels
    found = {f"host, {name}": make for name, make in host.subjects().items()}
    return found | {name: partial(checked, partial(_alone, make)) for name, make in cpu.subjects().items()}


def main() -> None:
    """Answers {"list": true}, {"prepare": name} and {"measure": pass, "repeat": calls} until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks, and closes this one's input
    if len(sys.argv) != 3 or not (Path(sys.argv[1]) / "fused_attn" / "__init__.py").is_file() or sys.argv[2] not in DEVICES:
        print(f"revision.py: expected a checkout and one of {', '.join(DEVICES)}; got {sys.argv[1:]}", file=sys.stderr)
        raise SystemExit(2)
    tree, device = Path(sys.argv[1]).resolve(), sys.argv[2]
    if not (tree / "fused_attn" / "tools").is_dir():
        print("revision.py: expected a revision that has fused_attn/tools; got an older one", file=sys.stderr)
        raise SystemExit(2)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    sys.path[0] = str(tree)
    graft("benchmarks", HARNESS / "benchmarks")
    graft("fused_attn.tools.bench", HARNESS / "fused_attn" / "tools" / "bench")
    import torch

    import fused_attn
    from fused_attn.tools.bench.timing import measure

    assert fused_attn.__file__ is not None
    assert Path(fused_attn.__file__).resolve().is_relative_to(tree), fused_attn.__file__
    if device == "cpu":
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):  # both revisions on one core: two cores are not equally disturbed
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    known, ready = calls(device), dict[str, Callable[[], Any]]()
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if "list" in request:
                answer["names"] = list(known)
            elif "prepare" in request:
                ready = known[request["prepare"]]()
                answer["passes"] = {which: min(cpu_ms(call) for _ in range(3)) for which, call in ready.items()}
            elif device == "cpu":
                answer["ms"] = cpu_ms(ready[request["measure"]], request["repeat"])
            else:
                answer["ms"] = sorted(measure({"": ready[request["measure"]]}, device, 5)[""])[2]
        except Exception as error:  # of this revision: the other one goes on
            answer["error"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
