"""A browser for the tests in this folder: the system's Chromium through Playwright, which downloads nothing.

Without Chromium or Playwright the tests do not run, and the last lines of the test run list them; with
`WORKBENCH_BROWSER=required` (continuous integration) they fail instead.
"""

import importlib.util
import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
LEFT_OUT = "left out for want of a browser"


def _chromium():
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def _lacking():
    if _chromium() is None:
        return "no Chromium here: install Debian's package chromium"
    if importlib.util.find_spec("playwright") is None:
        return "no Playwright here: pip install playwright"
    return None


@pytest.fixture(scope="session")
def browser():
    """Chromium, headless."""
    if lacking := _lacking():
        if os.environ.get("WORKBENCH_BROWSER") == "required":
            pytest.fail(f"the browser tests are required; {lacking}")
        pytest.skip(f"{LEFT_OUT}; {lacking}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # The sandbox needs privileges that root in a container lacks; the pages are our own.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(executable_path=_chromium(), args=arguments)
        yield chromium
        chromium.close()


def pytest_terminal_summary(terminalreporter):
    """List the tests that did not run for lack of a browser."""
    skipped = [
        report.nodeid
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple) and LEFT_OUT in report.longrepr[2]
    ]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests {LEFT_OUT} ({_lacking()}):")
        for nodeid in skipped:
            terminalreporter.write_line(f"  {nodeid}")
