"""The command line: `unlearn demo | plan | train | reference | alternates | eval | muse | metrics | report`.

Errors are one line; --help is meant to be read. Each command is a module of unlearn.commands and imports what it needs
when it runs, so that `unlearn --help` answers before torch could be loaded.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from unlearn import __version__
from unlearn.commands import alternates, demo, evaluate, metrics, muse, plan, report, train

_EXAMPLES = """examples:
  unlearn demo                                     the whole story on an invented corpus, no download
  unlearn train --recipe tofu-npo-rt --model ./my-model --output out \\
                --forget forget.jsonl --retain retain.jsonl
  unlearn eval --model out/model --forget forget_perturbed.json --retain retain_perturbed.json
  unlearn report out --output report.html"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for a run that failed, 2 for wrong input, 130 for Ctrl-C."""
    try:
        args = _parser().parse_args(argv)
        # One tokenizer thread pool beside torch's threads, and no warning about forks, on two cores.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return int(args.run(args) or 0)
    except ValueError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        where = "of train from the last checkpoint (--save-every), of alternates from the last batch"
        return _fail(f"stopped by Ctrl-C; --resume goes on: {where}", 130)
    except BrokenPipeError:  # `unlearn eval | head`: nobody reads on, and the exit's flush must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        return _fail(f"{error.filename}: {reason}" if error.filename else reason, 1)
    except Exception as error:
        from safetensors import SafetensorError

        from unlearn.memory import is_out_of_memory

        if is_out_of_memory(error):
            less = "a smaller --max-tokens, or (train) --gradient-checkpointing or --tile-tokens, needs less"
            return _fail("; ".join([str(error), *getattr(error, "__notes__", []), less]), 1)
        if isinstance(error, (RuntimeError, SafetensorError)):  # NonFiniteError, InvariantError, what torch raises
            return _fail(f"{type(error).__name__}: {error}", 1)
        raise


def _fail(message: str, status: int) -> int:
    """One line, whatever the message was."""
    print("unlearn: error:", " ".join(message.split()), file=sys.stderr)
    return status


class _Help(argparse.RawDescriptionHelpFormatter):
    """No line ends inside a name with hyphens: what is copied from --help works."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


class _Parser(argparse.ArgumentParser):
    """Raises ValueError instead of printing the usage; `ending` is called when --help is asked for, not before."""

    def __init__(self, *, ending: Callable[[], str] = str, **kwargs: Any) -> None:
        # no abbreviations: half an option's name must not become another one's value with the next version
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)
        self.ending = ending

    def format_help(self) -> str:
        self.epilog = self.ending()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help lists what is accepted)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="unlearn",
        description="Make a language model forget: NPO, SimNPO, AltPO and relatives, exactly, on one GPU or a CPU.",
        ending=lambda: _EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"unlearn {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (demo, plan, train, alternates, evaluate, muse, metrics, report):
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
