"""The main loops of a Hopper kernel, found in its PTX: the blocks of instructions between a loop's head and the jumps
back to it.

What stands before a loop and behind it runs once, and counts for nothing where the loop has many turns. Some parts run
in few turns: the mask of a block at the diagonal, the clearing of values behind a sequence's end. `fewest` are the
instructions of a turn that runs none of them, `most` those of a turn that runs all.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)")
IN_REGISTERS = " from registers"
"""Put behind the name of a `wgmma` whose left operand is there."""
SCOPE, LABEL, STATEMENT = r"[{}]", r"[\w$]+:(?!:)", r"[@.\w][^;]*;"


@dataclass
class Block:
    """Instructions that run one after another, and the blocks where they may go on."""

    names: list[str] = field(default_factory=list)
    follows: list[int] = field(default_factory=list)

    @property
    def flops(self) -> int:
        return flops_of(Counter(self.names))


@dataclass(frozen=True)
class Loop:
    """One turn."""

    fewest: Counter[str]
    """Instructions of a thread by name, where no part runs that can be passed over."""
    most: Counter[str]


def products_of(names: Counter[str]) -> list[tuple[int, int, int, bool]]:
    """(rows, columns, inputs, whether the left operand is in registers) of one warpgroup's `wgmma`."""
    found = [(WGMMA.match(name), name, times) for name, times in names.items()]
    return [
        (int(m[1]), int(m[2]), int(m[3]), name.endswith(IN_REGISTERS))
        for m, name, times in found if m for _ in range(times)
    ]  # fmt: skip


def flops_of(names: Counter[str]) -> int:
    """Of one warpgroup's `wgmma`."""
    return sum(2 * m * n * k for m, n, k, _ in products_of(names))


def entry(words: str, kernel: str) -> str:
    """The PTX of a kernel among all that the compiler says."""
    behind = words.partition(f".entry {kernel}_mosaic_gpu_kernel")[2]
    return behind.partition("ptxas info")[0].partition(".entry ")[0]


def threads_of(ptx: str) -> int:
    """Threads of a block, of all its warpgroups."""
    found = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)
    if found is None:
        raise ValueError(
            "the kernel's PTX has no .reqntid or .maxntid, which says how many threads a block has"
        )
    return int(found[1])


def main_loops(ptx: str) -> list[Loop]:
    """The innermost loops that multiply, in the order of the text. Warpgroups whose work differs have one each."""
    blocks = _blocks(ptx)
    loops = {
        head: inside
        for head, inside in sorted(_loops(blocks).items())
        if any(blocks[at].flops for at in inside)
    }
    return [
        _turn(blocks, head, inside)
        for head, inside in loops.items()
        if not any(other < inside for other in loops.values())
    ]


def _statements(ptx: str) -> list[tuple[str, tuple[int, ...]]]:
    """Statements, and labels with their colon, each with the scopes around it: inline assembly has its own labels."""
    text = re.sub(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", "", ptx.partition("{")[2], flags=re.MULTILINE)
    found: list[tuple[str, tuple[int, ...]]] = []
    scopes, opened = [0], 0
    for part in re.findall(f"{SCOPE}|{LABEL}|{STATEMENT}", text):
        if part == "{":
            opened += 1
            scopes.append(opened)
        elif part == "}":
            scopes.pop()
            if not scopes:
                break
        else:
            found.append((part, tuple(scopes)))
    return found


def _blocks(ptx: str) -> list[Block]:
    """Blocks in the order of the text, the first one at the entry."""
    blocks, labels, jumps = [Block()], {}, []
    goes_on = True  # from the last block into the next one

    def begin() -> None:
        blocks.append(Block())
        if goes_on:
            blocks[-2].follows.append(len(blocks) - 1)

    for statement, scopes in _statements(ptx):
        if statement.endswith(":"):
            begin()
            labels[scopes[-1], statement[:-1]] = len(blocks) - 1
            goes_on = True
            continue
        guarded = statement.startswith("@")
        name, *operands = statement.rstrip(";").split()[guarded:]
        if name.startswith("."):  # a declaration
            continue
        held = WGMMA.match(name) and "".join(operands).count("{") == 2  # sums and left operand
        blocks[-1].names.append(name + IN_REGISTERS if held else name)
        if name.startswith(("bra", "ret", "exit", "trap")):
            if name.startswith("bra"):
                jumps.append((len(blocks) - 1, operands[-1], scopes))
            goes_on = guarded
            begin()
            goes_on = True
    for at, label, scopes in jumps:
        blocks[at].follows.append(next(labels[s, label] for s in reversed(scopes) if (s, label) in labels))
    return blocks


def _loops(blocks: list[Block]) -> dict[int, frozenset[int]]:
    """Blocks of each loop, by the block at its head."""
    before: dict[int, list[int]] = {at: [] for at in range(len(blocks))}
    for at, block in enumerate(blocks):
        for after in block.follows:
            before[after].append(at)
    loops: dict[int, set[int]] = {}
    for at, head in _jumps_back(blocks):
        inside = loops.setdefault(head, {head})
        left = [at]
        while left:
            if (one := left.pop()) not in inside:
                inside.add(one)
                left += before[one]
    return {head: frozenset(inside) for head, inside in loops.items()}


def _jumps_back(blocks: list[Block]) -> list[tuple[int, int]]:
    """(from, to) of jumps to a block that is on the way there from the entry."""
    found, seen, way = [], {0}, [(0, iter(blocks[0].follows))]
    above = {0}
    while way:
        at, follows = way[-1]
        after = next(follows, None)
        if after is None:
            way.pop()
            above.discard(at)
        elif after in above:
            found.append((at, after))
        elif after not in seen:
            seen.add(after)
            above.add(after)
            way.append((after, iter(blocks[after].follows)))
    return found


def _turn(blocks: list[Block], head: int, inside: frozenset[int]) -> Loop:
    """The ways through a loop that multiply as much as any: the shortest one and the longest one."""
    back = set(_jumps_back(blocks))

    @cache
    def ways(at: int) -> list[tuple[int, tuple[int, ...]]]:
        """(instructions, blocks) of the shortest and the longest way from a block to a jump back to the head."""
        found = [(0, ())] if (at, head) in back else []
        for after in blocks[at].follows:
            if after in inside and (at, after) not in back:
                found += ways(after)
        found = [(count + len(blocks[at].names), (at, *way)) for count, way in found]
        if not found:
            return []
        most = max(_flops(blocks, way) for _, way in found)
        found = [each for each in found if _flops(blocks, each[1]) == most]
        return [min(found), max(found)]

    shortest, longest = (way for _, way in ways(head))
    return Loop(_names(blocks, shortest), _names(blocks, longest))


def _flops(blocks: list[Block], way: tuple[int, ...]) -> int:
    return sum(blocks[at].flops for at in way)


def _names(blocks: list[Block], way: tuple[int, ...]) -> Counter[str]:
    return Counter(name for at in way for name in blocks[at].names)
