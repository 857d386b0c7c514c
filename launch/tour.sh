#!/usr/bin/env bash
# The whole story, verb by verb: images without labels to an encoder, numbers, files, a model that answers, a page.
#
#   command    launch/tour.sh                                  built-in scenes, offline
#              DATA=/my/images launch/tour.sh                  your own images; the later chapters stay with scenes
#   hardware   two CPU cores; a GPU is used when there is one
#   time       not yet measured
#   numbers    not yet measured
#
# Stopped anywhere, the same command goes on: every verb resumes, and a finished one returns at once.
set -euo pipefail

OUT=${OUT:-runs/tour}
N=${N:-4096}
TRAIN="scenes:?n=$N&seed=0&size=48&objects=1"
VAL="scenes:?n=$((N / 4))&seed=0&size=48&objects=1&split=val"
PAIRS="scenes:?n=$N&seed=1&size=48&objects=1-3"
DATA=${DATA:-$TRAIN}

echo "1. What can this machine do?"
sslvit doctor
sslvit check-data "$DATA" --output-dir "$OUT/check"

echo "2. Images become an encoder."
sslvit pretrain --output-dir "$OUT/pretrain" data="$DATA" ${PRETRAIN_KEYS:-}

echo "3. How good is it? Beside a random encoder and raw pixels."
sslvit evaluate --encoder "$OUT/pretrain" --train-dataset "$TRAIN" --val-dataset "$VAL" --protocol knn,linear \
    --output-dir "$OUT/evaluate" ${EVALUATE_KEYS:-}

echo "4. Features in a file, and folders that timm and transformers open."
sslvit embed --encoder "$OUT/pretrain" --data "$VAL" --output-file "$OUT/features.npz"
sslvit export "$OUT/pretrain" --output-dir "$OUT/export" --formats timm,hf

echo "5. The encoder learns to answer."
sslvit align --output-dir "$OUT/align" encoder="$OUT/pretrain" data="$PAIRS" ${ALIGN_KEYS:-}

echo "6. A question about an image it has never seen."
python - "$OUT/question.png" <<'PYTHON'
import sys

from PIL import Image

from sslvit.data.sources import open_source

Image.fromarray(open_source("scenes:?n=8&seed=1&size=48&objects=1-3&split=val").read(3)).save(sys.argv[1])
PYTHON
sslvit ask "$OUT/align" --image "$OUT/question.png" --question "How many objects are there?"

echo "7. All of it on one page each."
sslvit report "$OUT/pretrain"
sslvit report "$OUT/align"
