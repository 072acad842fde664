"""The list of deliberate faults stays applicable; `python -m tests.kernels.mutants` shows that each is caught."""

import pytest

from tests.kernels.mutants import MUTANTS, PACKAGE, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_old_text_occurs_once(mutant):
    assert (PACKAGE / mutant.file).read_text().count(mutant.old) == 1
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / "kernels" / file).read_text()


def test_kernels_is_not_a_package():
    """A top-level importable `kernels` shadows the Hugging Face package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
