"""Continuous integration: a test that is skipped there fails."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
CONFTEST = Path(__file__).parent / "conftest.py"
TESTS = """
import pytest

@pytest.mark.skipif(True, reason="needs a browser")
def test_page(): pass

def test_other(): pytest.skip("no results yet")

@pytest.mark.xfail(strict=True)
def test_known(): assert False

def test_good(): pass
"""


@pytest.mark.parametrize("ci", [True, False])
def test_skips_fail_in_ci(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: bool) -> None:
    monkeypatch.setenv("CI", "1") if ci else monkeypatch.delenv("CI", raising=False)
    pytester.makeconftest(CONFTEST.read_text(encoding="utf-8"))
    pytester.makepyfile(test_skips=TESTS, test_whole='import pytest\npytest.importorskip("no_such_module")')
    (pytester.path / "tests/target").mkdir(parents=True)
    (pytester.path / "tests/target/test_quantised.py").write_text(
        'import pytest\npytest.skip("x", allow_module_level=True)'
    )
    run = pytester.runpytest_inprocess("-p", "no:cacheprovider", "--continue-on-collection-errors")
    if ci:
        run.assert_outcomes(passed=1, failed=1, xfailed=1, errors=2, skipped=1)
        run.stdout.fnmatch_lines(["*CI=1 does not allow: Skipped: needs a browser*"])
    else:
        run.assert_outcomes(passed=1, skipped=4, xfailed=1)
