"""Network and loss together against the numbers of the published trainer and of diffusers' pipelines."""

import pytest
import torch

from tests.cogvideox import CASES, RecordedDraws, batch, noise_schedule, reference, save_transformer
from vireo.losses.denoising import Denoising
from vireo.models.cogvideox import CogVideoX

SAME = {"rtol": 1e-5, "atol": 1e-5}


def step(case, mode, folder):
    """The network after a backward pass, the loss, the prediction and what the transformer was given."""
    network = CogVideoX(str(save_transformer(case, folder)), "fp32", mode)
    seen = {}
    network.transformer.register_forward_pre_hook(lambda module, args, given: seen.update(given), with_kwargs=True)
    given = batch(case, mode)
    loss = Denoising(noise_schedule(case), [name for name in given if name != "latents"])

    def called(*arguments, **conditions):
        seen["v_pred"] = network(*arguments, **conditions)
        return seen["v_pred"]

    objective = loss(called, given, RecordedDraws(f"d.{case}", CASES[case]["timesteps"]))
    objective.total.backward()
    return network, objective.total.detach(), seen


@pytest.mark.parametrize("case", CASES)
def test_as_the_published_trainer(case, tmp_path):
    network, total, seen = step(case, "upstream", tmp_path)
    wanted = {name.partition("/")[2]: value for name, value in reference().items() if name.startswith(f"{case}/")}
    torch.testing.assert_close(total.view(1), wanted["loss"].float().view(1), rtol=3e-5, atol=0)
    torch.testing.assert_close(total.view(1), wanted["v_mse"].float().view(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(seen["hidden_states"], wanted["hidden_states"], **SAME)
    torch.testing.assert_close(seen["v_pred"].detach().transpose(1, 2), wanted["v_pred"], **SAME)
    if "rope_cos" in wanted:
        for table, name in zip(seen["image_rotary_emb"], ("rope_cos", "rope_sin"), strict=True):
            torch.testing.assert_close(table, wanted[name], **SAME)
    gradients = {name: parameter.grad for name, parameter in network.transformer.named_parameters()}
    compared = [name for name in wanted if name.startswith("grad.")]
    assert len(compared) == 3
    for name in compared:
        torch.testing.assert_close(gradients[name.removeprefix("grad.")], wanted[name], rtol=1e-4, atol=1e-5)
    norm = torch.nn.utils.get_total_norm(gradients.values())
    torch.testing.assert_close(norm.view(1), wanted["grad_norm"].float().view(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_as_the_inference_pipeline(case, tmp_path):
    _, total, seen = step(case, "pipeline", tmp_path)
    wanted = reference()
    torch.testing.assert_close(total.view(1), wanted[f"{case}/loss_pipeline"].float().view(1), rtol=1e-6, atol=0)
    if f"{case}/rope_cos_pipeline" in wanted:
        for table, name in zip(seen["image_rotary_emb"], ("rope_cos", "rope_sin"), strict=True):
            torch.testing.assert_close(table, wanted[f"{case}/{name}_pipeline"], **SAME)


def test_the_two_differ_where_they_should():
    stored = reference()
    for case in CASES:
        differ = abs(float(stored[f"{case}/loss"]) - float(stored[f"{case}/loss_pipeline"])) > 1e-3
        assert differ == (case in ("t2v_5b_off", "i2v_15")), case
