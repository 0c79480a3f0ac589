"""Keep of a CUDA library only the machine code for one architecture.

nvcc puts kernels into containers, each a header and entries of machine code (ELF) or PTX for one
architecture; the driver takes the entry that fits its device. A container whose other entries are gone is
what nvcc writes when it is asked for that architecture alone. The file keeps its length and every address in
it: what became free is zeros, which compress to nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

# magic, version, bytes of this header, bytes of all entries
_CONTAINER = struct.Struct("<4sHHQ")
_MAGIC = b"\x50\xed\x55\xba"
# kind, version, bytes of this header, bytes of the payload; the architecture follows at _ARCHITECTURE
_ENTRY = struct.Struct("<HHIQ")
_ARCHITECTURE = struct.Struct("<I")
_ARCHITECTURE_AT = 0x1C
_ELF = 2


@dataclass(frozen=True)
class Entry:
    """One entry of a container: bytes with its header, the architecture (90 is sm_90), ELF or PTX."""

    content: bytes
    architecture: int
    elf: bool


def containers(library: bytes | bytearray) -> list[tuple[int, list[Entry]]]:
    """All containers of a library: where each begins, and its entries.

    Raises:
        ValueError: something that looks like a container is none.

    """
    found = []
    at = library.find(_MAGIC)
    while at >= 0:
        _, version, header, size = _CONTAINER.unpack_from(library, at)
        if version != 1 or header != _CONTAINER.size:
            raise ValueError(f"the container at byte {at} has version {version}; only version 1 is known")
        here, end = at + header, at + header + size
        entries = []
        while here < end:
            kind, _, entry_header, payload = _ENTRY.unpack_from(library, here)
            length = entry_header + payload
            (architecture,) = _ARCHITECTURE.unpack_from(library, here + _ARCHITECTURE_AT)
            entries.append(Entry(bytes(library[here : here + length]), architecture, kind == _ELF))
            here += length
        if here != end:
            raise ValueError(
                f"the entries of the container at byte {at} do not fill it; leave this file whole"
            )
        found.append((at, entries))
        at = library.find(_MAGIC, end)
    return found


def keep_architecture(library: bytes, architecture: int) -> bytes:
    """The library with machine code for one architecture.

    No container is left empty: those without any code for it get the shortest entry there is for another one.
    Their kernels do not run on that architecture (where it was PTX that made them run, they did before).

    Args:
        library: a shared library that nvcc built.
        architecture: 90 keeps sm_90 and sm_90a.

    Returns:
        As many bytes as the library has.

    Raises:
        ValueError: a container cannot be read, or none holds code for the architecture.

    """
    changed = bytearray(library)
    found = containers(library)
    others = [e.content for _, entries in found for e in entries if e.architecture != architecture and e.elf]
    shortest = min(others, key=len, default=b"")
    kept = 0
    for at, entries in found:
        size = sum(len(entry.content) for entry in entries)
        wanted = [e.content for e in entries if e.elf and e.architecture == architecture]
        kept += len(wanted)
        body = b"".join(wanted) or shortest
        if len(body) > size:
            continue
        start = at + _CONTAINER.size
        changed[start : start + size] = body + bytes(size - len(body))
        _CONTAINER.pack_into(changed, at, _MAGIC, 1, _CONTAINER.size, len(body))
    if not kept:
        raise ValueError(f"the library holds no machine code for sm_{architecture}; carry it whole")
    return bytes(changed)
