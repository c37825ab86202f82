"""Strict surroundings for every test: CPU, four fake devices, no rank promotion, no network."""

import os
import re
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Small programs run once or twice: what takes time is to compile them.
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

MAPS, MOST_MAPS = Path("/proc/self/maps"), 25_000
"""Linux gives a process some 65,000 pieces of memory; every compiled program takes several, and without them the
compiler crashes."""


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs():
    """Programs are forgotten between files once they are too many."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


def unexpected_skips(reports, may_skip: str | None) -> list[str]:
    """Skipped tests whose reason names none of the things in `may_skip` (comma separated; None: all may be skipped)."""
    if may_skip is None:
        return []
    lacking = [_plain(name) for name in may_skip.split(",") if name]
    reasons = [(report.nodeid, report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr))
               for report in reports]
    return [f"{test}: {reason}" for test, reason in reasons if not any(name in _plain(reason) for name in lacking)]


def _plain(words: str) -> str:
    return re.sub(r"[\W_]", "", words).lower()


def _skips(config) -> list[str]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return unexpected_skips(reporter.stats.get("skipped", []), os.environ.get("DLCOURSE_MAY_SKIP"))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Where DLCOURSE_MAY_SKIP says what this machine lacks, a skip for any other reason fails the run."""
    if not hasattr(session.config, "workerinput") and _skips(session.config) and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    for skip in _skips(config):
        terminalreporter.write_line(f"FAILED: should have run here, but was skipped: {skip}", red=True)
