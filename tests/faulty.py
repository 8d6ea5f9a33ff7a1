"""Run a program with a fault at a chosen point: python faulty.py FAULT NAME PROGRAM ARGUMENTS...

The fault happens just before a file or folder is first renamed to NAME. Files and checkpoints are written under another
name and renamed when they are complete, so a name stands for the same point of a run however fast the machine is.
"""

import os
import resource
import runpy
import signal
import sys

FAULTS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminated": lambda: os.kill(os.getpid(), signal.SIGTERM),
    # No file may grow beyond this size: a full disk that root is not exempt from.
    "full disk": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, 2**15)),
}


def main() -> None:
    fault, name, *program = sys.argv[1:]

    def inject(event, arguments):
        if event == "os.rename" and os.path.basename(os.fsdecode(arguments[1])) == name:
            FAULTS[fault]()

    sys.addaudithook(inject)
    sys.argv = program
    runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main()
