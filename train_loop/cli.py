"""The commands: `train-loop X` and `python -m train_loop X` are the same.

Results go to stdout, progress and logs to stderr. Exit codes: 0 done, 2 a mistake in the input (one line), 3 stopped
early by a signal (with a checkpoint written, once there was something to save), 141 nobody reads the output any more,
1 anything else. Only the commands that need torch import it, so help and mistakes in a configuration show up at once.
"""

import dataclasses
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from train_loop import environment, launchers, versions
from train_loop.config.arguments import Parser, bytes_of, number_of, path_of
from train_loop.config.load import config_from_arguments
from train_loop.config.parsing import documented, help_text
from train_loop.config.sampling import Sampling
from train_loop.config.schema import Config
from train_loop.console import shown
from train_loop.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_NO_READER,
    InputError,
    Interrupted,
    LostError,
    TrainingError,
    printable,
)
from train_loop.files import unwritable, write_output
from train_loop.records import to_json
from train_loop.signals import StopRequest, exit_code
from train_loop.streams import OutputError, unbreakable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    launchers.translate()  # one line on each host is enough, also for a mistake in the command line
    given = list(sys.argv[1:] if arguments is None else arguments)
    only_prints = given[:1] != ["train"] or bool({"-h", "--help"} & set(given))  # a run goes on without its output
    with unbreakable(strict=only_prints) as rest_of_output:
        try:
            code = _run(given)
        except OutputError:
            code = EXIT_FAILED
        except SystemExit:  # argparse's --help
            if rest_of_output() is None:
                raise
            code = EXIT_FAILED
        if (failure := rest_of_output()) is None:
            return code
        no_reader = failure.errno == errno.EPIPE  # it has seen enough, as in `train-loop train --help | head`
        if not no_reader:
            _complain(f"standard output cannot be written ({failure.strerror})")
        return code if not only_prints else EXIT_NO_READER if no_reader else EXIT_FAILED


def _run(given: list[str]) -> int:
    try:
        for argument in given:
            if not argument.isascii() and any("\ud800" <= letter <= "\udfff" for letter in argument):
                encoding = sys.getfilesystemencoding().upper()
                raise InputError(f"command line: {argument!a} is no text in {encoding}, this terminal's encoding")
        if not given or given[0] in ("-h", "--help"):
            print(_overview())
            return EXIT_DONE if given else EXIT_BAD_INPUT
        if given[0] == "--version":
            print(f"train-loop {versions.__version__}")
            return EXIT_DONE
        if given[0] not in COMMANDS:
            raise InputError(f"unknown command {given[0]}; commands: {', '.join(COMMANDS)}")
        with StopRequest():
            return COMMANDS[given[0]](given[1:])
    except LostError as error:
        _complain(error, error.speaks)
        # Leave at once: the interpreter's usual end would wait for the lost process.
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(EXIT_FAILED)
    except (InputError, TrainingError) as error:
        _complain(error)
        return EXIT_BAD_INPUT if isinstance(error, InputError) else EXIT_FAILED
    except RuntimeError as error:
        if "torch" not in sys.modules:
            raise
        from train_loop.devices import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _complain(
            "out of memory; lower batch.micro_batch_size (or set it to auto) or evaluation.batch_size, or use "
            "--model.activation_checkpointing full; the same command continues from the last checkpoint",
            speaks=True,  # whichever process it happened on
        )
        return EXIT_FAILED
    except (AttributeError, ImportError, TypeError) as error:
        if (reason := versions.too_new(error)) is None:
            raise
        _complain(reason)
        return EXIT_BAD_INPUT
    except Interrupted as stop:
        _complain(f"{stop}; the same command starts again")
        return exit_code()
    except KeyboardInterrupt:
        _complain("interrupted")
        return EXIT_FAILED


def _complain(error: object, speaks: bool | None = None) -> None:
    # Launchers start the command once per process: one line on each host is enough.
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank == "0" or not re.fullmatch("[0-9]{1,6}", rank) if speaks is None else speaks:
        line = printable(" ".join(str(error).split()))
        print(f"train-loop: {line if len(line) <= 2000 else f'{line[:2000]}...'}", file=sys.stderr, flush=True)


def _overview() -> str:
    lines = ["usage: train-loop COMMAND [options]", "", "commands:"]
    lines += [f"  {name:9} {command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items() if command.__doc__]
    lines += ["", "train-loop COMMAND --help says more; every setting can be given as --section.key value."]
    return "\n".join(lines)


def _wants_help(arguments: list[str], command: str, usage: str) -> bool:
    if not {"-h", "--help"} & set(arguments):
        return False
    print(f"usage: train-loop {command} {usage}\n\n{COMMANDS[command].__doc__}\n\nsettings:\n{help_text(Config)}")
    return True


def _ready_libraries() -> None:
    """Check the libraries' versions, and silence all but their errors: their notes would drown out ours."""
    versions.check()
    environment.check()
    # Datasets reads this when it is loaded; loading it takes a second and is not always needed.
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def prepare(arguments: list[str]) -> int:
    """Turn documents into a token store, once; prints the ledger."""
    if _wants_help(arguments, "prepare", "--config FILE [--section.key value ...]"):
        return EXIT_DONE
    config = config_from_arguments(arguments)
    _ready_libraries()
    from train_loop.data import documents

    prepared = documents.prepare(config)
    print(to_json({"folder": str(prepared.folder)} | prepared.ledger(), indent=2))
    return EXIT_DONE


def train(arguments: list[str]) -> int:
    """Do the whole job: prepare, train (resuming automatically), evaluate, sample, export; prints a summary."""
    if _wants_help(arguments, "train", "--config FILE [--section.key value ...]"):
        return EXIT_DONE
    config = config_from_arguments(arguments)
    _ready_libraries()
    from train_loop import job

    summary = job.train(config)
    if summary.is_main_process:
        _print_summary(summary, config)
    return exit_code() if summary.stopped else EXIT_DONE


def _print_summary(summary: Any, config: Config) -> None:
    if summary.stopped:
        print(f"stopped by {summary.stopped} at step {summary.step} of {summary.total_steps}; the same command resumes")
    if (last := summary.evaluation) is not None:
        ledger = summary.ledger["validation"]
        if summary.exported_step is not None and config.export.from_ == "best":
            print(f"best step        {summary.exported_step} of {summary.step}")
        # It may come from a log that has lost something.
        tokens = f"{last['tokens']:,}" if isinstance(last.get("tokens"), int) else "an unknown number of"
        print(f"validation loss  {shown(last['loss'])} nats per token, over {tokens} tokens")
        print(f"perplexity       {shown(last.get('perplexity'), 3)}")
        gzip = 8 * ledger["gzip_bytes"] / ledger["bytes"]
        print(f"bits per byte    {shown(last.get('bits_per_byte'))} (gzip -9: {gzip:.4f})")
        print(f"accuracy         {shown(last.get('accuracy'))}")
    if not summary.stopped:
        print(f"model            {summary.model_folder}" + (f" and {summary.hub}" if summary.hub else ""))


def evaluate(arguments: list[str]) -> int:
    """Evaluate a model exactly on the configured validation data; prints one JSON object."""
    if _wants_help(arguments, "evaluate", "--model FOLDER_OR_ID --config FILE [--section.key value ...]"):
        return EXIT_DONE
    parser = Parser(evaluate, add_help=False)
    parser.add_argument("--model", type=path_of("--model"), metavar="FOLDER_OR_ID", required=True)
    given, rest = parser.parse_known_args(arguments)
    config = config_from_arguments(rest)
    _ready_libraries()
    from train_loop import job

    metrics = job.evaluate(given.model, config)
    if os.environ.get("RANK", "0") == "0":
        print(to_json(metrics))
    return EXIT_DONE


def sample(arguments: list[str]) -> int:
    """Continue prompts with temperature, top-k and top-p; prints the text, streamed for one prompt."""
    parser = Parser(sample)
    option = parser.add_argument
    named = "model folder, Hub name, or a run or one of its checkpoints"
    option("--model", type=path_of("--model"), metavar="MODEL", required=True, help=named)
    option("--prompt", action="append", default=[], help="text to continue; may be repeated")
    lines = "a prompt per line, or in .jsonl each line's prompt; - is standard input"
    option("--prompts", type=path_of("--prompts"), metavar="FILE", help=lines)
    option("--interactive", action="store_true", help="ask for prompts")
    _, meanings = documented(Sampling)
    for each in dataclasses.fields(Sampling):
        meaning = meanings[each.name].rstrip(".")
        kind: dict[str, Any] = {
            "default": each.default,
            "help": f"{meaning} ({each.default})",
            "type": number_of(each.type),
        }
        if each.type is bool:
            kind = {"action": "store_true", "help": meaning}
        elif each.type == tuple[str, ...]:
            kind = {"action": "append", "metavar": "TEXT", "default": [], "help": meaning}
        elif each.type == tuple[int, ...]:
            kind = {"type": number_of(int), "nargs": "+", "metavar": "ID", "default": [], "help": meaning}
        option(f"--{each.name}", **kind)
    option(
        "--batch_size", type=number_of(int), default=8, help="how many texts grow together; does not change them (8)"
    )
    option("--json", action="store_true", help="print one JSON object per prompt")
    given = parser.parse_args(arguments)
    if given.interactive and (given.prompt or given.prompts or given.json):
        raise InputError("--interactive asks for prompts and shows texts: leave out --prompt, --prompts and --json")
    if given.log_probabilities and not given.json:
        raise InputError("--log_probabilities appear only in JSON; add --json")
    if given.batch_size < 1:
        raise InputError(f"--batch_size {given.batch_size}: must be at least 1")
    from train_loop.generation.prompts import converse, read_prompts

    prompts = [] if given.interactive else read_prompts(given.prompt, given.prompts)
    _ready_libraries()
    from train_loop.generation import sampler

    settings: dict[str, Any] = {each.name: getattr(given, each.name) for each in dataclasses.fields(Sampling)}
    settings |= {key: tuple(each) for key, each in settings.items() if isinstance(each, list)}
    sampling = Sampling(**settings)
    loaded = sampler.Sampler.load(given.model)

    def write(text: str) -> None:
        print(text, end="", flush=True)

    def continue_(prompts: list[str]) -> None:
        stream = len(prompts) == 1 and sampling.samples == 1 and not given.json
        found = loaded.sample(prompts, sampling, given.batch_size, write if stream else lambda text: None)
        if stream:
            write(prompts[0])
        for number, (prompt, continuations) in enumerate(zip(prompts, found, strict=True)):
            if given.json:
                print(sampler.as_json(prompt, continuations, loaded.tokenizer), flush=True)
            elif stream:
                print()
            else:
                print("\n" * (number > 0) + "\n\n".join(prompt + each.text for each in continuations), flush=True)

    if given.interactive:
        converse(lambda prompt: continue_([prompt]))
    else:
        continue_(prompts)
    return EXIT_DONE


def inspect(arguments: list[str]) -> int:
    """Replay a step of a run: its documents, each token's loss, gradients and update; prints a table."""
    parser = Parser(inspect)
    option = parser.add_argument
    option(
        "--run",
        type=path_of("--run"),
        metavar="FOLDER",
        required=True,
        help="folder of the run; nothing is written to it",
    )
    option("--step", type=number_of(int), required=True, help="number of the step, from 1, as in metrics.jsonl")
    option("--compare", type=number_of(int), metavar="STEP", help="another step, to show side by side")
    changed = "show the step with another setting, too (optimizer.learning_rate=1e-4, dropout=0); repeat it for several"
    option("--set", action="append", default=[], metavar="KEY=VALUE", help=changed)
    option("--json", action="store_true", help="print one JSON object per step, with everything")
    option("--html", type=path_of("--html"), metavar="FILE", help="also write a page")
    given = parser.parse_args(arguments)
    if given.compare is not None and given.set:
        raise InputError("inspect: --compare shows another step, --set the same step changed; give only one of them")
    keys = [each.partition("=")[0] for each in given.set]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise InputError(f"inspect: --set {repeated[0]} is given twice; drop one of the two")
    steps = [given.step] if given.compare is None else [given.step, given.compare]
    if given.html and (reason := unwritable(Path(given.html))):
        raise InputError(f"--html {given.html}: cannot be written ({reason})")
    _ready_libraries()
    from train_loop import job
    from train_loop.analysis import inspection

    replay = job.replay(Path(given.run), steps)
    with replay.heartbeat.naming_failures():
        if given.set:
            found = replay.instead(given.step, given.set)
        else:
            replayed = {step: replay.step(step) for step in sorted(set(steps))}
            found = [replayed[step] for step in steps]
        replay.run.context.accelerator.end_training()
    verdicts = [each["verification"]["verdict"] for each in found if each["verification"]]
    code = EXIT_FAILED if "different" in verdicts else EXIT_DONE
    if os.environ.get("RANK", "0") != "0":
        return code
    if given.html:
        title = f"{Path(given.run).resolve().name}, step {' and '.join(map(str, steps))}"
        try:
            write_output(Path(given.html), inspection.page(found, title))
        except OSError as error:
            raise InputError(f"--html {given.html}: cannot be written ({error.strerror})") from None
    if given.json:
        for each in found:
            print(to_json(each))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(inspection.lines(found, colour))
    return code


def report(arguments: list[str]) -> int:
    """Show what happened in one or several runs, on one page; prints the page's path."""
    parser = Parser(report)
    option = parser.add_argument
    several = "folder of a run; repeat it to compare runs"
    option("--run", type=path_of("--run"), metavar="RUN", action="append", required=True, help=several)
    option(
        "--output", type=path_of("--output"), metavar="FILE", help="the page (report.html in the first run's folder)"
    )
    pictures = "also draw each figure as a PNG into this folder; needs matplotlib"
    option("--png", type=path_of("--png"), metavar="FOLDER", help=pictures)
    option(
        "--serve", metavar="PORT", type=number_of(int), help="serve the page on 127.0.0.1, updated while a run goes on"
    )
    given = parser.parse_args(arguments)
    if given.serve is not None and (given.output or given.png):
        raise InputError("--serve shows a page without writing it: leave out --output and --png")
    from train_loop.report import figures, html_page, server
    from train_loop.report.page_data import gather
    from train_loop.report.run_reader import RunFiles

    runs = [RunFiles(run) for run in given.run]
    if given.serve is not None:
        server.serve(runs, given.serve, lambda address: print(address, flush=True))
        return EXIT_DONE
    data, page = gather(runs), Path(given.output or runs[0].folder / "report.html")
    drawn = figures.write(data, Path(given.png)) if given.png else []
    html_page.write(data, page)
    print(page, *drawn, sep="\n")
    return EXIT_DONE


def estimate(arguments: list[str]) -> int:
    """Tell what memory a run takes on each process, before its model is built, and what fits; prints a table."""
    parser = Parser(estimate, add_help=False)
    option = parser.add_argument
    option("--processes", type=number_of(int), metavar="W", default=1)
    option("--sharding", choices=("none", "fsdp2", "hsdp"))
    option("--gpu_memory", type=bytes_of, metavar="80GB")
    option("--json", action="store_true")
    usage = "--config FILE [--processes W] [--sharding none|fsdp2|hsdp] [--gpu_memory 80GB] [--json]"
    if _wants_help(arguments, "estimate", f"{usage} [--section.key value ...]"):
        return EXIT_DONE
    given, rest = parser.parse_known_args(arguments)
    if not 1 <= given.processes <= 2**20:
        raise InputError(f"--processes {given.processes}: must be at least 1")
    if given.processes == 1 and given.sharding == "hsdp":
        raise InputError("--sharding hsdp: needs several hosts; give --processes, too")
    config = config_from_arguments(rest)
    _ready_libraries()
    from train_loop.analysis import estimate as planning

    found = planning.run(config, given.processes, given.sharding, given.gpu_memory)
    print(to_json(found, indent=2) if given.json else planning.lines(found))
    return EXIT_DONE


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    command.__name__: command for command in (prepare, train, evaluate, sample, inspect, report, estimate)
}
