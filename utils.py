"""Configuration (defaults < YAML file < key=value on the command line), errors for users, seeding, logging on one rank."""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import io
import json
import logging
import os
import random
import re
import reprlib
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin

import numpy as np
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from systems import startup

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
LONGEST_LINE = 2000  # characters of an error
LARGEST = 2**31 - 1  # of whole numbers: beyond it they no longer fit everywhere
MEBIBYTE = 2**20


class UserError(ValueError):
    """Something the user can put right. Entry points print it as one line and exit with code 2."""


def null(value: Any) -> Any:
    return None if value in ("None", "") else value  # the published YAML files write None, which YAML reads as a string


def _usable_path(value: str | None) -> str | None:
    if value is None:
        return None
    if "YOUR_" in value:
        raise ValueError("a placeholder of the published files: put your own path in its place")
    if "\0" in value:
        raise ValueError("a path cannot hold the character NUL")
    try:
        return str(Path(value).expanduser()) if value.startswith("~") else value
    except RuntimeError:
        raise ValueError("no such user's home directory") from None


OptionalText = Annotated[str | None, BeforeValidator(null)]
PathText = Annotated[str, AfterValidator(_usable_path)]
OptionalPath = Annotated[str | None, BeforeValidator(null), AfterValidator(_usable_path)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


def one_of(table: Mapping[str, Any] | Callable[[], list[str]]) -> AfterValidator:
    """For a field that names a row of a table. The table is looked at when a value is read, so rows can be added."""

    def check(name: str) -> str:
        names = table() if callable(table) else list(table)
        if name not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return name

    return AfterValidator(check)


def check_folder_name(name: str, below: str) -> None:
    """Raise ValueError unless it names a folder below another one: no way out of it, nothing that breaks a line."""
    path = PurePath(name)
    if not name.strip() or not path.parts or path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise ValueError(f"name: {shown(name)} must be a folder below {below}")


class Config(BaseModel):
    """Base of every entry point's configuration: unknown keys are errors, values are converted to the declared types.

    The text under a field describes it, in `--help` too.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True)


AnyConfig = TypeVar("AnyConfig", bound=Config)


def load_config(kind: type[AnyConfig], arguments: list[str], about: str | None = None, default: str | None = None) -> AnyConfig:
    """`[FILE.yaml] [key=value ...]` to a configuration. Raises UserError with one line on anything that does not fit.

    about: what the program is, shown by `--help` above the keys. default: the file that is taken without any argument.
    """
    if {"-h", "--help"} & set(arguments):
        if is_main_process():
            with telling():
                print(help_text(kind, about, default), flush=True)
        sys.exit()
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if not arguments and default is not None:
        arguments = [default if Path(default).is_file() else str(Path(__file__).parent / default)]
    for argument in arguments:
        found, source = _parse_argument(argument, kind)
        for key in found:
            if key not in kind.model_fields:
                raise UserError(f"{source}: unknown key {shown(key)}{_nearest(key, kind)}")
        values.update(found)
        sources.update(dict.fromkeys(found, source))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        hint = f"; {default} has everything that is needed" if default is not None and default not in arguments else ""
        raise UserError(_one_line(error, sources, hint)) from None


def help_text(kind: type[Config], about: str | None = None, default: str | None = None) -> str:
    """What `--help` prints: the program, then each key with its default and its description."""
    lines = [(about or "").strip(), "", "Keys, in FILE.yaml as `key: value` and after it as key=value, which comes last:", ""]
    unused: tuple[str, ...] = getattr(kind, "unused", tuple)()  # keys that the program refuses
    for name, field in kind.model_fields.items():
        if name in unused:
            continue
        value = "needed" if field.is_required() else written(field.get_default(call_default_factory=True))
        lines += [f"  {name} ({value})", textwrap.indent(textwrap.fill(description(kind, name), 100), " " * 6)]
    if default is not None:
        lines += ["", f"Without arguments: {default}."]
    return "\n".join(lines).strip()


def description(kind: type[Config], key: str) -> str:
    """What a key is; a class that only changes its default says nothing of its own."""
    fields = [getattr(one, "model_fields", {}).get(key) for one in kind.__mro__]
    return next((field.description for field in fields if field is not None and field.description), "")


def written(value: Any) -> str:
    """A value as one would write it in YAML."""
    return "null" if value is None else yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _parse_argument(argument: str, kind: type[Config]) -> tuple[dict[str, Any], str]:
    key, equals, text = argument.partition("=")
    if equals and not os.path.isfile(argument):  # noqa: PTH113 - unlike Path's, it says no to what is too long for a path
        return {key: parse_yaml(text, f"command line: {shown(key)}", kind, key)}, "command line"
    if not argument.endswith((".yaml", ".yml")):
        number = argument.isdigit() and "num_questions" in kind.model_fields
        hint = f"; did you mean num_questions={argument}?" if number else ""
        raise UserError(f"command line: {shown(argument)} is neither a YAML file nor key=value{hint}")
    values = parse_yaml(read_text(Path(argument)), argument, kind)
    if not isinstance(values, dict):
        raise UserError(f"{argument}: expected `key: value` lines, found {type(values).__name__}")
    return {str(key): value for key, value in values.items()}, argument


def parse_yaml(text: str, source: str, kind: type[Config] | None = None, key: str | None = None) -> Any:
    """The value of a YAML text: of one key's, or of a mapping of keys. Keys of `kind` that hold text keep it as written."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        pairs = node.value if key is None and isinstance(node, yaml.MappingNode) else [(yaml.ScalarNode("", key or ""), node)]
        for name, value in pairs:
            if kind is None or not isinstance(value, yaml.ScalarNode) or value.tag == NULL:
                continue
            field = kind.model_fields.get(str(name.value))
            if field is not None and _allows_text(field.annotation):
                value.tag = TEXT  # else 1.10 is a number, 12:30:00 seconds, yes a boolean
            elif ODD_NUMBER.fullmatch(value.value):
                raise _odd_number(value)  # a text too: pydantic reads '1_0e-4' as a number
        return loader.construct_document(node)
    except Exception as error:  # of many kinds: `!!float "x"` is a ValueError, `!!bool "x"` a KeyError
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


NULL, TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"
PLAIN_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
ODD_NUMBER = re.compile(r"[-+]?[0-9.]+[_:][-+0-9._:e]*", re.IGNORECASE)  # 1_0.5 would be 10.5, and 1:30.5 90.5


def _allows_text(annotation: Any) -> bool:
    """Whether a text is a value of this type. A list of texts is none."""
    parts = () if get_origin(annotation) is list else get_args(annotation)
    return annotation is str or any(map(_allows_text, parts))


class _Loader(yaml.SafeLoader):
    """Refuses keys that are given twice, of which YAML would silently take the last, and numbers that are not written
    plainly: 010 would be 8, and 12:30:00 45000."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        seen: set[str] = set()
        for key in (key for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {shown(key.value)} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        if not PLAIN_NUMBER.fullmatch(node.value):
            raise _odd_number(node)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> float:
        if ODD_NUMBER.fullmatch(node.value):
            raise _odd_number(node)
        return super().construct_yaml_float(node)


def _odd_number(node: yaml.ScalarNode) -> yaml.YAMLError:
    problem = f"{shown(node.value)}: write the number in plain decimal digits, or a text in quotes"
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def read_text(path: Path) -> str:
    """The text of a regular file. Raises UserError naming it if it cannot be read."""
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(no_such_file(path)) from None
    except UnicodeDecodeError as error:
        line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        raise UserError(f"{path}: line {line}: cannot be read: not UTF-8 (byte 0x{byte:02x})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def parse_json(text: str, where: object) -> Any:
    """The value of a JSON text. Raises UserError naming the place if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of more than 4,300 digits
        raise UserError(f"{where}: not valid JSON: {error}") from None


SPLIT = r"(train|valid|test)\.json"
MAKERS = {  # the command that makes the files of `args/`, by a pattern of how their paths end
    rf"data/gsm_{SPLIT}": "bash preprocessing/gsm_icot.bash",
    rf"data/gsm8k_{SPLIT}": "python preprocessing/gsm8k.py --train train.jsonl --test test.jsonl",
    rf"data/prontoqa_{SPLIT}": "bash scripts/make_prontoqa.sh CLONE",
    rf"data/prosqa_quick_{SPLIT}|checkpoints/(seed\d+/)?quick-(cot|coconut|no-cot)": "bash scripts/quickstart.sh",
    rf"data/prosqa_symbolic_{SPLIT}": "python preprocessing/prosqa.py --symbolic",
    rf"data/prosqa_{SPLIT}": "git checkout data",
    r"checkpoints/gsm-cot": "run.py args/gsm_cot.yaml",
}


def no_such_file(path: Path) -> str:
    """The problem, and for what `args/` names the command that makes it; else the name that is there and most like it."""
    made = [maker for end, maker in MAKERS.items() if re.search(rf"(^|/)({end})$", path.as_posix())]
    if made:
        return f"{path}: no such file; `{made[0]}` makes it (data/README.md)"
    there = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    like = difflib.get_close_matches(path.name, there, n=1, cutoff=0.8)
    return f"{path}: no such file" + (f"; did you mean {path.with_name(like[0])}?" if like else "")


def check_regular(path: Path) -> None:
    """Raise UserError for a pipe, a device or a directory: reading or writing them may never end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file")


def _nearest(key: str, kind: type[Config]) -> str:
    nearest = difflib.get_close_matches(key, kind.model_fields, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; valid keys: {', '.join(sorted(kind.model_fields))}"


def _one_line(error: ValidationError, sources: dict[str, str], hint: str) -> str:
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    key = str(first["loc"][0])
    if first["type"] == "missing":
        return f"{key}: missing; it must be set in the YAML file or as {key}=VALUE{hint}"
    return f"{sources.get(key, 'default')}: {key}: {message.lower()}, got {shown(first['input'])}"


def shown(value: Any) -> str:
    """A value as an error shows it: what is long or deep is cut, however long or deep."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 200, 200
    return short.repr(value)


def set_seed(seed: int) -> None:
    """Seed python, numpy and torch on every device."""
    import torch  # not above: commands that compute nothing start without it

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def check_environment() -> None:
    """Raise UserError if the variables of torchrun are no numbers, out of range, or only some of them are there."""
    found: dict[str, int] = {}
    for key, least in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        text = os.environ.get(key)
        if text is not None:
            if not text.isascii() or not text.isdigit() or int(text) < least:
                raise UserError(f"environment: {key}={text}: a whole number of at least {least} is needed; start with torchrun")
            found[key] = int(text)
    missing = [key for key in ("RANK", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
    if "WORLD_SIZE" in found and missing:
        raise UserError(f"environment: WORLD_SIZE is set, but not {', '.join(missing)}: start with torchrun, or unset it")
    if (rank := found.get("RANK", 0)) >= (processes := found.get("WORLD_SIZE", 1)):
        raise UserError(f"environment: RANK={rank} of WORLD_SIZE={processes} processes: start with torchrun")


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Around what writes to standard output. Where the reader has gone (`| head`), a run that listens to SIGTERM stops as it
    does then; any other ends at once."""
    try:
        yield
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            sys.exit(128 + signal.SIGPIPE)
        signal.raise_signal(signal.SIGTERM)


class _ToStdout(logging.Handler):
    """Looks standard output up each time: it may have been redirected since the logger was made."""

    def emit(self, record: logging.LogRecord) -> None:
        with telling():
            print(self.format(record), flush=True)


@functools.cache
def get_logger() -> logging.Logger:
    """Rank 0 logs everything, the others warnings and errors only."""
    logger = logging.getLogger("coconut")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = _ToStdout()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(lambda record: is_main_process() or record.levelno >= logging.WARNING)
    logger.addHandler(handler)
    return logger


def entry_point(main: Callable[[list[str]], None]) -> Callable[..., None]:
    """Run `main` on the command line's arguments, or on those given.

    A UserError or a full disk becomes one line on each node and exit code 2. A path that may not be read or is no path
    is meant for the user too; other errors of the system keep their stack trace.
    """

    @functools.wraps(main)
    def run(arguments: list[str] | None = None) -> None:
        startup.imported()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a name may hold what the terminal cannot show
        try:
            check_environment()
            startup.import_extensions()
        except (UserError, ImportError) as error:
            _exit(f"error: {error}", 2, everywhere=True)  # it is not known which process this is
        try:
            main(sys.argv[1:] if arguments is None else arguments)
        except UserError as error:
            _exit(f"error: {error}", 2)
        except KeyboardInterrupt:
            _exit("interrupted", 130)
        except OSError as error:
            if error.errno not in (*DISK_ERRORS, *PATH_ERRORS):
                raise
            problem = "cannot be written" if error.errno in DISK_ERRORS else "cannot be used"
            _exit(f"error: {error.filename or 'a file'}: {problem}: {error.strerror}", 2)

    return run


def _exit(line: str, code: int, everywhere: bool = False) -> NoReturn:
    if everywhere or is_main_process() or os.environ.get("LOCAL_RANK") == "0":  # what is wrong may be so on this node alone
        text = printable(" ".join(line.split()))
        half = LONGEST_LINE // 2  # an error names the place first and the reason last
        print(text if len(text) <= LONGEST_LINE else f"{text[:half]} ... {text[-half:]}", file=sys.stderr, flush=True)
    sys.exit(code)


def printable(text: str) -> str:
    """Control characters escaped: what a hostile file says must not move the cursor of a terminal."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
