"""Hostile input for file readers: damaged bytes, values, tensors and folders; resource limits."""

import contextlib
import ctypes
import io
import json
import os
import resource
import signal
import socket
import struct
import zipfile
from pathlib import Path

import torch
from hypothesis import strategies as st

SECONDS, MEGABYTES = 10, 1024
"""Limits of one read; memory is address space beyond that of the process before the read."""


PR_SET_DUMPABLE = 4


class ReadTooLong(BaseException):
    """Not an Exception, so that no reader mistakes it for a damaged file."""


@contextlib.contextmanager
def limits(seconds=SECONDS, megabytes=MEGABYTES):
    """Interrupt the block after `seconds`, and let allocations beyond `megabytes` fail."""

    def stop(*_):
        raise ReadTooLong(f"more than {seconds} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + megabytes * 2**20
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def ordinary_user():
    """Open files of this thread as an ordinary user, since root can read every file.

    os.seteuid would change the user of the whole process and interrupt all of its threads,
    including those that inference runtimes have started.
    """
    if os.geteuid() != 0:
        yield
        return
    library = ctypes.CDLL(None)
    library.setfsuid(65534)
    try:
        yield
    finally:
        library.setfsuid(0)
        library.prctl(
            PR_SET_DUMPABLE, 1
        )  # otherwise a process that has changed its user writes no core dump


def snapshot(folder):
    """Names, kinds and contents below a folder; only small plain files are opened."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = path.lstat().st_mode
        content = None
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 2**24:
            with contextlib.suppress(PermissionError):
                content = path.read_bytes()
        found[str(path)] = (kind, content)
    return {name: what for name, what in found.items() if not Path(name).is_dir()}


# -- values ----------------------------------------------------------------------------------------


class Raw(str):
    """Text that is inserted into a document unchanged, whether it is well formed or not."""


VALUES = [
    None, True, False, -1, 0, 1, 2, 99, 10**9, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308, "", " ",
    "a", "x" * 10_000, "\0", "../../etc", "/", "a/b", "1e-05", "{}", "{0.real}", "{nothing}", "nan",
    [], {}, [[]], [None], [0], [-1], [1] * 1000, ["a"], [1, 10**9, 10**9], {"a": 1}, {"": {}},
    {"G": 0}, {"groups": 0}, [{"a": [1]}],
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5001), Raw("-0"),
    Raw('"\\ud800"'), Raw("[" * 100_000), Raw("[" * 90 + "]" * 90), Raw("[" * 400 + "]" * 400),
    Raw('{"a":' * 100_000), Raw('{"a":' * 90 + "1" + "}" * 90), Raw("[" * 100_000 + "]" * 100_000),
    Raw('{"a": 1, "a": 2}'), Raw("nonsense"), Raw(""), Raw("'"), Raw('"'),
]  # fmt: skip
YAML_VALUES = [
    Raw(text)
    for text in (
        ".nan", ".inf", "*nothing", "&a [*a]", "&a {b: *a}", "!!bool foo", "!!int foo", "yes", "~",
        "!!float x", "!!timestamp x", "!!set {a}", "!!omap [a]", "!!binary x", "- a", "%", "@", "|",
        "!!python/object/apply:os.abort []", "2001-99-99", "2001-01-01", "2001-01-01T99:99:99Z",
        "0b_", "0x_", "1:99:99", "? [a]", ">", "{a: 1, a: 2}", "[a, &x b, *x]", "<<", "{<<: 1}",
        "{<<: {a: 1}}",
        "[&a [x,x,x,x,x,x,x,x,x,x],&b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a],"
        "&c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b],&d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c],"
        "&e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d],&f [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e],"
        "[*f,*f,*f,*f,*f,*f,*f,*f,*f,*f]]",
    )
]  # fmt: skip


def places(tree, prefix=()):
    """The path of every value in a tree of dictionaries and lists, including the root."""
    found = [prefix]
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        found += [place for key, value in pairs for place in places(value, (*prefix, key))]
    return found


def changed(tree, place, value):
    """The tree with another value at a place; `...` removes the value."""
    if not place:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if len(place) == 1 and value is ...:
        del copy[place[0]]
    elif len(place) == 1:
        copy[place[0]] = value
    else:
        copy[place[0]] = changed(tree[place[0]], place[1:], value)
    return copy


def written(tree):
    """JSON in which `Raw` text appears unchanged."""
    raws = []

    def placed(value):
        if isinstance(value, Raw):
            raws.append(value)
            return f"@@{len(raws) - 1}@@"
        if isinstance(value, dict):
            return {key: placed(item) for key, item in value.items()}
        return [placed(item) for item in value] if isinstance(value, list) else value

    text = json.dumps(placed(tree))
    for number, raw in enumerate(raws):
        text = text.replace(f'"@@{number}@@"', raw)
    return text


@st.composite
def documents(draw, tree, more=()):
    """Text of a JSON document with one to three values changed, removed, duplicated or added."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(tree)))
        value = draw(st.sampled_from([*VALUES, *more]) | st.just(...))
        if value is ... and not place:
            value = None
        tree = changed(tree, place, value)
    if isinstance(tree, dict) and draw(st.integers(0, 9)) == 0:
        tree = tree | {draw(st.sampled_from(["", "more", "x" * 5000])): 1}
    text = written(tree)
    if draw(st.integers(0, 9)) == 0 and text.startswith("{") and isinstance(tree, dict) and tree:
        key = next(iter(tree))
        text = f"{{{json.dumps(key)}: 1, {text[1:]}"
    return text


@st.composite
def damaged_bytes(draw, content):
    """Bytes cut, flipped, replaced, repeated or filled with junk."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        if draw(st.booleans()):
            at = min(at, draw(st.integers(0, 64)))  # in the header
        how = draw(st.sampled_from(["cut", "flip", "set", "insert", "drop", "append", "all"]))
        junk = draw(st.binary(min_size=1, max_size=16))
        if how == "cut":
            del content[at:]
        elif how == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "set":
            content[at : at + len(junk)] = junk
        elif how == "insert":
            content[at:at] = junk
        elif how == "drop":
            del content[at : at + len(junk)]
        elif how == "append":
            content += junk
        elif how == "all":
            content = bytearray(draw(st.sampled_from([
                b"", b"\0" * 64, b"\xff" * 64, b"PK\3\4", b"\x80\4.", b"{", b"[]", b"{}", b"null",
                b"\n", b"- a\n- b\n", b"a: b: c", b"\t", b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0",
                b"[" * 100_000, b'{"a":' * 50_000, b"a: " * 50_000, b"- " * 20_000, b"? " * 20_000,
            ])))  # fmt: skip
    return bytes(content)


# -- safetensors -----------------------------------------------------------------------------------


def parts_of(content):
    """Header and data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header_text, data):
    text = header_text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


TYPES = ["F32", "F64", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "C64", "X"]


@st.composite
def damaged_tensors(draw, content, ours=True):
    """A safetensors file with changes to our header (if any), its own header, or its tensors."""
    header, data = parts_of(content)
    how = draw(st.sampled_from(["ours"] * 3 * ours + ["entry", "values", "types"]))
    names = [name for name in header if name != "__metadata__"]
    if how == "ours":
        ours = draw(documents(json.loads(header["__metadata__"]["secateur"])))
        header["__metadata__"] = {"secateur": ours}
        return joined(json.dumps(header), data)
    if how == "entry":
        return joined(draw(documents(header)), data)
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        begin, end = header[name]["data_offsets"]
        if how == "types":
            header[name]["dtype"] = draw(st.sampled_from(TYPES))
        else:
            pattern = draw(st.sampled_from(
                [b"\xff", b"\0", b"\x63\0\0\0\0\0\0\0", b"\0\0\xc0\x7f", b"\x02", b"\x7f"]
            ))  # fmt: skip
            filled = (pattern * (end - begin))[: end - begin]
            data = data[:begin] + filled + data[end:]
    return joined(json.dumps(header), data)


# -- files of torch.save ---------------------------------------------------------------------------


def doubled(levels, keys):
    """Every level refers to the next one twice or more: few objects, very many paths."""
    value = {"a": 1}
    for _ in range(levels):
        value = dict.fromkeys(keys, value)
    return value


def nested(levels, value):
    for _ in range(levels):
        value = {"state_dict": value}
    return value


def in_itself():
    value = {"epoch": 1}
    value["state_dict"] = value
    return value


ONE = torch.zeros(1)
ODD_OBJECTS = [
    None, True, -1, 10**30, 1e308, "", "a" * 10_000, b"\0", [], {}, (), {1, 2}, [[[]]], {"a": 1},
    {1: ONE}, {"": ONE}, {"a" * 10_000: ONE}, {"a\n": ONE}, {"fc": {"weight": ONE}}, {(1, 2): 3},
    nested(90, {"a": ONE}), doubled(40, ["model", "net", "state_dict"]), in_itself(),
    ONE.expand(2**40), ONE.expand(2**20, 2**20), ONE.expand(2**20, 2**20, 1, 1), ONE.view([1] * 60),
    torch.zeros(()), torch.zeros(0), torch.zeros(4)[::2], torch.full((3,), torch.nan),
    *(torch.zeros(3, dtype=kind) for kind in (torch.bool, torch.int64, torch.complex64)),
    *(torch.zeros(3, dtype=kind) for kind in (torch.bfloat16, torch.float8_e4m3fn)),
    torch.zeros(3, 3).to_sparse(), torch.zeros(2**40, device="meta"), torch.nn.Parameter(ONE),
    torch.Size([1, 2]), torch.float32,
]  # fmt: skip
"""Values that replace a tensor, or a dictionary of tensors, in a file of torch.save."""
ODD_NAMES = ["conv.mask", "module.conv.mask", "fc.ind_in", "fc.conv2d.weight", "net", "", 0]


@st.composite
def saved(draw, path):
    """A file of torch.save with one to three values changed, removed or added, as bytes."""
    tree = torch.load(path, weights_only=True)
    found = places(tree)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(found))
        value = draw(st.sampled_from(ODD_OBJECTS))
        if place and draw(st.booleans()):
            more = draw(st.booleans())
            place = (*place[:-1], draw(st.sampled_from(ODD_NAMES))) if more else place
            value = value if more else ...
        with contextlib.suppress(LookupError, TypeError):  # one of its parents has been replaced
            tree = changed(tree, place, value)
    content = io.BytesIO()
    torch.save(tree, content, _use_new_zipfile_serialization=draw(st.booleans()))
    return content.getvalue()


@st.composite
def repacked(draw, content):
    """An archive of torch.save with one entry damaged, removed or duplicated; others are intact."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        parts = [(item.filename, old.read(item)) for item in old.infolist()]
        at = draw(st.integers(0, len(parts) - 1))
        if draw(st.booleans()):
            at = next(n for n, (name, _) in enumerate(parts) if name.endswith("data.pkl"))
        how = draw(st.sampled_from(["bytes", "bytes", "bytes", "gone", "twice", "large"]))
        for number, (name, data) in enumerate(parts):
            if number == at and how == "gone":
                continue
            changed_data = draw(damaged_bytes(data)) if number == at and how == "bytes" else data
            if number == at and how == "large":
                changed_data = data + bytes(2**26)
            kind = zipfile.ZIP_DEFLATED if how == "large" else zipfile.ZIP_STORED
            new.writestr(name, changed_data, kind)
            if number == at and how == "twice":
                new.writestr(f"{name}2", changed_data)
    return made.getvalue()


# -- folders ---------------------------------------------------------------------------------------


def remove(path):
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            remove(inner)
        path.rmdir()
    else:
        path.unlink()


def as_folder(path):
    remove(path)
    path.mkdir()
    (path / "inside").write_bytes(b"x")


def as_fifo(path):
    remove(path)
    os.mkfifo(path)


def as_socket(path):
    remove(path)
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket may have at most 107 bytes
    try:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def as_link(target):
    def change(path):
        remove(path)
        path.symlink_to(target)

    return change


def as_loop(path):
    remove(path)
    path.symlink_to(path.name)


def as_sparse(size):
    def change(path):
        if path.is_dir():
            remove(path)
        with path.open("ab") as file:
            file.truncate(size)

    return change


def as_file(path):
    remove(path)
    path.write_bytes(b"x")


KINDS = {
    "missing": remove,
    "folder": as_folder,
    "plain file": as_file,
    "FIFO": as_fifo,
    "socket": as_socket,
    "dangling link": as_link("nowhere"),
    "link to itself": as_loop,
    "device": as_link("/dev/zero"),
    "empty": lambda path: as_file(path) or path.write_bytes(b""),
    "a terabyte": as_sparse(2**40),
    "unreadable": lambda path: path.chmod(0),
}
"""Objects that replace a file or a folder."""
