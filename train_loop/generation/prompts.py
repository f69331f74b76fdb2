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
    elif not found and not _is_terminal() and (text := _text("-")):
        found = [text.removesuffix("\n").removesuffix("\r")]
    if not found and file is not None:
        raise InputError(f"--prompts {file}: has no prompt; write one on each line")
    if not found:
        cure = "give --prompt TEXT, --prompts FILE, text on standard input, or --interactive"
        raise InputError(f"no prompt to continue; {cure}")
    return found


def _text(file: str) -> str:
    """The text of a file, or of standard input, without the mark (BOM) that some programs put before it."""
    name = "standard input" if file == "-" else f"--prompts {file}"
    try:
        content = _standard_input() if file == "-" else Path(file).read_bytes()
        text = content if isinstance(content, str) else content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 at byte {error.start}; convert it, e.g. with iconv -t UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: no path can have a NUL in it
        raise InputError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or one_line(error)})") from None
    if (at := text.find("\0")) >= 0:
        raise InputError(f"{name}: character {at + 1} is NUL, so this is no text")
    return text.removeprefix("\ufeff")


def _standard_input() -> bytes | str:
    """All of standard input; nothing if it is closed."""
    if sys.stdin is None or sys.stdin.closed:
        return b""
    try:
        return sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read()
    except OSError:
        return b""


def _lines(file: str) -> Iterator[str]:
    # Only line feeds end lines, also after carriage returns: str.splitlines would cut at form feeds and U+2028, too.
    for number, line in enumerate(_text(file).replace("\r\n", "\n").split("\n"), 1):
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


def _is_terminal() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def converse(answer: Callable[[str], None]) -> None:
    """Answer what is typed, line by line, until the end of the input.

    Lines can be edited, and earlier ones recalled. Ctrl-C stops a text, Ctrl-D quits. If there is something wrong with
    a prompt, it says so and asks for the next one.
    """
    try:
        import readline  # noqa: F401  (importing it gives `input` editing and history)
    except ImportError:  # not on every platform
        pass
    terminal = _is_terminal()
    if terminal:
        say("type a prompt (\\n is a line break); Ctrl-C stops a text, Ctrl-D quits")
    while sys.stdin is not None and not sys.stdin.closed:
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
        except UnicodeDecodeError as error:
            say(f"train-loop: prompt: not UTF-8 ({error.reason})")
