"""Whether the bytes of an MP4, Matroska, WMA, AMR or AAC file are all there, by the file's own structure.

Not covered: what is cut between two fragments, or frames, of a file that was written as a stream and tells no length.
"""

from typing import Literal

from svbatch.corpus.source import truncated

Container = Literal["aac", "amr", "asf", "flac", "matroska", "mp4"]

_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_EBML_HEADER, _MATROSKA_SEGMENT = 0x1A45DFA3, 0x18538067
_AMR_FRAME_BYTES = (13, 14, 16, 18, 20, 21, 27, 32, 6, 1, 1, 1, 1, 1, 1, 1)  # by mode, RFC 4867 section 5.3
_AMR_WB_FRAME_BYTES = (18, 24, 33, 37, 41, 47, 51, 59, 61, 6, 1, 1, 1, 1, 1, 1)


def container_of(content: bytes) -> Container | None:
    """Which of these formats the bytes are, by how they start; None if none."""
    if content[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mp4"
    if content[:4] == _EBML_HEADER.to_bytes(4, "big"):
        return "matroska"
    if content[:16] == _ASF_HEADER:
        return "asf"
    if content[:6] == b"#!AMR\n" or content[:9] == b"#!AMR-WB\n":
        return "amr"
    if content[:1] == b"\xff" and content[1:2] in (b"\xf0", b"\xf1", b"\xf8", b"\xf9"):
        return "aac"
    if content[:4] == b"fLaC" and len(content) > 26 and not content[21] & 0x0F and not any(content[22:26]):
        return "flac"
    return None


def check_whole(content: bytes, container: Container) -> None:
    """Raises RecordingError where the file's own structure goes on past its end."""
    end = len(content)
    match container:
        case "mp4":
            names, end = _mp4_boxes(content)
            if end <= len(content) and b"moov" not in names:
                raise truncated("its index (moov) is not there")
        case "matroska":
            end = _matroska_end(content)
        case "asf":
            end = _asf_end(content)
        case "amr" | "aac":
            end = _frames_end(content, container)
    if end > len(content):
        raise truncated(f"{end - len(content)} bytes that it promises are not there")


def _mp4_boxes(content: bytes) -> tuple[set[bytes], int]:
    """The names of the boxes, and where the last one ends (ISO/IEC 14496-12, 4.2)."""
    names: set[bytes] = set()
    position = 0
    while position + 8 <= len(content):
        size = int.from_bytes(content[position : position + 4], "big")
        if size == 1:
            size = int.from_bytes(content[position + 8 : position + 16], "big")
        if size == 0:  # to the end of the file
            size = len(content) - position
        if size < 8:
            raise truncated(f"the box at byte {position} has a length of {size}")
        names.add(content[position + 4 : position + 8])
        position += size
    return names, position


def _matroska_end(content: bytes) -> int:
    """Where the segment ends, by its header; 0 if it was written as a stream (RFC 8794 section 6)."""
    position = 0
    for wanted in (_EBML_HEADER, _MATROSKA_SEGMENT):
        is_wanted = int.from_bytes(content[position : position + 4], "big") == wanted
        first = content[position + 4] if len(content) > position + 4 else 0
        if not is_wanted or not first:
            raise truncated(f"no header of Matroska at byte {position}")
        width = 9 - first.bit_length()
        ones = (1 << 7 * width) - 1
        size = int.from_bytes(content[position + 4 : position + 4 + width], "big") & ones
        if size == ones:
            return 0
        position += 4 + width + size
    return position


def _asf_end(content: bytes) -> int:
    """The file's size by its File Properties Object; 0 if it does not know it (ASF specification, 3.2)."""
    at = content.find(_ASF_FILE_PROPERTIES, 0, 2**16)
    if at < 0 or len(content) < at + 92:
        raise truncated("its File Properties are not there")
    is_broadcast = content[at + 88] & 1
    return 0 if is_broadcast else int.from_bytes(content[at + 40 : at + 48], "little")


def _frames_end(content: bytes, container: Container) -> int:
    """Where the last frame ends: each of AMR and AAC (ADTS) tells its own length."""
    is_wide = content[:9] == b"#!AMR-WB\n"
    position = 0 if container == "aac" else 9 if is_wide else 6
    while position < len(content):
        if container == "aac":
            if content[position] != 0xFF or len(content) < position + 6:
                raise truncated(f"no frame of AAC at byte {position}")
            field = int.from_bytes(content[position + 3 : position + 6], "big")
            position += max(field >> 5 & 0x1FFF, 7)
        else:
            sizes = _AMR_WB_FRAME_BYTES if is_wide else _AMR_FRAME_BYTES
            position += sizes[content[position] >> 3 & 0x0F]
    return position
