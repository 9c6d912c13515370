"""The golden files: every quantity of every case within tolerance, the processing tables equal."""

import shutil

import pytest
from safetensors.numpy import load_file, save_file

from iv3jax.bench.parity import model_parity, processing_parity

CASES = {
    ("m2la", "text"): {"logits", "hidden_after_layer_0", "hidden_after_last_layer"},
    ("m2la", "packed"): {"logits", "loss_token", "loss_square", "features_image", "deepstack_image_2"},
    ("m2la", "video"): {"logits", "features_video", "deepstack_video_0"},
    ("gqa", "text"): {"logits"},
    ("gqa", "image"): {"logits"},
    ("gqa", "video"): {"logits"},
}


@pytest.mark.parametrize(("model", "case"), list(CASES))
def test_case(golden, model, case):
    """2e-4, 1e-5 on losses; what is seen is about 1e-6."""
    path = golden / model / "cases" / f"{case}.safetensors"
    rows = model_parity(golden / model, [path])
    inputs = {"input_ids", "cu_seqlens", "labels_shifted"}
    outputs = {
        k for k in load_file(path) if k not in inputs and not k.startswith(("pixel_values", "grid_thw"))
    }
    assert {row.quantity for row in rows} == outputs >= CASES[model, case]
    for row in rows:
        tolerance = 1e-5 if row.quantity.startswith("loss") else 2e-4
        tolerance = 0 if row.quantity == "position_ids" else tolerance
        assert row.difference <= tolerance, row


@pytest.mark.medium
@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
@pytest.mark.parametrize("case", ["text", "packed", "video"])
def test_m2la_through_the_kernels(golden, case, implementation):
    """Interpreted on a CPU."""
    path = golden / "m2la" / "cases" / f"{case}.safetensors"
    rows = model_parity(golden / "m2la", [path], implementation)
    assert {row.quantity for row in rows} >= CASES["m2la", case]
    assert max(row.difference for row in rows) <= 2e-4


def test_processing(golden):
    rows = processing_parity(golden / "processing.json")
    assert {row.quantity for row in rows} == {"image_resize", "video_resize", "sampling"}
    assert all(row.difference == 0 and row.shape[0] > 3 for row in rows), rows


def test_a_changed_number_is_seen(golden, tmp_path):
    """The comparison can fail: one weight, one expected logit."""
    folder = shutil.copytree(golden / "gqa", tmp_path / "gqa")
    weights = load_file(folder / "model.safetensors")
    weights["model.language_model.layers.2.self_attn.k_norm.weight"][3] += 0.1
    save_file(weights, folder / "model.safetensors")
    case = golden / "gqa" / "cases" / "text.safetensors"
    assert {r.quantity: r.difference for r in model_parity(folder, [case])}["logits"] > 2e-4
    values = load_file(case)
    values["logits"][0, 3, 5] += 0.01
    save_file(values, tmp_path / "case.safetensors")
    changed = {
        r.quantity: r.difference for r in model_parity(golden / "gqa", [tmp_path / "case.safetensors"])
    }
    assert changed["logits"] == pytest.approx(0.01, abs=1e-4)
