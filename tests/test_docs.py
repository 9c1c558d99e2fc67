"""The documentation is true: its tables, messages and links are checked, its commands and its code are run.

Commands run in children of this process, which has imported everything already; one is run by a shell as it stands.
`python -m tests.test_docs` writes the tables of the pages anew.
"""

import ast
import dataclasses
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path

import pytest

from vireo import config
from vireo.config import identity, places
from vireo.config.problems import Problem
from vireo.config.schema import Config
from vireo.models import taehv_variants
from vireo.verbs import prepare, prepare_cache

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of each command line in a page's bash blocks."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


# ------------------------------------------------------------------ tables

GROUPS = {
    "experiment": "the recipe: chooses options, sets numbers",
    "size": "the demonstration or the recipe itself",
    "model": "network (learns), encoder (frozen), sampler (what validation shows)",
    "data": "the dataset",
    "loss": "the objective",
    "optimizer": "the optimizer; its learning rate is `lr`",
    "schedule": "the learning rate over time",
    "freeze-policy": "which parameters learn, by pattern; its node is `freeze_policy`",
    "adapter": "what is added to the network",
    "cache": "whether frozen encodings are computed once and kept, see [The encoding cache](cache.md)",
    "strategy": "how one model is spread over processes",
    "launcher": "where processes run",
    "tracker": "where figures are shown beside `metrics.jsonl`",
    "paths": "folders; follows `size`",
    "debug": "ready-made short runs",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def groups_table() -> str:
    rows = []
    for group, meaning in GROUPS.items():
        options = [path.stem for path in sorted((config.conf_dir() / group).glob("*.yaml"))]
        rows.append([f"`{group}`", meaning, ", ".join(f"`{option}`" for option in options)])
    return table(["group", "says", "options"], rows)


def knobs_table() -> str:
    return table(["key", "default", "meaning"], list(_knobs(Config, "")))


def _knobs(schema: type, prefix: str) -> Iterator[list[str]]:
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _knobs(hints[field.name], f"{field.name}.")
        elif hints[field.name] != dict[str, typing.Any] | None:  # the node of a group
            yield [f"`{prefix}{field.name}`", _default(field), field.metadata["meaning"]]


def _default(field: dataclasses.Field) -> str:
    value = field.default_factory() if field.default is dataclasses.MISSING else field.default
    value = value.value if isinstance(value, Enum) else value
    if value == "???":
        return ""
    return {"None": "`null`", "True": "`true`", "False": "`false`", "": '`""`'}.get(str(value), f"`{value}`")


def free_keys() -> str:
    return ", ".join(f"`{key}`" for key in identity.NOT_PART_OF_A_RUN if key != "interpolations") + "."


def variants_table() -> str:
    import torch

    from vireo.models.taehv import TAEHV

    rows = []
    for name, variant in taehv_variants.VARIANTS.items():
        with torch.device("meta"):
            network = TAEHV(name)
        sizes = [sum(p.numel() for p in part.parameters()) for part in (network.encoder, network.decoder)]
        legal = [n for n in range(2, 60) if taehv_variants.is_legal(name, n)][:4]
        cell = f"{variant.frames_per_latent} x {variant.spatial_downscale} x {variant.spatial_downscale}"
        parameters = f"{sizes[0] / 1e6:.2f} M + {sizes[1] / 1e6:.2f} M"
        lengths = ", ".join(map(str, [*legal, "…"]))
        rows.append([f"`{name}`", variant.latents_of, cell, str(variant.latent_channels), parameters, lengths])
    head = ["variant", "latents of", "frames x pixels of a latent", "channels", "parameters", "`num_frames`"]
    return table(head, rows)


TABLES = {"groups": groups_table, "knobs": knobs_table, "free keys": free_keys, "variants": variants_table}


def with_tables(text: str) -> str:
    """A page with what its `<!-- table: … -->` marks stand for."""

    def written(mark: re.Match) -> str:
        return f"<!-- table: {mark[1]} -->\n\n{TABLES[mark[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: ([a-z ]+) -->\n.*?<!-- end -->", written, text, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_say_what_the_code_says(page):
    assert page.read_text() == with_tables(page.read_text()), "python -m tests.test_docs writes the tables anew"


def test_all_groups_and_tables_are_shown():
    folders = {path.name for path in config.conf_dir().iterdir() if path.is_dir()}
    assert folders - {"hydra", "local", "sizes"} == GROUPS.keys()
    assert {mark for page in PAGES for mark in re.findall("<!-- table: (.*) -->", page.read_text())} == TABLES.keys()


# ------------------------------------------------------------------ links


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.is_file(), f"{target}: no such file"
        headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE) if linked.suffix == ".md" else []
        assert not anchor or anchor in map(slug, headings), f"{target}: no such heading"


def test_every_page_is_in_the_navigation():
    import yaml

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = set(re.findall(r"[\w/]+\.md", str(nav)))
    assert named == {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}


def test_paths_in_the_readme_exist():
    text = (ROOT / "README.md").read_text().partition("## Where things are")[2]
    cells = re.findall(r"^\| (.*?`.*?) \|", text, re.MULTILINE)
    paths = re.findall("`(.+?)`", " ".join(cells))
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists() and not (ROOT / "src/vireo" / path).exists()] == []


# ------------------------------------------------------------------ tests that pages name


def test_tests_that_a_page_names_exist():
    """A promise that names its proof: `file.py::function`, and whether that runs in the full matrix only."""
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`( \(full\))?", page)
    assert len(named) > 50
    for file, function, is_full in named:
        text = (ROOT / "tests" / file).read_text()
        assert f"\ndef {function}(" in text or not function, f"{file}::{function}"
        marks = text.partition(f"\ndef {function}(")[0].rpartition("\n\n")[2]
        assert bool(is_full) == (function != "" and "@pytest.mark.full" in marks), f"{file}::{function}: full or not?"
    promises = re.findall(r"^\| (P\d+) \|", page, re.MULTILINE)
    assert promises == [f"P{number}" for number in range(1, 13)]


# ------------------------------------------------------------------ messages


def template(node: ast.AST) -> str:
    """A string expression as it is printed, with … for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%\.?\d*[sdfg]", "…", text)
        case ast.JoinedStr(values=parts):
            return "".join(template(part) for part in parts)
    return "…"


def test_quoted_messages_are_printed_somewhere():
    strings = [ast.walk(ast.parse(path.read_text())) for path in (ROOT / "src").rglob("*.py")]
    printed = "\0".join(template(n) for nodes in strings for n in nodes if isinstance(n, ast.JoinedStr | ast.Constant))
    page = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## Messages of PyTorch")[0]
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(quoted) > 40
    unheard = [message for message in quoted if message.strip("… ") not in printed]
    assert not unheard


# ------------------------------------------------------------------ keys in running text

ACTIONS = {f"cache={action}" for action in prepare_cache.ACTIONS}
NO_KEYS = {"key=value", "weights_only=True", "repeat_oldest=True", *ACTIONS}
UNKNOWN = ("there is no such key", "there is no such option", "no file sets", "has no argument", "in quotes")


@pytest.mark.slow
def test_keys_in_the_text_exist():
    """`data.flip=0.5` and the like: the key exists, and has a plus if it needs one."""
    words: dict[str, set[str]] = {}
    for page in PAGES:
        text = re.sub(r"^(```.*?^```|#.*?)$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for word in " ".join(re.findall("`([^`]+)`", text)).split():
            match = re.fullmatch(r"(\+?[a-z][\w.-]*)=[\w./,\[\]-]+", word)
            if match and word not in NO_KEYS and match[1] not in prepare.OWN:
                words.setdefault(match[1], set()).add(word)
    assert len(words) > 20
    choices = {word for key in words if places.is_group(key) for word in words[key]}
    assert not [str(problem) for word in sorted(choices) for problem in unknown([word])]
    values = {key: sorted(found) for key, found in words.items() if not places.is_group(key)}
    nowhere = set(values)
    for experiment in config.experiments():  # a key has to be known to one of them
        together = [f"experiment={experiment}", *(found[0] for found in values.values())]
        nowhere_here = {problem.key for problem in unknown(together)}
        nowhere &= {key for key in values if key.lstrip("+") in nowhere_here}
    assert not nowhere


def unknown(words: list[str]) -> list[Problem]:
    return [problem for problem in config.problems(words) if any(phrase in problem.message for phrase in UNKNOWN)]


# ------------------------------------------------------------------ commands and code


# What keeps a run of the documentation's commands short. Keys that a command gives itself stay as they are.
SHORT = {
    "steps": "2",
    "height": "32",
    "width": "32",
    "batch_size": "1",
    "gradient_accumulation": "1",
    "validation.clips": "1",
    "validation.at_start": "false",
    "loader.workers": "0",
    "checkpoint.keep_best": "false",
    "tracker": "none",
}
ALWAYS_SHORT = ("steps", "batch_size")
EDITS = ("experiment=ip2p_video", "experiment=ip2p_image")
INPAINTING = ("experiment=diffueraser", "experiment=diffueraser_stage1")
CAPTIONED = ("experiment=cogvideox_t2v_lora", "data=captioned_clips")
SUBJECTS = ("experiment=opens2v_wan", "experiment=opens2v_longlive")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder for each placeholder of the pages, and everything imported that a run imports.

    Clips, edits, videos and captioned clips of one's own; weights under the released names, small but for TAEHV's; an
    editor and a LoRA that were exported.
    """
    import matplotlib.pyplot  # noqa: F401
    import pandas  # noqa: F401
    import torch
    import torchmetrics.functional.image  # noqa: F401
    from diffusers import AutoencoderKL, AutoencoderKLCogVideoX  # noqa: F401
    from PIL import Image
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    from tests.data import captions, edits
    from vireo import report, video_io, worker  # noqa: F401
    from vireo.data import frame_edits  # noqa: F401
    from vireo.diffusion.noise_schedule import NoiseSchedule
    from vireo.lora import LoRA
    from vireo.mini import subject_clips, world
    from vireo.models.cogvideox import CogVideoX
    from vireo.models.taehv import TAEHV
    from vireo.models.video_ip2p import VideoEditor

    folder = tmp_path_factory.mktemp("world")
    report.draw({"a run": [{"step": step, "loss": 1.0} for step in (1, 2)]}, folder / "curves.png")  # loads the fonts
    for number in range(3):
        frames = torch.randint(0, 256, (3, 3, 48, 64), dtype=torch.uint8).repeat_interleave(9, dim=0)
        video_io.write_video(folder / "clips" / f"{number}.mp4", frames, fps=8)
    edits.write(folder / "edits", suffix=".jpg")
    for part in ("captioned", "captioned/validation"):
        captions.write(folder / part, [9, 9])
    (folder / "videos").symlink_to(world.ensure() / "data")
    subject_clips.write(folder / "opens2v", num_clusters=4)
    Image.new("RGB", (40, 30), "red").save(folder / "opens2v" / "thing.png")
    (folder / "weights").mkdir()
    for path in (world.ensure() / "weights").iterdir():
        (folder / "weights" / path.name).symlink_to(path)
    (folder / "weights" / "taehv").unlink()
    network = TAEHV("taecvx")
    network.export(folder / "weights" / "taehv", network.state_dict())
    released = str(folder / "weights" / "instruct-pix2pix")
    editor = VideoEditor(20, released, NoiseSchedule(prediction_type="v_prediction"))
    editor.export(folder / "editor", editor.state_dict())
    adapted = CogVideoX(str(folder / "weights" / "CogVideoX-5b"), "fp32")
    LoRA(rank=4, alpha=4)(adapted)
    adapted.export(folder / "lora", adapted.state_dict())
    return folder


def in_place(text: str, world: Path) -> str:
    """Placeholders (/clips, /weights, …) as folders that exist."""
    return re.sub(r"(?<![\w.])/(clips|edits|videos|captioned|opens2v|weights|editor|lora)\b", rf"{world}/\1", text)


def in_world(words: list[str], world: Path) -> list[str]:
    """A command with folders that exist. Demonstrations that encode read the few files here, not hundreds."""
    words = [in_place(word, world) for word in words]
    for experiments, data in ((EDITS, "edits"), (CAPTIONED, "captioned"), (SUBJECTS, "opens2v")):
        if set(experiments) & set(words) and not any(word.startswith("size=") for word in words):
            words += ["size=mini", f"paths.data={world}/{data}"]  # which no later one adds again
    return words


def in_child(task: Callable[[], int], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run a function in a forked process in `folder`; its exit code and what it printed."""
    output = folder / ".output"

    def child() -> None:
        sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115 - open to the end of the process
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        os.chdir(folder)
        os.environ.update(environment)
        sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
        code = 1
        try:
            code = task()
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode is not None, f"still going on after 120 s:\n{output.read_text()}"
    return process.exitcode, output.read_text()


def command_line(words: list[str]) -> Callable[[], int]:
    """What `python train.py …` and `vireo …` call, with the worker in the same process."""

    def task() -> int:
        from vireo import cli, launch, worker
        from vireo.console import set_up_logging

        def start(resolved: Path, launcher: dict, held: int) -> int:
            set_up_logging(resolved.parent / "train.log")
            return worker.main(resolved)

        launch.start = start
        sys.argv = list(words)
        return cli.vireo() if words[0] == "vireo" else cli.train()

    return task


def shortened(words: list[str]) -> list[str]:
    """A command that ends soon: few steps, of a sweep the values of one key, one clip to evaluate.

    What is measured of whole clips and of the speed is left out where the network has its released size.
    """
    if words[:2] == ["vireo", "evaluate"]:
        words = [*words, *(["clips=1"] if not any(word.startswith("clips=") for word in words) else [])]
        slow = ("speed", "full_resolution") if {"experiment=taehv", "size=full"} <= set(words) else ()
        return [*words, *(f"model.evaluations.{name}=null" for name in slow)]
    if words[:2] == ["python", "train.py"]:
        words = words[1:]
    elif words[:2] != ["vireo", "train"]:
        return words
    if any(word.startswith(("--cfg", "--info", "--help")) for word in words):
        return words
    swept = [word for word in words if "," in word and "-m" in words]
    words = [word.partition(",")[0] if word in swept[1:] else word for word in words]
    given = {word.partition("=")[0] for word in words}
    short = {key: value for key, value in SHORT.items() if key in ALWAYS_SHORT or key not in given}
    if {*EDITS, *INPAINTING, *CAPTIONED, *SUBJECTS} & set(words):
        short["model.sampler.num_inference_steps"] = "2"
    if "debug" in given:  # says itself how many steps it needs
        del short["steps"]
    return [*words, *(f"{key}={value}" for key, value in short.items())]


def run(words: list[str], folder: Path) -> None:
    """Run one command of the documentation; fails for one that fails, or of which nothing is known."""
    environment = {"VIREO_OUTPUTS": str(folder / "outputs")}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    else:
        assert words[0] == "vireo" or words[:2] == ["python", "train.py"], f"no test knows how to run {words}"
        code, output = in_child(command_line(shortened(words)), folder, environment)
        assert code == 0, f"{shlex.join(words)} ended with {code}:\n{output}"


def project(page: Path, folder: Path) -> None:
    """Write the files of a page: a block of code under the file's name."""
    for name, code in re.findall(r"^`([\w/.]+)`\n\n```\w+\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code)


def pages_with_commands():
    """README and the recipes' pages train for minutes in all."""
    pages = [page for page in PAGES if page.name != "CONTRIBUTING.md"]
    slow = [page for page in pages if page.parent.name == "recipes" or page.name == "README.md"]
    marks = {page: [pytest.mark.slow] for page in slow}
    return [pytest.param(page, id=name_of(page), marks=marks.get(page, ())) for page in pages]


@pytest.mark.parametrize("page", pages_with_commands())
def test_commands_run(page, world, tmp_path):
    project(page, tmp_path)
    (tmp_path / "my_project").mkdir(exist_ok=True)
    (tmp_path / "my_project" / "__init__.py").touch()
    for words in commands(page):
        run(in_world(words, world), tmp_path)
        for name in [word.removeprefix("run=") for word in words if word.startswith("run=")]:
            assert list(tmp_path.glob(f"outputs/*/{name}*/finished")), f"{shlex.join(words)} finished no run"


def test_the_test_on_the_page_passes(tmp_path):
    project(ROOT / "docs" / "extending.md", tmp_path)
    words = ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path), "test_losses.py"]
    code, output = in_child(lambda: pytest.main(words), tmp_path, {"PYTHONPATH": str(tmp_path)})
    assert code == 0, output
    assert "1 passed" in output


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "extending.md"], ids=name_of)
def test_python_blocks_run(page, world, tmp_path, monkeypatch):
    monkeypatch.setenv("VIREO_OUTPUTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for code in blocks(page, "python"):
        short = re.sub(r'("num_inference_steps": )\d+', r"\g<1>2", code)
        exec(compile(in_place(short, world), name_of(page), "exec"), {})


def test_launch_scripts_pass_their_words_on(tmp_path):
    """As a person types it: a shell and fresh interpreters."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "VIREO_OUTPUTS": str(tmp_path / "outputs"),
    }

    def shell(script: str, *words: str) -> str:
        answer = subprocess.run(
            [ROOT / "launch" / script, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    assert "processes: auto" in shell("node.sh", "experiment=taehv", "--cfg", "job", "-p", "launcher")
    shell("single.sh", "experiment=taehv", "run=real", *(f"{key}={value}" for key, value in SHORT.items()))
    assert (tmp_path / "outputs" / "taehv" / "real" / "finished").is_file()


if __name__ == "__main__":
    for changed in PAGES:
        changed.write_text(with_tables(changed.read_text()))
