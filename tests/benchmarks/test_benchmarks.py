"""What the benchmarks share: tasks that are what they say, evidence that is kept."""

import argparse
import io
import itertools
import json
import sys
import tarfile

import data
import documents
import harness
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
import schedule_peaks
import suite
import tasks
from common import ROOT
from flax import nnx
from jax import lax
from PIL import Image

pytestmark = pytest.mark.slow

# --- evidence -------------------------------------------------------------------------


def test_a_part_is_computed_once_per_source(tmp_path, monkeypatch):
    calls = itertools.count()
    path = tmp_path / "folder" / "part.json"

    def compute():
        return {"losses": np.array([1.0, np.inf]), "call": next(calls)}

    first = harness.resumable(path, compute)
    assert first == {"losses": [1.0, None], "call": 0}
    assert harness.resumable(path, compute) == first
    monkeypatch.setattr(harness, "source_hash", lambda: "another")
    assert harness.resumable(path, compute)["call"] == 1


def test_an_interruption_leaves_nothing_to_resume_from(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.resumable(tmp_path / "part.json", interrupted)
    assert harness.resumable(tmp_path / "part.json", lambda: 1) == 1


def test_the_evidence_is_of_committed_sources_and_of_commands_that_exist():
    for path in harness.RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        assert not record["environment"]["commit"].endswith("-dirty"), path.name
        assert (ROOT / record["claim"]["command"].split()[1]).exists(), path.name


def test_a_report_is_a_row_of_the_table_of_claims(tmp_path):
    args = argparse.Namespace(out=tmp_path, command="python benchmarks/x.py")
    claim = ("Why?", "a / b", "10", "1.00 ± 0.10 (n=2)", "none")
    rows, evidence = [{"arm": "a"}], {"losses": np.array([1.0, np.nan])}
    harness.report(args, "x", "title", rows, evidence, *claim)
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["evidence"] == {"losses": [1.0, None]}
    row = documents.table_of_claims(tmp_path).splitlines()[-1]
    assert row.startswith("| Why? | a / b | 10 | 1.00 ± 0.10 (n=2) | none |")
    assert row.endswith("| `python benchmarks/x.py` |")


@pytest.mark.parametrize(
    ("options", "refused"),
    [([], True), (["--data", "x.npz"], False), (["--smoke"], True)],
)
def test_evidence_of_more_data_is_not_overwritten(
    options, refused, tmp_path, monkeypatch, capsys
):
    command = "python benchmarks/x.py --data CIFAR10"
    (tmp_path / "x.json").write_text(json.dumps({"claim": {"command": command}}))
    monkeypatch.setattr(sys, "argv", ["x.py", "--out", str(tmp_path), *options])
    if refused:
        with pytest.raises(SystemExit):
            harness.parse_args(None, takes_data=True)
        assert "holds evidence made with --data" in capsys.readouterr().err
    else:
        assert harness.parse_args(None, takes_data=True).command == command


def test_a_smoke_run_is_no_evidence(monkeypatch, capsys):
    argv = ["x.py", "--smoke", "--out", str(harness.RESULTS)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        harness.parse_args(None)
    assert "no evidence" in capsys.readouterr().err


# --- measurement ----------------------------------------------------------------------


def test_each_arm_is_timed_in_every_round():
    calls = []
    arms = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = harness.interleave(arms, rounds=5)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 5, "b": 5}
    assert sorted(calls) == ["a"] * 6 + ["b"] * 6


def test_a_sweep_runs_what_is_not_kept(tmp_path):
    calls = []

    def square(name, k):
        calls.append(k)
        return k**2

    assert harness.sweep(square, [("a b", 1)], tmp_path) == {("a b", 1): 1}
    members = [("a b", k) for k in range(3)]
    found = harness.sweep(square, members, tmp_path, workers=1)
    assert found == {("a b", k): k**2 for k in range(3)}
    assert calls == [1, 0, 2]


def test_each_arm_takes_the_rate_with_the_best_mean_over_seeds(tmp_path):
    accuracies = {
        "a": {0.1: [50, 50], 0.2: [60, 30], 0.4: [49, 52]},
        "b": {0.1: [50, 50], 0.2: [60, 41], 0.4: [49, 49]},
    }

    def run(arm, rate, seed):
        return accuracies[arm][rate][seed], -rate

    best, grids = harness.tune(run, accuracies, [0.1, 0.2, 0.4], range(2), tmp_path)
    assert best == {"a": 0.4, "b": 0.2}
    np.testing.assert_array_equal(grids["a"][..., 0], [[50, 50], [60, 30], [49, 52]])
    np.testing.assert_array_equal(grids["a"][1, :, 1], [-0.2, -0.2])


@pytest.mark.parametrize("best", [3e-4, 2e-2, 1e-5, 1.0])
def test_the_best_peak_is_that_of_the_parabola_within_the_grid(best):
    rates = np.logspace(-4, -1, 7)
    losses = 0.1 * np.exp(np.log(rates / best) ** 2)
    record = {"peaks": rates, "losses": losses[:, None] * [0.5, 1.5]}
    expected = np.clip(best, rates[0], rates[-1])
    np.testing.assert_allclose(schedule_peaks.best_peak(record), expected)


def test_differences_are_paired():
    found = harness.paired([2.0, 5.0, 3.0, 1.0], [1.0, 2.0, 1.0, 1.0])
    assert found[2:] == (3, 0, 4)
    np.testing.assert_allclose(found[:2], [1.5, np.sqrt(5 / 3) / 2])
    assert str(found) == "+1.50 ± 0.65 (n=4, 3:0)"


# --- networks -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 5, 7, 1), (3, 1, 1, 4)])
def test_nine_products_are_the_convolution(shape):
    rng = np.random.default_rng(0)
    images = rng.normal(size=shape).astype(np.float32)
    kernel = rng.normal(size=(3, 3, shape[-1], 5)).astype(np.float32)
    expected = lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(networks.conv_3x3(images, kernel), expected, atol=1e-5)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("side", [16, 32])
def test_the_resnet_has_nine_layers_of_its_width(width, side):
    model = nnx.eval_shape(lambda: networks.ResNet9(width, rngs=nnx.Rngs(0)))
    kernels = [
        p.shape for p in jax.tree.leaves(nnx.state(model, nnx.Param)) if p.ndim > 1
    ]
    assert len(kernels) == 9
    assert max(shape[-1] for shape in kernels) == max(8 * width, 10)
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    logits = nnx.eval_shape(lambda m, x: m(x), model, images)
    assert logits.shape == (2, 10)


def test_no_character_of_the_transformer_sees_a_later_one():
    task = suite.sums_transformer()
    model = nnx.jit(task.make_model(nnx.Rngs(0)))
    tokens = task.held_out[0][:1]
    changed = tokens.at[0, 20].set((tokens[0, 20] + 1) % 10)
    before, after = model(tokens), model(changed)
    np.testing.assert_allclose(after[0, :20], before[0, :20], atol=1e-5)
    assert np.abs(after[0, 20:] - before[0, 20:]).max() > 1e-3


# --- data -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "zero"), (19, "nineteen"), (20, "twenty"), (48, "forty-eight")],
)
def test_numbers_in_words(number, words):
    assert data.in_words(number) == words


def test_the_targets_of_the_text_are_its_next_characters():
    inputs, targets = data.sums_in_words(50, 32)
    np.testing.assert_array_equal(inputs.ravel()[1:], targets.ravel()[:-1])


def fake_cifar10(folder):
    """The same 40 and 10 smooth images in the official layout and as JPEGs."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, size=(60, 2, 2, 3), dtype=np.uint8)
    images = small.repeat(16, axis=1).repeat(16, axis=2)
    labels = rng.integers(0, 10, size=60).astype(np.uint8)
    for k in range(6):
        part = slice(10 * k, 10 * k + 10)
        planes = images[part].transpose(0, 3, 1, 2).reshape(10, -1)
        rows = np.concatenate([labels[part, None], planes], axis=1)
        name = f"data_batch_{k + 1}.bin" if k < 5 else "test_batch.bin"
        (folder / name).write_bytes(rows.tobytes())
    arrays = {}
    for part, rows in (("train", slice(0, 50)), ("test", slice(50, 60))):
        files = []
        for image in images[rows]:
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "JPEG", quality=95, subsampling=0)
            files.append(np.frombuffer(stream.getvalue(), np.uint8))
        arrays[f"{part}_jpeg"] = np.concatenate(files)
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{part}_labels"] = labels[rows]
    np.savez(folder / "cifar10.npz", **arrays)
    with tarfile.open(folder / "cifar10.tar.gz", "w:gz") as archive:
        for file in folder.glob("*.bin"):
            archive.add(file, f"cifar-10-batches-bin/{file.name}")
    return images, labels


def test_cifar10_is_the_same_in_all_its_layouts(tmp_path):
    images, labels = fake_cifar10(tmp_path)
    options = {"num_train": 12, "num_test": 5}
    for path in (tmp_path, tmp_path / "cifar10.tar.gz", tmp_path / "cifar10.npz"):
        (train, classes), (test, test_classes) = data.load_cifar10(path, **options)
        assert train.shape == (12, 32, 32, 3)
        assert test.shape == (5, 32, 32, 3)
        np.testing.assert_array_equal(classes, labels[:12])
        np.testing.assert_array_equal(test_classes, labels[50:55])
        expected = (images[:12] / 255 - [0.4914, 0.4822, 0.4465]) / [
            0.2470,
            0.2435,
            0.2616,
        ]
        np.testing.assert_allclose(train, expected, atol=0.15)
    (halved, _), _ = data.load_cifar10(tmp_path, side=16, **options)
    np.testing.assert_allclose(halved, expected[:, ::2, ::2], atol=1e-5)


def test_augmentation_flips_and_shifts_and_keeps_the_labels():
    images = jnp.arange(64 * 16 * 16 * 3, dtype=jnp.float32).reshape(64, 16, 16, 3)
    changed, labels = data.flip_and_shift(jax.random.key(0), (images, jnp.arange(64)))
    np.testing.assert_array_equal(labels, np.arange(64))
    center = np.asarray(changed[:, 8, 8, 0] - images[:, 8, 8, 0])
    right = np.asarray(changed[:, 8, 9, 0] - changed[:, 8, 8, 0])
    assert set(right) == {-3.0, 3.0}  # The next pixel of three channels, either way.
    assert 20 < np.sum(right < 0) < 44
    assert len(np.unique(center)) > 10


# --- training -------------------------------------------------------------------------


def test_batches_hold_every_example_once_an_epoch():
    task = suite.diabetes()
    epoch = len(task.train[1]) // task.batch_size
    indices = tasks.batch_indices(task, 2 * epoch + 1, 0)
    assert indices.shape == (2 * epoch + 1, task.batch_size)
    for part in (indices[:epoch], indices[epoch : 2 * epoch]):
        assert len(np.unique(part)) == part.size
    assert not np.array_equal(indices[0], indices[epoch])
    assert not np.array_equal(indices, tasks.batch_indices(task, 2 * epoch + 1, 1))


def test_a_run_is_its_steps():
    training = tasks.Training(suite.diabetes(), lambda rate: optax.sgd(rate, 0.9))
    task, state = suite.diabetes(), training.start(3)
    _, losses = training.run(state, 0.01, tasks.batch_indices(task, 20, 3), 3)
    expected = []
    for batch in training.batches(3, 20):
        state, loss = training.step(state, 0.01, batch)
        expected.append(loss)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_held_out_loss_uses_the_running_statistics(tmp_path):
    fake_cifar10(tmp_path)
    parts = data.load_cifar10(tmp_path, num_train=50, side=8)
    task = tasks.Task(
        "fake",
        lambda rngs: networks.ResNet9(1, rngs=rngs),
        tasks.cross_entropy,
        *parts,
        10,
        5,
    )
    training = tasks.Training(task, optax.sgd)
    state = training.start(0)
    moved, _ = training.step(state, 0.0, training.batches(0, 1)[0])
    jax.tree.map(np.testing.assert_array_equal, moved[0], state[0])
    assert training.held_out_loss(moved) != training.held_out_loss(state)
