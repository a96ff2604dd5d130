"""The process that watches another one: what hangs is ended with all that it started, told, and gone past."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from benchmarks.supervise import AGAIN, Note, supervise

ROOT = Path(__file__).resolve().parent.parent
# A worker without torch, which takes seconds to import; its note is written as Note writes it.
HEAD = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path({folder!r})
log, AGAIN = folder / "log", {again}
turn = len(log.read_text().split()) if log.exists() else 0
with log.open("a") as file:
    file.write(sys.argv[1] + chr(10))
class note:
    def begin(step):
        (folder / "new").write_text(json.dumps(step))
        os.replace(folder / "new", folder / "note")
    def alive():
        os.utime(folder / "note")
"""


@pytest.fixture
def watched(tmp_path):
    """Supervises a script; (status, steps that hung, the minutes that each worker was given)."""

    def run(script, minutes=1.0, patience=3.0):
        file = tmp_path / "worker.py"
        file.write_text(HEAD.format(folder=str(tmp_path), again=AGAIN) + textwrap.dedent(script))
        steps = []
        status = supervise(lambda left: [sys.executable, str(file), f"{left:.2f}"], Note(tmp_path / "note"),
                           time.monotonic() + 60 * minutes, patience, steps.append)
        return status, steps, (tmp_path / "log").read_text().split()

    return run


def test_a_step_that_hangs_is_told_and_gone_past(watched):
    status, steps, given = watched("""
        if turn == 0:
            note.begin({"case": "one"})
            note.begin({"case": "two"})
            time.sleep(600)
        sys.exit(3)
    """)
    assert (status, steps, len(given)) == (3, [{"case": "two"}], 2)


def test_signs_of_life_keep_a_long_step_alive(watched):
    status, steps, given = watched("""
        note.begin({"case": "long"})
        for _ in range(20):
            time.sleep(0.25)
            note.alive()
    """)
    assert (status, steps, len(given)) == (0, [], 1)


def test_a_worker_may_ask_to_be_started_anew(watched):
    status, steps, given = watched("""
        note.begin({"case": "poisons"})
        sys.exit(AGAIN if turn < 2 else 0)
    """)
    assert (status, steps, len(given)) == (0, [], 3)


def test_what_never_begins_is_given_up(watched, capsys):
    status, steps, given = watched("time.sleep(600)")
    assert (status, steps, len(given)) == (1, [], 3)
    assert "hung 3 times before its first step" in capsys.readouterr().err


def test_past_the_deadline_a_worker_still_has_time_for_its_report(watched):
    status, steps, given = watched("""
        if turn == 0:
            note.begin({"case": "last"})
            time.sleep(600)
    """, minutes=0.01)
    assert (status, steps, given) == (0, [{"case": "last"}], ["0.50", "0.50"])


def test_what_a_worker_started_ends_with_it(watched, tmp_path):
    watched("""
        import subprocess
        if turn == 0:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (folder / "child").write_text(str(child.pid))
            note.begin({"case": "with a child"})
            time.sleep(600)
    """)
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        try:
            state = Path(f"/proc/{child}/stat").read_text().split()[2]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child of a worker that was killed lives on")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_go_to_the_worker_which_writes_its_report(tmp_path, number):
    """The watching process ends with the worker's own status, after the worker."""
    (tmp_path / "worker.py").write_text(HEAD.format(folder=str(tmp_path), again=AGAIN) + textwrap.dedent(f"""
        def stop(*_):
            (folder / "report").write_text("written")
            sys.exit(17)
        signal.signal({int(number)}, stop)
        note.begin({{"case": "long"}})
        time.sleep(600)
    """))
    code = f"""if True:
        import sys, time
        from pathlib import Path
        from benchmarks.supervise import Note, supervise
        folder = Path({str(tmp_path)!r})
        sys.exit(supervise(lambda left: [sys.executable, str(folder / "worker.py"), "1"], Note(folder / "note"),
                           time.monotonic() + 60, 60.0, print))
    """
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        while not (tmp_path / "note").exists():
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=30) == 17
    finally:
        process.kill()
    assert (tmp_path / "report").read_text() == "written"


def test_a_note_is_read_whole_or_not_at_all(tmp_path):
    """Written in one step, so that whoever reads while it is written sees the old one or the new one."""
    note, stop, broken = Note(tmp_path / "note"), threading.Event(), []
    note.begin({"case": "x" * 5000})

    def read():
        while not stop.is_set():
            if note.read() is None:
                broken.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(200):
        note.begin({"case": str(i) * 5000})
    stop.set()
    reader.join()
    assert not broken
    assert AGAIN not in (0, 1, 2, 130, 143)
