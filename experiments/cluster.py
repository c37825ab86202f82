"""Several processes as one run: they meet, the first one speaks and writes, and none is left waiting.

Processes are announced by flags (--coordinator, --num_processes, --process_id) or by what started them: SLURM's srun,
a TPU VM. The run's folder must be on a file system that all of them see.
"""

from __future__ import annotations

import contextlib
import glob
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dlcourse.contracts import InputError

HEARTBEAT = 30
"""Seconds after which a silent process is taken for dead; JAX then ends all others with a message."""


def check(values: Mapping[str, Any]) -> None:
    """Refuses what cannot be meant by the flags that announce processes."""
    address, count, number = values["coordinator"], values["num_processes"], values["process_id"]
    if not address and not count and number == -1:
        return
    if not (address and count and number >= 0):
        raise InputError(f"--coordinator={address} --num_processes={count} --process_id={number}: all three are needed,"
                         " or none where SLURM or a TPU VM tells them")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"--coordinator={address}: give HOST:PORT of process 0, such as 10.0.0.1:1234")
    if not number < count:
        raise InputError(f"--process_id={number}: must be in 0..{count - 1} for --num_processes={count}")


def announced(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize`; None where this process is alone."""
    if values["coordinator"]:
        return {"coordinator_address": values["coordinator"], "num_processes": values["num_processes"],
                "process_id": values["process_id"]}
    if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:  # set by srun, not in a batch script
        return {}
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return {}
    tpu = glob.glob("/dev/accel[0-9]*") or (glob.glob("/dev/vfio/[0-9]*") and os.environ.get("TPU_ACCELERATOR_TYPE"))
    return {} if tpu and "cpu" not in os.environ.get("JAX_PLATFORMS", "") else None


def start(values: Mapping[str, Any]) -> None:
    """Waits until all processes of the run are there; before JAX is asked for anything.

    Ends this process, with one line and status 2, where they do not come in time.
    """
    arguments = announced(values)
    if arguments is None:
        return
    import jax

    timeout = values["coordinator_timeout"]
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM, which is the loop's
    with _deadline(timeout, f"--coordinator={values['coordinator'] or 'as announced'}: not all "
                   f"{values['num_processes'] or ''} processes of the run met there within {timeout:g} seconds "
                   "(--coordinator_timeout); start all of them, and see that they reach that address"):
        jax.distributed.initialize(**arguments, initialization_timeout=int(timeout) + 30,
                                   heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT)
    counts = {}
    for device in jax.devices():
        counts[device.process_index] = counts.get(device.process_index, 0) + 1
    if len(set(counts.values())) > 1:
        listed = ", ".join(map(str, counts.values()))
        raise InputError(f"the processes of this run have {listed} devices; give each of them the same number")


@contextlib.contextmanager
def _deadline(seconds: float, line: str) -> Iterator[None]:
    """Ends the process with this line if the body takes longer; JAX itself would abort with a stack trace."""
    def end():
        print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def several() -> bool:
    """Whether this is one of several processes; JAX is not started to find out."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


@contextlib.contextmanager
def opened(open_run: Callable[..., contextlib.AbstractContextManager], workdir: Path) -> Iterator[Any]:
    """`open_run(writes=...)` for all processes: the first one makes the folder, or says for all why it cannot be."""
    if not several():
        with open_run(writes=True) as run:
            yield run
        return
    import jax
    from jax.experimental import multihost_utils

    first, said = jax.process_index() == 0, ""
    with contextlib.ExitStack() as stack:
        if first:
            try:
                run = stack.enter_context(open_run(writes=True))
            except InputError as error:
                said = str(error)
        said = _broadcast(said)
        if not first and not said:
            run = stack.enter_context(open_run(writes=False))
        seen = bool(said) or _appears(workdir / "config.json")
        if not multihost_utils.process_allgather(jax.numpy.array(seen)).all():
            said = f"--workdir={workdir} is not seen by all processes; name a folder on a file system that they share"
        if said:
            raise InputError(said)
        yield run
        multihost_utils.sync_global_devices("the end of the run")  # nobody leaves while another still needs him


def _broadcast(text: str) -> str:
    """The first process's text."""
    import numpy as np
    from jax.experimental import multihost_utils

    room = np.zeros(2048, np.uint8)
    data = np.frombuffer(text.encode()[:len(room)], np.uint8)
    room[:len(data)] = data
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(room))).rstrip(b"\0").decode(errors="replace")


def _appears(path: Path, seconds: float = 10.0) -> bool:
    """Whether a file is there, or comes to be seen soon: network file systems are late sometimes."""
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.2)
    return path.exists()


def lost(error: BaseException) -> bool:
    """Whether an error says that another process of this run is gone."""
    return several() and type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and any(
        word in str(error) for word in ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "peer", "NCCL"))


def leave(status: int) -> None:
    """Ends a process whose run failed at once; JAX would wait for the others first."""
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
