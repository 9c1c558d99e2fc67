"""A user's mistakes, as they are typed or written, and what is said about them."""

import re
import textwrap
from pathlib import Path

import pytest

from vireo import config
from vireo.errors import UserError


def messages(*words: str) -> list[str]:
    return [str(problem) for problem in config.problems(words)]


def message(*words: str) -> str:
    [only] = messages(*words)
    return only


def write(path: Path, text: str) -> None:
    path.write_text(textwrap.dedent(text).lstrip("\n"))


def edit(path: Path, old: str, new: str) -> int:
    """Replace text in a file; returns its line."""
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path}"
    path.write_text(text.replace(old, new))
    return text[: text.index(old)].count("\n") + 1


def test_a_shipped_experiment_has_none():
    assert messages("experiment=taehv") == []


# ------------------------------------------------------------------ misspelt keys, in each place where they can be


def test_misspelt_key_on_the_command_line():
    assert message("stepz=3") == "command line: stepz: there is no such key. Did you mean steps?"


def test_misspelt_key_added_on_the_command_line():
    assert message("+stepz=3") == "command line: stepz: there is no such key. Did you mean steps?"
    assert message("++stepz=3") == "command line: stepz: there is no such key. Did you mean steps?"


def test_a_key_below_what_is_null():
    said = message("adapter.rank=2")
    assert said == "command line: adapter.rank: adapter is null and has no keys; choose adapter=lora or lora_published"
    assert message("max_hours.minutes=2").endswith("max_hours is null and has no keys")


def test_misspelt_key_in_an_experiment_file(conf):
    line = edit(conf / "experiment/taehv.yaml", "\nsteps: ", "\nstepz: ") + 1
    assert f"conf/experiment/taehv.yaml:{line}: stepz: there is no such key. Did you mean steps?" in messages()


def test_misspelt_word_in_a_defaults_list(conf):
    line = edit(conf / "experiment/taehv.yaml", "- override /loss:", "- overide /loss:")
    found = messages()[0]
    assert found == (
        f"conf/experiment/taehv.yaml:{line}: overide loss: 'overide' is no keyword of a defaults list. "
        "Did you mean override?"
    )
    edit(conf / "config.yaml", "- optional local:", "- optioal local:")
    assert "Did you mean optional?" in messages()[0]


def test_unknown_argument_of_a_target(conf):
    line = edit(conf / "loss/autoencoder.yaml", "decoder_input:", "decodr_input:")
    assert message().startswith(
        f"conf/loss/autoencoder.yaml:{line}: loss.decodr_input: vireo.losses.autoencoder.Autoencoder has no argument "
        "decodr_input. Did you mean decoder_input? It takes "
    )
    unknown = "".join(messages("+model.network.varaint=taehv"))
    assert "varaint: vireo.models.taehv.TAEHV has no argument varaint. Did you mean variant?" in unknown


def test_misspelt_key_of_hydra():
    assert "hydra.ouput_subdir" in message("hydra.ouput_subdir=x")


def test_nested_keys_are_followed():
    assert "Did you mean model.network.variant?" in message("model.netwrk.variant=taehv")
    assert "Did you mean model.network.variant?" in message("model.variant=taehv")
    assert "Did you mean checkpoint.every?" in message("checkpoint.evry=3")
    assert "Did you mean lr?" in message("model.lr=3")


def test_misspelt_group_and_option(conf):
    assert "Did you mean optimizer?" in message("optimiser=adamw")
    assert message("experiment=tahv").startswith(
        "command line: experiment=tahv: there is no such option. Did you mean taehv? There are "
    )
    assert message("freeze_policy=decoder") == (
        "command line: freeze_policy: the group is written freeze-policy=decoder"
    )
    line = edit(conf / "experiment/taehv.yaml", "- override /loss: autoencoder", "- override /loss: autoencodr")
    assert message().startswith(
        f"conf/experiment/taehv.yaml:{line}: loss: autoencodr: there is no such option. Did you mean autoencoder?"
    )
    edit(conf / "experiment/taehv.yaml", "override /loss: autoencodr", "override /los: autoencoder")
    assert message() == (
        f"conf/experiment/taehv.yaml:{line}: override /los: there is no such group. Did you mean loss?"
    )


def test_an_argument_that_no_file_sets_is_not_called_unknown():
    assert message("loss.mix_probability=0.3") == (
        "command line: loss.mix_probability: no file sets this argument of vireo.losses.autoencoder.Autoencoder: "
        "write +loss.mix_probability=0.3"
    )
    assert messages("+loss.mix_probability=0.3") == []


def test_what_vireo_passes_itself_cannot_be_set():
    assert "the learning rate is the top-level lr" in message("optimizer.lr=3")
    assert "the learning rate is the top-level lr" in message("+optimizer.lr=3")
    assert "both splits" in message("+data.split=train")


def test_invalid_yaml_is_located(conf):
    edit(conf / "experiment/taehv.yaml", "steps: 10000", "steps: [1")
    assert re.match(r"conf/experiment/taehv.yaml:\d+: not valid YAML: ", message())


# ------------------------------------------------------------------ values


def test_wrong_types():
    assert message("lr=abc") == "command line: lr: is 'abc'; expected a number"
    assert message("steps=2.5") == "command line: steps: is 2.5; expected a whole number or null"
    assert message("checkpoint.keep_best=maybe") == (
        "command line: checkpoint.keep_best: is 'maybe'; expected true or false"
    )
    assert message("tags=a") == "command line: tags: is 'a'; expected a list, [a,b]"
    assert "expected a number" in message("+optimizer.eps=[1]") or "expected float" in message("+optimizer.eps=[1]")
    assert "expected tuple[float, float]" in message("optimizer.betas=[0.9]")
    assert "expected Literal['teacher', 'own', 'mixed']" in message("loss.decoder_input=ours")
    assert "keys are expected: checkpoint.<key>=<value>" in message("checkpoint=3")


@pytest.mark.parametrize(
    "word", ["lr=0", "lr=-1", "steps=0", "batch_size=0", "ema.decay=1", "loader.workers=-1", "launcher.processes=0"]
)
def test_numbers_out_of_range(word):
    key, _, value = word.partition("=")
    limit = r"(at least|more than|less than) .* expected"
    assert re.fullmatch(rf"command line: {key}: is {value}(\.0)?; {limit}", message(word))


def test_yaml_booleans(conf):
    edit(conf / "experiment/taehv.yaml", "max_grad_norm: 1.0", "max_grad_norm: 1.0\nprecision: no\nresume: off")
    assert messages()[0].endswith(
        "precision: is false (YAML reads yes, no, on and off so; put a word in quotes); "
        "expected one of auto, fp32, bf16, fp16"
    )
    assert "resume: is false: YAML reads" in messages()[1]
    edit(conf / "experiment/taehv.yaml", "precision: no", "precision: fp32")
    assert "resume: is false: YAML reads" in message()


def test_missing_values(conf):
    edit(conf / "experiment/taehv.yaml", "lr: 3e-4\n", "")
    edit(conf / "sizes/mini/experiment/taehv.yaml", "lr: 5e-4\n", "")
    assert "lr: has no value (learning rate): give it one, lr=…" in message()


def test_steps_and_epochs():
    assert "say how long to train" in message("steps=null")
    assert "give one of them, steps=null epochs=2" in message("epochs=2")
    assert messages("epochs=2", "steps=null") == []


def test_processes():
    assert "choose strategy=ddp" in message("strategy=single", "launcher.processes=2")
    assert "expected a whole number or auto" in message("launcher.processes=many")
    assert messages("launcher.processes=auto") == []
    assert messages("launcher.processes=4") == []


def test_names_and_places_of_runs(tmp_path):
    assert "it names a folder" in message("run=a/b")
    assert "does not exist" in message("init_from=nowhere.safetensors")
    (tmp_path / "step_1").mkdir()
    assert messages("init_from=step_1", "run=my_run-2.b") == []
    assert "names learning_rate, which is no key" in message("allow_changes=[learning_rate]")
    assert "Did you mean model.network.variant?" in message("allow_changes=[model.network.varian]")


def test_files_of_weights_that_are_not_there(tmp_path):
    words = ("experiment=opens2v_longlive", f"model.network.generator={tmp_path}/base.pt")
    assert f"model.network.generator: is '{tmp_path}/base.pt', which does not exist" in message(*words)
    (tmp_path / "base.pt").touch()
    assert messages(*words) == []
    assert "adapter.weights: is 'none.safetensors', which does not exist" in message(
        "experiment=opens2v_wan", "adapter=lora", "adapter.weights=none.safetensors"
    )


def test_a_weight_of_the_subject_without_its_mask():
    words = ("experiment=opens2v_wan", "loss.subject_weight=2")
    assert "loss.subject_weight: is 2, and without data.subject_mask=true" in message(*words)
    assert messages(*words, "data.subject_mask=true") == []


def test_several_values_without_a_sweep():
    assert "-m tries each in turn" in message("seed=1,2")
    assert """Put text in quotes: 'resume="a=b"'""" in message("resume=a=b")
    assert """Put text in quotes: 'freeze_policy.train=["^a"]'""" in message("freeze_policy.train=[^a]")
    assert "Expected key=value" in message("what")


# ------------------------------------------------------------------ interpolations, environment, secrets


def test_an_option_that_needs_what_another_has_not(conf):
    write(conf / "loss/denoising.yaml", "_target_: vireo.losses.autoencoder.Autoencoder\nl1: ${model.noise_schedule}\n")
    assert message("loss=denoising") == (
        "conf/loss/denoising.yaml:2: loss.l1: loss=denoising needs model.noise_schedule, model=taehv has none"
    )


def test_interpolations_that_lead_nowhere(monkeypatch):
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    assert "refers to nothing.here, which is not in the config" in message("notes=${nothing.here}")
    assert "needs the environment variable NO_SUCH_VARIABLE, which is not set" in message(
        "notes=${oc.env:NO_SUCH_VARIABLE}"
    )
    assert "cannot be resolved: Unsupported interpolation type nosuch" in message("notes=${nosuch:1}")


def test_secrets_stay_out_of_configs(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert "looks like a secret" in message("notes=${oc.env:WANDB_API_KEY}")
    assert "looks like a secret" in message("notes=${oc.env:MY_PASSWORD,none}")
    held = message("notes='see 0123456789abcdef'")
    assert "holds the value of WANDB_API_KEY" in held and "0123456789abcdef" not in held
    with pytest.raises(UserError, match="looks like a secret"):
        config.resolve(config.compose(["notes=${oc.env:WANDB_API_KEY}"]))


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWD", "MY_SECRET", "APP_CREDENTIALS", "key", "TOKEN_OF_MINE"]
)
def test_every_name_of_a_secret_is_known(monkeypatch, name):
    monkeypatch.setenv(name, "fedcba9876543210")
    for words in (f"notes=${{oc.env:{name}}}", f"tags=['${{oc.env:{name}}}']", f"run=x-${{oc.env:{name}}}"):
        told = message(words)
        assert "looks like a secret" in told and "fedcba9876543210" not in told
    for words in ("notes=fedcba9876543210", "tags=[a,xfedcba9876543210x]"):
        told = message(words)
        assert f"holds the value of {name}" in told and "fedcba9876543210" not in told


# ------------------------------------------------------------------ objects


def test_targets_that_are_not_there():
    assert "Did you mean Autoencoder?" in message("loss._target_=vireo.losses.autoencoder.Autoencodr")
    assert "Did you mean autoencoder?" in message("loss._target_=vireo.losses.autoencodr.Autoencoder")
    assert "it is a module" in message("loss._target_=vireo.losses.autoencoder")


def test_targets_of_others_need_leave():
    refused = message("tracker._target_=os.system")
    assert "may not be called by a config" in refused and "allow_targets=[os]" in refused
    assert "which is not installed" in message("tracker._target_=no_such_pkg.Tracker", "allow_targets=[no_such_pkg]")
    assert messages("tracker._target_=logging.getLogger", "allow_targets=[logging]") == []


def test_values_without_an_object(conf):
    edit(conf / "experiment/taehv.yaml", "max_grad_norm: 1.0", "adapter:\n  rank: 4")
    assert "adapter: has no _target_, only rank: these values belong to no object" in message()
    edit(conf / "experiment/taehv.yaml", "adapter:\n  rank: 4", "")
    assert message("~loss") == message("loss=null") == "command line: loss: is missing: choose an option with loss=…"
    assert messages("~adapter") == messages("tracker=null") == messages("~tracker") == []


def test_unknown_and_missing_nodes_of_a_model(conf):
    edit(conf / "model/taehv.yaml", "encoder:", "encodr:")
    unknown, missing = messages()
    assert "model.encodr: is nothing that vireo reads. Did you mean model.encoder?" in unknown
    assert "model.encoder: is missing" in missing


def test_an_object_needs_its_arguments(conf):
    edit(conf / "data/clips.yaml", "root: ${paths.data}", "")
    assert "data: vireo.data.clips.Clips needs root" in message()


# ------------------------------------------------------------------ lengths, sizes, files


def test_illegal_number_of_frames():
    illegal = message("num_frames=12")
    assert illegal.startswith("command line: num_frames: ") and "9 or 16" in illegal
    assert messages("num_frames=16") == []
    assert "Unknown TAEHV variant 'taecv'" in message("model.network.variant=taecv")


def test_data_without_a_size():
    asked = message("paths.data=/somewhere")
    assert "command line: paths.data: is /somewhere, but no size was chosen" in asked
    assert "size=full" in asked and "size=mini" in asked
    assert messages("paths.data=/somewhere", "size=mini") == []
    assert "no size was chosen" in message("paths.weights=/somewhere")


def test_no_mini_numbers(conf):
    write(
        conf / "experiment/mine.yaml",
        """
        # @package _global_
        defaults: [taehv, _self_]
        experiment: mine
        """,
    )
    assert "there are no mini numbers for mine: say size=full, or write sizes/mini/experiment/mine.yaml" in message(
        "experiment=mine"
    )
    write(
        conf / "sizes/mini/experiment/mine.yaml",
        """
        # @package _global_
        defaults: [mini/experiment/taehv, _self_]
        mini_of: mine
        """,
    )
    assert messages("experiment=mine") == []
    edit(conf / "experiment/mine.yaml", "experiment: mine", "experiment: yours")
    assert "they must be called the same" in message("experiment=mine")


def test_full_size_says_what_is_missing_and_how_to_get_it(tmp_path, full):
    data, weights = messages("size=full")
    assert "paths.data: size=full needs your data. Give the folder: paths.data=…" in data
    assert "machine.data in conf/local/default.yaml" in data
    assert "paths.weights: size=full needs your weights (taehv: https://github.com/madebyollin/taehv" in weights
    assert "there is no such folder" in message("size=full", "paths.data=nowhere", "paths.weights=weights")
    assert messages(*full) == []
    (tmp_path / "weights/taehv/taecvx.safetensors").unlink()
    assert "model.network.weights: " in message(*full) and "taehv/taecvx is missing (taehv: https://" in message(*full)
    assert messages(*full, "model.network.weights=null") == []
    (tmp_path / "weights/taehv/taecvx.pth").touch()
    assert messages(*full) == []


def test_a_machine_names_its_folders_once(conf, full, monkeypatch, tmp_path):
    write(conf / "local/default.yaml", "# @package _global_\nmachine:\n  data: data\n  weights: weights\n")
    assert messages("size=full") == []
    assert messages() == []  # the mini run does not see them
    assert "mini-" in config.settings([])["paths"]["data"]
    write(
        conf / "local/default.yaml",
        """
        # @package _global_
        defaults: [override /size: full]
        machine:
          data: data
          weights: weights
        """,
    )
    assert messages() == [] and config.settings([])["steps"] == 10000
    assert config.settings([])["paths"]["data"] == str(tmp_path / "data")
    assert "mini-" in config.settings(["size=mini"])["paths"]["data"]
    (conf / "local/default.yaml").unlink()
    monkeypatch.setenv("VIREO_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("VIREO_WEIGHTS", str(tmp_path / "weights"))
    assert messages("size=full") == []


# ------------------------------------------------------------------ all at once


def test_what_follows_from_a_mistake_is_not_told():
    """data.num_frames and the model's check read num_frames, and are wrong only because it is."""
    assert message("num_frames=abc") == "command line: num_frames: is 'abc'; expected a whole number"
    assert message("num_frames=0") == "command line: num_frames: is 0; at least 1 is expected"


def test_all_mistakes_are_told_together(conf):
    edit(conf / "experiment/taehv.yaml", "\nwidth: 128", "\nwidht: 128")
    words = ["model.netwrk.variant=x", "precision=fp8", "loss.decoder_input=ours", "seed=-1", "optimizer=adam"]
    found = "\n".join(messages(*words, "num_frames=12"))
    for key in (
        "num_frames",
        "widht",
        "model.netwrk.variant",
        "precision",
        "loss.decoder_input",
        "seed",
        "optimizer=adam:",
    ):
        assert key in found
    with pytest.raises(UserError, match="things to mend in the config") as told:
        config.compose(words)
    assert told.value.__cause__ is None and told.value.__suppress_context__
    with pytest.raises(UserError, match="2 things to mend in the config:\n  - .* seed: .*\n  - .* widht: "):
        config.settings(["seed=-1"])
