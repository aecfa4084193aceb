"""README's table of measurements, made from the committed results: `python -m bench.table [--check]`, `make table`.

A line of the table is one op on one device: the range over its shapes of its rate and of its share of the ceiling, and
for each peer the geometric mean of peer's time over ours, with the range where there are several shapes.
"""

import argparse
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import FAMILIES, LONG

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("bfloat16", "float32")  # where a shape ends in one
BEGIN, END = "<!-- measured: begin; `make table` writes what follows -->", "<!-- measured: end -->"


@dataclass
class Family:
    """One file of results: the machine it names, its lines, and its notes (`Bench.note`) of each kind."""

    name: str
    machine: dict
    lines: list[dict]
    steps: list[dict]
    profiles: list[dict]


def read_family(path: Path) -> Family:
    """ValueError with file and line for what is no result of `eightfold bench --results`."""
    records = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(text)
        except ValueError:
            raise ValueError(f"{path}:{number}: not JSON: truncated?") from None
        if not isinstance(record, dict) or len(record) != 1:
            raise ValueError(f"{path}:{number}: expected an object with one key, got {text[:60]}")
        records.append(record)
    if not records or "machine" not in records[0]:
        raise ValueError(f"{path}: the first line should hold the machine")
    machine, lines = records[0]["machine"], [record["line"] for record in records if "line" in record]
    if "torch" in machine:  # as results had it before they named the peers' versions
        machine["versions"] = {"torch": machine.pop("torch")}
    for where, record, keys in (
        ("machine", machine, ("device", "versions", "commit", "copy_gbps")),
        *(("line", line, ("op", "shape", "us", "tflops", "gbps", "share_of_ceiling", "peers_us")) for line in lines),
    ):
        missing = [key for key in keys if key not in record]
        if missing:
            raise ValueError(f"{path}: a {where} without {', '.join(missing)}")
    notes = {kind: [record[kind] for record in records if kind in record] for kind in ("step", "profile")}
    return Family(path.stem, machine, lines, notes["step"], notes["profile"])


def read_results(folder: Path) -> dict[str, list[Family]]:
    """Families by device, in the order in which they are run. ValueError where there are none."""
    known = [*FAMILIES, *LONG]
    found: dict[str, list[Family]] = {}
    for path in sorted(folder.glob("*/*.jsonl"), key=lambda p: (p.parent.name, _place(p.stem, known), p.stem)):
        family = read_family(path)
        found.setdefault(family.machine["device"], []).append(family)
    if not found:
        raise ValueError(f"{folder}: no results; `eightfold bench --results {folder}` writes some")
    return found


def _place(name: str, known: list[str]) -> int:
    name = name if name in known else name.partition("-")[0]  # a part: step-1.1B
    return known.index(name) if name in known else len(known)


def table(results: dict[str, list[Family]]) -> str:
    """The text between the markers."""
    sections = []
    for device, families in results.items():
        sections += [_about(device, families), _step_rows(families), _rows(families), _profile_rows(families)]
    return "\n\n".join(section for section in sections if section)


def _about(device: str, families: list[Family]) -> str:
    machines = [family.machine for family in families]
    copies = [machine["copy_gbps"] / 1e3 for machine in machines]
    versions = [machine["versions"] for machine in machines]
    facts = [f"torch {_each(versions, 'torch')}", f"copy {_span(copies, '{:.2f}')} TB/s"]
    products = [m["fp8_matmul_tflops"] for m in machines if "fp8_matmul_tflops" in m]
    if products:
        facts.append(f"largest E4M3 product {_span(products, '{:,.0f}')} TFLOP/s")
    if any(machine.get("driver") for machine in machines):
        facts.insert(1, f"driver {_each(machines, 'driver')}")
    if len(_commits(families)) == 1:
        facts.insert(0, f"commit {_commits(families)[0]}")
    peers = sorted({name for found in versions for name in found} - {"torch"})
    facts += [f"{name} {_each(versions, name)}" for name in peers]
    text = f"{device}: {', '.join(facts)}."
    if any(family.lines for family in families):
        text += "\nCold L2, medians of interleaved runs; every line passed its correctness gate before it was timed."
    if any(line.get("share_of_copy") for family in families for line in family.lines):
        text += " In brackets: of a copy of as many bytes."
    return text


def _commits(families: list[Family]) -> list[str]:
    return sorted({_commit(family) for family in families})


def _commit(family: Family) -> str:
    return family.machine["commit"] or "unknown"


def _markdown(head: str, align: str, rows: list[tuple[list[str], Family]], families: list[Family]) -> str:
    """Cells of ``head`` and of the rows, with each row's commit where there are several; align: a letter a column."""
    several = len(_commits(families)) > 1
    rules = {"l": "---", "r": "--:"}
    lines = [head.split(" | ") + ["commit"] * several, [rules[a] for a in align + "l" * several]]
    lines += [cells + [_commit(family)] * several for cells, family in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _each(records: list[dict], key: str) -> str:
    return " and ".join(sorted({str(record[key]) for record in records if record.get(key)}))


def _rows(families: list[Family]) -> str:
    rows = []
    for family in families:
        groups: dict[tuple[str, bool], list[dict]] = {}
        # Small products are bound by bytes: another ceiling, another row. So is another dtype.
        for line in family.lines:
            _, _, dtype = line["shape"].rpartition(" ")
            op = f"{line['op']} {dtype}" if dtype in DTYPES else line["op"]
            groups.setdefault((op, bool(line["gbps"])), []).append(line)
        rows += [(_row(op, by_bytes, lines), family) for (op, by_bytes), lines in groups.items()]
    return _markdown("op | shapes | rate | of ceiling | peer's time over ours", "llrrl", rows, families) if rows else ""


def _step_rows(families: list[Family]) -> str:
    """What a layer or a whole step took and kept, ours and each peer."""
    rows = []
    for family in families:
        for step in family.steps:
            ours = step["runs"].get("ours", {})
            for name, run in sorted(step["runs"].items(), key=lambda item: item[0] != "ours"):
                times = _ratio(run.get("ms"), ours.get("ms"), "{:,.1f} ms", name)
                rows.append(([step["name"], name, times, _speed(run), _memory(run, ours, name)], family))
    return _markdown("training | run | time | tokens/s | memory", "llrrl", rows, families) if rows else ""


def _speed(run: dict) -> str:
    if run.get("images_per_second"):
        return f"{run['images_per_second']:,.2f} images/s"
    return f"{run['tokens_per_second']:,.0f}" if run.get("tokens_per_second") else ""


def _memory(run: dict, ours: dict, name: str) -> str:
    if run.get("does_not_fit"):
        return f"does not fit in {run['does_not_fit'] / 1e9:.0f} GB"
    text = [_ratio(run.get("peak_bytes", 0) / 1e9, ours.get("peak_bytes", 0) / 1e9, "peak {:,.2f} GB", name)]
    if run.get("saved_units"):
        text.append(f"saves {run['saved_units']:.1f} U")
    return ", ".join(text)


def _ratio(value: float | None, ours: float | None, form: str, name: str) -> str:
    """The figure and, of a peer, how many times ours it is."""
    if not value:
        return ""
    return form.format(value) + (f" ({value / ours:.2f}x ours)" if ours and name != "ours" else "")


def _profile_rows(families: list[Family]) -> str:
    """Where the time of our steps goes."""
    profiles = [(profile, family) for family in families for profile in family.profiles]
    if not profiles:
        return ""
    totals: dict[str, float] = {}
    for p, _ in profiles:
        for name, ms in p["ms"].items():
            totals[name] = totals.get(name, 0) + ms
    classes = sorted(totals, key=totals.get, reverse=True)
    rows = []
    for p, family in profiles:
        times = [f"{p['ms'][name]:,.2f}" if p["ms"].get(name) else "" for name in classes]
        idle = f"{p['idle_share'] * p['wall_ms']:,.2f} ({100 * p['idle_share']:.0f} %)"
        rows.append(([p["name"], *times, idle, f"{p['wall_ms']:,.2f}"], family))
    head = " | ".join(["our step, ms", *classes, "idle", "all"])
    return _markdown(head, "l" + "r" * (len(classes) + 2), rows, families)


def _row(op: str, by_bytes: bool, lines: list[dict]) -> list[str]:
    name, _, rest = op.partition(" ")
    shapes = lines[0]["shape"] if len(lines) == 1 else f"{len(lines)}: {lines[0]['shape']} to {lines[-1]['shape']}"
    if by_bytes:
        rate = _span([line["gbps"] / 1e3 for line in lines], "{:.2f}") + " TB/s"
    else:
        rate = _span([line["tflops"] for line in lines], "{:,.0f}") + " TFLOP/s"
    share = _span([100 * line["share_of_ceiling"] for line in lines], "{:.0f}") + " %"
    copies = [100 * line["share_of_copy"] for line in lines if line.get("share_of_copy")]
    if copies:
        share += f" ({_span(copies, '{:.0f}')} %)"
    return [f"`{name}` {rest}".strip(), shapes, rate, share, _peers(lines)]


def _peers(lines: list[dict]) -> str:
    ratios: dict[str, list[float]] = {}
    for line in lines:
        for peer, us in line["peers_us"].items():
            ratios.setdefault(peer, []).append(us / line["us"])
    means = {peer: statistics.geometric_mean(values) for peer, values in ratios.items()}
    text = []
    for peer in sorted(means, key=means.get):  # the fastest first
        mean, span = f"{means[peer]:.2f}", _span(ratios[peer], "{:.2f}")
        text.append(f"{peer} {mean}x" + (f" ({span})" if span != mean else ""))
    return ", ".join(text)


def _span(values: Iterable[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def replaced(readme: str, text: str, name: str = "README.md") -> str:
    """``readme`` with ``text`` between the markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{name}: the lines {BEGIN!r} and {END!r} should be there, in this order")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description="Write README's table of measurements.")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where the table is not current"
    )
    options = parser.parse_args(arguments)
    try:
        now = options.readme.read_text(encoding="utf-8")
        wanted = replaced(now, table(read_results(options.results)), str(options.readme))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.check:
        if now != wanted:
            print(f"{options.readme}: its table is not that of {options.results}; run `make table`")
        return int(now != wanted)
    options.readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
