"""What a person types at a shell, through Hydra."""

import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import vireo
from vireo import config

PROGRAM = textwrap.dedent(
    """
    import sys
    import hydra
    from vireo import config
    from vireo.errors import UserError

    config.register()

    @hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name="config")
    def task(cfg):
        settings = config.settled(cfg)
        assert not {"torch", "diffusers", "datasets"} & set(sys.modules)
        print(settings["run"], settings["seed"], settings["tracker"])

    try:
        with config.explain_mistakes(sys.argv[1:]):
            task()
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        sys.exit(2)
    """
)


@pytest.fixture
def program(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(Path(vireo.__file__).parents[1]))

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "program.py", *words], capture_output=True, text=True)

    return run


def test_a_run_is_composed_without_torch_and_leaves_no_files(program, tmp_path):
    before = set(tmp_path.iterdir())
    done = program("experiment=taehv", "tracker=null", "seed=3")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("mini_") and done.stdout.endswith(" 3 None\n")
    assert set(tmp_path.iterdir()) == before


def test_showing_the_config_is_quick(program):
    """At most a second of processor time: tab completion runs the program at each key."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = program("experiment=taehv", "--cfg", "job")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0 and "_target_: vireo.models.taehv.TAEHV" in shown.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_mistakes_are_one_message_and_exit_code_2(program):
    failed = program("experiment=tahv", "stepz=3", "lr=abc")
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.splitlines()[0] == "3 things to mend in the config:"
    assert "Traceback" not in failed.stderr and "HYDRA_FULL_ERROR" not in failed.stderr


def test_mistakes_of_a_sweep_are_found_before_its_first_job(program, tmp_path):
    failed = program("-m", "seed=1,2", "num_frames=9,12")
    assert failed.returncode == 2 and failed.stdout == ""
    assert "command line: num_frames: " in failed.stderr and "9 or 16" in failed.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_sweep_whose_flag_stands_between_its_words(program, tmp_path):
    done = program("seed=range(1,3)", "-m", "schedule=glob(c*)", "tracker=null")
    assert done.returncode == 0, done.stderr
    runs = [line for line in done.stdout.splitlines() if line.startswith("mini_")]
    assert len(set(runs)) == 4
    assert len(list((tmp_path / "outputs" / "sweeps").iterdir())) == 1


def test_unresolvable_values_when_showing_the_config(program):
    failed = program("--cfg", "job", "--resolve", "notes=${oc.env:NO_SUCH_VARIABLE}")
    assert failed.returncode == 2
    assert "needs the environment variable NO_SUCH_VARIABLE, which is not set" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_folder_of_ones_own(program, tmp_path):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/other.yaml").write_text(
        "# @package _global_\ndefaults: [taehv, _self_]\nexperiment: other\nmini_of: other\nseed: 5\n"
    )
    done = program("--config-dir", "mine", "experiment=other")
    assert done.returncode == 0 and " 5 " in done.stdout
    failed = program("--config-dir", "mine", "experiment=othr")
    assert "Did you mean other?" in failed.stderr


def test_help_lists_what_can_be_chosen(program):
    shown = program("--help").stdout
    for name, about in config.describe_experiments().items():
        assert re.search(rf"^ *{name} +{re.escape(about[:40])}", shown, re.MULTILINE)
    assert "freeze-policy  adapter, all, decoder, encoder" in shown
    assert "gradient_accumulation  micro-batches in a step (1)" in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_hydras_own_errors_can_be_had(program, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert "Traceback" in program("stepz=3").stderr
