"""The command line: `freeguide COMMAND CONFIG.yaml key=value ...`, or `python -m cluster` with the same arguments.

Whatever a user gets wrong ends in one sentence on standard error and exit code 2, before a cluster is touched.
"""

import argparse
import atexit
import contextlib
import errno
import importlib.metadata
import logging
import math
import os
import platform
import re
import select
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

from freeguide.cluster.evaluation.extractors.roles import ROLES
from freeguide.cluster.runtime import ending
from freeguide.cluster.runtime.checks import contradictions
from freeguide.configs.checks import choices
from freeguide.configs.errors import ConfigError, UserError, visible
from freeguide.configs.load import SUFFIXES, find_config, load_config
from freeguide.configs.loopback import reach_loopback_directly
from freeguide.configs.schema import Config
from freeguide.configs.secrets import masked

COMMANDS = {
    "prepare": "write images as WebDataset shards with a manifest",
    "index": "write the manifest of WebDataset tars that are there already",
    "train": "train on a Ray cluster; run again to resume",
    "generate": "write a labelled set of samples as shards and .npz",
    "fit-evaluator": "train the small evaluator of the data set, where it has none, and say how to pin it",
    "evaluate": "measure FID and IS over w and write the report; run again to resume",
    "export": "write the averaged weights as one safetensors file with a card",
    "inspect": "print the resolved config, the network's size and what it costs",
}
EXAMPLES = {
    "prepare": "freeguide prepare image_folder data.path=photos data.uri=s3://bucket/photos",
    "index": "freeguide index image_folder data.uri=s3://bucket/tars data.shards='train-{0000..0999}.tar'",
    "train": "freeguide train image_folder data.uri=s3://bucket/photos run=s3://bucket/runs/photos train.steps=100000",
    "generate": "freeguide generate image_folder run=s3://bucket/runs/photos generate.w=0.5 generate.images=50000",
    "fit-evaluator": "freeguide fit-evaluator image_folder data.uri=s3://bucket/photos",
    "evaluate": "freeguide evaluate image_folder data.uri=s3://bucket/photos run=s3://bucket/runs/photos 'evaluate.w=[0,0.5,1]'",
    "export": "freeguide export image_folder run=s3://bucket/runs/photos",
    "inspect": "freeguide inspect digits, or for a run freeguide inspect s3://bucket/runs/photos",
    "score": "freeguide score samples.npz --extractor weights.safetensors --reference s3://bucket/photos --w 0.5",
    "demo": "freeguide demo train.steps=200",
}
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line of a worker twice
}
# What the machine refuses: no such place, no rights, no room, not that kind of file, too many of them.
_REFUSALS = {"ENOENT", "EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "ENAMETOOLONG", "ELOOP", "ENOTDIR", "EISDIR"}
_FULL = {"ENOSPC", "EDQUOT", "EFBIG"}  # met while writing, where the system does not say to which file
_REFUSALS |= {"EEXIST", "EMFILE", "ENFILE", "ENODEV", "ENXIO"}


def run() -> NoReturn:
    """`main` as a process of its own.

    Threads of Ray's core outlive `ray.shutdown`. Where the C library's own clean-up takes away what they use, the process dies of
    SIGSEGV after all is done and said, now and then. So a process that has used Ray leaves before it, after Python's clean-up.
    """
    code = 1  # of an error that nobody catches

    def leave() -> None:
        if "ray" in sys.modules:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or its reader has gone
                    stream.flush()
            os._exit(code)

    atexit.register(leave)  # the first that is registered is the last that is called
    try:
        code = main()
    except KeyboardInterrupt:
        code = ending.INTERRUPTED
        raise
    sys.exit(code)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a defect, 2 for what the user can mend; 130, 141, 143 if it was to stop."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files and classes may hold what a terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    for name, value in RAY_ENVIRONMENT.items():  # Ray reads these when it is imported
        os.environ.setdefault(name, value)
    reach_loopback_directly()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home that it may not write to, and uses another folder
    with ending.heard(), warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            code = _command(_parse(arguments))
            if ending.asked():  # too late to change what the command did, and what would follow it is not begun
                ending.leave()
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a reader that has gone does no harm
            return code
        except UserError as error:
            print(f"freeguide: error: {visible(str(error))}", file=sys.stderr)
            return 2
        except BrokenPipeError:
            if not _unread():
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes
            return 128 + signal.SIGPIPE
        except OSError as error:
            kind = errno.errorcode.get(error.errno or 0)
            if kind not in (_REFUSALS if error.filename is not None else _FULL):
                raise
            where = os.fsdecode(error.filename or f"{tempfile.gettempdir()} or {os.getcwd()}")
            print(f"freeguide: error: {visible(where)}: {error.strerror}", file=sys.stderr)
            return 2
        except (KeyboardInterrupt, SystemExit) as end:
            if not ending.asked():
                raise
            print(ending.GO_ON, file=sys.stderr)
            return ending.INTERRUPTED if isinstance(end, KeyboardInterrupt) else ending.TERMINATED


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a user reads it: without the line of the source that it comes from."""
    print(f"WARNING: {visible(str(message))}", file=sys.stderr, flush=True)


def _unread() -> bool:
    """Whether nobody reads our output any more, as after `freeguide inspect digits | head -1`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _command(options: argparse.Namespace) -> int:
    if options.command == "demo":
        from freeguide.cluster.jobs.demo import demo

        return demo(options.overrides, main)
    if options.command == "score":
        from freeguide.cluster.jobs.score import command

        command(options)
        return 0
    if options.command == "inspect" and _names_a_run(options.config):
        from freeguide.cluster.jobs.inspect import inspect_run

        if more := [*options.overrides, *(["--order"] if options.order else []), *(["--theory"] if options.theory else [])]:
            raise ConfigError(
                f"inspect {options.config}: of a run, {masked(more[0])} cannot be asked; give a config file, or the run alone"
            )
        inspect_run(options.config)
        return 0
    config = load_config(options.config, options.overrides, options.command, contradictions=contradictions)
    if getattr(options, "dry_run", False):
        options.command = "inspect"
    if getattr(options, "submit", None):
        return _submit(options, config)
    if options.command == "inspect":
        from freeguide.cluster.jobs.inspect import inspect

        inspect(config, order=getattr(options, "order", False), theory=getattr(options, "theory", None))
        return 0
    from freeguide.cluster.runtime.folders import temporary

    with temporary():
        _job(options.command)(config)
    return 0


def _job(command: str) -> Callable[[Config], object]:
    # Imported here: `freeguide --help` and a wrong key should not wait for torch and ray.
    if command == "prepare":
        from freeguide.cluster.jobs.prepare import prepare

        return prepare
    if command == "index":
        from freeguide.cluster.jobs.prepare import index

        return index
    if command == "train":
        from freeguide.cluster.jobs.train import train

        return train
    if command == "generate":
        from freeguide.cluster.jobs.generate import generate

        return generate
    if command == "fit-evaluator":
        from freeguide.cluster.jobs.fit_evaluator import fit_evaluator

        return fit_evaluator
    if command == "evaluate":
        from freeguide.cluster.jobs.evaluate import evaluate

        return evaluate
    from freeguide.cluster.jobs.export import export

    return export


def _names_a_run(name: str) -> bool:
    """Whether `freeguide inspect NAME` means a run: a URI or a folder. A bare word that is neither is the name of a config."""
    return not (name.endswith(SUFFIXES) or Path(name).is_file()) and (name != Path(name).name or Path(name).is_dir())


def _submit(options: argparse.Namespace, config: Config) -> int:
    from freeguide.cluster.runtime.submit import submit

    code = submit(options.submit, options.command, find_config(options.config), options.overrides)
    if code == 0 and options.command == "evaluate":
        from freeguide.cluster.jobs.evaluate import fetch_report

        try:
            print(f"report: {fetch_report(config)}/index.html")
        except UserError as error:
            print(f"the report stays with the run: {error}", file=sys.stderr)
    return code


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if wrong := next((word for word in rest if word.startswith("-")), None):
        parser.error(f"unrecognized arguments: {wrong}", options.command)
    options.overrides += rest  # overrides may also follow an option; argparse alone stops at the first
    if getattr(options, "screen", False):
        options.overrides.append("evaluate.screen=-1")  # as an override it travels with --submit
    return options


class _Parser(argparse.ArgumentParser):
    """What is wrong with a command line is one sentence, as is all that a user gets wrong. Commands have such parsers, too."""

    def error(self, message: str, command: str = "") -> NoReturn:
        """Raises ConfigError; `command` is the one that was given, if this is not its own parser."""
        of = self._of(command) if command else self
        if found := re.match(r"argument COMMAND: invalid choice: '([^']*)'", message):
            message = f"unknown command {found[1]}; {choices('commands', found[1], [*EXAMPLES])}"
        elif found := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            known = [name for action in of._actions for name in action.option_strings if name.startswith("--")]
            message = f"unknown option {found[1]}; {choices('options', found[1], known)}"
        raise ConfigError(f"{message}; see `{of.prog} --help`")

    def _of(self, command: str) -> "_Parser":
        every = next(action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        return cast(_Parser, every.choices[command])


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return value


_SCORE = "Measure images that anyone made, with the same rows as `evaluate`. docs/evaluation.md says what compares with what."


def _add_score(command: argparse.ArgumentParser) -> None:
    command.add_argument("samples", help="an .npz with arr_0 (and labels arr_1), a folder of images, or shards with a manifest")
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="fact=value", help="what is known of their maker: steps=256 v=0.3 ..."
    )
    command.add_argument("--extractor", required=True, help="weights of the feature network: Inception, or an own evaluator")
    command.add_argument("--extractor-hash", default="", help="the sha256 that those weights have to have")
    command.add_argument("--reference", required=True, help="the real images: a data set with a manifest, or an .npz of statistics")
    for role, wanted in ROLES.items():
        command.add_argument(f"--{role}", default="", help=f"{wanted.title} weights, for {wanted.gives} beside the rest")
        command.add_argument(f"--{role}-hash", default="", help="the sha256 that those weights have to have")
        command.add_argument(f"--{role}-reference", default="", help=f"{wanted.title} statistics of the real images")
    command.add_argument("--dataset", default="", help="name of the data set, as tables call it")
    command.add_argument("--name", default="", help="name of the row")
    command.add_argument(
        "--class-depth", type=int, choices=range(9), default=1, metavar="N", help="levels down to the class folders; 0 = no classes"
    )
    command.add_argument("--w", type=_finite, default=0.0, help="guidance weight that the images were made with")
    command.add_argument("--device", default="cpu", help="cpu or cuda")
    command.add_argument("--json", default="", help="a file to write the row to")
    command.add_argument("--request-payer", action="store_true", help="read from buckets for which those who read them pay")
    command.add_argument("--unsigned", action="store_true", help="read from S3 without credentials, although there may be some")


class _Help(argparse.HelpFormatter):
    """An example stands on one line, however long, so that it can be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("Example: ") else super()._fill_text(text, width, indent)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        stands_on = ", ".join(f"{name} {_version(name, 'missing')}" for name in ("torch", "ray", "deepspeed"))
        print(f"freeguide {_version('freeguide', 'source')} (Python {platform.python_version()}, {stands_on})")
        parser.exit()


def _version(distribution: str, otherwise: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return otherwise


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: Any, *__: object) -> None:
        import shtab

        print(shtab.complete(parser, shell))
        parser.exit()


_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}  # what shtab calls files
_DEMO = (
    "Prepare, train and evaluate scikit-learn's 1 797 handwritten digits on this machine: minutes on 2 cores, no GPU, no account. "
    "It writes to the working folder: the report to runs/digits/, and the objects of its own S3 server to runs/.s3/. If you "
    "interrupt it, the same command goes on; if all is there, nothing is done twice."
)


def _parser() -> _Parser:
    parser = _Parser(
        prog="freeguide",
        description="Train and measure classifier-free-guidance diffusion models on clusters.",
        epilog="Begin with `freeguide demo`. Each command has an example: `freeguide COMMAND --help`.",
        fromfile_prefix_chars="@",  # @FILE stands for the arguments in it, one a line: so they come to a submitted job
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print the versions of freeguide and of what it needs, and stop"
    )
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="print the script with which this shell completes commands, options and files, and stop",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = _add(commands, name, text)
        what = "a YAML file, or the name of a config that comes with freeguide (`freeguide inspect digits` shows all options)"
        config = command.add_argument(
            "config", metavar="CONFIG", help=what + ("; or the URI of a run" if name == "inspect" else "")
        )
        config.complete = _FILES  # type: ignore[attr-defined]
        command.add_argument(
            "overrides",
            nargs="*",
            default=[],
            metavar="key=value",
            help="options that win over the file, for example train.lr=1e-4",
        )
        if name == "inspect":
            command.add_argument(
                "--order", action="store_true", help="measure how well the order of the data set at data.uri mixes"
            )
            command.add_argument("--theory", metavar="PNG", help="draw the paper's figure 2 beside what Algorithm 2 samples")
        else:
            command.add_argument(
                "--submit",
                metavar="URL",
                help="run as a job on the Ray cluster whose dashboard is at URL (http://HEAD:8265) and follow it",
            )
            command.add_argument("--dry-run", action="store_true", help="print what would run and what it costs, and stop")
        if name == "evaluate":
            command.add_argument(
                "--screen", action="store_true", help="look at every w with a tenth of the images first (evaluate.screen=-1)"
            )
    _add_score(_add(commands, "score", "measure anyone's images: .npz, a folder, or shards", _SCORE))
    command = _add(commands, "demo", "train and measure on real handwritten digits, on this machine", _DEMO)
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="options that win over configs/digits.yaml")
    return parser


def _add(commands: Any, name: str, text: str, description: str = "") -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=description or text, epilog=f"Example: {EXAMPLES[name]}", formatter_class=_Help
    )
    return command
