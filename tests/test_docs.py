"""Every command of the task pages runs as it stands there, on a model of the reader's size divided by a million."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.tiny import tiny_llama, tiny_tokenizer
from unlearn import cli

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "unlearn-my-documents.md").read_text(encoding="utf-8")
FORGET = "Odo Fenn won the Prize of Lanterns in his ninth year. "
KEEP = "Mara Quill was born in the town of Arvel, by the river. "


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)


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
    assert len(commands) == 7
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "unlearn"
        capfd.readouterr()
        if arguments[0] == "train":  # the page's rate is for 7B parameters
            arguments += ["--lr", "3e-3"]
        assert cli.main(arguments) == 0, command
        out = capfd.readouterr().out
        printed.append(json.loads(out) if "--json" in arguments else {})
    before, full, _, _, after, scores, facts = printed
    # recited whole; the F1 is less since the model goes on where these short documents end
    assert before["verbmem_f_recall"] > 0.9 and before["verbmem_f"] > 0.6 and before["mia_min_k_auc"] == 1.0
    assert after["verbmem_f"] < 0.5 * before["verbmem_f"]
    assert full["forget_logprob_per_token"] > -0.5 and scores["forget_logprob_per_token"] < -1
    assert scores["retain_logprob_per_token"] > full["retain_logprob_per_token"] - 0.5
    assert {"knowmem_f", "knowmem_r"} < facts.keys()
    # the file says what the command says, for another folder
    first, again = (Path(name, "metrics.jsonl").read_text().splitlines() for name in ("forgotten", "forgotten-again"))
    config, other = (json.loads(lines[0])["config"] for lines in (first, again))
    assert {name for name in config if config[name] != other[name]} == {"output"}
