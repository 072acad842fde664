"""The dry run against the run: every count and byte that it announces is found in what the run then leaves."""

import json
import re

import pytest
from safetensors.torch import load_file

from tests.test_cli import refused
from tests.test_train import FORGET, REFUSALS, RETAIN
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer, write_rows
from unlearn import cli, train


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, one that has lost its weights, rows and refusals. Read only."""
    folder = tmp_path_factory.mktemp("dry")
    for name in ("model", "bare"):
        save_tiny(folder / name)
    (folder / "bare" / "model.safetensors").unlink()
    write_rows(folder / "forget.jsonl", FORGET)
    write_rows(folder / "retain.jsonl", RETAIN)
    (folder / "refusals.txt").write_text("\n".join(REFUSALS))
    return folder


def command(files, output, *, model="bare", method="npo", beta=0.1, retain_term="nll", **more):
    values = {
        "model": files / model, "output": output, "method": method, "beta": beta, "lr": 1e-2, "epochs": 3,
        "batch_size": 4, "seed": 0, "forget": files / "forget.jsonl", "retain": files / "retain.jsonl",
        "retain_term": retain_term, "device": "cpu", "dtype": "bfloat16", "max_tokens": 150, "save_every": 4, **more,
    }  # fmt: skip
    return ["train", *(text for name, v in values.items() for text in ("--" + name.replace("_", "-"), str(v)))]


def planned(capsys, arguments):
    capsys.readouterr()
    assert cli.main([*arguments, "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1
    return json.loads(out)


def tree(folder):
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"retain_term": "kl", "lora": 4, "max_tokens": 4096},
        {"method": "altpo", "lora": 2, "lora_targets": "all-linear,lm_head", "lora_alpha": 3},
        {"method": "kto", "retain_term": "kl", "dtype": "float32", "alternates": "refusals.txt", "warmup_epochs": 0},
        {"method": "idkdpo", "alternates": "refusals.txt", "max_tokens": 20},
        {"method": "finetune"},
    ],
    ids=lambda values: "-".join(map(str, values.values())) or "npo",
)
def test_the_plan_is_what_the_run_does(files, tmp_path, capsys, monkeypatch, values):
    output = tmp_path / "out"
    values = dict(values)
    if "alternates" in values:
        values["alternates"] = files / values["alternates"]
    arguments = command(files, output, **values)
    if values.get("method") == "finetune":
        place = arguments.index("--forget")
        arguments = arguments[:place] + arguments[place + 2 :]
        for flag in ("--beta", "--retain-term"):
            place = arguments.index(flag)
            arguments = arguments[:place] + arguments[place + 2 :]
    before = tree(tmp_path), tree(files)
    plan = planned(capsys, arguments)
    assert (tree(tmp_path), tree(files)) == before and not plan["output"]["holds_a_run"]
    arguments[arguments.index("--model") + 1] = str(files / "model")
    assert planned(capsys, arguments) == plan | {"model": plan["model"] | {"name": str(files / "model")}}
    saved, original = [], train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda *args: saved.append(args) or original(*args))
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    header, *rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    steps, size, provenance = plan["steps"], plan["bytes"], header["provenance"]
    assert steps["total"] == len(rows) == header["num_steps"] == steps["epochs"] * steps["per_epoch"]
    assert steps["per_epoch"] == sum(row["epoch"] == 1 for row in rows)
    assert steps["micro_batches"] == sum(row["packs"] for row in rows)
    assert steps["tokens"] == sum(row["tokens"] for row in rows)
    assert steps["tokens"] <= steps["micro_batches"] * max(steps["largest_pack"], steps["max_tokens"])
    # the largest pack is one of those of its step, and the only one where a step has one
    assert max(row["tokens"] / row["packs"] for row in rows) <= steps["largest_pack"] <= max(r["tokens"] for r in rows)
    if all(row["packs"] == 1 for row in rows):
        assert steps["largest_pack"] == max(row["tokens"] for row in rows)
    if steps["largest_pack"] <= steps["max_tokens"]:
        assert steps["packs_over_budget"] == 0
        assert steps["fill"] == pytest.approx(steps["tokens"] / (steps["micro_batches"] * steps["max_tokens"]))
    else:  # a budget below every row: each has a pack of its own, and all of it is used
        assert steps["packs_over_budget"] == steps["micro_batches"] and steps["fill"] == 1
    rates, found = [row["lr"] for row in rows], plan["learning_rate"]
    assert (found["first"], found["last"], found["peak"]) == (rates[0], rates[-1], max(rates))
    assert rates[found["peak_step"] - 1] == found["peak"]
    model = plan["model"]
    assert (model["parameters"], model["trained_parameters"]) == (
        provenance["parameters"], provenance["trained_parameters"],
    )  # fmt: skip
    for name, what in (("logprobs", "reference log-likelihoods of {} sequences: computed"), ("states", "KL retain")):
        one = plan["reference"].get(name)
        assert (one is not None) == (what.split("{}")[0] in said)
        if one is not None:
            assert what.format(one["sequences"]) in said and one["stored"] is None
            (stored,) = load_file(output / "reference" / one["file"].rpartition("/")[2]).values()
            assert one["bytes"] == stored.nbytes
    weight = load_file(files / "model" / "model.safetensors")["lm_head.weight"]
    wide = weight.numel() * (4 if plan["model"]["dtype"] == "float32" else 2)
    # copied where it is trained
    assert size["reference_head"] == (wide if "states" in plan["reference"] and "lora" not in values else 0)
    assert size["static"] == sum(size[part] for part in ("weights", "gradients", "optimizer", "reference_head"))
    assert size["checkpoint"] == size["gradients"] + size["optimizer"]
    (checkpoint,) = (output / "checkpoints").glob("step-*")
    assert plan["checkpoints"] == len(saved) >= 1
    for folder, expected, others in ((checkpoint, size["checkpoint"], 40_000), (output / "model", None, 0)):
        written = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        written += sum(p.stat().st_size for p in folder.glob("optimizer.pt"))
        expected = size["final_model"] if expected is None else expected
        assert expected <= written <= expected + 10_000 + others
    after = planned(capsys, arguments)
    assert after["output"]["holds_a_run"] and all(one["stored"] == "complete" for one in after["reference"].values())


def test_for_a_person(files, tmp_path, capsys):
    arguments = command(files, tmp_path / "out")
    assert cli.main([*arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    table = {line.split("  ")[0]: line.partition("  ")[2].strip() for line in out.splitlines()}
    assert list(table) == [
        "method", "model", "forget", "retain", "steps", "packs", "learning rate", "reference", "checkpoints",
        "static memory", "measures", "output",
    ]  # fmt: skip
    assert re.fullmatch(r"adamw; \d+ KiB planned", table["measures"])
    assert (
        table["method"] == "npo, retain term nll" and "36,640 parameters in bfloat16, 36,640 trained" in table["model"]
    )
    assert table["forget"].startswith("6 rows, 235 tokens, 130 of them labels (55%)")
    assert table["steps"].startswith("6 in 3 epochs of 2, ")
    assert table["reference"] == "log-likelihoods of 6 sequences, 235 tokens: to be computed"
    assert table["learning rate"] == "from 0 up to 0.01 at step 3, straight down to 0.0025 at step 6"
    assert table["checkpoints"] == "1 written, the newest kept, 358 KiB each"
    assert table["static memory"].startswith("429 KiB: weights 71.6 KiB, gradients 71.6 KiB, optimizer 286 KiB")
    assert cli.main([*command(files, tmp_path / "out", method="ga", beta=0.1)[:-2], "--dry-run"]) == 2
    assert cli.main([*command(files, tmp_path / "out", warmup_epochs=0, save_every=0), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "0.01 at step 1, straight down to 0.00167 at step 6" in out and "none before the end" in out


def test_a_cache_that_the_run_would_refuse(files, tmp_path, capsys):
    shared = {"reference_cache": tmp_path / "cache"}
    assert cli.main(["reference", *command(files, tmp_path / "out", model="model", **shared)[1:]]) == 0
    plan = planned(capsys, command(files, tmp_path / "out", **shared))
    assert plan["reference"]["logprobs"]["stored"] == "complete"
    more = write_rows(tmp_path / "more.jsonl", [*FORGET, {"question": "Who?", "answer": "Nobody."}])
    for values, reason in (
        ({"dtype": "float32"}, "is of another dtype (stored bfloat16, now float32)"),
        ({"forget": more}, "data (1 of 7 sequences are not in it)"),
    ):
        plan = planned(capsys, command(files, tmp_path / "out", **shared, **values))
        assert reason in plan["reference"]["logprobs"]["stored"]
    (tmp_path / "cache" / "reference.safetensors").write_bytes(b"half")
    plan = planned(capsys, command(files, tmp_path / "out", **shared))
    assert "is damaged" in plan["reference"]["logprobs"]["stored"]


def test_mistakes(files, tmp_path, capsys):
    arguments = command(files, tmp_path / "out")
    assert "json: given, but without --dry-run" in refused(capsys, [*arguments, "--json"])
    assert "resume: given, but a dry run" in refused(capsys, [*arguments, "--dry-run", "--resume"])
    for values, message in (
        ({"model": "nowhere"}, "model: "),
        ({"forget": "/nowhere.jsonl"}, "forget: no file"),
        ({"lora": 4, "lora_targets": "xyz"}, "lora_targets: 'xyz' is no linear layer"),
        ({"epochs": 1, "batch_size": 9}, "warmup_epochs: 1.0 keeps the only step at a rate of 0"),
        ({"max_length": 5}, "more than max_length 5"),
    ):
        assert message in refused(capsys, [*command(files, tmp_path / "out", **values), "--dry-run"])
    assert not (tmp_path / "out").exists()


def test_what_the_run_would_refuse_of_the_model(files, tmp_path, capsys):
    """Tokens beyond the embedding, an adapter of a tied head that cannot be merged: seen without the weights."""
    small = tmp_path / "small"
    tiny_llama(vocab=300).save_pretrained(small)
    tiny_tokenizer().save_pretrained(small)
    tied = tiny_llama(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    tiny_tokenizer().save_pretrained(tmp_path / "tied")
    lora = {"model": tmp_path / "tied", "lora": 2, "lora_targets": "lm_head", "epochs": 1, "warmup_epochs": 0}
    assert cli.main(command(files, tmp_path / "out", **lora)) == 0
    for values, message in (
        ({"model": small}, "has the token "),
        ({"model": tmp_path / "out" / "model"}, "model: the head's adapter cannot be merged"),
    ):
        arguments = command(files, tmp_path / "new", **values)
        assert refused(capsys, [*arguments, "--dry-run"]) == refused(capsys, arguments)
        assert message in refused(capsys, [*arguments, "--dry-run"])


def test_rows_that_say_the_same_are_counted_each(files, tmp_path, capsys):
    twice = write_rows(tmp_path / "twice.jsonl", [FORGET[0], *FORGET])
    assert planned(capsys, command(files, tmp_path / "out", forget=twice))["sets"]["forget"]["rows"] == len(FORGET) + 1
    alternates = write_rows(tmp_path / "a.jsonl", [row | {"alternates": ["No.", "Yes."]} for row in FORGET])
    plan = planned(capsys, command(files, tmp_path / "out", method="altpo", forget=alternates))
    assert [plan["sets"][name]["rows"] for name in ("forget", "alternates")] == [len(FORGET), 2 * len(FORGET)]
