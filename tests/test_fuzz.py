import pytest

from tests import fuzz

CASES = 25  # of each kind; `python tests/fuzz.py --cases 20000` runs more


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return fuzz.Fuzzer(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_damaged_file_ends_in_one_line_or_does_no_harm(fuzzer, kind):
    cases = [fuzzer.run(0, number, kind) for number in range(CASES)]
    assert [(said, repr(failure)) for said, failure in cases if failure] == []
