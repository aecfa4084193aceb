"""README's table: what the committed results say, and one clear line for results that are not whole."""

import json
import shutil

import pytest

MACHINE = {
    "device": "A GPU",
    "versions": {"torch": "2.11", "x": "1"},
    "commit": "abc",
    "copy_gbps": 3000.0,
    "driver": "570.1",
}
LINE = {"op": "cast both", "shape": "1x2", "us": 2.0, "tflops": None, "gbps": 1500.0, "share_of_ceiling": 0.5}


@pytest.fixture
def table(bench):
    return bench.table


@pytest.fixture
def tree(tmp_path, table):
    """A results folder of one line, and a README with markers."""
    folder = tmp_path / "results" / "a-gpu"
    folder.mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    return tmp_path


def write(tree, *lines, machine=MACHINE, name="quant"):
    records = [{"machine": machine}, *({"line": LINE | line} for line in lines)]
    path = tree / "results" / "a-gpu" / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(table, tree, *arguments):
    return table.main(["--results", str(tree / "results"), "--readme", str(tree / "README.md"), *arguments])


def test_readme_is_made_from_the_committed_results(table):
    assert table.main(["--check"]) == 0, "run `make table`"


def test_rows_are_ranges_and_geometric_means(table, tree):
    write(
        tree,
        {"peers_us": {"peer": 4.0, "slow": 20.0}},
        {"shape": "3x4", "gbps": 3000.0, "share_of_ceiling": 1.0, "share_of_copy": 1.04, "peers_us": {"peer": 16.0}},
        {"op": "product", "gbps": None, "tflops": 1234.4, "peers_us": {}},
        {"op": "step wall", "shape": "5 tensors float32", "peers_us": {}},
    )
    assert run(table, tree) == 0
    text = (tree / "README.md").read_text()
    assert text.startswith(
        f"before\n{table.BEGIN}\n\nA GPU: commit abc, torch 2.11, driver 570.1, copy 3.00 TB/s, x 1.\n"
    )
    assert "In brackets: of a copy of as many bytes." in text
    assert text.endswith(f"\n\n{table.END}\nafter\n")
    peers = "peer 4.00x (2.00 to 8.00), slow 10.00x"
    assert f"| `cast` both | 2: 1x2 to 3x4 | 1.50 to 3.00 TB/s | 50 to 100 % (104 %) | {peers} |\n" in text
    assert "| `product` | 1x2 | 1,234 TFLOP/s | 50 % |  |\n" in text
    assert "| `step` wall float32 | 5 tensors float32 | 1.50 TB/s | 50 % |  |\n" in text
    assert run(table, tree, "--check") == 0
    assert run(table, tree) == 0
    assert (tree / "README.md").read_text() == text


def test_steps_and_profiles(table, tree):
    ours = {"ms": 100.0, "tokens_per_second": 81920.0, "peak_bytes": 2e10, "saved_units": 9.0}
    runs = {"bf16": {"ms": 150.0, "peak_bytes": 4e10}, "ours": ours, "fp32": {"peak_bytes": None, "does_not_fit": 8e10}}
    notes = [
        {"step": {"name": "1B 4x2048", "runs": runs}},
        {"profile": {"name": "1B 4x2048", "ms": {"GEMM": 70.0, "other": 5.0}, "wall_ms": 80.0, "idle_share": 0.0625}},
    ]
    path = write(tree, name="step-1B")
    path.write_text(path.read_text() + "".join(json.dumps(note) + "\n" for note in notes))
    write(tree, {"peers_us": {}})
    assert run(table, tree) == 0
    text = (tree / "README.md").read_text()
    assert "In brackets" not in text
    for row in (
        "| 1B 4x2048 | ours | 100.0 ms | 81,920 | peak 20.00 GB, saves 9.0 U |\n"
        "| 1B 4x2048 | bf16 | 150.0 ms (1.50x ours) |  | peak 40.00 GB (2.00x ours) |\n",
        "| 1B 4x2048 | fp32 |  |  | does not fit in 80 GB |\n",
        "| our step, ms | GEMM | other | idle | all |",
        "| 1B 4x2048 | 70.00 | 5.00 | 5.00 (6 %) | 80.00 |",
    ):
        assert row in text


def test_commits_are_in_the_rows_where_they_differ(table, tree):
    write(tree, {"peers_us": {}})
    write(tree, {"op": "other", "peers_us": {}}, machine=MACHINE | {"commit": None}, name="norm")
    assert run(table, tree) == 0
    text = (tree / "README.md").read_text()
    assert "A GPU: torch 2.11" in text
    assert "| 50 % |  | abc |\n" in text
    assert "| 50 % |  | unknown |\n" in text


def test_check_says_that_the_table_is_old(table, tree, capsys):
    write(tree, {"peers_us": {}})
    assert run(table, tree, "--check") == 1
    assert "run `make table`" in capsys.readouterr().out
    assert "old" in (tree / "README.md").read_text()


def test_families_come_in_the_order_in_which_they_run(table, tree):
    for name in ("unknown", "step-1B", "optim", "quant"):
        write(tree, {"peers_us": {}, "op": name}, name=name)
    families = table.read_results(tree / "results")["A GPU"]
    assert [family.name for family in families] == ["quant", "optim", "step-1B", "unknown"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line should hold the machine"),
        ('{"line": {}}\n', "the first line should hold the machine"),
        ('{"machine": {"device": "A"}}\n', "a machine without versions, commit, copy_gbps"),
        (json.dumps({"machine": MACHINE}) + '\n{"line": {"op": "a", "sh', "quant.jsonl:2: not JSON: truncated?"),
        (json.dumps({"machine": MACHINE}) + "\n[1]\n", "quant.jsonl:2: expected an object with one key"),
        (json.dumps({"machine": MACHINE}) + "\n" + json.dumps({"line": LINE}), "a line without peers_us"),
    ],
)
def test_broken_results(table, tree, capsys, text, message):
    write(tree).write_text(text)
    with pytest.raises(SystemExit) as stop:
        run(table, tree)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert "old" in (tree / "README.md").read_text()


def test_no_results_and_no_markers(table, tree, capsys):
    with pytest.raises(SystemExit):
        run(table, tree)
    assert "no results; `eightfold bench --results" in capsys.readouterr().err
    write(tree, {"peers_us": {}})
    (tree / "README.md").write_text("no markers")
    with pytest.raises(SystemExit):
        run(table, tree)
    assert "should be there, in this order" in capsys.readouterr().err
    shutil.rmtree(tree / "results")
    (tree / "README.md").unlink()
    with pytest.raises(SystemExit):
        run(table, tree)
    assert "README.md" in capsys.readouterr().err
