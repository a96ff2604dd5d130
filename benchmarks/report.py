"""What people read: a line for each row as it is made, and the tables of summary.md. Losing cases are shown like the others."""

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]

BOUND_BY_MEMORY = ("decode", "cached decoding")


def line(row: Row) -> str:
    """One row as one line of the running output."""
    head = f"{row['stage']:<12} {row['case']}"
    if row.get("skipped"):
        return f"{head}: skipped, {row['skipped']}"
    if row.get("error"):
        return f"{head}: ERROR {row['error']}"
    if "ms" in row:
        return f"{head} {row['pass']}: {row['ms']:.3f} ms, {_verdict(row)}"
    facts = {key: row[key] for key in ("differ", "tasks", "done", "ours_us", "sdpa_us") if key in row}
    failing = [name for name, result in row.get("results", {}).items() if not result["ok"]]
    worst = max((float(result["E"]) for result in row.get("results", {}).values() if "E" in result), default=None)
    verdict = "ok" if row.get("ok") else "FAILED " + ", ".join(failing) if row.get("ok") is False else ""
    return " ".join(filter(None, (f"{head}:", verdict, "" if worst is None else f"E {worst:.3g}", str(facts) if facts else "")))


def _speed(row: Row) -> str:
    """By what a case is judged: tokens or bytes a second, or FLOPs."""
    if "step_ms" in row or row.get("family") == "generation":
        return f"{row['tokens_per_s']:.4g} tokens/s"
    if row.get("family") in BOUND_BY_MEMORY or not row["tflops"]:
        return f"{row['gbytes_per_s']:.4g} GB/s"
    return f"{row['tflops']:.4g} TFLOP/s"


def _verdict(row: Row) -> str:
    ratio = row.get("ratio_to_best_peer")
    if ratio is None:
        return f"{_speed(row)}, no peer"
    return f"{_speed(row)}, {ratio:.2f} of {row['best_peer']}" + (" LOSES" if ratio < 1 else "")


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    header = list(header)
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, ["---"] * len(header), *rows)] + [""]


def _checks(checked: list[Row]) -> list[str]:
    lines = ["## Correctness and determinism", ""]
    for stage in ("correctness", "features", "determinism"):
        rows = [row for row in checked if row["stage"] == stage]
        passed, failed, skipped = (sum(row.get("ok") is verdict for row in rows) for verdict in (True, False, None))
        lines += [f"- {stage}: {passed} passed, {failed} failed, {skipped} skipped"]
    worst: dict[tuple[str, str, str], tuple[float, str]] = {}
    for row in checked:
        for name, result in row.get("results", {}).items():
            for gate in ("E", "E_row", "R", "bias"):
                if gate in result:
                    key = (gate, row["case"].split()[0], "lse" if name == "lse" else "out" if name == "out" else "gradients")
                    worst[key] = max(worst.get(key, (-1.0, "")), (float(result[gate]), row["case"]))
    if worst:
        lines += ["", "Worst value met of each gate:", ""]
        lines += _table(("gate", "dtype", "of", "worst", "case"),
                        ((*key, f"{value:.3g}", case) for key, (value, case) in sorted(worst.items()) if key[0] in ("E", "R")))
    bad = [row for row in checked if row.get("ok") is False]
    lines += ["", "### Failed", ""] * bool(bad) + [f"- {line(row)}" for row in bad]
    return [*lines, ""]


def _grid(timed: list[Row]) -> list[str]:
    """TFLOP/s of the papers' grid, with the ratio to the best peer; L where we lose."""
    rows = [row for row in timed if row.get("family") == "grid" and "ms" in row]
    if not rows:
        return []
    lengths = sorted({row["n_keys"] for row in rows})
    cells = {(row["pass"], row["head_dim"], row["causal"], row["n_keys"]): _cell(row) for row in rows}
    lines = ["## TFLOP/s, and in brackets the best peer's time over ours (L: we lose)", ""]
    body = [[which, head_dim, "causal" if causal else "full", *(cells.get((which, head_dim, causal, n), "") for n in lengths)]
            for which, head_dim, causal in sorted({key[:3] for key in cells}, key=lambda key: (key[0] == "backward", *key[1:]))]
    return lines + _table(("pass", "D", "mask", *(f"N={n}" for n in lengths)), body)


def _cell(row: Row) -> str:
    ratio = row.get("ratio_to_best_peer")
    return f"{row['tflops']:.4g}" + ("" if ratio is None else f" ({ratio:.2f}{' L' if ratio < 1 else ''})")


def _others(timed: list[Row]) -> list[str]:
    rows = [row for row in timed if row.get("family") not in ("grid", "overhead", "cold") and "ms" in row]
    body = []
    for row in rows:
        ratio = row.get("ratio_to_best_peer")
        body.append((row["case"], row["pass"], f"{row['ms']:.3f}", _speed(row), row.get("times_plain", ""),
                     row.get("best_peer") or "none", "" if ratio is None else f"{ratio:.2f}{' L' if ratio < 1 else ''}"))
    header = ("case", "pass", "ms", "speed", "times plain", "best peer", "its time / ours")
    return (["## Everything else", "", *_table(header, body)] if rows else [])


def _cold(timed: list[Row]) -> list[str]:
    """First calls: with nothing on disk, with caches on disk, and calls after that."""
    body = []
    for row in timed:
        if row.get("family") == "cold" and "ms" in row:
            for name, facts in (("ours", row), *row["peers"].items()):
                if "cold_ms" in facts:
                    body.append((row["case"], row["pass"], name, f"{facts['cold_ms']:.0f}", f"{facts['disk_ms']:.0f}",
                                 f"{facts['ms']:.3f}"))
    header = ("case", "pass", "of", "first call ever, ms", "first of a process, ms", "then, ms")
    return ["## Cold calls", "", *_table(header, body)] if body else []


def _peer_errors(timed: list[Row]) -> list[str]:
    """Each way in which a peer failed, once, with the cases."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in timed:
        for name, facts in row.get("peers", {}).items():
            found = cases.setdefault((name, facts["error"]), []) if "error" in facts else []
            if row["case"] not in found:
                found.append(row["case"])
    return [f"- {name}, {len(found)} cases ({found[0]}, ...): {error}" for (name, error), found in sorted(cases.items())]


def summary(conditions: Row, stages: dict[str, Row], checked: list[Row], timed: list[Row], pictures: str) -> str:
    """summary.md."""
    measured = [row for row in timed if "ratio_to_best_peer" in row]
    losing = sorted((row for row in measured if row["ratio_to_best_peer"] < 1), key=lambda row: row["ratio_to_best_peer"])
    commit = f"commit {conditions['commit'] or 'unknown'}" + (" with changes" if conditions["dirty"] else "")
    lines = [f"# {conditions['gpu']}", ""]
    if conditions["interpreter"]:
        lines += ["**Run in Triton's interpreter on a CPU: no time below says anything about a GPU.**", ""]
    lines += [f"torch {conditions['torch']}, Triton {conditions['triton']}, Python {conditions['python']}, {commit}, "
              f"source {conditions['source']}, {conditions['time']}", ""]
    lines += [f"- stage {name}: {stage['seconds']} s" + (f", **truncated**: {stage['truncated']} cases not run"
                                                           if stage["truncated"] else "") for name, stage in stages.items()]
    lines += ["", *_checks(checked), *_grid(timed), *_others(timed), *_cold(timed)]
    for row in timed:
        if row.get("family") == "overhead" and "ours_us" in row:
            lines += [f"Host time of a call without gradients: {row['ours_us']} us; torch's SDPA {row['sdpa_us']} us.", ""]
    if measured:
        lines += [f"## Losing: {len(losing)} of {len(measured)} measured", ""]
        lines += [f"- {row['case']} {row['pass']}: {row['ratio_to_best_peer']:.2f} of {row['best_peer']}" for row in losing]
        lines += [""] if losing else []
    errors = [f"- {line(row)}" for row in timed if row.get("error")]
    lines += ["## Errors", "", *errors, *_peer_errors(timed), ""] if errors or _peer_errors(timed) else []
    return "\n".join([*lines, pictures, ""])


def show(text: str) -> None:
    """Prints a summary, by rich where it is installed."""
    try:
        from rich.console import Console
        from rich.markdown import Markdown
    except ImportError:
        print(text)
    else:
        Console(width=128).print(Markdown(text))
