"""What the terminal shows fits 80 columns, and says what is happening."""

import io
import math
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPT, options, run_script, runs, words

from training.distributed import Processes
from training.progress import Limits, Progress
from utils import terminal
from utils.metrics import COLUMNS
from utils.terminal import bar, duration, epoch_line, result, say


def test_a_labelled_text_is_wrapped_except_within_words_and_pairs(capsys):
    say("Settings", ", ".join(f"name{terminal.NO_BREAK}{i}" for i in range(100)))
    say("Validation error", "x" * 90)
    *lines, last = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 80 and all(line.startswith(" " * 13) for line in lines[1:])
    assert lines[0].startswith("Settings     name 0, ") and not any(
        line.endswith("name") for line in lines)
    assert last == f"Validation error {'x' * 90}"


@pytest.mark.parametrize("seconds, text", [
    (0.1, "about 1 second"), (50, "about 50 seconds"), (80, "about 80 seconds"),
    (100, "about 1.7 minutes"), (40 * 60, "about 40 minutes"), (3 * 3600, "about 3 hours"),
    (9 * 86_400, "about 9 days"), (130 * 86_400, "about 130 days")])
def test_durations_are_in_words(seconds, text):
    assert duration(seconds) == text


def test_epoch_lines_fit_and_show_errors():
    row = dict.fromkeys(COLUMNS, math.nan) | {
        "epoch": 500, "train_loss": -12345.6789, "val_acc": 0.9914, "val_bpd": 1.0603,
        "ema_val_acc": 0.0, "ema_val_bpd": 11.0, "seconds": 12345.6}
    for quantity in ("bpd", "log_p"):
        header, line = (epoch_line(r, ("val", "ema_val", "test"), quantity) for r in (None, row))
        assert len(header) == len(line) < 80
    header, line = (epoch_line(r, ("val", "ema_val", "test"), "bpd") for r in (None, row))
    assert line.split() == ["500", "-12345.679", "0.86%", "1.0603", "100.00%", "11.0000", "12345.6"]
    for name, value in (("val err", "0.86%"), ("avg err", "100.00%"), ("seconds", "12345.6")):
        assert header.rindex(name) + len(name) == line.rindex(value) + len(value)
    assert epoch_line(None, ("test",), "log_p").split() == [
        "epoch", "loss", "test", "err", "log", "p(x)", "seconds"]
    alone = epoch_line(None, ("val", "ema_val", "test"), "bpd", errors=False)
    assert "err" not in alone and len(alone) == len(header)
    assert alone.rindex("avg bits/dim") + 12 == line.rindex("11.0000") + 7


def test_the_result_says_which_weights():
    row = dict.fromkeys(COLUMNS, math.nan) | {"val_log_p": 1.0, "val_acc": 0.5}
    assert result(row) == ("Validation error", "50.00%")
    row |= {"ema_val_log_p": 2.0, "ema_val_acc": 0.75}
    assert result(row)[1].startswith("25.00%, of the averaged weights, which have the higher")
    assert result(row | {"val_log_p": math.nan, "test_log_p": 3.0, "test_acc": 0.8}) == (
        "Test error", "20.00%, of the averaged weights, which have the only finite validation "
                      "likelihood")


def test_a_bar_is_for_terminals_and_for_the_main_process(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    for has_stdout, is_terminal, shown in ((True, True, True), (True, False, False),
                                           (False, True, False)):
        stream = Terminal() if is_terminal else io.StringIO()
        monkeypatch.setattr(sys, "stdout", io.StringIO() if has_stdout else None)
        list(bar(range(3), "counting", file=stream))
        say("Label", "text")                        # without stdout it prints nothing
        assert ("counting" in stream.getvalue()) == shown


def progress_of(steps_per_epoch=4, epochs=10):
    settings = SimpleNamespace(train_bs=2, epochs=epochs)
    return Progress(steps_per_epoch, settings, [torch.zeros(1)], Processes(), Limits())


def train_epoch(progress, seconds, monkeypatch):
    """An epoch whose steps take so many seconds each."""
    now = time.perf_counter()
    with progress:
        for _ in progress.steps():
            now += seconds
            monkeypatch.setattr("training.progress.time.perf_counter", lambda now=now: now)
            progress.add({"loss": torch.zeros(()), "correct": torch.zeros(()),
                          "labelled": torch.ones(())})
        progress.finish_epoch()


def test_the_duration_is_told_once_from_the_first_steps(monkeypatch, capsys):
    monkeypatch.setattr("training.progress.time.perf_counter", lambda: 0.0)
    progress = progress_of()
    train_epoch(progress, 2, monkeypatch)           # steps end after 2, 4, 6, 8 s: 3 count
    assert capsys.readouterr().out == (
        "Duration     about 72 seconds to the end of epoch 10, evaluations aside\n")
    train_epoch(progress, 2, monkeypatch)
    assert not capsys.readouterr().out
    short = progress_of(steps_per_epoch=10, epochs=40)
    for _ in range(8):
        train_epoch(short, 0.125, monkeypatch)
        later = time.perf_counter() + 60                    # of evaluation
        monkeypatch.setattr("training.progress.time.perf_counter", lambda later=later: later)
    assert capsys.readouterr().out.startswith("Duration     about 44 seconds to the end of")


def test_a_slow_epoch_is_told_once_if_there_are_several_threads(monkeypatch, capsys):
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        progress = progress_of(epochs=5)
        for seconds in (0.5, 0.9, 1.1, 3):
            train_epoch(progress, seconds, monkeypatch)
        out = words(capsys.readouterr().out)
        assert out.count("Slow") == (threads > 1)
        assert ("Slow epoch 3 took 2.2 times as long as the fastest. Another program" in out
                and "--resume RUN_DIR --threads 1" in out) == (threads > 1)


def screen(argv, folder, seconds=120, interrupt_after=None):
    """Run the script on a terminal of 80 columns -> what it writes there, and its exit code."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    process = subprocess.Popen([sys.executable, str(SCRIPT), *argv], cwd=folder, stdin=slave,
                               stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    if interrupt_after:
        time.sleep(interrupt_after)
        process.send_signal(signal.SIGINT)
    parts = []
    while True:
        try:
            part = os.read(master, 2**16)
        except OSError:                             # the other end is closed
            break
        if not part:
            break
        parts.append(part.decode())
    os.close(master)
    return "".join(parts), process.wait(timeout=seconds)


@pytest.mark.slow
def test_a_run_on_a_terminal_of_80_columns(tmp_path):
    text, code = screen(options(epochs=300, log_each=100, validation=100, ema=0.9,
                                time_limit=0.35), tmp_path)
    assert code == 0 and "Loading PyTorch\r" in text and re.search(r"\repoch \d+/300:", text)
    # A bar rewrites its line, and ends with what the line shows.
    for line in text.split("\r\n"):
        shown = line.split("\r")[-1]
        assert len(shown) < 80 or "--resume" in shown, shown
    assert re.search(r"Duration +about .* to the end of epoch 300", text)
    run, = runs(tmp_path)
    epoch = str(torch.load(run / "checkpoint.pt")["epoch"] + 1)
    for _ in range(2):                              # to its end, and when it has ended
        text, code = screen(["--resume", str(run), "--epochs", epoch], tmp_path)
        assert code == 0 and "Test error" in text
        assert not re.search(r"img/s[^\r]*\]-log p", text)      # the bar has been removed


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 1])
def test_ctrl_c_during_the_imports_is_silent(tmp_path, seconds):
    text, code = screen(options(epochs=1), tmp_path, interrupt_after=seconds)
    assert code in (130, -signal.SIGINT) and "Traceback" not in text


def test_settings_that_differ_are_printed_and_no_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_script(options(epochs=1, name="mine")) == 0
    out = capsys.readouterr().out
    assert "Created symlink" not in out and len(out.splitlines()) < 40
    shown = words(out).split("Settings ")[1].split("; the others")[0].split(", ")
    assert {"name mine", "data digits", "epochs 1", "ssl_hd 8", "precision fp32"} < set(shown)
    assert not any(s.startswith(("optimizer", "seed", "test ")) for s in shown)
    run, = runs(tmp_path)
    assert out.split("Settings")[1] in (run / "log.txt").read_text()
