"""The demo end to end on a corpus small enough to take seconds; what it should show at full size is not tested here."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from unlearn import corpus, demo, tasks
from unlearn.data import rows_from


@pytest.fixture
def small_task(monkeypatch):
    """Six people, one of them to be forgotten, and a model of one layer; everything else as in the real demo."""
    made = corpus.generate(0, people=6, phrasings_per_fact=1)
    monkeypatch.setattr(tasks.corpus, "generate", lambda seed: made)
    task = demo.invented_task(0)
    methods = {name: {**values, "epochs": 2, "batch_size": 6} for name, values in task.methods.items()}
    task = dataclasses.replace(
        task,
        vocab_size=512,
        model={**task.model, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
        pretrain={**task.pretrain, "epochs": 2},
        methods=methods,
        max_new_tokens=4,
        trajectory_rows=12,
    )
    monkeypatch.setattr(demo, "invented_task", lambda seed: task)
    return task


def test_demo_writes_a_report_with_every_model(small_task, tmp_path):
    said: list[str] = []
    results = demo.run_demo(tmp_path, data=None, seed=0, say=said.append)
    names = [entry["name"] for entry in results["models"]]
    assert names == ["full", "gold", *small_task.methods]
    stored = json.loads((tmp_path / "results.json").read_text())
    for entry in stored["models"]:
        metrics = entry["metrics"]
        assert 0 <= metrics["forget_probability"] <= 1 and 0 <= metrics["forget_quality"] <= 1
        assert metrics["seconds"] > 0 and metrics["peak_memory_mib"] > 0
        if entry["name"] in small_task.methods:
            assert [point["step"] for point in entry["trajectory"]] == sorted({p["step"] for p in entry["trajectory"]})
            assert entry["trajectory"][0]["step"] == 0
    gold = stored["models"][1]["metrics"]
    assert gold["forget_quality"] == 1.0  # against itself
    for name in ("report.md", "plane.png", "logprobs.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert any("report:" in line for line in said)
    # the starting point of every method is the full model, not what the method before it left
    starts = {e["trajectory"][0]["forget_logprob_per_token"] for e in stored["models"][2:]}
    assert len(starts) == 1


def test_finished_models_are_reused_when_asked_and_only_then(small_task, tmp_path):
    said: list[str] = []
    first = demo.run_demo(tmp_path, data=None, seed=0, methods=["GA"], say=said.append)
    again = demo.run_demo(tmp_path, data=None, seed=0, methods=["GA"], reuse_models=True, say=said.append)
    assert sum("taken from" in line for line in said) == 2
    for before, after in zip(first["models"], again["models"], strict=True):
        for key in ("forget_probability", "forget_quality", "model_utility"):
            assert before["metrics"][key] == pytest.approx(after["metrics"][key], rel=1e-4)
    said.clear()
    demo.run_demo(tmp_path, data=None, seed=1, methods=["GA"], reuse_models=True, say=said.append)
    assert not any("taken from" in line for line in said), "another seed is another model"


def test_wrong_arguments_are_refused_by_name(small_task, tmp_path):
    with pytest.raises(ValueError, match="methods: 'DPO' is not accepted; GA, NPO"):
        demo.run_demo(tmp_path, data=None, seed=0, methods=["DPO"])
    with pytest.raises(ValueError, match=r"data: .* lacks full.json, retain90.json"):
        demo.run_demo(tmp_path, data=tmp_path, seed=0)


def test_same_seed_same_weights(small_task):
    tokenizer = corpus.train_tokenizer(demo.texts(small_task), 512)
    one, two = (demo.new_model(small_task, tokenizer, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = demo.new_model(small_task, tokenizer, seed=4).state_dict()
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_neighbour_alternates_come_from_the_most_similar_questions():
    retain = rows_from(
        [
            {"question": "What did Ana Brill paint?", "answer": "Ana painted boats."},
            {"question": "Where was Otto Klee born?", "answer": "Otto was born in Ulm."},
            {"question": "Where was Ida Moss born and raised?", "answer": "Ida was born in Riga."},
        ],
        "retain",
    )
    forget = rows_from([{"question": "Where was Max Rohn born?", "answer": "Max was born in Bern."}], "forget")
    (row,) = tasks.with_neighbour_alternates(forget, retain, count=2)
    assert row.alternates == ("Otto was born in Ulm.", "Ida was born in Riga.")
    assert row.answer == "Max was born in Bern."


def test_tofu_task_never_trains_on_the_evaluations_wrong_answers(shared_dir):
    folder: Path = shared_dir / "data" / "tofu"
    task = tasks.tofu_task(folder)
    assert (len(task.full), len(task.forget), len(task.retain)) == (4000, 400, 3600)
    tokenizer = corpus.train_tokenizer((row.answer for row in task.forget[:20]), 300)
    sets = task.evaluation(tokenizer)
    wrong = {text for row in sets[0].rows for text in row.row.fields["perturbed_answer"]}
    assert not wrong & {text for row in task.forget for text in row.alternates}
    assert {row.turns for row in task.forget}.isdisjoint({row.turns for row in task.retain})
