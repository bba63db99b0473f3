#!/usr/bin/env bash
# Makes every table and figure of README.md and results/README.md, but not what ran on a GPU:
#
#     results/reproduce.sh SECTION ...        in the environment that README.md sets up
#
# Sections, with about how long they take on 2 cores: search (1 h), third (4 h), main (4 h), one
# (2 h), size (20 min), selection (3 h), induction (4 h), crowdflower (20 min), fasttext (3 min),
# bench (4 min), profile (2 min), peers (10 min). A section that was interrupted resumes; what is
# trained is not trained again.
#
# data/ must hold training.1600000.processed.noemoticon.csv (or .xz), the vocab.txt of
# bert-base-uncased as bert-vocab.txt, and testdata.manual.2009.06.14.csv; the first two are
# downloaded if missing.
set -euo pipefail
if [ $# = 0 ]; then
    sed -n '2,/^set/p' "$0" | sed '$d'
fi
cd "$(dirname "$0")/.."
mkdir -p runs

# The learning rate of each model for all tweets; results/README.md says how it was chosen.
declare -A rate=([mamba]=4e-3 [ssm]=4e-3 [transformer]=2e-3 [lstm]=4e-3)
models="mamba ssm transformer lstm"

mamba() {                                   # a program that was compiled once is not compiled again
    TF_XLA_FLAGS=--tf_xla_persistent_cache_directory=runs/xla python mamba_sentiment.py "$@"
}

collect() {                                 # FOLDER NAME: metrics of all models -> results/NAME.csv
    python - "$@" <<'END'
import json, pathlib, sys
import pandas as pd
rows = []
for path in sorted(pathlib.Path(sys.argv[1]).rglob("metrics.json")):
    metrics = json.loads(path.read_text())
    rows.append(metrics.pop("config") | metrics)
table = pd.DataFrame(rows)[["model", "selection", "train_sequences", "learning_rate", "dropout",
                            "epochs", "seed", "validation", "accuracy", "low", "high", "macro_f1",
                            "n", "parameters", "train_seconds"]]
table.round(5).to_csv(f"results/{sys.argv[2]}.csv", index=False)
print(table.to_string(index=False))
settings = ["model", "selection", "train_sequences", "learning_rate", "dropout", "epochs"]
print(table.groupby(settings)[["validation", "accuracy"]].agg(["mean", "std", "count"]))
END
}

train_all() {                               # FOLDER OPTIONS ...: each model at its rate
    for model in $models; do
        mamba train --data sentiment140 --model "$model" --learning-rate "${rate[$model]}" \
            --run-dir "$@"
    done
}

search() {                                  # on a tenth of the tweets, one epoch, the same grid
    for dropout in 0.1 0.3; do
        for each in 1e-3 2e-3 4e-3 8e-3; do
            train_all "runs/search/$each-$dropout" --limit 146828 --epochs 1 \
                --learning-rate "$each" --dropout "$dropout"
        done
    done
    collect runs/search search
}

third() {                                   # on a third: the rates again, one to three epochs
    for epochs in 1 2 3; do
        for each in 2e-3 4e-3 8e-3; do
            train_all "runs/third/$each-$epochs" --limit 489427 --epochs "$epochs" \
                --learning-rate "$each"
        done
    done
    collect runs/third third
}

main() {                                    # all tweets, two epochs, three seeds
    for seed in 0 1 2; do
        train_all "runs/main/$seed" --seed "$seed"
    done
    collect runs/main main
    mamba evaluate --data sentiment140 --run-dir runs/main/0 \
        --test data/testdata.manual.2009.06.14.csv | tee results/manual.txt
    for seed in 0 1 2; do
        mamba evaluate --data sentiment140 --run-dir "runs/main/$seed"
    done | tee results/evaluation.txt
}

one() {                                     # all tweets, one epoch, three seeds
    for seed in 0 1 2; do
        train_all "runs/one/$seed" --seed "$seed" --epochs 1
    done
    collect runs/one one
}

size() {                                    # the learning curve; all tweets: one
    for limit in 14683 146828; do
        train_all "runs/size/$limit" --limit "$limit" --epochs 1
    done
    collect runs/size size
}

selection() {                               # the six selections on a fifth, one epoch
    for seed in 0 1 2; do
        mamba ablate --data sentiment140 --limit 293656 --epochs 1 --seed "$seed" \
            --run-dir "runs/selection/$seed"
    done
    collect runs/selection selection
}

induction() {                               # trained on 128 tokens, tested at other lengths
    mamba preprocess --data induction
    mamba ablate --data induction
    for seed in 1 2; do
        for selection in B+C delta delta+B+C; do
            mamba ablate --data induction --selection "$selection" --seed "$seed" \
                --run-dir "runs/seed/$seed"
        done
    done
    for seed in 0 1 2; do
        for model in ssm lstm; do
            mamba train --data induction --model "$model" --seed "$seed" --run-dir "runs/seed/$seed"
        done
    done
    for each in 3e-3 1e-3 3e-4 1e-4; do
        mamba train --data induction --model transformer --learning-rate "$each" \
            --run-dir "runs/transformer/$each"
    done
    python - <<'END'
import json, pathlib
import mamba_sentiment as ms                # first: it sets what TensorFlow prints
import keras, pandas as pd
lengths, rows = [64, 128, 256, 512, 1024, 4096, 16384], []
names = {"ssm": "SSM", "lstm": "LSTM", "transformer": "Transformer"}
for path in sorted(pathlib.Path("runs").rglob("induction/**/model.keras")):
    metrics = json.loads(path.with_name("metrics.json").read_text())
    model, accuracy, config = keras.models.load_model(path), {}, metrics["config"]
    for length in lengths:
        if model.block != "transformer" or length <= 4096:      # memory
            ids, labels = ms.induction_heads(256, length, seed=3)
            answers = ms.predict_logits(model, ids, max(1, 8192 // length)).argmax(1)
            accuracy[str(length)] = float((answers == labels).mean())
    rows.append({"model": names.get(model.block, f"Mamba, selective: {config['selection']}"),
                 "learning_rate": config["learning_rate"], "seed": config["seed"],
                 "device": ms.machine(),
                 "train_seconds": round(metrics["train_seconds"])} | accuracy)
table = pd.DataFrame(rows).drop_duplicates(["model", "learning_rate", "seed"])
table.to_csv("results/induction.csv", index=False)
print(table.to_string(index=False))
chart = table.groupby("model", sort=False)[[*map(str, lengths)]].mean().T.set_axis(lengths)
ms.draw(pathlib.Path("results/induction.png"), "Induction heads, trained at 128 tokens", chart,
        logx=True, xlim=(50, 1e6), xlabel="length", ylabel="accuracy, mean of the runs")
END
}

crowdflower() {                             # the offline default, beside TF-IDF
    mamba preprocess --data crowdflower --tokenizer train
    python -c 'import pathlib, mamba_sentiment as ms
ms.download("bert-base-uncased", pathlib.Path("data"))'
    mamba preprocess --data crowdflower --tokenizer data/bert-vocab.txt --data-dir data/bert
    for seed in 0 1 2; do
        mamba train --data crowdflower --model all --seed "$seed" --run-dir "runs/crowd/$seed"
        mamba train --data crowdflower --model mamba --seed "$seed" --data-dir data/bert \
            --run-dir "runs/crowd/bert-$seed"
    done
    collect runs/crowd crowdflower    # the rows of bert have more parameters
    python -m venv .sklearn
    .sklearn/bin/pip install -q scikit-learn pandas tokenizers
    .sklearn/bin/python - <<'END'
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tokenizers import BertWordPieceTokenizer
tokenizer = BertWordPieceTokenizer.from_file("data/crowdflower/tokenizer/vocab.txt")
texts, labels = {}, {}
for split in ("train", "test"):
    table = pd.read_csv(f"data/crowdflower/{split}_tokenized.csv")
    labels[split] = table.pop("label")
    texts[split] = tokenizer.decode_batch(table.to_numpy().tolist())
words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
model = make_pipeline(words, LogisticRegression(max_iter=1000)).fit(texts["train"], labels["train"])
accuracy = model.score(texts["test"], labels["test"])
print(f"TF-IDF of words and pairs, logistic regression: accuracy {accuracy:.4f}")
END
}

fasttext() {                                # word bigrams, on the same split
    mkdir -p runs/fasttext
    python - <<'END'
import pathlib
import mamba_sentiment as ms
source = ms.download("sentiment140", pathlib.Path("data"))
for split, tweets in ms.clean_and_split(ms.read_tweets(source)).items():
    lines = "__label__" + tweets.label.astype(str) + " " + tweets.text
    for limit in (14683, 146828, len(lines)) if split == "train" else (len(lines),):
        name = split if limit == len(lines) else f"{split}_{limit}"
        pathlib.Path(f"runs/fasttext/{name}.txt").write_text("\n".join(lines[:limit]) + "\n")
END
    python -m venv .fasttext
    .fasttext/bin/pip install -q fasttext-numpy2
    .fasttext/bin/python - <<'END' | tee results/fasttext.txt
import time
import fasttext
for name in ("train_14683", "train_146828", "train"):
    start = time.perf_counter()
    model = fasttext.train_supervised(f"runs/fasttext/{name}.txt", wordNgrams=2, dim=50, epoch=2,
                                      lr=0.2, minCount=3, thread=2, verbose=0)
    seconds = time.perf_counter() - start
    n, accuracy, _ = model.test("runs/fasttext/test.txt")
    print(f"{name}: test accuracy {accuracy:.4f} of {n} tweets, trained in {seconds:.0f} s")
END
}

bench() {                                   # on a machine that does nothing else
    mamba bench
    cp runs/bench/*.csv runs/bench/*.png results
}

profile() {                                 # how much faster Mamba is without each of its parts
    python - <<'END' | tee results/profile.txt
import functools, time
import mamba_sentiment as ms
import numpy as np, tensorflow as tf

def no_scan(u, delta, A, B, C, D, method):
    return u * delta + tf.reduce_sum(B * C, -1, keepdims=True) + D + tf.reduce_sum(A)

changes = {"Mamba": (None, None, None),
           "without the scan": (ms, "selective_scan", no_scan),
           "without the convolution": (ms, "Config", functools.partial(ms.Config, kernel=1)),
           "without dropout": (tf.nn.experimental, "stateless_dropout", lambda x, *_, **__: x)}
ids = tf.random.stateless_uniform((256, 24), (0, 0), 1, ms.Config().vocab_size, tf.int32)
batch = tf.range(256, dtype=tf.int64), ids, tf.zeros(256, tf.int32)
calls = {}
for name, (place, attribute, replacement) in changes.items():
    original = place and getattr(place, attribute)
    if place:
        setattr(place, attribute, replacement)
    model = ms.build_model("mamba")
    step = ms.training_step(model, ms.make_optimizer(model, 1000))
    calls["training step", name] = lambda step=step: step(*batch).numpy()
    calls["inference", name] = lambda model=model: model.logits(ids).numpy()
    for call in list(calls.values())[-2:]:
        call()                              # compiled while the replacement is in place
    if place:
        setattr(place, attribute, original)
delta, A = tf.random.stateless_uniform((2, 256 * 24, 128, 1), (0, 0)), -tf.range(1.0, 17.0)
exponentials = ms.compiled(lambda delta, A: tf.reduce_sum(tf.exp(delta * A), -1))
calls["the exponentials of two layers", "on one core"] = lambda: exponentials(delta, A).numpy()
times = {key: [] for key in calls}
for _ in range(17):
    for key, call in calls.items():
        start = time.perf_counter()
        call()
        times[key].append(1e3 * (time.perf_counter() - start))
print(f"{ms.machine()}; 256 sequences of 24 tokens, medians in milliseconds")
for key, found in times.items():
    print(f"{', '.join(key)}: {np.median(found[2:]):.1f}")
END
}

peers() {                                   # what else can be installed, and ours, in one process
    python -m venv .peers
    .peers/bin/pip install -q -r requirements.txt torch==2.13.0 mambapy
    .peers/bin/python - <<'END' | tee results/peers.txt
import importlib.metadata, itertools, time
import mamba_sentiment as ms
import numpy as np, pandas as pd, tensorflow as tf, torch
from mambapy.pscan import pscan
from transformers import MambaConfig, MambaModel
from transformers.utils import logging
logging.set_verbosity_error()
print(ms.machine(), *(f"{name} {importlib.metadata.version(name)}" for name in
                      ("torch", "mambapy", "transformers")), sep=", ")

def medians(calls, rounds):
    """Median milliseconds of each call; in each round they take turns."""
    times = {name: [] for name in calls}
    for round in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(found[2:])) for name, found in times.items()}

def loop(u, delta, A, B, C, D):
    decay = torch.exp(torch.einsum("bld,dn->bldn", delta, A))
    inflow = torch.einsum("bld,bln,bld->bldn", delta, B, u)
    h, outputs = torch.zeros(len(u), *A.shape), []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + inflow[:, t]
        outputs.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
    return torch.stack(outputs, 1) + u * D

def mambapy(u, delta, A, B, C, D):
    decay = torch.exp(delta.unsqueeze(-1) * A)
    inflow = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
    return (pscan(decay, inflow) @ C.unsqueeze(-1)).squeeze(3) + D * u

def eager_gradient(*inputs):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(tf.square(ms.selective_scan(*inputs)))
    return tape.gradient(loss, inputs)

def torch_gradient(scan, leaves):
    return torch.autograd.grad(scan(*leaves).square().sum(), leaves)

rows = []
shapes = (256, 16), (64, 64), (16, 256), (4, 1024), (1, 4096)
for run, (batch, length) in itertools.product((1, 2, 3), shapes):
    inputs = ms.scan_inputs(batch, length)
    leaves = [torch.tensor(x.numpy(), requires_grad=True) for x in inputs]
    plain = [x.detach() for x in leaves]
    compiled = tf.function(ms.selective_scan, autograph=False)
    gradient = tf.function(lambda *x: ms.scan_gradient(*x, method="auto"), autograph=False)
    forward = {"ours": lambda: compiled(*inputs).numpy(),
               "ours eager": lambda: ms.selective_scan(*inputs).numpy(),
               "mambapy": lambda: mambapy(*plain), "loop": lambda: loop(*plain)}
    both = {"ours": lambda: gradient(*inputs)[0].numpy(),
            "ours eager": lambda: eager_gradient(*inputs)[0].numpy(),
            "mambapy": lambda: torch_gradient(mambapy, leaves)}
    if length <= 64:                        # the loop's gradient takes seconds
        both["loop"] = lambda: torch_gradient(loop, leaves)
    for name, calls in (("forward", forward), ("with gradient", both)):
        if name == "forward":
            with torch.no_grad():
                found = medians(calls, 7)
        else:
            found = medians(calls, 5)
        rows.append({"batch": batch, "length": length, "pass": name, **found,
                     "mambapy / ours": found["mambapy"] / found["ours"],
                     "mambapy / ours eager": found["mambapy"] / found["ours eager"],
                     "loop / ours": found.get("loop", np.nan) / found["ours"], "run": run})
table = pd.DataFrame(rows)
table.round(2).to_csv("results/peers.csv", index=False)
print(table.to_string(index=False, float_format="{:.2f}".format))
medians_of_runs = table.groupby(["batch", "length", "pass"], sort=False).median()
print(medians_of_runs.drop(columns="run").round(2).to_string())

ids = torch.randint(1, 30000, (256, 24))
labels = torch.randint(0, 3, (256,))
config = ms.Config()
steps = {}
for name in ms.MODELS:
    model = ms.build_model(name, config)
    step = ms.training_step(model, ms.make_optimizer(model, 1000))
    batch = (tf.range(256, dtype=tf.int64), tf.constant(ids.numpy(), tf.int32),
             tf.constant(labels.numpy(), tf.int32))
    steps[name] = lambda step=step, batch=batch: step(*batch).numpy()
peer = MambaModel(MambaConfig(vocab_size=30522, hidden_size=64, num_hidden_layers=2, state_size=16,
                              use_mambapy=True))
head = torch.nn.Linear(64, 3)
optimizer = torch.optim.AdamW([*peer.parameters(), *head.parameters()])

def peer_step():
    optimizer.zero_grad()
    pooled = peer(ids, use_cache=False).last_hidden_state.mean(1)
    torch.nn.functional.cross_entropy(head(pooled), labels).backward()
    optimizer.step()

found = medians(steps, 11) | medians({"transformers with mambapy": peer_step}, 3)
print("\na training step of 256 tweets of 24 tokens")
for name, milliseconds in found.items():
    print(f"{name}: {milliseconds:.0f} ms, {256e3 / milliseconds:.0f} tweets/s")
END
}

for section in "$@"; do
    "$section"
done
