"""Runs a training again and again, ending it at random moments, until it is complete.

As a program: python killing.py SEED KILLS FLAG ... prints one line of JSON: how each session ended. Sessions are forks
of this process, which has imported everything but started nothing: they begin within a fraction of a second.
"""

import json
import os
import random
import signal
import sys
import threading
import time

from dlcourse.training import checkpoint
from experiments import classification, command, train, watch

MOMENTS = ("a step", "a save", "an evaluation", "the start")


def end_later(how: int, seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), how)).start()


def arm(how: int, moment: str, count: int, delay: float) -> None:
    """Sends this process the signal `delay` seconds after the `count`-th beginning of such a moment."""
    if moment == "the start":
        end_later(how, delay * 10)
        return
    holder, name = {"a step": (watch.Watch, "on_steps"), "a save": (checkpoint.Checkpoints, "save"),
                    "an evaluation": (train, "_validation")}[moment]
    inner, seen = getattr(holder, name), []

    def armed(*args, **kwargs):
        seen.append(1)
        if len(seen) == count:
            end_later(how, delay)
        return inner(*args, **kwargs)

    setattr(holder, name, armed)


def session(flags, prepare) -> int:
    """Runs the command in a fork; its exit status, negative for the signal that ended it."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        prepare()
        os._exit(command.status(classification.main, classification.Config, "classification", flags))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(seed: str, kills: str, *flags: str) -> None:
    rng, ended = random.Random(int(seed)), []
    for number in range(400):
        killed = sum(how == "SIGKILL" and status == -signal.SIGKILL for how, _, status, _ in ended)
        if killed >= int(kills):
            prepare, how, moment = (lambda: None), None, None
        else:
            how = signal.SIGKILL if number % 4 else rng.choice([signal.SIGTERM, signal.SIGINT])
            moment = MOMENTS[number % len(MOMENTS)] if number % 5 else rng.choice(MOMENTS)
            count = rng.randint(1, {"a step": 30, "a save": 2, "an evaluation": 2, "the start": 1}[moment])
            delay = rng.random() * 0.08

            def prepare(how=how, moment=moment, count=count, delay=delay):
                arm(how, moment, count, delay)

        began = time.monotonic()
        status = session(list(flags), prepare)
        ended.append((how and how.name, moment, status, time.monotonic() - began))
        if status == 0:
            break
    print(json.dumps(ended))


if __name__ == "__main__":
    main(*sys.argv[1:])
