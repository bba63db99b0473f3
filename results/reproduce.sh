#!/usr/bin/env bash
# Makes the tables and figures of README.md and results/README.md, except those of a GPU:
#
#     results/reproduce.sh SECTION ...        in the environment that README.md sets up
#
# Sections, with about how long they take on 2 cores: search (1 h), main (4 h), size (1 h),
# selection (1 h), induction (3 h), crowdflower (30 min), fasttext (3 min), state (15 min),
# selected (1 min), bench (2 min), peers (15 min). What is trained is not trained again.
#
# data/ must hold training.1600000.processed.noemoticon.csv (or .xz; downloaded if missing),
# testdata.manual.2009.06.14.csv, and the vocab.txt of bert-base-uncased as bert-vocab.txt.

set -euo pipefail
[ $# -gt 0 ] || sed -n '2,/^$/s/^# \?//p' "$0"
cd "$(dirname "$0")/.."
mkdir -p data runs
export PYTHONPATH=.

mamba() {                                   # a program that was compiled once is not compiled again
    TF_XLA_FLAGS=--tf_xla_persistent_cache_directory=runs/xla python mamba_sentiment.py "$@"
}
tweets() {                                  # train|ablate OPTIONS ...; they preprocess if needed
    mamba "$1" --data sentiment140 --tokenizer data/bert-vocab.txt "${@:2}"
}
train_all() {                               # OPTIONS ...: each model at its rate for all tweets
    for model in mamba ssm lstm; do tweets train --model "$model" --learning-rate 4e-3 "$@"; done
    tweets train --model transformer --learning-rate 2e-3 "$@"
}
peer() {                                    # FUNCTION: in an environment that has the peers, too
    python -m venv .peers
    .peers/bin/pip install -q -r requirements.txt torch==2.13.0 mambapy scikit-learn fasttext-numpy2
    .peers/bin/python results/reproduce.py "$1"
}
search() {                                  # a tenth of the tweets, one epoch, the same grid for all
    for dropout in 0.1 0.2; do for rate in 2e-3 4e-3 8e-3; do
        tweets train --model all --limit 146828 --epochs 1 --learning-rate "$rate" \
            --dropout "$dropout" --run-dir "runs/search/$rate-$dropout"
    done; done
    python results/reproduce.py collect search
}
main() {                                    # all tweets, two epochs; training prints to stderr
    for seed in 0 1 2; do
        train_all --seed "$seed" --run-dir "runs/main/$seed" >&2
        mamba evaluate --data sentiment140 --run-dir "runs/main/$seed"
    done | tee results/evaluation.txt
    python results/reproduce.py collect main
    mamba evaluate --data sentiment140 --run-dir runs/main/0 \
        --test data/testdata.manual.2009.06.14.csv | tee results/manual.txt
}
size() {                                    # the learning curve; 0: all tweets
    for n in 14683 146828 0; do train_all --limit "$n" --epochs 1 --run-dir "runs/size/$n"; done
    python results/reproduce.py collect size
}
selection() {                               # the six selections on a fifth, one epoch, three seeds
    for seed in 0 1 2; do
        tweets ablate --limit 293656 --epochs 1 --seed "$seed" --run-dir "runs/selection/$seed"
    done
    python results/reproduce.py collect selection
}
induction() {                               # trained at 128 tokens, tested at other lengths
    for seed in 0 1 2; do for model in ssm lstm "mamba --selection "{delta+B+C,delta,B+C,none}; do
        run="runs/induction/$seed/${model##* }"         # $model is one word or three
        mamba train --data induction --model $model --seed "$seed" --run-dir "$run"
        mamba evaluate --data induction --run-dir "$run" --lengths 64 128 256 512 1024 4096 16384
    done; done
    python results/reproduce.py induction
}
crowdflower() {                             # the offline default, three seeds, beside TF-IDF
    mamba preprocess --data crowdflower --tokenizer train
    mamba preprocess --data crowdflower --tokenizer data/bert-vocab.txt --data-dir data/bert
    for seed in 0 1 2; do for model in all "mamba --data-dir data/bert" "mamba --dropout "{0.2,0.3}; do
        mamba train --data crowdflower --model $model --seed "$seed" \
            --run-dir "runs/crowdflower/$seed-${model##*[ /]}"
    done; done                              # all: dropout 0.1
    python results/reproduce.py collect crowdflower
    peer tfidf
}
fasttext() {                                # word bigrams, on the same split
    peer train_fasttext | tee results/fasttext.txt
}
state() {                                   # a sequence read in pieces of so many tokens
    { for size in 1 64 4096 1048576; do python results/reproduce.py state "$size"; done
      python results/reproduce.py state 4096 runs/induction/?/delta+B+C/induction/mamba/model.keras
    } | tee results/state.txt                # the last line after induction
}
selected() {                                # what Mamba selects; after induction and main
    python results/reproduce.py selected runs/induction/0/delta+B+C/induction/mamba/model.keras \
        runs/main/0/sentiment140/mamba/model.keras data/sentiment140/tokenizer | tee results/selected.txt
}
bench() {                                   # on a machine that does nothing else
    mamba bench
    cp runs/bench/latency.csv runs/bench/latency.png results
}
peers() {                                   # the same; each in a process of its own
    for comparison in peer_scans peer_steps; do peer "$comparison"; done | tee results/peers.txt
}
for section in "$@"; do "$section"; done
