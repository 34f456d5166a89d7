"""Runs a module as a program that ends with whoever started it. For any Python: it knows the standard library alone.

    python -I die_with_parent.py FOLDER vllm.entrypoints.openai.api_server --model ...

FOLDER is looked in for imports after all others. Standard input is a pipe whose other end the starter holds. When it
closes, because the starter let go or was killed, this process gets SIGTERM; one that does not within `GRACE_S` is
killed with its process group, which the starter makes its own.
"""

import os
import runpy
import signal
import sys
import threading
import time

GRACE_S = 10.0


def _end_with(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    held = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_end_with, args=(held,), daemon=True).start()
    sys.path.append(sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
