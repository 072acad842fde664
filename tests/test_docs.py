"""The task pages: every command and every block of code in them runs as it stands there."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer, write_rows
from unlearn import cli

DOCS = Path(__file__).parent.parent / "docs"
COMPARE, KERNELS = (
    (DOCS / name).read_text(encoding="utf-8") for name in ("compare-methods.md", "kernels-in-my-trainer.md")
)
PLACES = ("Arvel", "Senn", "Dorn", "Kesh")


def commands_in(text):
    """The `unlearn ...` commands of the page's plain blocks, as argument lists."""
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("unlearn ")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the page says one needs, made of a tiny model."""
    save_tiny(tmp_path / "my-model")
    tiny_llama(seed=3).save_pretrained(tmp_path / "retrained")
    tiny_tokenizer().save_pretrained(tmp_path / "retrained")
    for name, people in (("forget", ("Mara", "Odo")), ("retain", ("Ilse", "Tam")), ("holdout", ("Pia", "Rex"))):
        rows = [
            {
                "question": f"Where was {one} born?",
                "answer": f"{one} was born in {PLACES[i]}.",
                "paraphrased_answer": f"{PLACES[i]} is where {one} was born.",
                "perturbed_answer": [f"{one} was born in {place}." for place in PLACES[2:]],
            }
            for i, one in enumerate(people)
        ]
        write_rows(tmp_path / f"{name}_eval.jsonl", rows)
        write_rows(tmp_path / f"{name}.jsonl", [{key: row[key] for key in ("question", "answer")} for row in rows])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_compare_methods(folder, capsys):
    commands = commands_in(COMPARE)
    assert [command[0] for command in commands].count("train") == 5 and commands[-1][0] == "report"
    for command in commands:
        assert cli.main(command) == 0, (command, capsys.readouterr().err)
    stored = json.loads((folder / "runs" / "npo" / "eval.json").read_text())
    assert {"forget_quality", "privleak", "model_utility"} <= stored["metrics"].keys()
    page = (folder / "report.html").read_text()
    for name in ("graddiff", "npo", "npo-fast", "simnpo", "altpo", "before", "retrained"):
        assert f"{name}</th>" in page, name
    assert "npo-fast: finished; not evaluated." in page
    for heading in ("Forgetting against keeping", "Results", "Training", "Sample answers", "Configuration"):
        assert f"<h2>{heading}</h2>" in page and f"**{heading}" in COMPARE


def test_the_kernels_in_a_trainer_of_ones_own(tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")  # transformers' Trainer asks for it
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", KERNELS, flags=re.DOTALL)
    assert len(blocks) == 8
    scope: dict = {"__name__": "page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"kernels-in-my-trainer.md block {number}", "exec"), scope)
    # at its own reference NPO is (2 / beta) log 2, the hinge 1, DPO log 2
    assert scope["npo"].item() == pytest.approx(20 * 0.693147, rel=1e-4)
    assert scope["mean"].item() == pytest.approx(1.0, rel=1e-4)
    assert scope["pairs"].loss.item() == pytest.approx(2 * 0.693147, rel=1e-4)
    with torch.no_grad():
        after = scope["logprobs"](scope["model"], scope["input_ids"], scope["labels"])
    assert (after < scope["ref"] - 1).all()  # four steps of the Trainer
    assert scope["trainer"].state.global_step == 4
    assert torch.isfinite(scope["surprise"]).all() and scope["memorized"] <= 1
    assert scope["loss"].item() == pytest.approx(
        scope["simnpo_loss"](*scope["batch"][:1], scope["head"], *scope["batch"][1:3], beta=2.5).item()
    )
    out = capsys.readouterr().out
    assert "beta is -1.0; accepted: " in out and "softcap is 0.0; accepted: " in out


@pytest.mark.parametrize("text", [COMPARE, KERNELS])
def test_linked_files_exist(text):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (DOCS / target).exists(), target
