"""The specification of mamba_sentiment.py, in its order. No network, no GPU, no timing.

Expected values come from a second computation: NumPy in float64 for scan and blocks, counts by hand.
"""

import functools
import io
import itertools
import json
import lzma
import math
import os
import pathlib
import pickle
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile

COMPILED = tempfile.mkdtemp()  # what several processes compile
os.environ["TF_XLA_FLAGS"] = f"--tf_xla_persistent_cache_directory={COMPILED}"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # fast rather than well
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import mamba_sentiment as ms

SCRIPT = pathlib.Path(ms.__file__)
os.environ["PYTHONPATH"] = str(SCRIPT.parent)
TINY = "--width 16 --depth 1 --max-length 10 --epochs 3 --batch-size 32"
LSTM = f"train --model lstm --data tweets.csv --run-dir again {TINY}"  # after `trained`
SMALL = {"width": 16, "vocab_size": 100}
MAMBA = functools.partial(ms.MambaBlock, state=5, selection="B+C")
ATTENTION = functools.partial(ms.AttentionBlock, 4, 4)
GOOD = "text,label\nA,negative\nB,positive\n"
SIX = '0,1,d,q,u,"bad, ""day"""\n"4","2","d","q","u","good\nday"\n"2","3","d","q","u","é"\n'
FILES = [".lock", "checkpoint.npz", "history.csv", "metrics.json", "model.keras"]
WORDS = ["sad", "awful", "lost", "cry", "pain"], ["happy", "great", "love", "win", "sun"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, with Keras's default dtype policy."""
    monkeypatch.chdir(tmp_path)
    keras.config.set_dtype_policy("float32")


def save(name, content):
    path = pathlib.Path(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def main(arguments, *more):
    try:
        return ms.main(ms.parse_arguments([*arguments.split(), *more]))
    except SystemExit as stop:
        return stop.code


def refuses(capsys, arguments, *words):
    """The command ends with status 2 and one line on stderr that has all the words."""
    capsys.readouterr()
    assert main(arguments) == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert all(note.startswith(("data: ", "models: ", "usage: ", "  ")) for note in notes), notes
    assert all(word in error for word in words), error


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def random_ids(*shape):
    return np.random.default_rng(0).integers(1, 50, shape).astype("int32")


def tweets_file(path, n=600):
    """Tweets in six columns whose words give their label away, half of them negative."""
    r, rows, filler = np.random.default_rng(0), [], list("abcdefghij")
    for i in range(n):
        text = " ".join(r.permutation([*r.choice(WORDS[i % 2], 2), *r.choice(filler, 4)]))
        rows.append(f'"{i % 2 * 4}","{i}","Mon","query","user","@you {text}, ok! http://x.y/{i}"\n')
    return save(path, "".join(rows))


@pytest.fixture(scope="session", autouse=True)
def training(tmp_path_factory):
    """`train --model all` at tiny size, started when the tests start: (folder, process)."""
    folder = tmp_path_factory.mktemp("trained")
    tweets_file(folder / "tweets.csv")
    command = f"train --model all --data tweets.csv --tokenizer train {TINY}".split()
    with open(folder / "output", "w") as output:
        options = {"cwd": folder, "stdout": output, "stderr": subprocess.STDOUT}
        with subprocess.Popen([sys.executable, SCRIPT, *command], **options) as process:
            yield folder, process
    shutil.rmtree(COMPILED)


@pytest.fixture
def trained(training, folder):
    """The test begins with a copy of what that training wrote and printed in its folder."""
    source, process = training
    assert process.wait(timeout=600) == 0, (source / "output").read_text()
    shutil.copytree(source, ".", dirs_exist_ok=True)


# ------------------------------------------------------------------------ 2 The selective scan
def numpy_scan(u, delta, A, B, C, D, h=0.0):
    """The recurrence in float64, step by step -> y, last h. B, C: (b, l, n) or (b, l, d, n)."""
    u, delta, A, B, C, D, h = (np.asarray(x, "float64") for x in (u, delta, A, B, C, D, h))
    B, C = (x if x.ndim == 4 else x[:, :, None] for x in (B, C))
    v, y = delta * u, np.zeros_like(u)
    for t in range(u.shape[1]):
        h = np.exp(delta[:, t, :, None] * A) * h + v[:, t, :, None] * B[:, t]
        y[:, t] = (h * C[:, t]).sum(-1) + D * u[:, t]
    return y, h


def gradients(method, dy, dh, *inputs):
    """[y, last h, each gradient of sum(dy y) + sum(dh last h)] as the script computes them."""
    inputs = [tf.convert_to_tensor(x) for x in inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        options = {"initial_state": inputs[6], "return_state": True, "method": method}
        y, h = ms.selective_scan(*inputs[:6], **options)
        loss = tf.reduce_sum(y * dy) + tf.reduce_sum(h * dh)
    return [y, h, *tape.gradient(loss, inputs)]


compiled_gradients = tf.function(gradients, jit_compile=True, autograph=False)
SCANS = [[(1, 1, 1, 1)], [(2, 257, 6, 8)], [(2, 4096, 4, 8)]]
SCANS += [[(2, 4096, 4, 8), (1e-3, 0.5), (1e-3, 0.5)]]  # as in the official tests
SCANS += [[(2, 257, 6, 8), (1e-6, 100), (1e-3, 1e3)], [(2, 257, 6, 8), (10, 100), (100, 1000)]]
SCANS += [[(2, 257, 6, 8), (1e-6, 1e-6), (1e3, 1e3)], [(2, 257, 6, 8), (100, 100), (1e-3, 1e-3)]]


def scan_inputs(shape, delta=(0.001, 0.1), rate=(1, 16)):
    """Random u, delta, A, B, C, D, initial h; delta and -A log-uniform between the bounds."""
    (b, l, d, n), r = shape, np.random.default_rng(shape[1])
    u, B, C, D, h = map(r.standard_normal, ((b, l, d), (b, l, n), (b, l, n), d, (b, d, n)))
    delta = np.exp(r.uniform(*np.log(delta), (b, l, d)))
    A = -np.exp(r.uniform(*np.log(rate), (d, n)))
    return [x.astype("float32") for x in (u, delta, A, B, C, D, h)]


@pytest.mark.parametrize("arguments", SCANS)
def test_the_scans_are_equivalent(arguments):
    """Sequential, fused, parallel and NumPy, in output, last state and gradients."""
    inputs = scan_inputs(*arguments)
    arrays = [normal(*inputs[0].shape), normal(*inputs[6].shape, seed=1), *inputs]
    exact = numpy_scan(*inputs)
    # The gradients of the sequential scan are those of automatic differentiation.
    expected = compiled_gradients("sequential", *(x.astype("float64") for x in arrays))
    for x, y in zip(expected, exact):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)
    names = "y", "last h", "du", "ddelta", "dA", "dB", "dC", "dD", "dh"
    for method in ("fused", "parallel"):
        result = gradients(method, *arrays)
        for name, x, y in zip(names, result, [*exact, *expected[2:]], strict=True):
            tolerance = 5e-5 if arguments[0][1] == 4096 and name[0] == "d" else 1e-5
            error, largest = np.abs(x - np.array(y)).max(), np.abs(y).max()
            assert error <= tolerance * max(largest, 1e-30), (method, name)


@pytest.mark.parametrize("batch, length", [(1, 1), (1, 17), (3, 1), (3, 17)])
def test_the_shapes_are_right(batch, length):
    """Those of every block and every model."""
    ids, x = random_ids(batch, length), normal(batch, length, 16)
    for name in ms.MODELS:
        model = ms.build_model(name, ms.Config(**SMALL, depth=1, classes=5))
        assert model(ids).shape == model.logits(ids).shape == (batch, 5)
        for block in model.blocks:
            assert block(x).shape == x.shape
    y, state = ms.MambaBlock(state=7, kernel=3)(x, return_state=True)
    assert [y.shape, *(x.shape for x in state)] == [x.shape, (batch, 2, 32), (batch, 32, 7)]


@pytest.mark.parametrize("length, error", [(16, 0.01), (64, 0.25), (256, 0.43), (1024, 0.52)])
def test_scan_is_exact_where_the_common_formula_is_not(length, error):
    r = np.random.default_rng(0)
    u, delta, B, C = (r.standard_normal((2, length, x), "float32") for x in (128, 128, 16, 16))
    delta, A, D = np.logaddexp(0, delta - 3), -np.tile(np.arange(1, 17.0), (128, 1)), np.ones(128)
    inputs = [tf.cast(x, tf.float32) for x in (u, delta, A, B, C, D)]
    # cumsum(delta B u S) / (S + 1e-12); S, the decay to the last position, soon is below 1e-12.
    S = np.flip(np.cumsum(np.flip(delta[:, 1:, :, None] * A, 1), 1), 1)
    S = np.exp(np.pad(S, ((0, 0), (0, 1), (0, 0), (0, 0))))
    h = np.cumsum((delta * u)[..., None] * B[:, :, None] * S, 1) / (S + 1e-12)
    common, expected = np.einsum("bldn,bln->bld", h, C) + D * u, numpy_scan(*inputs)[0]
    size = np.linalg.norm(expected)
    assert np.linalg.norm(common - expected) / size == pytest.approx(error, abs=0.01)
    assert np.linalg.norm(ms.selective_scan(*inputs) - expected) / size < 1e-6


@pytest.mark.parametrize("method", ms.METHODS[1:])
@pytest.mark.parametrize("dtype, cut, tolerance", [("bfloat16", 1, 1e-2), ("float64", 24, 1e-12)])
def test_scan_cut_anywhere_in_any_dtype(method, dtype, cut, tolerance):
    u, delta, A, B, C, D, h = inputs = [tf.cast(x, dtype) for x in scan_inputs((3, 25, 4, 3))]
    expected, last = numpy_scan(*(tf.cast(x, "float64") for x in inputs))
    for part in (slice(cut), slice(cut, None)):
        inputs = u[:, part], delta[:, part], A, B[:, part], C[:, part], D
        y, h = ms.selective_scan(*inputs, initial_state=h, return_state=True, method=method)
        assert (y.dtype, h.dtype) == (dtype, "float64" if dtype == "float64" else "float32")
        np.testing.assert_allclose(tf.cast(y, "float64"), expected[:, part], tolerance, tolerance)
    np.testing.assert_allclose(h, last, rtol=min(tolerance, 1e-4), atol=min(tolerance, 1e-4))
    assert np.isnan(ms.selective_scan(*inputs[:2], A * np.nan, *inputs[3:], method=method)).all()
    empty = [x[:0] if len(x.shape) == 3 else x for x in inputs]
    y, h = ms.selective_scan(*empty, return_state=True, method=method)
    assert y.shape[0] == 0 and h.shape == (0, 4, 3)


@pytest.mark.parametrize("method", ("auto", "parallel"))
def test_scan_gives_the_same_in_every_kind_of_function(method):
    inputs = scan_inputs((2, 41, 4, 3))
    y, last = numpy_scan(*inputs)
    expected = compiled_gradients("sequential", *(x.astype("float64") for x in (y, last, *inputs)))
    call = functools.partial(gradients, method, y.astype("float32"), last.astype("float32"))
    free = [tf.TensorSpec((None, None, *x.shape[2:]) if 41 in x.shape else x.shape) for x in inputs]
    for function in (tf.function(call, jit_compile=True), tf.function(call, free), call):
        for result, array in zip(function(*map(tf.constant, inputs)), expected, strict=True):
            np.testing.assert_allclose(result, array, rtol=1e-4, atol=1e-4)


def test_fused_scan_holds_no_states():
    scan = functools.partial(ms.selective_scan, method="fused")
    inputs = [tf.constant(x) for x in scan_inputs((2, 1024, 24, 16))[:6]]
    for function in (lambda *x: scan(*x), lambda *x: tf.gradients(tf.square(scan(*x)), x)):
        text = ms.compiled(function).experimental_get_compiler_ir(*inputs)("optimized_hlo")
        for shape in re.findall(r"f32\[([\d,]+)\]", text):
            assert math.prod(map(int, shape.split(","))) < 2 * 1024 * 24 * 16 / 8
        assert "entry_computation_layout={(f32" in text  # else XLA took them as constants


def test_a_second_derivative_is_refused_by_name():
    inputs = [tf.constant(x) for x in scan_inputs((1, 4, 2, 2))]
    with pytest.raises(NotImplementedError, match="sequential"), tf.GradientTape() as tape:
        tape.watch(inputs)
        tape.gradient(gradients("parallel", 1.0, 1.0, *inputs)[3], inputs[1])


def test_scan_names_the_argument_that_is_wrong():
    axes = {"u": "bld", "delta": "bld", "A": "dn", "B": "bln", "C": "bln", "D": "d"}
    axes |= {"initial_state": "bdn"}
    shapes = {x: tuple({"b": 2, "l": 5, "d": 3, "n": 4}[i] for i in y) for x, y in axes.items()}
    wrong = {"u": (2, 5), "delta": (2, 5, 4), "A": (4, 4), "B": (2, 5, 7), "C": (2, 6, 4)}
    for name, shape in (wrong | {"D": (2,), "initial_state": (2, 4, 3)}).items():
        arrays = {x: tf.zeros(y) for x, y in (shapes | {name: shape}).items()}
        expected = f"{name} must have the shape ({', '.join(axes[name])}) = {shapes[name]}"
        for call in (ms.selective_scan, tf.function(ms.selective_scan)):
            with pytest.raises(ValueError, match=re.escape(expected)):
                call(**arrays)
    with pytest.raises(ValueError, match="u must .* only the batch allowed to be 0"):
        ms.selective_scan(**arrays | {"u": tf.zeros((2, 0, 3))})
    with pytest.raises(ValueError, match="auto, sequential, parallel, fused, not 'fast'"):
        ms.selective_scan(**arrays, method="fast")


# ---------------------------------------------------------- 3 The four blocks, 4 The classifier
def weights_of(layer):
    return {w.path.split("/", 1)[-1]: w.numpy().astype("float64") for w in layer.weights}


@pytest.mark.parametrize("selection", [*ms.SELECTIONS, "ssm"])
def test_blocks_agree_with_the_published_equations(selection):
    padding = 6 if selection in ("B+C", "ssm") else 0  # at both ends of the second row
    mamba = functools.partial(ms.MambaBlock, selection=selection)
    block = (ms.SSMBlock if selection == "ssm" else mamba)(state=5)
    x, positions = normal(2, 133, 24), np.abs(np.arange(133) - 66)
    mask = positions[:, None] <= 66 - np.array([0, padding])[:, None, None]
    result, w = block(x, mask=mask[:, :, 0] if padding else None).numpy(), weights_of(block)
    u, gate = np.split(x.astype("float64") @ w["in_proj"], 2, -1)
    before = np.pad(u * mask, ((0, 0), (3, 0), (0, 0)))
    u = w["conv_bias"] + sum(w["conv_kernel"][i] * before[:, i : i + 133] for i in range(4))
    u = u / (1 + np.exp(-u)) * mask
    if selection == "ssm":  # the recurrence with constant parameters
        delta = np.tile(np.logaddexp(0, w["dt_bias"]), (2, 133, 1))
        B, C = (np.tile(w[name], (2, 133, 1, 1)) for name in ("B", "C"))
    else:
        parts = np.split(u @ w["x_proj"], [2, 7], -1)
        constants = np.split(w.get("constant", np.zeros(12)), [2, 7])
        for name, part, constant in zip(("delta", "B", "C"), parts, constants):
            if name not in selection.split("+"):
                part[:] = constant
        delta, B, C = parts
        delta = np.logaddexp(0, delta @ w["dt_proj"] + w["dt_bias"])
        for selected, part in zip(block.select(tf.cast(u, tf.float32)), (delta, B, C)):
            np.testing.assert_allclose(selected, part, rtol=1e-4, atol=1e-5)
    y, _ = numpy_scan(u, delta, -np.exp(w["A_log"]), B, C, w["D"])
    expected = (y * gate / (1 + np.exp(-gate))) @ w["out_proj"]
    assert np.abs(result - expected).max() / np.abs(expected).max() < 1e-5


def test_mamba_block_in_pieces_is_the_whole():
    block, x = ms.MambaBlock(state=5), tf.constant(normal(2, 40, 24))
    block.build(x.shape)
    mask = np.arange(40) < np.array([[40], [30]])

    def read(*cuts):
        y, state = [], None
        with tf.GradientTape() as tape:
            tape.watch(x)
            for i, j in itertools.pairwise(cuts):
                part, state = block(x[:, i:j], mask[:, i:j], state, return_state=True)
                y.append(part)
            results = [tf.concat(y, 1), *state]
            loss = sum(tf.reduce_sum(tf.sin(each)) for each in results)
        return results + tape.gradient(loss, [x, *block.trainable_variables])

    whole = read(0, 40)
    for pieces in (read(0, 1, 2, 10, 18, 40), tf.function(read)(0, 1, 2, 10, 18, 40)):
        for result, expected in zip(pieces, whole, strict=True):
            assert np.abs(result - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
    _, state = block(x[1:, :30], return_state=True)  # the state before the padding
    for result, expected in zip(whole[1:3], state):
        np.testing.assert_allclose(result[1:], expected, atol=1e-5)
    np.testing.assert_allclose(whole[1][0], (x @ block.in_proj)[0, -3:, :48], atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_classifier_reads_a_text_in_pieces(pooling):
    model = ms.build_model("mamba", ms.Config(**SMALL, pooling=pooling))
    ids = random_ids(3, 24) * (np.arange(24) < np.array([[24], [9], [15]]))
    for read, pieces in ((model.read, [1] * 24), (tf.function(model.read), [5, 7, 12])):
        state = None
        for piece in tf.split(ids, pieces, 1):
            logits, state = read(piece, state)
        np.testing.assert_allclose(logits, model(ids), atol=1e-5)
    with pytest.raises(ValueError, match="lstm"):
        ms.build_model("lstm", ms.Config(**SMALL)).read(ids)


@pytest.mark.parametrize("kind", [MAMBA, ms.SSMBlock, ATTENTION])
def test_blocks_are_keras_layers_of_any_dtype(kind):
    x, reference = normal(2, 12, 16), kind(dtype="float64")
    expected, policies = reference(x).numpy(), {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}
    for policy, tolerance in (policies | {"mixed_bfloat16": 0.05, "mixed_float16": 0.01}).items():
        block = kind(name="mine", dtype=policy)
        model = keras.Sequential([keras.Input((None, 16)), block])
        model.set_weights(reference.get_weights())
        error = np.abs(tf.cast(block(x), tf.float64) - expected).max()
        assert error <= tolerance * np.abs(expected).max() and block(x).dtype == block.compute_dtype
        assert kind is ATTENTION or block.A_log.dtype == "float32"
    exported = tf.function(model, input_signature=[tf.TensorSpec((None, None, 16))])
    assert exported(x[:0]).shape == block(x[:0]).shape == (0, 12, 16)
    model.save("model.keras")
    copies = keras.models.load_model("model.keras"), pickle.loads(pickle.dumps(model))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for copy in (*copies, clone):
        assert copy.layers[0].get_config() == block.get_config() and copy.layers[0].name == "mine"
        np.testing.assert_array_equal(copy(x), model(x))
    moved = np.abs(expected - reference(x + (np.arange(12) >= 8)[:, None])).max((0, 2))
    assert moved[8] > 1e-3 and (moved[:8].max() < 1e-5) != (kind is ATTENTION)  # causal


def test_the_transformer_agrees_with_an_independent_one():
    model, ids = ms.build_model("transformer", ms.Config(**SMALL)), random_ids(3, 9)
    ids[1, 5:] = 0
    real, x = ids != 0, model.embedding.embeddings.numpy()[ids]

    def norm(x):  # its weights are 1, and biases 0
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    angles = np.arange(9)[:, None] * 1e4 ** (-np.arange(8) / 8)
    positions = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    for attention, mlp in zip(model.blocks[::2], model.blocks[1::2]):
        w = {v.path.split("/")[-2]: v.numpy() for v in attention.weights if "kernel" in v.path}
        inputs = {"query": norm(x) + positions, "key": norm(x) + positions, "value": norm(x)}
        q, k, v = (np.einsum("blw,whe->bhle", y, w[part]) for part, y in inputs.items())
        score = np.exp(np.where(real[:, None, None], q @ np.swapaxes(k, 2, 3) / 2, -1e30))
        mixed = score / score.sum(-1, keepdims=True) @ v
        x = x + np.einsum("bhle,hew->blw", mixed, w["attention_output"])
        inner = norm(x) @ mlp.weights[0].numpy()
        gelu = inner * (1 + np.vectorize(math.erf)(inner / 2**0.5)) / 2
        x = x + gelu @ mlp.weights[2].numpy()
    x = (norm(x) * real[:, :, None]).sum(1) / real.sum(1, keepdims=True)
    np.testing.assert_allclose(model(ids), x @ model.head.kernel.numpy(), atol=1e-5)


def test_initial_values_and_parameters():
    seed = keras.utils.set_random_seed
    two = [seed(3) or ms.build_model("ssm", ms.Config(**SMALL)) for _ in range(2)]
    one, other, again, _ = [block.C.numpy() for model in two for block in model.blocks]
    assert (one == again).all() and (one != other).all()  # a seed decides, each layer has its own
    models = [ms.build_model(name) for name in ms.MODELS]
    counts = [model.count_params() - model.embedding.count_params() for model in models]
    assert max(counts) <= 1.15 * min(counts)
    for w in map(weights_of, models[0].blocks):
        delta, rates = np.logaddexp(0, w["dt_bias"]), np.tile(np.arange(1, 17), (128, 1))
        assert 0.00099 < delta.min() < 0.002 and 0.05 < delta.max() < 0.1001
        assert 0.004 < np.exp(np.log(delta).mean()) < 0.025  # log-uniform: 0.01 on average
        np.testing.assert_allclose(np.exp(w["A_log"]), rates, rtol=1e-6)
        bounds = {"dt_proj": 4**-0.5, "in_proj": 64**-0.5, "x_proj": 128**-0.5, "D": 1}
        bounds |= {"conv_kernel": 0.5, "conv_bias": 0.5, "out_proj": 256**-0.5}
        for name, bound in bounds.items():
            assert 0.9 * bound < np.abs(w[name]).max() <= bound, name


@pytest.mark.parametrize("name", ms.MODELS)
def test_models_learn_mask_shard_and_save(name, monkeypatch):
    keras.utils.set_random_seed(0)
    options = {"pooling": "last" if name == "ssm" else "mean", "learning_rate": 0.5, "warmup": 0.1}
    model = ms.build_model(name, ms.Config(**SMALL | options))
    weights = model.trainable_variables
    for variable in weights:  # no longer the even start
        variable.assign_add(0.05 * tf.random.stateless_normal(variable.shape, (1, 2)))
    ids = random_ids(6, 12) * (np.arange(12) < np.array([12, 5, 1, 0, 12, 12])[:, None])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(model(ids, training=True)))
    for variable, gradient in zip(weights, tape.gradient(loss, weights)):
        learns = np.abs(tf.convert_to_tensor(gradient)).max() > 0
        assert learns or variable.path.endswith("key/bias"), variable.path
    seeds = [tf.constant(seed, tf.int64) for seed in ((1, 2), (1, 2), (1, 3), (2, 2))] + [None] * 2
    drops = [model(ids, training=True, seed=seed).numpy().tobytes() for seed in seeds]
    assert drops[0] == drops[1] and len(set(drops)) == 5  # dropout is decided by the seed
    optimizer = ms.make_optimizer(model, 100)
    for step, rate in ((0, 0), (100, 0), (10, 0.5), (55, 0.25), (5, 0.25)):
        optimizer.iterations.assign(step)
        assert float(optimizer.learning_rate) == pytest.approx(rate, abs=1e-6)
    before = [w.numpy() for w in weights]
    optimizer.apply([tf.zeros(w.shape) for w in weights])  # weight decay is for matrices
    kept = {w.name for w, old in zip(weights, before) if (w.numpy() == old).all()}
    assert kept == {w.name for w in weights if re.fullmatch(".*bias|scale|A_log|[BCD]", w.name)}
    expected = model(ids).numpy()
    np.testing.assert_allclose(model(np.pad(ids, ((0, 0), (0, 31)))), expected, atol=1e-5)
    np.testing.assert_allclose(model(ids[1:2, :5]), expected[1:2], atol=1e-5)
    monkeypatch.setattr(ms.os, "cpu_count", lambda: 3)
    np.testing.assert_allclose(model.logits(tf.constant(ids)), expected, atol=1e-5)
    model.save("model.keras")
    np.testing.assert_array_equal(keras.models.load_model("model.keras")(ids), expected)
    keras.config.set_dtype_policy("mixed_bfloat16")
    mixed = ms.build_model(name, model.config)
    mixed.set_weights(model.get_weights())
    assert {w.dtype for w in mixed.weights} == {"float32"} and mixed(ids).dtype == tf.float32
    assert 0 < np.abs(mixed(ids) - expected).max() < 0.1 * np.abs(expected).max()


def test_dropout_drops_whole_channels(monkeypatch):
    model, seen = ms.build_model("ssm", ms.Config(**SMALL, dropout=0.5)), []
    ids, norm = random_ids(20, 9), keras.layers.RMSNormalization
    monkeypatch.setattr(norm, "call", lambda self, x: seen.append(x.numpy()) or x)
    model(ids, training=True)
    dropped = [seen[0] == 0, seen[1] == seen[0], seen[2] == seen[1]]  # embedding, two blocks
    for each in dropped:
        np.testing.assert_array_equal(each.all(1), each.any(1))
        assert 0.3 < each.mean() < 0.7
    assert (dropped[0] != dropped[1]).any() and (dropped[1] != dropped[2]).any()
    kept = np.where(dropped[0], 0, 2 * model.embedding(ids).numpy())
    np.testing.assert_allclose(seen[0], kept, rtol=1e-6)


# -------------------------------------------------------------------------------------- 5 Data
def test_tweets_are_cleaned():
    clean = {  # raw tweets: what is left
        "@bob I LOVE it!! http://t.co/x #yay &amp; co HTTPS://X.Y/Z bye": "i love it co bye",
        "can't, won’t, isn\x92t so...good\n\t4 you2": "cant wont isnt so good you",
        "www.example.com/a?b=1 &lt;3 &quot;quoted&quot; Café cafe\u0301": "quoted café café",
        "I\xef\xbf\xbdm 1½ m² ① Iʼm\ufffd I\ufffdm ❤️1️⃣": "im m iʼm im",
        "मुझे पसंद है! ฉันรักคุณ İa می\u200cخواهم": "मुझे पसंद है ฉันรักคุณ i̇a میخواهم",
        "@userこんにちは http://t.co/aこれ #tagねこ #ねこcat #हिन्दी ＃tag, x #B2B。y": "こんにちは これ x y",
        "Awww...so cute, awww.yes www...no (www.a.b/c) http:/ ...": "awww so cute awww yes www no",
        "@you #tag 123 :-)": "",
    }
    for raw, left in clean.items():
        assert ms.clean_tweet(raw) == left == ms.clean_tweet(left), raw


def test_a_table_is_read_right(capsys):
    def read(content):
        return dict(ms.read_table(save("t.csv", content))[["text", "label"]].to_numpy())

    three = {'bad, "day"': "negative", "good\nday": "positive", "é": "neutral"}
    assert read(SIX) == read(SIX.encode("utf-8-sig")) == three
    odd = " text ,label\nA,Negative\n\nB, positive", ",text,label,\n0,A,negative,\n1,B,positive,\n"
    marked = [("\ufeff" + GOOD).encode(f"utf-{x}") for x in ("16-le", "16-be", "32-le", "32-be")]
    for content in (*odd, *marked, GOOD.replace("\n", "\r\n"), GOOD):
        assert read(content) == {"A": "negative", "B": "positive"}
    assert read("text,x,label\nA,,0\nB,,4\n,,\n") == {"A": "0", "B": "4"}
    assert read(f"text,label\n{'A' * 200_000},x\n") == {"A" * 200_000: "x"}
    table = ms.read_table(save("t.csv", "text,x,label\nA,,0\nB,,4\n"))
    for suffix in ("gz", "bz2", "xz", "zip"):
        table.to_csv(f"t.csv.{suffix}", index=False)
        assert ms.read_table(f"t.csv.{suffix}").equals(table)
    assert capsys.readouterr().out == "" and read(SIX.encode("latin-1")) == three
    assert "latin-1 in 1 places, first in line 4\n" in capsys.readouterr().out
    mixed = b"text,label\nA,x\ncaf\xe9 caf\xc3\xa9,\xfc\n\xff,x\n"  # byte by byte
    assert read(mixed) == {"A": "x", "café café": "ü", "ÿ": "x"}
    assert "latin-1 in 3 places, first in line 3\n" in capsys.readouterr().out


def test_any_other_table_is_refused_by_row(capsys):
    bad = {"": "No columns", "text,text,label\na,b,0\n": "row 1: ['text', 'text'"}
    bad |= {"text,label\nA,x\nB,x\nC,x\nD,y\nE,y\nF,y\n1,z": "'z': 0", "text,label\n": ": {}"}
    bad |= {"a,b,c\n1,2,3\n": "'a', 'b', 'c'", f"{GOOD}C,\n": "row [4]", f"{GOOD}C\n": "row [4]"}
    bad |= {f'{GOOD}"C,positive\n': "expected", f"{GOOD}C,negative,x\n": "line 4"}
    bad |= {SIX.replace('"4"', '"1"'): "row [2]", '{"text": "A", "label": 0}\n': "row 1"}
    bad |= {b"PAR1\x15\x04": "row 1", "text,label\nA,x\nB,x\nC,x\nD,y\nE,y": "{'x': 3, 'y': 2}"}
    for content, word in (bad | {"text,label\nA,x\nB,x\nC,x\n": "{'x': 3}"}).items():
        before = save("b.csv", content).read_bytes()
        refuses(capsys, "preprocess --data b.csv", word, word if ":" in word else "b.csv")
        assert pathlib.Path("b.csv").read_bytes() == before and not os.listdir("data")
    refuses(capsys, f"preprocess --data {save('b.csv.gz', GOOD)}", "b.csv.gz", "gzip")


def test_splits_are_clean_and_balanced(capsys):
    words = ["".join(letters) for letters in itertools.product("abcdefghijklmn", repeat=4)]
    texts = [*words[:3000], "AAAA!", "123", "either", "Either"]
    labels = ["x"] * 2000 + ["y"] * 1000 + ["x", "x", "x", "y"]
    splits = ms.clean_and_split(pd.DataFrame({"text": texts, "label": labels}))
    assert "3,004 tweets read, 3,000 left" in capsys.readouterr().out
    assert sorted(pd.concat(splits.values()).text) == words[:3000]
    assert {name: len(x) for name, x in splits.items()} == {"train": 2940, "val": 30, "test": 30}
    for table in splits.values():
        assert abs(np.mean(table.label == "x") - 2 / 3) < 0.01
    many = pd.DataFrame({"text": words[:30_000], "label": np.arange(30_000) % 3})
    assert sorted(map(len, ms.clean_and_split(many).values())) == [3000, 3000, 24_000]


def test_tokenizers_are_trained_read_or_refused():
    import transformers

    texts = [f"tweet about the {word} café 욥" for word in ("weather", "football", "music") * 9]
    first, second = (ms.load_tokenizer("train", texts) for _ in range(2))
    ids = ms.tokenize(first, ["tweet about music", ""], 8)
    assert first.get_vocab() == second.get_vocab() and ids.shape == (2, 8) and ids[0, -1] == 0
    assert first.decode(ids[0].tolist(), skip_special_tokens=True) == "tweet about music"
    first.save_pretrained("saved")
    for load in (ms.load_tokenizer, transformers.AutoTokenizer.from_pretrained):
        np.testing.assert_array_equal(ms.tokenize(load("saved"), ["tweet about music", ""], 8), ids)
    words = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\nday\nö"
    for content in (words, words.replace("\n", "\r\n")):
        tokenizer = ms.load_tokenizer(save("vocab.txt", content))
        assert ms.tokenize(tokenizer, ["good day ö"], 6).tolist() == [[2, 5, 6, 1, 3, 0]]
    for content in ("good\n", words.replace("[UNK]", "a"), f"x\n{words}", f"{words}\nday"):
        pytest.raises(ms.UserError, ms.load_tokenizer, save("bad.txt", content)).match("bad.txt")


def test_any_labels_from_table_to_predictions(capsys):
    labels = {"c": ["b", "10", "a", "so so"], "b": ["positive", "negative"], "a": ["1", "0"]}
    expected = ["10", "a", "b", "so so"], ["negative", "neutral", "positive"], ["0", "1"]
    columns = "--text-column review --label-column stars"
    for day, name, names in zip("987", labels, expected):
        pairs = itertools.product("abcdefghijklmnopqrst", enumerate(labels[name]))
        rows = [(x, f"{x * 3} word{chr(97 + i)}", label) for x, (i, label) in pairs]
        pd.DataFrame(rows, columns=["id", "review", "stars"]).to_csv(f"{name}.csv", index=False)
        assert main(f"preprocess --data {name}.csv --tokenizer train {columns}") == 0
        path = pathlib.Path("data", name, "meta.json")
        meta = json.loads(path.read_text())
        assert meta["labels"] == names
        numbers = set(pd.read_csv(path.with_name("train_tokenized.csv")).label)
        assert numbers == {names.index(label) for label in labels[name]}
        save(path, json.dumps(meta | {"preprocessed": f"2026-01-0{day} 12:00:00"}))
    settings = "--width 16 --depth 1 --epochs 9 --batch-size 32 --learning-rate 0.02"
    assert main(f"train --model lstm {settings}") == main(f"evaluate --test c.csv {columns}") == 0
    assert "data/c, preprocessed 2026-01-09" in capsys.readouterr().err  # the last one
    path = pathlib.Path("runs/c/predictions.csv")
    table = pd.read_csv(path, dtype=str)
    assert list(table)[:3] == ["id", "review", "stars"] and (table.lstm == table.stars).mean() > 0.9
    assert main(f"evaluate --test {path.rename('again.csv')}") == 0
    pd.testing.assert_frame_equal(pd.read_csv(path, dtype=str), table)
    capsys.readouterr()
    assert main("predict --model lstm", "abc worda", "😀 123", "") == 0
    output = re.sub(r" +10 [\d.]+ a [\d.]+ b [\d.]+ so so [\d.]+ .*", "", capsys.readouterr().out)
    assert output.splitlines() == ["b", "nothing left to read", "nothing left to read"]


def test_changed_or_half_written_data_are_refused(monkeypatch, capsys):
    path, train, seen = tweets_file("t.csv", 60), "train --model lstm --limit 9", []
    monkeypatch.setattr(ms, "train_model", lambda *x: {"config": seen.append(x[3][0][0])} | x[2])
    assert main("preprocess --tokenizer train --data t.csv") == 0
    assert "60 tweets read" in capsys.readouterr().out
    path = path.rename("data/t.csv")
    assert main(f"{train} --data data/t.csv") == 0 and "tweets read" not in capsys.readouterr().out
    table = pd.read_csv("data/t/train_tokenized.csv").drop(columns="label")
    np.testing.assert_array_equal(seen[0], table[:9])
    for flags, word in (("--max-length 9", "max_length"), ("--tokenizer x", "tokenizer")):
        refuses(capsys, f"{train} {flags}", "data/t", word, "preprocess")
    save(path, path.read_text().replace(" ok", " yes"))
    for command in (train, "evaluate", "predict hi"):
        refuses(capsys, f"{command} --data data/t.csv", "another data/t.csv", "preprocess")
    assert main("preprocess --tokenizer train --data data/t.csv --max-length 9") == 0
    assert pd.read_csv("data/t/val_tokenized.csv").shape[1] == 10
    arguments = ms.parse_arguments(["preprocess", "--data", "data/t.csv", "--tokenizer", "train"])
    move = os.replace
    for n in ("train_tokenized.csv", "test_tokenized.csv", "meta.json"):
        ms.preprocess(arguments)
        assert ms.find_preprocessed(arguments)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # an interruption
            patch.setattr(os, "replace", lambda x, y, n=n: 1 / (y.name != n) and move(x, y))
            ms.preprocess(arguments)
        assert ms.find_preprocessed(arguments) is None


def zipped(files):
    with zipfile.ZipFile("archive", "w") as archive:
        for item in files.items():
            archive.writestr(*item)


def test_downloads_are_checked_and_kept(monkeypatch, capsys):
    original, data = tweets_file("original.csv", 60).read_bytes(), pathlib.Path("data")
    labels = ["negative", "neutral", "positive"] * 20
    texts = [f"tweet {chr(97 + i // 3)} {label}" for i, label in enumerate(labels)]
    pd.DataFrame({"sentiment": labels, "text": texts}).to_csv("crowd.csv")
    (_, name, _), (_, member, _) = ms.DOWNLOADS.values()
    urls = ["http://127.0.0.1:9/x.zip", "a_package"]
    files = zip(urls, (name, member), map(ms.sha256, ("original.csv", "crowd.csv")))
    monkeypatch.setattr(ms, "DOWNLOADS", dict(zip(ms.DOWNLOADS, files)))
    monkeypatch.setattr(ms.subprocess, "run", lambda x, **_: shutil.copy("archive", x[-1]))
    data.mkdir()
    for other in (f"{name}.part", f"{name[:-4]} (1).csv"):  # of a browser
        save(data / other, original)
    before = sorted(os.listdir(data))
    with monkeypatch.context() as patch:
        patch.setattr(ms.urllib.request, "urlopen", lambda _, timeout: io.FileIO("archive"))
        for source, file in zip(ms.DOWNLOADS, (name, member)):
            for files, word in ({}, file), ({file: "else"}, "sha256"):
                zipped(files)
                refuses(capsys, f"preprocess --data {source}", word, "put")
        save("archive", b"PK damaged")
        refuses(capsys, "preprocess --data sentiment140", "zip", "put")
        assert sorted(os.listdir(data)) == before
        zipped({name: original, "../evil": "x"})
        assert ms.find_source("sentiment140", data)[1] == data / name
        assert sorted(os.listdir(data)) == sorted([*before, name])
    assert len(ms.read_table(data / name)) == 60 and not os.path.exists("evil")
    (data / name).unlink()
    zipped({member: pathlib.Path("crowd.csv").read_bytes()})
    refuses(capsys, "preprocess --data crowdflower --tokenizer no/such", "no/such", "tokenizer")
    assert main("preprocess") == 0
    output = capsys.readouterr().out
    assert f"{urls[0]}: " in output and "using the CrowdFlower tweets instead" in output
    assert "bert-base-uncased" in output and "using a vocabulary of the training tweets" in output
    assert set(pd.read_csv("data/crowdflower/test_tokenized.csv").label) == {0, 1, 2}
    for content in original, original + b"4,,,,,new\n":
        save(data / f"{name}.xz", lzma.compress(content))  # put there by the user
        assert main("preprocess --data sentiment140 --tokenizer train") == 0
        assert ("xz, whose sha256" in capsys.readouterr().out) == (content != original)


@pytest.mark.parametrize("count, parts", [(10_000, 1), (10_001, 3), (100_001, 8)])
def test_batches_hold_every_tweet_once(count, parts):
    lengths = np.random.default_rng(0).integers(1, 65, count)
    ids, seen = np.where(np.arange(64) < lengths[:, None], 7, 0), []
    cuts = [64 * i // parts for i in range(parts + 1)]
    shorter = dict(zip(cuts[1:], cuts))
    for rows, length in ms.plan_batches(ids, 32, seed=0):
        real = rows[rows >= 0]
        seen += list(real)
        assert shorter[length] < min(lengths[real]) <= max(lengths[real]) <= length
        assert len(rows) == 32
    assert sorted(seen) == list(range(count))


def test_induction_heads():
    ids, labels = ms.induction_heads(500, 12, seed=0)
    where = np.argmax(ids == 16, 1)
    np.testing.assert_array_equal(ids[np.arange(500), where + 1], labels)
    assert ((ids == 16).sum(1) == 2).all() and (ids[:, -1] == 16).all() and ids.shape == (500, 12)
    assert set(labels) == set(range(1, 16)) and set(where) == set(range(10))


# ---------------------------------------------------------------------------------- 6 Training
def train_tiny(folder, data="", restart=False, **settings):
    """Train an LSTM on random sequences in `folder` -> its weights."""
    ids, labels = random_ids(90, 10), np.arange(90, dtype="int32") % 3
    config = ms.Config(**SMALL | {"depth": 1, "batch_size": 32, "epochs": 2} | settings)
    splits = [(ids, labels), (ids[:20], labels[:20]), (ids[:20], labels[:20])]
    ms.train_model("lstm", config, {"sha256": data}, splits, pathlib.Path(folder), restart)
    return keras.models.load_model(pathlib.Path(folder, "model.keras")).get_weights()


def test_training_steps(monkeypatch):
    weights = []
    for cores in (3, 1):
        monkeypatch.setattr(ms.os, "cpu_count", lambda cores=cores: cores)
        weights.append(train_tiny(str(cores), dropout=0.0))
    for whole, shared in zip(*weights, strict=True):
        np.testing.assert_allclose(whole, shared, atol=1e-4)
    with pytest.raises(ms.UserError, match="not finite.*--learning-rate"):
        train_tiny("bad", learning_rate=1e9, dropout=0.0)
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = ms.build_model("lstm", ms.Config(**SMALL, clip_norm=0.01))
    optimizer, before = keras.optimizers.SGD(1.0), model.get_weights()
    optimizer.build(model.trainable_variables)
    ms.training_step(model, optimizer)(np.arange(8), random_ids(8, 5), np.zeros(8, "int32"))
    change = [new - old for new, old in zip(model.get_weights(), before)]
    assert sum((x**2).sum() for x in change) ** 0.5 == pytest.approx(0.01, rel=1e-3)


def test_checkpoints_reports_and_the_best_epoch(monkeypatch, capsys):
    def count(model, optimizer, *batch):  # a training step that has nothing to compile
        optimizer.iterations.assign_add(1)
        model.head.bias.assign([float(optimizer.iterations), 0, 0])
        return tf.ones(2)

    monkeypatch.setattr(ms, "training_step", lambda *x: functools.partial(count, *x))
    monkeypatch.setattr(ms, "CHECKPOINT_SECONDS", -1)
    for module, name in ((ms, "predict_logits"), (np, "savez")):  # a kill, a full disk
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(module, name, lambda *_, **__: 1 / 0)
            train_tiny("x")
        assert os.listdir("x") == ["checkpoint.npz"]
    train_tiny("x")
    assert re.search("after step 2 of 6\n+step 3 of 6, loss 1, epoch 1,", capsys.readouterr().out)
    with pytest.raises(ms.UserError, match="x/checkpoint.npz: written with other.*--restart"):
        train_tiny("x", data="other")
    i, hits = np.arange(20), itertools.cycle([5, 19, 19, 1, 0])  # of 20: four epochs, the test
    monkeypatch.setattr(ms, "predict_logits", lambda *_: np.eye(3)[(i % 3 + (i >= next(hits))) % 3])
    monkeypatch.setattr(ms, "REPORT_SECONDS", -1)
    for restart in (False, True):
        assert train_tiny("y", epochs=4, restart=restart)[-1].tolist() == [6, 0, 0]
    output = capsys.readouterr().out
    assert "resuming" not in output
    assert re.search(r"\nstep 7 of 12, loss 1, [\d,]+ texts/s, [\d,]+ s left\n", output)


def test_stopped_training_resumes_to_the_same_weights(trained, capsys):
    path = pathlib.Path("again/tweets/lstm/checkpoint.npz")
    # A second passes after each file that is written, so that no training ends before its signal.
    code = "import os, runpy, sys, time; del sys.argv[0]; move = os.replace; os.replace = "
    code += "lambda *x: [move(*x), time.sleep(1)]; runpy.run_path(sys.argv[0], None, '__main__')"
    command = [sys.executable, "-c", code, SCRIPT, *LSTM.split()]
    for number, status in (("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)):
        path.unlink(missing_ok=True)
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not path.exists() and process.poll() is None:
            time.sleep(0.001)
        if status == 130:
            refuses(capsys, LSTM, "again/tweets/lstm", "another process trains")
        process.send_signal(getattr(signal, number))
        errors = process.communicate()[1]
        assert process.returncode == status and "Traceback" not in errors
        assert errors.endswith("the same command goes on\n") == (number != "SIGKILL")
    assert main(LSTM) == main(LSTM) == 0
    steps = re.findall("resuming from .*, after step (.*) of 57", capsys.readouterr().out)
    assert int(steps[0]) < 57 and steps[1] == "57"
    models = (keras.models.load_model(f"{x}/tweets/lstm/model.keras") for x in ("runs", "again"))
    np.testing.assert_equal(*(model.get_weights() for model in models))


def test_two_machines_or_devices_train_as_one(trained, monkeypatch, capsys):
    devices = """
import sys, mamba_sentiment as ms, tensorflow as tf
cpu, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
assert ms.all_devices().num_replicas_in_sync == 2
assert ms.main(ms.parse_arguments([*sys.argv[1:], "--batch-size", "1"])) == 2
sys.exit(ms.main(ms.parse_arguments()))
"""
    with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
        cluster = {"worker": [f"127.0.0.1:{x.getsockname()[1]}" for x in (a, b)]}
    first, second = ({"cluster": cluster, "task": {"type": "worker", "index": i}} for i in (0, 1))
    train, runs = f"{LSTM} --dropout 0 --limit 160", []
    for code, task in ([SCRIPT], first), ([SCRIPT], second), (["-c", devices], {}):
        folder = "machines" if task else "devices"
        monkeypatch.setenv("TF_CONFIG", json.dumps(task))
        runs.append(subprocess.Popen([sys.executable, *code, *train.split(), "--run-dir", folder]))
    assert main(f"{train} --run-dir alone") == 0  # TF_CONFIG is {} now
    assert [run.wait(timeout=600) for run in runs] == [0] * 3
    paths = (f"{name}/tweets/lstm/history.csv" for name in ("alone", "machines", "devices"))
    alone, *others = (pd.read_csv(path).drop(columns="seconds") for path in paths)
    np.testing.assert_allclose(others, [alone, alone], atol=1e-4)
    assert sorted(os.listdir("machines/tweets/lstm")) == FILES
    for text in ("x", "[1]", '{"cluster": ["a"]}'):
        monkeypatch.setenv("TF_CONFIG", text)
        refuses(capsys, LSTM, "TF_CONFIG", "unset")
    for text in ("", '{"task": 1}'):
        monkeypatch.setenv("TF_CONFIG", text)
        assert ms.all_devices().num_replicas_in_sync == 1


# ------------------------------------------------------------------- 7 Evaluation and prediction
def test_scores_agree_with_counts_by_hand():
    labels, predicted = np.array([0] * 4 + [2] * 6), np.array([0, 0, 0, 2, 2, 2, 2, 2, 0, 1])
    expected = {"n": 10, "accuracy": 0.7, "low": 0.3968, "high": 0.8922, "macro_f1": 65 / 88}
    assert ms.scores(labels, predicted) == pytest.approx(expected, abs=2e-4)  # F1: 3/4 and 8/11
    first, second = np.repeat([[1, 0, 1, 0], [0, 1, 1, 0]], (10, 2, 5, 4), axis=1) == 1
    assert tuple(ms.mcnemar(first, second).values()) == pytest.approx((10, 2, 0.0433), abs=1e-4)


def test_train_evaluate_and_the_readmes_code(trained, capsys):
    output = pathlib.Path("output").read_text()
    assert "600 tweets read, 600 left" in output and "cores, TensorFlow" in output
    assert pd.read_csv("data/tweets/train_tokenized.csv").shape == (588, 11)
    for run in pathlib.Path("runs", "tweets").iterdir():
        assert sorted(os.listdir(run)) == FILES
        history, metrics = pd.read_csv(run / FILES[2]), json.loads((run / FILES[3]).read_text())
        assert list(history.epoch) == [1, 2, 3] and history.loss[2] < history.loss[0]
        assert metrics["n"] == 6 and metrics["accuracy"] > 0.8
    save("t.csv", '0,1,x,phones,u,sad day\n4,2,x,q,u,happy day\n4,3,x,q,u,sun\n2,4,x,q,u,"a\rb"\n')
    assert main("evaluate --test t.csv") == 0
    readme = SCRIPT.with_name("README.md").read_text()
    for code in re.findall("```python\n(.*?)```", readme, re.DOTALL):  # a groupby, an export
        names = runpy.run_path(save("readme.py", code.replace("crowdflower", "tweets")))
    output, words = capsys.readouterr().out, ("4 tweets of t.csv", "not trained on: {'neutral': 1}")
    assert all(x in output for x in (*words, *ms.MODELS, "McNemar", "they disagree on", "macro_f1"))
    table, ids = pd.read_csv("runs/tweets/predictions.csv"), random_ids(3, 7)
    assert list(table) == ["label", "id", "date", "query", "user", "text", *ms.MODELS]
    assert list(table.label) == ["negative", "positive", "positive"]
    saved = tf.saved_model.load("saved")
    np.testing.assert_allclose(saved.serve(ids), names["model"](ids), atol=1e-5)
    assert main("evaluate --model lstm") == 0
    table = pd.read_csv("runs/tweets/predictions.csv")
    assert list(table) == ["text", "label", "lstm"] and (table.label == table.lstm).mean() > 0.8


def test_what_does_not_fit_is_refused_by_name(trained, monkeypatch, capsys):
    wrong = {"evaluate --run-dir none": "train --model mamba", "evaluate --test no.csv": "no.csv"}
    wrong |= {"predict hi --data-dir none": "first", f"{LSTM} --vocab-size 20": "from 0 to 19"}
    wrong |= {f"{LSTM} --run-dir output": "output", "preprocess --data ./induction": "rename"}
    wrong |= {"preprocess --data no.csv": "no.csv", "evaluate --lengths 9": "induction"}
    wrong |= {"preprocess --data tweets.csv --data-dir output/x": "output"}
    for command, word in wrong.items():
        refuses(capsys, command, word)
    for content, word in (("text,label\nwe work,neutral\n", "no tweet"), ("a,b\n1,2\n", "row 1")):
        refuses(capsys, f"evaluate --model lstm --test {save('t.csv', content)}", "t.csv", word)
    for row, word in (("1,99999,0", "ids"), ("1,x,0", "x'"), ("1,2,7", "label"), ("-1,2,0", "ids")):
        path = save("t.csv", f"0,1,label\n1,2,0\n{row}\n")
        pytest.raises(ms.UserError, ms.read_tokenized, path, ms.Config()).match(f"t.csv: .*{word}")
    with monkeypatch.context() as patch, pytest.raises(NameError):  # a mistake in a block
        patch.setattr(ms.MambaBlock, "build", lambda self, shape: undefined)  # noqa: F821
        main("predict hi")
    harmful = keras.layers.Lambda(lambda x: (os.mkdir("ran"), x)[1], output_shape=(4,))
    keras.Sequential([keras.Input((4,)), harmful]).save("runs/tweets/mamba/model.keras")
    shutil.rmtree("ran", ignore_errors=True)
    refuses(capsys, "predict hi", "model.keras", "Lambda", "train")
    assert not os.path.exists("ran")
    save("tweets.csv", pathlib.Path("tweets.csv").read_text().replace(" ok", " yes"))
    assert main("preprocess --data tweets.csv --tokenizer data/tweets/tokenizer") == 0
    refuses(capsys, "predict hi --model lstm", "trained with other data")


def test_predict_takes_any_bytes(trained, monkeypatch, capsys):
    assert main("predict", "love the great sun today", "awful pain, I cry", "!!! @x") == 0
    output, errors = capsys.readouterr()
    assert re.fullmatch("positive .*\nnegative .*\nnothing left to read .*\n", output)
    assert re.search("data/tweets, .*\nmodels: mamba of runs/tweets\n", errors)
    tweets = [b"great sun", b"", b"\x00\x1b[31m lost\r", b"\xff\xfe\xfd", b"love the caf\xe9"]
    tweets += ["\u202eabc \u05e9 \U0001f642".encode(), b"x" * 1_000_000]
    lines = io.BytesIO(b"\n".join(tweets))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines, "utf-8", "replace", "\n"))
    assert main("predict --model lstm") == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == len(tweets) and all(answer.isprintable() for answer in answers)
    assert re.match("negative .*31m lost$", answers[2]) and re.match("positive .*caf�", answers[4])
    assert main("predict --model ssm") == 0 and capsys.readouterr().out == ""  # no line is left


def test_damaged_files_are_read_or_refused_by_name(trained):
    bad = b"\0", b"\xff\xfe", b'"', b",,,", b"\n\n", b"-5", b"9" * 11, b"{", b"NaN", b"x" * 200_000
    np.savez("checkpoint.npz", "{}", np.zeros(3))
    save("words.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\n##s\n")
    r, predict = np.random.default_rng(0), ms.parse_arguments(["predict"])
    for name, times, read in (
        ("tweets.csv", 60, ms.read_table),
        (save("table.csv", GOOD), 60, ms.read_table),
        ("data/tweets/test_tokenized.csv", 60, lambda x: ms.read_tokenized(x, ms.Config())),
        ("data/tweets/meta.json", 60, lambda _: ms.find_preprocessed(predict)),
        ("words.txt", 60, ms.load_tokenizer),
        ("checkpoint.npz", 10, lambda x: train_tiny(x.parent)),
        ("runs/tweets/mamba/model.keras", 10, lambda _: ms.load_trained(predict)),
    ):
        path, outcomes, whole = pathlib.Path(name), set(), pathlib.Path(name).read_bytes()
        for _ in range(times):
            damaged = bytearray(whole)
            for i in r.integers(len(damaged) + 1, size=r.integers(1, 4)):
                new = bad[r.integers(len(bad))]
                damaged[i : i + r.choice([0, len(new), 1000])] = [new, b""][r.integers(2)]
            try:
                outcomes.add(read(save(path, bytes(damaged))) is not None)
            except ms.UserError as error:
                outcomes.add(path.name in str(error))
        assert outcomes == {True} and save(path, whole), name


# ------------------------------------------------------------------------ 8 Ablation and timing
def test_ablate_trains_each_selection_once(monkeypatch, capsys):
    monkeypatch.setattr(ms, "SELECTIONS", ("none", "C"))
    monkeypatch.setattr(ms, "INDUCTION", dict.fromkeys(["train", "val", "test"], 1000))
    command = "ablate --data induction --max-length 8 --limit 64 --width 8 --depth 1"
    for flag, models in ((" --selection none", ["ablate/none"]), ("", ["ablate/none", "ablate/C"])):
        assert main(command + flag) == 0
        assert list(pd.read_csv("runs/induction/ablate/ablate.csv").model) == models
    assert capsys.readouterr().out.count("resuming") == 1
    shutil.move("runs/induction/ablate/C", "runs/induction/mamba")
    assert main("evaluate --data induction --lengths 20") == 0
    assert list(pd.read_csv("runs/induction/lengths.csv")) == ["model", "20"]
    assert os.path.getsize("runs/induction/ablate/ablate.png") > 9999
    refuses(capsys, "predict hi --data induction", "tokenizer")
    monkeypatch.setattr(ms, "INDUCTION", {"train": 10**13})
    refuses(capsys, "preprocess --data induction", "allocate", "sizes")
    refuses(capsys, "evaluate --data induction --lengths 20 --test x", "--test")


def test_bench_writes_a_table_and_a_figure(monkeypatch):
    monkeypatch.setattr(ms, "build_model", lambda x: ms.TweetClassifier(x, {"width": 8}))
    monkeypatch.setattr(ms, "training_step", lambda *_: lambda rows, ids, labels: tf.ones(2))
    assert main("bench --models lstm --lengths 16 900") == 0
    rows = pd.read_csv("runs/bench/latency.csv")
    assert [*rows.model, *rows.batch] == ["lstm"] * 4 + ["lstm, a training step", 1, 512, 1, 9, 256]
    assert sorted(os.listdir("runs/bench")) == ["latency.csv", "latency.png"]


# ------------------------------------------------------------------------------ 10 Command line
def test_settings_are_flags_and_mistakes_are_named(capsys):
    assert main("--help") == 0 and "what the selection" in capsys.readouterr().out
    for name, default in vars(ms.Config()).items():
        if name != "classes":  # set from the data
            flag = f"--{name.replace('_', '-')}={default}"
            settings = ms.parse_arguments(["ablate", flag]).settings
            assert settings == {name: default} and type(settings[name]) is type(default)
    wrong = {"": "command", "train --model gru": "transformer", "ablate --selection A": "delta+B+C"}
    wrong |= {"train": "--model", "ablate --width x": "--width", "bench --lengths 0": "--lengths"}
    wrong |= {"ablate --dropout 1.5": "must be in [0, 0.99], not 1.5", "ablate --limit -5": "-5"}
    wrong |= {"ablate --dropout nan": "nan", "evaluate --lengths 9999999": "--lengths"}
    for arguments, word in wrong.items():
        refuses(capsys, arguments, word)


def test_script_runs_in_notebooks_services_and_pipes(trained):
    script = f"{sys.executable} {SCRIPT} predict --model lstm"
    options = {"env": os.environ | {"MPLBACKEND": "x"}, "capture_output": True, "text": True}
    os.mkdir("fake")
    save("fake/filelock.py", "import os\nos.kill(os.getpid(), 2)")  # Ctrl-C during the imports
    stopped, closed = f"PYTHONPATH=fake {script} hi || true", f"{script} hi <&- >&- 2>&-"
    for command in (stopped, closed, f"printf 'great sun\n\377b' | {script} | head -1"):
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], check=True, **options)
        assert not re.search("Error|Traceback", done.stderr), done.stderr
    assert done.stdout.startswith("positive")
    code = """
import signal, socket, numpy.random as r
before = r.get_state()[1].tolist(), signal.getsignal(15), socket.getdefaulttimeout()
import mamba_sentiment
assert before == (r.get_state()[1].tolist(), signal.getsignal(15), socket.getdefaulttimeout())
"""
    command = [sys.executable, "-c", code]
    subprocess.run(command, check=True)
    options["env"]["KERAS_BACKEND"] = "jax"
    assert "set KERAS_BACKEND=tensorflow" in subprocess.run(command, check=False, **options).stderr
