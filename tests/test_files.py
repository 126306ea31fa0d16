"""Files that are whole or not there, folders that one run has to itself, and runs that are told to stop."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ignite.engine import Engine, Events

from medsegdiff_monai.errors import InputError, Interrupted
from medsegdiff_monai.files import append, lock_folder, remove_leftovers, replacing, unlock_folder, write_atomically
from medsegdiff_monai.running import RunGuard

HOLD = """
import sys, time
from medsegdiff_monai.files import lock_folder
lock_folder(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_that_another_process_has_is_refused_and_taken_over_from_a_dead_one(other, tmp_path):
    with pytest.raises(InputError, match=rf"process {other.pid} on .+, since \d{{4}}-.+ is writing there: wait"):
        lock_folder(tmp_path)
    other.kill()
    other.wait()
    assert (tmp_path / ".lock").is_file()  # nobody was left to remove it
    lock_folder(tmp_path)
    assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()
    unlock_folder(tmp_path)


def test_a_process_takes_a_folder_as_often_as_it_likes_and_leaves_nothing_there(tmp_path):
    for _ in range(2):
        lock_folder(tmp_path / "new")
    unlock_folder(tmp_path / "new")
    assert (tmp_path / "new" / ".lock").exists()
    unlock_folder(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("write", [lambda p: write_atomically(p, b"x"), lambda p: lock_folder(p.parent)])
def test_a_file_in_the_place_of_a_folder_is_named(write, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match=r"out(/.+)?: cannot be written \((File exists|Not a directory)\)"):
        write(tmp_path / "out" / "mask.nii.gz")
    assert (tmp_path / "out").read_text() == "mine"


def test_what_is_appended_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "table.csv"
    append(file, b"one\n")
    append(file, b"two\n")
    assert file.read_bytes() == b"one\ntwo\n"

    class Full:
        """A file on a disk with room for three bytes."""

        def __init__(self, *args, **kwargs) -> None:
            self.file = original(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *args) -> None:
            self.file.close()

        def __getattr__(self, name: str):
            return getattr(self.file, name)

        def write(self, content: bytes) -> int:
            return self.file.write(content[:3])

    original = open
    monkeypatch.setattr("medsegdiff_monai.files.open", Full, raising=False)
    with pytest.raises(InputError, match=r"table.csv: cannot be written \(No space left on device\)"):
        append(file, b"three\n")
    assert file.read_bytes() == b"one\ntwo\n"


def test_of_several_files_on_a_full_disk_all_stay_as_they_were(tmp_path):
    from contextlib import ExitStack

    for name in "abc":
        (tmp_path / name).write_text(f"old {name}")
    with pytest.raises(InputError, match="/c: cannot be written"), ExitStack() as stack:
        for name in "abc":
            temporary = stack.enter_context(replacing(tmp_path / name))
            temporary.write_text("new")
            if name == "c":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: f"old {name}" for name in "abc"}


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    left = [".a.pt.12.tmp", "case/.case_seg.nii.gz.7.tmp", "validation/epoch_001/.case.png.999.tmp"]
    kept = ["a.tmp", ".notes.tmp", ".hidden", "case/x.12.tmp", "a/b/c/.deep.1.tmp"]
    for name in [*left, *kept]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == set(kept)


# --- runs that are told to stop


def guarded(folder: Path, step, **kwargs) -> Engine:
    engine = Engine(step)
    RunGuard(folder, **kwargs).attach(engine)
    return engine


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_advice_and_puts_all_back(number, code, tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    engine = guarded(tmp_path, lambda e, b: signal.raise_signal(number), advice=lambda: "Go on so.")
    with pytest.raises(Interrupted) as stop:
        engine.run([0])
    assert (stop.value.message, stop.value.code) == ("stopped. Go on so.", code)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert list(tmp_path.iterdir()) == []


def test_handlers_of_a_program_around_a_run_stay(tmp_path):
    seen = []
    previous = signal.signal(signal.SIGTERM, lambda *_: seen.append(True))
    try:
        guarded(tmp_path, lambda e, b: signal.raise_signal(signal.SIGTERM), advice=lambda: "").run([0])
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert seen == [True]


@pytest.mark.parametrize("early", [True, False])
def test_errors_of_a_run_are_not_swallowed(early, tmp_path):
    """Neither those before the run had its folder nor later ones; handlers that come after it see them too."""

    def fail(*_):
        raise InputError("no weights")

    engine, seen = Engine(lambda e, b: None if early else fail()), []
    if early:
        engine.add_event_handler(Events.STARTED, fail)
    RunGuard(tmp_path).attach(engine)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda e, error: seen.append(error))
    with pytest.raises(InputError, match="no weights"):
        engine.run([0])
    assert seen and list(tmp_path.iterdir()) == []


def test_only_the_first_of_several_processes_takes_the_folder(tmp_path, monkeypatch, other):
    monkeypatch.setattr("medsegdiff_monai.running.is_main", lambda: False)
    guarded(tmp_path, lambda e, b: None, advice=lambda: "").run([0])
    monkeypatch.setattr("medsegdiff_monai.running.is_main", lambda: True)
    with pytest.raises(InputError, match=f"process {other.pid}"):
        guarded(tmp_path, lambda e, b: None).run([0])
