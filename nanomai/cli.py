"""The command line: a thin skin over the calls that notebooks and tests use.

Settings of a configuration are flags of `train` and `prepare`, under their dotted names; the other commands list their
few options in options.py. torch is imported by the command that needs it, so help is instant.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from nanomai.config import Config, ConfigError
from nanomai.options import Eval, Export, Import, Plan, Sample, Simulate

USAGE = """\
usage: nanomai COMMAND ...

Train a language model, from a notebook-sized one to a 500B configuration, with one code path.

commands:
  train CONFIG [--SECTION.FIELD VALUE ...]    train a model; CONFIG is a name in scale_configs/, a YAML
                                              file, or the folder of a run to go on with
  sample RUN [--prompt TEXT ...]              let a trained model write
  eval RUN [--text FILE]                      loss and bits per byte, on the validation split or on a text of yours
  prepare CONFIG [--SECTION.FIELD VALUE ...]  only make the tokenizer and the token shards
  plan CONFIG [--gpus N] [--gpu h100]         memory, time and money of a run before it is started
  simulate CONFIG --world-size N              what one step of N ranks needs, without any of them
  import DIR OUT                              make a run of a Hugging Face folder
  export RUN OUT                              make a Hugging Face folder of a run

begin with:
  nanomai train nano                          a small model of Python code, in about three minutes on two CPU cores
  nanomai COMMAND --help                      every option of a command

under torchrun:  torchrun --nproc_per_node=2 -m nanomai train nano
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. Expected errors are one line, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Read when torch loads. Threads that wait for work must not spin: beside another busy process that made a step on
    # two threads ten times slower than on one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows question marks, and goes on
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    try:
        status = _command(arguments[0])(arguments[1:])
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush does not fail
        return 0
    except Exception as error:
        if getattr(error, "is_said_elsewhere", False):  # by another rank of this job
            return 1
        if _is_expected(error):
            by_the_system = isinstance(error, OSError)
            return _fail(f"{error.filename or 'a file'}: {error.strerror}" if by_the_system else str(error))
        raise


def _command(name: str) -> Callable[[list[str]], int]:
    if name in COMMANDS:
        return COMMANDS[name]
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(COMMANDS)}"
    raise ConfigError(f"no command {name!r}{hint}")


def _is_expected(error: Exception) -> bool:
    """Errors whose message is written for the person at the terminal."""
    is_ours = type(error).__module__.startswith("nanomai.")
    return is_ours or (isinstance(error, OSError) and error.strerror is not None)


def _fail(message: str, status: int = 1) -> int:
    rank = os.environ.get("RANK", "0")
    if "RANK" in os.environ:
        from nanomai.parallel.launch import is_first_to_say

        if not is_first_to_say(message):
            return status
    print(f"nanomai{'' if rank == '0' else f' (rank {rank})'}: {message}", file=sys.stderr)
    return status


def _config(command: str, arguments: list[str]) -> Config:
    """CONFIG and its overrides: the file's values are the defaults of the flags."""
    from nanomai.config_file import load_config

    if not arguments or arguments[0].startswith("-"):
        if not {"-h", "--help"} & set(arguments):
            raise ConfigError(f"which configuration? `nanomai {command} nano`, or a YAML file")
        arguments = ["nano", *arguments]
    name, *flags = arguments
    saved = Path(name) / "config.yaml"
    is_run = saved.is_file()
    default = load_config(saved, **{"train.run_dir": name, "train.resume": False}) if is_run else load_config(name)
    description = f"Settings of {name}, each with its value there. Change any of them by its flag."
    return _read_flags(Config, flags, f"nanomai {command} {name}", default=default, description=description)


def _read_flags(kind: type, arguments: list[str], prog: str, **options):
    """An instance of the dataclass `kind` from its flags. tyro's box of complaints becomes one line."""
    import tyro

    markers = (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, args=arguments, prog=prog, config=markers, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [line.strip("│ ").strip("╭─╮╰╯") for line in box.getvalue().splitlines()[1:]]  # without the title
        below = itertools.dropwhile(lambda line: not line.strip("-"), lines)
        message = " ".join(itertools.takewhile(lambda line: line.strip("-"), below))
        offered = [line.split()[0] for line in lines if line.startswith("--") and line.strip("-")]
        unknown = next((word.rstrip(",") for word in message.split() if word.startswith("--")), "")
        near = difflib.get_close_matches(unknown, offered, n=1)  # tyro's own order puts a longer name first
        hint = f"; did you mean {near[0]}?" if near and message.startswith("Unrecognized") else ""
        raise ConfigError(message.removeprefix("Error parsing ").removeprefix(f"{kind.__name__}: ") + hint) from None


def _train(arguments: list[str]) -> int:
    config = _config("train", arguments)
    from nanomai.trainer import train

    return 0 if train(config).finished else 130


def _prepare(arguments: list[str]) -> int:
    config = _config("prepare", arguments)
    from nanomai.preparation import prepare

    prepared = prepare(config.data, config.model.vocab_size)
    print(f"{prepared.folder}: tokenizer of {prepared.tokenizer.vocab_size} tokens, {_splits(prepared.manifest)}")
    return 0


def _splits(manifest: dict) -> str:
    return ", ".join(f"{sum(source['splits'][split]['tokens'] for source in manifest['sources']):,} {split} tokens"
                     for split in ("train", "val"))


def _sample(arguments: list[str]) -> int:
    options = _parse(Sample, arguments, "sample")
    from nanomai.machine import pick_device
    from nanomai.runs import load_run
    from nanomai.sampling import stream_text

    model, tokenizer, config = load_run(options.run, pick_device(options.device))
    length, context = len(tokenizer.encode(options.prompt)) + 1, config.model.context_length
    if length >= context:
        print(f"nanomai: the prompt has {length} tokens and the context {context}: its end is used", file=sys.stderr)
    for i in range(options.samples):
        if options.samples > 1:
            print(f"--- {i + 1} ---")
        print(options.prompt, end="", flush=True)
        seed = None if options.seed is None else options.seed + i
        for piece in stream_text(model, tokenizer, options.prompt, options.max_tokens, temperature=options.temperature,
                                 top_k=options.top_k, top_p=options.top_p, min_p=options.min_p,
                                 repetition_penalty=options.repetition_penalty, seed=seed):
            print(piece, end="", flush=True)
        print()
    return 0


def _eval(arguments: list[str]) -> int:
    options = _parse(Eval, arguments, "eval")
    from nanomai.checkpoint import newest, read_state
    from nanomai.evaluation import compressed_bits_per_byte, evaluate, evaluate_text, validation_text
    from nanomai.machine import pick_device
    from nanomai.preparation import prepare
    from nanomai.runs import find_run, load_run

    model, tokenizer, config = load_run(options.run, pick_device(options.device))
    if options.text:
        text = _read_text(options.text)
        result, text = evaluate_text(model, tokenizer, text), text.encode()
    else:
        data = read_state(newest(find_run(options.run) / "checkpoints")[0])["data"]
        if data is None:
            raise ConfigError(f"{options.run} was imported, so it has no validation split; measure on --text FILE")
        prepared = prepare(config.data, config.model.vocab_size, show=not options.json)
        now = prepared.loader(config.sequence_length, config.data.seed, verify=False).identity
        if data != now:
            raise ConfigError(f"corpus {config.data.corpus!r} has changed since this run; measure on --text FILE")
        validation = prepared.validation(config.sequence_length)
        result = evaluate(model, tokenizer, validation.batches(batch_size=16))
        text = validation_text(validation, tokenizer)
    table = result._asdict() | compressed_bits_per_byte(text)
    if options.json:
        print(json.dumps(table))
    else:
        for name, value in table.items():
            print(f"{name:>14}  {value:,.4f}" if isinstance(value, float) else f"{name:>14}  {value:,}")
    return 0


def _plan(arguments: list[str]) -> int:
    options, settings = _read_flags(Plan, arguments, "nanomai plan CONFIG", return_unknown_args=True)
    from nanomai.config_file import CONFIG_FOLDER, load_config
    from nanomai.planner import find_device, largest, pages, plan, search

    device = find_device(options.gpu)
    device = device if options.price is None else replace(device, price=options.price)
    if options.largest:
        if settings:
            raise ConfigError(f"--largest looks at all configurations: leave out {settings[0]!r}")
        named, plain = largest(options.gpus, device, map(load_config, CONFIG_FOLDER.glob("*.yaml")))
        found = {"largest": named and asdict(named), "plain": asdict(plain)}
        text = pages.largest(named, plain)
    elif options.search:
        fitting, failed = search(_config("plan", settings), options.gpus, device)
        found = {"fitting": [asdict(p) for p in fitting[:pages.BEST]], "failed": failed}
        text = pages.search(fitting, failed)
    else:
        planned = plan(_config("plan", settings), options.gpus, device)
        found, text = asdict(planned), pages.plan(planned)
    print(json.dumps(found) if options.json else text)
    return 0


def _simulate(arguments: list[str]) -> int:
    options, settings = _read_flags(Simulate, arguments, "nanomai simulate CONFIG", return_unknown_args=True)
    config = _config("simulate", settings)
    from nanomai.simulator import simulate, table

    found = simulate(config, **{name: value for name, value in asdict(options).items() if name != "json"})
    print(json.dumps(found.as_dict()) if options.json else table(found))
    return 0


def _import(arguments: list[str]) -> int:
    options = _parse(Import, arguments, "import")
    from nanomai.hub import import_run

    print(f"{import_run(options.dir, options.out)}: a run, to sample from or to begin with (--train.init-from)")
    return 0


def _export(arguments: list[str]) -> int:
    options = _parse(Export, arguments, "export")
    import torch

    from nanomai.hub import caution, to_hf
    from nanomai.runs import load_run

    model, tokenizer, _ = load_run(options.run)
    folder = to_hf(model, options.out, tokenizer, getattr(torch, options.dtype), options.architecture)
    settings = json.loads((folder / "config.json").read_text())
    print(f"{folder}: {settings['architectures'][0]}")
    if said := caution(settings):
        print(f"nanomai: {said}", file=sys.stderr)
    return 0


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from None
    if not text:
        raise ConfigError(f"{path} is empty: there is nothing to measure")
    return text


def _parse(kind: type, arguments: list[str], command: str):
    """`RUN --option value ...` as one of the dataclasses of options.py."""
    if not arguments:
        example = {"import": "DIR runs/new", "export": "runs/nano DIR"}.get(command, "runs/nano")
        raise ConfigError(f"which {'folder' if command == 'import' else 'run'}? `nanomai {command} {example}`")
    return _read_flags(kind, arguments, f"nanomai {command}")


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train, "sample": _sample, "eval": _eval, "prepare": _prepare, "plan": _plan, "simulate": _simulate,
    "import": _import, "export": _export}

if __name__ == "__main__":
    sys.exit(main())
