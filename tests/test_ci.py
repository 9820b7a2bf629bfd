"""Continuous integration: a test that is skipped there fails; which cases of a family run with the fast tests."""

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


@pytest.mark.slow
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


FAMILY = """
import pytest

@pytest.mark.sparing(2)
@pytest.mark.parametrize("x", range(5))
def test_many(x): pass

@pytest.mark.sparing
@pytest.mark.parametrize("x", range(3))
def test_one(x): pass

def test_alone(): pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(("chosen", "passed"), [("slow", 5), ("not slow", 4)])
def test_the_first_cases_of_a_family_are_fast(pytester: pytest.Pytester, chosen: str, passed: int) -> None:
    pytester.makeconftest(CONFTEST.read_text(encoding="utf-8"))
    pytester.makepyfile(test_family=FAMILY)
    pytester.runpytest_inprocess("-p", "no:cacheprovider", "-m", chosen).assert_outcomes(
        passed=passed, deselected=9 - passed
    )
