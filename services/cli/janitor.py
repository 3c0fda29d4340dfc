"""Run as a process of its own: waits until its parent is gone, then removes what that one left.

Its standard input is a pipe that only the parent holds, so the end of input is the parent's end,
also by SIGKILL. It leads the process group of the parent's other children.
"""

import os
import shutil
import signal
import sys


def main() -> None:
    """Outlive the parent, then remove the directory and kill the process group."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    directory = sys.argv[1]
    sys.stdin.buffer.read()
    shutil.rmtree(directory, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
