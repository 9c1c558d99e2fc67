"""What a run's network starts from: `init_from` and the adapter, for networks that learn in part."""

import pytest
import torch

from tests import wan
from tests.toys import STATE
from vireo import checkpoint, objects, weights
from vireo.errors import UserError
from vireo.freezing import FreezePolicy

NEW = [r"^clip_proj\.", r"^vae_proj\.", r"\.(k_vae|v_vae|norm_k_vae)\.", r"\.clip_gate$"]
LORA = {"_target_": "vireo.lora.LoRA", "rank": 2, "alpha": 4, "targets": ["to_q", "to_v"], "weights": None}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return wan.save_base(tmp_path_factory.mktemp("wan"))


def settings(base, init_from=None, adapter=None):
    node = {"_target_": "vireo.models.wan_references.WanReferences", "transformer": str(base), "clip_dim": wan.CLIP_DIM}
    return {"seed": 0, "model": {"network": node}, "init_from": init_from and str(init_from), "adapter": adapter}


def trained(base, adapter=None, patterns=NEW):
    """A network whose new modules, and adapter, are no longer what they were."""
    made = objects.network(settings(base, adapter=adapter))
    FreezePolicy([*patterns, *([r"\.lora_"] if adapter else [])])(made)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) / 5)
    return made


def save(made, run):
    """A checkpoint as a run's, of step 3."""
    state = weights.trained_state(made, made.state_dict())
    return checkpoint.save(run, 3, {"network": state}, {**STATE, "frozen": weights.frozen_digest(made)})


def same(one, two):
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["new modules", "and a LoRA"])
def test_what_a_run_has_learnt_beside_a_frozen_base(base, adapter, tmp_path):
    made = trained(base, adapter)
    folder = save(made, tmp_path)
    assert same(objects.network(settings(base, tmp_path, adapter)), made)
    assert same(objects.network(settings(base, folder, adapter)), made)
    made.export(tmp_path / "export", made.state_dict())
    (folder / "network.safetensors").unlink()  # a finished run is its export
    (tmp_path / "finished").write_text('{"step": 3}')
    assert same(objects.network(settings(base, tmp_path, adapter)), made)


def test_a_checkpoint_of_another_base_is_refused(base, tmp_path):
    made = trained(base)
    with torch.no_grad():
        made.transformer.patch_embedding.weight += 1
    folder = save(made, tmp_path)
    with pytest.raises(UserError, match=rf"`vireo export run={tmp_path} step=3`, and init_from="):
        objects.network(settings(base, folder))


def test_a_checkpoint_with_more_than_the_network_is_refused(base, tmp_path):
    folder = save(trained(base, LORA), tmp_path)
    with pytest.raises(UserError, match=r"lora_A\.default\.weight: not trained by this network"):
        objects.network(settings(base, folder))


def test_two_sources_of_an_adapter_are_refused(base, tmp_path):
    made = trained(base, LORA)
    made.export(tmp_path, made.state_dict())
    with pytest.raises(UserError, match="leave one of them out"):
        objects.network(settings(base, tmp_path, LORA | {"weights": str(tmp_path)}))
    with pytest.raises(UserError, match="say adapter=lora"):
        objects.network(settings(base, tmp_path))


def test_an_adapter_is_made_for_the_weights_that_a_run_starts_from(base, tmp_path):
    """Norms of DoRA are those of the rows that it finds."""
    made = trained(base, patterns=[r"\.attn2\.to_v\.weight", *NEW])
    made.export(tmp_path, made.state_dict())
    started = objects.network(settings(base, tmp_path, LORA | {"dora": True}))
    given = {**wan.inputs(), "timesteps": torch.tensor([100.0, 900.0])}
    with torch.no_grad():
        torch.testing.assert_close(started.eval()(**given), made.eval()(**given), rtol=0, atol=1e-5)
