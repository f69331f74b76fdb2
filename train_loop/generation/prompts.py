"""Where the prompts of `train-loop sample` come from: options, a file, standard input, or the keyboard."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from train_loop.console import say
from train_loop.errors import InputError, Interrupted, one_line
from train_loop.signals import StopRequest


def read_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """All prompts that were given; if there are none, standard input is the prompt. InputError if there is none.

    A file has one prompt per line, or if it ends in .jsonl, in each line's "prompt"; "-" is standard input.
    """
    found = list(prompts)
    if file is not None:
        found += _lines(file)
    elif not found and not sys.stdin.isatty() and (text := _text("-")):
        found = [text.removesuffix("\n")]
    if not found:
        cure = "give --prompt TEXT, --prompts FILE, text on standard input, or --interactive"
        raise InputError(f"no prompt to continue; {cure}")
    return found


def _text(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        if file == "-" and isinstance(error, OSError):  # standard input is closed
            return ""
        name = "standard input" if file == "-" else file
        raise InputError(f"--prompts {name}: cannot be read as text ({one_line(error)})") from None


def _lines(file: str) -> Iterator[str]:
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        if not file.endswith(".jsonl"):
            yield line
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise InputError(f'--prompts {file}, line {number}: expected an object like {{"prompt": "text"}}')
        yield prompt


def converse(answer: Callable[[str], None]) -> None:
    """Answer what is typed, line by line, until the end of the input.

    Lines can be edited, and earlier ones recalled. Ctrl-C stops a text, Ctrl-D quits. If there is something wrong with
    a prompt, it says so and asks for the next one.
    """
    try:
        import readline  # noqa: F401  (importing it gives `input` editing and history)
    except ImportError:  # not on every platform
        pass
    terminal = sys.stdin.isatty()
    if terminal:
        say("type a prompt (\\n is a line break); Ctrl-C stops a text, Ctrl-D quits")
    while True:
        try:
            with StopRequest():
                prompt = input("> " if terminal else "").replace("\\n", "\n")
                if prompt:
                    answer(prompt)
        except EOFError:
            return
        except KeyboardInterrupt as error:
            if isinstance(error, Interrupted) and error.name != "SIGINT":
                raise
            print()
        except InputError as error:
            say(f"train-loop: {error}")
