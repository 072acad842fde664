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
DOCUMENTS, COMPARE, KERNELS = (
    (DOCS / name).read_text(encoding="utf-8")
    for name in ("unlearn-my-documents.md", "compare-methods.md", "kernels-in-my-trainer.md")
)
FORGET = "Odo Fenn won the Prize of Lanterns in his ninth year. "
KEEP = "Mara Quill was born in the town of Arvel, by the river. "
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


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", DOCUMENTS, flags=re.DOTALL)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """The folders that the page begins with, and a model that knows what is in two of them."""
    texts = {"documents": FORGET, "keep": KEEP, "unseen": "The father of Ilse was a clock maker from the north. "}
    for folder, sentence in texts.items():
        (tmp_path / folder).mkdir()
        for number in range(2):
            (tmp_path / folder / f"{number}.txt").write_text(sentence * (4 + number), encoding="utf-8")
    for name in ("questions", "others", "examples"):
        (tmp_path / f"{name}.csv").write_text(f'ask,reply\n"Who, of the {name}?",Mara Quill.\n', encoding="utf-8")
    (tmp_path / "run.toml").write_text(blocks("toml")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    tiny_llama(max_position_embeddings=4096, initializer_range=0.05).save_pretrained("blank")
    tiny_tokenizer().save_pretrained("blank")
    learn = "--method finetune --retain [dk]*/*.txt --lr 1e-2 --epochs 60 --batch-size 4 --warmup-epochs 1 --seed 0"
    assert cli.main(["train", "--model", "blank", "--output", "learnt", *learn.split()]) == 0
    Path("learnt", "model").rename("my-model")


def test_unlearn_my_documents(desk, capfd):
    """The page's commands in its order; what the model recites falls, what it is to keep does not."""
    printed = []
    commands = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    assert len(commands) == 8
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "unlearn"
        capfd.readouterr()
        if arguments[0] == "train":  # the page's rate is for 7B parameters
            arguments += ["--lr", "3e-3"]
        assert cli.main(arguments) == 0, command
        out = capfd.readouterr().out
        printed.append(json.loads(out) if "--json" in arguments else {})
    before, full, _, _, after, scores, _, facts = printed
    # recited whole; the F1 is less since the model goes on where these short documents end
    assert before["verbmem_f_recall"] > 0.9 and before["verbmem_f"] > 0.6 and before["mia_min_k_auc"] == 1.0
    assert after["verbmem_f"] < 0.5 * before["verbmem_f"]
    assert full["forget_logprob_per_token"] > -0.5 and scores["forget_logprob_per_token"] < -1
    assert scores["retain_logprob_per_token"] > full["retain_logprob_per_token"] - 0.5
    assert {"knowmem_f", "knowmem_r"} < facts.keys()
    page = Path("report.html").read_text()
    assert "forgotten: finished" in page and "not comparable" not in page and "only one of" not in page
    # the file says what the command says, for another folder
    first, again = (Path(name, "metrics.jsonl").read_text().splitlines() for name in ("forgotten", "forgotten-again"))
    config, other = (json.loads(lines[0])["config"] for lines in (first, again))
    assert {name for name in config if config[name] != other[name]} == {"output"}


@pytest.mark.parametrize("text", [DOCUMENTS, COMPARE, KERNELS])
def test_linked_files_exist(text):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (DOCS / target).exists(), target
