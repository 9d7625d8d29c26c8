"""Closed pipes, names that are not UTF-8, and what an error of the operating system is answered with."""

import errno
import os
import sys
from pathlib import Path

import pytest

from uctrans.system import escaped, explained, is_utf8, lasting_streams

FOREIGN = os.fsdecode(b"caf\xe9")


def test_writing_goes_on_in_silence_when_the_reader_has_gone(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        patch.setattr(sys, "stderr", pipe)
        with lasting_streams():
            for stream in (sys.stdout, sys.stderr):
                for text in ("short", "long" * 50_000, FOREIGN):
                    print(text, file=stream, flush=True)
        assert sys.stdout is pipe


def test_what_is_written_arrives_and_names_that_are_not_utf8_are_escaped(capfd):
    with lasting_streams():
        print("first", end=" ")
        print(FOREIGN)
        print("grüße", file=sys.stderr)
    assert capfd.readouterr() == ("first caf\\udce9\n", "grüße\n")


def test_streams_that_are_closed_or_no_files_are_no_obstacle(monkeypatch, capsys):
    stand_in = sys.stdout
    monkeypatch.setattr(sys, "stderr", None)
    with lasting_streams():
        assert sys.stdout is stand_in
        print("nowhere", file=sys.stderr)
    assert sys.stderr is None


def test_other_errors_of_a_stream_are_raised():
    with Path("/dev/full").open("w") as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="No space left"), lasting_streams():
            print("text", flush=True)


def test_names_are_utf8_or_escaped():
    assert is_utf8("grüße")
    assert not is_utf8(FOREIGN)
    assert (escaped(FOREIGN), escaped("grüße")) == ("caf\\udce9", "grüße")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "the disk is full; free space or choose another output folder"),
        (errno.EFBIG, "a file would be larger than is allowed here; raise the limit (ulimit -f unlimited)"),
        (errno.EDQUOT, "the quota is used up; free space or ask for a larger quota or choose"),
        (errno.EROFS, "the disk is read-only; make it writable or choose another output folder"),
        (errno.EACCES, "permission is missing; allow reading and writing there or choose another output folder"),
    ],
)
def test_errors_of_the_system_get_a_cause_and_a_remedy(number, remedy):
    assert f"'scores.csv': {remedy}" in explained(OSError(number, os.strerror(number), "scores.csv"))


def test_other_errors_are_one_line():
    assert explained(ValueError("two\nlines")) == "two lines"
    assert explained(OSError(errno.ENOENT, "No such file", "a")) == "[Errno 2] No such file: 'a'"
