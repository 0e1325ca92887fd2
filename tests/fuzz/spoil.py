"""Bad values, and ways to spoil a good text, tree, array, tensor file or picture. All chance comes from `random`."""

from __future__ import annotations

import copy
import io
import json
import struct
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

STRINGS = (
    *("", " ", "x" * 5000, "../../etc/passwd", "/dev/null", "/", ".", "a\nb", "a\rsitdist: error: b", "\x1b[31mred"),
    *("\u202e", "\ud800", "\x00", "nan", "-inf", "1e400", "9" * 5000, "None", "null", "{}", "%s%n", "=1+1", "\ufeff"),
)
NUMBERS = (
    *(0, -1, 1, 2, 3, 7, -(2**31), 2**31, 2**53 + 1, -(2**63), 2**63, 2**64, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1e-300, 5e-324, 1e300, 1.7e308, -1e300, float("nan"), float("inf"), float("-inf")),
)
OTHERS = (None, True, False, [], {}, [[]], [None], [1, 2], {"a": 1}, [[[[[[[[0]]]]]]]], {"": ""}, {"kind": "x"})
SMALL = (0, -1, 1, 2, 3, True, 0.5, -0.5, 1e-300, 5e-324, float("nan"), float("inf"), -(2**31), -(10**30))
# Numbers of these keys say how much is to be done: a large one asks for much work, which is not wrong.
WORK = ("steps", "views", "copies", "supersample", "draws", "every", "warmup_steps", "workers", "depth", "start")

YAML_VALUES = (
    *("2020-13-45", "2020-01-01", "2020-01-01 99:99:99", "!!int abc", "!!int 1e999", "!!float x", "!!timestamp x"),
    *("!!binary 'x'", "!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "!!null x"),
    *("!!bool x", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!unknown 1", "!<tag:yaml.org,2002:int> ''"),
    *("9" * 5000, "-" + "9" * 5000, "1e999", ".inf", "-.inf", ".nan", "0x", "0b2", "0o9", "1:60:60", "1_000", "~", "="),
    *("[" * 3000, "[" * 200 + "]" * 200, "{a: " * 1500, "&a [*a]", "*missing", "{? [a] : b}", "{<<: [1]}"),
    *("{<<: 1}", "'", '"', '"\\x00"', '"\\ud800"', '"a\\nb"', "| \n  a\n  b", "%", "@", "`", "- 1", "? x", "---"),
    "[&a [x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b], &d [*c,*c,*c,*c,*c,*c,*c,*c],"
    " &e [*d,*d,*d,*d,*d,*d,*d,*d], &f [*e,*e,*e,*e,*e,*e,*e,*e], &g [*f,*f,*f,*f,*f,*f,*f,*f], [*g,*g,*g,*g]]",
    "{a: &a {b: *a}}",
)


def value(random: Random, key: str = "") -> Any:
    """Any bad value; for a key of WORK none that asks for much."""
    pools: tuple[tuple[Any, ...], ...] = (STRINGS, OTHERS, SMALL if key in WORK else NUMBERS)
    return copy.deepcopy(random.choice(random.choice(pools)))


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything in a tree of dicts and lists, the tree itself left out."""
    inner = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [each for key, child in inner for each in ((*path, key), *places(child, (*path, key)))]


def tree(random: Random, original: Any) -> tuple[Any, str]:
    """A tree with one to three nodes replaced, removed, renamed, repeated or added; and what was done."""
    changed, done = copy.deepcopy(original), []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        found = places(changed)
        if not found:
            return value(random), "replaced all"
        *parents, last = random.choice(found)
        inner = changed
        for key in parents:
            inner = inner[key]
        where = ".".join(str(key) for key in (*parents, last))
        how = random.choice(("replace", "replace", "replace", "remove", "rename", "add", "nudge"))
        if how == "remove":
            del inner[last]
        elif how == "rename" and isinstance(inner, dict):
            inner[f"{last}{random.choice(('x', '_', ' ', ''))}x"] = inner.pop(last)
        elif how == "add" and isinstance(inner, dict):
            inner[random.choice(("unknown", "", "kind", "__class__"))] = value(random)
        elif how == "add":
            inner.insert(last, copy.deepcopy(inner[last]))
        elif how == "nudge" and isinstance(inner[last], int | float) and not isinstance(inner[last], bool):
            inner[last] = inner[last] + random.choice((-1, 1)) if isinstance(inner[last], int) else -inner[last]
        elif how == "nudge" and isinstance(inner[last], str):
            inner[last] = text(random, inner[last])
        else:
            how = "replace"
            inner[last] = value(random, str(next((key for key in (last, *parents[::-1]) if isinstance(key, str)), "")))
        done.append(f"{how} {where}")
    return changed, ", ".join(done)


def json_bytes(random: Random, text: bytes) -> tuple[bytes, str]:
    """JSON with its tree spoiled, and now and then its text too."""
    original = json.loads(text)
    changed, done = tree(random, original)
    data = json.dumps(changed, indent=1).encode()
    which = random.randrange(20)
    if which == 0:
        return data_bytes(random, data), f"{done}; bytes"
    if which == 1:
        return random.choice(
            (b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"NaN", b"", b"\xff\xfe{}", b"null")
        ), "raw"
    if which == 2:
        encoding = random.choice(("utf-16", "utf-32", "utf-8-sig"))
        return json.dumps(original, indent=1).encode(encoding), encoding
    return data, done


def yaml_text(random: Random, original: str) -> tuple[str, str]:
    """YAML with a line's value replaced, a line removed, repeated, indented or added."""
    lines = original.splitlines()
    place = random.randrange(len(lines))
    key, colon, _ = lines[place].partition(":")
    how = random.choice(("value", "value", "value", "value", "remove", "repeat", "indent", "key", "characters"))
    if how == "value" and colon:
        bad = random.choice(YAML_VALUES) if random.random() < 0.6 else _plain(value(random, key.strip(" -")))
        lines[place] = f"{key}: {bad}"
    elif how == "remove":
        del lines[place]
    elif how == "repeat":
        lines.insert(place, lines[place])
    elif how == "indent":
        lines[place] = random.choice((" ", "  ", "\t", "- ")) + lines[place]
    elif how == "key":
        lines[place] = f"{random.choice(('unknown', '? [a]', '<<', '1', '~', 'x' * 300))}: {lines[place].strip()}"
    else:
        how = "characters"
        lines[place] = text(random, lines[place])
    return "\n".join(lines) + "\n", f"{how} at line {place + 1}"


def _plain(bad: Any) -> str:
    if isinstance(bad, str):
        return bad
    if isinstance(bad, float):
        return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(str(bad), repr(bad))
    return json.dumps(bad)


def text(random: Random, original: str) -> str:
    """A text with a character replaced, removed or added, or cut."""
    place = random.randrange(len(original) + 1)
    odd = random.choice(("\x00", "\n", "\t", ":", "-", "'", '"', "{", "\ud800", "é", "0", "9", " ", "#", "\u2028", ","))
    how = random.randrange(4)
    if how == 0:
        return original[:place] + odd + original[place:]
    if how == 1:
        return original[:place] + odd + original[place + 1 :]
    return original[:place] + original[place + 1 :] if how == 2 else original[:place]


def data_bytes(random: Random, original: bytes) -> bytes:
    """Bytes with one to four of them changed, or a stretch removed, repeated, zeroed or added, or cut."""
    data = bytearray(original)
    for _ in range(random.choice((1, 1, 2, 4))):
        # headers are at the front: half of all changes are there
        end = len(data) if random.random() < 0.5 else min(len(data), 256)
        place, length = random.randrange(end + 1), random.choice((1, 2, 8, 64, 1000))
        how = random.randrange(6)
        if how == 0 and place < len(data):
            data[place] ^= 1 << random.randrange(8)
        elif how == 1:
            data[place : place + length] = bytes(len(data[place : place + length]))
        elif how == 2:
            del data[place : place + length]
        elif how == 3:
            data[place:place] = data[place : place + length] or b"\xff" * length
        elif how == 4:
            del data[place:]
        else:
            data[place : place + 4] = random.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x80"))
    return bytes(data) if bytes(data) != original else original + b"\x00"


def bad_word(random: Random) -> str:
    """A word of a command line that is no valid value of anything."""
    pool = ("", " ", "nan", "inf", "-inf", "-1", "0", "1e400", "9" * 400, "x" * 300, "a\nb", "\udcff\udcfe", "--")
    return random.choice(
        (*pool, "None", "1,2", "é", "\x1b[2J", "1:1", "7:1", "0x10", "1_0", "٣", "²", "/dev/full", "a" * 5000)
    )


def lines(random: Random, data: bytes) -> tuple[bytes, str]:
    """Lines of JSON with one spoiled, removed or repeated."""
    found = data.splitlines()
    place = random.randrange(len(found))
    how = random.choice(("tree", "tree", "tree", "remove", "repeat", "bytes"))
    if how == "tree":
        changed, how = tree(random, json.loads(found[place]))
        found[place] = json.dumps(changed).encode()
    elif how == "remove":
        del found[place]
    elif how == "repeat":
        found.insert(place, found[place])
    else:
        return data_bytes(random, data), "bytes"
    return b"".join(line + b"\n" for line in found), how


def colmap_text(random: Random, original: str) -> tuple[str, str]:
    """A COLMAP text with a word or a line replaced, removed or repeated."""
    found = original.split("\n")
    place = random.choice([number for number, line in enumerate(found) if line and not line.startswith("#")])
    how = random.choice(("word", "word", "word", "word", "remove", "repeat", "characters"))
    if how == "word":
        words = found[place].split(" ")
        number = random.randrange(len(words))
        words[number] = str(value(random)) if random.random() < 0.7 else bad_word(random)
        found[place], how = " ".join(words), f"word {number} is {words[number][:20]!r}"
    elif how == "remove":
        del found[place]
    elif how == "repeat":
        found.insert(place, found[place])
    else:
        found[place] = text(random, found[place])
    return "\n".join(found), how


# -------------------------------------------------------------------------------------------------------------- arrays


def array(random: Random, original: np.ndarray) -> tuple[bytes, str]:
    """An .npy file of an array with a wrong value, type, shape or header."""
    how = random.choice(("value", "value", "type", "shape", "header", "bytes", "object", "empty"))
    if how == "value":
        changed = original.copy()
        bad = random.choice((np.nan, np.inf, -np.inf, 0, -1, 1, 1e30, 1e-30, 255, -1e300, 2**31, 2**62, -(2**62)))
        with np.errstate(all="ignore"):
            flat = changed.reshape(-1)
            flat[random.randrange(len(flat))] = np.asarray(bad).astype(changed.dtype)
        return npy(changed), f"an entry is {bad}"
    if how == "type":
        kind = random.choice(("<f2", "<f4", ">f8", "<i8", "u1", "?", "<c16", "S8", "<U8", "<M8[s]", "V8", "<f16"))
        with np.errstate(all="ignore"):
            try:
                return npy(original.astype(np.dtype(kind.replace("<f16", "g")))), kind
            except (TypeError, ValueError):
                return npy(np.zeros(original.shape, kind)), kind
    if how == "shape":
        original = np.atleast_1d(original)
        shapes = (original[..., None], original[None], original[..., :-1], original[:1], original[:0], original.T)
        number = random.randrange(len(shapes) + 1)
        changed = shapes[number] if number < len(shapes) else original.reshape(-1)[0]
        return npy(np.asarray(changed)), f"shape {np.shape(changed)}"
    if how == "header":
        shape = random.choice(("(1000000000, 4, 4)", "(-1, 4, 4)", "(10**30,)", "()", "(4, 4", "(True, 4)", "'x'"))
        kind = random.choice(("'<f8'", "'|O'", "'<f8,<f8'", "[('a', '<f8')]", "None", "'x'"))
        header = f"{{'descr': {kind}, 'fortran_order': {random.choice(('False', 'True', '1'))}, 'shape': {shape}, }}"
        body = header.encode().ljust(117) + b"\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body + original.tobytes(), header
    if how == "object":
        file = io.BytesIO()
        np.save(file, np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
        return file.getvalue(), "objects"
    return (b"", "empty") if how == "empty" else (data_bytes(random, npy(original)), "bytes")


def npy(values: np.ndarray) -> bytes:
    """An array as an .npy file."""
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


def npz(files: dict[str, bytes]) -> bytes:
    """.npy files as an .npz file."""
    import zipfile

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def arrays(random: Random, original: dict[str, np.ndarray]) -> tuple[bytes, str]:
    """An .npz file with a wrong, missing, renamed or additional array, or wrong bytes."""
    files = {name: npy(values) for name, values in original.items()}
    name = random.choice(sorted(files))
    how = random.choice(("array", "array", "array", "array", "remove", "rename", "add", "bytes"))
    if how == "array":
        files[name], what = array(random, original[name])
        return npz(files), f"{name}: {what}"
    if how == "remove":
        del files[name]
    elif how == "rename":
        files[random.choice((f"{name}x", "../x", "/x", "x\n"))] = files.pop(name)
    elif how == "add":
        files["unknown"] = npy(np.zeros(3))
    else:
        return data_bytes(random, npz(files)), "bytes"
    return npz(files), f"{how} {name}"


# ---------------------------------------------------------------------------------------------------------- safetensors


def safetensors(random: Random, original: bytes) -> tuple[bytes, str]:
    """A .safetensors file with a wrong header, type, shape, name or value."""
    (size,) = struct.unpack("<Q", original[:8])
    header, body = json.loads(original[8 : 8 + size]), bytearray(original[8 + size :])
    name = random.choice([name for name in sorted(header) if name != "__metadata__"])
    entry = header[name]
    start, stop = entry["data_offsets"]
    how = random.choice(("nan", "inf", "type", "shape", "remove", "rename", "offsets", "tree", "size", "bytes"))
    if how in ("nan", "inf") and stop - start >= 4:
        place = start + 4 * random.randrange((stop - start) // 4)
        body[place : place + 4] = struct.pack("<f", float(how))
    elif how == "type":
        entry["dtype"] = random.choice(("I32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "U8", "BOOL", "F64", "C64", "X9"))
    elif how == "shape":
        entry["shape"] = random.choice(([], [0], [-1], [2**62, 4], [1, *entry["shape"]], entry["shape"][::-1]))
    elif how == "remove":
        del header[name]
    elif how == "rename":
        header[random.choice((f"{name}.x", "", "a\nb", "x" * 300))] = header.pop(name)
    elif how == "offsets":
        entry["data_offsets"] = random.choice(([0, 0], [stop, start], [start, 2**62], [start + 1, stop + 1], [0, -1]))
    elif how == "tree":
        header, how = tree(random, header)
    elif how == "size":
        return struct.pack("<Q", random.choice((0, 2**63, 2**40, 10**6))) + original[8:], "header's size"
    else:
        return data_bytes(random, original), "bytes"
    words = json.dumps(header).encode()
    return struct.pack("<Q", len(words)) + words + bytes(body), f"{name}: {how}"


# ------------------------------------------------------------------------------------------------------------ pictures


def picture(random: Random, original: bytes) -> tuple[bytes, str]:
    """A picture file of a wrong kind, size, or with wrong bytes; `original` is a PNG."""
    how = random.choice(("bytes", "bytes", "bytes", "huge", "wide", "foreign", "mode", "cut", "chunk", "empty"))
    if how == "huge":
        side = random.choice((10**5, 2**31 - 1, 0))
        return _png(side, side, b""), f"{side}x{side}"
    if how == "wide":
        return _png(60_000, 1, zlib.compress(bytes(1 + 3 * 60_000))), "60000x1"
    if how == "foreign":
        return random.choice(FOREIGN)
    if how == "mode" and original.startswith(b"\x89PNG"):
        return _converted(random, original)
    if how == "cut":
        return original[: random.randrange(len(original))], "cut"
    if how == "chunk":
        name = random.choice((b"iCCP", b"zTXt", b"eXIf", b"tRNS", b"PLTE", b"acTL", b"gAMA"))
        bomb = b"x\x00\x00" + zlib.compress(bytes(50_000_000)) if name in (b"zTXt", b"iCCP") else bytes(13)
        return original[:33] + _chunk(name, bomb) + original[33:], name.decode()
    return (b"", "empty") if how == "empty" else (data_bytes(random, original), "bytes")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, data: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _converted(random: Random, original: bytes) -> tuple[bytes, str]:
    from PIL import Image

    mode, kind = random.choice(
        (("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("I;16", "PNG"), ("CMYK", "JPEG"))
    )
    with Image.open(io.BytesIO(original)) as opened:
        changed = Image.new("I;16", opened.size) if mode == "I;16" else opened.convert(mode)
    turned = random.random() < 0.5 and kind != "GIF"
    exif = Image.Exif()
    exif[0x0112] = random.choice((0, 1, 3, 6, 8, 9, 255))  # orientation
    file = io.BytesIO()
    changed.save(file, kind, **({"exif": exif} if turned else {}))
    return file.getvalue(), f"{mode} {kind}{' turned' if turned else ''}"


_PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n(pwned) (w) file closefile\nshowpage\n%%EOF\n"
FOREIGN = (
    (_PROGRAM, "PostScript"),
    (b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\ntrailer\n<< /Root 1 0 R >>\n%%EOF\n", "PDF"),
    (b"P6\n16 16\n255\n" + bytes(768), "PPM"),
    (b"P6\n999999 999999\n255\n", "huge PPM"),
    (b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x02D\x01\x00;", "huge GIF"),
    (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "SVG"),
    (b"#define a_width 16\n#define a_height 16\nstatic char a[] = {0x00};\n", "XBM"),
    (b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0), "huge BMP"),
    (b"II*\x00\x08\x00\x00\x00" + struct.pack("<HHHII", 1, 256, 4, 1, 2**31) + bytes(4), "TIFF of one tag"),
    (b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(20), "WebP of nothing"),
    (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(20) + b"\xff\xd9", "JPEG of nothing"),
    (b"8BPS\x00\x01" + bytes(40), "PSD"),
)


# ----------------------------------------------------------------------------------------------------------- by suffix


def any_bytes(random: Random, original: bytes) -> tuple[bytes, str]:
    """`data_bytes`, and what was done."""
    return data_bytes(random, original), "bytes"


def of_text(change: Callable[[Random, str], tuple[str, str]]) -> Callable[[Random, bytes], tuple[bytes, str]]:
    """A change of a text as one of bytes, which now and then are no text or of another encoding."""

    def spoiled(random: Random, original: bytes) -> tuple[bytes, str]:
        if random.randrange(10) == 0:
            return any_bytes(random, original)
        changed, what = change(random, original.decode("utf-8", "surrogateescape"))
        encoding = "utf-16" if random.randrange(50) == 0 else "utf-8"
        return changed.encode(encoding, "surrogatepass"), what

    return spoiled


def npy_bytes(random: Random, original: bytes) -> tuple[bytes, str]:
    """An .npy file, as `array` spoils it."""
    return array(random, np.load(io.BytesIO(original)))


def npz_bytes(random: Random, original: bytes) -> tuple[bytes, str]:
    """An .npz file, as `arrays` spoils it."""
    with np.load(io.BytesIO(original)) as loaded:
        return arrays(random, {name: loaded[name] for name in loaded.files})


BY_SUFFIX: dict[str, Callable[[Random, bytes], tuple[bytes, str]]] = {
    ".json": json_bytes,
    ".jsonl": lines,
    ".yaml": of_text(yaml_text),
    ".txt": of_text(colmap_text),
    ".npy": npy_bytes,
    ".npz": npz_bytes,
    ".safetensors": safetensors,
    ".png": picture,
}


def contents(random: Random, suffix: str, original: bytes) -> tuple[bytes, str]:
    """The contents of a file, spoiled in a way of its kind."""
    return BY_SUFFIX.get(suffix, any_bytes)(random, original)
