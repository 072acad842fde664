"""What the README tells a reader works as it stands there."""

import re
from pathlib import Path

import pytest

from bench import readme
from unlearn import cli

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert 10 <= len([line for line in example.splitlines() if line.strip()]) <= 25
    scope: dict = {}
    exec(compile(example, "README.md", "exec"), scope)
    # NPO at its own reference is (2 / beta) log 2 = 13.863
    assert scope["loss"].item() == pytest.approx(20 * 0.693147, rel=1e-4)
    assert scope["model"].lm_head.weight.grad.abs().sum() > 0


def test_tables_match_the_committed_rows():
    assert readme.main(["--check"]) == 0


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match="no table 'nothing'"):
        readme.render("<!-- rows:nothing -->\n<!-- end -->")


def test_commands_and_options_exist(capsys):
    """Every `unlearn COMMAND --option` the README shows is one that the parser knows."""
    shown = re.findall(r"unlearn +(demo|train|eval|reference)\b([^`\n]*)", TEXT.replace("\\\n", " "))
    assert len(shown) >= 4
    for command, rest in shown:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        known = capsys.readouterr().out
        for option in re.findall(r"--[a-z][a-z-]+", rest):
            assert option in known, f"unlearn {command} {option}"


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
