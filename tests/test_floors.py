import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The house, from the ground up. A module imports from lower floors, and from its neighbours: those in one set.
GROUND = {"errors", "extras"}
WORDS = {"layout", "progress", "progressions", "strict_json"}
RECORDS = {"chunks", "manifest"}
POLICIES = {"schedule", "best", "retention", "contest", "selection", "words"}
CONTRACTS = {"ranks", "stores", "formats"}
FLOWS = {
    *("attempt", "agreeing", "catalog", "saving", "restoring", "writer", "run"),
    *("copies", "judging", "keeping", "linked_keeping", "mirror", "planning", "pointer", "telling", "triggers"),
}
HANDS_WITHOUT_TORCH = {
    "ranks.board",
    *("stores.direct", "stores.file_sink", "stores.file_source", "stores.local", "stores.naming", "stores.read_ahead"),
    *("stores.appearing", "stores.leftovers", "stores.new_file", "stores.spares"),
}
ENGINE = {
    "ahead",
    "arena",
    "copying",
    "guard",
    "memory",
    "plan",
    "snapshot",
    "stager",
    "transfer",
    "witness",
    "writing",
}
HANDS = {
    *HANDS_WITHOUT_TORCH,
    *("formats.full", "formats.known", "formats.pth", "formats.safetensors_file", "formats.tree"),
    *("formats.pth_reading", "formats.pth_unpickling", "formats.pth_whole"),
    *("formats.full_layout", "formats.safetensors_layout", "formats.savable", "formats.form"),
    *("formats.tensor_pickle", "formats.zip_archive", "formats.zip_image"),
    *("formats.amending", "formats.boxes", "formats.held", "formats.merging", "formats.shard_file", "formats.sharded"),
    *("formats.sharded_layout", "formats.sharded_plan", "formats.sharded_reading", "formats.shards", "formats.sharing"),
    *("formats.dcp_planner", "formats.gathered", "formats.tiling"),
    *("formats.full_reading", "formats.safetensors_reading", "formats.filling", "formats.hashing", "formats.stand_ins"),
    *("formats.streaming", "formats.placeholders"),
    *("formats.export_dcp", "formats.export_hf", "formats.export_pth", "formats.export_safetensors"),
    *(f"formats.dcp_{name}" for name in ("chunks", "item", "metadata", "native", "pickle", "reading", "safetensors")),
    *("formats.dcp_stored", "formats.dcp_zip"),
    *("formats.placements", "formats.pth_folder", "formats.spread"),
    *(
        "ranks.process_group",
        "backends",
        "buffers",
        "destinations",
        "environment",
        "flat_parameters",
        "foreign",
        "matching",
        "message_hub",
        "accelerator_state",
        "loader_position",
        "optimizer_destinations",
        "optimizer_views",
        "optimizers",
        "prefixes",
        "placing",
        "rng",
        "runner_state",
        "state",
        "wrappers",
    ),
    *(f"engine.{name}" for name in ENGINE),
}
CANDIDATES = {"candidates"}
INTRODUCED = {
    *("capturing", "choosing", "dcp_reader", "exporting", "fetching", "initialising", "publishing", "hook_words"),
}
PLACES = {"places"}
RESUMING = {"policy", "resuming", "saver", "step_body"}
RUNS = {"checkpointer", "runner_run"}
RANKS_RUN = {"sharded_runner"}
HOOK = {"hook"}
DOORS = {
    "testing",
    *("integrations.lightning", "integrations.lightning_parts"),
    *("integrations.transformers", "integrations.transformers_parts"),
}

FLOORS = [
    *([GROUND], [WORDS], [RECORDS], [POLICIES], [CONTRACTS], [FLOWS, HANDS]),
    *([CANDIDATES], [INTRODUCED], [PLACES], [RESUMING], [RUNS], [RANKS_RUN], [HOOK], [DOORS]),
]
NAMED = [name for floor in FLOORS for room in floor for name in room]

ROOT = Path(__file__).parents[1] / "distckpt"
# A folder whose first page says what it is, and nothing else.
FOLDERS = {"engine", "integrations"}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if path != ROOT / "__init__.py" and path not in {ROOT / folder / "__init__.py" for folder in FOLDERS}
}

WITHOUT_TORCH = sorted(GROUND | WORDS | RECORDS | POLICIES | CONTRACTS | FLOWS | HANDS_WITHOUT_TORCH)
IMPORT_EACH = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{name} imports torch")
"""


def imports(path: Path) -> Iterator[str]:
    """The modules of distckpt that the file imports, wherever in it, as NAMED spells them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            asked = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            longer = [f"{node.module}.{alias.name}" for alias in node.names]
            asked = [name if name.removeprefix("distckpt.") in FILES else node.module for name in longer]
        else:
            continue
        yield from (name.removeprefix("distckpt.") for name in asked if name.split(".")[0] == "distckpt")


def may_import(name: str) -> set[str]:
    below = {"distckpt"}  # which imports nothing before it is asked for a name
    for floor in FLOORS:
        for room in floor:
            if name in room:
                return below | room
        below = below.union(*floor)
    raise AssertionError(f"{name} stands on no floor")


def test_every_module_stands_on_one_floor():
    assert sorted(NAMED) == sorted(FILES)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_module_imports_from_lower_floors_and_neighbours_only(name):
    assert set(imports(FILES[name])) <= may_import(name)


def test_records_policies_and_flows_import_without_torch():
    names = [f"distckpt.{name}" for name in WITHOUT_TORCH]
    run = subprocess.run([sys.executable, "-c", IMPORT_EACH, *names], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def test_distckpt_itself_imports_without_torch():
    run = subprocess.run([sys.executable, "-c", IMPORT_EACH, "distckpt"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
