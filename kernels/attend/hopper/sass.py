"""Reads the machine code of a compiled kernel for a fault of ptxas that no higher form shows.

ptxas 12.8 was seen to compute the descriptor of a matrix operand before one loop and to use it in a second, which is
also reached where the first is skipped: the product then reads from an arbitrary place in shared memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;")
_GUARD = re.compile(r"^@!?U?P[T\d]\s+")
_LEAVE = ("BRA", "BRX", "EXIT", "JMX", "RET")


def disassembled(cubin: bytes) -> str | None:
    """The SASS of a cubin, by the cuobjdump that Triton brings along; None where there is none."""
    try:
        from triton import knobs

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "--dump-sass", file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (ImportError, AttributeError, OSError, RuntimeError, subprocess.SubprocessError):
        return None


def unset_descriptor(sass: str) -> str | None:
    """None if on every path each wgmma's descriptor is set before it, else the first wgmma of which it is not."""
    code = [(int(found[1], 16), found[2]) for line in sass.splitlines() if (found := _LINE.match(line))]
    before = _predecessors(code)
    sets = [_sets(text) for _, text in code]
    for place, (address, text) in enumerate(code):
        for register in _descriptor(text):
            if _reaches_start(place, register, before, sets):
                return f"{text} at {address:#x}: UR{register} is not set on every path"
    return None


def _predecessors(code: list[tuple[int, str]]) -> list[list[int]]:
    places = {address: place for place, (address, _) in enumerate(code)}
    before: list[list[int]] = [[] for _ in code]
    for place, (_, text) in enumerate(code):
        body = _GUARD.sub("", text)
        operation = re.split(r"[. ]", body)[0]
        conditional = text.startswith("@") or re.match(r"BRA\S*\s+!?U?P\d", body) is not None
        if operation == "BRA" and (found := re.findall(r"0x([0-9a-f]+)", body)):
            target = places.get(int(found[-1], 16))
            if target is not None:
                before[target].append(place)
        if (operation not in _LEAVE or conditional) and place + 1 < len(code):
            before[place + 1].append(place)
    return before


def _sets(text: str) -> frozenset[int]:
    """Uniform registers that an instruction sets whatever its guard; a guarded one may leave them as they were."""
    parts = text.split(None, 1)
    found = re.match(r"UR(\d+)(?:,|$)", parts[1]) if len(parts) == 2 else None
    if found is None or text.startswith(("@", "SYNCS", "UTMA", "UBLK")):
        return frozenset()
    first = int(found[1])
    return frozenset((first, first + 1) if ".64" in parts[0] or "WIDE" in parts[0] else (first,))


def _descriptor(text: str) -> range:
    """The uniform registers of a wgmma's descriptors: four, or two where the first operand is in registers."""
    found = re.search(r"HGMMA\S*\s+R\d+, (R\d+, )?gdesc\[UR(\d+)\]", text)
    if found is None:
        return range(0)
    first = int(found[2])
    return range(first + 2, first + 4) if found[1] else range(first, first + 4)


def _reaches_start(place: int, register: int, before: list[list[int]], sets: list[frozenset[int]]) -> bool:
    """Whether some path from a start of the code comes to ``place`` without setting the register."""
    seen: set[int] = set()
    waiting = [place]
    while waiting:
        current = waiting.pop()
        if not before[current]:
            return True
        for earlier in before[current]:
            if earlier not in seen and register not in sets[earlier]:
                seen.add(earlier)
                waiting.append(earlier)
    return False
